"""Arguments: numbers read, or refused with their name, and leaves that are no arrays found."""

import math
import numbers
import operator
import reprlib
from typing import Any

import jax
from jax.core import Tracer

from mpjax._core.tree_paths import PyTree, leaf_paths

_SMALLEST, _LARGEST = 2.0**-126, 2.0**126  # between these, 1 / scale is a normal float32 too


def shown(value: Any) -> str:
  """A user's value for a message: its repr if that is short, its beginning and its end otherwise.

  Example:
    >>> shown("mixed"), len(shown("x" * 10**6)) < 100
    ("'mixed'", True)
  """
  return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 3
_SHORT.maxstring = _SHORT.maxother = 80


def no_array(tree: PyTree) -> str:
  """The first leaf that JAX takes for no array, with its path, for a message; empty for none.

  Example:
    >>> no_array({"x": 1.0, "split": "train"}), no_array([1.0, None])
    ("'train' of type str at split", '')
  """
  for path, leaf in leaf_paths(tree):
    if not _is_array(leaf):
      return f"{shown(leaf)} of type {type(leaf).__name__}{' at ' * bool(path)}{path}"
  return ""


def _is_array(leaf: Any) -> bool:
  if isinstance(leaf, jax.Array):
    return True
  try:
    jax.eval_shape(lambda x: x, leaf)
  except TypeError:
    return False
  return True


def power_of_two(name: str, value: Any) -> float:
  """Reads the argument ``name``: a positive power of two whose inverse is float32 as well.

  Raises:
    ValueError: If the number is no such power, or a bool.
    TypeError: If it is no number, or one that a transformation traces.

  Example:
    >>> power_of_two("scale", 2**15)
    32768.0
  """
  if isinstance(value, bool) or not isinstance(value, numbers.Real | jax.Array):
    _reject_type(name, value, "a power of two")
  if isinstance(value, Tracer):
    raise TypeError(
      f"{name} must be a number that is known when the function is made. Got one that is traced "
      f"({value.aval}). Pass a Python number: a scale that moves is mpjax.dynamic_loss_scaling's, "
      "whose own numbers optax.inject_hyperparams takes in static_args."
    )
  number = float(value)
  if not (math.isfinite(number) and number > 0 and math.frexp(number)[0] == 0.5):
    raise ValueError(
      f"{name} must be a positive power of two, so that scaling is exact. Got {shown(value)}. "
      f"Choose {_nearest(number)}."
    )
  if not _SMALLEST <= number <= _LARGEST:
    raise ValueError(
      f"{name} must lie between 2**-126 and 2**126, where it and its inverse are float32. "
      f"Got {shown(value)}. Choose a number in between."
    )
  return number


def _nearest(number: float) -> str:
  if not (math.isfinite(number) and number > 0):
    return "for example 2**15"
  exponent = min(max(round(math.log2(number)), -126), 126)
  return f"2**{exponent} = {2.0**exponent:g}"


def positive_integer(name: str, value: Any) -> int:
  """Reads the argument ``name``: an integer of at least 1.

  Raises:
    ValueError: If it is below 1, or a bool.
    TypeError: If it is no integer.

  Example:
    >>> positive_integer("hysteresis", 2)
    2
  """
  if isinstance(value, bool) or not hasattr(value, "__index__"):
    _reject_type(name, value, "an integer")
  number = operator.index(value)
  if number < 1:
    raise ValueError(f"{name} must be at least 1. Got {shown(value)}. Choose for example 1.")
  return number


def _reject_type(name: str, value: Any, what: str) -> None:
  kind = ValueError if isinstance(value, bool) else TypeError
  raise kind(
    f"{name} must be {what}. Got {shown(value)} of type {type(value).__name__}. Pass {what}."
  )
