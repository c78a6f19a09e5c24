"""What is known of the values of a jaxpr before any of its equations is decided.

Some is found in the jaxpr: what leads into a logarithm, what is added up, what comes near one. The
rest comes from outside, as `Known`, through the equation that holds the jaxpr: so a body knows what
is done to its results behind it. Each kind of knowledge is found in a room of its own; here it is
gathered for one jaxpr, and handed on to the bodies that this holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT16
from mpjax._core.primitives import CALLS, Rule
from mpjax._engine.analyses.constants import (
  Adapting,
  Extremes,
  Numbers,
  NumberSet,
  extremes_of,
  numbers_of,
)
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.data_transforms import DataTransforms
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.analyses.iterations import Iterations
from mpjax._engine.analyses.linear_recurrences import Recurrence, Recurrences, powers
from mpjax._engine.analyses.lookahead import MOVES, Leading, Needs
from mpjax._engine.analyses.made_of import Made, Makings, is_computed
from mpjax._engine.analyses.moments import moments
from mpjax._engine.analyses.near_one import Exact, NearOne
from mpjax._engine.analyses.power_iteration import Own, own_variables, power_iteration
from mpjax._engine.analyses.running_sums import additions
from mpjax._engine.analyses.solutions import solutions
from mpjax._engine.analyses.sums import Summing, is_matrix, is_vector, multiplied, sums_in
from mpjax._engine.analyses.uses import Uses
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import Body, bodies_of, repetitions
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.kinds import DATA, PARAM, Forms, Kind, is_narrow
from mpjax._engine.program.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var


class Known(NamedTuple):
  """What the equation that holds a jaxpr knows of its operands and results, by index.

  Attributes:
    exact: What in it is needed exactly, see `near_one`; None where that is to be found.
    sums: What is known of sums, see `sums`.
    made: Which operands are made of something alone, see `made_of`.
    leading: Which results lead somewhere, see `lookahead`.
    moments: Which results are moments of which one is subtracted from another, see `moments`.
    of_numbers: Which operands are matrices that the program makes of numbers alone, if there are
      matmuls.
    made_before: Which operands equations made, in float32, or loops hand on, if there are matmuls.
    numbers: For each operand the numbers that occur in it, None where they are not known; empty
      if they are known of none.
    own: Which operands depend on nothing but a model's parameters and state.
    logarithms: Which results lead into a logarithm.
    heads: Which operands are multiplied into one, in it or outside.
    carry: Which operands a loop hands on from turn to turn.
    began: Which of these began as no layer's.
    subtracted: Which results end in a difference outside, as products of data, see
      `data_transforms`.
    steady: Which operands are scalars that are the same in every turn of a loop; vectors of a long
      one, too.
    recurrence: What a long loop hands on with linear operations.
    is_test: Whether it tells a loop to go on.
    is_to_tolerance: Whether it stands in a loop that ends by a float.
    features: Which operands layers gave, outside of such a loop in which there are none.
    has_rule: Whether it is of a function with a derivative rule of its user's, or of that.
    tested: Which operands a loop around it hands to a test that multiplies for a residual.
    systems: Which operands belong to a linear system outside.
  """

  exact: Exact | None = None
  sums: Summing = Summing()
  made: Made[int] = Made()
  leading: Leading[int] = Leading()
  moments: tuple[int, ...] = ()
  of_numbers: frozenset[int] = frozenset()
  made_before: frozenset[int] = frozenset()
  numbers: tuple[NumberSet, ...] = ()
  own: Own[int] = Own()
  logarithms: tuple[int, ...] = ()
  heads: tuple[int, ...] = ()
  carry: range = range(0)
  began: frozenset[int] = frozenset()
  subtracted: frozenset[int] = frozenset()
  steady: tuple[int, ...] = ()
  recurrence: Recurrence[int] = Recurrence()
  is_test: bool = False
  is_to_tolerance: bool = False
  features: frozenset[int] = frozenset()
  has_rule: bool = False
  tested: frozenset[int] = frozenset()
  systems: frozenset[int] = frozenset()


NOTHING = Known()


class Analyses:
  """What finds things out about jaxprs, under one policy map; what is found of one is kept.

  Args:
    table: The rule of each primitive.
    formats: The 16-bit formats of the policies.
    in_float8: Whether one of them multiplies in float8: then logarithms are looked for.
  """

  def __init__(
    self, table: Mapping[str, Rule], formats: frozenset[np.dtype], in_float8: bool
  ) -> None:
    self.adapting = Adapting(formats)
    self.contents = Contents()
    self.needs, self.makings = Needs(table, self.contents), Makings(self.contents)
    self.near_one, self.recurrences = NearOne(table, formats), Recurrences(self.contents)
    self.in_float8 = in_float8


class Knowledge:
  """What is known of one jaxpr.

  Args:
    analyses: What finds it out.
    jaxpr: The jaxpr.
    in_forms: How its operands are held.
    known: What is known of them and of its results outside.
    is_backward: Whether an equation stands in a backward pass.

  Attributes:
    exact: The variables that are needed exactly and may come near one.
    sums: What is added up.
    made: What is made of something alone.
    leading: What leads somewhere.
    solutions: What belongs to a linear system behind it.
    iterated: The results of the matmuls of power iterations.
    weights: What is made of parameters alone, and what gradient steps make of that.
    moments: Moments of which one is subtracted from another, and their derivatives.
    running: The results of additions that are written out term by term.
    recurrence: What stands between what a long loop is given and what it hands on.
    is_test: Whether the jaxpr tells a loop to go on.
    is_to_tolerance: Whether it stands in a loop that ends by a float.
    features: What layers gave, outside of such a loop in which there are none.
    has_rule: Whether it is of a function with a user's derivative rule, or of that.
    tested: What a loop around it hands to a test that multiplies for a residual.
    in_float16: Whether a format is float16.
    uses: What all that reads a value does with it.
    of_numbers: Operands that the program makes of numbers alone.
    iterations: What equations made, and what is multiplied by a vector again and again.
    powers: Products of powers of a matrix.
    numbers: The values of what is constant, followed as equations are decided.
    frame: What makes each variable, and which are a number.
    carried: The variables that a loop hands on from turn to turn.
    logarithms: The variables that lead into a logarithm, if float8 asks.
    adapting: Which numbers adapt to the formats of the policies.
  """

  def __init__(
    self,
    analyses: Analyses,
    jaxpr: AnyJaxpr,
    in_forms: Forms,
    known: Known,
    is_backward: Callable[[JaxprEqn], bool],
  ) -> None:
    inner = versions.open_jaxpr(jaxpr)
    self._analyses, self._jaxpr, self._inner, needs = analyses, jaxpr, inner, analyses.needs
    self.adapting = analyses.adapting
    self.numbers = _numbers(analyses.adapting, jaxpr, known)
    steady = frozenset(inner.invars[n] for n in known.steady)
    self.frame = Frame(inner, is_backward, self.numbers.number, steady=steady)
    exact = known.exact
    if exact is None:
      parameters = (n for n, form in enumerate(in_forms) if form == PARAM)
      exact = analyses.near_one.exact(jaxpr, parameters=parameters)
    self.exact, self._exact_inside = exact.values, dict(exact.inside)
    self.sums = sums_in(inner, known.sums, is_backward, needs)
    self.made = analyses.makings.variables(jaxpr, known.made)
    outside = known.leading if known.exact is not None else _whole(inner)
    self.leading = needs.leading(jaxpr, outside)
    systems = frozenset(inner.invars[n] for n in known.systems)
    pure, contents = self.sums.pure, analyses.contents
    self.solutions = solutions(inner, self.made.solved, systems, pure, contents, needs)
    self._own = own_variables(inner, known.own)
    self.iterated: Collection[Var] = power_iteration(inner, self._own.state)
    self.weights = self.sums.weights(inner)
    is_sum = analyses.contents.is_sum
    self.moments = moments(self.frame, known.moments, is_sum, self.weights)
    self.running: Collection[Var] = additions(inner.eqns, inner.outvars)
    self.recurrence: Recurrence[Var] = analyses.recurrences.variables(jaxpr, known.recurrence)
    self.is_test, self.is_to_tolerance = known.is_test, known.is_to_tolerance
    self.features = frozenset(inner.invars[n] for n in known.features)
    self.has_rule = known.has_rule
    self.in_float16 = FLOAT16 in analyses.adapting.formats
    self.uses = Uses(self.frame, contents, self._is_layer)
    self.of_numbers = frozenset(inner.invars[n] for n in known.of_numbers)
    self.carried = frozenset(inner.invars[n] for n in known.carry)
    self._in_forms, self._known = in_forms, known
    self.tested = frozenset(inner.invars[n] for n in known.tested)
    self.iterations = Iterations(
      self.frame,
      analyses.contents,
      self.sums.pure,
      lambda atom: self._source(atom),
      frozenset(inner.invars[n] for n in known.made_before),
      self.carried,
    )
    self.logarithms, self._heads = frozenset[Var](), frozenset[Var]()
    if analyses.in_float8:
      outs = frozenset(known.logarithms)
      self.logarithms = needs.logarithms(jaxpr, outs)
      self._heads = needs.heads(jaxpr, outs)[0].union(inner.invars[n] for n in known.heads)

  def is_lacked_by(self, dtype: np.dtype, atom: Atom) -> bool:
    """Whether a 16-bit format does not hold a matmul's operand, as far as that is known."""
    numbers = self.numbers.of(atom)
    if numbers:
      return Extremes(max(map(abs, numbers))).lacked_by(dtype)
    found = self._extremes(atom)
    return found is not None and found.lacked_by(dtype)

  def holds_whole(self, dtype: np.dtype, atom: Atom) -> bool:
    """Whether a 16-bit format holds an operand of whole numbers, as far as that is known."""
    made = self.frame.maker(self._source(atom))
    if made is not None and made.primitive.name == "convert_element_type":
      before: Any = made.invars[0].aval
      return jaxprs.kind(made.invars[0]) in "biu" and before.dtype.itemsize == 1
    found = self._extremes(atom)
    return found is not None and found.longest > 0 and not found.lacked_by(dtype)

  def _extremes(self, atom: Atom) -> Extremes | None:
    """The extremes of an operand, if that is an array which the jaxpr captured."""
    source = self._source(atom) if self._captured else None
    return None if isinstance(source, Literal) else self._captured.get(source)

  @functools.cached_property
  def _captured(self) -> dict[Any, Extremes | None]:
    """The extremes of the arrays that the jaxpr captured."""
    pairs = zip(self._inner.constvars, versions.constants(self._jaxpr), strict=True)
    return {var: extremes_of(value) for var, value in pairs}

  def is_head(self, atom: Atom) -> bool:
    """Whether a value is multiplied into a logarithm, however it was moved before."""
    return self._was(atom, self._heads)

  @functools.cached_property
  def powers(self) -> frozenset[Var]:
    """Products of powers of a matrix, see `linear_recurrences`."""
    return powers(self._inner, self.carried)

  @functools.cached_property
  def data_transforms(self) -> DataTransforms:
    """What is done with products of data."""
    inner, carry, began = self._inner, self._known.carry, self._known.began
    pairs = enumerate(zip(inner.invars, self._in_forms, strict=True))
    of_layers = {*carry} - began
    given = {var for n, (var, form) in pairs if form == DATA and n not in of_layers}
    pairs_of = zip(inner.outvars, carry, strict=False)
    handed_on = {
      var: inner.invars[n] for var, n in pairs_of if n in began and not isinstance(var, Literal)
    }
    given.update(inner.constvars)
    subtracted = variables_of(inner.outvars[n] for n in self._known.subtracted)
    return DataTransforms(self.frame, self._analyses.contents, given, handed_on, subtracted)

  def _is_layer(self, matmul: JaxprEqn) -> bool:
    """Whether weights are multiplied, and for no moment."""
    is_moment = not self.moments.values.isdisjoint(matmul.outvars)
    return not is_moment and any(var in self.sums.pure for var in variables_of(matmul.invars))

  @functools.cached_property
  def _source(self) -> Callable[[Any], Any]:
    return jaxprs.sources(self._inner, MOVES)

  # What enters a body ---------------------------------------------------------------------------

  def of_call(self, eqn: JaxprEqn, body: Body, forms: Forms, is_plain: bool) -> Known:
    """What is known in a body that runs once.

    Args:
      eqn: The equation.
      body: Its body.
      forms: How the body's operands are held.
      is_plain: Whether no rules stand beside it, as a user's own derivative.
    """
    own: Own[int] = self._own.among(eqn.invars) if is_plain else Own()
    known = self._entering(eqn, body, forms, own, *self._exact_of(eqn))
    return known if is_plain else known._replace(has_rule=True)

  def of_branches(self, eqn: JaxprEqn, forms: Forms) -> list[Known]:
    """What is known in each branch of a ``cond``, whose own operands are held so."""
    pairs = zip(bodies_of(eqn), self._exact_of(eqn), strict=True)
    own = self._own.among(eqn.invars[1:])
    return [self._entering(eqn, body, forms, own, exact) for body, exact in pairs]

  def of_loop(self, eqn: JaxprEqn, forms: Forms) -> Known:
    """What is known in every turn of the body of a loop, whose own operands are held so."""
    body, exact = bodies_of(eqn)[-1], self._exact_of(eqn)[-1]
    # Only a scan has the state of a model in it.
    is_scan = eqn.primitive.name == "scan"
    own: Own[int] = self._own.among(eqn.invars).without(body.carry) if is_scan else Own()
    known = self._entering(eqn, body, forms, own, exact)
    pairs = zip(versions.open_jaxpr(body.jaxpr).invars, forms, strict=True)
    others = {n: var for n, (var, form) in enumerate(pairs) if form in (PARAM, DATA)}
    matrices = [n for n, var in others.items() if forms[n] == PARAM and is_matrix(var)]
    weights = multiplied(body.jaxpr, matrices, range(body.carry.start), body.carry)
    is_stack = any(n >= body.carry.stop for n in weights)  # of layers: each turn has its own
    is_solver, recurrences = not matrices and _ends_by("f", eqn), self._analyses.recurrences
    given = range(body.carry.start if is_solver else 0)
    consts = enumerate(zip(body.take(eqn.invars)[: body.carry.start], forms, strict=False))
    is_long = (repetitions(eqn) or math.inf) > _LAYERS  # with a step for each channel
    first = body.take(eqn.invars)
    began = (n for n in body.carry if not self.sums.may_be_of_layers([first[n]]))
    return known._replace(
      sums=known.sums.every_turn(body, others.keys() - weights),
      numbers=tuple(None if n in body.carry else x for n, x in enumerate(known.numbers)),
      carry=body.carry,
      began=frozenset(began),
      is_to_tolerance=known.is_to_tolerance or _ends_by(_OF_FLOATS, eqn),
      features=known.features.union(n for n in given if is_narrow(forms[n])),
      tested=known.tested | self._tested(eqn, body),
      recurrence=Recurrence() if is_stack else recurrences.of_loop(eqn, body, self.recurrence),
      steady=tuple(
        n
        for n, (atom, form) in consts
        if not is_stack
        and form is not None
        and (is_vector(atom) if is_long else not jaxprs.shape(atom))
      ),
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
    made = self._analyses.makings.entering(eqn, test, self.made)
    return Known(self._exact_of(eqn)[0], made=made, is_test=True)

  def _exact_of(self, eqn: JaxprEqn) -> tuple[Exact, ...]:
    return self._exact_inside.get(id(eqn)) or (Exact(),) * len(bodies_of(eqn))

  def _entering(
    self, eqn: JaxprEqn, body: Body, forms: Forms, own: Own[int], exact: Exact
  ) -> Known:
    atoms, analyses = body.take(eqn.invars), self._analyses
    numbers = tuple(self.numbers.of(atom) for atom in atoms)
    sums = self.sums.entering(eqn, body, forms)
    leading = self.leading._replace(factored=self.leading.factored.union(self.solutions.beside))
    return Known(
      exact=exact,
      sums=sums,
      made=analyses.makings.entering(eqn, body, self.made),
      leading=analyses.needs.entering(eqn, leading),
      moments=jaxprs.ordered_places(eqn.outvars, self.moments.values),
      of_numbers=self._of_numbers_in(body, atoms, forms, sums.of_parameters),
      made_before=self.iterations.entering(body, atoms, forms),
      numbers=numbers if any(n is not None for n in numbers) else (),
      own=own,
      logarithms=jaxprs.ordered_places(eqn.outvars, self.logarithms),
      heads=tuple(n for n, atom in enumerate(atoms) if self._heads and self.is_head(atom)),
      steady=jaxprs.ordered_places(atoms, self.frame.steady),
      recurrence=analyses.recurrences.entering(eqn, body, self.recurrence),
      is_test=self.is_test,
      is_to_tolerance=self.is_to_tolerance,
      features=frozenset(n for n, atom in enumerate(atoms) if self.is_feature(atom)),
      has_rule=self.has_rule,
      tested=jaxprs.places_of(atoms, self.tested),
      systems=jaxprs.places_of(atoms, self.solutions.values),
      subtracted=self._subtracted_from(eqn, body, forms),
    )

  def _subtracted_from(self, eqn: JaxprEqn, body: Body, forms: Forms) -> frozenset[int]:
    """Which results of a call end in a difference, if it may multiply data by a matrix of data."""
    if eqn.primitive.name not in CALLS or DATA not in forms:
      return frozenset()
    if not self._analyses.contents.matmuls(body.jaxpr):
      return frozenset()
    return self.data_transforms.subtracted_from(eqn)

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
    makers = self.frame.makers
    return frozenset(n for n in matrices if is_computed(atoms[n], makers, self.of_numbers))

  def is_feature(self, atom: Atom) -> bool:
    """Whether layers gave a value outside of the loop that seeks something of it."""
    return self._was(atom, self.features)

  def is_tested(self, atom: Atom) -> bool:
    """Whether the test of a loop reads what a value was moved from, too."""
    return self._was(atom, self.tested)

  def _was(self, atom: Atom, among: Collection[Var]) -> bool:
    """Whether a value was one of some, before it was moved."""
    source = self._source(atom) if among else None  # as nearly never
    return not isinstance(source, Literal) and source in among


_LAYERS = 16
"""As many turns as a loop has that is a network with the same weights in each layer."""
_OF_FLOATS = "fb"
"""A loop may carry a float, or what it said of one."""


def _ends_by(kinds: str, loop: JaxprEqn) -> bool:
  """Whether a loop goes on or ends by something of certain kinds that it carries."""
  test, *_ = bodies_of(loop)
  if not test.is_test:
    return False
  carry = test.split(range(len(loop.invars))).carry
  found = [n in carry and jaxprs.kind(loop.invars[n]) in kinds for n in test.operands]
  return any(jaxprs.depending(test.jaxpr, found))


def _whole(inner: Jaxpr) -> Leading[int]:
  """Where the results of a whole function lead: they are returned."""
  return Leading(returned=frozenset(range(len(inner.outvars))))


def _numbers(adapting: Adapting, jaxpr: AnyJaxpr, known: Known) -> Numbers:
  """The numbers that are known of a jaxpr's operands and constants."""
  inner, found = versions.open_jaxpr(jaxpr), Numbers(adapting)
  for var, numbers in zip(inner.invars, known.numbers, strict=False):
    found.define(var, numbers)
  for var, value in zip(inner.constvars, versions.constants(jaxpr), strict=True):
    found.define(var, numbers_of(value))
  return found
