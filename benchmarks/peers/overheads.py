"""What mixed precision costs beside computing: tracing, the first call, Python, eager calls.

    python -m benchmarks.peers.overheads

Every figure is a ratio to the plain model in float32, of medians of processor time over several
repetitions in which the peers take turns; JAX's caches are cleared before each trace. How trace
time grows is the slope of its logarithm over that of the model's depth: 1 is in proportion.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

compilers.prepare("cpu", quick=True)

COLUMNS = {
  "measure": "measure",
  "layers": "layers",
  "peer": "peer",
  "seconds": "seconds",
  "repetitions": "median of",
  "ratio": "to float32",
  "slope": "log-log slope over depth",
}


def processor_seconds(fn: Callable[[], Any]) -> float:
  """Processor time of a call, of all threads; collected garbage does not count."""
  gc.collect()
  began = time.process_time()
  fn()
  return time.process_time() - began


def trace_seconds(peer: Any, policy: str, workload: Any) -> float:
  """Seconds of one `jit(step).trace` with no cache warm."""
  import jax

  step, arguments = _step(peer, policy, workload)
  jax.clear_caches()
  return processor_seconds(lambda: jax.jit(step).trace(*arguments))


def first_call_seconds(peer: Any, policy: str, workload: Any) -> float:
  """Seconds of the first call of a jitted step: tracing, lowering, compiling, running."""
  import jax

  step, arguments = _step(peer, policy, workload)
  values = jax.tree.map(_zeros, arguments)
  jax.clear_caches()
  return processor_seconds(lambda: jax.block_until_ready(jax.jit(step)(*values)))


def call_seconds(peer: Any, policy: str, workload: Any, calls: int = 100) -> float:
  """Seconds of one further call of a jitted step, of a model so small that Python is most of it."""
  import jax

  step, arguments = _step(peer, policy, workload)
  jitted = jax.jit(step)
  state, *batch = jax.tree.map(_zeros, arguments)
  state, _ = jitted(state, *batch)

  def loop() -> None:
    current = state
    for _ in range(calls):
      current, _ = jitted(current, *batch)
    jax.block_until_ready(current)

  return processor_seconds(loop) / calls


def eager_seconds(peer: Any, policy: str, workload: Any) -> float:
  """Seconds of one step without `jit`, after a first one."""
  import jax

  step, arguments = _step(peer, policy, workload)
  first, second = (jax.tree.map(_zeros, arguments) for _ in range(2))  # a step may donate
  jax.block_until_ready(step(*first))
  return processor_seconds(lambda: jax.block_until_ready(step(*second)))


MEASURES = {
  "trace": trace_seconds,
  "first call": first_call_seconds,
  "further call": call_seconds,
  "eager step": eager_seconds,
}


def _zeros(leaf: Any) -> Any:
  import jax.numpy as jnp

  return jnp.zeros(leaf.shape, leaf.dtype)


def _step(peer: Any, policy: str, workload: Any) -> tuple[Any, tuple[Any, ...]]:
  import jax
  import optax

  from benchmarks import harness

  training = peer.build(workload, policy, optax.adamw(1e-3), harness.Scaling())
  state = jax.eval_shape(training.init, jax.random.key(0), workload.inputs)
  return training.step, (state, workload.inputs, workload.labels)


def measure(
  name: str, wanted: list[Any], policy: str, workload: Any, layers: int, repetitions: int
) -> list[report.Row]:
  """Measures peers in turn; returns a row for each, the ratio being to the first."""
  seconds: dict[str, list[float]] = {peer.name: [] for peer in wanted}
  for peer in wanted:  # imports and the allocator warm up here
    MEASURES[name](peer, policy, workload)
  for _ in range(repetitions):
    for peer in wanted:
      seconds[peer.name].append(MEASURES[name](peer, policy, workload))
  medians = {peer: statistics.median(found) for peer, found in seconds.items()}
  first = medians[wanted[0].name]
  return [
    {
      "measure": name,
      "policy": policy,
      "workload": workload.name,
      "layers": layers,
      "peer": peer,
      "seconds": median,
      "ratio": round(median / first, 2),
      "slope": None,
      "repetitions": repetitions,
    }
    for peer, median in medians.items()
  ]


def with_slopes(rows: list[report.Row]) -> list[report.Row]:
  """The rows, those of the deepest model with the slope from the shallowest one."""
  done = []
  for row in rows:
    kin = [r for r in rows if (r["measure"], r["peer"]) == (row["measure"], row["peer"])]
    low, high = (edge(kin, key=lambda r: r["layers"]) for edge in (min, max))
    slope = None
    if row is high and low is not high:
      rise = math.log(high["seconds"] / low["seconds"])
      slope = round(rise / math.log(high["layers"] / low["layers"]), 2)
    done.append({**row, "slope": slope})
  return done


def merge(old: list[report.Row], new: list[report.Row]) -> list[report.Row]:
  """Old rows, those that were measured again replaced, with their slopes."""
  found = report.merged(old, new, ("measure", "layers", "peer"))
  names = list(MEASURES)
  return with_slopes(sorted(found.values(), key=lambda r: (names.index(r["measure"]), r["layers"])))


def main() -> None:
  """Measures each depth; adds the tables to the results."""
  parser = argparse.ArgumentParser(description="What mixed precision costs beside computing.")
  parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
  parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 24])
  parser.add_argument("--policy", default="mixed_float16")
  parser.add_argument("--peers", nargs="+", help="beside float32; all that are installed otherwise")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()

  from benchmarks import workloads
  from benchmarks.peers import peers

  names = arguments.peers and list(dict.fromkeys([peers.FLOAT32, *arguments.peers]))
  wanted = peers.chosen(names, arguments.policy, workloads.TINY["gpt"]())
  path = arguments.out / "overheads.json"
  rows = report.rows_in(path)
  for name in arguments.measure:
    # Compiling takes too long for many depths; Python's share does not depend on it much.
    depths = arguments.layers if name == "trace" else arguments.layers[:1]
    for layers in depths:
      workload = workloads.TINY["gpt"](layers=layers)
      print(f"{name}, {layers} layers ...", file=sys.stderr, flush=True)
      new = measure(name, wanted, arguments.policy, workload, layers, arguments.repetitions)
      rows = merge(rows, new)
      report.write(
        "overheads",
        f"Overheads of {arguments.policy}, tiny GPT, processor time",
        "python -m benchmarks.peers.overheads",
        "CPU",
        rows,
        report.table(rows, COLUMNS),
        arguments.out,
      )


if __name__ == "__main__":
  main()
