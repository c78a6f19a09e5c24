"""Whether a tree is finite, and the choice between two trees."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mpjax._core.arguments import shown
from mpjax._core.dtypes import describe, is_of
from mpjax._core.tree_paths import PyTree, leaf_paths

T = TypeVar("T")


def all_finite(tree: PyTree) -> jax.Array:
  """Tests that no number in a tree is inf or NaN.

  Every leaf that can hold one is tested, complex and float8 included. Integers, bools, keys,
  float0 and ``None`` count as finite, and so do an empty array and an empty tree. Nothing is
  summed or squared, so a large finite tree is never mistaken for an infinite one.

  Args:
    tree: Any pytree of arrays.

  Returns:
    A bool scalar array.

  Example:
    >>> bool(all_finite({"a": jnp.ones(3), "b": None}))
    True
    >>> bool(all_finite({"a": jnp.array([1.0, jnp.inf])}))
    False
  """
  tested = [_is_finite(leaf) for leaf in jax.tree.leaves(tree) if _can_be_infinite(leaf)]
  return jnp.all(jnp.stack(tested)) if tested else jnp.array(True)


def nonfinite_leaves(tree: PyTree) -> jax.Array:
  """Tests each leaf of a tree for inf and NaN.

  Returns:
    A bool array with one entry per leaf, in the order of flattening; True where a leaf holds
    inf or NaN.
  """
  leaves = jax.tree.leaves(tree)
  bad = [~_is_finite(leaf) if _can_be_infinite(leaf) else jnp.array(False) for leaf in leaves]
  return jnp.stack(bad) if bad else jnp.zeros((0,), jnp.bool_)


def all_squarable(tree: PyTree) -> jax.Array:
  """Tests that each leaf of a tree has a finite sum of squares.

  Second moments and norms hold squares of gradients. Where the squares of a leaf add up to more
  than its dtype holds, 16-bit ones in float32 (2**128, of a norm of 1.8e19), they become inf, and a
  second moment that is inf stays so. A leaf with inf or NaN has no finite sum of squares either.

  Args:
    tree: Any pytree of arrays.

  Returns:
    A bool scalar array.

  Example:
    >>> bool(all_squarable([1e18])), bool(all_squarable([1e20])), bool(all_squarable([jnp.nan]))
    (True, False, False)
  """
  return jnp.all(~unsquarable_leaves(tree))


def unsquarable_leaves(tree: PyTree) -> jax.Array:
  """Tests each leaf of a tree for what `all_squarable` tests a tree for.

  Returns:
    A bool array with one entry per leaf, in the order of flattening.
  """
  bad = [~jnp.isfinite(square) for square in _squares(tree)]
  return jnp.stack(bad) if bad else jnp.zeros((0,), jnp.bool_)


def global_norm(tree: PyTree) -> jax.Array:
  """The 2-norm of all float leaves, in float32: inf if, and only if, a leaf cannot be squared.

  The sums of squares are those that `all_squarable` tests, so a program that has both computes
  them once.

  Example:
    >>> global_norm({"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2, jnp.bfloat16)})
    Array(5., dtype=float32)
  """
  squares = [square.astype(jnp.float32) for square in _squares(tree)]
  if not squares:
    return jnp.zeros((), jnp.float32)
  # Leaves that can be squared must not overflow together: a power of four makes room for so many.
  power = ((len(squares) - 1).bit_length() + 1) // 2
  return 2.0**power * jnp.sqrt(jnp.sum(jnp.stack(squares) * 4.0**-power))


def _squares(tree: PyTree) -> list[jax.Array]:
  """The sum of squares of each leaf in at least float32; 0 of what is no float."""
  return [
    _square(leaf) if _can_be_infinite(leaf) else jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree)
  ]


def _square(leaf: Any) -> jax.Array:
  x = jnp.asarray(leaf)
  if jnp.iscomplexobj(x):
    return _square(jnp.real(x)) + _square(jnp.imag(x))
  return jnp.sum(jnp.square(x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)))


def stays_finite(new: Any, old: Any) -> jax.Array | None:
  """Tests that no number of a tree became inf or NaN that was neither before.

  An infinity that a state holds on purpose, as a running minimum starts from it, passes.

  Args:
    new: A tree of arrays.
    old: The tree whose place it takes: same structure and shapes.

  Returns:
    bool[], or ``None`` if no leaf that can be infinite differs from its old one.

  Example:
    >>> old = {"mean": jnp.zeros(2), "lowest": jnp.array(jnp.inf)}
    >>> bool(stays_finite({**old, "mean": jnp.ones(2)}, old))
    True
    >>> bool(stays_finite({**old, "mean": jnp.array([1.0, jnp.nan])}, old))
    False
  """
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  moved = [(a, b) for a, b in pairs if a is not b and _can_be_infinite(a)]
  kept = [jnp.all(_finite_numbers(a) | ~_finite_numbers(b)) for a, b in moved]
  return jnp.all(jnp.stack(kept)) if kept else None


def _can_be_infinite(leaf: Any) -> bool:
  return isinstance(leaf, float | complex) or is_of(leaf, jnp.inexact)


def _is_finite(leaf: Any) -> jax.Array:
  return jnp.all(_finite_numbers(leaf))


def _finite_numbers(leaf: Any) -> jax.Array:
  x = jnp.asarray(leaf)
  narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 2
  return jnp.isfinite(x.astype(jnp.float32) if narrow else x)


def select(pred: jax.typing.ArrayLike, on_true: T, on_false: T) -> T:
  """Chooses one of two trees, leaf by leaf, without touching the numbers of the other.

  The choice is ``jnp.where`` and never a product, so inf and NaN in the tree that is not chosen
  do not leak into the result. Leaves that are not arrays (``None``, functions, names) must be
  equal in the two trees.

  Args:
    pred: A bool scalar.
    on_true: The tree for a true ``pred``.
    on_false: The tree for a false one: same structure, and the same dtype in every leaf.

  Returns:
    A tree of the same structure and dtypes.

  Raises:
    TypeError: If ``pred`` is no bool scalar.
    ValueError: If the structures differ, or a dtype does; the message names the paths.

  Example:
    >>> select(jnp.array(False), {"w": jnp.float32(jnp.nan)}, {"w": jnp.float32(1)})
    {'w': Array(1., dtype=float32)}
  """
  _check_predicate(pred)
  structure = jax.tree.structure(on_true)
  if structure != jax.tree.structure(on_false):
    raise ValueError(_structure_message(on_true, on_false))
  pairs = zip(leaf_paths(on_true), jax.tree.leaves(on_false), strict=True)
  return structure.unflatten([_choose(pred, path, a, b) for (path, a), b in pairs])


def _check_predicate(pred: Any) -> None:
  dtype = jnp.dtype(bool) if isinstance(pred, bool) else getattr(pred, "dtype", None)
  if dtype != jnp.bool_ or jnp.shape(pred) != ():
    raise TypeError(
      "The predicate must be one boolean, for the whole tree. Got "
      f"{describe(pred) if dtype is not None else shown(pred)}. Reduce it with jnp.all, or choose "
      "element by element with jnp.where."
    )


def _choose(pred: jax.typing.ArrayLike, path: str, a: Any, b: Any) -> Any:
  if a is b:
    return a
  if not _is_array(a) and not _is_array(b):
    return _equal(path, a, b)
  kind, other = _dtype_of(a), _dtype_of(b)
  if kind != other:
    raise ValueError(
      f"The two trees must have the same dtypes. Leaf {path!r} is {describe(a)} where the "
      f"predicate is true and {describe(b)} where it is false. Cast one of them."
    )
  return a if kind == jax.dtypes.float0 else jnp.where(pred, a, b)


def _equal(path: str, a: Any, b: Any) -> Any:
  if a == b:
    return a
  raise ValueError(
    f"Leaves that are not arrays must be equal in the two trees. Leaf {path!r} is {a!r} where "
    f"the predicate is true and {b!r} where it is false. Make it an array."
  )


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, bool | int | float | complex) or hasattr(leaf, "dtype")


def _dtype_of(leaf: Any) -> Any:
  dtype = getattr(leaf, "dtype", None)
  return jnp.result_type(leaf) if dtype is None else dtype


def _structure_message(on_true: Any, on_false: Any) -> str:
  a, b = ({path for path, _ in leaf_paths(tree)} for tree in (on_true, on_false))
  found = []
  if a - b:
    found.append(f"Only where the predicate is true: {', '.join(sorted(a - b))}.")
  if b - a:
    found.append(f"Only where it is false: {', '.join(sorted(b - a))}.")
  if not found:
    found = [f"{jax.tree.structure(on_true)} is not {jax.tree.structure(on_false)}."]
  return f"The two trees must have the same structure. {' '.join(found)} Add or drop leaves."
