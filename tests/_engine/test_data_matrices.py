"""Matrices that are data, in algorithms that are no networks: as exact as with float32 by hand.

What a layer gave goes into them: rewards, weights of a portfolio, keypoints.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import softmax

import mpjax
from _arrays import array, normal
from _jaxprs import equations
from _turns import in_turns

COMPUTE = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
both = pytest.mark.parametrize("policy", COMPUTE)
STATES, ACTIONS = 20, 4
X = array(normal(0, STATES, 8))
MOVES = array(softmax(3 * normal(1, STATES, ACTIONS, STATES), -1))
SPREAD = 0.3 * normal(2, STATES, STATES)
COVARIANCE = array(SPREAD @ SPREAD.T / STATES + 0.8)  # of what has much in common
LINKS = array(np.eye(STATES, k=1) + np.eye(STATES, k=-1))
DEGREES = array(np.diag(np.asarray(LINKS).sum(1)))
TAKEN = array(np.random.default_rng(3).integers(0, ACTIONS, STATES), np.int32)


def said(logits):
  return jax.nn.log_softmax(logits)[jnp.arange(STATES), TAKEN]


def iterated(turn, values=lambda v: jnp.einsum("sat,t->sa", MOVES, v)):
  """Value iteration of rewards that a layer gave."""

  def of(h):
    quality = lambda v: h[:, :1] + 0.95 * values(v)
    return said(quality(turn(lambda v: quality(v), jnp.zeros(STATES))))

  return of


def scanned(best):
  return lambda quality, v: lax.scan(lambda v, _: (best(quality(v)), None), v, None, length=60)[0]


soft = lambda q: jax.nn.logsumexp(q, -1)
VALUES = {
  "soft": iterated(scanned(soft)),
  "matmul": iterated(scanned(soft), lambda v: MOVES @ v),
  "batched": iterated(scanned(soft), lambda v: jax.vmap(lambda moves: moves @ v)(MOVES)),
  "counted": iterated(lambda q, v: lax.fori_loop(0, 60, lambda _, v: soft(q(v)), v)),
}
weights = jax.nn.softmax
traces = lambda s, a: jnp.trace(s.T @ a @ s)
FORMS = {
  "einsum": lambda h: jnp.einsum("bi,ij,bj->b", weights(h), COVARIANCE, weights(h)),
  "sum": lambda h: ((weights(h) @ COVARIANCE) * weights(h)).sum(-1),
  "each": lambda h: jax.vmap(lambda w: w @ COVARIANCE @ w)(weights(h)),
  "cut": lambda h: traces(weights(h[:, :4]), LINKS) / traces(weights(h[:, :4]), DEGREES),
  "columns": lambda h: ((LINKS @ weights(h[:, :4])) * weights(h[:, :4])).sum(0),
}
CAMERA = array([[500.0, 0, 128], [0, 500, 128], [0, 0, 1]])
TURN = array(np.linalg.qr(normal(4, 3, 3))[0])
POSE = array(np.concatenate([TURN, [[0.1], [0.0], [6.0]]], 1))


def keypoints(h):
  """Pixels of points that a layer gave, in a camera's picture."""
  points = h[:, :18].reshape(-1, 6, 3)
  seen = jnp.concatenate([points, jnp.ones_like(points[..., :1])], -1) @ (CAMERA @ POSE).T
  return jnp.sin(seen[..., :2] / seen[..., 2:])


PROGRAMS = {**VALUES, **FORMS, "keypoints": keypoints}


def distance(found, want):
  return jnp.linalg.norm(found - want) / jnp.linalg.norm(want)


@pytest.mark.quick(every=3)
@in_turns(("name", "policy"), [*PROGRAMS], [*COMPUTE])
def test_values_and_gradients_are_as_exact_as_by_hand(name, policy):
  w = array(normal(5, 8, STATES) / 3)

  def value(w, dtype=jnp.float32):
    return PROGRAMS[name]((X.astype(dtype) @ w.astype(dtype)).astype(jnp.float32))

  gradient = lambda fn: jax.grad(lambda w: jnp.sum(fn(w)))
  by_hand = lambda w: value(w, COMPUTE[policy])
  own = mpjax.autocast(value, policy)
  for fns in ((own, by_hand, value), map(gradient, (own, by_hand, value))):
    found, hand, want = (jax.jit(fn)(w) for fn in fns)
    assert distance(found, want) <= 2 * distance(hand, want)


CLOUDS = {
  "rows": lambda p: p @ TURN.T,
  "einsum": lambda p: jnp.einsum("cij,nj->cni", jnp.stack([TURN, TURN.T]), p),
  "each": jax.vmap(lambda point: TURN @ point),
  "homogeneous": lambda p: jnp.concatenate([p, jnp.ones((12, 1))], 1) @ POSE.T,
}


@both
@pytest.mark.parametrize("moved", CLOUDS.values(), ids=CLOUDS)
def test_points_may_be_parameters_that_data_turn(moved, policy):
  """Of bundle adjustment, splats, vertices: near the optimum a gradient is a small difference."""
  cloud = array(normal(6, 12, 3))
  loss = lambda p: jnp.mean((moved(p) - moved(cloud)) ** 2)
  near = cloud + 0.001
  found, want = (jax.grad(fn)(near) for fn in (mpjax.autocast(loss, policy), loss))
  assert distance(found, want) < 1e-4


@both
def test_layers_of_three_features_stay_narrow(policy):
  """Also where there are three examples of them, if these do not turn the rows of weights."""
  layers = lambda w, x: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])
  w = [jnp.ones((3, 16)), jnp.ones((16, 8))]
  jaxpr = jax.make_jaxpr(mpjax.autocast(layers, policy))(w, jnp.ones((3, 3)))
  dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
  assert {a.aval.dtype for eqn in dots for a in eqn.invars} == {jnp.dtype(COMPUTE[policy])}


def turns(cell, count=140):
  """A recurrence of so many turns."""
  return lambda p, x: lax.scan(
    lambda h, u: (cell(p, h, u), None), jnp.zeros((4, 8)), jnp.tile(x[:4], (count, 1, 1))
  )[0]


def masked_head(p, h, u):
  h = jnp.where(u > 0, jnp.tanh(u @ p[0] + h @ p[1]), h)
  return jnp.where(u > 0, h, h + 0.1 * jnp.tanh(h @ p[2]))


def pooled(p, x):
  """A graph that is pooled, and goes on into a layer."""
  chosen = jax.nn.softmax(LINKS @ (x @ p[0]))
  graph = chosen.T @ LINKS @ chosen
  return graph @ (chosen.T @ jnp.tanh(x @ p[1])) @ p[2]


NETWORKS = {
  "leaky": turns(lambda p, h, u: jax.nn.leaky_relu(h @ p[0] + u)),
  "elu": turns(lambda p, h, u: jax.nn.elu(h @ p[0] + u)),
  "chosen": turns(lambda p, h, u: jnp.where(h @ p[0] > 0, h @ p[0], 0.25 * (h @ p[0])) + u),
  "masked": turns(masked_head),
  "bilinear_attention": lambda p, x: jax.nn.softmax(x @ p[0] @ x.T) @ x @ p[1],
  "linear_attention": lambda p, x: x @ (x.T @ x) @ p[0],
  "pooled": pooled,
  "gated_by_neighbors": lambda p, x: (LINKS @ jnp.tanh(x @ p[0])) * jnp.tanh(x @ p[0]) @ p[1],
}


@in_turns(("name", "policy"), [*NETWORKS], [*COMPUTE])
def test_networks_beside_them_stay_narrow(name, policy):
  p = list(array(0.1 * normal(0, 3, 8, 8)))
  jaxpr = jax.make_jaxpr(mpjax.autocast(NETWORKS[name], policy))(p, X)
  dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
  assert {a.aval.dtype for eqn in dots for a in eqn.invars} == {jnp.dtype(COMPUTE[policy])}


@in_turns(("gate", "policy"), {"silu": jax.nn.silu, "gelu": jax.nn.gelu}, [*COMPUTE])
def test_powers_of_an_activation_round_once(gate, policy):
  """Not in each of twenty products, as a power of a decay would."""

  def fn(w, x):
    gated = power = gate(x @ w)
    for _ in range(20):
      power = power * gated
    return power

  x = array(0.25 * normal(7, 16, 8) + 1)
  w = jnp.eye(8) + 0.01
  rounded = lambda a: a.astype(COMPUTE[policy]).astype(jnp.float32)
  found = mpjax.autocast(fn, policy)(w, x)
  gates = gate(rounded(rounded(x) @ rounded(w)))
  assert distance(found, gates**21) < 4 * float(jnp.finfo(COMPUTE[policy]).eps)
