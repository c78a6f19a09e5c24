"""Plots of reports with a row for each module, or for each value that an operation reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from mpjax.inspect._check_report import CheckReport, ModuleCheck, underflows
from mpjax.inspect._flow_report import FlowReport
from mpjax.inspect._locate import NonFiniteReport
from mpjax.plot._axes import BLUE, GREY, RED, draws, legend_beside, name_rows, new_axes

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_ROWS_SHOWN = 30


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
  name_rows(ax, names)
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
  name_rows(ax, [row.module for row in rows])
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
  decades = int(math.log10(limit))
  marks = [10.0 ** (decades // 2), 10.0**decades]
  ax.set_xticks([*(-mark for mark in reversed(marks)), 0.0, *marks])
  ax.set_xlim(-limit * 10, limit * 10)
  name_rows(ax, [name for name, _ in entries])
  ax.set(xlabel="from the smallest to the largest finite number; dashed: the format's largest")
  ax.set_title(f"{first.op} at {first.line}" + (f", {first.within[-1]}" if first.within else ""))
  return ax


def _worst(report: CheckReport) -> Sequence[ModuleCheck]:
  """At most so many rows as can be read: those that lose most, in the order of the model."""
  if len(report.rows) <= _ROWS_SHOWN:
    return report.rows
  kept = report.worst[:_ROWS_SHOWN]
  return [row for row in report.rows if row in kept]


def _narrow_bytes(sizes: dict[str, float]) -> list[float]:
  return [size for dtype, size in sizes.items() if dtype in ("bfloat16", "float16")]


def _byte_unit(largest: float) -> tuple[str, int]:
  units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
  return next((unit for unit in units if largest >= unit[1]), ("bytes", 1))


def _limit(array: str) -> float:
  """The largest number of a format that is written as in ``f16[2,3]``."""
  formats = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f64": jnp.float64}
  return float(jnp.finfo(formats.get(array.partition("[")[0], jnp.float32)).max)
