"""Matmuls of float8 operands, each with a scale that is computed where it is used.

What goes forward is e4m3 and what is a derivative e5m2. ``x:bf16[8,4] @ w:f32[4,2]`` becomes

    s:f32[] = the power of two that brings the largest of x just below 448     (and t for w)
    q:f8_e4m3fn[8,4] = x / s
    y:bf16[8,2] = dot_general q r                (r the weight's; one float8 call on an H100)
    z:bf16[8,2] = y * s * t

No state is held from step to step, so a checkpoint has none, a tensor whose range jumps does not
overflow, and what is mapped or sharded has the scale of what it is. Formats and scales as in
Micikevicius et al., *FP8 formats for deep learning* (arXiv:2209.05433), section 3.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.program.new_primitive import new_primitive
from mpjax._engine.running.attached_derivatives import constant, with_derivative
from mpjax._engine.running.environment import to_dtype
from mpjax._engine.running.float32_products import Matmul, fixed
from mpjax._engine.running.matmul_derivatives import Contraction

FORWARD = np.dtype(jnp.float8_e4m3fn)
"""Three bits of mantissa: what a model computes has known ranges."""
BACKWARD = np.dtype(jnp.float8_e5m2)
"""Two bits, and a range of 2**32: cotangents have outliers."""

_SMALLEST = 2.0**-100
"""Below this no scale follows, so that it and its inverse are normal numbers in 16 bits, too."""


class Scaled(NamedTuple):
  """An array as ``values * scale``.

  Attributes:
    values: In a float8 format.
    scale: float32 powers of two, of the same rank: of size one along each dimension that shares it.
  """

  values: jax.Array
  scale: jax.Array


def scaled(x: jax.Array, dtype: np.dtype, apart: Sequence[int] = ()) -> Scaled:
  """Rounds an array to a float8 format under the scale of its largest finite magnitude.

  What is not finite stays so and does not touch the scale. Zero has a scale, too.

  Args:
    x: The array, float32 or 16 bits.
    dtype: The format.
    apart: The dimensions along which each has a scale of its own.
  """
  shared = tuple(dim for dim in range(x.ndim) if dim not in apart)
  magnitudes = lax.select(lax.is_finite(x), lax.abs(x), jnp.zeros_like(x))
  largest = to_dtype(jnp.max(magnitudes, axis=shared, keepdims=True, initial=0), FLOAT32)
  scale = _scale(jnp.maximum(largest, jnp.float32(_SMALLEST)), dtype)
  return Scaled(to_dtype(x * to_dtype(lax.reciprocal(scale), x.dtype), dtype), scale)


def _scale(largest: jax.Array, dtype: np.dtype) -> jax.Array:
  """The smallest power of two by which numbers up to ``largest`` must be divided to fit."""
  bits = lax.bitcast_convert_type(largest, jnp.uint32)
  power = lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), FLOAT32)
  top = float(jnp.finfo(dtype).max)  # 1.75 times a power of two in both formats
  binade = 2.0 ** math.floor(math.log2(top))
  fits = largest <= power * jnp.float32(top / binade)
  scale = power * jnp.float32(1 / binade)
  return lax.select(fits, scale, scale * 2)


class Product(NamedTuple):
  """A bilinear function of an operand and a stored one, by names of their dimensions.

  Attributes:
    operand: The names of the first's.
    stored: Those of the second's.
    result: Those of the result. What only the two operands have is summed over.
    dtype: The dtype of the result.
    narrow: The 16-bit format of derivatives of the derivative.
    examples: Those along which `jax.vmap` runs: an example has a scale of its own.
  """

  operand: tuple[int, ...]
  stored: tuple[int, ...]
  result: tuple[int, ...]
  dtype: np.dtype
  narrow: np.dtype
  examples: tuple[int, ...] = ()

  @classmethod
  def of(cls, contraction: Contraction, ranks: Sequence[int], operand: int) -> Product:
    """The matmul as a function of its left operand (0) or its right one (1).

    Args:
      contraction: The matmul, without batch dimensions.
      ranks: Of its left and its right operand.
      operand: Which of the two is the operand; the other one is stored.
    """
    sides = [[*range(ranks[0])], [*range(ranks[0], sum(ranks))]]
    for left, right in zip(*contraction.contracted, strict=True):
      sides[1][right] = sides[0][left]
    summed = {sides[0][dim] for dim in contraction.contracted[0]}
    result = tuple(name for side in sides for name in side if name not in summed)
    first, second = map(tuple, (sides[operand], sides[1 - operand]))
    return cls(first, second, result, contraction.dtype, contraction.dtype)

  def run(self, operand: jax.Array, stored: jax.Array) -> jax.Array:
    """The product, in 8 or 16 bits as its operands are."""
    both = [name for name in self.operand if name in self.stored]
    batch = [name for name in both if name in self.result]
    summed = [name for name in both if name not in self.result]
    dims: Any = tuple(
      tuple([names.index(name) for name in part] for names in (self.operand, self.stored))
      for part in (summed, batch)
    )
    found = lax.dot_general(fixed(operand), fixed(stored), dims, preferred_element_type=self.dtype)
    free = [name for names in (self.operand, self.stored) for name in names if name not in both]
    order = [*batch, *free]
    return jnp.transpose(fixed(found), [order.index(name) for name in self.result])

  def run_scaled(self, operand: Scaled, stored: Scaled) -> jax.Array:
    """The product of two that have scales; those of summed examples are in the operand already."""
    found = self.run(operand.values, stored.values)
    for names, scale in ((self.operand, operand.scale), (self.stored, stored.scale)):
      found *= to_dtype(_along(scale, names, self.result), self.dtype)
    return found

  def round_and_run(self, operand: jax.Array, stored: Scaled) -> jax.Array:
    """The product of a derivative, which is rounded to e5m2, and a stored operand."""
    apart = [n for n, name in enumerate(self.operand) if self._is_apart(name)]
    if any(name in self.stored and not self._is_apart(name) for name in self.examples):
      # Examples are summed over: their scales go in first, and then they share one.
      operand *= to_dtype(_along(stored.scale, self.stored, self.operand), operand.dtype)
      stored = stored._replace(scale=jnp.ones((1,) * len(self.stored), FLOAT32))
    return self.run_scaled(scaled(operand, BACKWARD, apart), stored)

  def _is_apart(self, name: int) -> bool:
    return name in self.examples and name in self.result

  @property
  def sums_examples(self) -> bool:
    """Whether a scale of the stored operand is part of what is summed."""
    return any(name not in self.result for name in self.examples)

  def transposed(self, dtype: np.dtype) -> Product:
    """The function from the cotangent of the result to that of the operand, of this dtype."""
    return Product(self.result, self.stored, self.operand, dtype, self.narrow, self.examples)

  def batched(self, operand: bool, stored: bool) -> Product:
    """The same for examples along one more dimension, ahead of one or both, and of the result."""
    name = max((*self.operand, *self.stored, *self.examples), default=0) + 1
    first, second = (
      (name, *names) if ahead else names
      for names, ahead in ((self.operand, operand), (self.stored, stored))
    )
    result, examples = (name, *self.result), (name, *self.examples)
    return Product(first, second, result, self.dtype, self.narrow, examples)


def _along(scale: jax.Array, names: Sequence[int], others: Sequence[int]) -> jax.Array:
  """A scale with dimensions of these names as one that broadcasts to an array with others."""
  kept = [name for name in others if name in names]
  left_out = tuple(n for n, name in enumerate(names) if name not in kept)
  rest = [name for name in names if name in kept]
  turned = jnp.transpose(lax.squeeze(scale, left_out), [rest.index(name) for name in kept])
  return jnp.expand_dims(turned, [n for n, name in enumerate(others) if name not in kept])


@functools.lru_cache(maxsize=1024)
def in_float8(contraction: Contraction, backward: bool = False) -> Matmul:
  """The matmul of a parameter, the wide operand, and another in float8.

  The cotangent of a float32 parameter does not round; one that its author cast has its format.

  What is stored for the backward pass are the two operands in float8. Second derivatives multiply
  in 16 bits.

  Args:
    contraction: The matmul in 16 bits.
    backward: Whether the other operand is a cotangent.
  """
  formats = [BACKWARD if backward and n != contraction.wide else FORWARD for n in (0, 1)]

  def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    product = Product.of(contraction, (left.ndim, right.ndim), 0)
    return product.run_scaled(scaled(left, formats[0]), scaled(right, formats[1]))

  def along(tangent: jax.Array, stored: jax.Array, operand: int) -> jax.Array:
    ranks = (tangent.ndim, stored.ndim) if operand == 0 else (stored.ndim, tangent.ndim)
    values = scaled(constant(stored), formats[1 - operand])
    product = Product.of(contraction, ranks, operand)
    return _tangent_p.bind(tangent, *values, stored, product=product)

  run = with_derivative(
    multiply,
    lambda tangent, right: along(tangent, right, 0),
    lambda left, tangent: along(tangent, left, 1),
  )
  return run if contraction.wide == 0 else lambda wide, other: run(other, wide)


def _impl(
  operand: jax.Array, values: jax.Array, scale: jax.Array, origin: jax.Array, *, product: Product
) -> jax.Array:
  del origin
  return product.round_and_run(operand, Scaled(values, scale))


def _jvp(primals: Any, tangents: Any, *, product: Product) -> Any:
  operand, *stored = primals
  terms = []
  if not isinstance(tangents[0], ad.Zero):
    terms.append(_tangent_p.bind(tangents[0], *stored, product=product))
  if not isinstance(tangents[3], ad.Zero):
    pair = (to_dtype(x, product.narrow) for x in (operand, tangents[3]))
    terms.append(to_dtype(product._replace(dtype=product.narrow).run(*pair), product.dtype))
  result = _tangent_p.bind(*primals, product=product)
  return result, functools.reduce(operator.add, terms) if terms else jnp.zeros_like(result)


def _transpose(
  cotangent: jax.Array, operand: jax.Array, *stored: jax.Array, product: Product
) -> Any:
  nothing = (None,) * len(stored)
  if isinstance(cotangent, ad.Zero):
    return None, *nothing
  transposed = product.transposed(operand.aval.dtype)
  return _tangent_p.bind(cotangent, *stored, product=transposed), *nothing


def _batch(args: Any, dims: Any, *, product: Product) -> Any:
  size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
  stored = any(d is not None for d in dims[1:])
  operand = dims[0] is not None or (stored and product.sums_examples)
  ahead = [
    batching.bdim_at_front(x, d, size) if is_mapped else x
    for x, d, is_mapped in zip(args, dims, (operand, stored, stored, stored), strict=True)
  ]
  return _tangent_p.bind(*ahead, product=product.batched(operand, stored)), 0


_tangent_p = new_primitive(
  "mpjax_float8_tangent", _impl, jvp=_jvp, transpose=_transpose, batch=_batch
)
"""`Product.round_and_run`, linear in its operand.

The stored operand comes as float8 values, their scale, and as the array that they were rounded
from: through that goes its derivative, and nothing reads it in the product itself.
"""
