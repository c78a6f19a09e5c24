"""The rows of what `explain` returns."""

from __future__ import annotations

from dataclasses import dataclass

from mpjax.inspect._source_lines import Line


@dataclass(frozen=True)
class OpFlow:
  """Operations of one kind in one module.

  Attributes:
    module: The module's path.
    op: The primitive's name.
    rule: What the table said: lower, full, follow, ...; "unknown" where it says nothing.
    dtype: What they compute in; of a matmul with integer operands the integers' dtype.
    returns: What they return.
    won: The rule of the policy map that governs them, "default" for none.
    backward: Whether they stand in the backward pass.
    count: How many there are in the program.
    flops: Multiplications and additions of matmuls and convolutions, loops multiplied out.
    bytes: What they return, in bytes of floats, loops multiplied out, before any fusion.
  """

  module: str
  op: str
  rule: str
  dtype: str
  returns: str
  won: str
  backward: bool
  count: int
  flops: float
  bytes: float


@dataclass(frozen=True)
class Float8Flow:
  """Matmuls of a module whose policy asks for float8.

  Attributes:
    module: The module's path.
    backward: Whether they stand in the backward pass of what is explained.
    reason: Why they multiply in 16 bits; empty if they multiply in float8.
    count: How many there are in the program.
    flops: Their multiplications and additions, loops multiplied out.
  """

  module: str
  backward: bool
  reason: str
  count: int
  flops: float

  @property
  def formats(self) -> str:
    """What they multiply, what they return, and what their derivative multiplies."""
    if self.reason:
      return "in 16 bits"
    return "e5m2 x e4m3 -> bf16" if self.backward else "e4m3 x e4m3 -> bf16, backward e5m2"


@dataclass(frozen=True)
class WideMatmul:
  """Matmuls of one line that a 16-bit policy leaves in float32 for what they compute.

  Attributes:
    module: The module's path.
    line: The line of the user's code.
    reason: What they are, and why they need float32.
    backward: Whether they stand in the backward pass of what is explained.
    count: How many there are in the program.
    flops: Their multiplications and additions, loops multiplied out.
  """

  module: str
  line: Line
  reason: str
  backward: bool
  count: int
  flops: float


@dataclass(frozen=True)
class CastFlow:
  """The casts in one module from one dtype to another."""

  module: str
  source: str
  target: str
  count: int


@dataclass(frozen=True)
class IslandFlow:
  """Connected operations that run in float32 in a 16-bit module, and which one asked for it."""

  module: str
  line: Line
  ops: tuple[str, ...]
  cause: str


@dataclass(frozen=True)
class Leak:
  """A place where a narrow value met float32 and became float32.

  Attributes:
    module: The module's path.
    line: The line of the user's code.
    op: The primitive that widened.
    result: Its result's shape.
    widened_by: The operand that did it: where its float32 was born.
    bytes: How much more the values take that are float32 for no other reason.
    also: How many more narrow values what came out of it widened.
    read_by: The first matmul or convolution that must cast it, with its line; empty for none.
    backward: Whether it stands in the backward pass.
    modules: The paths of all the modules in which the line does the same, with repetitions; the
      other fields speak of the first, ``bytes`` and ``also`` of all.
  """

  module: str
  line: Line
  op: str
  result: str
  widened_by: tuple[str, ...]
  bytes: int
  also: int
  read_by: str
  backward: bool
  modules: tuple[str, ...] = ()

  @property
  def count(self) -> int:
    """How often the line does it."""
    return max(1, len(self.modules))


@dataclass(frozen=True)
class ModuleFlow:
  """A module's row: what its own operations are, and what those of its submodules are not."""

  module: str
  rule: str
  compute: str
  matmuls: int
  narrow_matmuls: int
  flops: float
  narrow_flops: float
  ops: dict[str, int]
  bytes: dict[str, float]
  casts: dict[str, int]
  islands: int
  leaks: int


@dataclass(frozen=True)
class RuleUse:
  """What one rule of the policy map governs."""

  rule: str
  policy: str
  modules: tuple[str, ...]
  ops: int


@dataclass(frozen=True)
class UnknownOp:
  """An operation that runs exactly as traced, in float32.

  Attributes:
    op: Its name: one that the table does not know, or that holds matmuls of its own.
    module: The module's path.
    line: The line of the user's code.
    matmuls: How many float32 matmuls and convolutions can be seen in it.
    flops: Their multiplications and additions.
  """

  op: str
  module: str
  line: Line
  matmuls: int = 0
  flops: float = 0.0


@dataclass(frozen=True)
class RemarkFlow:
  """Something that the policy overrides, or that cannot be promised under it.

  Attributes:
    kind: "precision" for an author's ``precision=`` that is overridden, "format" for a matmul in
      the other 16-bit format, to which its author cast, "loop" for a loop that ends by comparing
      floats which 16-bit matmuls move, "batch" for data that was taken for the parameters,
      "float64" and "complex" for matmuls of these, "narrowed" for what a rule for operations keeps
      in 16 bits although it is a small step, a change of a parameter or a running sum, "rule" for a
      rule of the policy map that never wins, "policy" for a region with a policy of its own, whose
      leaks were not looked for, "integers" for matmuls of integers, which run as written and break
      no promise.
    module: The module's path.
    line: The line of the user's code.
    text: What it is, and what to do.
    count: How often the line does it.
  """

  kind: str
  module: str
  line: Line
  text: str
  count: int = 1

  @property
  def breaks_promise(self) -> bool:
    """Whether a policy does not do what it promises for it."""
    return self.kind != "integers"
