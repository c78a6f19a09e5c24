"""A loss scale inside a function: what is in it carries cotangents times a power of two.

A value that goes in is the same inside, and its cotangent is divided on the way out; a value that
comes out is the same outside, and its cotangent is multiplied on the way in::

    outside          x ──────────▶ f ──────────▶ y       values as they are
    outside   x̄ / scale ◀── x̄ ── fᵀ ◀── scale·ȳ ◀── ȳ   cotangents, in float32 where they cross

Both borders are one linear operation, `border_p`: it multiplies by ``forward``, and its transpose
is the same with ``forward`` and ``backward`` exchanged. Into a region ``backward`` is ``forward``
over the scale, out of it ``forward`` times the scale, and transposing makes the one the other.
So every derivative is true, of whatever order and mode, and every reverse pass is scaled inside.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mpjax._core.arguments import power_of_two
from mpjax._core.dtypes import FLOAT32
from mpjax._engine.program.new_primitive import new_primitive
from mpjax._engine.running.environment import to_dtype

UNSCALED = 1.0
"""The scale of a region that has none."""


def read_loss_scale(value: Any) -> float:
  """Reads the argument ``loss_scale``; `UNSCALED` for None.

  Raises:
    ValueError: If it is no positive power of two, or a bool.
    TypeError: If it is no number, or one that a transformation traces.
  """
  return UNSCALED if value is None else power_of_two("loss_scale", value)


def into(x: jax.Array, scale: float) -> jax.Array:
  """A value inside a region; its cotangent leaves divided by the scale of the region.

  Args:
    x: An array of any dtype. What is no float has no cotangent and passes.
    scale: The scale of the region, a power of two.
  """
  if scale == UNSCALED or not jnp.issubdtype(x.dtype, jnp.inexact):
    return x
  return border_p.bind(x, forward=1.0, backward=1 / scale, inward=True)


def out_of(x: jax.Array, scale: float) -> jax.Array:
  """A value outside of a region, of 32 bits at least: its cotangent is multiplied, then rounds."""
  if scale == UNSCALED or not jnp.issubdtype(x.dtype, jnp.inexact):
    return x
  return border_p.bind(_wide(x), forward=1.0, backward=scale, inward=False)


def within(params: dict[str, Any], scale: float) -> dict[str, Any]:
  """The parameters of a border that stands in a region with a scale: the inner one governs."""
  around = scale if params["inward"] else 1 / scale
  return params | {"backward": params["backward"] * around}


def _impl(x: jax.Array, *, forward: float, backward: float, inward: bool) -> jax.Array:
  del backward, inward
  if forward == 1:
    return x
  wide = _wide(x)
  return to_dtype(wide * jnp.asarray(forward, wide.dtype), x.dtype)


def _transpose(
  cotangent: jax.Array, x: jax.Array, *, forward: float, backward: float, inward: bool
) -> Any:
  del x
  return [border_p.bind(cotangent, forward=backward, backward=forward, inward=not inward)]


def _wide(x: jax.Array) -> jax.Array:
  """A float of at most 16 bits as float32."""
  return to_dtype(x, FLOAT32) if x.dtype.itemsize < FLOAT32.itemsize else x


border_p = new_primitive("mpjax_loss_scale", _impl, shape=lambda x, **_: x, transpose=_transpose)
"""Multiplies by ``forward`` and transposes to ``backward``, in float32 or what is wider."""
