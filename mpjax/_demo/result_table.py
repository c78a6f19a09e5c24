"""The table at the end of `mpjax compare`."""

from __future__ import annotations

from mpjax._demo.compare import Comparison, Result
from mpjax.inspect._report import Table

_UNKNOWN = "-"
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def format_report(report: Comparison) -> str:
  """Prints a report as a table, one row a policy, and what its columns mean."""
  header = ["policy", "par/comp/out", "steps", "skips", "scale", "loss", *_metric_header(report)]
  header += ["args MiB", "temp MiB", "step ms", "ratio", "compile s"]
  rows = [_cells(report, result) for result in report.results]
  notes = [
    f"{report.job}: {report.plan.steps} steps of {report.plan.batch_size}, "
    f"seed {report.plan.seed}. loss: mean of the last applied training steps; "
    f"{report.metric.name.replace('_', ' ')}: on held-out data.",
    "args, temp: memory of the compiled step, as the compiler states it; "
    "ratio: step time to the first row's.",
  ]
  return str(Table(header, rows, align="<<>", notes=notes))


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
  return "/".join(_SHORT[name] for name in names)


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
