"""Quotients that are moved and then rounded are rounded before they are moved.

``softmax(concatenate([scores, sink]))[..., :-1] @ v``: a matmul alone reads the slice, in 16 bits.
Rounded before it is cut, the softmax is one whose result is read in 16 bits, and stores no float32.
The numbers are the same, those of the cotangents too, since no such move adds any up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.jaxprs import variables_of
from mpjax._engine.kinds import DATA, narrow
from mpjax._engine.plan import AS_HELD, Plan, Read, Step
from mpjax._engine.versions import Literal, Var

_MOVES = frozenset(
  {
    *("reshape", "transpose", "squeeze", "expand_dims", "rev"),
    *("slice", "dynamic_slice", "split", "select_n"),
  }
)


def rounding_early(plan: Plan) -> Plan:
  """A plan in which a quotient that is moved and rounded by its one reader is rounded before.

  Args:
    plan: The plan of one jaxpr.
  """
  quotients, moves = set[Var](), list[int]()
  for n, step in enumerate(plan.steps):
    name = step.eqn.primitive.name
    if name == "div" and step.outs[0] == DATA:
      quotients |= {*step.eqn.outvars}
    elif name in _MOVES and quotients and not quotients.isdisjoint(variables_of(step.eqn.invars)):
      quotients |= {*step.eqn.outvars}
      moves.append(n)
  steps, changed = list(plan.steps), False
  for n in reversed(moves):
    readers = [plan.readers.get(var, []) for var in steps[n].eqn.outvars]
    found = sorted({reader for reads in readers for reader, _ in reads})
    if max(map(len, readers)) == 1 and found[0] >= 0:  # no result of the plan
      changed |= _round(steps, n, found)
  return replace(plan, steps=tuple(steps)) if changed else plan


def _round(steps: list[Step], n: int, readers: Sequence[int]) -> bool:
  """Round what a step moves, if it moves nothing but float32 that all readers round alike."""
  step = steps[n]
  places = [
    (m, k)
    for m in readers
    for k, atom in enumerate(steps[m].eqn.invars)
    if not isinstance(atom, Literal) and atom in step.eqn.outvars
  ]
  formats = {steps[m].reads[k] for m, k in places}
  via, to = formats.pop()
  if formats or via is not None or to in (None, FLOAT32) or {*step.operands} - {None, DATA}:
    return False
  form = narrow(to)
  steps[n] = replace(
    step,
    reads=tuple(
      read if held is None else Read(read.via, to)
      for read, held in zip(step.reads, step.operands, strict=True)
    ),
    outs=tuple(form for _ in step.outs),
  )
  for m, k in places:
    reads, operands = [*steps[m].reads], [*steps[m].operands]
    reads[k], operands[k] = AS_HELD, form
    steps[m] = replace(steps[m], reads=tuple(reads), operands=tuple(operands))
  return True
