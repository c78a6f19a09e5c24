"""What a train step is made of, and the steps that need no other tool: float32's and mpjax's.

A model is two functions, a training two more: `begin` makes the state that a step needs, `step`
takes it. The loss is float32 for all. What other tools make of the same is in `peers/peers.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from benchmarks.workloads import Workload


class Scaling(NamedTuple):
  """Settings of a dynamic loss scaler; those of torch.amp, but for the start.

  Attributes:
    start: the first scale.
    interval: good steps until it doubles.
  """

  start: float = 2.0**15
  interval: int = 2000


class State(NamedTuple):
  """All that a train step reads and writes.

  Attributes:
    params: the float32 parameters.
    model_state: BatchNorm's running statistics, if the model has any.
    opt_state: the optimizer's state.
    scaler: the loss scaler's state where it stands beside the optimizer; None otherwise.
  """

  params: Any
  model_state: Any
  opt_state: Any
  scaler: Any = None


class Model(NamedTuple):
  """A model as two pure functions.

  Attributes:
    init: `(key, inputs) -> (params, model_state)`.
    apply: `(params, model_state, inputs) -> (outputs, model_state)`.
  """

  init: Callable[..., tuple[Any, Any]]
  apply: Callable[..., tuple[jax.Array, Any]]


class Training(NamedTuple):
  """A train step.

  Attributes:
    model: what is trained.
    begin: `(params, model_state) -> State`, the state before the first step.
    step: `(state, inputs, labels) -> (state, loss)`.
  """

  model: Model
  begin: Callable[..., State]
  step: Callable[..., tuple[State, jax.Array]]

  def init(self, key: jax.Array, inputs: Any) -> State:
    """The state before the first step, with new parameters."""
    return self.begin(*self.model.init(key, inputs))


def compute_dtype(policy: str) -> np.dtype:
  """The dtype that a policy computes in."""
  return mpjax.Policy.parse(policy).compute_dtype


def scales(policy: str) -> bool:
  """Whether a policy needs loss scaling."""
  return compute_dtype(policy) == jnp.float16


def linen(workload: Workload, dtype: Any = None, **options: Any) -> Model:
  """The workload's Linen model, its layers given `dtype`; other options are the model's own."""
  return of_module(workload.model(**workload.sizes, dtype=dtype, **options))  # pyright: ignore[reportCallIssue]


def of_module(module: Any) -> Model:
  """A Linen module as a model."""

  def init(key: jax.Array, inputs: jax.Array) -> tuple[Any, Any]:
    model_state = dict(module.init(key, inputs))
    return model_state.pop("params"), model_state

  def apply(params: Any, model_state: Any, inputs: jax.Array) -> Any:
    variables = {"params": params, **model_state}
    return module.apply(variables, inputs, mutable=list(model_state))

  return Model(init, apply)


def loss_of(workload: Workload, model: Model) -> Callable[..., Any]:
  """`(params, model_state, inputs, labels) -> (loss, model_state)`."""

  def loss(params: Any, model_state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
    outputs, model_state = model.apply(params, model_state, inputs)
    return workload.loss(outputs, labels), model_state

  return loss


def training_of(model: Model, tx: Any, step: Callable[..., Any], scaler: Any = None) -> Training:
  """A training by a step, its state made of new parameters, the optimizer's and a scaler's."""

  def begin(params: Any, model_state: Any) -> State:
    return State(params, model_state, tx.init(params), scaler)

  return Training(model, begin, step)


def updated(tx: optax.GradientTransformation, state: State, grads: Any) -> tuple[Any, Any]:
  """Parameters and the optimizer's state after a step of the optimizer."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  return optax.apply_updates(state.params, updates), opt_state


def unscaled(loss_fn: Callable[..., Any], model: Model, tx: Any) -> Training:
  """A step that differentiates a loss as it is."""
  grad = jax.value_and_grad(loss_fn, has_aux=True)

  def step(state: State, inputs: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    (loss, model_state), grads = grad(state.params, state.model_state, inputs, labels)
    params, opt_state = updated(tx, state, grads)
    return State(params, model_state, opt_state), loss

  return training_of(model, tx, step)


def float32(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The plain model; the policy is not used."""
  del policy, scaling
  model = linen(workload)
  return unscaled(loss_of(workload, model), model, tx)


def _mpjax(loss: Any, model: Model, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The loop of mpjax's README."""
  if not scales(policy):
    return unscaled(loss, model, tx)
  return _mpjax_scaled(loss, model, tx, scaling)


def _mpjax_scaled(loss: Any, model: Model, tx: Any, scaling: Scaling) -> Training:
  tx = mpjax.dynamic_loss_scaling(tx, init_scale=scaling.start, growth_interval=scaling.interval)

  def step(state: State, inputs: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    scale = mpjax.loss_scale(state.opt_state)
    (value, model_state), grads = mpjax.value_and_grad(loss, has_aux=True)(
      state.params, state.model_state, inputs, labels, loss_scale=scale
    )
    params, opt_state = updated(tx, state, grads)
    finite = mpjax.step_is_finite(opt_state)
    return State(params, mpjax.select(finite, model_state, state.model_state), opt_state), value

  return training_of(model, tx, step)


def mpjax_inside(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The plain model, the whole loss under `mpjax.autocast`."""
  model = linen(workload)
  return _mpjax(mpjax.autocast(loss_of(workload, model), policy), model, policy, tx, scaling)


FOLLOWING = {"exp": "follow", "reduce_sum": "follow", "reduce_max": "follow"}
"""Rules under which a softmax computes in its operands' dtype, as it does by hand."""


def mpjax_following(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`mpjax_inside` with 16-bit softmaxes."""
  model = linen(workload)
  rules = mpjax.PolicyMap({}, default=policy, ops=FOLLOWING)
  return _mpjax(mpjax.autocast(loss_of(workload, model), rules), model, policy, tx, scaling)


def mpjax_scaled(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`mpjax_inside`, the loss scaled in bfloat16 too, as mpx does."""
  model = linen(workload)
  return _mpjax_scaled(mpjax.autocast(loss_of(workload, model), policy), model, tx, scaling)


def mpjax_outside(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The plain model under `mpjax.autocast`, the loss outside."""
  plain = linen(workload)
  model = Model(plain.init, mpjax.autocast(plain.apply, policy))
  return _mpjax(loss_of(workload, model), model, policy, tx, scaling)


def mpjax_statistics(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`mpjax_inside`, the statistics of every step collected."""
  return mpjax_inside(workload, policy, mpjax.inspect.collect_statistics(tx), scaling)


def mpjax_step(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`mpjax.make_train_step`, with its norms, metrics and skips."""
  model = linen(workload)
  plain = loss_of(workload, model)
  if scales(policy):
    tx = mpjax.dynamic_loss_scaling(tx, init_scale=scaling.start, growth_interval=scaling.interval)
  compiled = mpjax.make_train_step(
    lambda params, model_state, batch: plain(params, model_state, *batch), tx, policy=policy
  )

  def step(state: State, inputs: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    before = mpjax.TrainState(state.scaler, state.params, state.opt_state, state.model_state)
    after, metrics = compiled(before, (inputs, labels))
    return State(after.params, after.model_state, after.opt_state, after.step), metrics.loss

  return training_of(model, tx, step, jnp.zeros((), jnp.int32))
