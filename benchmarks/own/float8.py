"""The same training with matmuls in bfloat16 and in float8.

    python -m benchmarks.own.float8

The text task of `convergence.py`, longer. Seeds are paired: a seed's parameters and batches
are the same in every row. Flax's row has its float8 layers, whose scales come from a history of
1,024 steps that is part of the training state (`flax.linen.Fp8DirectDotGeneralOp`, `dtype=` by
hand). What is trained is judged in float32. A CPU computes float8 exactly as a GPU does, sums
aside: these are figures of accuracy, not of speed.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

compilers.prepare("cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks.own import convergence, float8_rows, rounding  # noqa: E402

CHUNK = 100
SHOWN = ("mixed_bfloat16", "mixed_float8", "Flax, delayed scaling")


def train(task: convergence.Task, row: str, seed: int, steps: int) -> tuple[float, float]:
  """Trains once; the score of what was trained, and the mean of the last tenth of the losses."""
  model, loss_fn = float8_rows.ROWS[row](task.workload)
  one = float8_rows.step_of(loss_fn, task.tx)

  def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
    *carry, loss = one(*carry, *batch)
    return tuple(carry), loss

  run = jax.jit(lambda carry, batches: lax.scan(step, carry, batches))
  inputs = task.workload.inputs
  params, state = model.init(jax.random.key(seed), jnp.zeros(inputs.shape, inputs.dtype))
  carry, losses = (params, state, task.tx.init(params)), []
  for start in range(0, steps, CHUNK):
    batches = [task.batch(seed, index) for index in range(start, min(start + CHUNK, steps))]
    carry, found = run(carry, jax.tree.map(lambda *x: np.stack(x), *batches))
    losses += found.tolist()
  plain = harness.linen(task.workload)
  logits, _ = plain.apply(carry[0], {}, jnp.asarray(task.held_out[0]))
  return task.score(logits, task.held_out[1]), statistics.mean(losses[-max(steps // 10, 1) :])


def measure(row: str, seeds: list[int], steps: int) -> report.Row:
  """Trains the task in one way for each seed; returns its row."""
  task = convergence.TASKS["text"](steps)
  runs = [train(task, row, seed, steps) for seed in seeds]
  return {
    "matmuls": row,
    "steps": steps,
    "seeds": len(seeds),
    "metric": task.metric,
    "scores": [round(score, 4) for score, _ in runs],
    "training_loss": round(statistics.mean(loss for _, loss in runs), 4),
    "device": rounding.device(),
  }


def with_differences(rows: list[report.Row]) -> list[report.Row]:
  """The rows with their means, and what they differ from bfloat16's, seed by seed."""
  first = rows[0]["scores"]
  spread = round(statistics.stdev(first), 4) if len(first) > 1 else None
  done = []
  for row in rows:
    ways = [a - b for a, b in zip(row["scores"], first, strict=True)]
    done.append(
      {
        **row,
        "mean": round(statistics.mean(row["scores"]), 4),
        "difference": round(statistics.mean(ways), 4),
        "differences": ", ".join(f"{way:+.4f}" for way in ways),
        "spread": spread,
      }
    )
  return done


COLUMNS = {
  "matmuls": "matmuls in",
  "steps": "steps",
  "metric": "metric",
  "mean": "mean",
  "difference": "to mixed_bfloat16",
  "differences": "each seed",
  "spread": "spread of mixed_bfloat16's seeds",
  "training_loss": "training loss",
  "device": "on",
}


def main() -> None:
  """Trains in every way; writes the results."""
  parser = argparse.ArgumentParser(description="The same training in bfloat16 and in float8.")
  parser.add_argument("--steps", type=int, default=3000)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
  parser.add_argument("--rows", nargs="+", choices=SHOWN, default=list(SHOWN))
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  rows = []
  for row in arguments.rows:
    print(f"{row} ...", file=sys.stderr, flush=True)
    rows.append(measure(row, arguments.seeds, arguments.steps))
  found = report.merged(report.rows_in(arguments.out / "float8.json"), rows, ("matmuls",))
  rows = with_differences([found[(row,)] for row in SHOWN])
  report.write(
    "float8",
    "The same training with matmuls in bfloat16 and in float8",
    "python -m benchmarks.own.float8",
    rounding.device(),
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
