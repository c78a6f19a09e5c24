"""`apply_policy` on Linen modules: every way of running one, and what stays as it was."""

import copy
import functools
import pickle
from typing import Any

import cloudpickle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import _backends
import mpjax
from _arrays import array
from _jaxprs import contractions, primitives, result_dtypes, wide_contractions
from zoo.cases import case, filled
from zoo.linen_models import ResNet, Transformer

# Flax's norms mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

BF16 = "mixed_bfloat16"
TOKENS = array(np.zeros((2, 5)), jnp.int32)


class MLP(nn.Module):
  """Two layers with dropout and a method besides `__call__`."""

  dtype: Any = None

  def setup(self):
    self.hidden = nn.Dense(8, dtype=self.dtype)
    self.head = nn.Dense(3, dtype=self.dtype)
    self.dropout = nn.Dropout(0.5)

  def encode(self, x, train=False):
    return self.dropout(nn.relu(self.hidden(x)), deterministic=not train)

  def __call__(self, x, train=False):
    return self.head(self.encode(x, train))


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (4, 6))


@pytest.fixture
def plain():
  return MLP()


@pytest.fixture
def mixed(plain):
  return mpjax.apply_policy(plain, BF16)


@pytest.fixture
def variables(plain, x):
  return plain.init(jax.random.key(1), x)


def assert_same_bits(ours, plain):
  assert jax.tree.structure(ours) == jax.tree.structure(plain)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    assert a.dtype == b.dtype
    _backends.assert_same_bits(a, b)


def dot_dtypes(fn, *args):
  return {found.factors for found in contractions(jax.make_jaxpr(fn)(*args))}


NARROW = {("bfloat16", "bfloat16")}
WIDE = {("float32", "float32")}


def test_the_result_is_a_module_of_the_same_class_name_and_fields(plain, mixed):
  assert isinstance(mixed, MLP)
  assert type(mixed).__name__ == "MLP"
  assert mixed.dtype is None
  assert mpjax.apply_policy(plain, BF16) == mixed
  assert hash(mpjax.apply_policy(plain, BF16)) == hash(mixed)
  assert mixed.clone(dtype=jnp.float32).dtype == jnp.float32


def configured(cls):
  """What diffusers does to its models: an `__init__` that sets more than the fields."""
  init = cls.__init__

  @functools.wraps(init)
  def __init__(self, *args, **kwargs):
    self.register(*args, **kwargs)
    init(self, *args, **kwargs)

  cls.__init__ = __init__
  return cls


class Register:
  """A base that is no module, whose method runs before the module is made."""

  def register(self, features=3, **_):
    self.config = {"features": features}


@configured
class Configured(nn.Module, Register):
  """Reads what its wrapped `__init__` set."""

  features: int = 3

  def setup(self):
    self.head = nn.Dense(self.config["features"])

  def init_weights(self, rng):
    return self.init(rng, jnp.ones((1, 6)))["params"]

  def __call__(self, x):
    return self.head(x)


def test_a_model_whose_init_sets_more_than_its_fields_keeps_it(x):
  mixed = mpjax.apply_policy(Configured(5), BF16)
  variables = {"params": mixed.init_weights(jax.random.key(0))}
  assert wide_contractions(jax.make_jaxpr(mixed.apply)(variables, x), "bfloat16") == []
  assert mixed.apply(variables, x, method=lambda module, x: module.head(x)).shape == (4, 5)


def test_under_an_all_float32_policy_a_module_computes_what_the_plain_one_does(plain, variables, x):
  wide = mpjax.apply_policy(plain, "float32")
  assert_same_bits(wide.init(jax.random.key(1), x), variables)
  assert str(jax.make_jaxpr(wide.apply)(variables, x)) == str(
    jax.make_jaxpr(plain.apply)(variables, x)
  )
  assert_same_bits(
    wide.apply(variables, x, method=lambda module, x: module.head(module.hidden(x))),
    plain.apply(variables, x, method=lambda module, x: module.head(module.hidden(x))),
  )


def test_init_gives_the_same_bits_as_the_plain_model(plain, mixed, variables, x):
  assert_same_bits(mixed.init(jax.random.key(1), x), variables)
  assert_same_bits(jax.jit(mixed.init)(jax.random.key(1), x), variables)
  out, made = mixed.init_with_output(jax.random.key(1), x)
  assert_same_bits(made, variables)
  assert out.dtype == jnp.float32


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_init_of_a_whole_model_traces_to_the_same_shapes(name):
  found = case(name, "linen")
  args = jax.random.key(0), found.batch(0).inputs
  ours = jax.eval_shape(mpjax.apply_policy(found.module(), BF16).init, *args)
  assert ours == jax.eval_shape(found.module().init, *args)


def test_param_dtype_decides_how_parameters_are_stored(plain, x):
  model = mpjax.apply_policy(plain, "params=bfloat16, compute=bfloat16, output=float32")
  made = model.init(jax.random.key(1), x)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {"bfloat16"}
  assert model.apply(made, x).dtype == jnp.float32


@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16"])
def test_results_have_the_output_dtype(plain, variables, x, output):
  model = mpjax.apply_policy(plain, f"params=float32, compute=bfloat16, output={output}")
  assert model.apply(variables, x).dtype.name == output


def test_apply_runs_narrow_and_close_to_the_plain_model(plain, mixed, variables, x):
  assert dot_dtypes(mixed.apply, variables, x) == NARROW
  np.testing.assert_allclose(mixed.apply(variables, x), plain.apply(variables, x), atol=0.05)


@pytest.mark.parametrize(
  "method",
  ["encode", MLP.encode, lambda module, x: module.encode(x) * 2],
  ids=["name", "function", "lambda"],
)
def test_other_methods_run_under_the_policy(plain, mixed, variables, x, method):
  run = lambda model: lambda v, x: model.apply(v, x, method=method)
  assert dot_dtypes(run(mixed), variables, x) == NARROW
  np.testing.assert_allclose(run(mixed)(variables, x), run(plain)(variables, x), atol=0.05)


def test_a_method_of_the_wrapped_instance_runs_under_the_policy(mixed, variables, x):
  assert dot_dtypes(lambda v, x: mixed.apply(v, x, method=mixed.encode), variables, x) == NARROW


def test_init_takes_a_method_too(plain, mixed, x):
  ours = mixed.init(jax.random.key(1), x, method="encode")
  assert_same_bits(ours, plain.init(jax.random.key(1), x, method="encode"))


def test_bind_runs_under_the_policy(mixed, variables, x):
  assert dot_dtypes(lambda v, x: mixed.bind(v)(x), variables, x) == NARROW
  assert dot_dtypes(lambda v, x: mixed.bind(v).encode(x), variables, x) == NARROW


def test_tabulate_prints_the_table_of_the_plain_model_under_its_policy(plain, mixed, x):
  ours, theirs = (model.tabulate(jax.random.key(0), x) for model in (mixed, plain))
  assert ours == f"\nPolicy: mixed_bfloat16{theirs}"
  assert "kernel" in ours


def test_dropout_draws_the_same_mask(plain, mixed, variables, x):
  def zeros(model):
    rngs = {"dropout": jax.random.key(3)}
    return model.apply(variables, x, True, method="encode", rngs=rngs) == 0

  np.testing.assert_array_equal(zeros(mixed), zeros(plain))


def test_keyword_and_static_arguments_pass(mixed, variables, x):
  out = mixed.apply(variables, x=x, train=True, rngs={"dropout": jax.random.key(0)})
  assert out.shape == (4, 3)


def test_a_missing_rng_is_flaxs_own_error(mixed, variables, x):
  with pytest.raises(Exception, match="dropout"):
    mixed.apply(variables, x, train=True)


def test_batch_statistics_arrive_in_float32():
  plain = case("resnet", "linen").module()
  pictures = case("resnet", "linen").batch(0).inputs
  shapes = jax.eval_shape(plain.init, jax.random.key(0), pictures)
  variables = jax.device_put(filled(shapes, 0))
  update = lambda model: jax.jit(lambda v: model.apply(v, pictures, mutable=["batch_stats"])[1])
  ours = update(mpjax.apply_policy(plain, BF16))(variables)
  truth = update(plain)(variables)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), ours, truth)
  before = jax.tree.leaves(variables["batch_stats"])
  assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), before, strict=True))


def test_without_mutable_statistics_are_read_only():
  model = mpjax.apply_policy(ResNet(), BF16)
  pictures = jnp.ones((2, 8, 8, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), pictures)
  variables = jax.device_put(filled(shapes, 0))
  assert model.apply(variables, pictures, train=False).shape == (2, 10)
  with pytest.raises(Exception, match="batch_stats"):
    model.apply(variables, pictures)


def test_sown_intermediates_arrive():
  class Sower(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4)(x)
      self.sow("intermediates", "hidden", x)
      return x.sum()

  x = jnp.ones((2, 3))
  model = mpjax.apply_policy(Sower(), BF16)
  variables = Sower().init(jax.random.key(0), x)
  _, sown = model.apply({"params": variables["params"]}, x, mutable="intermediates")
  assert sown["intermediates"]["hidden"][0].shape == (2, 4)
  _, captured = model.apply({"params": variables["params"]}, x, capture_intermediates=True)
  assert "Dense_0" in captured["intermediates"]


def test_gradients_are_float32(mixed, variables, x):
  grads = jax.grad(lambda v: mixed.apply(v, x).sum())(variables)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
  assert jax.tree.structure(grads) == jax.tree.structure(variables)


def test_checkpoints_are_interchangeable(plain, mixed, variables, x):
  made = mixed.init(jax.random.key(1), x)
  restored = serialization.from_bytes(made, serialization.to_bytes(variables))
  assert_same_bits(restored, serialization.from_bytes(variables, serialization.to_bytes(made)))
  np.testing.assert_array_equal(mixed.apply(restored, x), mixed.apply(variables, x))
  np.testing.assert_array_equal(plain.apply(restored, x), plain.apply(variables, x))


# Inside other modules ----------------------------------------------------------------------------


class Compact(nn.Module):
  """A wrapped submodule made in a compact method, beside a plain one."""

  policy: Any = "float32"

  @nn.compact
  def __call__(self, x):
    x = mpjax.apply_policy(MLP(name="inner"), self.policy)(x)
    return nn.Dense(2, name="outer")(x)


class Setup(nn.Module):
  """The same in `setup`."""

  policy: Any = "float32"

  def setup(self):
    self.inner = mpjax.apply_policy(MLP(), self.policy)
    self.outer = nn.Dense(2)

  def __call__(self, x):
    return self.outer(self.inner(x))


class Given(nn.Module):
  """The same with the submodule as a field."""

  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name="outer")(self.inner(x))


HOSTS = {
  "compact": Compact,
  "setup": Setup,
  "field": lambda policy="float32": Given(mpjax.apply_policy(MLP(), policy)),
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
def test_a_wrapped_submodule_keeps_paths_and_bits_and_runs_narrow(host, x):
  variables = host().init(jax.random.key(0), x)
  assert_same_bits(host(BF16).init(jax.random.key(0), x), variables)
  found = contractions(jax.make_jaxpr(host(BF16).apply)(variables, x))
  assert [dot.factors[0] for dot in found] == ["bfloat16", "bfloat16", "float32"]
  np.testing.assert_allclose(host(BF16).apply(variables, x), host().apply(variables, x), atol=0.05)


def test_a_wrapped_module_inside_a_wrapped_module_keeps_its_own_policy(x):
  outer = mpjax.apply_policy(Compact("mixed_float16"), BF16)
  variables = Compact().init(jax.random.key(0), x)
  found = contractions(jax.make_jaxpr(outer.apply)(variables, x))
  assert [dot.factors[0] for dot in found] == ["float16", "float16", "bfloat16"]


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
@pytest.mark.parametrize("around", ["module", "loss", "both"])
def test_the_innermost_policy_governs_float32_included(host, around, x):
  model, variables = host("float32"), host().init(jax.random.key(0), x)
  if around != "loss":
    model = mpjax.apply_policy(model, BF16)
  fn = lambda variables, x: model.apply(variables, x).sum()
  fn = mpjax.autocast(fn, BF16) if around != "module" else fn
  found = contractions(jax.make_jaxpr(jax.grad(fn))(variables, x))
  assert [dot.factors[0] for dot in found[:3]] == ["float32", "float32", "bfloat16"]
  assert sum(dot.factors == ("float32", "float32") for dot in found) == 5  # and their gradients
  assert_same_bits(model.init(jax.random.key(0), x), variables)


def test_a_policy_inside_float32_inside_a_policy_governs_its_own_module(x):
  inner = mpjax.apply_policy(nn.Dense(6, name="innermost"), "mixed_float16")
  wide = mpjax.apply_policy(nn.Sequential([nn.Dense(6), inner]), "float32")
  model = mpjax.apply_policy(nn.Sequential([wide, nn.Dense(2)]), BF16)
  variables = model.init(jax.random.key(0), x)
  found = contractions(jax.make_jaxpr(model.apply)(variables, x))
  assert [dot.factors[0] for dot in found] == ["float32", "float16", "bfloat16"]


def test_one_wrapped_module_called_twice_shares_its_parameters(x):
  class Twice(nn.Module):
    policy: Any

    @nn.compact
    def __call__(self, x):
      layer = mpjax.apply_policy(nn.Dense(6), self.policy)
      return layer(layer(x))

  variables = Twice("float32").init(jax.random.key(0), x)
  assert_same_bits(Twice(BF16).init(jax.random.key(0), x), variables)
  assert dot_dtypes(Twice(BF16).apply, variables, x) == NARROW


class Layer(nn.Module):
  """A layer with the signature that `nn.scan` wants."""

  policy: Any = None

  @nn.compact
  def __call__(self, x, _):
    layer = nn.Dense(6)
    return jnp.tanh((mpjax.apply_policy(layer, self.policy) if self.policy else layer)(x)), None


class Stack(nn.Module):
  """Layers under `nn.scan`, with or without `nn.remat`."""

  policy: Any = None
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
    scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(self.policy)(x, None)[0]


@pytest.mark.quick
@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan_of_remat"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_lifted_transforms_compose_with_a_wrapped_module(remat, where, x):
  plain = Stack(remat=remat)
  mixed = Stack(BF16, remat) if where == "inside" else mpjax.apply_policy(plain, BF16)
  variables = jax.jit(plain.init)(jax.random.key(0), x)
  assert_same_bits(jax.jit(mixed.init)(jax.random.key(0), x), variables)
  loss = lambda model: lambda v: (model.apply(v, x) ** 2).sum()
  jaxpr = jax.make_jaxpr(jax.grad(loss(mixed)))(variables)
  assert wide_contractions(jaxpr, "bfloat16") == []
  assert primitives(jaxpr)["scan"] == 2
  ours, truth = (jax.jit(jax.grad(loss(model)))(variables) for model in (mixed, plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), ours, truth)


@pytest.mark.parametrize("transform", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_the_class_of_a_wrapped_module_can_be_lifted(transform, x):
  class Host(nn.Module):
    policy: Any = "float32"

    @nn.compact
    def __call__(self, x):
      return mpjax.apply_policy(transform(nn.Dense)(6, name="layer"), self.policy)(x)

  variables = Host().init(jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(jax.grad(lambda v: Host(BF16).apply(v, x).sum()))(variables)
  assert wide_contractions(jaxpr, "bfloat16") == []


def test_vmap_over_wrapped_modules_splits_parameters(x):
  class Heads(nn.Module):
    policy: Any = "float32"

    @nn.compact
    def __call__(self, x):
      heads = nn.vmap(
        MLP, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
      )
      return mpjax.apply_policy(heads(), self.policy)(x)

  variables = Heads().init(jax.random.key(0), x)
  assert_same_bits(Heads(BF16).init(jax.random.key(0), x), variables)
  assert dot_dtypes(Heads(BF16).apply, variables, x) == NARROW


# Layers with a dtype of their own, and rules -----------------------------------------------------


def test_a_policy_overrides_the_dtype_that_a_model_gives_its_layers(x):
  model = MLP(dtype=jnp.float32)
  variables = model.init(jax.random.key(0), x)
  assert dot_dtypes(mpjax.apply_policy(model, BF16).apply, variables, x) == NARROW


@pytest.mark.parametrize("dtype", [None, jnp.float32], ids=["no_dtype", "float32_dtype"])
def test_a_rule_keeps_a_module_float32(dtype, x):
  model = MLP(dtype=dtype)
  variables = model.init(jax.random.key(0), x)
  mixed = mpjax.apply_policy(model, mpjax.PolicyMap({"head": "float32"}, default=BF16))
  found = contractions(jax.make_jaxpr(mixed.apply)(variables, x))
  assert [dot.factors[0] for dot in found] == ["bfloat16", "float32"]


def test_a_rule_governs_forward_and_backward_of_all_beneath_it():
  model = Transformer(depth=2)
  policy = mpjax.PolicyMap({r"blocks_0": "float32"}, default=BF16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  params = jax.device_put(filled(shapes, 0))
  fraction = []
  for mixed in (model, mpjax.apply_policy(model, policy), mpjax.apply_policy(model, BF16)):
    loss = lambda params, mixed=mixed: mixed.apply(params, TOKENS).sum()
    found = contractions(jax.make_jaxpr(jax.grad(loss))(params))
    fraction.append(sum(dot.factors == ("float32", "float32") for dot in found))
  every, by_rule, none = fraction
  assert none == 0
  assert 0 < by_rule < every


def test_all_modules_under_a_float32_rule_are_float32_bit_for_bit(plain, variables, x):
  policy = mpjax.PolicyMap({"hidden|head|dropout": "float32"}, default="p=f32,c=bf16,o=f32")
  mixed = mpjax.apply_policy(plain, policy)
  assert dot_dtypes(mixed.apply, variables, x) == WIDE
  assert_same_bits(mixed.apply(variables, x), plain.apply(variables, x))


def test_a_rule_that_matches_no_module_lists_the_paths(plain, variables, x):
  mixed = mpjax.apply_policy(plain, mpjax.PolicyMap({"haed": "float32"}, default=BF16))
  with pytest.raises(ValueError, match=r"'haed' matched no module.*head.*hidden"):
    mixed.apply(variables, x)


def test_a_policy_is_replaced_by_another(mixed, variables, x):
  again = mpjax.apply_policy(mixed, "mixed_float16")
  assert dot_dtypes(again.apply, variables, x) == {("float16", "float16")}


def test_apply_policy_refuses_what_is_no_module():
  with pytest.raises(TypeError, match="Linen module or an NNX model; got function"):
    mpjax.apply_policy(lambda x: x, BF16)


def test_jit_traces_once_for_equal_modules(plain, variables, x):
  traces = []

  @jax.jit
  def run(v, x):
    traces.append(1)
    return mpjax.apply_policy(plain, BF16).apply(v, x)

  run(variables, x)
  run(variables, x)
  assert len(traces) == 1
  static = jax.jit(lambda model, v, x: model.apply(v, x), static_argnums=0)
  static(mpjax.apply_policy(plain, BF16), variables, x)
  static(mpjax.apply_policy(plain, BF16), variables, x)
  assert static._cache_size() == 1


def test_a_norm_hands_narrow_values_on():
  class Norms(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2)(jnp.tanh(nn.LayerNorm()(nn.Dense(8)(x))))

  x = jnp.ones((2, 6))
  variables = Norms().init(jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(mpjax.apply_policy(Norms(), BF16).apply)(variables, x)
  assert result_dtypes(jaxpr, "tanh") == {"bfloat16"}
  assert result_dtypes(jaxpr, "rsqrt") == {"float32"}


def test_a_convolution_over_frequencies_hands_narrow_values_on():
  """Complex numbers run as they were traced, and what came in as 16 bits leaves in 16."""

  class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
      w = self.param("w", nn.initializers.normal(), (8, 8)).astype(jnp.complex64)
      return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) @ w, x.shape[1], axis=1)

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(8)(nn.relu(Spectral()(nn.Dense(8)(x))))

  x = jnp.ones((2, 6, 8))
  variables = Block().init(jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(mpjax.apply_policy(Block(), BF16).apply)(variables, x)
  assert result_dtypes(jaxpr, "max") == {"bfloat16"}


# A policy that is replaced, taken away, seen, and pickled -----------------------------------------


class Empty(nn.Module):
  """A module without fields."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x)


@pytest.mark.parametrize("policy", [BF16, mpjax.PolicyMap({"head": "float32"}, default=BF16)])
def test_float32_takes_a_policy_away(plain, policy, variables, x):
  again = mpjax.apply_policy(mpjax.apply_policy(plain, policy), "float32")
  assert isinstance(again, MLP) and again == mpjax.apply_policy(plain, "float32")
  assert dot_dtypes(again.apply, variables, x) == WIDE


def test_float32_takes_a_policy_away_inside_another_module(x):
  class Host(nn.Module):
    policies: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(3, name="layer")
      for policy in self.policies:
        layer = mpjax.apply_policy(layer, policy)
      return layer(x)

  plain = Host(())
  variables = plain.init(jax.random.key(0), x)
  for policies, found in (((BF16, "float32"), WIDE), ((BF16, "float32", BF16), NARROW)):
    assert_same_bits(Host(policies).init(jax.random.key(0), x), variables)
    assert dot_dtypes(Host(policies).apply, variables, x) == found


def test_policy_of_a_module_is_its_own_policy(plain, mixed):
  rules = mpjax.PolicyMap({"head": "float32"}, default=BF16)
  assert mpjax.policy_of(mixed) == mpjax.Policy.parse(BF16)
  assert mpjax.policy_of(mpjax.apply_policy(plain, rules)) == rules
  assert mpjax.policy_of(mixed.clone()) == mpjax.Policy.parse(BF16)
  assert mpjax.policy_of(plain) is None
  assert mpjax.policy_of(mpjax.apply_policy(plain, "float32")) == mpjax.Policy.parse("float32")


def test_policy_of_a_function_is_what_autocast_was_given():
  fn = lambda w: w
  cast = mpjax.autocast(fn, BF16)
  assert mpjax.policy_of(cast) == mpjax.Policy.parse(BF16)
  assert mpjax.policy_of(jax.jit(cast)) == mpjax.policy_of(cast)
  assert mpjax.policy_of(mpjax.nnx.autocast(fn, BF16)) == mpjax.policy_of(cast)
  assert mpjax.policy_of(mpjax.autocast(cast, "mixed_float16")) != mpjax.policy_of(cast)
  assert [mpjax.policy_of(x) for x in (fn, "mixed_bfloat16", None, 3, MLP)] == [None] * 5


def test_a_module_shows_its_policy(plain, mixed):
  assert repr(mixed) == "MLP(\n    # policy mixed_bfloat16\n" + repr(plain).partition("(\n")[2]
  empty = mpjax.apply_policy(Empty(), "p=f32,c=bf16,o=bf16")
  spec = "params=float32,compute=bfloat16,output=bfloat16"
  assert repr(empty) == f"Empty(\n    # policy {spec}\n)"
  rules = mpjax.PolicyMap({"a": "float32", "b": BF16}, default=BF16, ops={"exp": "follow"})
  assert "# policy mixed_bfloat16, 2 rules, 1 op\n" in repr(mpjax.apply_policy(plain, rules))


@pytest.mark.parametrize("pickles", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_a_module_pickles_with_its_policy(mixed, variables, pickles, x):
  again = pickle.loads(pickles.dumps(Given(mixed)))
  assert again == Given(mixed)
  assert_same_bits(again.inner.apply(variables, x), mixed.apply(variables, x))


def test_a_module_of_a_local_class_cloudpickles_with_its_policy(x):
  class Local(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(x)

  mixed = mpjax.apply_policy(Local(), BF16)
  again = pickle.loads(cloudpickle.dumps(mixed))
  variables = mixed.init(jax.random.key(0), x)
  assert mpjax.policy_of(again) == mpjax.policy_of(mixed)
  assert dot_dtypes(again.apply, variables, x) == NARROW


REGISTRY = {}


class Registered(nn.Module):
  """A base class that looks at whatever is a subclass of it."""

  def __init_subclass__(cls, kind, **keywords):
    super().__init_subclass__(**keywords)
    REGISTRY[kind, cls.__name__] = cls


class Head(Registered, kind="head"):
  size: int = 3

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.size)(x)


@pytest.mark.parametrize("policy", [BF16, "float32"])
def test_a_base_class_takes_no_notice_of_the_class_under_a_policy(policy, x):
  mixed, same = mpjax.apply_policy(Head(4), policy), mpjax.apply_policy(Head(4), policy)
  assert {("head", "Head"): Head} == REGISTRY
  assert isinstance(mixed, Head) and mixed.size == 4 and mixed == same
  variables = Head(4).init(jax.random.key(0), x)
  again = pickle.loads(pickle.dumps(mixed))
  assert again == mixed
  assert dot_dtypes(again.apply, variables, x) == (NARROW if policy == BF16 else WIDE)
  by_function = functools.partial(mixed.apply, method=lambda head, x: head(x))
  assert dot_dtypes(by_function, variables, x) == (NARROW if policy == BF16 else WIDE)


WIDTHS = {}


class Known(nn.Module):
  """A base class that keeps a table of its subclasses, by their names and by themselves."""

  def __init_subclass__(cls):
    super().__init_subclass__()
    WIDTHS[cls] = WIDTHS[cls.__name__] = 3


class Wide(Known):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(WIDTHS[type(self)])(x)


def test_a_base_class_that_keeps_a_table_knows_the_class_under_a_policy(x):
  WIDTHS["Wide"] = plain = "as it was"
  mixed = mpjax.apply_policy(Wide(), BF16)
  assert mixed.init_with_output(jax.random.key(0), x)[0].shape == (len(x), 3)
  assert WIDTHS["Wide"] is plain


def test_copies_keep_the_policy(mixed, variables, x):
  for again in (copy.copy(mixed), copy.deepcopy(mixed)):
    assert again == mixed and dot_dtypes(again.apply, variables, x) == NARROW


@pytest.mark.parametrize("rule", ["haed", "tanh@head"])
def test_a_rule_that_matches_nothing_is_an_error_at_init(plain, rule, x):
  mixed = mpjax.apply_policy(plain, mpjax.PolicyMap({rule: "float32"}, default=BF16))
  with pytest.raises(ValueError, match=r"matched no (module|operation)"):
    mixed.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match=r"matched no (module|operation)"):
    jax.eval_shape(mixed.init, jax.random.key(0), x)


@pytest.mark.parametrize("rule", ["head", "dropout", "max@.*"])
def test_a_rule_that_matches_leaves_init_as_it_was(plain, variables, rule, x):
  mixed = mpjax.apply_policy(plain, mpjax.PolicyMap({rule: "float32"}, default=BF16))
  assert_same_bits(mixed.init(jax.random.key(1), x), variables)
