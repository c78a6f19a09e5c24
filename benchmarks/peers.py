"""What other mixed-precision tools do, observed: the facts of the README's table.

Run `python benchmarks/peers.py`. Tools that are not installed are left out; for all of them:
`pip install jmp mixed-precision-for-jax`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale

import mpjax

Observation = tuple[str, str, str, str]


def matmul_dtype(fn: Callable[..., Any], *args: Any) -> str:
  """The dtype of the last matmul of a function."""
  eqns = jax.make_jaxpr(fn)(*args).jaxpr.eqns
  return str([e.outvars[0].aval.dtype for e in eqns if e.primitive.name == "dot_general"][-1])


def embedding() -> Observation:
  """A token seen 4096 times has the gradient 4096."""
  tokens = jnp.zeros(4096, jnp.int32)

  def gradient(layer: nn.Module) -> str:
    params = layer.init(jax.random.key(0), tokens)
    grad = jax.grad(lambda p: jnp.asarray(layer.apply(p, tokens), jnp.float32).sum())(params)
    return f"{float(grad['params']['embedding'][0, 0]):g}"

  by_hand = gradient(nn.Embed(2, 1, dtype=jnp.bfloat16))
  ours = gradient(mpjax.apply_policy(nn.Embed(2, 1), "mixed_bfloat16"))
  return "Flax Embed(dtype=bfloat16)", "gradient of a token seen 4096 times", by_hand, ours


def dynamic_scale_start() -> Observation:
  """A float16 loss above 1 overflows at the scale 65536."""

  def loss(w: jax.Array) -> jax.Array:
    return (w * jnp.float16(2)).astype(jnp.float16)

  _, finite, _, _ = DynamicScale().value_and_grad(loss)(jnp.float16(1))
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  params = {"w": jnp.float32(1)}
  fn = mpjax.autocast(lambda p: p["w"] * 2, "mixed_float16")
  state = tx.init(params)
  _, grads = mpjax.value_and_grad(fn)(params, loss_scale=mpjax.loss_scale(state))
  _, state = tx.update(grads, state, params)
  applied = bool(mpjax.step_is_finite(state))
  what = "first step of a float16 loss of 2 is applied"
  return "flax DynamicScale", what, str(bool(finite)), str(applied)


def nan_storm() -> Observation:
  """300 steps of NaN."""
  scale = DynamicScale()
  for _ in range(300):
    scale, *_ = scale.value_and_grad(lambda w: w * jnp.nan)(1.0)
  params = {"w": jnp.ones(1)}
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(300):
    _, state = update({"w": jnp.full(1, jnp.nan)}, state, params)
  ours = f"{float(mpjax.loss_scale(state)):g}"
  return "flax DynamicScale", "scale after 300 NaN steps", f"{float(scale.scale):.1e}", ours


def apply_if_finite() -> Observation:
  """A storm that is longer than the patience."""

  def parameter(tx: optax.GradientTransformation) -> str:
    params = {"w": jnp.ones(1)}
    state = tx.init(params)
    for _ in range(8):
      updates, state = tx.update({"w": jnp.full(1, jnp.nan)}, state, params)
      params = optax.apply_updates(params, updates)
    return f"{float(jax.tree.leaves(params)[0][0]):g}"

  theirs = parameter(optax.apply_if_finite(optax.sgd(0.1), 5))
  ours = parameter(mpjax.static_loss_scaling(optax.sgd(0.1), 1))
  return "optax apply_if_finite(5)", "parameter 1 after 8 NaN gradients", theirs, ours


def jmp_leak() -> Observation:
  """One float32 array on the way to a matmul."""
  import jmp  # pyright: ignore[reportMissingImports]

  params, x, table = jnp.ones((4, 4)), jnp.ones((4, 4)), np.ones((4, 4), np.float32)

  def fn(w: jax.Array, x: jax.Array) -> jax.Array:
    return (x * table) @ w

  policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
  theirs = matmul_dtype(lambda w, x: fn(*policy.cast_to_compute((w, x))), params, x)
  ours = matmul_dtype(mpjax.autocast(fn, "mixed_bfloat16"), params, x)
  return "jmp", "dtype of a matmul after a float32 table", theirs, ours


def mpx_growth() -> Observation:
  """The gradient on the step on which the scale grows."""
  import mpx  # pyright: ignore[reportMissingImports]

  scaling = mpx.DynamicLossScaling(jnp.float32(8), jnp.float32(1), period=1, counter=jnp.int32(0))
  w = jnp.ones(2)
  theirs = mpx.filter_grad(lambda w: jnp.sum(3 * w), scaling)(w)[-1]
  tx = mpjax.dynamic_loss_scaling(optax.identity(), init_scale=8, growth_interval=1)
  state = tx.init(w)
  _, grads = mpjax.value_and_grad(lambda w: jnp.sum(3 * w))(w, loss_scale=mpjax.loss_scale(state))
  ours, _ = tx.update(grads, state, w)
  theirs_0, ours_0 = (f"{float(jax.tree.leaves(g)[0][0]):g}" for g in (theirs, ours))
  return "mpx", "gradient 3 on a growth step", theirs_0, ours_0


OBSERVATIONS = {
  embedding: "flax",
  dynamic_scale_start: "flax",
  nan_storm: "flax",
  apply_if_finite: "optax",
  jmp_leak: "jmp",
  mpx_growth: "mpx",
}


def main() -> None:
  """Prints one row an observation, as a Markdown table."""
  print("| tool | what | there | here |\n|---|---|---|---|")
  for observe, package in OBSERVATIONS.items():
    if importlib.util.find_spec(package) is None:
      print(f"| {package} | {observe.__doc__} | not installed | |")
    else:
      print("| " + " | ".join(observe()) + " |")


if __name__ == "__main__":
  main()
