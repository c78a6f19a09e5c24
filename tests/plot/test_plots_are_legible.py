"""Every plot: its legend covers nothing, and its colors are those of one palette."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import colors
from matplotlib.figure import Figure

import mpjax
from mpjax import inspect, plot
from mpjax.inspect._cost_report import CostRow
from mpjax.inspect._tune_report import Trial
from mpjax.plot import _axes

MIB = 2**20


def narrowing(depth):
  """A function of many modules, of which the fourth overflows float16, and its arguments."""

  def fn(params, x):
    for n in range(depth):
      with jax.named_scope(f"layer_{n}"):
        x = jnp.tanh(x @ params[n]) if n != 3 else x @ params[n]
    return x

  eye = jnp.eye(8) * 0.5
  return fn, ([eye * 1e6 if n == 3 else eye for n in range(depth)], jnp.ones((2, 8)))


def a_flow():
  fn, args = narrowing(6)
  return inspect.explain(fn, "mixed_float16", *args, grad=True)


def a_check(depth=6):
  fn, args = narrowing(depth)
  return inspect.check(fn, "mixed_float16", *args, gradients=False)


def a_culprit():
  return inspect.locate_nonfinite(lambda x: x * x, jnp.full(3, 300.0, jnp.float16))


def ranges(scale=1.0):
  values = jnp.exp2(jnp.concatenate([jnp.arange(-60.0, 16.0), jnp.full(40, 10.0)]))
  return inspect.range_report(inspect.histogram([values]), scale=scale)


def good_scales():
  return inspect.range_report(inspect.histogram([jnp.exp2(jnp.arange(-34.0, -6.0))]))


def updates():
  params = {"w": jnp.exp2(jnp.arange(-6.0, 16.0))}
  tx = inspect.collect_statistics(optax.sgd(1e-2))
  _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  return inspect.update_report(inspect.statistics(state))


def a_frontier():
  wide = mpjax.PolicyMap({}, "float32")
  rows = (
    Trial("low", 0.5, 0.5, "w", 0.0, None, wide, within=False, best=True),
    Trial("some", 0.001, 0.01, "w", 2.0, None, wide, within=True, best=True),
    Trial("float32", 0.0, 0.0, "", 10.0, None, wide, within=True, best=True),
  )
  return inspect.TuneReport(wide, "", (), rows, (), 0.05, 10.0, 3)


def a_cost():
  rows = [
    CostRow(name, 10 * MIB, size * MIB, 10 * MIB, 10 * MIB, None, None, 1.0)
    for name, size in (("float32", 20), ("mixed_bfloat16", 12))
  ]
  return inspect.CostReport("gpu:h100", 40 * MIB, tuple(rows))


def curves():
  falling = np.geomspace(2, 0.02, 60)
  applied = np.arange(60) != 30
  scales = 2.0 ** (15 + np.arange(60) // 20)
  flat = plot.Curve("float32", falling, np.ones(60), np.ones(60, bool))
  scaled = flat._replace(label="mixed_float16", scales=scales, applied=applied)
  return [flat, scaled, flat._replace(label="float16", losses=np.full(60, 2.0))]  # does not learn


PLOTS = {
  "flow": (plot.plot_flow, a_flow),
  "check": (plot.plot_check, a_check),
  "check of many modules": (plot.plot_check, lambda: a_check(40)),
  "nonfinite": (plot.plot_nonfinite, a_culprit),
  "range": (plot.plot_range, ranges),
  "range at a scale": (plot.plot_range, lambda: ranges(2**10)),
  "scale choice": (plot.plot_scale_choice, good_scales),
  "updates": (plot.plot_updates, updates),
  "frontier": (plot.plot_frontier, a_frontier),
  "cost": (plot.plot_cost, a_cost),
  "losses": (plot.plot_losses, curves),
  "scales": (plot.plot_scales, curves),
}


@functools.cache
def drawn(name):
  """A plot on axes of a figure of its own."""
  draw, make = PLOTS[name]
  figure = Figure(layout="constrained")
  ax = draw(make(), ax=figure.subplots())
  figure.draw_without_rendering()
  return ax


def covered(ax):
  """The parts of a plot that its legend lies on."""
  box = ax.get_legend().get_window_extent()
  for line in ax.get_lines():
    path = line.get_transform().transform_path(line.get_path())
    crosses = line.get_linestyle() != "None" and path.intersects_bbox(box, filled=False)
    if crosses or any(box.contains(x, y) for x, y in path.vertices):
      yield line
  yield from (p for p in ax.patches if p.get_window_extent().overlaps(box))
  yield from (t for t in ax.texts if t.get_text() and t.get_window_extent().overlaps(box))


def used_colors(ax):
  """The colors of a plot that are no shade of grey."""
  lines = [line.get_color() for line in ax.get_lines()]
  found = {colors.to_hex(color).upper() for color in lines}
  faces = [p.get_facecolor() if p.get_fill() else p.get_edgecolor() for p in ax.patches]
  found |= {colors.to_hex(color).upper() for color in faces}
  return {color for color in found if len({color[1:3], color[3:5], color[5:]}) > 1}


@pytest.mark.parametrize("name", list(PLOTS))
def test_a_plot_has_the_palettes_colors_and_a_legend_that_covers_nothing(name):
  ax = drawn(name)
  palette = {*_axes.SERIES, _axes.ORANGE, _axes.GREEN, _axes.RED, _axes.BLUE}
  assert used_colors(ax) <= palette
  if (legend := ax.get_legend()) is None:
    assert name == "nonfinite"
    return
  box, page = legend.get_window_extent(), ax.get_figure().bbox
  assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
  assert not list(covered(ax))


@pytest.mark.parametrize("name", list(PLOTS))
def test_no_label_of_a_scale_lies_on_another(name):
  for labels in (drawn(name).get_xticklabels(), drawn(name).get_yticklabels()):
    shown = [label for label in labels if label.get_text() and label.get_visible()]
    boxes = [label.get_window_extent() for label in shown]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_a_check_of_many_modules_has_the_one_that_overflows_and_not_those_behind_it():
  ax = drawn("check of many modules")
  rows = [label.get_text() for label in ax.get_yticklabels()]
  assert "layer_3" in rows and "layer_4" not in rows and len(rows) <= 30
  assert "of 40 modules" in ax.get_title()
