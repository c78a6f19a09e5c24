"""Follows float32 through a plan: where it was born, what it widened, what each operation costs.

Every value carries whether it is 16-bit in meaning and, if not, where its float32 comes from. A
narrow value that meets float32 is a widening; it is a leak if what came out of it is stored or
multiplied wide although no operation of the primitive table asked for float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import FLOAT32, describe
from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import bodies_of, repetitions, settled
from mpjax._engine.program.kinds import Form, Kind, is_data, is_narrow
from mpjax._engine.program.versions import JaxprEqn, Literal
from mpjax.inspect._flow_costs import (
  bytes_of,
  dtype_inside,
  flops,
  has_floats,
  integer_operand,
  is_matmul,
  matmuls_inside,
  returns,
  runs_in,
  runs_narrow,
)
from mpjax.inspect._flow_data import (
  MEANT,
  NOTHING,
  Birth,
  Float8Key,
  Flow,
  Island,
  OpCount,
  OpKey,
  Remark,
  Value,
  WideKey,
  Widening,
  born,
  float_of_integers,
  held_value,
  joined,
  made_of_no_floats,
  read_value,
  widenings_in,
)
from mpjax.inspect._flow_remarks import narrowed_sums, remarks_on
from mpjax.inspect._source_lines import UNKNOWN, Line, line_of

_KEEP = "name"
_FOLLOWS = frozenset({Rule.FOLLOW, Rule.EACH, Rule.MULTIPLY})


class Spot(NamedTuple):
  """Where a jaxpr stands that is walked."""

  line: Line = UNKNOWN
  times: int = 1
  key: tuple[int, ...] = ()
  record: bool = True

  def into(self, step: Step, number: int, line: Line, record: bool = True) -> Spot:
    """The spot of one of a step's bodies."""
    times = self.times * (repetitions(step.eqn) or 1)
    return Spot(line, times, (*self.key, id(step), number), self.record and record)


def follow(planner: Planner, plan: Plan, names: Sequence[str]) -> Flow:
  """Follow the float32 values of a plan.

  Args:
    planner: The planner that made the plan.
    plan: The plan of a whole function.
    names: What its operands are called.
  """
  walker = _Walker(planner)
  invars: Any = versions.open_jaxpr(plan.jaxpr).invars
  operands = [
    born(Birth("argument", f"{name} {describe(v.aval)}")) if is_data(form) else NOTHING
    for name, v, form in zip(names, invars, plan.in_forms, strict=True)
  ]
  walker.walk(plan, operands, Spot())
  return walker.flow


class _Walker:
  def __init__(self, planner: Planner) -> None:
    self.planner = planner
    self.flow = Flow()
    self._widenings: dict[tuple[int, ...], int] = {}
    self._walked: dict[Any, list[Value]] = {}

  def walk(self, plan: Plan, operands: Sequence[Value], spot: Spot) -> list[Value]:
    """Follow the values of a plan from its operands to its results."""
    if spot.record:
      return self.walk_anew(plan, operands, spot)
    # Each of several nested loops walks its body until nothing changes; once for equal operands.
    known = plan, spot.key, tuple(operands)
    if known not in self._walked:
      self._walked[known] = self.walk_anew(plan, operands, spot)
    return self._walked[known]

  def walk_anew(self, plan: Plan, operands: Sequence[Value], spot: Spot) -> list[Value]:
    """The same, and count on the way what is to be recorded."""
    inner = versions.open_jaxpr(plan.jaxpr)
    env: dict[Any, Value] = dict(zip(inner.invars, operands, strict=True))
    for var in inner.constvars:
      env[var] = born(Birth("constant", describe(var.aval)))
    islands = _Islands(self.planner)
    widened: set[Any] = set()
    for step in plan.steps:
      line = line_of(step.eqn, spot.line)
      values = [
        read_value(env, atom, read, form, line)
        for atom, read, form in zip(step.eqn.invars, step.reads, step.operands, strict=True)
      ]
      outs = self.step(step, values, spot, line)
      for var, form, value in zip(step.eqn.outvars, step.outs, outs, strict=True):
        env[var] = held_value(value, form)
      if spot.record:
        self.count(step, spot, widened)
        self.flow.remarks.update(remarks_on(step, line, self.compute_dtype(step)))
        self.count_widened(step, outs, spot)
        islands.add(step, line, [env[var] for var in step.eqn.outvars])
    self.flow.islands += islands.found() if spot.record else []
    return [
      read_value(env, atom, read, form, spot.line)
      for atom, read, form in zip(inner.outvars, plan.out_reads, plan.out_forms, strict=True)
    ]

  # What an equation makes of its operands -----------------------------------------------------

  def step(self, step: Step, values: list[Value], spot: Spot, line: Line) -> list[Value]:
    if step.bodies:
      return self.bodies(step, values, spot, line)
    return [self.leaf(step, form, values, spot, line) for form in step.outs]

  def leaf(
    self, step: Step, form: Form | None, values: list[Value], spot: Spot, line: Line
  ) -> Value:
    if form is None:
      return made_of_no_floats(step.eqn.primitive.name, values, line)
    history = frozenset().union(*(v.history for v in values))
    touched = any(v.narrow or v.touched for v in values)
    if is_matmul(step):
      touched = touched or runs_narrow(step)
      self.matmul(step, values, history, line, spot)
      history = frozenset()
    if not is_data(form):
      return Value(True, history=history, touched=touched)
    origins = self.origins(step, values, touched, spot, line)
    if not origins and not any(v.narrow for v in values):  # numbers alone, of which none fits
      origins = frozenset([Birth("operation", step.eqn.primitive.name, line)])
    history |= frozenset(o for o in origins if isinstance(o, int))
    return Value(not origins, origins, history, touched)

  def origins(
    self, step: Step, values: list[Value], touched: bool, spot: Spot, line: Line
  ) -> frozenset[Any]:
    """Where the float32 of a step's result comes from; nowhere if it is narrow in meaning."""
    name = step.eqn.primitive.name
    before = frozenset().union(*(v.origins for v in values))
    if self.is_float32_scope(step):
      return frozenset([MEANT])
    if step.rule in _FOLLOWS or (step.rule is Rule.CONVERT and any(step.operands)):
      return self.joined(step, values, before, spot, line)
    if step.rule is Rule.CONVERT:
      aval = _aval(step.eqn)
      if jnp.issubdtype(aval.dtype, jnp.integer):
        return frozenset([float_of_integers(values, aval, line)])
      return frozenset([Birth("operation", name, line)])
    if step.rule is Rule.TRACED:
      known = self.planner.table.get(name, Rule.FOREIGN) is not Rule.FOREIGN
      return frozenset([Birth("operation" if known else "unknown", name, line)])
    if touched or MEANT in before or name == _KEEP:
      return frozenset([MEANT])
    return before or frozenset([Birth("operation", name, line)])

  def joined(
    self, step: Step, values: list[Value], before: frozenset[Any], spot: Spot, line: Line
  ) -> frozenset[Any]:
    """A narrow operand that meets float32 widens, unless the float32 was meant."""
    if MEANT in before or not any(v.narrow for v in values):
      return before
    births = {o for o in before if isinstance(o, Birth)}
    if any(birth.kind == "random" for birth in births):  # what else made them is JAX's own
      births = {birth for birth in births if birth.kind in ("random", "argument", "constant")}
    if not before:
      formats = {f.dtype.name for f in step.operands if is_narrow(f)}
      if len(formats) < 2:
        return before
      births = {Birth("formats", " and ".join(sorted(formats)))}
    if births:
      number = self.widening(step, births, spot, line)
      return frozenset([number])
    for number in before:
      self.flow.widenings[number].again += spot.record
    return before

  def widening(self, step: Step, births: set[Birth], spot: Spot, line: Line) -> int:
    key = (*spot.key, id(step))
    if key not in self._widenings:
      self._widenings[key] = len(self.flow.widenings)
      path, backward, *_ = step.place
      result = describe(step.eqn.outvars[0].aval)
      made = Widening(path, backward, step.eqn.primitive.name, line, result, set())
      self.flow.widenings.append(made)
    number = self._widenings[key]
    self.flow.widenings[number].births |= births
    return number

  def matmul(
    self, step: Step, values: list[Value], history: frozenset[int], line: Line, spot: Spot
  ) -> None:
    is_wide = bool(step.because) and not runs_narrow(step)  # it takes float32 as it is
    for widening in self.of_this_pass(() if is_wide else history, step):
      widening.before_matmul = True
    for value in () if is_wide else values:
      if not value.narrow and MEANT not in value.origins:
        for widening in self.of_this_pass(widenings_in(value.origins), step):
          widening.reader = widening.reader or (step.eqn.primitive.name, line)
    if step.rule is Rule.TRACED and spot.record and not self.is_float32_scope(step):
      self.flow.foreign.append((step.place.path, step.eqn.primitive.name, line))

  def of_this_pass(self, numbers: Iterable[int], step: Step) -> list[Widening]:
    """The widenings that a matmul speaks against: in a backward pass, those of that pass alone.

    A label widens where the loss needs float32 anyway; its cotangent is cast, as every one is.
    """
    found = [self.flow.widenings[number] for number in numbers]
    return [widening for widening in found if widening.backward or not step.place.backward]

  def is_float32_scope(self, step: Step) -> bool:
    return self.compute_dtype(step) == FLOAT32

  def compute_dtype(self, step: Step) -> np.dtype:
    """That of the policy which governs a step; float32 in a region that has its own."""
    governed = self.planner.policies.policy_of(step.won).compute_dtype
    return FLOAT32 if step.place.has_policy else governed

  # Bodies ----------------------------------------------------------------------------------------

  def bodies(self, step: Step, values: list[Value], spot: Spot, line: Line) -> list[Value]:
    """Follow values through what a step calls, repeats or chooses from."""
    self.flow.loops += spot.record and repetitions(step.eqn) is None
    if spot.record and not self.is_float32_scope(step):
      self.flow.remarks.update(self.narrowed_sums(step, line))
    carry = self.carry(step, values, spot, line)
    results: list[list[Value]] = []
    for n, (body, plan) in enumerate(zip(bodies_of(step.eqn), step.bodies, strict=True)):
      consts, _, slices = body.split(values)
      outs = self.walk(plan, [*consts, *carry, *slices], spot.into(step, n, line))
      if body.is_test and spot.record and any(out.decided for out in outs):
        self.flow.remarks[Remark("loop", step.place.path, line)] += 1
      results += [] if body.is_test else [outs]
    return [joined(column) for column in zip(*results, strict=True)]

  def narrowed_sums(self, step: Step, line: Line) -> Iterable[Remark]:
    """The sums of a loop that a rule of the map keeps in 16 bits."""
    has_matmuls = self.planner.analyses.contents.matmuls(bodies_of(step.eqn)[-1].jaxpr)
    changed = dict(self.planner.policies.ops)
    return narrowed_sums(step, line, changed, has_matmuls=has_matmuls)

  def carry(self, step: Step, values: list[Value], spot: Spot, line: Line) -> list[Value]:
    """What a loop carries, in whichever turn; nothing for other steps."""
    body, plan = bodies_of(step.eqn)[-1], step.bodies[-1]
    consts, held, slices = body.split(values)
    if not held:
      return []
    inner = plan.in_forms[body.carry.start : body.carry.stop]
    held = _accumulators(body.split(step.operands).carry, inner, held)
    looking = spot.into(step, len(step.bodies) - 1, line, record=False)
    return settled(held, lambda held: self.walk(plan, [*consts, *held, *slices], looking), joined)

  # Counting --------------------------------------------------------------------------------------

  def count(self, step: Step, spot: Spot, widened: set[Any]) -> None:
    self.count_casts(step, widened)
    name = step.eqn.primitive.name
    integer = integer_operand(step.eqn)
    if step.bodies or not (integer or has_floats(step.eqn)):
      return
    foreign = self.planner.table.get(name, Rule.FOREIGN) is Rule.FOREIGN
    rule = "unknown" if foreign else step.rule.name.lower()
    runs = integer or runs_in(step).name
    key = OpKey(*step.place[:2], name, rule, runs, returns(step).name, step.won)
    entry = self.flow.ops.setdefault(key, OpCount())
    entry.count += 1
    entry.flops += spot.times * (flops(step.eqn) if is_matmul(step) else 0)
    entry.bytes += spot.times * sum(
      bytes_of(v, f) for v, f in zip(step.eqn.outvars, step.outs, strict=True)
    )
    self.count_traced(step, rule, spot)
    if step.float8 is not None:
      wish = Float8Key(step.place.path, step.float8.backward, step.float8.reason)
      _count_matmul(self.flow.float8, wish, step, spot)
    runs_wide = not integer and runs_in(step) == FLOAT32 and not self.is_float32_scope(step)
    if step.because and is_matmul(step) and runs_wide:
      key = WideKey(*step.place[:2], line_of(step.eqn, spot.line), step.because)
      _count_matmul(self.flow.wide, key, step, spot)

  def count_traced(self, step: Step, rule: str, spot: Spot) -> None:
    """Count what runs as traced in a 16-bit scope, and the matmuls that it holds.

    Those of a linear system are float32 for what they compute.
    """
    path, backward, *_ = step.place
    name, line = step.eqn.primitive.name, line_of(step.eqn, spot.line)
    wide = OpCount()
    for matmul, times in matmuls_inside(step.eqn, step.params):
      dtype, cost = dtype_inside(matmul), spot.times * times * flops(matmul)
      key = OpKey(path, backward, matmul.primitive.name, rule, dtype, dtype, step.won)
      for entry in (self.flow.ops.setdefault(key, OpCount()), *[wide] * (dtype == FLOAT32.name)):
        entry.count += 1
        entry.flops += cost
    if self.is_float32_scope(step) or not (
      wide.count or (rule == "unknown" and any(step.operands))
    ):
      return
    if name in _FACTORS:
      entry = self.flow.wide.setdefault(WideKey(path, backward, line, _SYSTEM), OpCount())
    else:
      entry = self.flow.traced.setdefault((name, line, path), OpCount())
    entry.count += wide.count
    entry.flops += wide.flops

  def count_widened(self, step: Step, outs: Sequence[Value], spot: Spot) -> None:
    """What is float32 for no other reason than a widening takes twice its bytes."""
    for var, form, value in zip(step.eqn.outvars, step.outs, outs, strict=True):
      numbers = widenings_in(value.origins)
      if numbers and not step.bodies and not value.narrow and MEANT not in value.origins:
        self.flow.widenings[min(numbers)].bytes += spot.times * bytes_of(var, form) // 2

  def count_casts(self, step: Step, widened: set[Any]) -> None:
    """A value that is widened once is shared; a cast to 16 bits is made at every use."""
    for atom, read, form in zip(step.eqn.invars, step.reads, step.operands, strict=True):
      if isinstance(atom, Literal) or form is None:
        continue
      for dtype, shared in ((read.via, True), (read.to, read.to == FLOAT32)):
        if dtype is None or (shared and (atom, dtype) in widened):
          continue
        widened.add((atom, dtype))
        self.flow.casts[(step.place.path, _other(dtype, form), dtype.name)] += 1


_FACTORS = having(Trait.FACTORS)
_SYSTEM = "linear system: it multiplies what rounds by its condition"


def _count_matmul(entries: dict[Any, OpCount], key: Any, step: Step, spot: Spot) -> None:
  entry = entries.setdefault(key, OpCount())
  entry.count += 1
  entry.flops += spot.times * flops(step.eqn)


class _Islands:
  """Groups connected float32 steps of one jaxpr."""

  def __init__(self, planner: Planner) -> None:
    self._planner = planner
    self._group: dict[Any, list[tuple[Step, Line]]] = {}

  def add(self, step: Step, line: Line, outs: Sequence[Value]) -> None:
    """Put a step that made float32 out of narrow values into the group of its operands."""
    wide = any(v.touched and not v.narrow for v in outs)
    policy = self._planner.policies.policy_of(step.won)
    if step.bodies or not wide or policy.compute_dtype == FLOAT32:
      return
    group: list[tuple[Step, Line]] = [(step, line)]
    for atom in step.eqn.invars:
      other = self._group.get(atom) if not isinstance(atom, Literal) else None
      if other is not None and other is not group:
        small, large = sorted((group, other), key=len)
        large += small
        for member, _ in small:
          self._group.update(dict.fromkeys(member.eqn.outvars, large))
        group = large
    self._group.update(dict.fromkeys(step.eqn.outvars, group))

  def found(self) -> list[Island]:
    """The groups, in the order of their first steps."""
    groups = {id(group): group for group in self._group.values()}
    return [
      Island(
        group[0][0].place.path,
        group[0][1],
        tuple(dict.fromkeys(step.eqn.primitive.name for step, _ in group)),
        next((s.eqn.primitive.name for s, _ in group if s.rule in _SENSITIVE), "float32 met"),
      )
      for group in groups.values()
    ]


_SENSITIVE = frozenset({Rule.FULL, Rule.ALWAYS, Rule.NAMED})


def _accumulators(outer: Sequence[Any], inner: Sequence[Any], held: list[Value]) -> list[Value]:
  """A carry that starts from a constant is an accumulator: its float32 is meant."""
  meant = born(MEANT)
  return [
    meant if o is not None and o.kind is Kind.CONSTANT and is_data(i) else value
    for o, i, value in zip(outer, inner, held, strict=True)
  ]


def _aval(eqn: JaxprEqn) -> Any:
  return eqn.invars[0].aval


def _other(dtype: np.dtype, form: Form) -> str:
  return form.dtype.name if form.dtype != dtype else FLOAT32.name
