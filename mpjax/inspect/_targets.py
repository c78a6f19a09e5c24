"""Devices that programs can be compiled for without having one, and the process that does it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpjax._core.arguments import shown
from mpjax.inspect import _target_compiler
from mpjax.inspect._compiled_text import Card

_GIB = 2**30
_FOLDER = Path(__file__).parents[1] / "targets"


class Target(NamedTuple):
  """A device that a compiler can be told about.

  Attributes:
    name: As a user writes it: ``tpu:v5e``.
    platform: The platform that programs are lowered for.
    topology: What the compiler calls it.
    environment: What JAX must find in its environment when it is imported.
    memory: The bytes of the device's memory.
    config: The description of a GPU, a text proto of published figures; empty for a TPU.
    card: What a GPU does at most; None for a TPU.
  """

  name: str
  platform: str
  topology: str
  environment: dict[str, str]
  memory: int
  config: str = ""
  card: Card | None = None


def _tpu(name: str, accelerator: str, topology: str, gib: int) -> Target:
  environment = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": accelerator,
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is shared: there is no device
  }
  return Target(f"tpu:{name}", "tpu", topology, environment, gib * _GIB)


# Memory a chip: cloud.google.com/tpu/docs/system-architecture-tpu-vm
_TPUS = {
  "tpu:v4": _tpu("v4", "v4-8", "v4:2x2x1", 32),
  "tpu:v5e": _tpu("v5e", "v5litepod-4", "v5e:2x2", 16),
  "tpu:v5p": _tpu("v5p", "v5p-8", "v5p:2x2x1", 95),
  "tpu:v6e": _tpu("v6e", "v6e-4", "v6e:2x2", 32),
}
_GPUS = ("gpu:a100", "gpu:h100", "gpu:v100")
TARGETS = (*_GPUS, *_TPUS)
"""What `mpjax.inspect.cost` takes as ``target``."""


def read_target(name: str) -> Target:
  """Reads the name of a target.

  Raises:
    ValueError: If it is none of those known.
  """
  if name in _TPUS:
    return _TPUS[name]
  if name not in _GPUS:
    raise ValueError(f"target must be one of {', '.join(TARGETS)}. Got {name!r}. Name one of them.")
  kind = name.partition(":")[2]
  config = (_FOLDER / f"{kind}.txtpb").read_text()
  memory = _stated(config, "device_memory_size")
  # Without a device there is nothing to time kernels on.
  environment = {"XLA_FLAGS": _NO_AUTOTUNE}
  return Target(name, "cuda", kind, environment, memory, config, card_of(kind))


def card_of(kind: str) -> Card:
  """What a GPU of ``mpjax/targets`` does at most: ``a100``, ``h100`` or ``v100``."""
  config = (_FOLDER / f"{kind}.txtpb").read_text()
  return Card(_stated(config, "memory_bandwidth"), _PEAKS[kind])


def card_here(name: str) -> Card | None:
  """What the GPU that is present does at most, by the name that its driver gives it."""
  return next((card_of(kind) for kind in _PEAKS if kind in name.lower()), None)


def _stated(config: str, field: str) -> int:
  found = re.search(rf"{field}: (\d+)", config)
  assert found is not None, f"{field} is in each of mpjax's own files"
  return int(found[1])


# Operations a second without sparsity, by the data sheets of the SXM cards.
_PEAKS = {
  "v100": {"f16": 125e12, "f32": 15.7e12, "tf32": 15.7e12, "f64": 7.8e12},
  "a100": {"f16": 312e12, "bf16": 312e12, "tf32": 156e12, "f32": 19.5e12, "f64": 19.5e12},
  "h100": {
    "f8": 1979e12,
    "f16": 989.5e12,
    "bf16": 989.5e12,
    "tf32": 494.7e12,
    "f32": 66.9e12,
    "f64": 66.9e12,
  },
}
_NO_AUTOTUNE = "--xla_gpu_autotune_level=0"
_NEEDS = {
  "tpu": (("libtpu",), '"jax[tpu]" flatbuffers'),
  "cuda": (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), '"jax[cuda12]" flatbuffers'),
}


def check_installed(target: Target, python: str | None) -> None:
  """Refuses a target whose compiler this environment lacks.

  Raises:
    ModuleNotFoundError: If something is missing; the message has the command that installs it.
  """
  needed = [] if _has("flatbuffers") else ["flatbuffers"]
  modules, packages = _NEEDS.get(target.platform, ((), "flatbuffers"))
  if python is None and modules and not any(map(_has, modules)):
    needed.append(modules[0])
  if not needed:
    return
  elsewhere = (
    ""
    if python
    else ", or name the interpreter of an environment that has jax with it: python=, or --python"
  )
  raise ModuleNotFoundError(
    f"Compiling for {target.name} needs {' and '.join(needed)}; not installed here. Run: "
    f"pip install {packages} (no {target.platform.upper()} device is needed{elsewhere})."
  )


def _has(module: str) -> bool:
  parent = module.rpartition(".")[0]
  if parent and importlib.util.find_spec(parent) is None:
    return False
  return importlib.util.find_spec(module) is not None


def compile_for(
  target: Target, programs: Sequence[bytes], donated: Sequence[int], python: str | None
) -> list[dict[str, Any]]:
  """Compiles serialized exports for a target, in a process of its own.

  Returns:
    The compiler's figures, one dict a program.

  Raises:
    RuntimeError: If the process failed; the message has the end of what it said.
  """
  with tempfile.TemporaryDirectory(prefix="mpjax-") as name:
    folder = Path(name)
    names = [f"program{n}.bin" for n in range(len(programs))]
    for path, program in zip(names, programs, strict=True):
      (folder / path).write_bytes(program)
    (folder / "job.json").write_text(json.dumps(_job(target, names, donated)))
    _run([python or sys.executable, "-P", _target_compiler.__file__, name], target)
    return json.loads((folder / "results.json").read_text())


def _job(target: Target, programs: Sequence[str], donated: Sequence[int]) -> dict[str, Any]:
  options = {"target_config": target.config, "topology": "1x1x1"} if target.config else {}
  return {
    "platform": target.platform,
    "topology": target.topology,
    "options": options,
    "programs": list(programs),
    "donated": list(donated),
  }


def _run(command: Sequence[str], target: Target) -> None:
  environment = {**os.environ, **target.environment, "JAX_PLATFORMS": "cpu"}
  try:
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  except OSError as error:
    raise RuntimeError(
      f"python must be an interpreter that can be run. {shown(command[0])}: {error.strerror}. Give "
      "the path of one that has JAX with the compiler."
    ) from error
  if result.returncode:
    said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-12:])
    extra = _NEEDS.get(target.platform, ((), "nothing else"))[1]
    raise RuntimeError(
      f"The compiler for {target.name} must end without an error. {command[0]} ended with status "
      f"{result.returncode} and said:\n{said}\nSee whether that environment has JAX, flatbuffers "
      f"and the compiler ({extra}), and whether the step compiles for this machine."
    )
