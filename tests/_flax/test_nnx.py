"""`apply_policy` on NNX models: what is shared, what arrives, and every transform around one."""

import copy
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mpjax
from _jaxprs import contractions, primitives, result_dtypes, wide_contractions
from zoo.cases import case
from zoo.nnx_models import Transformer

# Flax's norms and adamw mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

BF16 = "mixed_bfloat16"
NARROW = {("bfloat16", "bfloat16")}
WIDE = {("float32", "float32")}


class MLP(nnx.Module):
  """Two layers with dropout and a method besides `__call__`."""

  def __init__(self, rngs, dtype=None, rate=0.0):
    self.hidden = nnx.Linear(6, 8, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.head = nnx.Linear(8, 3, dtype=dtype, rngs=rngs)

  def encode(self, x):
    return self.dropout(nnx.relu(self.hidden(x)))

  def __call__(self, x):
    return self.head(self.encode(x))


class Normed(nnx.Module):
  """A layer with BatchNorm: state that a call updates."""

  def __init__(self, rngs):
    self.layer = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)

  def __call__(self, x):
    return nnx.relu(self.norm(self.layer(x)))


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (4, 6))


@pytest.fixture
def plain():
  return MLP(nnx.Rngs(0))


@pytest.fixture
def mixed(plain):
  return mpjax.apply_policy(plain, BF16)


def pure(model, method="__call__"):
  """A model's method as a function of its state and an input."""
  graph, state = nnx.split(model)
  return lambda state, x: getattr(nnx.merge(graph, state, copy=True), method)(x), state


def dots(model, x, method="__call__"):
  fn, state = pure(model, method)
  return {found.factors for found in contractions(jax.make_jaxpr(fn)(state, x))}


def paths(model):
  leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
  return [f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}" for path, leaf in leaves]


def loss_of(model, x):
  return (model(x) ** 2).mean()


# What is shared ----------------------------------------------------------------------------------


def test_the_result_is_a_model_of_the_same_class_with_the_same_variables(plain, mixed):
  assert isinstance(mixed, MLP)
  assert type(mixed).__name__ == "MLP<mixed_bfloat16>"
  assert mixed is not plain
  assert mixed.hidden is plain.hidden
  assert mixed.head.kernel is plain.head.kernel
  assert paths(mixed) == paths(plain)


def test_the_model_given_stays_as_it_was(plain, mixed, x):
  mixed(x)
  assert type(plain) is MLP
  assert type(plain.hidden) is nnx.Linear
  assert dots(plain, x) == WIDE
  assert dots(mixed, x) == NARROW
  assert not [name for name in vars(plain.hidden) if "mpjax" in name]


def test_under_an_all_float32_policy_a_model_computes_what_the_plain_one_does(plain, x):
  wide = mpjax.apply_policy(plain, "float32")
  assert wide.head.kernel is plain.head.kernel
  (ours, state), (fn, _) = pure(wide), pure(plain)
  assert str(jax.make_jaxpr(ours)(state, x)) == str(jax.make_jaxpr(fn)(state, x))


def test_an_update_of_either_reaches_the_other(plain, mixed, x):
  plain.head.bias[...] = jnp.full(3, 5.0)
  np.testing.assert_array_equal(mixed.head.bias[...], jnp.full(3, 5.0))
  nnx.update(mixed, jax.tree.map(jnp.zeros_like, nnx.state(mixed, nnx.Param)))
  assert not np.any(plain(x))


def test_batch_statistics_arrive_in_both_in_float32(x):
  plain, reference = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
  mixed = mpjax.apply_policy(plain, BF16)
  for _ in range(2):
    mixed(x)
    reference(x)
  assert plain.norm.mean is mixed.norm.mean
  assert plain.norm.mean[...].dtype == plain.norm.var[...].dtype == jnp.float32
  np.testing.assert_allclose(plain.norm.mean[...], reference.norm.mean[...], atol=0.01)
  np.testing.assert_allclose(plain.norm.var[...], reference.norm.var[...], rtol=0.02)
  assert np.all(np.abs(plain.norm.mean[...]) > 0)


def test_dropout_draws_the_same_masks_and_its_counts_arrive(x):
  plain, reference = MLP(nnx.Rngs(0), rate=0.5), MLP(nnx.Rngs(0), rate=0.5)
  mixed = mpjax.nnx.apply_policy(plain, BF16, methods=("encode",))
  for _ in range(3):
    np.testing.assert_array_equal(mixed.encode(x) == 0, reference.encode(x) == 0)
  assert int(plain.dropout.rngs.count[...]) == int(reference.dropout.rngs.count[...]) == 3


def test_train_and_eval_reach_the_shared_submodules(plain, x):
  plain = MLP(nnx.Rngs(0), rate=0.5)
  mixed = mpjax.apply_policy(plain, BF16)
  mixed.eval()
  assert plain.dropout.deterministic
  np.testing.assert_array_equal(mixed(x), mixed(x))
  plain.train()
  assert np.any(mixed(x) != mixed(x))


def test_tied_variables_stay_tied(x):
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(6, 6, rngs=rngs)
      self.second = self.first

    def __call__(self, x):
      return self.second(self.first(x))

  plain = Tied(nnx.Rngs(0))
  mixed = mpjax.apply_policy(plain, BF16)
  assert paths(mixed) == paths(plain)
  assert dots(mixed, x) == NARROW
  grads = nnx.grad(loss_of)(mixed, x), nnx.grad(loss_of)(plain, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.03), *grads)


@pytest.mark.parametrize("around", [lambda f: f, nnx.jit], ids=["plain", "jitted"])
def test_what_a_call_sows_and_perturbs_arrives(x, around):
  class Sower(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(6, 3, rngs=rngs)
      self.scales = nnx.data((nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(3))))

    @around
    def __call__(self, x):
      x = self.perturb("moved", self.layer(x)) * self.scales[0][None]
      self.sow(nnx.Intermediate, "hidden", x)
      return x

  mixed = mpjax.apply_policy(Sower(nnx.Rngs(0)), BF16)
  out, intermediates = nnx.capture(mixed, nnx.Intermediate)(x)
  (sown,) = intermediates["hidden"].get_value()
  np.testing.assert_allclose(sown, out, atol=0.01)
  _, moved = nnx.capture(mixed, nnx.Perturbation)(x)
  assert moved["moved"].shape == (4, 3)


# Policies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16"])
def test_results_have_the_output_dtype(plain, x, output):
  model = mpjax.apply_policy(plain, f"params=float32, compute=bfloat16, output={output}")
  assert model(x).dtype.name == output


def test_param_dtype_makes_a_cast_copy(plain, x):
  model = mpjax.apply_policy(plain, "params=bfloat16, compute=bfloat16, output=float32")
  assert model.head.kernel[...].dtype == jnp.bfloat16
  assert plain.head.kernel[...].dtype == jnp.float32
  assert model(x).dtype == jnp.float32


def test_named_methods_run_under_the_policy_and_others_do_not(plain, x):
  encode = mpjax.nnx.apply_policy(plain, BF16, methods=("encode",))
  both = mpjax.nnx.apply_policy(plain, BF16, methods=("__call__", "encode"))
  assert dots(encode, x, "encode") == NARROW
  assert dots(both, x, "encode") == dots(both, x) == NARROW
  assert dots(mpjax.apply_policy(plain, BF16), x, "encode") == WIDE
  np.testing.assert_allclose(both.encode(x), plain.encode(x), atol=0.05)


def test_an_unknown_method_lists_the_methods(plain):
  with pytest.raises(ValueError, match=r"methods of MLP; got 'encod'.*__call__, encode"):
    mpjax.nnx.apply_policy(plain, BF16, methods=("encod",))


def test_a_policy_overrides_the_dtype_that_a_model_gives_its_layers(x):
  assert dots(mpjax.apply_policy(MLP(nnx.Rngs(0), dtype=jnp.float32), BF16), x) == NARROW


@pytest.mark.parametrize("dtype", [None, jnp.float32], ids=["no_dtype", "float32_dtype"])
def test_a_rule_keeps_a_module_float32(dtype, x):
  policy = mpjax.PolicyMap({"head": "float32"}, default=BF16)
  fn, state = pure(mpjax.apply_policy(MLP(nnx.Rngs(0), dtype=dtype), policy))
  found = contractions(jax.make_jaxpr(fn)(state, x))
  assert [dot.factors[0] for dot in found] == ["bfloat16", "float32"]


def test_a_rule_governs_forward_and_backward_of_all_beneath_it():
  tokens = jnp.zeros((2, 5), jnp.int32)
  model = Transformer(depth=2, rngs=nnx.Rngs(0))
  count = []
  for policy in ("float32", mpjax.PolicyMap({"blocks/0": "float32"}, default=BF16), BF16):
    fn, state = pure(mpjax.apply_policy(model, policy))
    gradient = jax.grad(lambda state, fn=fn: fn(state, tokens).sum(), allow_int=True)
    found = contractions(jax.make_jaxpr(gradient)(state))
    count.append(sum(dot.factors == ("float32", "float32") for dot in found))
  every, by_rule, none = count
  assert none == 0
  assert 0 < by_rule < every


class Table(nnx.Module):
  """A module that computes in all that a class may define."""

  def __init__(self, rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (6, 6)))

  def _look_up(self, x):
    return x @ self.w[...]

  @nnx.jit
  def __hidden(self, x):
    return x @ self.w[...]

  def __getitem__(self, x):
    return self.__hidden(x)

  def __rmatmul__(self, x):
    return x @ self.w[...]

  @property
  def squared(self):
    """A weight that is computed."""
    return self.w[...] @ self.w[...]


WAYS = {
  "private": lambda table, x: table._look_up(x),
  "item": lambda table, x: table[x],
  "operator": lambda table, x: table.__rmatmul__(x),
  "property": lambda table, x: table.squared,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_rule_governs_a_module_whatever_of_it_is_called(way, x):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.table, self.head = Table(rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
      return self.head(way(self.table, x)) + self.head(self.table[x]).sum()

  for rules, want in (({"table": "float32"}, 2), ({"tab.*": "float32", "he.*": BF16}, 2), ({}, 0)):
    fn, state = pure(mpjax.apply_policy(Model(nnx.Rngs(0)), mpjax.PolicyMap(rules, default=BF16)))
    found = [dot.factors for dot in contractions(jax.make_jaxpr(fn)(state, x))]
    assert (found.count(("float32", "float32")), len(found)) == (want, 4)


def test_a_rule_that_matches_no_module_lists_the_paths(plain):
  with pytest.raises(ValueError, match=r"'haed' matched no module.*head.*hidden"):
    mpjax.apply_policy(plain, mpjax.PolicyMap({"haed": "float32"}, default=BF16))


def test_a_policy_is_replaced_by_another(mixed, x):
  assert dots(mpjax.apply_policy(mixed, "mixed_float16"), x) == {("float16", "float16")}


class Host(nnx.Module):
  """A model inside another."""

  def __init__(self, inner, rngs):
    self.inner = inner
    self.outer = nnx.Linear(3, 2, rngs=rngs)

  def __call__(self, x):
    return self.outer(self.inner(x))


@pytest.mark.parametrize("around", ["model", "loss", "both"])
def test_the_innermost_policy_governs_float32_included(plain, x, around):
  model = Host(mpjax.apply_policy(plain, "float32"), nnx.Rngs(1))
  model = mpjax.apply_policy(model, BF16) if around != "loss" else model
  loss = mpjax.autocast(loss_of, BF16) if around != "model" else loss_of
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  fn = lambda params, x: loss(nnx.merge(graph, params, rest, copy=True), x)
  found = contractions(jax.make_jaxpr(jax.grad(fn))(params, x))
  assert [dot.factors[0] for dot in found[:3]] == ["float32", "float32", "bfloat16"]
  assert sum(dot.factors == ("float32", "float32") for dot in found) == 5  # and their gradients


def test_a_policy_inside_float32_inside_a_policy_governs_its_own_model(plain, x):
  wide = mpjax.apply_policy(
    Host(mpjax.apply_policy(plain, "mixed_float16"), nnx.Rngs(1)), "float32"
  )
  model = mpjax.apply_policy(nnx.Sequential(wide, nnx.Linear(2, 2, rngs=nnx.Rngs(2))), BF16)
  fn, state = pure(model)
  found = contractions(jax.make_jaxpr(fn)(state, x))
  assert [dot.factors[0] for dot in found] == ["float16", "float16", "float32", "bfloat16"]


def test_a_wrapped_submodule_keeps_its_own_policy_and_paths(plain, x):
  host = Host(mpjax.apply_policy(plain, "mixed_float16"), nnx.Rngs(1))
  assert paths(host) == paths(Host(plain, nnx.Rngs(1)))
  for model, last in ((host, "float32"), (mpjax.apply_policy(host, BF16), "bfloat16")):
    fn, state = pure(model)
    found = contractions(jax.make_jaxpr(fn)(state, x))
    assert [dot.factors[0] for dot in found] == ["float16", "float16", last]


# Transforms --------------------------------------------------------------------------------------


def test_split_merge_and_clone_keep_the_policy(mixed, plain, x):
  graph, params, rest = nnx.split(mixed, nnx.Param, ...)
  for model in (nnx.merge(graph, params, rest), nnx.clone(mixed)):
    assert dots(model, x) == NARROW
    np.testing.assert_array_equal(model(x), mixed(x))
  copy = nnx.clone(mixed)
  copy.head.bias[...] = jnp.ones(3)
  assert not np.any(plain.head.bias[...])


def test_state_is_that_of_the_plain_model(plain, mixed):
  ours, theirs = jax.tree.leaves(nnx.state(mixed)), jax.tree.leaves(nnx.state(plain))
  assert all(a is b for a, b in zip(ours, theirs, strict=True))
  assert nnx.to_pure_dict(nnx.state(mixed)).keys() == nnx.to_pure_dict(nnx.state(plain)).keys()
  nnx.update(MLP(nnx.Rngs(7)), nnx.state(mixed))


def test_jit_updates_state_and_traces_once(x):
  plain, eager = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
  mixed = mpjax.apply_policy(plain, BF16)
  traces = []

  @nnx.jit
  def run(model, x):
    traces.append(1)
    return model(x)

  outs = [run(mixed, x), run(mixed, x)]
  expected = mpjax.apply_policy(eager, BF16)
  np.testing.assert_allclose(outs[1], (expected(x), expected(x))[1], atol=0.02)
  np.testing.assert_allclose(plain.norm.mean[...], eager.norm.mean[...], atol=1e-3)
  assert len(traces) == 1


def test_grad_gives_float32_gradients_with_the_paths_of_the_plain_model(plain, mixed, x):
  ours, truth = nnx.grad(loss_of)(mixed, x), nnx.grad(loss_of)(plain, x)
  assert jax.tree.structure(ours) == jax.tree.structure(truth)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), ours, truth)


def test_an_optimizer_trains_both_models_at_once(plain, mixed, x):
  optimizer = nnx.Optimizer(mixed, optax.adamw(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(mixed, optimizer)) for _ in range(20)]
  assert losses[-1] < 0.5 * losses[0]
  assert float(loss_of(plain, x)) < losses[0]
  floats = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.dtype != jnp.int32]
  assert {leaf.dtype.name for leaf in floats} <= {"float32", "uint32"}


def test_state_moves_during_value_and_grad(x):
  plain = Normed(nnx.Rngs(0))
  nnx.jit(nnx.value_and_grad(loss_of))(mpjax.apply_policy(plain, BF16), x)
  assert np.any(plain.norm.mean[...])


def test_remat_keeps_the_policy(mixed, x):
  def loss(model, x):
    return (nnx.remat(lambda model, x: model(x))(model, x) ** 2).mean()

  fn, state = pure(mixed)
  jaxpr = jax.make_jaxpr(jax.grad(lambda s: jax.checkpoint(fn)(s, x).sum(), allow_int=True))(state)
  assert wide_contractions(jaxpr, "bfloat16") == []
  ours, truth = nnx.grad(loss)(mixed, x), nnx.grad(loss_of)(mixed, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, truth)


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_scan_over_stacked_layers_runs_narrow(where, x):
  class Stack(nnx.Module):
    def __init__(self, wrap=lambda layer: layer):
      make = nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
      self.layers = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
      self.wrap = wrap

    def __call__(self, x):
      step = lambda x, layer: jnp.tanh(self.wrap(layer)(x))
      return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

  wrap = lambda layer: mpjax.apply_policy(layer, BF16)
  model = Stack(wrap) if where == "inside" else mpjax.apply_policy(Stack(), BF16)
  fn, state = pure(model)
  jaxpr = jax.make_jaxpr(jax.grad(lambda s: fn(s, x).sum(), allow_int=True))(state)
  assert wide_contractions(jaxpr, "bfloat16") == []
  assert primitives(jaxpr)["scan"] == 2
  np.testing.assert_allclose(model(x), Stack()(x), atol=0.03)


def test_vmap_over_models_runs_narrow(x):
  make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: MLP(rngs)))
  models = mpjax.apply_policy(make(nnx.Rngs(0)), BF16)
  run = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
  assert run(models, x).shape == (3, 4, 3)
  graph, state = nnx.split(models)
  jaxpr = jax.make_jaxpr(lambda state: run(nnx.merge(graph, state, copy=True), x))(state)
  assert wide_contractions(jaxpr, "bfloat16") == []


def test_a_models_static_and_none_arguments_pass(x):
  class Switch(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, mask=None, *, double=False):
      x = self.layer(x)
      x = x if mask is None else jnp.where(mask, x, 0.0)
      return 2 * x if double else x

  mixed = mpjax.apply_policy(Switch(nnx.Rngs(0)), BF16)
  np.testing.assert_array_equal(mixed(x, double=True), 2 * mixed(x, None))
  assert not np.any(mixed(x, jnp.zeros((4, 1), bool)))


# Whole losses ------------------------------------------------------------------------------------


def test_autocast_takes_a_loss_of_models_and_brings_updates_back(x):
  plain = Normed(nnx.Rngs(0))
  loss = mpjax.nnx.autocast(loss_of, BF16)
  value, grads = nnx.value_and_grad(loss)(plain, x)
  assert value.dtype == jnp.float32
  assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
  assert np.any(plain.norm.mean[...])


@pytest.mark.ci
def test_a_whole_zoo_model_trains_under_jit_as_in_float32():
  found = case("resnet", "nnx")
  batch, losses = found.batch(0), {}
  for policy in ("float32", BF16):
    model = mpjax.apply_policy(found.module(), policy)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
      loss = lambda model: found.objective(model(batch.inputs), batch.targets)
      value, grads = nnx.value_and_grad(loss)(model)
      optimizer.update(model, grads)
      return value

    losses[policy] = [float(step(model, optimizer, batch)) for _ in range(8)]
  np.testing.assert_allclose(losses[BF16], losses["float32"], rtol=0.1, atol=0.05)
  assert losses[BF16][-1] < losses[BF16][0]


# Graph nodes of every kind -----------------------------------------------------------------------


class Counted(nnx.Pytree):
  """A graph node that is no module."""

  def __init__(self):
    self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
    self.kernel = nnx.Param(jnp.full((6, 3), 1.001))

  def __call__(self, x):
    self.calls[...] += 1
    return x @ self.kernel[...]


def test_the_variables_of_any_graph_node_move_under_autocast(x):
  node = Counted()
  call = mpjax.autocast(lambda node, x: node(x), "p=f32, c=bf16, o=bf16")
  assert call(node, x).dtype == jnp.bfloat16
  call(node, x)
  assert int(node.calls[...]) == 2


def test_a_param_among_the_arguments_is_a_parameter_wherever_it_stands(x):
  kernel = nnx.Param(jnp.ones((6, 3)))
  fn = lambda x, kernel: (x @ jnp.ones((6, 3))) + kernel[:1]  # data would keep the sum in float32
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, BF16))(x, kernel)
  assert result_dtypes(jaxpr, "add") == {"bfloat16"}
  (row,) = mpjax.inspect.explain(fn, BF16, x, kernel).rows
  assert not row.leaks


def test_the_state_of_a_model_is_a_pytree_of_parameters(x):
  graph, state = nnx.split(MLP(nnx.Rngs(0)))
  loss = lambda state, x: nnx.merge(graph, state)(x).sum()
  grads = jax.grad(mpjax.autocast(loss, BF16), allow_int=True)(state, x)
  assert jax.tree.structure(grads) == jax.tree.structure(state)
  floats = nnx.split_state(state, nnx.Param, ...)[0]
  merged = lambda params, x: nnx.merge(graph, params, nnx.split_state(state, nnx.Param, ...)[1])(x)
  loss, grads = mpjax.value_and_grad(lambda p, x: merged(p, x).sum())(floats, x, loss_scale=2.0)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}


# A policy that is replaced, taken away, seen, and pickled -----------------------------------------


@pytest.mark.parametrize("policy", [BF16, mpjax.PolicyMap({"head": "float32"}, default=BF16)])
def test_float32_takes_a_policy_away(plain, policy, x):
  mixed = mpjax.apply_policy(plain, policy)
  again = mpjax.apply_policy(mixed, "float32")
  assert isinstance(again, MLP) and again.head.kernel is plain.head.kernel
  assert dots(again, x) == WIDE and mpjax.policy_of(again) == mpjax.Policy.parse("float32")
  assert mpjax.policy_of(mixed) is not None


def test_a_policy_replaced_keeps_its_methods(plain, x):
  encode = mpjax.nnx.apply_policy(plain, BF16, methods="encode")
  again = mpjax.apply_policy(encode, "mixed_float16")
  assert dots(again, x, "encode") == {("float16", "float16")}
  plainly = mpjax.nnx.apply_policy(again, BF16, methods="__call__")
  assert dots(plainly, x, "encode") == WIDE and dots(plainly, x) == NARROW


def test_policy_of_a_model_is_its_own_policy(plain, mixed):
  rules = mpjax.PolicyMap({"head": "float32"}, default=BF16)
  assert mpjax.policy_of(mixed) == mpjax.Policy.parse(BF16)
  assert mpjax.policy_of(mpjax.apply_policy(plain, rules)) == rules
  assert mpjax.policy_of(mixed.hidden) is None and mpjax.policy_of(plain) is None
  assert mpjax.policy_of(nnx.clone(mixed)) == mpjax.Policy.parse(BF16)


def test_a_model_shows_its_policy(plain, mixed, x, capsys):
  assert repr(mixed).startswith("MLP<mixed_bfloat16>(") and repr(plain).startswith("MLP(")
  nnx.display(mixed)
  assert "MLP<mixed_bfloat16>(" in capsys.readouterr().out
  rules = mpjax.PolicyMap({"head": "float32"}, default=BF16)
  assert "MLP<mixed_bfloat16, 1 rule>" in repr(mpjax.apply_policy(plain, rules))


def test_a_table_of_a_model_shows_its_policy_and_leaves_it_as_it_was(mixed, x):
  assert "MLP<mixed_bfloat16>" in nnx.tabulate(mixed, x)
  assert dots(mixed, x) == NARROW
  assert np.all(np.isfinite(mixed(x)))


@pytest.mark.parametrize("pickles", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_a_model_pickles_with_its_policy(mixed, pickles, x):
  class Local(MLP):
    pass

  models = [mixed] if pickles is pickle else [mixed, mpjax.apply_policy(Local(nnx.Rngs(0)), BF16)]
  for model in models:
    again = pickle.loads(pickles.dumps(model))
    assert mpjax.policy_of(again) == mpjax.policy_of(model)
    np.testing.assert_array_equal(again(x), model(x))


class OfAPolicy(type(mpjax.apply_policy(nnx.Dropout(0.5), BF16))):
  """A subclass of what `apply_policy` made."""


def test_a_subclass_of_a_model_under_a_policy_pickles_as_itself():
  model = OfAPolicy(0.5)
  assert type(pickle.loads(pickle.dumps(model))) is OfAPolicy


@pytest.mark.parametrize("pickles", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_the_halves_of_a_split_model_pickle(mixed, pickles, x):
  graphdef, state = pickle.loads(pickles.dumps(nnx.split(mixed)))
  again = nnx.merge(graphdef, state)
  assert type(again) is type(mixed) and graphdef == nnx.graphdef(mixed)
  np.testing.assert_array_equal(again(x), mixed(x))


def test_copies_keep_the_policy_and_share_or_not_as_python_has_it(mixed, x):
  shallow, deep = copy.copy(mixed), copy.deepcopy(mixed)
  assert shallow.head.kernel is mixed.head.kernel
  assert deep.head.kernel is not mixed.head.kernel
  assert dots(shallow, x) == dots(deep, x) == NARROW


# A Variable made where there was None -------------------------------------------------------------


class Remembering(nnx.Module):
  """Keeps a mean of its outputs, from the first call on."""

  def __init__(self):
    self.linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    self.seen = nnx.data(None)

  def __call__(self, x):
    y = self.linear(x)
    if self.seen is None:
      self.seen = nnx.BatchStat(y.mean(0))
    else:
      self.seen[...] = 0.5 * (self.seen[...] + y.mean(0))
    return y


@pytest.mark.parametrize("jit", [lambda fn: fn, nnx.jit], ids=["eager", "jit"])
def test_a_variable_made_where_there_was_none_arrives(jit, x):
  plain, mixed = Remembering(), mpjax.apply_policy(Remembering(), BF16)
  for model in (plain, mixed):
    for _ in range(2):
      jit(lambda model, x: model(x))(model, x)
  assert isinstance(mixed.seen, nnx.BatchStat)
  np.testing.assert_allclose(mixed.seen[...], plain.seen[...], atol=2e-2)


class OfItsClass(nnx.Module):
  """Has None for a default of its class, until it is called."""

  seen = None

  def __init__(self):
    self.linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

  def __call__(self, x):
    if self.seen is None:
      self.seen = nnx.BatchStat(jnp.zeros(()))
    self.seen[...] = self.seen[...] + 1
    return self.linear(x)


class InAList(nnx.Module):
  def __init__(self):
    self.linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    self.all = nnx.List([nnx.data(None), nnx.data(None)])

  @property
  def seen(self):
    return self.all[1]

  def __call__(self, x):
    if self.seen is None:
      self.all[1] = nnx.BatchStat(jnp.zeros(()))
    self.seen[...] = self.seen[...] + 1
    return self.linear(x)


@pytest.mark.parametrize("kind", [OfItsClass, InAList])
def test_a_variable_may_be_made_wherever_none_stood(kind, x):
  model = mpjax.apply_policy(kind(), BF16)
  for call in (lambda model, x: model(x), nnx.jit(lambda model, x: model(x))):
    call(model, x)
  assert model.seen[...] == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_variable_that_a_step_makes_where_there_was_none_stays(accumulate, x):
  model = mpjax.apply_policy(Remembering(), BF16)
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  loss = lambda model, x: (model(x) ** 2).mean()
  step = mpjax.nnx.make_train_step(loss, accumulate=accumulate)
  losses = [float(step(model, optimizer, x).loss) for _ in range(3)]
  assert losses == sorted(losses, reverse=True) and model.seen.shape == (3,)


def test_an_attention_may_make_its_cache_in_the_call():
  class Decoder(nnx.Module):
    def __init__(self):
      self.attend = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))

    def __call__(self, x):
      if self.attend.cached_key is None:
        self.attend.init_cache((2, 5, 8))
      return self.attend(x)

  tokens = jax.random.normal(jax.random.key(0), (2, 3, 8))
  plain, mixed = Decoder(), mpjax.apply_policy(Decoder(), BF16)
  for n in range(3):
    out = [model(tokens[:, n : n + 1]) for model in (plain, mixed)]
    np.testing.assert_allclose(*out, atol=3e-2)
  assert int(mixed.attend.cache_index[...]) == 3


# What cannot be brought back, and what autocast does not take ------------------------------------


def add_module(model):
  model.extra = nnx.Linear(6, 6, rngs=nnx.Rngs(0))


CHANGES = {
  "a new submodule": (add_module, "extra"),
  "a new number": (lambda model: setattr(model, "count", 3), "count"),
  "a new function": (lambda model: setattr(model.hidden, "then", jnp.tanh), "hidden/then"),
  "a submodule gone": (lambda model: delattr(model, "dropout"), "dropout"),
  "another flag": (lambda model: setattr(model.dropout, "deterministic", True), "deterministic"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_structure_in_a_call_is_an_error(plain, change, name, x):
  def loss(model, x):
    out = model(x)
    change(model)
    return out.mean()

  with pytest.raises(ValueError, match=rf"set, added or deleted '.*{name}"):
    mpjax.autocast(loss, BF16)(plain, x)


def test_a_parameter_that_a_loss_adds_is_refused_by_the_step(plain, x):
  def loss(model, x):
    model.hidden.extra = nnx.Param(jnp.ones(()))
    return model(x).mean()

  optimizer = nnx.Optimizer(plain, optax.sgd(0.1), wrt=nnx.Param)
  with pytest.raises(ValueError, match=r"Got 'hidden/extra', of type Param, which the loss adds"):
    mpjax.nnx.make_train_step(loss, policy=BF16)(plain, optimizer, x)


@pytest.mark.parametrize(
  ("call", "says"),
  [
    (lambda: mpjax.autocast("mixed_bfloat16"), "Got 'mixed_bfloat16'"),
    (lambda: mpjax.autocast(mpjax.Policy.parse(BF16)), "Got Policy"),
    (lambda: mpjax.autocast(enabled=False), "Got enabled="),
    (lambda: mpjax.autocast("cuda", dtype=jnp.bfloat16), "Got dtype="),
    (lambda: mpjax.autocast(), "Got no function"),
  ],
)
def test_autocast_as_torch_has_it_is_answered_with_what_to_write(call, says):
  with pytest.raises(
    TypeError, match=rf"no context manager.*{says}.*mpjax\.autocast\(fn, policy\)"
  ):
    call()


def test_autocast_of_a_module_names_apply_policy(plain):
  for module, kind in ((plain, "NNX model MLP"), (nn.Dense(3), "Linen module Dense")):
    with pytest.raises(TypeError, match=rf"Got the {kind}\. Use mpjax\.apply_policy"):
      mpjax.autocast(module, BF16)


class Bridged(nnx.Module):
  """A Linen layer in an NNX model, as Flax's own bridge puts it there."""

  def __init__(self, rngs):
    self.linen = nnx.bridge.ToNNX(nn.Dense(8), rngs=rngs).lazy_init(jnp.ones((2, 6)))
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.tanh(self.linen(x)))


def test_a_linen_layer_in_a_model_runs_and_obeys_rules(x):
  model, own = Bridged(nnx.Rngs(0)), mpjax.PolicyMap({"linen": "float32"}, default=BF16)
  for policy, held in ((BF16, NARROW), (own, NARROW | WIDE)):
    policed = mpjax.apply_policy(Bridged(nnx.Rngs(0)), policy)
    graph, state = nnx.split(policed)
    traced = jax.make_jaxpr(lambda state, x, graph=graph: nnx.merge(graph, state)(x))(state, x)
    assert {found.factors for found in contractions(traced)} == held
    np.testing.assert_allclose(policed(x), model(x), atol=0.02)


REGISTRY = {}


class Registered(nnx.Module):
  """A base class that looks at whatever is a subclass of it."""

  def __init_subclass__(cls, kind, **keywords):
    super().__init_subclass__(**keywords)
    REGISTRY[kind, cls.__name__] = cls


class Layer(Registered, kind="layer"):
  def __init__(self, rngs):
    self.linear = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.linear(x)


class Whole(Registered, kind="model"):
  def __init__(self, rngs):
    self.layer = Layer(rngs)

  def __call__(self, x):
    return self.layer(x)


def test_a_base_class_takes_no_notice_of_the_class_under_a_policy(x):
  plain, known = Whole(nnx.Rngs(0)), dict(REGISTRY)
  model = mpjax.apply_policy(plain, BF16)
  assert isinstance(model, Whole)
  np.testing.assert_allclose(model(x), plain(x), atol=0.02)
  again = pickle.loads(pickle.dumps(model))
  for call in (model, again, mpjax.nnx.autocast(lambda x: plain(x), BF16)):
    assert call(x).dtype == jnp.float32
  traced = jax.make_jaxpr(lambda x: again(x))(x)
  assert {found.factors for found in contractions(traced)} == NARROW
  assert known == REGISTRY == {("layer", "Layer"): Layer, ("model", "Whole"): Whole}


WIDTHS = {}


class Known(nnx.Module, pytree=False):
  """A base class that keeps a table of its subclasses, by their names and by themselves."""

  def __init_subclass__(cls):
    super().__init_subclass__(pytree=False)
    WIDTHS[cls] = WIDTHS[cls.__name__] = 3


class Wide(Known):
  def __init__(self, rngs):
    self.layers = [nnx.Linear(6, 3, rngs=rngs)]

  def __call__(self, x):
    return self.layers[0](x) * WIDTHS[type(self)]


class Nested(nnx.Module):
  def __init__(self, rngs):
    self.wide, self.own = Wide(rngs), mpjax.apply_policy(Wide(rngs), "float32")
    self.layer = mpjax.apply_policy(Layer(rngs), "float32")

  def __call__(self, x):
    return self.wide(x) + self.own(x) + self.layer(x)


def test_a_base_class_that_keeps_a_table_knows_the_class_under_a_policy(x):
  WIDTHS["Wide"] = plain = "as it was"
  model, nested = mpjax.apply_policy(Wide(nnx.Rngs(0)), BF16), Nested(nnx.Rngs(0))
  np.testing.assert_allclose(model(x), Wide(nnx.Rngs(0))(x), atol=0.06)
  np.testing.assert_allclose(mpjax.apply_policy(nested, BF16)(x), nested(x), atol=0.06)
  assert jax.jit(lambda x: model(x))(x).shape == (len(x), 3)
  assert WIDTHS["Wide"] is plain and not type(model)._pytree__is_pytree


@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit])
def test_parameters_of_16_bits_that_a_transform_writes_back_keep_their_dtype(wrap):
  class Wraps(nnx.Module):
    def __init__(self, rngs):
      self.layer, self.head = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))

    def __call__(self, x):
      return self.head(wrap(lambda layer, x: layer(x))(self.layer, x))

  model, x = Wraps(nnx.Rngs(0)), jnp.ones((2, 4))
  nnx.update(model, mpjax.cast_floating(nnx.state(model), "bfloat16"))
  mpjax.nnx.autocast(lambda model, x: model(x).sum(), BF16)(model, x)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
  policed = mpjax.apply_policy(model, "bfloat16")
  policed(x)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(policed))} == {"bfloat16"}
