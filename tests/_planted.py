"""Models with one fault each, for tests that must find it: in Linen, in NNX and as functions.

The line of a fault carries a comment ``planted: NAME``; `line_of` reads its number from this file.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

WIDTH, HEADS, DEPTH = 8, 4, 12
LAYER, HEAD = 7, 2
TABLE = np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)[None]


def line_of(name):
  """The number of the line that carries a fault."""
  lines = Path(__file__).read_text().splitlines()
  (found,) = [n for n, text in enumerate(lines, 1) if text.endswith(f"# planted: {name}")]
  return found


def at(line, name):
  """Whether a report's line is that of a fault."""
  return line.file == __file__ and line.line == line_of(name)


# A stray np.float32 table, and a parameter that is cast to float32 --------------------------------


def stray(params, x):
  with jax.named_scope("hidden"):
    h = jnp.tanh(x @ params["a"]) * TABLE  # planted: stray function
  with jax.named_scope("head"):
    return h @ params["b"]


class LinenHidden(nn.Module):
  stray: bool = True

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(WIDTH)(x)
    return h * TABLE if self.stray else h  # planted: stray linen


class LinenStray(nn.Module):
  stray: bool = True

  @nn.compact
  def __call__(self, x):
    h = LinenHidden(self.stray, name="hidden")(x)
    return nn.Dense(WIDTH, name="head")(h)


class NNXHidden(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return self.dense(x) * TABLE  # planted: stray nnx


class NNXStray(nnx.Module):
  def __init__(self, rngs):
    self.hidden = NNXHidden(rngs)
    self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return self.head(self.hidden(x))


def cast_param(params, x):
  return jnp.tanh(x @ params["a"].astype(jnp.float32)) @ params["b"].astype(jnp.float32)


class LinenCastParam(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (WIDTH, WIDTH))
    return nn.Dense(WIDTH, name="head")(x @ kernel.astype(jnp.float32))


class NNXCastParam(nnx.Module):
  def __init__(self, rngs):
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
    self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return self.head(x @ self.kernel[...].astype(jnp.float32))


# Twelve layers of attention; one head of the seventh overflows float16 ----------------------------


def attend(q, k, v):
  split = lambda a: a.reshape(*a.shape[:-1], HEADS, -1)
  scores = jnp.einsum("...qhd,...khd->...hqk", split(q), split(k))  # planted: overflow
  return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), split(v)).reshape(q.shape)


class LinenAttention(nn.Module):
  @nn.compact
  def __call__(self, x):
    return attend(*(nn.Dense(WIDTH, use_bias=False, name=name)(x) for name in "qkv"))


class LinenLayers(nn.Module):
  @nn.compact
  def __call__(self, x):
    for n in range(DEPTH):
      x = x + LinenAttention(name=f"layer_{n}")(x)
    return x


class NNXAttention(nnx.Module):
  def __init__(self, rngs):
    self.q, self.k, self.v = (nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(3))

  def __call__(self, x):
    return attend(self.q(x), self.k(x), self.v(x))


class NNXLayers(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([NNXAttention(rngs) for _ in range(DEPTH)])

  def __call__(self, x):
    for layer in self.layers:
      x = x + layer(x)
    return x


def layers(params, x):
  for n, layer in enumerate(params):
    with jax.named_scope(f"layer_{n}"):
      x = x + attend(*(x @ layer[name] for name in "qkv"))
  return x


def layer_params(key):
  """Parameters for `layers`: queries and keys of one head so large that their product overflows."""
  draw = jax.random.normal(key, (DEPTH, 3, WIDTH, WIDTH)) / WIDTH
  return [planted_head(n, dict(zip("qkv", draw[n], strict=True))) for n in range(DEPTH)]


def planted_head(n, layer):
  """A layer's kernels, those of one head in the one layer made large."""
  size = WIDTH // HEADS
  own = jnp.arange(WIDTH) // size == HEAD
  if n != LAYER:
    return layer
  large = jnp.where(own, 2000.0, 1.0)[None]
  return layer | {name: layer[name] * large for name in "qk"}


def linen_layer_variables(key):
  params = layer_params(key)
  return {
    "params": {
      f"layer_{n}": {name: {"kernel": kernel} for name, kernel in layer.items()}
      for n, layer in enumerate(params)
    }
  }


def nnx_layers(key):
  model = NNXLayers(nnx.Rngs(0))
  for layer, kernels in zip(model.layers, layer_params(key), strict=True):
    for name, kernel in kernels.items():
      getattr(layer, name).kernel[...] = kernel
  return model


# A branch that underflows float16 ---------------------------------------------------------------


def small_product(a, b):
  return a * b * b  # planted: underflow


class LinenBranch(nn.Module):
  @nn.compact
  def __call__(self, x):
    init, x = nn.initializers.constant(1e-4), 1 + jnp.abs(x)
    a, b = (nn.Dense(WIDTH, use_bias=False, kernel_init=init, name=n)(x) for n in "ab")
    return small_product(a, b)


class LinenUnderflow(nn.Module):
  @nn.compact
  def __call__(self, x):
    large = nn.Dense(WIDTH, name="large")(x)
    return large * LinenBranch(name="small")(large)


class NNXBranch(nnx.Module):
  def __init__(self, rngs):
    init = nnx.initializers.constant(1e-4)
    self.a, self.b = (
      nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=init, rngs=rngs) for _ in range(2)
    )

  def __call__(self, x):
    x = 1 + jnp.abs(x)
    return small_product(self.a(x), self.b(x))


class NNXUnderflow(nnx.Module):
  def __init__(self, rngs):
    self.large, self.small = nnx.Linear(WIDTH, WIDTH, rngs=rngs), NNXBranch(rngs)

  def __call__(self, x):
    large = self.large(x)
    return large * self.small(large)


def underflow(params, x):
  with jax.named_scope("large"):
    large = x @ params["large"]
  with jax.named_scope("small"):
    positive = 1 + jnp.abs(large)
    product = small_product(positive @ params["a"], positive @ params["b"])
  return large * product


# Faults of the program itself ---------------------------------------------------------------------


def scanned(params, xs):
  def cell(carry, x):
    with jax.named_scope("cell"):
      carry = jnp.tanh(carry @ params["w"] + jnp.log(x))  # planted: scan
    return carry, carry.sum()

  return jax.lax.scan(cell, jnp.zeros((1, WIDTH)), xs)


def bad_inputs():
  """Inputs of twenty steps, all positive but those of step 13."""
  return jnp.ones((20, 1, WIDTH)).at[13, 0, 3].set(-1.0)


class LinenCell(nn.Module):
  @nn.compact
  def __call__(self, carry, x):
    carry = jnp.tanh(nn.Dense(WIDTH)(carry) + jnp.log(x))  # planted: scan linen
    return carry, carry.sum()


class LinenScanned(nn.Module):
  @nn.compact
  def __call__(self, xs):
    cell = nn.scan(LinenCell, variable_broadcast="params", split_rngs={"params": False})
    return cell(name="cell")(jnp.zeros((1, WIDTH)), xs)


class NNXScanned(nnx.Module):
  def __init__(self, rngs):
    self.cell = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, xs):
    def step(cell, carry, x):
      carry = jnp.tanh(cell(carry) + jnp.log(x))  # planted: scan nnx
      return carry, carry.sum()

    over = nnx.scan(step, in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return over(self.cell, jnp.zeros((1, WIDTH)), xs)


@jax.custom_vjp
def norm(x):
  return jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def _norm_forward(x):
  return norm(x), (x, norm(x))


def _norm_backward(residuals, g):
  x, n = residuals
  return (g * x / n,)  # planted: custom_vjp


norm.defvjp(_norm_forward, _norm_backward)


def normed(params, x):
  with jax.named_scope("norm"):
    return jnp.sum(norm(x @ params["w"]))  # planted: call function


class LinenNorm(nn.Module):
  @nn.compact
  def __call__(self, x):
    return norm(x)  # planted: call linen


class LinenNormed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return LinenNorm(name="norm")(nn.Dense(WIDTH, name="dense")(x)).sum()


class NNXNorm(nnx.Module):
  def __call__(self, x):
    return norm(x)  # planted: call nnx


class NNXNormed(nnx.Module):
  def __init__(self, rngs):
    self.dense, self.norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), NNXNorm()

  def __call__(self, x):
    return self.norm(self.dense(x)).sum()
