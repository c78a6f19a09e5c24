"""Plots of reports."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import mpjax
from mpjax import inspect
from mpjax.inspect._cost_report import CostRow
from mpjax.inspect._tune_report import Trial
from mpjax.plot import plot_cost, plot_frontier, plot_range, plot_scale_choice, plot_updates


@pytest.fixture
def ax():
  return Figure().subplots()


def labels(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.fixture(scope="module")
def counted():
  return inspect.histogram([jnp.exp2(jnp.arange(-40.0, 8.0))])


def test_a_range_says_what_becomes_of_the_values(ax, counted):
  assert plot_range(inspect.range_report(counted), ax=ax) is ax
  assert [label.split(" (")[0] for label in labels(ax)] == ["becomes zero", "loses bits", "kept"]
  assert "power of two" in ax.get_xlabel() and "%" in ax.get_ylabel()
  shares = [float(label.split("(")[1].rstrip("%)")) for label in labels(ax)]
  assert sum(shares) == pytest.approx(100, abs=0.2)
  assert shares[0] == pytest.approx(100 * 16 / 48, abs=0.1)  # 2^-40 to 2^-25


def test_a_scaled_range_shows_where_it_came_from(ax, counted):
  plot_range(inspect.range_report(counted, scale=2**10), ax=ax)
  assert labels(ax)[0] == "unscaled" and "at scale 2^10" in ax.get_xlabel()
  assert any(label.startswith("overflows") for label in labels(ax))


def test_the_good_scales_are_marked_where_there_are_any(ax):
  fits = inspect.histogram([jnp.array([1e-6, 1e-3])])
  plot_scale_choice(inspect.range_report(fits), ax=ax)
  assert any(label.startswith("recommended") for label in labels(ax))
  assert "good scales" in labels(ax)
  wide = inspect.histogram([jnp.exp2(jnp.arange(-100.0, 0.0))])
  none = plot_scale_choice(inspect.range_report(wide), ax=Figure().subplots())
  assert labels(none) == ["becomes zero", "overflows"]


def test_updates_stand_beside_half_a_spacing_of_each_format(ax):
  params = {"w": jnp.ones(4)}
  tx = inspect.collect_statistics(optax.sgd(1e-3))
  _, state = tx.update(params, tx.init(params), params)
  plot_updates(inspect.update_report(inspect.statistics(state)), ax=ax)
  bands = [f"left of this band: lost in {name}" for name in ("bfloat16", "float16")]
  assert labels(ax) == bands
  assert [patch.get_x() for patch in ax.patches[-2:]] == [-9, -12]


def test_a_frontier_marks_what_was_chosen_and_draws_errors_that_are_not_finite(ax):
  wide = mpjax.PolicyMap({}, "float32")
  rows = (
    Trial("low", np.inf, np.inf, "w", 0.0, None, wide, within=False, best=True),
    Trial("some", 0.001, 0.01, "w", 2.0, None, wide, within=True, best=True),
    Trial("float32", 0.0, 0.0, "", 10.0, None, wide, within=True, best=True),
  )
  report = inspect.TuneReport(wide, "", (), rows, (), 0.05, 10.0, 3)
  plot_frontier(report, ax=ax)
  assert labels(ax) == ["frontier", "within", "too far off", "chosen", "tolerance"]
  assert ax.get_lines()[3].get_xdata().tolist() == [20.0]


def test_cost_is_stacked_and_the_device_shown_when_it_is_near(ax):
  mib = 2**20
  row = CostRow("float32", 10 * mib, 20 * mib, 10 * mib, 10 * mib, None, None, 1.0)
  gone = CostRow("large", *[None] * 6, 1.0, "RESOURCE_EXHAUSTED")
  plot_cost(inspect.CostReport("gpu:h100", 40 * mib, (row, gone)), ax=ax)
  assert set(labels(ax)) == {"arguments", "temporaries", "results", "device memory"}
  assert "MiB" in ax.get_xlabel() and ax.get_title() == "gpu:h100"
  assert [text.get_text().strip() for text in ax.texts] == ["30"]
  far = plot_cost(inspect.CostReport("gpu:h100", 2**40, (row,)), ax=Figure().subplots())
  assert "device memory" not in labels(far)


@pytest.mark.parametrize(
  "name", ["range", "scale_choice", "updates", "frontier", "cost", "flow", "check", "nonfinite"]
)
def test_a_plot_names_what_makes_the_report_that_it_draws(name):
  with pytest.raises(
    TypeError, match=rf"plot_{name} draws what mpjax.inspect.\w+ returns, a .*dict"
  ):
    getattr(mpjax.plot, f"plot_{name}")({"a": 1})


@pytest.mark.parametrize("draw", [mpjax.plot.plot_losses, mpjax.plot.plot_scales])
def test_a_plot_of_runs_takes_a_list_of_curves_and_lists_in_them(draw):
  curve = mpjax.plot.Curve("a", [1.0, 2.0], [2.0, 2.0], [True, False])
  assert draw([curve], ax=Figure().subplots()).get_xlabel() == "step"
  with pytest.raises(TypeError, match=r"a list of mpjax.plot.Curve. Got float in it"):
    draw([1.0, 0.5])
  with pytest.raises(TypeError, match=r"a list of mpjax.plot.Curve. Got a Curve. Write \[Curve"):
    draw(curve)
