"""The optimizer's step alone as compiled for an H100 or a v5e, by how parameters are held.

    python -m benchmarks.own.rounding_compiled --target h100

AdamW on 24 equal leaves, of 30 and of 1,000 million parameters together, the state donated. Held
is what stays from step to step, parameters and moments; gradients have the parameters' dtype. No
card is needed.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks import compilers, report

MIB = 2**20
MILLIONS = (30, 1000)
LEAVES = 24


def measure(target: str, millions: int, row: str) -> report.Row:
  """Compiles one step; returns its row."""
  import jax
  import jax.numpy as jnp
  import optax

  from benchmarks.own import rounding
  from mpjax.inspect._compiled_text import moved

  tx = optax.adamw(1e-3)
  shape = jax.ShapeDtypeStruct((millions * 10**6 // LEAVES,), jnp.float32)
  held = jax.eval_shape(
    lambda params: rounding.optimizer_step(row, params, tx)[0], [shape] * LEAVES
  )
  _, step = rounding.optimizer_step(row, [jnp.zeros(1)], tx)
  compiled = compilers.compile_for(target, step, (held, held[0]))
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  return {
    "target": target,
    "millions": millions,
    "held": row,
    "bytes": round(
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)) / millions / 1e6, 1
    ),
    "held_mib": round((memory.argument_size_in_bytes - _bytes(held[0])) / MIB),
    "temp_mib": round(memory.temp_size_in_bytes / MIB),
    "gbytes": round((costs["bytes accessed"] if costs else moved(compiled.as_text())) / 1e9, 2),
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
  }


def _bytes(tree: list[object]) -> int:
  return sum(x.size * x.dtype.itemsize for x in tree)  # pyright: ignore[reportAttributeAccessIssue]


COLUMNS = {
  "target": "target",
  "millions": "million parameters",
  "held": "parameters",
  "bytes": "bytes a parameter",
  "held_mib": "held MiB",
  "temp_mib": "temp MiB",
  "gbytes": "GB moved",
  "date": "date",
}


def main() -> None:
  """Compiles every row for a target; adds them to the results."""
  parser = argparse.ArgumentParser(description="The optimizer's step alone, compiled.")
  parser.add_argument("--target", choices=compilers.TARGETS, default="h100")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  compilers.prepare(arguments.target)

  from benchmarks.own import rounding

  rows = []
  for millions in MILLIONS:
    for row in rounding.ROWS:
      print(f"{millions}M: {row} ...", file=sys.stderr, flush=True)
      rows.append(measure(arguments.target, millions, row))
  old = report.rows_in(arguments.out / "rounding_compiled.json")
  found = report.merged(old, rows, ("target", "millions", "held"))
  rows = [found[key] for key in sorted(found, key=lambda key: key[:2])]
  report.write(
    "rounding_compiled",
    "The optimizer's step alone, compiled",
    "python -m benchmarks.own.rounding_compiled",
    arguments.target,
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
