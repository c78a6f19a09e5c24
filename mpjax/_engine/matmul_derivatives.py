"""Matmuls whose derivatives have other dtypes than JAX would give them.

JAX multiplies a cotangent in the dtype of the matmul's result and returns it in that of the
operand. Here a float32 result has 16-bit derivatives, and a 16-bit result a float32 cotangent.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.environment import to_dtype
from mpjax._engine.float32_products import Matmul, fixed

Dims = tuple[int, ...]


def with_derivative(matmul: Matmul, along_first: Matmul, along_second: Matmul) -> Matmul:
  """A matmul whose derivative is the sum of two others.

  It stands in the trace as it is, so that a policy of `jax.checkpoint` can save its result.

  Args:
    matmul: The function.
    along_first: Its derivative, from a tangent of the first operand and the second operand.
    along_second: The same, from the first operand and a tangent of the second.
  """

  @jax.custom_jvp
  def attach(result: Any, first: Any, second: Any) -> Any:
    del first, second
    return result

  def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
    result, first, second = primals
    terms = _bilinear(along_first, along_second, (first, second), tangents[1:], SymbolicZero)
    return attach(*primals), jnp.zeros_like(result) if terms is None else terms

  attach.defjvp(rule, symbolic_zeros=True)

  def run(first: Any, second: Any) -> Any:
    return attach(matmul(_constant(first), _constant(second)), first, second)

  return run


@jax.custom_jvp
def _constant(x: Any) -> Any:
  """`lax.stop_gradient` that can be transposed: linear functions are evaluated, too."""
  return x


@functools.partial(_constant.defjvp, symbolic_zeros=True)
def _constant_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
  del tangents
  (x,) = primals
  return x, SymbolicZero(jax.typeof(x).to_tangent_aval())


def _bilinear(
  along_first: Matmul, along_second: Matmul, primals: Any, tangents: Any, zero: type
) -> Any:
  """The tangent of a bilinear function by its two terms; None if neither operand has one."""
  terms = []
  if not isinstance(tangents[0], zero):
    terms.append(along_first(tangents[0], primals[1]))
  if not isinstance(tangents[1], zero):
    terms.append(along_second(primals[0], tangents[1]))
  return functools.reduce(operator.add, terms) if terms else None


# A float32 cotangent -----------------------------------------------------------------------------


class Contraction(NamedTuple):
  """A `lax.dot_general` in a 16-bit format, of a wide operand, which is float32, and another.

  Attributes:
    wide: Which operand is wide, 0 or 1.
    contracted: The contracted dimensions of the first and of the second operand.
    batch: Their batch dimensions.
    dtype: The format: of the other operand, of the wide one where it is multiplied, of the result.
    precision: The precision of `lax.dot_general`.
  """

  wide: int
  contracted: tuple[Dims, ...]
  batch: tuple[Dims, ...]
  dtype: np.dtype
  precision: Any

  @classmethod
  def of(cls, params: Mapping[str, Any], wide: int, dtype: np.dtype) -> Contraction:
    """The contraction that the parameters of a `lax.dot_general` describe."""
    contracted, batch = (tuple(map(_dims, pair)) for pair in params["dimension_numbers"])
    return cls(wide, contracted, batch, dtype, params["precision"])

  def run(self, wide: Any, other: Any) -> Any:
    """The matmul: the wide operand is rounded."""
    narrow = to_dtype(wide, self.dtype)
    left, right = (narrow, other) if self.wide == 0 else (other, narrow)
    dims: Any = (self.contracted, self.batch)
    return lax.dot_general(
      left,
      right,
      dims,
      precision=self.precision,
      preferred_element_type=self.dtype,
    )

  def transpose(self, cotangent: Any, other: Any, rank: int) -> Any:
    """The float32 cotangent of the wide operand, which has ``rank`` dimensions."""
    batch, contracted = (
      [f"{kind}{n}" for n in range(len(dims[0]))] for kind, dims in self._kinds()
    )
    wide = self._labels(self.wide, rank)
    others = self._labels(1 - self.wide, other.ndim)
    kept, summed = ([x for x in labels if x.startswith("free")] for labels in (wide, others))
    result = [*batch, *kept, *summed] if self.wide == 0 else [*batch, *summed, *kept]
    left = fixed(_turned(cotangent, result, [*batch, *kept, *summed]))
    right = fixed(_turned(other, others, [*batch, *summed, *contracted]))
    along = range(len(batch))
    in_left, in_right = (range(n, n + len(summed)) for n in (len(batch + kept), len(batch)))
    found = lax.dot_general(
      left,
      right,
      ((in_left, in_right), (along, along)),
      precision=self.precision,
      preferred_element_type=FLOAT32,
    )
    return _turned(fixed(found), [*batch, *kept, *contracted], wide)

  def _kinds(self) -> tuple[tuple[str, tuple[Dims, ...]], ...]:
    return ("batch", self.batch), ("contracted", self.contracted)

  def _labels(self, operand: int, rank: int) -> list[str]:
    """A name for each dimension of an operand: the same for those that are matched."""
    labels = [f"free{operand}.{n}" for n in range(rank)]
    for kind, dims in self._kinds():
      for n, dim in enumerate(dims[operand]):
        labels[dim] = f"{kind}{n}"
    return labels

  def batched(self, *operands: int) -> Contraction:
    """The same with one more dimension ahead of some operands: if of both, they are matched."""
    ahead = [n in operands for n in (0, 1)]
    contracted, batch = (
      tuple(_shifted(dims, by) for dims, by in zip(pair, ahead, strict=True))
      for pair in (self.contracted, self.batch)
    )
    if all(ahead):
      batch = tuple((0, *dims) for dims in batch)
    return self._replace(contracted=contracted, batch=batch)


def _dims(dims: Iterable[Any]) -> Dims:
  return tuple(map(int, dims))


def _shifted(dims: Dims, by: int) -> Dims:
  return tuple(dim + by for dim in dims)


def _turned(x: Any, labels: Sequence[str], order: Sequence[str]) -> Any:
  """An array whose dimensions have names, in another order."""
  return jnp.transpose(x, [labels.index(label) for label in order])


def with_wide_cotangent(contraction: Contraction) -> Matmul:
  """The matmul of a wide operand and another, whose wide cotangent does not round.

  The derivative of a softmax takes a mean from the cotangent of its weights. If that was rounded
  before, the small difference has the rounding error of the large cotangent.
  """
  along_wide = functools.partial(_tangent_p.bind, contraction=contraction)
  return with_derivative(contraction.run, along_wide, contraction.run)


_tangent_p = Primitive("mpjax_wide_tangent")
"""`Contraction.run` as a linear function of its wide operand."""


@_tangent_p.def_impl
def _impl(wide: Any, other: Any, *, contraction: Contraction) -> Any:
  return contraction.run(wide, other)


@_tangent_p.def_abstract_eval
def _abstract_eval(wide: Any, other: Any, *, contraction: Contraction) -> Any:
  (aval,) = jax.make_jaxpr(contraction.run)(wide, other).out_avals
  return aval


def _jvp(primals: Any, tangents: Any, *, contraction: Contraction) -> Any:
  run = functools.partial(_tangent_p.bind, contraction=contraction)
  return run(*primals), _bilinear(run, run, primals, tangents, ad.Zero)


def _transpose(cotangent: Any, wide: Any, other: Any, *, contraction: Contraction) -> Any:
  if isinstance(cotangent, ad.Zero):
    return None, None
  if ad.is_undefined_primal(wide):
    return contraction.transpose(cotangent, other, len(wide.aval.shape)), None
  along = jax.linear_transpose(functools.partial(contraction.run, wide), other.aval)
  return None, *along(cotangent)


def _batch(args: Any, dims: Any, *, contraction: Contraction) -> Any:
  """An operand that has no examples is not copied for each: theirs is a free dimension."""
  moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
  mapped = [
    n for n, d in zip((contraction.wide, 1 - contraction.wide), dims, strict=True) if d is not None
  ]
  out = _tangent_p.bind(*moved, contraction=contraction.batched(*mapped))
  if len(mapped) == 2:
    return out, 0
  batch = len(contraction.batch[0])
  free_of_left = args[contraction.wide].ndim - batch - len(contraction.contracted[0])
  return out, batch + (free_of_left if mapped == [1] else 0)


ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_impl, multiple_results=False))
