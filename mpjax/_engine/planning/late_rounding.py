"""Multiples of narrow values that are added to float32 are float32 themselves.

``x + h / 6 * k``: 16 bits hold no 1 / 60, so that as a number of theirs each step would be 0.4%
longer than it is, and an integral from 0 to 1 end at 1.004. Where nothing but float32 reads the
multiple, it is multiplied in float32, and so is what adds or moves it on the way. All of this is
linear, so that the backward pass stores nothing of it but masks. A multiple that goes on in
16 bits rounds with its number, as by hand. Masks, slices and functions that do nothing but that are
on the way, too: of scores over 0.07 the diagonal is masked before their cross-entropy.

So is what is multiplied, added or moved for a float32 matmul alone, as the ``2 * e`` and ``e.T`` of
a distance: what comes back to e from there and from its squares is a small difference, which adds
up in float32. And so is what is made of a value for float32 alone if that is read in float32
besides: of ``logsumexp(s) - (s * one_hot).sum()`` there come back to s a probability and -1. And so
is a multiple that data multiply, for which nothing is stored, and what is cut twice in the same way
for float32 alone, as halves of which kernels are compared.

What no layer comes after is an output: of ``2 * sigmoid(o) - 1``, which a loss compares, o rounds,
as by hand, and nothing else. Activations of outputs, numbers that are added to them and what is
made of these is float32 where float32 alone reads it. So it is where it is returned for a loss
outside, if a number is added to it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import ADDS, BOUNDS, FUNCTIONS, SCALES, Rule, Trait, having
from mpjax._engine.analyses.constants import NumberSet
from mpjax._engine.planning.plan import AS_HELD, ONE_FLOAT32, Plan, Read, Step
from mpjax._engine.program import versions
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.kinds import CONSTANT, DATA, PARAM, Form, Kind, is_narrow
from mpjax._engine.program.versions import Atom, Literal, Var

_MOVES = having(Trait.MOVES) - {"name"}  # by which a checkpoint would store it
_CHOOSES = frozenset({"select_n", "scatter", "concatenate", "pad", "slice", "dynamic_slice"})
_LEADS_ON = ADDS | _MOVES | _CHOOSES | {"neg", "broadcast_in_dim"}
_ADDS_UP = ADDS | {"reduce_sum"}
_AS_WIDE = Read(to=FLOAT32)
_STEEP = frozenset({"exp", "exp2", "pow", "log"})
_BENDS = frozenset({"logistic", "tanh", "erf", "erfc", "atan", "sin", "cos", "sqrt", "cbrt"})
_MAKES_OUTPUTS = _LEADS_ON | _BENDS | BOUNDS | SCALES | {"abs", "integer_pow"}
_MAY_LEAD_ON = _MAKES_OUTPUTS | FUNCTIONS
_ENDS = _ADDS_UP | FUNCTIONS | _STEEP | {"reduce_max", "reduce_min", "gather"}
_RESULT = -1
"""What reads the results of a plan, among the indices of steps."""


class Around(NamedTuple):
  """What is known around a plan.

  Attributes:
    numbers: The numbers that occur in a constant of it.
    multiplied: What leads into a matmul: weights of an attention round with their scale, as by
      hand, and no loss does.
    is_of_layers: Whether one of some values may be of layers. Data that are none have no gradient,
      for which a product with them would store the multiple.
    comes_last: Whether no layer comes after a value, which goes into a loss.
    is_returned: Whether no matmul does, and what is made of it is returned for a loss outside.
    is_whole: Whether the plan is that of a whole function, whose results leave in float32 anyway.
  """

  numbers: Callable[[Atom], NumberSet]
  multiplied: Collection[Var]
  is_of_layers: Callable[[Sequence[Atom]], bool]
  comes_last: Callable[[Var], bool]
  is_returned: Callable[[Var], bool]
  is_whole: bool


def rounding_late(plan: Plan, around: Around) -> Plan:
  """A plan of one jaxpr in which such multiples are float32."""
  late = _Late(plan, around)
  wide, made = late.made_wide()
  if not wide:
    return plan
  readers = {n for var in made for n, _ in plan.readers[var]}
  steps = [*plan.steps]
  for n in wide | readers - {_RESULT}:
    steps[n] = _reading(steps[n], made, is_wide=n in wide)
  results = zip(versions.open_jaxpr(plan.jaxpr).outvars, plan.out_forms, strict=True)
  out_forms = tuple(DATA if not isinstance(v, Literal) and v in made else f for v, f in results)
  return replace(plan, steps=tuple(steps), out_forms=out_forms)


class _Late:
  """The steps that make or lead on multiples, and whose result float32 alone reads.

  Once, or to add or multiply: what is added up and read again besides is most often normalized.
  """

  def __init__(self, plan: Plan, around: Around) -> None:
    self._plan, self._around = plan, around
    self._shifted = _shifted(plan) if around.is_whole else ()
    self._cuts = Counter(_cut(step) for step in plan.steps if step.eqn.primitive.name == "slice")
    self._late = set[int]()
    self._exact = set[int]()  # of these, what others round inside
    self._returned = {_RESULT}  # of these, what is made of nothing on the way out
    self._find()

  def made_wide(self) -> tuple[set[int], set[Var]]:
    """Which of the steps are better in float32, and what they make."""
    wide, made = set[int](), set[Var]()
    for n in sorted(self._late):
      step = self._plan.steps[n]
      if (
        _is_inexact_multiple(step, self._around.numbers)
        or _leads_to_matmul(self._plan, step)
        or self._is_read_besides(n)
        or (_bends_or_shifts(step) and self._is_output(step))
        or self._is_cut_again(step)
        or made & variables_of(step.eqn.invars)
      ):
        wide.add(n)
        made |= {*step.eqn.outvars}
    return wide, made

  def _find(self) -> None:
    likely = [
      (n, step)
      for n, step in enumerate(self._plan.steps)
      if step.eqn.primitive.name in _MAY_LEAD_ON
      and step.rule in (Rule.FOLLOW, Rule.CALL)
      and len(step.outs) == 1
      and is_narrow(step.outs[0])
    ]
    for n, step in reversed(likely):
      self._see(n, step)

  def _see(self, n: int, step: Step) -> None:
    """Note a step whose readers have been seen, if all of them read it in float32."""
    leads_on = _leads_on(step)
    is_last = _leads_on(step, _MAKES_OUTPUTS) and self._is_output(step)
    (result,) = step.eqn.outvars
    reads = self._plan.readers[result] if leads_on or is_last else []
    is_made = _is_shift(step) or any(reader not in self._returned for reader, _ in reads)
    if (
      not reads
      or not (is_made or leads_on)
      or not self._are_late(step, reads, is_last)
      or (len(reads) > 1 and any(_is_total(self._plan, reader) for reader, _ in reads))
    ):
      return
    rounds_inside = any(
      _is_exact(self._plan, reader) or reader in self._exact for reader, _ in reads
    )
    if rounds_inside and _rounds(step, self._around.numbers):
      return  # others would read what it makes as it was before
    self._late.add(n)
    if rounds_inside:
      self._exact.add(n)
    if not is_made:
      self._returned.add(n)

  def _are_late(self, step: Step, reads: Sequence[tuple[int, Read]], is_last: bool) -> bool:
    """Whether all that reads the result of a step does in float32, or is late itself."""
    if self._is_cut_again(step):
      return all(reader in self._late or read == _AS_WIDE for reader, read in reads)
    (result,) = step.eqn.outvars
    ends = (
      (lambda _: True) if is_last else _adds_up if result in self._around.multiplied else self._ends
    )
    return all(self._is_late(reader, read, ends) for reader, read in reads)

  def _is_late(self, reader: int, read: Read, ends: Callable[[Step], bool]) -> bool:
    """Whether a narrow value is read in float32, or by what is late itself."""
    if read.via is not None:
      return False
    if reader == _RESULT:
      return self._around.is_whole
    if reader in self._late:
      return read.to is None
    step = self._plan.steps[reader]
    is_end = ends(step) or _is_wide_matmul(step)
    is_end = is_end or (
      step.eqn.primitive.name == "concatenate" and _leads_to_matmul(self._plan, step)
    )
    return read.to == FLOAT32 and is_end and step.outs == ONE_FLOAT32

  def _ends(self, step: Step) -> bool:
    return step.eqn.primitive.name in _ENDS or _multiplies_data(step, self._around.is_of_layers)

  def _is_output(self, step: Step) -> bool:
    (result, *_) = step.eqn.outvars
    is_said = self._around.comes_last(result) or (
      result in self._shifted and self._around.is_returned(result)
    )
    return is_said and not step.place.has_cotangents

  def _is_cut_again(self, step: Step) -> bool:
    """Whether a step cuts a part from a value that another one cuts from it, too."""
    return step.eqn.primitive.name == "slice" and self._cuts[_cut(step)] > 1

  def _is_read_besides(self, reader: int) -> bool:
    """Whether the narrow value that a step reads is read in float32 by others, too."""
    step = self._plan.steps[reader]
    return any(
      read.to == FLOAT32 and n not in self._late
      for atom, form in zip(step.eqn.invars, step.operands, strict=True)
      if not isinstance(atom, Literal) and is_narrow(form)
      for n, read in self._plan.readers[atom]
    )


def _is_inexact_multiple(step: Step, numbers: Callable[[Atom], NumberSet]) -> bool:
  """Whether a step multiplies a narrow value by a number that its format does not hold."""
  if step.rule is Rule.CALL:
    (body,) = step.bodies
    outside = dict(zip(versions.open_jaxpr(body.jaxpr).invars, step.eqn.invars, strict=True))

    def known(atom: Atom) -> NumberSet:
      return numbers(atom if isinstance(atom, Literal) else outside.get(atom, atom))

    return any(_is_inexact_multiple(inner, known) for inner in body.steps)
  if not _is_multiple(step):
    return False
  found = numbers(step.eqn.invars[step.operands.index(CONSTANT)])
  if found is not None and step.eqn.primitive.name == "div":  # 16 bits hold 60, and no 1 / 60
    found = {1 / number if number else 0.0 for number in found}
  return found is None or any(_is_inexact(number, step.outs[0]) for number in found)


def _is_wide_matmul(step: Step) -> bool:
  """Whether a step is a matmul that needs its operands' cotangents in float32."""
  return bool(step.because) and step.rule in (Rule.FULL, Rule.EXACT)


def _leads_to_matmul(plan: Plan, step: Step) -> bool:
  """Whether such matmuls read what a step makes."""
  readers = plan.readers[step.eqn.outvars[0]]
  return any(n != _RESULT and _is_wide_matmul(plan.steps[n]) for n, _ in readers)


def _adds_up(step: Step) -> bool:
  return step.eqn.primitive.name in _ADDS_UP


def _multiplies_data(step: Step, is_of_layers: Callable[[Sequence[Atom]], bool]) -> bool:
  """Whether a step multiplies a narrow value by data that no layer made, or divides these by it."""
  if step.eqn.primitive.name not in SCALES or {*step.operands} & {None, CONSTANT, PARAM}:
    return False
  pairs = zip(step.eqn.invars, step.operands, strict=True)
  data = [atom for atom, form in pairs if form == DATA]
  return len(data) == 1 and not is_of_layers(data)


def _shifted(plan: Plan) -> Collection[Var]:
  """What leads to a step that adds a number to it."""
  found = set[Var]()
  for step in reversed(plan.steps):
    if not found.isdisjoint(step.eqn.outvars) or _is_shift(step):
      found |= {*step.eqn.outvars, *variables_of(step.eqn.invars)}
  return found


def _is_multiple(step: Step) -> bool:
  """Whether a step with a narrow result multiplies by a number, or divides by one."""
  if step.eqn.primitive.name not in SCALES:
    return False
  first, second = step.operands
  kinds = {form and form.kind for form in (first, second)}
  is_reciprocal = step.eqn.primitive.name == "div" and first == CONSTANT
  return kinds == {Kind.CONSTANT, Kind.NARROW} and not is_reciprocal


def _is_inexact(number: float, form: Form | None) -> bool:
  return form is not None and float(np.asarray(number).astype(form.dtype)) != number


def _cut(step: Step) -> Hashable:
  (value,), params = step.eqn.invars, step.eqn.params
  return id(value), params["start_indices"], params["limit_indices"], params["strides"]


def _rounds(step: Step, numbers: Callable[[Atom], NumberSet]) -> bool:
  """Whether what a step makes of narrow values needs more digits than these."""
  if step.bodies:
    steps = (inner for body in step.bodies for inner in body.steps)
    return any(_rounds(inner, lambda atom: None) for inner in steps)
  if step.eqn.primitive.name in ADDS:
    return True
  if not _is_multiple(step):
    return False
  found = numbers(step.eqn.invars[step.operands.index(CONSTANT)])
  return found is None or any(math.frexp(number)[0] not in (0.0, 0.5, -0.5) for number in found)


def _bends_or_shifts(step: Step) -> bool:
  """Whether a step makes what narrow values hold with more digits: by a function, by a number."""
  if step.bodies:
    return any(_bends_or_shifts(inner) for body in step.bodies for inner in body.steps)
  return step.eqn.primitive.name in _BENDS or _is_shift(step)


def _is_shift(step: Step) -> bool:
  """Whether a step adds a number to a narrow value."""
  if step.bodies:
    return any(_is_shift(inner) for body in step.bodies for inner in body.steps)
  if step.eqn.primitive.name not in ADDS or CONSTANT not in step.operands:
    return False
  number = step.eqn.invars[step.operands.index(CONSTANT)]
  return not isinstance(number, Literal) or number.val != 0  # with which Python's `sum` begins


def _leads_on(step: Step, names: Collection[str] = _LEADS_ON) -> bool:
  """Whether a step with a narrow result multiplies, adds, moves or chooses among narrow values.

  Or does something else of that to them, by the names of primitives.
  """
  if step.bodies:
    if step.rule is not Rule.CALL or len(step.outs) != 1:  # a loop, a choice
      return False
    (body,) = step.bodies
    narrow = [s for s in body.steps if any(map(is_narrow, (*s.operands, *s.outs)))]
    return body.out_reads[0].via is None and all(_leads_on(inner, names) for inner in narrow)
  return step.eqn.primitive.name in names or _is_multiple(step)


def _is_exact(plan: Plan, reader: int) -> bool:
  return reader != _RESULT and plan.steps[reader].rule is Rule.EXACT


def _is_total(plan: Plan, reader: int) -> bool:
  return reader != _RESULT and plan.steps[reader].eqn.primitive.name == "reduce_sum"


def _reading(step: Step, made: set[Var], *, is_wide: bool) -> Step:
  """A step that reads as it is held what is float32 now; if it is wide itself, all in float32."""
  reads: list[Read] = []
  operands = []
  for atom, form, read in zip(step.eqn.invars, step.operands, step.reads, strict=True):
    if not isinstance(atom, Literal) and atom in made:
      form, read = DATA, AS_HELD
    elif is_wide and form is not None:
      read = Read(read.via, FLOAT32) if form.dtype != FLOAT32 or read.via else AS_HELD
    reads.append(read)
    operands.append(form)
  outs = step.outs if not is_wide else ONE_FLOAT32
  bodies = tuple(map(_in_float32, step.bodies)) if is_wide else step.bodies
  return replace(step, reads=tuple(reads), operands=tuple(operands), outs=outs, bodies=bodies)


def _in_float32(body: Plan) -> Plan:
  """The body of a call that leads on what is float32 now."""
  inner = versions.open_jaxpr(body.jaxpr)
  made = {var for var, f in zip(inner.invars, body.in_forms, strict=True) if is_narrow(f)}
  steps = []
  for step in body.steps:
    is_wide = not made.isdisjoint(variables_of(step.eqn.invars))
    steps.append(_reading(step, made, is_wide=True) if is_wide else step)
    made |= {*step.eqn.outvars} if is_wide else set()
  (result,) = inner.outvars
  is_made = not isinstance(result, Literal) and result in made
  return replace(
    body,
    in_forms=tuple(DATA if is_narrow(form) else form for form in body.in_forms),
    steps=tuple(steps),
    out_reads=(AS_HELD if is_made else Read(to=FLOAT32),),
    out_forms=ONE_FLOAT32,
  )
