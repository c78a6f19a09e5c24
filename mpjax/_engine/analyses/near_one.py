"""Which values 16 bits would make 1 or 0, found before any equation is decided.

``log(sigmoid(x))``, ``1 - sigmoid(x)``, a gate that multiplies itself or what a long loop carries:
the sigmoid runs in float32, for in bfloat16 it is 1 from an argument of 6.3 on, and 0.999 is 1.
A hard sigmoid, ``clip((x + 3) / 6, 0, 1)``, is arithmetic that is cut off: all of that runs in
float32. The sigmoid may stand in another body than what needs it, as the gates
do that are computed for all steps at once before the loop that they rule. A gate that is computed
twice is needed as exactly at both places: the second may be what a derivative multiplies by.

The same in other words: half of a tanh and one, a product or a mean of gates, a sigmoid times a
number. What is put in order is needed exactly, too, for the best scores of a detector are all 1 in
16 bits; so is a coordinate that was made of one, ``31 * sigmoid(h)``, from which an index comes and
a fraction, and the base of a power. What needs a gate for another value that it meets stands in
`gate_meetings`.

So a jaxpr is read twice. Forwards, for what its values are made of (`roles`). Backwards, from
what needs a value exactly to the sigmoids that elementwise operations lead to it from. Bodies are
read with the roles of their operands and the needs of their results; a loop's carry is a fixed
point of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.primitives import ADDS, BOUNDS, Rule, Trait, having
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.gate_meetings import meetings
from mpjax._engine.analyses.ranges import ONE
from mpjax._engine.analyses.recomputed import computed_again, same_values
from mpjax._engine.analyses.roles import (
  GATES,
  HAND_ON,
  NONE,
  OWN,
  POWERS,
  RECUR,
  Forward,
  Indices,
  RoleFinder,
  Roles,
)
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import HAVE_BODIES, Body, bodies_of
from mpjax._engine.program.jaxprs import kind, places_of, variables_of
from mpjax._engine.program.matmuls import operation
from mpjax._engine.program.versions import AnyJaxpr, Jaxpr, JaxprEqn, Var

_SUMMARIES = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_NEED = having(Trait.LOGARITHM | Trait.MULTIPLIES_UP | Trait.ORDERS)
_JUMPS = having(Trait.JUMPS)
_HIGH = 3
"""From which power on a number near one loses more than it does by a product with itself."""
_STEEP = having(Trait.STEEP)
_PASS_ON = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CONVERT})


class Exact(NamedTuple):
  """What of a jaxpr is needed exactly and may come near one: sigmoids, and sums with one.

  Attributes:
    values: The results of such equations.
    inside: The same of the bodies of equations, by the equation's identity; without those in
      which there are none.
    shifts: Other sums that are needed exactly: near a number, if what a layer gave is added to one.
  """

  values: frozenset[Var] = frozenset()
  inside: frozenset[tuple[int, tuple[Exact, ...]]] = frozenset()
  shifts: frozenset[Var] = frozenset()


class Needed(NamedTuple):
  """Which results of a jaxpr, or which of its operands, are needed exactly.

  Attributes:
    exact: Those that are.
    bounded: Those of them that only arithmetic and a bound lead on from, as ``x + 3`` in a hard
      sigmoid: what is lost of them is lost of it.
  """

  exact: Indices = frozenset()
  bounded: Indices = frozenset()


class NearOne:
  """Finds what is needed exactly in jaxprs; what is known of one is kept.

  Args:
    table: The rule of each primitive.
    dtypes: The 16-bit formats.
    contents: Tells what jaxprs hold.
  """

  def __init__(
    self, table: Mapping[str, Rule], dtypes: frozenset[np.dtype], contents: Contents
  ) -> None:
    self._table, self._roles, self._contents = table, RoleFinder(dtypes), contents
    self._leads: dict[Any, tuple[set[Var], Indices]] = {}
    self._backwards: dict[Any, tuple[Exact, Needed]] = {}

  def exact(
    self, jaxpr: AnyJaxpr, outs: Iterable[int] | None = None, parameters: Iterable[int] = ()
  ) -> Exact:
    """The sigmoids from which elementwise operations lead to where 16 bits would be 1 or 0.

    Args:
      jaxpr: A closed or open jaxpr that nothing else is known of the operands of.
      outs: Which of its results are needed exactly; by default those that are sigmoids, which who
        called it compares, orders or subtracts from one, but for those of a loop.
      parameters: Which of its operands are parameters.
    """
    roles = [NONE] * len(versions.open_jaxpr(jaxpr).invars)
    for n in self._roles.from_one(jaxpr)[1].intersection(parameters):
      roles[n] = OWN
    operands = tuple(roles)
    needed = frozenset(self._roles.sigmoids(jaxpr, operands) if outs is None else outs)
    return self._backward(jaxpr, operands, Needed(needed), frozenset())[0]

  # Backwards: what is needed exactly ------------------------------------------------------------

  def _leading(self, jaxpr: AnyJaxpr, recurring: Indices) -> tuple[set[Var], Indices]:
    """What arithmetic leads from to results that recur, in a jaxpr and among its operands."""
    key = id(jaxpr), recurring
    if key not in self._leads:
      inner = versions.open_jaxpr(jaxpr)
      found = variables_of(inner.outvars[n] for n in recurring)
      for eqn in reversed(inner.eqns):
        read = []
        if eqn.primitive.name in HAVE_BODIES:
          bodies = bodies_of(eqn)
          for body, outs in zip(bodies, _recurring(eqn, bodies, found), strict=True):
            read += [eqn.invars[body.operands[n]] for n in self._leading(body.jaxpr, outs)[1]]
        elif not found.isdisjoint(eqn.outvars) and operation(eqn) in HAND_ON:
          read = eqn.invars
        if read:
          found |= variables_of(read)
      self._leads[key] = found, frozenset(n for n, v in enumerate(inner.invars) if v in found)
    return self._leads[key]

  def _backward(
    self, jaxpr: AnyJaxpr, operands: Roles, outs: Needed, recurring: Indices
  ) -> tuple[Exact, Needed]:
    """What is needed exactly in a jaxpr, and which of its operands are.

    Args:
      jaxpr: The jaxpr.
      operands: The roles of its operands.
      outs: Which of its results are needed exactly.
      recurring: Which of them a loop around it hands on, whatever is done to them before.
    """
    key = id(jaxpr), operands, outs, recurring
    if key not in self._backwards:
      inner, forward = versions.open_jaxpr(jaxpr), self._roles.forward(jaxpr, operands)
      leading, _ = self._leading(jaxpr, recurring)
      found = variables_of(inner.outvars[n] for n in outs.exact)
      near, forgetting = meetings(inner, forward, leading)
      found |= near
      bounded = variables_of(inner.outvars[n] for n in outs.bounded)
      direct = {*found}
      inside, gates = self._swept(inner, forward, leading, found, bounded)
      while (inside or gates & found) and (again := computed_again(same_values(inner), found)):
        found |= again
        inside, gates = self._swept(inner, forward, leading, found, bounded)
      shifts = _shifts(inner, direct, found, self._holds_gate) if direct else set()
      values, held = frozenset(gates & found | forgetting), frozenset(inside.items())
      exact = Exact(values, held, frozenset(shifts))
      places = (places_of(inner.invars, variables) for variables in (found, bounded & found))
      self._backwards[key] = exact, Needed(*places)
    return self._backwards[key]

  def _swept(
    self,
    inner: Jaxpr,
    forward: Forward,
    leading: Collection[Var],
    found: set[Var],
    bounded: set[Var],
  ) -> tuple[dict[int, tuple[Exact, ...]], set[Var]]:
    """Adds to what is needed exactly what leads to it; returns what of bodies is, and the gates."""
    inside, gates = {}, set()
    for eqn in reversed(inner.eqns):
      if id(eqn) in forward.inside:
        results = Needed(*(places_of(eqn.outvars, variables) for variables in (found, bounded)))
        entering = forward.inside[id(eqn)]
        exact, needed = self._of_bodies(eqn, entering, results, leading)
        inside |= {id(eqn): exact} if any(map(any, exact)) else {}
        found |= variables_of(eqn.invars[n] for n in needed.exact)
        bounded |= variables_of(eqn.invars[n] for n in needed.bounded)
        continue
      is_needed = not found.isdisjoint(eqn.outvars)
      if (is_needed and _is_bound(eqn, forward)) or (bounded and _is_within(eqn, bounded)):
        bounded |= variables_of(eqn.invars)
        gates.add(eqn.outvars[0])
      elif _comes_near_one(eqn, forward):
        gates.add(eqn.outvars[0])
      if needed := self._needed(eqn, forward, is_needed=is_needed):
        found |= variables_of(needed)
    return inside, gates

  def _holds_gate(self, eqn: JaxprEqn) -> bool:
    """Whether an equation is a sigmoid, or holds one."""
    if eqn.primitive.name not in HAVE_BODIES:
      return eqn.primitive.name in GATES
    return any(self._contents.any_of(GATES, body.jaxpr) for body in bodies_of(eqn))

  def _needed(self, eqn: JaxprEqn, forward: Forward, *, is_needed: bool) -> Sequence[Any]:
    """The operands of an equation that are needed exactly, given whether a result is."""
    name = eqn.primitive.name
    if name in _NEED:
      return eqn.invars
    if name in _STEEP and forward.of(eqn.invars[0]).gates:
      return eqn.invars
    if (_jumps(eqn) or _is_high_power(eqn)) and forward.of(eqn.invars[0]).products:
      return eqn.invars
    if not is_needed:
      return ()
    passes = name in POWERS or self._table.get(operation(eqn)) in _PASS_ON
    passes = passes or (name in _SUMMARIES and forward.of(eqn.outvars[0]).range.high < math.inf)
    return eqn.invars if passes else ()

  def _of_bodies(
    self, eqn: JaxprEqn, entering: Sequence[Roles], results: Needed, leading: Collection[Var]
  ) -> tuple[tuple[Exact, ...], Needed]:
    """What is needed exactly in an equation's bodies, and which of its operands are."""
    bodies = bodies_of(eqn)
    recurring = _recurring(eqn, bodies, leading)
    while True:
      found = [
        self._backward(body.jaxpr, roles, Needed() if body.is_test else results, again)
        for body, roles, again in zip(bodies, entering, recurring, strict=True)
      ]
      pairs = list(zip(bodies, found, strict=True))
      needed = Needed(
        frozenset(body.operands[n] for body, (_, operands) in pairs for n in operands.exact),
        frozenset(body.operands[n] for body, (_, operands) in pairs for n in operands.bounded),
      )
      carries = ((n, body.operands[c]) for body in bodies for n, c in enumerate(body.carry))
      grown = results.exact | {n for n, operand in carries if operand in needed.exact}
      if grown == results.exact:
        return tuple(exact for exact, _ in found), needed
      results = results._replace(exact=grown)


def _shifts(
  inner: Jaxpr, first: set[Var], exact: set[Var], is_gate: Callable[[JaxprEqn], bool]
) -> set[Var]:
  """The sums among what is needed exactly, but for those in the argument of a sigmoid.

  Args:
    inner: The jaxpr.
    first: What is needed by itself.
    exact: And all that leads to it.
    is_gate: Whether an equation is a sigmoid, or holds one.
  """
  found, shifts = {*first}, set[Var]()
  for eqn in reversed(inner.eqns):
    if not found.isdisjoint(eqn.outvars) and not is_gate(eqn):
      found |= variables_of(eqn.invars) & exact
      shifts |= {*eqn.outvars} if eqn.primitive.name in ADDS else set()
  return shifts


def _recurring(eqn: JaxprEqn, bodies: Sequence[Body], leading: Collection[Var]) -> list[Indices]:
  """Which results of each body recur: a loop's carry, and what leads on to what does outside."""
  outer = {n for n, var in enumerate(eqn.outvars) if var in leading}
  return [
    frozenset() if body.is_test else frozenset(outer | set(range(len(body.carry))))
    for body in bodies
  ]


def _jumps(eqn: JaxprEqn) -> bool:
  """Whether an equation makes whole numbers of floats, or what is left beside these."""
  if eqn.primitive.name != "convert_element_type":
    return eqn.primitive.name in _JUMPS
  return kind(eqn.invars[0]) == "f" and kind(eqn.outvars[0]) in "iu"


def _is_high_power(eqn: JaxprEqn) -> bool:
  return eqn.primitive.name == "integer_pow" and abs(eqn.params["y"]) >= _HIGH


def _is_bound(eqn: JaxprEqn, forward: Forward) -> bool:
  """Whether an equation cuts off, as ``x / (1 + |x|)`` and clips do, what is needed exactly."""
  name = eqn.primitive.name
  if name != "div":
    return name in BOUNDS
  return forward.of(eqn.outvars[0]).range.high < forward.of(eqn.invars[0]).range.high == math.inf


def _is_within(eqn: JaxprEqn, bounded: Set[Any]) -> bool:
  """Whether an equation is part of the arithmetic that a bound cuts off."""
  return not bounded.isdisjoint(eqn.outvars) and operation(eqn) in RECUR


def _comes_near_one(eqn: JaxprEqn, forward: Forward) -> bool:
  """Whether an equation is a sigmoid, or adds to one, as a decay ``1 - rate * x`` does.

  Or divides an exponential, as a softmax does by the sum of all.
  """
  name = eqn.primitive.name
  if name in ADDS:
    return ONE in [forward.of(atom).range for atom in eqn.invars]
  return name in GATES or (name == "div" and bool(forward.of(eqn.invars[0]).gates))
