"""The state of a loss scaler, and the search for states in an optimizer's."""

from typing import Any, NamedTuple

import jax

from mpjax._core.tree_paths import PyTree


class LossScalingState(NamedTuple):
  """The state of a loss scaler: six strongly typed scalar arrays and the optimizer's state.

  Settings live in the transformation, so nothing is lost when the state passes through
  ``jax.jit`` or a checkpoint.

  Attributes:
    scale: f32[], the scale that the next loss must be multiplied by.
    good_steps: i32[], optimizer steps since the scale last changed or a step was skipped.
    consecutive_skips: i32[], skipped steps since the last applied one.
    total_skips: i32[], skipped steps since the beginning.
    hysteresis: i32[], non-finite steps since they were last counted anew; the scale is backed off
      where they come to the setting of this name.
    last_finite: bool[], whether the last update was applied; True before the first.
    inner_state: The state of the wrapped transformation, as it would be without scaling.
  """

  scale: jax.Array
  good_steps: jax.Array
  consecutive_skips: jax.Array
  total_skips: jax.Array
  hysteresis: jax.Array
  last_finite: jax.Array
  inner_state: PyTree


def find_states(tree: PyTree, kind: type | tuple[type, ...]) -> list[Any]:
  """The states of one type anywhere inside an optimizer state, but not those inside of these."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
  return [leaf for leaf in leaves if isinstance(leaf, kind)]
