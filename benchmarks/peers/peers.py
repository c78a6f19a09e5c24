"""The train step of every tool, as its own documentation writes it, for all tables of tools.

A peer turns a workload, a policy and an optimizer into a training. Where a tool has dynamic loss
scaling it is used for float16. The steps of float32 and of mpjax are those of `harness.py`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from benchmarks.harness import (
  Model,
  Scaling,
  State,
  Training,
  compute_dtype,
  float32,
  linen,
  loss_of,
  mpjax_following,
  mpjax_inside,
  mpjax_outside,
  mpjax_scaled,
  mpjax_statistics,
  mpjax_step,
  scales,
  training_of,
  unscaled,
  updated,
)
from benchmarks.workloads import Workload

POLICIES = ("mixed_bfloat16", "mixed_float16")
PATIENCE = 5


def _plain(workload: Workload, model: Model, tx: Any) -> Training:
  return unscaled(loss_of(workload, model), model, tx)


def by_hand(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """Flax's `dtype=` on every layer."""
  del scaling
  return _plain(workload, linen(workload, compute_dtype(policy)), tx)


def wide_softmax(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`by_hand` with the float32 softmax that mpjax has by itself and Flax's attention offers."""
  del scaling
  return _plain(workload, linen(workload, compute_dtype(policy), wide_softmax=True), tx)


def apply_if_finite(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`by_hand` with optax's guard around the optimizer."""
  del scaling
  model = linen(workload, compute_dtype(policy))
  return _plain(workload, model, optax.apply_if_finite(tx, PATIENCE))


def dynamic_scale(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """`by_hand` with Flax's scaler, used as Flax's ImageNet example does."""
  model = linen(workload, compute_dtype(policy))
  loss_fn = loss_of(workload, model)
  scaler = DynamicScale(
    growth_interval=scaling.interval,
    fin_steps=jnp.int32(0),  # pyright: ignore[reportArgumentType]
    scale=jnp.float32(scaling.start),  # pyright: ignore[reportArgumentType]
  )

  def step(state: State, inputs: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    grad = state.scaler.value_and_grad(loss_fn, has_aux=True)
    scaler, finite, (loss, model_state), grads = grad(
      state.params, state.model_state, inputs, labels
    )
    new = updated(tx, state, grads)
    keep = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.params, state.opt_state))
    return State(keep[0], model_state, keep[1], scaler), loss

  return training_of(model, tx, step, scaler)


def _jmp_policy(policy: str) -> Any:
  import jmp  # pyright: ignore[reportMissingImports]

  return jmp.get_policy(f"params=float32,compute={compute_dtype(policy)},output=float32")


def _jmp_scaled(
  loss_fn: Callable[..., Any], model: Model, policy: str, tx: Any, scaling: Scaling
) -> Training:
  """A step with jmp's scaler, as jmp's README and Haiku's ImageNet example have it.

  The state holds its two fields: the object itself cannot be lowered ahead of time (jmp 0.0.4).
  """
  import jmp  # pyright: ignore[reportMissingImports]

  def step(state: State, inputs: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    scaler = jmp.DynamicLossScale(*state.scaler, scaling.interval)

    def scaled(params: Any) -> Any:
      loss, model_state = loss_fn(params, state.model_state, inputs, labels)
      return scaler.scale(loss), (loss, model_state)

    grads, (loss, model_state) = jax.grad(scaled, has_aux=True)(state.params)
    grads = scaler.unscale(grads)
    finite = jmp.all_finite(grads)
    params, opt_state = updated(tx, state, grads)
    new = (params, model_state, opt_state)
    params, model_state, opt_state = jmp.select_tree(finite, new, state[:3])
    scaler = scaler.adjust(finite)
    return State(params, model_state, opt_state, (scaler.loss_scale, scaler.counter)), loss

  if scales(policy):
    return training_of(model, tx, step, (jnp.float32(scaling.start), jnp.int32(0)))
  return unscaled(loss_fn, model, tx)


def jmp_policy(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The plain model, parameters and inputs cast by jmp's policy."""
  model, cast = linen(workload), _jmp_policy(policy)

  def loss(params: Any, model_state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
    params, inputs = cast.cast_to_compute((params, inputs))
    outputs, model_state = model.apply(params, model_state, inputs)
    return workload.loss(cast.cast_to_output(outputs), labels), model_state

  return _jmp_scaled(loss, model, policy, tx, scaling)


def mpx_scaling(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The plain model under `mpx.filter_value_and_grad`, which casts all arguments and scales."""
  import mpx  # pyright: ignore[reportMissingImports]

  model = linen(workload)
  scaler = mpx.DynamicLossScaling(
    jnp.float32(scaling.start), jnp.float32(1), period=scaling.interval
  )

  def step(state: State, inputs: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
    # Its setter takes the scalar type; the name of bfloat16 changes nothing (mpx 0.1.8).
    mpx.set_half_precision_datatype(jnp.dtype(compute_dtype(policy)).type)
    grad = mpx.filter_value_and_grad(loss_of(workload, model), state.scaler, has_aux=True)
    (loss, model_state), scaler, finite, grads = grad(
      state.params, state.model_state, inputs, labels
    )
    params, opt_state = mpx.optimizer_update(state.params, tx, state.opt_state, grads, finite)
    return State(params, mpx.cast_to_float32(model_state), opt_state, scaler), loss

  return training_of(model, tx, step, scaler)


def haiku_policy(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The Haiku model under `hk.mixed_precision`, BatchNorm in float32 as its example has it."""
  model = haiku(workload, policy)
  return _jmp_scaled(loss_of(workload, model), model, policy, tx, scaling)


def haiku_float32(workload: Workload, policy: str, tx: Any, scaling: Scaling) -> Training:
  """The Haiku model in float32: what `haiku_policy` is compared with."""
  del policy, scaling
  model = haiku(workload, "float32")
  return unscaled(loss_of(workload, model), model, tx)


def haiku(workload: Workload, policy: str) -> Model:
  """The workload's model in Haiku, under a policy."""
  import haiku as hk  # pyright: ignore[reportMissingImports]
  import jmp  # pyright: ignore[reportMissingImports]

  from benchmarks.peers import haiku_models

  kind = getattr(haiku_models, workload.model.__name__)
  half = compute_dtype(policy)
  norms = jmp.get_policy(f"params=float32,compute=float32,output={half}")
  transformed = hk.transform_with_state(lambda inputs: kind(**workload.sizes)(inputs))

  def under(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
      mixed = hk.mixed_precision
      with mixed.push_policy(kind, _jmp_policy(policy)), mixed.push_policy(hk.BatchNorm, norms):
        return fn(*args)

    return run

  def apply(params: Any, model_state: Any, inputs: jax.Array) -> Any:
    return transformed.apply(params, model_state, None, inputs)

  return Model(under(transformed.init), under(apply))


class Peer(NamedTuple):
  """A tool.

  Attributes:
    name: how tables call it.
    build: `(workload, policy, tx, scaling) -> Training`.
    packages: what must be installed.
    policies: the policies that it is used for.
    models: the names of the models that it is for; all models where there are none.
  """

  name: str
  build: Callable[[Workload, str, Any, Scaling], Training]
  packages: tuple[str, ...] = ()
  policies: tuple[str, ...] = POLICIES
  models: tuple[str, ...] = ()


FLOAT32 = "float32"
BY_HAND = "Flax `dtype=` by hand"
WIDE_SOFTMAX = "by hand, float32 softmax"
INSIDE = "mpjax, loss inside"
OUTSIDE = "mpjax, loss outside"
STEP = "mpjax.make_train_step"
SCALED = "mpjax, loss scaled"
FOLLOWS = "mpjax, 16-bit softmax"
STATISTICS = "mpjax, statistics collected"
HAIKU = "Haiku policy"
HAIKU_FLOAT32 = "Haiku, float32"
# What `haiku_models.py` holds.
HAIKU_MODELS = ("Transformer", "VisionTransformer", "ResNet", "RecurrentModel")
HAIKU_MODELS += ("Parameters", "Lookup", "Shared", "Tabled")

ALL = (
  Peer(FLOAT32, float32),
  Peer(BY_HAND, by_hand),
  Peer(WIDE_SOFTMAX, wide_softmax, models=("Transformer", "VisionTransformer", "Llama")),
  Peer("by hand + apply_if_finite", apply_if_finite),
  Peer("by hand + DynamicScale", dynamic_scale, policies=("mixed_float16",)),
  Peer("jmp", jmp_policy, ("jmp",)),
  Peer("mpx", mpx_scaling, ("mpx",)),
  Peer(HAIKU_FLOAT32, haiku_float32, ("haiku", "jmp"), models=HAIKU_MODELS),
  Peer(HAIKU, haiku_policy, ("haiku", "jmp"), models=HAIKU_MODELS),
  Peer(INSIDE, mpjax_inside),
  Peer(OUTSIDE, mpjax_outside),
  Peer(STEP, mpjax_step),
  Peer(SCALED, mpjax_scaled, policies=("mixed_bfloat16",), models=("VisionTransformer",)),
  Peer(FOLLOWS, mpjax_following, models=("Transformer", "Llama")),
  Peer(STATISTICS, mpjax_statistics, models=("Parameters", "Perceptron")),
)
PEERS = {peer.name: peer for peer in ALL}


def installed(peer: Peer) -> bool:
  """Whether a peer's packages can be imported."""
  return all(importlib.util.find_spec(package) for package in peer.packages)


def serves(peer: Peer, policy: str, workload: Workload) -> bool:
  """Whether a peer is installed, and for this policy and this model."""
  of_the_model = not peer.models or workload.model.__name__ in peer.models
  return installed(peer) and policy in peer.policies and of_the_model


def chosen(names: list[str] | None, policy: str, workload: Workload) -> list[Peer]:
  """The installed peers that serve a policy and a workload; those named, if any are.

  Raises:
    ValueError: If a name is none of a peer's.
  """
  unknown = sorted(set(names or ()) - set(PEERS))
  if unknown:
    raise ValueError(f"Peers must be among {', '.join(PEERS)}. Got {', '.join(unknown)}.")
  wanted = names or list(PEERS)
  return [PEERS[name] for name in wanted if serves(PEERS[name], policy, workload)]
