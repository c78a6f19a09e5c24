"""Axes of matplotlib, which is imported when they are asked for, and colors to tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_ROW_INCHES = 0.28

# Okabe and Ito, Color Universal Design (2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
PINK, SKY = "#CC79A7", "#56B4E9"

# Of several runs, in this order: neighbors differ in lightness too.
SERIES = (BLUE, ORANGE, GREEN, RED, PINK, SKY)


def figure_class() -> type[Figure]:
  """The Figure of matplotlib.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'Plots need matplotlib, which is not installed. Run: pip install "mpjax[plot]"'
    ) from error
  return Figure


def new_axes(rows: int = 0) -> Axes:
  """The axes of a new figure, high enough for so many rows.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
  """
  figure_class()
  from matplotlib import pyplot

  size = (9.0, max(2.4, 1.2 + _ROW_INCHES * rows)) if rows else None
  return pyplot.subplots(figsize=size, layout="constrained")[1]
