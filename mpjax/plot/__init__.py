"""Plots: data in, matplotlib axes out. matplotlib is imported when a function is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax.inspect._check_report import CheckReport, ModuleCheck, underflows
from mpjax.inspect._flow_report import FlowReport
from mpjax.inspect._locate import NonFiniteReport
from mpjax.plot._axes import (
  BLUE,
  GREY,
  RED,
  SERIES,
  draws,
  figure_class,
  legend_below,
  legend_beside,
  new_axes,
)
from mpjax.plot._reports import (
  plot_cost,
  plot_frontier,
  plot_range,
  plot_scale_choice,
  plot_updates,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes

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


@draws(FlowReport, "mpjax.inspect.explain")
def plot_flow(report: FlowReport, *, ax: Axes | None = None) -> Axes:
  """Plots how many bytes of activations each module holds in 16 bits and in float32.

  Modules with a leak have an arrow in front of their names. `FlowReport.fold` makes fewer rows.

  Args:
    report: What `mpjax.inspect.explain` returned.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `FlowReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import jax, mpjax
    >>> from matplotlib.figure import Figure
    >>> square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> report = mpjax.inspect.explain(lambda w, x: x @ w, "mixed_bfloat16", square, square)
    >>> plot_flow(report, ax=Figure().subplots()).get_title()
    '100% of matmul FLOP in 16 bits, 0 leaks'
  """
  rows = report.rows
  ax = new_axes(len(rows)) if ax is None else ax
  wide = np.array([row.bytes.get("float32", 0) for row in rows], float)
  narrow = np.array([sum(_narrow_bytes(row.bytes)) for row in rows], float)
  unit, size = _byte_unit(float((wide + narrow).max(initial=0)))
  places = np.arange(len(rows))
  ax.barh(places, narrow / size, color=BLUE, label="16 bits")
  ax.barh(places, wide / size, left=narrow / size, color=RED, hatch="///", label="float32")
  names = [f"\N{RIGHTWARDS ARROW} {row.module}" if row.leaks else row.module for row in rows]
  _name_rows(ax, names)
  ax.set(xlabel=f"bytes that operations return, before fusion ({unit})")
  leaks = f"{len(report.leaks)} leak{'s' * (len(report.leaks) != 1)}"
  share = "an unknown part" if np.isnan(report.narrow_share) else f"{report.narrow_share:.0%}"
  ax.set_title(f"{share} of matmul FLOP in 16 bits, {leaks}")
  legend_beside(ax)
  return ax


@draws(CheckReport, "mpjax.inspect.check")
def plot_check(report: CheckReport, *, ax: Axes | None = None) -> Axes:
  """Plots the relative error of what each module is given and hands out.

  Of more than 30 modules those that lose most are drawn, at most 30, in the order of the model: not
  those that pass on what is lost before them, nor those beneath which it is lost. A cross marks a
  module whose results overflow, a triangle one whose results underflow, both in grey where what it
  is given does already.

  Args:
    report: What `mpjax.inspect.check` returned.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `CheckReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import mpjax
    >>> from matplotlib.figure import Figure
    >>> args = jnp.eye(2), jnp.ones((1, 2))
    >>> report = mpjax.inspect.check(lambda w, x: x @ w, "float16", *args, gradients=False)
    >>> ax = plot_check(report, ax=Figure().subplots())
    >>> ax.get_xlabel(), ax.get_xscale()
    ('relative error against float32', 'log')
  """
  rows = _worst(report)
  ax = new_axes(len(rows)) if ax is None else ax
  places = np.arange(len(rows))
  out = np.array([row.output.error for row in rows], float)
  given = np.array([row.error_in for row in rows], float)
  floor = min([e for e in (*out, *given) if e > 0], default=report.tolerance) / 2
  shown, before = np.maximum(out, floor), np.maximum(given, floor)
  ax.hlines(places, before, shown, color="0.75", zorder=1)
  ax.plot(before, places, "|", color="0.3", markersize=9, label="in")
  ax.plot(shown, places, "o", color=BLUE, label="out")
  inherits = np.array([row.inherits for row in rows], bool)
  overflow = np.array([row.output.overflow > 0 for row in rows], bool)
  underflow = np.array([underflows(row.output) > 0 for row in rows], bool)
  for label, marker, hit in (("overflows", "X", overflow), ("underflows", "v", underflow)):
    for how, color, here in (
      (label, RED, hit & ~inherits),
      (f"{label} already", GREY, hit & inherits),
    ):
      if here.any():
        ax.plot(shown[here], places[here], marker, color=color, markersize=10, label=how)
  ax.axvline(report.tolerance, color="0.3", linestyle="--", linewidth=1, label="tolerance")
  ax.set_xscale("log")
  _name_rows(ax, [row.module for row in rows])
  ax.set(xlabel=f"relative error against {report.reference}")
  if len(rows) < len(report.rows):
    title = f"{len(rows)} of {len(report.rows)} modules, those that lose most"
    ax.set_title(title, fontsize="medium")
  legend_beside(ax)
  return ax


@draws(NonFiniteReport, "mpjax.inspect.locate_nonfinite")
def plot_nonfinite(report: NonFiniteReport, *, ax: Axes | None = None) -> Axes:
  """Plots what the culprit was given, against the range of the format that it computes in.

  Args:
    report: What `mpjax.inspect.locate_nonfinite` returned; it must have found something.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `NonFiniteReport`.
    ValueError: If everything is finite.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import mpjax
    >>> from matplotlib.figure import Figure
    >>> report = mpjax.inspect.locate_nonfinite(lambda x: x * x, jnp.full(3, 300, jnp.float16))
    >>> ax = plot_nonfinite(report, ax=Figure().subplots())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['operand 0: f16[3]', 'operand 1: f16[3]', 'result: f16[3]']
  """
  first = report.first
  if first is None:
    raise ValueError(
      "plot_nonfinite draws the operation that made the first inf or NaN; the report has none. "
      "Look at report.finite first."
    )
  entries = [
    *((f"operand {n}: {r.array}", r) for n, r in enumerate(first.operands)),
    (f"result: {first.result.array}", first.result),
  ]
  ax = new_axes(len(entries)) if ax is None else ax
  for place, (_, found) in enumerate(entries):
    ax.plot([found.low, found.high], [place, place], "|-", color=BLUE, linewidth=3, markersize=12)
    bad = [f"{n} {name}" for n, name in ((found.infs, "inf"), (found.nans, "NaN")) if n]
    ax.annotate(" and ".join(bad), (1.01, place), xycoords=("axes fraction", "data"), va="center")
  limit = _limit(first.result.array)
  for value in (-limit, limit):
    ax.axvline(value, color=RED, linestyle="--")
  ax.set_xscale("symlog", linthresh=1.0)
  ax.set_xlim(-limit * 10, limit * 10)
  _name_rows(ax, [name for name, _ in entries])
  ax.set(xlabel="from the smallest to the largest finite number; dashed: the format's largest")
  ax.set_title(f"{first.op} at {first.line}" + (f", {first.within[-1]}" if first.within else ""))
  return ax


_ROWS_SHOWN = 30


def _worst(report: CheckReport) -> Sequence[ModuleCheck]:
  """At most so many rows as can be read: those that lose most, in the order of the model."""
  if len(report.rows) <= _ROWS_SHOWN:
    return report.rows
  kept = report.worst[:_ROWS_SHOWN]
  return [row for row in report.rows if row in kept]


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
  ax.set_yticks(np.arange(len(names)), names)
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.grid(axis="x", color="0.9")
  ax.set_axisbelow(True)


def _narrow_bytes(sizes: dict[str, float]) -> list[float]:
  return [size for dtype, size in sizes.items() if dtype in ("bfloat16", "float16")]


def _byte_unit(largest: float) -> tuple[str, int]:
  units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
  return next((unit for unit in units if largest >= unit[1]), ("bytes", 1))


def _limit(array: str) -> float:
  """The largest number of a format that is written as in ``f16[2,3]``."""
  formats = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f64": jnp.float64}
  return float(jnp.finfo(formats.get(array.partition("[")[0], jnp.float32)).max)


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
  _name_rows(ax, [curve.label for curve in curves])
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
