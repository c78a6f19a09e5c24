"""16-bit parameters that are trained without float32 masters, by an optax transformation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import tree_util

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32
from mpjax._core.tree_paths import PyTree, path_str
from mpjax._scaling.optimizers import as_transformation, initial_state
from mpjax._scaling.rounding import (
  StochasticRoundingState,
  first_key,
  is_16_bit,
  rounded_stochastically,
  step_key,
  way_to,
)
from mpjax._scaling.states import LossScalingState, find_states


def stochastic_rounding(
  inner: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it trains 16-bit parameters by rounding them stochastically.

  ``inner`` sees float32 gradients and float32 views of the parameters, and its state is made for
  these. Where its updates would take a bfloat16 or float16 parameter lies between two numbers of
  that format; the parameter goes to one of the two, at random, such that it is right on average
  (Zamirai et al., 2020, arXiv:2010.06192). Rounded to the nearest, the parameter would lose every
  update below half the distance between the two. `mpjax.master_weights` loses nothing and takes 4
  bytes a parameter more.

  The updates are float32, and such that ``optax.apply_updates(params, updates)`` takes every
  parameter to the number that was drawn, bit for bit. An update of zero leaves every bit. A number
  that becomes too large for the format becomes infinite, as in a cast; NaN stays NaN. Where a
  device takes float32 numbers below 2**-126 for zero, as CPUs do, updates below that are lost.
  Leaves that are float32, integers or anything else pass untouched.

  The random bits are a function of the seed, the number of the update, a parameter's path and the
  place in its array: a run that is resumed has the same ones, so have all replicas, and arrays
  under ``jax.jit`` however they are sharded. Inside ``jax.shard_map`` a shard counts as an array.
  All members of a ``jax.vmap`` over parameters share them.

  It goes around `dynamic_loss_scaling` or inside of it, into Flax's ``TrainState``,
  `mpjax.TrainState` and ``nnx.Optimizer``. Outside of it there must be nothing that changes
  updates; ``optax.MultiSteps`` may be on either side, but accumulates in float32 only inside. With
  `mpjax.bfloat16_states` around the optimizer inside, Adam takes 6 bytes a parameter.

  Args:
    inner: The optimizer.
    seed: Of the random bits. Give several of these in one optimizer the same one or not: each
      parameter has bits of its own.

  Returns:
    A transformation whose state has a raw key, the number of updates (a step that a loss scaler
    skips does not count), and the state of ``inner``; its ``update`` needs ``params``.

  Raises:
    TypeError: If ``inner`` is no optax transformation, or the seed no integer.
    ValueError: When called, if ``update`` is not given the parameters.

  Example:
    >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}
    >>> tx = stochastic_rounding(optax.sgd(1e-3))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> moved = params["w"].astype(jnp.float32) + updates["w"]
    >>> sorted(set(moved.tolist())), round(float(moved.mean()), 3)
    ([0.99609375, 1.0], 0.999)
  """
  inner, start = as_transformation(inner), first_key(seed)

  def init(params: optax.Params) -> StochasticRoundingState:
    inner_state = initial_state(inner, params)
    # A copy: whoever donates one state must not delete the next one's key.
    return StochasticRoundingState(jnp.copy(start), jnp.zeros((), jnp.int32), inner_state)

  def update(
    updates: optax.Updates,
    state: PyTree,  # a StochasticRoundingState; optax types every state alike
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, StochasticRoundingState]:
    if params is None:
      raise ValueError(
        "stochastic_rounding rounds what parameters become and needs these. Got params=None. Call "
        "tx.update(grads, state, params)."
      )
    steps, inner_state = inner.update(
      cast_floating(updates, FLOAT32),
      state.inner_state,
      cast_floating(params, FLOAT32),
      **extra_args,
    )
    land = _landing(step_key(state.key, state.step))
    steps = tree_util.tree_map_with_path(land, params, steps)
    step = state.step + was_applied(inner_state).astype(jnp.int32)
    return steps, StochasticRoundingState(state.key, step, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _landing(key: jax.Array) -> Callable[[Any, Any, Any], Any]:
  """The function from a parameter's key path, the parameter and its update to the rounded one."""

  def land(path: tree_util.KeyPath, param: Any, step: Any) -> Any:
    if not is_16_bit(param):
      return step
    wide = jnp.asarray(param).astype(FLOAT32)
    target = wide + step.astype(FLOAT32)
    name = f"parameter/{path_str(path)}"
    return way_to(rounded_stochastically(target, param.dtype, key, name), wide)

  return land


def was_applied(opt_state: PyTree) -> jax.Array:
  """Whether an update has moved more than loss scalers: bool[], False after a skipped step."""
  scalers = find_states(opt_state, LossScalingState)
  if not scalers:
    return jnp.ones((), jnp.bool_)
  return jnp.any(jnp.stack([state.last_finite for state in scalers]))
