"""Key paths of pytrees, printed as the paths that rules and messages use."""

from typing import Any, TypeAlias

from jax import tree_util

KeyPath = tuple[Any, ...]

PyTree: TypeAlias = Any
"""Arrays in dicts, tuples and other nodes; it names what an argument is, and checks nothing."""


def path_str(key_path: KeyPath) -> str:
  """Prints a key path of ``jax.tree_util`` as names joined by slashes.

  Dictionary keys, list positions, attribute names and fields all print bare. An NNX Variable
  stores its array in an attribute ``value``; a path that ends there prints as the Variable's
  own, so that Linen and NNX parameters have the same paths.

  Args:
    key_path: A key path, as ``jax.tree_util.tree_flatten_with_path`` gives it.

  Returns:
    The path, such as ``encoder/0/kernel``; the empty string for the root.

  Example:
    >>> paths = tree_util.tree_flatten_with_path({"encoder": [{"kernel": 1.0}]})[0]
    >>> path_str(paths[0][0])
    'encoder/0/kernel'
  """
  return tree_util.keystr(_without_value(key_path), simple=True, separator="/")


def names_in(key_path: KeyPath) -> tuple[str, ...]:
  """The names of which `path_str` makes a path; one of them may have slashes in it."""
  return tuple([path_str((key,)) for key in _without_value(key_path)])


def _without_value(key_path: KeyPath) -> KeyPath:
  is_variable = len(key_path) > 1 and key_path[-1] == tree_util.GetAttrKey("value")
  return tuple(key_path[:-1] if is_variable else key_path)


def leaf_paths(tree: PyTree) -> list[tuple[str, Any]]:
  """The leaves of a tree with the paths that `path_str` prints, in the order of flattening."""
  leaves, _ = tree_util.tree_flatten_with_path(tree)
  return [(path_str(key_path), leaf) for key_path, leaf in leaves]
