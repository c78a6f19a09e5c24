"""Mixed precision for JAX, Flax and optax: a policy is an argument, a mixed function comes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpjax._core import ctrl_c as _ctrl_c  # noqa: F401  # before what takes time to import

# isort: split
from mpjax import inspect, linen, nnx, testing, training
from mpjax._core.casting import cast_floating
from mpjax._core.policy import Policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.primitives import DEFAULT_OPS
from mpjax._engine.cast_inputs import cast_inputs
from mpjax._engine.program.keep_float32 import keep_float32
from mpjax._flax.dispatch import apply_policy, autocast, value_and_grad
from mpjax._flax.policed import policy_of
from mpjax._scaling.bfloat16_states import bfloat16_states
from mpjax._scaling.device_gradients import reduce_gradients
from mpjax._scaling.finiteness import all_finite, select
from mpjax._scaling.loss_scaling import dynamic_loss_scaling, static_loss_scaling
from mpjax._scaling.master_weights import master_weights
from mpjax._scaling.scaling_state import loss_scale, step_is_finite
from mpjax._scaling.stochastic_rounding import stochastic_rounding
from mpjax.training import TrainState, make_train_step

if TYPE_CHECKING:
  from mpjax import checkpoint as checkpoint
  from mpjax import plot as plot

__version__ = "0.1.0"

__all__ = [
  "DEFAULT_OPS",
  "Policy",
  "PolicyMap",
  "TrainState",
  "__version__",
  "all_finite",
  "apply_policy",
  "autocast",
  "bfloat16_states",
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
  "policy_of",
  "reduce_gradients",
  "select",
  "static_loss_scaling",
  "step_is_finite",
  "stochastic_rounding",
  "testing",
  "training",
  "value_and_grad",
]

_LAZY = ("checkpoint", "plot")  # what they import takes time, and not every installation has it

if not TYPE_CHECKING:  # a type checker would take any name for one of the package

  def __getattr__(name: str) -> Any:
    if name in _LAZY:
      return import_module(f"mpjax.{name}")
    raise AttributeError(f"module 'mpjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*__all__, *_LAZY})
