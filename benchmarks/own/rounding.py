"""The same training with parameters and moments of fewer bytes, by how they are rounded.

    python -m benchmarks.own.rounding

The tasks are those of `convergence.py` on which 16-bit parameters lose; the matmuls run in
bfloat16 for all, so that what differs is what the optimizer holds from step to step. Seeds are
paired: a seed's parameters and batches are the same in every row. Kahan's compensated summation
(Zamirai et al., 2020) is here to compare with: it holds what a bfloat16 parameter lacks in another
bfloat16 number.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compilers, report

compilers.prepare("cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax import lax  # noqa: E402

import mpjax  # noqa: E402
from benchmarks import harness, meters  # noqa: E402
from benchmarks.own import convergence  # noqa: E402

TASKS = ("digits", "text")
CHUNK = 100


def nearest_states(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """The float32 arrays of an optimizer's state held in bfloat16, rounded to the nearest."""

  def narrow(state: Any) -> Any:
    return jax.tree.map(lambda x: _nearest(x) if x.dtype == jnp.float32 and x.ndim else x, state)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
    updates, state = inner.update(updates, wide, params)
    return updates, narrow(state)

  return optax.GradientTransformation(lambda params: narrow(inner.init(params)), update)


def _nearest(x: jax.Array) -> jax.Array:
  # The explicit rounding stays where a compiler may leave out a cast and back.
  return lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16)


def wide_inside(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """An optimizer with float32 states and gradients for bfloat16 parameters, rounded to nearest."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, wide = mpjax.cast_floating((updates, params), "float32")
    return inner.update(updates, state, wide)

  return optax.GradientTransformation(
    lambda params: inner.init(mpjax.cast_floating(params, "float32")), update
  )


def kahan(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """An optimizer that holds what its bfloat16 parameters lack in further bfloat16 numbers."""
  inner = wide_inside(inner)

  def init(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params), inner.init(params)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    lacking, inner_state = state
    updates, inner_state = inner.update(updates, inner_state, params)
    wide, low = mpjax.cast_floating((params, lacking), "float32")
    wanted = jax.tree.map(lambda p, c, u: p + (c + u), wide, low, updates)
    landed = jax.tree.map(lambda x: lax.reduce_precision(x, 8, 7), wanted)
    # What is missing is taken from the parts: their sum has lost its last bits already.
    lacking = jax.tree.map(
      lambda p, c, u, new: _nearest((c + u) - (new - p)), wide, low, updates, landed
    )
    return jax.tree.map(lambda new, p: new - p, landed, wide), (lacking, inner_state)

  return optax.GradientTransformation(init, update)


Wrap = Callable[[Any], Any]
ROWS: dict[str, tuple[str, Wrap]] = {
  "float32": ("float32", lambda tx: tx),
  "bfloat16, to the nearest": ("bfloat16", wide_inside),
  "bfloat16, Kahan": ("bfloat16", kahan),
  "bfloat16, stochastic": ("bfloat16", mpjax.stochastic_rounding),
  "float32, states to the nearest": ("float32", nearest_states),
  "float32, states stochastic": ("float32", mpjax.bfloat16_states),
  "bfloat16 and states to the nearest": ("bfloat16", lambda tx: wide_inside(nearest_states(tx))),
  "bfloat16 and states stochastic": (
    "bfloat16",
    lambda tx: mpjax.stochastic_rounding(mpjax.bfloat16_states(tx)),
  ),
}


def optimizer_step(name: str, params: Any, tx: Any) -> tuple[Any, Any]:
  """One way of holding parameters and moments as a step of the optimizer alone.

  Args:
    name: a row of `ROWS`.
    params: f32 arrays, or their shapes under `jax.eval_shape`.
    tx: the optimizer.

  Returns:
    What it holds, `(params, state)`, and `step(held, grads) -> held`, the gradients in the
    parameters' dtype.
  """
  dtype, wrap = ROWS[name]
  tx = wrap(tx)

  def step(held: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, held[1], held[0])
    return optax.apply_updates(held[0], updates), state

  params = mpjax.cast_floating(params, dtype)
  return (params, tx.init(params)), step


class Run(NamedTuple):
  """What a training ends with: the final metric, the mean of the last losses, bytes a parameter."""

  score: float
  loss: float
  held: float


def train(task: convergence.Task, name: str, seeds: list[int], steps: int) -> list[Run]:
  """Trains once for each seed."""
  dtype, wrap = ROWS[name]
  model, tx = harness.linen(task.workload), wrap(task.tx)
  policy = f"params={dtype}, compute=bfloat16, output=float32"
  loss_fn = mpjax.autocast(harness.loss_of(task.workload, model), policy)

  def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
    params, state = carry
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, {}, *batch)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss.astype(jnp.float32)

  run = jax.jit(lambda carry, batches: lax.scan(step, carry, batches))

  def one(seed: int) -> Run:
    inputs = task.workload.inputs
    params, _ = model.init(jax.random.key(seed), jnp.zeros(inputs.shape, inputs.dtype))
    params = mpjax.cast_floating(params, dtype)
    carry, losses = (params, tx.init(params)), []
    for start in range(0, steps, CHUNK):
      batches = [task.batch(seed, index) for index in range(start, min(start + CHUNK, steps))]
      carry, found = run(carry, jax.tree.map(lambda *x: np.stack(x), *batches))
      losses += found.tolist()
    params = mpjax.cast_floating(carry[0], "float32")
    logits, _ = model.apply(params, {}, jnp.asarray(task.held_out[0]))
    held = sum(x.nbytes for x in jax.tree.leaves(carry)) / sum(
      map(jnp.size, jax.tree.leaves(params))
    )
    last = statistics.mean(losses[-(steps // 10) :])
    return Run(task.score(logits, task.held_out[1]), last, held)

  return [one(seed) for seed in seeds]


def measure(name: str, row: str, seeds: list[int], steps: int) -> report.Row:
  """Trains one task with one way of holding parameters and moments; returns its row."""
  task = convergence.TASKS[name](steps)
  runs = train(task, row, seeds, steps)
  return {
    "task": name,
    "metric": task.metric,
    "held": row,
    "bytes": round(runs[0].held, 1),
    "steps": steps,
    "seeds": len(seeds),
    "scores": [round(run.score, 4) for run in runs],
    "training_loss": round(statistics.mean(run.loss for run in runs), 4),
    "device": device(),
  }


def device() -> str:
  """What the figures were measured on."""
  return "CPU" if jax.default_backend() == "cpu" else meters.card()


def with_differences(rows: list[report.Row]) -> list[report.Row]:
  """The rows with their means, and their paired differences from float32's."""
  done = []
  for row in rows:
    (plain,) = [r for r in rows if r["task"] == row["task"] and r["held"] == "float32"]
    ways = [a - b for a, b in zip(row["scores"], plain["scores"], strict=True)]
    done.append(
      {
        **row,
        "mean": round(statistics.mean(row["scores"]), 4),
        "difference": round(statistics.mean(ways), 4),
        "differences": ", ".join(f"{way:+.4f}" for way in ways),
      }
    )
  return done


COLUMNS = {
  "task": "task",
  "held": "parameters",
  "bytes": "bytes a parameter",
  "steps": "steps",
  "metric": "metric",
  "mean": "mean",
  "difference": "to float32",
  "differences": "each seed",
  "training_loss": "training loss",
  "device": "on",
}


def main() -> None:
  """Trains every task in every way; adds its rows to the results."""
  parser = argparse.ArgumentParser(description="The same training, rounded in several ways.")
  parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
  parser.add_argument("--steps", type=int, default=3000)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  rows = report.rows_in(arguments.out / "rounding.json")
  rows = [row for row in rows if row["task"] not in arguments.task]
  for task in arguments.task:
    for row in ROWS:
      print(f"{task}: {row} ...", file=sys.stderr, flush=True)
      rows.append(measure(task, row, arguments.seeds, arguments.steps))
    rows = with_differences(rows)
    report.write(
      "rounding",
      "The same training with fewer bytes a parameter",
      "python -m benchmarks.own.rounding",
      device(),
      rows,
      report.table(rows, COLUMNS),
      arguments.out,
    )


if __name__ == "__main__":
  main()
