"""The run behind `mpjax compare`: order, interrupts, checkpoints, the report, the table."""

import dataclasses
import io
import json
import math
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _arrays import array
from _linear_job import LinearJob
from mpjax import Policy
from mpjax._demo.compare import Plan, Result, compare
from mpjax._demo.jobs import UsageError
from mpjax._demo.progress import Progress
from mpjax._demo.result_table import format_report
from mpjax._demo.run_checkpoints import Checkpoints
from mpjax.plot import Curve

pytestmark = pytest.mark.usefixtures("standard_promotion_in_every_thread")

PLAN = Plan(steps=12, batch_size=8, seed=0)
THREE = {name: Policy.parse(name) for name in ("float32", "mixed_bfloat16", "mixed_float16")}
FLOAT16 = {"mixed_float16": Policy.parse("mixed_float16")}


def run(job, policies=THREE, plan=PLAN, checkpoint=None):
  return compare(job, policies, plan, Progress(io.StringIO()), checkpoint)


def bits(session):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(session.state())]


def same_curves(one, other):
  return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one[1:], other[1:], strict=True))


def test_the_results_come_in_the_order_asked_for_and_are_complete():
  report = run(LinearJob())
  assert [result.curve.label for result in report.results] == list(THREE)
  assert not report.interrupted
  for result in report.results:
    assert result.steps == PLAN.steps
    assert result.metric is not None
    assert math.isfinite(result.train_loss)
    assert result.argument_bytes > 0 and result.temp_bytes >= 0
    assert result.step_ms > 0 and result.compile_seconds > 0


def test_a_row_has_what_a_reader_of_the_json_needs():
  row = run(LinearJob(), FLOAT16).rows()[0]
  assert json.loads(json.dumps(row, allow_nan=False)) == row
  expected = {
    "policy": "mixed_float16",
    "param_dtype": "float32",
    "compute_dtype": "float16",
    "output_dtype": "float32",
    "metric_name": "error",
    "steps": 12,
    "skipped": 0,
    "loss_scale": 32768.0,
  }
  assert {key: row[key] for key in expected} == expected
  numbers = ("train_loss", "metric", "temp_bytes", "argument_bytes", "step_ms", "compile_seconds")
  assert all(isinstance(row[key], int | float) for key in numbers)


def test_only_float16_is_scaled():
  scales = {r.curve.label: r.loss_scale for r in run(LinearJob()).results}
  assert scales == {"float32": 1.0, "mixed_bfloat16": 1.0, "mixed_float16": 2.0**15}


def test_a_skipped_step_is_counted_and_left_out_of_the_final_loss():
  (result,) = run(LinearJob(bad_at=(3, 11)), FLOAT16).results
  assert result.skipped == 2
  assert np.flatnonzero(~result.curve.applied).tolist() == [3, 11]
  assert math.isfinite(result.train_loss)
  assert result.loss_scale == 2.0**14


def test_a_run_that_diverges_is_reported_as_not_known():
  report = run(LinearJob(bad_at=(3,)), {"float32": THREE["float32"]})
  row = report.rows()[0]
  assert row["train_loss"] is None and row["metric"] is None
  assert row["complete"]
  assert "nan" in format_report(report, 80)


def test_ctrl_c_ends_after_the_step_at_hand_with_what_there_is():
  report = run(LinearJob(ctrl_c_at=(5,)))
  assert report.interrupted
  (result,) = report.results
  assert result.steps == 6
  assert result.metric is None
  assert math.isfinite(result.train_loss)
  assert "6/12" in format_report(report, 80)
  assert report.rows()[0]["complete"] is False


def test_ctrl_c_while_nothing_has_been_trained_leaves_an_empty_report():
  report = run(LinearJob(ctrl_c_at=(0,)))
  assert report.interrupted and report.results == () and report.rows() == []


def test_a_checkpoint_is_written_on_ctrl_c_and_gone_on_from_with_the_same_bits(tmp_path):
  whole = LinearJob(bad_at=(2, 9))
  unbroken = run(whole, FLOAT16, checkpoint=tmp_path / "whole")
  parts = tmp_path / "parts"
  assert run(LinearJob((4,), (2, 9)), FLOAT16, checkpoint=parts).interrupted
  assert run(LinearJob((7,), (2, 9)), FLOAT16, checkpoint=parts).interrupted
  last = LinearJob(bad_at=(2, 9))
  resumed = run(last, FLOAT16, checkpoint=parts)
  (one,), (other,) = unbroken.results, resumed.results
  assert same_curves(one.curve, other.curve)
  assert one.metric == other.metric
  assert bits(whole.sessions[0]) == bits(last.sessions[0])


@pytest.mark.ci
def test_a_run_that_is_complete_is_resumed_to_the_same_report(tmp_path):
  first = run(LinearJob(), checkpoint=tmp_path)
  again = run(LinearJob(), checkpoint=tmp_path)
  for one, other in zip(first.results, again.results, strict=True):
    assert same_curves(one.curve, other.curve)
    assert one.metric == other.metric


def test_a_kill_between_checkpoints_loses_only_what_came_after_the_last(tmp_path):
  plan = dataclasses.replace(PLAN, steps=40)

  class Killed(LinearJob):
    def batch(self, index, size, seed):
      if index == 22:
        raise SystemError("killed")
      return super().batch(index, size, seed)

  with pytest.raises(SystemError):
    run(Killed(), FLOAT16, plan, tmp_path)
  resumed = run(LinearJob(), FLOAT16, plan, tmp_path)
  unbroken = run(LinearJob(), FLOAT16, plan)
  assert same_curves(resumed.results[0].curve, unbroken.results[0].curve)
  assert resumed.results[0].metric == unbroken.results[0].metric


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("change", [{"steps": 13}, {"batch_size": 4}, {"seed": 1}], ids=str)
def test_a_checkpoint_of_other_settings_is_refused_before_anything_is_trained(tmp_path, change):
  run(LinearJob(), FLOAT16, checkpoint=tmp_path)
  job = LinearJob()
  with pytest.raises(UsageError, match=f"has {next(iter(change)).replace('_', '-')} .* this run"):
    run(job, THREE, dataclasses.replace(PLAN, **change), tmp_path)
  assert not job.sessions


@pytest.mark.parametrize(
  "other",
  [{"a": array([1] * 3)}, {"a": array([1, 1], jnp.int32)}, {"a": array([1, 1]), "b": array([1])}],
  ids=["shape", "dtype", "leaf"],
)
def test_a_checkpoint_with_other_arrays_is_refused_rather_than_cast(tmp_path, other):
  with Checkpoints(tmp_path, {}) as saved:
    saved.save(1, other)
    with pytest.raises(UsageError, match="needs a checkpoint of the same arrays"):
      saved.restore({"a": jnp.ones(2)})


def test_a_checkpoint_keeps_every_dtype_to_the_bit(tmp_path):
  tree = {
    "step": jnp.asarray(16777217, jnp.int32),
    "narrow": jnp.asarray([1.5, jnp.nan], jnp.bfloat16),
    "half": (jnp.asarray([6e-8], jnp.float16), None),
    "flag": np.ones(2, np.bool_),
  }
  with Checkpoints(tmp_path, {}) as saved:
    assert saved.restore(tree) is None
    saved.save(1, tree)
    back = saved.restore(tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
    assert one.dtype == other.dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_the_table_lines_up_and_tells_differences_to_the_first_row():
  lines = format_report(run(LinearJob()), 160).splitlines()
  header, *rows = lines[:4]
  assert len({len(line) for line in (header, *rows)}) == 1
  assert header.split()[:3] == ["policy", "par/comp/out", "steps"]
  assert [row.split()[1] for row in rows] == ["f32/f32/f32", "f32/bf16/f32", "f32/f16/f32"]
  assert " 1.00x " in rows[0]


def test_policies_that_differ_in_the_format_of_matmuls_are_told_apart(tmp_path):
  policies = {name: Policy.parse(name) for name in ("mixed_bfloat16", "mixed_float8")}
  for _ in range(2):  # the second time from its checkpoints
    _, *rows = format_report(run(LinearJob(), policies, checkpoint=tmp_path), 160).splitlines()
    assert [row.split()[1] for row in rows[:2]] == ["f32/bf16/f32", "f32/bf16/f32+fp8"]


@pytest.mark.parametrize("width", [72, 80, 100, 160])
def test_the_table_fits_the_terminal_and_loses_no_column(width):
  text = format_report(run(LinearJob()), width)
  assert max(map(len, text.splitlines())) <= width
  for column in ("skips", "scale", "loss", "error", "args MiB", "step ms", "ratio", "compile s"):
    assert column in text
  assert text.count("mixed_bfloat16") == (1 if width >= 160 else 2)


def test_the_final_loss_is_a_mean_over_the_last_twenty_applied_steps():
  losses = np.arange(30, dtype=np.float32)
  applied = np.arange(30) != 29
  curve = Curve("float32", losses, np.ones(30, np.float32), applied)
  result = Result(THREE["float32"], curve, None, None, None, 0.0, 1.0)
  assert result.train_loss == np.mean(losses[9:29])
  assert result.skipped == 1


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_the_bar_fits_the_terminal_and_uses_it(columns, monkeypatch):
  monkeypatch.setenv("COLUMNS", str(columns))
  stream = Terminal()
  progress = Progress(stream, 14)
  with progress.run("mixed_bfloat16", 400):
    progress.update(200, 0.5, 32768.0, 12)
  shown = stream.getvalue().split("\n")[0].split("\r")[-1]
  assert len(shown) == columns - 1
  assert "200/400  loss 0.5000  scale 32768" in shown
  assert shown.count("#") == {60: 0, 80: 3, 160: 20}[columns]


@pytest.mark.parametrize("kind", [Terminal, io.StringIO], ids=["terminal", "log"])
def test_a_clock_runs_while_the_step_compiles(kind, monkeypatch):
  monkeypatch.setattr("mpjax._demo.progress._TICK", 0.01)
  monkeypatch.setattr("mpjax._demo.progress._TICK_IN_A_LOG", 0.01)
  stream = kind()
  progress = Progress(stream)
  with progress.run("float32", 2):
    until = time.monotonic() + 5
    while "compiling, 0 s" not in stream.getvalue() and time.monotonic() < until:
      time.sleep(0.01)
  assert "compiling, 0 s" in stream.getvalue()


def test_ctrl_c_is_answered_while_a_step_compiles_and_keeps_what_there_is():
  class Slow(LinearJob):
    def start(self, policy, steps, seed):
      session = super().start(policy, steps, seed)
      if len(self.sessions) == 2:
        session.lower = lambda batch: SlowToCompile()
      return session

  class SlowToCompile:
    def compile(self):
      signal.raise_signal(signal.SIGINT)
      released.wait(60)

  released = threading.Event()
  stream = io.StringIO()
  try:
    report = compare(Slow(), THREE, PLAN, Progress(stream))
  finally:
    released.set()
  assert report.interrupted
  assert [result.curve.label for result in report.results] == ["float32"]
  assert "stopping after the step at hand" in stream.getvalue()


def test_a_compiler_that_fails_says_why():
  class Broken(LinearJob):
    def start(self, policy, steps, seed):
      session = super().start(policy, steps, seed)
      session.lower = lambda batch: self
      return session

    def compile(self):
      raise RuntimeError("out of registers")

  with pytest.raises(RuntimeError, match="out of registers"):
    run(Broken())


def test_progress_in_a_log_is_a_line_at_every_quarter():
  stream = io.StringIO()
  progress = Progress(stream, 10)
  with progress.run("float32", 20):
    for done in range(1, 21):
      progress.update(done, 0.5, 8.0, 1)
  first, *lines = stream.getvalue().splitlines()
  assert first.split() == ["float32", "compiling"]
  assert [line.split("] ")[1].split()[0] for line in lines] == ["5/20", "10/20", "15/20", "20/20"]
  assert all("loss 0.5000  scale 8  skips 1" in line for line in lines)


def test_progress_on_a_terminal_stays_on_one_line_and_ends_it():
  stream = Terminal()
  progress = Progress(stream)
  with progress.run("float32", 2):
    progress.update(1, 0.5, 8.0, 0)
    progress.update(2, 0.25, 8.0, 0)
  text = stream.getvalue()
  assert text.count("\n") == 1 and text.endswith("\n")
  assert "compiling" in text and "2/2" in text
