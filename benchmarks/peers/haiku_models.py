"""The models of `models.py` in Haiku, for its policies, which apply to Haiku's modules alone."""

import haiku as hk  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp


def _norm() -> hk.LayerNorm:
  return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, eps=1e-6)


def _attend(x: jax.Array, heads: int, causal: bool) -> jax.Array:
  length, width = x.shape[1:]
  attention = hk.MultiHeadAttention(
    heads, width // heads, w_init=hk.initializers.VarianceScaling(), model_size=width
  )
  mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if causal else None
  return attention(x, x, x, mask=mask)


def _block(x: jax.Array, heads: int, causal: bool = True) -> jax.Array:
  width = x.shape[-1]
  x = x + _attend(_norm()(x), heads, causal)
  y = jax.nn.gelu(hk.Linear(4 * width)(_norm()(x)))
  return x + hk.Linear(width)(y)


def _table(name: str, rows: int, width: int) -> jax.Array:
  return hk.get_parameter(name, (rows, width), init=hk.initializers.RandomNormal(width**-0.5))


class Transformer(hk.Module):
  """As `benchmarks.models.Transformer`."""

  def __init__(
    self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257
  ) -> None:
    super().__init__(name="transformer")
    self.layers, self.width, self.heads, self.vocabulary = layers, width, heads, vocabulary

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    embedding = _table("embedding", self.vocabulary, self.width)
    x = jnp.take(embedding, tokens, axis=0)
    x = x + _table("position", tokens.shape[1], self.width)
    for _ in range(self.layers):
      x = _block(x, self.heads)
    return _norm()(x) @ embedding.T


class VisionTransformer(hk.Module):
  """As `benchmarks.models.VisionTransformer`."""

  def __init__(
    self,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    patch: int = 16,
    classes: int = 1000,
  ) -> None:
    super().__init__(name="vision_transformer")
    self.layers, self.width, self.heads = layers, width, heads
    self.patch, self.classes = patch, classes

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps pictures to the logits of their classes."""
    x = hk.Conv2D(self.width, self.patch, self.patch)(images)
    x = x.reshape(x.shape[0], -1, self.width)
    token = hk.get_parameter("token", (1, 1, self.width), init=jnp.zeros)
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
    x = x + _table("position", x.shape[1], self.width)
    for _ in range(self.layers):
      x = _block(x, self.heads, causal=False)
    return hk.Linear(self.classes)(_norm()(x)[:, 0])


def _normed(x: jax.Array, features: int, side: int, stride: int) -> jax.Array:
  x = hk.Conv2D(features, side, stride, with_bias=False)(x)
  return hk.BatchNorm(True, True, decay_rate=0.99)(x, is_training=True)


def _bottleneck(x: jax.Array, features: int, stride: int) -> jax.Array:
  y = jax.nn.relu(_normed(x, features, 1, 1))
  y = jax.nn.relu(_normed(y, features, 3, stride))
  y = _normed(y, 4 * features, 1, 1)
  if x.shape != y.shape:
    x = _normed(x, 4 * features, 1, stride)
  return jax.nn.relu(x + y)


class ResNet(hk.Module):
  """As `benchmarks.models.ResNet`."""

  def __init__(
    self, stages: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
  ) -> None:
    super().__init__(name="resnet")
    self.stages, self.width, self.classes = stages, width, classes

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps pictures to the logits of their classes; updates Haiku's state."""
    x = jax.nn.relu(_normed(images, self.width, 7, 2))
    x = hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for stage, blocks in enumerate(self.stages):
      for block in range(blocks):
        x = _bottleneck(x, self.width * 2**stage, 2 if stage > 0 and block == 0 else 1)
    return hk.Linear(self.classes)(jnp.mean(x, axis=(1, 2)))


class RecurrentModel(hk.Module):
  """As `benchmarks.models.RecurrentModel`."""

  def __init__(self, layers: int = 2, width: int = 1024, vocabulary: int = 10000) -> None:
    super().__init__(name="recurrent_model")
    self.layers, self.width, self.vocabulary = layers, width, vocabulary

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens to the logits of each next token."""
    x = jnp.take(_table("embedding", self.vocabulary, self.width), tokens, axis=0)
    for _ in range(self.layers):
      cell = hk.LSTM(self.width)
      x, _ = hk.dynamic_unroll(cell, x, cell.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(self.vocabulary)(x)


class Lookup(hk.Module):
  """As `benchmarks.workloads.Lookup`."""

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up tokens in a table of one feature."""
    return jnp.take(_table("embedding", 2, 1), tokens, axis=0)


class Shared(hk.Module):
  """As `benchmarks.workloads.Shared`."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies one layer to every place in turn."""
    layer = hk.Linear(1, with_bias=False)
    return hk.scan(lambda carry, place: (carry, layer(place)), None, x)[1]


class Tabled(hk.Module):
  """As `benchmarks.workloads.Tabled`."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Multiplies by a float32 table, then by a matrix."""
    return hk.Linear(4)(x * jnp.linspace(0, 1, x.shape[-1], dtype=jnp.float32))


class Parameters(hk.Module):
  """As `benchmarks.models.Parameters`."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Sums the products of parameters and inputs."""
    names = [f"w{i}" for i in range(x.shape[0])]
    weights = [hk.get_parameter(name, x.shape[1:], init=jnp.ones) for name in names]
    return sum((jnp.vdot(w, x[i]) for i, w in enumerate(weights)), start=jnp.zeros(()))
