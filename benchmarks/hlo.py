"""Bytes that a compiled program moves, read off its text where the compiler has no figure."""

import math
import re
from collections.abc import Iterator

_ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_ITEM |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%?[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{\s*$")

# These rename or group what lies in memory; nothing moves.
_FREE = frozenset({"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"})


def moved(text: str) -> int:
  """Bytes that the kernels of a compiled program read and write.

  Each kernel counts with the whole of its operands and results: a slice that is updated in place
  therefore counts as its whole array. A loop counts as often as the compiler knows it to run, a
  conditional as its costliest branch.

  Args:
    text: `compiled.as_text()`.
  """
  computations = dict(_computations(text))
  (entry,) = (name for name in computations if name.startswith("ENTRY "))
  return _moved(computations, entry)


def size(shape: str) -> int:
  """Bytes of an array or a tuple of arrays, as the text writes its shape."""
  return sum(
    _ITEM.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
    for kind, dims in _SHAPE.findall(shape)
  )


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
    elif opcode not in _FREE:
      operands = re.findall(r"%?([\w.\-]+)", rest.split(")")[0])
      total += size(shape) + sum(sizes.get(operand, 0) for operand in operands)
  return total


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
