"""Plots of the reports of `mpjax.inspect` on ranges, updates, policies and cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mpjax._core.formats import Format, read_format
from mpjax.inspect._cost_report import CostReport
from mpjax.inspect._ranges import RangeReport, UpdateReport
from mpjax.inspect._tune_report import TuneReport
from mpjax.plot._axes import BLUE, GREEN, GREY, ORANGE, RED, draws, legend_below, new_axes

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_GIB, _MIB = 2**30, 2**20


@draws(RangeReport, "mpjax.inspect.range_report")
def plot_range(report: RangeReport, *, ax: Axes | None = None) -> Axes:
  """Plots how values spread over the powers of two, and what the format makes of them.

  The outline is the histogram as counted; the bars are the same values times the report's scale.

  Args:
    report: What `mpjax.inspect.range_report` returns.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `RangeReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> from matplotlib.figure import Figure
    >>> counted = mpjax.inspect.histogram({"w": jnp.array([1e-8, 1e-3])})
    >>> ax = plot_range(mpjax.inspect.range_report(counted), ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['becomes zero (50.0%)', 'loses bits (0.0%)', 'kept (50.0%)']
  """
  ax = new_axes() if ax is None else ax
  to, shift = read_format(report.dtype), report.exponent
  edges, shares = np.array(report.exponents), 100 * np.array(report.density)
  if shift:
    ax.stairs(shares, [*edges, edges[-1] + 1], color=GREY, label="unscaled")
  moved = edges + shift
  for label, color, inside in _fates(moved, to):
    if inside.any():
      share = f"{label} ({shares[inside].sum():.1f}%)"
      ax.bar(moved[inside] + 0.5, shares[inside], width=0.9, color=color, label=share)
  for edge in (to.zero, to.normal, to.top + 1):
    ax.axvline(edge, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
  low = min(edges[0], moved[0], to.zero) - 2
  ax.set_xlim(low, max(edges[-1], moved[-1], to.top) + 3)
  scaled = f" at scale 2^{shift}" if shift else ""
  ax.set(xlabel=f"magnitude{scaled}, as a power of two", ylabel="values that are not zero, %")
  ax.set_title(f"{report.dtype}: zero below $2^{{{to.zero}}}$, full precision from "
    f"$2^{{{to.normal}}}$, infinite above $2^{{{to.top + 1}}}$", fontsize="medium")  # fmt: skip
  legend_below(ax)
  return ax


def _fates(exponents: np.ndarray, to: Format) -> list[tuple[str, str, np.ndarray]]:
  """What becomes of the values of each bin, with a color."""
  zero, over = exponents < to.zero, exponents > to.top
  subnormal = ~zero & (exponents < to.normal)
  return [
    ("becomes zero", RED, zero),
    ("loses bits", ORANGE, subnormal),
    ("kept", BLUE, ~zero & ~subnormal & ~over),
    ("overflows", "black", over),
  ]


@draws(RangeReport, "mpjax.inspect.range_report")
def plot_scale_choice(report: RangeReport, *, ax: Axes | None = None) -> Axes:
  """Plots what underflows and what overflows at every loss scale, and the good scales between.

  Args:
    report: What `mpjax.inspect.range_report` returns.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `RangeReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> from matplotlib.figure import Figure
    >>> counted = mpjax.inspect.histogram({"w": jnp.array([1e-8, 1e-3])})
    >>> ax = plot_scale_choice(mpjax.inspect.range_report(counted), ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['becomes zero', 'overflows', 'good scales', 'recommended, $2^{21}$']
  """
  ax = new_axes() if ax is None else ax
  to = read_format(report.dtype)
  exponents, shares = np.array(report.exponents), 100 * np.array(report.density)
  low, high = (math.frexp(s)[1] - 1 for s in (report.lowest_scale, report.highest_scale))
  shifts = np.arange(min(low, 0) - 4, max(high, 0) + 9)
  lost = [shares[exponents + shift < to.zero].sum() for shift in shifts]
  over = [shares[exponents + shift > to.top].sum() for shift in shifts]
  ax.plot(shifts, lost, color=RED, linewidth=1.8, label="becomes zero")
  ax.plot(shifts, over, color="black", linewidth=1.8, linestyle="--", label="overflows")
  if low <= high:
    ax.axvspan(low, high, color=GREEN, alpha=0.18, linewidth=0, label="good scales")
  if report.recommended_scale is not None:
    best = math.frexp(report.recommended_scale)[1] - 1
    ax.axvline(best, color=GREEN, linewidth=1.8, label=f"recommended, $2^{{{best}}}$")
  ax.set(xlabel="loss scale, as a power of two", ylabel="values that are not zero, %")
  ax.set_title(f"{report.dtype}", fontsize="medium")
  legend_below(ax)
  return ax


@draws(UpdateReport, "mpjax.inspect.update_report")
def plot_updates(report: UpdateReport, *, ax: Axes | None = None) -> Axes:
  """Plots ``|update / parameter|`` beside half the spacing of bfloat16 and float16.

  Args:
    report: What `mpjax.inspect.update_report` returns.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `UpdateReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import jax.numpy as jnp, mpjax, optax
    >>> from matplotlib.figure import Figure
    >>> tx, params = mpjax.inspect.collect_statistics(optax.sgd(1e-3)), {"w": jnp.ones(4)}
    >>> _, opt_state = tx.update(params, tx.init(params), params)
    >>> report = mpjax.inspect.update_report(mpjax.inspect.statistics(opt_state))
    >>> plot_updates(report, ax=Figure().subplots()).get_xlabel()
    '|update / parameter|, as a power of two'
  """
  ax = new_axes() if ax is None else ax
  exponents, shares = np.array(report.exponents), 100 * np.array(report.density)
  ax.bar(exponents + 0.5, shares, width=0.9, color=BLUE, zorder=2)
  for name, color in (("bfloat16", RED), ("float16", ORANGE)):
    # Half a spacing is between 2^-(bits + 2) and twice that of the number.
    edge = -read_format(name).bits - 1
    label = f"left of this band: lost in {name}"
    ax.axvspan(edge - 1, edge, color=color, alpha=0.45, linewidth=0, label=label, zorder=1)
  ax.set(xlabel="|update / parameter|, as a power of two", ylabel="updates, %")
  legend_below(ax)
  return ax


@draws(TuneReport, "mpjax.inspect.tune")
def plot_frontier(report: TuneReport, *, ax: Axes | None = None) -> Axes:
  """Plots error against cost for the policy maps that `mpjax.inspect.tune` tried.

  Args:
    report: What it returns.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `TuneReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> from matplotlib.figure import Figure
    >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> report = mpjax.inspect.tune(loss_fn, (jnp.ones((4, 2)), jnp.ones((2, 4))))
    >>> ax = plot_frontier(report, ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['frontier', 'within', 'chosen', 'tolerance']
  """
  ax = new_axes() if ax is None else ax
  least = report.tolerance * 1e-3
  points = [
    (100 * row.float32_flops / max(report.flops, 1), min(max(row.error, least), 1e3), row)
    for row in report.rows
  ]
  best = [(x, y) for x, y, row in points if row.best]
  ax.plot(*zip(*best, strict=True), color=GREY, drawstyle="steps-post", label="frontier")
  for label, color, marker, within in (
    ("within", BLUE, "o", True),
    ("too far off", RED, "x", False),
  ):
    chosen = [(x, y) for x, y, row in points if row.within is within]
    if chosen:
      ax.plot(*zip(*chosen, strict=True), marker, color=color, label=label)
  ((x, y),) = [(x, y) for x, y, row in points if row is report.chosen]
  ax.plot(x, y, "o", markersize=13, fillstyle="none", color="black", label="chosen")
  ax.axhline(report.tolerance, color="black", linewidth=0.8, linestyle="--", label="tolerance")
  ax.set_yscale("log")
  ax.set(xlabel="FLOPs in float32, %", ylabel="relative error of loss and gradients")
  legend_below(ax, columns=5)
  return ax


@draws(CostReport, "mpjax.inspect.cost")
def plot_cost(report: CostReport, *, ax: Axes | None = None) -> Axes:
  """Plots the memory that a step needs under each policy, and that of the device.

  Args:
    report: What `mpjax.inspect.cost` returns.
    ax: Where to draw; the axes of a new figure if not given.

  Returns:
    The axes.

  Raises:
    TypeError: If ``report`` is no `CostReport`.
    ModuleNotFoundError: If matplotlib is not installed.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> from matplotlib.figure import Figure
    >>> square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    >>> report = mpjax.inspect.cost(lambda w, x: x @ w, square, square)
    >>> ax = plot_cost(report, ax=Figure().subplots())
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['float32', 'mixed_bfloat16']
  """
  ax = new_axes() if ax is None else ax
  rows = [row for row in report.rows if row.peak_bytes is not None]
  names = [row.policy for row in rows]
  largest = max((row.peak_bytes or 0 for row in rows), default=0)
  unit, word = (_GIB, "GiB") if largest >= _GIB else (_MIB, "MiB")
  parts = {
    "arguments": [row.argument_bytes or 0 for row in rows],
    "temporaries": [row.temp_bytes or 0 for row in rows],
    "results": [(row.output_bytes or 0) - (row.alias_bytes or 0) for row in rows],
  }
  start = np.zeros(len(rows))
  for (label, sizes), color in zip(parts.items(), (BLUE, ORANGE, GREEN), strict=True):
    ax.barh(names, np.array(sizes) / unit, left=start, height=0.6, color=color, label=label)
    start += np.array(sizes) / unit
  for place, end in enumerate(start):
    ax.text(end, place, f" {end:.3g}", va="center")
  ax.set_xlim(0, 1.15 * max(start, default=1.0))
  if report.memory_bytes is not None and report.memory_bytes < 2 * largest:
    ax.axvline(report.memory_bytes / unit, color=RED, linestyle="--", label="device memory")
    ax.set_xlim(0, 1.15 * max(*start, report.memory_bytes / unit))
  ax.invert_yaxis()
  ax.set(xlabel=f"memory, {word}")
  ax.set_title(report.target, fontsize="medium")
  legend_below(ax, columns=4)
  return ax
