"""Counting the floating-point operations of matmuls and convolutions in a jaxpr."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax


def contractions(fn: Any, *args: Any) -> Counter[str]:
  """Floating-point operations of a function's matmuls and convolutions, by their dtype.

  A product counts for the wider of its two factors' dtypes. The body of a scan counts as often as
  it runs, that of a while loop once; of the branches of a conditional all count, but of those by
  platform, one of which is compiled, only the last.

  Args:
    fn: a function of arrays.
    *args: arrays, or their shapes and dtypes.
  """
  found: Counter[str] = Counter()
  for eqn, times in _equations(jax.make_jaxpr(fn)(*args).jaxpr, 1):
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
      factors = [atom.aval.dtype for atom in eqn.invars[:2]]
      found[max(factors, key=lambda dtype: dtype.itemsize).name] += times * _operations(eqn)
  return found


def low_share(found: Counter[str]) -> float:
  """The share of operations in 16 bits or fewer."""
  wide = found["float32"] + found["float64"]
  return 1 - wide / sum(found.values())


def _operations(eqn: Any) -> int:
  """Two for each multiplication with its addition; zeros of dilation count too."""
  left, right = (atom.aval.shape for atom in eqn.invars[:2])
  outputs = math.prod(eqn.outvars[0].aval.shape)
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * outputs * math.prod(left[axis] for axis in contracted)
  features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
  return 2 * outputs * math.prod(right) // features


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
  for eqn in jaxpr.eqns:
    yield eqn, times
    inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
    by_platform = eqn.params.get("branches_platforms") is not None
    for value in [eqn.params["branches"][-1]] if by_platform else eqn.params.values():
      for sub in _jaxprs(value):
        yield from _equations(sub, inner)


def _jaxprs(value: Any) -> Iterator[Any]:
  opened = getattr(value, "jaxpr", value)
  if hasattr(opened, "eqns"):
    yield opened
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _jaxprs(item)
