"""The command line: ``python -m mpjax compare`` and ``cost``, or ``mpjax compare``.

Every failure that is none of mpjax's own ends in one line on stderr and exit status 2, among them
an output that nobody reads any more; Ctrl-C ends with what there is and exit status 130.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax

from mpjax import Policy
from mpjax._core.ctrl_c import INTERRUPTED, handled_by
from mpjax._demo.elsewhere import elsewhere
from mpjax._demo.flags import count, flag, local_path
from mpjax._demo.jobs import Job, UsageError
from mpjax.inspect._targets import TARGETS
from mpjax.plot import save_curves

if TYPE_CHECKING:
  from mpjax._demo.compare import Comparison

_USAGE = 2
_LONGEST = 1000
_DEFAULT_POLICIES = "float32,mixed_bfloat16,mixed_float16"
_DESCRIPTION = """\
Trains one model from one seed under several precision policies, on real data that needs no
download, and shows what precision did to loss, held-out metric, memory and time.
"""
_EPILOG = """\
jobs:
  digits  a residual network with BatchNorm (Flax Linen) on scikit-learn's 1,797 handwritten digits
  text    a byte-level transformer (Flax NNX) on the source text of Python's standard library

examples:
  mpjax compare
  mpjax compare --policies "float32;p=f32,c=bf16,o=bf16" --json rows.json --plot curves.png
  mpjax compare --job text --steps 200 --checkpoint run1
  mpjax compare --job text --steps 200 --checkpoint run1 --resume
"""


_COST_POLICIES = "float32,mixed_bfloat16,mixed_float16"
_COST_DESCRIPTION = """\
Compiles a step of your own under several policies and shows the memory, operations and bytes moved
that the compiler states; for a GPU or TPU that need not be there with --target. Nothing is run.
"""
_COST_EPILOG = """\
CASE names a function without arguments that returns a tuple: the step, then its arguments, arrays
or jax.ShapeDtypeStruct. A step with a parameter `policy` is called with each policy and applies it
by itself; any other runs under mpjax.autocast.

examples:
  mpjax cost my_model:train_case --donate 0
  mpjax cost my_model:train_case --policies float32,mixed_bfloat16 --target tpu:v5e
  mpjax cost my_model:train_case --target gpu:h100 --python /envs/gpu/bin/python --json rows.json
"""


@dataclass(frozen=True)
class _Defaults:
  """What a job is trained with unless flags say otherwise, chosen for two CPU cores."""

  steps: int
  batch_size: int


_JOBS = {"digits": _Defaults(steps=400, batch_size=64), "text": _Defaults(steps=400, batch_size=16)}


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(_USAGE, f"{self.prog}: error: {_one_line(message)}\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: The arguments after the program's name; those of the process by default.

  Returns:
    The exit status: 0, 2 for what the person at the shell can put right, 130 after Ctrl-C.
  """
  try:
    try:
      args = _parser().parse_args(argv)
      return args.run(args)
    finally:
      if sys.stdout is not None:  # None where the shell closed it
        sys.stdout.flush()
  except UsageError as error:
    return _ended(f"error: {_one_line(str(error))}", _USAGE)
  except OSError as error:
    return _ended(f"error: reading or writing failed: {_one_line(str(error))}.", _USAGE)
  except KeyboardInterrupt:
    return _ended("interrupted", INTERRUPTED)


def program() -> NoReturn:
  """The process of the command line: after Ctrl-C it ends at once.

  An interpreter that ends in order would wait for a compiler that is still at work.
  """
  status = main()
  if status == INTERRUPTED:
    os._exit(status)
  raise SystemExit(status)


def _ended(message: str, status: int) -> int:
  """Says why it ends, as far as somebody listens; a closed pipe must not fail Python's own end."""
  with contextlib.suppress(OSError):
    if sys.stderr is not None:  # print would take stdout instead
      print(f"mpjax: {message}", file=sys.stderr, flush=True)
  for stream in filter(None, (sys.stdout, sys.stderr)):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  return status


def parse_policies(text: str) -> dict[str, Policy]:
  """Reads a list of policies: by commas, and by semicolons around specs that hold commas.

  Args:
    text: Presets and spec strings.

  Returns:
    The policies by the words that they were given in, in order.

  Raises:
    ValueError: If a spec cannot be read, or two mean the same policy.

  Example:
    >>> list(parse_policies("float32, mixed_bfloat16; p=f32,c=f16,o=f32"))
    ['float32', 'mixed_bfloat16', 'p=f32,c=f16,o=f32']
  """
  groups = [[group] if "=" in group else group.split(",") for group in text.split(";")]
  specs = ["".join(spec.split()) for group in groups for spec in group]
  policies: dict[str, Policy] = {}
  for spec in filter(None, specs):
    policy = Policy.parse(spec)
    for other, known in policies.items():
      if known == policy:
        raise ValueError(f"Policies must differ. Got {other} and {spec}, both {policy}. Drop one.")
    policies[spec] = policy
  if not policies:
    raise ValueError(f"There must be at least one policy. Got {text!r}. Name for example float32.")
  return policies


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="mpjax",
    description="Mixed precision for JAX, Flax and optax.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="version", version=f"mpjax {_version()}")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  compare = commands.add_parser(
    "compare",
    help="train the same model under several policies and compare",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  compare.set_defaults(run=_compare)
  _add_compare_flags(compare)
  cost = commands.add_parser(
    "cost",
    help="memory and cost of your step, here or on a GPU or TPU that is not there",
    description=_COST_DESCRIPTION,
    epilog=_COST_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cost.set_defaults(run=_cost)
  _add_cost_flags(cost)
  return parser


def _version() -> str:
  try:
    return version("mpjax")
  except PackageNotFoundError:
    return "(a checkout that is not installed)"


def _add_compare_flags(parser: argparse.ArgumentParser) -> None:
  def default(name: str) -> str:
    return ", ".join(f"{getattr(job, name)} for {key}" for key, job in _JOBS.items())

  add = parser.add_argument
  add("--job", choices=sorted(_JOBS), default="digits", help="what to train (digits)")
  add(
    "--policies",
    type=flag(parse_policies),
    default=_DEFAULT_POLICIES,
    metavar="SPECS",
    help=f"presets or spec strings; ';' between specs that hold commas ({_DEFAULT_POLICIES})",
  )
  add("--steps", type=count(1), metavar="N", help=f"training steps ({default('steps')})")
  add("--batch-size", type=count(1), metavar="N", help=f"examples a step ({default('batch_size')})")
  add(
    "--seed",
    type=count(0, 2**32 - 1),
    default=0,
    metavar="N",
    help="initial values and batches (0)",
  )
  add("--json", type=local_path, metavar="FILE", help="write the rows of the table as JSON")
  add(
    "--plot",
    type=local_path,
    metavar="FILE.png",
    help="draw losses, held-out metric and loss scales",
  )
  add("--checkpoint", type=local_path, metavar="DIR", help="save the state ten times a run")
  add("--resume", action="store_true", help="go on from the checkpoints in DIR, if it has any")


def _add_cost_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("case", metavar="CASE", help="module:function that makes the step and its arguments")
  add(
    "--policies",
    type=flag(parse_policies),
    default=_COST_POLICIES,
    metavar="SPECS",
    help=f"presets or spec strings; ';' between specs that hold commas ({_COST_POLICIES})",
  )
  add("--target", choices=TARGETS, help="compile for this device instead of the one present")
  add("--python", metavar="FILE", help="an interpreter that has JAX with the target's compiler")
  add(
    "--donate",
    type=count(0),
    action="append",
    default=[],
    metavar="N",
    help="the position of an argument that the step may overwrite; may be given again",
  )
  add("--json", type=local_path, metavar="FILE", help="write the rows of the table as JSON")


def _compare(args: argparse.Namespace) -> int:
  """The command `compare`: checks everything that can be wrong, then trains."""
  _check_files(args)
  _check_backend()
  job = _load_job(args)
  # Here and not above: `--help` need not wait for Orbax.
  from mpjax._demo.compare import Plan, compare
  from mpjax._demo.progress import Progress
  from mpjax._demo.result_table import format_report

  defaults = _JOBS[args.job]
  plan = Plan(args.steps or defaults.steps, args.batch_size or defaults.batch_size, args.seed)
  if plan.batch_size > job.train_size:
    raise UsageError(
      f"--batch-size must be at most {job.train_size}, the training examples of {job.name}. "
      f"Got {plan.batch_size}."
    )
  progress = Progress(sys.stderr, max(map(len, args.policies)))
  report = compare(job, args.policies, plan, progress, args.checkpoint)
  if report.results:
    print(format_report(report, shutil.get_terminal_size().columns))
  if args.json is not None:
    _write_json(args.json, report.rows())
  if args.plot is not None and report.results:
    _write_plot(args.plot, report)
  if report.interrupted:
    complete = sum(result.metric is not None for result in report.results)
    print(f"mpjax: interrupted: {complete} of {len(args.policies)} policies done", file=sys.stderr)
    return INTERRUPTED
  return 0


def _cost(args: argparse.Namespace) -> int:
  """The command `cost`."""
  if args.json is not None:
    _check_writable("--json", args.json)
  if args.python is not None and args.target is None:
    raise UsageError("--python is the interpreter that compiles for --target. Name a target too.")
  from mpjax._demo.cost_command import report_for

  if args.target is None:
    report = elsewhere(lambda: report_for(args))
  else:  # in another process and a folder of its own, which are to be left in order
    with handled_by(signal.default_int_handler):
      report = report_for(args)
  print(report)
  if args.json is not None:
    _write_json(args.json, report.to_rows())
  return 0


def _load_job(args: argparse.Namespace) -> Job:
  if args.job == "digits":
    from mpjax._demo.digits import Digits

    return Digits()
  from mpjax._demo.text import Text

  return Text()


def _check_backend() -> None:
  try:
    jax.devices()
  except RuntimeError as error:
    raise UsageError(f"JAX must have a device to compute on. {error}") from error


def _check_files(args: argparse.Namespace) -> None:
  if args.resume and args.checkpoint is None:
    raise UsageError("--resume needs --checkpoint DIR, the directory to go on from.")
  if args.json is not None:
    _check_writable("--json", args.json)
  if args.plot is not None:
    _check_plot(args.plot)
  if args.checkpoint is not None:
    _check_directory(args.checkpoint, resume=args.resume)


def _check_plot(path: Path) -> None:
  if importlib.util.find_spec("matplotlib") is None:
    raise UsageError("--plot needs matplotlib: pip install matplotlib")
  if path.suffix.lower() not in (".png", ".pdf", ".svg"):
    raise UsageError(f"--plot must name a .png, .pdf or .svg file. Got {path}.")
  _check_writable("--plot", path)


def _check_writable(flag: str, path: Path) -> None:
  """Opens a file for writing without touching what it holds."""
  try:
    existed = path.exists()
    with path.open("ab"):
      pass
  except OSError as error:
    raise UsageError(
      f"{flag} must name a file that can be written. {_reason(error, path)}"
    ) from error
  if not existed:
    path.unlink()


def _check_directory(path: Path, *, resume: bool) -> None:
  if importlib.util.find_spec("orbax.checkpoint") is None:
    raise UsageError("--checkpoint needs Orbax: pip install orbax-checkpoint")
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".mpjax-{os.getpid()}"
    probe.touch()
    probe.unlink()
    empty = not any(path.iterdir())
  except OSError as error:
    raise UsageError(
      f"--checkpoint must name a directory that can be written. {_reason(error, path)}"
    ) from error
  if not (empty or resume):
    raise UsageError(
      f"--checkpoint must name an empty directory, unless --resume is given. Got {path}, "
      "which holds files. Add --resume or name another."
    )


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
  try:
    path.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8")
  except OSError as error:
    raise UsageError(f"--json could not be written. {_reason(error, path)}") from error


def _write_plot(path: Path, report: Comparison) -> None:
  metric = report.metric
  held_out = [
    None if result.metric is None else metric.factor * result.metric for result in report.results
  ]
  unit = f", {metric.unit}" if metric.unit else ""
  try:
    save_curves(
      [result.curve for result in report.results],
      path,
      title=f"{report.job}: {report.plan.steps} steps of {report.plan.batch_size}",
      held_out=(f"{metric.name.replace('_', ' ')}{unit}", held_out),
    )
  except OSError as error:
    raise UsageError(f"--plot could not be written. {_reason(error, path)}") from error


def _reason(error: OSError, path: Path) -> str:
  return f"{_one_line(str(path))[:200]}: {error.strerror or error}."


def _one_line(message: str) -> str:
  line = " ".join(message.split())
  return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."
