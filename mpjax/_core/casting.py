"""Casting the float leaves of a tree, and nothing else."""

from typing import Any, TypeVar

import jax
import numpy as np

from mpjax._core.dtypes import FLOAT32, is_castable, parse_dtype

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


def as_held(tree: T, held: Any) -> T:
  """Casts the float32 arrays of a tree for which another one holds 16-bit floats to what it holds.

  Parameters of 16 bits are float32 inside of a function under a policy, and those that it writes
  back, changed or not, are held as before.

  Args:
    tree: Any pytree.
    held: A pytree whose leaves stand at the same paths, as far as there are any.
  """
  if not jax.tree.leaves(tree):  # most calls write nothing back
    return tree
  paths = jax.tree_util.tree_leaves_with_path(held)
  narrow = {path: leaf.dtype for path, leaf in paths if is_castable(leaf) and leaf.dtype != FLOAT32}

  def cast(path: Any, leaf: Any) -> Any:
    is_wide = path in narrow and is_castable(leaf) and leaf.dtype == FLOAT32
    return _cast(leaf, narrow[path]) if is_wide else leaf

  return jax.tree_util.tree_map_with_path(cast, tree) if narrow else tree


def _cast(leaf: Any, dtype: np.dtype) -> Any:
  if not is_castable(leaf) or leaf.dtype == dtype:
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(dtype=dtype)
  with np.errstate(over="ignore", under="ignore"):
    return leaf.astype(dtype)
