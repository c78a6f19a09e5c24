"""Plots of training runs: losses, loss scales, what came out on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpjax.plot._axes import GREY, SERIES, figure_class, legend_below, name_rows, new_axes

if TYPE_CHECKING:
  from matplotlib.axes import Axes

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

  Example:
    >>> curve = Curve("float32", np.array([2.0, 1.0]), np.ones(2), np.ones(2, bool))
    >>> curve.label, curve.losses.tolist()
    ('float32', [2.0, 1.0])
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
    TypeError: If ``curves`` is no sequence of `Curve`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> from matplotlib.figure import Figure
    >>> losses, ones = np.array([2.0, 1.0, 0.5]), np.ones(3)
    >>> ax = plot_losses([Curve("float32", losses, ones, ones > 0)], ax=Figure().subplots())
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('step', 'training loss')
  """
  curves = _read_curves(curves)
  ax = new_axes() if ax is None else ax
  for number, curve in enumerate(curves):
    steps, style = _steps(curve), _style(number)
    ax.plot(steps, curve.losses, color=style["color"], alpha=0.2, linewidth=0.8)
    width = 1 + len(curve.losses) // 40
    ax.plot(steps, running_mean(curve.losses, width), label=curve.label, **style)
  if curves:
    ax.plot(
      [], [], color=GREY, alpha=0.5, linewidth=0.8, label="faint: each step; bold: running means"
    )
  if _span(curves) > _WIDE_SPAN:
    ax.set_yscale("log")
  ax.set(xlabel="step", ylabel="training loss")
  legend_below(ax)
  return ax


def plot_scales(curves: Sequence[Curve], *, ax: Axes | None = None) -> Axes:
  """Plots the loss scale of each run, with a cross on every skipped step.

  Args:
    curves: The runs.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``curves`` is no sequence of `Curve`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> from matplotlib.figure import Figure
    >>> scales, applied = np.array([8.0, 8.0, 4.0]), np.array([True, False, True])
    >>> ax = plot_scales([Curve("float16", np.ones(3), scales, applied)], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['float16', 'skipped']
  """
  ax = new_axes() if ax is None else ax
  return _draw_scales(ax, list(enumerate(_read_curves(curves))))


def _draw_scales(ax: Axes, numbered: Sequence[tuple[int, Curve]]) -> Axes:
  """Draws loss scales; the number of a run decides its color."""
  for number, curve in numbered:
    steps, style = _steps(curve), _style(number)
    ax.plot(steps, curve.scales, drawstyle="steps-post", label=curve.label, **style)
    skipped = ~curve.applied
    if skipped.any():
      ax.plot(steps[skipped], curve.scales[skipped], "x", color=style["color"], label="skipped")
  ax.set_yscale("log", base=2)
  ax.set(xlabel="step", ylabel="loss scale")
  legend_below(ax)
  return ax


def save_curves(
  curves: Sequence[Curve],
  path: Path,
  *,
  title: str = "",
  held_out: tuple[str, Sequence[float | None]] | None = None,
) -> None:
  """Writes a picture of some runs: losses, what came out on held-out data, and loss scales.

  The loss scales have a panel only if one of them is not 1 throughout, or a step was skipped.

  Args:
    curves: The runs.
    path: A file whose suffix names a format that matplotlib writes.
    title: What stands above the picture.
    held_out: What was measured after training and its value for each run, ``None`` where it was
      not; no panel without it.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
    OSError: If the file cannot be written.

  Example:
    >>> import tempfile
    >>> curve = Curve("float32", np.array([2.0, 1.0]), np.ones(2), np.ones(2, bool))
    >>> path = Path(tempfile.mkdtemp()) / "curves.png"
    >>> save_curves([curve], path, title="digits", held_out=("accuracy, %", [99.5]))
    >>> path.exists()
    True
  """
  scaled = [
    (number, curve)
    for number, curve in enumerate(curves)
    if (curve.scales != 1).any() or not curve.applied.all()
  ]
  widths = [1.5, *[0.8] * (held_out is not None), *[1.1] * bool(scaled)]
  figure = figure_class()(figsize=(1.5 + 3.4 * sum(widths), 4.2), layout="constrained")
  axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
  plot_losses(curves, ax=axes[0])
  if held_out is not None:
    _plot_held_out(curves, *held_out, ax=axes[1])
  if scaled:
    _draw_scales(axes[-1], scaled)
  figure.suptitle(title)
  figure.savefig(path, dpi=150)


def _plot_held_out(
  curves: Sequence[Curve], name: str, values: Sequence[float | None], *, ax: Axes
) -> None:
  """A dot a run, its number beside it, in the color of the run's curve."""
  for number, value in enumerate(values):
    if value is not None and np.isfinite(value):
      ax.plot(value, number, "o", color=_style(number)["color"], markersize=9)
      note = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center"}
      ax.annotate(f"{value:.4g}", (value, number), **note)
    else:
      ax.text(0.5, number, "none", transform=ax.get_yaxis_transform(), ha="center", va="center")
  name_rows(ax, [curve.label for curve in curves])
  ax.margins(x=0.35)
  low, high = ax.get_xlim()
  if "%" in name:
    ax.set_xlim(low, min(high, 100 + 0.05 * (high - low)))
  ax.set(xlabel=f"held-out {name}")


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


def _read_curves(curves: Any) -> list[Curve]:
  """The runs that a plot was given, what they hold as arrays.

  Raises:
    TypeError: If they are no sequence of `Curve`.
  """
  given = [curves] if isinstance(curves, Curve) else [*curves]
  strange = [type(curve).__name__ for curve in given if not isinstance(curve, Curve)]
  if strange or isinstance(curves, Curve):
    raise TypeError(
      f"Plots of runs take a list of mpjax.plot.Curve. Got "
      f"{strange[0] + ' in it' if strange else 'a Curve'}. Write "
      "[Curve(label, losses, scales, applied)]."
    )
  return [
    Curve(c.label, np.asarray(c.losses), np.asarray(c.scales), np.asarray(c.applied, bool))
    for c in given
  ]


def _span(curves: Sequence[Curve]) -> float:
  """The factor between the largest and the smallest loss that is finite and above zero."""
  losses = np.concatenate([curve.losses for curve in curves]) if curves else np.ones(1)
  positive = losses[np.isfinite(losses) & (losses > 0)]
  return float(positive.max() / positive.min()) if positive.size else 1.0


def _steps(curve: Curve) -> np.ndarray:
  return np.arange(1, len(curve.losses) + 1)


def _style(number: int) -> dict[str, Any]:
  """Runs lie on top of each other when all is well, so their dashes differ too."""
  color = SERIES[number % len(SERIES)]
  return {"color": color, "linestyle": _DASHES[number % 4], "linewidth": 1.6}
