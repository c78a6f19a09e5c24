"""Stochastic rounding of float32 arrays to 16 bits, with bits that replicas share.

A number between two neighbors of a format goes to the upper one as often as it lies close to it:
1.0 - 1e-3 in bfloat16 is 1.0 three times of four and 0.996 the fourth, and right on average. Added
up over steps the errors stay random, where those of rounding to the nearest may all have one sign
(Zamirai et al., 2020, arXiv:2010.06192; Ozkara et al., 2025, arXiv:2502.20566).
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32, is_castable
from mpjax._core.formats import Format, read_format
from mpjax._core.tree_paths import PyTree

_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 number but its sign
_MANTISSA, _BIAS, _LEAST_EXPONENT = 23, 127, -126  # of float32
_WIDTH = 16
_GENERATOR = "threefry2x32"  # the one whose bits do not depend on how an array is sharded


class StochasticRoundingState(NamedTuple):
  """The state of `stochastic_rounding`.

  Attributes:
    key: u32[2], the key that every step's bits are drawn from. It never changes.
    step: i32[], the number of updates; a skipped one does not count.
    inner_state: The state of the wrapped transformation, made for float32 parameters.
  """

  key: jax.Array
  step: jax.Array
  inner_state: PyTree


def seen_parameters(opt_state: PyTree, params: PyTree) -> Any:
  """The parameters as an optimizer must be given them: as float32 views.

  Only one that rounds stochastically must see what they are held in: it makes the views itself.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=_rounds)
  return params if any(map(_rounds, nodes)) else cast_floating(params, FLOAT32)


def _rounds(node: Any) -> bool:
  return isinstance(node, StochasticRoundingState)


def is_16_bit(leaf: Any) -> bool:
  """Whether a leaf is an array of bfloat16 or float16."""
  return is_castable(leaf) and leaf.dtype in (BFLOAT16, FLOAT16)


def first_key(seed: int) -> jax.Array:
  """The raw key of a seed, u32[2]: it passes through every checkpoint, as typed keys do not.

  Raises:
    TypeError: If the seed is no integer.
  """
  if isinstance(seed, bool) or not hasattr(seed, "__index__"):
    raise TypeError(
      f"seed must be an integer. Got {seed!r} of type {type(seed).__name__}. Choose for example 0."
    )
  return jax.random.key_data(jax.random.key(seed, impl=_GENERATOR))


def step_key(key: jax.Array, step: jax.Array) -> jax.Array:
  """The key of one step: a typed key."""
  return jax.random.fold_in(jax.random.wrap_key_data(key, impl=_GENERATOR), step)


def rounded_stochastically(x: jax.Array, dtype: Any, key: jax.Array, name: str) -> jax.Array:
  """Rounds a float32 array to a 16-bit format, held in float32.

  The bits are a function of key, name, and the place of an element in the array; where that lies
  on devices does not matter.

  Args:
    x: f32[...].
    dtype: bfloat16 or float16.
    key: The step's key.
    name: The array's name among those of this step; each has bits of its own.
  """
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
  width = jnp.uint16 if np.dtype(dtype) == BFLOAT16 else jnp.uint32
  return round_by_bits(x, dtype, jax.random.bits(key, x.shape, width))


def round_by_bits(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
  """Rounds a float32 array to a 16-bit format by random bits, held in float32.

  What the format holds stays. NaN, inf and what is beyond the format's largest number become what
  a cast makes of them; nothing else overflows. Everything is done on the bits of the numbers:
  compilers may drop a conversion to 16 bits and back.

  Args:
    x: f32[...].
    dtype: bfloat16 or float16.
    bits: u32[...], uniform; for bfloat16 u16[...] will do.

  Example:
    >>> bits = jnp.array([0, 2**16 - 1], jnp.uint16)
    >>> round_by_bits(jnp.full(2, 0.999), jnp.bfloat16, bits).astype(jnp.bfloat16)
    Array([0.996094, 1], dtype=bfloat16)
  """
  to, bits = read_format(dtype), bits.astype(jnp.uint32)
  word = lax.bitcast_convert_type(x, jnp.uint32)
  magnitude = word & _MAGNITUDE
  # Random bits below the last one that is kept carry into it as often as it should grow.
  below = (jnp.uint32(1) << _lost_bits(magnitude, to)) - 1
  near = (magnitude + (bits & below)) & ~below
  if to.normal > _LEAST_EXPONENT:  # then what is below the format's smallest has no bit to keep
    near = jnp.where(jnp.abs(x) < _smallest(to), _smallest_or_zero(x, to, bits), near)
  near = lax.bitcast_convert_type(near | (word & ~jnp.uint32(_MAGNITUDE)), FLOAT32)
  cast = lax.reduce_precision(x, _WIDTH - 1 - to.bits, to.bits)
  return jnp.where(jnp.abs(x) <= float(jnp.finfo(to.dtype).max), near, cast)


def _lost_bits(magnitude: jax.Array, to: Format) -> jax.Array:
  """How many of float32's bits are dropped: more below the format's smallest normal number."""
  normal = jnp.uint32(_MANTISSA - to.bits)
  if to.normal == _LEAST_EXPONENT:
    return normal
  smallest, exponent = jnp.uint32(to.normal + _BIAS), magnitude >> _MANTISSA
  return jnp.minimum(normal + jnp.maximum(smallest, exponent) - exponent, jnp.uint32(_MANTISSA))


def _smallest(to: Format) -> np.float32:
  return np.float32(2.0 ** (to.zero + 1))


def _smallest_or_zero(x: jax.Array, to: Format, bits: jax.Array) -> jax.Array:
  """The bits of the format's smallest number, as often as ``x`` is a share of it, or zero's."""
  share = (jnp.abs(x) * (2.0**32 / float(_smallest(to)))).astype(jnp.uint32)
  return jnp.where(bits < share, _smallest(to).view(np.uint32), jnp.uint32(0))


def way_to(target: jax.Array, param: jax.Array) -> jax.Array:
  """What must be added to a parameter, in float32, to come to a target.

  ``p - 0.0`` leaves every bit, a negative zero too. An overflowed parameter stays what it is: its
  distance from the target is infinite, and inf - inf is NaN.
  """
  stays = (target == param) | ~jnp.isfinite(param)
  return jnp.where(stays, jnp.float32(-0.0), target - param)
