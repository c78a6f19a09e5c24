"""What the rule of an equation makes of it: the dtypes of its operands, the forms of its results.

Of equations that hold no jaxpr; what those do that hold one, the planner finds out by planning it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy import Policy
from mpjax._core.primitives import Rule
from mpjax._engine import constants, jaxprs, sharpening
from mpjax._engine.constants import Numbers
from mpjax._engine.jaxprs import JaxprEqn
from mpjax._engine.kernels import kernel_of
from mpjax._engine.kinds import CONSTANT, DATA, Form, Kind, join, narrow
from mpjax._engine.module_exits import held_as
from mpjax._engine.plan import Forms, Plan
from mpjax._engine.sharpening import Surroundings

NAMEABLE = frozenset({Rule.LOWER, Rule.WIDE, Rule.RANGE, Rule.FULL, Rule.FOLLOW})
"""The rules of operations that a rule of a `PolicyMap` may name."""


class Decision(NamedTuple):
  """How an equation runs.

  Attributes:
    wanted: The dtype in which it reads each operand; None for one that is read as it is held.
    outs: How each result is held, None for what is not float32 in the trace.
    params: Its parameters.
    bodies: The plans of the jaxprs that it holds.
  """

  wanted: Sequence[np.dtype | None]
  outs: Forms
  params: dict[str, Any]
  bodies: tuple[Plan, ...] = ()


class Decisions(NamedTuple):
  """Decides equations of one jaxpr, each from the forms of its operands and the compute dtype.

  Attributes:
    numbers: The numbers that are known to occur in the jaxpr's values; gains those of results.
    around: What is known of the jaxpr's values beyond their forms.
  """

  numbers: Numbers
  around: Surroundings

  def decide(self, rule: Rule, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """What a rule without a body makes of an equation."""
    return _WAYS[rule](self, eqn, forms, compute)

  def named(self, eqn: JaxprEqn, forms: Forms, policy: Policy) -> Decision:
    """An operation that a rule speaks of runs as the rule says, and returns what it says."""
    decision = _uniform(eqn, forms, held_as(policy.compute_dtype))
    if not any(forms):
      return decision
    outs = tuple(held_as(policy.output_dtype) if f is not None else None for f in decision.outs)
    return decision._replace(outs=outs, params=jaxprs.without_algorithm(decision.params))

  def lower(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """In 16 bits: those of the policy, or those that the author gave one of the operands."""
    compute = sharpening.foreign_format(eqn, forms) or compute
    decision = _uniform(eqn, forms, narrow(compute))
    if not any(forms):
      return decision
    return decision._replace(params=jaxprs.without_algorithm(decision.params))

  def wide(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """Scores and what is added up are float32: they leave their matmul as it summed them up."""
    decision = self.lower(eqn, forms, compute)
    params = decision.params | {"preferred_element_type": FLOAT32}
    return decision._replace(outs=_for_float32(eqn.outvars, DATA), params=params)

  def full(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """In float32."""
    return _uniform(eqn, forms, DATA)

  def follow(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """In the form that its operands join to; an update, and what it adds, in float32."""
    form = join(forms) or DATA
    if form.kind is Kind.CONSTANT:
      form = self.numbers.form_after(eqn, forms)
    if eqn.outvars[0] in self.around.sums.updates:
      form = DATA
    decision = _uniform(eqn, forms, form)
    if sharpening.looks_up_rows(eqn, forms) and compute != FLOAT32:
      return decision._replace(outs=(narrow(compute),))
    return decision

  def traced(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """As it stands in the trace: autocast does not know what it computes."""
    wanted = [FLOAT32 if f is not None else None for f in forms]
    return Decision(wanted, _for_float32(eqn.outvars, DATA), eqn.params)

  def custom_lin(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """Operands are read as they are held: the backward pass is planned when it is run."""
    return Decision([None] * len(forms), _for_float32(eqn.outvars, DATA), eqn.params)

  def each(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """Each result is held as the operand in its place."""
    return Decision([None] * len(forms), forms, eqn.params)

  def convert(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """float32 to float32 passes on; a mask or a number adapts; an integer becomes data."""
    operand: Any = eqn.invars[0]
    (form,), (result,) = forms, eqn.outvars
    if not jaxprs.is_float32(result):
      return Decision([None], (None,), eqn.params)
    if form is not None:
      self.numbers.define(result, self.numbers.of(operand))
      return _uniform(eqn, forms, DATA if compute == FLOAT32 else form)
    if operand.aval.dtype == np.bool_:
      self.numbers.define(result, constants.MASK)
      return Decision([None], (CONSTANT,), eqn.params)
    numbers = self.numbers.of(operand)
    self.numbers.define(result, numbers)
    return Decision([None], (self.numbers.form_of_all(numbers),), eqn.params)

  def marker(self, eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> Decision:
    """A marked function takes and makes what its trace in the compute dtype does."""
    jaxpr = kernel_of(eqn.params).traced_in(compute)
    operands = zip(jaxpr.in_avals, forms, strict=True)
    wanted = [aval.dtype if f is not None else None for aval, f in operands]
    outs = tuple(
      held_as(aval.dtype) if jaxprs.is_float32(var) else None
      for var, aval in zip(eqn.outvars, jaxpr.out_avals, strict=True)
    )
    return Decision(wanted, outs, {"jaxpr": jaxpr})


def _uniform(eqn: JaxprEqn, forms: Forms, form: Form) -> Decision:
  """Every float32 operand and result of the equation in one form."""
  if not any(forms):
    return Decision([None] * len(forms), _for_float32(eqn.outvars, DATA), eqn.params)
  wanted = [form.dtype if f is not None else None for f in forms]
  params = jaxprs.retyped(eqn.params, form.dtype)
  return Decision(wanted, _for_float32(eqn.outvars, form), params)


def _for_float32(outvars: Sequence[Any], form: Form) -> Forms:
  return tuple([form if jaxprs.is_float32(var) else None for var in outvars])


_WAYS: dict[Rule, Callable[[Decisions, JaxprEqn, Forms, np.dtype], Decision]] = {
  Rule.LOWER: Decisions.lower,
  Rule.WIDE: Decisions.wide,
  Rule.FULL: Decisions.full,
  Rule.ALWAYS: Decisions.full,
  Rule.LOSS_SCALE: Decisions.full,
  Rule.FOLLOW: Decisions.follow,
  Rule.MULTIPLY: Decisions.follow,
  Rule.EACH: Decisions.each,
  Rule.CONVERT: Decisions.convert,
  Rule.CUSTOM_LIN: Decisions.custom_lin,
  Rule.MARKER: Decisions.marker,
  Rule.TRACED: Decisions.traced,
}
