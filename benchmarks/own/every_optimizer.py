"""Trains with every optimizer of optax, with faults, and never sees them again.

Run `python -m benchmarks.own.every_optimizer`: each optimizer of optax and its contrib trains twice
by one compiled program, once with NaN, inf, -inf and the largest finite number in gradients and
NaN, inf and that number in batches, and once on the batches that were not skipped, without any
fault. Exits with 1 if anything is ever inf or NaN, a struck step is applied, or the two do not end
with the same bits.
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
from benchmarks.own import optimizers
from mpjax._scaling.finiteness import nonfinite_leaves
from mpjax.testing import FaultSchedule, inject, inject_faults

STEPS = 400
RATE = 0.04  # of gradients, and again of batches
IN_GRADIENTS = ("nan", "inf", "-inf", "huge")  # the largest finite number
IN_BATCHES = ("nan", "inf", "huge")  # in a batch it makes the loss overflow


class Result(NamedTuple):
  """What a run with faults came to; counts but for the last.

  Attributes:
    struck: Steps with a fault.
    skipped: Steps that were skipped.
    applied: Steps with a fault that were applied.
    nonfinite: Leaves of a state that held inf or NaN, over all steps.
    same: Whether parameters and optimizer end with the bits of the run without faults.
  """

  struck: int
  skipped: int
  applied: int
  nonfinite: int
  same: bool

  @property
  def failures(self) -> list[str]:
    """What must not be."""
    found = {
      "no fault": not self.struck,
      "a struck step was applied": self.applied > 0,
      "inf or NaN in the state": self.nonfinite > 0,
      "other bits": not self.same,
    }
    return [what for what, failed in found.items() if failed]


def batch_of(number: jax.Array) -> dict[str, jax.Array]:
  """A batch of a linear function of 8 numbers."""
  x = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (16, 8))
  return {"x": x, "y": jnp.stack([x[:, 0], x[:, 1] - x[:, 2]], axis=1)}


def loss_fn(params: Any, batch: Any) -> jax.Array:
  """That of two matrices, one after the other: no saturation hides a number that is too large."""
  return jnp.mean((batch["x"] @ params["first"] @ params["second"] - batch["y"]) ** 2)


def initial_params() -> Any:
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    "first": jax.random.normal(keys[0], (8, 8)) / 3,
    "second": jax.random.normal(keys[1], (8, 2)) / 3,
  }


def trainer(name: str, steps: int, policy: str) -> Callable[..., Any]:
  """The compiled training of one optimizer: batches, their number and faults -> state and record.

  How many batches there are is no constant of the program, so that both runs are one program and
  round alike.
  """
  tx = mpjax.dynamic_loss_scaling(optimizers.build(name, 0.01), growth_interval=5)

  def run(numbers: jax.Array, count: jax.Array, gradients: Any, batches: Any) -> Any:
    chain = optax.chain(inject_faults(gradients), tx)
    step = mpjax.make_train_step(loss_fn, chain, policy=policy, donate=False)

    def body(n: jax.Array, carry: Any) -> Any:
      state, applied, bad = carry
      batch = batch_of(numbers[n])
      state, metrics = step(state, {**batch, "x": inject(batch["x"], batches, n)})
      bad = bad + jnp.sum(nonfinite_leaves(state)).astype(jnp.int32)
      return state, applied.at[n].set(metrics.applied), bad

    start = mpjax.TrainState.create(initial_params(), chain)
    carry = (start, jnp.zeros(steps, bool), jnp.zeros((), jnp.int32))
    return jax.lax.fori_loop(0, count, body, carry)

  return jax.jit(run)


def train(name: str, steps: int = STEPS, seed: int = 0, policy: str = "mixed_bfloat16") -> Result:
  """Trains with faults, then on the batches that were applied."""
  run = trainer(name, steps, policy)
  faults = [
    FaultSchedule.random(steps, RATE, seed=2 * seed + n, kinds=kinds)
    for n, kinds in enumerate((IN_GRADIENTS, IN_BATCHES))
  ]
  struck = sorted({*faults[0].struck, *faults[1].struck})
  state, applied, bad = run(jnp.arange(steps), jnp.int32(steps), *faults)
  kept = np.flatnonzero(applied)
  none = [jax.tree.map(jnp.zeros_like, schedule) for schedule in faults]
  numbers = jnp.asarray(np.resize(kept, steps))
  expected, _, more = run(numbers, jnp.int32(len(kept)), *none)
  return Result(
    struck=len(struck),
    skipped=steps - len(kept),
    applied=len({*struck} & {*kept.tolist()}),
    nonfinite=int(bad) + int(more),
    same=_bits(state) == _bits(expected),
  )


def _bits(state: mpjax.TrainState) -> list[bytes]:
  """All that a skip must leave alone: the scaler and the count of faults move."""
  inner = state.opt_state[1].inner_state
  leaves = jax.tree.leaves((state.params, state.step, inner))
  keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
  raw = [jax.random.key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)]
  return [np.asarray(x).tobytes() for x in raw]


COLUMNS = {
  "optimizer": "optimizer",
  "struck": "struck steps",
  "skipped": "skipped",
  "applied": "struck and applied",
  "nonfinite": "non-finite leaves",
  "same": "ends as without faults",
}


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints the table and writes it into the results; returns how many optimizers failed."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--policy", default="mixed_bfloat16")
  parser.add_argument("--optimizers", nargs="+", default=optimizers.NAMES)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  options = parser.parse_args(arguments)
  rows = []
  for name in options.optimizers:
    result = train(name, options.steps, options.seed, options.policy)
    same = "bit for bit" if result.same else "**no**"
    rows.append({"optimizer": name, **result._asdict(), "same": same, "failures": result.failures})
    print(name, *result.failures or ["as it must be"], file=sys.stderr, flush=True)
  failed = sum(bool(found["failures"]) for found in rows)
  totals = [sum(found[name] for found in rows) for name in Result._fields[:4]]
  text = report.table(rows, COLUMNS) + (
    f"\n\n{len(rows)} optimizers, {len(rows) * options.steps} steps, "
    "{} struck, {} skipped, {} struck and applied, {} non-finite leaves".format(*totals)
    + f"; {failed} failed"
  )
  print(text)
  command = (
    f"python -m benchmarks.own.every_optimizer --steps {options.steps} --seed {options.seed}"
  )
  title = "Every optimizer of optax, with faults"
  report.write("every_optimizer", title, command, "CPU", rows, text, options.out)
  return failed


if __name__ == "__main__":
  sys.exit(min(main(), 1))
