"""Compiles exported programs for a device that is only described; runs in a process of its own.

``python -P _target_compiler.py FOLDER``: reads ``job.json`` and the programs that it names, writes
``results.json``. JAX reads its settings when it is imported, hence the process; it needs JAX and
the target's compiler, not mpjax, so another environment can run it.
"""

import contextlib
import importlib
import json
import re
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
    figures = read_figures(
      lower(shapes).compile(), lambda: lower(exported.in_avals), job["platform"]
    )
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    figures = {"error": str(error)}
  return {**figures, "compile_seconds": time.perf_counter() - began}


def read_figures(compiled: Any, lowered: Callable[[], Any], platform: str) -> dict[str, Any]:
  """What a compiler states of a program; None for what it does not state.

  That for GPUs states no FLOPs; then they are those of the program as it was lowered. It alone says
  which matmuls multiply in float8.
  """
  memory, costs = compiled.memory_analysis(), costs_of(compiled)
  sizes = ("argument", "temp", "output", "alias")
  states_flops = "flops" in costs
  return {
    **{f"{size}_bytes": getattr(memory, f"{size}_size_in_bytes", None) for size in sizes},
    "flops": costs["flops"] if states_flops else costs_of(lowered()).get("flops"),
    "flops_lowered": not states_flops,
    "bytes_moved": costs.get("bytes accessed"),
    "float8_calls": float8_calls(compiled.as_text()) if platform in _GPUS else None,
    "error": None,
  }


_GPUS = ("cuda", "gpu")
_DOT = re.compile(r" dot\(%([\w.-]+), %([\w.-]+)\)")
_FLOAT8_VALUE = re.compile(r"%([\w.-]+) = f8e\w+\[")
_WIDENED = re.compile(r" = (?:bf16|f16|f32)\[[^ ]* convert\(%([\w.-]+)\)")


def float8_calls(text: str) -> tuple[int, int]:
  """How many matmuls of a program compiled for a GPU take float8, cuBLAS's and Triton's.

  And how many float8 arrays it makes 16-bit or float32 again, as it does where a matmul does not
  take them. Matmuls that share an operand may have become one.
  """
  values = set(_FLOAT8_VALUE.findall(text))
  dots = sum(left in values and right in values for left, right in _DOT.findall(text))
  calls = dots + text.count('custom_call_target="__cublas$lt$matmul$f8"')
  return calls, sum(name in values for name in _WIDENED.findall(text))


def costs_of(program: Any) -> dict[str, float]:
  """XLA's cost analysis of a lowered or a compiled program; empty where it has none."""
  costs = program.cost_analysis() or {}
  return costs[0] if isinstance(costs, list) else costs


if __name__ == "__main__":
  main(Path(sys.argv[1]))
