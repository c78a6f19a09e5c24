"""What a cast makes of each kind of leaf: the table is the specification."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from _arrays import array
from mpjax import cast_floating

BF16 = np.dtype(jnp.bfloat16)

CAST = {
  "float32": lambda: jnp.ones(2),
  "float16": lambda: jnp.ones(2, jnp.float16),
  "scalar array": lambda: jnp.float32(1),
  "weak float": lambda: jnp.asarray(1.0),
  "empty": lambda: jnp.ones((0, 3)),
  "numpy float32": lambda: np.ones(2, np.float32),
  "numpy float16": lambda: np.ones(2, np.float16),
  "numpy scalar": lambda: np.float32(1.5),
  "numpy read-only": lambda: np.broadcast_to(np.float32(1), (2, 2)),
  "ShapeDtypeStruct": lambda: jax.ShapeDtypeStruct((2,), jnp.float32),
}
UNTOUCHED = {
  "already bfloat16": lambda: jnp.ones(2, jnp.bfloat16),
  "numpy bfloat16": lambda: np.ones(2, jnp.bfloat16),
  "int32": lambda: jnp.arange(2),
  "uint8 image": lambda: np.full((2, 2, 3), 255, np.uint8),
  "int4": lambda: jnp.ones(2, jnp.int4),
  "bool": lambda: jnp.ones(2, bool),
  "typed key": lambda: jax.random.key(0),
  "raw key": lambda: jax.random.PRNGKey(0),
  "complex64": lambda: jnp.ones(2, jnp.complex64),
  "float8": lambda: jnp.ones(2, jnp.float8_e4m3fn),
  "float64": lambda: np.ones(2, np.float64),
  "numpy float64 scalar": lambda: np.float64(0.1),
  "numpy int scalar": lambda: np.int64(2**53 + 1),
  "float0": lambda: np.zeros(2, jax.dtypes.float0),
  "int ShapeDtypeStruct": lambda: jax.ShapeDtypeStruct((2,), jnp.int32),
  "Python float": lambda: 0.1,
  "Python int": lambda: 2049,
  "Python bool": lambda: True,
  "Python complex": lambda: 1j,
  "string": lambda: "name",
  "object": object,
  "function": lambda: jnp.sin,
  "dtype": lambda: jnp.float32,
}


@pytest.mark.parametrize("make", CAST.values(), ids=CAST.keys())
def test_a_float_leaf_is_cast_and_keeps_its_kind(make):
  leaf = make()
  cast = cast_floating({"x": leaf}, "bfloat16")["x"]
  assert cast.dtype == BF16
  assert cast.shape == leaf.shape
  for kind in (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct):
    assert isinstance(cast, kind) == isinstance(leaf, kind) or kind is np.generic


@pytest.mark.parametrize("make", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_any_other_leaf_comes_back_as_the_same_object(make):
  leaf = make()
  assert cast_floating([leaf, None], "bfloat16")[0] is leaf


def test_a_numpy_scalar_stays_a_numpy_scalar():
  cast = cast_floating(np.float32(1.5), "float16")
  assert isinstance(cast, np.float16)


def test_a_numpy_overflow_is_inf_without_a_warning():
  assert np.isinf(cast_floating(np.float32(1e6), "float16"))


def test_a_cast_float_is_strongly_typed():
  assert not cast_floating(jnp.asarray(1.0), "bfloat16").weak_type


def test_float_targets_beyond_the_compute_precision_survive_as_integers():
  batch = {"label": jnp.array([2049, 4097]), "target": np.array([2049.0, 4097.0])}
  cast = cast_floating(batch, "bfloat16")
  np.testing.assert_array_equal(cast["label"], [2049, 4097])
  np.testing.assert_array_equal(cast["target"], [2049.0, 4097.0])


def test_a_sharding_survives():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = NamedSharding(mesh, P("x"))
  array = jax.device_put(jnp.ones(8), sharding)
  assert cast_floating(array, "bfloat16").sharding.is_equivalent_to(sharding, 1)
  struct = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
  assert cast_floating(struct, "bfloat16").sharding == sharding


def test_an_nnx_state_keeps_its_variables_and_their_metadata():
  class Model(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.ones(2), note="kept")
      self.mean = nnx.BatchStat(jnp.ones(2))
      self.rngs = nnx.Rngs(0)

  state = nnx.state(Model())
  cast = cast_floating(state, "bfloat16")
  assert isinstance(cast, nnx.State)
  assert isinstance(cast["w"], nnx.Param)
  assert cast["w"].get_metadata()["note"] == "kept"
  assert cast["w"].dtype == BF16
  assert isinstance(cast["mean"], nnx.BatchStat)
  assert cast["rngs"]["default"]["key"].dtype == state["rngs"]["default"]["key"].dtype
  assert cast["rngs"]["default"]["count"].dtype == jnp.uint32
  assert state["w"].dtype == jnp.float32


def test_containers_keep_their_types():
  tree = flax.core.freeze({"a": (jnp.ones(1), [jnp.ones(1)], None)})
  cast = cast_floating(tree, "bfloat16")
  assert jax.tree.structure(cast) == jax.tree.structure(tree)
  assert isinstance(cast, flax.core.FrozenDict)


def test_a_cast_works_under_jit_vmap_grad_and_eval_shape():
  def f(x):
    return cast_floating({"x": x, "n": jnp.arange(2)}, "bfloat16")

  x = jnp.ones((3, 2))
  assert jax.jit(f)(x)["x"].dtype == BF16
  assert jax.vmap(f)(x)["x"].dtype == BF16
  assert jax.eval_shape(f, x)["x"].dtype == BF16
  grad = jax.grad(lambda x: jnp.sum(cast_floating(x, "bfloat16").astype(jnp.float32)))(x)
  assert grad.dtype == jnp.float32


def test_a_target_that_is_no_policy_format_is_refused():
  with pytest.raises(ValueError, match="must be one of"):
    cast_floating(jnp.ones(1), "float64")


names = st.sampled_from(["float32", "bfloat16", "float16"])
leaves = st.sampled_from(
  [array([1, 1]), np.ones(2, np.float16), array([0, 1], np.int32), 0.5, "name"]
)
trees = st.recursive(
  leaves,
  lambda t: st.lists(t, max_size=3) | st.dictionaries(st.sampled_from("abc"), t),
  max_leaves=6,
)


@given(trees, names)
def test_a_cast_is_idempotent_and_keeps_the_structure(tree, dtype):
  once = cast_floating(tree, dtype)
  assert jax.tree.structure(once) == jax.tree.structure(tree)
  twice = cast_floating(once, dtype)
  assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True))
