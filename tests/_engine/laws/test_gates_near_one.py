"""Gates near one, and what is taken from one, keep their distance from it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _backends import rounded
from _both_formats import KEYS, POLICIES, W, both, cases, in_both_formats, matmuls
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


GATES = {"z": array(np.eye(4) * 0.1), "w": array(np.eye(4))}


def scanned(turn):
  def run(p, x):
    return lax.scan(lambda h, u: (turn(p, h, u), None), jnp.zeros(4), x)[0]

  return run


def associative(decay):
  def run(p, x):
    a = decay(x @ p["z"])
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return lax.associative_scan(combine, (a, (1 - a) * (x @ p["w"])))[1][-1]

  return run


sigmoid = jax.nn.sigmoid
update = lambda p, u: sigmoid(u @ p["z"] - 6)
forget = lambda p, u: sigmoid(u @ p["z"] + 6)
hard = lambda p, u: jax.nn.hard_sigmoid(u @ p["z"] / 50 + 2.98)
state = lambda p, u: jnp.tanh(u @ p["w"])
gru = lambda z, h, n: (1 - z) * h + z * n
lstm = lambda f, h, n: f * h + 0.01 * n


def ahead(turn, gate, new):
  """What needs no state is computed for all steps at once, before the loop."""

  def run(p, x):
    return lax.scan(
      lambda h, u: (turn(u[0], h, u[1]), None), jnp.zeros(4), (gate(p, x), new(p, x))
    )[0]

  return run


def in_two_loops(turn):
  def run(p, x):
    loop = lambda h, u: (turn(p, h, u), None)
    return lax.scan(lambda h, us: lax.scan(loop, h, us), jnp.zeros(4), x.reshape(64, 32, 4))[0]

  return run


@jax.custom_jvp
def own_jvp(y):
  return sigmoid(y + 6)


@jax.custom_vjp
def own_vjp(y):
  return sigmoid(y + 6)


@jax.custom_vjp
def twice_vjp(y):
  return sigmoid(y + 6)


@jax.custom_vjp
def own_sigmoid(y):
  return sigmoid(y + 6)


# What is stored is the function's own, written once more, with what else there is.
own_sigmoid.defvjp(
  lambda y: (own_sigmoid(y), (jnp.sin(y), jax.nn.sigmoid(y + 6))),
  lambda kept, g: (g * (kept[1] * (1 - kept[1])),),
)
twice_vjp.defvjp(lambda y: (twice_vjp(y), twice_vjp(y)), lambda s, g: (g * (s * (1 - s)),))
own_jvp.defjvp(lambda primals, tangents: jax.jvp(lambda y: sigmoid(y + 6), primals, tangents))
own_vjp.defvjp(lambda y: (own_vjp(y),) * 2, lambda s, g: (g * (s * (1 - s)),))

RECURRENCES = {
  "gru": scanned(lambda p, h, u: gru(update(p, u), h, state(p, u))),
  "lstm": scanned(lambda p, h, u: lstm(forget(p, u), h, state(p, u))),
  "jitted_gru": scanned(lambda p, h, u: jax.jit(gru)(update(p, u), h, jnp.tanh(u))),
  "jitted_lstm": scanned(lambda p, h, u: jax.jit(lstm)(forget(p, u), h, state(p, u))),
  "jitted_turn": scanned(jax.jit(lambda p, h, u: lstm(forget(p, u), h, state(p, u)))),
  "jitted_gates": scanned(
    lambda p, h, u: (lambda f, n: lstm(f, h, n))(
      *jax.jit(lambda p, u: (forget(p, u), state(p, u)))(p, u)
    )
  ),
  "remat": scanned(jax.checkpoint(lambda p, h, u: lstm(forget(p, u), h, state(p, u)))),
  "cond": scanned(
    lambda p, h, u: lax.cond(u[0] > -9, gru, lambda f, h, n: h, update(p, u), h, state(p, u))
  ),
  "custom_jvp": scanned(lambda p, h, u: lstm(own_jvp(u @ p["z"]), h, state(p, u))),
  "custom_vjp": scanned(lambda p, h, u: lstm(own_vjp(u @ p["z"]), h, state(p, u))),
  "custom_vjp_called_twice": scanned(lambda p, h, u: lstm(twice_vjp(u @ p["z"]), h, state(p, u))),
  "gate_stored_by_itself": scanned(lambda p, h, u: lstm(own_sigmoid(u @ p["z"]), h, state(p, u))),
  "hard_sigmoid": scanned(lambda p, h, u: lstm(hard(p, u), h, state(p, u))),
  "hard_gru": scanned(lambda p, h, u: gru(1 - hard(p, u), h, state(p, u))),
  "hard_sigmoid_ahead": ahead(lstm, lambda p, x: hard(p, x), state),
  "clipped": scanned(lambda p, h, u: lstm(jnp.clip(0.99 + u @ p["z"] / 50, 0, 1), h, state(p, u))),
  "cumprod_of_hard": lambda p, x: jnp.cumprod(hard(p, x), 0)[-1],
  "gru_ahead": ahead(gru, update, state),
  "lstm_ahead": ahead(lstm, forget, state),
  "jitted_gru_ahead": ahead(jax.jit(gru), update, state),
  "while": lambda p, x: (
    lambda z, n: lax.fori_loop(0, len(x), lambda i, h: gru(z[i], h, n[i]), jnp.zeros(4))
  )(update(p, x), state(p, x)),
  "one_gate": lambda p, x: (
    lambda f: lax.scan(lambda h, n: (lstm(f, h, n), None), jnp.zeros(4), state(p, x))[0]
  )(forget(p, x[0])),
  "two_loops": in_two_loops(lambda p, h, u: lstm(forget(p, u), h, state(p, u))),
  "forgets_last": scanned(lambda p, h, u: forget(p, u) * (h + 0.01 * state(p, u))),
  "array_of_ones": ahead(lambda z, h, n: (jnp.ones_like(z) - z) * h + z * n, update, state),
  "decay": scanned(lambda p, h, u: jnp.exp(-jax.nn.softplus(u @ p["z"] - 6)) * h + 0.01 * u),
  "linear_decay": scanned(lambda p, h, u: (1 - 0.003 * jax.nn.relu(u @ p["z"])) * h + 0.01 * u),
  "linear_decay_ahead": ahead(lstm, lambda p, x: 1 - 0.003 * jax.nn.relu(x @ p["z"]), state),
  "cumprod_of_decays": lambda p, x: jnp.cumprod(1 - 0.003 * jax.nn.relu(x @ p["z"]), 0)[-1],
  "mingru": associative(lambda y: sigmoid(y + 6)),
  "exponential": associative(lambda y: jnp.exp(-jax.nn.softplus(y - 6))),
  "cumprod": lambda p, x: jnp.cumprod(sigmoid(x @ p["z"] + 7), 0)[-1],
  "cumprod_of_a_map": lambda p, x: jnp.cumprod(lax.map(lambda u: sigmoid(u @ p["z"] + 7), x), 0)[
    -1
  ],
  "logarithms": lambda p, x: lax.scan(
    lambda h, z: (h + jax.jit(jnp.log)(1 - z), None), jnp.zeros(4), sigmoid(x @ p["z"] + 8)
  )[0],
  "by_einsum": lambda p, x: lax.scan(
    lambda h, z: (jnp.einsum("i,i->i", z, h), None), jnp.ones(4), sigmoid(x[:64] @ p["z"] + 6)
  )[0],
  "rows_by_einsum": lambda p, x: lax.scan(
    lambda s, z: (jnp.einsum("i,ij->ij", z, s), None),
    jnp.ones((4, 3)),
    sigmoid(x[:64] @ p["z"] + 6),
  )[0],
  "linear_attention": lambda p, x: lax.scan(
    lambda s, u: (
      jnp.einsum("i,ij->ij", sigmoid(u @ p["z"] + 6), s) + jnp.outer(u @ p["w"], u) / 100,
      None,
    ),
    jnp.zeros((4, 4)),
    x,
  )[0],
  "arc_tangent": scanned(
    lambda p, h, u: (lambda z: z * h + (1 - z) * (u @ p["w"]))(
      0.5 + jnp.arctan((u @ p["z"] + 6) * 20) / jnp.pi
    )
  ),
  "unrolled": lambda p, x: functools.reduce(
    lambda h, u: u * h, list(sigmoid(x[:64] @ p["z"] + 6)), jnp.ones(4)
  ),
}


@pytest.mark.quick(every=5)
@in_turns(("fn", "policy"), RECURRENCES, POLICIES)
def test_gates_and_decays_near_one_forget_at_the_rate_of_float32(fn, policy):
  found, want = in_both_formats(fn, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.03)


DIFFERENTIATED = ("lstm_ahead", "custom_jvp", "custom_vjp", "cond")


@in_turns(("fn", "policy"), {name: RECURRENCES[name] for name in DIFFERENTIATED}, POLICIES)
def test_so_they_do_where_they_are_differentiated(fn, policy):
  loss = lambda p, x: jnp.sum(fn(p, x))
  found, _ = rounded(jax.value_and_grad(mpjax.autocast(loss, policy)))(GATES, KEYS)
  np.testing.assert_allclose(found, loss(GATES, KEYS), rtol=0.03)


# In 16 bits a sigmoid that a rule stores by a second call is 1, and its slope 0.
STORED = ("custom_vjp_called_twice", "gate_stored_by_itself", "hard_sigmoid")
GRADIENTS = {
  "outside": lambda loss, policy: jax.grad(mpjax.autocast(loss, policy)),
  "inside": lambda loss, policy: mpjax.autocast(jax.grad(loss), policy),
}


@pytest.mark.quick(every=3)
@in_turns(
  ("fn", "way", "policy"), {name: RECURRENCES[name] for name in STORED}, GRADIENTS, POLICIES
)
def test_and_a_gate_has_its_derivative(fn, way, policy):
  loss = lambda p, x: jnp.sum(fn(p, x))
  run = lambda p, x: [grad(p, x) for grad in (way(loss, policy), jax.grad(loss))]
  got, exact = rounded(run)(GATES, KEYS)
  assert jnp.linalg.norm(got["z"] - exact["z"]) < 0.1 * jnp.linalg.norm(exact["z"])


@both
@pytest.mark.parametrize("has_cache", [False, True])
def test_gates_of_a_net_that_a_loop_feeds_with_tokens_are_as_narrow_as_elsewhere(has_cache, policy):
  def net(p, token, cache, n):
    x = p["w"][token]
    if has_cache:
      cache = cache.at[n].set(x @ p["w"])
      x = jax.nn.softmax((x @ p["w"]) @ cache.T) @ cache
    return jax.nn.silu(x @ p["w"]) @ p["w"], cache

  def tokens(p, token):
    def turn(c, n):
      logits, cache = net(p, *c, n)
      return (jnp.argmax(logits), cache), logits

    return lax.scan(turn, (token, jnp.zeros((20, 4))), jnp.arange(20))[1]

  found = equations(jax.make_jaxpr(mpjax.autocast(tokens, policy))({"w": W}, 2))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "logistic"} == {2}


@both
def test_a_gate_of_what_was_handed_on_twice_is_float32(policy):
  def delayed(w, x):
    gates = jax.nn.sigmoid(x @ w + 7)
    turn = lambda c, g: ((0.001 * c[0] + g * c[1], c[0]), None)
    return lax.scan(turn, (jnp.ones(4), jnp.ones(4)), gates)[0][0]

  found, want = in_both_formats(delayed, policy, 0.01 * jnp.eye(4), jnp.ones((200, 4)))
  np.testing.assert_allclose(found, want, rtol=0.01)


@both
def test_what_a_long_loop_multiplies_but_does_not_hand_on_stays_in_16_bits(policy):
  """A reset gate or an output gate: nothing multiplies up."""

  def turn(p, h, u):
    reset = sigmoid(u @ p["z"])
    return jnp.tanh((reset * h) @ p["w"])

  found = equations(jax.make_jaxpr(mpjax.autocast(scanned(turn), policy))(GATES, KEYS))
  (gate,) = [e for e in found if e.primitive.name == "logistic"]
  assert gate.outvars[0].aval.dtype.itemsize == 2


@both
def test_a_swish_and_a_gated_unit_stay_in_16_bits(policy):
  def fn(p, x):
    h = x @ p["w"]
    return (jax.nn.silu(h) * (x @ p["z"]) + jax.nn.glu(h)[:, :1]) @ p["w"]

  grad = jax.make_jaxpr(mpjax.autocast(fn, policy))(GATES, KEYS)
  found = [e for e in equations(grad) if e.primitive.name == "logistic"]
  assert {e.outvars[0].aval.dtype.itemsize for e in found} == {2}


POWERS = {
  "squared": lambda s: jnp.sqrt(1 - s**2),
  "by_square": lambda s: jnp.sqrt(1 - jnp.square(s)),
  "multiplied": lambda s: jnp.sqrt(1 - s * s),
  "cubed": lambda s: 1 - s**3,
  "to_a_power": lambda s: 1 - s**1.5,
  "root": lambda s: 1 - jnp.sqrt(s),
  "jitted": lambda s: 1 - jax.jit(lambda s: s**2)(s),
}


@in_turns(("fn", "policy"), POWERS, POLICIES)
def test_powers_of_a_gate_keep_their_distance_from_one(fn, policy):
  program = lambda p, x: fn(jnp.tanh(x[:64] @ p["w"] / 9 + 4))
  found, want = in_both_formats(program, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.05)


@both
def test_the_root_of_a_gate_near_zero_has_a_slope(policy):
  """A sigmoid of -20 is 0 in float16, where the slope of a root is infinite."""
  loss = lambda p, x: jnp.sum(jnp.sqrt(sigmoid(x[:64] @ p["w"] - 20)))
  run = lambda p, x: [jax.grad(mpjax.autocast(loss, policy))(p, x), jax.grad(loss)(p, x)]
  found, want = rounded(run)(GATES, KEYS)
  np.testing.assert_allclose(found["w"], want["w"], rtol=0.05)


@both
@cases(
  inverse=lambda h, x: x / sigmoid(h),
  odds=lambda h, x: (1 - sigmoid(h)) / sigmoid(h),
  squared=lambda h, x: x / sigmoid(h) ** 2,
)
def test_what_is_divided_by_a_gate_near_zero_is_finite(fn, policy):
  """A sigmoid of -20 is 0 in float16."""
  program = lambda p, x: fn(x[:64] @ p["w"] - 20, x[:64])
  found, want = in_both_formats(program, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.2, atol=0.01 * float(np.abs(want).max()))


half_tanh = lambda h: 0.5 * (1 + jnp.tanh(h / 2))
OTHER_WORDS = {
  "half_tanh": lambda h: 1 - half_tanh(h),
  "affine": lambda h: 1 - (sigmoid(h) * 0.5 + 0.5),
  "weighed": lambda h: 1 - (0.25 * sigmoid(h) + 0.75 * sigmoid(h + 1)),
  "divided": lambda h: 1 - (sigmoid(h) + 3) / 4,
  "turned_round": lambda h: -(sigmoid(h) * 0.9999 - 1),
  "scaled": lambda h: 1 - 0.9999 * sigmoid(h),
  "from_another_number": lambda h: 6 - 6 * sigmoid(h),
  "product": lambda h: 1 - sigmoid(h) * sigmoid(h + 1),
  "mean": lambda h: 1 - sigmoid(h).mean(-1),
  "largest": lambda h: 1 - (sigmoid(h) * 0.9999).max(-1),
  "mean_of_affine": lambda h: 1 - jnp.mean(half_tanh(h), 0),
  "distribution": lambda h: 1 - jax.scipy.stats.norm.cdf(h * 0.46),
  "hard_sigmoid": lambda h: 1 - jax.nn.hard_sigmoid(h * 0.43),
  "clipped": lambda h: 1 - jnp.clip(h / 6.98, 0, 1),
  "soft_sign": lambda h: 1 - jax.nn.soft_sign(h * 100),
  "share": lambda h: (lambda r: 1 - r / (r + 1))(jax.nn.relu(h * 100)),
  "two_sigmoids": lambda h: sigmoid(h + 1) - sigmoid(h - 1),
  "two_distributions": lambda h: -half_tanh(h - 1) + jax.scipy.stats.norm.cdf(h * 0.46),
  "part_of_one": lambda h: (sigmoid(h) - sigmoid(h - 1)) / sigmoid(h),
  "negated": lambda h: -sigmoid(h) + 1,
  "two_at_the_low_end": lambda h: jnp.tanh(1 - h) - jnp.tanh(2 - h),
  "rest_of_a_value": lambda h: h - sigmoid(h) * h,
  "value_of_the_rest": lambda h: h * sigmoid(h) - h,
  "jitted": lambda h: 1 - jax.jit(lambda a, h: a * sigmoid(h) + a)(0.5, h),
  "cond": lambda h: 1 - lax.cond(h[0, 0] < 99, half_tanh, jnp.zeros_like, h),
  "scanned": lambda h: lax.scan(lambda n, u: (n, 1 - half_tanh(u)), 0, h)[1],
  "remat": lambda h: 1 - jax.checkpoint(half_tanh)(h),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), OTHER_WORDS, POLICIES)
def test_one_minus_a_gate_is_as_exact_in_other_words(fn, policy):
  """What numbers, products and means make of gates and clips comes near a number, too."""
  x = 6.5 + jnp.arange(16.0).reshape(4, 4) / 32  # that both formats hold
  program = lambda p, x: fn(x @ p["w"])
  found, want = in_both_formats(program, policy, GATES, x)
  np.testing.assert_allclose(found, want, rtol=0.07)
  (product,) = matmuls(mpjax.autocast(program, policy), GATES, x)
  assert {v.aval.dtype.itemsize for v in (*product.invars, *product.outvars)} == {2}


def short(turn):
  """A hundred turns, which 16 bits could count."""

  def run(p, x):
    us = x[:101] * 0.2 @ p["w"]
    return lax.scan(lambda h, u: (turn(h, u), None), us[0] + 3, us[1:])[0]

  return run


flowing = lambda h, u: sigmoid(u + 5) * h + sigmoid(u) * jnp.tanh(u)
interpolating = lambda h, u: (lambda n: n + sigmoid(u + 5) * (h - n))(jnp.tanh(u))
SHORT = {
  "lstm": short(flowing),
  "gru": short(interpolating),
  "jitted": short(jax.jit(flowing)),
  "remat": short(jax.checkpoint(interpolating)),
  "cond": short(lambda h, u: lax.cond(u[0] > -9, flowing, lambda h, u: h, h, u)),
  "half_tanh": short(lambda h, u: 0.5 * (1 + jnp.tanh(2.5 + u / 2)) * h),
  "two_loops": lambda p, x: short(
    lambda h, u: lax.scan(lambda h, _: (flowing(h, u), None), h, None, length=4)[0]
  )(p, x[:25]),
  "one_gate": lambda p, x: (
    lambda z, us: functools.reduce(lambda h, u: u + z * (h - u), list(us), us[0] + 3)
  )(sigmoid(x[0] @ p["z"] + 5), x[:64] @ p["w"]),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), SHORT, POLICIES)
def test_a_gate_in_a_loop_of_a_hundred_turns_forgets_as_in_float32(fn, policy):
  found, want = in_both_formats(fn, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.007)


@both
def test_what_is_cut_with_a_stride_is_no_recurrence(policy):
  """Every other entry of a value and of its gate, halves that interleave, magnitudes of pairs."""

  def fn(p, x):
    h = x[:64] @ p["w"]
    cut = h[::2] * sigmoid(h)[::2] + h[1::2] * sigmoid(h)[1::2] + h[1::2] * h[1::2]
    return jnp.concatenate([cut[:, ::2] * cut[:, 1::2], cut[:, 1::2]], 1) @ p["w"]

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(GATES, KEYS))
  gates = [e for e in found if e.primitive.name in ("logistic", "tanh")]
  assert {e.outvars[0].aval.dtype.itemsize for e in gates} == {2}


@both
def test_a_small_number_and_the_bias_of_a_gate_are_no_numbers_near_one(policy):
  def fn(p, x):
    given = x[:64] @ p["w"] + 0.01, sigmoid(x[:64] @ p["z"] + 0.5)
    return lax.scan(lambda c, u: (u[0] * c * u[1], None), x[0], given)[0][None] @ p["w"]

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(GATES, KEYS))
  shifts = [e for e in found if e.primitive.name == "add" and e.invars[1].aval.shape == ()]
  assert {e.outvars[0].aval.dtype.itemsize for e in shifts} == {2}


@both
def test_what_does_not_come_near_what_it_is_taken_from_stays_in_16_bits(policy):
  """A gelu by tanh, the square of an output, a centered gate, a layer's norm, a few turns."""

  def fn(p, x):
    h = x[:64] @ p["w"]
    scaled = h * sigmoid(jnp.mean(h, 0) @ p["z"])
    centered = 2 * sigmoid(h) - 1 + (0.3 - sigmoid(h)) + (1 - 0.1 * (h * sigmoid(h)))
    normed = nn.LayerNorm(use_bias=False, use_scale=False).apply({}, jnp.tanh(h))
    few, _ = lax.scan(lambda h, _: (sigmoid(h) * h, None), h, None, length=8)
    return (scaled + centered + normed + few + 0.5 * h * (1 + jnp.tanh(0.8 * h))) @ p["w"]

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(GATES, KEYS))
  found = [e for e in found if e.primitive.name in ("logistic", "tanh")]
  assert {e.outvars[0].aval.dtype.itemsize for e in found} == {2}


near_zero = lambda p, x: x[:64] @ p["w"] / 20
ONE_AT_ZERO = {
  "cosine": lambda p, x: 1 - jnp.cos(near_zero(p, x)),
  "cosine_first": lambda p, x: jnp.cos(near_zero(p, x)) - 1,
  "hyperbolic": lambda p, x: jnp.cosh(near_zero(p, x)) - 1,
  "of_a_piece": lambda p, x: 1 - jnp.split(jnp.cos(near_zero(p, x)), 2)[1],
  "jitted": lambda p, x: 1 - jax.jit(jnp.cos)(near_zero(p, x)),
  "scanned": lambda p, x: lax.scan(
    lambda n, h: (n + (1 - jnp.cos(h)), None), jnp.zeros(4), near_zero(p, x)
  )[0],
  "logarithm": lambda p, x: jnp.log(jnp.cosh(near_zero(p, x))),
}


@both
@cases(**ONE_AT_ZERO)
def test_what_is_one_at_zero_keeps_its_distance_from_one(fn, policy):
  found, want = in_both_formats(fn, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.03, atol=1e-6)


@both
def test_a_cosine_that_is_not_subtracted_from_one_stays_in_16_bits(policy):
  found = equations(
    jax.make_jaxpr(mpjax.autocast(lambda p, x: jnp.cos(x @ p["w"]), policy))(GATES, KEYS)
  )
  (cosine,) = [e for e in found if e.primitive.name == "cos"]
  assert cosine.outvars[0].aval.dtype.itemsize == 2
