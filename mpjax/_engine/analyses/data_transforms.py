"""Products of data and a matrix that is data, too: of a frozen network, or a transform.

``t - 0.1 * t @ laplacian``, ``(t @ blends - 293) / 2``, ``x - x @ p @ v``, ``s @ f + u @ g`` of a
motion, ``log((frames @ cosines) ** 2 + (frames @ sines) ** 2)``: no parameter is in the matrix, and
none need be in what it multiplies. Both may as well be the input and the weights of a network that
is not trained. What is done with the product tells them apart. A network goes on with an
activation, a norm, or its next layer, perhaps after a bias, and its hidden layers multiply what an
activation made. Where what was multiplied is added to the product, data or a number like 293 are
taken away, where its logarithm is taken, or where a loop hands it on to the next turn as what it
was made of, what 16 bits round of it is large beside what is left.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mpjax._core.primitives import (
  ADDS,
  BOUNDS,
  COMPARES,
  KEEPS_NUMBERS,
  MATMULS,
  SCALES,
  UNCHANGED,
  Trait,
  having,
)
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var


class End(enum.Enum):
  """What is done with a product of data."""

  DIFFERENCE = "what is left of it may be small beside it"
  LAYER = "an activation made what it is of, or it goes on into an activation or a next layer"
  TRAINED = "a layer that is trained is the first to read it"
  NORM = "it is divided by its norm or deviation"
  JOINED = "it is compared with what is trained, in a loss"
  RETURNED = "none of these"


class DataTransforms:
  """Tells what is done with products of data in one jaxpr.

  Args:
    frame: The jaxpr.
    contents: Tells what functions do that are called.
    given: The operands and constants of the jaxpr that are data.
    trained: What is made of parameters alone.
    handed_on: For each result of a loop's body that the next turn gets, as what.
    subtracted: The results of which a call that the jaxpr is the body of makes differences.
  """

  def __init__(
    self,
    frame: Frame,
    contents: Contents,
    given: Collection[Any],
    trained: Collection[Any],
    handed_on: Mapping[Any, Var],
    subtracted: Collection[Any],
  ) -> None:
    self._frame, self._contents = frame, contents
    self._given, self._trained = given, trained
    self._handed_on, self._subtracted = handed_on, subtracted

  def end_of(self, matmul: JaxprEqn) -> End:
    """What the first of the equations that say so does with a product."""
    if any(self._is_hidden(a) for a in matmul.invars if not self._is_average(a, matmul)):
      return End.LAYER
    made = _Made(matmul.outvars[0], self._sources(matmul.invars))
    made.has_rows = _has_rows(matmul)
    return self._end(matmul, made)

  def end_of_sum(self, matmul: JaxprEqn, states: Collection[Var]) -> End:
    """The same of one that adds up what something else weighs, which an activation may have made.

    Args:
      matmul: The matmul.
      states: What it may move.
    """
    return self._end(matmul, _Made(matmul.outvars[0], {*states}))

  def subtracted_from(self, call: JaxprEqn) -> frozenset[int]:
    """Which results of a call, if they are products of its operands, end in a difference."""
    read = self._sources(call.invars)
    ends = ((n, self._end(call, _Made(var, read))) for n, var in enumerate(call.outvars))
    return frozenset(n for n, end in ends if end is End.DIFFERENCE)

  def _end(self, eqn: JaxprEqn, made: _Made) -> End:
    """The same of a result of an equation, and of what is made of it."""
    eqns, start = self._frame.inner.eqns, self._places[eqn.outvars[0]] + 1
    for reader in eqns[start : start + _LOOKS]:
      is_read = made.reads(reader, made.values) and not self._frame.is_backward(reader)
      if is_read and (end := self._end_at(reader, made)):
        return end
    results = made.values.intersection(variables_of(self._frame.inner.outvars))
    is_next = any(self._handed_on.get(var) in made.operands for var in results)
    if is_next or made.offset or not results.isdisjoint(self._subtracted):
      return End.DIFFERENCE
    if made.clipped:
      return End.LAYER
    return End.JOINED if made.is_joined else End.RETURNED

  @functools.cached_property
  def _places(self) -> Mapping[Any, int]:
    eqns = self._frame.inner.eqns
    return {var: n for n, eqn in enumerate(eqns) for var in eqn.outvars}

  def _end_at(self, eqn: JaxprEqn, made: _Made) -> End | None:
    """Whether an equation says what is done; it goes on with what it makes if not."""
    name, held = eqn.primitive.name, self._held(eqn)
    others = [a for a in eqn.invars if isinstance(a, Literal) or a not in made.values]
    if name in HAVE_BODIES and not held.isdisjoint(MATMULS):
      return None  # as a layer, or a step of a solver
    if not held.isdisjoint(_LOGARITHMS) and held.isdisjoint(_ACTIVATES):
      return End.DIFFERENCE if jaxprs.size(eqn.outvars[0]) > 1 else None  # of all of it: a report
    if made.reads(eqn, made.clipped) and name not in UNCHANGED:
      return End.LAYER
    if name in MATMULS:
      is_power = made.reads(eqn, made.squares) and not made.is_joined  # alone: an activation
      if is_power or not others or not all(map(self.is_given, others)):
        is_trained = any(a in self._trained for a in variables_of(others))
        layer = End.TRAINED if is_trained else End.LAYER
        return End.DIFFERENCE if made.reads(eqn, made.offset) else layer
    elif not held.isdisjoint(_ROOTS):
      return End.NORM if made.reads(eqn, made.totals) or "rsqrt" in held else End.DIFFERENCE
    elif not held.isdisjoint(_ACTIVATES) or self._chooses(eqn, held, made):
      return End.LAYER
    elif name in ADDS:
      if any(self._is_subtracted(other, eqn, made) for other in others):
        return End.DIFFERENCE
      made.is_joined |= any(map(self._is_multiplied, others))
    elif name in SCALES:
      if not all(self._is_spread(other, eqn) or self.is_given(other) for other in others):
        made.is_joined |= any(map(self._is_multiplied, others))
        return None
    elif name not in _LEADS_ON and name not in HAVE_BODIES:
      return None
    made.add(eqn, held)
    if name in ADDS and any(map(self._is_far, others)):
      made.offset.update(eqn.outvars)
    return None

  def _held(self, eqn: JaxprEqn) -> set[str]:
    """The primitives of an equation, and of its bodies."""
    bodies = bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ()
    return {eqn.primitive.name}.union(*(self._contents.primitives(b.jaxpr) for b in bodies))

  def _chooses(self, eqn: JaxprEqn, held: set[str], made: _Made) -> bool:
    """Whether something is chosen by what a product is compared with, as a leaky relu does."""
    tests = [a for a in variables_of(eqn.invars) if jaxprs.kind(a) == "b"]
    is_tested = any(a in made.values for a in tests)
    return "select_n" in held and (is_tested or not held.isdisjoint(COMPARES))

  def _is_subtracted(self, other: Atom, eqn: JaxprEqn, made: _Made) -> bool:
    """Whether what was multiplied is added, or other data are subtracted, a number from each.

    A bias is added, if there is a single row as large as that.
    """
    if self._frame.number_moved(other) is not None or self._is_spread(other, eqn):
      return False
    is_own = not made.operands.isdisjoint(self._sources([other]))
    return is_own or (eqn.primitive.name == "sub" and made.has_rows and self.is_given(other))

  def _is_far(self, other: Atom) -> bool:
    """Whether an operand is a number like 293."""
    number = self._frame.number_moved(other)
    return number is not None and abs(number) >= UNIT

  def _is_spread(self, other: Atom, eqn: JaxprEqn) -> bool:
    """Whether an operand has fewer numbers than the result, as a bias and a scale do."""
    return jaxprs.size(self._frame.before(other)) < jaxprs.size(eqn.outvars[0])

  def _sources(self, atoms: Sequence[Atom]) -> set[Var]:
    """What values are multiples or sums of, as it was before it was moved."""
    waiting, found = [*atoms], set[Var]()
    for _ in range(_STEPS):
      if not waiting:
        break
      value = self._frame.before(waiting.pop())
      found |= variables_of([value])
      made = self._frame.maker(value)
      waiting += made.invars if made and made.primitive.name in _LINEAR else []
    return found

  def is_given(self, atom: Atom) -> bool:
    """Whether an operand is data, or what no matmul made of data."""
    found = list(itertools.islice(jaxprs.behind(atom, self._frame.makers), _STEPS))
    return len(found) < _STEPS and all(
      var in self._given or jaxprs.kind(var) in "biu"
      if made is None
      else self._held(made).isdisjoint(MATMULS)
      for var, made in found
    )

  def _is_multiplied(self, atom: Atom) -> bool:
    """Whether a matmul had part in an operand, which is no bias then."""
    found = itertools.islice(jaxprs.behind(atom, self._frame.makers), _STEPS)
    return any(made is not None and not self._held(made).isdisjoint(MATMULS) for _, made in found)

  def _is_hidden(self, atom: Atom) -> bool:
    """Whether an activation or a norm made an operand of what a matmul gave.

    A square is one, but not the sum of two, as a power spectrum.
    """
    waiting = [(atom, False, False)]
    for _ in range(_STEPS):
      if not waiting:
        return False
      value, is_activated, is_sum = waiting.pop()
      made = self._frame.maker(value)
      if made is None:
        continue
      held, is_sum = self._held(made), is_sum or made.primitive.name in ADDS
      names = _MAKES_HIDDEN if is_sum else _MAKES_HIDDEN | _SQUARES
      is_activated = is_activated or not held.isdisjoint(names)
      if held.isdisjoint(MATMULS):
        waiting += [(a, is_activated, is_sum) for a in made.invars]
      elif is_activated:
        return True
    return False

  def _is_average(self, atom: Atom, matmul: JaxprEqn) -> bool:
    """Whether an operand is a softmax by which data are weighed, which have their unit still."""
    others = [other for other in matmul.invars if other is not atom]
    made = self._frame.maker(self._frame.before(atom))
    if made is None or not others or not all(map(self.is_given, others)):
      return False
    above = self._frame.maker(self._frame.before(made.invars[0]))
    held = self._held(made) | (set() if above is None else self._held(above))
    return held >= {"div", "exp"}


class _Made:
  """What is made of a product, with nothing that says what that is done for.

  Args:
    product: The product.
    operands: What was multiplied, and what that is a multiple or a sum of.

  Attributes:
    values: The variables.
    totals: Those among them that are made of sums of it.
    offset: Those to which a number was added.
    clipped: Those that were bounded.
    squares: Those that were multiplied by themselves.
    has_rows: Whether there are several rows of it, to each of which a bias would be added.
    is_joined: Whether what another matmul made was added to it, or multiplied it.
  """

  def __init__(self, product: Any, operands: set[Any]) -> None:
    self.operands, self.values = operands, {product}
    self.totals, self.offset, self.clipped = set[Any](), set[Any](), set[Any]()
    self.squares = set[Any]()
    self.has_rows, self.is_joined = True, False

  def reads(self, eqn: JaxprEqn, found: set[Any]) -> bool:
    """Whether an equation reads some of it."""
    return not found.isdisjoint(variables_of(eqn.invars))

  def add(self, eqn: JaxprEqn, held: set[str]) -> None:
    """Takes in what an equation makes, which holds some primitives."""
    self.values.update(eqn.outvars)
    for found, names in (
      (self.totals, _TOTALS),
      (self.offset, ()),
      (self.clipped, BOUNDS),
      (self.squares, _SQUARES),
    ):
      if not held.isdisjoint(names) or self.reads(eqn, found):
        found.update(eqn.outvars)


def _has_rows(matmul: JaxprEqn) -> bool:
  """Whether a matrix is multiplied with several rows; a convolution is, everywhere."""
  if matmul.primitive.name != "dot_general":
    return True
  return all(any(size != 1 for size in matmuls.free(matmul, n)) for n in (0, 1))


UNIT = 2
"""From where on a number that is added is one of a unit, as 293 kelvin."""

_LOOKS, _STEPS = 256, 128
"""How many equations behind a product are looked at, and before what is added to it."""

_LOGARITHMS, _ROOTS = having(Trait.LOGARITHM), frozenset({"sqrt", "rsqrt", "pow"})
_ACTIVATES = having(Trait.TRANSCENDENTAL) - _LOGARITHMS - _ROOTS
_SQUARES = frozenset({"square", "integer_pow"})
_MAKES_HIDDEN = _ACTIVATES | BOUNDS | COMPARES | {"rsqrt"}
_LINEAR = ADDS | SCALES | {"neg", "concatenate", "slice"}
_TOTALS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_LEADS_ON = (
  (KEEPS_NUMBERS - having(Trait.ORDERS))
  | _TOTALS
  | BOUNDS
  | {"neg", "abs", "square", "integer_pow", "cumsum", "add_any"}
)
