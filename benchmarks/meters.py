"""Timing and energy of repeated calls on a device."""

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

GROUPS = 5


def energy_counter() -> Callable[[], float] | None:
  """A function that reads the first card's energy counter in joules; None where there is none."""
  try:
    import pynvml  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError:
    return None
  try:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
  except pynvml.NVMLError:  # no driver, or a card older than Volta
    return None
  return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def card() -> str:
  """The first card's name and driver; "no NVIDIA card" where there is none."""
  with contextlib.suppress(Exception):
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    return f"{name}, driver {pynvml.nvmlSystemGetDriverVersion()}"
  return "no NVIDIA card"


@contextlib.contextmanager
def alone(cell: Mapping[str, Any]) -> Iterator[None]:
  """Holds a cell's lock, so that no other process that asks for it uses the device meanwhile.

  Args:
    cell: its `lock`, a file, if it has one; and `alone_s`, for how many seconds at most: then a
      signal ends this process, for a compilation that does not end listens to nothing else.
  """
  path, seconds = cell.get("lock"), cell.get("alone_s", 0)
  if path is None:
    yield
    return
  import fcntl

  with Path(path).open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    signal.alarm(seconds)
    try:
      yield
    finally:
      signal.alarm(0)


def measure(step: Callable[[], None], wait: Callable[[], None], seconds: float) -> dict[str, Any]:
  """Times a step that a device runs behind Python's back.

  Args:
    step: enqueues one step; it has been called before.
    wait: returns when all that was enqueued is done.
    seconds: how long to measure, at least.

  Returns:
    `step_ms`, the median over groups of steps of their mean; `spread`, the slowest group to the
    fastest; `joules`, of one step, or None; `steps`.
  """
  count = _count(step, wait, seconds)
  joules = energy_counter()
  before = joules() if joules else None
  groups = [_group(step, wait, count) for _ in range(GROUPS)]
  used = (joules() - before) / (GROUPS * count) if joules and before is not None else None
  return {
    "step_ms": 1000 * statistics.median(groups),
    "spread": max(groups) / min(groups),
    "joules": used,
    "steps": GROUPS * count,
  }


def _count(step: Callable[[], None], wait: Callable[[], None], seconds: float) -> int:
  for _ in range(3):
    step()
  wait()
  once = min(_group(step, wait, 1) for _ in range(3))
  return max(1, round(seconds / GROUPS / once))


def _group(step: Callable[[], None], wait: Callable[[], None], count: int) -> float:
  began = time.perf_counter()
  for _ in range(count):
    step()
  wait()
  return (time.perf_counter() - began) / count
