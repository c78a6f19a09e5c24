"""The compiled train step of every peer: memory, converts, operations and bytes moved.

    python -m benchmarks.peers.compiled --target h100 --workload gpt-small

The figures are the compiler's own (`memory_analysis()`, `cost_analysis()`, the program's text),
exact and the same every time. Rows are added to results/compiled.json, one for each target,
workload, policy and peer, and results/compiled.md is written anew from all of them.
"""

import argparse
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

MIB = 2**20
KEY = ("target", "workload", "policy", "peer")
COLUMNS = {
  "peer": "peer",
  "temp_mib": "temp MiB",
  "temp_ratio": "to by hand",
  "argument_mib": "arguments MiB",
  "converts": "converts",
  "kernels": "kernels",
  "kernels_ratio": "to by hand",
  "gflops": "matmul GFLOP",
  "gbytes": "GB moved",
  "bytes_ratio": "to by hand",
  "device_gbytes": "of device memory",
  "time": "estimated time",
  "time_ratio": "to by hand",
  "low_share": "matmuls in 16 bits",
}
_TIMES = {"estimated_ms": "ms", "estimated_mcycles": "Mcycles"}
COMPILER = {"cpu": "jaxlib", "cuda": "jax-cuda12-plugin", "tpu": "libtpu"}


def measure(target: str, workload: Any, policy: str, peer: Any) -> report.Row:
  """Compiles one peer's step; returns its row."""
  import jax
  import optax

  from benchmarks import harness
  from benchmarks.peers import flops

  training = peer.build(workload, policy, optax.adamw(1e-3), harness.Scaling())
  state = jax.eval_shape(training.init, jax.random.key(0), workload.inputs)
  arguments = (state, workload.inputs, workload.labels)
  began = time.perf_counter()
  compiled = compilers.compile_for(target, training.step, arguments)
  operations = flops.contractions(training.step, *arguments)
  row = {
    "target": target,
    "workload": workload.name,
    "batch": workload.inputs.shape[0],
    "policy": policy,
    "peer": peer.name,
    "jax": jax.__version__,
    "compiler": compiler(target),
    "flags": os.environ["XLA_FLAGS"],
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
    "low_share": flops.low_share(operations),
    "flops": operations.total(),
  }
  return {
    **row,
    **compilers.figures(compiled, target),
    "seconds": round(time.perf_counter() - began, 1),
  }


def compiler(target: str) -> str:
  """The package that holds a target's compiler, with its version."""
  package = COMPILER[compilers.PLATFORM[target]]
  return f"{package} {metadata.version(package)}"


def shown(rows: list[report.Row]) -> list[report.Row]:
  """The rows of one cell in readable units, with ratios to the model written by hand."""
  from benchmarks.peers import peers

  hand = next((row for row in rows if row["peer"] == peers.BY_HAND), None)
  return [_shown(row, hand) for row in rows]


def _shown(row: report.Row, hand: report.Row | None) -> report.Row:
  def ratio(key: str) -> str | None:
    return f"{row[key] / hand[key]:.3f}" if hand and key in hand else None

  device = row.get("device_bytes")  # results of before it was read off have none
  time = next((key for key in _TIMES if key in row), None)  # nor of the time
  return {
    "peer": row["peer"],
    "temp_mib": f"{row['temp_bytes'] / MIB:.0f}",
    "temp_ratio": ratio("temp_bytes"),
    "argument_mib": f"{row['argument_bytes'] / MIB:.0f}",
    "converts": row["converts"],
    "kernels": row.get("kernels"),  # results of before they were counted have none
    "kernels_ratio": ratio("kernels") if "kernels" in row else None,
    "gflops": f"{row['flops'] / 1e9:.0f}",
    "gbytes": f"{row['bytes_moved'] / 1e9:.2f}",
    "bytes_ratio": ratio("bytes_moved"),
    "device_gbytes": f"{device / 1e9:.2f}" if device else None,
    "time": f"{row[time]:.2f} {_TIMES[time]}" if time else None,
    "time_ratio": ratio(time) if time and hand and time in hand else None,
    "low_share": f"{row['low_share']:.1%}",
  }


def markdown(rows: list[report.Row]) -> str:
  """A summary, and a table for every target, workload and policy."""
  cells: dict[tuple[str, ...], list[report.Row]] = {}
  for row in rows:
    cells.setdefault(tuple(row[key] for key in KEY[:3]), []).append(row)
  parts = [summary(cells) + "\n"]
  for (target, workload, policy), found in cells.items():
    parts.append(f"## {target}, {workload} (batch {found[0]['batch']}), {policy}\n")
    parts.append("; ".join(sorted({_made(row) for row in found})) + "\n")
    parts.append(report.table(shown(found), COLUMNS) + "\n")
  return "\n".join(parts)


def summary(cells: dict[tuple[str, ...], list[report.Row]]) -> str:
  """One line for each target, workload and policy, one column for each peer."""
  found = {row["peer"] for rows in cells.values() for row in rows}
  names = [name for name in _summarized() if name in found]
  lines = [
    {"cell": ", ".join(cell), **{row["peer"]: _short(row) for row in rows}}
    for cell, rows in cells.items()
  ]
  return report.table(
    lines, {"cell": "MiB beyond the arguments / GB moved"} | dict(zip(names, names, strict=True))
  )


def _summarized() -> list[str]:
  """The peers of the summary: one way of using each tool."""
  from benchmarks.peers import peers

  twice = {peers.HAIKU_FLOAT32, peers.OUTSIDE, peers.SCALED, peers.FOLLOWS, peers.STATISTICS}
  return [name for name in peers.PEERS if name not in twice]


def _short(row: report.Row) -> str:
  return f"{row['temp_bytes'] / MIB:.0f} / {row['bytes_moved'] / 1e9:.3g}"


def _made(row: report.Row) -> str:
  how = f"{row['date']}, JAX {row['jax']}, {row['compiler']}"
  return f"{how}, `{row['flags']}`" if row.get("flags") else how


def merge(old: list[report.Row], new: list[report.Row]) -> list[report.Row]:
  """Old rows, those that were measured again replaced, in the order of the peers' table."""
  from benchmarks.peers import peers

  found = report.merged(old, new, KEY)
  names = list(peers.PEERS)
  ordered = sorted(found, key=lambda key: (*map(str, key[:3]), names.index(key[3])))
  return [found[key] for key in ordered]


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description="What compilers say of every peer's train step.")
  parser.add_argument("--target", choices=compilers.TARGETS, default="cpu")
  parser.add_argument("--workload", nargs="+", default=["gpt-small"], help="full or tiny ones")
  parser.add_argument(
    "--policy", nargs="+", choices=("mixed_bfloat16", "mixed_float16"), default=["mixed_bfloat16"]
  )
  parser.add_argument("--peers", nargs="+", help="names; all that are installed otherwise")
  parser.add_argument("--batch", type=int, help="another batch size than the workload's own")
  parser.add_argument("--name", default="compiled", help="the name of the results")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  return parser.parse_args()


def main() -> None:
  """Measures peers on workloads; adds their rows to the results."""
  arguments = parse()
  compilers.prepare(arguments.target)

  from benchmarks import workloads
  from benchmarks.peers import peers

  sizes = {} if arguments.batch is None else {"batch": arguments.batch}
  for name in arguments.workload:
    workload = {**workloads.FULL, **workloads.TINY}[name](**sizes)
    for policy in arguments.policy:
      for peer in peers.chosen(arguments.peers, policy, workload):
        print(f"{arguments.target} {name} {policy} {peer.name} ...", file=sys.stderr, flush=True)
        row = measure(arguments.target, workload, policy, peer)
        old = report.rows_in(arguments.out / f"{arguments.name}.json")
        rows = merge(old, [row])
        named = "" if arguments.name == "compiled" else f" --name {arguments.name}"
        command = (
          "python -m benchmarks.peers.compiled --target TARGET --workload WORKLOAD --policy POLICY"
        )
        report.write(
          arguments.name,
          "Compiled train steps",
          command + named,
          "compilers of the targets named in each heading",
          rows,
          markdown(rows),
          arguments.out,
        )


if __name__ == "__main__":
  main()
