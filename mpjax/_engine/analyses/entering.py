"""What enters the bodies that a jaxpr holds: what is known of their operands and results there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mpjax._core.primitives import CALLS, MATMULS
from mpjax._engine.analyses.knowledge import Knowledge
from mpjax._engine.analyses.known import Known
from mpjax._engine.analyses.linear_recurrences import Recurrence
from mpjax._engine.analyses.made_of import is_computed
from mpjax._engine.analyses.near_one import Exact
from mpjax._engine.analyses.power_iteration import Own
from mpjax._engine.analyses.roles import Indices
from mpjax._engine.analyses.sums import is_matrix, is_vector, multiplied
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import HAVE_BODIES, Body, bodies_of, repetitions
from mpjax._engine.program.kinds import DATA, PARAM, Forms, Kind, is_narrow
from mpjax._engine.program.versions import Atom, JaxprEqn


class Entering:
  """Hands on what is known of one jaxpr to the bodies in it.

  Args:
    around: What is known of the jaxpr.
  """

  def __init__(self, around: Knowledge) -> None:
    self._around, self._analyses = around, around.analyses

  def of_call(self, eqn: JaxprEqn, body: Body, forms: Forms, is_plain: bool) -> Known:
    """What is known in a body that runs once.

    Args:
      eqn: The equation.
      body: Its body.
      forms: How the body's operands are held.
      is_plain: Whether no rules stand beside it, as a user's own derivative.
    """
    own: Own[int] = self._around.own.among(eqn.invars) if is_plain else Own()
    known = self._entering(eqn, body, forms, own, *self._exact_of(eqn))
    return known if is_plain else known._replace(has_rule=True)

  def of_branches(self, eqn: JaxprEqn, forms: Forms) -> list[Known]:
    """What is known in each branch of a ``cond``, whose own operands are held so."""
    pairs = zip(bodies_of(eqn), self._exact_of(eqn), strict=True)
    own = self._around.own.among(eqn.invars[1:])
    return [self._entering(eqn, body, forms, own, exact) for body, exact in pairs]

  def of_loop(self, eqn: JaxprEqn, forms: Forms) -> Known:
    """What is known in every turn of the body of a loop, whose own operands are held so."""
    body, exact = bodies_of(eqn)[-1], self._exact_of(eqn)[-1]
    # Only a scan has the state of a model in it.
    is_scan = eqn.primitive.name == "scan"
    own: Own[int] = self._around.own.among(eqn.invars).without(body.carry) if is_scan else Own()
    known = self._entering(eqn, body, forms, own, exact)
    pairs = zip(versions.open_jaxpr(body.jaxpr).invars, forms, strict=True)
    others = {n: var for n, (var, form) in enumerate(pairs) if form in (PARAM, DATA)}
    matrices = [n for n, var in others.items() if forms[n] == PARAM and is_matrix(var)]
    weights = multiplied(body.jaxpr, matrices, range(body.carry.start), body.carry)
    is_stack = any(n >= body.carry.stop for n in weights)  # of layers: each turn has its own
    is_solver, recurrences = not matrices and _ends_by("f", eqn), self._analyses.recurrences
    given = range(body.carry.start if is_solver else 0)
    first = body.take(eqn.invars)
    began = (n for n in body.carry if not self._around.sums.may_be_of_layers([first[n]]))
    recurrence = recurrences.of_loop(eqn, body, self._around.recurrence)
    return known._replace(
      sums=known.sums.every_turn(body, others.keys() - weights),
      numbers=tuple(None if n in body.carry else x for n, x in enumerate(known.numbers)),
      carry=body.carry,
      began=frozenset(began),
      is_to_tolerance=known.is_to_tolerance or _ends_by(_OF_FLOATS, eqn),
      features=known.features.union(n for n in given if is_narrow(forms[n])),
      tested=known.tested | self._tested(eqn, body),
      recurrence=Recurrence() if is_stack else recurrence,
      steady=() if is_stack else _steady(eqn, body, forms),
    )

  def _tested(self, eqn: JaxprEqn, body: Body) -> frozenset[int]:
    """Which constants of a loop's body its test reads, too, if that multiplies for a residual."""
    (test, *_), contents = bodies_of(eqn), self._analyses.contents
    if not (test.is_test and contents.matmuls(test.jaxpr) and contents.any_of({"sub"}, test.jaxpr)):
      return frozenset()
    read = jaxprs.variables_of(test.split(eqn.invars).consts)
    return jaxprs.places_of(body.split(eqn.invars).consts, read)

  def of_test(self, eqn: JaxprEqn, test: Body) -> Known:
    """What is known in the test of a loop."""
    made = self._analyses.makings.entering(eqn, test, self._around.made)
    return Known(self._exact_of(eqn)[0], made=made, is_test=True)

  def _exact_of(self, eqn: JaxprEqn) -> tuple[Exact, ...]:
    return self._around.exact_inside.get(id(eqn)) or (Exact(),) * len(bodies_of(eqn))

  def _entering(
    self, eqn: JaxprEqn, body: Body, forms: Forms, own: Own[int], exact: Exact
  ) -> Known:
    atoms, analyses = body.take(eqn.invars), self._analyses
    numbers = tuple(self._around.numbers.of(atom) for atom in atoms)
    sums = self._around.sums.entering(eqn, body, forms)
    factored = self._around.leading.factored.union(self._around.solutions.beside)
    leading = self._around.leading._replace(factored=factored)
    return Known(
      exact=exact,
      sums=sums,
      made=analyses.makings.entering(eqn, body, self._around.made),
      leading=analyses.needs.entering(eqn, leading),
      moments=jaxprs.ordered_places(eqn.outvars, self._around.moments.values),
      of_numbers=self._of_numbers_in(body, atoms, forms, sums.of_parameters),
      made_before=self._around.iterations.entering(body, atoms, forms),
      numbers=numbers if any(n is not None for n in numbers) else (),
      own=own,
      logarithms=jaxprs.ordered_places(eqn.outvars, self._around.logarithms),
      heads=_places(self._around.is_head, atoms),
      steady=jaxprs.ordered_places(atoms, self._around.frame.steady),
      recurrence=analyses.recurrences.entering(eqn, body, self._around.recurrence),
      is_test=self._around.is_test,
      is_to_tolerance=self._around.is_to_tolerance,
      features=frozenset(_places(self._around.is_feature, atoms)),
      has_rule=self._around.has_rule,
      tested=jaxprs.places_of(atoms, self._around.tested),
      systems=jaxprs.places_of(atoms, self._around.solutions.values),
      subtracted=self._subtracted_from(eqn, body, forms),
      outputs=self._outputs_of(eqn, body),
    )

  def _outputs_of(self, eqn: JaxprEqn, body: Body) -> frozenset[int]:
    """Which results of a body no layer comes after and a loss is made of, if it adds up."""
    if eqn.primitive.name not in _HOLD_LOSSES or not self._analyses.contents.sums(body.jaxpr):
      return frozenset()
    found = frozenset(n for n, var in enumerate(eqn.outvars) if self._around.is_output(var))
    if not any(n < len(body.carry) for n in found):
      return found
    others = frozenset(range(len(eqn.outvars))) - found
    return found - _leading_on(body, others)[1]

  def _subtracted_from(self, eqn: JaxprEqn, body: Body, forms: Forms) -> frozenset[int]:
    """Which results of a call end in a difference, if it may multiply data by a matrix of data."""
    if eqn.primitive.name not in CALLS or DATA not in forms:
      return frozenset()
    if not self._analyses.contents.matmuls(body.jaxpr):
      return frozenset()
    return self._around.data_transforms.subtracted_from(eqn)

  def _of_numbers_in(
    self, body: Body, atoms: Sequence[Atom], forms: Forms, of_parameters: frozenset[int]
  ) -> frozenset[int]:
    matrices = [
      n
      for n, form in enumerate(forms)
      if form is not None
      and form.kind in (Kind.CONSTANT, Kind.DATA)
      and n not in of_parameters
      and n not in body.carry
      and len(jaxprs.shape(atoms[n])) > 1
    ]
    if not matrices or not self._analyses.contents.matmuls(body.jaxpr):
      return frozenset()
    makers = self._around.frame.makers
    return frozenset(n for n in matrices if is_computed(atoms[n], makers, self._around.of_numbers))


_HOLD_LOSSES = CALLS | {"scan", "cond", "shard_map"}
_LAYERS = 16
"""As many turns as a loop has that is a network with the same weights in each layer."""
_OF_FLOATS = "fb"
"""A loop may carry a float, or what it said of one."""


def _leading_on(body: Body, results: Indices) -> tuple[Indices, Indices]:
  """Which operands of a body lead to matmuls or to certain results, and to which with what recurs.

  What one turn of a loop makes of such an operand, the next one reads.
  """
  inner = versions.open_jaxpr(body.jaxpr)
  while True:
    found = jaxprs.variables_of(inner.outvars[n] for n in results)
    for eqn in reversed(inner.eqns):
      bodies = bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ()
      outs = jaxprs.places_of(eqn.outvars, found)
      for own in bodies:
        places, _ = _leading_on(own, frozenset() if own.is_test else outs)
        found |= jaxprs.variables_of(eqn.invars[own.operands[n]] for n in places)
      if eqn.primitive.name in MATMULS or (outs and not bodies):
        found |= jaxprs.variables_of(eqn.invars)
    operands = jaxprs.places_of(inner.invars, found)
    again = {n for n, place in enumerate(body.carry) if place in operands} - results
    if not again:
      return operands, results
    results = results | again


def _places(is_one: Callable[[Atom], bool], atoms: Sequence[Atom]) -> tuple[int, ...]:
  return tuple(n for n, atom in enumerate(atoms) if is_one(atom))


def _steady(eqn: JaxprEqn, body: Body, forms: Forms) -> tuple[int, ...]:
  """Which floats are the same in every turn of a loop: scalars, vectors of a long one, too."""
  is_long = (repetitions(eqn) or math.inf) > _LAYERS  # with a step for each channel
  is_steady = is_vector if is_long else lambda atom: not jaxprs.shape(atom)
  consts = zip(body.take(eqn.invars)[: body.carry.start], forms, strict=False)
  return tuple(n for n, (a, form) in enumerate(consts) if form is not None and is_steady(a))


def _ends_by(kinds: str, loop: JaxprEqn) -> bool:
  """Whether a loop goes on or ends by something of certain kinds that it carries."""
  test, *_ = bodies_of(loop)
  if not test.is_test:
    return False
  carry = test.split(range(len(loop.invars))).carry
  found = [n in carry and jaxprs.kind(loop.invars[n]) in kinds for n in test.operands]
  return any(jaxprs.depending(test.jaxpr, found))
