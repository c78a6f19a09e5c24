"""What `explain` returns: the flow of dtypes, module by module."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpjax._core.dtypes import FLOAT32, short_name
from mpjax._core.policy import spec
from mpjax._core.policy_map import PolicyMap
from mpjax._core.primitives import MATMULS, Rule
from mpjax._core.scopes import Path
from mpjax._engine.running.float8 import FORWARD
from mpjax.inspect._flow_rows import (
  CastFlow,
  Float8Flow,
  IslandFlow,
  Leak,
  ModuleFlow,
  OpFlow,
  RemarkFlow,
  RuleUse,
  UnknownOp,
  WideMatmul,
)
from mpjax.inspect._report import Report, Table, in_bytes, in_units
from mpjax.inspect._source_lines import texts_of

TOP = "(top)"
Namer = Callable[[Path], str]
"""How a report prints the path of a module."""


def module_name(path: Path, root: int) -> str:
  """A module's path as rules spell it, without so many leading components."""
  return "/".join(path[root:]) or TOP


@dataclass(frozen=True, repr=False)
class FlowReport(Report):
  """What a policy does to a function, as `explain` found it.

  Attributes:
    name: The function or module.
    policy: The policies.
    ops: Operations, by module, primitive and dtype.
    casts: Casts by module.
    leaks: Where float32 leaked, in program order; a line once, however often it leaks.
    absorbed: Where narrow values met float32 just before it was needed anyway: losses, masks.
    islands: What runs in float32 because the table says so.
    unknown: Operations that ran as traced.
    loops: How many while loops there are; their bodies are counted once.
    depth: How many components of a path make a row; None for all.
    remarks: What the policy overrides, and what cannot be promised under it.
    float8: The matmuls whose policy asks for float8: in which formats they multiply, or why not.
    wide: The matmuls that stay in float32 for what they compute, and why.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> report = mpjax.inspect.explain(lambda w, x: x @ w @ w, "mixed_bfloat16", square, square)
    >>> report.narrow_share, report.keeps_promise, len(report.to_rows())
    (1.0, True, 1)
  """

  name: str
  policy: PolicyMap
  ops: tuple[OpFlow, ...]
  casts: tuple[CastFlow, ...]
  leaks: tuple[Leak, ...]
  absorbed: tuple[Leak, ...]
  islands: tuple[IslandFlow, ...]
  unknown: tuple[UnknownOp, ...]
  loops: int = 0
  depth: int | None = None
  remarks: tuple[RemarkFlow, ...] = ()
  float8: tuple[Float8Flow, ...] = ()
  wide: tuple[WideMatmul, ...] = ()

  @property
  def keeps_promise(self) -> bool:
    """Whether every matmul runs as the policy says, nothing widens against it or is overridden.

    And whether that could be seen of all that runs, see `RemarkFlow`.
    """
    return not (self.leaks or self.unknown or any(r.breaks_promise for r in self.remarks))

  @property
  def flops(self) -> float:
    """Multiplications and additions of all matmuls and convolutions of floats."""
    return sum(op.flops for op in self.ops if _is_of_floats(op))

  @property
  def narrow_share(self) -> float:
    """The part of `flops` that is computed in 16 bits or fewer, 0 to 1; 1 if there are none.

    NaN where an operation computes that cannot be looked into: what it multiplies is not known.
    """
    if self._hides:
      return math.nan
    return self._narrow_flops / self.flops if self.flops else 1.0

  @property
  def _narrow_flops(self) -> float:
    return sum(op.flops for op in self.ops if _is_narrow(op.dtype))

  @property
  def float8_share(self) -> float:
    """The part of `flops` that is computed in float8, 0 to 1; NaN where that is not known."""
    if self._hides:
      return math.nan
    multiplied = sum(row.flops for row in self.float8 if not row.reason)
    return multiplied / self.flops if self.flops else 0.0

  @property
  def summary(self) -> str:
    """Whether the policy does what it promises, in a line."""
    facts = self._facts
    rules = f"its rules ({len(self.policy.rules)}), else " if self.policy.rules else ""
    head = f"{self.name} under {rules}{spec(self.policy.default)}"
    if self.keeps_promise:
      return f"{head}: does what it promises. {facts}; nothing widens against it."
    verdict = "leaks" if self.leaks else "not all of it runs in 16 bits"
    if not (self.leaks or self.unknown):
      verdict = "with reservations"
    return f"{head}: {verdict}. {facts}, but {' and '.join(self._faults())}."

  @property
  def _facts(self) -> str:
    """How many matmuls there are, and in what they run."""
    matmuls = [op for op in self.ops if _is_matmul(op) and _is_of_floats(op)]
    total = sum(op.count for op in matmuls)
    narrow = sum(op.count for op in matmuls if _is_narrow(op.dtype))
    integers = sum(op.count for op in self.ops if _is_matmul(op) and not _is_of_floats(op))
    and_integers = f", and {integers} on integers as written" if integers else ""
    if not total:
      where = "can be seen in it" if self._hides else "of floats is in it"
      return f"No matmul or convolution {where}{and_integers}"
    share = f"{_percent(self.narrow_share)} of {in_units(self.flops, 'FLOP')}"
    if self._hides:
      share = in_units(self._narrow_flops, "FLOP")
    seen = " that can be seen" if self._hides else ""
    return (
      f"{narrow} of {total} matmuls and convolutions{seen} run in 16 bits ({share})"
      f"{self._and_wide}{self._and_float8}{and_integers}"
    )

  @property
  def _and_wide(self) -> str:
    """How many of them are float32 for what they compute."""
    count = sum(row.count for row in self.wide)
    return f", {count} in float32 for what they compute" if count else ""

  @property
  def _and_float8(self) -> str:
    """How many of those that run narrow multiply in float8, if the policy asks for it."""
    count = sum(row.count for row in self.float8 if not row.reason)
    share = "" if self._hides else f" ({_percent(self.float8_share)})"
    told = f", {count} of them in float8{share}" if count else ", none of them in float8"
    return told if self.float8 else ""

  @property
  def _hides(self) -> bool:
    """Whether something runs as traced that cannot be looked into."""
    return bool(self._hiding)

  @property
  def _hiding(self) -> frozenset[str]:
    """The rows of the modules in which that is so."""
    return frozenset(self._folded(op.module) for op in self.unknown if not op.matmuls)

  def _faults(self) -> Iterator[str]:
    if self.leaks:
      first = self.leaks[0]
      yield (
        f"{_places(len(self.leaks))} to float32, first {first.line} in {first.module}, by "
        f"{first.widened_by[0]}"
      )
    if self.unknown:
      op, count = self.unknown[0], len(self.unknown)
      yield (
        f"{count} operation{'s' * (count > 1)} run{'s' * (count == 1)} as traced, in float32"
        f"{', first' * (count > 1)}: {op.op} at {op.line} in {op.module} (mpjax.cast_inputs hands "
        "a function 16 bits)"
      )
    for remark in {r.kind: r for r in self.remarks[::-1] if r.breaks_promise}.values():
      where = f", at {remark.line}" if remark.line.line else ""
      yield f"{remark.text} (in {remark.module}{where})"

  @property
  def rows(self) -> tuple[ModuleFlow, ...]:
    """A row a module, in program order."""
    names = [entry.module for entry in (*self.ops, *self.casts)]
    return tuple(self._row(name) for name in dict.fromkeys(map(self._folded, names)))

  @property
  def rules(self) -> tuple[RuleUse, ...]:
    """Which rule of the policy map won where, in the order of the map, the default last."""
    named = [(pattern, spec(policy)) for pattern, policy in self.policy.rules]
    return tuple(
      RuleUse(
        name,
        policy,
        tuple(dict.fromkeys(op.module for op in self.ops if op.won == name)),
        sum(op.count for op in self.ops if op.won == name),
      )
      for name, policy in [*named, ("default", spec(self.policy.default))]
    )

  def fold(self, depth: int | None) -> FlowReport:
    """The same report with modules deeper than ``depth`` counted in their parents."""
    return dataclasses.replace(self, depth=depth)

  def by_op(self, module: str | None = None) -> OpReport:
    """The operations of all modules, or of one and those beneath it, a row each."""
    chosen = [op for op in self.ops if module is None or _is_under(op.module, module)]
    return OpReport(self.name if module is None else module, tuple(chosen))

  def tables(self) -> Sequence[Table]:
    """A row a module, leaks, remarks, matmuls in float32, the rules, and what is unknown."""
    tables = [self._modules_table()]
    if self.leaks:
      tables.append(_leaks_table(self.leaks))
    if self.remarks:
      rows = [[str(r.line), r.module, str(r.count), r.text] for r in self.remarks]
      tables.append(Table(["line", "module", "times", "what"], rows, "<<><", "Remarks"))
    if self.wide:
      tables.append(_wide_table(self.wide))
    if self.float8:
      rows = [[r.module, r.formats, r.reason, str(r.count), in_units(r.flops)] for r in self.float8]
      header = ["module", "multiplied", "because", "matmuls", "FLOP"]
      title = "Matmuls whose policy says m=fp8"
      tables.append(Table(header, rows, "<<<>", title))
    if self.policy.rules:
      rows = [[r.rule, r.policy, str(r.ops), _shortened(r.modules)] for r in self.rules]
      tables.append(Table(["rule", "policy", "ops", "modules"], rows, "<<><", "Rules"))
    if self.unknown:
      rows = [
        [u.op, u.module, str(u.line), str(u.matmuls or "?"), in_units(u.flops) if u.matmuls else ""]
        for u in self.unknown
      ]
      title = (
        "Run as traced, in float32: mpjax does not know them, or leaves what they hold as it is. "
        "mpjax.cast_inputs hands a function 16 bits"
      )
      header = ["operation", "module", "line", "matmuls", "FLOP"]
      tables.append(Table(header, rows, "<<<>", title))
    return tables

  def _folded(self, module: str) -> str:
    return "/".join(module.split("/")[: self.depth]) if module != TOP else TOP

  def _row(self, module: str) -> ModuleFlow:
    ops = [op for op in self.ops if self._folded(op.module) == module]
    matmuls = [op for op in ops if _is_matmul(op) and _is_of_floats(op)]
    low = [op for op in matmuls if _is_narrow(op.dtype)]
    path = () if module == TOP else tuple(module.split("/"))
    rule = self.policy.rule_at(path)
    casts = [cast for cast in self.casts if self._folded(cast.module) == module]
    return ModuleFlow(
      module,
      rule_name(self.policy, rule),
      self.policy.policy_of(rule).compute_dtype.name,
      sum(op.count for op in matmuls),
      sum(op.count for op in low),
      sum(op.flops for op in matmuls),
      sum(op.flops for op in low),
      _tally((op.rule, op.count) for op in ops),
      _tally((op.returns, op.bytes) for op in ops),
      _tally((f"{cast.source}->{cast.target}", cast.count) for cast in casts),
      sum(self._folded(island.module) == module for island in self.islands),
      sum(self._folded(m) == module for leak in self.leaks for m in leak.modules or [leak.module]),
    )

  def _modules_table(self) -> Table:
    header = ["module", "compute", "matmuls", "in 16 bits", "FLOP", "full", "follow"]
    header += ["16-bit", "float32", "casts", "islands", "leaks"]
    notes = [
      "full: operations that the table sends to float32; follow: those that run in whatever their "
      "operands have.",
      "16-bit, float32: bytes that operations return, before fusion; casts: to 16 bits + to "
      "float32.",
    ]
    if self.loops:
      notes.append(f"{self.loops} while loops: their bodies are counted once.")
    if self.absorbed:
      notes.append(
        f"{len(self.absorbed)} more times float32 was met where it was needed anyway (losses, "
        "masks): see .absorbed."
      )
    rows = [_cells(row, hides=row.module in self._hiding) for row in self.rows]
    return Table(header, rows, "<<>", notes=notes)


@dataclass(frozen=True, repr=False)
class OpReport(Report):
  """Operations, a row each.

  Attributes:
    name: The function or module.
    rows: The operations.
  """

  name: str
  rows: tuple[OpFlow, ...]

  @property
  def summary(self) -> str:
    """How many operations there are."""
    return f"{self.name}: {sum(op.count for op in self.rows)} operations on floats"

  def tables(self) -> Sequence[Table]:
    """The operations."""
    header = [
      "module",
      "operation",
      "table",
      "runs in",
      "returns",
      "rule",
      "count",
      "FLOP",
      "returns",
    ]
    rows = [
      [
        op.module,
        op.op,
        op.rule,
        op.dtype,
        op.returns,
        op.won,
        str(op.count),
        in_units(op.flops),
        in_bytes(op.bytes),
      ]
      for op in self.rows
    ]
    return [Table(header, rows, "<<<<<<>")]


def rule_name(policies: PolicyMap, won: int | None) -> str:
  """The pattern of a rule by its index, "default" for None."""
  return "default" if won is None else policies.rules[won][0]


def _is_narrow(dtype: str) -> bool:
  return dtype in ("bfloat16", "float16", FORWARD.name)


def _is_matmul(op: OpFlow) -> bool:
  return op.op in MATMULS and op.rule != Rule.MULTIPLY.name.lower()


def _is_of_floats(op: OpFlow) -> bool:
  return np.dtype(op.dtype).kind not in "biu"


def _is_under(module: str, parent: str) -> bool:
  return module == parent or module.startswith(parent + "/")


def _tally(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  total: Counter[str] = Counter()
  for key, value in pairs:
    total[key] += value
  return dict(total)


def _cells(row: ModuleFlow, *, hides: bool) -> list[str]:
  full = sum(n for rule, n in row.ops.items() if rule in ("full", "always", "named", "traced"))
  follow = sum(n for rule, n in row.ops.items() if rule in ("follow", "each", "convert"))
  narrow = sum(n for dtype, n in row.bytes.items() if _is_narrow(dtype))
  to_float32 = sum(n for cast, n in row.casts.items() if cast.endswith(FLOAT32.name))
  casts = f"{sum(row.casts.values()) - to_float32}+{to_float32}"
  share = _percent(row.narrow_flops / row.flops) if row.flops else ""
  return [
    row.module,
    short_name(row.compute) + (f" ({row.rule})" if row.rule != "default" else ""),
    str(row.matmuls) if row.matmuls else "",
    "?" if hides else share,
    in_units(row.flops) if row.flops else "",
    str(full),
    str(follow),
    in_bytes(narrow),
    in_bytes(row.bytes.get("float32", 0)),
    casts,
    str(row.islands),
    str(row.leaks),
  ]


def _leaks_table(leaks: Sequence[Leak]) -> Table:
  rows = [
    [
      str(leak.line),
      leak.module + (" (backward)" if leak.backward else ""),
      leak.op + (f" ({leak.count} times)" if leak.count > 1 else ""),
      _shortened(leak.widened_by, 3),
      in_bytes(leak.bytes),
      leak.read_by or f"{leak.also} more values",
    ]
    for leak in leaks
  ]
  header = ["line", "module", "operation", "widened by", "costs", "goes on to"]
  sources = texts_of(leak.line for leak in leaks)
  return Table(header, rows, "<<<<><", "Leaks: narrow values that became float32", sources)


def _wide_table(matmuls: Sequence[WideMatmul]) -> Table:
  rows = [
    [
      str(row.line),
      row.module + (" (backward)" if row.backward else ""),
      str(row.count),
      in_units(row.flops),
      row.reason,
    ]
    for row in matmuls
  ]
  header = ["line", "module", "matmuls", "FLOP", "because"]
  sources = texts_of(row.line for row in matmuls)
  return Table(header, rows, "<<>><", "Matmuls in float32 for what they compute", sources)


def _percent(share: float) -> str:
  """A share in percent, 100% only if it is all."""
  return "over 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _places(count: int) -> str:
  return f"{count} place{'s' * (count > 1)} widen{'s' * (count == 1)}"


def _shortened(names: Sequence[str], limit: int = 6) -> str:
  more = f", and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
