"""The table at the end of `mpjax compare`."""

from __future__ import annotations

import textwrap

from mpjax._demo.compare import Comparison, Result
from mpjax.inspect._report import Table

_UNKNOWN = "-"
_DTYPES_FIT = 79
_WIDEST_NOTE = 120
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def format_report(report: Comparison, width: int) -> str:
  """Prints a report as a table, one row a policy, and what its columns mean.

  Where the terminal is too narrow for one table it is two: what came out, and what it took.

  Args:
    report: What came of the run.
    width: The columns of the terminal.
  """
  header = ["policy", "par/comp/out", "steps", "skips", "scale", "loss", *_metric_header(report)]
  header += ["args MiB", "temp MiB", "step ms", "ratio", "compile s"]
  rows = [_cells(report, result) for result in report.results]
  whole = str(Table(header, rows, align="<<>"))
  parts = [whole] if _width(whole) <= width else [_part(header, rows, p) for p in _parts(width)]
  return "\n\n".join([*parts, *_notes(report, width)])


def _width(text: str) -> int:
  return max(map(len, text.splitlines()))


def _parts(width: int) -> list[list[int]]:
  """The columns of two tables; the dtypes, which a policy says itself, only where there is room."""
  return [[0, *range(2, 8)], [0, 1, *range(8, 13)] if width >= _DTYPES_FIT else [0, *range(8, 13)]]


def _part(header: list[str], rows: list[list[str]], columns: list[int]) -> str:
  picked = [[row[column] for column in columns] for row in [header, *rows]]
  return str(Table(picked[0], picked[1:], align="<<>" if 1 in columns else "<>"))


def _notes(report: Comparison, width: int) -> list[str]:
  notes = (
    f"{report.job}: {report.plan.steps} steps of {report.plan.batch_size}, "
    f"seed {report.plan.seed}. loss: mean of the last applied training steps; "
    f"{report.metric.name.replace('_', ' ')}: on held-out data.",
    "args, temp: memory of the compiled step, as the compiler states it, which for a CPU says "
    "nothing of a GPU's (mpjax cost --target asks for that); "
    "ratio: step time to the first row's.",
  )
  return ["\n".join(textwrap.fill(note, min(width, _WIDEST_NOTE)) for note in notes)]


def _metric_header(report: Comparison) -> list[str]:
  return [report.metric.name.replace("_", " "), "diff"]


def _cells(report: Comparison, result: Result) -> list[str]:
  first = report.results[0]
  return [
    result.curve.label,
    _dtypes(result),
    _steps(report, result),
    str(result.skipped),
    f"{result.loss_scale:.8g}",
    f"{result.train_loss:.4f}",
    *_metric(report, result),
    _size(result.argument_bytes),
    _size(result.temp_bytes),
    f"{result.step_ms:.1f}",
    f"{result.step_ms / first.step_ms:.2f}x",
    f"{result.compile_seconds:.1f}",
  ]


def _dtypes(result: Result) -> str:
  policy = result.policy
  names = (policy.param_dtype.name, policy.compute_dtype.name, policy.output_dtype.name)
  matmuls = f"+{policy.matmul_format}" if policy.matmul_format else ""
  return "/".join(_SHORT[name] for name in names) + matmuls


def _steps(report: Comparison, result: Result) -> str:
  planned = report.plan.steps
  return str(planned) if result.steps == planned else f"{result.steps}/{planned}"


def _metric(report: Comparison, result: Result) -> list[str]:
  first = report.results[0].metric
  if result.metric is None:
    return [_UNKNOWN, _UNKNOWN]
  shown = report.metric.show(result.metric)
  if first is None or result is report.results[0]:
    return [shown, _UNKNOWN]
  return [shown, report.metric.show_difference(result.metric - first)]


def _size(size: int | None) -> str:
  return _UNKNOWN if size is None else f"{size / 2**20:.2f}"
