"""Memory of the compiled train step, mpjax beside float32 and beside Flax's `dtype=` by hand.

    python -m benchmarks.compiled_memory --target h100

The figures are the compiler's own (`compiled.memory_analysis()`), exact and the same every time.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import compilers

MIB = 2**20


def measure(target: str, case_name: str, policy: str, variant: str) -> dict[str, Any]:
  """Compiles one variant's step; returns the row that `--json` writes."""
  import jax

  from benchmarks import steps

  case = steps.CASES[case_name](variant, policy)
  began = time.perf_counter()
  compiled = compilers.compile_for(target, case.step, case.arguments)
  memory = compiled.memory_analysis()
  return {
    "target": target,
    "model": case_name,
    "policy": policy,
    "variant": variant,
    "jax": jax.__version__,
    "temp_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "compile_seconds": round(time.perf_counter() - began, 1),
  }


def markdown(rows: list[dict[str, Any]]) -> str:
  """A table of rows of one target and model; the ratio is to the model written by hand."""
  from benchmarks import steps

  (by_hand,) = [row["temp_bytes"] for row in rows if row["variant"] == steps.BY_HAND]
  lines = [
    f"{rows[0]['model']}, {rows[0]['policy']}, {rows[0]['target']}, JAX {rows[0]['jax']}\n",
    "| variant | temp MiB | to by hand | arguments MiB |",
    "|---|---|---|---|",
  ]
  for row in rows:
    temp, argument = row["temp_bytes"], row["argument_bytes"]
    lines.append(
      f"| {row['variant']} | {temp / MIB:.0f} | {temp / by_hand:.3f} | {argument / MIB:.0f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """Measures every variant of a model on a target; prints a table, and JSON if asked for."""
  parser = argparse.ArgumentParser(description="Memory of the compiled train step.")
  parser.add_argument("--target", choices=compilers.TARGETS, default="cpu")
  parser.add_argument("--model", choices=("transformer", "resnet"), default="transformer")
  parser.add_argument(
    "--policy", choices=("mixed_bfloat16", "mixed_float16"), default="mixed_bfloat16"
  )
  parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
  arguments = parser.parse_args()
  compilers.prepare(arguments.target)

  from benchmarks import steps

  rows = []
  for variant in steps.VARIANTS:
    print(f"compiling {variant} ...", file=sys.stderr)
    rows.append(measure(arguments.target, arguments.model, arguments.policy, variant))
  print(markdown(rows))
  if arguments.json:
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
  main()
