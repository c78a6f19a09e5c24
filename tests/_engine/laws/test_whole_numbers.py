"""Whole numbers are counted and told apart, whoever multiplies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _both_formats import DATA, POLICIES, W, both, cases, in_both_formats, matmuls
from _turns import in_turns
from mpjax.inspect import explain

pytestmark = pytest.mark.usefixtures("promotion_of_users")


IDS = array(np.arange(2400) * 7 % 2401, np.int32)
CODES = np.arange(2401, dtype=np.float32)
chosen = lambda ids: jax.nn.one_hot(ids, 2401)
COUNTS = {
  "of_each": lambda ids: jax.nn.one_hot(ids % 2, 2).T @ jnp.ones(len(ids)),
  "one_by_one": lambda ids: jnp.tril(jnp.ones((2400, 2400))) @ (ids % 3 > 0).astype(jnp.float32),
  "of_pairs": lambda ids: jnp.einsum("ti,tj->ij", *[jax.nn.one_hot(ids % n, n) for n in (2, 4)]),
  "a_position": lambda ids: chosen(ids) @ jnp.arange(2401.0),
  "a_table_of_numpy": lambda ids: chosen(ids) @ CODES,
  "an_index": lambda ids: (
    jnp.stack([ids, ids % 40], 1).astype(jnp.float32) @ jnp.array([40.0, 1.0])
  ),
  "of_rounded_codes": lambda ids: (
    jnp.floor(jnp.stack([ids / 7, jnp.sin(ids) * 9], 1)) @ jnp.array([17.0, 1.0])
  ),
  "jitted": jax.jit(lambda ids: jax.jit(chosen)(ids) @ jnp.arange(2401.0)),
  "remat": jax.checkpoint(lambda ids: chosen(ids) @ jnp.arange(2401.0)),
  "cond": lambda ids: lax.cond(
    ids[0] >= 0, lambda rows: rows @ CODES, lambda rows: rows[:, 0], chosen(ids)
  ),
  "mapped": lambda ids: lax.map(lambda row: row @ jnp.arange(2401.0), chosen(ids)),
  "scanned": lambda ids: lax.scan(
    lambda n, rows: (n + rows.T @ jnp.ones(600), None),
    jnp.zeros(2),
    jax.nn.one_hot(ids % 2, 2).reshape(4, 600, 2),
  )[0],
  "convolved": lambda ids: jnp.convolve((ids % 2).astype(jnp.float32), jnp.ones(600)),
}


@in_turns(("fn", "policy"), COUNTS, POLICIES)
def test_a_matmul_of_whole_numbers_counts(fn, policy):
  found, want = in_both_formats(lambda w, ids: fn(ids), policy, W, IDS)
  np.testing.assert_array_equal(found, want)
  assert np.max(want) > 256


BASE = array([1.0, 7.0, 49.0, 343.0])
DIGITS = {
  "of_a_vector": lambda d: d @ BASE,
  "of_a_matrix": lambda d: jnp.stack([d, d]) @ jnp.stack([BASE, BASE[::-1]]).T,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", DIGITS.values(), ids=DIGITS.keys())
def test_digits_that_a_layer_gave_are_those_of_a_number(number, policy):
  """No layer whose weights were rounded: 343 is 344 in bfloat16."""
  digits = lambda w, x: jnp.round(jnp.clip(3 * (x @ w), -3, 3)) + 3
  w, x = (jax.random.normal(jax.random.key(n), (m, 8)) for n, m in ((0, 4), (1, 200)))
  found = mpjax.autocast(lambda w, x: (digits(w, x), number(digits(w, x))), policy)(w.T / 2, x)
  np.testing.assert_array_equal(jnp.round(found[1]), jnp.round(number(found[0])))
  assert found[1].max() > 2048


def test_numbers_that_the_format_does_not_hold_are_no_layer():
  base = jnp.ones((4, 8)) * BASE[:, None]
  w, x = jnp.ones((8, 4)), jnp.ones((200, 8))
  for policy, count in (("mixed_bfloat16", 1), ("mixed_float16", 0)):  # float16 holds 343
    report = explain(lambda w, x: jnp.tanh(x @ w) @ base, policy, w, x)
    assert len([op for op in report.wide if "does not hold" in op.reason]) == count


def test_a_matmul_of_whole_numbers_with_others_is_narrow():
  fn = lambda w, x: (jax.nn.one_hot(jnp.arange(4), 4) @ w, jnp.tril(jnp.ones((8, 8))) @ (x @ w))
  assert explain(fn, "mixed_bfloat16", W, DATA).narrow_share == 1


@jax.custom_vjp
def _binarized(x):
  return jnp.sign(x)


_binarized.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) <= 1),))


@jax.custom_jvp
def _rounded(x):
  return jnp.round(x)


_rounded.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))

QUANTIZED = {
  "sign": (_binarized, 1.0),
  "where": (lambda x: jnp.where(x >= 0, 1.0, -1.0), 1.0),
  "round": (_rounded, 9.0),
  "clipped": (lambda x: jnp.clip(_rounded(x), -127, 127), 40.0),
  "floor": (lambda x: jnp.floor(x + 0.5), 9.0),
}


@in_turns(("case", "policy"), QUANTIZED, POLICIES)
def test_a_layer_whose_weights_are_rounded_is_narrow_and_exact(case, policy):
  quantize, scale = case
  weights = jax.random.normal(jax.random.key(3), (64, 64))
  x = 3 * jax.random.normal(jax.random.key(4), (32, 64))
  fn = lambda w, x: quantize(x * scale) @ quantize(w * scale)
  assert explain(fn, policy, weights, x).narrow_share == 1
  np.testing.assert_array_equal(mpjax.autocast(fn, policy)(weights, x), fn(weights, x))


@both
@pytest.mark.parametrize("captured", [True, False])
def test_a_layer_whose_frozen_weights_have_8_bits_is_narrow_and_exact(captured, policy):
  frozen = (jnp.arange(64 * 64) * 37 % 255 - 127).reshape(64, 64).astype(jnp.int8)
  w, x = jnp.eye(64), jnp.round(10 * jax.random.normal(jax.random.key(4), (32, 64)))
  weights = lambda q: (frozen if captured else q).astype(jnp.float32)
  fn = lambda w, x, q: jnp.round(x @ w) @ weights(q)
  assert explain(fn, policy, w, x, frozen).narrow_share == 1
  np.testing.assert_array_equal(mpjax.autocast(fn, policy)(w, x, frozen), fn(w, x, frozen))


INTEGERS = {
  "where": lambda h, m: jnp.where(m, h, 0),
  "where_first": lambda h, m: jnp.where(m, 1, h),
  "select": lambda h, m: lax.select(jnp.broadcast_to(m, h.shape), h, jnp.full_like(h, 0)),
  "clip": lambda h, m: jnp.clip(h, 0, 6),
  "pad": lambda h, m: jnp.pad(h, ((1, 1), (0, 0))),
  "pad_value": lambda h, m: jnp.pad(h, ((1, 1), (0, 0)), constant_values=1),
  "maximum": lambda h, m: jnp.maximum(h, 0),
  "minimum": lambda h, m: jnp.minimum(h, jnp.array(6)),
  "full": lambda h, m: h + jnp.full(h.shape, 2),
  "set": lambda h, m: h.at[0].set(0),
  "add": lambda h, m: h.at[0].add(1),
  "jit": lambda h, m: jax.jit(lambda h, n: h * n)(h, 3),
  "concatenate": lambda h, m: jnp.concatenate([h, jnp.zeros(h.shape, jnp.int32)]),
  "power": lambda h, m: h * 2**3,
  "roll_in": lambda h, m: jnp.where(m, jnp.roll(h, 1, 0), jnp.zeros((), jnp.int32)),
}


@both
@cases(**INTEGERS)
def test_integer_constants_adapt(fn, policy):
  m = jnp.arange(4)[:, None] > 1
  program = lambda w, x: fn(x @ w, m) @ w
  assert not explain(program, policy, jnp.ones((8, 8)), jnp.ones((4, 8))).leaks


@both
def test_integers_that_are_data_stay_data(policy):
  fn = lambda w, n: n * 1.0
  assert float(mpjax.autocast(fn, policy)(W, jnp.array(4097))) == 4097.0
  counted = lambda w: jnp.arange(5000)[4097] * 1.0
  assert float(mpjax.autocast(counted, policy)(W)) == 4097.0


UNFIT = {
  "captured": lambda h: h @ FAR,
  "turned": lambda h: h @ FAR.T,
  "tiny": lambda h: h @ FAINT,
  "of_numpy": lambda h: h @ np.asarray(FAR),
  "identity": lambda h: h @ (jnp.eye(4) * 7e4),
  "filled": lambda h: h @ jnp.full((4, 8), 1e5),
  "jitted": lambda h: jax.jit(lambda h: h @ FAR)(h),
  "convolution": lambda h: lax.conv(h[None, None], jnp.full((1, 1, 2, 2), 1e5), (1, 1), "SAME"),
}
FAR = array(np.diag([1e5, 1, 2, 3]))
FAINT = array(np.diag([1e5, 1, 2, 3]) / 1e14)


@in_turns(("fn", "policy"), UNFIT, POLICIES)
def test_a_matmul_with_numbers_that_float16_does_not_hold_has_a_result(fn, policy):
  def loss(w, x):
    found = fn(jnp.tanh(x @ w))
    return jnp.mean(found / jnp.abs(lax.stop_gradient(found)).max())

  value, grads = jax.value_and_grad(mpjax.autocast(loss, policy))(W, DATA)
  want, of_want = jax.value_and_grad(loss)(W, DATA)
  np.testing.assert_allclose(value, want, rtol=0.03)
  np.testing.assert_allclose(grads, of_want, atol=0.04 * float(jnp.abs(of_want).max()))


def test_captured_weights_multiply_in_float16_however_small_some_are():
  weights = jax.random.normal(jax.random.key(0), (4, 4)).at[0, 0].set(1e-7)
  (product,) = matmuls(mpjax.autocast(lambda w, x: (x * w[0]) @ weights, "mixed_float16"), W, DATA)
  assert product.invars[0].aval.dtype == jnp.float16
