"""Training with matmuls in bfloat16 and in float8: what `float8` and `float8_compiled` compare."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mpjax
from benchmarks import models, peers, workloads

Loss = Callable[..., tuple[jax.Array, Any]]
"""`(params, scales, inputs, labels) -> (loss, scales)`."""
Build = Callable[[workloads.Workload], tuple[peers.Model, Loss]]


def under(policy: str) -> Build:
  """A workload's model, and its loss under a policy."""

  def build(workload: workloads.Workload) -> tuple[peers.Model, Loss]:
    model = peers.linen(workload)
    return model, mpjax.autocast(peers.loss_of(workload, model), policy)

  return build


def by_hand(workload: workloads.Workload) -> tuple[peers.Model, Loss]:
  """A workload's model with its layers given bfloat16."""
  model = peers.linen(workload, jnp.bfloat16)
  return model, peers.loss_of(workload, model)


def flax_float8(operation: Any) -> Build:
  """A workload's model with Flax's float8 matmuls in its dense layers, in bfloat16 by hand."""

  def in_float8(function: Any, args: Any, keywords: Any, context: Any) -> Any:
    module = context.module
    if isinstance(module, nn.Dense | nn.DenseGeneral) and module.name != "head":
      object.__setattr__(module, "dot_general_cls", operation)
    return function(*args, **keywords)

  def intercepted(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
      with nn.intercept_methods(in_float8):
        return function(*args)

    return run

  def build(workload: workloads.Workload) -> tuple[peers.Model, Loss]:
    plain = peers.linen(workload, jnp.bfloat16)
    model = peers.Model(intercepted(plain.init), intercepted(plain.apply))
    return model, peers.loss_of(workload, model)

  return build


ROWS: dict[str, Build] = {
  "bfloat16 by hand": by_hand,
  "mixed_bfloat16": under("mixed_bfloat16"),
  "mixed_float8": under("mixed_float8"),
  "Flax, delayed scaling": flax_float8(nn.Fp8DirectDotGeneralOp),
  "Flax, cast there and back": flax_float8(nn.Fp8DotGeneralOp),
}

_SIZES = {"layers": 4, "width": 2048, "heads": 16}
WORKLOADS = {
  "GPT": workloads.language("GPT", models.Transformer, 4, 1024, 32000, **_SIZES),
  "Llama": workloads.language(
    "Llama", models.Llama, 4, 1024, 32000, **_SIZES, groups=16, hidden=5632
  ),
}


def step_of(loss_fn: Loss, tx: optax.GradientTransformation) -> Callable[..., Any]:
  """`(params, scales, opt_state, *batch) -> (params, scales, opt_state, loss)`."""

  def step(params: Any, scales: Any, opt_state: Any, *batch: Any) -> Any:
    grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, _), (grads, scales) = grad(params, scales, *batch)  # Flax hands scales on as gradients
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, scales, opt_state, loss.astype(jnp.float32)

  return step
