"""What it saves to compute float32 between 16-bit values again instead of storing it.

    python -m benchmarks.own.islands --target v100 --policy mixed_float16

The train step of a workload, compiled as it is and with every island and softmax of `_islands`
stored as JAX stores by itself. Rows are added to results/islands.json.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

MIB = 2**20
COLUMNS = {
  "target": "target",
  "workload": "workload",
  "policy": "policy",
  "stored_mib": "MiB, all stored",
  "mib": "MiB, computed again",
  "ratio": "ratio",
  "stored_gb": "GB moved, all stored",
  "gb": "GB moved, computed again",
  "bytes_ratio": "ratio",
}


@contextmanager
def everything_stored() -> Iterator[None]:
  """Without islands: the interpreter executes every step by itself."""
  from mpjax._engine.running import islands

  find = islands.find
  islands.find = lambda plan: {}
  try:
    yield
  finally:
    islands.find = find


def compiled(target: str, workload: Any, policy: str) -> report.Row:
  """What a compiler says of a workload's train step, the whole loss under the policy."""
  import jax
  import optax

  from benchmarks import harness

  training = harness.mpjax_inside(workload, policy, optax.adamw(1e-3), harness.Scaling())
  state = jax.eval_shape(training.init, jax.random.key(0), workload.inputs)
  arguments = (state, workload.inputs, workload.labels)
  program = compilers.compile_for(target, training.step, arguments)
  return compilers.figures(program, target)


def measure(target: str, name: str, policy: str) -> report.Row:
  """Compiles a workload's train step twice."""
  from benchmarks import workloads

  workload = {**workloads.FULL, **workloads.TINY}[name]()
  again = compiled(target, workload, policy)
  with everything_stored():
    stored = compiled(target, workload, policy)
  return {
    "target": target,
    "workload": name,
    "policy": policy,
    "stored_mib": f"{stored['temp_bytes'] / MIB:.0f}",
    "mib": f"{again['temp_bytes'] / MIB:.0f}",
    "ratio": f"{again['temp_bytes'] / stored['temp_bytes']:.3f}",
    "stored_gb": f"{stored['bytes_moved'] / 1e9:.2f}",
    "gb": f"{again['bytes_moved'] / 1e9:.2f}",
    "bytes_ratio": f"{again['bytes_moved'] / stored['bytes_moved']:.3f}",
  }


def main() -> None:
  """Measures workloads; adds their rows to the results."""
  parser = argparse.ArgumentParser(description="What it saves to compute islands again.")
  parser.add_argument("--target", choices=compilers.TARGETS, default="cpu")
  parser.add_argument("--workload", nargs="+", default=["gpt-small"], help="full or tiny ones")
  parser.add_argument(
    "--policy", choices=("mixed_bfloat16", "mixed_float16"), default="mixed_bfloat16"
  )
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  compilers.prepare(arguments.target)

  rows = report.rows_in(arguments.out / "islands.json")
  for name in arguments.workload:
    print(f"{arguments.target} {name} {arguments.policy} ...", file=sys.stderr, flush=True)
    row = measure(arguments.target, name, arguments.policy)
    rows = [*report.merged(rows, [row], ("target", "workload", "policy")).values()]
    table = report.table(rows, COLUMNS)
    report.write(
      "islands",
      "Float32 computed again instead of stored",
      "python -m benchmarks.own.islands --target TARGET --workload WORKLOAD --policy POLICY",
      "compilers of the targets named in each row",
      rows,
      table,
      arguments.out,
    )
    print(table)


if __name__ == "__main__":
  main()
