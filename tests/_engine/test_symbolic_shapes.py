"""What `jax.export` can export with symbolic dimensions it can export under a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export, lax

import mpjax
from _turns import in_turns

POLICIES = ("mixed_bfloat16", "mixed_float16")
WIDTH = 8


pytestmark = pytest.mark.usefixtures("promotion_of_users")


def gru(w, x):
  def turn(h, u):
    gate = jax.nn.sigmoid(u @ w + h)
    return gate * h + (1 - gate) * u, None

  return lax.scan(turn, jnp.zeros(WIDTH), x)[0]


def rope(w, x):
  angles = jnp.arange(x.shape[0])[:, None] * 1e4 ** (-jnp.arange(WIDTH) / WIDTH)
  return (x @ w) * jnp.cos(angles)


def normalized(w, x):
  h = (x @ w).reshape(x.shape[0], 2, 4)
  return (h - h.mean((0, 2), keepdims=True)) / jnp.sqrt(h.var((0, 2), keepdims=True) + 1e-5)


FUNCTIONS = {
  "pool": lambda w, x: jax.nn.sigmoid(x @ w).mean(0),
  "gru": gru,
  "average": lambda w, x: lax.scan(
    lambda h, u: (0.99 * h + 0.01 * (u @ w), None), jnp.zeros(WIDTH), x
  )[0],
  "rope": rope,
  "clip": lambda w, x: jnp.clip(x @ w, 0, 1).mean(-1),
  "norm": normalized,
  "attention": lambda w, x: jax.nn.softmax((x @ w) @ x.T / x.shape[0]) @ x,
  "step": lambda w, x: w - 1e-3 * jax.grad(lambda w: jnp.tanh(x @ w).mean())(w),
  "distance": lambda w, x: (lambda h: (h * h).sum(1)[:, None] + (h * h).sum(1) - 2 * h @ h.T)(
    x @ w
  ),
  "filter": lambda w, x: (
    lax.scan(
      lambda c, u: (jnp.linalg.solve(w @ c @ w.T + jnp.eye(WIDTH), c), u @ c), jnp.eye(WIDTH), x
    )[1]
    @ x.T
  ),
  "batches": lambda w, x: lax.fori_loop(
    0, 20, lambda _, h: (h @ w) @ jnp.linalg.inv(jnp.eye(WIDTH) + h.T @ h), x
  ),
  "embedding": lambda w, x: w[jnp.arange(x.shape[0]) % WIDTH] @ w,
}


@in_turns(("name", "policy"), list(FUNCTIONS), POLICIES)
def test_a_function_of_any_batch_is_exported(name, policy):
  fn = FUNCTIONS[name]
  cast = mpjax.autocast(fn, policy)
  w = jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) / 3
  x = jax.random.normal(jax.random.key(1), (12, WIDTH))
  shapes = (
    jax.ShapeDtypeStruct(w.shape, w.dtype),
    jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {WIDTH}"), x.dtype),
  )
  got = export.export(jax.jit(cast))(*shapes).call(w, x)
  want, by_shape = fn(w, x), jax.jit(cast)(w, x)
  assert got.dtype == by_shape.dtype and got.shape == by_shape.shape
  eps = float(jnp.finfo(policy.removeprefix("mixed_")).eps)
  np.testing.assert_allclose(got, want, atol=8 * eps * float(jnp.abs(want).max()))


def test_a_recurrent_module_is_exported_for_any_length():
  model = mpjax.apply_policy(nn.RNN(nn.GRUCell(WIDTH)), "mixed_bfloat16")
  x = jax.random.normal(jax.random.key(0), (2, 5, WIDTH))
  variables = model.init(jax.random.key(1), x)
  shape = jax.ShapeDtypeStruct(export.symbolic_shape(f"2, time, {WIDTH}"), x.dtype)
  exported = export.export(jax.jit(lambda x: model.apply(variables, x)))(shape)
  np.testing.assert_allclose(exported.call(x), model.apply(variables, x), atol=0.02)
