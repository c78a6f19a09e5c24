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

  began = time.perf_counter()
  lowered = (
    jax.jit(call, donate_argnums=tuple(job["donated"]))
    .trace(*shapes)
    .lower(lowering_platforms=(job["platform"],))
  )
  try:
    figures = read_figures(lowered.compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    figures = {"error": str(error)}
  return {**figures, "compile_seconds": time.perf_counter() - began}


def read_figures(compiled: Any) -> dict[str, Any]:
  """What a compiler states of a compiled program; None for what it does not state."""
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
  costs = costs[0] if isinstance(costs, list) else costs
  sizes = ("argument", "temp", "output", "alias")
  return {
    **{f"{size}_bytes": getattr(memory, f"{size}_size_in_bytes", None) for size in sizes},
    "flops": costs.get("flops"),
    "bytes_moved": costs.get("bytes accessed"),
    "error": None,
  }


if __name__ == "__main__":
  main(Path(sys.argv[1]))
