"""Sums that data or an exponential read before a layer does: they are read in their own unit.

``k + 0.1 * (m + g * net(k) - k)`` of a state that began with data is float32 as these are, and so
is ``exp(w + 0.1 * net(h))``, a rate. The stream of a network is neither: layers and norms read it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from mpjax._core.primitives import ADDS, CALLS, SCALES, UNCHANGED, Trait, having
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.program import jaxprs
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import JaxprEqn, Literal, Var

_MOVES = UNCHANGED | {"neg", "slice", "dynamic_slice", "split", "concatenate", "unstack"}
_KEEPS_DATA = _MOVES | having(Trait.ARITHMETIC | Trait.TRANSCENDENTAL)


def joined(frame: Frame, given: Collection[Any]) -> Collection[Var]:
  """What is added to data or to what began as such, or is an exponent.

  Args:
    frame: The frame of a jaxpr.
    given: Its operands and constants that are data.
  """
  forward = [eqn for eqn in frame.inner.eqns if not frame.is_backward(eqn)]
  data = made_of_data(frame, given, lambda eqn, _: eqn.primitive.name in ADDS)
  summed, raised = set[Var](), set[Var]()
  for eqn in reversed(forward):
    name, read = eqn.primitive.name, variables_of(eqn.invars)
    if name == "exp" or (name in _MOVES | SCALES and not raised.isdisjoint(eqn.outvars)):
      raised |= read
    is_joined = name in ADDS and any(_is_whole(a, eqn) for a in read & data)
    if is_joined or (name in _LEADS_ON and not summed.isdisjoint(eqn.outvars)):
      summed |= read
  return summed | raised


def made_of_data(
  frame: Frame, given: Collection[Any], takes: Callable[[JaxprEqn, Collection[Any]], bool]
) -> set[Var]:
  """What is made of data, elementwise.

  Args:
    frame: The frame of a jaxpr.
    given: Its operands and constants that are data.
    takes: Whether what an equation makes is data if some of its operands are, given what is; else
      all must be.
  """
  data = {*given}
  for eqn in frame.inner.eqns:
    read = [a for a in eqn.invars if not isinstance(a, Literal) and jaxprs.kind(a) == "f"]
    are_data = [] if frame.is_backward(eqn) else [a in data for a in read]
    keeps = eqn.primitive.name in _KEEPS_DATA and all(are_data)
    if any(are_data) and (keeps or takes(eqn, data)):
      data |= {*eqn.outvars}
  return data


def _is_whole(atom: Any, eqn: Any) -> bool:
  """Whether an operand is as large as the result."""
  return jaxprs.size(atom) == jaxprs.size(eqn.outvars[0])


_LEADS_ON = _MOVES | ADDS | SCALES | CALLS
