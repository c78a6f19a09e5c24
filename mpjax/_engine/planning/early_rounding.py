"""Quotients that are moved and then rounded are rounded before they are moved.

``softmax(concatenate([scores, sink]))[..., :-1] @ v``: a matmul alone reads the slice, in 16 bits.
Rounded before it is cut, the softmax is one whose result is read in 16 bits, and stores no float32.
The numbers are the same, those of the cotangents too, since no such move adds any up. Nor does a
mask that chooses among them. What multiplies them by a number reads float32: it would round the
number too, and a quotient that is larger than the format holds may be small behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import JITTED
from mpjax._engine.planning.plan import AS_HELD, Plan, Read, Step
from mpjax._engine.program import versions
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.kinds import CONSTANT, DATA, Form, Forms, narrow
from mpjax._engine.program.versions import Literal, Var

_MOVES = frozenset(
  {
    *("reshape", "transpose", "squeeze", "expand_dims", "rev"),
    *("slice", "dynamic_slice", "split", "select_n"),
  }
)
_MAY_MOVE = _MOVES | JITTED


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
    elif name in _MAY_MOVE and quotients and quotients & variables_of(step.eqn.invars):
      quotients |= {*step.eqn.outvars}
      moves.append(n)
  steps, changed = list(plan.steps), False
  for n in reversed(moves):
    readers = [plan.readers[var] for var in steps[n].eqn.outvars]
    found = sorted({reader for reads in readers for reader, _ in reads})
    if max(map(len, readers), default=0) == 1 and found[0] >= 0:  # no result of the plan
      changed |= _round(steps, n, found)
  return replace(plan, steps=tuple(steps)) if changed else plan


def _round(steps: list[Step], n: int, readers: Sequence[int]) -> bool:
  """Round what a step moves, if it moves nothing but float32 that all readers round alike."""
  made = steps[n].eqn.outvars
  places = [
    (m, k)
    for m in readers
    for k, atom in enumerate(steps[m].eqn.invars)
    if not isinstance(atom, Literal) and atom in made
  ]
  formats = {steps[m].reads[k] for m, k in places}
  via, to = formats.pop()
  if formats or via is not None or to is None or to == FLOAT32:
    return False
  rounded = _rounded(steps[n], to)
  if rounded is None:
    return False
  steps[n] = rounded
  for m, k in places:
    reads, operands = [*steps[m].reads], [*steps[m].operands]
    reads[k], operands[k] = AS_HELD, narrow(to)
    steps[m] = replace(steps[m], reads=tuple(reads), operands=tuple(operands))
  return True


def _rounded(step: Step, to: np.dtype) -> Step | None:
  """A step that reads and makes in a format what it does in float32; None if it computes."""
  bodies = [_rounded_body(body, to) for body in step.bodies]
  found = [body for body in bodies if body is not None]
  if len(found) < len(bodies) or not {*step.operands} <= {None, DATA, CONSTANT}:
    return None
  cast = {DATA} if found else {DATA, CONSTANT}  # a body gets its numbers as they are
  pairs = zip(step.reads, step.operands, strict=True)
  reads = tuple(Read(read.via, to) if form in cast else read for read, form in pairs)
  return replace(step, reads=reads, outs=_in_format(step.outs, to), bodies=tuple(found))


def _rounded_body(plan: Plan, to: np.dtype) -> Plan | None:
  """The plan of a function that does nothing but move its float32 operands, these in a format."""
  inner, moved, steps = versions.open_jaxpr(plan.jaxpr), set[Var](), list[Step]()
  pairs = zip(inner.invars, plan.in_forms, strict=True)
  moved.update(var for var, form in pairs if form == DATA)
  for step in plan.steps:
    after: Step | None = step
    if DATA in (*step.operands, *step.outs):
      held = zip(step.eqn.invars, step.operands, strict=True)
      own = all(not isinstance(a, Literal) and a in moved for a, form in held if form == DATA)
      is_move = own and DATA in step.operands and step.eqn.primitive.name in _MAY_MOVE
      after = _rounded(step, to) if is_move else None
      moved.update(step.eqn.outvars)
    if after is None:
      return None
    steps.append(after)
  results = zip(inner.outvars, plan.out_forms, plan.out_reads, strict=True)
  if any(form == DATA and (var not in moved or read != AS_HELD) for var, form, read in results):
    return None
  in_forms, out_forms = _in_format(plan.in_forms, to), _in_format(plan.out_forms, to)
  return replace(plan, in_forms=in_forms, steps=tuple(steps), out_forms=out_forms)


def _in_format(forms: Forms, to: np.dtype) -> Forms:
  """Forms of which those of float32 values are those of a format."""
  form: Form = narrow(to)
  return tuple([form if before == DATA else before for before in forms])
