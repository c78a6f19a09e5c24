"""The 16-bit copies that are there of float32 values: loops, checkpoints and collectives read them.

What is rounded once, before a loop, on its way to another device, or by who stores it in 16 bits,
is read as it is by all that rounds it to that format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.planning.plan import Plan
from mpjax._engine.planning.rounded_alike import rounded_alike
from mpjax._engine.running.attached_derivatives import rounded_from
from mpjax._engine.running.environment import to_dtype

NONE_ALIKE: Mapping[int, Any] = MappingProxyType({})


def widened(copy: jax.Array, x: jax.Array) -> jax.Array:
  """What stands for a weight in a loop: its derivative is that of the weight, not of the copy."""
  return rounded_from(to_dtype(copy, FLOAT32), x)


class Copies:
  """The 16-bit copies of float32 values, weights mostly, that are traced now."""

  def __init__(self) -> None:
    self._known: dict[int, tuple[Any, jax.Array]] = {}

  def __bool__(self) -> bool:
    return bool(self._known)

  def of(self, x: Any, dtype: np.dtype) -> jax.Array | None:
    """The copy of a value in a format, if there is one."""
    _, copy = self._known.get(id(x), (None, None))
    return copy if copy is not None and copy.dtype == dtype else None

  def among(self, plan: Plan, operands: Sequence[Any]) -> dict[int, jax.Array]:
    """The copies of those operands of a body that all of it rounds to their formats."""
    places = [n for n, x in enumerate(operands) if id(x) in self._known] if self else ()
    found = rounded_alike(plan, places).items()
    copies = {n: self.of(operands[n], dtype) for n, dtype in found}
    return {n: copy for n, copy in copies.items() if copy is not None}

  def add(self, x: Any, copy: jax.Array) -> None:
    """Note the copy of a value."""
    # The value is held, too, so that no other has its identity.
    self._known = self._known | {id(x): (x, copy)}

  @contextlib.contextmanager
  def noted(
    self, operands: Sequence[Any] = (), copies: Mapping[int, Any] = NONE_ALIKE
  ) -> Iterator[None]:
    """Where copies are noted, those of some operands at first: behind it they are not known."""
    before = self._known
    try:
      for n, copy in copies.items():
        self.add(operands[n], copy)
      yield
    finally:
      self._known = before
