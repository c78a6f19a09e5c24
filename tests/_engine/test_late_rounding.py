"""Numbers that 16 bits do not hold, times what comes out of matmuls.

What the matmuls give here both formats hold, so that whatever is off is off by the number.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import mpjax
from _arrays import array
from _backends import ROUNDING
from _jaxprs import equations
from _turns import in_turns

POLICIES = ("mixed_bfloat16", "mixed_float16")
DTYPES = dict(zip(POLICIES, (jnp.bfloat16, jnp.float16), strict=True))
both = pytest.mark.parametrize("policy", POLICIES)

X = array(np.arange(32).reshape(8, 4) / 16 - 1)
EYE = array(np.eye(4))
REWARDS = array(np.linspace(0, 1, 8))


def steps(turn):
  """Sixteen turns of a step, from what is data."""
  return lambda k: lax.scan(lambda x, k: (turn(x, k), None), X, jnp.broadcast_to(k, (16, 8, 4)))[0]


MULTIPLES = {
  "step": steps(lambda x, k: x + 1 / 60 * k),
  "divided": steps(lambda x, k: x - k / 0.6),
  "divided_by_what_16_bits_hold": steps(lambda x, k: x + (k + 2 * k + k) / 60),
  "read_by_two": steps(lambda x, k: (lambda d: (x + d) - (0.5 * x - d))(0.3 * k)),
  "cut": steps(lambda x, k: x + (0.3 * jnp.concatenate([k, k]))[2:10]),
  "combined": steps(lambda x, k: x + 0.3 * (k + 0.7 * k.reshape(4, 8).reshape(8, 4))),
  "of_a_function": steps(jax.jit(lambda x, k: x + 0.9 * k)),
  "discounted": lambda k: REWARDS[:, None] + 0.99 * k,
  "spread": lambda k: REWARDS[:, None, None] - (-0.99 * k)[None].transpose(1, 0, 2),
  "filled": lambda k: X + jnp.full((1, 4), 0.99) * k,
  "added_up": lambda k: jnp.sum(0.99 * k, 1),
  "times_data": lambda k: (0.3 * k) * REWARDS[:, None],
  "times_what_is_made_of_data": lambda k: (0.3 * k).reshape(4, 8) * jnp.tanh(X).reshape(4, 8),
  "returned": lambda k: 0.18215 * k,
  "returned_moved": lambda k: (0.7 * k).T,
}


OWN = array(np.arange(8), np.int32)
picked = lambda s: jnp.take_along_axis(s, OWN[:, None], 1)[:, 0]
CONTRASTS = {
  "diagonal": lambda g: jax.nn.logsumexp(g / 0.07, 1) - jnp.diag(g / 0.07),
  "masked": lambda g: (lambda s: jax.nn.logsumexp(s, 1) - (s * jnp.eye(8)).sum(1))(g / 0.07),
  "index": lambda g: (lambda s: jax.nn.logsumexp(s, 1) - s[OWN, OWN])(g / 0.07),
  "along": lambda g: (lambda s: jax.nn.logsumexp(s, 1) - picked(s))(g / 0.07),
  "log_softmax": lambda g: -jnp.diag(jax.nn.log_softmax(g / 0.07)),
  "optax": lambda g: optax.softmax_cross_entropy_with_integer_labels(g / 0.07, OWN),
  "diagonal_masked": lambda g: optax.softmax_cross_entropy_with_integer_labels(
    jnp.where(jnp.eye(8, dtype=bool), -1e9, g / 0.07), (OWN + 1) % 8
  ),
  "diagonal_set": lambda g: optax.softmax_cross_entropy_with_integer_labels(
    jnp.fill_diagonal(g / 0.07, -1e9, inplace=False), (OWN + 1) % 8
  ),
  "joined": lambda g: -jnp.diag(jax.nn.log_softmax(jnp.concatenate([g / 0.07, g / 0.07], 1))),
  "scaled_and_masked_in_a_function": lambda g: (
    -jax.nn.log_softmax(jax.jit(lambda g: jnp.where(jnp.eye(8, dtype=bool), -1e9, g) / 0.07)(g))[
      OWN, (OWN + 1) % 8
    ]
  ),
  "exponentials": lambda g: (lambda e: -jnp.log(jnp.diag(e) / e.sum(1)))(jnp.exp(g / 0.07)),
}


@in_turns(("fn", "policy"), CONTRASTS, POLICIES)
def test_scores_over_a_temperature_round_once_and_so_do_their_cotangents(fn, policy):
  """Of a confident choice there come back the probability and -1, which cancel but for 1e-3."""
  h = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 8)))[0] + 0.06
  rounded = lambda a, b: (
    lambda g: g + lax.stop_gradient(g.astype(DTYPES[policy]).astype(jnp.float32) - g)
  )(a @ b.T)
  h = h.astype(DTYPES[policy]).astype(jnp.float32)
  by_hand = lambda a, b: jnp.mean(fn(rounded(a, b)))
  ours = mpjax.autocast(lambda a, b: jnp.mean(fn(a @ b.T)), policy)
  run = lambda f: jax.jit(jax.value_and_grad(f), compiler_options=ROUNDING)(h, h)
  (value, grad), (want, of_want) = run(ours), run(by_hand)
  np.testing.assert_allclose(value, want, rtol=1e-4)
  np.testing.assert_allclose(grad, of_want, atol=0.02 * float(jnp.abs(of_want).max()))


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), MULTIPLES, POLICIES)
def test_a_multiple_that_float32_reads_is_one_of_the_number_that_was_written(fn, policy):
  def both_ways(w):
    f = lambda w: fn(X @ w)
    value, transpose = jax.vjp(f, w)
    return value, *transpose(jnp.ones_like(value))

  inside = mpjax.autocast(both_ways, policy)
  outside = lambda w: jax.vjp(mpjax.autocast(lambda w: fn(X @ w), policy), w)
  got, of_got = jax.jit(inside, compiler_options=ROUNDING)(EYE)
  want, of_want = both_ways(EYE)
  np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))
  value, transpose = outside(EYE)
  np.testing.assert_allclose(value, want, atol=2e-6 * float(jnp.abs(want).max()))
  for gradient in (of_got, *transpose(jnp.ones_like(want))):  # their cotangents round
    np.testing.assert_allclose(gradient, of_want, rtol=0.01, atol=0.01)


@both
@pytest.mark.parametrize(
  "fn",
  [
    lambda h, w: jnp.tanh(0.3 * h) @ w,
    lambda h, w: jnp.sin(h / 0.3 + 0.7 * h) @ w,
    lambda h, w: (h + 0.1 * jnp.maximum(h @ w, 0)) @ w,
    lambda h, w: X + checkpoint_name(0.3 * h, "stored"),
  ],
  ids=["scaled", "summed", "residual", "named"],
)
def test_what_goes_on_to_a_matmul_or_is_stored_rounds_with_its_number(fn, policy):
  network = mpjax.autocast(lambda w: jnp.sum(fn(X @ w, w)), policy)
  found = equations(jax.make_jaxpr(network)(EYE))
  products = [e for e in found if e.primitive.name in ("mul", "div")]
  assert products
  assert {e.outvars[0].aval.dtype.itemsize for e in products} == {2}


NEAREST = array(abs(np.subtract.outer(range(8), range(8))) % 4, np.int32)
PICKS = {
  "along": lambda s: jnp.take_along_axis(s, NEAREST, 1),
  "index": lambda s: s[OWN[:, None], NEAREST],
  "vmap": lambda s: jax.vmap(lambda s, n: s[n])(s, NEAREST),
}


@in_turns(("pick", "policy"), PICKS, POLICIES)
def test_scores_of_an_attention_that_are_picked_by_position_stay_narrow(pick, policy):
  def attend(w, x):
    h = x @ w
    return jnp.sum(jax.nn.softmax(h @ h.T + pick(h @ w)) @ h)

  found = equations(jax.make_jaxpr(mpjax.autocast(attend, policy))(EYE, X))
  picked = [e.outvars[0].aval for e in found if e.primitive.name == "gather"]
  assert {aval.dtype.itemsize for aval in picked if aval.shape == (8, 8)} == {2}


@in_turns(("pick", "policy"), {"along": picked, "index": lambda s: s[OWN, OWN]}, POLICIES)
def test_logits_of_labels_are_float32_where_the_losses_are_weighed_by_a_matmul(pick, policy):
  def loss(w, x):
    scores = (x @ w) @ (x @ w).T
    return jnp.sum((jax.nn.logsumexp(scores, 1) - pick(scores)).reshape(2, 4) @ w)

  found = equations(jax.make_jaxpr(mpjax.autocast(loss, policy))(EYE, X))
  assert {e.outvars[0].aval.dtype.name for e in found if e.primitive.name == "gather"} == {
    "float32"
  }


@both
def test_a_norm_reads_a_multiple_in_16_bits(policy):
  """A norm reads it several times and stores it for its derivative."""

  def norm(w):
    h = 0.3 * (X @ w)
    return jnp.sum((h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5))

  (product, *_) = [
    e
    for e in equations(jax.make_jaxpr(mpjax.autocast(norm, policy))(EYE))
    if e.primitive.name == "mul"
  ]
  assert product.outvars[0].aval.dtype.itemsize == 2


def cut_wherever_read(h):
  """Kernels between two halves, which are compared."""

  def mean(a, b):
    distances = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return jnp.exp(-distances / 16).mean()

  return mean(h[:4], h[:4]) + mean(h[4:], h[4:]) - 2 * mean(h[:4], h[4:])


@both
def test_what_comes_back_to_a_part_that_is_cut_twice_meets_in_float32(policy):
  loss = mpjax.autocast(lambda w, x: cut_wherever_read(x @ w), policy)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(EYE, X)
  sums = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in ("add", "add_any")]
  assert len(sums) > 8
  assert {var.aval.dtype for eqn in sums for var in eqn.invars} == {jnp.dtype("float32")}


@both
def test_what_is_cut_for_a_layer_is_cut_in_16_bits(policy):
  """However often, and beside what is cut for float32."""

  def fn(ws, x):
    h = x @ ws[0]
    return h[:4] @ ws[1], h[:4] @ ws[1].T, jnp.exp(h[:4])

  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))([EYE, EYE], X)
  cuts = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "slice"]
  assert [eqn.outvars[0].aval.dtype for eqn in cuts[:2]] == [jnp.dtype(DTYPES[policy])] * 2


TURNED = {
  "cond": lambda h, p: lax.cond(p > 0, lambda h: -h, lambda h: h, h),
  "switch": lambda h, p: lax.switch(2, [lambda h: h, jnp.negative, lambda h: 2 * h], h),
  "while": lambda h, p: lax.stop_gradient(
    lax.while_loop(lambda h: jnp.sum(h) > 1e9, lambda h: h * 0.3, lax.stop_gradient(h))
  ),
  "scan": lambda h, p: lax.scan(lambda h, _: (h * 0.3, None), h, None, length=3)[0],
  "two": lambda h, p: jax.jit(lambda h: (0.3 * h, h + h))(h)[0],
  "beside": lambda h, p: h * lax.cond(p > 0, lambda: 0.3, lambda: 0.5),
}


@both
@pytest.mark.parametrize("turn", TURNED.values(), ids=TURNED)
def test_a_function_that_is_called_may_hold_any_construct(turn, policy):
  loss = lambda w, x: jnp.sum(jax.jit(turn)(x @ w, x[0, 0]) + x)
  run = lambda fn: jax.value_and_grad(fn)(EYE, X)
  found, want = run(mpjax.autocast(loss, policy)), run(loss)
  for got, exact in zip(found, want, strict=True):
    np.testing.assert_allclose(got, exact, rtol=0.01, atol=0.01)
