"""What everything that reads a float32 value rounds to one format, and what travels so.

Between devices such a value goes in 16 bits, which changes no number: ``all_gather(w) @ x``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import UNCHANGED, Rule, Trait, having
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import Body, bodies_of
from mpjax._engine.program.kinds import DATA, PARAM
from mpjax._engine.program.versions import Var

_TRAVELS, _SPREADS = having(Trait.TRAVELS), having(Trait.SPREADS)
_HANDS_ON = UNCHANGED | _TRAVELS | {"gather", "slice", "dynamic_slice"}
_MULTIPLY = frozenset({Rule.LOWER, Rule.WIDE})
_LOOK_INTO = frozenset({Rule.CALL, Rule.COND, Rule.SCAN, Rule.WHILE})


def rounded_alike(plan: Plan, places: Sequence[int]) -> dict[int, np.dtype]:
  """The formats to which everything in a body rounds some of its operands, matrices in float32.

  Args:
    plan: The plan of the body.
    places: Which operands, by index. Others are not looked at.
  """
  invars, found = versions.open_jaxpr(plan.jaxpr).invars, dict[int, np.dtype]()
  for n in places:
    if plan.in_forms[n] in (PARAM, DATA) and (dtype := _format(plan, invars[n])) is not None:
      found[n] = dtype
  return found


def travelling(plan: Plan) -> Plan:
  """A plan in which what all that reads it rounds alike goes from device to device rounded.

  A parameter that is spread stays where it is: only its gradient travels, which is summed in
  float32.

  Args:
    plan: The plan of one jaxpr.
  """
  steps = list(plan.steps)
  for n, step in enumerate(steps):
    name = step.eqn.primitive.name
    if name in _TRAVELS and step.rule is Rule.FOLLOW and step.outs[0] in (PARAM, DATA):
      is_there = name in _SPREADS and step.outs[0] == PARAM
      dtype = None if is_there else _format(plan, step.eqn.outvars[0])
      if dtype is not None:
        steps[n] = replace(step, travels=dtype)
  return replace(plan, steps=tuple(steps)) if steps != [*plan.steps] else plan


def _format(plan: Plan, var: Var) -> np.dtype | None:
  """The format to which all that reads a matrix rounds it, if there is one."""
  formats = {*_formats(plan, var)} if len(jaxprs.shape(var)) > 1 else set()
  return formats.pop() if len(formats) == 1 else None


def _formats(plan: Plan, var: Var) -> Iterator[np.dtype | None]:
  """The formats to which all that reads a variable rounds it; None for what does not."""
  for index, _ in plan.readers[var]:
    if index < 0:
      yield None
      continue
    step = plan.steps[index]
    for n, atom in enumerate(step.eqn.invars):
      if atom is var:
        yield from _formats_at(plan, step, n)


def _formats_at(plan: Plan, step: Step, place: int) -> Iterator[np.dtype | None]:
  read = step.reads[place]
  if read.via is not None:
    yield None
  elif read.to is not None and read.to != FLOAT32:
    yield read.to
  elif step.rule in _MULTIPLY and step.wide == place and not step.in_float8:
    other = step.operands[1 - place]
    dtype = step.reads[1 - place].to or (other and other.dtype)
    yield None if dtype == FLOAT32 else dtype
  elif step.rule in _LOOK_INTO and step.bodies:
    for body, inner in zip(bodies_of(step.eqn), step.bodies, strict=True):
      yield from _formats_in(body, inner, place)
  elif step.rule is Rule.FOLLOW and step.eqn.primitive.name in _HANDS_ON and not place:
    yield from _formats(plan, step.eqn.outvars[0])
  else:
    yield None


def _formats_in(body: Body, plan: Plan, place: int) -> Iterator[np.dtype | None]:
  """The same in the body of an equation, for one of the operands of that."""
  invars = versions.open_jaxpr(plan.jaxpr).invars
  for n, operand in enumerate(body.operands):
    if operand == place:
      if n in body.carry:
        yield None
      else:
        yield from _formats(plan, invars[n])
