"""Gradient steps inside, and parameters that others join, move as in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import mpjax
from _backends import ROUNDING, rounded
from _both_formats import DATA, POLICIES, W, both, cases, in_both_formats, loss, matmuls
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


def sgd(w, x):
  return w - 1e-3 * jax.grad(loss)(w, x)


def by_hand(w, x):
  y = x @ w
  return w - 1e-3 * (x.T @ (y * (2 / y.size)))


def rows(w, x):
  """The delta rule, one example after the other."""
  step = lambda w, u: (w - 1e-3 / 8 * jnp.outer(u, u @ w) / 2, None)
  return lax.scan(step, w, x)[0]


def optimizer(tx):
  def step(w, x):
    state = tx.init(w)
    for _ in range(2):
      updates, state = tx.update(jax.grad(loss)(w, x), state, w)
      w = optax.apply_updates(w, updates)
    return w

  return step


STEPS = {
  "sgd": sgd,
  "by_hand": by_hand,
  "rows": rows,
  "jitted": jax.jit(sgd),
  "jitted_update": lambda w, x: jax.jit(lambda w, g: w - 1e-3 * g)(w, jax.grad(loss)(w, x)),
  "added": lambda w, x: w + -1e-3 * jax.grad(loss)(w, x),
  "remat": lambda w, x: w - 1e-3 * jax.grad(jax.checkpoint(loss))(w, x),
  "decayed": lambda w, x: w * (1 - 1e-5) - 1e-3 * jax.grad(loss)(w, x),
  "linear": lambda w, x: w - 1e-3 * jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w) / 32,
  "momentum": optimizer(optax.sgd(1e-3, momentum=0.9)),
  "adam": optimizer(optax.adam(1e-4)),
}
LOOPS = {
  "once": lambda step: step,
  "scan": lambda step: (
    lambda w, x: lax.scan(lambda w, _: (step(w, x), None), w, None, length=50)[0]
  ),
  "fori": lambda step: lambda w, x: lax.fori_loop(0, 50, lambda _, w: step(w, x), w),
  "while": lambda step: (
    lambda w, x: lax.while_loop(lambda c: c[1] < 50, lambda c: (step(c[0], x), c[1] + 1), (w, 0))[0]
  ),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "loop", "policy"), STEPS, LOOPS, POLICIES, turning=2)
def test_a_gradient_step_moves_a_parameter_by_what_float32_moves_it(fn, loop, policy):
  found, want = in_both_formats(loop(fn), policy, W, DATA)
  np.testing.assert_allclose(found - W, want - W, rtol=0.03)


@both
def test_the_gradients_of_an_inner_loop_leave_their_matmuls_in_float32(policy):
  """Model-agnostic meta-learning: a step inside of a loss that is differentiated itself."""

  def meta(w, x):
    return loss(sgd(w, x), x)

  (*_, inner, _) = matmuls(mpjax.autocast(meta, policy), W, DATA)
  assert inner.outvars[0].aval.dtype == jnp.float32
  assert {v.aval.dtype.itemsize for v in inner.invars} == {2}
  exact = jax.grad(meta)(W, DATA)
  got = rounded(jax.grad(mpjax.autocast(meta, policy)))(W, DATA)
  np.testing.assert_allclose(got, exact, rtol=0.03)


@both
def test_a_bias_and_a_table_of_positions_still_follow_the_matmul(policy):
  def fn(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) + p["positions"]

  p = {"w": W, "b": jnp.ones(4), "positions": jnp.ones((1, 4))}
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(p, DATA)
  adds = [e for e in equations(jaxpr) if e.primitive.name == "add"]
  assert {e.outvars[0].aval.dtype.itemsize for e in adds} == {2}


@both
def test_a_bias_that_is_spread_has_its_gradient_summed_in_float32(policy):
  fn = mpjax.autocast(lambda b, x: (x @ W + b[None]).sum(), policy)
  grad = rounded(jax.grad(fn))(jnp.zeros(4), jnp.ones((4096, 4)))
  np.testing.assert_array_equal(grad, np.full(4, 4096.0))


@both
def test_so_has_one_that_the_rows_of_a_device_share(policy):
  P, auto = jax.sharding.PartitionSpec, (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ("d",), axis_types=auto)
  add = lambda b, x, w: lax.psum((x @ w + b).sum(), "d")
  fn = jax.shard_map(add, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P())
  grad = rounded(jax.grad(mpjax.autocast(fn, policy)))(jnp.zeros(4), jnp.ones((3002, 4)), W)
  np.testing.assert_array_equal(grad, np.full(4, 3002.0))


@both
def test_so_has_a_number_that_scales_all(policy):
  """W is an operand: XLA's CPU backend missums a matmul with a constant of equal numbers."""
  fn = mpjax.autocast(lambda s, x, w: (s * (x @ w)).sum(), policy)
  assert float(rounded(jax.grad(fn))(jnp.float32(1), jnp.ones((4096, 4)), W)) == 4096 * 4 * 2


@both
def test_a_class_token_is_put_before_the_sequence(policy):
  fn = lambda p, x: jnp.concatenate([p["token"], x @ p["w"]]).sum(0)
  p = {"token": jnp.ones((1, 4)), "w": W}
  np.testing.assert_allclose(rounded(mpjax.autocast(fn, policy))(p, DATA), fn(p, DATA), rtol=1e-2)


MERGED = {
  "added": lambda p: p["w"] + p["a"] @ p["b"],
  "scaled": lambda p: p["w"] + 0.5 * (p["a"] @ p["b"]),
  "subtracted": lambda p: p["w"] - p["a"] @ p["b"],
  "second": lambda p: jnp.einsum("ir,rj->ij", p["a"], p["b"]) + p["w"],
  "turned": lambda p: p["w"].T + (p["a"] @ p["b"]).T,
  "jitted": lambda p: jax.jit(lambda w, a, b: w + a @ b)(p["w"], p["a"], p["b"]),
  "jitted_change": lambda p: p["w"] + jax.jit(jnp.matmul)(p["a"], p["b"]),
  "mapped": lambda p: lax.map(
    lambda p: p["w"] + p["a"] @ p["b"], jax.tree.map(lambda v: v[None], p)
  )[0],
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), MERGED, POLICIES)
def test_a_parameter_with_a_low_rank_change_is_as_exact_as_it_was(fn, policy):
  p = {"w": W + 1e-4, "a": jnp.full((4, 2), 1e-2), "b": jnp.full((2, 4), 1e-2)}
  found, want = in_both_formats(fn, policy, p)
  np.testing.assert_allclose(found, want, rtol=1e-6)
  forward = mpjax.autocast(lambda p, x: x @ fn(p), policy)
  *_, product = matmuls(forward, p, DATA)
  assert {v.aval.dtype.itemsize for v in (*product.invars, *product.outvars)} == {2}


@both
@cases(
  queries=lambda p: (lambda t: t + t @ p["w"])(jnp.broadcast_to(p["w"], (8, 4, 4))),
  bias=lambda p: p["w"] @ p["w"] + p["a"][:, 0],
  vector=lambda p: p["w"][0] @ p["w"] + p["a"][:, 0],
)
def test_what_is_spread_over_a_batch_or_is_a_bias_is_no_merged_parameter(fn, policy):
  p = {"w": W, "a": jnp.full((4, 2), 1e-2)}
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(p))
  (add,) = (e for e in found if e.primitive.name == "add")
  assert add.outvars[0].aval.dtype.itemsize == 2


def kept(update):
  """A function that gives back the state that it was given, one entry updated."""
  return lambda s, x: {**s, "m": update(s["m"], x @ s["w"])}


STATES = {
  "sum": kept(lambda m, h: m + h.T @ h),
  "sum_of_rows": kept(lambda m, h: m + (jnp.ones(8) @ h)[:, None]),
  "average": kept(lambda m, h: 0.995 * m + 0.005 * h[:4]),
  "second_moment": kept(lambda m, h: 0.995 * m + 0.005 * (h.T @ h) / 8),
  "guarded": kept(lambda m, h: jnp.where(jnp.isfinite(h[:4]), 0.995 * m + 0.005 * h[:4], m)),
  "jitted": kept(jax.jit(lambda m, h: 0.995 * m + 0.005 * h[:4])),
  "branch": kept(
    lambda m, h: lax.cond(h.sum() > 0, lambda m, h: 0.995 * m + 0.005 * h, lambda m, _: m, m, h[:4])
  ),
  "slot": kept(lambda m, h: jnp.concatenate([m[:1] + h[:1], m[1:]])),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), STATES, POLICIES)
def test_a_state_that_is_returned_is_updated_in_float32(fn, policy):
  """As a program outside of the function hands it on: nothing inside tells that it is a sum."""
  state = {"w": W, "m": jnp.full((4, 4), 5.0)}

  def steps(state, x, policy):
    step = mpjax.autocast(fn, policy)
    return lax.fori_loop(0, 300, lambda _, s: step(s, x), state)["m"]

  run = jax.jit(steps, static_argnums=2, compiler_options=ROUNDING)
  found, want = (run(state, DATA, p) - 5.0 for p in (policy, "float32"))
  np.testing.assert_allclose(found, want, rtol=0.01, atol=1e-6)


@both
def test_a_slope_and_a_scale_that_layers_share_are_no_decays(policy):
  def fn(p, x):
    h = x @ p["w"]
    for _ in range(6):
      h = h + h @ p["w"]
      h = jnp.where(h > 0, h, p["slope"] * h)
      h = (h + jnp.tanh(h @ p["w"])) * p["scale"]
    return h

  p = {"w": W, "slope": jnp.array(0.9), "scale": jnp.full(4, 0.9)}
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(p, DATA))
  products = [e for e in found if e.primitive.name in ("mul", "add")]
  assert {e.outvars[0].aval.dtype.itemsize for e in products} == {2}
