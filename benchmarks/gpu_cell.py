"""One cell of the GPU table, measured in a process of its own; `gpu.py` gives it as JSON."""

import collections
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import harness, meters, workloads
from benchmarks.peers import peers
from mpjax.inspect._compiled_text import float8_calls, moved

_ALIGN = 8


def workload_of(cell: dict[str, Any], batch: int | None = None) -> workloads.Workload:
  """The workload of a cell, at its own batch size or another."""
  makers = {**workloads.FULL, **workloads.TINY}
  batch = batch or cell.get("batch")
  return makers[cell["workload"]](**({"batch": batch} if batch else {}))


def lowered_step(cell: dict[str, Any], workload: workloads.Workload) -> tuple[Any, Any]:
  """A peer's training on a workload and its lowered step, the state donated."""
  training = _training(cell, workload)
  state = jax.eval_shape(training.init, jax.random.key(0), workload.inputs)
  step = jax.jit(training.step, donate_argnums=0)
  return training, step.lower(state, workload.inputs, workload.labels)


def _training(cell: dict[str, Any], workload: workloads.Workload) -> harness.Training:
  tx = optax.adamw(1e-3)
  if cell["kind"] == "float8":
    from benchmarks.own import float8_rows

    return float8_rows.training(cell["peer"], workload, tx)
  return peers.PEERS[cell["peer"]].build(workload, cell["policy"], tx, harness.Scaling())


def needed(compiled: Any) -> int:
  """Bytes that a compiled step needs, its arguments included."""
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


def of_text(text: str) -> dict[str, Any]:
  """What a compiled step's text tells: bytes moved, and the libraries' kernels by name."""
  called = re.findall(r'custom_call_target="([^"]+)"', text)
  return {
    "moved_bytes": moved(text),
    "calls": dict(collections.Counter(called)),
    "float8_calls": float8_calls(text),
  }


def timed(cell: dict[str, Any], workload: workloads.Workload) -> dict[str, Any]:
  """Step time, energy and memory of a peer on a workload."""
  training, lowered = lowered_step(cell, workload)
  with meters.alone(cell):
    return _timed(cell, workload, training, lowered)


def _timed(
  cell: dict[str, Any], workload: workloads.Workload, training: Any, lowered: Any
) -> dict[str, Any]:
  began = time.perf_counter()
  compiled = lowered.compile()
  compile_s = time.perf_counter() - began
  inputs, labels = (jnp.asarray(array) for array in workloads.batch_of(workload))
  state = jax.jit(training.init)(jax.random.key(0), inputs)
  current = [state, jnp.zeros(())]

  def step() -> None:
    current[:] = compiled(current[0], inputs, labels)

  def wait() -> None:
    jax.block_until_ready(current[1])

  found = meters.measure(step, wait, cell["seconds"])
  stats = jax.devices()[0].memory_stats() or {}
  return {
    **found,
    "batch": workload.inputs.shape[0],
    "compile_s": compile_s,
    **of_text(compiled.as_text()),
    "peak_bytes": stats.get("peak_bytes_in_use"),
    "compiler_bytes": needed(compiled),
    "loss": float(current[1]),
  }


def largest(cell: dict[str, Any]) -> dict[str, Any]:
  """The largest batch that fits, from the line through two compiled sizes, then run."""
  limit = cell.get("limit") or (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  if limit is None:
    raise ValueError("The cell must have a limit in bytes where the device states none. Add it.")
  first = workload_of(cell).inputs.shape[0]
  steps = [lowered_step(cell, workload_of(cell, n))[1] for n in (first, 2 * first)]
  with meters.alone(cell):
    sizes = [needed(step.compile()) for step in steps]
  slope = (sizes[1] - sizes[0]) / first
  batch = math.floor((limit - sizes[0]) / slope + first)
  for share in (1.0, 0.95, 0.9, 0.8):
    size = max(_ALIGN, int(batch * share) // _ALIGN * _ALIGN)
    try:
      return timed(cell, workload_of(cell, size))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
  raise RuntimeError(f"No batch below {batch} fits in {limit} bytes. Give a smaller limit.")


def scatter(cell: dict[str, Any]) -> dict[str, Any]:
  """The gradient of an embedding alone: random tokens, one token, and as a matmul (xla#46225)."""
  workload = workload_of(cell)
  vocabulary, width = workload.sizes["vocabulary"], workload.sizes.get("width", 768)
  tokens = jnp.asarray(workloads.batch_of(workload)[0])
  cotangent = jax.random.normal(jax.random.key(1), (*tokens.shape, width))

  def scattered(tokens: jax.Array) -> jax.Array:
    return jnp.zeros((vocabulary, width)).at[tokens].add(cotangent)

  def multiplied(tokens: jax.Array) -> jax.Array:
    hot = jax.nn.one_hot(tokens.ravel(), vocabulary)
    return hot.T @ cotangent.reshape(-1, width)

  cases: dict[str, tuple[Callable[..., Any], jax.Array]] = {
    "random_ms": (scattered, tokens),
    "one_token_ms": (scattered, jnp.zeros_like(tokens)),
    "matmul_ms": (multiplied, tokens),
  }
  with meters.alone(cell):
    return {name: _time_of(fn, arg, cell["seconds"]) for name, (fn, arg) in cases.items()}


def optimizer(cell: dict[str, Any]) -> dict[str, Any]:
  """AdamW's step alone, parameters and moments held as a row of `rounding.ROWS` has them."""
  from benchmarks.own import rounding

  leaves, size = workload_of(cell).inputs.shape
  tx = optax.adamw(1e-3)

  def begin(key: jax.Array) -> Any:
    params = [jax.random.normal(k, (size,)) for k in jax.random.split(key, leaves)]
    held, _ = rounding.optimizer_step(cell["peer"], params, tx)
    return held, jax.tree.map(lambda x: x / 100, held[0])

  _, step = rounding.optimizer_step(cell["peer"], [jnp.zeros(1)], tx)
  lowered = jax.jit(step, donate_argnums=0).lower(*jax.eval_shape(begin, jax.random.key(0)))
  with meters.alone(cell):
    compiled = lowered.compile()
    held, grads = jax.jit(begin)(jax.random.key(0))
    current = [held]

    def once() -> None:
      current[0] = compiled(current[0], grads)

    found = meters.measure(once, lambda: jax.block_until_ready(current[0]), cell["seconds"])
  bytes_held = sum(x.nbytes for x in jax.tree.leaves(current[0]))
  return {**found, "compiler_bytes": needed(compiled), "held_bytes": bytes_held / (leaves * size)}


def _time_of(fn: Callable[..., Any], argument: jax.Array, seconds: float) -> float:
  jitted = jax.jit(fn)
  last = [jitted(argument)]

  def step() -> None:
    last[0] = jitted(argument)

  return meters.measure(step, lambda: jax.block_until_ready(last[0]), seconds / 3)["step_ms"]


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
  "fixed": lambda cell: timed(cell, workload_of(cell)),
  "largest": largest,
  "scatter": scatter,
  "optimizer": optimizer,
  "float8": lambda cell: timed(cell, workload_of(cell)),
}


def main() -> None:
  """Measures the cell on the command line; prints its figures as JSON, in the last line."""
  cell = json.loads(sys.argv[1])
  jax.config.update("jax_default_matmul_precision", cell["precision"])
  figures = KINDS[cell["kind"]](cell)
  print(json.dumps({"framework": f"jax {jax.__version__}", **figures}))


if __name__ == "__main__":
  main()
