"""Sums that come back in a unit of their own: 300 kelvin, the corners of a mesh, a level."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mpjax._core.primitives import ADDS, CALLS, MATMULS, SCALES, UNCHANGED, Trait, having
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.planning.sight import Sight, is_hidden
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import PARAM
from mpjax._engine.program.versions import Atom, Literal


def adds_much(sight: Sight) -> bool:
  """Whether a number like 300 is added to an output, which no matmul multiplies, or subtracted.

  Or a parameter, to what has had its bias or scale: corners of a mesh, anchors, the level of a
  series. What has had an activation is a stream, to which positions are added.
  """
  if is_hidden(sight) or sight.place.has_cotangents:
    return False
  found = [sight.around.numbers.of(atom) or () for atom in sight.eqn.invars]
  known = [[abs(n) for n in numbers if n] for numbers in found]  # in the identity, beside zeros
  if any(numbers and all(UNIT <= n < MASKS for n in numbers) for numbers in known):
    return not _is_gate(sight)
  others = [a for a, form in zip(sight.eqn.invars, sight.forms, strict=True) if form != PARAM]
  around = sight.around
  return len(others) == 1 and _is_output(others[0], around.frame, around.sums.pure)


def _is_gate(sight: Sight) -> bool:
  """Whether a number is added to what lies between bounds, as in the ``1 + tanh(x)`` of a gelu."""
  made = map(sight.around.frame.maker, sight.eqn.invars)
  return any(eqn is not None and eqn.primitive.name in _SATURATES for eqn in made)


def _is_output(atom: Atom, frame: Frame, pure: Collection[Any]) -> bool:
  """Whether a value is what a matmul gave, with a bias or as a multiple, be it moved or in a call.

  Args:
    atom: The value.
    frame: The frame of its jaxpr.
    pure: What is made of parameters alone there.
  """
  is_scaled = False
  while made := frame.maker(atom):
    name, read = made.primitive.name, made.invars
    if name in MATMULS:
      return is_scaled
    if name in CALLS:
      *_, (atom, frame) = frame.inside(made, atom)
      pure = _pure_in(frame, pure)
      continue
    if name in _AFFINE:
      is_scaled = True
      read = [a for a in read if not isinstance(a, Literal) and a not in pure]
    if len(read) != 1 or name not in _LEADS_ON:
      return False
    (atom,) = read
  return False


def _pure_in(frame: Frame, pure: Collection[Any]) -> Collection[Any]:
  """What is made of parameters alone in the body of a call."""
  outside = frame.outside.items()
  own = {v for v, (atom, _) in outside if not isinstance(atom, Literal) and atom in pure}
  for eqn in frame.inner.eqns:
    own |= {*eqn.outvars} if jaxprs.variables_of(eqn.invars) <= own else set()
  return own


_SATURATES = having(Trait.SATURATES)
_AFFINE = ADDS | SCALES
_LEADS_ON = UNCHANGED | _AFFINE | {"neg", "slice", "dynamic_slice"}

UNIT, MASKS = 0.75, 2**24
"""From where on numbers are those of a unit, as the 1 of a strain, and from where on of a mask."""
