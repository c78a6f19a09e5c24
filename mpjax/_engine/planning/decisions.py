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
from mpjax._engine.analyses import constants
from mpjax._engine.planning.matmul_sight import foreign_format, is_layer_of_one
from mpjax._engine.planning.module_exits import held_as
from mpjax._engine.planning.plan import Plan
from mpjax._engine.planning.sight import Sight, looks_up_rows, scales_parameter
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kernels import kernel_of
from mpjax._engine.program.kinds import CONSTANT, DATA, PARAM, Form, Forms, Kind, join, narrow

NAMEABLE = frozenset({Rule.LOWER, Rule.WIDE, Rule.EXACT, Rule.FULL, Rule.FOLLOW})
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


def decide(rule: Rule, sight: Sight) -> Decision:
  """What a rule without a body makes of an equation; numbers that its results hold are noted."""
  return _WAYS[rule](sight)


def named(sight: Sight, policy: Policy) -> Decision:
  """An operation that a rule speaks of runs as the rule says, and returns what it says."""
  decision = _uniform(sight, held_as(policy.compute_dtype))
  if not sight.has_float32:
    return decision
  outs = tuple(held_as(policy.output_dtype) if f is not None else None for f in decision.outs)
  return decision._replace(outs=outs, params=jaxprs.without_algorithm(decision.params))


def _lower(sight: Sight) -> Decision:
  """In 16 bits: those of the policy, or those that the author gave one of the operands."""
  compute = foreign_format(sight) or sight.compute
  decision = _uniform(sight, narrow(compute))
  if not sight.has_float32:
    return decision
  return decision._replace(params=jaxprs.without_algorithm(decision.params))


def _wide(sight: Sight) -> Decision:
  """Scores and what is added up are float32: they leave their matmul as it summed them up."""
  decision = _lower(sight)
  params = decision.params | {"preferred_element_type": FLOAT32}
  return decision._replace(outs=_for_float32(sight.eqn.outvars, DATA), params=params)


def _exact(sight: Sight) -> Decision:
  """It reads float32, as who else reads a value so, and rounds inside: there all comes together."""
  decision = _full(sight)
  params = jaxprs.without_algorithm(decision.params) | {"preferred_element_type": FLOAT32}
  return decision._replace(params={PRODUCTS: foreign_format(sight) or sight.compute, **params})


PRODUCTS = "products"
"""Among the parameters of a matmul that rounds inside, the format in which it multiplies."""


def _full(sight: Sight) -> Decision:
  """In float32."""
  return _uniform(sight, DATA)


def _follow(sight: Sight) -> Decision:
  """In the form that its operands join to; an update, and what it adds, in float32.

  A parameter times or over one number is a parameter, as in a spectral norm, and rounds once.
  """
  form = join(sight.forms) or DATA
  if form.kind is Kind.CONSTANT:
    form = sight.around.numbers.form_after(sight.eqn, sight.forms)
  elif form == DATA and sight.around.in_float16:
    sight.around.numbers.follow_data(sight.eqn)
  if form.kind is Kind.NARROW and PARAM in sight.forms and scales_parameter(sight):
    form = PARAM
  if sight.eqn.outvars[0] in sight.around.sums.updates:
    form = DATA
  decision = _uniform(sight, form)
  if sight.compute != FLOAT32 and (looks_up_rows(sight) or is_layer_of_one(sight)):
    return decision._replace(outs=(narrow(sight.compute),))
  return decision


def _traced(sight: Sight) -> Decision:
  """As it stands in the trace: autocast does not know what it computes."""
  wanted = [FLOAT32 if f is not None else None for f in sight.forms]
  return Decision(wanted, _for_float32(sight.eqn.outvars, DATA), sight.eqn.params)


def _custom_lin(sight: Sight) -> Decision:
  """Operands are read as they are held: the backward pass is planned when it is run."""
  return Decision(
    [None] * len(sight.forms), _for_float32(sight.eqn.outvars, DATA), sight.eqn.params
  )


def _each(sight: Sight) -> Decision:
  """Each result is held as the operand in its place."""
  return Decision([None] * len(sight.forms), sight.forms, sight.eqn.params)


def _convert(sight: Sight) -> Decision:
  """float32 to float32 passes on; a mask or a number adapts; an integer becomes data."""
  known = sight.around.numbers
  operand: Any = sight.eqn.invars[0]
  (form,), (result,) = sight.forms, sight.eqn.outvars
  if not jaxprs.is_float32(result):
    return Decision([None], (None,), sight.eqn.params)
  if form is not None:
    known.define(result, known.of(operand))
    return _uniform(sight, DATA if sight.compute == FLOAT32 else form)
  if operand.aval.dtype == np.bool_:
    known.define(result, constants.MASK)
    return Decision([None], (CONSTANT,), sight.eqn.params)
  numbers = known.of(operand)
  known.define(result, numbers)
  return Decision([None], (known.form_of_all(numbers),), sight.eqn.params)


def _marker(sight: Sight) -> Decision:
  """A marked function takes and makes what its trace in the compute dtype does."""
  jaxpr = kernel_of(sight.eqn.params).traced_in(sight.compute)
  operands = zip(jaxpr.in_avals, sight.forms, strict=True)
  wanted = [aval.dtype if f is not None else None for aval, f in operands]
  outs = tuple(
    held_as(aval.dtype) if jaxprs.is_float32(var) else None
    for var, aval in zip(sight.eqn.outvars, jaxpr.out_avals, strict=True)
  )
  return Decision(wanted, outs, {"jaxpr": jaxpr})


def _uniform(sight: Sight, form: Form) -> Decision:
  """Every float32 operand and result of the equation in one form."""
  eqn, forms = sight.eqn, sight.forms
  if not any(forms):
    return Decision([None] * len(forms), _for_float32(eqn.outvars, DATA), eqn.params)
  wanted = [form.dtype if f is not None else None for f in forms]
  params = jaxprs.retyped(eqn.params, form.dtype)
  return Decision(wanted, _for_float32(eqn.outvars, form), params)


def _for_float32(outvars: Sequence[Any], form: Form) -> Forms:
  return tuple([form if jaxprs.is_float32(var) else None for var in outvars])


_WAYS: dict[Rule, Callable[[Sight], Decision]] = {
  Rule.LOWER: _lower,
  Rule.WIDE: _wide,
  Rule.EXACT: _exact,
  Rule.FULL: _full,
  Rule.ALWAYS: _full,
  Rule.LOSS_SCALE: _full,
  Rule.FOLLOW: _follow,
  Rule.MULTIPLY: _follow,
  Rule.EACH: _each,
  Rule.CONVERT: _convert,
  Rule.CUSTOM_LIN: _custom_lin,
  Rule.MARKER: _marker,
  Rule.TRACED: _traced,
}
