"""Plots of training runs."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import _planted as planted
from mpjax.inspect import check, explain, locate_nonfinite
from mpjax.plot import (
  Curve,
  plot_check,
  plot_flow,
  plot_losses,
  plot_nonfinite,
  plot_scales,
  running_mean,
  save_curves,
)


def curve(label="float32", losses=None, applied=None, scale=1.0):
  losses = np.geomspace(2, 0.002, 50) if losses is None else np.asarray(losses, np.float32)
  applied = np.ones(len(losses), bool) if applied is None else np.asarray(applied)
  return Curve(label, losses, np.full(len(losses), scale, np.float32), applied)


@pytest.fixture
def ax():
  return Figure().subplots()


def labels(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("plot", [plot_losses, plot_scales])
def test_a_plot_draws_on_the_axes_given_and_returns_them(ax, plot):
  assert plot([curve("float32"), curve("mixed_float16")], ax=ax) is ax
  assert labels(ax)[:2] == ["float32", "mixed_float16"]
  assert ax.get_xlabel() == "step" and ax.get_ylabel()


@pytest.mark.parametrize("plot", [plot_losses, plot_scales])
def test_a_plot_makes_its_own_axes_if_given_none(plot):
  from matplotlib import pyplot

  pyplot.switch_backend("agg")
  made = plot([curve()])
  assert made.get_figure() is pyplot.gcf()
  pyplot.close(made.get_figure())


@pytest.mark.parametrize("plot", [plot_losses, plot_scales])
def test_no_runs_make_an_empty_plot(ax, plot):
  assert plot([], ax=ax).get_legend() is None


def test_losses_that_span_a_lot_get_a_logarithmic_axis_and_others_do_not(ax):
  assert plot_losses([curve()], ax=ax).get_yscale() == "log"
  assert plot_losses([curve(losses=[3, 2, 1])], ax=Figure().subplots()).get_yscale() == "linear"


@pytest.mark.parametrize("losses", [[np.nan, np.inf], [-1.0, 0.0], [1.0]], ids=str)
def test_a_run_that_went_wrong_can_still_be_drawn(tmp_path, losses):
  save_curves([curve(losses=losses)], tmp_path / "curves.png")
  assert (tmp_path / "curves.png").stat().st_size > 0


def test_skipped_steps_are_marked(ax):
  plot_scales([curve(losses=[1, np.nan, 1], applied=[True, False, True], scale=8)], ax=ax)
  marks = ax.get_lines()[-1]
  assert marks.get_marker() == "x"
  assert marks.get_xdata().tolist() == [2]
  assert "skipped" in labels(ax)


@pytest.mark.parametrize(
  ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_curves_are_saved_in_the_format_of_the_suffix(tmp_path, suffix, start):
  path = tmp_path / f"curves.{suffix}"
  save_curves([curve(), curve("mixed_float16", scale=2**15)], path)
  assert path.read_bytes().startswith(start)


def test_losses_say_in_their_legend_what_is_raw_and_what_is_smoothed(ax):
  assert labels(plot_losses([curve()], ax=ax))[-1] == "faint: each step; bold: running means"


def panels(monkeypatch, tmp_path, curves, **options):
  """The axes of a saved picture."""
  made = []
  monkeypatch.setattr(
    Figure, "savefig", lambda figure, *args, **kwargs: made.append(figure), raising=True
  )
  save_curves(curves, tmp_path / "curves.png", **options)
  return made[0].axes, made[0].get_suptitle()


def test_a_picture_has_a_title_and_the_metric_and_no_panel_that_says_nothing(monkeypatch, tmp_path):
  runs = [curve(), curve("mixed_float16", scale=2**15)]
  options = {"title": "digits", "held_out": ("accuracy, %", [99.5, None])}
  axes, title = panels(monkeypatch, tmp_path, runs, **options)
  assert title == "digits"
  assert [a.get_xlabel() for a in axes] == ["step", "held-out accuracy, %", "step"]
  assert [text.get_text() for text in axes[1].texts] == ["99.5", "none"]
  assert axes[2].get_lines()[0].get_color() == axes[0].get_lines()[3].get_color()
  axes, _ = panels(monkeypatch, tmp_path, runs[:1])
  assert len(axes) == 1


def test_a_missing_matplotlib_is_named_with_its_command(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  for draw in (lambda: plot_losses([curve()]), lambda: save_curves([curve()], tmp_path / "x.png")):
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
      draw()


def test_the_running_mean_looks_back_and_leaves_out_what_is_not_finite():
  values = np.array([2.0, 4.0, np.inf, 6.0, np.nan, np.nan])
  assert running_mean(values, 2)[:5].tolist() == [2.0, 3.0, 4.0, 6.0, 6.0]
  assert np.isnan(running_mean(values, 2)[5])


def rows_of(ax):
  return [label.get_text() for label in ax.get_yticklabels()]


def test_a_flow_is_drawn_with_its_leaks_marked(ax):
  square = jnp.ones((planted.WIDTH, planted.WIDTH))
  report = explain(planted.stray, "mixed_bfloat16", {"a": square, "b": square}, square[:2])
  assert plot_flow(report, ax=ax) is ax
  assert rows_of(ax) == ["\N{RIGHTWARDS ARROW} hidden", "head"]
  assert labels(ax) == ["16 bits", "float32"] and "bytes" in ax.get_xlabel()


def test_a_check_is_drawn_with_its_underflows_marked(ax):
  square, small = jnp.eye(planted.WIDTH), jnp.full((planted.WIDTH, planted.WIDTH), 1e-4)
  params = {"large": square, "a": small, "b": small}
  report = check(planted.underflow, "mixed_float16", params, square[:2], gradients=False)
  assert plot_check(report, ax=ax) is ax
  assert rows_of(ax) == ["large", "small"] and ax.get_xscale() == "log"
  assert labels(ax) == ["in", "out", "underflows", "tolerance"]


def test_the_ranges_of_a_culprit_are_drawn_and_no_culprit_is_refused(ax):
  report = locate_nonfinite(lambda x: x * x, jnp.full(3, 300.0, jnp.float16))
  assert plot_nonfinite(report, ax=ax) is ax
  assert rows_of(ax) == ["operand 0: f16[3]", "operand 1: f16[3]", "result: f16[3]"]
  assert [text.get_text() for text in ax.texts] == ["", "", "3 inf"]
  with pytest.raises(ValueError, match="the report has none"):
    plot_nonfinite(locate_nonfinite(lambda x: x, jnp.ones(3)), ax=ax)
