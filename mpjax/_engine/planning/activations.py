"""Activations that nothing but layers read take 16 bits, whatever made what they are of.

``relu(segment_sum(h @ w, nodes) + b) @ v``: a long sum is float32, and so is what is added to it.
Weights alone multiply what the activation makes, which rounds there anyway. Rounded before the
activation it is as exact as by hand, and the backward pass stores 16 bits; of a `relu` the numbers
are the same, so that its layers may be those of a network that is given. Data that no layer made
are not rounded, nor is what is float32 for what others do with it. Nor is it in float16, where a
sum may be infinite, by what would make a NaN of that, or where it is divided behind it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from mpjax._core.dtypes import FLOAT16, FLOAT32
from mpjax._core.primitives import BOUNDS, FUNCTIONS, Trait, having
from mpjax._engine.analyses.knowledge import Knowledge
from mpjax._engine.program import jaxprs
from mpjax._engine.program.bodies import bodies_of
from mpjax._engine.program.kinds import CONSTANT, DATA, Forms, narrow
from mpjax._engine.program.versions import JaxprEqn, Literal

_MAY_ACTIVATE = BOUNDS | FUNCTIONS  # a tanh that stands alone may be a part of one
_TRANSCENDENTAL = having(Trait.TRANSCENDENTAL)


def rounded(
  eqn: JaxprEqn,
  vias: list[np.dtype | None],
  forms: Forms,
  compute: np.dtype,
  around: Knowledge,
  lasting: Collection[Any],
) -> tuple[list[np.dtype | None], Forms]:
  """How an equation reads its operands: one that is such an activation in 16 bits.

  Args:
    eqn: The equation.
    vias: The casts that its operands went through.
    forms: How they are held.
    compute: The compute dtype that governs it.
    around: What is known of its jaxpr.
    lasting: What is float32 for what others do with it.
  """
  if eqn.primitive.name not in _MAY_ACTIVATE or forms.count(DATA) != 1 or compute == FLOAT32:
    return vias, forms
  place = forms.index(DATA)
  if {*forms} - {DATA, CONSTANT, None} or not _may_round(eqn, place, around, lasting):
    return vias, forms
  if not _is_read_by_layers(eqn, compute, around):
    return vias, forms
  return (
    [compute if n == place else via for n, via in enumerate(vias)],
    tuple(narrow(compute) if n == place else form for n, form in enumerate(forms)),
  )


def _may_round(eqn: JaxprEqn, place: int, around: Knowledge, lasting: Collection[Any]) -> bool:
  """Whether layers made the operand of an activation, and it is float32 for nothing else."""
  value, result = eqn.invars[place], eqn.outvars[0] if len(eqn.outvars) == 1 else None
  if isinstance(value, Literal) or result is None or jaxprs.shape(value) != jaxprs.shape(result):
    return False
  made = around.frame.maker(around.frame.before(value))
  is_meant = value in lasting or (made is not None and made.primitive.name == "name")
  return (
    not is_meant
    and (eqn.primitive.name in BOUNDS or around.uses.is_activation(eqn))
    and around.exact.isdisjoint([value, result])
    and not around.frame.is_backward(eqn)
    and around.sums.may_be_of_layers([value])
  )


def _is_read_by_layers(eqn: JaxprEqn, compute: np.dtype, around: Knowledge) -> bool:
  """Whether nothing but layers read an activation, which may round before it."""
  uses, result = around.uses, eqn.outvars[0]
  if not _bounds(eqn, around):
    return compute != FLOAT16 and result in uses.activated
  of_trained = uses.activated_alone if compute == FLOAT16 else uses.activated
  return result in of_trained or result in uses.moved_to_layers


def _bounds(eqn: JaxprEqn, around: Knowledge) -> bool:
  """Whether an activation does no more than a `relu`: it makes no NaN of an infinity."""
  if eqn.primitive.name in BOUNDS:
    return True
  contents = around.analyses.contents
  return all(contents.primitives(b.jaxpr).isdisjoint(_TRANSCENDENTAL) for b in bodies_of(eqn))
