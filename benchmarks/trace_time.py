"""Time to trace the autocast train step, as a ratio to the plain one.

    python -m benchmarks.trace_time

Each repetition clears JAX's caches, builds the step anew and traces it once for each variant, in
turn; what is compared are medians over the repetitions of one run. Tracing has one thread, so
processor time is its time, whatever else the machine does.
"""

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import compilers

compilers.prepare("cpu")


def trace_seconds(variant: str, layers: int) -> float:
  """Processor seconds of one `jit(step).trace` with no cache warm."""
  import jax

  from benchmarks import steps

  case = steps.transformer_case(variant, layers=layers)
  jax.clear_caches()
  gc.collect()
  began = time.process_time()
  jax.jit(case.step).trace(*case.arguments)
  return time.process_time() - began


def measure(layers: int, repetitions: int) -> dict[str, Any]:
  """Traces the plain and the autocast step in turn; returns the row that `--json` writes."""
  import jax

  from benchmarks import steps

  variants = (steps.FLOAT32, steps.LOSS_INSIDE, steps.LOSS_OUTSIDE)
  seconds: dict[str, list[float]] = {variant: [] for variant in variants}
  for variant in variants:  # imports and the allocator warm up here
    trace_seconds(variant, layers=1)
  for _ in range(repetitions):
    for variant in variants:
      seconds[variant].append(trace_seconds(variant, layers))
  plain, inside, outside = (statistics.median(seconds[variant]) for variant in variants)
  return {
    "layers": layers,
    "jax": jax.__version__,
    "repetitions": repetitions,
    "plain_seconds": round(plain, 3),
    "autocast_seconds": round(inside, 3),
    "ratio": round(inside / plain, 2),
    "ratio_loss_outside": round(outside / plain, 2),
  }


def main() -> None:
  """Measures each depth; prints a table, and JSON if asked for."""
  parser = argparse.ArgumentParser(description="Time to trace the autocast train step.")
  parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
  parser.add_argument("--repetitions", type=int, default=7)
  parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
  arguments = parser.parse_args()
  rows = [measure(layers, arguments.repetitions) for layers in arguments.layers]
  print(f"JAX {rows[0]['jax']}, {os.cpu_count()} cores, medians of {arguments.repetitions}\n")
  print("| layers | plain s | autocast s | ratio, whole loss inside | ratio, loss outside |")
  print("|---|---|---|---|---|")
  for row in rows:
    print(
      f"| {row['layers']} | {row['plain_seconds']:.2f} | {row['autocast_seconds']:.2f} "
      f"| {row['ratio']:.2f} | {row['ratio_loss_outside']:.2f} |"
    )
  if arguments.json:
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
  main()
