"""Sums that come back in a unit of their own: 300 kelvin, the corners of a mesh, a level."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import ADDS, CALLS, MATMULS, SCALES, UNCHANGED
from mpjax._engine.analyses.data_transforms import UNIT
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.planning.matmul_sight import FEWER, is_hidden
from mpjax._engine.planning.sight import Sight
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import PARAM
from mpjax._engine.program.versions import Atom, Literal


def adds_much(sight: Sight) -> bool:
  """Whether a number like 300 is added to an output, which no matmul multiplies, or subtracted.

  Or one like 1 to a fraction of it, as in a strain ``eye(3) + 0.1 * h``.
  Or a parameter, to what has had its bias or scale: corners of a mesh, anchors, the level of a
  series. What has had an activation is a stream, to which positions are added. So is what leads
  into other layers, unless it is little beside the features that it was made of: a rate, say, of a
  state that a network reads again.
  """
  if sight.place.has_cotangents or (_is_of_layers(sight) and not _is_of_few(sight)):
    return False
  first, second = sight.eqn.invars
  if _is_of_unit(sight, first, second) or _is_of_unit(sight, second, first):
    return True
  others = [a for a, form in zip(sight.eqn.invars, sight.forms, strict=True) if form != PARAM]
  made = _made_of(others[0], sight) if len(others) == 1 else None
  return made is not None and made.is_scaled


def _is_of_layers(sight: Sight) -> bool:
  """Whether a sum leads nowhere but into other layers, and what is read in its unit before."""
  around, result = sight.around, sight.result
  is_stream = is_hidden(sight) and result in around.uses.before_layers
  return is_stream and result not in around.joined


def _is_of_few(sight: Sight) -> bool:
  """Whether what is added was made of many more features: in float32 it costs nothing."""
  found = [_made_of(atom, sight) for atom in sight.eqn.invars]
  size = FEWER * jaxprs.size(sight.result)
  return any(size <= max(map(jaxprs.size, m.features), default=0) for m in found if m)


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


class _Made(NamedTuple):
  """What a matmul gave.

  Attributes:
    features: What it multiplied that is not made of parameters alone.
    is_scaled: Whether it has had a bias, or is a multiple.
  """

  features: Sequence[Atom]
  is_scaled: bool


def _made_of(atom: Atom, sight: Sight) -> _Made | None:
  """What a value is that a matmul gave, with a bias or as a multiple, be it moved or in a call."""
  frame, pure, is_scaled = sight.around.frame, sight.around.sums.pure, False
  while made := frame.maker(atom):
    name, read = made.primitive.name, made.invars
    if name in MATMULS:
      return _Made([a for a in read if isinstance(a, Literal) or a not in pure], is_scaled)
    if name in CALLS:
      *_, (atom, frame) = frame.inside(made, atom)
      pure = _pure_in(frame, pure)
      continue
    if name in _AFFINE:
      is_scaled = True
      read = [a for a in read if not isinstance(a, Literal) and a not in pure]
    if len(read) != 1 or name not in _LEADS_ON:
      return None
    (atom,) = read
  return None


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
