"""What is trained: a model, the shapes of a batch, and the loss, each in a full and a tiny size.

The probes are workloads of one layer each, whose gradient is known without a computer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross-entropy, computed in float32 as a careful user would: f32[]."""
  logits = logits.astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean squared error, computed in float32: f32[]."""
  return jnp.mean((outputs.astype(jnp.float32) - labels) ** 2)


class Workload(NamedTuple):
  """What is trained, without a precision.

  Attributes:
    name: its name in tables and on command lines.
    model: the class of the model, in `models.py` and by the same name in `peers/haiku_models.py`.
    sizes: the model's arguments.
    inputs: shape and dtype of a batch's inputs.
    labels: shape and dtype of its labels.
    classes: inputs and labels that are integers lie below this.
    loss: a function of the model's outputs and the labels.
  """

  name: str
  model: type[nn.Module]
  sizes: dict[str, Any]
  inputs: jax.ShapeDtypeStruct
  labels: jax.ShapeDtypeStruct
  classes: int
  loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy


def language(
  name: str, model: type[nn.Module], batch: int, length: int, vocabulary: int, **sizes: Any
) -> Workload:
  """A language model on `batch` sequences of `length` tokens."""
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  return Workload(name, model, {"vocabulary": vocabulary, **sizes}, tokens, tokens, vocabulary)


def vision(
  name: str, model: type[nn.Module], batch: int, side: int, classes: int, **sizes: Any
) -> Workload:
  """A classifier of `batch` pictures of `side` x `side` pixels."""
  images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return Workload(name, model, {"classes": classes, **sizes}, images, labels, classes)


def denoising(name: str, model: type[nn.Module], batch: int, side: int, **sizes: Any) -> Workload:
  """A model of the noise in `batch` pictures of `side` x `side` pixels."""
  images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
  return Workload(name, model, sizes, images, images, 1, squared_error)


def optimizer(name: str, millions: int) -> Workload:
  """Parameters alone, in 24 leaves: their gradient is the batch."""
  inputs = jax.ShapeDtypeStruct((24, millions * 10**6 // 24), jnp.float32)
  return Workload(name, models.Parameters, {}, inputs, _NO_LABELS, 1, _total)


REPEATS = 4096
ODD = 2049.0
_NO_LABELS = jax.ShapeDtypeStruct((1,), jnp.int32)


def _total(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  del labels
  return jnp.sum(outputs.astype(jnp.float32))


def _attending(
  name: str, *, batch: int = 8, length: int = 512, layers: int = 2, **options: Any
) -> Workload:
  options = {"width": 512, "heads": 8, "hidden": 2048} | options
  return language(name, models.Llama, batch, length, 4096, layers=layers, **options)


_ATTENTIONS: dict[str, dict[str, Any]] = {
  "einsum-512": {"groups": 8},
  "grouped-512": {"groups": 2},
  "stray-512": {"groups": 8, "kernel": "stray"},
  "dpa-512": {"groups": 8, "kernel": "jax"},
  "gqa-512": {"groups": 2, "kernel": "jax"},
  "gqa-2048": {"groups": 2, "kernel": "jax", "length": 2048, "batch": 4, "layers": 1},
  **{
    f"{name}-8192": {**options, "length": 8192, "batch": 1, "layers": 1}
    for name, options in (
      ("einsum", {"groups": 8}),
      ("dpa", {"groups": 8, "kernel": "jax"}),
      ("gqa", {"groups": 2, "kernel": "jax"}),
    )
  },
}
"""Blocks of a Llama: attention that is spelled out, with grouped heads, and with a stray NumPy
number in it; and JAX's function, which is `dpa`, with grouped heads `gqa`.
"""

_WAYS: dict[str, dict[str, Any]] = {
  "": {},
  "-remat": {"remat": True},
  "-dots": {"remat": "dots_with_no_batch_dims_saveable"},
  "-scan": {"scanned": True},
}

FULL: dict[str, Callable[..., Workload]] = {
  "gpt-124m": lambda batch=8, layers=12: language(
    "gpt-124m", models.Transformer, batch, 1024, 50257, layers=layers
  ),
  "gpt-small": lambda batch=16, layers=4: language(
    "gpt-small", models.Transformer, batch, 512, 8192, layers=layers
  ),
  "gpt-cpu": lambda batch=4, layers=4: language(
    "gpt-cpu", models.Transformer, batch, 128, 4096, layers=layers, width=256, heads=4
  ),
  "llama-cpu": lambda batch=4, layers=4: language(
    "llama-cpu",
    models.Llama,
    batch,
    128,
    4096,
    layers=layers,
    width=256,
    heads=4,
    groups=4,
    hidden=1024,
  ),
  "llama-200m": lambda batch=4, layers=12: language(
    "llama-200m", models.Llama, batch, 2048, 32000, layers=layers
  ),
  "llama-200m-cudnn": lambda batch=4, layers=12: language(
    "llama-200m-cudnn", models.Llama, batch, 2048, 32000, layers=layers, kernel="cudnn"
  ),
  **{
    f"{name}{suffix}": functools.partial(_attending, f"{name}{suffix}", **sizes, **way)
    for name, sizes in _ATTENTIONS.items()
    for suffix, way in _WAYS.items()
  },
  "vit-base": lambda batch=32: vision("vit-base", models.VisionTransformer, batch, 224, 1000),
  "resnet-50": lambda batch=32: vision("resnet-50", models.ResNet, batch, 224, 1000),
  "moe-small": lambda batch=8, layers=4: language(
    "moe-small", models.MixtureOfExperts, batch, 512, 8192, layers=layers
  ),
  "unet-small": lambda batch=16: denoising("unet-small", models.UNet, batch, 64),
  "lstm-2x1024": lambda batch=64: language("lstm-2x1024", models.RecurrentModel, batch, 128, 10000),
  "float8-gpt": lambda batch=4, layers=4: language(
    "float8-gpt", models.Transformer, batch, 2048, 32000, layers=layers, width=4096, heads=32
  ),
  "float8-llama": lambda batch=4, layers=4: language(
    "float8-llama",
    models.Llama,
    batch,
    2048,
    32000,
    layers=layers,
    width=4096,
    heads=32,
    groups=8,
    hidden=14336,
  ),
  "optimizer-1m": lambda: optimizer("optimizer-1m", 1),
  "optimizer-30m": lambda: optimizer("optimizer-30m", 30),
  "optimizer-1000m": lambda: optimizer("optimizer-1000m", 1000),
}

TINY: dict[str, Callable[..., Workload]] = {
  "gpt": lambda batch=4, layers=1: language(
    "gpt", models.Transformer, batch, 16, 64, layers=layers, width=32, heads=2
  ),
  "float8": lambda batch=4, layers=1: language(
    "float8", models.Transformer, batch, 16, 64, layers=layers, width=32, heads=2
  ),
  "llama": lambda batch=4, layers=1: language(
    "llama",
    models.Llama,
    batch,
    16,
    64,
    layers=layers,
    width=32,
    heads=4,
    groups=2,
    hidden=64,
  ),
  "vit": lambda batch=4: vision(
    "vit", models.VisionTransformer, batch, 16, 10, layers=1, width=32, heads=2, patch=4
  ),
  "resnet": lambda batch=8: vision("resnet", models.ResNet, batch, 16, 10, stages=(1,), width=8),
  "lstm": lambda batch=4: language(
    "lstm", models.RecurrentModel, batch, 16, 64, width=32, layers=1
  ),
}


class Lookup(nn.Module):
  """An embedding of one feature.

  Attributes:
    dtype: the compute dtype; None for the parameters' own.
  """

  dtype: Any = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up tokens in a table of two."""
    return nn.Embed(2, 1, dtype=self.dtype)(tokens)


class Shared(nn.Module):
  """One layer that is applied to every place of a sequence in turn.

  Attributes:
    dtype: the compute dtype; None for the parameters' own.
  """

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [length, 1, 1] to the same shape."""
    layer = nn.Dense(1, use_bias=False, dtype=self.dtype)
    loop = nn.scan(
      lambda layer, carry, place: (carry, layer(place)),
      variable_broadcast="params",
      split_rngs={"params": False},
    )
    return loop(layer, (), x)[1]


class Tabled(nn.Module):
  """A layer behind a product with a float32 table.

  Attributes:
    dtype: the compute dtype; None for the parameters' own.
  """

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Multiplies by a float32 table, then by a matrix."""
    table = jnp.linspace(0, 1, x.shape[-1], dtype=jnp.float32)
    return nn.Dense(4, dtype=self.dtype)(x * table)


def _label_itself(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.sum(outputs.astype(jnp.float32)) * 0 + jnp.sum(labels.astype(jnp.float32))


PROBES = {
  "embedding": Workload(
    "embedding",
    Lookup,
    {},
    jax.ShapeDtypeStruct((REPEATS,), jnp.int32),
    _NO_LABELS,
    1,
    _total,
  ),
  "shared": Workload(
    "shared",
    Shared,
    {},
    jax.ShapeDtypeStruct((REPEATS, 1, 1), jnp.float32),
    _NO_LABELS,
    1,
    _total,
  ),
  "table": Workload(
    "table", Tabled, {}, jax.ShapeDtypeStruct((2, 4), jnp.float32), _NO_LABELS, 1, _total
  ),
  "target": Workload(
    "target",
    Tabled,
    {},
    jax.ShapeDtypeStruct((2, 4), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
    1,
    _label_itself,
  ),
}


def batch_of(workload: Workload, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and labels drawn at random: integers below `classes`, pictures from a normal."""
  draw = np.random.default_rng(seed)

  def array(spec: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(spec.dtype, jnp.integer):
      return draw.integers(0, workload.classes, spec.shape, np.int32)
    return draw.standard_normal(spec.shape, np.float32)

  return array(workload.inputs), array(workload.labels)


def poisoned(inputs: np.ndarray) -> np.ndarray:
  """The inputs with one NaN in them: a pixel, or a token out of range, whose embedding is NaN."""
  inputs = inputs.copy()
  inputs.flat[0] = np.nan if inputs.dtype.kind == "f" else np.iinfo(np.int32).max
  return inputs
