"""A matmul of 16-bit operands that gives one of them a float32 cotangent.

What a matmul adds up in float32 rounds as it leaves. Where a softmax takes it, that error is of the
cotangents' own size, while what is left of them is their difference to a mean: it need not be
made. The derivative of a matmul has the dtype of its result in either direction, so that its
transpose is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax._dtypes import FLOAT32
from mpjax._values import to_dtype

Dims = tuple[int, ...]


class Contraction(NamedTuple):
  """A `lax.dot_general` of a 16-bit format with a wide operand, which is float32, and another.

  Attributes:
    wide: Which operand is wide, 0 or 1.
    contracted: The contracted dimensions of the first and of the second operand.
    batch: Their batch dimensions.
    dtype: The 16-bit format in which it multiplies and which its result has.
    precision: The precision of `lax.dot_general`.
  """

  wide: int
  contracted: tuple[Dims, Dims]
  batch: tuple[Dims, Dims]
  dtype: np.dtype
  precision: Any

  @classmethod
  def of(cls, params: Mapping[str, Any], wide: int, dtype: np.dtype) -> Contraction:
    """The contraction that the parameters of a `lax.dot_general` describe."""
    contracted, batch = (
      tuple(tuple(map(int, dims)) for dims in pair) for pair in params["dimension_numbers"]
    )
    return cls(wide, contracted, batch, dtype, params["precision"])

  def run(self, wide: Any, other: Any) -> Any:
    """The matmul: the wide operand is rounded."""
    pair = (to_dtype(wide, self.dtype), other)
    return lax.dot_general(
      *(pair if self.wide == 0 else pair[::-1]),
      (self.contracted, self.batch),
      precision=self.precision,
      preferred_element_type=self.dtype,
    )

  def transpose(self, cotangent: Any, other: Any, rank: int) -> Any:
    """The float32 cotangent of the wide operand, which has ``rank`` dimensions."""
    mine, others = self.wide, 1 - self.wide
    kept = _without(rank, self.contracted[mine], self.batch[mine])
    summed = _without(other.ndim, self.contracted[others], self.batch[others])
    batch = tuple(range(len(self.batch[mine])))
    free = range(len(batch), cotangent.ndim)
    last = (summed, kept)[mine]  # free dimensions of the left operand stand before the right's
    ahead, behind = free[: len(free) - len(last)], free[len(free) - len(last) :]
    turned = (*ahead, *behind) if mine == 0 else (*behind, *ahead)
    # XLA has kernels for CPUs for dimensions in this order, and not in every other.
    left = jnp.transpose(cotangent, (*batch, *turned))
    right = jnp.transpose(other, (*self.batch[others], *summed, *self.contracted[others]))
    sums = (free[len(kept) :], free[: len(summed)])
    dims = (tuple(map(tuple, sums)), (batch, batch))
    found = lax.dot_general(
      left, right, dims, precision=self.precision, preferred_element_type=FLOAT32
    )
    return jnp.transpose(found, np.argsort((*self.batch[mine], *kept, *self.contracted[mine])))

  def batched(self) -> Contraction:
    """The same with one more batch dimension ahead of both operands."""
    contracted, batch = (
      tuple(tuple(d + 1 for d in dims) for dims in pair) for pair in (self.contracted, self.batch)
    )
    ahead: Any = tuple((0, *dims) for dims in batch)
    return self._replace(contracted=contracted, batch=ahead)


def _without(rank: int, *dims: Dims) -> Dims:
  return tuple(d for d in range(rank) if not any(d in some for some in dims))


def contract(contraction: Contraction) -> Callable[[Any, Any], Any]:
  """The matmul of a wide operand and another, differentiable in both."""

  @jax.custom_jvp
  def run(wide: Any, other: Any) -> Any:
    return contraction.run(wide, other)

  def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
    wide, other = primals
    terms = []
    if not isinstance(tangents[0], SymbolicZero):
      terms.append(_tangent_p.bind(tangents[0], other, contraction=contraction))
    if not isinstance(tangents[1], SymbolicZero):
      terms.append(contraction.run(wide, tangents[1]))
    return run(wide, other), sum(terms[1:], terms[0])

  run.defjvp(rule, symbolic_zeros=True)
  return run


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
  """Linear in both operands, each of which may have a tangent."""
  out = _tangent_p.bind(*primals, contraction=contraction)
  terms = [
    _tangent_p.bind(*pair, contraction=contraction)
    for pair in ((tangents[0], primals[1]), (primals[0], tangents[1]))
    if not any(isinstance(x, ad.Zero) for x in pair)
  ]
  return out, sum(terms[1:], terms[0])


def _transpose(cotangent: Any, wide: Any, other: Any, *, contraction: Contraction) -> Any:
  if isinstance(cotangent, ad.Zero):
    return None, None
  if ad.is_undefined_primal(wide):
    return contraction.transpose(cotangent, other, len(wide.aval.shape)), None
  along = jax.linear_transpose(lambda other: contraction.run(wide, other), other.aval)
  return None, *along(cotangent)


def _batch(args: Any, dims: Any, *, contraction: Contraction) -> Any:
  size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
  ahead = [
    jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
    for x, d in zip(args, dims, strict=True)
  ]
  return _tangent_p.bind(*ahead, contraction=contraction.batched()), 0


ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(
  _tangent_p,
  mlir.lower_fun(
    lambda wide, other, contraction: contraction.run(wide, other), multiple_results=False
  ),
)
