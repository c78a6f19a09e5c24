"""What of a traced step multiplies in float8, and whether that pays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from mpjax._core.primitives import MATMULS
from mpjax._engine.program.bodies import repetitions
from mpjax._engine.program.jaxprs import equations
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn
from mpjax.inspect._compiled_text import Card
from mpjax.inspect._flow_costs import flops, is_float
from mpjax.inspect._targets import card_of

_TO_ROUND = 5
"""Bytes that move to round a 16-bit number: read for the scale, read again, and written."""


class Float8Work(NamedTuple):
  """The float8 matmuls of a traced step, forwards and backwards.

  Attributes:
    matmuls: How many there are in the program, the body of a loop once.
    flops: Their multiplications and additions, loops multiplied out.
    share: Their part of those of all matmuls of floats, 0 to 1.
    rounded_bytes: What is written in float8, in bytes, loops multiplied out.
    small: How many of them cannot gain: to round their operands takes an H100 longer than it saves,
      by its data sheet.
  """

  matmuls: int
  flops: float
  share: float
  rounded_bytes: float
  small: int


class _Matmul(NamedTuple):
  is_float8: bool
  flops: float
  rounded: float
  """How many numbers are rounded for it."""
  times: int


def float8_work(jaxpr: AnyJaxpr) -> Float8Work:
  """Counts the float8 matmuls of a jaxpr."""
  h100 = card_of("h100")
  found = list(_matmuls(jaxpr))
  narrow = [matmul for matmul in found if matmul.is_float8]
  in_float8 = sum(m.flops * m.times for m in narrow)
  return Float8Work(
    matmuls=len(narrow),
    flops=in_float8,
    share=in_float8 / max(sum(m.flops * m.times for m in found), 1),
    rounded_bytes=sum(m.rounded * m.times for m in narrow),
    small=sum(_saved(m, h100) < m.rounded * _TO_ROUND / h100.bandwidth for m in narrow),
  )


def _saved(matmul: _Matmul, card: Card) -> float:
  """Seconds that a matmul takes less, at its fastest."""
  return matmul.flops * (1 / card.peaks["bf16"] - 1 / card.peaks["f8"])


def _matmuls(jaxpr: AnyJaxpr) -> Iterator[_Matmul]:
  for eqn, times in equations(jaxpr, 1, lambda eqn, times: times * (repetitions(eqn) or 1)):
    if eqn.primitive.name == "mpjax_float8_tangent":
      yield _Matmul(True, *_of_tangent(eqn), times)
    elif eqn.primitive.name in MATMULS and is_float(eqn.outvars[0].aval):
      avals: list[Any] = [atom.aval for atom in eqn.invars[:2]]
      is_float8 = all(is_float(aval) and aval.dtype.itemsize == 1 for aval in avals)
      yield _Matmul(is_float8, flops(eqn), sum(map(_size, avals)), times)


def _of_tangent(eqn: JaxprEqn) -> tuple[float, float]:
  """The operations of a derivative's matmul, and the numbers that are rounded for it."""
  product, (operand, stored) = eqn.params["product"], (atom.aval for atom in eqn.invars[:2])
  shapes: Any = (operand.shape, stored.shape)  # pyright: ignore[reportAttributeAccessIssue]
  sizes = dict(zip(product.operand, shapes[0], strict=True))
  sizes |= dict(zip(product.stored, shapes[1], strict=True))
  return 2 * math.prod(sizes.values()), math.prod(shapes[0])


def _size(aval: Any) -> int:
  return math.prod(aval.shape)
