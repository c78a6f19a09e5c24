"""Float32 between 16-bit values is computed again in the backward pass, not stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import mpjax
from _jaxprs import equations, primitives
from mpjax import _interpreter
from mpjax._scopes import module_path

ACTIVATIONS = {
  "gelu": nn.gelu,
  "exact_gelu": lambda x: nn.gelu(x, approximate=False),
  "softplus": nn.softplus,
  "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
  "elu": nn.elu,
  "exp": lambda x: jnp.exp(-jnp.abs(x)),
}
SIZE = (16, 32)


@pytest.fixture(scope="module")
def operands():
  w = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 6.0
  return w, jax.random.normal(jax.random.key(1), SIZE)


def make(activation):
  return lambda w, x: (activation(x @ w[0]) @ w[1]).sum()


def stored(fn, operands):
  """The dtypes of what the backward pass stores in the size of an activation."""
  _, pullback = jax.vjp(lambda w: fn(w, operands[1]), operands[0])
  return [leaf.dtype.name for leaf in jax.tree.leaves(pullback) if leaf.shape == SIZE]


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_float16_islands_store_nothing_wide(activation, operands, monkeypatch):
  fn = make(activation)
  kept = stored(mpjax.autocast(fn, "mixed_float16"), operands)
  # The input is the caller's own float32 array; all else is float16.
  assert kept.count("float32") <= 1
  monkeypatch.setattr(_interpreter._islands, "find", lambda plan: {})
  without = stored(mpjax.autocast(fn, "mixed_float16"), operands)
  assert sum(np.dtype(d).itemsize for d in kept) <= sum(np.dtype(d).itemsize for d in without)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_gradients_are_those_of_storing(activation, operands, monkeypatch):
  fn = make(activation)
  grads = jax.grad(mpjax.autocast(fn, "mixed_float16"))(*operands)
  monkeypatch.setattr(_interpreter._islands, "find", lambda plan: {})
  storing = jax.grad(mpjax.autocast(fn, "mixed_float16"))(*operands)
  np.testing.assert_allclose(grads, storing, rtol=2e-3, atol=2e-3)


def test_gelu_is_computed_again_in_float16_only(operands):
  fn = make(nn.gelu)
  for policy, again in (("mixed_float16", 1), ("mixed_bfloat16", 0)):
    jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(*operands)
    assert primitives(jaxpr)["remat2"] == again


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_the_scopes_of_an_island_are_those_of_its_operations_once(wrap):
  def attend(w, x):
    with jax.named_scope("attn"):
      return jax.nn.gelu(x @ w) @ w

  def loss(w, x):
    with jax.named_scope("block"):
      return jnp.sum(wrap(attend)(w, x) ** 2)

  grad = jax.grad(mpjax.autocast(loss, "mixed_float16"))
  jaxpr = jax.make_jaxpr(grad)(jnp.eye(4), jnp.ones((2, 4)))
  paths = {module_path(eqn.source_info.name_stack) for eqn in equations(jaxpr)}
  assert paths <= {(), ("block",), ("attn",), ("block", "attn")}
