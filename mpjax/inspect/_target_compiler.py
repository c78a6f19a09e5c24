"""Compiles exported programs for a device that is only described; runs in a process of its own.

``python -P _target_compiler.py FOLDER``: reads ``job.json`` and the programs that it names, writes
``results.json``. JAX reads its settings when it is imported, hence the process; it needs JAX and
the target's compiler, not mpjax, so another environment can run it.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
  """Compiles the programs of a folder one after the other."""
  job = json.loads((folder / "job.json").read_text())
  device = describe_device(job)
  results = [compile_program(folder / name, device, job) for name in job["programs"]]
  (folder / "results.json").write_text(json.dumps(results))


def describe_device(job: dict[str, Any]) -> Any:
  """The first device of the topology that a job names."""
  import jax
  from jax.experimental import topologies

  host = jax.devices()[0]  # registers the plugins
  if job["platform"] == "cpu":
    return host
  options = dict(job["options"])
  if job["platform"] == "cuda":
    for plugin in ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"):
      # It raises where it is missing, and where JAX has registered it by itself.
      with contextlib.suppress(Exception):
        importlib.import_module(plugin).initialize()
  topology = topologies.get_topology_desc(
    platform=job["platform"], topology_name=job["topology"], **options
  )
  return topology.devices[0]


def compile_program(path: Path, device: Any, job: dict[str, Any]) -> dict[str, Any]:
  """The compiler's figures for one program, or why it could not compile it."""
  import jax
  from jax import export

  exported = export.deserialize(bytearray(path.read_bytes()))
  sharding = jax.sharding.SingleDeviceSharding(device)
  shapes = [
    jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in exported.in_avals
  ]

  def call(*arrays: Any) -> Any:
    return exported.call(*arrays)

  def lower(shapes: Sequence[Any]) -> Any:
    jitted = jax.jit(call, donate_argnums=tuple(job["donated"]))
    return jitted.trace(*shapes).lower(lowering_platforms=(job["platform"],))

  began = time.perf_counter()
  try:
    # What is lowered for a device that is not there has no cost analysis; for no device, it has.
    figures = read_figures(lower(shapes).compile(), lambda: lower(exported.in_avals))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    figures = {"error": str(error)}
  return {**figures, "compile_seconds": time.perf_counter() - began}


def read_figures(compiled: Any, lowered: Callable[[], Any]) -> dict[str, Any]:
  """What a compiler states of a program, with the program's text; None for what it does not state.

  That for GPUs states no FLOPs; then they are those of the program as it was lowered.
  """
  memory, costs = compiled.memory_analysis(), costs_of(compiled)
  sizes = ("argument", "temp", "output", "alias")
  states_flops = "flops" in costs
  return {
    **{f"{size}_bytes": getattr(memory, f"{size}_size_in_bytes", None) for size in sizes},
    "flops": costs["flops"] if states_flops else costs_of(lowered()).get("flops"),
    "flops_lowered": not states_flops,
    "bytes_moved": costs.get("bytes accessed"),
    "text": compiled.as_text(),
    "error": None,
  }


def costs_of(program: Any) -> dict[str, float]:
  """XLA's cost analysis of a lowered or a compiled program; empty where it has none."""
  costs = program.cost_analysis() or {}
  return costs[0] if isinstance(costs, list) else costs


if __name__ == "__main__":
  main(Path(sys.argv[1]))
