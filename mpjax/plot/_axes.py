"""Axes of matplotlib, which is imported when they are asked for, and colors to tell apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

F = TypeVar("F", bound=Callable[..., Any])

_ROW_INCHES = 0.28
_LABEL_INCHES = 0.5  # numbers and label of an axis

# Okabe and Ito, Color Universal Design (2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
PINK, SKY = "#CC79A7", "#56B4E9"

# Of several runs, in this order: neighbors differ in lightness too.
SERIES = (BLUE, ORANGE, GREEN, RED, PINK, SKY)


def draws(kind: type, maker: str) -> Callable[[F], F]:
  """Makes a plot refuse what is not the report that it draws.

  Args:
    kind: The class of the report.
    maker: What makes one.
  """

  def decorate(plot: F) -> F:
    @functools.wraps(plot)
    def checked(report: Any, **kwargs: Any) -> Any:
      if not isinstance(report, kind):
        raise TypeError(
          f"{plot.__name__} draws what {maker} returns, a {kind.__name__}. Got "
          f"{type(report).__name__}. Pass that."
        )
      return plot(report, **kwargs)

    return cast(F, checked)

  return decorate


def figure_class() -> type[Figure]:
  """The Figure of matplotlib.

  Raises:
    ModuleNotFoundError: If matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "Plots need matplotlib, which is not installed. Run: pip install matplotlib"
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


def legend_beside(ax: Axes) -> None:
  """The legend at the right of the axes, where nothing is drawn."""
  if not ax.get_legend_handles_labels()[1]:
    return
  ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def legend_below(ax: Axes, columns: int = 2) -> None:
  """The legend below the axes and their label, where nothing is drawn."""
  from matplotlib.transforms import ScaledTranslation

  if not ax.get_legend_handles_labels()[1]:
    return
  figure = ax.get_figure()
  below = ScaledTranslation(0, -_LABEL_INCHES, figure.dpi_scale_trans) if figure else None
  ax.legend(
    frameon=False,
    fontsize="small",
    ncols=columns,
    loc="upper center",
    bbox_to_anchor=(0.5, 0),
    bbox_transform=ax.transAxes + below if below else None,
  )


def name_rows(ax: Axes, names: Sequence[str]) -> None:
  """Rows from the top down, each with its name, and lines between them."""
  ax.set_yticks(np.arange(len(names)), names)
  ax.set_ylim(len(names) - 0.4, -0.6)
  ax.grid(axis="x", color="0.9")
  ax.set_axisbelow(True)
