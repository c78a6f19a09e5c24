"""The dtype in which gradients are summed over devices.

Under automatic partitioning a compiler puts the sum over devices where the partial sums are: at
the matmul that computes a weight's gradient. Under a policy that matmul returns the float32 that
it adds up in, unless `with_narrow_sums` asks for less. Under ``jax.shard_map`` the sum is the
user's own, and `reduce_gradients` takes it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from mpjax._core.dtypes import FLOAT32, is_of, parse_dtype
from mpjax._core.scopes import NARROW_SUMS
from mpjax._core.tree_paths import PyTree

AxisName = str | Sequence[str]
P = ParamSpec("P")
R = TypeVar("R")


def reduce_gradients(grads: PyTree, axis_name: AxisName, dtype: Any = FLOAT32) -> Any:
  """Averages gradients over the devices of a mapped axis, in a dtype of your choice.

  For a train step of your own under ``jax.shard_map`` or ``jax.pmap``, between
  `mpjax.value_and_grad` and the optimizer. What each device adds is divided by the number of
  devices first, so the mean overflows no sooner than its terms. Each device must hold gradients
  of its own part of the batch alone: under ``shard_map`` with ``check_vma=True`` pass the
  parameters through ``jax.lax.pcast(params, axis_name, to="varying")`` before they are
  differentiated, or JAX sums their gradients itself, in the dtype of each use.

  Args:
    grads: A tree of gradients, scaled or not.
    axis_name: The axis or axes.
    dtype: In which dtype to send and sum: float32, or a 16-bit one to halve the traffic.

  Returns:
    The mean in float32 (float64 and complex leaves are summed as they are, integers pass), the
    same on every device.

  Raises:
    ValueError: If ``dtype`` is none of float32, bfloat16 and float16, or no transformation maps the
      axis.

  Example:
    >>> mean = lambda g: reduce_gradients({"w": g}, "data", "bfloat16")
    >>> jax.vmap(mean, axis_name="data", out_axes=None)(jnp.array([1.0, 2.0]))
    {'w': Array(1.5, dtype=float32)}
  """
  sent = parse_dtype(dtype)
  axes = mapped_axes(axis_name)
  count = lax.psum(1, axes)

  def mean(leaf: Any) -> Any:
    if not is_of(leaf, jnp.inexact):
      return leaf
    if leaf.dtype.itemsize > FLOAT32.itemsize:
      return lax.psum(leaf / jnp.asarray(count, leaf.dtype), axes)
    share = leaf.astype(FLOAT32) / jnp.asarray(count, FLOAT32)
    return lax.psum(share.astype(sent), axes).astype(FLOAT32)

  return jax.tree.map(mean, grads)


def mapped_axes(axis_name: AxisName) -> str | tuple[str, ...]:
  """Reads the argument ``axis_name`` where it is used.

  Raises:
    ValueError: If no transformation around maps such an axis.
  """
  axes = axis_name if isinstance(axis_name, str) else tuple(axis_name)
  try:
    lax.axis_size(axes)
  except NameError as error:
    raise ValueError(
      f"axis_name must name an axis that jax.shard_map, jax.pmap or jax.vmap maps. Got {axes!r}, "
      "and none around maps it. Call this inside of one, or drop axis_name: under jax.jit alone, "
      "sharded or not, it is not needed."
    ) from error
  return axes


def read_reduce_dtype(value: Any) -> bool:
  """Whether the argument ``reduce_dtype`` asks for float32; ``"compute"`` does not.

  Raises:
    ValueError: If it is neither.
  """
  if isinstance(value, str) and value.strip().lower() == "compute":
    return False
  try:
    known = parse_dtype(value) == FLOAT32
  except (TypeError, ValueError):
    known = False
  if known:
    return True
  raise ValueError(
    "reduce_dtype must be 'float32', or 'compute' for the dtype that the policy's matmuls return. "
    f"Got {value!r}. Write one of the two; for another dtype take the sum yourself, with "
    "mpjax.reduce_gradients under jax.shard_map."
  )


def with_narrow_sums(fn: Callable[P, R]) -> Callable[P, R]:
  """A function under policies, the gradients of whose parameters have its matmuls' dtype.

  By itself a policy makes them float32 where they leave their matmuls, so that they are summed over
  devices in float32.
  """

  @functools.wraps(fn)
  def narrow(*args: P.args, **kwargs: P.kwargs) -> R:
    with jax.named_scope(NARROW_SUMS):
      return fn(*args, **kwargs)

  return narrow
