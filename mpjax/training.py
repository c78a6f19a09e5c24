"""Train steps for Linen models and pure functions."""

from mpjax._train.low_precision_warning import LowPrecisionWarning
from mpjax._train.step_parts import NonFiniteError, StepMetrics
from mpjax._train.train_state import TrainState
from mpjax._train.train_step import TrainStep, make_train_step

__all__ = [
  "LowPrecisionWarning",
  "NonFiniteError",
  "StepMetrics",
  "TrainState",
  "TrainStep",
  "make_train_step",
]
