"""Rules for operations: within a path, everywhere, and in the table of a policy map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax
from _arrays import array
from _jaxprs import contractions, equations

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Attn(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(8)(jnp.tanh(nn.Dense(8)(x)))


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = Attn(name="attn")(x)
    x = jnp.tanh(x)
    return nn.Dense(4, name="head")(x)


class NnxAttn(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(8, 8, rngs=rngs)
    self.outer = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x):
    return self.outer(jnp.tanh(self.inner(x)))


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.attn = NnxAttn(rngs)
    self.head = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.tanh(self.attn(x)))


def scoped(params, x):
  with jax.named_scope("attn"):
    x = jnp.tanh(x @ params["inner"]) @ params["outer"]
  x = jnp.tanh(x)
  with jax.named_scope("head"):
    return x @ params["head"]


X = array(np.ones((2, 8)))


def linen(policies):
  variables = Net().init(jax.random.key(0), X)
  return jax.make_jaxpr(mpjax.apply_policy(Net(), policies).apply)(variables, X)


def of_nnx(policies):
  graph, state = nnx.split(mpjax.apply_policy(NnxNet(nnx.Rngs(0)), policies))
  return jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, X)


def plain(policies):
  params = {"inner": jnp.ones((8, 8)), "outer": jnp.ones((8, 8)), "head": jnp.ones((8, 4))}
  return jax.make_jaxpr(mpjax.autocast(scoped, policies))(params, X)


every_api = pytest.mark.parametrize("trace", [linen, of_nnx, plain])


def dtypes(jaxpr, primitive):
  found = (eqn for eqn in equations(jaxpr) if eqn.primitive.name == primitive)
  return [eqn.outvars[0].aval.dtype.name for eqn in found]


@every_api
def test_a_rule_for_an_operation_holds_within_its_path_only(trace):
  policies = mpjax.PolicyMap({"tanh|exp@attn": "float32"}, default="mixed_bfloat16")
  if trace is not plain:  # there is no exp: the pattern needs one operation, not all
    assert dtypes(trace(policies), "tanh") == ["float32", "bfloat16"]
  jaxpr = trace(policies)
  assert dtypes(jaxpr, "tanh") == ["float32", "bfloat16"]
  assert {c.factors for c in contractions(jaxpr)} == {("bfloat16", "bfloat16")}


@every_api
def test_only_the_matmul_of_a_path_is_float32(trace):
  policies = mpjax.PolicyMap({"dot_general@head": "float32"}, default="mixed_float16")
  jaxpr = trace(policies)
  assert [c.factors[0] for c in contractions(jaxpr)] == ["float16", "float16", "float32"]
  assert set(dtypes(jaxpr, "tanh")) == {"float16"}


@every_api
def test_the_output_dtype_of_a_rule_is_what_the_operation_returns(trace):
  rules = {"tanh@attn": "params=float32, compute=float32, output=bfloat16"}
  jaxpr = trace(mpjax.PolicyMap(rules, default="p=f32, c=bf16, o=bf16"))
  tanh = next(e for e in equations(jaxpr) if e.primitive.name == "tanh")
  (after,) = [e for e in equations(jaxpr) if tanh.outvars[0] in e.invars]
  assert after.primitive.name == "convert_element_type"
  assert after.outvars[0].aval.dtype == jnp.bfloat16


@every_api
def test_a_rule_without_a_path_holds_everywhere(trace):
  jaxpr = trace(mpjax.PolicyMap({"tanh@": "float32"}, default="mixed_bfloat16"))
  assert dtypes(jaxpr, "tanh") == ["float32", "float32"]


@every_api
def test_the_first_rule_that_matches_wins(trace):
  rules = {"dot_general@head": "mixed_bfloat16", "head": "float32", "attn": "mixed_float16"}
  jaxpr = trace(mpjax.PolicyMap(rules, default="mixed_bfloat16"))
  assert [c.factors[0] for c in contractions(jaxpr)] == ["float16", "float16", "bfloat16"]


@every_api
def test_a_rule_whose_operation_never_occurs_is_an_error(trace):
  policies = mpjax.PolicyMap({"tahn@attn": "float32"}, default="mixed_bfloat16")
  with pytest.raises(ValueError, match=r"'tahn@attn' matched no operation.*Closest: tanh"):
    trace(policies)


@every_api
def test_a_rule_whose_path_never_occurs_is_an_error(trace):
  policies = mpjax.PolicyMap({"tanh@atn": "float32"}, default="mixed_bfloat16")
  with pytest.raises(ValueError, match=r"'tanh@atn' matched no module.*Closest: attn"):
    trace(policies)


@every_api
def test_the_table_of_a_map_can_be_changed(trace):
  assert mpjax.DEFAULT_OPS["tanh"] == "follow"
  policies = mpjax.PolicyMap({}, default="mixed_bfloat16", ops={"tanh": "full"})
  assert dtypes(trace(policies), "tanh") == ["float32", "float32"]


def test_a_changed_table_can_let_an_operation_go_narrow():
  fn = lambda w, x: jnp.log1p(x @ w)
  assert mpjax.DEFAULT_OPS["log1p"] == "full"
  policies = mpjax.PolicyMap({}, default="mixed_bfloat16", ops={"log1p": "follow"})
  args = jnp.ones((4, 4)), jnp.ones((2, 4))
  narrow, wide = (
    jax.make_jaxpr(mpjax.autocast(fn, p))(*args) for p in (policies, "mixed_bfloat16")
  )
  assert (dtypes(narrow, "log1p"), dtypes(wide, "log1p")) == (["bfloat16"], ["float32"])


def many_operations(params, x):
  """Operations of a parameter and of what a matmul gave, with a gradient step inside."""

  def loss(params):
    h = x @ params["w"] * params["v"] / (1 + params["v"] ** 2) + params["v"]
    h = jnp.where(h > 0, jnp.maximum(h, params["v"]), jnp.abs(h) ** params["v"])
    return jax.nn.logsumexp(h[:, ::-1]) - jnp.cumsum(h, 0).mean()

  grads = jax.grad(loss)(params)
  return loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))


LOWERED = (
  *(
    "abs",
    "add",
    "add_any",
    "broadcast_in_dim",
    "cumsum",
    "div",
    "exp",
    "log",
    "max",
    "mul",
    "neg",
  ),
  *("pow", "reduce_sum", "reshape", "rev", "select_n", "sign", "sub", "transpose"),
)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("op", LOWERED)
def test_an_operation_that_is_no_matmul_may_be_lowered_and_differentiated(op):
  params = {"w": jnp.eye(4) + 0.1, "v": jnp.full((1, 4), 0.5)}
  policy = mpjax.PolicyMap({}, default="mixed_bfloat16", ops={op: "lower"})
  x = jnp.arange(8.0).reshape(2, 4)
  want = jax.grad(many_operations)(params, x)
  for fn in (
    jax.grad(mpjax.autocast(many_operations, policy)),
    mpjax.autocast(jax.grad(many_operations), policy),
  ):
    jaxpr = jax.make_jaxpr(fn)(params, x)
    assert "bfloat16" in dtypes(jaxpr, op)
    for got, exact in zip(*map(jax.tree.leaves, (fn(params, x), want)), strict=True):
      # JAX 0.10 derives a maximum by comparing its operands with it, which equal no rounded one.
      assert op == "max" or jnp.linalg.norm(got - exact) < 0.2 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("method", ["add", "multiply", "min", "max"])
@pytest.mark.parametrize("rule", ["lower", "follow"])
def test_a_scatter_computes_in_16_bits_when_asked(method, rule):
  def fn(w, x):
    return getattr(jnp.ones((4, 4)).at[jnp.array([0, 1, 3])], method)(x @ w).sum()

  op = {"multiply": "scatter-mul"}.get(method, f"scatter-{method}")
  policies = mpjax.PolicyMap({}, default="mixed_bfloat16", ops={op: rule})
  args = jnp.eye(4) / 2, jnp.arange(12.0).reshape(3, 4)
  cast = mpjax.autocast(fn, policies)
  if rule == "lower":
    assert dtypes(jax.make_jaxpr(cast)(*args), op) == ["bfloat16"]
  assert jnp.allclose(jax.jit(cast)(*args), fn(*args), rtol=2e-2)


def test_embeddings_are_looked_up_in_a_16_bit_table_when_asked():
  """So that sharded tables are gathered in 16 bits; then their gradients add up in them too."""
  lookup = lambda table: table[jnp.arange(8)].sum()
  policies = mpjax.PolicyMap({}, default="mixed_bfloat16", ops={"gather": "lower"})
  for policy, dtype in (("mixed_bfloat16", jnp.float32), (policies, jnp.bfloat16)):
    jaxpr = jax.make_jaxpr(mpjax.autocast(lookup, policy))(jnp.ones((16, 4)))
    (gather,) = (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "gather")
    assert gather.invars[0].aval.dtype == dtype


def test_an_operation_without_16_bit_kernels_stays_float32_whatever_a_rule_says():
  fn = lambda w, x: jnp.linalg.cholesky(w @ w.T + 9.0 * jnp.eye(4)) @ x.T
  policies = mpjax.PolicyMap({".*@": "bfloat16"}, default="mixed_bfloat16")
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policies))(jnp.ones((4, 4)), jnp.ones((2, 4)))
  assert dtypes(jaxpr, "cholesky") == ["float32"]


@pytest.mark.parametrize(
  ("ops", "message"),
  [
    ({"tahn": "full"}, "got 'tahn'. Closest: tan, tanh"),
    ({"tanh": "wide"}, "one of lower, range, full, follow; got 'wide' for 'tanh'"),
    ({"cholesky": "lower"}, "got 'cholesky'"),
  ],
)
def test_a_change_that_names_nothing_says_what_there_is(ops, message):
  with pytest.raises(ValueError, match=message):
    mpjax.PolicyMap({}, default="mixed_bfloat16", ops=ops)


def test_maps_with_other_tables_differ_and_print_back():
  changed = mpjax.PolicyMap({"tanh@": "float32"}, "mixed_bfloat16", ops={"exp": "follow"})
  assert changed != mpjax.PolicyMap({"tanh@": "float32"}, "mixed_bfloat16")
  assert eval(repr(changed), {"PolicyMap": mpjax.PolicyMap}) == changed
  assert mpjax.PolicyMap({}, "float32", ops=mpjax.DEFAULT_OPS).ops == ()
