"""Train steps for NNX models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mpjax._core.arguments import positive_integer
from mpjax._core.dtypes import FLOAT16, FLOAT32, describe
from mpjax._core.tree_paths import leaf_paths
from mpjax._flax.nnx_calls import autocast
from mpjax._scaling.device_gradients import read_reduce_dtype
from mpjax._scaling.finiteness import nonfinite_leaves, select
from mpjax._scaling.loss_scaling import find_scaling_state
from mpjax._scaling.scaled_gradients import split_aux
from mpjax._train.accumulation import Window, check_flow
from mpjax._train.accumulation import accumulate as run_window
from mpjax._train.low_precision_warning import warn_of_low_precision
from mpjax._train.shardings import Placement, keep_placement, placement
from mpjax._train.step_parts import (
  PolicyLike,
  StepMetrics,
  autocast_loss,
  check_param_dtype,
  keep_if_skipped,
  loss_and_grads,
  raise_if_stuck,
  read_limit,
  require_scaling,
  step_metrics,
)


class TrainStep:
  """A compiled train step, as `make_train_step` returns it: ``step(model, optimizer, batch)``."""

  def __init__(self, jitted: Any, max_consecutive_skips: int | None) -> None:
    self._jitted = jitted
    self._limit = max_consecutive_skips

  def __call__(self, model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> StepMetrics:
    """Takes one step, updating ``model`` and ``optimizer`` in place.

    Args:
      model: The model.
      optimizer: Its optimizer.
      batch: What the loss function takes as its second argument.

    Returns:
      The metrics of the step.

    Raises:
      NonFiniteError: If this was the last of ``max_consecutive_skips`` skipped steps.
    """
    metrics, bad = self._jitted(model, optimizer, batch, _placement(model, optimizer, batch))
    if self._limit is not None:
      params = nnx.state(model, optimizer.wrt)
      raise_if_stuck(metrics, bad, params, self._limit, (model, optimizer))
    return metrics

  def lower(self, model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> Any:
    """Lowers the step for these arguments, as ``nnx.jit(...).lower`` does.

    Args:
      model: The model.
      optimizer: Its optimizer.
      batch: A batch.

    Returns:
      A lowered function; its ``compile()`` tells memory and cost.
    """
    return self._jitted.lower(model, optimizer, batch, _placement(model, optimizer, batch))


def make_train_step(
  loss_fn: Callable[..., Any],
  *,
  has_aux: bool = False,
  policy: PolicyLike | None = None,
  accumulate: int = 1,
  max_consecutive_skips: int | None = None,
  donate: bool = True,
  reduce_dtype: Any = FLOAT32,
) -> TrainStep:
  """Makes the compiled train step of a loss function of an NNX model.

  The step differentiates ``loss_fn(model, batch)`` with respect to the Variables that the
  optimizer was made for (its ``wrt``), and updates model and optimizer in place; BatchNorm
  statistics, random streams and whatever else the loss changes in the model arrive there.

  If the optimizer holds a loss scaler (`mpjax.dynamic_loss_scaling` as the outermost
  transformation), the loss is scaled, and a step with non-finite gradients is skipped: every
  Variable of model and optimizer, ``optimizer.step`` and the random streams included, stays as
  it was; only the scaler moves. Without one, no operation of scaling or testing is in the
  compiled step.

  With ``accumulate=k`` the leading axis of the batch is split into k micro-batches, whose float32
  gradients are averaged before one step is applied or skipped; see `mpjax.make_train_step`, and
  there what it assumes of the loss. What the loss changes in the model goes from one micro-batch
  into the next, random streams included; a skip puts back what was there before the first. A
  Variable that the loss adds is kept as the last micro-batch left it.

  Args:
    loss_fn: Returns the loss, or ``(loss, aux)`` if ``has_aux``.
    has_aux: Whether ``loss_fn`` returns auxiliary output, for the metrics.
    policy: A policy to run the whole loss under; see `mpjax.nnx.autocast`. The results of
      ``loss_fn`` stay float32. Leave it out if the model is one of `mpjax.nnx.apply_policy`.
    accumulate: The number of micro-batches that a batch is computed in.
    max_consecutive_skips: After this many skipped steps in a row, raise on the host. Each step
      then waits for its result.
    donate: Whether the step reuses the buffers of model and optimizer. Arrays that another
      object shares with them, such as a clone's, are deleted by that.
    reduce_dtype: In which dtype gradients are summed over devices, as for
      `mpjax.make_train_step`.

  Returns:
    ``step(model, optimizer, batch) -> metrics``.

  Warns:
    LowPrecisionWarning: As for `mpjax.make_train_step`.

  Raises:
    ValueError: If a policy or ``reduce_dtype`` cannot be read, ``accumulate`` or
      ``max_consecutive_skips`` is below 1 or, when called, a limit is given without a loss scaler,
      parameters do not have the policy's param dtype, ``accumulate`` does not divide the batch,
      ``optax.MultiSteps`` is
      around the loss scaler, or an optimizer without a loss scaler has float16 state.
    TypeError: When called, if ``loss_fn`` returns something else than above, or a micro-batch
      changes the shape or dtype of a Variable.

  Example:
    >>> import mpjax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> loss_fn = lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
    >>> step = make_train_step(loss_fn, policy="mixed_float16")
    >>> metrics = step(model, optimizer, {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 1))})
    >>> metrics.applied, metrics.loss_scale, model.kernel.dtype
    (Array(True, dtype=bool), Array(32768., dtype=float32), dtype('float32'))
  """
  limit = read_limit(max_consecutive_skips)
  count = positive_integer("accumulate", accumulate)
  wide_sums = read_reduce_dtype(reduce_dtype)
  run = autocast_loss(loss_fn, policy, autocast)

  def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, batch: Any, where: Placement
  ) -> tuple[Any, Any]:
    before = find_scaling_state(optimizer.opt_state)
    require_scaling(before, limit, optimizer.opt_state)
    paths = list(_arrays((model, optimizer)))
    graphdef, *parts = nnx.split(model, optimizer.wrt, ...)
    check_param_dtype(parts[0], policy)
    _check_opt_state(optimizer.opt_state, scaled=before is not None)
    warn_of_low_precision(parts[0], optimizer.opt_state)

    def compute(wrt: nnx.State, rest: nnx.State, batch: Any) -> Any:
      copy = nnx.merge(graphdef, wrt, rest, copy=True)
      out = run(copy, batch)
      loss, aux = split_aux(out) if has_aux else (out, None)
      return loss, (nnx.state(copy), aux)

    old_variables = _arrays(model)
    old_opt_state = nnx.as_pure(optimizer.opt_state)
    old_step = optimizer.step[...]

    def micro_step(parts: list[nnx.State], batch: Any, index: jax.Array | None) -> Window:
      (loss, (changed, aux)), grads = loss_and_grads(
        compute, before, *parts, batch, wide=wide_sums and where.spread
      )
      if index is None:
        return Window(loss, [changed], ([], aux), grads)
      parts, added = _sorted_into(parts, changed)
      return Window(loss, parts, ([added], aux), grads)

    loss, changed, (added, aux), grads = run_window(micro_step, count, parts[0], parts, batch)
    for state in [*changed, *jax.tree.map(lambda x: x[-1], added)]:
      nnx.update(model, state)
    optimizer.update(model, grads, **_extra_args(optimizer, loss))
    after = find_scaling_state(optimizer.opt_state)
    if after is not None:
      _restore(after.last_finite, model, old_variables)
      _restore_optimizer(after.last_finite, optimizer, old_opt_state, old_step)
    bad = None if limit is None else nonfinite_leaves(grads)
    _keep_placement((model, optimizer), paths, where)
    return step_metrics(loss, grads, before, after, aux), bad

  jitted = nnx.jit(train_step, donate_argnums=(0, 1) if donate else (), static_argnums=3)
  return TrainStep(jitted, limit)


def _arrays(nodes: Any) -> dict[Any, Any]:
  """The arrays of graph nodes by path: pure ones, for the Variables themselves change."""
  return dict(nnx.to_flat_state(nnx.as_pure(nnx.state(nodes))))


def _placement(model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> Placement:
  return placement(list(_arrays((model, optimizer)).values()), batch)


def _keep_placement(nodes: Any, paths: list[Any], where: Placement) -> None:
  """Holds the Variables that a step was given to the shardings that they had."""
  if not where.shardings:
    return
  now = _arrays(nodes)
  kept = keep_placement([now[path] for path in paths], where.shardings)
  nnx.update(nodes, nnx.from_flat_state(zip(paths, kept, strict=True)))


def _extra_args(optimizer: nnx.Optimizer, loss: jax.Array) -> dict[str, jax.Array]:
  takes_value = isinstance(optimizer.tx, optax.GradientTransformationExtraArgs)
  return {"value": loss} if takes_value else {}


def _sorted_into(parts: list[nnx.State], changed: nnx.State) -> tuple[list[nnx.State], nnx.State]:
  """Puts the Variables of a changed model into the parts that they came from; what is new is left.

  Raises:
    TypeError: If one has another dtype or shape now, or is gone.
  """
  now = dict(nnx.to_flat_state(changed))
  for part in parts:
    check_flow(dict(leaf_paths(nnx.from_flat_state(now))), dict(leaf_paths(part)))
  sorted_parts = [
    nnx.map_state(lambda path, variable: variable.replace(now.pop(path).get_value()), part)
    for part in parts
  ]
  return sorted_parts, nnx.from_flat_state(now)


def _restore(applied: jax.Array, model: nnx.Module, old: dict[Any, Any]) -> None:
  """Puts the Variables of a skipped step back; one that the step has added stays."""
  now = _arrays(model)
  kept = select(applied, [now[path] for path in old], list(old.values()))
  nnx.update(model, nnx.from_flat_state(zip(old, kept, strict=True)))


def _restore_optimizer(
  applied: jax.Array, optimizer: nnx.Optimizer, old_opt_state: Any, old_step: jax.Array
) -> None:
  """Puts the optimizer of a skipped step back; only its loss scaler has moved."""
  kept = keep_if_skipped(applied, nnx.as_pure(optimizer.opt_state), old_opt_state)
  nnx.update(optimizer.opt_state, nnx.state(kept))
  optimizer.step[...] = jnp.where(applied, optimizer.step[...], old_step)


def _check_opt_state(opt_state: Any, *, scaled: bool) -> None:
  """Adam on float16 moments gives NaN: its epsilon is zero there (optax#1754)."""
  if scaled:
    return
  for path, leaf in leaf_paths(opt_state):
    if getattr(leaf, "dtype", None) == FLOAT16:
      raise ValueError(
        "The optimizer's state must not be float16, where Adam's epsilon is zero. Got "
        f"{path}: {describe(leaf)}. Keep the parameters in float32, or wrap the optimizer: "
        "mpjax.static_loss_scaling(tx, 1) holds its state in float32."
      )
