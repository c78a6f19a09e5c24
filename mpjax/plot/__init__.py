"""Plots: data in, matplotlib axes out. matplotlib is imported when a function is called."""

from mpjax.plot._by_module import plot_check, plot_flow, plot_nonfinite
from mpjax.plot._curves import Curve, plot_losses, plot_scales, running_mean, save_curves
from mpjax.plot._reports import (
  plot_cost,
  plot_frontier,
  plot_range,
  plot_scale_choice,
  plot_updates,
)

__all__ = [
  "Curve",
  "plot_check",
  "plot_cost",
  "plot_flow",
  "plot_frontier",
  "plot_losses",
  "plot_nonfinite",
  "plot_range",
  "plot_scale_choice",
  "plot_scales",
  "plot_updates",
  "running_mean",
  "save_curves",
]
