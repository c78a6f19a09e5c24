"""Constants that float16 does not hold: masks in all usual writings, guards, and running maxima.

A finite constant never turns into a NaN or an infinity that float32 has not, and rows that are not
wholly masked agree with float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import mpjax
from _arrays import array
from _jaxprs import equations
from _turns import in_turns

UNIT = {"mixed_bfloat16": 2.0**-8, "mixed_float16": 2.0**-11}
every_policy = pytest.mark.parametrize("policy", UNIT)


pytestmark = pytest.mark.usefixtures("promotion_of_users")


# Rows of scores: half masked, wholly masked, not masked, all but one masked.
MASK = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
WHOLLY = ~MASK.any(1)
LOWEST = float(np.finfo(np.float32).min)


def added(low):
  return lambda s, m: s + (1 - m.astype(s.dtype)) * low


def chosen(low):
  return lambda s, m: jnp.where(m, s, low)


WRITINGS = {
  "where_1e9": chosen(-1e9),
  "where_1e30": chosen(-1e30),
  "where_1e4": chosen(-1e4),
  "where_lowest": chosen(LOWEST),
  "where_infinity": chosen(-np.inf),
  "where_numpy": chosen(np.float32(-1e9)),
  "where_array": lambda s, m: jnp.where(m, s, jnp.full_like(s, -1e9)),
  "select": lambda s, m: lax.select(m, s, lax.full_like(s, -1e9)),
  "added_1e9": added(-1e9),
  "added_lowest": added(LOWEST),
  "added_table": lambda s, m: s + np.where(MASK, 0, -1e9).astype(s.dtype),
  "added_where": lambda s, m: s + jnp.where(m, 0.0, -1e9),
  "added_log": lambda s, m: s + jnp.log(m.astype(s.dtype) + 1e-30),
  "subtracted": lambda s, m: s - 1e9 * ~m,
  "multiplied": lambda s, m: s * m - 1e9 * (1 - m),
  "in_a_branch": lambda s, m: lax.cond(m[0, 0], lambda: jnp.where(m, s, -1e9), lambda: s),
  "in_a_jit": lambda s, m: jax.jit(chosen(-1e9))(s, m),
  "in_a_checkpoint": lambda s, m: jax.checkpoint(chosen(-1e9))(s, m),
}


def renormalized(s, m):
  weights = nn.softmax(s, -1) * m
  return weights / (weights.sum(-1, keepdims=True) + 1e-12)


READINGS = {
  "softmax": lambda s, m: nn.softmax(s, -1),
  "logsumexp": lambda s, m: nn.logsumexp(s, -1, keepdims=True),
  "log_softmax": lambda s, m: jnp.where(m, nn.log_softmax(s, -1), 0.0),
  "renormalized": renormalized,
  "by_hand": lambda s, m: jnp.exp(s - s.max(-1, keepdims=True)) / 4,
  "attention": lambda s, m: nn.softmax(s, -1) @ jnp.eye(4, dtype=s.dtype),
}
# Each in one format; in the other, and all other writings, `slow`.
COMMON = {
  "where_1e9": "mixed_float16",
  "where_lowest": "mixed_float16",
  "where_infinity": "mixed_bfloat16",
  "added_1e9": "mixed_float16",
}
every_writing = pytest.mark.parametrize(
  ("writing", "policy"),
  [
    pytest.param(w, policy, marks=() if COMMON.get(w) == policy else pytest.mark.slow)
    for w in WRITINGS
    for policy in UNIT
  ],
)

# Products of queries and keys that every format holds, so that the scores are exact.
QUERIES = np.array([[1, 0.5, 0, -1], [0, 1, 1, 0.5], [2, 0, -0.5, 1], [1, 1, 1, 1]], np.float32)
KEYS = np.array([[1, -1, 0.5, 0], [0.5, 1, 0, 0], [0, 0, 2, 1], [1, 0, 1, -0.5]], np.float32)


def outcomes(writing, cast=lambda fn: fn):
  """Every reading of masked scores, and the gradients of their weighted sums."""

  def read(reading, q, k, m):
    return READINGS[reading](WRITINGS[writing](q @ k.T, m), m)

  def weighted(reading, q, k, m):
    out = read(reading, q, k, m)[~WHOLLY]
    return (out * np.linspace(-1, 1, out.size).reshape(out.shape).astype(out.dtype)).sum()

  def run(q, k, m):
    return {
      name: (
        cast(functools.partial(read, name))(q, k, m),
        jax.grad(cast(functools.partial(weighted, name)), (0, 1))(q, k, m),
      )
      for name in READINGS
    }

  dtype = jnp.result_type(float)
  run = jax.jit(run)
  return jax.device_get(run(QUERIES.astype(dtype), KEYS.astype(dtype), MASK))


@functools.cache
def plain(writing):
  return outcomes(writing)


@functools.cache
def under(policy, writing):
  return outcomes(writing, lambda fn: mpjax.autocast(fn, policy, argnums=()))


@functools.cache
def truth(writing):
  with jax.enable_x64(True):
    return outcomes(writing)


@pytest.mark.quick(every=5)
@every_writing
def test_a_mask_means_what_it_means_in_float32(writing, policy):
  unit = UNIT[policy]
  for name, (value, grads) in under(policy, writing).items():
    wide, wide_grads = plain(writing)[name]
    exact, exact_grads = truth(writing)[name]
    assert (np.isfinite(value) >= np.isfinite(wide)).all(), name
    close = functools.partial(np.testing.assert_allclose, rtol=unit, err_msg=name)
    close(value[~WHOLLY], exact[~WHOLLY], atol=4 * unit)
    for got, want, float32 in zip(grads, exact_grads, wide_grads, strict=True):
      assert (np.isfinite(got) >= np.isfinite(float32)).all(), name
      if np.isfinite(want).all():
        close(got, want, atol=8 * unit * max(1.0, np.abs(want).max()))


@every_writing
def test_a_wholly_masked_row_is_as_in_float32(writing, policy):
  """Not where -1e4 or a logarithm leave the scores apart, nor -inf, whose softmax is NaN."""
  if writing not in ("where_1e4", "where_infinity", "added_log"):
    assert (plain(writing)["softmax"][0][WHOLLY] == 0.25).all()
    assert (under(policy, writing)["softmax"][0][WHOLLY] == 0.25).all()


GUARDS = {
  "norm": lambda h: h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + 1e-12),
  "ratio": lambda h: h / (jnp.abs(h) + 1e-9),
  "rsqrt": lambda h: h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-8),
  "sqrt": lambda h: jnp.sqrt(h**2 + 1e-12),
  "log": lambda h: jnp.log(jnp.abs(h) + 1e-12),
  "log_of_sigmoid": lambda h: jnp.log(nn.sigmoid(40 * h - 40) + 1e-12),
  "clipped": lambda h: jnp.log(jnp.clip(nn.softmax(40 * h, -1), 1e-12, 1.0)),
  "maximum": lambda h: h / jnp.maximum(jnp.abs(h), 1e-10),
  "tiny": lambda h: h / (jnp.abs(h) + np.finfo(np.float32).tiny),
  "divided": lambda h: jnp.tanh(h) / 1e-7 * 1e-7,
  "scaled": lambda h: h * 1e6 / 1e6,
  "powers": lambda h: h * lax.pow(jnp.full(4, 300.0), jnp.arange(4)) / 300.0**3,
  "large_range": lambda h: jnp.clip(h, -1e30, 1e30),
  "running_maximum": lambda h: lax.scan(
    lambda c, r: (jnp.maximum(c, r), jnp.exp(c - jnp.maximum(c, r))), jnp.full(4, -1e30), h
  ),
  "edge": lambda h: jnp.where(h > 9, 65520.0, h),
  "fill": lambda h: nn.relu(h.at[jnp.array([0, 9])].get(mode="fill", fill_value=-1e9)),
}


# Their derivative at zero is a number that float16 does not hold; a loss scale skips such a step.
STEEP = {"ratio", "log", "maximum"}


@functools.cache
def guarded(guard, policy):
  """A guard and its gradient in float32 and under a policy, on zeros and on both signs."""
  fn = lambda w, x: GUARDS[guard](x @ w)
  loss = lambda w, x: sum(y.sum() for y in jax.tree.leaves(fn(w, x)))

  @jax.jit
  def run(w, x):
    casts = {p: lambda f, p=p: mpjax.autocast(f, p) for p in ("float32", policy)}
    return {p: [cast(fn)(w, x), jax.grad(cast(loss))(w, x)] for p, cast in casts.items()}

  return [jax.device_get(run(KEYS, x)) for x in (np.zeros((4, 4), np.float32), QUERIES)]


@pytest.mark.quick(every=3)
@in_turns(("guard", "policy"), list(GUARDS), reversed(UNIT))
def test_a_guard_still_guards(guard, policy):
  """The gradient too, where float16 holds it."""
  for results in guarded(guard, policy):
    plain, found = results["float32"], results[policy]
    if guard in STEEP and policy == "mixed_float16":
      plain, found = plain[:1], found[:1]
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
      assert (np.isfinite(got) >= np.isfinite(want)).all()


@every_policy
def test_every_part_of_a_constant_adapts(policy):
  def fn(w, x):
    first, second = jnp.split(0.5 + (jnp.arange(8) < x[0, 0]), 2)
    return x @ w * (2 * first), x @ w * (2 * second)

  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(KEYS, QUERIES)
  products = [e.outvars[0].aval for e in equations(jaxpr) if e.primitive.name == "mul"]
  narrow = [aval.dtype for aval in products if aval.shape == (4, 4)]
  assert narrow == 2 * [policy.removeprefix("mixed_")]


CAPTURED = {
  "subtracted_from_one": lambda one, w, x: (one - jax.nn.sigmoid(x @ w - 6)) * x,
  "cosine": lambda one, w, x: one - jnp.cos(x @ w * 0.1),
  "in_a_loop": lambda one, w, x: lax.fori_loop(
    0, 9, lambda _, y: (one - jax.nn.sigmoid(y @ w - 6)) * y, x @ w
  ),
  "in_a_helper": lambda one, w, x: jax.jit(lambda y: one - jax.nn.sigmoid(y))(x @ w - 6) * x,
  "returned": lambda one, w, x: (one, x @ w * one),
  "integer_beside_an_array": lambda one, w, x: x[jnp.int32(1)] @ w * one + ROW,
}
ROW = array(np.arange(4))


@every_policy
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_scalar_is_the_number_that_it_is(name, policy):
  w, x = jnp.eye(4) * 0.7, jnp.linspace(0.3, 2, 16).reshape(4, 4)
  captured, written = (
    jax.jit(mpjax.autocast(functools.partial(CAPTURED[name], one), policy))
    for one in (jnp.float32(1), np.float32(1))
  )
  jax.tree.map(np.testing.assert_array_equal, captured(w, x), written(w, x))


NUMBER = 65536.0
"""The count of 256 times 256, and the smallest that float16 rounds to infinity."""
IN_FLOAT32 = {
  "subtracted": lambda t, m: t - NUMBER,
  "divided": lambda t, m: jnp.floor(t * 1000 / NUMBER),
  "clipped": lambda t, m: jnp.clip(t, 0, NUMBER),
  "chosen": lambda t, m: jnp.where(m, t, NUMBER),
  "in_a_jit": lambda t, m: jax.jit(lambda t, n: t - n)(t, NUMBER),
  "in_a_loop": lambda t, m: lax.fori_loop(0, 2, lambda _, n: n + t - NUMBER, NUMBER + 0 * t),
  "compared": lambda t, m: (t >= NUMBER).astype(jnp.float32),
  "returned": lambda t, m: NUMBER * jnp.ones_like(t),
  "of_constants": lambda t, m: t - jnp.where(m, NUMBER, 1.0),
  "negative": lambda t, m: jnp.maximum(-t, -NUMBER),
}


@every_policy
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_number_at_the_edge_of_float16_is_itself_in_float32(name, policy):
  times, mask = jnp.asarray([65504.0, 65535.0, 65536.0, 70000.0]), jnp.arange(4) % 2 == 0
  w = jnp.eye(4)

  def fn(w, t, m):
    return IN_FLOAT32[name](t, m), jnp.tanh(w @ w)  # a layer stands beside

  got, _ = mpjax.autocast(fn, policy)(w, times, mask)
  np.testing.assert_array_equal(got, IN_FLOAT32[name](times, mask))


@every_policy
@pytest.mark.parametrize("number", [NUMBER, -NUMBER, LOWEST, -LOWEST])
def test_a_number_that_stands_for_what_is_missing_equals_itself(number, policy):
  found = jnp.asarray([1.0, number, 2.0, number])

  def loss(w, x):
    there = x != number
    return jnp.sum((jnp.where(there, x, 0.0) @ w) ** 2) / jnp.sum(there), x == number

  (got, missing), grads = jax.value_and_grad(mpjax.autocast(loss, policy), has_aux=True)(
    jnp.ones((4, 2)), found
  )
  assert got == 9 and np.all(np.isfinite(grads))
  np.testing.assert_array_equal(missing, [False, True, False, True])


@every_policy
@pytest.mark.parametrize("number", [-NUMBER, LOWEST])
@pytest.mark.parametrize(
  "bias",
  [
    lambda b, m, n: b + jnp.where(m, 0.0, n),
    lambda b, m, n: jnp.where(m, b, n),
    lambda b, m, n: b + (1 - m.astype(jnp.float32)) * n,
  ],
  ids=["added", "chosen", "multiplied"],
)
def test_a_row_that_a_learned_bias_masks_wholly_stays_finite(bias, number, policy):
  x = jax.random.normal(jax.random.key(0), (4, 8))
  params = {"w": jnp.eye(8), "b": jnp.ones((4, 4))}

  def loss(p, x):
    h = x @ p["w"]
    return jnp.sum(nn.softmax(h @ h.T + bias(p["b"], jnp.asarray(MASK), number), -1) @ h)

  got, grads = jax.value_and_grad(mpjax.autocast(loss, policy))(params, x)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((got, grads)))


@every_policy
def test_a_masked_logit_of_16_bits_is_finite(policy):
  fn = lambda w, x: jnp.where(jnp.arange(8) < 5, 30 * jnp.tanh(x @ w / 30), LOWEST)
  whole = mpjax.Policy.parse(policy.removeprefix("mixed_"))
  got = mpjax.autocast(fn, whole)(jnp.eye(8), jnp.ones((2, 8)))
  assert np.all(np.isfinite(got)) or policy == "mixed_float16"  # which has no such number


SQUARED = {
  "variance": lambda h: h**2 / jnp.full_like(h, 0.5) ** 2,
  "product": lambda h: h @ h.T * (jnp.ones((8, 8)) * jnp.ones((8, 8))),
  "first_state": lambda h: h + (jnp.zeros_like(h) ** 2).mean(-1, keepdims=True) @ h[:1],
  "less": lambda h: h - (h @ h.T) * (1 - jnp.full((8, 8), 0.5) ** 2),
}


@in_turns(("fn", "policy"), SQUARED, [*UNIT])
def test_constants_are_squared_behind_a_matmul(fn, policy):
  w, x = 0.3 * jax.random.normal(jax.random.key(0), (2, 8, 8))
  loss = lambda w, x: fn(x @ w).sum()
  for program in (loss, jax.grad(loss)):
    got, want = mpjax.autocast(program, policy)(w, x), program(w, x)
    assert jnp.max(jnp.abs(got - want)) <= 16 * UNIT[policy] * jnp.max(jnp.abs(want))


OF_BOOLEANS = {
  "causal": lambda h: (1.0 - jnp.tril(jnp.ones(h.shape, bool))) * -1e9,
  "causal_by_number": lambda h: -1e4 * ~jnp.tril(jnp.ones(h.shape, bool), 1),
  "chosen": lambda h: 0.01 * jnp.where(h > 0, h > 1, False),
  "forced": lambda h: 0.1 * jnp.where(h > 0, False, True),
  "integers": lambda h: 0.1 * jnp.where(h > 0, 1, 0),
  "placed": lambda h: -1e4 * jnp.zeros(h.shape[-1], bool).at[0].set(True),
  "in_a_jit": jax.jit(lambda h: 0.1 * jnp.where(h > 0, h > 1, False)),
}


@in_turns(("mask", "policy"), OF_BOOLEANS, [*UNIT])
def test_a_mask_of_boolean_literals_is_added_as_in_float32(mask, policy):
  w, x = 0.3 * jax.random.normal(jax.random.key(0), (2, 8, 8))

  def attend(w, x):
    h = x @ w
    return nn.softmax(h @ h.T + mask(h)) @ h

  got, want = mpjax.autocast(attend, policy)(w, x), attend(w, x)
  assert jnp.max(jnp.abs(got - want)) <= 8 * UNIT[policy] * jnp.max(jnp.abs(want))


INTEGER_MASKS = {
  "cast": lambda m: m.astype(jnp.int32),
  "multiplied": lambda m: m.astype(jnp.int32) * m[::-1].astype(jnp.int32),
  "inverted": lambda m: 1 - m.astype(jnp.int8),
  "multiplied_up": lambda m: jnp.cumprod(m.astype(jnp.int32), -1),
  "of_windows": lambda m: jnp.ones(m.shape) * m.astype(jnp.int32),
  "signs": lambda m: jnp.sign(jnp.arange(8) - 3),
  "largest": lambda m: jnp.max(m.astype(jnp.int32), -1, keepdims=True),
  "counted": lambda m: jnp.sum(m.astype(jnp.int32), -1, keepdims=True),
  "both": lambda m: m.astype(jnp.int32) & m[::-1].astype(jnp.int32),
  "from_a_function": lambda m: 1 - jax.jit(lambda m: jnp.where(m, 1.0, 0.0))(m),
  "from_a_branch": lambda m: 1 - lax.cond(m[0, 0], lambda: m.astype(jnp.int32), lambda: 0 * m),
  "of_16_bits": lambda m: jnp.sqrt(m.astype(jnp.int32) * 4.0).astype(jnp.bfloat16),
  "of_pairs": lambda m: jnp.einsum("i,j->ij", m[0].astype(jnp.float32), m[1].astype(jnp.float32)),
}


@in_turns(("mask", "policy"), INTEGER_MASKS, [*UNIT])
def test_integers_made_of_booleans_are_numbers_that_adapt(mask, policy):
  w, x = 0.3 * jax.random.normal(jax.random.key(0), (2, 8, 8))

  def masked(w, x, m):
    h = x @ w
    return h * mask(m).astype(h.dtype)

  args = w, x, x > 0
  found, *_ = jax.make_jaxpr(mpjax.autocast(lambda *a: masked(*a) @ w, policy))(*args).eqns[-1:]
  assert {v.aval.dtype.itemsize for v in found.invars} == {2}
  products = [
    e
    for e in equations(jax.make_jaxpr(mpjax.autocast(masked, policy))(*args))
    if e.primitive.name == "mul" and jnp.issubdtype(e.outvars[0].aval.dtype, jnp.floating)
  ]
  assert products[-1].outvars[0].aval.dtype.itemsize == 2
  got, want = mpjax.autocast(masked, policy)(*args), masked(*args)
  assert jnp.max(jnp.abs(got - want)) <= 4 * UNIT[policy] * jnp.max(jnp.abs(want))


@every_policy
def test_an_integer_that_its_dtype_does_not_hold_is_not_known(policy):
  def below(w, m):
    return (w @ w) + 0 * (m.astype(jnp.uint32) - 1).astype(jnp.float32)

  w, m = jnp.eye(4), jnp.zeros((4, 4), bool)
  np.testing.assert_array_equal(mpjax.autocast(below, policy)(w, m), below(w, m))
  filled = lambda m: m.astype(jnp.int32).at[:, 99].get(mode="fill", fill_value=257)
  got = mpjax.autocast(lambda w, m: (w @ w) * filled(m).astype(jnp.float32), policy)(w, m)
  np.testing.assert_array_equal(got, 257 * w)
  nothing = lambda m: jnp.prod(jnp.zeros((4, 0), jnp.int32) * m[:, :1], -1).astype(jnp.float32)
  got = mpjax.autocast(lambda w, m: (w @ w) * (256 + nothing(m)), policy)(w, m)
  np.testing.assert_array_equal(got, 257 * w)
  large = lambda w: (w @ w) * jnp.full((4, 4), 1e6).astype(jnp.float16).astype(jnp.float32)
  assert jnp.isinf(mpjax.autocast(large, policy)(w + 1)).all()
  largest = lambda x: jnp.argmax((x > 0).astype(jnp.int32), 1).astype(jnp.float32)
  x = jnp.zeros((1, 300)).at[0, 257].set(1.0)
  got = mpjax.autocast(lambda w, x: (x @ w) * largest(x), policy)(jnp.eye(300), x)
  np.testing.assert_array_equal(got, x * 257)
  many = lambda m: m.astype(jnp.int8) * 100 * 100 * 1.0
  got = mpjax.autocast(lambda w, m: (w @ w) * many(m), policy)(w, ~m)
  np.testing.assert_array_equal(got, w * many(~m))
