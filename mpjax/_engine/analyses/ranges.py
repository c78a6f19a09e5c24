"""Within which numbers the values of a jaxpr lie, as far as what they are made of tells.

A sigmoid lies between 0 and 1, and so does half of a tanh and one, a product or a mean of sigmoids,
what is cut off there, and a number by itself. What such a value is subtracted from tells by its
bounds whether it comes near (interval arithmetic; Moore 1966, "Interval analysis").
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.primitives import KEEPS_NUMBERS
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.versions import JaxprEqn, Literal, Var


class Range(NamedTuple):
  """The numbers from the lowest to the highest that a value may have, these among them."""

  low: float
  high: float

  @property
  def is_number(self) -> bool:
    """Whether it is one and the same everywhere."""
    return self.low == self.high

  @property
  def negated(self) -> Range:
    """Where the value lies with the other sign."""
    return Range(-self.high, -self.low)

  def comes_near(self, number: Range) -> bool:
    """Whether its highest number is about a certain positive one.

    At an eighth from it a difference is eight times as far off as the value is itself.
    """
    return number.is_number and abs(number.high - self.high) < number.high / 8

  def crowds_with(self, other: Range) -> bool:
    """Whether both end at the same number that is not 0, near which their values lie close."""
    ends = (pair[0] for pair in zip(self, other, strict=True) if pair[0] == pair[1])
    return any(0 < abs(end) < math.inf for end in ends) and not self.is_number


ANYWHERE = Range(-math.inf, math.inf)
ONE = Range(1.0, 1.0)


def hull(ranges: Iterable[Range]) -> Range:
  """Where a value lies that is one of several."""
  lows, highs = zip(*ranges, strict=True)
  return Range(min(lows), max(highs))


def widened(before: Range, after: Range) -> Range:
  """Where a value lies in every turn of a loop, from before one and after: no bound moves."""
  return Range(
    before.low if before.low <= after.low else -math.inf,
    before.high if before.high >= after.high else math.inf,
  )


def range_after(
  eqn: JaxprEqn, read: Sequence[Range], made: Mapping[Var, JaxprEqn], of: Callable[[Any], Range]
) -> Range:
  """Where the results of an equation lie.

  Args:
    eqn: The equation.
    read: Where its operands lie.
    made: The equations before it, by what they made.
    of: Tells where any operand of these lies.
  """
  name = matmuls.operation(eqn)
  if name in _KEEP_RANGE and name != "clamp":
    return _chosen(eqn, read)
  if name == "div" and read[1].low > 0 and (share := _of_share(eqn, made, of)):
    return share
  if name in _ARITHMETIC:
    is_known = ANYWHERE not in read and not (name == "div" and read[1].low <= 0 <= read[1].high)
    return _of_corners(_ARITHMETIC[name], read) if is_known else ANYWHERE
  if name in _MONOTONE:
    return _of_corners(_MONOTONE[name], read)
  if name in _POWERS:
    return _of_power(read[0], _POWERS[name](eqn, read))
  if name == "abs":
    ends = sorted(map(abs, read[0]))
    return Range(ends[0] if read[0].low * read[0].high > 0 else 0.0, ends[1])
  if name == "reduce_sum":
    terms = max(1.0, jaxprs.size(eqn.invars[0]) / max(1, jaxprs.size(eqn.outvars[0])))
    return Range(*(end * terms if end else 0.0 for end in read[0]))
  return ANYWHERE


def _of_corners(function: Callable[..., Any], read: Sequence[Range]) -> Range:
  """Where a function lies that is monotone in each of its operands."""
  ends = [end for corner in product(*read) if not math.isnan(end := function(*corner))]
  return Range(min(ends), max(ends)) if ends else ANYWHERE


def _of_power(base: Range, exponent: float) -> Range:
  """Where a power of a value between 0 and 1 lies."""
  inside = base.low >= 0 and base.high <= 1 and 0 < exponent < math.inf
  return Range(base.low**exponent, base.high**exponent) if inside else ANYWHERE


def _chosen(eqn: JaxprEqn, read: Sequence[Range]) -> Range:
  """Where a value lies that is moved or chosen among others."""
  dtypes = set(map(jaxprs.dtype, eqn.outvars))
  if len(dtypes) > 1:
    return ANYWHERE
  (dtype,) = dtypes
  if eqn.primitive.name == "convert_element_type":
    return read[0] if np.issubdtype(dtype, np.floating) else ANYWHERE
  pairs = zip(eqn.invars, read, strict=True)
  same = [place for atom, place in pairs if jaxprs.dtype(atom) == dtype]
  return hull(same) if same else ANYWHERE


def _of_share(
  eqn: JaxprEqn, made: Mapping[Var, JaxprEqn], of: Callable[[Any], Range]
) -> Range | None:
  """Where a value lies that is divided by a sum of its size and something positive, if it is."""
  share, total = eqn.invars
  summing = None if isinstance(total, Literal) else made.get(total)
  if summing is None or summing.primitive.name != "add":
    return None
  for part, rest in (summing.invars, summing.invars[::-1]):
    sizing = None if isinstance(part, Literal) else made.get(part)
    is_size = sizing is not None and sizing.primitive.name == "abs" and sizing.invars[0] is share
    if of(rest).low >= 0 and (is_size or (part is share and of(share).low >= 0)):
      return Range(-1.0 if is_size else 0.0, 1.0)
  return None


_KEEP_RANGE = KEEPS_NUMBERS | {"reduce_max", "reduce_min"}
_ARITHMETIC: Mapping[str, Callable[..., float]] = {
  "add": operator.add,
  "add_any": operator.add,
  "sub": operator.sub,
  "mul": operator.mul,
  "div": operator.truediv,
}
_MONOTONE: Mapping[str, Callable[..., Any]] = {
  "neg": operator.neg,
  "max": max,
  "min": min,
  "clamp": lambda low, x, high: min(max(low, x), high),
  "tanh": math.tanh,
  "atan": math.atan,
  "logistic": lambda x: (1 + math.tanh(x / 2)) / 2,
  "erf": math.erf,
  "erfc": math.erfc,
}
_POWERS: Mapping[str, Callable[[JaxprEqn, Sequence[Range]], float]] = {
  "integer_pow": lambda eqn, read: eqn.params["y"],
  "pow": lambda eqn, read: read[1].low if read[1].is_number else math.inf,
  "square": lambda eqn, read: 2,
  "sqrt": lambda eqn, read: 1 / 2,
  "cbrt": lambda eqn, read: 1 / 3,
}
