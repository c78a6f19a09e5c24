"""The report of `cost`: what each policy needs, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mpjax.inspect._float8 import Float8Work
from mpjax.inspect._report import Report, Table

_MIB, _GIB = 2**20, 2**30
_ROOFLINE = (
  "Kernel by kernel the longer of bytes over bandwidth and operations over the peak of their "
  "dtype, by the data sheet; without launches, partly filled tiles and what caches save."
)
_CYCLES = (
  "As the compiler expects, instruction by instruction; without copies that run beside others, "
  "kernels whose cost it is not told, and the host."
)


class CostRow(NamedTuple):
  """What the compiler states of the step under one policy; None for what it does not state.

  Attributes:
    policy: The policy's name.
    argument_bytes: Memory of the arguments.
    temp_bytes: What the step needs beyond arguments and results.
    output_bytes: Memory of the results.
    alias_bytes: The part of the results that lies where donated arguments lay.
    flops: Floating-point operations of a step.
    bytes_moved: Bytes read and written in a step. The compiler for GPUs does not state them: there
      they are the operands and results of the compiled program's kernels.
    compile_seconds: The time to compile it.
    error: Why the compiler gave up, if it did: the step does not fit into the device's memory.
    flops_lowered: Whether ``flops`` is XLA's figure for the program before it is compiled, for the
      compiler states none, as that for GPUs: the body of a loop counts once, and what becomes a
      call of a library not at all.
    float8: What of the step multiplies in float8, under a policy that asks for it.
    float8_calls: How many matmuls take float8 as compiled, of which those that share an operand may
      be one; and how many float8 arrays become 16-bit again, for a matmul that does not. Only the
      compiler for GPUs says so.
    estimated_seconds: The time on a GPU by its data sheet: the sum, over the kernels of the
      compiled program, of the longer of their bytes over the memory's bandwidth and their
      operations over the peak of the dtype that they multiply in. A card is slower where its tiles
      are not full or kernels are small, and faster where a cache holds what a loop reads again:
      compare policies.
    unknown_kernels: How many kernels do work of which the program says nothing, such as those of
      Pallas: they are in that time with their bytes alone.
    estimated_cycles: The time that the compiler for TPUs expects, in cycles of a core: the sum of
      what it writes beside its instructions, loops as often as they run. Copies that run beside
      others, and kernels whose cost it is not told, are not in it.
  """

  policy: str
  argument_bytes: int | None
  temp_bytes: int | None
  output_bytes: int | None
  alias_bytes: int | None
  flops: float | None
  bytes_moved: float | None
  compile_seconds: float
  error: str | None = None
  flops_lowered: bool = False
  float8: Float8Work | None = None
  float8_calls: tuple[int, int] | None = None
  estimated_seconds: float | None = None
  unknown_kernels: int = 0
  estimated_cycles: float | None = None

  @property
  def peak_bytes(self) -> int | None:
    """What the device must hold: arguments, results that are not donated ones, and the rest."""
    sizes = (self.argument_bytes, self.temp_bytes, self.output_bytes, self.alias_bytes)
    known = [size for size in sizes if size is not None]
    return sum(known) - 2 * known[3] if len(known) == 4 else None


@dataclass(frozen=True, repr=False)
class CostReport(Report):
  """Memory, operations and bytes moved of a compiled step, a row a policy.

  Attributes:
    target: What it was compiled for.
    memory_bytes: The memory of one such device; None if it is not known.
    rows: One row a policy, in the order asked for.
    parameters: How many parameters there are, in the arguments that hold them.
    bytes_per_parameter: The memory, for each of them, of what a step takes and hands back:
      parameters, and with them the optimizer's state where that is an argument too. 12 for float32
      parameters with Adam, 6 for bfloat16 ones with `mpjax.stochastic_rounding` and
      `mpjax.bfloat16_states`. None if there are no parameters.
    inside: Where the step has a 16-bit policy of its own inside, such as a model of
      `mpjax.apply_policy`: the innermost policy governs, so that part is the same in every row.
      None if it has none, or takes the policy as a parameter.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> report = mpjax.inspect.cost(lambda w, x: x @ w, square, square, policies=["float32"])
    >>> report.parameters, report.rows[0].output_bytes, report.fits(report.rows[0])
    (64, 256, None)
  """

  target: str
  memory_bytes: int | None
  rows: tuple[CostRow, ...]
  parameters: int = 0
  bytes_per_parameter: float | None = None
  inside: str | None = None

  @property
  def summary(self) -> str:
    """What each policy needs, and whether it fits."""
    first = self.rows[0]
    words = [f"{row.policy} {self._need(row, first)}" for row in self.rows]
    where = "" if self.memory_bytes is None else f", {_size(self.memory_bytes)} a device"
    inside = (
      "" if self.inside is None else f" Not compared is what has its own policy: {self.inside}."
    )
    return f"On {self.target}{where}: {'; '.join(words)}.{inside}"

  def fits(self, row: CostRow) -> bool | None:
    """Whether the step fits into one device; None if the device's memory is not known."""
    if row.error is not None:
      return False
    if self.memory_bytes is None or row.peak_bytes is None:
      return None
    return row.peak_bytes <= self.memory_bytes

  def tables(self) -> list[Table]:
    """A row a policy."""
    header = ["policy", "args MiB", "temp MiB", "output MiB", "peak MiB", "GFLOP", "moved MiB"]
    rows = [
      [
        row.policy,
        *(
          _number(size, _MIB)
          for size in (row.argument_bytes, row.temp_bytes, row.output_bytes, row.peak_bytes)
        ),
        _number(row.flops, 1e9) + "~" * row.flops_lowered,
        _number(row.bytes_moved, _MIB),
      ]
      for row in self.rows
    ]
    notes = ["peak: args + temp + output, what is donated once; - where the compiler says nothing."]
    errors = [f"{row.policy}: {row.error.splitlines()[0][:200]}" for row in self.rows if row.error]
    if any(row.flops_lowered for row in self.rows):
      notes.append("~: of the program before it is compiled, the body of a loop once.")
    notes += [
      f"{row.policy}: {_in_float8(row.float8, row.float8_calls)}."
      for row in self.rows
      if row.float8
    ]
    if self.bytes_per_parameter is not None:
      notes.append(
        f"held from step to step: {self.bytes_per_parameter:.1f} bytes a parameter, of which there "
        f"are {self.parameters:,}."
      )
    if self.inside is not None:
      notes.append(
        f"a policy inside governs its part in every row ({self.inside}): give the step of the "
        "plain model to compare policies."
      )
    return [Table(header, rows, notes=[*notes, *errors]), *self._times()]

  def _times(self) -> list[Table]:
    """The estimated time of each policy, if there is one of the first."""
    first = self.rows[0]
    if first.estimated_seconds:
      unit, scale, note = "ms", 1e-3, _ROOFLINE
    elif first.estimated_cycles:
      unit, scale, note = "Mcycles", 1e6, _CYCLES
    else:
      return []
    times = [row.estimated_seconds or row.estimated_cycles for row in self.rows]
    base = times[0] or 1.0
    rows = [
      [row.policy, _number(time, scale), "-" if time is None else f"{time / base:.2f}"]
      for row, time in zip(self.rows, times, strict=True)
    ]
    notes = [
      f"{row.policy}: {row.unknown_kernels} kernels count with their bytes alone."
      for row in self.rows
      if row.unknown_kernels
    ]
    header = ["policy", unit, f"to {first.policy}"]
    return [Table(header, rows, title="Estimated time of a step", notes=[note, *notes])]

  def _need(self, row: CostRow, first: CostRow) -> str:
    if row.peak_bytes is None:
      return "does not fit" if row.error else "needs what the compiler does not state"
    words = f"needs {_size(row.peak_bytes)}"
    if row is not first and first.peak_bytes:
      words += f" ({row.peak_bytes / first.peak_bytes:.2f} of {first.policy})"
    fits = self.fits(row)
    return words if fits is None else f"{words}, which {'fits' if fits else 'does not fit'}"


def _in_float8(work: Float8Work, compiled: tuple[int, int] | None) -> str:
  """What a step multiplies in float8, planned and compiled, in words."""
  words = (
    f"{work.matmuls} matmuls with {work.share:.0%} of the FLOP in float8, for which "
    f"{_size(work.rounded_bytes)} are rounded"
  )
  words += f"; {work.small} are too small to gain" * bool(work.small)
  if compiled is None:
    return words
  calls, widened = compiled
  lost = f", and {widened} of their operands are made 16-bit again" * bool(widened)
  return f"{words}; compiled, they are {calls} float8 calls{lost}"


def _number(value: float | None, unit: float) -> str:
  return "-" if value is None else f"{value / unit:.2f}"


def _size(value: float) -> str:
  return f"{value / _GIB:.1f} GiB" if value >= _GIB else f"{value / _MIB:.1f} MiB"
