"""Sums that come back in a unit of their own: 300 kelvin, the corners of a mesh, a level."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mpjax._core.primitives import ADDS, CALLS, MATMULS, SCALES, UNCHANGED
from mpjax._engine.analyses.data_transforms import UNIT
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.planning.matmul_sight import is_hidden
from mpjax._engine.planning.sight import Sight
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import PARAM
from mpjax._engine.program.versions import Atom, Literal


def adds_much(sight: Sight) -> bool:
  """Whether a number like 300 is added to an output, which no matmul multiplies, or subtracted.

  Or one like 1 to a fraction of it, as in a strain ``eye(3) + 0.1 * h``.
  Or a parameter, to what has had its bias or scale: corners of a mesh, anchors, the level of a
  series. What has had an activation is a stream, to which positions are added.
  """
  is_of_layers = is_hidden(sight) and sight.result in sight.around.uses.before_layers
  if is_of_layers or sight.place.has_cotangents:
    return False
  first, second = sight.eqn.invars
  if _is_of_unit(sight, first, second) or _is_of_unit(sight, second, first):
    return True
  others = [a for a, form in zip(sight.eqn.invars, sight.forms, strict=True) if form != PARAM]
  around = sight.around
  return len(others) == 1 and _is_output(others[0], around.frame, around.sums.pure)


def _is_of_unit(sight: Sight, number: Atom, value: Atom) -> bool:
  """Whether numbers are large, or are so beside a fraction of a value; zeros may be among them."""
  sizes = [abs(n) for n in sight.around.numbers.of(number) or () if n]
  if not sizes or max(sizes) >= MASKS:
    return False
  return min(sizes) >= UNIT or min(sizes) >= 2 * _fraction(value, sight.around.frame)


def _fraction(atom: Atom, frame: Frame) -> float:
  """The number by which a value was multiplied last, before it was moved; 1 if by none."""
  made = frame.maker(frame.before(atom))
  if made is None or made.primitive.name not in SCALES:
    return 1.0
  is_product = made.primitive.name == "mul"
  numbers = [frame.number(a) for a in made.invars[not is_product :]]
  known = next((abs(n) for n in numbers if n), 1.0)
  return known if is_product else 1 / known


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


_AFFINE = ADDS | SCALES
_LEADS_ON = UNCHANGED | _AFFINE | {"neg", "slice", "dynamic_slice"}

MASKS = 2**24
"""From where on numbers are those of a mask."""
