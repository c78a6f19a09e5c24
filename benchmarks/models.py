"""The benchmarked models: plain Flax Linen that hands one `dtype` argument to every layer.

`dtype=None` is the model as people write it, in float32; `dtype=jnp.bfloat16` is the same model in
mixed precision by hand, which every figure of mpjax is compared with. `haiku_models.py` and
`torch_models.py` in `peers/` hold those that their tools run.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

import mpjax


class Block(nn.Module):
  """A pre-norm transformer block: [batch, length, width] -> the same shape.

  Attributes:
    heads: attention heads.
    causal: whether a place attends only to itself and what stands before it.
    dtype: the compute dtype of every layer; None for the parameters' own.
    wide_softmax: whether attention's softmax is float32, which `dtype` alone does not make it.
  """

  heads: int
  causal: bool = True
  dtype: DTypeLike | None = None
  wide_softmax: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds attention, then a perceptron four times as wide, to the stream."""
    width = x.shape[-1]
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2], jnp.int32)) if self.causal else None
    y = nn.LayerNorm(dtype=self.dtype)(x)
    attention = nn.MultiHeadDotProductAttention(
      self.heads, dtype=self.dtype, force_fp32_for_softmax=self.wide_softmax
    )
    x = x + attention(y, mask=mask)
    y = nn.LayerNorm(dtype=self.dtype)(x)
    y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(y))
    return x + nn.Dense(width, dtype=self.dtype)(y)


class Transformer(nn.Module):
  """A causal language model like GPT-2: i32[batch, length] -> logits[batch, length, vocabulary].

  The embedding is also the head, as there: 12 layers of 768 with GPT-2's vocabulary are its 124M.

  Attributes:
    layers: blocks.
    width: features of the stream.
    heads: attention heads of a block.
    vocabulary: tokens.
    dtype: the compute dtype of every layer; None for the parameters' own.
    wide_softmax: as in `Block`.
  """

  layers: int = 12
  width: int = 768
  heads: int = 12
  vocabulary: int = 50257
  dtype: DTypeLike | None = None
  wide_softmax: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
    positions = jnp.arange(tokens.shape[1])
    x = embed(tokens)
    x = x + nn.Embed(tokens.shape[1], self.width, dtype=self.dtype)(positions)
    for _ in range(self.layers):
      x = Block(self.heads, dtype=self.dtype, wide_softmax=self.wide_softmax)(x)
    return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


class LlamaBlock(nn.Module):
  """A block of Llama (Touvron et al., 2023): [batch, length, width] -> the same shape.

  RMSNorm, rotary positions, several query heads to one of keys and values, a gated perceptron.

  Attributes:
    heads: query heads.
    groups: heads of keys and values.
    hidden: features of the perceptron.
    kernel: the `implementation` of `jax.nn.dot_product_attention`, a kernel that takes 16-bit
      operands; "jax" for that function as anybody calls it; None for attention that is spelled out
      in einsums, "stray" for that with a stray float32 number in it.
    dtype: the compute dtype of every layer; None for the parameters' own.
    wide_softmax: whether the softmax of attention that is spelled out is float32.
  """

  heads: int
  groups: int
  hidden: int
  kernel: Any = None
  dtype: DTypeLike | None = None
  wide_softmax: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds attention, then the perceptron, to the stream."""
    width = x.shape[-1]

    def dense(features: int | tuple[int, int], axis: Any = -1) -> nn.Module:
      return nn.DenseGeneral(features, axis, use_bias=False, dtype=self.dtype)

    y = nn.RMSNorm(dtype=self.dtype)(x)
    query = rotated(dense((self.heads, width // self.heads))(y))
    key, value = (dense((self.groups, width // self.heads))(y) for _ in range(2))
    attend = _ATTENTION.get(self.kernel) or mpjax.cast_inputs(self._fused)
    if self.wide_softmax and self.kernel is None:
      attend = functools.partial(spelled_out, wide_softmax=True)
    x = x + dense(width, (-2, -1))(attend(query, rotated(key), value))
    y = nn.RMSNorm(dtype=self.dtype)(x)
    return x + dense(width)(nn.silu(dense(self.hidden)(y)) * dense(self.hidden)(y))

  def _fused(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(
      query, key, value, is_causal=True, implementation=self.kernel
    )


def rotated(x: jax.Array) -> jax.Array:
  """Rotary positions (Su et al., 2021) in float32: [batch, length, heads, features]."""
  half = x.shape[-1] // 2
  rate = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * rate
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return turned.astype(x.dtype)


def spelled_out(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scale: float | None = None,
  wide_softmax: bool = False,
) -> jax.Array:
  """Causal attention of grouped heads by two einsums and a softmax in the operands' dtype."""
  batch, length, heads, features = query.shape
  factor = features**-0.5 if scale is None else scale
  query = query.reshape(batch, length, key.shape[2], -1, features) * factor
  scores = jnp.einsum("bqgrd,bkgd->bgrqk", query, key)
  seen = jnp.tril(jnp.ones((length, length), bool))
  scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
  weights = jax.nn.softmax(scores.astype(jnp.float32) if wide_softmax else scores)
  mixed = jnp.einsum("bgrqk,bkgd->bqgrd", weights.astype(scores.dtype), value)
  return mixed.reshape(batch, length, heads, features)


def stray(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`spelled_out` with NumPy's root, which JAX takes for a float32 array: it widens the matmuls."""
  return spelled_out(query, key, value, 1 / np.sqrt(query.shape[-1]))


_ATTENTION = {
  None: spelled_out,
  "stray": stray,
  "jax": functools.partial(jax.nn.dot_product_attention, is_causal=True),
}


class Llama(nn.Module):
  """A causal language model like Llama: i32[batch, length] -> logits[batch, length, vocabulary].

  Attributes:
    layers: blocks.
    width: features of the stream.
    heads: as in `LlamaBlock`.
    groups: as in `LlamaBlock`.
    hidden: as in `LlamaBlock`.
    vocabulary: tokens.
    kernel: as in `LlamaBlock`.
    remat: whether the backward pass computes every block again; or what it does not compute again,
      by its name in `jax.checkpoint_policies`.
    scanned: whether the blocks are one, scanned over its stacked parameters.
    dtype: the compute dtype of every layer; None for the parameters' own.
    wide_softmax: as in `LlamaBlock`.
  """

  layers: int = 12
  width: int = 1024
  heads: int = 16
  groups: int = 4
  hidden: int = 2816
  vocabulary: int = 32000
  kernel: Any = None
  remat: bool | str = False
  scanned: bool = False
  dtype: DTypeLike | None = None
  wide_softmax: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
    saved = getattr(jax.checkpoint_policies, self.remat) if isinstance(self.remat, str) else None
    kind = nn.remat(LlamaBlock, policy=saved) if self.remat else LlamaBlock
    sizes = self.heads, self.groups, self.hidden
    block = functools.partial(kind, *sizes, self.kernel, self.dtype, self.wide_softmax)
    if self.scanned:
      scan = nn.scan(
        lambda one, x, _: (one(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.layers,
      )
      x, _ = scan(block(), x, None)
    for _ in range(0 if self.scanned else self.layers):
      x = block()(x)
    x = nn.RMSNorm(dtype=self.dtype)(x)
    return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)(x)


class Experts(nn.Module):
  """A transformer block whose tokens go to two of several perceptrons: the shape is kept.

  Every perceptron computes every token, and a router's softmax, in float32 as routers are written,
  weighs the two that it likes best (Shazeer et al., 2017).

  Attributes:
    heads: attention heads.
    experts: perceptrons.
    hidden: features of each.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  heads: int
  experts: int
  hidden: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds attention, then the chosen perceptrons, to the stream."""
    width = x.shape[-1]
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2], jnp.int32))
    y = nn.LayerNorm(dtype=self.dtype)(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, mask=mask)
    y = nn.LayerNorm(dtype=self.dtype)(x)
    chance = jax.nn.softmax(nn.Dense(self.experts, use_bias=False)(y.astype(jnp.float32)))
    least = jax.lax.top_k(chance, 2)[0][..., -1:]
    weight = jnp.where(chance >= least, chance, 0.0)
    weight = weight / weight.sum(-1, keepdims=True)
    init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
    into = self.param("into", init, (self.experts, width, self.hidden))
    out = self.param("out", init, (self.experts, self.hidden, width))
    y, into, out = promote_dtype(y, into, out, dtype=self.dtype)
    y = nn.gelu(jnp.einsum("bld,edh->bleh", y, into))
    return x + jnp.einsum("bleh,ehd,ble->bld", y, out, weight.astype(y.dtype))


class MixtureOfExperts(nn.Module):
  """A causal language model of experts: i32[batch, length] -> logits[batch, length, vocabulary].

  Attributes:
    layers: blocks.
    width: features of the stream.
    heads: as in `Experts`.
    experts: as in `Experts`.
    hidden: as in `Experts`.
    vocabulary: tokens.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  layers: int = 4
  width: int = 512
  heads: int = 8
  experts: int = 8
  hidden: int = 1024
  vocabulary: int = 8192
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
    for _ in range(self.layers):
      x = Experts(self.heads, self.experts, self.hidden, self.dtype)(x)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)(x)


class Residual(nn.Module):
  """Two convolutions behind GroupNorm and swish, and a shortcut: [batch, height, width, channels].

  Attributes:
    features: channels that come out.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  features: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds the convolutions to the (projected) input."""
    y = x
    for _ in range(2):
      y = nn.silu(nn.GroupNorm(dtype=self.dtype)(y))
      y = nn.Conv(self.features, (3, 3), dtype=self.dtype)(y)
    if x.shape != y.shape:
      x = nn.Conv(self.features, (1, 1), dtype=self.dtype)(x)
    return x + y


class UNet(nn.Module):
  """A U-Net of a diffusion model (Ho et al., 2020): [batch, height, width, 3] -> the same shape.

  Attributes:
    widths: channels of each level; a level halves the picture.
    blocks: residual blocks of a level, each way.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  widths: tuple[int, ...] = (64, 128, 256)
  blocks: int = 2
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps noisy pictures to their noise."""
    x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype)(images)
    before = []
    for width in self.widths:
      for _ in range(self.blocks):
        x = Residual(width, self.dtype)(x)
      before.append(x)
      x = nn.Conv(width, (3, 3), (2, 2), dtype=self.dtype)(x)
    for width in reversed(self.widths):
      x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
      x = jnp.concatenate([x, before.pop()], -1)
      for _ in range(self.blocks):
        x = Residual(width, self.dtype)(x)
    x = nn.silu(nn.GroupNorm(dtype=self.dtype)(x))
    return nn.Conv(images.shape[-1], (3, 3), dtype=self.dtype)(x)


class VisionTransformer(nn.Module):
  """ViT (Dosovitskiy et al., 2021): [batch, height, width, 3] -> logits[batch, classes].

  Attributes:
    layers: blocks.
    width: features of the stream.
    heads: attention heads of a block.
    patch: the side of a patch, in pixels.
    classes: the number of classes.
    dtype: the compute dtype of every layer; None for the parameters' own.
    wide_softmax: as in `Block`.
  """

  layers: int = 12
  width: int = 768
  heads: int = 12
  patch: int = 16
  classes: int = 1000
  dtype: DTypeLike | None = None
  wide_softmax: bool = False

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps pictures to the logits of their classes."""
    side = (self.patch, self.patch)
    x = nn.Conv(self.width, side, side, dtype=self.dtype)(images)
    x = x.reshape(x.shape[0], -1, self.width)
    token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
    token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
    x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
    place = self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
    x = x + place.astype(x.dtype)
    for _ in range(self.layers):
      x = Block(self.heads, False, self.dtype, self.wide_softmax)(x)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return nn.Dense(self.classes, dtype=self.dtype)(x[:, 0])


class Bottleneck(nn.Module):
  """A bottleneck block with BatchNorm and a shortcut: [batch, height, width, channels].

  Attributes:
    features: channels of the 3x3 convolution; four times as many come out.
    stride: of the 3x3 convolution and the shortcut.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  features: int
  stride: int = 1
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds the three convolutions to the (projected) input."""
    y = nn.relu(self._normed(x, self.features, 1, 1))
    y = nn.relu(self._normed(y, self.features, 3, self.stride))
    y = self._normed(y, 4 * self.features, 1, 1)
    if x.shape != y.shape:
      x = self._normed(x, 4 * self.features, 1, self.stride)
    return nn.relu(x + y)

  def _normed(self, x: jax.Array, features: int, side: int, stride: int) -> jax.Array:
    x = nn.Conv(features, (side, side), (stride, stride), use_bias=False, dtype=self.dtype)(x)
    return nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)


class ResNet(nn.Module):
  """ResNet-50 in training mode: [batch, height, width, 3] -> logits[batch, classes].

  Attributes:
    stages: blocks of each stage; a stage doubles the channels and halves the picture.
    width: channels after the first convolution.
    classes: the number of classes.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  stages: tuple[int, ...] = (3, 4, 6, 3)
  width: int = 64
  classes: int = 1000
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps pictures to the logits of their classes; updates `batch_stats`."""
    x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, dtype=self.dtype)(images)
    x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
    x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
    for stage, blocks in enumerate(self.stages):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        x = Bottleneck(self.width * 2**stage, stride, dtype=self.dtype)(x)
    return nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


class RecurrentModel(nn.Module):
  """An LSTM language model: i32[batch, length] -> logits[batch, length, vocabulary].

  Attributes:
    layers: LSTM layers.
    width: features of embedding and cells.
    vocabulary: tokens.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  layers: int = 2
  width: int = 1024
  vocabulary: int = 10000
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    x: Any = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
    for _ in range(self.layers):
      x = nn.RNN(nn.OptimizedLSTMCell(self.width, dtype=self.dtype))(x)
    return nn.Dense(self.vocabulary, dtype=self.dtype)(x)


class Perceptron(nn.Module):
  """Dense layers with sigmoids between them, whose gradients vanish with depth.

  Attributes:
    layers: hidden layers.
    width: features of each.
    classes: the number of classes.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  layers: int = 4
  width: int = 64
  classes: int = 10
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [batch, features] to the logits of each row's class."""
    for _ in range(self.layers):
      x = nn.sigmoid(nn.Dense(self.width, dtype=self.dtype)(x))
    return nn.Dense(self.classes, dtype=self.dtype)(x)


class Parameters(nn.Module):
  """Nothing but parameters, each times an input: [leaves, size] -> f32[].

  Its gradient is its input, so a train step of it is the optimizer's.

  Attributes:
    dtype: the compute dtype; None for the parameters' own.
  """

  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Sums the products of parameters and inputs."""
    leaves = range(x.shape[0])
    weights = [self.param(f"w{i}", nn.initializers.ones, x.shape[1:]) for i in leaves]
    return sum((jnp.vdot(w, x[i]) for i, w in enumerate(weights)), start=jnp.zeros(()))
