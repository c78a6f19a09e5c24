"""Precision policies and train steps for Flax NNX models."""

from mpjax._flax.nnx_calls import autocast
from mpjax._flax.nnx_models import apply_policy
from mpjax._flax.nnx_step import make_train_step

__all__ = ["apply_policy", "autocast", "make_train_step"]
