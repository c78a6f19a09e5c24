"""Buffers that a step may donate: each is its own, as those are that it returned itself."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from mpjax._core.tree_paths import PyTree
from mpjax._train.shardings import is_on_one_device


def shared_buffers(donated: Sequence[Any], kept: Sequence[Any]) -> list[int]:
  """Finds the arrays that cannot be donated, for another argument is the same array.

  The states of some optimizers start as the parameters themselves, and so share their buffers.

  Args:
    donated: The arrays that are donated.
    kept: Those of the arguments that are not.

  Returns:
    The positions, among the donated, of those that came before or are kept.
  """
  if len({*map(id, donated), *map(id, kept)}) == len(donated) + len(kept):
    return []  # looked at in every step: as a rule, each is there once
  seen = {id(x) for x in kept if isinstance(x, jax.Array)}
  found = []
  for n, x in enumerate(donated):
    if id(x) in seen and isinstance(x, jax.Array):
      found.append(n)
    seen.add(id(x))
  return found


def own_buffer(leaf: jax.Array) -> jax.Array:
  """A copy with a buffer of its own, where the array is."""
  return leaf if isinstance(leaf, jax.core.Tracer) else jnp.copy(leaf)


def explain_if_deleted(error: Exception, arrays: Iterable[tuple[str, Any]], message: str) -> None:
  """Says in one sentence why a step cannot run on arrays whose buffers a step has taken.

  Args:
    error: What the step raised.
    arrays: What is donated, with paths; read if the error speaks of what is deleted.
    message: The sentence, with ``{}`` for the path of the first array that is deleted.

  Raises:
    ValueError: If an array was deleted before the step.
  """
  if "deleted" not in str(error):  # what fails later has taken its buffers, too
    return
  deleted = [path for path, x in arrays if isinstance(x, jax.Array) and _is_deleted(x)]
  if deleted:
    raise ValueError(message.format(deleted[0])) from error


def _is_deleted(x: jax.Array) -> bool:
  return not isinstance(x, jax.core.Tracer) and x.is_deleted()


class Returned:
  """What a step returned last, if that lies on one device.

  Unless it was changed in place, each of its arrays is one of its own, so that all can be donated,
  and none has a sharding to keep. It is held weakly: a state that nobody needs any more is freed.
  """

  def __init__(self) -> None:
    self._last: Any = None

  def is_it(self, state: PyTree) -> bool:
    """Whether a state is the one that was returned."""
    last = self._last
    return last is not None and last() is state

  def note(self, state: PyTree, first: jax.Array) -> None:
    """Notes what a step returned.

    Args:
      state: The state.
      first: Any array of it.
    """
    self._last = weakref.ref(state) if is_on_one_device(first) else None

  def forget(self) -> None:
    """Looks at the next state, whichever it is."""
    self._last = None
