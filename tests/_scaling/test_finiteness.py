"""Finiteness of trees, and the choice between two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from _arrays import array
from mpjax import all_finite, select
from mpjax._scaling.finiteness import (
  all_squarable,
  global_norm,
  nonfinite_leaves,
  unsquarable_leaves,
)

FINITE = {
  "empty tree": {},
  "None": None,
  "ints": array([0, 1, 2], jnp.int32),
  "bools": array([1, 1], bool),
  "float0": np.zeros(2, jax.dtypes.float0),
  "typed key": jax.random.key(0),
  "raw key": jax.random.PRNGKey(0),
  "empty array": array(np.zeros((0, 3))),
  "Python numbers": [1, 2.0, 3j, True],
  "string": "name",
  "complex": array([1, 1], jnp.complex64),
  "float8": array([1, 1], jnp.float8_e4m3fn),
  "float64": np.ones(2),
  # A sum of squares would overflow.
  "large": [array([1e30] * 4), array([3e38] * 4)],
  "large float16": array([6e4] * 4, jnp.float16),
  "subnormal": array(1e-45),
}
SPOILED = {
  **{
    f"{value} in {name}": array([1, value], name)
    for value in (np.inf, -np.inf, np.nan)
    for name in ("float32", "bfloat16", "float16")
  },
  "Python float": float("nan"),
  "NumPy float64": np.array([1, np.inf]),
  "0-d": array(np.nan),
  "imaginary part": array([complex(0, np.inf)], jnp.complex64),
  "float8": array([np.nan], jnp.float8_e4m3fn),
}


@pytest.mark.parametrize("tree", FINITE.values(), ids=FINITE.keys())
def test_what_cannot_be_infinite_or_is_not_counts_as_finite(tree):
  result = all_finite(tree)
  assert (result.shape, result.dtype) == ((), bool)
  assert result


@pytest.mark.parametrize("leaf", SPOILED.values(), ids=SPOILED.keys())
def test_one_bad_number_in_any_leaf_is_found(leaf):
  assert not all_finite({"a": jnp.ones(3), "b": [leaf, jnp.arange(2)], "c": None})


@pytest.mark.parametrize("bad", range(20))
def test_a_bad_leaf_is_found_among_many_and_named(bad):
  leaves = [jnp.ones(2) for _ in range(20)]
  leaves[bad] = leaves[bad].at[1].set(jnp.inf)
  assert not all_finite(leaves)
  assert nonfinite_leaves(leaves).tolist() == [i == bad for i in range(20)]


def test_leaves_that_are_not_floats_keep_their_place():
  tree = [jnp.arange(2), jnp.float32(jnp.nan), None, jax.random.key(0)]
  assert nonfinite_leaves(tree).tolist() == [False, True, False]
  assert nonfinite_leaves(None).shape == (0,)


def test_finiteness_is_tested_under_jit_and_vmap():
  x = jnp.array([[1.0, 2.0], [1.0, jnp.nan]])
  assert jax.vmap(all_finite)(x).tolist() == [True, False]
  assert not jax.jit(all_finite)(x)


@pytest.mark.parametrize("choose", [select, jax.jit(select)], ids=["eager", "jit"])
def test_select_chooses_and_never_multiplies(choose):
  bad, good = {"w": jnp.array([jnp.nan, jnp.inf])}, {"w": jnp.array([1.0, -0.0])}
  kept = choose(jnp.array(False), bad, good)["w"]
  assert np.asarray(kept).tobytes() == np.asarray(good["w"]).tobytes()
  primitives = {eqn.primitive.name for eqn in jax.make_jaxpr(select)(True, bad, good).eqns}
  assert "mul" not in primitives


@pytest.mark.parametrize("pred", [True, False])
def test_select_keeps_structure_and_dtypes(pred):
  def tree(n):
    return {
      "f16": jnp.full((2,), n, jnp.float16),
      "int": jnp.int32(n),
      "bool": jnp.array(n == 1),
      "key": jax.random.key(n),
      "float0": np.zeros(2, jax.dtypes.float0),
      "complex": jnp.full((2,), n, jnp.complex64),
      "none": None,
      "name": "adam",
      "python": n,
      "state": nnx.State({"w": nnx.Param(jnp.full((2,), n, jnp.bfloat16))}),
    }

  out = select(jnp.array(pred), tree(1), tree(2))
  expected = tree(1 if pred else 2)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  assert out["f16"].dtype == jnp.float16
  assert out["int"] == expected["int"]
  assert out["bool"] == expected["bool"]
  assert jax.random.key_data(out["key"]).tolist() == jax.random.key_data(expected["key"]).tolist()
  assert out["state"]["w"].dtype == jnp.bfloat16
  assert out["python"] == expected["python"]


def test_select_of_the_same_object_adds_nothing_to_the_jaxpr():
  jaxpr = jax.make_jaxpr(lambda p, x: select(p, {"x": x}, {"x": x}))(True, jnp.ones(2))
  assert not jaxpr.eqns


def test_select_names_what_differs():
  with pytest.raises(ValueError, match=r"Only where the predicate is true: b. Only .* false: c"):
    select(True, {"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})
  with pytest.raises(ValueError, match="same structure"):
    select(True, [jnp.ones(1)], (jnp.ones(1),))
  with pytest.raises(ValueError, match=r"Leaf 'a/0' is bf16\[2\] where .* true and f32\[2\] where"):
    select(True, {"a": [jnp.ones(2, jnp.bfloat16)]}, {"a": [jnp.ones(2)]})
  with pytest.raises(ValueError, match=r"Leaf 'f' is 'x' where .* 'y' where"):
    select(True, {"f": "x"}, {"f": "y"})


# What can be squared ------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", SPOILED.values(), ids=SPOILED.keys())
def test_what_is_not_finite_cannot_be_squared(tree):
  assert not all_squarable([jnp.ones(2), tree])


@pytest.mark.parametrize("tree", [tree for name, tree in FINITE.items() if name != "large"])
def test_what_is_finite_and_not_huge_can_be_squared(tree):
  assert all_squarable(tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float64"])
def test_what_can_be_squared_has_a_finite_sum_of_squares(dtype):
  with jax.enable_x64(True):
    most = 2.0 ** (510 if dtype == "float64" else 62)
    fits, large = jnp.asarray([1, most], dtype), jnp.asarray([1, 8 * most], dtype)
    many = jnp.full(64, most, dtype)
    assert list(unsquarable_leaves([fits, large, 1, many])) == [False, True, False, True]
    assert jnp.isfinite(jnp.sum(2 * fits**2))


def test_a_norm_is_finite_if_all_leaves_can_be_squared():
  large = [jnp.float32(1.8e19)] * 100
  assert all_squarable(large)
  np.testing.assert_allclose(global_norm(large), 1.8e20, rtol=1e-6)
  assert global_norm([*large, jnp.float32(1.9e19)]) == jnp.inf
  small = [jnp.float32(2e-18)] * 4
  np.testing.assert_allclose(global_norm(small), 4e-18, rtol=1e-6)
  assert global_norm({}) == 0
  mixed = {"a": jnp.full(4, 300, jnp.float16), "b": jnp.array([3 + 4j]), "n": jnp.arange(3)}
  np.testing.assert_allclose(global_norm(mixed), np.sqrt(4 * 300.0**2 + 25), rtol=1e-6)
