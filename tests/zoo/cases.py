"""The models with their data and losses, and one functional view of Linen and NNX alike."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from zoo import linen_models, nnx_models

LOSS_SCALE = 2.0**10
"""What float16 gradients need to stay above the subnormals, for every way of writing them."""


class Batch(NamedTuple):
  """What a model reads, and what its loss compares the outputs with."""

  inputs: Any
  targets: jax.Array


class Pure(NamedTuple):
  """A model as data and a function `loss(params, state, batch) -> (loss, new_state)`."""

  params: Any
  state: Any
  loss: Callable[[Any, Any, Batch], tuple[jax.Array, Any]]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy; a hand-written 16-bit model leaves 16 bits at its logits."""
  logits = logits.astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """The mean squared error, in float32 for every model."""
  return jnp.mean((outputs.astype(jnp.float32) - targets) ** 2)


def text(seed: int) -> Batch:
  """Random tokens and, as labels, random tokens."""
  inputs, labels = np.random.default_rng(seed).integers(0, 31, (2, 4, 12))
  return Batch(jnp.asarray(inputs, jnp.int32), jnp.asarray(labels, jnp.int32))


def pictures(seed: int) -> Batch:
  """Random images of unit variance and labels."""
  rng = np.random.default_rng(seed)
  images = rng.standard_normal((8, 8, 8, 3))
  return Batch(jnp.asarray(images, jnp.float32), jnp.asarray(rng.integers(0, 10, 8), jnp.int32))


def noisy_pictures(seed: int) -> Batch:
  """Random images with diffusion times up to 1000, and the noise to predict."""
  rng = np.random.default_rng(seed)
  images, noise = rng.standard_normal((2, 2, 8, 8, 3))
  times = rng.integers(0, 1000, 2)
  inputs = (jnp.asarray(images, jnp.float32), jnp.asarray(times, jnp.float32))
  return Batch(inputs, jnp.asarray(noise, jnp.float32))


@dataclass(frozen=True)
class Case:
  """One architecture in one of Flax's two APIs.

  Attributes:
      name: The architecture.
      api: "linen" or "nnx".
      build: Makes the module; takes `dtype=` and, in NNX, `rngs=`.
      batch: Makes the data for a seed.
      objective: The loss, from the model's outputs and the targets.
  """

  name: str
  api: str
  build: Callable[..., Any]
  batch: Callable[[int], Batch]
  objective: Callable[[jax.Array, jax.Array], jax.Array]

  def __str__(self) -> str:
    return f"{self.name}-{self.api}"

  def module(self, dtype: Any = None, seed: int = 0) -> Any:
    """The module: bare in Linen, with the parameters of a seed in NNX."""
    if self.api == "linen":
      return self.build(dtype=dtype)
    model = nnx.eval_shape(lambda: self.build(dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(filled(state, seed)))

  def pure(self, module: Any, seed: int = 0) -> Pure:
    """Parameters, other state and loss of a module of this case."""
    return self._pure_linen(module, seed) if self.api == "linen" else self._pure_nnx(module)

  def _pure_linen(self, module: nn.Module, seed: int) -> Pure:
    shapes = jax.eval_shape(module.init, jax.random.key(0), self.batch(0).inputs)
    variables = dict(jax.device_put(filled(shapes, seed)))
    params = variables.pop("params")

    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, Any]:
      outputs, state = module.apply({"params": params, **state}, batch.inputs, mutable=list(state))
      return self.objective(outputs, batch.targets), state

    return Pure(params, variables, loss)

  def _pure_nnx(self, model: nnx.Module) -> Pure:
    graph, params, state = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, Any]:
      model = nnx.merge(graph, params, state, copy=True)
      loss = self.objective(model(batch.inputs), batch.targets)
      return loss, nnx.state(model, nnx.Not(nnx.Param))

    return Pure(params, state, loss)


def filled(shapes: Any, seed: int) -> Any:
  """A tree of variables, abstract or not, filled with random values of the usual sizes.

  Far faster than the initializers, which compile a sampler for every shape; and biases and
  scales that are not 0 and 1 test more.
  """
  rng = np.random.default_rng(seed)

  def fill(path: tuple[Any, ...], leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(seed)
    name = next(part for part in map(_name, reversed(path)) if part != "value")
    noise = rng.standard_normal(leaf.shape)
    match name:
      case "scale" | "var":
        values = 1 + 0.1 * np.abs(noise)
      case "bias" | "mean":
        values = 0.1 * noise
      case "up" | "down":  # the experts' weights
        values = noise * leaf.shape[-2] ** -0.5
      case "kernel" | "embedding":
        values = noise * np.prod(leaf.shape[:-1]) ** -0.5
      case _:
        values = np.zeros(leaf.shape)
    return np.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _name(key: Any) -> str:
  return str(getattr(key, "key", getattr(key, "name", key)))


def _both(
  name: str,
  linen: Callable[..., Any],
  in_nnx: Callable[..., Any],
  batch: Callable[[int], Batch],
  objective: Callable[[jax.Array, jax.Array], jax.Array],
) -> list[Case]:
  return [
    Case(name, "linen", linen, batch, objective),
    Case(name, "nnx", in_nnx, batch, objective),
  ]


def _model(name: str, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  return tuple(
    functools.partial(getattr(models, name), **options) for models in (linen_models, nnx_models)
  )


CASES: tuple[Case, ...] = (
  *_both("transformer", *_model("Transformer"), text, cross_entropy),
  *_both("einsum_transformer", *_model("Transformer", einsum=True), text, cross_entropy),
  *_both("resnet", *_model("ResNet"), pictures, cross_entropy),
  *_both("lstm", *_model("Recurrent"), text, cross_entropy),
  *_both(
    "gru",
    functools.partial(linen_models.Recurrent, cell=nn.GRUCell),
    functools.partial(nnx_models.Recurrent, cell=nnx.GRUCell),
    text,
    cross_entropy,
  ),
  *_both("unet", *_model("UNet"), noisy_pictures, squared_error),
  *_both("moe", *_model("MixtureOfExperts"), text, cross_entropy),
  *_both("ragged_moe", *_model("MixtureOfExperts", ragged=True), text, cross_entropy),
)


def case(name: str, api: str) -> Case:
  """The case of an architecture in an API."""
  return next(found for found in CASES if (found.name, found.api) == (name, api))
