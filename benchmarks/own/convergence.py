"""Micikevicius et al. (2018) in small: the same training in five precisions, on real data.

    python -m benchmarks.own.convergence

A perceptron with sigmoids learns handwritten digits (scikit-learn's), a transformer the source
text of Python's standard library. What differs is the precision alone; the final metric is
computed in float32 on held-out data, with its spread over seeds.
"""

import argparse
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compilers, report

compilers.prepare("cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import mpjax  # noqa: E402
from benchmarks import harness, models, workloads  # noqa: E402

_SCALING = harness.Scaling(interval=50)


class Task(NamedTuple):
  """Real data and what learns it.

  Attributes:
    workload: the model and the shapes of a batch.
    tx: the optimizer.
    batch: `(seed, step) -> (inputs, labels)`.
    held_out: inputs and labels that are not trained on.
    metric: its name.
    better: 1 if more of it is better, -1 if less is.
    score: `(logits, labels) -> float`.
  """

  workload: workloads.Workload
  tx: Any
  batch: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
  held_out: tuple[np.ndarray, np.ndarray]
  metric: str
  better: int
  score: Callable[[jax.Array, np.ndarray], float]


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """1,797 pictures of 8 x 8 pixels, their digits, and which of them, every fifth, are held out."""
  from sklearn.datasets import load_digits

  data: Any = load_digits()
  images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
  return images, labels, np.arange(len(labels)) % 5 == 0


def digits(steps: int) -> Task:
  """Which digit a picture shows."""
  images, labels, held = pictures()
  size = 128

  def batch(seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.random.default_rng((seed, step)).integers(0, (~held).sum(), size)
    return images[~held][chosen], labels[~held][chosen]

  picture = jax.ShapeDtypeStruct((size, 64), jnp.float32)
  digit = jax.ShapeDtypeStruct((size,), jnp.int32)
  workload = workloads.Workload("digits", models.Perceptron, {}, picture, digit, 10)
  tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  held_out = images[held], labels[held]
  return Task(workload, tx, batch, held_out, "accuracy, %", 1, accuracy)


def autoencoder(steps: int) -> Task:
  """The picture itself, out of its own features; the loss is a mean over all pixels of a batch.

  Each pixel's share of it is small, and sigmoids shrink it further: below float16's range.
  """
  images, _, held = pictures()
  size = 128

  def batch(seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = images[~held][np.random.default_rng((seed, step)).integers(0, (~held).sum(), size)]
    return chosen, chosen

  picture = jax.ShapeDtypeStruct((size, 64), jnp.float32)
  sizes = {"layers": 6, "classes": 64}
  workload = workloads.Workload(
    "autoencoder", models.Perceptron, sizes, picture, picture, 1, squares
  )
  tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  held_out = images[held], images[held]
  return Task(workload, tx, batch, held_out, "variance left, %", -1, variance_left)


def text(steps: int) -> Task:
  """The bytes of Python's standard library; its last tenth held out."""
  size, length = 16, 64
  folder = Path(sysconfig.get_path("stdlib"))
  paths = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_sysconfigdata")]
  source = np.concatenate([np.frombuffer(p.read_bytes(), np.uint8) for p in paths])
  cut = len(source) * 9 // 10

  def windows(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    taken = source[places[:, None] + np.arange(length + 1)].astype(np.int32)
    return taken[:, :-1], taken[:, 1:]

  def batch(seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    return windows(np.random.default_rng((seed, step)).integers(0, cut - length - 1, size))

  sizes = {"layers": 1, "width": 64, "heads": 4}
  workload = workloads.language("text", models.Transformer, size, length, 256, **sizes)
  tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
  held_out = windows(np.linspace(cut, len(source) - length - 1, 64).astype(int))
  return Task(workload, tx, batch, held_out, "bits per byte", -1, bits)


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
  """The percentage of rows whose largest logit is their label's."""
  return 100 * float((np.asarray(logits).argmax(-1) == labels).mean())


def squares(outputs: jax.Array, wanted: jax.Array) -> jax.Array:
  """The mean squared error, in float32: f32[]."""
  return jnp.mean((outputs.astype(jnp.float32) - wanted) ** 2)


def variance_left(outputs: jax.Array, wanted: np.ndarray) -> float:
  """The mean squared error as a percentage of the pixels' variance about their means."""
  return 100 * float(squares(outputs, jnp.asarray(wanted))) / float(wanted.var(0).mean())


def bits(logits: jax.Array, labels: np.ndarray) -> float:
  """The mean cross-entropy in bits."""
  return float(workloads.cross_entropy(logits, jnp.asarray(labels))) / float(np.log(2))


TASKS: dict[str, Callable[[int], Task]] = {
  "digits": digits,
  "autoencoder": autoencoder,
  "text": text,
}
STEPS = {"digits": 400, "autoencoder": 600, "text": 200}


def _without_scaling(workload: workloads.Workload, tx: Any) -> harness.Training:
  """Autocast to float16, the loss not scaled."""
  model = harness.linen(workload)
  loss = mpjax.autocast(harness.loss_of(workload, model), "mixed_float16")
  return harness.unscaled(loss, model, tx)


def _pure(workload: workloads.Workload, tx: Any) -> harness.Training:
  """Parameters, activations and the optimizer's moments in bfloat16."""
  plain = harness.linen(workload)
  cast = mpjax.Policy.parse("bfloat16").cast_to_param

  def init(key: jax.Array, inputs: jax.Array) -> tuple[Any, Any]:
    return cast(plain.init(key, inputs))

  def apply(params: Any, model_state: Any, inputs: jax.Array) -> Any:
    return plain.apply(params, model_state, cast(inputs))

  model = harness.Model(init, apply)
  return harness.unscaled(harness.loss_of(workload, model), model, tx)


def _mpjax(policy: str) -> Callable[[workloads.Workload, Any], harness.Training]:
  return lambda workload, tx: harness.mpjax_inside(workload, policy, tx, _SCALING)


PRECISIONS: dict[str, Callable[[workloads.Workload, Any], harness.Training]] = {
  "float32": lambda workload, tx: harness.float32(workload, "float32", tx, _SCALING),
  "mixed_bfloat16": _mpjax("mixed_bfloat16"),
  "mixed_float16": _mpjax("mixed_float16"),
  "mixed_float16 without scaling": _without_scaling,
  "pure bfloat16": _pure,
}


def train(task: Task, precision: str, seeds: list[int], steps: int) -> list[tuple[float, float]]:
  """Trains once for each seed; returns the final metric and the last losses' mean of each."""
  training = PRECISIONS[precision](task.workload, task.tx)
  step = jax.jit(training.step)
  plain = harness.linen(task.workload)
  found = []
  for seed in seeds:
    state = training.init(
      jax.random.key(seed), jnp.zeros(task.workload.inputs.shape, task.workload.inputs.dtype)
    )
    losses = []
    for index in range(steps):
      state, loss = step(state, *task.batch(seed, index))
      losses.append(loss)
    params = mpjax.cast_floating(state.params, jnp.float32)
    logits, _ = plain.apply(params, state.model_state, jnp.asarray(task.held_out[0]))
    last = float(np.mean([float(loss) for loss in losses[-steps // 10 :]]))
    found.append((task.score(logits, task.held_out[1]), last))
  return found


def measure(name: str, precision: str, seeds: list[int], steps: int) -> report.Row:
  """Trains one task in one precision; returns its row."""
  task = TASKS[name](steps)
  scores, losses = zip(*train(task, precision, seeds, steps), strict=True)
  return {
    "task": name,
    "metric": task.metric,
    "better": task.better,
    "precision": precision,
    "steps": steps,
    "seeds": len(seeds),
    "mean": round(statistics.mean(scores), 3),
    "lowest": round(min(scores), 3),
    "highest": round(max(scores), 3),
    "training_loss": round(statistics.mean(losses), 4),
  }


def with_verdicts(rows: list[report.Row]) -> list[report.Row]:
  """The rows, each with whether its mean is no worse than the worst of float32's seeds."""
  done = []
  for row in rows:
    (plain,) = [r for r in rows if r["task"] == row["task"] and r["precision"] == "float32"]
    worst = plain["lowest"] if row["better"] > 0 else plain["highest"]
    matches = (row["mean"] - worst) * row["better"] >= 0
    done.append({**row, "matches": matches})
  return done


COLUMNS = {
  "task": "task",
  "precision": "precision",
  "metric": "metric",
  "mean": "mean",
  "lowest": "lowest",
  "highest": "highest",
  "training_loss": "training loss",
  "matches": "no worse than float32's worst seed",
}


def main() -> None:
  """Trains every task in every precision; adds its rows to the results."""
  parser = argparse.ArgumentParser(description="The same training in five precisions.")
  parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
  parser.add_argument("--steps", type=int, help="instead of each task's own number")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  path = arguments.out / "convergence.json"
  rows = report.rows_in(path)
  rows = [row for row in rows if row["task"] not in arguments.task]
  for task in arguments.task:
    for precision in PRECISIONS:
      print(f"{task} {precision} ...", file=sys.stderr, flush=True)
      rows.append(measure(task, precision, arguments.seeds, arguments.steps or STEPS[task]))
    rows = with_verdicts(rows)
    report.write(
      "convergence",
      "The same training in five precisions",
      "python -m benchmarks.own.convergence",
      "CPU",
      rows,
      report.table(rows, COLUMNS),
      arguments.out,
    )


if __name__ == "__main__":
  main()
