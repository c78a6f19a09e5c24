"""`check`: how far a policy moves a function's values and gradients, module by module."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, get_abstract_mesh

from mpjax._core.dtypes import is_of
from mpjax._core.policy_map import PolicyLike, as_policy_map
from mpjax._engine.escapes import read_by_rules
from mpjax._engine.execute import Decided
from mpjax._engine.planning.plan import LOCATED, Plan
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program.kinds import DATA, Kind
from mpjax._engine.running.interpreter import Interpreter
from mpjax.inspect._check_report import (
  Change,
  CheckReport,
  Difference,
  GradientCheck,
  ModuleCheck,
  NotLookedInto,
  underflows,
)
from mpjax.inspect._differences import Stats, compare
from mpjax.inspect._flow_report import TOP, module_name
from mpjax.inspect._inspected import Subject, concrete, is_real, subject_of
from mpjax.inspect._policies_inside import AuthorsOwn, as_written, first_region, refuse_regions
from mpjax.inspect._side_by_side import (
  FLOAT64,
  Border,
  Crossing,
  Lockstep,
  Opaque,
  Pair,
  doubled,
)
from mpjax.inspect._updates import updated

_INSIDE = "modules, for a part that has a policy of its own (check its plain model to see them)"

_AUTHORS = (
  "the rounding of {0.count} of {0.total} matmuls, which are 16-bit in the reference too, as their "
  "author made them; the first"
)

# Errors of a unit roundoff each add up like a random walk over some hundred operations.
_TOLERATED_EPS = 16


def check(
  fn: Callable[..., Any],
  policy: PolicyLike | None,
  *args: Any,
  reference: Literal["float32", "float64"] = "float32",
  gradients: bool = True,
  loss_scale: float = 1.0,
  tolerance: float | None = None,
  argnums: int | Sequence[int] = 0,
  **kwargs: Any,
) -> CheckReport:
  """Compare a function under a policy with itself in float32, module by module.

  Both run once, side by side, on the values given: what each module is given and hands out is
  compared, inside ``jit``, ``checkpoint``, ``scan``, ``while``, ``cond`` and ``shard_map`` too, and
  the gradients of the parameters. Of a ``while`` loop the worst iteration counts; where the two
  take different branches of a ``cond``, what the branches return is compared and no more.
  A result that is no scalar is differentiated along fixed random signs; collections that a Linen
  module returns for ``mutable=`` are not. Integers and bools count where they differ.

  Of a result that updates an argument, as the parameters that a train step returns do, the change
  is compared too: a step that does nothing differs little from the true one in what it returns.

  What has a policy already, as a model that `mpjax.apply_policy` made and a loss closes over, keeps
  it, and is compared with what it is without: modules are then not looked into.

  Args:
    fn: A function of pytrees or NNX models (a loss, best), a Linen module, or an NNX model.
    policy: A `Policy`, a `PolicyMap` or a spec string. None for a module that `apply_policy` made:
      then its own.
    *args: What the function or the model takes; for a Linen module, its variables first.
    reference: What to compare with. In "float64" custom derivatives, conditionals, while loops and
      unknown operations still run in float32, and float32 constants keep their values.
    gradients: Whether to compare gradients; False for what cannot be differentiated.
    loss_scale: What the gradients under the policy are scaled with, and unscaled again.
    tolerance: The relative error that is taken for rounding; by default 16 times the distance from
      1 to the next number of the coarsest format in the policy.
    argnums: Which arguments of a function hold its parameters.
    **kwargs: The keyword arguments of the function, the model, or Linen's ``apply``.

  Returns:
    The report. ``report.agrees`` is the verdict, ``report.worst`` the modules that lose most.

  Raises:
    TypeError: An argument is a shape and no array, or the tolerance no number.
    ValueError: A rule of the policy map matches nothing, ``reference`` is unknown, or the function
      has a policy inside that cannot be left out: in a ``jax.jit``, a loop or a checkpoint; or its
      author made all of its matmuls 16-bit, so that there is no reference.

  Example:
    >>> import jax.numpy as jnp, mpjax.inspect
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2 * 1e-6)
    >>> x, w = jnp.ones((4, 8)), jnp.full((8, 8), 0.01)
    >>> report = mpjax.inspect.check(loss, "mixed_float16", w, x)
    >>> report.agrees, report.gradients[0].gradient.underflow
    (False, 64)
    >>> mpjax.inspect.check(loss, "mixed_float16", w, x, loss_scale=2.0**15).agrees
    True
  """
  if reference not in ("float32", "float64"):
    raise ValueError(
      f"reference must be 'float32' or 'float64'; got {reference!r}. Choose one of them."
    )
  if tolerance is not None and not isinstance(tolerance, numbers.Real):
    raise TypeError(f"tolerance must be a number or None. Got {tolerance!r}. Try 0.05.")
  subject = subject_of(fn, policy, args, kwargs, argnums)
  concrete(subject)
  subject = subject.differentiable() if gradients else subject
  decided = subject.decide()
  comparison = _Comparison(subject, decided, reference == "float64", gradients, loss_scale)
  return _report(subject, comparison, reference, tolerance)


class _Comparison:
  """One run of a function under two plans, and what it showed."""

  def __init__(
    self, subject: Subject, decided: Decided, double: bool, gradients: bool, loss_scale: float
  ) -> None:
    self._decided, self._double, self.scale = decided, double, loss_scale
    self._output = subject.policies.default.output_dtype
    self._plans = Pair(self._reference_plan(subject), decided.plan)
    reference = Planner(as_policy_map("float32"), LOCATED)
    self._reads = read_by_rules(self._plans.narrow.jaxpr)
    sides = (reference, decided.planner)
    self._lockstep = Lockstep(
      *(Interpreter(side, stepwise=True, read_by_rules=self._reads) for side in sides)
    )
    self.inside = first_region(decided.plan)
    self._reference = reference
    # Updates of an NNX model are no results; what a Linen module returns so is not differentiated.
    self._results = _count_returned(decided, is_pair=subject.has_models)
    is_pair = subject.has_models or subject.has_mutable
    self._differentiated = _count_returned(decided, is_pair=is_pair)
    self.updates = _updates(subject, decided)
    self.params = decided.call.parameters if gradients else ()
    self.sizes = [int(np.size(x)) for x in decided.call.operands]
    self._floats, self._compared_sizes = 0, list[int]()
    self.borders: list[Border] = []
    run = self._all
    if AxisType.Explicit in get_abstract_mesh().axis_types:
      # JAX takes no gradient through `auto_axes` operation by operation.
      run = jax.jit(run, compiler_options={"xla_allow_excess_precision": False})
    with jax.enable_x64(True) if double else contextlib.nullcontext():
      # Else not compiled as a whole: so every value exists in its dtype, and operations that many
      # layers share are compiled once.
      found: Any = jax.device_get(run(decided.call.operands))
    results, stats, self.changes, self.gradients = found
    counting = [n for n, x in enumerate(results) if n < self._floats or x.error]
    self.results = [results[n] for n in counting]
    self.result_sizes = [self._compared_sizes[n] for n in counting]
    self.crossings = [Crossing(*entry) for entry in zip(self.borders, stats, strict=True)]

  @property
  def opaque(self) -> list[Opaque]:
    """What was compared from outside only."""
    whole = [] if self.inside is None else [Opaque(_INSIDE, *self.inside)]
    own = self._authors
    narrow = [Opaque(_AUTHORS.format(own), own.path, own.line)] if own.count else []
    return [*whole, *narrow, *self._lockstep.opaque]

  def _run(self, given: list[Pair]) -> tuple[list[Pair], list[Crossing]]:
    """Both sides: step by step, or as a whole where the two are different programs."""
    if self.inside is None:
      return self._lockstep.run(self._plans, given)
    planners = Pair(self._reference, self._decided.planner)
    columns = (
      Interpreter(planner, read_by_rules=self._reads).run(plan, [pair[side] for pair in given])
      for side, (planner, plan) in enumerate(zip(planners, self._plans, strict=True))
    )
    return [Pair(*pair) for pair in zip(*columns, strict=True)], []

  def _reference_plan(self, subject: Subject) -> Plan:
    planner = Planner(as_policy_map("float32"), subject.scoping)
    jaxpr = self._decided.plan.jaxpr
    if first_region(self._decided.plan) is not None:
      jaxpr = as_written(self._decided.call)
    plan = planner.plan(jaxpr, self._decided.call.forms)
    refuse_regions(plan, "check", "its reference")
    self._authors = AuthorsOwn.of(plan)
    self._authors.refuse("check")
    return doubled(plan) if self._double else plan

  def _all(self, operands: list[Any]) -> Any:
    """The statistics of results, of what crossed borders, of changes and of gradients."""
    exact = [x.astype(FLOAT64) if self._double and _is_float32(x) else x for x in operands]
    params = Pair([exact[n] for n in self.params], [operands[n] for n in self.params])

    def loss(params: Pair) -> Any:
      columns = [
        {**dict(enumerate(column)), **dict(zip(self.params, own, strict=True))}.values()
        for column, own in zip((exact, operands), params, strict=True)
      ]
      given = [Pair(*pair) for pair in zip(*columns, strict=True)]
      outs, crossings = self._run(given)
      outs = [Pair(x, self._returned(y)) if is_real(x) else Pair(x, y) for x, y in outs]
      changes = [_change(outs[n], given[source]) for n, source in self.updates.items()]
      own_floats, _ = _floats_and_others(outs[: self._differentiated])
      outs, others = _floats_and_others(outs[: self._results])
      self._floats, compared = len(outs), [*outs, *others]
      self._compared_sizes = [int(np.size(pair.reference)) for pair in compared]
      self.borders = [crossing.border for crossing in crossings]
      own = [crossing.stats for crossing in crossings]
      moved = [
        (compare(*pair), jnp.linalg.norm(given[source].reference.ravel()))
        for pair, source in zip(changes, self.updates.values(), strict=True)
      ]
      stats = [compare(*pair) for pair in compared], own, moved
      return _loss_of(own_floats, self.scale), stats

    if not self.params:
      return *loss(params)[1], []
    try:
      grads, stats = jax.grad(loss, has_aux=True)(params)
    except Exception as error:
      error.add_note("check differentiates. Pass gradients=False to compare values alone.")
      raise
    unscaled = [_parts(g).astype(jnp.float32) / self.scale for g in grads.narrow]
    exact = [jnp.where(jnp.isfinite(g), g, jnp.nan) for g in map(_parts, grads.reference)]
    return *stats, [compare(*p) for p in zip(exact, unscaled, strict=True)]

  def _returned(self, x: Any) -> Any:
    """A result in the output dtype."""
    castable = x.dtype.itemsize in (2, 4)
    return x.astype(self._output) if castable else x


def _floats_and_others(outs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
  """Results that are floats or complex, all as floats; and integers and bools, as floats."""
  floats, others = list[Pair](), list[Pair]()
  for pair in outs:
    if is_real(pair.reference):
      floats.append(pair)
    elif is_of(pair.reference, np.complexfloating):
      floats.append(Pair(*map(_parts, pair)))
    elif is_of(pair.reference, np.integer) or is_of(pair.reference, np.bool_):
      others.append(Pair(*(x.astype(np.float32) for x in pair)))
  return floats, others


def _parts(x: Any) -> Any:
  """The real parts of complex numbers, and the imaginary ones; other numbers as they are."""
  return jnp.stack([lax.real(x), lax.imag(x)]) if is_of(x, np.complexfloating) else x


def _loss_of(outs: Sequence[Pair], scale: float) -> Any:
  """The sum of the results of both sides: of one scalar as it is, else along random signs."""
  scalar = len(outs) == 1 and outs[0].reference.ndim == 0
  total = jnp.zeros((), outs[0].reference.dtype if outs else jnp.float32)
  for n, pair in enumerate(outs):
    signs = jax.random.rademacher(jax.random.key(n), pair.reference.shape, jnp.float32)
    for value, factor in zip(pair, (1.0, scale), strict=True):
      weights = jnp.float32(factor) if scalar else signs * jnp.float32(factor)
      total += jnp.sum(value.astype(total.dtype) * weights.astype(total.dtype))
  return total


def _change(after: Pair, before: Pair) -> Pair:
  """What an update adds to an argument, on both sides."""
  return Pair(*(x - y.astype(x.dtype) for x, y in zip(_exact(after), before, strict=True)))


def _exact(pair: Pair) -> Pair:
  """A pair, what is 16-bit on one side in the dtype of the reference: differences are exact."""
  return Pair(pair.reference, pair.narrow.astype(pair.reference.dtype))


def _updates(subject: Subject, decided: Decided) -> dict[int, int]:
  """Which results update which operands; of a model its parameters, not its statistics."""
  has_model = subject.scoping.root or subject.scoping.absolute
  forms = decided.call.forms
  return {
    n: source
    for n, source in updated(decided.plan.jaxpr).items()
    if is_real(decided.call.operands[source])
    and not (has_model and (forms[source] or DATA).kind is not Kind.PARAM)
  }


def _is_float32(x: Any) -> bool:
  return getattr(x, "dtype", None) == np.float32


def _count_returned(decided: Decided, *, is_pair: bool) -> int:
  """How many arrays are returned; of a pair of results and updates, in the first."""
  call = decided.call
  tree = call.out_tree.children()[0] if is_pair else call.out_tree
  return sum(leaf is None for leaf in call.out_leaves[: tree.num_leaves])


def _report(
  subject: Subject, comparison: _Comparison, reference: str, tolerance: float | None
) -> CheckReport:
  names = subject.operand_names()
  eps = max((float(jnp.finfo(d).eps) for d in subject.policies.narrow_dtypes()), default=1e-6)
  params, grads, sizes = comparison.params, comparison.gradients, comparison.sizes
  total = float(np.linalg.norm([float(g.norm) for g in grads]))
  return CheckReport(
    subject.name,
    subject.policies,
    reference,
    _TOLERATED_EPS * eps if tolerance is None else tolerance,
    _difference(comparison.results, comparison.result_sizes),
    tuple(
      Change(names[n], _difference([c], [sizes[n]]), float(_ratio(float(c.norm), float(norm))))
      for n, (c, norm) in zip(comparison.updates.values(), comparison.changes, strict=True)
    ),
    tuple(_rows(comparison.crossings, subject.scoping.root)),
    tuple(
      GradientCheck(names[n], _difference([g], [sizes[n]]), float(_ratio(float(g.norm), total)))
      for n, g in zip(params, grads, strict=True)
    ),
    tuple(
      NotLookedInto(o.what, module_name(o.path, subject.scoping.root), o.line)
      for o in comparison.opaque
    ),
    comparison.scale,
  )


def _rows(crossings: Sequence[Crossing], root: int) -> list[ModuleCheck]:
  """One row for each module that hands something out."""
  left: dict[str, list[Crossing]] = {}
  entered: dict[str, list[Crossing]] = {}
  for crossing in crossings:
    if not np.any(crossing.stats.times):  # in a branch that was not taken
      continue
    for path in crossing.border.leaves:
      left.setdefault(module_name(path, root), []).append(crossing)
    for path in crossing.border.enters:
      entered.setdefault(module_name(path, root), []).append(crossing)
  return [
    _row(module, outputs, entered.get(module, []))
    for module, outputs in left.items()
    if module != TOP
  ]


def _row(module: str, outputs: list[Crossing], inputs: list[Crossing]) -> ModuleCheck:
  output = _pooled(outputs)
  error_in = max((_pooled([crossing]).error for crossing in inputs), default=0.0)
  worst = max(outputs, key=lambda c: _badness(_pooled([c])))
  added = np.sqrt(max(0.0, output.error**2 - error_in**2))
  given = _pooled(inputs)
  return ModuleCheck(
    module,
    worst.border.line,
    output,
    error_in,
    float(added),
    given.overflow > 0 or underflows(given) > 0,
    _worst_iteration(worst),
  )


def _badness(difference: Difference) -> tuple[float, ...]:
  return difference.overflow, underflows(difference), difference.error


def _worst_iteration(crossing: Crossing) -> int | None:
  if not crossing.border.loop:
    found = int(np.max(crossing.stats.iteration))
    return found if found >= 0 else None
  stats, length = crossing.stats, crossing.border.loop[0]
  error, norm, overflow = (
    np.asarray(x, float).reshape(length, -1) for x in (stats.error, stats.norm, stats.overflow)
  )
  ratio = _ratio(np.square(error).sum(1), np.square(norm).sum(1))
  return int(np.lexsort((-np.arange(length), ratio, overflow.sum(1)))[-1])


def _pooled(crossings: Sequence[Crossing]) -> Difference:
  sizes = [c.border.size * int(np.sum(c.stats.times)) for c in crossings]
  return _difference([crossing.stats for crossing in crossings], sizes)


def _difference(stats: Sequence[Stats], sizes: Sequence[int]) -> Difference:
  """Statistics of several values, each perhaps of several iterations, as those of one."""
  columns = (np.concatenate([np.ravel(x) for x in column]) for column in zip(*stats, strict=True))
  if not stats:
    return Difference(0.0, 1.0, 0, 0, 0, 0.0)
  error, norm, cosine, overflow, underflow, largest, undefined, *_ = (
    np.asarray(c, float) for c in columns
  )
  total = np.square(norm).sum()
  return Difference(
    float(np.sqrt(_ratio(np.square(error).sum(), total))),
    float((cosine * np.square(norm)).sum() / total) if total else 1.0,
    int(overflow.sum()),
    int(underflow.sum()),
    sum(sizes),
    float(largest.max()),
    int(undefined.sum()),
  )


def _ratio(error: Any, norm: Any) -> Any:
  """A relative error; that of something where nothing should be is infinite."""
  fallback = np.where(np.asarray(error) > 0, np.inf, 0.0)
  return np.divide(error, norm, out=fallback, where=np.asarray(norm) > 0)
