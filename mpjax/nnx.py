"""Precision policies, gradients and train steps for Flax NNX models."""

from mpjax._flax.dispatch import autocast
from mpjax._flax.nnx_gradients import value_and_grad
from mpjax._flax.nnx_models import apply_policy
from mpjax._flax.nnx_step import TrainStep, make_train_step

__all__ = ["TrainStep", "apply_policy", "autocast", "make_train_step", "value_and_grad"]
