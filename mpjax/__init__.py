"""Mixed precision for JAX, Flax and optax: a policy is an argument, a mixed function comes out."""

from mpjax import inspect, linen, nnx, testing, training
from mpjax._core.casting import cast_floating
from mpjax._core.policy import Policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.primitives import DEFAULT_OPS
from mpjax._engine.markers import cast_inputs, keep_float32
from mpjax._flax.dispatch import apply_policy, autocast
from mpjax._scaling.device_gradients import reduce_gradients
from mpjax._scaling.finiteness import all_finite, select
from mpjax._scaling.loss_scaling import (
  dynamic_loss_scaling,
  loss_scale,
  static_loss_scaling,
  step_is_finite,
)
from mpjax._scaling.master_weights import master_weights
from mpjax._scaling.scaled_gradients import value_and_grad
from mpjax.training import TrainState, make_train_step

__all__ = [
  "DEFAULT_OPS",
  "Policy",
  "PolicyMap",
  "TrainState",
  "all_finite",
  "apply_policy",
  "autocast",
  "cast_floating",
  "cast_inputs",
  "dynamic_loss_scaling",
  "inspect",
  "keep_float32",
  "linen",
  "loss_scale",
  "make_train_step",
  "master_weights",
  "nnx",
  "reduce_gradients",
  "select",
  "static_loss_scaling",
  "step_is_finite",
  "testing",
  "training",
  "value_and_grad",
]
