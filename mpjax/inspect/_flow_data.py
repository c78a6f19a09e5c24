"""What `mpjax.inspect._flow` knows of values, and what it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT32, describe
from mpjax._core.scopes import Path
from mpjax._engine.planning.plan import Read
from mpjax._engine.program.kinds import Form, Kind, is_data
from mpjax._engine.program.versions import Literal
from mpjax.inspect._source_lines import UNKNOWN, Line


class Birth(NamedTuple):
  """Where float32 comes from.

  Attributes:
    kind: "argument", "constant", "number", "integers", "random", "operation", "unknown" or
      "formats"; or "meant", if the table, a rule or a marker asks for it.
    what: Its name and shape.
    line: The line that made it, where one did.
  """

  kind: str
  what: str
  line: Line = UNKNOWN

  def __str__(self) -> str:
    where = f" at {self.line}" if self.line.line else ""
    return f"{_WORDS[self.kind]} {self.what}".rstrip() + where


_WORDS = {
  "argument": "the argument",
  "constant": "the constant",
  "number": "the number",
  "integers": "integers made float:",
  "random": "random numbers",
  "operation": "the result of",
  "unknown": "the unknown operation",
  "formats": "two 16-bit formats:",
  "meant": "",
}
MEANT = Birth("meant", "")


class Value(NamedTuple):
  """What is known of a value beside its form."""

  narrow: bool = False
  """Whether it is 16-bit in meaning, in whatever dtype a body of a jit takes it."""
  origins: frozenset[Any] = frozenset()
  """If not: its births, and the numbers of the widenings that it came out of. Of what is no float:
  that it is random, or a number that stands in the program."""
  history: frozenset[int] = frozenset()
  """The widenings that led to it, sensitive operations between them or not."""
  touched: bool = False
  """Whether it comes from a narrow value."""
  decided: bool = False
  """Of a boolean: whether narrow values, compared with others, decided it."""


NOTHING = Value()


def born(birth: Birth) -> Value:
  """A float32 value, or one that becomes float32, that was made here."""
  return Value(False, frozenset([birth]))


def joined(values: Iterable[Value]) -> Value:
  """What is known of a value that is one of several."""
  known = [v for v in values if v != NOTHING]
  if not known:
    return NOTHING
  return Value(
    all(v.narrow for v in known),
    frozenset().union(*(v.origins for v in known)),
    frozenset().union(*(v.history for v in known)),
    any(v.touched for v in known),
    any(v.decided for v in known),
  )


def widenings_in(origins: Iterable[Any]) -> list[int]:
  """The numbers of the widenings among the origins of a value."""
  return [origin for origin in origins if isinstance(origin, int)]


def read_value(
  env: dict[Any, Value], atom: Any, read: Read, form: Form | None, line: Line
) -> Value:
  """A value where it is used: after it left its module."""
  if isinstance(atom, Literal) and (form is None or is_data(form)):
    return born(Birth("number", f"{float(atom.val):g}", line)) if _is_real(atom) else NOTHING
  if form is None:
    return env[atom]
  if form.kind < Kind.NARROW:
    return NOTHING
  value = env[atom]
  if read.via is not None and read.via == FLOAT32:
    return value._replace(narrow=False, origins=frozenset([MEANT]))
  return value if is_data(form) else value._replace(narrow=True, origins=frozenset(), touched=True)


def held_value(value: Value, form: Form | None) -> Value:
  """A value as its form has it."""
  if form is None or is_data(form):
    return value
  return NOTHING if form.kind < Kind.NARROW else Value(True, frozenset(), value.history, True)


def _is_real(atom: Literal) -> bool:
  return np.ndim(atom.val) == 0 and np.asarray(atom.val).dtype.kind in "iuf"


def made_of_no_floats(name: str, values: Sequence[Value], line: Line) -> Value:
  """What is known of a result that is no float: of its randomness, numbers and who decided it."""
  if name in _RANDOM:
    return born(Birth("random", "", line))
  births = frozenset().union(*(v.origins for v in values))
  kept = births if name in _MOVES else frozenset(b for b in births if _is_random(b))
  compared = name in _COMPARISONS and any(v.narrow or v.touched for v in values)
  decided = compared or any(v.decided for v in values)
  return Value(False, kept, decided=decided) if kept or decided else NOTHING


def float_of_integers(values: Sequence[Value], aval: Any, line: Line) -> Birth:
  """Where a float comes from that was no float."""
  known = [b for v in values for b in v.origins if isinstance(b, Birth)]
  if known:
    return known[0]
  return Birth("integers", describe(aval), line)


def _is_random(origin: Any) -> bool:
  return isinstance(origin, Birth) and origin.kind == "random"


_RANDOM = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"})
_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "is_finite"})
_MOVES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"})


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


class Remark(NamedTuple):
  """Something that a policy overrides, or that cannot be promised under it.

  Attributes:
    kind: "precision", "format", "float64", "complex", "narrowed", "integers", "loop", "batch",
      "rule" or "policy".
    path: The module's path.
    line: Where it is.
    what: Which operation or value it is about.
  """

  kind: str
  path: Path
  line: Line
  what: str = ""


class OpKey(NamedTuple):
  """Operations that a report counts together."""

  path: Path
  backward: bool
  op: str
  rule: str
  dtype: str
  returns: str
  won: int | None


class Float8Key(NamedTuple):
  """Matmuls of a policy that asks for float8, which a report counts together.

  Attributes:
    path: The module's path.
    backward: Whether in its backward pass.
    reason: Why they multiply in 16 bits; empty if they do not.
  """

  path: Path
  backward: bool
  reason: str


class WideKey(NamedTuple):
  """Matmuls in float32 that a report counts together.

  Attributes:
    path: The module's path.
    backward: Whether in its backward pass.
    line: Where they are.
    reason: Why they do not multiply in 16 bits.
  """

  path: Path
  backward: bool
  line: Line
  reason: str


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
  remarks: Counter[Remark] = field(default_factory=Counter)
  float8: dict[Float8Key, OpCount] = field(default_factory=dict)
  wide: dict[WideKey, OpCount] = field(default_factory=dict)
  loops: int = 0
