"""Tools for tests of training: a step is right at any loss scale, and survives faults."""

from mpjax._flax.scale_invariance import assert_scale_invariant
from mpjax._scaling.faults import (
  FAULTS,
  FaultSchedule,
  FaultState,
  inject,
  inject_faults,
  inject_gradients,
)

__all__ = [
  "FAULTS",
  "FaultSchedule",
  "FaultState",
  "assert_scale_invariant",
  "inject",
  "inject_faults",
  "inject_gradients",
]
