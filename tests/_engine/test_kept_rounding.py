"""Derivatives that lose all digits where XLA leaves out a rounding for one reader alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import jet

import mpjax
from _arrays import array, normal
from _jaxprs import equations


@jax.custom_jvp
def own_softplus(x):
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@own_softplus.defjvp
def _derivative(primals, tangents):
  (x,), (t,) = primals, tangents
  y = own_softplus(x)
  return y, t * jnp.exp(x - y)


ACTIVATIONS = {
  "softplus": lambda z: jax.nn.softplus(100.0 * z) / 100,
  "logaddexp": lambda z: jnp.logaddexp(100.0 * z, 50.0 * z) / 100,
  "own_rule": lambda z: own_softplus(100.0 * z) / 100,
}
PARAMS = {
  "w1": array(normal(0, 3, 64)),
  "w2": array(normal(1, 64, 64) / 8),
  "w3": array(normal(2, 64, 1) / 8),
}
POINTS = array(2 * normal(3, 64, 3))


def eikonal(activation):
  """The loss of a signed distance, whose slope is to be one: a derivative is taken inside."""

  def distance(p, x):
    h = activation(x @ p["w1"])
    return (activation(h @ p["w2"]) @ p["w3"])[0]

  def loss(p, x):
    slopes = jax.vmap(jax.grad(distance, argnums=1), (None, 0))(p, x)
    return jnp.mean((jnp.linalg.norm(slopes, axis=-1) - 1) ** 2)

  return loss


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_value_less_what_is_computed_of_it_is_below_zero_for_whoever_reads_it(activation, policy):
  loss = eikonal(ACTIVATIONS[activation])
  expected = jax.jit(loss)(PARAMS, POINTS)
  value, gradient = jax.jit(jax.value_and_grad(mpjax.autocast(loss, policy)))(PARAMS, POINTS)
  assert float(value) == pytest.approx(float(expected), rel=0.05)
  slope = jax.grad(loss)(PARAMS, POINTS)
  error = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, slope))
  assert float(error) < 0.3 * float(optax.tree.norm(slope))


@pytest.mark.parametrize(
  "fn",
  [
    lambda p, x: jax.nn.softmax(x @ p["w1"]),
    lambda p, x: jax.grad(lambda x: jax.nn.log_softmax(x @ p["w1"])[:, 0].sum())(x),
    lambda p, x: jax.nn.softplus(x @ p["w1"]),
  ],
  ids=["softmax", "log_softmax", "first_order"],
)
def test_others_round_as_they_like(fn):
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, "mixed_bfloat16"))(PARAMS, POINTS)
  assert not [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "reduce_precision"]


def test_taylor_series_are_propagated_through_it():
  fn = lambda x: (lambda z: jnp.exp(z - jnp.log(1 + jnp.exp(z))))(x @ PARAMS["w1"] / 8)
  cast = mpjax.autocast(lambda p, x: p * fn(x), "mixed_bfloat16")
  series = ((POINTS, jnp.ones_like(POINTS)),)
  assert "reduce_precision" in str(jax.make_jaxpr(cast)(1.0, POINTS))
  found = jet.jet(lambda x: cast(1.0, x), (POINTS,), series)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(jet.jet(fn, (POINTS,), series)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))
