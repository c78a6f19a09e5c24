"""What values of a jaxpr were before they were moved or scaled, and what makes that."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mpjax._core.primitives import SCALES, UNCHANGED
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

_MOVED = UNCHANGED | {"neg", "slice", "dynamic_slice"}
_HANDS_ON = _MOVED | SCALES


class Origins:
  """Of each value of a jaxpr, what it was moved from or is a multiple of.

  Of a part that is cut twice, what was cut first.

  Args:
    frame: The frame of the jaxpr.

  Attributes:
    makers: The equations, by what they make.
  """

  def __init__(self, frame: Frame) -> None:
    self.makers = frame.makers
    self._frame = frame
    self._called: dict[int, Origins] = {}

  @functools.cached_property
  def _known(self) -> dict[Any, Any]:
    """What each value was that was moved or scaled; few jaxprs are asked for it."""
    known: dict[Any, Any] = {}
    parts: dict[Any, Var] = {}
    for eqn in self._frame.inner.eqns:
      if eqn.primitive.name not in _HANDS_ON:  # most
        continue
      for atom in handed_on(eqn):
        before = atom if isinstance(atom, Literal) else known.get(atom, atom)
        if eqn.primitive.name == "slice" and not isinstance(before, Literal):
          cut = (eqn.params[key] for key in ("start_indices", "limit_indices", "strides"))
          before = parts.setdefault((before, *cut), eqn.outvars[0])
        known[eqn.outvars[0]] = before
    return known

  def of(self, atom: Atom) -> Any:
    """What an operand was; a literal is what it is."""
    return atom if isinstance(atom, Literal) else self._known.get(atom, atom)

  def of_all(self, atoms: Iterable[Atom]) -> list[Any]:
    """The same of several."""
    return [self.of(atom) for atom in atoms]

  def maker(self, atom: Atom) -> JaxprEqn | None:
    """What makes what an operand was; None if no equation does."""
    before = self.of(atom)
    return None if isinstance(before, Literal) else self.makers.get(before)

  def in_call(self, eqn: JaxprEqn, result: Any) -> Called | None:
    """What a result of a call was in the body of that; None where no variable makes it."""
    seen = self._frame.inside(eqn, result)
    if not seen or isinstance(seen[-1][0], Literal):
      return None
    made, frame = seen[-1]
    within = self._called.setdefault(id(frame), Origins(frame))
    outside = {var: self.of(atom) for var, (atom, _) in frame.outside.items()}
    return Called(within, within.of(made), outside)


class Called(NamedTuple):
  """A result of a call, seen in its body.

  Attributes:
    origins: The origins of the values there.
    made: What the result was there.
    outside: What the operands of the body were outside.
  """

  origins: Origins
  made: Any
  outside: Mapping[Any, Any]


def handed_on(eqn: JaxprEqn) -> list[Atom]:
  """What an equation moves, or multiplies by a number; none if it does something else."""
  name = eqn.primitive.name
  if name in _MOVED:
    return eqn.invars[:1]
  read = [atom for atom in eqn.invars if getattr(atom.aval, "shape", ())] if name in SCALES else []
  return read if len(read) == 1 and (name == "mul" or read[0] is eqn.invars[0]) else []
