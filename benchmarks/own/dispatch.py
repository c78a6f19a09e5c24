"""What calling a train step costs on the host, beside a jitted step that is written by hand.

    python -m benchmarks.own.dispatch

Parameters of two numbers each, so that nothing but Python, JAX's dispatch and the outputs are paid
for. Every figure is the least of several repetitions, in which the steps take turns.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

compilers.prepare("cpu", quick=True)

PLAIN, REPORTING, OURS = (
  "by hand, returns loss and norm",
  "by hand, returns what mpjax does",
  "mpjax",
)
COLUMNS = {
  "optimizer": "optimizer",
  "leaves": "parameters",
  "step": "step",
  "microseconds": "microseconds a call",
  "ratio": "to the first",
}


def steps_of(leaves: int, optimizer: str) -> dict[str, Callable[[], Any]]:
  """Three train steps of the same loss: calls that each take a step."""
  import jax
  import jax.numpy as jnp
  import optax
  from flax.training.train_state import TrainState

  import mpjax

  tx = {"sgd": optax.sgd, "adam": optax.adam}[optimizer](1e-3)
  batch = jnp.ones(2)

  def parameters() -> dict[str, jax.Array]:
    return {f"w{n}": jnp.ones(2) for n in range(leaves)}

  def loss(params: Any, batch: Any) -> jax.Array:
    return sum((jnp.sum((w * batch) ** 2) for w in params.values()), start=jnp.zeros(()))

  @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
  def by_hand(state: Any, batch: Any, reports: bool) -> Any:
    found, grads = jax.value_and_grad(loss)(state.params, batch)
    constants = jnp.float32(1), jnp.bool_(True), jnp.int32(0), jnp.int32(0)
    metrics = found, optax.global_norm(grads), *(constants if reports else ())
    return state.apply_gradients(grads=grads), metrics

  def in_turn(step: Callable[..., Any], state: Any, *rest: Any) -> Callable[[], Any]:
    held = [state]

    def call() -> None:
      held[0], _ = step(held[0], batch, *rest)

    return call

  def flax_state() -> Any:
    return TrainState.create(apply_fn=None, params=parameters(), tx=tx)

  ours = mpjax.make_train_step(loss, tx)
  return {
    PLAIN: in_turn(by_hand, flax_state(), False),
    REPORTING: in_turn(by_hand, flax_state(), True),
    OURS: in_turn(ours, mpjax.TrainState.create(parameters(), tx)),
  }


def measure(leaves: int, optimizer: str, calls: int, repetitions: int) -> list[report.Row]:
  """The rows of one number of parameters, the steps measured in turns."""
  steps = steps_of(leaves, optimizer)
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for call in steps.values():
    call()
    call()
  for _ in range(repetitions):
    for name, call in steps.items():
      began = time.perf_counter()
      for _ in range(calls):
        call()
      seconds[name].append((time.perf_counter() - began) / calls)
  least = {name: min(found) for name, found in seconds.items()}
  return [
    {
      "optimizer": optimizer,
      "leaves": leaves,
      "step": name,
      "microseconds": round(1e6 * found, 1),
      "ratio": round(found / least[PLAIN], 2),
    }
    for name, found in least.items()
  ]


def main() -> None:
  """Measures each number of parameters; adds the table to the results."""
  parser = argparse.ArgumentParser(description="What calling a train step costs on the host.")
  parser.add_argument("--leaves", type=int, nargs="+", default=[4, 100])
  parser.add_argument("--calls", type=int, default=300)
  parser.add_argument("--repetitions", type=int, default=15)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  rows: list[report.Row] = []
  for optimizer in ("sgd", "adam"):
    for leaves in arguments.leaves:
      print(f"{optimizer}, {leaves} parameters ...", file=sys.stderr, flush=True)
      rows += measure(leaves, optimizer, arguments.calls, arguments.repetitions)
  report.write(
    "dispatch",
    "What a call of a train step costs on the host",
    "python -m benchmarks.own.dispatch",
    "CPU",
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
