"""Matmuls through which a long loop hands on what it carries, with nothing but linear operations.

``v = r + 0.99 * (p @ v)``, ``x = x + dt * (a @ x)``, conjugate gradients: what 16 bits round of the
operand in one turn is there in every later one, and adds up to more than is added. No activation
forgets it, as in a recurrent network, and no weights of its own, as in a layer of a stack. So such
a matmul is float32 in more than 128 turns, or in more than 16 where it multiplies nothing that a
layer made, a Kalman filter; turns of the loops around that hand on the same count. So is one of two
values that the loop carries, neither of which a layer made, as ``h @ s`` of a quasi-Newton method.
A gradient leads to what is trained, which does not depend on it so. Nor does what goes round by way
of an activation: ``v = 0.9 * v + r @ w`` with ``r = tanh(v)``, however much of it the loop carries.
A logsumexp is none: it hands on the largest of what it is taken of.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from mpjax._core.primitives import (
  KEEPS_NUMBERS,
  MATMULS,
  RULES,
  SCALES,
  UNCHANGED,
  Rule,
  Trait,
  having,
)
from mpjax._core.scopes import is_backward
from mpjax._engine.analyses.contents import SOLVES, Contents
from mpjax._engine.analyses.loop_carries import TERMS
from mpjax._engine.program import jaxprs, matmuls, versions
from mpjax._engine.program.bodies import Body, bodies_of, repetitions
from mpjax._engine.program.jaxprs import ordered_places, places_of, variables_of
from mpjax._engine.program.kinds import FEW
from mpjax._engine.program.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var

T = TypeVar("T")

_LINEAR = UNCHANGED | {
  *("add", "sub", "add_any", "neg", "reduce_sum"),
  *("reduce_max", "reduce_min"),  # of the values of actions: no nearer to each other than these
  "stop_gradient",  # a logsumexp is the largest and what is above that
}


class Recurrence(NamedTuple, Generic[T]):
  """What a loop hands on, in one jaxpr: operands and results by index, or variables.

  Attributes:
    reads: What depends on what the loop carries.
    linear: What depends on it linearly, on some way; by products, quotients and roots, too, where
      the loop solves.
    leads: What linear operations lead from to what the next turn is given.
    turns: How often that is handed on.
    solves: Whether a linear system of what the loop carries is solved in every turn.
  """

  reads: Collection[T] = ()
  linear: Collection[T] = ()
  leads: Collection[T] = ()
  turns: float = 0
  solves: bool = False

  def is_long(self, *, has_layer: bool) -> bool:
    """Whether what rounds of it adds up to more than other values lose in 16 bits."""
    return self.turns > (TERMS if has_layer else FEW)


class Recurrences:
  """Finds what loops hand on in jaxprs; what is known of one is kept.

  Args:
    contents: Tells what jaxprs hold.
  """

  def __init__(self, contents: Contents) -> None:
    self._contents = contents
    self._found: dict[Any, Recurrence[Any]] = {}
    self._bits: dict[Any, Mapping[Var, int]] = {}

  def of_loop(self, eqn: JaxprEqn, body: Body, around: Recurrence[Any]) -> Recurrence[int]:
    """What is known of the operands and results of a loop's body.

    Args:
      eqn: The loop.
      body: Its body.
      around: What loops around it hand on, in the jaxpr that it stands in.
    """
    count = repetitions(eqn)
    turns = math.inf if count is None else count
    own = Recurrence[int]()
    if body.carry and turns > FEW:
      start = body.carry.start
      masks = self._linear(body.jaxpr, body.carry, {n: 1 << n - start for n in body.carry})
      inner = versions.open_jaxpr(body.jaxpr)
      floats = tuple(n for n in body.carry if jaxprs.is_float32(inner.invars[n]))  # no counters
      made = inner.outvars[: len(body.carry)]
      after = [0 if isinstance(var, Literal) else masks.get(var, 0) for var in made]
      again = _that_return(after)
      solves = self._contents.solutions(body.jaxpr) and self._solves(body.jaxpr, floats)
      own = Recurrence(floats, tuple(start + n for n in again), again, turns, solves)
    if own.turns > TERMS or not around.leads:
      return own
    outer = self.entering(eqn, body, around)
    if not outer.linear or not outer.leads:
      return own
    is_handed_on = not {*outer.linear}.isdisjoint(body.carry)
    return outer._replace(turns=outer.turns * max(1, turns if is_handed_on else 1))

  def entering(self, eqn: JaxprEqn, body: Body, around: Recurrence[Any]) -> Recurrence[int]:
    """What is known of the operands and results of a body that loops around it hand on.

    In every turn, if it is that of a loop itself.
    """
    if not around.leads:
      return Recurrence()
    atoms = body.take(eqn.invars)
    inside = Recurrence(
      ordered_places(atoms, around.reads),
      ordered_places(atoms, around.linear),
      ordered_places(eqn.outvars, around.leads),
      around.turns,
      around.solves,
    )
    inner, carry = versions.open_jaxpr(body.jaxpr), body.carry
    while carry:
      found = self.variables(body.jaxpr, inside)
      made = places_of(inner.outvars[: len(carry)], found.linear)
      again = {n for n, place in enumerate(carry) if inner.invars[place] in found.leads}
      grown = inside._replace(
        reads=tuple(sorted({*inside.reads, *(carry if inside.reads else ())})),
        linear=tuple(sorted({*inside.linear, *(carry[n] for n in made)})),
        leads=tuple(sorted({*inside.leads, *again})),
      )
      if grown == inside:
        break
      inside = grown
    return inside

  def _solves(self, jaxpr: AnyJaxpr, carried: Collection[int]) -> bool:
    """Whether a linear system, or a factorization, of what a loop carries stands in its body."""
    inner = versions.open_jaxpr(jaxpr)
    reads = {inner.invars[n] for n in carried}
    for eqn in inner.eqns:
      if not reads.isdisjoint(variables_of(eqn.invars)):
        reads |= {*eqn.outvars}
        held = (self._contents.solutions(own.jaxpr) for own in bodies_of(eqn))
        if eqn.primitive.name in SOLVES or any(held):
          return True
    return False

  def variables(self, jaxpr: AnyJaxpr, known: Recurrence[int]) -> Recurrence[Any]:
    """The variables of a jaxpr that stand between what a loop is given and what it hands on.

    Args:
      jaxpr: A jaxpr, the body of a loop or of a call in one.
      known: What is known of its operands and results.
    """
    if not known.linear or not known.leads:
      return Recurrence()
    key = id(jaxpr), known
    if key not in self._found:
      inner = versions.open_jaxpr(jaxpr)
      reads = {inner.invars[n] for n in known.reads}
      for eqn in inner.eqns:
        if not reads.isdisjoint(variables_of(eqn.invars)):
          reads.update(eqn.outvars)
      linear: Collection[Var] = self._algebraic(inner, known.linear) if known.solves else ()
      linear = linear or self._linear(jaxpr, known.reads, dict.fromkeys(known.linear, 1)).keys()
      leads, finite = variables_of(inner.outvars[n] for n in known.leads), _tests_of_finite(inner)
      for eqn in reversed(inner.eqns):
        if not leads.isdisjoint(eqn.outvars) and not is_backward(eqn.source_info.name_stack):
          around = Recurrence(reads, linear, leads)
          leads |= variables_of(self._leading_operands(eqn, around, finite))
      self._found[key] = Recurrence(reads, linear, leads, known.turns, known.solves)
    return self._found[key]

  def _algebraic(self, inner: Jaxpr, carried: Collection[int]) -> set[Var]:
    """What depends on what a loop carries by arithmetic and linear systems, and no activation."""
    found = {inner.invars[n] for n in carried}
    for eqn in inner.eqns:
      if not found.isdisjoint(variables_of(eqn.invars)):
        held = [self._contents.primitives(body.jaxpr) for body in bodies_of(eqn)]
        if all(map(_solves_or_computes, held)) if held else eqn.primitive.name in _ALGEBRAIC:
          found |= {*eqn.outvars}
    return found

  def _linear(
    self, jaxpr: AnyJaxpr, carried: Collection[int], masks: Mapping[int, int]
  ) -> Mapping[Var, int]:
    """What in a jaxpr depends linearly on some of its operands, on some way.

    Args:
      jaxpr: The jaxpr.
      carried: Which operands depend on what a loop carries.
      masks: The bits of such operands, by index.

    Returns:
      The variables, with the bits of all such operands.
    """
    key = id(jaxpr), frozenset(carried), frozenset(masks.items())
    if key not in self._bits:
      inner = versions.open_jaxpr(jaxpr)
      reads = {inner.invars[n] for n in carried}
      found = {inner.invars[n]: bits for n, bits in masks.items()}
      finite = _tests_of_finite(inner)
      for eqn in inner.eqns:
        if reads.isdisjoint(variables_of(eqn.invars)):
          continue
        if _is_entered(eqn):
          made = self._linear_results(eqn, reads, found)
        else:
          own = _bits_of(eqn.invars, found) if _is_linear(eqn, reads, finite) else {}
          made = {0: functools.reduce(operator.or_, own.values())} if own else {}
        found |= {eqn.outvars[n]: bits for n, bits in made.items()}
        reads.update(eqn.outvars)
      self._bits[key] = found
    return self._bits[key]

  def _linear_results(
    self, eqn: JaxprEqn, reads: Collection[Var], found: Mapping[Var, int]
  ) -> dict[int, int]:
    """Which results of a call or a loop depend linearly on what is carried, with their bits."""
    body = bodies_of(eqn)[-1]
    atoms, carry = body.take(eqn.invars), body.carry
    bits, carried = _bits_of(atoms, found), places_of(atoms, reads)
    carried |= frozenset(carry if not carried.isdisjoint(carry) else ())
    while True:
      inside = self._linear(body.jaxpr, carried, bits)
      made = _bits_of(versions.open_jaxpr(body.jaxpr).outvars, inside)
      again = {carry[n]: made[n] | bits.get(carry[n], 0) for n in made if n < len(carry)}
      if bits | again == bits:
        return made
      bits |= again

  def _leading_operands(
    self, eqn: JaxprEqn, around: Recurrence[Any], finite: Sequence[Var]
  ) -> Sequence[Any]:
    """The operands from which linear operations lead to results that are handed on."""
    if _is_entered(eqn):
      body = bodies_of(eqn)[-1]
      inside = self.variables(body.jaxpr, self.entering(eqn, body, around))
      invars = versions.open_jaxpr(body.jaxpr).invars
      return [eqn.invars[body.operands[n]] for n in places_of(invars, inside.leads)]
    return eqn.invars if _is_linear(eqn, around.reads, finite) else ()


def _solves_or_computes(held: set[str]) -> bool:
  """Whether a function with these primitives solves a linear system, or has no activation."""
  return not held.isdisjoint(SOLVES) or held.isdisjoint(_ACTIVATIONS)


_ALGEBRAIC = (
  KEEPS_NUMBERS
  | SOLVES
  | MATMULS
  | _LINEAR
  | {"mul", "div", "sqrt", "rsqrt", "integer_pow", "square"}
)
_ACTIVATIONS = (having(Trait.TRANSCENDENTAL) | {"max"}) - _ALGEBRAIC


def _that_return(made: Sequence[int]) -> tuple[int, ...]:
  """Which of some values come back to themselves, given a bit for each that one is made of."""
  found = list(made)
  for n in range(len(found)):  # Warshall 1962, "A theorem on Boolean matrices"
    found = [bits | found[n] if bits >> n & 1 else bits for bits in found]
  return tuple(n for n, bits in enumerate(found) if bits >> n & 1)


def _bits_of(atoms: Sequence[Atom], found: Mapping[Var, int]) -> dict[int, int]:
  """The bits of those of some operands or results that have any, by index."""
  return {n: found[v] for n, v in enumerate(atoms) if not isinstance(v, Literal) and v in found}


def _is_linear(eqn: JaxprEqn, reads: Collection[Any], finite: Sequence[Var]) -> bool:
  """Whether an equation is linear in those of its operands that depend on what a loop carries.

  A matmul is in each of two, as in a state that a gain of the same turn multiplies. A quotient
  hands on what rounds below its line as what rounds above: Sinkhorn's ``u = a / (k @ v)``. So does
  the choice of what is finite, as a logsumexp makes it. Any other is an activation, or a mask.

  Args:
    eqn: The equation.
    reads: What depends on what the loop carries.
    finite: What tells which values are finite.
  """
  name, places = eqn.primitive.name, places_of(eqn.invars, reads)
  if name in SCALES:
    return len(places) == 1
  if name in ("max", "min"):  # as a logsumexp keeps the largest from being less than all numbers
    return any(isinstance(a, Literal) and np.isinf(a.val) for a in eqn.invars)
  if name == "select_n":
    return eqn.invars[0] in finite
  return name in _LINEAR or name in MATMULS


def _tests_of_finite(inner: Jaxpr) -> list[Var]:
  """What tells which values are finite."""
  return [var for eqn in inner.eqns if eqn.primitive.name == "is_finite" for var in eqn.outvars]


def _is_entered(eqn: JaxprEqn) -> bool:
  """Whether what linear operations do in the bodies of an equation is looked at."""
  return RULES.get(eqn.primitive.name) in _ENTERED


_ENTERED = frozenset({Rule.CALL, Rule.SCAN, Rule.WHILE})


def powers(inner: Jaxpr, carried: Collection[Var]) -> frozenset[Var]:
  """The products of powers of a square matrix, as squaring it again and again makes them.

  Not that of ``a @ a`` alone, if no loop hands it on.

  Args:
    inner: A jaxpr.
    carried: What a loop hands on to it.
  """
  bases: dict[Var, Atom] = {}
  again = set[Var](carried)
  for eqn in inner.eqns:
    if eqn.primitive.name == "dot_general" and matmuls.is_square_product(eqn):
      first, second = [a if isinstance(a, Literal) else bases.get(a, a) for a in eqn.invars]
      if first is second:
        bases[eqn.outvars[0]] = first
        read = variables_of(eqn.invars)
        again |= {*eqn.outvars, *(read & bases.keys())} if read & (again | bases.keys()) else set()
  return frozenset(bases.keys() & again)
