"""Buffers that a step may donate: each is its own."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def shared_buffers(donated: Iterable[Any], kept: Iterable[Any]) -> list[int]:
  """Finds the arrays that cannot be donated, for another argument is the same array.

  The states of some optimizers start as the parameters themselves, and so share their buffers.

  Args:
    donated: The arrays that are donated.
    kept: Those of the arguments that are not.

  Returns:
    The positions, among the donated, of those that came before or are kept.
  """
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
