"""What `check` returns: differences from a reference, by module and by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpjax._core.dtypes import FLOAT16
from mpjax._core.policy import spec
from mpjax._core.policy_map import PolicyMap
from mpjax.inspect._report import Report, Table
from mpjax.inspect._source_lines import Line

_TOLERATED_UNDERFLOW = 0.01


_TOLERATED_GRADIENT_UNDERFLOW = 0.1
# Some float32 roundings, relative to the gradient as a whole.
ROUNDING = 2.0**-20


@dataclass(frozen=True)
class Difference:
  """How values differ from their reference.

  Attributes:
    error: The norm of the difference over that of the reference, where both are finite.
    cosine: Of the angle between the two.
    overflow: How many numbers are not finite although the reference is.
    underflow: How many are zero although the reference is not.
    size: How many numbers there are.
    largest: The largest magnitude in the reference.
    undefined: How many are NaN in the reference, or infinite there and something else here. Of
      gradients, all that are not finite there.
  """

  error: float
  cosine: float
  overflow: int
  underflow: int
  size: int
  largest: float
  undefined: int = 0

  @property
  def is_lost(self) -> bool:
    """Whether numbers are not finite, here or in the reference, so that norms leave them out."""
    return self.overflow > 0 or self.undefined > 0


@dataclass(frozen=True)
class ModuleCheck:
  """What a module hands out, against the reference.

  Attributes:
    module: The module's path.
    line: The line that computed what it hands out; of several, the one that differs most.
    output: What it hands out.
    error_in: The largest relative error among what it is given.
    added: The relative error that is its own: what is left of the output's beyond `error_in`.
    inherits: Whether what it is given overflows or underflows already.
    worst_iteration: In which iteration of a scan or while loop the error is largest; None outside
      of loops. What a while loop's modules hand out is that of this iteration alone.
  """

  module: str
  line: Line
  output: Difference
  error_in: float
  added: float
  inherits: bool = False
  worst_iteration: int | None = None


@dataclass(frozen=True)
class Change:
  """What the function adds to an argument that it updates, against the reference.

  Attributes:
    argument: The argument's path.
    change: How the difference between what is returned and what was given differs.
    share: The norm of the change over that of the argument. One that is no more than float32
      itself rounds has a large relative error that says nothing.
  """

  argument: str
  change: Difference
  share: float = 1.0

  @property
  def counts(self) -> bool:
    """Whether it is more than rounding; what is not finite is, whatever the rest of it."""
    return self.share > ROUNDING or self.change.is_lost


@dataclass(frozen=True)
class GradientCheck:
  """The gradient of a parameter, against the reference.

  Attributes:
    parameter: The parameter's path.
    gradient: How its gradient differs.
    share: The norm of its gradient over that of all gradients. One that is zero but for rounding,
      as that of a bias in front of a norm, has a large relative error that says nothing.
  """

  parameter: str
  gradient: Difference
  share: float = 1.0

  @property
  def counts(self) -> bool:
    """Whether it is more than rounding; what is not finite is, whatever the rest of it."""
    return self.share > ROUNDING or self.gradient.is_lost


@dataclass(frozen=True)
class NotLookedInto:
  """A part of the program that was compared from outside only."""

  what: str
  module: str
  line: Line


@dataclass(frozen=True, repr=False)
class CheckReport(Report):
  """How far a policy moves values and gradients, as `check` found it.

  Attributes:
    name: The function or module.
    policy: The policies.
    reference: The dtype that they were compared with.
    tolerance: The relative error that is taken for rounding.
    result: What the function returns.
    changes: What it adds to each argument that it updates.
    rows: What each module hands out, in the order of the program.
    gradients: The gradient of each parameter; empty if they were not asked for.
    not_looked_into: Custom derivatives that were compared from outside only.
    loss_scale: What the gradients under the policy were scaled with, and unscaled again.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> large = lambda w, x: (x @ w) ** 2
    >>> args = 200 * jnp.eye(2), jnp.full((1, 2), 2.0)
    >>> report = mpjax.inspect.check(large, "p=f32,c=f16,o=f16", *args, gradients=False)
    >>> report.agrees, report.result.overflow
    (False, 2)
  """

  name: str
  policy: PolicyMap
  reference: str
  tolerance: float
  result: Difference
  changes: tuple[Change, ...]
  rows: tuple[ModuleCheck, ...]
  gradients: tuple[GradientCheck, ...]
  not_looked_into: tuple[NotLookedInto, ...]
  loss_scale: float = 1.0

  @property
  def agrees(self) -> bool:
    """Whether nothing overflows, here or there, and all that was compared is within the tolerance.

    That is results, what modules hand out, what changes in updated arguments, and gradients.
    """
    return not self.faults

  @property
  def faults(self) -> tuple[str, ...]:
    """What does not agree, in words: what the reference has not, overflows, underflows, errors."""
    outputs = [(row.module, row.output, row.added) for row in self._deepest()]
    grads = [
      (f"gradient of {g.parameter}", g.gradient, g.gradient.error)
      for g in self.gradients
      if g.counts
    ]
    result = [("the result", self.result, self.result.error)]
    changes = [
      (f"the change of {c.argument}", c.change, c.change.error) for c in self.changes if c.counts
    ]
    named = [*outputs, *result, *changes, *grads]
    undefined = [
      f"{n} is not finite in {self.reference} ({_share(d.undefined, d)})"
      for n, d, _ in [*result, *changes, *grads]
      if d.undefined
    ]
    overflows = [f"{n} overflows ({_share(d.overflow, d)})" for n, d, _ in named if d.overflow]
    underflows = [
      f"{n} underflows ({_share(d.underflow, d)} are zero)"
      for n, d, _ in named
      if d.underflow > d.size * _tolerated_underflow(n)
    ]
    errors = [f"{n} is off by {e:.2g}" for n, d, e in named if e > self.tolerance]
    return (*undefined, *overflows, *underflows, *errors)

  @property
  def worst(self) -> tuple[ModuleCheck, ...]:
    """The modules that lose most: those with an overflow or underflow, then by `added`."""
    rows = self._deepest()
    rank = lambda r: (r.output.overflow > 0, underflows(r.output), r.added)  # noqa: E731
    return tuple(sorted(rows, key=rank, reverse=True))

  @property
  def summary(self) -> str:
    """Whether the two agree, and which modules lose most."""
    head = f"{self.name} under {spec(self.policy.default)}"
    head += f" with rules ({len(self.policy.rules)})" if self.policy.rules else ""
    head += f" against {self.reference}: "
    if self.agrees:
      changes = max((c.change.error for c in self.changes if c.counts), default=None)
      grads = max((g.gradient.error for g in self.gradients if g.counts), default=None)
      text = f"agrees. The result is off by {self.result.error:.2g}"
      text += "" if changes is None else f", what it changes by at most {changes:.2g}"
      text += "." if grads is None else f", gradients by at most {grads:.2g}."
    else:
      text = f"does not agree: {'; '.join(self.faults[:3])}.{self._advice}"
    losing = [row for row in self.worst if row.added or _is_lost(row)]
    worst = [f"{row.module} ({row.added:.2g})" for row in losing[:3]]
    return head + text + (f"\nMost is lost in {', '.join(worst)}." if worst else "")

  @property
  def _advice(self) -> str:
    """Where to look for what is not finite in float32, or which loss scale to pass in float16."""
    compared = [
      self.result,
      *(c.change for c in self.changes),
      *(g.gradient for g in self.gradients),
    ]
    if any(difference.undefined for difference in compared):
      return " mpjax.inspect.locate_nonfinite finds the operation."
    counted = [g.gradient for g in self.gradients if g.counts]
    off = any(g.error > self.tolerance for g in counted) and not any(g.overflow for g in counted)
    if self.loss_scale != 1 or not off or FLOAT16 not in self.policy.narrow_dtypes():
      return ""
    return " Training in float16 scales the loss: pass that scale here, loss_scale=2.0**15."

  def tables(self) -> Sequence[Table]:
    """A row a module and a row a parameter."""
    header = ["module", "line", "error in", "error out", "added", *_HEADER]
    rows = [
      [
        r.module,
        str(r.line),
        f"{r.error_in:.2g}",
        f"{r.output.error:.2g}",
        f"{r.added:.2g}",
        *_cells(r.output),
      ]
      for r in self.rows
    ]
    notes = [
      "error: norm of the difference / norm of the reference; cosine: of the angle between them. "
      "overflow: not finite, underflow: zero, where the reference is not."
    ]
    notes += [f"Not looked into: {n.what} at {n.line} in {n.module}." for n in self.not_looked_into]
    tables = [Table(header, rows, "<<>", "What modules hand out", notes)]
    if self.changes:
      rows = [[c.argument, f"{c.change.error:.2g}", *_cells(c.change)] for c in self.changes]
      title = "Changes: what is added to the arguments that are updated"
      tables.append(Table(["argument", "error", *_HEADER], rows, "<>", title))
    if self.gradients:
      rows = [[g.parameter, f"{g.gradient.error:.2g}", *_cells(g.gradient)] for g in self.gradients]
      tables.append(Table(["parameter", "error", *_HEADER], rows, "<>", "Gradients"))
    return tables

  def _deepest(self) -> list[ModuleCheck]:
    """Modules without those that pass on what they are given, or what one beneath them lost."""
    own = [row for row in self.rows if not (row.inherits and _is_lost(row))]
    return [
      row
      for row in own
      if not any(
        other.module.startswith(row.module + "/")
        and (_is_lost(other) if _is_lost(row) else other.added >= row.added / 2)
        for other in own
      )
    ]


def _is_lost(row: ModuleCheck) -> bool:
  return row.output.overflow > 0 or underflows(row.output) > 0


_HEADER = ("cosine", "overflow", "underflow", "numbers", "largest")


def underflows(difference: Difference) -> float:
  """The share of underflows, if it is more than a stray few."""
  share = difference.underflow / difference.size if difference.size else 0.0
  return share if share > _TOLERATED_UNDERFLOW else 0.0


def _tolerated_underflow(name: str) -> float:
  wide = name.startswith(("gradient of", "the change of"))
  return _TOLERATED_GRADIENT_UNDERFLOW if wide else _TOLERATED_UNDERFLOW


def _share(count: int, difference: Difference) -> str:
  return f"{count} of {difference.size} numbers"


def _cells(d: Difference) -> list[str]:
  counts = [str(n) if n else "" for n in (d.overflow, d.underflow)]
  return [f"{d.cosine:.6f}", *counts, str(d.size), f"{d.largest:.3g}"]
