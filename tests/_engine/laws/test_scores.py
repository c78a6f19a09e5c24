"""Scores that are put in order, or returned, are told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _both_formats import DATA, POLICIES, W, both, cases, in_both_formats
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


ORDERED = {
  "top_k": lambda f, h: lax.top_k(f(h).ravel(), 20)[1],
  "approximate": lambda f, h: lax.approx_max_k(f(h).ravel(), 20)[1],
  "argsort": lambda f, h: jnp.argsort(-f(h).ravel())[:20],
  "argmax": lambda f, h: jnp.argmax(f(h), 1),
  "threshold": lambda f, h: f(h) > 0.9995,
  "jitted": lambda f, h: jax.jit(lambda h: lax.top_k(f(h).ravel(), 20)[1])(h),
}
SATURATE = {
  "sigmoid": jax.nn.sigmoid,
  "tanh": lambda h: jnp.tanh(h - 3),
  "normal": lambda h: jax.scipy.stats.norm.cdf(h - 5),
}


@in_turns(("order", "gate", "policy"), ORDERED, SATURATE, POLICIES)
def test_scores_that_are_put_in_order_are_told_apart(order, gate, policy):
  """Logits from 6 to 10, which both formats hold: their sigmoids are 1 in both."""
  h = (6 + jnp.arange(64.0) / 16).reshape(8, 8)[:, ::-1]
  found, want = in_both_formats(lambda w, x: order(gate, x @ w), policy, jnp.eye(8), h)
  np.testing.assert_array_equal(found, want)


RETURNED = {
  "sigmoid": jax.nn.sigmoid,
  "tanh": jnp.tanh,
  "half_of_a_tanh": lambda h: 0.5 + 0.5 * jnp.tanh(h),
  "of_an_action": lambda h: 2.0 * jnp.tanh(h - 5),
  "jitted": jax.jit(lambda h: jax.nn.sigmoid(h)[:, :3]),
  "checkpointed": jax.checkpoint(jax.nn.sigmoid),
  "among_others": lambda h: {"loss": jnp.mean(h), "scores": jax.nn.sigmoid(h)}["scores"],
}


@in_turns(("fn", "policy"), RETURNED, POLICIES)
def test_scores_that_are_returned_are_told_apart(fn, policy):
  """Of logits from 6 to 10, as a metric orders them that is computed outside."""
  h = (6 + jnp.arange(64.0) / 16).reshape(8, 8)
  found, want = in_both_formats(lambda w, x: fn(x @ w), policy, jnp.eye(8), h)
  top = np.abs(want).max().round()
  np.testing.assert_allclose(top - found, top - want, rtol=1e-2)


@both
@cases(
  gated=lambda w, x: jax.nn.silu(x @ w),
  unit=lambda w, x: jax.nn.sigmoid(x @ w) * jnp.tanh(x @ w) * x,
  cell=lambda w, x: jax.nn.sigmoid(x @ w) * jnp.tanh(x @ w[::-1]),
  recurrent=lambda w, x: lax.scan(lambda h, u: (jnp.tanh(u + h @ w),) * 2, x[0], x @ w)[1],
)
def test_activations_that_are_returned_stay_narrow(fn, policy):
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(W, DATA))
  gates = [e for e in found if e.primitive.name in ("logistic", "tanh")]
  assert {v.aval.dtype.itemsize for e in gates for v in e.outvars} == {2}
