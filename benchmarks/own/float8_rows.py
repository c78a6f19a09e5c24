"""Training with matmuls in bfloat16 and in float8: what `float8` and `float8_compiled` compare."""

import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mpjax
from benchmarks import harness, models, workloads

Loss = Callable[..., tuple[jax.Array, Any]]
"""`(params, scales, inputs, labels) -> (loss, scales)`."""
Build = Callable[[workloads.Workload], tuple[harness.Model, Loss]]


def under(policy: str) -> Build:
  """A workload's model, and its loss under a policy."""

  def build(workload: workloads.Workload) -> tuple[harness.Model, Loss]:
    model = harness.linen(workload)
    return model, mpjax.autocast(harness.loss_of(workload, model), policy)

  return build


def by_hand(workload: workloads.Workload) -> tuple[harness.Model, Loss]:
  """A workload's model with its layers given bfloat16."""
  model = harness.linen(workload, jnp.bfloat16)
  return model, harness.loss_of(workload, model)


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

  def build(workload: workloads.Workload) -> tuple[harness.Model, Loss]:
    plain = harness.linen(workload, jnp.bfloat16)
    model = harness.Model(intercepted(plain.init), intercepted(plain.apply))
    return model, harness.loss_of(workload, model)

  return build


def qwix_float8(workload: workloads.Workload) -> tuple[harness.Model, Loss]:
  """A workload's model with Qwix's matmuls, a scale a channel, in bfloat16 by hand."""
  import qwix  # pyright: ignore[reportMissingImports]

  rule = qwix.QtRule(
    module_path="^(?!head).*$",
    weight_qtype=jnp.float8_e4m3fn,
    act_qtype=jnp.float8_e4m3fn,
    bwd_qtype=jnp.float8_e5m2,
  )
  module: Any = workload.model(**workload.sizes, dtype=jnp.bfloat16)  # pyright: ignore[reportCallIssue]
  model = harness.of_module(qwix.quantize_model(module, qwix.QtProvider([rule])))
  return model, harness.loss_of(workload, model)


ROWS: dict[str, Build] = {
  "bfloat16 by hand": by_hand,
  "mixed_bfloat16": under("mixed_bfloat16"),
  "mixed_float8": under("mixed_float8"),
  "Flax, delayed scaling": flax_float8(nn.Fp8DirectDotGeneralOp),
  "Flax, cast there and back": flax_float8(nn.Fp8DotGeneralOp),
}
if importlib.util.find_spec("qwix"):
  ROWS["Qwix"] = qwix_float8

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


def training(
  row: str, workload: workloads.Workload, tx: optax.GradientTransformation
) -> harness.Training:
  """The training of a row; its state is parameters, scales and the optimizer's state."""
  model, loss_fn = ROWS[row](workload)
  one = step_of(loss_fn, tx)

  def begin(params: Any, scales: Any) -> Any:
    return params, scales, tx.init(params)

  def step(state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
    *state, loss = one(*state, inputs, labels)
    return tuple(state), loss

  return harness.Training(model, begin, step)
