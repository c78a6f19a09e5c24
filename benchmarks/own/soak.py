"""Trains with faults everywhere: optimizers, wrappers, policies and schedules, drawn at random.

Run `python -m benchmarks.own.soak`: 10,000 steps, one row an optimizer. Exits with 1 if a parameter
or a state is ever inf or NaN, the scale leaves its bounds, or a run does not come to the loss that
the same run comes to without faults.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from benchmarks import report
from mpjax._scaling.finiteness import nonfinite_leaves
from mpjax.testing import FAULTS, FaultSchedule, inject, inject_faults

Transformation = optax.GradientTransformation

RATE = 0.02  # of each of the three places: gradients, batches, activations
NOISE = 0.1  # of the targets, so that the loss has a floor of its square
FLOOR, CEILING = 1.0, 2.0**20
WORST = 1.15  # times the loss without faults

OPTIMIZERS: dict[str, Callable[[], Transformation]] = {
  "sgd, momentum": lambda: optax.sgd(0.05, momentum=0.9),
  "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(1e-2),
  "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-4),
  "adamax": lambda: optax.adamax(1e-2),
  "nadam": lambda: optax.nadam(1e-2),
  "radam": lambda: optax.radam(1e-2),
  "adabelief": lambda: optax.adabelief(1e-2),
  "yogi": lambda: optax.yogi(2e-2),
  "lion": lambda: optax.lion(1e-3),
  "lamb": lambda: optax.lamb(1e-2),
  "novograd": lambda: optax.novograd(1e-2),
  "rmsprop": lambda: optax.rmsprop(3e-3),
  "adagrad": lambda: optax.adagrad(0.1),
  "adafactor": lambda: optax.adafactor(2e-2, min_dim_size_to_factor=8),
  "sm3": lambda: optax.sm3(0.1),
}


def matrices(params: Any) -> Any:
  return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def wide_leaves(params: Any) -> Any:
  return jax.tree.map(lambda p: p.ndim > 1, params)


WRAPPERS: dict[str, Callable[[Transformation], Transformation]] = {
  "alone": lambda tx: tx,
  "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
  "clip values": lambda tx: optax.chain(optax.clip(1.0), tx),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  "accumulate": lambda tx: tx,
  "masked decay": lambda tx: optax.chain(
    optax.masked(optax.add_decayed_weights(1e-4), wide_leaves), tx
  ),
  "partition": lambda tx: optax.partition({"matrix": tx, "vector": optax.sgd(0.02)}, matrices),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(
    lambda factor: optax.chain(tx, optax.scale(factor))
  )(factor=optax.linear_schedule(1.0, 0.5, 500)),
  "schedule": lambda tx: optax.chain(
    tx, optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 800))
  ),
  "ema": lambda tx: optax.chain(tx, optax.ema(0.5)),
  "master_weights": mpjax.master_weights,
}
POLICIES = ("mixed_float16", "mixed_float16", "mixed_bfloat16", "float32")


class Case(NamedTuple):
  """One run: the keys of an optimizer and a wrapper, a policy, its number of steps and its seed."""

  optimizer: str
  wrapper: str
  policy: str
  steps: int
  seed: int

  def schedules(self, rate: float) -> tuple[FaultSchedule, ...]:
    """The faults of gradients, batches and activations."""
    return tuple(
      FaultSchedule.random(self.steps, rate, seed=3 * self.seed + n, kinds=FAULTS) for n in range(3)
    )


class Result(NamedTuple):
  """What a run came to; counts but for the scales and the losses."""

  steps: int
  faults: int
  skipped: int
  nonfinite: int
  lowest: float
  highest: float
  loss: float
  reference: float

  @property
  def failures(self) -> list[str]:
    """What must not be."""
    found = {
      "inf or NaN in the state": self.nonfinite > 0,
      "scale out of bounds": not FLOOR <= self.lowest <= self.highest <= CEILING,
      "loss not recovered": not self.loss <= WORST * self.reference,
      "nothing was skipped": self.faults > 20 and not self.skipped,
    }
    return [what for what, failed in found.items() if failed]


def draw_cases(steps: int, count: int, seed: int) -> list[Case]:
  """Cases of equal length: every optimizer and every wrapper in turn, matched at random."""
  draw = np.random.default_rng(seed)
  optimizers, wrappers = draw.permutation(list(OPTIMIZERS)), draw.permutation(list(WRAPPERS))
  cases = []
  for n in range(count):
    wrapper = str(wrappers[n % len(wrappers)])
    policy = "bfloat16" if wrapper == "master_weights" else POLICIES[n % len(POLICIES)]
    optimizer = str(optimizers[n % len(optimizers)])
    cases.append(Case(optimizer, wrapper, policy, steps // count, seed + n))
  return cases


def batch_of(step: jax.Array, size: int = 32) -> dict[str, jax.Array]:
  """A batch of a noisy function of 8 numbers."""
  x_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
  x = jax.random.normal(x_key, (size, 8))
  y = jnp.sin(x[:, 0]) + 0.5 * x[:, 1] + NOISE * jax.random.normal(noise_key, (size,))
  return {"x": x, "y": y, "step": step}


def predict(params: Any, x: jax.Array, strike: Callable[[jax.Array], jax.Array]) -> jax.Array:
  hidden = strike(jnp.tanh(x @ params["in"]["w"] + params["in"]["b"]))
  hidden = jnp.tanh(hidden @ params["mid"]["w"] + params["mid"]["b"])
  return (hidden @ params["out"]["w"])[:, 0]


def initial_params() -> Any:
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    "in": {"w": jax.random.normal(keys[0], (8, 32)) / 3, "b": jnp.zeros(32)},
    "mid": {"w": jax.random.normal(keys[1], (32, 32)) / 6, "b": jnp.zeros(32)},
    "out": {"w": jax.random.normal(keys[2], (32, 1)) / 6},
  }


def trainer(case: Case) -> Callable[..., Any]:
  """The compiled run of a case: its three schedules -> the final loss and a record of each step."""
  # Steps that shrink, so that the last loss does not hang on the last batch.
  last = case.steps // 2 if case.wrapper == "MultiSteps" else case.steps
  decay = optax.scale_by_schedule(optax.linear_schedule(1.0, 0.05, last))
  tx = WRAPPERS[case.wrapper](optax.chain(OPTIMIZERS[case.optimizer](), decay))
  scaled = mpjax.dynamic_loss_scaling(tx, growth_interval=20, min_scale=FLOOR, max_scale=CEILING)
  count = 2 if case.wrapper == "accumulate" else 1
  params = mpjax.Policy.parse(case.policy).cast_to_param(initial_params())

  def run(gradients: FaultSchedule, batches: FaultSchedule, activations: FaultSchedule) -> Any:
    chain = optax.chain(inject_faults(gradients), scaled)

    def loss(params: Any, batch: Any) -> jax.Array:
      out = predict(params, batch["x"], lambda h: inject(h, activations, batch["step"]))
      return jnp.mean((out - batch["y"]) ** 2)

    train_step = mpjax.make_train_step(
      loss, chain, policy=case.policy, accumulate=count, donate=False
    )

    def body(state: Any, step: jax.Array) -> Any:
      batch = batch_of(step)
      batch["x"] = inject(batch["x"], batches, step)
      state, metrics = train_step(state, batch)
      bad = jnp.sum(nonfinite_leaves(state))
      return state, (metrics.applied, bad, mpjax.loss_scale(state.opt_state))

    state = mpjax.TrainState.create(params, chain)
    state, record = jax.lax.scan(body, state, jnp.arange(case.steps))
    held_out = batch_of(jnp.int32(10**6), 2048)
    out = predict(mpjax.cast_floating(state.params, "float32"), held_out["x"], lambda h: h)
    return jnp.mean((out - held_out["y"]) ** 2), record

  return jax.jit(run)


def run_case(case: Case) -> Result:
  """Runs a case with its faults and without any; compiled once."""
  run, schedules = trainer(case), case.schedules(RATE)
  loss, (applied, bad, scales) = jax.device_get(run(*schedules))
  reference, (_, bad_without, _) = jax.device_get(run(*case.schedules(0.0)))
  return Result(
    steps=case.steps,
    faults=sum(len(schedule.struck) for schedule in schedules),
    skipped=int((~applied).sum()),
    nonfinite=int(bad.sum() + bad_without.sum()),
    lowest=float(scales.min()),
    highest=float(scales.max()),
    loss=float(loss),
    reference=float(reference),
  )


COLUMNS = {
  "optimizer": "optimizer",
  "wrapper": "wrapper",
  "policy": "policy",
  "steps": "steps",
  "faults": "faults",
  "skipped": "skipped",
  "nonfinite": "non-finite leaves",
  "scales": "scale",
  "loss": "final loss",
  "reference": "without faults",
}


def row(case: Case, result: Result) -> report.Row:
  """A case and what came of it."""
  scales = f"2^{np.log2(result.lowest):.0f} to 2^{np.log2(result.highest):.0f}"
  drawn = {name: getattr(case, name) for name in ("optimizer", "wrapper", "policy")}
  return {**drawn, **result._asdict(), "scales": scales, "failures": result.failures}


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints the table and writes it into the results; returns the number of cases that failed."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=10_000, help="of all cases together")
  parser.add_argument("--cases", type=int, default=len(OPTIMIZERS))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  options = parser.parse_args(arguments)
  rows = []
  for case in draw_cases(options.steps, options.cases, options.seed):
    rows.append(row(case, run_case(case)))
    print(case.optimizer, *rows[-1]["failures"] or ["as it must be"], file=sys.stderr, flush=True)
  failed = sum(bool(found["failures"]) for found in rows)
  totals = [sum(found[name] for found in rows) for name in Result._fields[:4]]
  text = report.table(rows, COLUMNS) + (
    "\n\n{} steps, {} faults, {} skipped steps, {} non-finite leaves; {} of {} cases failed".format(
      *totals, failed, len(rows)
    )
  )
  print(text)
  command = f"python -m benchmarks.own.soak --steps {options.steps} --seed {options.seed}"
  report.write("soak", "Training with faults", command, "CPU", rows, text, options.out)
  return failed


if __name__ == "__main__":
  sys.exit(min(main(), 1))
