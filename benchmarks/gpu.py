"""Step time, memory and energy on a GPU, every peer and torch.amp in one run.

    python -m benchmarks.gpu --minutes 9 --out benchmarks/results

Each cell is a process of its own, so that one's memory is not another's. The most telling cells
come first; when the minutes are over the script ends, and started again with the same --out it
goes on with the cells that are missing. `--tiny` tries it all on any machine.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
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
TORCH = ("torch, float32", "torch.amp", "torch.amp, compiled")
KEY = ("workload", "kind", "peer", "policy", "precision")


def cells(names: list[str], seconds: float) -> list[dict[str, Any]]:
  """All cells, the most telling first: main peers on every workload, then the others."""
  from benchmarks import peers

  main = [peers.BY_HAND, peers.INSIDE]
  others = [name for name in peers.PEERS if name not in (peers.FLOAT32, *main)]
  stages = [
    [("fixed", peers.FLOAT32, "mixed_bfloat16", precision) for precision in ("default", "highest")]
    + [("fixed", peer, "mixed_bfloat16", "default") for peer in [*main, "torch.amp"]],
    [("scatter", peers.FLOAT32, "mixed_bfloat16", "default")]
    + [("fixed", peer, "mixed_float16", "default") for peer in [*main, "torch.amp"]]
    + [("fixed", "by hand + DynamicScale", "mixed_float16", "default")]
    + [("fixed", "torch, float32", "mixed_bfloat16", p) for p in ("default", "highest")],
    [("fixed", peer, "mixed_bfloat16", "default") for peer in others]
    + [("fixed", "torch.amp, compiled", "mixed_bfloat16", "default")],
    [("fixed", peer, "mixed_float16", "default") for peer in others],
    [
      ("largest", peer, "mixed_bfloat16", "default") for peer in (peers.FLOAT32, *main, "torch.amp")
    ],
  ]
  found = [
    {"workload": name, **dict(zip(KEY[1:], cell, strict=True)), "seconds": seconds}
    for stage in stages
    for name in names
    for cell in stage
  ]
  return [cell for cell in _unique(found) if _possible(cell)]


def _unique(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
  return list({_key(cell): cell for cell in reversed(found)}.values())[::-1]


def _key(row: dict[str, Any]) -> tuple[str, ...]:
  return tuple(row[name] for name in KEY)


def _possible(cell: dict[str, Any]) -> bool:
  """Whether a cell's tool is installed, serves its policy and has this kind of figure."""
  from benchmarks import peers, workloads

  if cell["kind"] == "scatter":
    return cell["workload"].startswith("gpt")
  if cell["peer"] in TORCH:
    return importlib.util.find_spec("torch") is not None
  workload = {**workloads.FULL, **workloads.TINY}[cell["workload"]]()
  return peers.serves(peers.PEERS[cell["peer"]], cell["policy"], workload)


def run(cell: dict[str, Any], seconds: float, limit: int | None = None) -> report.Row:
  """Measures a cell in a process of its own; a failure is a row that says so.

  Args:
    cell: what to measure.
    seconds: after so many it is given up.
    limit: bytes that the largest batch may take; those of the card otherwise.
  """
  module = "torch_cell" if cell["peer"] in TORCH else "gpu_cell"
  given = {**cell, "compiled": cell["peer"].endswith("compiled"), "limit": limit}
  command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(given)]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
  except subprocess.TimeoutExpired:
    return {**cell, "error": f"{_LATE} {seconds:.0f} s"}
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


def main() -> None:
  """Measures what is missing from the results, until the minutes are over."""
  parser = argparse.ArgumentParser(description="Step time, memory and energy on a GPU.")
  parser.add_argument("--workload", nargs="+", help="full or tiny ones")
  parser.add_argument("--tiny", action="store_true", help="tiny workloads, on any machine")
  parser.add_argument("--minutes", type=float, default=9)
  parser.add_argument("--seconds", type=float, default=3, help="measured for each cell")
  parser.add_argument("--peers", nargs="+", help="only cells of these")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  ends = time.monotonic() + 60 * arguments.minutes
  names = arguments.workload or (
    ["gpt", "resnet"] if arguments.tiny else ["gpt-124m", "resnet-50", "vit-base", "lstm-2x1024"]
  )
  path = arguments.out / "gpu.json"
  rows = report.rows_in(path)
  rows = [row for row in rows if not (row["error"] or "").startswith(_LATE)]
  done = {_key(row) for row in rows}
  for cell in cells(names, arguments.seconds):
    left = ends - time.monotonic()
    if _key(cell) in done or (arguments.peers and cell["peer"] not in arguments.peers):
      continue
    if left < 20:
      print("The minutes are over; start it again to go on.", file=sys.stderr)
      break
    rows.append(run(cell, left, _TINY_BYTES if arguments.tiny else None))
    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report.write(
      "gpu",
      "On a GPU",
      "python -m benchmarks.gpu --minutes 9",
      meters.card(),
      rows,
      markdown(rows),
      arguments.out,
    )


if __name__ == "__main__":
  main()
