"""The dtype-flow report: what a policy does to a function, module by module."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mpjax._core.policy_map import PolicyLike
from mpjax.inspect import _flow
from mpjax.inspect._flow_data import Flow, Remark, Widening
from mpjax.inspect._flow_remarks import batch_first, never_reached, of_float64
from mpjax.inspect._flow_report import FlowReport, Namer, module_name, rule_name
from mpjax.inspect._flow_rows import (
  CastFlow,
  Float8Flow,
  IslandFlow,
  Leak,
  OpFlow,
  RemarkFlow,
  UnknownOp,
  WideMatmul,
)
from mpjax.inspect._inspected import Subject, subject_of
from mpjax.inspect._source_lines import Line


def explain(
  fn: Callable[..., Any],
  policy: PolicyLike | None,
  *args: Any,
  argnums: int | Sequence[int] = 0,
  grad: bool = False,
  **kwargs: Any,
) -> FlowReport:
  """Report what a policy does to a function or model, without running anything.

  The function is traced and planned as `mpjax.autocast` would; every array among the arguments
  may be a ``jax.ShapeDtypeStruct``.

  Args:
    fn: A function of pytrees or of NNX models (a loss, or ``jax.grad`` of one), a Linen module, or
      an NNX model.
    policy: A `Policy`, a `PolicyMap` or a spec string. None for a module that `apply_policy` made:
      then its own.
    *args: What the function or the model takes; for a Linen module, its variables first.
    argnums: Which arguments of a function hold its parameters, as for `mpjax.autocast`.
    grad: Whether to follow the backward pass too, as ``autocast(jax.grad(fn), policy)`` runs it:
      the gradients of the parameters, from the sum of the results. What stands in it is marked as
      ``backward``; rules of ``custom_vjp`` are part of it. Where the gradient is taken outside of
      `autocast`, matmuls that stay in float32 have both of their derivatives in float32, too.
    **kwargs: The keyword arguments of the function, the model, or Linen's ``apply``.

  Returns:
    The report. ``report.keeps_promise`` if the policy does what it promises: nothing leaks, nothing
    multiplies as traced, in float32, and ``report.remarks`` holds nothing but matmuls of integers.
    A remark is made of a ``precision=`` that the policy overrides, of matmuls of float64 and of
    complex numbers, of sums that a rule for operations keeps in 16 bits although they are small
    steps, changes of parameters or what a long loop adds up, of a rule that never wins, of a loop
    that ends by comparing floats which 16-bit matmuls move, of data that were taken for the
    parameters, and of regions with a policy of their own, whose leaks are not looked for.

  Raises:
    ValueError: A rule of the policy map matches nothing; a module without a policy came with None;
      ``grad`` and no parameter is a float.
    TypeError: ``fn`` is none of these.

  Example:
    >>> import jax, jax.numpy as jnp, numpy as np, mpjax.inspect
    >>> table = np.ones((2, 8), np.float32)
    >>> def fn(params, x):
    ...   return (x @ params["a"] * table) @ params["b"]
    >>> shape = jax.ShapeDtypeStruct((8, 8), np.float32)
    >>> params = {"a": shape, "b": shape}
    >>> report = mpjax.inspect.explain(fn, "mixed_bfloat16", params, jnp.ones((2, 8)))
    >>> report.narrow_share, [leak.widened_by for leak in report.leaks]
    (1.0, [('the constant f32[2,8]',)])
  """
  subject = subject_of(fn, policy, args, kwargs, argnums)
  subject = subject.backward() if grad else subject
  planned = subject.plan_abstractly()
  flow = _flow.follow(planned.planner, planned.plan, subject.operand_names())
  flow.remarks.update(batch_first(subject, planned.plan))
  flow.remarks.update(never_reached(subject, planned.planner))
  named = [(of_float64(r, subject, planned.plan), n) for r, n in flow.remarks.items()]
  flow.remarks = Counter(dict(named))
  return _report(subject, flow)


def _report(subject: Subject, flow: Flow) -> FlowReport:
  policies, named = subject.policies, functools.partial(module_name, root=subject.scoping.root)
  leaks = {
    leaks: tuple(_leak(w, named) for w in flow.widenings if w.leaks is leaks)
    for leaks in (True, False)
  }
  foreign = [_foreign(named(path), op, line) for path, op, line in flow.foreign]
  return FlowReport(
    subject.name,
    policies,
    tuple(
      OpFlow(
        named(key.path),
        key.op,
        key.rule,
        key.dtype,
        key.returns,
        rule_name(policies, key.won),
        key.backward,
        entry.count,
        entry.flops,
        entry.bytes,
      )
      for key, entry in flow.ops.items()
    ),
    tuple(CastFlow(named(p), source, to, n) for (p, source, to), n in flow.casts.items()),
    _folded((*leaks[True], *foreign)),
    leaks[False],
    tuple(IslandFlow(named(i.path), i.line, i.ops, i.cause) for i in flow.islands),
    tuple(
      UnknownOp(op, named(path), line, inside.count, inside.flops)
      for (op, line, path), inside in flow.traced.items()
    ),
    flow.loops,
    remarks=tuple(_remark(remark, n, named) for remark, n in flow.remarks.items()),
    float8=tuple(
      Float8Flow(named(key.path), key.backward, key.reason, entry.count, entry.flops)
      for key, entry in flow.float8.items()
    ),
    wide=tuple(
      WideMatmul(named(key.path), key.line, key.reason, key.backward, entry.count, entry.flops)
      for key, entry in flow.wide.items()
    ),
  )


def _leak(widening: Widening, named: Namer) -> Leak:
  reader = widening.reader
  return Leak(
    named(widening.path),
    widening.line,
    widening.op,
    widening.result,
    tuple(sorted(map(str, widening.births))),
    widening.bytes,
    widening.again,
    f"{reader[0]} {reader[1]}" if reader else "",
    widening.backward,
  )


def _folded(leaks: Sequence[Leak]) -> tuple[Leak, ...]:
  """The leaks with those of one line, as of a loop over layers, in one."""
  groups: dict[Any, list[Leak]] = {}
  for leak in leaks:
    place = (leak.line, "") if leak.line.line else (leak.line, leak.module)
    kinds = tuple(sorted({by.partition(" ")[0] for by in leak.widened_by}))
    groups.setdefault((place, leak.op, leak.backward, kinds), []).append(leak)
  return tuple(
    dataclasses.replace(
      group[0],
      widened_by=tuple(dict.fromkeys(by for leak in group for by in leak.widened_by)),
      bytes=sum(leak.bytes for leak in group),
      also=sum(leak.also for leak in group),
      modules=tuple(leak.module for leak in group),
    )
    for group in groups.values()
  )


_KEEPS = 'mpjax.autocast(fn, "float32") around it, or a float32 rule for its module, keeps it'
_TEXTS = {
  "precision": "{} is overridden by the policy; " + _KEEPS,
  "float64": "{}",
  "format": "{}: its author cast to that; drop the cast, or take a policy of that format",
  "complex": "{}, of which there is no 16-bit format; multiply real and imaginary parts apart",
  "rule": "the rule {} above it take all that it matches; put it first, or drop it",
  "narrowed": "a rule of the map keeps {}",
  "integers": "{} runs as written; it is counted apart",
  "loop": "a while loop ends by comparing floats that 16-bit matmuls move: it may run more or "
  "fewer times than in float32, or for ever; " + _KEEPS,
  "batch": "the policy {}; pass the parameters first, or set argnums",
  "policy": "a part of it has a policy of its own, which governs there and was not looked into; "
  "explain the module or function that has it, with None for the policy of a module; of an "
  "mpjax.autocast or a train step, the plain function or the loss, with its policy",
}


def _remark(remark: Remark, count: int, named: Namer) -> RemarkFlow:
  text = _TEXTS[remark.kind].format(remark.what)
  return RemarkFlow(remark.kind, named(remark.path), remark.line, text, count)


def _foreign(module: str, op: str, line: Line) -> Leak:
  by = "an operand in a format of its own, with which it runs as traced"
  return Leak(module, line, op, "", (by,), 0, 0, f"{op} {line}", False)
