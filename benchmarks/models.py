"""The benchmarked models: plain Flax Linen that hands one `dtype` argument to every layer.

`dtype=None` is the model as people write it, in float32; `dtype=jnp.bfloat16` is the same model in
mixed precision by hand, which every figure of mpjax is compared with.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Block(nn.Module):
  """A pre-norm transformer block: [batch, length, width] -> the same shape.

  Attributes:
    heads: attention heads.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  heads: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds causal attention, then a perceptron four times as wide, to the stream."""
    width = x.shape[-1]
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2], jnp.int32))
    y = nn.LayerNorm(dtype=self.dtype)(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, mask=mask)
    y = nn.LayerNorm(dtype=self.dtype)(x)
    y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(y))
    return x + nn.Dense(width, dtype=self.dtype)(y)


class Transformer(nn.Module):
  """A causal language model: i32[batch, length] -> logits[batch, length, vocabulary].

  Attributes:
    layers: blocks.
    width: features of the stream.
    heads: attention heads of a block.
    vocabulary: tokens.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  layers: int = 4
  width: int = 768
  heads: int = 12
  vocabulary: int = 8192
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    positions = jnp.arange(tokens.shape[1])
    x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
    x = x + nn.Embed(tokens.shape[1], self.width, dtype=self.dtype)(positions)
    for _ in range(self.layers):
      x = Block(self.heads, dtype=self.dtype)(x)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return nn.Dense(self.vocabulary, dtype=self.dtype)(x)


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions with BatchNorm and a shortcut: [batch, height, width, channels].

  Attributes:
    features: channels that come out.
    stride: of the first convolution and the shortcut.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  features: int
  stride: int = 1
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds the two convolutions to the (projected) input."""
    strides = (self.stride, self.stride)
    y = nn.Conv(self.features, (3, 3), strides, use_bias=False, dtype=self.dtype)(x)
    y = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(y))
    y = nn.Conv(self.features, (3, 3), use_bias=False, dtype=self.dtype)(y)
    y = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(y)
    if x.shape != y.shape:
      x = nn.Conv(self.features, (1, 1), strides, use_bias=False, dtype=self.dtype)(x)
      x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-18 in training mode: [batch, height, width, 3] -> logits[batch, classes].

  Attributes:
    stages: residual blocks of each stage; a stage doubles the channels and halves the picture.
    classes: the number of classes.
    dtype: the compute dtype of every layer; None for the parameters' own.
  """

  stages: tuple[int, ...] = (2, 2, 2, 2)
  classes: int = 1000
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps pictures to the logits of their classes; updates `batch_stats`."""
    x = nn.Conv(64, (7, 7), (2, 2), use_bias=False, dtype=self.dtype)(images)
    x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
    x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
    for stage, blocks in enumerate(self.stages):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        x = ResidualBlock(64 * 2**stage, stride, dtype=self.dtype)(x)
    return nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))
