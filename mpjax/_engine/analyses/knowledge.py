"""What is known of the values of a jaxpr before any of its equations is decided.

Some is found in the jaxpr: what leads into a logarithm, what is added up, what comes near one. The
rest comes from outside, as `Known`, through the equation that holds the jaxpr: so a body knows what
is done to its results behind it. Each kind of knowledge is found in a room of its own; here it is
gathered for one jaxpr, and `entering` hands it on to the bodies that this holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from mpjax._core.dtypes import FLOAT16
from mpjax._core.primitives import ADDS, MATMULS, SCALES, Rule
from mpjax._engine.analyses.constants import (
  Adapting,
  Extremes,
  Numbers,
  extremes_of,
  numbers_of,
)
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.data_transforms import DataTransforms
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.analyses.iterations import Iterations
from mpjax._engine.analyses.joined import joined, made_of_data
from mpjax._engine.analyses.known import Known
from mpjax._engine.analyses.linear_recurrences import Recurrence, Recurrences, powers
from mpjax._engine.analyses.lookahead import MOVES, Leading, Needs
from mpjax._engine.analyses.made_of import Makings, is_computed
from mpjax._engine.analyses.moments import moments
from mpjax._engine.analyses.near_one import NearOne
from mpjax._engine.analyses.power_iteration import own_variables, power_iteration
from mpjax._engine.analyses.running_sums import additions
from mpjax._engine.analyses.solutions import solutions
from mpjax._engine.analyses.sums import sums_in
from mpjax._engine.analyses.uses import Uses
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.kinds import DATA, PARAM, Forms
from mpjax._engine.program.matmuls import asks_for_float32
from mpjax._engine.program.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var


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
    self.near_one = NearOne(table, formats, self.contents)
    self.recurrences = Recurrences(self.contents)
    self.in_float8 = in_float8


class Knowledge:
  """What is known of one jaxpr.

  Args:
    analyses: What finds it out.
    jaxpr: The jaxpr.
    in_forms: How its operands are held.
    known: What is known of them and of its results outside.
    is_backward: Whether an equation stands in a backward pass.
    is_rounding: Whether a policy below float32 governs one.

  Attributes:
    analyses: What finds it out.
    exact: The variables that are needed exactly and may come near one.
    shifts: Sums that are needed exactly and may come near a number.
    exact_inside: And those in bodies, by the identity of the equation that holds them.
    sums: What is added up.
    made: What is made of something alone.
    leading: What leads somewhere.
    solutions: What belongs to a linear system behind it.
    own: What depends on nothing but a model's parameters and state.
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
    heads: What was multiplied into one outside, or is here, before it was moved.
    adapting: Which numbers adapt to the formats of the policies.
  """

  def __init__(
    self,
    analyses: Analyses,
    jaxpr: AnyJaxpr,
    in_forms: Forms,
    known: Known,
    is_backward: Callable[[JaxprEqn], bool],
    is_rounding: Callable[[JaxprEqn], bool],
  ) -> None:
    inner = versions.open_jaxpr(jaxpr)
    self.analyses, self._jaxpr, self._inner, needs = analyses, jaxpr, inner, analyses.needs
    self.adapting = analyses.adapting
    self.numbers = _numbers(analyses.adapting, jaxpr, known)
    steady = frozenset(inner.invars[n] for n in known.steady)
    self.frame = Frame(inner, is_backward, self.numbers.number, steady=steady)
    exact = known.exact
    if exact is None:
      parameters = (n for n, form in enumerate(in_forms) if form == PARAM)
      exact = analyses.near_one.exact(jaxpr, parameters=parameters)
    self.exact, self.shifts, self.exact_inside = exact.values, exact.shifts, dict(exact.inside)
    self.sums = sums_in(inner, known.sums, is_backward, needs)
    self.made = analyses.makings.variables(jaxpr, known.made)
    outside = _whole(inner) if known.is_whole else known.leading
    self.leading = needs.leading(jaxpr, outside)
    systems = frozenset(inner.invars[n] for n in known.systems)
    pure, contents = self.sums.pure, analyses.contents
    self.solutions = solutions(inner, self.made.solved, systems, pure, contents, needs)
    self.own = own_variables(inner, known.own)
    self.iterated: Collection[Var] = power_iteration(inner, self.own.state)
    self.weights = self.sums.weights(inner)
    is_sum = analyses.contents.is_sum
    self.moments = moments(self.frame, known.moments, is_sum, self.weights)
    self.running: Collection[Var] = additions(inner.eqns, inner.outvars)
    self.recurrence: Recurrence[Var] = analyses.recurrences.variables(jaxpr, known.recurrence)
    self.is_test, self.is_to_tolerance = known.is_test, known.is_to_tolerance
    self.features = frozenset(inner.invars[n] for n in known.features)
    self.has_rule = known.has_rule
    self.in_float16 = FLOAT16 in analyses.adapting.formats
    layers = self._is_layer, self._may_weigh
    self.uses = Uses(self.frame, contents, *layers, is_rounding, is_whole=known.is_whole)
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
    self.logarithms, self.heads = frozenset[Var](), frozenset[Var]()
    if analyses.in_float8:
      outs = frozenset(known.logarithms)
      self.logarithms = needs.logarithms(jaxpr, outs)
      self.heads = needs.heads(jaxpr, outs)[0].union(inner.invars[n] for n in known.heads)

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
    return self._was(atom, self.heads)

  @functools.cached_property
  def powers(self) -> frozenset[Var]:
    """Products of powers of a matrix, see `linear_recurrences`."""
    return powers(self._inner, self.carried)

  @functools.cached_property
  def _given(self) -> Collection[Any]:
    """The operands and constants that are data."""
    of_layers = {*self._known.carry} - self._known.began
    pairs = enumerate(zip(self._inner.invars, self._in_forms, strict=True))
    given = {var for n, (var, form) in pairs if form == DATA and n not in of_layers}
    return given.union(self._inner.constvars)

  @functools.cached_property
  def joined(self) -> Collection[Var]:
    """What is added to data or is an exponent, see `analyses.joined`."""
    return joined(self.frame, self._given)

  @functools.cached_property
  def streams_of_data(self) -> Collection[Var]:
    """What is data, to which layers add and which they scale, and what precise matmuls move.

    What layers gave is none for it is scaled by data, as queries are by the sines of a position.
    """
    began = {self._inner.invars[n] for n in self._known.began}
    given = {v for v in self._given if v in began or not self.sums.may_be_of_layers([v])}
    return made_of_data(self.frame, given, self._takes_data)

  def _takes_data(self, eqn: JaxprEqn, data: Collection[Any]) -> bool:
    name, read = eqn.primitive.name, variables_of(eqn.invars)
    if name in SCALES:
      of_layers = [a for a in read if self.sums.may_be_of_layers([a])]
      return not of_layers or any(a in data for a in of_layers)
    if name in MATMULS:
      return asks_for_float32(eqn) and not any(a in self.weights for a in read)
    return name in _TAKE_DATA

  @functools.cached_property
  def data_transforms(self) -> DataTransforms:
    """What is done with products of data."""
    inner, carry, began = self._inner, self._known.carry, self._known.began
    pairs_of = zip(inner.outvars, carry, strict=False)
    handed_on = {
      var: inner.invars[n] for var, n in pairs_of if n in began and not isinstance(var, Literal)
    }
    subtracted = variables_of(inner.outvars[n] for n in self._known.subtracted)
    given, contents = self._given, self.analyses.contents
    return DataTransforms(self.frame, contents, given, self.weights, handed_on, subtracted)

  def is_output(self, var: Var) -> bool:
    """Whether a value goes into a loss, and no layer comes after, be its weights trained or not."""
    return var in self._in_totals and var not in self._before_weights

  def is_returned(self, var: Var) -> bool:
    """Whether a whole function returns what is made of a value, and no matmul comes after."""
    return self._known.is_whole and var not in self._before_matmuls

  @functools.cached_property
  def _before_matmuls(self) -> Collection[Var]:
    """What leads into a matmul, whatever is made of it before."""
    return self.uses.before(lambda _: True, ())

  @functools.cached_property
  def _before_weights(self) -> Collection[Var]:
    """What leads to weights, or is returned from a body to what may."""
    results = self._inner.outvars
    ends = () if self._known.is_whole else set(range(len(results))) - self._known.outputs
    return self.uses.before(self._may_weigh, variables_of(results[n] for n in ends))

  @functools.cached_property
  def _in_totals(self) -> Collection[Var]:
    """What a single number is made of, as a loss is, in the forward pass."""
    found = variables_of(self._inner.outvars[n] for n in self._known.outputs)
    for eqn in reversed(self._inner.eqns):
      if not self.frame.is_backward(eqn) and (not found.isdisjoint(eqn.outvars) or _totals(eqn)):
        found |= {*eqn.outvars, *variables_of(eqn.invars)}
    return found

  def _may_weigh(self, matmul: JaxprEqn) -> bool:
    """Whether weights may be: a matrix of parameters, or of neither layers nor numbers."""
    makers, known = self.frame.makers, self.of_numbers
    return self._is_layer(matmul) or any(
      jaxprs.kind(a) == "f"
      and len(jaxprs.shape(a)) > 1
      and not isinstance(a, Literal)
      and not self.sums.may_be_of_layers([a])
      and not is_computed(a, makers, known)
      for a in matmul.invars
    )

  def _is_layer(self, matmul: JaxprEqn) -> bool:
    """Whether weights are multiplied, and for no moment."""
    is_moment = not self.moments.values.isdisjoint(matmul.outvars)
    return not is_moment and any(var in self.sums.pure for var in variables_of(matmul.invars))

  @functools.cached_property
  def _source(self) -> Callable[[Any], Any]:
    return jaxprs.sources(self._inner, MOVES)

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


_TAKE_DATA = ADDS | {"concatenate"}


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


def _totals(eqn: JaxprEqn) -> bool:
  """Whether an equation makes a float of an array."""
  made = any(not jaxprs.shape(v) and jaxprs.kind(v) == "f" for v in eqn.outvars)
  return made and any(map(jaxprs.shape, eqn.invars))
