"""Warnings for 16-bit parameters, moments and gradients where they are known to fail."""

import warnings
from collections.abc import Callable
from typing import Any

import jax

from mpjax._core.dtypes import BFLOAT16, FLOAT16, describe
from mpjax._core.primitives import MATMULS
from mpjax._core.scopes import is_backward
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._engine.program.jaxprs import equations
from mpjax._engine.program.versions import AnyJaxpr
from mpjax._engine.running.scaled_cotangents import border_p
from mpjax._scaling.bfloat16_states import BFloat16StatesState
from mpjax._scaling.master_weights import MasterWeightsState
from mpjax._scaling.rounding import StochasticRoundingState, is_16_bit
from mpjax._scaling.scaling_state import find_scaling_state
from mpjax._scaling.states import find_states

_SECOND_MOMENT = "nu"  # as optax names it in the states of Adam and its relatives


class LowPrecisionWarning(UserWarning):
  """Training will lose numbers that 16 bits do not hold: small sums, or small gradients.

  To train so all the same: ``warnings.simplefilter("ignore", LowPrecisionWarning)``.

  Example:
    >>> import jax.numpy as jnp, mpjax, optax
    >>> tx, params = optax.sgd(1e-3), {"w": jnp.ones(2, jnp.bfloat16)}
    >>> step = mpjax.make_train_step(lambda params, x: jnp.sum(x * params["w"]), tx)
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...   lowered = step.lower(mpjax.TrainState.create(params, tx), jnp.ones(2, jnp.bfloat16))
    >>> caught[0].category.__name__
    'LowPrecisionWarning'
  """


def warn_of_low_precision(params: PyTree, opt_state: PyTree) -> None:
  """Warns of trained 16-bit parameters and moments that are rounded to the nearest.

  Parameters that have masters or are rounded stochastically are sound, and so are moments that
  are. First moments in bfloat16 (``mu_dtype``) are too, and pass.

  Args:
    params: The trained parameters, as they are held.
    opt_state: The state of their optimizer.
  """
  kept = (MasterWeightsState, StochasticRoundingState)
  if not any(find_states(opt_state, kind) for kind in kept):
    _warn(
      [(path, leaf) for path, leaf in leaf_paths(params) if is_16_bit(leaf)],
      "Trained parameters should be float32, or have float32 masters, or be rounded "
      "stochastically: rounded to the nearest, a bfloat16 parameter loses every update below 1/512 "
      "of itself, a float16 one every update below 1/4096",
      "Keep them in float32, as the policies 'mixed_bfloat16' and 'mixed_float16' do, or wrap the "
      "optimizer: mpjax.stochastic_rounding(tx), or mpjax.master_weights(tx) for 4 bytes a "
      "parameter more",
    )
  leaves = leaf_paths(_without_rounded(opt_state))
  _warn(
    [(path, leaf) for path, leaf in leaves if is_16_bit(leaf) and _SECOND_MOMENT in _names(path)],
    "Second moments should be float32 or rounded stochastically: to the nearest, in bfloat16 a "
    "decay of 0.999 is 1, and in float16 the squares of gradients below 2e-4 are 0",
    "Wrap the optimizer: mpjax.bfloat16_states(tx), or keep the parameters in float32, or wrap it "
    "with float32 views of them: mpjax.stochastic_rounding(tx), mpjax.master_weights(tx)",
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


def _without_rounded(opt_state: PyTree) -> Any:
  """An optimizer's state without the moments that `mpjax.bfloat16_states` rounds."""

  def is_rounding(node: Any) -> bool:
    return isinstance(node, BFloat16StatesState)

  def without(node: Any) -> Any:
    if not is_rounding(node):
      return node
    return jax.tree.map(lambda x: None if getattr(x, "dtype", None) == BFLOAT16 else x, node)

  return jax.tree.map(without, opt_state, is_leaf=is_rounding)


class UnscaledFloat16Check:
  """Looks at a step when it is first called, and warns if it needs a loss scaler and has none.

  Attributes:
    is_due: Whether it has not looked yet.
  """

  def __init__(self) -> None:
    self.is_due = True

  def __call__(self, opt_state: PyTree, trace: Callable[[], Any]) -> None:
    """Warns if float16 gradients go through a matmul of the step and nothing scales them.

    What the step computes decides, whoever chose the format: a policy of the step or of the model,
    or the model's own ``dtype=``.

    Args:
      opt_state: The state of the step's optimizer.
      trace: Returns the step's jaxpr; called once at most.
    """
    if not self.is_due:
      return
    self.is_due = False
    if find_scaling_state(opt_state) is None and _loses_small_gradients(trace()):
      warnings.warn(UNSCALED_FLOAT16, LowPrecisionWarning, stacklevel=3)


def _loses_small_gradients(jaxpr: AnyJaxpr) -> bool:
  """Whether a backward matmul or convolution takes float16, and no region has a ``loss_scale``."""
  eqns = list(
    equations(jaxpr, False, lambda e, around: around or is_backward(e.source_info.name_stack))
  )
  if any(eqn.primitive is border_p for eqn, _ in eqns):
    return False
  return any(
    backward
    and eqn.primitive.name in MATMULS
    and any(getattr(atom.aval, "dtype", None) == FLOAT16 for atom in eqn.invars)
    for eqn, backward in eqns
  )


UNSCALED_FLOAT16 = (
  "A float16 loss should be scaled before it is differentiated: gradients below 6e-8 are 0 in "
  "float16. Got an optimizer without a loss scaler. Wrap it: mpjax.dynamic_loss_scaling(tx), or "
  "compute in bfloat16. Ignore mpjax.training.LowPrecisionWarning to train so all the same."
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


def _names(path: str) -> list[str]:
  return path.split("/")
