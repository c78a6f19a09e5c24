"""Decides, for every equation of a jaxpr, in which dtype it runs. Moves no data.

The plan is made by abstract interpretation: each float32 of the trace gets a `Form`, equations
join the forms of their operands as the primitive table says, and the carry of a loop is the least
fixed point. Executing a plan is `_interpreter`'s work, reporting one is `inspect`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core import scopes
from mpjax._core.dtypes import FLOAT16, FLOAT32
from mpjax._core.policy import FLOAT32_POLICY, Policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.primitives import Rule
from mpjax._core.scopes import Path
from mpjax._engine import constants, jaxprs, sharpening, versions
from mpjax._engine.constants import Adapting, Numbers
from mpjax._engine.jaxprs import JaxprEqn, Literal, Var
from mpjax._engine.keep_float32 import KEEP_FLOAT32
from mpjax._engine.kernels import kernel_of
from mpjax._engine.kinds import CONSTANT, DATA, Form, Kind, join, narrow
from mpjax._engine.module_exits import Borders, held_as
from mpjax._engine.plan import ROOT, Forms, Place, Plan, Read, Step, widened
from mpjax._engine.sharpening import Own

_NONE = Own()


class _Decision(NamedTuple):
  wanted: Sequence[np.dtype | None]
  outs: Forms
  params: dict[str, Any]
  bodies: tuple[Plan, ...] = ()


class Planner:
  """Plans jaxprs under one policy map.

  Attributes:
    policies: The map that answers what governs a path.
    adapting: Which numbers adapt to its formats.
    ops: The primitives that were planned in each module.
    unknown: How often each primitive that the table does not know was met.

  Args:
    policies: The map.
    root: How many leading components of every scope are not part of a rule's path.
    absolute: Whether scopes inside the body of a loop or jit are full paths all the same.
    located: Whether a body that several modules call is planned for each of them, as a report
      that names modules must have it.
  """

  def __init__(
    self, policies: PolicyMap, root: int = 0, absolute: bool = False, located: bool = False
  ) -> None:
    self.policies = policies
    self._located = located or bool(policies.rules)
    self._root, self._absolute = root, absolute
    self.ops: dict[Path, set[str]] = {}
    self.unknown: Counter[str] = Counter()
    self.table = policies.table()
    self.adapting = Adapting(policies.narrow_dtypes())
    self._rules: dict[tuple[Path, str | None], int | None] = {}
    self._plans: dict[Any, Plan] = {}
    self._names: dict[Any, Place] = {}

  def plan(
    self,
    jaxpr: Any,
    in_forms: Forms,
    place: Place = ROOT,
    out_forms: Forms | None = None,
    exact: tuple[int, ...] = (),
    own: Own = _NONE,
  ) -> Plan:
    """Plan a closed or open jaxpr.

    Args:
      jaxpr: What to plan.
      in_forms: How each operand is held, None for what is not float32.
      place: Where the jaxpr stands.
      out_forms: How the results must be held; as they come out when None.
      exact: Which results go into a logarithm.
      own: Which operands depend on nothing but a model's parameters and state.
    """
    known = place if self._located else place._replace(path=())
    key = (id(jaxpr), in_forms, known, out_forms, exact, own)
    if key not in self._plans:
      self._plans[key] = _Walk(self, jaxpr, in_forms, place, exact, own).plan(out_forms)
    return self._plans[key]

  def rule_at(self, path: Path, op: str | None = None) -> int | None:
    """The index of the rule that governs a path, or an operation there; None for the default."""
    key = path, op
    if key not in self._rules:
      relative = path[self._root :]
      self._rules[key] = self.policies.rule_at(relative, op)
      self.ops.setdefault(relative, set()).update(() if op is None else (op,))
    return self._rules[key]

  def place_of(self, eqn: JaxprEqn, base: Path) -> Place:
    """The place of an equation, relative to that of the jaxpr that it stands in."""
    stack = eqn.source_info.name_stack
    if stack not in self._names:
      self._names[stack] = Place(
        scopes.module_path(stack), scopes.is_backward(stack), scopes.has_policy(stack)
      )
    place = self._names[stack]
    if self._absolute and base and place.path[: len(base)] == base:
      return place._replace(path=place.path[len(base) :])
    return place


class _Walk:
  """One pass over the equations of one jaxpr."""

  def __init__(
    self,
    planner: Planner,
    jaxpr: Any,
    in_forms: Forms,
    place: Place,
    exact: tuple[int, ...],
    own: Own,
  ) -> None:
    inner = versions.open_jaxpr(jaxpr)
    self.planner, self.jaxpr, self.place, self.in_forms = planner, jaxpr, place, in_forms
    self.forms: dict[Var, Form | None] = dict(zip(inner.invars, in_forms, strict=True))
    self.into_log = sharpening.into_log(inner, exact, planner.table)
    self.own = sharpening.own_variables(inner, own)
    self.iterated = sharpening.power_iteration(inner, self.own.state)
    self.numbers = Numbers(planner.adapting)
    self.borders = Borders(self.governs)
    for var, value in zip(inner.constvars, versions.constants(jaxpr), strict=True):
      self.forms[var] = planner.adapting.form(value) if jaxprs.is_float32(var) else None

  def plan(self, out_forms: Forms | None) -> Plan:
    inner = versions.open_jaxpr(self.jaxpr)
    steps = tuple(self.step(eqn) for eqn in inner.eqns)
    vias, forms = self.look_up(inner.outvars, ())
    held = forms if out_forms is None else out_forms
    reads = tuple(_read(via, f, h and h.dtype) for via, f, h in zip(vias, forms, held, strict=True))
    return Plan(self.jaxpr, self.in_forms, steps, reads, held)

  def step(self, eqn: JaxprEqn) -> Step:
    inner = self.planner.place_of(eqn, self.place.path)
    path, place = inner.path, inner.within(self.place)
    vias, forms = self.look_up(eqn.invars, path)
    won = None if place.has_policy else self.planner.rule_at(place.path, eqn.primitive.name)
    policy = FLOAT32_POLICY if place.has_policy else self.planner.policies.policy_of(won)
    rule = self.rule(eqn, forms, policy.compute_dtype)
    if self.planner.policies.is_for_op(won) and rule in _NAMEABLE:
      rule, decision = Rule.NAMED, self.named(eqn, forms, policy)
    else:
      decision = _DECIDE[rule](self, eqn, forms, policy.compute_dtype, place)
    reads = tuple(_read(v, f, w) for v, f, w in zip(vias, forms, decision.wanted, strict=True))
    for var, form in zip(eqn.outvars, decision.outs, strict=True):
      self.forms[var] = form
      self.borders.settle(var, () if place.backward or place.has_policy else path)
    return Step(
      eqn, rule, won, place, reads, forms, decision.outs, decision.params, decision.bodies
    )

  def rule(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Rule:
    """The table's rule, sharpened by what only the equation shows."""
    name = eqn.primitive.name
    rule = self.planner.table.get(name)
    if rule is None:
      if any(forms):
        self.planner.unknown[name] += 1
      return Rule.TRACED
    if rule in _WITH_BODIES and not all(hasattr(a.aval, "dtype") for a in eqn.invars):
      return Rule.TRACED  # a mutable reference cannot change its dtype
    if name == "name" and eqn.params["name"] == KEEP_FLOAT32:
      return Rule.FULL
    if sharpening.applies_a_function(eqn):
      return Rule.ALWAYS
    if rule is Rule.ALWAYS or (rule in _FLAT and compute == FLOAT32):
      return rule if rule is Rule.ALWAYS else Rule.FULL
    if name in sharpening.SATURATING and eqn.outvars[0] in self.into_log:
      return Rule.FULL
    if sharpening.is_square(eqn) or sharpening.picks_numbers(eqn, forms):
      return Rule.FULL
    if not self.planner.adapting.holds(sharpening.fill_value(eqn)):
      return Rule.FULL
    if rule is Rule.LOWER and sharpening.has_foreign_float(eqn, forms, compute):
      return Rule.TRACED
    if rule is Rule.LOWER and eqn.outvars[0] in self.iterated:
      return Rule.FULL
    if rule is Rule.LOWER and sharpening.is_grouped_scores(eqn, forms):
      return Rule.SCORES
    if rule is Rule.RANGE:
      form = join(forms)
      held = compute if form and form.kind < Kind.NARROW else form and form.dtype
      return Rule.FULL if held == FLOAT16 else Rule.FOLLOW
    return rule

  # Reading a value where it is used ---------------------------------------------------------

  def look_up(self, atoms: Sequence[Any], path: Path) -> tuple[list[np.dtype | None], Forms]:
    """How each operand is held where it is read, and the cast that leaving its module made."""
    vias, forms = [], []
    for atom in atoms:
      held = self.held(atom)
      form = self.borders.cross(atom, held, path)
      vias.append(form.dtype if form is not None and form != held else None)
      forms.append(form)
    return vias, tuple(forms)

  def held(self, atom: Any) -> Form | None:
    return self.numbers.form_of(atom) if isinstance(atom, Literal) else self.forms[atom]

  def governs(self, path: Path) -> tuple[int | None, Policy]:
    """The rule and the policy of a path, as it stands in this jaxpr."""
    rule = self.planner.rule_at(self.place.path + path)
    return rule, self.planner.policies.policy_of(rule)

  # Deciding one equation -----------------------------------------------------------------------

  def lower(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    decision = self.uniform(eqn, forms, narrow(compute))
    if not any(forms):
      return decision
    return decision._replace(params=jaxprs.without_algorithm(decision.params))

  def scores(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    """Scores are float32, as JAX has them for 16-bit operands: none rounds before its softmax."""
    decision = self.lower(eqn, forms, compute, place)
    params = decision.params | {"preferred_element_type": FLOAT32}
    return decision._replace(outs=_for_float32(eqn.outvars, DATA), params=params)

  def full(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    return self.uniform(eqn, forms, DATA)

  def follow(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    form = join(forms) or DATA
    if form.kind is Kind.CONSTANT:
      form = self.numbers.form_after(eqn, forms)
    decision = self.uniform(eqn, forms, form)
    if sharpening.looks_up_rows(eqn, forms) and compute != FLOAT32:
      return decision._replace(outs=(narrow(compute),))
    return decision

  def named(self, eqn: JaxprEqn, forms: Forms, policy: Policy) -> _Decision:
    """An operation that a rule speaks of runs as the rule says, and returns what it says."""
    decision = self.uniform(eqn, forms, held_as(policy.compute_dtype))
    if not any(forms):
      return decision
    outs = tuple(held_as(policy.output_dtype) if f is not None else None for f in decision.outs)
    return decision._replace(outs=outs, params=jaxprs.without_algorithm(decision.params))

  def uniform(self, eqn: JaxprEqn, forms: Forms, form: Form) -> _Decision:
    """Every float32 operand and result of the equation in one form."""
    wanted = [form.dtype if f is not None else None for f in forms]
    held = form if any(forms) else DATA
    params = jaxprs.retyped(eqn.params, held.dtype) if any(forms) else eqn.params
    return _Decision(wanted, _for_float32(eqn.outvars, held), params)

  def traced(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    wanted = [FLOAT32 if f is not None else None for f in forms]
    return _Decision(wanted, _for_float32(eqn.outvars, DATA), eqn.params)

  def custom_lin(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    """Operands are read as they are held: the backward pass is planned when it is run."""
    return _Decision([None] * len(forms), _for_float32(eqn.outvars, DATA), eqn.params)

  def each(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    return _Decision([None] * len(forms), forms, eqn.params)

  def convert(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    """float32 to float32 passes on; a mask or a number adapts; an integer becomes data."""
    operand: Any = eqn.invars[0]
    (form,), (result,) = forms, eqn.outvars
    if not jaxprs.is_float32(result):
      return _Decision([None], (None,), eqn.params)
    if form is not None:
      self.numbers.define(result, self.numbers.of(operand))
      held = DATA if compute == FLOAT32 else form
      return self.uniform(eqn, forms, held)
    if operand.aval.dtype == np.bool_:
      self.numbers.define(result, constants.MASK)
      return _Decision([None], (CONSTANT,), eqn.params)
    if not isinstance(operand, Literal):
      return _Decision([None], (DATA,), eqn.params)
    self.numbers.define(result, self.numbers.of(operand))
    return _Decision([None], (self.planner.adapting.form(operand.val),), eqn.params)

  def call(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    (jaxpr,) = (eqn.params[key] for key in _BODY if key in eqn.params)
    exact = tuple(n for n, var in enumerate(eqn.outvars) if var in self.into_log)
    is_call = self.planner.table[eqn.primitive.name] is Rule.CALL  # other bodies have rules beside
    own = self.own.among(eqn.invars) if is_call else _NONE
    body = self.body(jaxpr, forms, place, exact=exact, own=own)
    if eqn.primitive.name in _SHARES_READS:
      body = self.body(jaxpr, widened(body), place, exact=exact, own=own)
    wanted = [form and form.dtype for form in body.in_forms]
    return _Decision(wanted, body.out_forms, eqn.params, (body,))

  def scan(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    consts, carry = versions.scan_shape(eqn)
    before, after = forms[:consts], forms[consts + carry :]
    jaxpr = eqn.params["jaxpr"]
    own = self.own.among(eqn.invars).without(range(consts, consts + carry))
    held = self.fixed_point(jaxpr, before, forms[consts : consts + carry], after, place, own)
    operands = (*before, *held, *after)
    stacked = self.body(jaxpr, operands, place, own=own).out_forms[carry:]
    body = self.body(jaxpr, operands, place, (*held, *stacked), own=own)
    return _Decision([f and f.dtype for f in operands], body.out_forms, eqn.params, (body,))

  def loop(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    of_cond = eqn.params["cond_nconsts"]
    of_body = of_cond + eqn.params["body_nconsts"]
    jaxpr = eqn.params["body_jaxpr"]
    held = self.fixed_point(jaxpr, forms[of_cond:of_body], forms[of_body:], (), place)
    body = self.body(jaxpr, (*forms[of_cond:of_body], *held), place, held)
    cond = self.body(eqn.params["cond_jaxpr"], (*forms[:of_cond], *held), place)
    wanted = [f and f.dtype for f in (*forms[:of_body], *held)]
    return _Decision(wanted, held, eqn.params, (cond, body))

  def fixed_point(
    self,
    jaxpr: Any,
    before: Forms,
    carry: Forms,
    after: Forms,
    place: Place,
    own: Own = _NONE,
  ) -> Forms:
    """The least forms of a carry that the loop's body keeps.

    A carry that starts from a constant is an accumulator or the state of a recurrent cell: it
    stays float32, for sums over many steps stall in 16 bits.
    """
    held = tuple(DATA if f is not None and f.kind is Kind.CONSTANT else f for f in carry)
    while True:
      outs = self.body(jaxpr, (*before, *held, *after), place, own=own).out_forms
      grown = tuple(join(pair) for pair in zip(held, outs[: len(held)], strict=True))
      if grown == held:
        return held
      held = grown

  def cond(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    branches = eqn.params["branches"]
    own = self.own.among(eqn.invars[1:])
    free = [self.body(branch, forms[1:], place, own=own).out_forms for branch in branches]
    outs = tuple(join(column) for column in zip(*free, strict=True))
    bodies = tuple(self.body(branch, forms[1:], place, outs, own=own) for branch in branches)
    return _Decision([None] * len(forms), outs, eqn.params, bodies)

  def marker(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype, place: Place) -> _Decision:
    """A marked function takes and makes what its trace in the compute dtype does."""
    jaxpr = kernel_of(eqn.params).traced_in(compute)
    operands = zip(jaxpr.in_avals, forms, strict=True)
    wanted = [aval.dtype if f is not None else None for aval, f in operands]
    outs = tuple(
      held_as(aval.dtype) if jaxprs.is_float32(var) else None
      for var, aval in zip(eqn.outvars, jaxpr.out_avals, strict=True)
    )
    return _Decision(wanted, outs, {"jaxpr": jaxpr})

  def body(
    self,
    jaxpr: Any,
    forms: Forms,
    place: Place,
    outs: Forms | None = None,
    exact: tuple[int, ...] = (),
    own: Own = _NONE,
  ) -> Plan:
    return self.planner.plan(jaxpr, forms, place, outs, exact, own)


_DECIDE: dict[Rule, Callable[..., _Decision]] = {
  Rule.LOWER: _Walk.lower,
  Rule.SCORES: _Walk.scores,
  Rule.FULL: _Walk.full,
  Rule.ALWAYS: _Walk.full,
  Rule.FOLLOW: _Walk.follow,
  Rule.EACH: _Walk.each,
  Rule.CONVERT: _Walk.convert,
  Rule.CALL: _Walk.call,
  Rule.SCAN: _Walk.scan,
  Rule.WHILE: _Walk.loop,
  Rule.COND: _Walk.cond,
  Rule.CUSTOM_JVP: _Walk.call,
  Rule.CUSTOM_VJP: _Walk.call,
  Rule.CUSTOM_LIN: _Walk.custom_lin,
  Rule.CUSTOM_VMAP: _Walk.call,
  Rule.MARKER: _Walk.marker,
  Rule.TRACED: _Walk.traced,
}
_BODY = ("jaxpr", "call_jaxpr", "call")
# A checkpoint stores its operands, so they stay narrow; a jit may get them as it reads them.
_SHARES_READS = frozenset({"jit", "pjit"})
_FLAT = frozenset({Rule.LOWER, Rule.RANGE, Rule.FOLLOW})
_NAMEABLE = frozenset({Rule.LOWER, Rule.SCORES, Rule.RANGE, Rule.FULL, Rule.FOLLOW})
_WITH_BODIES = frozenset(
  {
    Rule.CALL,
    Rule.SCAN,
    Rule.WHILE,
    Rule.COND,
    Rule.CUSTOM_JVP,
    Rule.CUSTOM_VJP,
    Rule.CUSTOM_VMAP,
  }
)


def _read(via: np.dtype | None, form: Form | None, wanted: np.dtype | None) -> Read:
  if form is None or wanted is None or wanted == form.dtype:
    return Read(via)
  return Read(via, wanted)


def _for_float32(outvars: Sequence[Any], form: Form) -> Forms:
  return tuple(form if jaxprs.is_float32(var) else None for var in outvars)
