"""What an operation of a random program is, and which values it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Body = Callable[..., Any]
STRAY = np.float32(0.7)


class Op(NamedTuple):
  """An operation: the kinds of its operands and, from a knob and operands, its value."""

  kinds: tuple[str, ...]
  fn: Callable[..., Any]
  params: Callable[..., tuple[Any, ...]] | None = None
  isolated: bool = False

  @property
  def nested(self) -> bool:
    """Whether it has a body, which comes after the knob."""
    return self.params is not None


def takes(kind: str, aval: Any, known: list[Any]) -> bool:
  """Whether a value can stand where an operand of a kind is wanted.

  ``F`` a real float, ``M`` a float matrix, ``S`` a square one, ``V`` a float that is no scalar,
  ``C`` complex, ``I`` an integer, ``N`` an integer scalar, ``B`` a boolean, ``K`` a key; ``W`` is
  float32, and a trailing ``=`` wants the shape and ``@`` the inner dimension of the first operand.
  """
  dtype, shape = aval.dtype, aval.shape
  if kind.endswith("="):
    return shape == known[0].shape and takes(kind[:-1], aval, known)
  if kind.endswith("@"):
    return shape[:1] == known[0].shape[-1:] and takes(kind[:-1], aval, known)
  real = jnp.issubdtype(dtype, jnp.floating)
  integer = jnp.issubdtype(dtype, jnp.integer)
  return {
    "F": real,
    "W": dtype == np.float32,
    "M": real and len(shape) == 2,
    "S": real and len(shape) == 2 and shape[0] == shape[1],
    "V": real and len(shape) > 0,
    "C": jnp.issubdtype(dtype, jnp.complexfloating),
    "I": integer,
    "N": integer and not shape,
    "B": dtype == np.bool_,
    "K": jnp.issubdtype(dtype, jax.dtypes.prng_key),
  }[kind]


def blend(first: Any, last: Any) -> Any:
  """A value of the type of ``first`` that depends on ``last``: what a body returns."""
  if (first.shape, first.dtype) == (last.shape, last.dtype):
    return last
  if not jnp.issubdtype(first.dtype, jnp.inexact) or not jnp.issubdtype(last.dtype, jnp.inexact):
    return first
  return first + jnp.tanh(jnp.mean(jnp.real(last))).astype(first.dtype)
