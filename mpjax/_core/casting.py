"""Casting the float leaves of a tree, and nothing else."""

from typing import Any, TypeVar

import jax
import numpy as np

from mpjax._core.dtypes import is_castable, parse_dtype

T = TypeVar("T")


def cast_floating(tree: T, dtype: Any) -> T:
  """Casts the float32, bfloat16 and float16 arrays of a tree to ``dtype``.

  Every other leaf comes back as the same object: integers, bools, typed and raw keys, complex,
  float64, float8, Python scalars, ``None``, anything that is not an array. So does a leaf that
  has the dtype already. NumPy arrays and scalars stay NumPy, a ``jax.ShapeDtypeStruct`` keeps
  its sharding, containers and NNX Variables keep their types and metadata. A float array that
  is weakly typed becomes strongly typed when it is cast.

  Args:
    tree: Any pytree.
    dtype: float32, bfloat16 or float16, by name, as a ``np.dtype`` or as a scalar type.

  Returns:
    A tree of the same structure.

  Raises:
    ValueError: If ``dtype`` is another format.
    TypeError: If ``dtype`` is not a dtype.

  Example:
    >>> import jax.numpy as jnp
    >>> tree = {"kernel": jnp.ones((2, 2)), "step": jnp.int32(3), "name": "dense"}
    >>> cast = cast_floating(tree, "bfloat16")
    >>> cast["kernel"].dtype, cast["step"].dtype, cast["name"]
    (dtype(bfloat16), dtype('int32'), 'dense')
  """
  target = parse_dtype(dtype)
  return jax.tree.map(lambda leaf: _cast(leaf, target), tree)


def _cast(leaf: Any, dtype: np.dtype) -> Any:
  if not is_castable(leaf) or leaf.dtype == dtype:
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(dtype=dtype)
  with np.errstate(over="ignore", under="ignore"):
    return leaf.astype(dtype)
