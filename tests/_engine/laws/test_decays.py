"""Decays forget at the rate of float32, however they are learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _both_formats import DATA, KEYS, POLICIES, W, both, in_both_formats
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


def blended(decay, turn=lambda d, h, u: d * h + (1 - d) * u):
  """A hundred turns, which 16 bits could count."""

  def run(p, x):
    us = x[:101] @ p["w"]
    return lax.scan(lambda h, u: (turn(decay(p), h, u), None), us[0], us[1:])[0]

  return run


def split_ahead(p, x):
  kept, new = p["d"], 1 - p["d"]
  us = x[:101] @ p["w"]
  return lax.scan(lambda h, u: (kept * h + new * u, None), us[0], us[1:])[0]


learned = lambda p: p["d"]
blend = lambda d, h, u: d * h + (1 - d) * u
DECAYS = {
  "parameter": blended(learned),
  "clipped": blended(lambda p: jnp.clip(p["d"], 0, 1)),
  "of_a_square": blended(lambda p: 1 - p["r"] ** 2),
  "of_a_sum": blended(lambda p: 0.9 + 0.1 * p["d"]),
  "sigmoid": blended(lambda p: jax.nn.sigmoid(p["s"])),
  "exponential": blended(lambda p: jnp.exp(-jnp.exp(-p["s"]))),
  "number": blended(lambda p: 0.99),
  "array_of_a_number": blended(lambda p: jnp.full(4, 0.99)),
  "without_the_rest": blended(learned, lambda d, h, u: d * h + u),
  "of_what_is_kept": blended(learned, lambda d, h, u: h + (1 - d) * (u - h)),
  "split_ahead": split_ahead,
  "jitted": blended(learned, jax.jit(blend)),
  "remat": blended(learned, jax.checkpoint(blend)),
  "vmap": lambda p, x: jax.vmap(
    lambda d, us: lax.scan(lambda h, u: (blend(d, h, u), None), us[0], us[1:])[0], (0, 1)
  )(p["d"], x[:101] @ p["w"]),
  "fori": lambda p, x: (
    lambda us: lax.fori_loop(1, 101, lambda i, h: blend(p["d"], h, us[i]), us[0])
  )(x @ p["w"]),
  "unrolled": lambda p, x: functools.reduce(
    functools.partial(blend, p["d"]), list(x[:101] @ p["w"])
  ),
  "unrolled_without_the_rest": lambda p, x: functools.reduce(
    lambda h, u: p["d"] * h + u, list(x[:101] @ p["w"])
  ),
  "nothing_else": lambda p, x: functools.reduce(lambda h, _: p["d"] * h, range(100), x @ p["w"]),
  "unrolled_number": lambda p, x: functools.reduce(
    functools.partial(blend, 0.99), list(x[:101] @ p["w"])
  ),
}
LEARNED = {
  "w": array(np.eye(4)),
  "d": array([0.99] * 4),
  "r": array([0.1] * 4),
  "s": array([4.6] * 4),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), DECAYS, POLICIES)
def test_a_learned_decay_and_a_number_forget_as_in_float32_however_short_the_loop(fn, policy):
  """In bfloat16 0.99 is 0.988: it forgets a sixth faster, and is 0.998 with the 0.01 beside it."""
  found, want = in_both_formats(fn, policy, LEARNED, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.01)


@both
def test_a_number_that_a_scan_reads_as_an_array_is_one(policy):
  def forgotten(w, x):
    return lax.scan(lambda h, d: (d * h, None), x @ w, jnp.full(100, 0.998))[0]

  found, want = in_both_formats(forgotten, policy, W, DATA)
  np.testing.assert_allclose(found, want, rtol=0.01)


@both
def test_a_number_near_one_times_a_matmul_of_what_a_loop_hands_on_is_not_rounded(policy):
  def values(q, x):
    return lax.scan(lambda h, u: (0.99 * (h @ q) + u, None), jnp.zeros(4), x)[0]

  args = jnp.eye(4)[::-1], jnp.ones((40, 4))  # too short to be float32 as a whole
  found = equations(jax.make_jaxpr(mpjax.autocast(values, policy))(*args))
  (product,) = [e for e in found if e.primitive.name == "mul"]
  assert {atom.aval.dtype for atom in product.invars} == {jnp.dtype(jnp.float32)}
  got, want = in_both_formats(values, policy, *args)
  np.testing.assert_allclose(got, want, rtol=0.02)


@both
def test_what_no_turn_hands_on_is_blended_in_16_bits(policy):
  """A weighed residual, an RWKV's shift of tokens, a layer's own scales in a scan of layers."""

  def layers(p, x):
    h = x @ p["w"]
    h = (p["d"] * h + (1 - p["d"]) * (x @ p["w"])) @ p["w"]
    scales = jnp.stack([p["d"], p["r"]])
    h, _ = lax.scan(lambda h, d: (d * h + (1 - d) * (h @ p["w"]), None), h, scales)
    return h * 0.99 / 0.99 / p["d"]

  found = equations(jax.make_jaxpr(mpjax.autocast(layers, policy))(LEARNED, KEYS))
  products = [e for e in found if e.primitive.name in ("mul", "div")]
  assert {e.outvars[0].aval.dtype.itemsize for e in products} == {2}
