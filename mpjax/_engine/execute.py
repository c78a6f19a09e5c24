"""Traces a function, plans its jaxpr, and runs the plan on the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import source_info_util

from mpjax._core.policy_map import PolicyMap
from mpjax._core.scopes import POLICY_REGION, Path, is_as_written
from mpjax._engine import escapes
from mpjax._engine.analyses.known import Known
from mpjax._engine.analyses.sums import Summing
from mpjax._engine.calls import Call, Flags, Result
from mpjax._engine.kept_plans import Planned, Program, planned
from mpjax._engine.planning.plan import PLAIN, Plan, Scoping
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.kinds import PARAM
from mpjax._engine.running import captured
from mpjax._engine.running.environment import to_dtype
from mpjax._engine.running.scaled_cotangents import UNSCALED, into, out_of


class Decided(NamedTuple):
  """A call whose dtypes are decided, before it runs.

  Attributes:
    call: The call.
    planned: Its plan, and what is rebuilt to run it.
    captured: The arrays that its function closed over this time.
  """

  call: Call
  planned: Planned
  captured: Sequence[jax.Array]

  @property
  def planner(self) -> Planner:
    """The planner that made the plan."""
    return self.planned.planner

  @property
  def plan(self) -> Plan:
    """The plan."""
    return self.planned.plan

  def run(self, loss_scale: float = UNSCALED) -> Result:
    """Execute the plan on the arguments of the call; the call itself where that is asked for.

    Args:
      loss_scale: What cotangents are multiplied by inside, a power of two.
    """
    if runs_as_written():
      outs = self.call.flat(*self.call.operands)
      return self.call.result(outs, (None,) * len(outs))
    with jax.named_scope(POLICY_REGION):
      operands = [into(x, loss_scale) for x in self.call.operands]
      captured = [into(x, loss_scale) if isinstance(x, Tracer) else x for x in self.captured]
      is_expanded = any(map(_is_series, (*operands, *captured)))
      interpreter = self.planned.interpreter(loss_scale, stepwise=is_expanded)
      with interpreter.copies.noted(operands, self.call.stored):
        leaves = interpreter.run(self.plan, operands, captured)
      arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]  # constants
      outside = [
        out_of(x, loss_scale) if form else to_dtype(out_of(x, loss_scale), x.dtype)
        for x, form in zip(arrays, self.plan.out_forms, strict=True)
      ]
    return self.call.result(outside, self.plan.out_forms)


def _is_series(x: Any) -> bool:
  """Whether a value is a Taylor series: `jet` has rules for operations, not for checkpoints."""
  return type(x).__module__ == "jax.experimental.jet"


def runs_as_written() -> bool:
  """Whether a report asks for what is computed here without the policies inside of it.

  JAX starts a name stack anew in the body of a `jax.jit`, a loop or a checkpoint, so these are
  traced with their policies all the same, and what JAX keeps of such a trace stays true.
  """
  return is_as_written(source_info_util.current_name_stack())


def decide(
  fn: Callable[..., Any],
  policies: PolicyMap,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  flags: Flags,
  *,
  scoping: Scoping = PLAIN,
  strict: bool = True,
  known: Iterable[Path] = (),
) -> Decided:
  """Trace ``fn(*args, **kwargs)`` and plan it under a policy map.

  Args:
    fn: A pure function of pytrees.
    policies: The policies by module path.
    args: Positional arguments.
    kwargs: Keyword arguments.
    flags: For each of them whether it holds parameters (True), a model's other state (`STATE`) or
      neither (False); for a tuple, flags of its entries.
    scoping: How scopes lead to the paths of modules.
    strict: Whether a rule that matches no scope is an error.
    known: Module paths that there are, whether this call runs them or not; read after the trace.

  Raises:
    ValueError: A rule of the policy map matched no scope.
  """
  call = Call(fn, args, kwargs, flags)
  jaxpr = captured.trace(call.flat_and_named(), call.operands)
  call.hidden = escapes.computed(call.hidden, jaxpr)
  outs = versions.open_jaxpr(jaxpr).outvars
  of_call = Known(
    sums=Summing(
      parameters=tuple(n for n, form in enumerate(call.forms) if form == PARAM),
      gradients=tuple(range(len(outs))),
      given_back=call.given_back([*map(jaxprs.shape, outs)]),
    ),
    own=call.own,
  )
  program = Program(jaxpr, call.forms, of_call, policies, scoping)
  found = planned(program, call.operands)
  if strict:
    policies.check_used((*found.planner.ops, *known), found.planner.ops)
  return Decided(call, found, versions.constants(jaxpr))
