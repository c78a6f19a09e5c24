"""What a train step does between its arguments and its results, for Linen and NNX alike."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._core.arguments import positive_integer
from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32, is_castable, is_of
from mpjax._core.policy_map import PolicyLike, PolicyMap, as_policy_map
from mpjax._core.tree_paths import PyTree
from mpjax._scaling.device_gradients import read_reduce_dtype, with_narrow_sums
from mpjax._scaling.finiteness import stays_finite, unsquarable_leaves
from mpjax._scaling.loss_scaling import unscaled
from mpjax._scaling.optimizers import call_with_those_taken, initial_state, those_taken
from mpjax._scaling.rounding import seen_parameters
from mpjax._scaling.scaled_gradients import float32_loss, value_and_grad
from mpjax._scaling.scaling_state import find_scaling_state
from mpjax._scaling.states import LossScalingState, find_states
from mpjax._train.accumulation import zero_gradient
from mpjax._train.left_alone import left_alone
from mpjax._train.low_precision_warning import warn_of_low_precision
from mpjax._train.step_parts import (
  StepMetrics,
  check_are_floats,
  check_param_dtype,
  require_scaling,
  step_metrics,
)


class StepSettings(NamedTuple):
  """The arguments that both makers of train steps take, read.

  Attributes:
    policies: The policy of the loss, or ``None``.
    accumulate: The number of micro-batches of a step.
    limit: The number of skips in a row that raises, or ``None``.
    wide_sums: Whether gradients are summed over devices in float32.
  """

  policies: PolicyMap | None
  accumulate: int
  limit: int | None
  wide_sums: bool


def read_settings(
  policy: PolicyLike | None, accumulate: int, max_consecutive_skips: int | None, reduce_dtype: Any
) -> StepSettings:
  """Reads the arguments of a maker of train steps.

  Raises:
    ValueError: If one cannot be read; the message names it.
    TypeError: If a number is none.
  """
  limit = max_consecutive_skips
  return StepSettings(
    policies=None if policy is None else as_policy_map(policy),
    accumulate=positive_integer("accumulate", accumulate),
    limit=None if limit is None else positive_integer("max_consecutive_skips", limit),
    wide_sums=read_reduce_dtype(reduce_dtype),
  )


@dataclass(frozen=True)
class StepCore:
  """A step that is being traced: what it found in its arguments, and what follows from that.

  Attributes:
    settings: What the step was made with.
    tx: The optimizer.
    scaling: The state of the loss scaler before the step, or ``None``.
    frozen: Which leaves of the parameters the optimizer leaves alone; empty for none.
  """

  settings: StepSettings
  tx: optax.GradientTransformation
  scaling: LossScalingState | None
  frozen: tuple[bool, ...]

  @classmethod
  def begin(
    cls,
    settings: StepSettings,
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
  ) -> "StepCore":
    """Checks the arguments of a step.

    Raises:
      ValueError: If the scaler is not outermost, a limit has no scaler, or a trained parameter
        has another dtype than the policy's.
      TypeError: If a trained parameter is no float.
    """
    scaling = find_scaling_state(opt_state)
    require_scaling(scaling, settings.limit)
    core = cls(settings, tx, scaling, ())
    core = cls(settings, tx, scaling, core._find_frozen(params, opt_state))
    trained = core.trained(params)
    check_are_floats(trained)
    check_param_dtype(trained, settings.policies)
    warn_of_low_precision(trained, opt_state)
    return core

  def trained(self, params: PyTree) -> Any:
    """A tree with ``None`` in place of the parameters that the optimizer leaves alone."""
    return self.choose_frozen(jax.tree.map(lambda _: None, params), params)

  def choose_frozen(self, frozen: Any, trained: Any) -> Any:
    """The leaves of one tree where parameters are frozen, and of the other where they are not."""
    if not any(self.frozen):
      return trained
    leaves, structure = jax.tree.flatten(trained)
    others = jax.tree.leaves(frozen, is_leaf=lambda x: x is None)
    flags = zip(self.frozen, others, leaves, strict=True)
    return structure.unflatten([a if flag else b for flag, a, b in flags])

  def differentiate(
    self, loss_fn: Callable[..., tuple[Any, Any]], *args: Any
  ) -> tuple[tuple[jax.Array, Any], Any]:
    """Differentiates a loss with respect to its first argument.

    Args:
      loss_fn: Returns a pair: the loss and whatever else the step needs.
      *args: Its arguments.

    Returns:
      ``((loss, rest), grads)``; the gradients are scaled if there is a scaler, and otherwise
      float32 where they were 16-bit. Those of integers and keys, which are frozen, are zero.
    """
    run = loss_fn if self.settings.wide_sums else with_narrow_sums(loss_fn)
    if all(map(_is_float, jax.tree.leaves(args[0]))):
      return self._differentiate(run, *args)
    params, *others = args
    floats = jax.tree.map(lambda p: p if _is_float(p) else None, params)

    def of_floats(floats: PyTree, *others: Any) -> Any:
      whole = jax.tree.map(lambda p, own: p if own is None else own, params, floats)
      return run(whole, *others)

    out, grads = self._differentiate(of_floats, floats, *others)
    return out, jax.tree.map(lambda p, g: zero_gradient(p) if g is None else g, params, grads)

  def _differentiate(
    self, run: Callable[..., tuple[Any, Any]], *args: Any
  ) -> tuple[tuple[jax.Array, Any], Any]:
    """`differentiate` for parameters that are floats, all of them."""
    if self.scaling is not None:
      return value_and_grad(run, has_aux=True)(*args, loss_scale=self.scaling.scale)

    def float32_loss_fn(*args: Any) -> tuple[jax.Array, Any]:
      loss, rest = run(*args)
      return float32_loss(loss), rest

    out, grads = jax.value_and_grad(float32_loss_fn, has_aux=True)(*args)
    return out, cast_floating(grads, FLOAT32)

  def update(
    self,
    update: Callable[..., Any],
    args: tuple[Any, ...],
    loss: jax.Array,
    grads: PyTree,
    state: tuple[Any, Any],
    loss_at: Callable[[Any], Any],
  ) -> Any:
    """Calls the optimizer with its arguments and with what it may take beside them.

    Args:
      update: The optimizer's update, or what calls it.
      args: Its positional arguments.
      loss: f32[], the loss.
      grads: The gradients, scaled if there is a scaler.
      state: What the step writes beside parameters and optimizer, and what that was before.
      loss_at: The loss of this step's batch, as a function of the parameters.

    Returns:
      What ``update`` returns.
    """
    return self._update(update, args, loss, grads, stays_finite(*state), loss_at, self.frozen)

  def report(
    self, loss: jax.Array, grads: PyTree, opt_state: PyTree, aux: PyTree
  ) -> tuple[StepMetrics, jax.Array | None]:
    """The metrics of a step that has come to ``opt_state``, and which gradients made it a skip."""
    after = find_scaling_state(opt_state)
    metrics = step_metrics(loss, self.trained(grads), self.scaling, after, aux)
    if self.settings.limit is None or self.scaling is None:
      return metrics, None
    return metrics, unsquarable_leaves(unscaled(grads, self.scaling.scale))

  def _update(
    self,
    update: Callable[..., Any],
    args: tuple[Any, ...],
    loss: jax.Array,
    grads: PyTree,
    also_finite: jax.Array | None,
    loss_at: Callable[[Any], Any],
    untested: tuple[bool, ...],
  ) -> Any:
    if not isinstance(self.tx, optax.GradientTransformationExtraArgs):
      return update(*args)
    functions = _LossFunctions(loss_at, None if self.scaling is None else self.scaling.scale)
    offered = {
      "value": loss,
      "grad": grads,
      "value_fn": functions.value,
      "grad_fn": functions.grad,
      "obj_fn": functions.value,
    }
    extra = those_taken(self.tx, offered)
    if self.scaling is None:
      return call_with_those_taken(partial(update, *args), extra)
    scaled = partial(update, *args, also_finite=also_finite, untested=untested)
    return call_with_those_taken(scaled, extra)

  def _find_frozen(self, params: PyTree, opt_state: PyTree) -> tuple[bool, ...]:
    """Looks where parameters may be frozen: under a mask, held in 16 bits, or no floats."""
    leaves = jax.tree.leaves(params)
    narrow = any(is_castable(leaf) and leaf.dtype != FLOAT32 for leaf in leaves)
    other = not all(map(_is_float, leaves))
    if not (narrow or other) and not find_states(
      opt_state, (optax.MaskedState, optax.PartitionState)
    ):
      return ()
    if other:  # looked at as floats, of which every optimizer can take a gradient
      params = jax.tree.map(lambda p: p if _is_float(p) else zero_gradient(p) + 1, params)
      opt_state = initial_state(self.tx, params)
    wide, seen = cast_floating(params, FLOAT32), seen_parameters(opt_state, params)
    nothing_tested = (True,) * len(leaves)

    def update(grads: PyTree) -> tuple[Any, Any]:
      args = (grads, opt_state, seen)
      loss = jnp.zeros((), FLOAT32)
      return self._update(self.tx.update, args, loss, grads, None, _no_loss, nothing_tested)

    return left_alone(update, wide)


def _is_float(leaf: Any) -> bool:
  """Whether a parameter has a gradient."""
  return is_of(leaf, jnp.inexact)


def _no_loss(params: PyTree) -> jax.Array:
  """A loss to look at an optimizer with: which it is does not matter to what is frozen."""
  return sum((jnp.sum(jnp.real(p)) for p in jax.tree.leaves(params)), start=jnp.zeros(()))


class _LossFunctions(NamedTuple):
  """The loss of a batch as optimizers call it; its gradients survive in float16."""

  loss_at: Callable[[Any], Any]
  scale: jax.Array | None

  def value(self, params: PyTree, grad_fn: Any = None, obj_fn: Any = None) -> jax.Array:
    """The loss; differentiated, in either mode, it is differentiated scaled.

    The line searches of optax hand ``value_fn`` the extra arguments that are not theirs, and
    refuse those that its signature does not name.
    """
    del grad_fn, obj_fn
    if self.scale is None:
      return float32_loss(self.loss_at(params))

    @jax.custom_jvp
    def value(params: PyTree) -> jax.Array:
      return float32_loss(self.loss_at(params))

    @value.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
      loss, grads = self._value_and_grad(*primals)
      pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(tangents[0]), strict=True)
      return loss, sum(
        (jnp.real(jnp.sum(g * t.astype(g.dtype))) for g, t in pairs), start=jnp.zeros_like(loss)
      )

    return value(params)

  def grad(self, params: PyTree, *_: Any) -> Any:
    """The gradients of the loss, unscaled, in float32."""
    return self._value_and_grad(params)[1]

  def _value_and_grad(self, params: PyTree) -> tuple[jax.Array, Any]:
    scale = jnp.ones((), FLOAT32) if self.scale is None else self.scale
    loss, grads = value_and_grad(self.loss_at)(params, loss_scale=scale)
    return loss, jax.tree.map(lambda g: g / scale.astype(g.dtype), cast_floating(grads, FLOAT32))
