"""Step time, memory and energy on a GPU, every peer and torch.amp in one run.

    python -m benchmarks.gpu --minutes 9 --out benchmarks/results

Each cell is a process of its own, so that one's memory is not another's; the next ones start and
trace while one compiles and measures, which a lock keeps to one at a time. The most telling cells
come first; when the minutes are over the script ends, and started again with the same --out it
goes on with the cells that are missing. `--tiny` tries it all on any machine.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import meters, report

COLUMNS = {
  "peer": "peer",
  "policy": "policy",
  "precision": "float32 matmuls",
  "kind": "batch is",
  "batch": "batch",
  "step_ms": "step ms",
  "spread": "slowest to fastest",
  "example_us": "us an example",
  "joules": "J a step",
  "peak_mib": "peak MiB",
  "error": "error",
}
_LATE = "not done after"
_TINY_BYTES = 2**24
TORCHAO = "torchao, compiled"
TORCH = ("torch, float32", "torch.amp", "torch.amp, compiled", TORCHAO)
FULL = ["gpt-124m", "llama-200m", "llama-200m-cudnn", "resnet-50", "vit-base", "lstm-2x1024"]
FULL += ["float8-gpt", "float8-llama", "optimizer-30m", "optimizer-1000m"]
TINY = ["gpt", "llama", "resnet", "float8", "optimizer-1m"]
HELD = (
  "float32",
  "bfloat16, to the nearest",
  "bfloat16, Kahan",
  "bfloat16, stochastic",
  "float32, states stochastic",
  "bfloat16 and states stochastic",
)
_OWN_KINDS = ("optimizer", "float8")
"""Kinds of cells that workloads of their own have, whose names begin so."""
KEY = ("workload", "kind", "peer", "policy", "precision")


def cells(names: list[str], seconds: float) -> list[dict[str, Any]]:
  """All cells, the most telling first: main peers on every workload, then the others."""
  from benchmarks.own import float8_rows
  from benchmarks.peers import peers

  bf16, f16 = "mixed_bfloat16", "mixed_float16"
  main = [peers.BY_HAND, peers.INSIDE]
  first = [peers.FLOAT32, *main, "torch.amp", peers.STEP]
  others = [name for name in peers.PEERS if name not in first]
  stages = [
    [("fixed", peer, bf16, "default") for peer in first],
    [("float8", row, "", "default") for row in [*float8_rows.ROWS, TORCHAO]],
    [("optimizer", row, "", "default") for row in HELD],
    [("fixed", peers.FLOAT32, bf16, "highest"), ("scatter", peers.FLOAT32, bf16, "default")],
    [("fixed", peer, f16, "default") for peer in ("by hand + DynamicScale", *main, "torch.amp")],
    [("fixed", peer, bf16, "default") for peer in ("jmp", "mpx", peers.HAIKU)],
    [("largest", peer, bf16, "default") for peer in (peers.FLOAT32, *main)],
    [("fixed", peer, bf16, "default") for peer in [*others, "torch.amp, compiled"]],
    [("fixed", "torch, float32", bf16, precision) for precision in ("default", "highest")],
    [("fixed", peer, f16, "default") for peer in [peers.STEP, *others]],
    [("largest", "torch.amp", bf16, "default")],
  ]
  found = [
    {"workload": name, **dict(zip(KEY[1:], cell, strict=True)), "seconds": seconds}
    for stage in stages
    for name in names
    for cell in stage
  ]
  return [cell for cell in _unique(found) if _possible(cell)]


def _unique(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
  return list({_key(cell): cell for cell in found}.values())


def _key(row: dict[str, Any]) -> tuple[str, ...]:
  return tuple(row[name] for name in KEY)


def _possible(cell: dict[str, Any]) -> bool:
  """Whether a cell's tool is installed, serves its policy and has this kind of figure."""
  from benchmarks import workloads
  from benchmarks.peers import peers

  own = next((kind for kind in _OWN_KINDS if cell["workload"].startswith(kind)), None)
  if own or cell["kind"] in _OWN_KINDS:
    installed = cell["peer"] != TORCHAO or _has_torchao(cell["workload"])
    return own == cell["kind"] and installed
  if cell["kind"] == "scatter":
    return cell["workload"].startswith("gpt")
  workload = {**workloads.FULL, **workloads.TINY}[cell["workload"]]()
  if cell["peer"] in TORCH:
    known = cell["workload"].startswith(("gpt", "vit", "resnet", "lstm"))
    return known and importlib.util.find_spec("torch") is not None
  wide = cell["peer"] in (peers.FLOAT32, peers.HAIKU_FLOAT32)
  if wide and workload.sizes.get("kernel") == "cudnn":
    return False  # it has no float32 form
  return peers.serves(peers.PEERS[cell["peer"]], cell["policy"], workload)


def _has_torchao(workload: str) -> bool:
  installed = all(importlib.util.find_spec(name) for name in ("torch", "torchao"))
  return installed and "llama" not in workload  # benchmarks/peers/torch_models.py has none


def run(
  cell: dict[str, Any],
  seconds: float,
  scratch: Path,
  limit: int | None = None,
  alone_s: int = 0,
) -> report.Row:
  """Measures a cell in a process of its own; a failure is a row that says so.

  Args:
    cell: what to measure.
    seconds: after so many it is given up.
    scratch: a folder for the lock of the card and for what the compiler has tuned: the same
      matmul is tuned once, so that no peer has the luck of a better draw.
    limit: bytes that the largest batch may take; those of the card otherwise.
    alone_s: seconds that it may hold the card; 0 for as long as it takes.
  """
  module = "torch_cell" if cell["peer"] in TORCH else "gpu_cell"
  given = {**cell, "compiled": cell["peer"].endswith("compiled"), "limit": limit}
  given |= {"lock": str(scratch / "lock"), "alone_s": alone_s}
  settings = {
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
    "JAX_TRACEBACK_FILTERING": "off",  # the last line is the error
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
  }
  command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(given)]
  try:
    done = subprocess.run(
      command,
      capture_output=True,
      text=True,
      timeout=seconds,
      check=False,
      env={**os.environ, **settings},
    )
  except subprocess.TimeoutExpired:
    return {**cell, "error": f"{_LATE} {seconds:.0f} s"}
  if done.returncode == -signal.SIGALRM:
    return {**cell, "error": f"held the card for {alone_s} s without an end"}
  if done.returncode:
    return {**cell, "error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
  return {**cell, "error": None, **json.loads(done.stdout.strip().splitlines()[-1])}


def shown(row: report.Row) -> report.Row:
  """A row in readable units."""
  peak = row.get("peak_bytes") or row.get("compiler_bytes")
  step, batch = row.get("step_ms"), row.get("batch")
  return {
    **row,
    "example_us": 1000 * step / batch if step and batch else None,
    "peak_mib": f"{peak / 2**20:.0f}" if peak else None,
  }


def markdown(rows: list[report.Row]) -> str:
  """A table for each workload, and the embedding's gradient beside its step."""
  parts = []
  for workload in dict.fromkeys(row["workload"] for row in rows):
    found = [row for row in rows if row["workload"] == workload]
    table = report.table([shown(r) for r in found if r["kind"] != "scatter"], COLUMNS)
    parts.append(f"## {workload}\n\n{table}\n")
    for row in found:
      if row["kind"] == "scatter" and not row["error"]:
        parts.append(
          f"The embedding's float32 gradient alone: {row['random_ms']:.3g} ms for random tokens, "
          f"{row['one_token_ms']:.3g} ms where all are the same, {row['matmul_ms']:.3g} ms as a "
          "matmul (openxla/xla#46225).\n"
        )
  return "\n".join(parts)


def _asked(cell: dict[str, Any], arguments: argparse.Namespace) -> bool:
  """Whether the command line asks for a cell: by its peer, its matmuls and its kind."""
  named = not arguments.peers or cell["peer"] in arguments.peers
  asked = (arguments.precision, arguments.kind)
  have = (cell["precision"], cell["kind"])
  return named and all(a in (None, b) for a, b in zip(asked, have, strict=True))


def main() -> None:
  """Measures what is missing from the results, until the minutes are over."""
  parser = argparse.ArgumentParser(description="Step time, memory and energy on a GPU.")
  parser.add_argument("--workload", nargs="+", help="full or tiny ones")
  parser.add_argument("--tiny", action="store_true", help="tiny workloads, on any machine")
  parser.add_argument("--minutes", type=float, default=9)
  parser.add_argument("--seconds", type=float, default=3, help="measured for each cell")
  parser.add_argument(
    "--cell-seconds", type=int, default=240, help="that a cell may hold the card, compiling and all"
  )
  parser.add_argument("--jobs", type=int, default=4, help="cells traced while one is measured")
  parser.add_argument("--peers", nargs="+", help="only cells of these")
  parser.add_argument("--precision", help="only cells with these float32 matmuls: default, highest")
  parser.add_argument("--kind", help="only cells of this kind: fixed, largest, float8, ...")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  ends = time.monotonic() + 60 * arguments.minutes
  names = arguments.workload or (TINY if arguments.tiny else FULL)
  path = arguments.out / "gpu.json"
  rows = report.rows_in(path)
  rows = [row for row in rows if not (row["error"] or "").startswith(_LATE)]
  done = {_key(row) for row in rows}
  wanted = [
    cell
    for cell in cells(names, arguments.seconds)
    if _key(cell) not in done and _asked(cell, arguments)
  ]
  limit = _TINY_BYTES if arguments.tiny else None
  scratch = Path(tempfile.gettempdir()) / "mpjax-gpu-cells"
  scratch.mkdir(exist_ok=True)

  def measured(cell: dict[str, Any]) -> report.Row | None:
    left = ends - time.monotonic()
    return run(cell, left, scratch, limit, arguments.cell_seconds) if left > 20 else None

  with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
    for row in pool.map(measured, wanted):
      if row is None:
        continue
      rows.append(row)
      print(json.dumps(row), file=sys.stderr, flush=True)
      report.write(
        "gpu",
        "On a GPU",
        "python -m benchmarks.gpu --minutes 9",
        meters.card(),
        rows,
        markdown(rows),
        arguments.out,
      )
  if len(rows) < len(done) + len(wanted):
    print("The minutes are over; start it again to go on.", file=sys.stderr)


if __name__ == "__main__":
  main()
