"""The time of a train step on this machine's CPU: float32, by hand and mpjax.

    python -m benchmarks.peers.cpu

The steps take turns, and every figure is the least of several repetitions. Rows are added to
results/cpu.json, one for each version of JAX, workload, policy and peer.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

compilers.prepare("cpu")

KEY = ("jax", "workload", "policy", "peer")
COLUMNS = {
  "jax": "JAX",
  "workload": "workload",
  "policy": "policy",
  "peer": "peer",
  "milliseconds": "ms a step",
  "ratio": "to float32",
  "repetitions": "least of",
}


def calls_of(workload: Any, policy: str, wanted: list[Any]) -> dict[str, Callable[[], None]]:
  """A compiled step of each peer, all from the same batch: calls that each take one."""
  import jax
  import optax

  from benchmarks import harness, workloads

  inputs, labels = workloads.batch_of(workload)

  def in_turn(peer: Any) -> Callable[[], None]:
    training = peer.build(workload, policy, optax.adamw(1e-3), harness.Scaling())
    step = jax.jit(training.step, donate_argnums=0)
    held = [training.init(jax.random.key(0), inputs)]

    def call() -> None:
      held[0], loss = step(held[0], inputs, labels)
      jax.block_until_ready((held[0], loss))

    return call

  return {peer.name: in_turn(peer) for peer in wanted}


def measure(workload: Any, policy: str, wanted: list[Any], repetitions: int) -> list[report.Row]:
  """The rows of one workload; the ratio is to the first peer."""
  calls = calls_of(workload, policy, wanted)
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(repetitions):
    for name, call in calls.items():
      began = time.perf_counter()
      call()
      seconds[name].append(time.perf_counter() - began)
  least = {name: min(found) for name, found in seconds.items()}
  first = least[wanted[0].name]
  return [
    {
      "jax": metadata.version("jax"),
      "workload": workload.name,
      "policy": policy,
      "peer": name,
      "milliseconds": round(1e3 * found, 2),
      "ratio": round(found / first, 2),
      "repetitions": repetitions,
    }
    for name, found in least.items()
  ]


def main() -> None:
  """Measures each workload; adds its rows to the results."""
  from benchmarks import workloads
  from benchmarks.peers import peers

  parser = argparse.ArgumentParser(description="A train step on this machine's CPU.")
  parser.add_argument("--workload", nargs="+", default=["gpt-cpu", "llama-cpu"])
  parser.add_argument("--policy", nargs="+", choices=peers.POLICIES, default=["mixed_bfloat16"])
  parser.add_argument("--repetitions", type=int, default=30)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  rows = report.rows_in(arguments.out / "cpu.json")
  for name in arguments.workload:
    workload = {**workloads.FULL, **workloads.TINY}[name]()
    for policy in arguments.policy:
      print(f"{name} {policy} ...", file=sys.stderr, flush=True)
      wanted = peers.chosen([peers.FLOAT32, peers.BY_HAND, peers.INSIDE], policy, workload)
      new = measure(workload, policy, wanted, arguments.repetitions)
      rows = list(report.merged(rows, new, KEY).values())
  report.write(
    "cpu",
    "A train step on a CPU",
    "python -m benchmarks.peers.cpu",
    "CPU",
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
