"""Bytes that a compiled program moves to and from a device's memory, read off its text.

XLA's own figure, `cost_analysis()`, counts a copy into the fast memory of a TPU's core and what is
read there like any other, so that of two programs that read the same, the one that fetches more of
it ahead of time seems to move more; and it counts a loop once. GPUs' programs have no such figure.
"""

import math
import re
from collections.abc import Iterator

_ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_ITEM |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_FAST_MEMORY = re.compile(r"S\([1-9]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%?[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{\s*$")

# These rename or group what lies in memory; nothing moves.
_FREE = frozenset({"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"})
# These wait for what was counted where it began.
_DONE = frozenset({"copy-done", "slice-done"})


def moved(text: str) -> int:
  """Bytes that the kernels of a compiled program read and write.

  Each kernel counts with the whole of its operands and results that lie in the device's memory: a
  slice that is updated in place therefore counts as its whole array. A copy that runs beside others
  counts with what it copies, a loop as often as the compiler knows it to run, a conditional as its
  costliest branch.

  Args:
    text: `compiled.as_text()`.
  """
  computations = dict(_computations(text))
  (entry,) = (name for name in computations if name.startswith("ENTRY "))
  return _moved(computations, entry)


def size(shape: str) -> int:
  """Bytes of an array or a tuple in the device's memory, as the text writes its shape."""
  return sum(_sizes(shape))


def _sizes(shape: str, everywhere: bool = False) -> list[int]:
  """Bytes of each array of a shape, of one in a core's fast memory none unless asked for."""
  return [
    math.prod(int(n) for n in dims.split(",") if n) * _ITEM.get(kind, 0)
    if everywhere or not _FAST_MEMORY.search(layout)
    else 0
    for kind, dims, layout in _SHAPE.findall(shape)
  ]


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  name, lines = "", []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      name, lines = (header[1] or "") + header[2].lstrip("%"), []
    elif line.startswith("}") and name:
      yield name, lines
    else:
      lines.append(line)


def _moved(computations: dict[str, list[str]], name: str) -> int:
  sizes: dict[str, int] = {}
  total = 0
  for line in computations[name]:
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    result, shape, opcode, rest = found.groups()
    sizes[result.lstrip("%")] = size(shape)
    if opcode == "while":
      total += _loop(computations, rest)
    elif opcode == "conditional":
      total += max(_moved(computations, branch) for branch in _branches(rest))
    elif opcode in _COPIED:
      total += _COPIED[opcode](shape)
    elif opcode not in _FREE | _DONE:
      operands = re.findall(r"%?([\w.\-]+)", rest.split(")")[0])
      total += size(shape) + sum(sizes.get(operand, 0) for operand in operands)
  return total


def _copied(shape: str) -> int:
  """Bytes of a copy that began; its result is the copy, the source and a number."""
  return sum(_sizes(shape)[:2])


def _sliced(shape: str) -> int:
  """Bytes of a slice that is being copied; its result is the source, the slice and a number."""
  source, written, _ = _sizes(shape)
  read = _sizes(shape, everywhere=True)[1] if source else 0
  return read + written


_COPIED = {"copy-start": _copied, "slice-start": _sliced}


def _branches(rest: str) -> list[str]:
  listed = re.search(r"branch_computations=\{(.*?)\}", rest)
  found = listed[1] if listed else " ".join(re.findall(r"(?:true|false)_computation=(\S+)", rest))
  return re.findall(r"[\w.\-]+", found)


def _loop(computations: dict[str, list[str]], rest: str) -> int:
  body = re.search(r"body=%?([\w.\-]+)", rest)
  times = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
  if body is None:
    raise ValueError(f"A while loop must name its body. Got {rest[:80]!r}. Mend the pattern.")
  return _moved(computations, body[1]) * (int(times[1]) if times else 1)
