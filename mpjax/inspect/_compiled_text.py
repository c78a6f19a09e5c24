"""What the text of a compiled program says of its kernels: bytes, operations and time.

XLA's own figure of the bytes, `cost_analysis()`, counts a copy into the fast memory of a TPU's core
and what is read there like any other, so that of two programs that read the same, the one that
fetches more of it ahead of time seems to move more; and it counts a loop once. GPUs' programs have
no such figure, and none of the time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_ITEM |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([0-9,]*)\](\{[^}]*\})?")
_FAST_MEMORY = re.compile(r"S\([1-9]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")

# These rename or group what lies in memory; nothing moves.
_FREE = frozenset({"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"})
# These wait for what was counted where it began.
_DONE = frozenset({"copy-done", "slice-done", "fusion-done"})
# These read of their first operand as much as they return.
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})


class Card(NamedTuple):
  """What a GPU does at most, by its data sheet.

  Attributes:
    bandwidth: Bytes a second to and from its memory.
    peaks: Operations a second of a matmul, without sparsity, by the dtype that it multiplies in as
      XLA writes it; ``tf32`` for float32 operands at the default precision, where there is such.
  """

  bandwidth: float
  peaks: Mapping[str, float]


class Roofline(NamedTuple):
  """The time of a compiled program on a GPU, by the card's data sheet.

  Attributes:
    seconds: The sum, over its kernels, of the longer of two times: that to read and write their
      operands and results, and that to multiply at the peak of their dtype.
    unknown: How many kernels do work of which the text says nothing, such as those of Triton and
      Pallas; they count with their bytes.
  """

  seconds: float
  unknown: int


def moved(text: str) -> int:
  """Bytes that the kernels of a compiled program read and write.

  Each kernel counts with its operands and results that lie in the device's memory: with the slices
  that it takes where it takes nothing else of an array, and with what it writes where it updates
  one in place. A copy that runs beside others counts with what it copies, a loop as often as the
  compiler knows it to run, a conditional as its costliest branch.

  Args:
    text: ``compiled.as_text()``.

  Returns:
    The bytes of one run.
  """
  program = _Program(text)
  return int(program.total(program.bytes_of))


def estimated_cycles(text: str) -> float | None:
  """The time that the compiler for TPUs expects a program to take, in cycles of a core.

  The sum of the estimates beside its instructions. Not in it are copies that do not wait for one
  another, kernels whose cost the compiler is not told, and the host.

  Args:
    text: ``compiled.as_text()``.

  Returns:
    The cycles of one run, loops and conditionals as in `moved`; ``None`` if there are no estimates,
    or for a kernel that runs none that it can make.
  """
  if '"estimated_cycles"' not in text:
    return None
  cycles = _Program(text).total(_cycles_of)
  return cycles if cycles < _NO_ESTIMATE else None


def roofline(text: str, card: Card) -> Roofline:
  """The time of a program compiled for a GPU, by the card's data sheet.

  Not in it are the launches of kernels, what keeps a kernel from its peak, and what a cache saves,
  such as a weight that fits there and is read again by each turn of a loop.

  Args:
    text: ``compiled.as_text()``.
    card: The GPU.

  Returns:
    The time of one run, loops and conditionals as in `moved`.
  """
  program = _Program(text)

  def seconds_of(kernel: _Instruction) -> float:
    work = program.work_of(kernel)
    multiplying = sum(operations / _peak(card, dtype) for dtype, operations in work)
    return max(program.bytes_of(kernel) / card.bandwidth, multiplying)

  return Roofline(program.total(seconds_of), round(program.total(_is_unknown)))


def float8_calls(text: str) -> tuple[int, int]:
  """How many matmuls of a program compiled for a GPU take float8, cuBLAS's and Triton's.

  And how many float8 arrays it makes 16-bit or float32 again, as it does where a matmul does not
  take them. Matmuls that share an operand may have become one.
  """
  values = set(_FLOAT8_VALUE.findall(text))
  dots = sum(left in values and right in values for left, right in _DOT.findall(text))
  calls = dots + text.count('custom_call_target="__cublas$lt$matmul$f8"')
  return calls, sum(name in values for name in _WIDENED.findall(text))


_DOT = re.compile(r" dot\(%([\w.-]+), %([\w.-]+)\)")
_FLOAT8_VALUE = re.compile(r"%([\w.-]+) = f8e\w+\[")
_WIDENED = re.compile(r" = (?:bf16|f16|f32)\[[^ ]* convert\(%([\w.-]+)\)")


def size(shape: str) -> int:
  """Bytes of an array or a tuple in the device's memory, as the text writes its shape."""
  return sum(_sizes(shape))


# Programs -----------------------------------------------------------------------------------------


class _Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


class _Program:
  """The computations of a compiled program, by name, and what each of their values is."""

  def __init__(self, text: str) -> None:
    self.computations: dict[str, list[_Instruction]] = {}
    self.shapes: dict[str, str] = {}
    self.entry = ""
    for is_entry, name, lines in _computations(text):
      self.computations[name] = found = [x for x in map(_instruction, lines) if x]
      self.shapes |= {instruction.name: instruction.shape for instruction in found}
      self.entry = name if is_entry else self.entry

  def total(self, cost: Callable[[_Instruction], float]) -> float:
    """The sum of what its kernels cost, as often as they run."""
    return self._total(self.entry, cost)

  def _total(self, name: str, cost: Callable[[_Instruction], float]) -> float:
    total = 0.0
    for instruction in self.computations[name]:
      if instruction.opcode == "while":
        total += self._total(_body(instruction), cost) * _times(instruction)
      elif instruction.opcode == "conditional":
        total += max(self._total(branch, cost) for branch in _branches(instruction.attributes))
      elif instruction.opcode in ("call", "async-start"):
        total += self._total(_called(instruction), cost)
      elif instruction.opcode not in _FREE:
        total += cost(instruction)
    return total

  def bytes_of(self, kernel: _Instruction) -> int:
    """What a kernel reads and writes."""
    if kernel.opcode in _COPIED:
      return _COPIED[kernel.opcode](kernel.shape)
    if kernel.opcode in _DONE or kernel.opcode.startswith("async-"):
      return 0
    read = sum(self._read_by(kernel, place) for place in range(len(kernel.operands)))
    return read + self._written_by(kernel)

  def _read_by(self, kernel: _Instruction, place: int) -> int:
    """The bytes that a kernel, or an instruction in one, reads of an operand."""
    whole = size(self.shapes.get(kernel.operands[place], ""))
    if kernel.opcode in _SLICES:
      return min(whole, size(kernel.shape)) if place == 0 else whole
    if kernel.opcode == "dynamic-update-slice":
      return 0 if place == 0 else whole
    if kernel.opcode != "fusion":
      return whole
    inside = self.computations[_called(kernel)]
    named = [x.name for x in inside if x.opcode == "parameter" and x.operands == (str(place),)]
    return min(whole, sum(self._read_inside(inside, name) for name in named))

  def _read_inside(self, inside: list[_Instruction], name: str) -> int:
    """The bytes of a value that the instructions of a fusion read."""
    read = 0
    for user in inside:
      for place in (n for n, operand in enumerate(user.operands) if operand == name):
        free = user.opcode == "bitcast"
        read += self._read_inside(inside, user.name) if free else self._read_by(user, place)
    return read

  def _written_by(self, kernel: _Instruction) -> int:
    """The bytes that a kernel writes."""
    if kernel.opcode == "dynamic-update-slice":
      return size(self.shapes.get(kernel.operands[1], ""))
    if kernel.opcode != "fusion":
      return size(kernel.shape)
    inside = {x.name: x for x in self.computations[_called(kernel)]}
    last = list(inside.values())[-1]
    results = [inside.get(name) for name in last.operands] if last.opcode == "tuple" else [last]
    updated = 0
    for result in results:
      while result is not None and result.opcode == "bitcast":
        result = inside.get(result.operands[0])
      if result is not None and result.opcode == "dynamic-update-slice":
        updated += size(result.shape) - size(self.shapes.get(result.operands[1], ""))
    return size(kernel.shape) - updated

  def work_of(self, kernel: _Instruction) -> Iterator[tuple[str, float]]:
    """The operations of the matmuls and convolutions in a kernel, and their dtypes."""
    if kernel.opcode == "fusion":
      for instruction in self.computations[_called(kernel)]:
        yield from self.work_of(instruction)
    elif kernel.opcode in ("dot", "convolution", "custom-call"):
      target = _target(kernel)
      operands = [self.shapes.get(name, "") for name in kernel.operands]
      for pattern, operations in _WORK.items():
        if re.match(pattern, target or kernel.opcode):
          yield _dtype(kernel, operands), operations(kernel, operands)
          return


def _computations(text: str) -> Iterator[tuple[bool, str, list[str]]]:
  is_entry, name, lines = False, "", []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      is_entry, name, lines = bool(header[1]), header[2], []
    elif line.startswith("}") and name:
      yield is_entry, name, lines
    else:
      lines.append(line)


def _instruction(line: str) -> _Instruction | None:
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  name, shape, opcode, rest = found.groups()
  if opcode == "fusion-start":  # of a GPU: a fusion that runs beside others
    opcode, shape = "fusion", _parts(shape)[1]
  listed, _, attributes = re.sub(r"/\*.*?\*/", "", rest).partition(")")
  return _Instruction(name, shape, opcode, tuple(re.findall(r"%?([\w.\-]+)", listed)), attributes)


def _parts(shape: str) -> list[str]:
  """The shapes that a tuple holds: of a begun fusion its operands, its result and a number."""
  parts, depth = [""], 0
  for letter in shape[1:-1]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def _match(pattern: str, text: str) -> str:
  found = re.search(pattern, text)
  return found[1] if found else ""


def _target(kernel: _Instruction) -> str:
  """What a custom call runs; empty for what is none."""
  return _match(r'custom_call_target="([^"]*)"', kernel.attributes)


def _called(instruction: _Instruction) -> str:
  return _named(instruction, r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


def _body(loop: _Instruction) -> str:
  return _named(loop, r"body=%?([\w.\-]+)")


def _named(instruction: _Instruction, pattern: str) -> str:
  name = _match(pattern, instruction.attributes)
  if not name:
    raise ValueError(
      f"An instruction '{instruction.opcode}' must name what it runs. Got "
      f"{instruction.attributes[:80]!r}. Mend the pattern."
    )
  return name


def _times(loop: _Instruction) -> int:
  return int(_match(r'known_trip_count":\{"n":"(\d+)"', loop.attributes) or 1)


def _branches(attributes: str) -> list[str]:
  listed = _match(r"branch_computations=\{(.*?)\}", attributes)
  found = listed or " ".join(re.findall(r"(?:true|false)_computation=(\S+)", attributes))
  return re.findall(r"[\w.\-]+", found)


# Bytes --------------------------------------------------------------------------------------------


def _sizes(shape: str, everywhere: bool = False) -> list[int]:
  """Bytes of each array of a shape, of one in a core's fast memory none unless asked for."""
  return [
    math.prod(_numbers(dims)) * _item(kind) if everywhere or not _FAST_MEMORY.search(layout) else 0
    for kind, dims, layout in _SHAPE.findall(shape)
  ]


def _item(kind: str) -> int:
  return 1 if kind.startswith("f8") else _ITEM.get(kind, 0)


def _numbers(listed: str) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", listed)]


def _copied(shape: str) -> int:
  """Bytes of a copy that began; its result is the copy, the source and a number."""
  return sum(_sizes(shape)[:2])


def _sliced(shape: str) -> int:
  """Bytes of a slice that is being copied; its result is the source, the slice and a number."""
  source, written, _ = _sizes(shape)
  read = _sizes(shape, everywhere=True)[1] if source else 0
  return read + written


_COPIED = {"copy-start": _copied, "slice-start": _sliced}


# Time ---------------------------------------------------------------------------------------------


_NO_ESTIMATE = 2.0**62
"""The compiler writes the largest integer where it knows none."""


def _cycles_of(kernel: _Instruction) -> float:
  return float(_match(r'"estimated_cycles":"(\d+)"', kernel.attributes) or 0)


def _peak(card: Card, dtype: str) -> float:
  """Operations a second; of what a card does not multiply by itself, those of float32."""
  return card.peaks.get(dtype, card.peaks["f32"])


def _dtype(kernel: _Instruction, operands: list[str]) -> str:
  """The dtype in which a kernel multiplies."""
  found = [m[1] for m in map(_SHAPE.search, operands[:2]) if m]
  kind = "f8" if found and all(x.startswith("f8") for x in found) else (found or ["f32"])[0]
  exact = re.search(r"operand_precision=\{[^}]*high|\"HIGH", kernel.attributes)
  return "tf32" if kind == "f32" and not exact else kind


def _elements(shape: str) -> list[int]:
  found = _SHAPE.search(shape)
  return _numbers(found[2]) if found else []


def _dot(kernel: _Instruction, operands: list[str]) -> float:
  """A matmul: two operations for each number of the result and each that is summed for it."""
  contracted = _match(r"lhs_contracting_dims=\{([^}]*)\}", kernel.attributes) or _match(
    r'"lhs_contracting_dimensions":\[([^\]]*)\]', kernel.attributes
  )
  left = _elements(operands[0])
  summed = math.prod(left[n] for n in _numbers(contracted))
  return 2.0 * math.prod(_elements(kernel.shape)) * summed


def _convolution(kernel: _Instruction, operands: list[str]) -> float:
  """A convolution, or the derivative of one: the same sums in another order.

  Each number of the convolution's result takes two operations for each of the filter's that belong
  to its feature. Which array is which follows from what is computed.
  """
  target = _target(kernel)
  first, second, result = (_elements(shape) for shape in (*operands[:2], kernel.shape))
  filters, made = second, result
  if target.endswith("BackwardInput"):
    made = first
  elif target.endswith("BackwardFilter"):
    filters, made = result, second
  features = _match(r"dim_labels=\w+_(\w+)->", kernel.attributes).index("o")
  return 2.0 * math.prod(made) * math.prod(filters) / max(filters[features], 1)


def _attention(kernel: _Instruction, operands: list[str]) -> float:
  """Fused attention: two matmuls of the scores' size forwards, five backwards."""
  shape = r'intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]'
  scores = _match(shape, kernel.attributes)
  matmuls = 5 if "Backward" in kernel.attributes else 2
  return 2.0 * matmuls * math.prod(_numbers(scores)) * _elements(operands[0])[-1]


_WORK: dict[str, Callable[[_Instruction, list[str]], float]] = {
  r"dot$|__cublas\$": _dot,
  r"convolution$|__cudnn\$conv": _convolution,
  r"__cudnn\$fmha": _attention,
}
_IDLE = re.compile(r"Sharding|.*(Barrier|AllocateBuffer|topk|cub\$|sort|rng)", re.IGNORECASE)
"""Custom calls that multiply nothing."""


def _is_unknown(kernel: _Instruction) -> bool:
  target = _target(kernel)
  known = _IDLE.match(target) or any(re.match(pattern, target) for pattern in _WORK)
  return bool(target) and not known
