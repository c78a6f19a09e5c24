"""Of what an index, a fraction, a power or an arc cosine is taken is float32 from its gate on."""

import jax
import jax.numpy as jnp
import pytest

import mpjax
from _arrays import array, normal
from _both_formats import both
from _jaxprs import equations
from _turns import in_turns

X = array(normal(0, 64, 16))
WEIGHTS = array(normal(1, 16, 32) / 4)
HEAD = array(normal(2, 32, 16) / 6)
ACTIVATIONS = {"logistic", "tanh"}
STARTS = {"floor", "logistic"}
sigmoid = jax.nn.sigmoid


def sampled(o):
  """Where a deformable attention looks: a reference point and an offset, in pixels."""
  at = (sigmoid(o) + 0.01 * o) * 64 - 0.5
  return at - jnp.floor(at)


def straight_through(o):
  levels = 3 * jnp.tanh(o)
  return levels + jax.lax.stop_gradient(jnp.round(levels) - levels)


def quantized(o):
  """Steps of a clipped layer: in 16 bits as by hand, which store them."""
  steps = jnp.clip(o / 0.3, 0, 15)
  return (steps + jax.lax.stop_gradient(jnp.floor(steps) - steps)) * 0.3


FUNCTIONS = {
  "fraction": lambda o: 31 * sigmoid(o) - jnp.floor(31 * sigmoid(o)),
  "remainder": lambda o: (31 * sigmoid(o)) % 1.0,
  "index": lambda o: 31 * sigmoid(o) - (31 * sigmoid(o)).astype(jnp.int32).astype(jnp.float32),
  "sampled": sampled,
  "straight through": straight_through,
  "power": lambda o: sigmoid(o) ** 8,
  "power of a sum": lambda o: (1 + sigmoid(o)) ** 3,
  "Chebyshev": lambda o: jnp.cos(3 * jnp.arccos(jnp.clip(jnp.tanh(o), -1 + 1e-6, 1 - 1e-6))),
  "clamped": lambda o: jnp.arcsin(jax.lax.clamp(-0.999, jnp.tanh(o), 0.999)),
}


@both
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_gate_is_float32(function, policy):
  fn = mpjax.autocast(lambda w, head: function(X @ w) @ head, policy)
  made = [
    e.outvars[0].aval
    for e in equations(jax.make_jaxpr(fn)(WEIGHTS, HEAD))
    if e.primitive.name in ACTIVATIONS
  ]
  assert {str(aval.dtype) for aval in made if aval.shape == (64, 32)} == {"float32"}


@both
@pytest.mark.parametrize(
  "function", [lambda o: o - jnp.floor(o), lambda o: sigmoid(o) ** 2, quantized]
)
def test_coordinates_that_a_layer_gives_and_squares_of_gates_stay_narrow(function, policy):
  fn = mpjax.autocast(lambda w, head: function(X @ w) @ head, policy)
  made = [e for e in equations(jax.make_jaxpr(fn)(WEIGHTS, HEAD)) if e.primitive.name in STARTS]
  assert [e.outvars[0].aval.dtype.itemsize for e in made] == [2]


@in_turns(
  ("name", "policy"), ["sampled", "power", "Chebyshev"], ["mixed_bfloat16", "mixed_float16"]
)
def test_gradients_are_as_exact_as_by_hand(name, policy):
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  plain = lambda x, w: x @ w
  by_hand = lambda x, w: (x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32)

  def loss(w, dense=plain):
    return jnp.mean(dense(FUNCTIONS[name](dense(X, w)), HEAD) ** 2)

  runs = [loss, lambda w: loss(w, by_hand), mpjax.autocast(loss, policy)]
  want, hand, found = jax.jit(lambda w: [jax.grad(run)(w) for run in runs])(WEIGHTS)
  assert jnp.linalg.norm(found - want) <= 1.2 * jnp.linalg.norm(hand - want)
