"""Where values of a jaxpr lead, found before any equation is decided.

Read backwards: which are factored, lead into a matmul or into a logarithm, in bodies and through
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from mpjax._core import scopes
from mpjax._core.primitives import (
  ADDS,
  MATMULS,
  REMATS,
  RULES,
  UNCHANGED,
  Rule,
  Trait,
  having,
)
from mpjax._engine.analyses.contents import Contents, makes_complex
from mpjax._engine.program import jaxprs, matmuls, versions
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import AnyJaxpr, Jaxpr, JaxprEqn, Var

T = TypeVar("T")

MOVES = having(Trait.MOVES)

# What a value passes on its way to where it is added up.
_PASSED = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CONVERT, Rule.EACH, Rule.FULL})


class Question(NamedTuple):
  """Whether values lead somewhere.

  Attributes:
    ends: To which primitives.
    of: Of what primitives' results it is asked; of all where there are none.
    is_forward: Whether those of a backward pass are no ends.
    is_again: Whether it is asked in the body of a checkpoint's backward pass, where only those are
      ends that belong to what is computed again.
    through_matmuls: Whether it is asked of what other matmuls multiply on the way, too.
    through_streams: Whether it is asked of what is added to another value that layers made, too.
    is_inside: Whether it is asked in a body, whose operands layers may have made.
  """

  ends: frozenset[str]
  of: frozenset[str] = frozenset()
  is_forward: bool = False
  is_again: bool = False
  through_matmuls: bool = False
  through_streams: bool = True
  is_inside: bool = False


LOGARITHMS = Question(having(Trait.LOGARITHM))
"""What leads into a logarithm."""

FACTORED = Question(having(Trait.FACTORS))
"""What leads into the factorization of a matrix."""

_PHASES = Question(frozenset({"sin", "cos", "tan", "complex", "rem", "round", "floor", "ceil"}))
"""What leads into a sine, or is a complex number, or of which no more counts than what is left."""

_FACTORED_LATER = FACTORED._replace(through_matmuls=True)

_MULTIPLY = MATMULS | {name for name, rule in RULES.items() if rule is Rule.MARKER}
MULTIPLIED = Question(_MULTIPLY, MATMULS | {"gather"}, is_forward=True)
"""What a matmul multiplies: a stream, rows of an embedding; none of a mesh, no result of a head."""

_NOWHERE = Question(frozenset())

_RETURNED = Question(frozenset(), MATMULS, through_streams=False)
"""What is returned, but for the terms of a residual stream."""


class Leading(NamedTuple, Generic[T]):
  """What leads somewhere: results of a jaxpr that do so outside, by index, or variables.

  Attributes:
    factored: What leads into the factorization of a matrix or a linear system.
    factored_later: And what does so by way of other matmuls, as ``h @ p`` of ``h @ p @ h.T``.
    phases: What leads into a sine or cosine, or is taken modulo something.
    multiplied: What leads into a matmul, if rows are looked up in the jaxpr or multiplied.
    returned: What leads to a result of the whole function, if there are matmuls; but not by way of
      a sum of values that layers made, a residual stream.
    multiplying: What asks there for what leads into a matmul.
    returning: What asks there for what is returned.
  """

  factored: frozenset[T] = frozenset()
  factored_later: frozenset[T] = frozenset()
  phases: frozenset[T] = frozenset()
  multiplied: frozenset[T] = frozenset()
  returned: frozenset[T] = frozenset()
  multiplying: Question = MULTIPLIED
  returning: Question = _RETURNED


class Needs:
  """What is asked of the values of jaxprs; what is known of one is kept.

  Args:
    table: The rule of each primitive.
    contents: Tells which primitives jaxprs hold.
  """

  def __init__(self, table: Mapping[str, Rule], contents: Contents) -> None:
    self._table, self._contents = table, contents
    self._ends: dict[Any, tuple[frozenset[Var], frozenset[int]]] = {}
    self._heads: dict[Any, tuple[frozenset[Var], frozenset[int]]] = {}

  def logarithms(self, jaxpr: AnyJaxpr, outs: frozenset[int]) -> frozenset[Var]:
    """The variables of a jaxpr that lead into a logarithm, with no matmul between.

    Args:
      jaxpr: The jaxpr.
      outs: Which of its results do so outside.
    """
    return self._into(LOGARITHMS, jaxpr, outs)[0]

  def leading(self, jaxpr: AnyJaxpr, outside: Leading[int]) -> Leading[Var]:
    """The variables of a jaxpr that lead somewhere, with no matmul between.

    Args:
      jaxpr: The jaxpr.
      outside: Which of its results do.
    """
    held = self._contents.primitives(jaxpr)

    def find(question: Question, outs: frozenset[int]) -> frozenset[Var]:
      asked = outs or not held.isdisjoint(question.of or question.ends)
      return self._into(question, jaxpr, outs)[0] if asked else frozenset()

    return _each(find, outside, outside.multiplying, outside.returning)

  def entering(self, eqn: JaxprEqn, found: Leading[Var]) -> Leading[int]:
    """Which results of an equation's bodies lead somewhere, in them or outside.

    Args:
      eqn: The equation.
      found: The variables that do outside.
    """
    held = set[str]().union(*(self._contents.primitives(body.jaxpr) for body in bodies_of(eqn)))

    def find(question: Question, found: frozenset[Var]) -> frozenset[int]:
      is_held = not held.isdisjoint(question.of or question.ends)
      if not (is_held or found):
        return frozenset()
      results = jaxprs.places_of(eqn.outvars, found)
      return self._through_bodies(question, eqn, results)[1] if is_held else results

    inside = found.returning._replace(is_inside=True)
    return _each(find, found, asked_at(found.multiplying, eqn), inside)

  def passes(self, name: str) -> bool:
    """Whether a value leads on through a primitive to where it is added up."""
    return self._table.get(name) in _PASSED

  def before(self, eqn: JaxprEqn, results: frozenset[int]) -> frozenset[int]:
    """Which operands of an equation with bodies lead to some of its results."""
    return self._through_bodies(_NOWHERE, eqn, results)[0]

  def heads(self, jaxpr: AnyJaxpr, outs: frozenset[int]) -> tuple[frozenset[Var], frozenset[int]]:
    """What is multiplied into a logarithm: operands of such matmuls, as they were before a move.

    Args:
      jaxpr: The jaxpr.
      outs: Which of its results lead into a logarithm outside.

    Returns:
      The variables, and which of them are operands of the jaxpr, by index.
    """
    key = id(jaxpr), outs
    if key not in self._heads:
      inner, into = versions.open_jaxpr(jaxpr), self.logarithms(jaxpr, outs)
      source, found = jaxprs.sources(inner, MOVES), set[Var]()
      for eqn in inner.eqns:
        results = jaxprs.places_of(eqn.outvars, into)
        read = eqn.invars if results and eqn.primitive.name in MATMULS else []
        for body in bodies_of(eqn):
          _, operands = self.heads(body.jaxpr, frozenset() if body.is_test else results)
          read = [*read, *(eqn.invars[body.operands[n]] for n in operands)]
        found |= variables_of(map(source, read))
      operands = jaxprs.places_of(inner.invars, found)
      self._heads[key] = frozenset(found), operands
    return self._heads[key]

  def _into(
    self, question: Question, jaxpr: AnyJaxpr, outs: frozenset[int]
  ) -> tuple[frozenset[Var], frozenset[int]]:
    """What leads where a question asks: variables, and operands by index."""
    key = question, id(jaxpr), outs
    if key not in self._ends:
      inner = versions.open_jaxpr(jaxpr)
      found = variables_of(inner.outvars[n] for n in outs)
      of_layers = functools.cache(functools.partial(_of_layers, inner, question, self._contents))
      for eqn in reversed(inner.eqns):
        name = eqn.primitive.name
        if name in HAVE_BODIES:
          results = jaxprs.places_of(eqn.outvars, found)
          read = self._through_bodies(asked_at(question, eqn), eqn, results)[0]
          found |= variables_of(eqn.invars[n] for n in read)
        elif name in question.ends or ("complex" in question.ends and makes_complex(eqn)):
          is_layer = not (matmuls.is_inner(eqn) or matmuls.may_transform_points(eqn))
          is_end = asked_at(question, eqn).ends and is_layer and not _comes_back_to_complex(eqn)
          found |= variables_of(eqn.invars) if is_end else set()
        elif not found.isdisjoint(eqn.outvars) and (
          self._table.get(name) in _PASSED or (question.through_matmuls and name in MATMULS)
        ):
          read = variables_of(eqn.invars)
          may_join = not question.through_streams and name in ADDS and len(read) > 1
          if not may_join or not _joins(eqn, *of_layers()):
            found |= read
      operands = jaxprs.places_of(inner.invars, found)
      self._ends[key] = frozenset(found), operands
    return self._ends[key]

  def _through_bodies(
    self, question: Question, eqn: JaxprEqn, results: frozenset[int]
  ) -> tuple[frozenset[int], frozenset[int]]:
    """Which operands of an equation lead where a question asks, in its bodies or behind it.

    And which results do, those among them that a loop hands on to such an operand.
    """
    if not question.through_streams:
      question = question._replace(is_inside=True)
    while True:
      needed, grown = set[int](), set(results)
      for body in bodies_of(eqn):
        _, operands = self._into(question, body.jaxpr, frozenset() if body.is_test else results)
        needed |= {body.operands[n] for n in operands}
        grown |= {n for n, own in enumerate(body.carry) if body.operands[own] in needed}
      if grown == results:
        return frozenset(needed), results
      results = frozenset(grown)


def _each(
  find: Callable[[Question, Any], frozenset[Any]],
  known: Leading[Any],
  multiplying: Question,
  returning: Question,
) -> Leading[Any]:
  """What is found for each question, given what is known of it."""
  return Leading(
    find(FACTORED, known.factored),
    find(_FACTORED_LATER, known.factored_later),
    find(_PHASES, known.phases),
    find(multiplying, known.multiplied),
    find(returning, known.returned),
    multiplying,
    returning,
  )


def asked_at(question: Question, eqn: JaxprEqn) -> Question:
  """What is asked at an equation, and in its bodies: nothing in a backward pass, where it says so.

  But for what a checkpoint computes again there, whose scopes tell.
  """
  if not question.is_forward:
    return question
  stack = eqn.source_info.name_stack
  if question.is_again:
    is_asked = scopes.is_forward_again(stack)
    return question._replace(is_again=False) if is_asked else _NOWHERE
  if not scopes.is_backward(stack):
    return question
  return question._replace(is_again=True) if eqn.primitive.name in REMATS else _NOWHERE


def _comes_back_to_complex(eqn: JaxprEqn) -> bool:
  """Whether a cotangent becomes complex, as that of the real part of something does: no phase."""
  stack = eqn.source_info.name_stack
  is_complex = eqn.primitive.name == "complex" or makes_complex(eqn)
  return is_complex and scopes.is_backward(stack) and not scopes.is_forward_again(stack)


def _joins(eqn: JaxprEqn, made: set[Var], operands: set[Var]) -> bool:
  """Whether layers made both terms of a sum, which is no single number.

  Args:
    eqn: The sum.
    made: What layers made in its jaxpr.
    operands: What they may have made outside, if it is as large as the sum: a bias is smaller.
  """
  size = jaxprs.size(eqn.outvars[0])
  return size > 1 and all(
    a in made or (a in operands and jaxprs.size(a) == size) for a in variables_of(eqn.invars)
  )


def _of_layers(inner: Jaxpr, question: Question, contents: Contents) -> tuple[set[Var], set[Var]]:
  """What matmuls made, and what was made of that; and the operands of a body, moved.

  What is made of these is taken for made by layers, but where it is only spread, as a bias is.
  """
  operands, found = set(inner.invars if question.is_inside else ()), set[Var]()
  for eqn in inner.eqns:
    name, read = eqn.primitive.name, variables_of(eqn.invars)
    if read and read <= operands and name in UNCHANGED:
      operands |= set() if name == "broadcast_in_dim" else {*eqn.outvars}
    elif (
      name in MATMULS
      or not (found.isdisjoint(read) and operands.isdisjoint(read))
      or (name in HAVE_BODIES and any(contents.matmuls(b.jaxpr) for b in bodies_of(eqn)))
    ):
      found |= {*eqn.outvars}
  return found, operands
