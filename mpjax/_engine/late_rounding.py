"""Multiples of narrow values that are added to float32 are float32 themselves.

``x + h / 6 * k``: 16 bits hold no 1 / 60, so that as a number of theirs each step would be 0.4%
longer than it is, and an integral from 0 to 1 end at 1.004. Where nothing but float32 reads the
multiple, it is multiplied in float32, and so is what adds or moves it on the way. All of this is
linear, so that the backward pass stores nothing of it in either format. A multiple that goes on in
16 bits rounds with its number, as by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine import versions
from mpjax._engine.constants import NumberSet
from mpjax._engine.kinds import CONSTANT, DATA, Form, Kind
from mpjax._engine.plan import AS_HELD, Plan, Read, Step
from mpjax._engine.versions import Atom, Literal, Var

_MULTIPLIES = frozenset({"mul", "div"})
_ADDS = frozenset({"add", "sub"})
_LEADS_ON = _ADDS | having(Trait.MOVES) | {"neg", "broadcast_in_dim"}
_ADDS_UP = _ADDS | {"reduce_sum"}


def rounding_late(plan: Plan, numbers: Callable[[Atom], NumberSet], *, is_whole: bool) -> Plan:
  """A plan in which such multiples are float32.

  Args:
    plan: The plan of one jaxpr.
    numbers: The numbers that occur in a constant of it.
    is_whole: Whether it is that of a whole function, whose results leave in float32 anyway.
  """
  multiples = [n for n, step in enumerate(plan.steps) if _is_inexact_multiple(step, numbers)]
  wide = set[int]()
  for n in reversed(multiples):
    wide |= _way(plan, n, wide, is_whole=is_whole)
  if not wide:
    return plan
  made = {var for n in wide for var in plan.steps[n].eqn.outvars}
  readers = {n for var in made for n, _ in plan.readers[var]}
  steps = [*plan.steps]
  for n in wide | readers - {_RESULT}:
    steps[n] = _reading(steps[n], made, is_wide=n in wide)
  results = zip(versions.open_jaxpr(plan.jaxpr).outvars, plan.out_forms, strict=True)
  out_forms = tuple(DATA if not isinstance(v, Literal) and v in made else f for v, f in results)
  return replace(plan, steps=tuple(steps), out_forms=out_forms)


def _is_inexact_multiple(step: Step, numbers: Callable[[Atom], NumberSet]) -> bool:
  """Whether a step multiplies a narrow value by a number that its format does not hold."""
  if step.eqn.primitive.name not in _MULTIPLIES or not _is_multiple(step):
    return False
  found = numbers(step.eqn.invars[step.operands.index(CONSTANT)])
  return found is None or any(_is_inexact(number, step.outs[0]) for number in found)


def _is_multiple(step: Step) -> bool:
  """Whether a step makes a narrow value of a narrow one and of numbers, none of them divided."""
  first, second = step.operands
  kinds = {form and form.kind for form in (first, second)}
  return (
    kinds == {Kind.CONSTANT, Kind.NARROW}
    and _is_narrow(step)
    and not (step.eqn.primitive.name == "div" and first == CONSTANT)
  )


def _is_narrow(step: Step) -> bool:
  (form,) = step.outs
  return step.rule is Rule.FOLLOW and form is not None and form.kind is Kind.NARROW


def _is_inexact(number: float, form: Form | None) -> bool:
  return form is not None and float(np.asarray(number).astype(form.dtype)) != number


def _way(plan: Plan, start: int, wide: set[int], *, is_whole: bool) -> set[int]:
  """The steps from a multiple to where float32 reads it alone; none if it is read otherwise."""
  way, n = {start}, start
  while True:
    (var,) = plan.steps[n].eqn.outvars
    reads = plan.readers.get(var, [])
    if len(reads) != 1 or reads[0][1].via is not None:
      return set()
    n, read = reads[0]
    if n == _RESULT:
      return way if is_whole else set()
    reader = plan.steps[n]
    name = reader.eqn.primitive.name
    if n in wide or (read.to == FLOAT32 and name in _ADDS_UP and reader.outs == _ONE_FLOAT32):
      return way
    leads_on = name in _LEADS_ON or (name in _MULTIPLIES and _is_multiple(reader))
    if not leads_on or read.to is not None or len(reader.outs) != 1 or not _is_narrow(reader):
      return set()
    way.add(n)


_ONE_FLOAT32 = (DATA,)
_RESULT = -1


def _reading(step: Step, made: set[Var], *, is_wide: bool) -> Step:
  """A step that reads what is float32 now as it is held; and all else so, if it is wide itself."""
  reads: list[Read] = []
  operands = []
  for atom, form, read in zip(step.eqn.invars, step.operands, step.reads, strict=True):
    if not isinstance(atom, Literal) and atom in made:
      form, read = DATA, AS_HELD
    elif is_wide and form is not None:
      read = Read(read.via, FLOAT32) if form.dtype != FLOAT32 or read.via else AS_HELD
    reads.append(read)
    operands.append(form)
  outs = step.outs if not is_wide else _ONE_FLOAT32
  return replace(step, reads=tuple(reads), operands=tuple(operands), outs=outs)
