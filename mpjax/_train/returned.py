"""The state that a step returned: it need not be looked at again when it comes back."""

import weakref
from typing import Any

import jax

from mpjax._train.shardings import Placement, is_on_one_device


class Returned:
  """What a step returned last.

  Each of its arrays is one of its own, so all can be donated, and they lie where the step was told
  to keep them. It is held weakly: a state that nobody needs any more is freed.
  """

  def __init__(self) -> None:
    self._last: tuple[Any, Placement] | None = None

  def placement(self, state: Any) -> Placement | None:
    """Where a state's leaves are, if it is the one that was returned; None for another."""
    last = self._last
    return last[1] if last is not None and last[0]() is state else None

  def note(self, state: Any, first: jax.Array, where: Placement) -> None:
    """Notes what a step returned.

    Args:
      state: The state.
      first: Any array of it.
      where: Where the step was told to keep its leaves.
    """
    known = None not in where.shardings if where.shardings else is_on_one_device(first)
    self._last = (weakref.ref(state), where) if known else None

  def forget(self) -> None:
    """Looks at the next state, whichever it is."""
    self._last = None
