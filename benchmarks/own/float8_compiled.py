"""What an H100's compiler makes of float8 matmuls: how many there are, memory, bytes moved.

    python -m benchmarks.own.float8_compiled
    python -m benchmarks.own.float8_compiled --triton off

A GPT and a Llama of four layers, trained by AdamW. Planned are the float8 matmuls of the traced
step, compiled those of the program, be they cuBLAS's or Triton's: matmuls that share an operand, as
those of query, key and value, may have become one. Flax's rows have its float8
layers in bfloat16 by hand, direct and with a cast there and back (`Fp8DotGeneralOp`, which leaves
it to XLA to find the matmul in that). Needs `mpjax[gpu]` and no card.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks import compilers, report

TARGET = "h100"
MIB = 2**20


def measure(workload: str, row: str) -> report.Row:
  """Compiles a training step; returns its row."""
  import jax
  import optax

  from benchmarks.own import float8_rows
  from mpjax.inspect._compiled_text import float8_calls, moved
  from mpjax.inspect._float8 import float8_work

  cell = float8_rows.WORKLOADS[workload]
  model, loss_fn = float8_rows.ROWS[row](cell)
  tx = optax.adamw(1e-3)
  params, scales = jax.eval_shape(model.init, jax.random.key(0), cell.inputs)
  arguments = (params, scales, jax.eval_shape(tx.init, params), cell.inputs, cell.labels)
  step = float8_rows.step_of(loss_fn, tx)
  compiled = compilers.compile_for(TARGET, step, arguments)
  text = compiled.as_text()
  calls, widened = float8_calls(text)
  return {
    "workload": workload,
    "matmuls": row,
    "triton": "off" if "triton_gemm=false" in os.environ["XLA_FLAGS"] else "on",
    "planned": float8_work(jax.make_jaxpr(step)(*arguments)).matmuls,
    "compiled": calls,
    "widened": widened,
    "temp_mib": round(compiled.memory_analysis().temp_size_in_bytes / MIB),
    "gbytes": round(moved(text) / 1e9, 2),
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
  }


COLUMNS = {
  "workload": "workload",
  "matmuls": "matmuls in",
  "triton": "Triton's matmuls",
  "planned": "float8 matmuls planned",
  "compiled": "float8 calls compiled",
  "widened": "operands made 16-bit again",
  "temp_mib": "temp MiB",
  "gbytes": "GB moved",
  "date": "date",
}


def main() -> None:
  """Compiles every row; adds them to the results."""
  parser = argparse.ArgumentParser(description="What an H100's compiler makes of float8 matmuls.")
  parser.add_argument("--triton", choices=("on", "off"), default="on", help="its matmuls")
  parser.add_argument("--matmuls", nargs="+", help="rows; all that are installed otherwise")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  if arguments.triton == "off":
    os.environ["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"
  compilers.prepare(TARGET)

  from benchmarks.own import float8_rows

  rows = []
  for workload in float8_rows.WORKLOADS:
    for row in arguments.matmuls or float8_rows.ROWS:
      print(f"{workload}: {row} ...", file=sys.stderr, flush=True)
      rows.append(measure(workload, row))
  old = report.rows_in(arguments.out / "float8_compiled.json")
  found = report.merged(old, rows, ("workload", "triton", "matmuls"))
  rows = [found[key] for key in sorted(found, key=lambda key: key[:2])]
  report.write(
    "float8_compiled",
    "Float8 matmuls, compiled for an H100",
    "python -m benchmarks.own.float8_compiled",
    TARGET,
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
