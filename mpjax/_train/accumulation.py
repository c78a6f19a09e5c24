"""Gradient accumulation: one optimizer step from a batch that is computed in parts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32, describe, is_of
from mpjax._core.tree_paths import PyTree, leaf_paths


class Window(NamedTuple):
  """What a micro-batch gives, or all micro-batches of one optimizer step together.

  Attributes:
    loss: f32[], the mean of the losses.
    flow: What goes from one micro-batch into the next, such as BatchNorm statistics.
    extras: What each micro-batch gives besides; stacked along a new first axis if there are more
      than one.
    grads: The mean of the gradients, in float32 where they were 16-bit.
  """

  loss: jax.Array
  flow: Any
  extras: Any
  grads: PyTree


MicroStep = Callable[[Any, Any, jax.Array | None], Window]


def run_window(
  micro_step: MicroStep, count: int, params: PyTree, flow: Any, batch: PyTree
) -> Window:
  """Runs the micro-batches of a batch one after the other and averages their gradients.

  Micro-batch ``i`` of ``count`` holds the examples ``i``, ``i + count``, ``i + 2 * count``, ... So
  each device that holds a share of the batch works on every micro-batch. Only the accumulator, of
  the size of the parameters, and what a single micro-batch needs are in memory at one time.

  Nothing is tested between micro-batches: inf or NaN in one of them is inf or NaN in the mean.

  Args:
    micro_step: Called with the flow, a micro-batch and its number (``None`` if it is the whole
      batch); the flow that it returns must have the type of the one it was given.
    count: The number of micro-batches.
    params: What the gradients are taken with respect to.
    flow: What the first micro-batch starts from.
    batch: Arrays with one common leading axis; scalars go to every micro-batch.

  Returns:
    The losses and gradients averaged, the flow after the last micro-batch, the extras stacked.

  Raises:
    ValueError: If the leading axes differ, or ``count`` does not divide them.
  """
  if count == 1:
    return micro_step(flow, batch, None)
  check_divides(batch, count)
  # Sums of shares stay within float32 if the mean does. A power of two costs no bit.
  share = 2.0 ** -math.ceil(math.log2(count))

  def body(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    total, flow = carry
    out = micro_step(flow, _part(batch, index, count), index)
    total = jax.tree.map(lambda t, g: t + g.astype(t.dtype) * share, total, out.grads)
    return (total, out.flow), (out.loss, out.extras)

  start = (jax.tree.map(_zeros, cast_floating(params, FLOAT32)), flow)
  (total, flow), (losses, extras) = lax.scan(body, start, jnp.arange(count))
  grads = jax.tree.map(lambda t: t * (1 / (share * count)), total)
  return Window(jnp.mean(losses), flow, extras, grads)


def mean_loss(loss_of: Callable[[Any, jax.Array | None], Any], count: int, batch: PyTree) -> Any:
  """The mean of the losses of a batch's micro-batches.

  Args:
    loss_of: Called with a micro-batch and its number, as a micro-step is.
    count: The number of micro-batches.
    batch: As for `run_window`.
  """
  if count == 1:
    return loss_of(batch, None)
  return jnp.mean(lax.map(lambda i: loss_of(_part(batch, i, count), i), jnp.arange(count)))


def check_divides(batch: PyTree, count: int) -> None:
  """Refuses a batch that cannot be split into ``count`` micro-batches of one size.

  Raises:
    ValueError: If the leading axes of its arrays differ, or ``count`` does not divide them; the
      message names the array.
  """
  arrays = [(path, leaf) for path, leaf in leaf_paths({"batch": batch}) if jnp.ndim(leaf)]
  if not arrays:
    raise ValueError(
      f"accumulate={count} splits the leading axis of the batch's arrays. Got a batch without any "
      "array of one axis or more. Pass the examples in the batch, or drop accumulate."
    )
  first, size = arrays[0][0], arrays[0][1].shape[0]
  for path, leaf in arrays:
    if leaf.shape[0] != size:
      raise ValueError(
        f"accumulate={count} needs one leading axis for all arrays of the batch. Got {path}: "
        f"{describe(leaf)} beside {first}: {describe(arrays[0][1])}. Close over what is no "
        "example, or repeat it for each."
      )
    if size % count:
      raise ValueError(
        f"accumulate={count} must divide the leading axis of the batch. Got {path}: "
        f"{describe(leaf)}. Take a batch of a multiple of {count} examples, or another count."
      )


def check_flow(new: dict[str, Any], old: dict[str, Any]) -> None:
  """Refuses a flow whose arrays, by path, do not have the dtypes and shapes that they had.

  Raises:
    TypeError: If so; the message names the first one.
  """
  for path, leaf in old.items():
    got = describe(new[path]) if path in new else "nothing"
    if got != describe(leaf):
      raise TypeError(
        "With accumulate, a micro-batch must leave every Variable as it found it, in dtype and "
        f"shape. Got {path}: {got} for {describe(leaf)}. Keep its type, or take accumulate=1."
      )


def _part(batch: PyTree, index: jax.Array, count: int) -> Any:
  """Micro-batch ``index``, sliced where it is used: no second copy of the batch is made."""

  def part(leaf: Any) -> Any:
    if not jnp.ndim(leaf):
      return leaf
    split = jnp.reshape(leaf, (leaf.shape[0] // count, count, *leaf.shape[1:]))
    return lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

  return jax.tree.map(part, batch)


def zero_gradient(leaf: Any) -> jax.Array:
  """What stands for the gradient of a parameter that is an integer or a key: zeros of its shape."""
  return jnp.zeros(jnp.shape(leaf), FLOAT32)


def _zeros(leaf: jax.Array) -> jax.Array:
  if not is_of(leaf, jnp.inexact):
    return zero_gradient(leaf)
  # A choice rather than a constant, so that the axes over which a parameter varies under
  # jax.shard_map are those of its accumulator; compiled, it is the constant.
  return jnp.where(False, leaf, jnp.zeros_like(leaf))
