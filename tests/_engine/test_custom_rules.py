"""Calls of JAX's outlying modules are rewritten, or run as traced and are reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.experimental import compute_on, sparse
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mpjax
from _jaxprs import contractions, primitives, wide_contractions
from _turns import in_turns

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
every_policy = pytest.mark.parametrize("policy", COMPUTE)


@jax.custom_vjp
def rematerialized(x, w):
  return jnp.tanh(x @ w)


def rematerialized_forward(x, w):
  y = jnp.tanh(x @ w)
  return y, (x, w, y)


def rematerialized_backward(residuals, ct):
  x, w, y = residuals
  moved = 3.0 * ct * (1 - y * y)
  return moved @ w.T, x.T @ moved


rematerialized.defvjp(rematerialized_forward, rematerialized_backward, optimize_remat=True)


def by_linear_call(x, w):
  return linear_call(lambda w, x: x @ w, lambda w, ct: 3.0 * ct @ w.T, w, x)


# Its first release with a primitive of its own called it so.
on_device = getattr(compute_on, "compute_on2", compute_on.compute_on)


def by_compute_on(x, w):
  place = {"compute_type": "device_host", "out_memory_spaces": jax.memory.Space.Device}
  return on_device(lambda x, w: jnp.tanh(x @ w), **place)(x, w)


CALLS = {
  "optimize_remat": rematerialized,
  "optimize_remat_in_checkpoint": jax.checkpoint(rematerialized),
  "linear_call": lambda x, w: by_linear_call(x, lax.stop_gradient(w)) + x @ w,
  "metadata": lambda x, w: set_xla_metadata(x @ w, key="value"),
}


@pytest.fixture(scope="module")
def operands():
  random = np.random.default_rng(0)
  w, x = random.normal(size=(4, 4)) / 2, random.normal(size=(2, 4))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


@pytest.mark.quick(every=3)
@in_turns(("name", "policy"), list(CALLS), list(COMPUTE))
def test_a_call_is_narrow_with_the_users_rules(name, policy, operands):
  call = CALLS[name]
  losses = {
    "plain": lambda w, x: jnp.sum(call(x @ w, w) ** 2),
    "scan": lambda w, x: jnp.sum(lax.scan(lambda c, _: (call(c, w), None), x, None, length=2)[0]),
  }
  for loss in losses.values():
    want = jax.jit(jax.grad(loss))(*operands)
    for grad in (jax.grad(mpjax.autocast(loss, policy)), mpjax.autocast(jax.grad(loss), policy)):
      assert not wide_contractions(jax.make_jaxpr(grad)(*operands), COMPUTE[policy])
      got = jax.jit(grad)(*operands)
      assert got.dtype == jnp.float32
      assert jnp.linalg.norm(got - want) < 2.0**-5 * jnp.linalg.norm(want)


def test_a_checkpoint_drops_what_the_forward_pass_stores_as_without_a_policy(operands):
  """Its first pass takes the function in the place of the forward pass."""
  loss = lambda w, x: jnp.sum(jax.checkpoint(rematerialized)(x, w))
  found = [
    primitives(jax.make_jaxpr(jax.grad(fn))(*operands))["remat_opt"]
    for fn in (loss, mpjax.autocast(loss, "mixed_bfloat16"))
  ]
  assert found[0] == found[1]


@every_policy
def test_a_composite_keeps_its_name_and_is_narrow(policy, operands):
  fn = lambda w, x: lax.composite(lambda x, w: jnp.tanh(x @ w), "my.layer")(x, w)
  closed = jax.make_jaxpr(mpjax.autocast(fn, policy))(*operands)
  assert primitives(closed)["composite"] == 1
  assert contractions(closed) and not wide_contractions(closed, COMPUTE[policy])
  np.testing.assert_allclose(
    jax.jit(mpjax.autocast(fn, policy))(*operands), fn(*operands), atol=0.02
  )


@every_policy
def test_what_is_computed_elsewhere_is_narrow(policy, operands):
  loss = lambda w, x: by_compute_on(x, w).sum()
  for grad in (jax.grad(mpjax.autocast(loss, policy)), mpjax.autocast(jax.grad(loss), policy)):
    closed = jax.make_jaxpr(grad)(*operands)
    assert primitives(closed)["compute_on"] == 2
    assert contractions(closed) and not wide_contractions(closed, COMPUTE[policy])


@every_policy
def test_each_device_runs_its_part_of_a_partitioned_function_under_the_policy(policy):
  @custom_partitioning
  def layer(x, w):
    return jnp.exp(x @ w)

  def partition(mesh, arguments, result):
    del result
    rows = NamedSharding(mesh, PartitionSpec("i"))
    whole = NamedSharding(mesh, PartitionSpec())
    return mesh, lambda x, w: jnp.exp(x @ w), rows, (rows, whole)

  layer.def_partition(partition=partition, sharding_rule="i j, j k -> i k")
  mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
  random = np.random.default_rng(0)
  w = jnp.asarray(random.normal(size=(4, 4)) / 4, jnp.float32)
  x = jnp.asarray(random.normal(size=(4, 4)) / 4, jnp.float32)
  x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("i")))
  cast = jax.jit(mpjax.autocast(lambda w, x: layer(x, w), policy))
  assert not wide_contractions(jax.make_jaxpr(cast)(w, x), COMPUTE[policy])
  np.testing.assert_allclose(cast(w, x), jnp.exp(x @ w), rtol=0.02)


@pytest.mark.quick(every=2, start=1)
@every_policy
def test_a_compiled_function_and_a_sparse_product_run_as_traced_and_are_reported(policy, operands):
  exported = jax.export.export(jax.jit(lambda x: x @ x.T))(operands[1])
  matrix = sparse.BCOO.fromdense(operands[0])
  calls = {
    "call_exported": lambda w, x: exported.call(x) @ (x @ w),
    "bcoo_dot_general": lambda w, x: (matrix @ x.T).T @ w,
  }
  for name, fn in calls.items():
    cast = mpjax.autocast(fn, policy)
    closed = jax.make_jaxpr(cast)(*operands)
    assert primitives(closed)[name] and not wide_contractions(closed, COMPUTE[policy])
    np.testing.assert_allclose(cast(*operands), fn(*operands), rtol=0.05, atol=0.05)
    report = mpjax.inspect.explain(fn, policy, *operands)
    assert name in {found.op for found in report.unknown}


# The rule of a user's own batching ---------------------------------------------------------------


@jax.custom_batching.custom_vmap
def shares(w, x):
  return w @ w, jnp.tanh(x @ w)


@shares.def_vmap
def shares_rule(size, batched, w, x):
  del size
  return (w @ w, jnp.tanh(x @ w)), (False, batched[1])


@every_policy
def test_what_a_batching_rule_shares_is_shared(policy):
  w, xs = jnp.eye(3) / 2, jnp.ones((5, 3))
  run = jax.vmap(mpjax.autocast(shares, policy), (None, 0), (None, 0))
  shared, each = run(w, xs)
  np.testing.assert_allclose(shared, w @ w)
  np.testing.assert_allclose(each, jnp.tanh(xs @ w), rtol=0.01)


@every_policy
def test_tangents_alone_are_batched(policy):
  w, x = jnp.eye(3) / 2, jnp.arange(3.0)
  own = lambda w, x: shares(w, x)[1]
  found = jax.jacfwd(mpjax.autocast(own, policy), 1)(w, x)
  np.testing.assert_allclose(found, jax.jacfwd(jax.jit(own), 1)(w, x), rtol=0.02, atol=1e-3)
  inside = mpjax.autocast(lambda w, x: jax.jacfwd(own, 1)(w, x), policy)(w, x)
  np.testing.assert_allclose(inside, found, rtol=0.02, atol=1e-3)


# Mutable references -------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("start", [0.0, [0.0, 0.0, 0.0]], ids=["scalar", "array"])
def test_a_reference_from_outside_is_written(start, policy):
  w, x, ref = jnp.eye(3), jnp.ones((2, 3)), jax.new_ref(jnp.asarray(start))

  def given(w, x, ref):
    ref[...] = ref[...] + 1.0
    return jnp.sum(x @ w)

  mpjax.autocast(given, policy)(w, x, ref)
  jax.grad(mpjax.autocast(given, policy))(w, x, ref)
  mpjax.autocast(lambda w, x: given(w, x, ref), policy)(w, x)
  np.testing.assert_array_equal(ref[...], 3.0)


@jax.custom_vjp
def stash_gradient(refs, x):
  """The identity, which writes the gradient of its result into a mutable array."""
  return x


def stash_backward(residuals, ct):
  refs, x = residuals
  refs["gradient"][...] = ct * x
  return None, ct


stash_gradient.defvjp(lambda refs, x: (x, (refs, x)), stash_backward)


def stashing(w, x, ref):
  return jnp.sum(jnp.sin(stash_gradient({"gradient": ref}, x @ w)) ** 2)


@every_policy
@pytest.mark.parametrize(
  "inside",
  [
    lambda f: f,
    jax.jit,
    jax.checkpoint,
    lambda f: lambda w, *rest: lax.fori_loop(0, 1, lambda _, c: c + f(w, *rest), 0.0),
  ],
  ids=["plain", "jit", "checkpoint", "scan"],
)
def test_a_rule_hands_a_mutable_operand_to_its_backward_pass(inside, policy):
  w, x = jax.random.normal(jax.random.key(0), (4, 4)), jnp.ones((2, 4))

  def run(fn):
    ref = jax.new_ref(jnp.zeros((2, 4)))
    return jax.grad(fn)(w, x, ref), ref[...]

  under_policy = mpjax.autocast(inside(stashing), policy)
  for fn in (under_policy, jax.jit(under_policy)):
    for found, exact in zip(run(fn), run(stashing), strict=True):
      assert found.dtype == jnp.float32
      np.testing.assert_allclose(found, exact, rtol=0.05, atol=0.05)


@every_policy
def test_a_rule_does_not_differentiate_a_mutable_array_in_silence(policy):
  def loss(x):
    return jnp.sum(stash_gradient({"gradient": jax.new_ref(jnp.sin(x))}, x))

  jax.grad(loss)(jnp.ones(3))
  with pytest.raises(ValueError, match=r"Got Ref\{float32\[3\]\} that was made in .* ref\["):
    jax.grad(mpjax.autocast(loss, policy))(jnp.ones(3))
