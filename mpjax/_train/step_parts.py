"""What a train step reports, refuses and keeps: metrics, argument checks, skips, the abort."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.core import Tracer

from mpjax._core.arguments import no_array
from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32, describe, is_of
from mpjax._core.policy import spec
from mpjax._core.policy_map import PolicyMap
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._scaling.faults import FaultState
from mpjax._scaling.finiteness import global_norm, select
from mpjax._scaling.loss_scaling import unscaled
from mpjax._scaling.states import LossScalingState


class StepMetrics(NamedTuple):
  """What one train step reports; scalar arrays, and whatever the loss function adds.

  Attributes:
    loss: f32[], the unscaled loss before the update.
    grad_norm: f32[], the 2-norm of the unscaled gradients of all trained parameters; inf where the
      squares of a leaf add up to inf in float32. With a loss scaler it is inf where a gradient is
      inf or NaN, too, so that ``jax.debug_nans`` stops no skip.
    loss_scale: f32[], the scale that this step used; 1 without a loss scaler.
    applied: bool[], False if the step was skipped; always True without a loss scaler.
    consecutive_skips: i32[], skipped steps up to this one; 0 if it was applied.
    total_skips: i32[], skipped steps since the beginning.
    aux: The auxiliary output of the loss function, or ``None``.

  Example:
    >>> import mpjax, optax
    >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    >>> step = mpjax.make_train_step(lambda params, x: jnp.sum(params["w"] * x), tx)
    >>> state = mpjax.TrainState.create({"w": jnp.ones(2)}, tx)
    >>> _, metrics = step(state, jnp.ones(2))
    >>> float(metrics.loss), bool(metrics.applied), float(metrics.loss_scale)
    (2.0, True, 32768.0)
  """

  loss: jax.Array
  grad_norm: jax.Array
  loss_scale: jax.Array
  applied: jax.Array
  consecutive_skips: jax.Array
  total_skips: jax.Array
  aux: PyTree = None


class NonFiniteError(FloatingPointError):
  """Raised when a train step has been skipped too many times in a row.

  Attributes:
    state: What training has come to: the ``TrainState``, or for NNX the pair of model and
      optimizer. No skipped step changed its parameters, so it can be saved or trained on.
    paths: The parameters whose gradients held inf or NaN in the last step.

  Example:
    >>> import mpjax, optax
    >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    >>> loss_fn = lambda params, x: jnp.sum(params["w"] * x)
    >>> step = mpjax.make_train_step(loss_fn, tx, max_consecutive_skips=1)
    >>> state = mpjax.TrainState.create({"w": jnp.ones(2)}, tx)
    >>> try:
    ...   step(state, jnp.array([1.0, jnp.nan]))
    ... except NonFiniteError as error:
    ...   print(error.paths, error.state.params["w"])
    ('w',) [1. 1.]
  """

  def __init__(self, message: str, state: PyTree, paths: Sequence[str]) -> None:
    super().__init__(message)
    self.state = state
    self.paths = tuple(paths)


def check_is_loss(loss_fn: Any, what: str) -> None:
  """Refuses what is no function, modules and their classes.

  Args:
    loss_fn: What came for a loss function.
    what: The beginning of the sentence: what takes one.

  Raises:
    TypeError: If so.
  """
  kind = loss_fn if isinstance(loss_fn, type) else type(loss_fn)
  if issubclass(kind, nn.Module | nnx.Module) or not callable(loss_fn):
    got = f"the class {kind.__name__}" if kind is loss_fn else kind.__name__
    raise TypeError(
      f"{what} a loss function. Got {got}. Write a function that takes the "
      "parameters, or the NNX model, and a batch, and returns a scalar."
    )


def autocast_loss(
  loss_fn: Callable[..., Any], policies: PolicyMap | None, autocast: Callable[..., Any]
) -> Callable[..., Any]:
  """Runs a whole loss function under a policy, by one of the autocasts; its results stay float32.

  The policy's output dtype is what a model returns; the loss, the auxiliary output and BatchNorm
  statistics that a loss function returns are none of that.

  Raises:
    TypeError: If there is no function.
  """
  check_is_loss(loss_fn, "A train step is made from")
  if policies is None:
    return loss_fn
  default = dataclasses.replace(policies.default, output_dtype=FLOAT32)
  return autocast(loss_fn, policies.with_default(default))


def in_words(loss_fn: Callable[..., Any], policies: PolicyMap | None) -> str:
  """A loss and its policy, for the repr of a step."""
  name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
  if policies is None:
    return name
  rules = f" and {len(policies.rules)} rules" if policies.rules else ""
  return f"{name} under {spec(policies.default)}{rules}"


def called(
  run: Callable[..., Any],
  loss_fn: Callable[..., Any],
  args: tuple[Any, ...],
  keywords: dict[str, Any],
) -> Any:
  """Calls a loss with what a state has, and says what that is where the loss takes something else.

  Args:
    run: The loss, under its policy.
    loss_fn: The loss, for its name and signature.
    args: Parameters, model_state if there is one, batch.
    keywords: The key, if there is one.

  Raises:
    TypeError: If the call raised one and the signature of ``loss_fn`` does not fit it.
  """
  try:
    return run(*args, **keywords)
  except TypeError as error:
    signature = _signature(loss_fn)
    if signature is None or _fits(signature, args, keywords):
      raise
    stateful, keyed = len(args) > 2, bool(keywords)
    names = ["params", *["model_state"] * stateful, "batch", *["rng=key"] * keyed]
    raise TypeError(
      f"The state has {'a' if stateful else 'no'} model_state and {'a' if keyed else 'no'} rng: "
      f"loss_fn is called as loss_fn({', '.join(names)}). Got "
      f"{getattr(loss_fn, '__name__', 'loss_fn')}{signature}. Take that, or change rng= and "
      "model_state= of TrainState.create."
    ) from error


def check_aux(aux: PyTree) -> None:
  """Refuses auxiliary output that a compiled step cannot return.

  Raises:
    TypeError: If a leaf is no array; the message names it.
  """
  if got := no_array(aux):
    raise TypeError(
      "loss_fn must return an aux of arrays: a step is compiled, and returns these alone. Got "
      f"{got}. Leave it out of aux, and add it to what the step returns."
    )


def explain_if_no_array(error: Exception, arguments: PyTree) -> None:
  """Says in one sentence why a step cannot be compiled for arguments that hold a string, say.

  Args:
    error: What the step raised.
    arguments: What it was called with, by name.

  Raises:
    TypeError: If a leaf is no array; the message names it.
  """
  if got := no_array(arguments):
    raise TypeError(
      f"A step is compiled, and takes arrays alone. Got {got}. Leave it out, or close over it in "
      "loss_fn."
    ) from error


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
  try:
    return inspect.signature(fn)
  except (TypeError, ValueError):  # some callables have none
    return None


def _fits(signature: inspect.Signature, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
  try:
    signature.bind(*args, **keywords)
  except TypeError:
    return False
  return True


def check_param_dtype(params: PyTree, policies: PolicyMap | None) -> None:
  """Refuses trained parameters that are not held in the dtype that one policy for all asks for.

  Raises:
    ValueError: If a float leaf has another dtype; the message names it.
  """
  if policies is None or policies.rules:
    return
  for path, leaf in leaf_paths(params):
    held = cast_floating(leaf, policies.default.param_dtype)
    if held is not leaf:
      raise ValueError(
        f"Parameters must be held in {policies.default.param_dtype.name}, the policy's param "
        f"dtype. Got {path}: {describe(leaf)}. {_held_so(policies.default.param_dtype)}"
      )


def _held_so(dtype: np.dtype) -> str:
  """What to write where parameters are not held in a policy's param dtype."""
  cast = "Create the state from policy.cast_to_param(params)"
  if dtype == FLOAT32:
    return f"{cast}."
  return f"{cast}. For training write 'mixed_{dtype.name}', which keeps them in float32."


def check_are_floats(params: PyTree) -> None:
  """Refuses trained parameters that have no gradient.

  Raises:
    TypeError: If a leaf is an integer, a bool or a key; the message names it.
  """
  for path, leaf in leaf_paths(params):
    if not is_of(leaf, jnp.inexact):
      raise TypeError(
        f"Parameters must be floats. Got {path}: {describe(leaf)}. Keep it in model_state or in "
        "the batch (in NNX, in a Variable that the optimizer's wrt does not select), or freeze it "
        "with optax.partition and optax.set_to_zero."
      )


def check_is_own_state(own: PyTree, state: PyTree, instead: str) -> None:
  """Refuses an optimizer's state that is not like its own.

  Args:
    own: The state that the optimizer makes for the parameters, or its shapes.
    state: The state that came.
    instead: What to write.

  Raises:
    ValueError: If paths or shapes differ.
  """
  wanted, got = ([(path, jnp.shape(x)) for path, x in leaf_paths(tree)] for tree in (own, state))
  if wanted == got:
    return
  names, others = ([path for path, _ in leaves] for leaves in (wanted, got))
  if names == others:
    pairs = zip(leaf_paths(own), leaf_paths(state), strict=True)
    path, a, b = next((p, a, b) for (p, a), (_, b) in pairs if jnp.shape(a) != jnp.shape(b))
    raise ValueError(
      "The optimizer's state must be made for the parameters that it comes with. Got "
      f"{path}: {describe(b)} for {describe(a)}. {instead}"
    )
  differing = sorted(set(names) ^ set(others)) or ["their order"]
  raise ValueError(
    "The state must be that of the step's optimizer. Got another, which differs in "
    f"{', '.join(differing[:3])}{' ...' if len(differing) > 3 else ''}. {instead}"
  )


def step_metrics(
  loss: jax.Array,
  grads: PyTree,
  before: LossScalingState | None,
  after: LossScalingState | None,
  aux: PyTree,
) -> StepMetrics:
  """The metrics of a step, from its (scaled) gradients and the scaler before and after it."""
  if before is None or after is None:
    return StepMetrics(
      loss=loss,
      grad_norm=global_norm(grads),
      loss_scale=jnp.ones((), FLOAT32),
      applied=jnp.ones((), jnp.bool_),
      consecutive_skips=jnp.zeros((), jnp.int32),
      total_skips=jnp.zeros((), jnp.int32),
      aux=aux,
    )
  norm = global_norm(unscaled(grads, before.scale))
  return StepMetrics(
    loss=loss,
    grad_norm=jnp.where(jnp.isnan(norm), jnp.inf, norm),
    loss_scale=before.scale,
    applied=after.last_finite,
    consecutive_skips=after.consecutive_skips,
    total_skips=after.total_skips,
    aux=aux,
  )


def keep_if_skipped(applied: jax.Array, new_opt_state: PyTree, old_opt_state: PyTree) -> Any:
  """The optimizer state after a step; if that was skipped, only the loss scaler has moved.

  And the count of a fault schedule: a fault that stayed in place would strike for ever.
  """

  def moves(state: PyTree) -> bool:
    return isinstance(state, LossScalingState | FaultState)

  def choose(new: Any, old: Any) -> Any:
    return new if moves(new) else select(applied, new, old)

  return jax.tree.map(choose, new_opt_state, old_opt_state, is_leaf=moves)


def require_scaling(scaling: LossScalingState | None, limit: int | None) -> None:
  """Refuses a limit on skips where nothing is ever skipped.

  Raises:
    ValueError: If there is a limit and no loss scaler.
  """
  if limit is not None and scaling is None:
    raise ValueError(
      "max_consecutive_skips needs an optimizer with a loss scaler, which skips non-finite "
      "steps. Got one without. Wrap it: mpjax.static_loss_scaling(tx, 1), or drop the limit."
    )


def raise_if_stuck(
  metrics: StepMetrics, bad: jax.Array, params: PyTree, limit: int, state: PyTree
) -> None:
  """Waits for a step and raises if it was the last of ``limit`` skipped ones.

  Args:
    metrics: The step's metrics.
    bad: bool[n], which gradients held inf, NaN or what cannot be squared, in the order of the
      leaves of ``params``.
    params: The parameters.
    limit: The number of skips in a row that is too many.
    state: What the error carries.

  Raises:
    NonFiniteError: If so.
    TypeError: If the step is part of a function that is being traced.
  """
  if isinstance(metrics.consecutive_skips, Tracer):
    raise TypeError(
      "max_consecutive_skips is told on the host, after each step. Got a step inside of a jax.jit, "
      "a jax.lax.scan or another transformation, where it cannot raise. Call the step outside of "
      "it, or drop the limit and read metrics.consecutive_skips of what it returns."
    )
  skips = int(metrics.consecutive_skips)
  if skips < limit:
    return
  flags = jax.device_get(bad)
  paths = [path for (path, _), flag in zip(leaf_paths(params), flags, strict=True) if flag]
  where = "what is written beside the parameters" if not paths else ", ".join(paths[:10])
  shown = where + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")
  raise NonFiniteError(
    f"The gradients must be finite at least once in {limit} steps. Got {skips} skipped steps in a "
    f"row; the last had inf, NaN or what is too large to square in {shown}, at loss "
    f"{float(metrics.loss):g} and loss scale {float(metrics.loss_scale):g}. Look for what "
    "overflows there, lower the learning rate or train in bfloat16; the error's `state` holds "
    "everything up to here.",
    state,
    paths,
  )
