"""The benchmarked train steps: one AdamW step, the same however a model got its precision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from benchmarks.models import ResNet, Transformer

FLOAT32 = "float32"
BY_HAND = "Flax `dtype=` by hand"
LOSS_OUTSIDE = "mpjax, loss outside"
LOSS_INSIDE = "mpjax, whole loss inside"
VARIANTS = (FLOAT32, BY_HAND, LOSS_OUTSIDE, LOSS_INSIDE)

POLICIES = ("mixed_bfloat16", "mixed_float16")


class Case(NamedTuple):
  """A train step and the shapes of its arguments.

  Attributes:
    step: `(variables, opt_state, inputs, labels) -> (variables, opt_state, loss)`.
    arguments: one `jax.ShapeDtypeStruct` per array of the arguments.
  """

  step: Callable[..., Any]
  arguments: tuple[Any, ...]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy, computed in float32 as a careful user would: f32[]."""
  logits = logits.astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def dtype_of(variant: str, policy: str) -> np.dtype | None:
  """What a model's layers are given as `dtype`: the compute dtype of `BY_HAND`, None otherwise."""
  return mpjax.Policy.parse(policy).compute_dtype if variant == BY_HAND else None


def loss_of(variant: str, policy: str, model: nn.Module) -> Callable[..., tuple[jax.Array, Any]]:
  """The loss of a model: `(params, model_state, inputs, labels) -> (loss, new model_state)`.

  Args:
    variant: one of `VARIANTS`.
    policy: one of `POLICIES`.
    model: built with `dtype_of` the two.
  """

  def predict(params: Any, model_state: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": params, **model_state}
    return model.apply(variables, inputs, mutable=list(model_state))  # pyright: ignore

  if variant == LOSS_OUTSIDE:
    predict = mpjax.autocast(predict, policy)

  def loss(params: Any, model_state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
    logits, model_state = predict(params, model_state, inputs)
    return cross_entropy(logits, labels), model_state

  return mpjax.autocast(loss, policy) if variant == LOSS_INSIDE else loss


def make_case(variant: str, policy: str, model: nn.Module, inputs: Any, labels: Any) -> Case:
  """One AdamW step of a model, plain optax, with the loss of this variant.

  Args:
    variant: one of `VARIANTS`.
    policy: one of `POLICIES`.
    model: as for `loss_of`.
    inputs: the shape and dtype of a batch.
    labels: the shape and dtype of its labels.
  """
  loss = loss_of(variant, policy, model)
  tx = optax.adamw(1e-3)

  def step(variables: Any, opt_state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
    params, model_state = variables
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, model_state), grads = grad(params, model_state, inputs, labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), model_state), opt_state, value

  def init(inputs: jax.Array) -> Any:
    model_state = dict(model.init(jax.random.key(0), inputs))
    params = model_state.pop("params")
    return (params, model_state), tx.init(params)

  variables, opt_state = jax.eval_shape(init, inputs)
  return Case(step, (variables, opt_state, inputs, labels))


def transformer_case(
  variant: str, policy: str = POLICIES[0], layers: int = 4, batch: int = 16, length: int = 512
) -> Case:
  """The step of a 768-wide language model; `layers`, `batch` and `length` are counts."""
  model = Transformer(layers, dtype=dtype_of(variant, policy))
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  return make_case(variant, policy, model, tokens, tokens)


def resnet_case(variant: str, policy: str = POLICIES[0], batch: int = 32, size: int = 224) -> Case:
  """The step of a ResNet-18 with BatchNorm on `batch` pictures of `size` x `size` pixels."""
  model = ResNet(dtype=dtype_of(variant, policy))
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  return make_case(variant, policy, model, images, jax.ShapeDtypeStruct((batch,), jnp.int32))


CASES = {"transformer": transformer_case, "resnet": resnet_case}
