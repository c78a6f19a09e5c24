"""Where float formats end: what becomes zero, loses precision, or overflows when it is rounded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._core.arguments import shown
from mpjax._core.dtypes import FLOAT32

_BY_NAME = {
  "bfloat16": jnp.bfloat16,
  "float16": jnp.float16,
  "float8_e4m3fn": jnp.float8_e4m3fn,
  "float8_e5m2": jnp.float8_e5m2,
}
_SHORT = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16"}


class Format(NamedTuple):
  """A float format by its limits, each a power of two given by its exponent.

  Attributes:
    name: The dtype's name.
    dtype: The dtype.
    zero: Magnitudes up to and with ``2**zero`` round to zero.
    normal: Magnitudes below ``2**normal`` are subnormal: they have fewer bits.
    top: The largest number lies between ``2**top`` and ``2**(top + 1)``.
    bits: The bits of the mantissa, the leading one not counted.
  """

  name: str
  dtype: np.dtype
  zero: int
  normal: int
  top: int
  bits: int

  def overflows(self, value: float) -> bool:
    """Whether a finite magnitude becomes infinite or NaN, rounded to the nearest."""
    with np.errstate(over="ignore"):
      return not np.isfinite(np.asarray(value, np.float64).astype(self.dtype).astype(np.float32))


def read_format(value: Any) -> Format:
  """Reads a 16-bit or 8-bit float format, given by name or as a dtype.

  Raises:
    ValueError: If it is none of those known.

  Example:
    >>> read_format("float16").zero, read_format(jnp.float8_e4m3fn).top
    (-25, 8)
  """
  name = value.strip().lower() if isinstance(value, str) else jnp.dtype(value).name
  name = _SHORT.get(name, name)
  if name not in _BY_NAME:
    raise ValueError(
      f"A format must be one of {', '.join(_BY_NAME)}. Got {shown(value)}. Name one."
    )
  info = jnp.finfo(_BY_NAME[name])
  return Format(
    name=name,
    dtype=np.dtype(_BY_NAME[name]),
    zero=_exponent(info.smallest_subnormal) - 1,
    normal=_exponent(info.smallest_normal),
    top=_exponent(info.max),
    bits=int(info.nmant),
  )


def _exponent(value: Any) -> int:
  return math.frexp(float(value))[1] - 1


def rounded(x: jax.Array, to: Format) -> jax.Array:
  """float32 values rounded to a format and held in float32; nothing overflows.

  Compilers may drop a conversion to 16 bits and back, and ``lax.reduce_precision`` flushes
  subnormals, so the rounding is spelled out: to a multiple of the spacing at each value.
  """
  magnitude = jnp.maximum(jnp.abs(x), jnp.float32(2.0**to.normal))
  power = lax.bitcast_convert_type(magnitude, jnp.uint32) & jnp.uint32(0x7F800000)
  spacing = lax.bitcast_convert_type(power, FLOAT32) * jnp.float32(2.0**-to.bits)
  safe = jnp.maximum(spacing, jnp.finfo(FLOAT32).smallest_normal)
  return lax.round(x / safe, lax.RoundingMethod.TO_NEAREST_EVEN) * safe
