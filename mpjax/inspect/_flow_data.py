"""What `mpjax.inspect._flow` knows of values, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mpjax._core.scopes import Path
from mpjax.inspect._source_lines import UNKNOWN, Line


class Birth(NamedTuple):
  """Where float32 comes from.

  Attributes:
    kind: "argument", "constant", "number", "integers", "operation", "unknown" or "formats"; or
      "meant", if the table, a rule or a marker asks for it.
    what: Its name and shape.
    line: The line that made it, where one did.
  """

  kind: str
  what: str
  line: Line = UNKNOWN

  def __str__(self) -> str:
    where = f" at {self.line}" if self.line.line else ""
    return f"{_WORDS[self.kind]} {self.what}{where}"


_WORDS = {
  "argument": "the argument",
  "constant": "the constant",
  "number": "the number",
  "integers": "integers made float:",
  "operation": "the result of",
  "unknown": "the unknown operation",
  "formats": "two 16-bit formats:",
  "meant": "",
}
MEANT = Birth("meant", "")


class Value(NamedTuple):
  """What is known of a float value beside its form."""

  narrow: bool = False
  """Whether it is 16-bit in meaning, in whatever dtype a body of a jit takes it."""
  origins: frozenset[Any] = frozenset()
  """If not: its births, and the numbers of the widenings that it came out of."""
  history: frozenset[int] = frozenset()
  """The widenings that led to it, sensitive operations between them or not."""
  touched: bool = False
  """Whether it comes from a narrow value."""


NOTHING = Value()


@dataclass
class Widening:
  """A place where a narrow value met float32 and became float32."""

  path: Path
  backward: bool
  op: str
  line: Line
  result: str
  births: set[Birth]
  bytes: int = 0
  """How much more the values take that are float32 for no other reason."""
  again: int = 0
  """How many more narrow values it widened."""
  reader: tuple[str, Line] | None = None
  """The first matmul or convolution that had to cast it."""
  before_matmul: bool = False

  @property
  def leaks(self) -> bool:
    """Whether float32 goes on: into a matmul, or along a stream of values that meets others."""
    return self.reader is not None or (self.again > 0 and self.before_matmul)


class OpKey(NamedTuple):
  """Operations that a report counts together."""

  path: Path
  backward: bool
  op: str
  rule: str
  dtype: str
  returns: str
  won: int | None


@dataclass
class OpCount:
  """How many operations, and what they cost."""

  count: int = 0
  flops: float = 0.0
  bytes: float = 0.0


class Island(NamedTuple):
  """Connected operations that run in float32 within a 16-bit scope."""

  path: Path
  line: Line
  ops: tuple[str, ...]
  cause: str


@dataclass
class Flow:
  """Everything that was counted along a plan."""

  ops: dict[OpKey, OpCount] = field(default_factory=dict)
  casts: Counter[tuple[Path, str, str]] = field(default_factory=Counter)
  widenings: list[Widening] = field(default_factory=list)
  islands: list[Island] = field(default_factory=list)
  foreign: list[tuple[Path, str, Line]] = field(default_factory=list)
  traced: dict[tuple[str, Line, Path], OpCount] = field(default_factory=dict)
  loops: int = 0
