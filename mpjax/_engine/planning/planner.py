"""Decides, for every equation of a jaxpr, in which dtype it runs. Moves no data.

The plan is made by abstract interpretation: each float32 of the trace gets a `Form`, equations
join the forms of their operands as the primitive table says, and the carry of a loop is the least
fixed point. Executing a plan is `interpreter`'s work, reporting one is `inspect`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import source_info_util

from mpjax._core import scopes
from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy import FLOAT32_POLICY, Policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.primitives import ADDS, JITTED, MATMULS, REMATS, Rule
from mpjax._core.scopes import Path
from mpjax._engine.analyses.entering import Entering
from mpjax._engine.analyses.knowledge import Analyses, Knowledge
from mpjax._engine.analyses.known import NOTHING, Known
from mpjax._engine.analyses.loop_carries import accumulators, carried
from mpjax._engine.planning import decisions, late_rounding
from mpjax._engine.planning.activations import rounded
from mpjax._engine.planning.decisions import NAMEABLE, Decision
from mpjax._engine.planning.early_rounding import rounding_early
from mpjax._engine.planning.module_exits import Borders
from mpjax._engine.planning.parameter_gradients import CastParameters, parameter_of, why_not_float8
from mpjax._engine.planning.plan import (
  AS_HELD,
  ONE_FLOAT32,
  PLAIN,
  ROOT,
  Float8,
  Place,
  Plan,
  Read,
  Scoping,
  Step,
  multiplies,
  narrowed,
  widened,
)
from mpjax._engine.planning.rounded_alike import travelling
from mpjax._engine.planning.sharpening import Sharpening, sharpening_of
from mpjax._engine.planning.sight import Sight
from mpjax._engine.planning.streams import Streams
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import RULES_WITH_BODIES, bodies_of, repetitions, settled
from mpjax._engine.program.kinds import DATA, PARAM, Form, Forms, is_data, is_narrow, join
from mpjax._engine.program.versions import AnyJaxpr, Atom, JaxprEqn, Literal, Var


class Planner:
  """Plans jaxprs under one policy map.

  Attributes:
    policies: The map that answers what governs a path.
    adapting: Which numbers adapt to its formats.
    ops: The primitives that were planned in each module.

  Args:
    policies: The map.
    scoping: How scopes lead to the paths of modules.
  """

  def __init__(self, policies: PolicyMap, scoping: Scoping = PLAIN) -> None:
    self.policies = policies
    self._scoping = scoping._replace(located=scoping.located or bool(policies.rules))
    self.ops: dict[Path, set[str]] = {}
    self.table = policies.table()
    in_float8 = policies.multiplies_in_float8()
    self.analyses = Analyses(self.table, policies.narrow_dtypes(), in_float8)
    self.adapting = self.analyses.adapting
    self.wide_gradients = not scopes.has_narrow_sums(source_info_util.current_name_stack())
    self._rules: dict[tuple[Path, str | None], tuple[int | None, Policy]] = {}
    self._plans: dict[Any, Plan] = {}
    self._names: dict[int, tuple[Any, Place]] = {}  # by identity: many equations share a stack

  def plan(
    self,
    jaxpr: AnyJaxpr,
    in_forms: Forms,
    place: Place = ROOT,
    out_forms: Forms | None = None,
    known: Known = NOTHING,
    cast: tuple[int, ...] = (),
  ) -> Plan:
    """Plan a closed or open jaxpr.

    Args:
      jaxpr: What to plan.
      in_forms: How each operand is held, None for what is not float32.
      place: Where the jaxpr stands.
      out_forms: How the results must be held; as they come out when None.
      known: What else is known of its operands and results.
      cast: Which operands are parameters that their author cast to 16 bits.
    """
    where = place if self._scoping.located else place._replace(path=())
    key = (id(jaxpr), in_forms, where, out_forms, known, cast)
    if key not in self._plans:
      self._plans[key] = _Walk(self, jaxpr, in_forms, place, known, cast).plan(out_forms)
    return self._plans[key]

  def rule_of(
    self,
    jaxpr: AnyJaxpr,
    in_forms: Forms,
    place: Place,
    primals: Forms,
    out_forms: Forms | None = None,
  ) -> Plan:
    """Plan a user's rule whose first results are those of the function that it is for.

    Args:
      jaxpr: The rule.
      in_forms: How each operand is held.
      place: Where the function stands.
      primals: How the function's results are held: those in float32 are needed as exactly here.
      out_forms: How the rule's results must be held; as they come out when None.
    """
    outs = (n for n, form in enumerate(primals) if is_data(form))
    known = Known(self.analyses.near_one.exact(jaxpr, outs), has_rule=True)
    return self.plan(jaxpr, in_forms, place, out_forms, known)

  def governs(self, path: Path, op: str | None = None) -> tuple[int | None, Policy]:
    """The rule that governs a path, or an operation there: its index, None for the default.

    And its policy.
    """
    key = path, op
    if key not in self._rules:
      relative, modules = path[self._scoping.root :], self._scoping.modules
      rule = self.policies.rule_at(relative, op)
      if rule is None and modules:
        module = scopes.as_module(relative, modules)
        rule = self.policies.rule_at(module, op)
        relative = relative if rule is None else module
      self._rules[key] = rule, self.policies.policy_of(rule)
      self.ops.setdefault(relative, set()).update(() if op is None else (op,))
    return self._rules[key]

  def place_of(self, eqn: JaxprEqn, base: Path) -> Place:
    """The place of an equation, relative to that of the jaxpr that it stands in."""
    stack = eqn.source_info.name_stack
    _, place = self._names.get(id(stack), (None, None))
    if place is None:
      place = Place(
        scopes.module_path(stack),
        scopes.is_backward(stack),
        scopes.has_policy(stack),
        scopes.is_forward_again(stack),
      )
      self._names[id(stack)] = stack, place
    if self._scoping.absolute and base and place.path[: len(base)] == base:
      return place._replace(path=place.path[len(base) :])
    return place


class _Walk:
  """One pass over the equations of one jaxpr."""

  def __init__(
    self,
    planner: Planner,
    jaxpr: AnyJaxpr,
    in_forms: Forms,
    place: Place,
    known: Known,
    cast: tuple[int, ...],
  ) -> None:
    inner = versions.open_jaxpr(jaxpr)
    self.planner, self.jaxpr, self.place, self.in_forms = planner, jaxpr, place, in_forms
    told = self.is_backward, self.is_rounding
    self.around = Knowledge(planner.analyses, jaxpr, in_forms, known, *told)
    self.entering = Entering(self.around)
    self.cast = CastParameters(inner.invars[n] for n in cast)
    self.is_whole = known.is_whole
    multiplied, makers = self.around.leading.multiplied, self.around.frame.makers
    self.borders = Borders(self.governs, multiplied)
    self.streams = Streams(multiplied, self.borders.lasting, makers)
    self.forms: dict[Var, Form | None] = dict(zip(inner.invars, in_forms, strict=True))
    for var, value in zip(inner.constvars, versions.constants(jaxpr), strict=True):
      self.forms[var] = self.around.adapting.form(value) if jaxprs.is_float32(var) else None

  def plan(self, out_forms: Forms | None) -> Plan:
    inner = versions.open_jaxpr(self.jaxpr)
    steps = tuple([self.step(eqn) for eqn in inner.eqns])
    vias, forms = self.look_up(inner.outvars, ())
    held = forms if out_forms is None else out_forms
    reads = tuple(_read(via, f, h and h.dtype) for via, f, h in zip(vias, forms, held, strict=True))
    plan = Plan(
      self.jaxpr,
      self.in_forms,
      steps,
      reads,
      held,
      self.cast.among(inner.outvars),
      jaxprs.ordered_places(inner.outvars, self.borders.lasting),
      tuple(map(self.around.numbers.of, inner.outvars)),
    )
    around = late_rounding.Around(
      self.around.numbers.of,
      self.around.leading.multiplied,
      self.around.sums.may_be_of_layers,
      self.around.is_output,
      self.around.is_returned,
      is_whole=self.is_whole and out_forms is None,
    )
    return travelling(late_rounding.rounding_late(rounding_early(plan), around))

  def is_backward(self, eqn: JaxprEqn) -> bool:
    return self.place.backward or self.planner.place_of(eqn, self.place.path).backward

  def is_rounding(self, eqn: JaxprEqn) -> bool:
    place = self.planner.place_of(eqn, self.place.path).within(self.place)
    return self.governing(place, eqn.primitive.name)[1].compute_dtype != FLOAT32

  def step(self, eqn: JaxprEqn) -> Step:
    inner = self.planner.place_of(eqn, self.place.path)
    path, place = inner.path, inner.within(self.place)
    name = eqn.primitive.name
    won, policy = self.governing(place, name)
    vias, forms = self.read(eqn, path, policy.compute_dtype)
    table_rule = self.planner.table.get(name, Rule.FOREIGN)
    sight = Sight(eqn, name, table_rule, forms, policy.compute_dtype, self.around, place)
    rule, found = self.rule(sight)
    if won is not None and self.planner.policies.is_for_op(won) and rule in NAMEABLE:
      rule, decision = Rule.NAMED, decisions.named(sight, policy)
    elif rule in _WAYS:
      decision = _WAYS[rule](self, eqn, forms, place)
    else:
      decision = decisions.decide(rule, sight)
    if name in ADDS and decision.outs == ONE_FLOAT32 and sight.has_narrow:
      decision = self.restored(eqn, forms, decision)
    pairs = zip(vias, forms, decision.wanted, strict=True)
    reads = tuple([_read(v, f, w) if v or w else AS_HELD for v, f, w in pairs])
    self.around.numbers.follow(eqn)
    lasts = found is not None and found.lasts
    self.leave(eqn, () if place.backward or place.has_policy else path, decision, lasts=lasts)
    for var, form in zip(eqn.outvars, decision.outs, strict=True):
      self.forms[var] = form
    if self.planner.analyses.in_float8:
      called = decision.bodies[0].cast if rule is Rule.CALL else ()
      self.cast.follow(eqn, self.forms, called)
    step = Step(
      eqn,
      rule,
      won,
      place,
      reads,
      forms,
      decision.outs,
      decision.params,
      decision.bodies,
      parameter_of(eqn, rule, forms) if PARAM in forms and self.planner.wide_gradients else None,
      float8=self.float8(eqn, rule, forms, place) if policy.matmul_format else None,
      because=self.because(eqn, rule, found, decision)
      if found is not None or self.around.sums.updates
      else "",
      is_of_difference=found is not None and found.is_of_difference,
    )
    if decision.outs == ONE_FLOAT32:
      self.streams.settle(step)
    return step

  def restored(self, eqn: JaxprEqn, forms: Forms, decision: Decision) -> Decision:
    """What is left of a sum that is taken back is held as it was without that: narrow, mostly."""
    before = self.around.uses.restoring.get(eqn.outvars[0])
    read = [a for a in before.invars if not isinstance(a, Literal)] if before else []
    if not read or not is_narrow(join([self.forms[a] for a in read])):
      return decision
    stream = join([form for form in forms if is_narrow(form)])
    return decision._replace(outs=(stream,))

  def because(self, eqn: JaxprEqn, rule: Rule, found: Sharpening | None, decision: Decision) -> str:
    """What of a step is to be told: see `Step.because`."""
    if found is not None and (eqn.primitive.name in MATMULS or rule is Rule.NAMED):
      return found.because
    is_update = eqn.outvars and eqn.outvars[0] in self.around.sums.updates
    return _CHANGE if is_update and any(w and w.itemsize == 2 for w in decision.wanted) else ""

  def leave(self, eqn: JaxprEqn, home: Path, decision: Decision, *, lasts: bool) -> None:
    """Note what the results of an equation are to become where they leave their module."""
    bodies = decision.bodies
    lasting = _lasting(eqn, bodies) if bodies and not lasts else ()
    self.borders.settle(
      eqn,
      home,
      multiplies=multiplies(eqn, bodies),
      lasts=(*eqn.outvars,) if lasts else lasting,
    )

  def float8(self, eqn: JaxprEqn, rule: Rule, forms: Forms, place: Place) -> Float8 | None:
    """Whether a matmul of a policy that asks for float8 multiplies in it, or why it does not."""
    if eqn.primitive.name not in MATMULS or rule is Rule.MULTIPLY:
      return None
    backward, parameter = place.has_cotangents, self.cast.sole(eqn, self.forms)
    is_head = backward and parameter is not None and self.around.is_head(eqn.invars[parameter])
    if reason := why_not_float8(eqn, rule, forms, parameter, self.around.logarithms, is_head):
      return Float8(backward=backward, reason=reason)
    return Float8(parameter, backward)

  def rule(self, sight: Sight) -> tuple[Rule, Sharpening | None]:
    """The table's rule, or that of what only the equation shows, and this."""
    if sight.rule is Rule.FOREIGN:
      return Rule.TRACED, None
    found = sharpening_of(sight)
    return (sight.rule if found is None else found.rule), found

  # Reading a value where it is used ---------------------------------------------------------

  def look_up(self, atoms: Sequence[Atom], path: Path) -> tuple[list[np.dtype | None], Forms]:
    """How each operand is held where it is read, and the cast that leaving its module made."""
    known, numbers = self.forms, self.around.numbers
    held = [numbers.form_of(a) if isinstance(a, Literal) else known[a] for a in atoms]
    forms = [self.borders.cross(*pair, path) for pair in zip(atoms, held, strict=True)]
    pairs = zip(forms, held, strict=True)
    vias = [None if form is None or form == before else form.dtype for form, before in pairs]
    return vias, tuple(forms)

  def read(
    self, eqn: JaxprEqn, path: Path, compute: np.dtype
  ) -> tuple[list[np.dtype | None], Forms]:
    """The same of the operands of an equation, which may join a stream or be rounded before it."""
    vias, forms = self.look_up(eqn.invars, path)
    if eqn.primitive.name in ADDS:
      return self.streams.joined(eqn, vias, forms)
    if DATA not in forms:
      return vias, forms
    return rounded(eqn, vias, forms, compute, self.around, self.borders.lasting)

  def governing(self, place: Place, name: str) -> tuple[int | None, Policy]:
    """The rule and the policy of a primitive at a place; float32 where its author gave it one."""
    governing = self.planner.governs(place.path, name)  # which notes that the module is there
    return (None, FLOAT32_POLICY) if place.has_policy else governing

  def governs(self, path: Path) -> tuple[int | None, Policy]:
    """The rule and the policy of a path, as it stands in this jaxpr."""
    return self.planner.governs(self.place.path + path)

  # Deciding an equation that has bodies -------------------------------------------------------

  def call(self, eqn: JaxprEqn, forms: Forms, place: Place) -> Decision:
    (held,) = bodies_of(eqn)
    is_plain = self.planner.table[eqn.primitive.name] is Rule.CALL
    known = self.entering.of_call(eqn, held, forms, is_plain)
    cast = self.cast.among(eqn.invars)
    body = self.planner.plan(held.jaxpr, forms, place, None, known, cast)
    if eqn.primitive.name in JITTED:
      body = self.planner.plan(held.jaxpr, widened(body), place, None, known, cast)
    elif eqn.primitive.name in REMATS:  # what it stores is as narrow as it is read
      stored = narrowed(body, range(len(held.operands)))
      body = self.planner.plan(held.jaxpr, stored, place, None, known, cast)
    self.around.numbers.follow_branches(eqn, [body.numbers])
    wanted = [form and form.dtype for form in body.in_forms]
    return Decision(wanted, body.out_forms, eqn.params, (body,))

  def loop(self, eqn: JaxprEqn, forms: Forms, place: Place) -> Decision:
    *tests, body = bodies_of(eqn)
    count = len(body.carry)
    taken = body.split(forms)
    known = self.entering.of_loop(eqn, tuple(body.take(forms)))
    given = self.cast.among(body.take(eqn.invars))
    cast = tuple(n for n in given if n not in body.carry)
    slices = tuple(taken.slices)

    def plan(held: Sequence[Form | None], outs: Forms | None = None) -> Plan:
      operands = (*taken.consts, *held, *slices)
      return self.planner.plan(body.jaxpr, operands, place, outs, known, cast)

    def turn(held: Sequence[Form | None]) -> Sequence[Form | None]:
      """A parameter that a loop changes is a sum from then on."""
      outs = plan(held).out_forms
      return [carried(*pair) for pair in zip(held, outs[:count], strict=True)]

    has_matmuls = self.planner.analyses.contents.matmuls(body.jaxpr)
    begun = accumulators(body, taken.carry, repetitions(eqn), has_matmuls=has_matmuls)
    held = tuple(settled(begun, turn, join))
    slices = narrowed(plan(held), range(body.carry.stop, len(body.operands)))
    stacked = plan(held).out_forms[count:]
    bodies = [plan(held, (*held, *stacked))]
    operands = list(forms)
    for n, form in enumerate((*held, *slices), body.carry.start):
      operands[body.operands[n]] = form
    for test in tests:
      own, of_test = tuple(test.take(operands)), self.entering.of_test(eqn, test)
      bodies.insert(0, self.planner.plan(test.jaxpr, own, place, known=of_test))
    wanted = [form and form.dtype for form in operands]
    return Decision(wanted, bodies[-1].out_forms, eqn.params, tuple(bodies))

  def cond(self, eqn: JaxprEqn, forms: Forms, place: Place) -> Decision:
    rest = forms[1:]
    cast = self.cast.among(eqn.invars[1:])
    known = self.entering.of_branches(eqn, rest)
    pairs = [(b.jaxpr, k) for b, k in zip(bodies_of(eqn), known, strict=True)]
    if eqn.params.get("branches_platforms"):  # the one that all devices have but a few stays
      rest = widened(self.planner.plan(pairs[-1][0], rest, place, None, pairs[-1][1], cast))
    free = [self.planner.plan(b, rest, place, None, k, cast).out_forms for b, k in pairs]
    outs = tuple(join(column) for column in zip(*free, strict=True))
    bodies = tuple(self.planner.plan(b, rest, place, outs, k, cast) for b, k in pairs)
    self.around.numbers.follow_branches(eqn, [body.numbers for body in bodies])
    wanted = [form and form.dtype for form in rest]
    return Decision([None, *wanted], outs, eqn.params, bodies)


_CHANGE = "change of a parameter: it is lost where 16 bits hold both"

_WAYS: dict[Rule, Callable[[_Walk, JaxprEqn, Forms, Place], Decision]] = {
  **dict.fromkeys(RULES_WITH_BODIES, _Walk.call),
  Rule.SCAN: _Walk.loop,
  Rule.WHILE: _Walk.loop,
  Rule.COND: _Walk.cond,
}


def _lasting(eqn: JaxprEqn, bodies: Sequence[Plan]) -> list[Var]:
  """Which results of an equation are, in one of its bodies, float32 behind their module."""
  same = [body for body in bodies if len(body.out_forms) == len(eqn.outvars)]
  return [eqn.outvars[n] for n in {n for body in same for n in body.lasting}]


def _read(via: np.dtype | None, form: Form | None, wanted: np.dtype | None) -> Read:
  if form is None or wanted is None or wanted == form.dtype:
    return AS_HELD if via is None else Read(via)
  return Read(via, wanted)
