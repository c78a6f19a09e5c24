"""Warnings for 16-bit parameters and moments where they are known to fail."""

import warnings
from typing import Any

from mpjax._core.dtypes import BFLOAT16, FLOAT16, describe
from mpjax._core.tree_paths import leaf_paths
from mpjax._scaling.loss_scaling import find_states
from mpjax._scaling.master_weights import MasterWeightsState

_SECOND_MOMENT = "nu"  # as optax names it in the states of Adam and its relatives


class LowPrecisionWarning(UserWarning):
  """Training will lose what it adds up, because it is added up in 16 bits.

  To train so all the same: ``warnings.simplefilter("ignore", LowPrecisionWarning)``.
  """


def warn_of_low_precision(params: Any, opt_state: Any) -> None:
  """Warns of trained 16-bit parameters without masters, and of 16-bit moments that fail.

  First moments in bfloat16 (``mu_dtype``) are a sound choice and pass.

  Args:
    params: The trained parameters, as they are held.
    opt_state: The state of their optimizer.
  """
  if not find_states(opt_state, MasterWeightsState):
    _warn(
      [(path, leaf) for path, leaf in leaf_paths(params) if _is_16_bit(leaf)],
      "Trained parameters should be float32, or have float32 masters: a bfloat16 parameter loses "
      "every update below 1/512 of itself, a float16 one every update below 1/4096",
      "Keep them in float32, as the policies 'mixed_bfloat16' and 'mixed_float16' do, or wrap the "
      "optimizer: mpjax.master_weights(tx)",
    )
  leaves = leaf_paths(opt_state)
  _warn(
    [(path, leaf) for path, leaf in leaves if _is_16_bit(leaf) and _SECOND_MOMENT in _names(path)],
    "Second moments should be float32: in bfloat16 a decay of 0.999 is 1, in float16 the squares "
    "of gradients below 2e-4 are 0",
    "Keep the parameters in float32, or wrap the optimizer: mpjax.master_weights(tx)",
  )
  _warn(
    [
      (path, leaf)
      for path, leaf in leaves
      if getattr(leaf, "dtype", None) == FLOAT16 and _SECOND_MOMENT not in _names(path)
    ],
    "The optimizer's state should not be float16, where a moment of gradients below 3e-8 is 0",
    "Choose bfloat16 or float32, such as mu_dtype='bfloat16'",
  )


def _warn(found: list[tuple[str, Any]], what: str, instead: str) -> None:
  if found:
    path, leaf = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    warnings.warn(
      f"{what}. Got {path}: {describe(leaf)}{more}. {instead}. Ignore "
      "mpjax.training.LowPrecisionWarning to train so all the same.",
      LowPrecisionWarning,
      stacklevel=2,
    )


def _is_16_bit(leaf: Any) -> bool:
  return getattr(leaf, "dtype", None) in (BFLOAT16, FLOAT16)


def _names(path: str) -> list[str]:
  return path.split("/")
