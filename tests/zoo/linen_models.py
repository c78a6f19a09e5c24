"""The architectures in Linen.

Each model takes one `dtype`, which stands for nothing but Flax's own way: None is the model as
people write it, a 16-bit dtype is the same code with `dtype=` passed to every layer by hand.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any


def cast(dtype: Dtype, *arrays: Array) -> tuple[Array, ...]:
  """What a hand-written layer does to its input and its own parameters."""
  return arrays if dtype is None else tuple(x.astype(dtype) for x in arrays)


class EinsumAttention(nn.Module):
  """Attention written out: a fused projection, two einsums, -1e9 where a key is hidden."""

  heads: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    batch, length, width = x.shape
    head = width // self.heads
    qkv = nn.Dense(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, head), 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * head**-0.5
    weights = nn.softmax(jnp.where(mask, logits, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
    return nn.Dense(width, dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
  """A pre-norm transformer block."""

  heads: int
  einsum: bool = False
  dropout: float = 0.0
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: Array, mask: Array, train: bool) -> Array:
    width = x.shape[-1]
    y = nn.LayerNorm(dtype=self.dtype)(x)
    if self.einsum:
      y = EinsumAttention(self.heads, dtype=self.dtype)(y, mask)
    else:
      y = nn.MultiHeadDotProductAttention(
        self.heads,
        dropout_rate=self.dropout,
        deterministic=not train,
        dtype=self.dtype,
      )(y, mask=mask)
    x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
    y = nn.LayerNorm(dtype=self.dtype)(x)
    y = nn.Dense(2 * width, dtype=self.dtype)(y)
    y = nn.Dense(width, dtype=self.dtype)(nn.gelu(y))
    return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class Transformer(nn.Module):
  """A causal language model with learned positions and tied embeddings."""

  vocab: int = 31
  width: int = 16
  heads: int = 2
  depth: int = 1
  einsum: bool = False
  dropout: float = 0.0
  dtype: Dtype = None

  def setup(self) -> None:
    self.embed = nn.Embed(self.vocab, self.width, dtype=self.dtype)
    self.positions = nn.Embed(64, self.width, dtype=self.dtype)
    self.blocks = [
      Block(self.heads, self.einsum, self.dropout, self.dtype) for _ in range(self.depth)
    ]
    self.norm = nn.LayerNorm(dtype=self.dtype)

  def encode(self, tokens: Array, train: bool = True) -> Array:
    mask = nn.make_causal_mask(tokens, dtype=jnp.bool_)
    x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
    for block in self.blocks:
      x = block(x, mask, train)
    return self.norm(x)

  def __call__(self, tokens: Array, train: bool = True) -> Array:
    return self.embed.attend(self.encode(tokens, train))


class ResidualBlock(nn.Module):
  """Two convolutions with BatchNorm around a projected shortcut."""

  features: int
  stride: int = 1
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    strides = (self.stride, self.stride)
    y = nn.Conv(self.features, (3, 3), strides, use_bias=False, dtype=self.dtype)(x)
    y = nn.relu(nn.BatchNorm(not train, dtype=self.dtype)(y))
    y = nn.Conv(self.features, (3, 3), use_bias=False, dtype=self.dtype)(y)
    y = nn.BatchNorm(not train, dtype=self.dtype)(y)
    if x.shape != y.shape:
      x = nn.Conv(self.features, (1, 1), strides, use_bias=False, dtype=self.dtype)(x)
      x = nn.BatchNorm(not train, dtype=self.dtype)(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A residual classifier of small images."""

  classes: int = 10
  dtype: Dtype = None

  @nn.compact
  def __call__(self, images: Array, train: bool = True) -> Array:
    x = nn.Conv(8, (3, 3), use_bias=False, dtype=self.dtype)(images)
    x = nn.relu(nn.BatchNorm(not train, dtype=self.dtype)(x))
    x = ResidualBlock(8, dtype=self.dtype)(x, train)
    x = ResidualBlock(16, 2, dtype=self.dtype)(x, train)
    return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


class Recurrent(nn.Module):
  """A recurrent language model: LSTM or GRU cells under `nn.RNN`."""

  cell: type[nn.RNNCellBase] = nn.OptimizedLSTMCell
  vocab: int = 31
  width: int = 16
  dtype: Dtype = None

  @nn.compact
  def __call__(self, tokens: Array, train: bool = True) -> Array:
    x = nn.Embed(self.vocab, self.width, dtype=self.dtype)(tokens)
    x = nn.RNN(self.cell(self.width, dtype=self.dtype))(x)
    return nn.Dense(self.vocab, dtype=self.dtype)(x)


def sinusoids(times: Array, width: int) -> Array:
  """The sinusoidal embedding of scalar times, as diffusion models write it."""
  rates = jnp.exp(-jnp.log(1e4) * jnp.arange(width // 2) / (width // 2))
  angles = times[:, None] * rates[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimedConv(nn.Module):
  """GroupNorm, swish, convolution, with the time added to every pixel."""

  features: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: Array, time: Array) -> Array:
    y = nn.swish(nn.GroupNorm(2, dtype=self.dtype)(x))
    y = nn.Conv(self.features, (3, 3), dtype=self.dtype)(y)
    y = y + nn.Dense(self.features, dtype=self.dtype)(time)[:, None, None]
    y = nn.swish(nn.GroupNorm(2, dtype=self.dtype)(y))
    y = nn.Conv(self.features, (3, 3), dtype=self.dtype)(y)
    return y + nn.Conv(self.features, (1, 1), dtype=self.dtype)(x)


class UNet(nn.Module):
  """A denoiser with one level, a skip connection and a time embedding."""

  width: int = 8
  dtype: Dtype = None

  @nn.compact
  def __call__(self, inputs: tuple[Array, Array], train: bool = True) -> Array:
    images, times = inputs
    time = nn.Dense(16, dtype=self.dtype)(sinusoids(times, 16))
    time = nn.Dense(16, dtype=self.dtype)(nn.swish(time))
    x = nn.Conv(self.width, (3, 3), dtype=self.dtype)(images)
    skip = TimedConv(self.width, dtype=self.dtype)(x, time)
    x = nn.Conv(2 * self.width, (3, 3), (2, 2), dtype=self.dtype)(skip)
    x = TimedConv(2 * self.width, dtype=self.dtype)(x, time)
    x = nn.ConvTranspose(self.width, (2, 2), (2, 2), dtype=self.dtype)(x)
    x = TimedConv(self.width, dtype=self.dtype)(jnp.concatenate([x, skip], axis=-1), time)
    x = nn.swish(nn.GroupNorm(2, dtype=self.dtype)(x))
    return nn.Conv(images.shape[-1], (3, 3), dtype=self.dtype)(x)


def grouped(tokens: Array, chosen: Array, experts: int) -> tuple[Array, Array, Array]:
  """Sort a copy of every token for each expert chosen: the rows, their order, group sizes."""
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat)
  rows = jnp.repeat(tokens, chosen.shape[1], axis=0)[order]
  return rows, order, jnp.bincount(flat, length=experts)


class Experts(nn.Module):
  """A mixture-of-experts layer: softmax router, the best two, dispatch by one_hot or sorting."""

  experts: int = 4
  chosen: int = 2
  ragged: bool = False
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, length, width = x.shape
    up = self.param("up", nn.initializers.lecun_normal(), (self.experts, width, 2 * width))
    down = self.param("down", nn.initializers.lecun_normal(), (self.experts, 2 * width, width))
    router = nn.Dense(self.experts, use_bias=False, dtype=self.dtype, name="router")
    tokens = x.reshape(batch * length, width)
    gates, chosen = jax.lax.top_k(nn.softmax(router(tokens)), self.chosen)
    gates = gates / gates.sum(-1, keepdims=True)
    tokens, up, down = cast(self.dtype, tokens, up, down)
    dispatch = self.by_sorting if self.ragged else self.by_one_hot
    return dispatch(tokens, gates, chosen, up, down).reshape(x.shape)

  def by_one_hot(self, tokens, gates, chosen, up, down) -> Array:
    mask = nn.one_hot(chosen, self.experts, dtype=tokens.dtype)
    inputs = jnp.einsum("tke,td->ketd", mask, tokens)
    hidden = nn.relu(jnp.einsum("ketd,edf->ketf", inputs, up))
    outputs = jnp.einsum("ketf,efd->ketd", hidden, down)
    return jnp.einsum("ketd,tke,tk->td", outputs, mask, gates)

  def by_sorting(self, tokens, gates, chosen, up, down) -> Array:
    rows, order, sizes = grouped(tokens, chosen, self.experts)
    hidden = nn.relu(jax.lax.ragged_dot(rows, up, sizes))
    outputs = jax.lax.ragged_dot(hidden, down, sizes)
    outputs = jnp.zeros_like(outputs).at[order].set(outputs)
    outputs = outputs.reshape(*chosen.shape, -1) * gates[..., None]
    return outputs.sum(1)


class MixtureOfExperts(nn.Module):
  """A classifier of tokens around one mixture-of-experts layer."""

  vocab: int = 31
  width: int = 16
  ragged: bool = False
  dtype: Dtype = None

  @nn.compact
  def __call__(self, tokens: Array, train: bool = True) -> Array:
    x = nn.Embed(self.vocab, self.width, dtype=self.dtype)(tokens)
    x = x + Experts(ragged=self.ragged, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
    return nn.Dense(self.vocab, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
