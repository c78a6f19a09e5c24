"""Points, rotations and grids of two or three features are float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from _arrays import array, normal
from _backends import ROUNDING
from _both_formats import POLICIES, both, in_both_formats, matmuls
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


def angles_of(r):
  """Rotations from two vectors each."""
  a = r[..., :3] / jnp.linalg.norm(r[..., :3], axis=-1, keepdims=True)
  b = r[..., 3:] - jnp.sum(a * r[..., 3:], -1, keepdims=True) * a
  b = b / jnp.linalg.norm(b, axis=-1, keepdims=True)
  return jnp.stack([a, b, jnp.cross(a, b)], -1)


def about(axis):
  """A rotation about an axis, as Rodrigues wrote it."""
  angle = jnp.sqrt(jnp.sum(axis**2) + 1e-12)
  x, y, z = axis / angle
  o = jnp.zeros(())
  k = jnp.stack([jnp.stack([o, -z, y]), jnp.stack([z, o, -x]), jnp.stack([-y, x, o])])
  return jnp.eye(3) + jnp.sin(angle) * k + (1 - jnp.cos(angle)) * k @ k


def homogeneous(p, x):
  """Rotations and shifts, one after the other."""
  shift = jnp.stack([p["t"], 2 * p["t"]])[..., None]
  bottom = jnp.broadcast_to(jnp.array([0.0, 0, 0, 1]), (2, 1, 4))
  first, second = jnp.concatenate([jnp.concatenate([angles_of(p["r"]), shift], -1), bottom], -2)
  return jnp.concatenate([x, jnp.ones((len(x), 1))], -1) @ (first @ second).T


def grid_of(p, x):
  """Where a network, whose head is small, says that an image is to be looked at."""
  theta = (jnp.tanh(jnp.tile(x, (1, 16))[:2] @ p["a"]) @ p["b"]).reshape(2, 2, 3)
  grid = jnp.stack([x[:, :2, None] * jnp.ones(3), x[:, 1:, None] * jnp.ones(3)], -1)[..., :1]
  return jnp.einsum("bij,nj->bni", theta, grid[:, 0, :, 0][:, [0, 1, 1]]) * 64


CAMERA = array([[1000.0, 0, 512], [0, 1000, 512], [0, 0, 1]])
SCENE = {
  "r": array([[1.0, 0.1, 0, 0, 1, 0.2], [0.8, 0, 0.3, 0.1, 1, 0]]),
  "t": array([0.1, -0.2, 6.0]),
  "points": array(normal(2, 20, 3)),
  "a": array(normal(3, 48, 64) / 7),
  "b": array(normal(4, 64, 6) / 8),
}
POINTS = {
  "rotated": lambda p, x: x @ angles_of(p["r"])[0].T,
  "in_batches": lambda p, x: jnp.einsum("bij,bnj->bni", angles_of(p["r"]), jnp.stack([x, -x])),
  "projected": lambda p, x: (x + p["t"]) @ CAMERA.T,
  "of_parameters": lambda p, x: jnp.einsum("bij,nj->bni", angles_of(p["r"]), p["points"]),
  "one_after_the_other": homogeneous,
  "about_an_axis": lambda p, x: x @ about(p["t"]).T,
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), POINTS, POLICIES)
def test_points_are_rotated_and_projected_in_float32(fn, policy):
  """Pixels come in steps of 2 in bfloat16, where they lie at 500."""
  x = jax.random.normal(jax.random.key(1), (20, 3)) * 50
  loss = lambda p, x: jnp.mean(jnp.abs(fn(p, x) - 0.99 * fn(SCENE, x)))
  p = jax.tree.map(lambda a: 1.01 * a + 0.003, SCENE)
  for run in (
    jax.value_and_grad(mpjax.autocast(loss, policy)),
    mpjax.autocast(jax.value_and_grad(loss), policy),
  ):
    value, grads = jax.jit(run, compiler_options=ROUNDING)(p, x)
    want, of_want = jax.value_and_grad(loss)(p, x)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=0.01 * float(jnp.abs(b).max()))
    jax.tree.map(close, grads, of_want)


@both
def test_a_grid_that_a_network_moves_is_as_exact_as_its_head(policy):
  x = jax.random.normal(jax.random.key(1), (20, 3))
  found, want = in_both_formats(grid_of, policy, SCENE, x)
  close = 0.02 if policy == "mixed_bfloat16" else 0.003
  np.testing.assert_allclose(found, want, atol=close * float(jnp.abs(want).max()))
  products = equations(jax.make_jaxpr(mpjax.autocast(grid_of, policy))(SCENE, x))
  dots = [e.outvars[0].aval.dtype.itemsize for e in products if e.primitive.name == "dot_general"]
  assert dots == [2, 4, 4]


@both
def test_layers_of_two_or_three_features_stay_in_16_bits(policy):
  w = {"in": jnp.ones((3, 3)) / 3, "out": jnp.ones((3, 2))}

  def network(w, x):
    wide = jnp.broadcast_to(w["in"], (2, 3, 3))
    h = jnp.tanh(x @ w["in"]) @ w["in"] + (x @ (w["in"] * 0.5)) + (x @ wide)[0]
    return jnp.stack([h, h]) @ w["out"]

  for x in (jnp.ones((1, 3)), jnp.ones((2, 3)), jnp.ones((20, 3))):
    assert {
      v.aval.dtype.itemsize
      for e in matmuls(mpjax.autocast(network, policy), w, x)
      for v in e.invars
    } == {2}


@both
def test_a_mixture_of_two_or_three_vectors_is_no_projection_of_points(policy):
  """A router over two experts, and the first layer of one observation."""

  def mixture(p, h):
    experts = jnp.stack([nn.standardize(h @ p["u"]), nn.standardize(h @ p["u"].T)], 1)
    return jnp.einsum("tk,tkd->td", jax.nn.softmax(h[:, :2] @ p["u"][:2, :2]), experts) @ p["u"]

  params = {"u": jnp.ones((64, 64))}
  frozen = jax.random.normal(jax.random.key(0), (3, 64))
  acting = lambda p, x: jnp.tanh(x @ frozen) @ p["u"]
  for fn, x in ((mixture, jnp.ones((8, 64))), (acting, jnp.ones(3)), (acting, jnp.ones((1, 3)))):
    for product in matmuls(mpjax.autocast(fn, policy), params, x):
      assert {v.aval.dtype.itemsize for v in product.invars} == {2}
