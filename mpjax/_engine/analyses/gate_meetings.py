"""Where gates meet what 16 bits would round them to, in one jaxpr, whatever reads its results.

Where the highest number that a value may be (`ranges`) is about the number that it is subtracted
from or compared with, it is needed exactly; so is the gate g of ``v - g * v``, and so are two
sigmoids of which one is subtracted from the other: both lie near the end that they share. A gate
that multiplies itself, or what a long loop carries, is too, and what is divided by a sigmoid: in
float16 that is zero from an argument of -17 on. So are those that a matrix is made of which
multiplies a vector in each turn of a long loop.

A decay may be learned, or a number: in ``d * h + (1 - d) * u`` a parameter d is held in float32, so
that ``1 - d`` is exact, and would be cast where it multiplies: the two would add up to one no more,
and 0.99 would forget a sixth faster. Where what it multiplies recurs, the product is in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mpjax._core.primitives import COMPARES, CUTS, UNCHANGED
from mpjax._engine.analyses.ranges import ANYWHERE, ONE
from mpjax._engine.analyses.recomputed import same_values
from mpjax._engine.analyses.roles import Forward, Role
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.matmuls import is_of_few, operation, vector_places
from mpjax._engine.program.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

TURNS = 8
"""How often a loop may hand on a product with a gate in 16 bits.

In bfloat16 a gate near one is off by up to 1/512, in each turn in the same direction: eight turns
by a sixty-fourth, as much as other values in 16 bits are.
"""

_MEET = frozenset({"add", "sub", "mul", "dot_general", "div"}) | COMPARES
"""In what a gate may meet another value near which it lies, which recurs, or which it divides."""


class Met(NamedTuple):
  """What is needed exactly for what it meets.

  Attributes:
    exact: Values that come near what they are subtracted from, multiply themselves or what recurs,
      or divide.
    forgetting: Products that are, of a decay with what it made or with what recurs, and quotients.
  """

  exact: set[Var]
  forgetting: set[Var]


def meetings(inner: Jaxpr, forward: Forward, leading: Collection[Var]) -> Met:
  """What of a jaxpr is needed exactly for what it meets there.

  Args:
    inner: An open jaxpr.
    forward: The roles of its values.
    leading: What arithmetic leads from to what recurs.
  """
  found = _Meetings(inner, forward, leading)
  for eqn in inner.eqns if forward.roles else ():
    found.read(eqn)
  return Met(found.exact, found.forgetting)


class _Meetings:
  """Reads a jaxpr's equations one after the other."""

  def __init__(self, inner: Jaxpr, forward: Forward, leading: Collection[Var]) -> None:
    self._inner, self._forward, self._leading = inner, forward, leading
    self.exact, self.forgetting = set[Var](), set[Var]()

  @functools.cached_property
  def _same(self) -> Mapping[Var, int]:
    return same_values(self._inner)

  @functools.cached_property
  def _products(self) -> Mapping[Var, JaxprEqn]:
    likely = (eqn for eqn in self._inner.eqns if eqn.primitive.name in ("mul", "dot_general"))
    return {eqn.outvars[0]: eqn for eqn in likely if operation(eqn) == "mul"}

  @functools.cached_property
  def _cut(self) -> set[Var]:
    """What was cut from other values: halves of one swish are no powers of it."""
    found = set[Var]()
    for eqn in self._inner.eqns:
      name = eqn.primitive.name
      if name in CUTS or (name in UNCHANGED and not found.isdisjoint(variables_of(eqn.invars))):
        found |= {*eqn.outvars}
    return found

  @functools.cached_property
  def _readers(self) -> Mapping[Var, Sequence[JaxprEqn | None]]:
    """What reads each variable, None for who called the jaxpr."""
    readers: dict[Var, list[JaxprEqn | None]] = {}
    for eqn in self._inner.eqns:
      for atom in eqn.invars:
        if not isinstance(atom, Literal):
          readers.setdefault(atom, []).append(eqn)
    for atom in self._inner.outvars:
      if not isinstance(atom, Literal):
        readers.setdefault(atom, []).append(None)
    return readers

  def read(self, eqn: JaxprEqn) -> None:
    """Adds what is needed exactly in an equation."""
    name = operation(eqn) if eqn.primitive.name in _MEET else ""
    if name == "add" or name == "sub" or name in COMPARES:
      self._subtracts(eqn, "add" if name == "add" else "sub")
    elif name == "mul":
      self._multiplies(eqn)
    elif name == "dot_general":
      both = eqn.invars if self._are_neighbors(eqn) else self._transitions(eqn)
      self.exact |= variables_of(both)
    elif name == "div" and _divides_up(self._forward.of(eqn.invars[1])):
      self.exact |= variables_of(eqn.invars[1:])
      self.forgetting.update(eqn.outvars)

  def _pairs(self, eqn: JaxprEqn) -> list[tuple[Atom, Role, Role]]:
    """Each of two operands with its role and the other's."""
    (first, own), (second, other) = ((atom, self._forward.of(atom)) for atom in eqn.invars)
    return [(first, own, other), (second, other, own)]

  def _subtracts(self, eqn: JaxprEqn, name: str) -> None:
    for atom, role, other in self._pairs(eqn):
      if _is_near(role, other, name) and not self._is_slope(eqn, atom):
        self.exact |= variables_of([atom])
    if eqn.primitive.name == "sub":
      self.exact |= self._part_left(eqn)

  def _multiplies(self, eqn: JaxprEqn) -> None:
    leads, are_neighbors = eqn.outvars[0] in self._leading, self._are_neighbors(eqn)
    for atom, role, other in self._pairs(eqn):
      recurs = leads and other.turns > TURNS
      again, decays = role.products & other.products, role.is_own != other.is_own
      if (recurs and role.products and isinstance(atom, Literal)) or (again and decays):
        self.forgetting.update(eqn.outvars)
      is_power = again and not decays and self._is_power(eqn, role, other)
      if recurs or are_neighbors or is_power:
        self.exact |= variables_of([atom])

  def _is_power(self, eqn: JaxprEqn, role: Role, other: Role) -> bool:
    """Whether a product of what one gate made is one of gates, and not of parts of a value."""
    return _is_factor(role) or _is_factor(other) or self._cut.isdisjoint(variables_of(eqn.invars))

  def _are_neighbors(self, eqn: JaxprEqn) -> bool:
    """Whether one of two operands is the first and another the second of pairs."""
    first, second = (self._forward.of(atom).taken for atom in eqn.invars)
    return bool(first and second) and first | second == {0, 1}

  def _transitions(self, eqn: JaxprEqn) -> list[Atom]:
    """The matrix by which a matmul multiplies a vector that recurs, or one of each of a batch.

    Or a matrix of few numbers that does, as the covariance of a filter's state.
    """
    if eqn.outvars[0] not in self._leading:
      return []
    places = (0, 1) if is_of_few(eqn) else vector_places(eqn)
    return [eqn.invars[1 - n] for n in places if self._forward.of(eqn.invars[n]).turns > TURNS]

  def _part_left(self, eqn: JaxprEqn) -> set[Var]:
    """The gate g of ``v - g * v``, which is ``(1 - g) * v``."""
    operands = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
    if len(operands) < 2:
      return set()
    for whole, part in (operands, operands[::-1]):
      product = self._products.get(part)
      factors = [] if product is None else product.invars
      for factor, gate in zip(factors, factors[::-1], strict=True):
        if isinstance(factor, Literal) or not self._forward.of(gate).range.comes_near(ONE):
          continue
        if self._same[factor] == self._same[whole]:
          return variables_of([gate])
    return set()

  def _is_slope(self, eqn: JaxprEqn, gate: Atom) -> bool:
    """Whether ``1 - s`` only multiplies s: the derivative of a sigmoid or tanh, as JAX writes it.

    That of a tanh is ``g (1 - s) + (g (1 - s)) s`` in older versions: s multiplies a product.
    """

    def multiplies(user: JaxprEqn | None) -> bool:
      return user is not None and user.primitive.name == "mul" and gate in user.invars

    def leads_on(user: JaxprEqn | None) -> bool:
      if user is None or user.primitive.name != "mul":
        return False
      return multiplies(user) or any(map(multiplies, self._readers.get(user.outvars[0], [])))

    users = self._readers.get(eqn.outvars[0], [])
    return bool(users) and all(map(leads_on, users))


def _is_factor(role: Role) -> bool:
  """Whether something is known of a value itself: of a swish or gelu nothing is."""
  return bool(role.gates) or role.range != ANYWHERE


def _divides_up(role: Role) -> bool:
  """Whether a value is a sigmoid that may be near zero, as a probability is that one divides by."""
  return bool(role.gates) and role.range.low == 0 and role.range.high < math.inf


def _is_near(role: Role, other: Role, name: str) -> bool:
  """Whether a value comes near what it is subtracted from, or what is subtracted from it.

  What is added to a value below zero is such a value.
  """
  ranges = role.range, other.range
  if name == "add":
    below = [r.high <= 0 for r in ranges]
    if sum(below) != 1:
      return False
    ranges = tuple(r.negated if is_below else r for r, is_below in zip(ranges, below, strict=True))
  own, others = ranges
  is_from_one = others == ONE and bool(role.gates)
  of_two = bool(role.products and other.products) and own.crowds_with(others)
  return is_from_one or of_two or own.comes_near(others)
