"""The state that a step returned: it need not be looked at again when it comes back."""

import weakref
from typing import Any

import jax

from mpjax._train.shardings import is_on_one_device


class Returned:
  """What a step returned last, if that lies on one device.

  Unless it was changed in place, each of its arrays is one of its own, so that all can be donated,
  and none has a sharding to keep. It is held weakly: a state that nobody needs any more is freed.
  """

  def __init__(self) -> None:
    self._last: Any = None

  def is_it(self, state: Any) -> bool:
    """Whether a state is the one that was returned."""
    last = self._last
    return last is not None and last() is state

  def note(self, state: Any, first: jax.Array) -> None:
    """Notes what a step returned.

    Args:
      state: The state.
      first: Any array of it.
    """
    self._last = weakref.ref(state) if is_on_one_device(first) else None

  def forget(self) -> None:
    """Looks at the next state, whichever it is."""
    self._last = None
