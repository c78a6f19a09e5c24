"""Sums that come back in a unit of their own: 300 kelvin, the corners of a mesh, a level."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mpjax._core.primitives import ADDS, CALLS, MATMULS, SCALES, UNCHANGED
from mpjax._engine.planning.sight import Sight, is_hidden
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import made_in
from mpjax._engine.program.kinds import PARAM
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var


def adds_much(sight: Sight) -> bool:
  """Whether a number like 300 is added to an output, which no matmul multiplies, or subtracted.

  Or a parameter, to what has had its bias or scale: corners of a mesh, anchors, the level of a
  series. What has had an activation is a stream, to which positions are added.
  """
  if is_hidden(sight) or sight.place.has_cotangents:
    return False
  known = [sight.around.numbers.of(atom) for atom in sight.eqn.invars]
  if any(numbers and all(UNIT <= abs(n) < MASKS for n in numbers) for numbers in known):
    return True
  others = [a for a, form in zip(sight.eqn.invars, sight.forms, strict=True) if form != PARAM]
  around = sight.around
  return len(others) == 1 and _is_output(others[0], around.view.makers, around.sums.pure)


def _is_output(
  atom: Atom, makers: Mapping[Var, JaxprEqn], pure: Collection[Any], *, is_scaled: bool = False
) -> bool:
  """Whether a value is what a matmul gave, with a bias or as a multiple, be it moved or in a call.

  Args:
    atom: The value.
    makers: The equations of its jaxpr, by what they make.
    pure: What is made of parameters alone.
    is_scaled: Whether it has had a bias or a scale behind it.
  """
  while not isinstance(atom, Literal) and (made := makers.get(atom)):
    name, read = made.primitive.name, made.invars
    if name in MATMULS:
      return is_scaled
    if name in CALLS:
      return _is_output_of_call(made, atom, pure, is_scaled)
    if name in _AFFINE:
      is_scaled = True
      read = [a for a in read if not isinstance(a, Literal) and a not in pure]
    if len(read) != 1 or name not in _LEADS_ON:
      return False
    (atom,) = read
  return False


def _is_output_of_call(call: JaxprEqn, result: Any, pure: Collection[Any], is_scaled: bool) -> bool:
  """The same of a result of a call."""
  body, made = made_in(call, result)
  inner = versions.open_jaxpr(body.jaxpr)
  own = {inner.invars[n] for n in jaxprs.places_of(call.invars, pure)}
  for eqn in inner.eqns:
    own |= {*eqn.outvars} if jaxprs.variables_of(eqn.invars) <= own else set()
  makers = jaxprs.makers_of(inner)
  return made is not None and _is_output(made, makers, own, is_scaled=is_scaled)


_AFFINE = ADDS | SCALES
_LEADS_ON = UNCHANGED | _AFFINE | {"neg", "slice", "dynamic_slice"}

UNIT, MASKS = 2, 2**24
"""From where on numbers are those of a unit, and from where on those of a mask."""
