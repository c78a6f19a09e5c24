"""Within which numbers values lie, as far as what they are made of tells."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from mpjax._engine.analyses.ranges import ANYWHERE, ONE, Range
from mpjax._engine.analyses.roles import NONE, RoleFinder
from mpjax._engine.program import versions

sigmoid = jax.nn.sigmoid
KNOWN = {
  "sigmoid": sigmoid,
  "half_tanh": lambda x: 0.5 * (1 + jnp.tanh(x)),
  "turned_round": lambda x: 3 - 2 * sigmoid(x),
  "of_a_positive_value": lambda x: lax.erfc(jnp.abs(x)),
  "product": lambda x: sigmoid(x) * jnp.tanh(x),
  "powers": lambda x: jnp.sqrt(sigmoid(x)) * sigmoid(x) ** 3,
  "mean": lambda x: jnp.broadcast_to(sigmoid(x), (3, x.size)).mean(0),
  "distribution": jax.scipy.stats.norm.cdf,
  "hard_sigmoid": jax.nn.hard_sigmoid,
  "clip": lambda x: jnp.clip(x, -1, 2),
  "clamp": lambda x: lax.clamp(-1.0, x, 2.0),
  "soft_sign": jax.nn.soft_sign,
  "share": lambda x: (lambda r: r / (1 + r))(jax.nn.relu(x)),
  "chosen": lambda x: jnp.where(x > 0, sigmoid(x), -1.0),
  "cond": lambda x: lax.cond(x[-1] > 0, jnp.tanh, lambda x: 0 * sigmoid(x) - 1.5, x),
  "scanned": lambda x: lax.scan(lambda n, u: (n, sigmoid(u)), 0, x)[1],
}
UNKNOWN = {
  "itself": lambda x: x,
  "sum_with_it": lambda x: x + sigmoid(x),
  "share_of_what_may_be_negative": lambda x: x / (1 + x),
  "over_what_may_be_zero": lambda x: 1 / jnp.tanh(x),
  "carried": lambda x: lax.fori_loop(0, 9, lambda _, c: c + jnp.tanh(x), jnp.tanh(x)),
}


def range_of(fn, x):
  jaxpr = jax.make_jaxpr(fn)(x)
  forward = RoleFinder(frozenset({np.dtype(jnp.bfloat16)})).forward(jaxpr, (NONE,))
  return forward.of(versions.open_jaxpr(jaxpr).outvars[0]).range


X = array(np.concatenate([-np.logspace(-3, 4, 50), [0], np.logspace(-3, 4, 50)]))


@pytest.mark.parametrize("fn", KNOWN.values(), ids=KNOWN.keys())
def test_a_value_lies_within_its_range_and_comes_near_the_ends(fn):
  low, high = range_of(fn, X)
  values = np.asarray(fn(X))
  assert math.isfinite(high - low)
  assert low - 1e-6 <= values.min()
  assert values.max() <= high + 1e-6
  assert values.max() >= high - 1e-3


@pytest.mark.parametrize("fn", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_of_other_values_nothing_is_known(fn):
  assert range_of(fn, X) == ANYWHERE


def test_near_a_number_is_who_has_about_that_for_its_highest():
  assert Range(0, 0.99).comes_near(ONE)
  assert Range(-1, 1).comes_near(ONE)
  assert not Range(0, 2).comes_near(ONE)
  assert not Range(0, 0.5).comes_near(ONE)
  assert not Range(0, 1).comes_near(Range(0, 1))


def test_what_has_no_results_has_no_range():
  seen = []

  def fn(w, x):
    jax.debug.callback(seen.append, 1 - sigmoid(x @ w))
    jax.debug.callback(seen.append, 1.0)
    return (x @ w).sum() - jnp.zeros((0, 3)).sum() + (jnp.inf - jnp.float32(jnp.inf))

  assert np.isnan(mpjax.autocast(fn, "mixed_bfloat16")(jnp.ones((2, 2)), jnp.ones((2, 2))))
  jax.effects_barrier()
  assert len(seen) == 2
