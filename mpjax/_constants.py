"""The values that a constant of a trace may have, as far as equations tell.

Each number of a program may fit float16 and their product leave it: ``(1 - mask) * -300 * 300``.
Constants are few numbers in large arrays, so their values are followed as small sets.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np

Values = frozenset[float] | None
"""The numbers that occur in a constant; None where they are not known."""

MASK: Values = frozenset({0.0, 1.0})
"""What a boolean becomes."""

MOST = 64
"""Of more different numbers than these no account is kept."""

_ARITHMETIC: dict[str, Callable[..., Any]] = {
  "add": operator.add,
  "sub": operator.sub,
  "mul": operator.mul,
  "div": np.divide,
  "neg": operator.neg,
  "abs": abs,
  "max": max,
  "min": min,
}
_LEAVE_THE_RANGE = frozenset({"add", "sub", "mul", "div"})
_OTHER_NUMBERS = frozenset(
  {
    *("sqrt", "cbrt", "tanh", "logistic", "erf", "erfc", "sin", "cos", "asin", "acos", "atan"),
    *("atan2", "sign", "floor", "ceil", "round", "rem"),
  }
)


def number(value: float) -> Values:
  """The values of a number."""
  return frozenset({float(value)})


def after(primitive: str, operands: Sequence[Values]) -> Values:
  """The values of an equation's result, all of whose float operands are constants."""
  known = [values for values in operands if values is not None]
  if len(known) < len(operands) or primitive in _OTHER_NUMBERS:
    return None
  if primitive in _ARITHMETIC:
    if np.prod([len(values) for values in known]) > MOST:
      return None
    with np.errstate(all="ignore"):
      return frozenset(float(_ARITHMETIC[primitive](*numbers)) for numbers in product(*known))
  return frozenset[float]().union(*known)  # what moves or chooses numbers makes no new ones


def may_leave_the_range(primitive: str) -> bool:
  """Whether numbers that fit a format can have a result that does not."""
  return primitive in _LEAVE_THE_RANGE
