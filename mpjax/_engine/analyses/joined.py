"""Sums that data or an exponential read before a layer does: they are read in their own unit.

``k + 0.1 * (m + g * net(k) - k)`` of a state that began with data is float32 as these are, and so
is ``exp(w + 0.1 * net(h))``, a rate. The stream of a network is neither: layers and norms read it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mpjax._core.primitives import ADDS, CALLS, SCALES, UNCHANGED, Trait, having
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.program import jaxprs
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import Literal, Var

_MOVES = UNCHANGED | {"neg", "slice", "dynamic_slice", "split", "concatenate", "unstack"}
_KEEPS_DATA = _MOVES | having(Trait.ARITHMETIC | Trait.TRANSCENDENTAL)


def joined(frame: Frame, given: Collection[Any]) -> Collection[Var]:
  """What is added to data or to what began as such, or is an exponent.

  Args:
    frame: The frame of a jaxpr.
    given: Its operands and constants that are data.
  """
  forward = [eqn for eqn in frame.inner.eqns if not frame.is_backward(eqn)]
  data = {*given}
  for eqn in forward:
    read = [a for a in eqn.invars if not isinstance(a, Literal) and jaxprs.kind(a) == "f"]
    are_data = [a in data for a in read]
    name = eqn.primitive.name
    if any(are_data) if name in ADDS else name in _KEEPS_DATA and read and all(are_data):
      data |= {*eqn.outvars}
  summed, raised = set[Var](), set[Var]()
  for eqn in reversed(forward):
    name, read = eqn.primitive.name, variables_of(eqn.invars)
    if name == "exp" or (name in _MOVES | SCALES and not raised.isdisjoint(eqn.outvars)):
      raised |= read
    is_joined = name in ADDS and any(_is_whole(a, eqn) for a in read & data)
    if is_joined or (name in _LEADS_ON and not summed.isdisjoint(eqn.outvars)):
      summed |= read
  return summed | raised


def _is_whole(atom: Any, eqn: Any) -> bool:
  """Whether an operand is as large as the result."""
  return jaxprs.size(atom) == jaxprs.size(eqn.outvars[0])


_LEADS_ON = _MOVES | ADDS | SCALES | CALLS
