"""Statistics of gradients, updates and parameters, collected by an optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mpjax._core.arguments import positive_integer
from mpjax._core.dtypes import FLOAT32
from mpjax._core.formats import Format, read_format, rounded
from mpjax._scaling.optimizers import as_transformation
from mpjax.inspect._histogram import Histogram, add_counts, histogram

FORMATS = ("bfloat16", "float16")
"""The formats in which parameters might be kept."""


class Statistics(NamedTuple):
  """What an optimizer has seen and done, a pytree of arrays; ``a + b`` of its parts adds steps.

  Attributes:
    steps: i32[], the optimizer steps that were counted.
    gradients: What came into the optimizer.
    updates: What came out of it.
    parameters: What they were added to.
    ratios: ``|update / parameter|`` where neither is zero.
    stalls: u32[2, leaves, 3], high and low word of the counts of updates that are not zero; of
      those that a bfloat16 parameter would not notice; and of those that a float16 one would not.

  Example:
    >>> tx, params = collect_statistics(optax.sgd(0.5)), {"w": jnp.array([1.0, 2.0])}
    >>> _, opt_state = tx.update({"w": jnp.array([0.5, 0.0])}, tx.init(params), params)
    >>> seen = statistics(opt_state)
    >>> int(seen.steps), float(seen.gradients.largest[0]), float(seen.updates.largest[0])
    (1, 0.5, 0.25)
  """

  steps: jax.Array
  gradients: Histogram
  updates: Histogram
  parameters: Histogram
  ratios: Histogram
  stalls: jax.Array


class StatisticsState(NamedTuple):
  """The state of `collect_statistics`.

  Attributes:
    step: i32[], the updates so far.
    statistics: What was collected.
    inner_state: The state of the wrapped optimizer.

  Example:
    >>> opt_state = collect_statistics(optax.adam(1e-3)).init({"w": jnp.ones(2)})
    >>> int(opt_state.step), type(opt_state.inner_state[0]).__name__
    (0, 'ScaleByAdamState')
  """

  step: jax.Array
  statistics: Statistics
  inner_state: Any


def collect_statistics(
  inner: optax.GradientTransformation, *, every: int = 1
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that its state collects statistics; the updates stay what they were.

  Put it inside the loss scaler, where gradients are unscaled and a skipped step is not counted:
  ``mpjax.dynamic_loss_scaling(mpjax.inspect.collect_statistics(optax.adam(1e-3)))``. Gradients
  that float16 has already rounded to zero are counted as zeros; to choose a loss scale, collect in
  float32 or bfloat16. The state names the parameters, which ``optax.tree_map_params`` cannot read:
  ``jax.eval_shape(tx.init, params)`` tells its arrays. Counting takes a CPU core 45 ns a parameter,
  fifteen times Adam's update and little beside a large batch; ``every`` divides it.

  Args:
    inner: The optimizer.
    every: Count one of this many steps.

  Returns:
    A transformation whose state is a `StatisticsState`; read it with `statistics`.

  Raises:
    ValueError: If ``every`` is below 1; or at an update without parameters.

  Example:
    >>> tx = collect_statistics(optax.sgd(0.5))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> updates, state = tx.update({"w": jnp.array([0.5, 1e-6])}, tx.init(params), params)
    >>> collected = statistics(state)
    >>> int(collected.steps), collected.gradients.names, collected.stalls[1].tolist()
    (1, ('w',), [[2, 1, 1]])
  """
  inner = as_transformation(inner)
  every = positive_integer("every", every)

  def init(params: optax.Params) -> Any:  # a StatisticsState, and below
    zeros = jax.tree.map(jnp.zeros_like, params)
    shapes = jax.eval_shape(_collect, zeros, zeros, zeros)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return StatisticsState(jnp.zeros((), jnp.int32), nothing, inner.init(params))

  def update(
    updates: optax.Updates,
    state: Any,  # a StatisticsState; optax types every state alike
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    if params is None:
      raise ValueError(
        "collect_statistics compares updates with parameters. Got none. Pass them: "
        "tx.update(grads, opt_state, params)."
      )
    out, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    collected = lax.cond(
      state.step % every == 0,
      lambda old: add_statistics(old, _collect(updates, out, params)),
      lambda old: old,
      state.statistics,
    )
    return out, StatisticsState(state.step + 1, collected, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def statistics(opt_state: Any) -> Statistics:
  """What `collect_statistics` has collected, wherever it stands in an optimizer's state.

  Args:
    opt_state: The state of an optimizer, or what holds one: a train state, an ``nnx.Optimizer``'s
      ``opt_state``.

  Raises:
    ValueError: If there is none, or more than one.

  Example:
    >>> tx = optax.chain(optax.clip(1.0), collect_statistics(optax.sgd(0.5)))
    >>> statistics(tx.init({"w": jnp.ones(2)})).gradients.names
    ('w',)
  """
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, StatisticsState))
  found = [leaf for leaf in leaves if isinstance(leaf, StatisticsState)]
  if len(found) != 1:
    raise ValueError(
      f"The optimizer state must hold one collect_statistics. Got {len(found)}. Wrap the "
      "optimizer: mpjax.inspect.collect_statistics(tx), or pass the state that holds one."
    )
  return found[0].statistics


def add_statistics(a: Statistics, b: Statistics) -> Statistics:
  """The statistics of two runs of steps together."""
  return Statistics(
    steps=a.steps + b.steps,
    gradients=a.gradients + b.gradients,
    updates=a.updates + b.updates,
    parameters=a.parameters + b.parameters,
    ratios=a.ratios + b.ratios,
    stalls=add_counts(a.stalls, b.stalls),
  )


def stall_counts(collected: Statistics) -> np.ndarray:
  """The counts of stalls as u64[leaves, 3]."""
  high, low = np.asarray(collected.stalls).astype(np.uint64)
  return (high << np.uint64(32)) + low


def _collect(gradients: Any, updates: Any, params: Any) -> Statistics:
  pairs = jax.tree.map(_Pair, _floats(params), _floats(updates))
  ratios = jax.tree.map(_ratio, pairs, is_leaf=_is_pair)
  stalls = [_stalls(pair) for pair in jax.tree.leaves(pairs, is_leaf=_is_pair)]
  counted = jnp.stack(stalls) if stalls else jnp.zeros((0, 3), jnp.uint32)
  return Statistics(
    steps=jnp.ones((), jnp.int32),
    gradients=histogram(gradients),
    updates=histogram(updates),
    parameters=histogram(params),
    ratios=histogram(ratios),
    stalls=jnp.stack([jnp.zeros_like(counted), counted]),
  )


class _Pair:
  """A parameter and its update, one leaf of a tree."""

  def __init__(self, param: jax.Array, update: jax.Array) -> None:
    self.param, self.update = param, update


def _is_pair(x: Any) -> bool:
  return isinstance(x, _Pair)


def _floats(tree: Any) -> Any:
  """A tree with its float leaves in float32 and the others as None, which is no leaf."""
  return jax.tree.map(
    lambda x: x.astype(FLOAT32) if jnp.issubdtype(x.dtype, jnp.floating) else None, tree
  )


def _ratio(pair: _Pair) -> jax.Array:
  """``|update / parameter|``; 0 where either is zero, which the histogram counts apart."""
  safe = jnp.where(pair.param == 0, 1.0, pair.param)
  return jnp.where(pair.param == 0, 0.0, jnp.abs(pair.update / safe))


def _stalls(pair: _Pair) -> jax.Array:
  """How many updates are not zero, and how many of those each format would lose: u32[3]."""
  moves = pair.update != 0
  lost = [moves & ~_notices(pair, read_format(name)) for name in FORMATS]
  return jnp.stack([jnp.sum(mask, dtype=jnp.uint32) for mask in (moves, *lost)])


def _notices(pair: _Pair, to: Format) -> jax.Array:
  """Whether a parameter kept in a format is another one after the update."""
  kept = rounded(pair.param, to)
  return rounded(kept + pair.update, to) != kept
