"""Tools for tests of training: faults at chosen steps, to test that a run survives them."""

from mpjax._scaling.faults import (
  FAULTS,
  FaultSchedule,
  FaultState,
  inject,
  inject_faults,
  inject_gradients,
)

__all__ = ["FAULTS", "FaultSchedule", "FaultState", "inject", "inject_faults", "inject_gradients"]
