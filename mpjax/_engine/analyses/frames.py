"""A jaxpr and the call that it stands in: what makes a value, seen through calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mpjax._core.primitives import UNCHANGED
from mpjax._engine.analyses.constants import numbers_of, only
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.versions import Atom, Jaxpr, JaxprEqn, Literal

_KEEPS_NUMBER = frozenset({"convert_element_type", "broadcast_in_dim"})
_KEEPS_SIZE = UNCHANGED | {"neg"}


def _number_of(atom: Atom) -> float | None:
  return only(numbers_of(atom.val)) if isinstance(atom, Literal) else None


class Frame:
  """The equations of a jaxpr, and what stands behind its arguments.

  Args:
    inner: The jaxpr, open.
    is_backward: Whether an equation came from transposing.
    known: The number that a value is all of, or None.
    outside: The operand behind each argument, with its frame, if the jaxpr is a body.
    steady: The scalars that are the same in every turn, in the body of a loop.

  Attributes:
    inner: The jaxpr.
    makers: Its equations, by what they make.
    is_backward, known, outside, steady: The other arguments.
  """

  def __init__(
    self,
    inner: Jaxpr,
    is_backward: Callable[[JaxprEqn], bool],
    known: Callable[[Atom], float | None] = _number_of,
    outside: Mapping[Any, Seen] | None = None,
    steady: Collection[Any] = (),
  ) -> None:
    self.inner, self.makers = inner, jaxprs.makers_of(inner)
    self.is_backward, self.known = is_backward, known
    self.outside, self.steady = outside or {}, steady
    self._called: dict[int, list[Frame]] = {}

  def maker(self, atom: Atom) -> JaxprEqn | None:
    """The equation that makes a value, or None."""
    return None if isinstance(atom, Literal) else self.makers.get(atom)

  def before(self, atom: Atom, names: Collection[str] = UNCHANGED) -> Atom:
    """What an operand was before primitives of these names handed on what they read first."""
    while (made := self.maker(atom)) and made.primitive.name in names:
      atom = made.invars[0]
    return atom

  def back(self, atom: Atom, hands_on: Callable[[JaxprEqn], Sequence[Atom]]) -> list[Atom]:
    """An operand, and one after the other what it was.

    Args:
      atom: The operand.
      hands_on: The operand that an equation hands on; none if it does something else.
    """
    found = [atom]
    while (made := self.maker(found[-1])) and (before := hands_on(made)):
      found += before
    return found

  def behind(self, atom: Atom) -> list[Seen]:
    """The operand behind an argument, with its frame; nothing behind what is made in the jaxpr."""
    found = None if isinstance(atom, Literal) else self.outside.get(atom)
    return [] if found is None else [found]

  def number(self, atom: Atom) -> float | None:
    """The number that a value is all of, or None."""
    atom = self.before(atom, _KEEPS_NUMBER)
    for before, frame in self.behind(atom):
      return frame.number(before)
    return self.known(atom)

  def number_moved(self, atom: Atom) -> float | None:
    """The same, whatever moved it or changed its sign."""
    return self.number(self.before(atom, _KEEPS_SIZE))

  def inside(self, eqn: JaxprEqn, result: Any) -> list[Seen]:
    """What the bodies of a call or branch return as one of its results; nothing for a loop.

    The last is what runs everywhere else, of a choice by platform.
    """
    place, called = eqn.outvars.index(result), self._called.get(id(eqn))
    if called is None:
      bodies = bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ()
      self._called[id(eqn)] = called = []
      for body in () if any(body.carry for body in bodies) else bodies:
        inner = versions.open_jaxpr(body.jaxpr)
        pairs = zip(inner.invars, body.take(eqn.invars), strict=True)
        outside = {var: (operand, self) for var, operand in pairs}
        called.append(Frame(inner, self.is_backward, outside=outside))
    return [(frame.inner.outvars[place], frame) for frame in called]


Seen = tuple[Atom, Frame]
"""A value, and the frame of the jaxpr that it stands in."""
