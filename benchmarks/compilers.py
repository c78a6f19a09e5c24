"""XLA's compilers for CPU, NVIDIA GPUs and TPUs, none of which needs its device.

Each asks for an environment of its own; see README.md beside this file. JAX reads its settings
when it is imported, so `prepare` comes first and imports nothing.
"""

import contextlib
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_QUICK = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
_GPU = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is shared: there is no device
}

ENVIRONMENT = {
  "cpu": {},
  "h100": _GPU,
  "v100": _GPU,
  "v5e": {**_TPU, "TPU_ACCELERATOR_TYPE": "v5litepod-4"},
  "v6e": {**_TPU, "TPU_ACCELERATOR_TYPE": "v6e-4"},
}
TARGETS = tuple(ENVIRONMENT)

PLATFORM = {"cpu": "cpu", "h100": "cuda", "v100": "cuda", "v5e": "tpu", "v6e": "tpu"}


def prepare(target: str, *, quick: bool = False) -> None:
  """Sets the environment variables of a target; call it before JAX is imported.

  Flags of XLA that are set already stay, and so does `JAX_PLATFORMS`.

  Args:
    target: one of `TARGETS`.
    quick: whether to compile without optimizing, where what is computed matters and not how fast.
  """
  settings = dict(ENVIRONMENT[target])
  flags = [
    os.environ.get("XLA_FLAGS", ""),
    settings.pop("XLA_FLAGS", ""),
    *(_QUICK if quick else ()),
  ]
  os.environ.update(settings, XLA_FLAGS=" ".join(filter(None, flags)))
  os.environ.setdefault("JAX_PLATFORMS", "cpu")


def target_device(target: str) -> Any:
  """The device that a target's compiler compiles for, present or only described."""
  return target_devices(target, 1)[0]


def target_devices(target: str, count: int) -> list[Any]:
  """Some devices of one machine of a target (of a TPU four at most), present or only described."""
  import jax
  from jax.experimental import topologies

  import mpjax

  host = jax.devices()  # registers the plugins
  if target == "cpu":
    return host[:count]
  if PLATFORM[target] == "tpu":
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:2x2")
    return described.devices[:count]
  with contextlib.suppress(Exception):  # raises where JAX has registered the plugin by itself
    importlib.import_module("jax_plugins.xla_cuda12").initialize()
  text = (Path(mpjax.__file__).parent / "targets" / f"{target}.txtpb").read_text()
  topology = topologies.get_topology_desc(
    platform="cuda", topology_name=target, target_config=text, topology=f"1x{count}x1"
  )
  return topology.devices


def compile_for(target: str, step: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
  """Compiles a train step for a target, its state donated.

  Args:
    target: one of `TARGETS`.
    step: a function whose first argument is donated.
    arguments: pytrees of `jax.ShapeDtypeStruct`.

  Returns:
    The compiled step, which can be read (`memory_analysis()`, `as_text()`) but run on CPU only.
  """
  import jax

  sharding = jax.sharding.SingleDeviceSharding(target_device(target))
  placed = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
  )
  traced = jax.jit(step, donate_argnums=0).trace(*placed)
  return traced.lower(lowering_platforms=(PLATFORM[target],)).compile()


def figures(compiled: Any, target: str) -> dict[str, Any]:
  """What a compiler says of its program, and what stands in the program's text."""
  from mpjax.inspect import _compiled_text

  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  text = compiled.as_text()
  device_bytes = _compiled_text.moved(text)
  return {
    "temp_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "converts": len(re.findall(r" convert\(", text)),
    "kernels": kernels(text),
    "bytes_moved": int(costs["bytes accessed"]) if costs else device_bytes,
    "device_bytes": device_bytes,
    **_estimate(text, target),
  }


def kernels(text: str) -> int:
  """How many kernels a compiled program runs: fusions, custom calls, copies and the like.

  A copy that runs beside others is one, a loop's count as often as it runs.
  """
  from mpjax.inspect import _compiled_text

  def is_one(kernel: Any) -> bool:
    return not kernel.opcode.endswith(("-done", "async-update"))

  return round(_compiled_text._Program(text).total(is_one))


def _estimate(text: str, target: str) -> dict[str, Any]:
  """The time of a step in milliseconds, as far as the compiler's text tells it."""
  from mpjax.inspect import _compiled_text
  from mpjax.inspect._targets import card_of

  if PLATFORM[target] == "cuda":
    seconds = _compiled_text.roofline(text, card_of(target)).seconds
    return {"estimated_ms": round(seconds * 1e3, 4)}
  cycles = _compiled_text.estimated_cycles(text)
  return {} if cycles is None else {"estimated_mcycles": round(cycles / 1e6, 4)}
