"""What a loss scaler's state says, and where in an optimizer's state it must stand."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from mpjax._core.tree_paths import PyTree, path_str
from mpjax._scaling.bfloat16_states import BFloat16StatesState
from mpjax._scaling.faults import FaultState
from mpjax._scaling.master_weights import MasterWeightsState
from mpjax._scaling.rounding import StochasticRoundingState
from mpjax._scaling.states import LossScalingState, find_states


def loss_scale(opt_state: PyTree) -> jax.Array:
  """The scale that the loss of the next step must be multiplied by.

  Args:
    opt_state: The state of an optimizer with the loss scaler as its outermost transformation,
      such as the ``opt_state`` of Flax's ``TrainState`` or ``nnx.Optimizer``. Around the scaler
      there may be `mpjax.master_weights`, ``optax.inject_hyperparams`` and
      `mpjax.testing.inject_faults`. What stands around it moves on skipped steps, too, but in the
      train steps.

  Returns:
    f32[].

  Raises:
    ValueError: If it is no state but the optimizer itself, or there is no loss scaler in it, more
      than one, or one that is not outermost: in a chain, in a branch of ``optax.partition``, in
      ``optax.masked`` or ``optax.MultiSteps``; the message says what to write instead.

  Example:
    >>> from mpjax import dynamic_loss_scaling
    >>> import jax.numpy as jnp
    >>> tx = dynamic_loss_scaling(optax.adam(1e-3))
    >>> loss_scale(tx.init({"w": jnp.ones(2)}))
    Array(32768., dtype=float32)
  """
  return _require_scaling_state(opt_state).scale


def step_is_finite(opt_state: PyTree) -> jax.Array:
  """Whether the last update was applied; False if it was skipped as not finite.

  What is kept beside the parameters, such as BatchNorm statistics, must not move either on a
  skipped step: ``select(step_is_finite(opt_state), new, old)``.

  Args:
    opt_state: See `loss_scale`.

  Returns:
    bool[], True before the first update.

  Raises:
    ValueError: As `loss_scale`.

  Example:
    >>> from mpjax import dynamic_loss_scaling
    >>> import jax.numpy as jnp
    >>> tx = dynamic_loss_scaling(optax.adam(1e-3))
    >>> step_is_finite(tx.init({"w": jnp.ones(2)}))
    Array(True, dtype=bool)
  """
  return _require_scaling_state(opt_state).last_finite


def find_scaling_state(opt_state: PyTree) -> LossScalingState | None:
  """Finds the state of the one loss scaler in an optimizer state, the outermost of all states.

  Returns:
    The state, its scalars as arrays even where Flax wraps them in Variables; ``None`` if there
    is no loss scaler.

  Raises:
    ValueError: If there is more than one, or something around it that must be inside.
  """
  found = _scaling_states(opt_state)
  if not found:
    return None
  if len(found) > 1:
    raise ValueError(
      "The optimizer state must hold one loss scaler. "
      f"Got {len(found)}. Wrap the outermost transformation only, or pass the part of the "
      "state that belongs to one of them."
    )
  _check_place(opt_state)
  *scalars, inner_state = found[0]
  return LossScalingState._make([*(jax.tree.leaves(x)[0] for x in scalars), inner_state])


def _require_scaling_state(opt_state: PyTree) -> LossScalingState:
  state = find_scaling_state(opt_state)
  if isinstance(opt_state, optax.GradientTransformation):
    raise ValueError(
      "The scale is in the optimizer's state. Got the optimizer itself. Pass opt_state, which "
      "tx.init(params) makes and every tx.update(...) returns anew."
    )
  if state is None:
    raise ValueError(
      f"The optimizer state must hold a loss scaler. Got a {type(opt_state).__name__} without "
      "one. Wrap the optimizer: mpjax.dynamic_loss_scaling(tx), or "
      "mpjax.static_loss_scaling(tx, 1) where one step is to serve policies that need no scale "
      "too; and pass its state."
    )
  return state


def _scaling_states(tree: PyTree) -> list[LossScalingState]:
  found = find_states(tree, LossScalingState)
  return found + [below for state in found for below in _scaling_states(state.inner_state)]


# The place of the scaler --------------------------------------------------------------------------

_MAY_BE_AROUND = (
  MasterWeightsState,
  StochasticRoundingState,
  BFloat16StatesState,
  optax.InjectHyperparamsState,
  optax.InjectStatefulHyperparamsState,
)
"""States, with an ``inner_state``, of what hands scaled gradients on as they are."""

_INSTEAD: dict[type, tuple[str, str]] = {
  tuple: (
    "beside other transformations of a chain, which see scaled gradients or change what it returns",
    "the scaler around the whole chain: mpjax.dynamic_loss_scaling(optax.chain(...))",
  ),
  optax.MultiStepsState: (
    "inside optax.MultiSteps, where it never sees the micro-batch that overflowed: optax keeps the "
    "NaN in its accumulator for ever, or leaves the micro-batch out without lowering the scale",
    "a train step with accumulate=k and no MultiSteps, or the scaler around it: "
    "mpjax.dynamic_loss_scaling(optax.MultiSteps(tx, k))",
  ),
  optax.PartitionState: (
    "in one branch of optax.partition, whose other branches get scaled gradients",
    "the scaler around all branches: mpjax.dynamic_loss_scaling(optax.partition(...))",
  ),
  optax.MaskedState: (
    "inside optax.masked, which hands the other gradients on scaled",
    "the scaler around it: mpjax.dynamic_loss_scaling(optax.masked(...))",
  ),
}


def misplaced_scaler(tree: PyTree) -> str | None:
  """What is wrong with the place of a loss scaler anywhere in a tree, ``None`` if nothing is.

  For states of which it is not known where an optimizer's begins: in a tuple the scaler may stand
  beside parameters, but not beside states of optax.
  """
  if isinstance(tree, LossScalingState) or not find_states(tree, LossScalingState):
    return None
  parts = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
  others = [x for x in parts if not find_states(x, (LossScalingState, FaultState))]
  in_chain = type(tree) is tuple and others and all(map(_is_of_optax, others))
  if in_chain or (_is_of_optax(tree) and not isinstance(tree, _MAY_BE_AROUND)):
    return _place_message(tree, tree)
  return next(filter(None, map(misplaced_scaler, parts)), None)


def _is_of_optax(state: PyTree) -> bool:
  return isinstance(state, tuple) and type(state).__module__.startswith("optax")


def _check_place(opt_state: PyTree) -> None:
  """Refuses a loss scaler that is not the outermost transformation.

  Raises:
    ValueError: If so; the message names what is around it and what to write instead.
  """
  around = opt_state
  while not isinstance(around, LossScalingState):
    inside = _handed_on(around)
    if inside is None:
      raise ValueError(_place_message(opt_state, around))
    around = inside


def _handed_on(state: PyTree) -> Any:
  """The only state inside of another that matters to the scaler; ``None`` if others do too."""
  if isinstance(state, _MAY_BE_AROUND):
    return state.inner_state
  parts = [state]
  if type(state) in (tuple, list):
    parts = list(state)
  elif isinstance(state, Mapping):
    parts = list(state.values())
  others = [part for part in parts if not isinstance(part, FaultState)]
  return others[0] if len(others) == 1 and others[0] is not state else None


def _place_message(opt_state: PyTree, around: Any) -> str:
  if around is opt_state and hasattr(around, "opt_state") and not isinstance(around, tuple):
    return (
      "What is passed must be the state of an optimizer. Got a "
      f"{type(around).__name__} that has one. Pass its opt_state."
    )
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    opt_state, is_leaf=lambda x: isinstance(x, LossScalingState)
  )
  path = next(path_str(path) for path, leaf in leaves if isinstance(leaf, LossScalingState))
  kind = tuple if isinstance(around, list | Mapping) else type(around)
  name = type(around).__name__
  where, instead = _INSTEAD.get(
    kind,
    (
      f"inside of what has the state {name}, which sees scaled gradients or changes what it "
      "returns",
      "the scaler around that: mpjax.dynamic_loss_scaling(...)",
    ),
  )
  return (
    "The loss scaler must be the outermost transformation. Got it "
    f"{where} (its state is at {path!r} of the optimizer's). Write {instead}."
  )
