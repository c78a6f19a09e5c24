"""Runs of equations, and islands, that recur in a plan, as those of a model's equal layers do.

Differentiating an equation costs JAX far more than planning it. What a jitted function computes
JAX differentiates once, however often it is called, so what recurs is executed as one
jitted function. It is inlined where it is called: into the jaxpr by JAX 0.10, into the lowered
module by later ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.primitives import JITTED, Rule
from mpjax._engine.planning.plan import Plan, Read, Step
from mpjax._engine.program import jaxprs
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var
from mpjax._engine.running.environment import Key, nearest, shared
from mpjax._engine.running.islands import Island
from mpjax._engine.running.softmax import Softmax

OFTEN = 4
"""How often a run must recur to be worth a function of its own."""

_SIMPLE = frozenset(
  {
    Rule.LOWER,
    Rule.WIDE,
    Rule.EXACT,
    Rule.FULL,
    Rule.ALWAYS,
    Rule.FOLLOW,
    Rule.MULTIPLY,
    Rule.NAMED,
    Rule.EACH,
    Rule.CONVERT,
  }
)

Unit = Step | Island | Softmax
"""What is executed at once: a step, or several that store less for the backward pass together."""


class Repeat(NamedTuple):
  """Units that run as one function."""

  units: tuple[Unit, ...]
  eqn: JaxprEqn
  """The first equation."""
  scopes: int
  """How many scopes lie around all of the equations: those of the call."""
  inputs: tuple[Key, ...]
  """What the units read that none of them computes."""
  outputs: tuple[Key, ...]
  """What others read of their results."""
  code: Hashable
  """Equal for runs that compute the same from their inputs."""


def joined(plan: Plan, units: Mapping[int, Unit], kept: Collection[Var]) -> list[Unit | Repeat]:
  """What a plan executes, those runs of units that recur often as repeats.

  Args:
    plan: The plan.
    units: What it executes one after the other, by the index of the step for which it is run.
    kept: The values whose rounding is kept, see `kept_rounding`.
  """
  runs = _runs(units)
  worthy = [run for run in runs if len(run) > 1 or not isinstance(units[run[0]], Step)]
  repeats: dict[int, Repeat] = {}
  if len(worthy) >= OFTEN:
    repeats = {run[0]: _repeat(plan, {n: units[n] for n in run}, kept) for run in worthy}
  count = Counter(repeat.code for repeat in repeats.values())
  found: list[Unit | Repeat] = []
  for run in runs:
    repeat = repeats.get(run[0])
    if repeat is not None and count[repeat.code] >= OFTEN:
      found.append(repeat)
    else:
      found += (units[n] for n in run)
  return found


def _runs(units: Mapping[int, Unit]) -> list[list[int]]:
  """The indices, cut into the longest runs of simple steps in one module and one context.

  Every other unit stands alone.
  """
  runs: list[list[int]] = []
  before: JaxprEqn | None = None
  for index, unit in units.items():
    eqn = unit.eqn if isinstance(unit, Step) and _is_simple(unit) else None
    if before is not None and eqn is not None and _stand_together(before, eqn):
      runs[-1].append(index)
    else:
      runs.append([index])
    before = eqn
  return runs


def _stand_together(eqn: JaxprEqn, other: JaxprEqn) -> bool:
  """Whether two equations stand in one module and one context."""
  stack, others = eqn.source_info.name_stack, other.source_info.name_stack
  return eqn.ctx == other.ctx and (stack is others or stack == others)


def _is_simple(step: Step) -> bool:
  called = step.rule is Rule.CALL and step.eqn.primitive.name in JITTED
  return not step.eqn.effects and (called or step.rule in _SIMPLE)


def _repeat(plan: Plan, units: Mapping[int, Unit], kept: Collection[Var]) -> Repeat:
  steps = {i: plan.steps[i] for index, unit in units.items() for i in _steps_of(index, unit)}
  eqns = [step.eqn for step in steps.values()]
  made = {var: n for n, var in enumerate([v for eqn in eqns for v in eqn.outvars])}
  scopes = jaxprs.common_scopes(eqns)
  inside_of_islands = {i for u in units.values() if not isinstance(u, Step) for i in u.steps}
  inputs: dict[Key, int] = {}

  def operand(index: int, atom: Atom, read: Read) -> Hashable:
    if isinstance(atom, Literal):
      return atom.aval, np.asarray(atom.val).tobytes(), read
    if atom in made:
      return made[atom], read
    key = Key(atom) if index in inside_of_islands else shared(atom, read)  # islands cast inside
    return "input", inputs.setdefault(key, len(inputs)), atom.aval, read

  code = [
    (
      _code(step, scopes),
      *[operand(i, *pair) for pair in zip(step.eqn.invars, step.reads, strict=True)],
    )
    for i, step in steps.items()
  ]
  read = [(shared(var, r), n in steps) for var in made for n, r in plan.readers[var]]
  inside = {key for key, is_inside in read if is_inside}
  outside = [key for key, is_inside in read if not is_inside]
  handed = [near for key in outside for near in (Key(key.var), nearest(key, inside))]
  outputs = tuple(dict.fromkeys(handed))
  exits = tuple((made[key.var], key.via, key.wide) for key in outputs)
  kinds = tuple(map(_kind, units.values()))
  rounded = tuple(n for var, n in made.items() if var in kept)
  whole = _hashable((kinds, tuple(code), exits, rounded))
  return Repeat(tuple(units.values()), eqns[0], scopes, tuple(inputs), outputs, whole)


def _steps_of(index: int, unit: Unit) -> tuple[int, ...]:
  """The indices of a unit's steps."""
  if isinstance(unit, Step):
    return (index,)
  return unit.steps if index in unit.steps else (*unit.steps, index)


def _kind(unit: Unit) -> Hashable:
  """How a unit runs its steps."""
  if isinstance(unit, Step):
    return Step
  if isinstance(unit, Island):
    return Island, len(unit.steps), unit.dtype, unit.merges
  run = unit.axes, unit.dtype, unit.held, unit.matmul is None, unit.is_masked
  return Softmax, len(unit.steps), *run


def _code(step: Step, scopes: int) -> tuple[Any, ...]:
  """What a step does, but for its operands; where it was written is part of it.

  So are the shapes of its results: a bias is spread over them, and params do not hold them all.
  """
  eqn, info = step.eqn, step.eqn.source_info
  shapes = tuple([var.aval for var in eqn.outvars])
  params = tuple(sorted(step.params.items()))
  bodies = tuple(map(id, step.bodies))
  written = info.traceback, info.name_stack[scopes:], eqn.ctx
  ways = step.parameter, step.order, step.float8
  return eqn.primitive, params, shapes, step.rule, step.outs, bodies, written, ways


def _hashable(code: Hashable) -> Hashable:
  """The code, or for one whose parameters cannot be compared something equal to nothing else."""
  try:
    hash(code)
  except TypeError:
    return object()
  return code
