"""Activations and norms that are added to a 16-bit stream.

``x + softplus(x @ w)``: an exponential runs in float32, and what is added to float32 is float32, so
that one such activation would widen all of a residual stream behind it, with its norms and what is
stored for the backward pass. So would the norms of ``x + norm(layer(norm(x)))``. What elementwise
operations and averages made of narrow values alone is as exact as these, and rounds where it is
added to such a value on the way to a matmul. Not to one that it was computed from, nor on the way
to a loss: ``x - mean(x)``, ``expm1(v) - v`` and ``exp(v) + m**2 - 1 - v`` are small beside their
terms. Nor in float16, whose range it may exceed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from mpjax._core.dtypes import BFLOAT16
from mpjax._core.primitives import FUNCTIONS, UNCHANGED
from mpjax._engine.planning.plan import ELEMENTWISE, Step
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import Forms, Kind, is_narrow
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

_AVERAGES = frozenset({"reduce_sum"})
_LEAD_ON = ELEMENTWISE | FUNCTIONS | UNCHANGED | _AVERAGES | {"slice", "split", "concatenate"}
_LOOKS = 64
"""How many values behind a sum are looked at."""


class Streams:
  """Which values of one jaxpr are as exact as the narrow ones that they were made of.

  Args:
    multiplied: The variables that lead into a matmul.
    lasting: Those that are float32 for what others do with them.
    makers: The equations of the jaxpr, by what they make.
  """

  def __init__(
    self, multiplied: Collection[Var], lasting: Collection[Any], makers: Mapping[Var, JaxprEqn]
  ) -> None:
    self._multiplied, self._lasting, self._makers = multiplied, lasting, makers
    self._of_narrow = set[Var]()

  def joined(
    self, eqn: JaxprEqn, vias: list[np.dtype | None], forms: Forms
  ) -> tuple[list[np.dtype | None], Forms]:
    """How a sum reads its operands: in the format of the stream among them, if they join one.

    Args:
      eqn: An equation that is one of `ADDS`.
      vias: The casts that its operands went through.
      forms: How they are held.
    """
    if not self._of_narrow or eqn.outvars[0] not in self._multiplied:
      return vias, forms
    stream = [form for form in forms if is_narrow(form)]
    size = jaxprs.size(eqn.outvars[0])
    joins = [
      not isinstance(atom, Literal)
      and atom in self._of_narrow
      and atom not in self._lasting
      and jaxprs.size(atom) == size
      for atom in eqn.invars
    ]
    if len(stream) != 1 or stream[0].dtype != BFLOAT16 or not any(joins):
      return vias, forms
    left, right = (set(self._made_of(atom)) for atom in eqn.invars)
    if left & right:
      return vias, forms
    return (
      [BFLOAT16 if own else via for via, own in zip(vias, joins, strict=True)],
      tuple(stream[0] if own else form for form, own in zip(forms, joins, strict=True)),
    )

  def _made_of(self, atom: Atom) -> Iterator[Var]:
    """What elementwise operations made a value of, the nearest first, as far as is looked."""
    waiting, seen = deque([atom]), set[Var]()
    while waiting and len(seen) < _LOOKS:
      atom = waiting.popleft()
      if isinstance(atom, Literal) or atom in seen:
        continue
      seen.add(atom)
      yield atom
      made = self._makers.get(atom)
      if made is not None and made.primitive.name in _LEAD_ON:
        waiting += made.invars

  def settle(self, step: Step) -> None:
    """Note what a step that makes one float32 value made of narrow ones, element by element."""
    pairs = zip(step.eqn.invars, step.operands, strict=True)
    own = [
      form.kind if isinstance(atom, Literal) or atom not in self._of_narrow else Kind.NARROW
      for atom, form in pairs
      if form is not None
    ]
    is_exact = step.is_of_difference  # it is float32 for what is added to it
    if own and max(own) is Kind.NARROW and _makes_of_them(step) and not is_exact:
      self._of_narrow.update(step.eqn.outvars)


def _makes_of_them(step: Step) -> bool:
  """Whether a step computes element by element, or sums up, itself or in the function it calls."""
  name = step.eqn.primitive.name
  if name in FUNCTIONS and step.bodies:
    return all(map(_makes_of_them, step.bodies[0].steps))
  return name in ELEMENTWISE | _AVERAGES
