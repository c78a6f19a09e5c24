"""Where values of a jaxpr lead, found before any equation is decided.

Which are added up, and by which matmuls; which are factored, or lead into a logarithm.

``w - rate * (x.T @ error)``: the matmul returns the float32 that it adds up in, since its result is
added to the parameter that it came from, or is the gradient of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core import scopes
from mpjax._core.primitives import MATMULS, RULES, Rule, Trait, having
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.jaxprs import variables_of
from mpjax._engine.made_of import SOLVES, weights_of
from mpjax._engine.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var

Indices = tuple[int, ...]

_WEIGHTED = "weighted sum"
"""Stands beside the names of primitives for matmuls with what may be weights."""
_MAY_WEIGH = frozenset({"dot_general", "conv_general_dilated"})

_JITTED = having(Trait.JIT)
_REMATS = having(Trait.REMAT)
_SUMS = MATMULS | {"reduce_sum"}
MOVES = having(Trait.MOVES)

# What a gradient passes on its way to where it is added up.
_PASSED = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CONVERT, Rule.EACH, Rule.FULL})


class Question(NamedTuple):
  """Whether values lead somewhere.

  Attributes:
    ends: To which primitives.
    of: Of what primitives' results it is asked; of all where there are none.
    is_forward: Whether those of a backward pass are no ends.
    is_again: Whether it is asked in the body of a checkpoint's backward pass, where only those are
      ends that belong to what is computed again.
  """

  ends: frozenset[str]
  of: frozenset[str] = frozenset()
  is_forward: bool = False
  is_again: bool = False


LOGARITHMS = Question(having(Trait.LOGARITHM))
"""What leads into a logarithm."""

FACTORED = Question(having(Trait.FACTORS))
"""What leads into the factorization of a matrix."""

_MULTIPLY = MATMULS | {name for name, rule in RULES.items() if rule is Rule.MARKER}
MULTIPLIED = Question(_MULTIPLY, MATMULS | {"gather"}, is_forward=True)
"""What a matmul multiplies: a stream, rows of an embedding; none of a mesh, no result of a head."""

_NOWHERE = Question(frozenset())


class Needs:
  """What is asked of the values of jaxprs; what is known of one is kept.

  Args:
    table: The rule of each primitive.
  """

  def __init__(self, table: Mapping[str, Rule]) -> None:
    self._table = table
    self._ends: dict[Any, tuple[frozenset[Var], frozenset[int]]] = {}
    self._names: dict[int, set[str]] = {}
    self._heads: dict[Any, tuple[frozenset[Var], frozenset[int]]] = {}

  def summed(
    self,
    inner: Jaxpr,
    parameters: Indices,
    kin: Sequence[int],
    of_parameters: Collection[int],
    outs: Indices,
    given_back: Indices,
    is_backward: Callable[[JaxprEqn], bool],
  ) -> Sums:
    """The updates of parameters in a jaxpr, and the matmuls whose results are added up.

    Args:
      inner: An open jaxpr.
      parameters: Which of its operands are parameters.
      kin: For each operand from which parameters it was computed: a bit for each of them; none
        where nothing is known.
      of_parameters: Which operands were computed from a parameter at all.
      outs: Which of its results are gradients if they come out of a backward pass.
      given_back: Which of its results are a state among the parameters that is returned.
      is_backward: Whether an equation came from transposing.
    """
    origins = dict(zip(inner.invars, kin or [0] * len(inner.invars), strict=True))
    for n in of_parameters:
      origins[inner.invars[n]] |= _OUTSIDE
    pure: dict[Any, int] = {}
    for n in parameters:
      pure[inner.invars[n]] = origins[inner.invars[n]] = 1 << n
    updates: dict[Any, Any] = {}
    others: dict[Any, Any] = {}
    stack, born = None, 0
    for eqn in inner.eqns:
      read = [a for a in eqn.invars if not isinstance(a, Literal)]
      if eqn.source_info.name_stack is not stack:  # many that follow each other share one
        stack, born = eqn.source_info.name_stack, _BORN if is_backward(eqn) else 0
      origin = born
      for atom in read:
        origin |= origins.get(atom, 0)
      for var in eqn.outvars:
        origins[var] = origin
      if read and pure.keys() >= {*read}:
        pure |= dict.fromkeys(eqn.outvars, origin & ~_BORN)
      elif eqn.primitive.name in ("add", "sub", "add_any") and len(read) == 2:
        for target, change in (read, read[::-1]):
          if _adds_to(eqn, target, pure, inner.invars) and change not in pure:
            related = origins.get(change, 0) & (pure[target] | _BORN)
            whole = related and _is_whole(target, pure[target], inner.invars)
            (updates if whole else others)[eqn.outvars[0]] = change
    states = self._leading(inner, {}, given_back, through_calls=True) if given_back else {}
    updates |= {var: change for var, change in others.items() if var in states}
    leading = self._leading(inner, updates, outs)
    return Sums(pure, origins, frozenset(updates), leading, states)

  def _leading(
    self, inner: Jaxpr, updates: Mapping[Any, Any], outs: Indices, *, through_calls: bool = False
  ) -> dict[Any, bool]:
    """The variables that are added up by and by, with whether in an update: else in a result."""
    results = [inner.outvars[n] for n in outs if n < len(inner.outvars)]
    found = {var: False for var in results if not isinstance(var, Literal)}
    found |= dict.fromkeys(updates.values(), True)
    for eqn in reversed(inner.eqns):
      leads = [found[var] for var in eqn.outvars if var in found]
      read = eqn.invars if leads and self._table.get(eqn.primitive.name) in _PASSED else []
      if leads and through_calls and eqn.primitive.name in _JITTED:
        results = jaxprs.places_of(eqn.outvars, found)
        read = [eqn.invars[n] for n in self._through_bodies(_NOWHERE, eqn, results)[0]]
      for atom in read:
        if not isinstance(atom, Literal):
          found[atom] = found.get(atom, False) or any(leads)
    return found

  def logarithms(self, jaxpr: AnyJaxpr, outs: frozenset[int]) -> frozenset[Var]:
    """The variables of a jaxpr that lead into a logarithm, with no matmul between.

    Args:
      jaxpr: The jaxpr.
      outs: Which of its results do so outside.
    """
    return self._into(LOGARITHMS, jaxpr, outs)[0]

  def leading(self, question: Question, jaxpr: AnyJaxpr, outs: frozenset[int]) -> frozenset[Var]:
    """The variables of a jaxpr that lead where a question asks, with no matmul between.

    Args:
      question: What is asked.
      jaxpr: The jaxpr.
      outs: Which of its results do so outside.
    """
    asked = (outs and not question.of) or self._holds(question, jaxpr)
    return self._into(question, jaxpr, outs)[0] if asked else frozenset()

  def leading_from_bodies(
    self, question: Question, eqn: JaxprEqn, found: frozenset[Var]
  ) -> frozenset[int]:
    """Which results of an equation's bodies lead where a question asks, in them or outside.

    Args:
      question: What is asked.
      eqn: The equation.
      found: The variables that do outside.
    """
    results = jaxprs.places_of(eqn.outvars, found)
    held = any(self._holds(question, body.jaxpr) for body in bodies_of(eqn))
    if not held:
      return frozenset() if question.of else results
    return self._through_bodies(question, eqn, results)[1]

  def _holds(self, question: Question, jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr, or a body in it, holds what a question is about."""
    return not self._primitives(jaxpr).isdisjoint(question.of or question.ends)

  def may_multiply(self, jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr, or a body in it, holds a matmul."""
    return not self._primitives(jaxpr).isdisjoint(MATMULS)

  def may_solve(self, jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr, or a body in it, solves a linear system or decomposes a matrix."""
    return not self._primitives(jaxpr).isdisjoint(SOLVES)

  def may_weigh(self, jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr, or a body in it, holds a matmul or convolution with what may be weights."""
    return _WEIGHTED in self._primitives(jaxpr)

  def holds_sum(self, eqn: JaxprEqn) -> bool:
    """Whether an equation is a sum or a matmul, or a call of a function that holds one."""
    if eqn.primitive.name not in _JITTED:
      return jaxprs.operation(eqn) in _SUMS
    (body,) = bodies_of(eqn)
    return not self._primitives(body.jaxpr).isdisjoint(_SUMS)

  def _primitives(self, jaxpr: AnyJaxpr) -> set[str]:
    """The names of the primitives in a jaxpr, its bodies among it."""
    found = self._names.get(id(jaxpr))
    if found is None:
      eqns = versions.open_jaxpr(jaxpr).eqns
      self._names[id(jaxpr)] = found = {eqn.primitive.name for eqn in eqns}
      weighing = (eqn for eqn in eqns if eqn.primitive.name in _MAY_WEIGH)
      found |= {_WEIGHTED} if any(map(weights_of, weighing)) else set()
      holding = [] if found.isdisjoint(HAVE_BODIES) else eqns
      for body in (body for eqn in holding for body in bodies_of(eqn)):
        found |= self._primitives(body.jaxpr)
    return found

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
      for eqn in reversed(inner.eqns):
        name = eqn.primitive.name
        if name in HAVE_BODIES:
          results = jaxprs.places_of(eqn.outvars, found)
          read = self._through_bodies(asked_at(question, eqn), eqn, results)[0]
          found |= variables_of(eqn.invars[n] for n in read)
        elif name in question.ends:
          is_end = asked_at(question, eqn).ends and not jaxprs.is_inner(eqn)
          found |= variables_of(eqn.invars) if is_end else set()
        elif not found.isdisjoint(eqn.outvars) and self._table.get(name) in _PASSED:
          found |= variables_of(eqn.invars)
      operands = jaxprs.places_of(inner.invars, found)
      self._ends[key] = frozenset(found), operands
    return self._ends[key]

  def _through_bodies(
    self, question: Question, eqn: JaxprEqn, results: frozenset[int]
  ) -> tuple[frozenset[int], frozenset[int]]:
    """Which operands of an equation lead where a question asks, in its bodies or behind it.

    And which results do, those among them that a loop hands on to such an operand.
    """
    while True:
      needed, grown = set[int](), set(results)
      for body in bodies_of(eqn):
        _, operands = self._into(question, body.jaxpr, frozenset() if body.is_test else results)
        needed |= {body.operands[n] for n in operands}
        grown |= {n for n, own in enumerate(body.carry) if body.operands[own] in needed}
      if grown == results:
        return frozenset(needed), results
      results = frozenset(grown)


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
  return question._replace(is_again=True) if eqn.primitive.name in _REMATS else _NOWHERE


def totaled(eqns: Sequence[JaxprEqn]) -> set[Var]:
  """The variables of which a sum, a root or a logarithm is taken.

  Moved, with another sign, as a multiple, or with something added to it: ``(a * b).sum()``,
  ``sqrt(a * a + b * b + 1e-6)``.
  """
  found = set[Var]()
  for eqn in reversed(eqns):
    name = eqn.primitive.name
    if name in _TOTALS or (name in _STAYS_A_TERM and not found.isdisjoint(eqn.outvars)):
      found |= variables_of(eqn.invars)
    elif name in _SCALES and not found.isdisjoint(eqn.outvars):
      factors = variables_of(eqn.invars)
      found |= factors if len(factors) < len(eqn.invars) else set()  # by a number
  return found


_TOTALS = LOGARITHMS.ends | {"reduce_sum", "sqrt", "rsqrt"}
_SCALES = frozenset({"mul", "div"})
_STAYS_A_TERM = MOVES | {"neg", "add", "sub", "convert_element_type"}


class Sums(NamedTuple):
  """What of a jaxpr is added up.

  Attributes:
    pure: What is made of parameters alone, each with a bit for each of these.
    origins: From which parameters each variable was computed, 0 if from none; `_BORN` if in a
      backward pass, `_OUTSIDE` if from one that is no operand.
    updates: The results of adding to a parameter what was computed from it, or of adding anything
      to one that is given back.
    leading: The variables that are added up by and by, with whether in an update.
    given_back: The variables that lead to a state among the parameters that is returned.
  """

  pure: Mapping[Var, int]
  origins: Mapping[Var, int]
  updates: frozenset[Var]
  leading: Mapping[Any, bool]
  given_back: Collection[Var]

  def is_sum(self, eqn: JaxprEqn) -> bool:
    """Whether a matmul makes what is added to a parameter, or is the gradient of one."""
    (result,) = eqn.outvars
    operands = [a for a in eqn.invars if not isinstance(a, Literal)]
    if result not in self.leading or any(a in self.pure for a in operands):
      return False
    return self.leading[result] or bool(self.origins[result] & _BORN)

  def of_parameters(self, atoms: Sequence[Atom]) -> frozenset[int]:
    """Which operands of a body were computed from a parameter, or are one."""
    return frozenset([n for n, bits in enumerate(self.origins_of(atoms)) if bits])

  def may_be_weights(self, var: Var) -> bool:
    """Whether a value was computed from a parameter, and from no gradient."""
    bits = self.origins.get(var, 0)
    return bool(bits) and not bits & _BORN

  def origins_of(self, atoms: Sequence[Atom]) -> list[int]:
    """From which parameters some operands were computed."""
    return [0 if isinstance(a, Literal) else self.origins.get(a, 0) for a in atoms]

  def kin(self, atoms: Sequence[Atom]) -> tuple[int, ...]:
    """For each operand of a body from which of its parameters it was computed; none if from none.

    A parameter is one by its place among the operands.
    """
    known = self.origins_of(atoms)
    own = [0 if isinstance(a, Literal) else self.pure.get(a, 0) for a in atoms]
    bits_of = [(n, bits) for n, bits in enumerate(own) if bits]
    related = [
      (origin & _BORN) | sum([1 << n for n, bits in bits_of if bits & origin]) for origin in known
    ]
    mixed = [kin for kin, bits in zip(related, own, strict=True) if kin and not bits]
    return tuple(related) if mixed else ()


_BORN = 1 << 4096
"""The bit of what was computed in a backward pass; the others are those of parameters."""
_OUTSIDE = 1 << 4097
"""The bit of what was computed from a parameter that is no operand of the jaxpr."""


def _adds_to(eqn: JaxprEqn, var: Any, pure: Mapping[Var, int], invars: Sequence[Any]) -> bool:
  """Whether an equation adds to a parameter, or to a part of one: no bias, spread over a batch."""
  bits, size = pure.get(var, 0), jaxprs.size(eqn.outvars[0])
  return bool(bits) and jaxprs.size(var) == size <= max(_sizes(bits, invars), default=0)


def _is_whole(var: Var, bits: int, invars: Sequence[Any]) -> bool:
  """Whether a value made of parameters is as large as one of them."""
  return jaxprs.size(var) in _sizes(bits, invars)


def _sizes(bits: int, invars: Sequence[Any]) -> set[int]:
  """The sizes of the parameters that these bits stand for."""
  return {jaxprs.size(v) for n, v in enumerate(invars) if bits >> n & 1}
