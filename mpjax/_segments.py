"""Runs of equations that recur in a plan, as those of a model's equal layers do.

Differentiating an equation costs JAX far more than planning it. What a jitted function computes
JAX differentiates once, however often it is called, so a run that recurs is executed as one
jitted function. It is inlined where it is called: into the jaxpr by JAX 0.10, into the lowered
module by later ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mpjax._jaxpr import Literal
from mpjax._plan import Plan, Read, Readers, Step, readers_of
from mpjax._precision import Rule
from mpjax._values import Key, nearest, shared

OFTEN = 4
"""How often a run must recur to be worth a function of its own."""

_SIMPLE = frozenset(
  {
    Rule.LOWER,
    Rule.SCORES,
    Rule.FULL,
    Rule.ALWAYS,
    Rule.FOLLOW,
    Rule.NAMED,
    Rule.EACH,
    Rule.CONVERT,
  }
)
_CALLS = frozenset({"jit", "pjit"})


class Segment(NamedTuple):
  """A run of steps, from one index up to another."""

  start: int
  stop: int
  inputs: tuple[Key, ...]
  """What the steps read that none of them computes."""
  outputs: tuple[Key, ...]
  """What others read of their results."""
  code: Hashable
  """Equal for runs that compute the same from their inputs."""


def find(plan: Plan, apart: Collection[int]) -> Mapping[int, Segment]:
  """The runs of a plan that recur often, by the index of their first step.

  Args:
    plan: The plan.
    apart: The indices of steps that are in no run.
  """
  runs = [run for run in _runs(plan.steps, apart) if len(run) > 1]
  if len(runs) < OFTEN:
    return {}
  readers = readers_of(plan)
  segments = [_segment(plan.steps, run, readers) for run in runs]
  count = Counter(segment.code for segment in segments)
  return {segment.start: segment for segment in segments if count[segment.code] >= OFTEN}


def _runs(steps: tuple[Step, ...], apart: Collection[int]) -> list[range]:
  """The longest runs of simple steps in one module and one context."""
  runs, start = [], 0
  for stop in range(1, len(steps) + 1):
    ended = stop == len(steps) or stop in apart or not _continues(steps[stop - 1], steps[stop])
    if not ended:
      continue
    if _is_simple(steps[start]) and start not in apart:
      runs.append(range(start, stop))
    start = stop
  return runs


def _continues(before: Step, step: Step) -> bool:
  same = before.eqn.source_info.name_stack == step.eqn.source_info.name_stack
  return same and before.eqn.ctx == step.eqn.ctx and _is_simple(before) and _is_simple(step)


def _is_simple(step: Step) -> bool:
  called = step.rule is Rule.CALL and step.eqn.primitive.name in _CALLS
  return not step.eqn.effects and (called or step.rule in _SIMPLE)


def _segment(steps: tuple[Step, ...], run: range, readers: Readers) -> Segment:
  made = {var: n for n, var in enumerate(v for i in run for v in steps[i].eqn.outvars)}
  inputs: dict[Key, int] = {}

  def operand(atom: Any, read: Read) -> Hashable:
    if isinstance(atom, Literal):
      return atom.aval, np.asarray(atom.val).tobytes(), read
    if atom in made:
      return made[atom], read
    return "input", inputs.setdefault(shared(atom, read), len(inputs)), read.to

  code = [
    (_code(step), tuple(map(operand, step.eqn.invars, step.reads)))
    for step in (steps[i] for i in run)
  ]
  read = [(shared(var, r), n in run) for var in made for n, r in readers.get(var, ())]
  inside = {key for key, is_inside in read if is_inside}
  outside = [key for key, is_inside in read if not is_inside]
  handed = [near for key in outside for near in (Key(key.var), nearest(key, inside))]
  outputs = tuple(dict.fromkeys(handed))
  exits = tuple((made[key.var], key.via, key.wide) for key in outputs)
  return Segment(run.start, run.stop, tuple(inputs), outputs, _hashable((tuple(code), exits)))


def _code(step: Step) -> tuple[Any, ...]:
  """What a step does, but for its operands; where it was written is part of it."""
  eqn = step.eqn
  params = tuple(sorted(step.params.items()))
  written = eqn.source_info.traceback
  return eqn.primitive, params, step.rule, step.outs, tuple(map(id, step.bodies)), written, eqn.ctx


def _hashable(code: Hashable) -> Hashable:
  """The code, or for one whose parameters cannot be compared something equal to nothing else."""
  try:
    hash(code)
  except TypeError:
    return object()
  return code
