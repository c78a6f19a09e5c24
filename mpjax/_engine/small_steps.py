"""Sums that step: a small number of times what was computed from a value, added to that value.

``y + 0.002 * f(y)``, an Euler step, a relaxation, an average that follows: 16 bits round each step
by up to a 512th of y in bfloat16, which is all of it, so that y never moves, however few steps
there are. So do they in ``5 + 0.001 * h``, where nothing of h is left beside the number. A residual
of ``h + f(h)``, or one with a learned scale, takes no small steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from mpjax._core.primitives import Trait, having
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import HAVE_BODIES, bodies_of, repetitions
from mpjax._engine.jaxprs import JaxprEqn, Literal
from mpjax._engine.versions import Atom

SMALL = 1 / 32
"""Numbers below it are small. The cube in a gelu has 0.0447, residuals of large models 0.1."""

_KEEPS_SIZE = having(Trait.MOVES) | {
  "neg",
  "convert_element_type",
  "broadcast_in_dim",
  "sharding_constraint",
}
_KEEPS_NUMBER = frozenset({"convert_element_type", "broadcast_in_dim"})
_SUMS = frozenset({"add", "sub"})
_CHOICES = frozenset({"select_n", "max", "min", "concatenate"})
_DEEP = 4
"""How deep sums within sums are looked through, and functions within functions."""

Makers = Mapping[Any, JaxprEqn]


class View(NamedTuple):
  """What is known of the values of a jaxpr.

  Attributes:
    makers: The equation that makes each variable.
    known: The number that a value is all of, or None.
    outside: The operand behind each argument, and what is known of the jaxpr that the call stands
      in, if the jaxpr is a body.
  """

  makers: Makers
  known: Callable[[Atom], float | None]
  outside: Mapping[Any, tuple[Atom, View]] = {}

  def number(self, atom: Atom) -> float | None:
    """The number that a value is all of, or None."""
    while (made := self.maker(atom)) and made.primitive.name in _KEEPS_NUMBER:
      (atom,) = made.invars
    if not isinstance(atom, Literal) and atom in self.outside:
      atom, view = self.outside[atom]
      return view.number(atom)
    return self.known(atom)

  def maker(self, atom: Atom) -> JaxprEqn | None:
    """The equation that makes a value, or None."""
    return None if isinstance(atom, Literal) else self.makers.get(atom)

  def inside(self, eqn: JaxprEqn, atom: Atom) -> tuple[Atom, View] | None:
    """What the body of a call returns as one of its results; None if this runs no body once."""
    if eqn.primitive.name not in HAVE_BODIES or repetitions(eqn) != 1:
      return None
    body, *others = bodies_of(eqn)
    if others:
      return None
    inner = versions.open_jaxpr(body.jaxpr)
    makers = {var: e for e in inner.eqns for var in e.outvars}
    outside = {
      var: (operand, self) for var, operand in zip(inner.invars, body.take(eqn.invars), strict=True)
    }
    return inner.outvars[eqn.outvars.index(atom)], View(makers, _written_out, outside)  # pyright: ignore[reportArgumentType]


def is_small_step(eqn: JaxprEqn, view: View, carried: Collection[Any]) -> bool:
  """Whether an equation adds to a value a small number of times what was computed from it.

  Or to a number a much smaller one of times a value.

  Args:
    eqn: An addition or subtraction.
    view: What is known of the jaxpr that it stands in.
    carried: What a loop hands on: each was computed from all of it in the turns before.
  """
  first, second = eqn.invars
  for value, step in ((first, second), (second, first)):
    if 0 < (factor := _multiple(step, view)) < SMALL:
      while (made := view.maker(value)) and made.primitive.name in _KEEPS_SIZE:
        (value,) = made.invars
      if (number := view.number(value)) is not None:
        return factor < SMALL * abs(number)
      if not isinstance(value, Literal) and (step is second or eqn.primitive.name == "add"):
        return _reads(step, carried if value in carried else (value,), view.makers)
  return False


def _multiple(atom: Atom, view: View, deep: int = _DEEP) -> float:
  """The number of times that a value is something, as far as it is known; else 1."""
  factor = 1.0
  while True:
    eqn = view.maker(atom)
    if eqn is None:
      if isinstance(atom, Literal) or atom not in view.outside:
        return factor
      atom, view = view.outside[atom]
      continue
    name = eqn.primitive.name
    if factor == 1 and deep and (parts := _parts(eqn, view)):
      sizes = (_multiple(part, view, deep - 1) for part in parts)
      return next((1.0 for size in sizes if size >= SMALL), SMALL / 2)
    if name in _KEEPS_SIZE:
      (atom,) = eqn.invars
    elif name == "optimization_barrier":
      atom = eqn.invars[eqn.outvars.index(atom)]  # pyright: ignore[reportArgumentType]
    elif name in ("mul", "div"):
      atom, number = _without_number(eqn, view)
      if number == 1:
        return factor
      factor *= number
    elif deep and (found := view.inside(eqn, atom)):
      (atom, view), deep = found, deep - 1
    else:
      return 1.0 if _undoes_a_sum(factor, eqn) else factor


def _parts(eqn: JaxprEqn, view: View) -> list[Atom]:
  """What a sum adds, but for zeros, or a choice chooses from, but for numbers; else nothing."""
  name = eqn.primitive.name
  if name in _SUMS:
    return [atom for atom in eqn.invars if view.number(atom) != 0]
  if name in _CHOICES:
    choices = eqn.invars[1:] if name == "select_n" else eqn.invars
    return [atom for atom in choices if view.number(atom) is None]
  return []


def _undoes_a_sum(factor: float, eqn: JaxprEqn) -> bool:
  """Whether a sum of n values times a number is their mean, or as large as one of them.

  ``h @ w / n`` and ``h @ w / n ** 0.5`` are no smaller than h, however large n is.
  """
  name, shape = eqn.primitive.name, jaxprs.shape(eqn.invars[0])
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(shape[dim] for dim in contracted)
  elif name == "reduce_sum":
    summed = math.prod(shape[axis] for axis in eqn.params["axes"])
  elif name == "reduce_window_sum":
    summed = math.prod(eqn.params["window_dimensions"])
  else:
    return False
  return any(math.isclose(factor * size, 1, rel_tol=1e-2) for size in (summed, summed**0.5))


def _without_number(eqn: JaxprEqn, view: View) -> tuple[Atom, float]:
  """What a product or quotient is a multiple of, and how large a one; 1 if by no number."""
  left, right = eqn.invars
  number, rest = view.number(right), left
  if eqn.primitive.name == "div":
    return rest, 1 / abs(number) if number else 1.0
  if number is None:
    number, rest = view.number(left), right
  return rest, 1.0 if number is None else abs(number)


def _written_out(atom: Atom) -> float | None:
  return float(atom.val) if isinstance(atom, Literal) and not jaxprs.shape(atom) else None


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
