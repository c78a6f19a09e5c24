"""Loss scaling as one optax transformation around the optimizer.

float16 gradients below 6e-8 are zero. The loss is therefore multiplied by a scale before it is
differentiated, and the gradients are divided by it before the optimizer sees them (Micikevicius
et al., 2018, section 3.2). A scale that makes them overflow costs one skipped step and is backed
off. The scale is a power of two, so scaling and unscaling are exact.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mpjax._core.arguments import positive_integer, power_of_two
from mpjax._core.dtypes import FLOAT32, is_of
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._scaling.device_gradients import AxisName, mapped_axes
from mpjax._scaling.finiteness import all_squarable, select
from mpjax._scaling.optimizers import as_transformation, initial_state
from mpjax._scaling.rounding import seen_parameters
from mpjax._scaling.states import LossScalingState, find_states


def dynamic_loss_scaling(
  inner: optax.GradientTransformation,
  *,
  init_scale: float = 2.0**15,
  growth_factor: float = 2.0,
  backoff_factor: float = 0.5,
  growth_interval: int = 2000,
  min_scale: float = 1.0,
  max_scale: float = 2.0**24,
  hysteresis: int = 1,
  consecutive_hysteresis: bool = False,
  axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it takes gradients of a scaled loss and skips non-finite ones.

  Each update converts the gradients to float32, divides them by the scale in its state (the
  one that `loss_scale` handed out for this step) and tests them. If the sum of squares of every
  leaf is finite (none has inf or NaN, or a norm beyond 2**64, whose square a second moment does not
  hold), ``inner`` updates as it would without scaling. Otherwise the updates are zero and the state
  of ``inner`` stays as it was, bit for bit; only the scaler moves. The scale grows after
  ``growth_interval`` good optimizer steps and is backed off by a step that was skipped.

  ``inner`` must hold the whole chain, clipping included: a transformation in front of the
  scaler sees scaled gradients and may hide an overflow from it. ``inner`` is initialized and
  called with float32 views of 16-bit parameters, so its moments are float32 (in float16,
  Adam's epsilon is zero, optax#1754); `mpjax.stochastic_rounding` in it makes these views by
  itself. Extra arguments of ``update`` pass through to it; ``grad``,
  which line searches take, is scaled as the updates are and unscaled with them, while ``value``,
  ``value_fn``, ``grad_fn`` and ``obj_fn`` are those of the loss itself. (The gradients that
  ``optax.value_and_grad_from_state`` returns are not scaled: multiply them by `loss_scale`.)

  Beside the gradients, ``update`` takes ``also_finite``, a bool scalar: a step is skipped if it is
  False. So new BatchNorm statistics can be part of the test:
  ``tx.update(grads, state, params, also_finite=mpjax.all_finite(statistics))``.

  It must be the outermost transformation; `loss_scale` and the train steps refuse another place.
  Its settings are not part of its state: a state that was saved under others follows those of the
  transformation that it is passed to from the first update on.

  To accumulate gradients, give `mpjax.make_train_step` ``accumulate=k``, which drops the whole
  window of a non-finite micro-batch. ``optax.MultiSteps`` belongs inside: a non-finite micro-batch
  is left out of its window, which takes one more instead, and the scale grows by optimizer steps,
  not by micro-steps. Around the scaler it is refused: there it keeps the first non-finite
  micro-batch in its accumulator for ever (it clears it by a product with 0).

  The default start is below torch's 2**16, which overflows float16 on the first step of a loss
  that is itself float16; the other settings are theirs, the ceiling is Apex's.

  Args:
    inner: The optimizer.
    init_scale: The first scale.
    growth_factor: What the scale is multiplied by when it grows.
    backoff_factor: What the scale is multiplied by when it is backed off.
    growth_interval: The number of consecutive good optimizer steps that make it grow.
    min_scale: The scale is never backed off below this.
    max_scale: The scale never grows above this.
    hysteresis: The number of non-finite steps after which the scale is backed off, once and
      then at every further one; counted anew when the scale grows.
    consecutive_hysteresis: Whether every good step counts them anew too, so that only that many
      non-finite steps in a row back the scale off (DeepSpeed's setting of this name).
    axis_name: The axis or axes of ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` over which
      gradients may differ. All devices then skip if one does. Not needed under plain
      ``jax.jit``, sharded or not.

  Returns:
    A transformation whose state is a `LossScalingState`.

  Raises:
    ValueError: If a scale or factor is not a power of two within float32's range, is out of
      order, or a count is below 1; the message says which.
    TypeError: If an argument is no number, or ``inner`` no optax transformation.

  Example:
    >>> from mpjax import loss_scale, step_is_finite
    >>> tx = dynamic_loss_scaling(optax.sgd(1.0), init_scale=8)
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.array([8.0, jnp.inf])}, state, params)
    >>> step_is_finite(state), loss_scale(state)
    (Array(False, dtype=bool), Array(4., dtype=float32))
    >>> optax.apply_updates(params, updates)
    {'w': Array([1., 1.], dtype=float32)}
  """
  settings = _Settings(
    growth=power_of_two("growth_factor", growth_factor),
    backoff=power_of_two("backoff_factor", backoff_factor),
    interval=positive_integer("growth_interval", growth_interval),
    floor=power_of_two("min_scale", min_scale),
    ceiling=power_of_two("max_scale", max_scale),
    hysteresis=positive_integer("hysteresis", hysteresis),
    consecutive=bool(consecutive_hysteresis),
  )
  start = power_of_two("init_scale", init_scale)
  _check_order(start, settings)
  return _loss_scaling(inner, start, settings, axis_name)


def static_loss_scaling(
  inner: optax.GradientTransformation,
  scale: float = 2.0**10,
  *,
  axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer like `dynamic_loss_scaling`, with a scale that never changes.

  Non-finite steps are skipped all the same, so ``static_loss_scaling(inner, 1)`` is a guard
  against NaN for training without scaling, in bfloat16 or float32.

  Args:
    inner: The optimizer.
    scale: The scale, a power of two.
    axis_name: See `dynamic_loss_scaling`.

  Returns:
    A transformation whose state is a `LossScalingState`.

  Raises:
    ValueError: If ``scale`` is not a power of two within float32's range.
    TypeError: If ``scale`` is no number, or ``inner`` no optax transformation.

  Example:
    >>> from mpjax import loss_scale
    >>> state = static_loss_scaling(optax.sgd(1.0), 1).init({"w": jnp.ones(2)})
    >>> loss_scale(state)
    Array(1., dtype=float32)
  """
  return _loss_scaling(inner, power_of_two("scale", scale), None, axis_name)


class _Settings(NamedTuple):
  """What a dynamic scaler was made with; held by its closure, not by its state."""

  growth: float
  backoff: float
  interval: int
  floor: float
  ceiling: float
  hysteresis: int
  consecutive: bool


def _loss_scaling(
  inner: Any, start: float, settings: _Settings | None, axis_name: AxisName | None
) -> optax.GradientTransformationExtraArgs:
  inner = as_transformation(inner)

  def init(params: optax.Params) -> LossScalingState:
    return LossScalingState(
      scale=jnp.full((), start, FLOAT32),
      good_steps=jnp.zeros((), jnp.int32),
      consecutive_skips=jnp.zeros((), jnp.int32),
      total_skips=jnp.zeros((), jnp.int32),
      hysteresis=jnp.zeros((), jnp.int32),
      last_finite=jnp.ones((), jnp.bool_),
      inner_state=jax.tree.map(_strong, initial_state(inner, params)),
    )

  def update(
    updates: optax.Updates,
    state: PyTree,  # a LossScalingState; optax types every state alike
    params: optax.Params | None = None,
    *,
    also_finite: jax.typing.ArrayLike | None = None,
    untested: Sequence[bool] = (),
    **extra_args: Any,
  ) -> tuple[optax.Updates, LossScalingState]:
    _check_is_state(state, params)
    grads = unscaled(updates, state.scale)
    if "grad" in extra_args:
      same = extra_args["grad"] is updates
      extra_args["grad"] = grads if same else unscaled(extra_args["grad"], state.scale)
    # A scale below 1 can overflow here what came in finite, hence the test after unscaling;
    # inf and NaN stay what they are.
    finite = all_squarable(_without(grads, untested))
    finite = finite if also_finite is None else finite & also_finite
    finite = _agree(finite, axis_name)
    new_updates, new_inner = inner.update(
      grads, state.inner_state, seen_parameters(state.inner_state, params), **extra_args
    )
    stepped = finite & _optimizer_stepped(state.inner_state, new_inner)
    state = _adjust(state, finite, stepped, settings or start)
    return (
      jax.tree.map(lambda u: _zero_unless(finite, u), new_updates),
      state._replace(inner_state=select(finite, new_inner, _held_as(new_inner, state.inner_state))),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _check_is_state(state: PyTree, params: PyTree) -> None:
  if isinstance(state, LossScalingState):
    return
  swapped = isinstance(params, LossScalingState)
  got = "the state in the place of the parameters" if swapped else type(state).__name__
  raise TypeError(
    f"The loss scaler's update takes gradients, its state and parameters. Got {got}"
    f"{'' if swapped else ' for its state'}. Write tx.update(grads, opt_state, params), with the "
    "opt_state of tx.init(params)."
  )


def _held_as(new: Any, old: Any) -> Any:
  """An old state in the containers of the new one, if these are all that differs.

  ``nnx.Optimizer`` hands the lists and dictionaries of an optimizer's state over as ``nnx.State``.
  """
  structure = jax.tree.structure(new)
  if structure == jax.tree.structure(old):
    return old
  paths, others = ([path for path, _ in leaf_paths(tree)] for tree in (new, old))
  return structure.unflatten(jax.tree.leaves(old)) if paths == others else old


def _without(grads: PyTree, untested: Sequence[bool]) -> Any:
  """The gradients that are tested: all, or the leaves that are not flagged as untested."""
  if not any(untested):
    return grads
  return [g for g, out in zip(jax.tree.leaves(grads), untested, strict=True) if not out]


def _adjust(
  state: LossScalingState, finite: jax.Array, stepped: jax.Array, settings: _Settings | float
) -> LossScalingState:
  """Moves the counters and the scale; a restored one moves into what these settings allow.

  ``settings`` is the scale itself if that is static.
  """
  skipped = (~finite).astype(jnp.int32)
  state = state._replace(
    consecutive_skips=(state.consecutive_skips + 1) * skipped,
    total_skips=state.total_skips + skipped,
    last_finite=finite,
    good_steps=(state.good_steps + stepped.astype(jnp.int32)) * (1 - skipped),
  )
  if not isinstance(settings, _Settings):
    return state._replace(
      scale=jnp.full((), settings, FLOAT32), hysteresis=jnp.zeros((), jnp.int32)
    )
  grow = stepped & (state.good_steps >= settings.interval)
  used = state.hysteresis + skipped
  back_off = ~finite & (used >= settings.hysteresis)
  factor = jnp.where(grow, settings.growth, jnp.where(back_off, settings.backoff, 1.0))
  refill = finite if settings.consecutive else grow
  return state._replace(
    scale=jnp.clip(state.scale * factor, settings.floor, settings.ceiling),
    good_steps=jnp.where(grow, 0, state.good_steps),
    hysteresis=jnp.where(refill, 0, used),
  )


def unscaled(updates: optax.Updates, scale: jax.Array) -> optax.Updates:
  """Gradients over their scale, those in 16 bits in float32."""
  inverse = 1 / scale

  def unscale(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf) if isinstance(leaf, float | complex) else leaf
    if not is_of(leaf, jnp.inexact):
      return leaf
    wide = leaf if leaf.dtype.itemsize >= FLOAT32.itemsize else leaf.astype(FLOAT32)
    return wide * inverse.astype(wide.dtype)

  return jax.tree.map(unscale, updates)


def _agree(finite: jax.Array, axis_name: AxisName | None) -> jax.Array:
  if axis_name is None:
    return finite
  return lax.pmin(finite.astype(jnp.int32), mapped_axes(axis_name)) == 1


def _optimizer_stepped(old: Any, new: Any) -> jax.Array:
  """Whether this update was an optimizer step rather than one of its micro-steps."""
  before, after = _gradient_steps(old), _gradient_steps(new)
  if not before:
    return jnp.array(True)
  return jnp.any(jnp.stack([a != b for a, b in zip(before, after, strict=True)]))


def _gradient_steps(state: PyTree) -> list[jax.Array]:
  return [found.gradient_step for found in find_states(state, optax.MultiStepsState)]


def _zero_unless(finite: jax.Array, update: Any) -> Any:
  if getattr(update, "dtype", jax.dtypes.float0) == jax.dtypes.float0:
    return update
  # p + 0.0 turns a parameter -0.0 into 0.0; p - 0.0 leaves every bit.
  zero = -0.0 if jnp.issubdtype(update.dtype, jnp.floating) else 0
  return jnp.where(finite, update, jnp.full_like(update, zero))


def _strong(leaf: Any) -> Any:
  """A weakly typed array would change its type, and be traced again, after one update."""
  return lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


def _check_order(start: float, settings: _Settings) -> None:
  if settings.growth <= 1:
    raise ValueError(
      f"growth_factor must be above 1. Got {settings.growth:g}. Choose for example 2."
    )
  if settings.backoff >= 1:
    raise ValueError(
      f"backoff_factor must be below 1. Got {settings.backoff:g}. Choose for example 0.5."
    )
  if not settings.floor <= start <= settings.ceiling:
    raise ValueError(
      f"init_scale must lie between min_scale and max_scale. Got init_scale {start:g}, "
      f"min_scale {settings.floor:g} and max_scale {settings.ceiling:g}. Move one of them."
    )
