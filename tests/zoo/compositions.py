"""Flax's own layers, composed: lifted transforms, caches, wrappers, adapters.

Each is a small module with the inputs to call it with; nothing takes a dtype, unless that is the
point.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

SERIES = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)
VIDEO = jax.ShapeDtypeStruct((2, 3, 8, 8, 2), jnp.float32)
PICTURES = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
TOKEN = jax.ShapeDtypeStruct((2, 1, 8), jnp.float32)
LENGTHS = jax.ShapeDtypeStruct((2,), jnp.int32)


@dataclass(frozen=True, eq=False)
class Composition:
  """A way of composing layers.

  Attributes:
      name: What it is.
      build: Makes the module; in NNX from `nnx.Rngs`.
      inputs: The shapes of what it is called with.
      options: Static keyword arguments of the call.
      rngs: The names of the random keys that a Linen module draws from.
      power_iteration: How many matmuls are a spectral norm's, and those of its gradient.
  """

  name: str
  build: Callable[..., Any]
  inputs: tuple[Any, ...]
  options: dict[str, Any] = field(default_factory=dict)
  rngs: tuple[str, ...] = ()
  power_iteration: int = 0

  def __str__(self) -> str:
    return self.name


# Linen ----------------------------------------------------------------------------------------


class Recurrent(nn.Module):
  """Two recurrences, there and back, over sequences of different lengths."""

  @nn.compact
  def __call__(self, x: Array, lengths: Array) -> Array:
    there, back = nn.RNN(nn.LSTMCell(8)), nn.RNN(nn.GRUCell(8))
    x = nn.Bidirectional(there, back)(x, seq_lengths=lengths)
    return nn.Dense(3)(x)


class Film(nn.Module):
  """A convolutional LSTM over the frames of a film."""

  @nn.compact
  def __call__(self, frames: Array) -> Array:
    hidden = nn.RNN(nn.ConvLSTMCell(4, (3, 3)))(frames)
    return nn.ConvTranspose(1, (2, 2), (2, 2))(hidden[:, -1])


class Normalized(nn.Module):
  """Weight norm, spectral norm, and the norms of activations."""

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = nn.WeightNorm(nn.Conv(8, (3, 3)))(x)
    x = nn.relu(nn.GroupNorm(2)(x))
    x = nn.SpectralNorm(nn.Conv(8, (3, 3), (2, 2)))(x, update_stats=train)
    x = nn.relu(nn.InstanceNorm()(x))
    return nn.Dense(3)(nn.RMSNorm()(x.mean((1, 2))))


class Block(nn.Module):
  """A residual perceptron that the lifted transforms below repeat."""

  @nn.compact
  def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
    y = nn.Dense(16)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class Stack(nn.Module):
  """Layers under scan and remat, then an ensemble of heads under vmap."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    x, _ = nn.scan(nn.remat(Block, prevent_cse=False), length=3, **split)(name="layers")(x, None)
    heads = nn.vmap(nn.Dense, in_axes=None, out_axes=0, axis_size=2, **split)
    return heads(3, name="heads")(x).mean(0)


class Projected(nn.Module):
  """Einsum and DenseGeneral layers, a parameter of the module's own, a mask of finfo's minimum."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    query = nn.DenseGeneral((2, 4), name="query")(x)
    key = nn.Einsum((8, 2, 4), "bld,dhk->blhk", name="key")(x)
    value = nn.Einsum((8, 2, 4), "bld,dhk->blhk", name="value")(x)
    bias = self.param("bias", nn.initializers.normal(), (2, 6, 6))
    hidden = jnp.finfo(x.dtype).min
    mask = jnp.where(jnp.tril(jnp.ones((6, 6), bool)), 0.0, hidden)
    logits = jnp.einsum("bqhk,blhk->bhql", query, key) / 2 + bias[None]
    weights = jax.nn.softmax(jnp.maximum(logits + mask[None, None], hidden))
    out = jnp.einsum("bhql,blhk->bqhk", weights, value)
    return nn.DenseGeneral(8, axis=(-2, -1), name="out")(out)


class Autoencoder(nn.Module):
  """Methods of its own, submodules made in setup, one of them in a dtype that somebody fixed."""

  def setup(self) -> None:
    self.encoder = nn.Sequential([nn.Dense(4, dtype=jnp.float32), nn.tanh, nn.Dense(2)])
    self.decoder = [nn.Dense(4), nn.Dense(8)]

  def encode(self, x: Array) -> Array:
    return self.encoder(x)

  def decode(self, code: Array) -> Array:
    for layer in self.decoder:
      code = layer(nn.relu(code))
    return code

  def __call__(self, x: Array) -> tuple[Array, Array]:
    code = self.encode(x)
    return code, self.decode(code)


class Adapted(nn.Module):
  """A low-rank adapter that shares the scope of the layer it adapts."""

  inner: nn.Dense

  def setup(self) -> None:
    nn.share_scope(self, self.inner)
    self.down = self.param("down", nn.initializers.normal(), (8, 2))
    self.up = self.param("up", nn.initializers.normal(), (2, self.inner.features))

  def __call__(self, x: Array) -> Array:
    return self.inner(x) + x @ self.down @ self.up


class Adapter(nn.Module):
  """Two calls of one adapted layer, which share its parameters."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    layer = Adapted(nn.Dense(8))
    return layer(nn.relu(layer(x)))


class Decoder(nn.Module):
  """One step of autoregressive decoding: attention with its cache."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    attend = nn.MultiHeadDotProductAttention(2, decode=True, normalize_qk=True)
    return nn.Dense(3)(attend(x))


class Mixture(nn.Module):
  """A switch between experts by `nn.switch`, and weights tied through `attend`."""

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    embed = nn.Embed(16, 8)
    x = embed(tokens)
    experts = [nn.Dense(8, name=f"expert_{n}") for n in range(2)]
    if self.is_initializing():
      for expert in experts:
        expert(x)
    branches = [lambda module, x, one=one: one(x) for one in experts]
    x = nn.switch(tokens.sum() % 2, branches, self, x)
    return embed.attend(nn.Dropout(0.2, deterministic=False)(x))


class Windowed(nn.Module):
  """Attention to neighbours: keys and values padded, and left out, with a literal 0."""

  @nn.compact
  def __call__(self, x: Array, lengths: Array) -> Array:
    query, key, value = jnp.split(nn.Dense(24, name="projections")(x), 3, -1)
    kept = (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None]
    key, value = (_windows(jnp.where(kept, y, 0)) for y in (key, value))
    scores = jnp.einsum("bqd,bqwd->bqw", query, key) / 8**0.5
    there = _windows(kept)[..., 0]
    weights = nn.softmax(jnp.where(there, scores, -1e9)) * there.any(-1, keepdims=True)
    out = jnp.einsum("bqw,bqwd->bqd", weights, value)
    return nn.Dense(3, name="head")(jnp.clip(out, -6, 6))


def _windows(x: Array) -> Array:
  """Each of a sequence with the one before and the one behind it."""
  length = x.shape[1]
  padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=0)
  return jnp.stack([padded[:, n : n + length] for n in range(3)], 2)


LINEN: tuple[Composition, ...] = (
  Composition("bidirectional recurrence", Recurrent, (SERIES, LENGTHS)),
  Composition("convolutional LSTM", Film, (VIDEO,)),
  Composition(
    "weight and spectral norm", Normalized, (PICTURES,), {"train": True}, power_iteration=6
  ),
  Composition("scan, remat and vmap", Stack, (SERIES,)),
  Composition("einsum layers", Projected, (SERIES,)),
  Composition("methods and lists of layers", Autoencoder, (SERIES,)),
  Composition("shared scopes", Adapter, (SERIES,)),
  Composition("decoding with a cache", Decoder, (TOKEN,)),
  Composition("switch and tied weights", Mixture, (TOKENS,), rngs=("dropout",)),
  Composition("windows padded with a literal 0", Windowed, (SERIES, LENGTHS)),
)


# NNX ------------------------------------------------------------------------------------------


class Layer(nnx.Module):
  """A residual perceptron with dropout, for the transforms below."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return x + self.dropout(self.down(nnx.gelu(self.up(self.norm(x)))))


class Scanned(nnx.Module):
  """Layers stacked by vmap and run by scan, each of them rematerialized."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.rngs = rngs  # kept, as many do
    self.layers = nnx.vmap(Layer, in_axes=0)(rngs.split(3))
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def run(x: Array, layer: Layer) -> Array:
      return layer(x)

    return self.head(run(x, self.layers))


class Jitted(nnx.Module):
  """A method that is compiled by itself, and a layer that fixes float32."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.first = nnx.Linear(8, 8, dtype=jnp.float32, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.second = nnx.Einsum("bld,dk->blk", (8, 4), (4,), rngs=rngs)

  @nnx.jit
  def encode(self, x: Array) -> Array:
    return nnx.relu(self.norm(self.first(x)))

  def __call__(self, x: Array) -> Array:
    return self.second(self.encode(x))


class LowRank(nnx.Module):
  """LoRA around a layer and beside one, weight norm, and spectral norm."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.adapted = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
    self.beside = nnx.LoRA(8, 2, 8, base_module=nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
    self.head = nnx.WeightNorm(nnx.Linear(8, 3, rngs=rngs), rngs=rngs)
    self.spectral = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)

  def __call__(self, x: Array) -> Array:
    x = nnx.relu(self.beside(nnx.relu(self.adapted(x))))
    return self.head(self.spectral(x, update_stats=True))


class Cached(nnx.Module):
  """One step of decoding with a cache."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.attend = nnx.MultiHeadAttention(2, 8, decode=True, normalize_qk=True, rngs=rngs)
    self.attend.init_cache((2, 4, 8))
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.head(self.attend(x))


class Sequential(nnx.Module):
  """A recurrence there and back, in a Sequential, with a count of its calls."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    there = nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=rngs), rngs=rngs)
    back = nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs), rngs=rngs)
    self.recurrent = nnx.Bidirectional(there, back, rngs=rngs)
    self.head = nnx.Sequential(nnx.Linear(16, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
    self.calls = nnx.Variable(jnp.array(0))

  def __call__(self, x: Array) -> Array:
    self.calls[...] += 1
    return self.head(self.recurrent(x))


class Grouped(nnx.Module):
  """Qwen3's attention: normalized queries and keys, two queries a key, angles by einsum."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.query = nnx.Einsum("BTD,DNH->BTNH", (8, 4, 4), rngs=rngs)
    self.key = nnx.Einsum("BSD,DKH->BSKH", (8, 2, 4), rngs=rngs)
    self.value = nnx.Einsum("BSD,DKH->BSKH", (8, 2, 4), rngs=rngs)
    self.out = nnx.Einsum("BTNH,NHD->BTD", (4, 4, 8), rngs=rngs)
    self.query_norm, self.key_norm = nnx.RMSNorm(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)

  def __call__(self, x: Array, sin: Array, cos: Array) -> Array:
    query = _rotated(self.query_norm(self.query(x)), sin, cos)
    key = _rotated(self.key_norm(self.key(x)), sin, cos)
    batch, length, heads, size = query.shape
    query = query.reshape((batch, length, 2, heads // 2, size))
    scores = jnp.einsum("BTKGH,BSKH->BTSKG", query, key) * size**-0.5
    causal = jnp.tril(jnp.ones((length, length), bool))[None, :, :, None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -2.3819763e38).astype(jnp.float32), axis=2)
    attended = jnp.einsum("BTSKG,BSKH->BTKGH", weights.astype(x.dtype), self.value(x))
    return self.out(attended.reshape((batch, length, heads, size)))


def _rotated(x: Array, sin: Array, cos: Array) -> Array:
  one, two = jnp.split(x, 2, axis=-1)
  sin, cos = sin[:, :, None], cos[:, :, None]
  return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1).astype(x.dtype)


class Decoding(nnx.Module):
  """A layer of Qwen3 behind a thousand tokens: rotary positions, a gated unit, tied embeddings."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.embed = nnx.Embed(16, 8, rngs=rngs)
    self.norms = nnx.List([nnx.RMSNorm(8, rngs=rngs) for _ in range(3)])
    self.attend = Grouped(rngs)
    self.gate, self.up, self.down = (
      nnx.Linear(*sizes, use_bias=False, rngs=rngs) for sizes in ((8, 16), (8, 16), (16, 8))
    )

  def __call__(self, tokens: Array) -> Array:
    x = self.embed(tokens)
    positions = 1001 + jnp.cumsum(jnp.ones_like(tokens), -1)
    frequencies = 1.0 / 1e6 ** (jnp.arange(0, 4, 2, dtype=jnp.float32) / 4)
    angles = jnp.einsum("BT,k->BTk", positions, frequencies, precision=jax.lax.Precision.HIGHEST)
    x = x + self.attend(self.norms[0](x), jnp.sin(angles), jnp.cos(angles))
    y = self.norms[1](x)
    x = x + self.down(nnx.silu(self.gate(y)) * self.up(y))
    return self.embed.attend(self.norms[2](x))


NNX: tuple[Composition, ...] = (
  Composition("scan of remat of vmap", Scanned, (SERIES,)),
  Composition("a jitted method", Jitted, (SERIES,)),
  Composition("LoRA, weight and spectral norm", LowRank, (SERIES,), power_iteration=6),
  Composition("decoding with a cache", Cached, (TOKEN,)),
  Composition("bidirectional recurrence and a counter", Sequential, (SERIES,)),
  Composition("rotary positions by einsum", Decoding, (TOKENS,)),
)
