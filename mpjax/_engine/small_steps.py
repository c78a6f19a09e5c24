"""Sums that step: a small number of times what was computed from a value, added to that value.

``y + 0.002 * f(y)``, an Euler step, a relaxation, an average that follows: 16 bits round each step
by up to a 512th of y in bfloat16, which is all of it, so that y never moves, however few steps
there are. So do they in ``5 + 0.001 * h``, where nothing of h is left beside the number. A residual
of ``h + f(h)``, or one with a learned scale, takes no small steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from mpjax._core.primitives import Trait, having
from mpjax._engine import jaxprs
from mpjax._engine.jaxprs import JaxprEqn, Literal
from mpjax._engine.versions import Atom

SMALL = 1 / 32
"""Numbers below it are small. The cube in a gelu has 0.0447, residuals of large models 0.1."""

_KEEPS_SIZE = having(Trait.MOVES) | {"neg", "convert_element_type", "broadcast_in_dim"}
_SUMS = frozenset({"add", "sub"})
_DEEP = 4
"""How deep sums within sums are looked through."""

Makers = Mapping[Any, JaxprEqn]


def is_small_step(eqn: JaxprEqn, makers: Makers, carried: Collection[Any]) -> bool:
  """Whether an equation adds to a value a small number of times what was computed from it.

  Or to a number a much smaller one of times a value.

  Args:
    eqn: An addition or subtraction.
    makers: The equation that makes each variable of the jaxpr.
    carried: What a loop hands on: each was computed from all of it in the turns before.
  """
  first, second = eqn.invars
  for value, step in ((first, second), (second, first)):
    if 0 < (factor := _multiple(step, makers)) < SMALL:
      while (made := _maker(value, makers)) and made.primitive.name in _KEEPS_SIZE:
        (value,) = made.invars
      if _is_number(value):
        return factor < SMALL * abs(float(value.val))
      if not isinstance(value, Literal) and (step is second or eqn.primitive.name == "add"):
        return _reads(step, carried if value in carried else (value,), makers)
  return False


def _multiple(atom: Atom, makers: Makers, deep: int = _DEEP) -> float:
  """The number of times that a value is something, as far as it is written out; else 1."""
  factor = 1.0
  while eqn := _maker(atom, makers):
    name = eqn.primitive.name
    if name in _SUMS and factor == 1 and deep:
      terms = (_multiple(term, makers, deep - 1) for term in eqn.invars)
      return next((1.0 for size in terms if size >= SMALL), SMALL / 2)
    if name in _KEEPS_SIZE:
      (atom,) = eqn.invars
      continue
    if name not in ("mul", "div"):
      break
    atom, number = _without_number(eqn)
    if number == 1:
      break
    factor *= number
  return 1.0 if (made := _maker(atom, makers)) and _undoes_a_sum(factor, made) else factor


def _undoes_a_sum(factor: float, eqn: JaxprEqn) -> bool:
  """Whether a sum of n products times a number is their mean, or as large as one of them.

  ``h @ w / n`` and ``h @ w / n ** 0.5`` are no smaller than h, however large n is.
  """
  if eqn.primitive.name != "dot_general":
    return False
  (contracted, _), _ = eqn.params["dimension_numbers"]
  summed = math.prod(jaxprs.shape(eqn.invars[0])[dim] for dim in contracted)
  return any(math.isclose(factor * size, 1, rel_tol=1e-2) for size in (summed, summed**0.5))


def _without_number(eqn: JaxprEqn) -> tuple[Atom, float]:
  """What a product or quotient is a multiple of, and how large a one; 1 if by no number."""
  left, right = eqn.invars
  if eqn.primitive.name == "div":
    return left, 1 / (abs(float(right.val)) or 1) if _is_number(right) else 1.0
  number, rest = (left, right) if _is_number(left) else (right, left)
  return rest, abs(float(number.val)) if _is_number(number) else 1.0


def _maker(atom: Atom, makers: Makers) -> JaxprEqn | None:
  return None if isinstance(atom, Literal) else makers.get(atom)


def _is_number(atom: Atom) -> TypeGuard[Literal]:
  return isinstance(atom, Literal) and not jaxprs.shape(atom)


def _reads(atom: Atom, values: Collection[Any], makers: Makers) -> bool:
  """Whether a value was computed from one of others."""
  seen, waiting = set[Atom](), [atom]
  while waiting:
    atom = waiting.pop()
    if isinstance(atom, Literal) or atom in seen:
      continue
    if atom in values:
      return True
    seen.add(atom)
    waiting += makers[atom].invars if atom in makers else ()
  return False
