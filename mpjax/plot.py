"""Plots: data in, matplotlib axes out. matplotlib is imported when a function is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Losses that span more than this factor are drawn on a logarithmic axis.
_WIDE_SPAN = 20.0
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))


class Curve(NamedTuple):
  """The course of one training run.

  Attributes:
    label: What the legend calls it.
    losses: f32[steps], the loss of each step.
    scales: f32[steps], the loss scale that each step used; 1 without scaling.
    applied: bool[steps], whether each step was applied; False if it was skipped.
  """

  label: str
  losses: np.ndarray
  scales: np.ndarray
  applied: np.ndarray


def plot_losses(curves: Sequence[Curve], *, ax: Axes | None = None) -> Axes:
  """Plots the training loss of each run: every step faintly, and a running mean.

  Args:
    curves: The runs.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
  """
  ax = _new_axes() if ax is None else ax
  for number, curve in enumerate(curves):
    steps, style = _steps(curve), _style(number)
    ax.plot(steps, curve.losses, color=style["color"], alpha=0.2, linewidth=0.8)
    mean = running_mean(curve.losses, 1 + len(curve.losses) // 40)
    ax.plot(steps, mean, label=curve.label, **style)
  if _span(curves) > _WIDE_SPAN:
    ax.set_yscale("log")
  ax.set(xlabel="step", ylabel="training loss")
  ax.legend(frameon=False)
  return ax


def plot_scales(curves: Sequence[Curve], *, ax: Axes | None = None) -> Axes:
  """Plots the loss scale of each run, with a cross on every skipped step.

  Args:
    curves: The runs.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
  """
  ax = _new_axes() if ax is None else ax
  for number, curve in enumerate(curves):
    steps, style = _steps(curve), _style(number)
    ax.plot(steps, curve.scales, drawstyle="steps-post", label=curve.label, **style)
    skipped = ~curve.applied
    if skipped.any():
      ax.plot(steps[skipped], curve.scales[skipped], "x", color=style["color"], label="skipped")
  ax.set_yscale("log", base=2)
  ax.set(xlabel="step", ylabel="loss scale")
  ax.legend(frameon=False)
  return ax


def save_curves(curves: Sequence[Curve], path: Path) -> None:
  """Writes a picture of the losses and the loss scales of some runs, side by side.

  Args:
    curves: The runs.
    path: A file whose suffix names a format that matplotlib writes.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
    OSError: If the file cannot be written.
  """
  figure = _figure_class()(figsize=(11, 4.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  plot_losses(curves, ax=left)
  plot_scales(curves, ax=right)
  figure.savefig(path, dpi=150)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
  """The mean of each value and up to ``width - 1`` before it, leaving out what is not finite.

  Example:
    >>> running_mean(np.array([1.0, 3.0, np.nan, 7.0]), 2).tolist()
    [1.0, 2.0, 3.0, 7.0]
  """
  finite = np.isfinite(values)
  sums = _trailing_sum(np.where(finite, values, 0.0), width)
  counts = _trailing_sum(finite.astype(float), width)
  return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _trailing_sum(values: np.ndarray, width: int) -> np.ndarray:
  total = np.concatenate([np.zeros(width), np.cumsum(values, dtype=float)])
  return total[width:] - total[:-width]


def _span(curves: Sequence[Curve]) -> float:
  """The factor between the largest and the smallest loss that is finite and above zero."""
  losses = np.concatenate([curve.losses for curve in curves]) if curves else np.ones(1)
  positive = losses[np.isfinite(losses) & (losses > 0)]
  return float(positive.max() / positive.min()) if positive.size else 1.0


def _steps(curve: Curve) -> np.ndarray:
  return np.arange(1, len(curve.losses) + 1)


def _style(number: int) -> dict[str, Any]:
  """Runs lie on top of each other when all is well, so their dashes differ too."""
  return {"color": f"C{number}", "linestyle": _DASHES[number % 4], "linewidth": 1.6}


def _figure_class() -> type[Figure]:
  try:
    from matplotlib.figure import Figure
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'Plots need matplotlib, which is not installed. Run: pip install "mpjax[plot]"'
    ) from error
  return Figure


def _new_axes() -> Axes:
  _figure_class()
  from matplotlib import pyplot

  return pyplot.subplots()[1]
