"""Float formats by name: what a user may write, what a message prints, what a cast touches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._core.arguments import shown

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT16 = np.dtype(np.float16)

CASTABLE = (FLOAT32, BFLOAT16, FLOAT16)
"""The formats that policies name and casts move between; no other leaf is ever cast."""

_ALIASES = {
  FLOAT32: ("float32", "f32", "fp32"),
  BFLOAT16: ("bfloat16", "bf16"),
  FLOAT16: ("float16", "f16", "fp16"),
}
_BY_NAME = {name: dtype for dtype, names in _ALIASES.items() for name in names}
_LEGAL = "; ".join(" = ".join(names) for names in _ALIASES.values())


def is_of(x: Any, kind: Any) -> bool:
  """Whether an array or its type has a dtype of a kind, such as ``jnp.floating``.

  Example:
    >>> is_of(jnp.ones(2), jnp.inexact), is_of("two", jnp.inexact)
    (True, False)
  """
  dtype = getattr(x, "dtype", None)
  return dtype is not None and bool(jnp.issubdtype(dtype, kind))


def is_key(x: Any) -> bool:
  """Whether a value is an array of typed random keys."""
  return is_of(x, jax.dtypes.prng_key)


def parse_dtype(value: Any) -> np.dtype:
  """Reads a float format given by name, as a NumPy dtype, or as a scalar type.

  Names are looked up here and never handed to NumPy, which reads ``"f8"`` as float64 and
  ``"f16"`` as float128.

  Args:
    value: A name ("bfloat16", "bf16", any case, spaces around it allowed), a ``np.dtype``, or
      a scalar type such as ``jnp.bfloat16`` or ``np.float16``.

  Returns:
    The dtype: float32, bfloat16 or float16.

  Raises:
    ValueError: If a name or a dtype is none of the three formats.
    TypeError: If ``value`` is not a name, a dtype or a scalar type.

  Example:
    >>> parse_dtype("bf16"), parse_dtype(jnp.float16)
    (dtype(bfloat16), dtype('float16'))
  """
  if isinstance(value, str):
    name = value.strip().lower()
    if name in _BY_NAME:
      return _BY_NAME[name]
    raise ValueError(
      f"A dtype must be one of: {_LEGAL}. Got {shown(str(value))}. Write one of these names."
    )
  dtype = _as_numpy(value)
  if dtype is None:
    raise TypeError(
      f"A dtype must be one of: {_LEGAL}, as a name, a np.dtype or a scalar type. "
      f"Got {shown(value)} of type {type(value).__name__}. Pass for example 'bfloat16' or "
      "jnp.bfloat16."
    )
  if dtype not in CASTABLE:
    raise ValueError(
      f"A dtype must be one of: {_LEGAL}. Got {dtype.name!r}. Choose one of these formats; "
      "leaves of other dtypes are never cast."
    )
  return dtype


def _as_numpy(value: Any) -> np.dtype | None:
  if isinstance(value, np.dtype):
    return value
  if not isinstance(value, type):
    return None
  if issubclass(value, np.generic):
    return np.dtype(value)
  dtype = getattr(value, "dtype", None)
  return dtype if isinstance(dtype, np.dtype) else None


def is_castable(leaf: Any) -> bool:
  """Whether a leaf is an array of float32, bfloat16 or float16 that a cast may touch.

  JAX arrays and tracers, NumPy arrays and scalars, and ``jax.ShapeDtypeStruct`` count. Integers,
  bools, keys, complex numbers, float64, float8, Python scalars and ``None`` do not.

  Example:
    >>> is_castable(jnp.ones(3)), is_castable(jnp.arange(3)), is_castable(1.0)
    (True, False, False)
  """
  return (
    isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
    and leaf.dtype in CASTABLE
  )


_SHORT = {"bfloat": "bf", "float": "f", "complex": "c", "uint": "u", "int": "i"}


def short_name(dtype: Any) -> str:
  """The name of a dtype as jaxprs print it: ``bf16``, ``f32``, ``i32``, ``bool``.

  Example:
    >>> short_name(jnp.bfloat16), short_name(np.dtype("uint8"))
    ('bf16', 'u8')
  """
  try:
    name = np.dtype(dtype).name
  except TypeError:  # extended dtypes, such as those of typed PRNG keys
    return str(dtype)
  for long, short in _SHORT.items():
    if name.startswith(long):
      return short + name.removeprefix(long)
  return name


def describe(leaf: Any) -> str:
  """A leaf's dtype and shape for a message, or the name of its type if it has none.

  Example:
    >>> describe(jnp.ones((3, 4), jnp.bfloat16)), describe(0.5)
    ('bf16[3,4]', 'float')
  """
  dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
  if dtype is None or shape is None:
    return type(leaf).__name__
  return f"{short_name(dtype)}[{','.join(map(str, shape))}]"
