"""The command line: what it reads, what it writes, how it ends."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from _linear_job import LinearJob
from mpjax import cli
from mpjax._demo.jobs import UsageError
from mpjax._demo.run_checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("standard_promotion_in_every_thread")


@pytest.fixture
def linear(monkeypatch):
  """Puts a job in the place of the built-in ones that compiles in no time."""
  job = LinearJob()
  monkeypatch.setattr(cli, "_load_job", lambda args: job)
  return job


def run(*argv):
  """The exit status, whether argparse or `main` ends the run."""
  try:
    return cli.main([str(argument) for argument in argv])
  except SystemExit as end:
    return end.code


def module(*argv, **kwargs):
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, "-m", "mpjax", *argv], capture_output=True, text=True, env=env, **kwargs
  )


def compare(*argv):
  return run("compare", "--steps", "4", "--batch-size", "4", *argv)


def test_the_module_runs_as_a_program():
  result = module("--version")
  assert result.returncode == 0
  assert result.stdout.startswith("mpjax ")


@pytest.mark.parametrize("argv", [["--help"], ["compare", "--help"]], ids=" ".join)
def test_help_is_printed_on_stdout(capsys, argv):
  assert run(*argv) == 0
  out, err = capsys.readouterr()
  assert out.startswith("usage: mpjax") and not err


WRONG = {
  "no command": ([], "COMMAND"),
  "an unknown command": (["train"], "invalid choice: 'train'"),
  "an unknown flag": (["compare", "--stepz", "3"], "unrecognized arguments: --stepz"),
  "a shortened flag": (["compare", "--pol", "float32"], "unrecognized arguments: --pol"),
  "an unknown job": (["compare", "--job", "images"], "invalid choice: 'images'"),
  "an unknown policy": (["compare", "--policies", "float31"], "mixed_bfloat16"),
  "an unknown dtype": (["compare", "--policies", "p=f8,c=f16,o=f32"], "float16"),
  "a policy twice": (["compare", "--policies", "mixed_float16;p=f32,c=f16,o=f32"], "must differ"),
  "no policy": (["compare", "--policies", " ; "], "at least one policy"),
  "no steps": (["compare", "--steps", "0"], "at least 1"),
  "half a step": (["compare", "--steps", "1.5"], "whole number"),
  "a negative seed": (["compare", "--seed", "-1"], "at least 0"),
  "a huge batch": (["compare", "--batch-size", "1000"], "at most 64"),
  "more steps than there can be": (["compare", "--steps", "9" * 5000], "at most 1000000000"),
  "a seed of 65 bits": (["compare", "--seed", str(2**64)], "at most 4294967295"),
  "a name that is too long": (["compare", "--json", "{tmp}/" + "x" * 5000], "name too long"),
  "a folder that is too long": (["compare", "--checkpoint", "{tmp}/" + "x" * 300], "name too long"),
  "a remote folder": (["compare", "--checkpoint", "gs://bucket/run"], "a local file or folder"),
  "a remote file": (["compare", "--json", "s3://bucket/rows.json"], "a local file or folder"),
  "resume without a directory": (["compare", "--resume"], "--resume needs --checkpoint"),
  "no folder for the JSON": (["compare", "--json", "{tmp}/no/rows.json"], "No such file"),
  "a folder as JSON": (["compare", "--json", "{tmp}"], "Is a directory"),
  "no folder for the plot": (["compare", "--plot", "{tmp}/no/x.png"], "No such file"),
  "a plot of no known kind": (["compare", "--plot", "{tmp}/x.txt"], ".png, .pdf or .svg"),
  "a file as checkpoint": (["compare", "--checkpoint", "{tmp}/file"], "File exists"),
  "a full checkpoint": (["compare", "--checkpoint", "{tmp}"], "Add --resume"),
}


@pytest.mark.parametrize(("argv", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_and_status_2_before_anything_is_trained(
  linear, capsys, tmp_path, argv, says
):
  (tmp_path / "file").write_text("kept")
  assert run(*(argument.format(tmp=tmp_path) for argument in argv)) == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.count("\n") == 1 and err.startswith("mpjax")
  assert says in err
  assert not linear.sessions
  assert os.listdir(tmp_path) == ["file"]
  assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
  ("module", "flags", "package"),
  [("sklearn.datasets", [], "scikit-learn"), ("matplotlib", ["--plot", "x.png"], "matplotlib")],
  ids=["scikit-learn", "matplotlib"],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, capsys, module, flags, package):
  monkeypatch.setitem(sys.modules, module, None)
  assert run("compare", *flags) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert f"pip install {package}" in err


@pytest.mark.ci
def test_an_output_that_nobody_reads_is_one_line_and_status_2(tmp_path):
  (tmp_path / "closed_case.py").write_text(
    "import jax.numpy as jnp\n\ndef make():\n  return jnp.sin, jnp.ones(3)\n"
  )
  read, write = os.pipe()
  os.close(read)
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "mpjax", "cost", "closed_case:make"]
  result = subprocess.run(
    command, stdout=write, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path
  )
  os.close(write)
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1 and "Broken pipe" in result.stderr


def test_a_backend_that_is_not_there_is_one_line_and_status_2(linear, monkeypatch, capsys):
  def devices():
    raise RuntimeError("Unable to initialize backend 'nonsense'\n(set JAX_PLATFORMS)")

  monkeypatch.setattr(cli.jax, "devices", devices)
  assert compare() == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "Unable to initialize backend 'nonsense'" in err


def test_a_checkpoint_that_cannot_be_read_is_one_line_and_status_2(linear, capsys, tmp_path):
  flags = ["--policies", "float32", "--checkpoint", tmp_path / "run"]
  assert compare(*flags) == 0
  for file in (tmp_path / "run").rglob("*"):
    if file.is_file() and "settings" in str(file):
      file.write_bytes(b"{")
  capsys.readouterr()
  assert compare(*flags, "--resume") == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "--resume needs checkpoints that can be read" in err


def test_whatever_orbax_raises_of_an_array_that_is_cut_off_is_one_line(monkeypatch, tmp_path):
  def restore(*args, **kwargs):
    raise Exception("error while reading an array\nand much more")  # as it does, no narrower one

  tree = {"w": np.ones(4)}
  with Checkpoints(tmp_path, {}) as checkpoints:
    checkpoints.save(1, tree)
    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    with pytest.raises(
      UsageError, match=r"^--resume needs .*: error while reading an array\. [^\n]*$"
    ):
      checkpoints.restore(tree)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_usage(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path, {}) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
      with pytest.raises(UsageError, match=r"^--checkpoint needs .* Step 1 of .*Make room[^\n]*$"):
        checkpoints.save(1, {"w": np.random.default_rng(0).normal(size=10_000)})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_table_goes_to_stdout_and_progress_to_stderr(linear, capsys):
  assert compare() == 0
  out, err = capsys.readouterr()
  lines = out.splitlines()
  assert [line.split()[0] for line in lines[:4]] == [
    "policy",
    "float32",
    "mixed_bfloat16",
    "mixed_float16",
  ]
  assert "loss" in err and "scale" in err and "skips" in err


def test_json_and_plot_are_written_and_replace_what_was_there(linear, tmp_path):
  rows, plot = tmp_path / "rows.json", tmp_path / "curves.png"
  rows.write_text("old")
  assert compare("--json", rows, "--plot", plot, "--policies", "float32; p=f32,c=f16,o=f32") == 0
  written = json.loads(rows.read_text())
  assert [row["policy"] for row in written] == ["float32", "p=f32,c=f16,o=f32"]
  assert plot.read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_with_status_130_the_table_and_the_json(linear, capsys, tmp_path):
  linear.ctrl_c_at = [2]
  rows, plot = tmp_path / "rows.json", tmp_path / "curves.png"
  assert compare("--json", rows, "--plot", plot) == 130
  out, err = capsys.readouterr()
  assert "3/4" in out
  assert "interrupted: 0 of 3 policies done" in err and "Traceback" not in err
  assert [row["steps"] for row in json.loads(rows.read_text())] == [3]
  assert plot.exists()


def test_ctrl_c_before_the_first_step_leaves_an_empty_json(linear, capsys, tmp_path):
  linear.ctrl_c_at = [0]
  assert compare("--json", tmp_path / "rows.json") == 130
  assert json.loads((tmp_path / "rows.json").read_text()) == []
  assert not capsys.readouterr().out


SLOW = {
  "compare": "cli._load_job = lambda args: Slow()",
  "cost": "sys.modules['slow'] = types.SimpleNamespace(case=lambda: (work, 1.0))",
}


@pytest.mark.ci
@pytest.mark.parametrize(("command", "patch"), SLOW.items(), ids=SLOW)
def test_ctrl_c_ends_the_process_whatever_is_at_work(command, patch, tmp_path):
  """At work in another thread, and not to be stopped there: as a compiler is."""
  program = f"""
import signal, sys, time, types

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from mpjax import cli
from mpjax._demo.jobs import UsageError
from mpjax._demo.run_checkpoints import Checkpoints

def work(*_):
  print("at work", file=sys.stderr, flush=True)
  time.sleep(120)

class Slow:
  name, metric, train_size, fingerprint, start = "slow", None, 512, "0", work

{patch}
sys.argv = ["mpjax", "{command}"] + ["slow:case"] * {command == "cost"}
cli.program()
"""
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path
  ) as process:
    try:
      while "at work" not in process.stderr.readline():
        assert process.poll() is None
      process.send_signal(signal.SIGINT)
      said = process.communicate(timeout=60)[1]
    finally:
      process.kill()
  assert process.returncode == 130 and "mpjax: interrupted" in said


def test_a_run_is_resumed_from_its_directory_and_ends_in_the_same_rows(linear, capsys, tmp_path):
  flags = ["--policies", "mixed_float16", "--json", tmp_path / "rows.json"]
  assert compare(*flags) == 0
  unbroken = json.loads((tmp_path / "rows.json").read_text())[0]
  flags += ["--checkpoint", tmp_path / "run"]
  linear.ctrl_c_at = [2]
  assert compare(*flags) == 130
  assert compare(*flags, "--resume") == 0
  resumed = json.loads((tmp_path / "rows.json").read_text())[0]
  for key in ("train_loss", "metric", "steps", "skipped", "loss_scale"):
    assert resumed[key] == unbroken[key]
  capsys.readouterr()
  assert compare(*flags, "--resume", "--seed", "3") == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "has seed 0, this run 3" in err


def test_resume_in_an_empty_directory_starts_from_the_beginning(linear, tmp_path):
  assert compare("--policies", "float32", "--checkpoint", tmp_path / "new", "--resume") == 0
  assert any((tmp_path / "new").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("job", "good"), [("digits", 0.97), ("text", 3.5)])
def test_the_default_run_is_good_under_every_policy(job, good, tmp_path):
  result = module("compare", "--job", job, "--json", str(tmp_path / "rows.json"))
  assert result.returncode == 0, result.stderr
  first, *others = json.loads((tmp_path / "rows.json").read_text())
  if job == "digits":
    assert all(row["metric"] >= good for row in (first, *others))
  else:
    assert all(row["metric"] <= good for row in (first, *others))
  near = 0.01 if job == "digits" else 0.03
  assert all(abs(row["metric"] - first["metric"]) <= near for row in others)
