"""Train steps for Linen models and pure functions."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Never

import jax
import optax

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32, describe, is_key
from mpjax._core.policy_map import PolicyLike
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._engine.autocast import autocast
from mpjax._scaling.finiteness import select
from mpjax._scaling.optimizers import as_transformation
from mpjax._scaling.rounding import seen_parameters
from mpjax._scaling.states import LossScalingState
from mpjax._train.accumulation import Window, mean_loss, run_window
from mpjax._train.buffers import Returned, explain_if_deleted, own_buffer, shared_buffers
from mpjax._train.low_precision_warning import UnscaledFloat16Check
from mpjax._train.shardings import NOWHERE, Placement, keep_placement, placement
from mpjax._train.step_core import StepCore, read_settings
from mpjax._train.step_parts import (
  StepMetrics,
  autocast_loss,
  called,
  check_aux,
  explain_if_no_array,
  in_words,
  keep_if_skipped,
  raise_if_stuck,
)
from mpjax._train.train_state import TrainState, check_is_state, check_optimizer


class TrainStep:
  """A compiled train step, as `make_train_step` returns it: ``step(state, batch)``.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = optax.sgd(0.1)
    >>> step = make_train_step(lambda params, x: jnp.mean(x * params), tx, donate=False)
    >>> state, x = TrainState.create(jnp.ones(2), tx), jnp.ones(2)
    >>> lowered = step.lower(state, x)  # without a run
    >>> [int(step(s, x)[0].step) for s in (state, state)]  # not donated: taken twice
    [1, 1]
  """

  def __init__(
    self, jitted: Any, max_consecutive_skips: int | None, donate: bool, words: str
  ) -> None:
    self._jitted = jitted
    self._words = words
    self._limit = max_consecutive_skips
    self._donate = donate
    self._check_float16 = UnscaledFloat16Check()
    self._returned = Returned()
    self._batch_shares = False

  def __call__(
    self, state: TrainState, batch: PyTree, *more: Never
  ) -> tuple[TrainState, StepMetrics]:
    """Takes one step.

    Args:
      state: The state; donated, so it must not be used again (unless made with
        ``donate=False``).
      batch: What the loss function takes as its last argument.
      *more: Nothing: inputs and labels are one batch, ``step(state, (x, y))``.

    Returns:
      The state after the step, and its metrics.

    Raises:
      NonFiniteError: If this was the last of ``max_consecutive_skips`` skipped steps.
      TypeError: If ``state`` is no ``TrainState``, or holds what is no array, or the batch does.
      ValueError: If its ``opt_state`` is that of another optimizer, or a step was given ``state``
        before and has taken its buffers.
    """
    check_is_state(state, batch)
    if more:
      raise TypeError(_MORE.format(1 + len(more)))
    given = state
    state, where = self._enter(state, batch)
    try:
      if self._check_float16.is_due:
        self._check_float16(state.opt_state, partial(self._jaxpr, state, batch, where))
      state, metrics, bad = self._jitted(state, batch, where)
    except TypeError as error:
      explain_if_no_array(error, {"batch": batch, "state": given})
      raise
    except (RuntimeError, ValueError) as error:
      explain_if_deleted(error, leaf_paths(given), _DELETED)
      if "donate" not in str(error) or not self._returned.is_it(given):
        raise
      self._returned.forget()  # it was changed in place, or the batch holds an array of it
      return self(given, batch)
    self._returned.note(state, state.step)
    if self._limit is not None:
      raise_if_stuck(metrics, bad, state.params, self._limit, state)
    return state, metrics

  def _enter(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Placement]:
    """A state whose arrays can be donated, if they are to be, and where they are."""
    if self._returned.is_it(state) and not (self._donate and self._batch_shares):
      return state, NOWHERE
    leaves, structure = jax.tree.flatten(state)
    others = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array)]
    self._batch_shares |= not {*map(id, others)}.isdisjoint(map(id, leaves))
    if self._donate and (shared := shared_buffers(leaves, others)):
      leaves = [own_buffer(x) if n in shared else x for n, x in enumerate(leaves)]
      state = structure.unflatten(leaves)
    return state, placement(leaves)

  def _jaxpr(self, state: TrainState, batch: PyTree, where: Placement) -> Any:
    return self._jitted.trace(state, batch, where).jaxpr

  def __repr__(self) -> str:
    return f"<{type(self).__name__} of {self._words}>"

  def lower(
    self,
    state: TrainState,
    batch: PyTree,
    *more: Never,
    lowering_platforms: tuple[str, ...] | None = None,
  ) -> Any:
    """Lowers the step for these arguments, to read what it costs.

    What is compiled of it returns more than the step does. To call a step that is compiled ahead,
    lower ``jax.jit(step)``.

    Args:
      state: A state, or its ``jax.eval_shape``; shapes may carry a ``sharding``.
      batch: A batch, or its shapes.
      *more: Nothing, as for a call.
      lowering_platforms: For which platforms, if not for the one that JAX runs on.

    Returns:
      A ``jax.stages.Lowered``; its ``compile()`` tells memory and cost.
    """
    check_is_state(state, batch)
    if more:
      raise TypeError(_MORE.format(1 + len(more)))
    where = placement(jax.tree.leaves(state))
    try:
      traced = self._jitted.trace(state, batch, where)
    except TypeError as error:
      explain_if_no_array(error, {"batch": batch, "state": state})
      raise
    self._check_float16(state.opt_state, lambda: traced.jaxpr)
    return traced.lower(lowering_platforms=lowering_platforms)


_MORE = (
  "A step takes an mpjax.TrainState and one batch. Got {} arguments after the state. Write "
  "step(state, (x, y)): loss_fn takes them as its batch."
)
_DELETED = (
  "A step that donates takes a state once. Got one whose buffers a step has taken, first {}. Go on "
  "with the state that the step returned, or with a checkpoint if it was interrupted; or make the "
  "step with donate=False."
)


def make_train_step(
  loss_fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  *,
  policy: PolicyLike | None = None,
  has_aux: bool = False,
  accumulate: int = 1,
  max_consecutive_skips: int | None = None,
  donate: bool = True,
  reduce_dtype: Any = FLOAT32,
) -> TrainStep:
  """Makes the compiled train step of a loss function and an optimizer.

  What ``loss_fn`` takes and returns follows from the state and ``has_aux``:

  ===================  ==========================================  =============================
  state has            called as                                   must return
  ===================  ==========================================  =============================
  parameters only      ``loss_fn(params, batch)``                  ``loss``
  ``model_state``      ``loss_fn(params, model_state, batch)``     ``(loss, new_model_state)``
  ``rng``              with the keyword ``rng=`` besides           the same
  ``has_aux=True``     the same                                    a tuple with ``aux`` at its end
  ===================  ==========================================  =============================

  The key of a step is ``jax.random.fold_in(state.rng, n)``, where n counts the steps before it,
  applied and skipped ones: the key that made a NaN does not come back. If ``tx`` holds a loss
  scaler (`mpjax.dynamic_loss_scaling` as the outermost transformation), the loss is scaled, and a
  step is skipped if its gradients are not finite, or its new ``model_state`` holds an inf or NaN
  where there was a number: parameters, optimizer state, ``model_state`` and the step count stay
  as they were; only the scaler moves, and typed keys in ``model_state``. Without one, no
  operation of scaling or testing is in the compiled step.

  Gradients reach ``tx`` in float32, and beside them, if it takes them, the extra arguments
  ``value`` and ``grad``, the loss and its gradients, and ``value_fn``, ``obj_fn`` and ``grad_fn``,
  the loss of this batch and its gradients as functions of the parameters, for line searches such
  as that of ``optax.lbfgs``. A parameter that ``tx`` leaves alone, as under
  ``optax.partition`` with ``optax.set_to_zero``, keeps its dtype and its buffer, whatever these
  are, integers and keys included; its gradient is neither computed nor part of the norm, unless
  ``tx`` reads it all the same.

  With ``accumulate=k`` the leading axis of the batch is split into k micro-batches, which run one
  after the other in a ``jax.lax.scan``: activations take the memory of one micro-batch. Their
  gradients are averaged in float32; then comes one step, unscaled, tested, applied or skipped as
  a whole, so a NaN in one micro-batch drops the batch and nothing else. The result is that of the
  whole batch at once if ``loss_fn`` returns a mean over its examples, each with the same weight.
  A mean over tokens of which some are masked is none: divide by a number that is the same for
  every micro-batch instead. ``model_state`` goes from one micro-batch into the next, micro-batch
  i has the key ``jax.random.fold_in(step_key, i)``, ``loss`` is the mean of the losses, and
  ``aux`` has a new first axis of length k. Micro-batch i holds the examples i, i + k, i + 2k, ...,
  so that every device works on each; scalars in the batch go to all.

  Args:
    loss_fn: The loss, a pure function.
    tx: The optimizer, the one that the state was created with.
    policy: A policy to run the whole loss under; see `mpjax.autocast`. The results of
      ``loss_fn`` stay float32. Leave it out if the model has its policy already.
    has_aux: Whether ``loss_fn`` returns auxiliary output, for the metrics.
    accumulate: The number of micro-batches that a batch is computed in.
    max_consecutive_skips: After this many skipped steps in a row, raise on the host. Each step
      then waits for its result.
    donate: Whether the step reuses the buffers of the state that it is given.
    reduce_dtype: In which dtype the gradients of weights and kernels leave the matmuls and
      convolutions of a policy, and so the compiler sums them over devices: ``"float32"``, or
      ``"compute"`` for what the policy's matmuls return, which halves the traffic. Gradients
      that the policy computes in float32 (of norms and embeddings) are sent so in either case;
      on GPUs those of convolutions in what they return, for XLA would run the whole of them in
      float32 otherwise. A model's own ``dtype=`` decides for itself, and so do ragged matmuls and
      meshes of the type Explicit.

  Returns:
    ``step(state, batch) -> (state, metrics)``.

  Warns:
    LowPrecisionWarning: When traced, if trained parameters are bfloat16 or float16 and the
      optimizer has neither `mpjax.stochastic_rounding` nor `mpjax.master_weights`, whatever the
      policy says, or if moments have a 16-bit format that fails without `mpjax.bfloat16_states`.
      When first called, if gradients go through a float16 matmul or convolution, by this policy,
      by one of the model or by its ``dtype=``, and nothing scales them: ``tx`` has no loss scaler,
      and no `mpjax.autocast` or `mpjax.apply_policy` inside a ``loss_scale``. The policies
      ``"bfloat16"`` and ``"float16"`` are meant for inference.

  Raises:
    ValueError: If a policy or ``reduce_dtype`` cannot be read, ``accumulate`` or
      ``max_consecutive_skips`` is below 1 or, when called, a limit is given without a loss scaler,
      trained parameters do not have the policy's param dtype, ``accumulate`` does not divide the
      batch, or the loss scaler is not the outermost transformation.
    TypeError: If ``tx`` is not an optax transformation or, when called, ``loss_fn`` takes or
      returns something else than above, or a trained parameter is no float.

  Example:
    >>> import jax.numpy as jnp
    >>> loss_fn = lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    >>> tx = optax.sgd(0.1)
    >>> step = make_train_step(loss_fn, tx, policy="mixed_bfloat16")
    >>> state = TrainState.create({"w": jnp.zeros(2)}, tx)
    >>> state, metrics = step(state, {"x": jnp.ones((4, 2)), "y": jnp.ones(4)})
    >>> metrics.loss.dtype, state.params["w"].dtype, metrics.applied
    (dtype('float32'), dtype('float32'), Array(True, dtype=bool))
  """
  tx = as_transformation(tx)
  settings = read_settings(policy, accumulate, max_consecutive_skips, reduce_dtype)
  run = autocast_loss(loss_fn, settings.policies, autocast)

  def compute(params: PyTree, model_state: PyTree, batch: PyTree, rng: Any) -> tuple[Any, Any]:
    args = (params, batch) if model_state is None else (params, model_state, batch)
    out = called(run, loss_fn, args, {} if rng is None else {"rng": rng})
    return _unpack(out, model_state, has_aux)

  def train_step(
    state: TrainState, batch: PyTree, where: Placement
  ) -> tuple[TrainState, StepMetrics, Any]:
    check_optimizer(tx, state)
    core = StepCore.begin(settings, tx, state.params, state.opt_state)
    step_rng = _step_rng(state, core.scaling)

    def micro_step(model_state: PyTree, part: Any, index: jax.Array | None) -> Window:
      args = (state.params, model_state, part, _fold(step_rng, index))
      (loss, (model_state, aux)), grads = core.differentiate(compute, *args)
      return Window(loss, model_state, aux, grads)

    def loss_at(params: PyTree) -> Any:
      def loss_of(part: Any, index: jax.Array | None) -> Any:
        return compute(params, state.model_state, part, _fold(step_rng, index))[0]

      return mean_loss(loss_of, settings.accumulate, batch)

    loss, model_state, aux, grads = run_window(
      micro_step, settings.accumulate, state.params, state.model_state, batch
    )
    seen = seen_parameters(state.opt_state, state.params)
    written = (model_state, state.model_state)
    updates, opt_state = core.update(
      tx.update, (grads, state.opt_state, seen), loss, grads, written, loss_at
    )
    new = dataclasses.replace(
      state,
      step=state.step + 1,
      params=_moved(state.params, core.trained(state.params), updates),
      opt_state=opt_state,
      model_state=model_state,
    )
    metrics, bad = core.report(loss, grads, opt_state, aux)
    if core.scaling is not None:
      new = _unless_skipped(metrics.applied, new, state)
    return keep_placement(new, where.shardings), metrics, bad

  donated = (0,) if donate else ()
  jitted = jax.jit(train_step, donate_argnums=donated, static_argnums=2)
  return TrainStep(jitted, settings.limit, donate, in_words(loss_fn, settings.policies))


def _step_rng(state: TrainState, scaling: LossScalingState | None) -> Any:
  """The key of a step: another after each step, whether that was applied or skipped."""
  if scaling is None:
    return _fold(state.rng, state.step)
  return _fold(state.rng, state.step + scaling.total_skips)


def _fold(rng: Any, number: jax.Array | None) -> Any:
  return rng if rng is None or number is None else jax.random.fold_in(rng, number)


def _moved(params: PyTree, trained: PyTree, updates: PyTree) -> Any:
  """Parameters after their updates, added up in float32, in the dtypes that they are held in.

  Args:
    params: The parameters.
    trained: The same, with ``None`` for those that stay as they are.
    updates: The updates.
  """
  wide = optax.apply_updates(cast_floating(trained, FLOAT32), updates)
  return jax.tree.map(lambda p, new: p if new is None else new.astype(p.dtype), params, wide)


def _unless_skipped(applied: jax.Array, new: TrainState, old: TrainState) -> TrainState:
  opt_state = keep_if_skipped(applied, new.opt_state, old.opt_state)
  model_state = jax.tree.map(_key_or_old, new.model_state, old.model_state)
  new = dataclasses.replace(new, opt_state=None)
  old = dataclasses.replace(old, opt_state=None, model_state=model_state)
  return dataclasses.replace(select(applied, new, old), opt_state=opt_state)


def _key_or_old(new: Any, old: Any) -> Any:
  return new if is_key(new) else old


def _unpack(out: Any, model_state: PyTree, has_aux: bool) -> tuple[Any, tuple[Any, Any]]:
  """Splits what a loss function returned into ``loss, (new_model_state, aux)``."""
  parts = ["loss"]
  parts += ["new_model_state"] if model_state is not None else []
  parts += ["aux"] if has_aux else []
  values = out if isinstance(out, tuple) else (out,)
  if len(values) != len(parts) or (len(parts) == 1 and isinstance(out, tuple)):
    wanted = f"({', '.join(parts)})" if len(parts) > 1 else "the loss alone"
    got = f"a tuple of {len(out)}" if isinstance(out, tuple) else describe(out)
    raise TypeError(
      f"loss_fn must return {wanted}: the state has {'a' if model_state is not None else 'no'} "
      f"model_state and has_aux is {has_aux}. Got {got}. Return that, or change has_aux or the "
      "state's model_state."
    )
  named = dict(zip(parts, values, strict=True))
  if model_state is not None:
    _check_model_state(named["new_model_state"], model_state)
  check_aux(named.get("aux"))
  return named["loss"], (named.get("new_model_state"), named.get("aux"))


def _check_model_state(new: Any, old: Any) -> None:
  got, wanted = ({path: describe(leaf) for path, leaf in leaf_paths(tree)} for tree in (new, old))
  if got == wanted and jax.tree.structure(new) == jax.tree.structure(old):
    return
  paths = sorted({path for path, _ in got.items() ^ wanted.items()})
  added, gone = ([p for p in paths if p not in tree] for tree in (wanted, got))
  texts = [
    f"{path}: {got.get(path, 'nothing')} for {wanted.get(path, 'nothing')}"
    for path in added[:1] + gone[:1] or paths[:1]
  ]
  containers = f"containers: {jax.tree.structure(new)} for {jax.tree.structure(old)}"
  raise TypeError(
    "loss_fn must return a model_state like the one that it was given. Got "
    f"{' and '.join(texts) or containers}. Return all collections with their dtypes, those that "
    "did not change included; a model_state has their names, as {'batch_stats': ...}."
  )
