"""Finds the cheapest policy map whose loss and gradients stay within a tolerance."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._core.arguments import shown
from mpjax._core.dtypes import FLOAT32, describe
from mpjax._core.policy import Policy, Preset, as_policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.scopes import Path
from mpjax.inspect._check_report import ROUNDING
from mpjax.inspect._explain import explain
from mpjax.inspect._inspected import Subject, subject_of
from mpjax.inspect._policies_by_module import (
  WIDE,
  Assignment,
  Names,
  as_text,
  default_of,
  module_path,
  policy_map,
  rules_of,
  spelled,
)
from mpjax.inspect._policies_inside import AuthorsOwn, refuse_regions
from mpjax.inspect._target_compiler import costs_of
from mpjax.inspect._tune_report import Sensitivity, Trial, TuneReport

_SMALL = 1e-3


def tune(
  loss_fn: Callable[..., Any],
  args: Sequence[Any],
  *,
  candidates: Sequence[Policy | Preset | str] = ("mixed_bfloat16",),
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

  Cheap is what has few FLOPs in float32, and then moves few bytes. XLA's cost analysis does not
  tell FLOPs of one dtype from those of another, so they are counted on the plan, in the forward
  pass. The bytes that loss and gradients read and write are XLA's figure for the lowered program:
  each operation's by itself, in its own dtypes, the body of a loop once. The compiled one would
  mislead on a CPU, which computes 16 bits in float32; for that of a device give the maps in
  ``report.rows`` to `cost`. Among equals the map with fewer rules wins, then that with less error.

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
    TypeError: If ``candidates`` is a string, ``args`` no tuple, the tolerance no number, or
      ``loss_fn`` returns no scalar.
    ValueError: If there is no candidate below float32, the tolerance is not positive, the loss
      or gradients are not finite in float32, or ``loss_fn`` computes with no floats, or has a
      16-bit policy inside.

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
  if isinstance(candidates, str):
    raise TypeError(
      f"candidates must be a list of policies. Got {shown(candidates)}. Write "
      f"candidates=[{shown(candidates)}]."
    )
  if not isinstance(args, tuple | list):
    raise TypeError(
      f"args must be a tuple of the arguments of the loss. Got {describe(args)}. Write "
      "tune(loss_fn, (params,))."
    )
  low = [policy for policy in candidates if not PolicyMap({}, policy).is_float32()]
  if not low:
    raise ValueError(
      f"candidates must hold a policy below float32. Got {list(candidates)}. Name 'mixed_bfloat16'."
    )
  if not isinstance(tolerance, numbers.Real):
    raise TypeError(f"tolerance must be a number. Got {tolerance!r}. Try 0.05.")
  if not tolerance > 0:
    raise ValueError(f"tolerance must be above 0. Got {tolerance!r}. Try 0.05.")
  loss = _without_aux(loss_fn) if has_aux else loss_fn
  lab = _Lab(loss, args, argnums, tolerance, loss_scale)
  return _search(lab, Names({str(p): as_policy(p) for p in low}))


def _without_aux(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
  """A loss function with auxiliary output without it."""
  return functools.wraps(loss_fn)(lambda *args: loss_fn(*args)[0])


_Alone = tuple[list[Path], Sensitivity]


class _Lab:
  """Measures policy maps; each costs a compilation."""

  def __init__(
    self,
    loss: Callable[..., Any],
    args: Sequence[Any],
    argnums: int | Sequence[int],
    tolerance: float,
    loss_scale: float,
  ) -> None:
    self.loss, self.args, self.argnums = loss, args, argnums
    self.subject = subject_of(loss, WIDE, args, {}, argnums).differentiable()
    self.tolerance, self.scale = tolerance, loss_scale
    self.compilations = 0
    _check_is_scalar(self.subject)
    flow = explain(loss, WIDE, *args, argnums=argnums)
    self.flops = float(flow.flops)
    self.units: list[Path] = sorted({module_path(op.module) for op in flow.ops if not op.backward})
    if not self.units:
      raise ValueError(
        "tune chooses policies for the modules that compute with floats, and the loss computes "
        "with none. Pass the loss that is trained."
      )
    self.leaves = self.subject.params
    wide = PolicyMap({}, WIDE)
    plan = self.subject.decide(wide).plan
    refuse_regions(plan, "tune", "its reference")
    AuthorsOwn.of(plan).refuse("tune")
    self.exact, moved = self._run(self.subject.value_and_grad(wide))
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(self.exact)):
      raise ValueError(
        "Loss and gradients must be finite in float32, or nothing can be compared with them. Got "
        "inf or NaN. See mpjax.inspect.locate_nonfinite."
      )
    self.reference = Trial(_label({(): WIDE}), 0.0, 0.0, "", self.flops, moved, wide, within=True)

  def _run(self, fn: Callable[..., Any]) -> tuple[Any, float | None]:
    """Loss and gradients, and the bytes that XLA says it takes to compute them."""
    self.compilations += 1
    run, arrays = self.subject.of_arrays(fn)
    lowered = jax.jit(run).lower(*arrays)
    return lowered.compile()(*arrays), costs_of(lowered).get("bytes accessed")

  def measure(self, policies: PolicyMap, tried: str) -> Trial:
    """The errors and the cost of a policy map."""
    found, moved = self._run(self.subject.value_and_grad(policies, self.scale))
    loss_error, gradient_errors = jax.device_get(_errors(found, self.exact))
    gradient_errors = np.nan_to_num(gradient_errors, nan=math.inf)
    loss_error = float(np.nan_to_num(loss_error, nan=math.inf))
    worst = int(np.argmax(gradient_errors)) if gradient_errors.size else -1
    gradient_error = float(gradient_errors[worst]) if worst >= 0 else 0.0
    flow = explain(self.loss, policies, *self.args, argnums=self.argnums)
    return Trial(
      tried=tried,
      loss_error=loss_error,
      gradient_error=gradient_error,
      worst=self.leaves[worst] if worst >= 0 else "",
      float32_flops=float(sum(op.flops for op in flow.ops if op.dtype == "float32")),
      bytes_moved=moved,
      policy_map=policies,
      within=max(loss_error, gradient_error) <= self.tolerance,
    )


def _check_is_scalar(subject: Subject) -> None:
  """Refuses what returns something else than one number."""
  run, arrays = subject.of_arrays(subject.fn)
  out = subject.results(jax.eval_shape(run, *arrays))
  if getattr(out, "shape", None) != ():
    raise TypeError(
      "tune takes a loss that returns a scalar. Got "
      f"{type(out).__name__ if isinstance(out, tuple) else describe(out)}. Reduce it to a scalar, "
      "or pass has_aux=True if it is a pair."
    )


@jax.jit
def _errors(found: Any, exact: Any) -> tuple[jax.Array, jax.Array]:
  """The relative errors of a loss and of the leaves of its gradients."""
  (loss, grads), (wanted_loss, wanted_grads) = found, exact
  return _relative(loss, wanted_loss), _relative_each(grads, wanted_grads)


def _relative(x: jax.Array, reference: jax.Array) -> jax.Array:
  return jnp.abs(x - reference) / jnp.maximum(jnp.abs(reference), jnp.finfo(FLOAT32).tiny)


def _at_least_32(x: jax.Array) -> jax.Array:
  return x if x.dtype.itemsize >= 4 else x.astype(FLOAT32)


def _relative_each(tree: Any, reference: Any) -> jax.Array:
  """The error of each leaf relative to its norm, or to a thousandth of the largest norm.

  A leaf that is zero but for rounding has none, as in `check`: the bias of an attention's keys.
  """
  leaves, wanted = ([*map(_at_least_32, jax.tree.leaves(t))] for t in (tree, reference))
  if not leaves:
    return jnp.zeros((0,))
  norms = jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in wanted])
  errors = [jnp.linalg.norm((a - b).ravel()) for a, b in zip(leaves, wanted, strict=True)]
  floor = jnp.maximum(_SMALL * jnp.max(norms), jnp.finfo(FLOAT32).tiny)
  relative = jnp.stack(errors) / jnp.maximum(norms, floor)
  is_rounding = (norms <= ROUNDING * jnp.linalg.norm(norms)) & jnp.isfinite(relative)
  return jnp.where(is_rounding, 0.0, relative)


# The search -----------------------------------------------------------------------------------


def _search(lab: _Lab, names: Names) -> TuneReport:
  wide = dict.fromkeys(lab.units, WIDE)
  tried: dict[Any, tuple[Trial, Assignment]] = {_key(wide): (lab.reference, wide)}

  def attempt(assignment: Assignment) -> Trial:
    key = _key(assignment)
    if key not in tried:
      trial = lab.measure(policy_map(assignment, names), _label(assignment))
      tried[key] = trial, assignment
    return tried[key][0]

  alone: list[_Alone] = []
  if not attempt(dict.fromkeys(lab.units, names.low[0])).within:
    assignment, alone = _one_by_one(lab, names)
    _add_largest(assignment, alone, attempt)
  trials = [trial for trial, _ in tried.values()]
  _, chosen = min((p for p in tried.values() if p[0].within), key=lambda pair: pair[0].rank)
  return TuneReport(
    policy_map=policy_map(chosen, names),
    text=as_text(chosen),
    modules=tuple((spelled(path), name) for path, name in rules_of(chosen)),
    rows=_with_frontier(trials),
    sensitivity=tuple(s for _, s in sorted(alone, key=lambda pair: -_error(pair[1]))),
    tolerance=lab.tolerance,
    flops=lab.flops,
    compilations=lab.compilations,
    note=_note(lab),
  )


def _key(assignment: Assignment) -> tuple[tuple[Path, str], ...]:
  return tuple(sorted(assignment.items()))


def _label(assignment: Assignment) -> str:
  """What a policy map says, in words: the modules of each policy that is not the default."""
  named: dict[str, list[str]] = {}
  for path, name in rules_of(assignment):
    named.setdefault(name, []).append(spelled(path))
  if not named:
    return f"all in {default_of(assignment)}"
  rules = "; ".join(f"{name}: {', '.join(paths)}" for name, paths in named.items())
  return f"{rules}; else {default_of(assignment)}"


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
  assignment: Assignment, alone: Sequence[_Alone], attempt: Callable[[Assignment], Trial]
) -> None:
  """Try to move the fewest of the modules with the largest errors to float32."""
  passing = [(units, s) for units, s in alone if s.within]
  passing.sort(key=lambda pair: -_error(pair[1]))

  def within(count: int) -> bool:
    wider = {unit: WIDE for units, _ in passing[:count] for unit in units}
    return attempt(assignment | wider).within

  if within(0):
    return
  low, high = 0, len(passing)  # `high` is all that is left in float32
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if within(middle) else (middle, high)


def _with_frontier(trials: Sequence[Trial]) -> tuple[Trial, ...]:
  ordered, least, rows = sorted(trials, key=lambda t: t.rank), math.inf, []
  for trial in ordered:
    rows.append(trial._replace(best=trial.error < least))
    least = min(least, trial.error)
  return tuple(rows)


def _note(lab: _Lab) -> str:
  heads = {unit[0] for unit in lab.units if unit}
  if len(heads) != 1 or lab.subject.has_models:
    return ""
  (head,) = heads
  return (
    "For mpjax.autocast(loss_fn, ...) and make_train_step(policy=...). If "
    f"{head} is a Linen module, leave '{head}/' out of the paths for mpjax.apply_policy."
  )
