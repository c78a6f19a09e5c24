"""The architectures in NNX, layer for layer those of `linen_models`.

Each model takes one `dtype`, which stands for nothing but Flax's own way: None is the model as
people write it, a 16-bit dtype is the same code with `dtype=` passed to every layer by hand.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.linen_models import cast, grouped, sinusoids

Array = jax.Array
Dtype = Any


def float16_attention(query: Array, key: Array, value: Array, *, mask: Array, **_: Any) -> Array:
  """What `jax.nn.dot_product_attention` computes; its own float16 matmul has no CPU kernel."""
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
  weights = nnx.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min))
  return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


class EinsumAttention(nnx.Module):
  """Attention written out: a fused projection, two einsums, -1e9 where a key is hidden."""

  def __init__(self, width: int, heads: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
    self.heads = heads
    self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
    self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    batch, length, width = x.shape
    head = width // self.heads
    qkv = self.qkv(x).reshape(batch, length, 3, self.heads, head)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * head**-0.5
    weights = nnx.softmax(jnp.where(mask, logits, -1e9))
    return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width))


class Block(nnx.Module):
  """A pre-norm transformer block."""

  def __init__(
    self, width: int, heads: int, einsum: bool, dropout: float, dtype: Dtype, rngs: nnx.Rngs
  ) -> None:
    self.attend_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    if einsum:
      self.attention = EinsumAttention(width, heads, dtype, rngs)
    else:
      by_hand = {"attention_fn": float16_attention} if dtype == jnp.float16 else {}
      self.attention = nnx.MultiHeadAttention(
        heads,
        width,
        dropout_rate=dropout,
        decode=False,
        dtype=dtype,
        rngs=rngs,
        **by_hand,
      )
    self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    self.up = nnx.Linear(width, 2 * width, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(2 * width, width, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(self, x: Array, mask: Array) -> Array:
    x = x + self.dropout(self.attention(self.attend_norm(x), mask=mask))
    y = self.down(nnx.gelu(self.up(self.norm(x))))
    return x + self.dropout(y)


class Transformer(nnx.Module):
  """A causal language model with learned positions and tied embeddings."""

  def __init__(
    self,
    *,
    vocab: int = 31,
    width: int = 16,
    heads: int = 2,
    depth: int = 1,
    einsum: bool = False,
    dropout: float = 0.0,
    dtype: Dtype = None,
    rngs: nnx.Rngs,
  ) -> None:
    self.embed = nnx.Embed(vocab, width, dtype=dtype, rngs=rngs)
    self.positions = nnx.Embed(64, width, dtype=dtype, rngs=rngs)
    self.blocks = nnx.List(
      [Block(width, heads, einsum, dropout, dtype, rngs) for _ in range(depth)]
    )
    self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)

  def encode(self, tokens: Array) -> Array:
    mask = nnx.make_causal_mask(tokens, dtype=jnp.bool_)
    x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
    for block in self.blocks:
      x = block(x, mask)
    return self.norm(x)

  def __call__(self, tokens: Array) -> Array:
    return self.embed.attend(self.encode(tokens))


class ConvNorm(nnx.Module):
  """A convolution without bias and its BatchNorm."""

  def __init__(
    self, inputs: int, features: int, size: int, stride: int, dtype: Dtype, rngs: nnx.Rngs
  ) -> None:
    self.conv = nnx.Conv(
      inputs, features, (size, size), stride, use_bias=False, dtype=dtype, rngs=rngs
    )
    self.norm = nnx.BatchNorm(features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.norm(self.conv(x))


class ResidualBlock(nnx.Module):
  """Two convolutions with BatchNorm around a projected shortcut."""

  def __init__(self, inputs: int, features: int, stride: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
    self.first = ConvNorm(inputs, features, 3, stride, dtype, rngs)
    self.second = ConvNorm(features, features, 3, 1, dtype, rngs)
    self.shortcut = ConvNorm(inputs, features, 1, stride, dtype, rngs) if stride > 1 else None

  def __call__(self, x: Array) -> Array:
    y = self.second(nnx.relu(self.first(x)))
    return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
  """A residual classifier of small images."""

  def __init__(self, *, classes: int = 10, dtype: Dtype = None, rngs: nnx.Rngs) -> None:
    self.stem = ConvNorm(3, 8, 3, 1, dtype, rngs)
    self.first = ResidualBlock(8, 8, 1, dtype, rngs)
    self.second = ResidualBlock(8, 16, 2, dtype, rngs)
    self.head = nnx.Linear(16, classes, dtype=dtype, rngs=rngs)

  def __call__(self, images: Array) -> Array:
    x = self.second(self.first(nnx.relu(self.stem(images))))
    return self.head(x.mean((1, 2)))


class Recurrent(nnx.Module):
  """A recurrent language model: LSTM or GRU cells under `nnx.RNN`."""

  def __init__(
    self,
    *,
    cell: type[nnx.RNNCellBase] = nnx.OptimizedLSTMCell,
    vocab: int = 31,
    width: int = 16,
    dtype: Dtype = None,
    rngs: nnx.Rngs,
  ) -> None:
    self.embed = nnx.Embed(vocab, width, dtype=dtype, rngs=rngs)
    self.rnn = nnx.RNN(cell(width, width, dtype=dtype, rngs=rngs), rngs=rngs)
    self.head = nnx.Linear(width, vocab, dtype=dtype, rngs=rngs)

  def __call__(self, tokens: Array) -> Array:
    return self.head(self.rnn(self.embed(tokens)))


class TimedConv(nnx.Module):
  """GroupNorm, swish, convolution, with the time added to every pixel."""

  def __init__(self, inputs: int, features: int, dtype: Dtype, rngs: nnx.Rngs) -> None:
    self.norm = nnx.GroupNorm(inputs, 2, dtype=dtype, rngs=rngs)
    self.conv = nnx.Conv(inputs, features, (3, 3), dtype=dtype, rngs=rngs)
    self.time = nnx.Linear(16, features, dtype=dtype, rngs=rngs)
    self.second_norm = nnx.GroupNorm(features, 2, dtype=dtype, rngs=rngs)
    self.second_conv = nnx.Conv(features, features, (3, 3), dtype=dtype, rngs=rngs)
    self.shortcut = nnx.Conv(inputs, features, (1, 1), dtype=dtype, rngs=rngs)

  def __call__(self, x: Array, time: Array) -> Array:
    y = self.conv(nnx.swish(self.norm(x))) + self.time(time)[:, None, None]
    return self.second_conv(nnx.swish(self.second_norm(y))) + self.shortcut(x)


class UNet(nnx.Module):
  """A denoiser with one level, a skip connection and a time embedding."""

  def __init__(self, *, width: int = 8, dtype: Dtype = None, rngs: nnx.Rngs) -> None:
    self.time_in = nnx.Linear(16, 16, dtype=dtype, rngs=rngs)
    self.time_out = nnx.Linear(16, 16, dtype=dtype, rngs=rngs)
    self.stem = nnx.Conv(3, width, (3, 3), dtype=dtype, rngs=rngs)
    self.before = TimedConv(width, width, dtype, rngs)
    self.down = nnx.Conv(width, 2 * width, (3, 3), 2, dtype=dtype, rngs=rngs)
    self.middle = TimedConv(2 * width, 2 * width, dtype, rngs)
    self.up = nnx.ConvTranspose(2 * width, width, (2, 2), 2, dtype=dtype, rngs=rngs)
    self.after = TimedConv(2 * width, width, dtype, rngs)
    self.norm = nnx.GroupNorm(width, 2, dtype=dtype, rngs=rngs)
    self.head = nnx.Conv(width, 3, (3, 3), dtype=dtype, rngs=rngs)

  def __call__(self, inputs: tuple[Array, Array]) -> Array:
    images, times = inputs
    time = self.time_out(nnx.swish(self.time_in(sinusoids(times, 16))))
    skip = self.before(self.stem(images), time)
    x = self.up(self.middle(self.down(skip), time))
    x = self.after(jnp.concatenate([x, skip], axis=-1), time)
    return self.head(nnx.swish(self.norm(x)))


class Experts(nnx.Module):
  """A mixture-of-experts layer: softmax router, the best two, dispatch by one_hot or sorting."""

  def __init__(self, width: int, ragged: bool, dtype: Dtype, rngs: nnx.Rngs) -> None:
    init = nnx.initializers.lecun_normal()
    self.experts, self.chosen, self.ragged, self.dtype = 4, 2, ragged, dtype
    self.router = nnx.Linear(width, self.experts, use_bias=False, dtype=dtype, rngs=rngs)
    self.up = nnx.Param(init(rngs.params(), (self.experts, width, 2 * width)))
    self.down = nnx.Param(init(rngs.params(), (self.experts, 2 * width, width)))

  def __call__(self, x: Array) -> Array:
    batch, length, width = x.shape
    tokens = x.reshape(batch * length, width)
    gates, chosen = jax.lax.top_k(nnx.softmax(self.router(tokens)), self.chosen)
    gates = gates / gates.sum(-1, keepdims=True)
    tokens, up, down = cast(self.dtype, tokens, self.up[...], self.down[...])
    dispatch = self.by_sorting if self.ragged else self.by_one_hot
    return dispatch(tokens, gates, chosen, up, down).reshape(x.shape)

  def by_one_hot(self, tokens, gates, chosen, up, down) -> Array:
    mask = nnx.one_hot(chosen, self.experts, dtype=tokens.dtype)
    inputs = jnp.einsum("tke,td->ketd", mask, tokens)
    hidden = nnx.relu(jnp.einsum("ketd,edf->ketf", inputs, up))
    outputs = jnp.einsum("ketf,efd->ketd", hidden, down)
    return jnp.einsum("ketd,tke,tk->td", outputs, mask, gates)

  def by_sorting(self, tokens, gates, chosen, up, down) -> Array:
    rows, order, sizes = grouped(tokens, chosen, self.experts)
    hidden = nnx.relu(jax.lax.ragged_dot(rows, up, sizes))
    outputs = jax.lax.ragged_dot(hidden, down, sizes)
    outputs = jnp.zeros_like(outputs).at[order].set(outputs)
    outputs = outputs.reshape(*chosen.shape, -1) * gates[..., None]
    return outputs.sum(1)


class MixtureOfExperts(nnx.Module):
  """A classifier of tokens around one mixture-of-experts layer."""

  def __init__(
    self,
    *,
    vocab: int = 31,
    width: int = 16,
    ragged: bool = False,
    dtype: Dtype = None,
    rngs: nnx.Rngs,
  ) -> None:
    self.embed = nnx.Embed(vocab, width, dtype=dtype, rngs=rngs)
    self.before = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    self.experts = Experts(width, ragged, dtype, rngs)
    self.after = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(width, vocab, dtype=dtype, rngs=rngs)

  def __call__(self, tokens: Array) -> Array:
    x = self.embed(tokens)
    x = x + self.experts(self.before(x))
    return self.head(self.after(x))
