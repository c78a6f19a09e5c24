"""`locate_nonfinite`: which operation made the first inf or NaN."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._core.policy_map import PolicyLike, as_policy_map
from mpjax._core.tree_paths import leaf_paths
from mpjax._engine.calls import is_traced
from mpjax._engine.execute import Decided
from mpjax._engine.planning.plan import Scoping
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import jaxprs
from mpjax._engine.running.scaled_cotangents import UNSCALED
from mpjax._flax.policed import POLICIES
from mpjax.inspect._flow_report import TOP, module_name
from mpjax.inspect._inspected import Subject, concrete, is_real, subject_of
from mpjax.inspect._nonfinite_search import (
  PATIENCE,
  Birth,
  Hunt,
  Spot,
  State,
  custom_rules,
  state_of,
)
from mpjax.inspect._report import Report, Table
from mpjax.inspect._source_lines import Line, texts_of

_FLOAT32 = "float32"


@dataclass(frozen=True, repr=False)
class NonFiniteReport(Report):
  """Where inf and NaN were made, as `locate_nonfinite` found it.

  Attributes:
    name: The function or module.
    finite: Whether everything that it returned is finite.
    arrived: The results that are not.
    rows: Every operation that made inf out of finite numbers, or NaN out of others, in the order
      of the program; ``row.arrives`` says whether a result is not finite because of it.
    unended: The lines of while loops that were left after 10,000 iterations with numbers that are
      not finite, which may keep them from ending; what follows saw their values at that point.

  Example:
    >>> import mpjax.inspect
    >>> report = mpjax.inspect.locate_nonfinite(lambda x: jnp.log(x), jnp.zeros(1))
    >>> report.finite, report.first.op, report.first.made
    (False, 'log', 'inf')
  """

  name: str
  finite: bool
  arrived: tuple[str, ...]
  rows: tuple[Birth, ...]
  unended: tuple[Line, ...] = ()

  @property
  def first(self) -> Birth | None:
    """The first operation because of which a result is not finite; None if all are."""
    return next((row for row in self.rows if row.arrives), None)

  @property
  def summary(self) -> str:
    """What happened first, and where."""
    return self._found + "".join(
      f"\nThe while loop at {line} had not ended after {PATIENCE:,} iterations with numbers that "
      "are not finite, and was left."
      for line in self.unended
    )

  @property
  def _found(self) -> str:
    if self.finite:
      inside = f" {len(self.rows)} made on the way did not reach it." if self.rows else ""
      return f"{self.name}: nothing that is not finite arrives in the result.{inside}"
    first = self.first
    if first is None:
      return (
        f"{self.name}: the result is not finite, and no operation made it so: it holds an inf or "
        f"a NaN that the program states ({', '.join(self.arrived)})."
      )
    where = f" of {first.module}" if first.module != TOP else ""
    passes = ", in the backward pass" if first.backward else ""
    passes += f" (rule {first.rule})" if first.rule else ""
    steps = "".join(f", {part}" for part in first.within)
    made = {"inf": "inf", "nan": "NaN"}[first.made]
    return (
      f"{self.name}: {made} is made first by {first.op} at {first.line}{where}{passes}{steps}, "
      f"in {first.result.array}{first.where}.\n"
      f"Operands: {'; '.join(map(str, first.operands)) or 'none'}.\n"
      f"Not finite in the result: {', '.join(self.arrived)}."
    )

  def tables(self) -> Sequence[Table]:
    """Every place where it was made, in the order of the program."""
    rows = [
      [
        str(row.line),
        row.module + (" (backward)" if row.backward else ""),
        row.op,
        row.made,
        f"{row.result.array}{row.where}",
        "; ".join(map(str, row.operands)),
        ", ".join(row.within),
        "yes" if row.arrives else "no",
      ]
      for row in self.rows
    ]
    header = ["line", "module", "operation", "made", "result", "operands", "within", "arrives"]
    sources = texts_of(row.line for row in self.rows)
    return [Table(header, rows, "<", notes=sources)] if rows else []


def locate_nonfinite(
  fn: Callable[..., Any],
  *args: Any,
  policy: PolicyLike | None = None,
  argnums: int | Sequence[int] = 0,
  backward: bool = False,
  loss_scale: float = 1.0,
  **kwargs: Any,
) -> NonFiniteReport:
  """Find the first operation that turns finite numbers into inf or NaN.

  The function runs once, one operation at a time, on the values given: inside ``jit``,
  ``checkpoint``, ``cond`` and custom derivatives, and in the iteration of a ``scan`` or ``while``
  that goes wrong. A ``while`` that NaN keeps from ending is left after some time, and named. What
  is inf by intent, such as the ``-inf`` of a mask, is no finding; a number that is not finite but
  never reaches the result, as behind ``jnp.where``, is listed apart.

  Args:
    fn: A function of pytrees or NNX models (``jax.grad`` of a loss, say), a Linen module, or an
      NNX model.
    *args: What the function or the model takes; for a Linen module, its variables first.
    policy: Look at the function under this policy. None for as it is; a module that
      `apply_policy` made has its own.
    argnums: Which arguments of a function hold its parameters.
    backward: Whether to run the backward pass too, from the sum of the results to the parameters.
    loss_scale: What the backward pass starts with, as under loss scaling.
    **kwargs: The keyword arguments of the function, the model, or Linen's ``apply``.

  Returns:
    The report; ``report.first`` is the culprit.

  Raises:
    TypeError: An argument is a shape and no array.
    ValueError: A rule of the policy map matches nothing; ``backward`` and no parameter is a float.

  Example:
    >>> import jax.numpy as jnp, mpjax.inspect
    >>> report = mpjax.inspect.locate_nonfinite(lambda x: jnp.sum(x / (x - 1)), jnp.arange(3.0))
    >>> report.first.op, report.first.where, report.first.made
    ('div', '[1]', 'inf')
  """
  own = getattr(type(fn), POLICIES, _FLOAT32)
  subject = subject_of(fn, own if policy is None else policy, args, kwargs, argnums)
  concrete(subject)
  subject = subject.differentiable() if backward else subject
  decided = subject.decide()
  closed, names, operands = _program(subject, decided, backward, loss_scale)
  planner = Planner(as_policy_map(_FLOAT32), Scoping(absolute=True, located=True))
  hunt = Hunt(planner, functools.partial(module_name, root=subject.scoping.root))
  with jax.debug_nans(False), jax.debug_infs(False):
    arguments = zip(operands, subject.operand_names(), strict=True)
    taints = [hunt.arrived(x, f"argument {name}") for x, name in arguments]
    outs, marks = hunt.run(closed, operands, taints, Spot())
  reached = frozenset().union(*marks)
  rules = dict(custom_rules(decided.plan.jaxpr, planner, Spot()))
  named = {(hunt.name(path), line): rule for (path, line), rule in rules.items()}
  births = [
    dataclasses.replace(
      b, arrives=n in reached, rule=named.get((b.module, b.line), "") if b.backward else ""
    )
    for n, b in enumerate(hunt.births)
  ]
  arrived = [name for name, x in zip(names, outs, strict=True) if state_of(x) is not State.FINITE]
  return NonFiniteReport(
    subject.name, not arrived, tuple(arrived), tuple(births), tuple(dict.fromkeys(hunt.unended))
  )


def _program(
  subject: Subject, decided: Decided, backward: bool, loss_scale: float
) -> tuple[Any, list[str], list[Any]]:
  """The jaxpr to run, the names of its results, and its operands."""
  call, operands = decided.call, decided.call.operands
  run = decided.planned.interpreter(UNSCALED, stepwise=True).run
  forward = call.flat
  if subject.policies.is_float32():  # as it is: 16-bit parameters are not widened
    operands = [jnp.asarray(x) for x in call.leaves if is_traced(x)]
  else:
    forward = lambda *xs: run(decided.plan, xs)  # noqa: E731
  if not backward:
    return jaxprs.trace(forward, operands), _result_names(subject, decided), operands
  places = call.parameters
  if not places:
    raise ValueError(
      "backward=True differentiates with respect to the parameters, and no float is one. Set "
      "argnums to the arguments that hold them."
    )

  def both(*operands: Any) -> list[Any]:
    def of_params(*params: Any) -> tuple[list[Any], list[Any]]:
      merged = dict(enumerate(operands)) | dict(zip(places, params, strict=True))
      outs = forward(*merged.values())
      return [x for x in outs if is_real(x)], list(outs)

    floats, pull, outs = jax.vjp(of_params, *(operands[n] for n in places), has_aux=True)
    return [*outs, *pull([jnp.full_like(x, loss_scale) for x in floats])]

  traced, titles = jaxprs.trace(both, operands), subject.operand_names()
  names = _result_names(subject, decided)  # as this trace returned them: keys may be unused in it
  return traced, [*names, *(f"gradient of {titles[n]}" for n in places)], operands


def _result_names(subject: Subject, decided: Decided) -> list[str]:
  """The paths of the arrays that the function returned; a model's updates come after them."""
  call = decided.call
  leaves = ["array" if leaf is None else None for leaf in call.out_leaves]
  tree = jax.tree.unflatten(call.out_tree, leaves)
  result, updated = tree if subject.scoping.absolute else (tree, ())
  names = [f"result/{path}".rstrip("/") for path, _ in leaf_paths(result)]
  names += [f"updated {path}" for path, _ in leaf_paths(updated)]
  return [*names, *(f"array in {holder}" for holder, *_ in call.hidden)]
