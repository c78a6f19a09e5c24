"""Finds the cheapest policy map whose loss and gradients stay within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._assignment import (
  OUTSIDE,
  WIDE,
  Assignment,
  Names,
  as_text,
  module_path,
  policy_map,
  rules_of,
  spelled,
)
from mpjax._dtypes import FLOAT32
from mpjax._explain import explain
from mpjax._objective import Objective
from mpjax._paths import leaf_paths
from mpjax._policy import Policy, as_policy
from mpjax._policy_map import PolicyMap
from mpjax._report import Report, Table
from mpjax._scopes import Path

_SMALL = 1e-3


class Trial(NamedTuple):
  """One policy map that was tried.

  Attributes:
    tried: What was tried, in words.
    loss_error: The loss, relative to that in float32.
    gradient_error: The largest error of a parameter's gradient, relative to its norm; norms below
      a thousandth of the largest one count as that.
    worst: The parameter that it belongs to.
    float32_flops: The FLOPs of matmuls and convolutions of the forward pass in float32.
    float32_bytes: The bytes that the forward pass writes in float32.
    within: Whether both errors are within the tolerance.
    best: Whether no cheaper map has errors as small: the frontier of cost against error.
  """

  tried: str
  loss_error: float
  gradient_error: float
  worst: str
  float32_flops: float
  float32_bytes: float
  within: bool
  best: bool = False

  @property
  def error(self) -> float:
    """The larger of both errors."""
    return max(self.loss_error, self.gradient_error)

  @property
  def cost(self) -> tuple[float, float]:
    """FLOPs first, then bytes."""
    return self.float32_flops, self.float32_bytes


class Sensitivity(NamedTuple):
  """What one module, or several beneath one path, does to the loss alone in low precision.

  Attributes:
    module: The path.
    policy: The candidate that it ran under, everything else in float32.
    loss_error: See `Trial`.
    gradient_error: See `Trial`.
    within: Whether both are within the tolerance.
  """

  module: str
  policy: str
  loss_error: float
  gradient_error: float
  within: bool


@dataclass(frozen=True, repr=False)
class TuneReport(Report):
  """The cheapest policy map that was found, and how.

  Attributes:
    policy_map: The policy map.
    text: The same as Python to paste.
    modules: The modules that do not run under the default, with their policies.
    rows: The maps that were tried, the cheapest first.
    sensitivity: What each module does alone.
    tolerance: The largest error allowed.
    flops: The FLOPs of all matmuls and convolutions of the forward pass.
    compilations: How often loss and gradient were compiled.
    note: What to know before pasting.
  """

  policy_map: PolicyMap
  text: str
  modules: tuple[tuple[str, str], ...]
  rows: tuple[Trial, ...]
  sensitivity: tuple[Sensitivity, ...]
  tolerance: float
  flops: float
  compilations: int
  note: str = ""

  @property
  def chosen(self) -> Trial:
    """The row of the map that was chosen."""
    return min((row for row in self.rows if row.within), key=lambda row: (row.cost, row.error))

  @property
  def summary(self) -> str:
    """What is in float32 now, what that costs, and the map to paste."""
    share = self.chosen.float32_flops / self.flops if self.flops else 0.0
    named = ", ".join(f"{module} in {policy}" for module, policy in self.modules) or "nothing"
    return (
      f"Apart from the default: {named}. {share:.1%} of the FLOPs are in float32; loss error "
      f"{self.chosen.loss_error:.2g}, gradient error {self.chosen.gradient_error:.2g} (tolerance "
      f"{self.tolerance:g}; {self.compilations} compilations).\n{self.text}"
      + (f"\n{self.note}" if self.note else "")
    )

  def tables(self) -> list[Table]:
    """What was tried, and what each module does alone."""
    return [self._tried(), self._alone()] if self.sensitivity else [self._tried()]

  def _tried(self) -> Table:
    header = ["tried", "float32 GFLOP", "float32 MiB", "loss error", "gradient error", "within"]
    rows = [
      [
        row.tried,
        f"{row.float32_flops / 1e9:.4g}",
        f"{row.float32_bytes / 2**20:.4g}",
        f"{row.loss_error:.2g}",
        f"{row.gradient_error:.2g}" + (f" ({row.worst})" if row.worst else ""),
        _yes(row.within) + " *" * row.best,
      ]
      for row in self.rows
    ]
    note = "FLOPs and bytes of the forward pass, as planned; *: no cheaper one has less error."
    return Table(header, rows, notes=[note])

  def _alone(self) -> Table:
    header = ["alone in low precision", "policy", "loss error", "gradient error", "within"]
    rows = [
      [s.module, s.policy, f"{s.loss_error:.2g}", f"{s.gradient_error:.2g}", _yes(s.within)]
      for s in self.sensitivity
    ]
    return Table(header, rows, "<<>")


def _yes(true: bool) -> str:
  return "yes" if true else "no"


def tune(
  loss_fn: Callable[..., Any],
  args: Sequence[Any],
  *,
  candidates: Sequence[Policy | str] = ("mixed_bfloat16",),
  tolerance: float = 0.05,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  loss_scale: float = 1.0,
) -> TuneReport:
  """Find the cheapest policy map whose loss and gradients stay near those of float32.

  Everything in low precision is tried first. If that is too far off, each module runs alone in low
  precision, whole branches first and their parts only where a branch fails. What fails alone gets
  the next candidate that does not, or float32; if the rest together is still too far off, the
  modules with the largest errors go to float32 as well, as few as possible.

  Cheap is what computes few FLOPs, and then writes few bytes, in float32. Both are counted on the
  planned program, since a CPU's compiler computes 16 bits in float32 and cannot tell.

  Args:
    loss_fn: Returns a scalar loss. NNX models may be among its arguments.
    args: Its arguments, with real data: a few typical batches in one.
    candidates: Policies to choose from, the preferred one first; float32 is always one more.
    tolerance: The largest relative error of the loss and of each parameter's gradient. 16-bit
      training that works has gradient errors of some percent.
    argnums: Which arguments hold the parameters.
    has_aux: Whether ``loss_fn`` returns a pair of the loss and something else.
    loss_scale: What the loss is multiplied by before it is differentiated: for float16 what
      `range_report` recommends.

  Returns:
    The report, with ``policy_map`` and, to paste, ``text``. Its paths are those of
    ``mpjax.autocast(loss_fn, ...)`` and ``make_train_step(loss_fn, ..., policy=...)``.

  Raises:
    ValueError: If there is no candidate below float32, the tolerance is not positive, or the loss
      or gradients are not finite in float32.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> def loss(params, x):
    ...   with jax.named_scope("body"):
    ...     x = jnp.tanh(x @ params["w"])
    ...   with jax.named_scope("cancel"):  # a small difference of large numbers
    ...     return jnp.mean((x @ (100 + params["v"]) - x @ (100 * jnp.ones((4, 4)))) ** 2)
    >>> params = {"w": jnp.eye(4), "v": 0.1 * jnp.eye(4)}
    >>> report = mpjax.inspect.tune(loss, (params, jnp.ones((2, 4))))
    >>> report.modules, report.policy_map.default.compute_dtype.name
    ((('cancel', 'float32'),), 'bfloat16')
  """
  low = [policy for policy in candidates if not PolicyMap({}, policy).is_float32()]
  if not low:
    raise ValueError(
      f"candidates must hold a policy below float32. Got {list(candidates)}. Name 'mixed_bfloat16'."
    )
  if not tolerance > 0:
    raise ValueError(f"tolerance must be above 0. Got {tolerance!r}. Try 0.05.")
  objective = Objective(loss_fn, args, argnums, has_aux=has_aux)
  lab = _Lab(loss_fn, args, argnums, objective, tolerance, loss_scale)
  return _search(lab, Names({str(p): as_policy(p) for p in low}))


_Alone = tuple[list[Path], Sensitivity]


class _Lab:
  """Measures policy maps; each costs a compilation."""

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    args: Sequence[Any],
    argnums: int | Sequence[int],
    objective: Objective,
    tolerance: float,
    loss_scale: float,
  ) -> None:
    self.loss_fn, self.args, self.argnums = loss_fn, args, argnums
    self.objective, self.tolerance, self.scale = objective, tolerance, loss_scale
    self.compilations = 0
    flow = explain(loss_fn, WIDE, *args, argnums=argnums)
    self.flops = float(flow.flops)
    self.units: list[Path] = sorted({module_path(op.module) for op in flow.ops if not op.backward})
    self.loss, self.grads = self._run(objective.value_and_grad(PolicyMap({}, WIDE)))
    self.leaves = [path for path, _ in leaf_paths(objective.params)]
    finite = [bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((self.loss, self.grads))]
    if not all(finite):
      raise ValueError(
        "Loss and gradients must be finite in float32, or nothing can be compared with them. Got "
        "inf or NaN. See mpjax.inspect.locate_nonfinite."
      )

  def _run(self, fn: Callable[..., Any]) -> Any:
    self.compilations += 1
    return jax.jit(fn)(*self.objective.operands)

  def measure(self, policies: PolicyMap, tried: str) -> Trial:
    """The errors and the cost of a policy map."""
    both = self.objective.value_and_grad(policies, self.scale)

    def errors(*operands: Any) -> Any:
      loss, grads = both(*operands)
      return _relative(loss, self.loss), _relative_each(grads, self.grads)

    loss_error, gradient_errors = jax.device_get(self._run(errors))
    gradient_errors = np.nan_to_num(gradient_errors, nan=math.inf)
    loss_error = float(np.nan_to_num(loss_error, nan=math.inf))
    worst = int(np.argmax(gradient_errors)) if gradient_errors.size else -1
    gradient_error = float(gradient_errors[worst]) if worst >= 0 else 0.0
    flow = explain(self.loss_fn, policies, *self.args, argnums=self.argnums)
    return Trial(
      tried=tried,
      loss_error=loss_error,
      gradient_error=gradient_error,
      worst=self.leaves[worst] if worst >= 0 else "",
      float32_flops=float(sum(op.flops for op in flow.ops if op.dtype == "float32")),
      float32_bytes=float(sum(op.bytes for op in flow.ops if op.returns == "float32")),
      within=max(loss_error, gradient_error) <= self.tolerance,
    )


def _relative(x: jax.Array, reference: jax.Array) -> jax.Array:
  return jnp.abs(x - reference) / jnp.maximum(jnp.abs(reference), jnp.finfo(FLOAT32).tiny)


def _relative_each(tree: Any, reference: Any) -> jax.Array:
  """The error of each leaf relative to its norm, or to a thousandth of the largest norm."""
  leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(reference)
  if not leaves:
    return jnp.zeros((0,))
  norms = jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in wanted])
  errors = [jnp.linalg.norm((a - b).ravel()) for a, b in zip(leaves, wanted, strict=True)]
  floor = jnp.maximum(_SMALL * jnp.max(norms), jnp.finfo(FLOAT32).tiny)
  return jnp.stack(errors) / jnp.maximum(norms, floor)


# The search -----------------------------------------------------------------------------------


def _search(lab: _Lab, names: Names) -> TuneReport:
  first = names.low[0]
  trials: dict[tuple[Any, ...], Trial] = {}

  def attempt(assignment: Assignment, tried: str) -> Trial:
    key = tuple(sorted(assignment.items()))
    if key not in trials:
      trials[key] = lab.measure(policy_map(assignment, names), tried)
    return trials[key]

  assignment = dict.fromkeys(lab.units, first)
  alone: list[_Alone] = []
  if not attempt(assignment, f"all in {first}").within:
    assignment, alone = _one_by_one(lab, names)
    assignment = _add_largest(assignment, alone, attempt)
  wide = Trial("all in float32", 0.0, 0.0, "", *_wide_cost(lab), within=True)
  rows = _with_frontier([*trials.values(), wide])
  policies = policy_map(assignment, names)
  return TuneReport(
    policy_map=policies,
    text=as_text(assignment),
    modules=tuple((spelled(path), name) for path, name in rules_of(assignment)),
    rows=rows,
    sensitivity=tuple(s for _, s in sorted(alone, key=lambda pair: -_error(pair[1]))),
    tolerance=lab.tolerance,
    flops=lab.flops,
    compilations=lab.compilations,
    note=_note(lab),
  )


def _wide_cost(lab: _Lab) -> tuple[float, float]:
  flow = explain(lab.loss_fn, WIDE, *lab.args, argnums=lab.argnums)
  return lab.flops, float(sum(op.bytes for op in flow.ops if op.returns == "float32"))


def _error(found: Sensitivity) -> float:
  return max(found.loss_error, found.gradient_error)


def _one_by_one(lab: _Lab, names: Names) -> tuple[Assignment, list[_Alone]]:
  """For each module the first candidate under which it does not fail alone, or float32."""
  left, chosen = list(lab.units), {}
  found: list[_Alone] = []
  for name in names.low:
    tested, bad = _alone(lab, names, name, left)
    found += tested
    chosen |= {unit: name for unit in left if unit not in bad}
    left = bad
  return chosen | dict.fromkeys(left, WIDE), found


def _alone(
  lab: _Lab, names: Names, name: str, units: Sequence[Path]
) -> tuple[list[_Alone], list[Path]]:
  """Each module alone under a candidate: what was found, and the modules that fail."""
  found: list[_Alone] = []
  bad: list[Path] = []

  def visit(head: Path, members: list[Path]) -> None:
    wide = dict.fromkeys(lab.units, WIDE)
    policies = policy_map(wide | dict.fromkeys(members, name), names)
    trial = lab.measure(policies, "")
    label = spelled(head) + ("/..." if len(members) > 1 else "")
    seen = Sensitivity(label, name, trial.loss_error, trial.gradient_error, trial.within)
    if len(members) == 1 or trial.within:
      found.append((members, seen))
      bad.extend([] if trial.within else members)
    else:
      split(head, members)

  def split(head: Path, members: list[Path]) -> None:
    groups: dict[Path, list[Path]] = {}
    for unit in members:
      groups.setdefault(unit[: len(head) + 1], []).append(unit)
    for child, group in groups.items():
      if len(groups) == 1 and len(group) > 1:
        split(child, group)
      else:
        visit(child, group)

  split((), list(units))
  return found, bad


def _add_largest(
  assignment: Assignment,
  alone: Sequence[_Alone],
  attempt: Callable[[Assignment, str], Trial],
) -> Assignment:
  """Move the fewest of the modules with the largest errors to float32 that bring it within."""
  passing = [(units, s) for units, s in alone if s.within]
  passing.sort(key=lambda pair: -_error(pair[1]))

  def widened(count: int) -> Assignment:
    return assignment | {u: WIDE for units, _ in passing[:count] for u in units}

  def within(count: int) -> bool:
    chosen = widened(count)
    wide = [path for path, name in rules_of(chosen) if name == WIDE]
    tried = "float32: " + (", ".join(map(spelled, wide)) or OUTSIDE)
    return attempt(chosen, tried).within

  if within(0):
    return assignment
  low, high = 0, len(passing)  # `high` is all that is left in float32
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if within(middle) else (middle, high)
  return widened(high)


def _with_frontier(trials: Sequence[Trial]) -> tuple[Trial, ...]:
  ordered, least, rows = sorted(trials, key=lambda t: (t.cost, t.error)), math.inf, []
  for trial in ordered:
    rows.append(trial._replace(best=trial.error < least))
    least = min(least, trial.error)
  return tuple(rows)


def _note(lab: _Lab) -> str:
  heads = {unit[0] for unit in lab.units if unit}
  if len(heads) != 1 or lab.objective.has_models:
    return ""
  (head,) = heads
  return (
    "For mpjax.autocast(loss_fn, ...) and make_train_step(policy=...). If "
    f"{head} is a Linen module, leave '{head}/' out of the paths for mpjax.apply_policy."
  )
