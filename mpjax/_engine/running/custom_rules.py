"""Runs equations that hold functions of a user's beside their body, all of them under the policy.

`custom_derivatives` reads rules for derivatives and batching out of an equation; here they are
planned and become the rules of what takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.custom_batching
import jax.custom_derivatives
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from mpjax._engine.analyses.known import Known
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.versions import AnyJaxpr, ClosedJaxpr
from mpjax._engine.running import captured, custom_derivatives
from mpjax._engine.running.custom_derivatives import Slots, Vjp

T = TypeVar("T")


class Interprets(Protocol):
  """What plans functions, runs their plans and makes jaxprs of them."""

  planner: Planner

  def run(self, plan: Plan, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Execute a plan on operands that are held as its forms say."""
    ...

  def run_of_rules(self) -> Callable[[Plan, Sequence[jax.Array]], list[jax.Array]]:
    """`run` for rules of the step that runs: later, with what they close over as it is now."""
    ...

  def rebuild(self, plan: Plan) -> ClosedJaxpr:
    """The closed jaxpr of a plan."""
    ...

  def of_step(self, step: Step, make: Callable[[Step], T]) -> T:
    """What is made of a step the first time that it runs."""
    ...


def custom_jvp(interpreter: Interprets, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """The body under the policy, with the user's derivative under the policy."""
  eqn, known = step.eqn, custom_derivatives.closed_over(step.eqn)
  inputs, outs = custom_derivatives.slots(eqn.invars[known:]), custom_derivatives.slots(eqn.outvars)
  captured, run_rule = operands[:known], interpreter.run_of_rules()
  rule_plan = interpreter.of_step(step, functools.partial(_jvp_plans, interpreter.planner))

  @jax.custom_jvp
  def call(*primals: jax.Array) -> list[jax.Array]:
    return interpreter.run(step.bodies[0], [*captured, *primals])

  @custom_derivatives.named(eqn)
  def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    ins, count = inputs.nonzero(tangents), len(step.outs)
    plan, given = rule_plan(ins), ins.keep(tangents)
    run = functools.partial(run_rule, plan)
    if not plan.in_float8:
      flat = run([*captured, *primals, *given])
      return flat[:count], outs.fill(flat[count:])
    # A rounding to float8 has no transpose. The rule is linear, so it is its derivative at zero,
    # which has one.
    nothing = [*map(jnp.zeros_like, given)]
    flat, moved = jax.jvp(lambda given: run([*captured, *primals, *given]), (nothing,), (given,))
    return flat[:count], outs.fill(moved[count:])

  call.defjvp(rule, symbolic_zeros=True)
  return call(*operands[known:])


def _jvp_plans(planner: Planner, step: Step) -> Callable[[Slots], Plan]:
  """The plans of a derivative, by the operands that have a tangent."""
  eqn, known = step.eqn, custom_derivatives.closed_over(step.eqn)
  outs = custom_derivatives.slots(eqn.outvars)

  @functools.cache
  def rule_plan(ins: Slots) -> Plan:
    forms = (*step.operands, *ins.keep(step.operands[known:]))
    held = (*step.outs, *outs.keep(step.outs))
    rule = custom_derivatives.trace_jvp(eqn, ins)
    return planner.rule_of(rule, forms, step.place, step.outs, held)

  return rule_plan


def custom_lin(interpreter: Interprets, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """What JAX leaves of a custom_vjp in a rule that differentiates it: tangents to be transposed.

  Its backward pass is to be the user's under the policy. So a custom_vjp of zeros is made that has
  this one, and differentiated: what JAX leaves of it in the trace takes the place of the first.
  """
  eqn, count = step.eqn, step.eqn.params["num_res"]
  outs = custom_derivatives.slots(eqn.outvars)
  tangents = operands[count:]
  out_avals: list[Any] = outs.keep([v.aval for v in eqn.outvars])

  @functools.cache
  def plan(given: Slots) -> Plan:
    forms, held = (*step.operands[:count], *given.keep(step.outs)), step.operands[count:]
    transpose = custom_derivatives.trace_transpose(eqn, count, given)
    return interpreter.planner.plan(transpose, forms, step.place, held)

  @jax.custom_vjp
  def call(residuals: list[jax.Array], values: list[jax.Array]) -> list[jax.Array]:
    del residuals, values
    return [*map(ad.zeros_like_aval, out_avals)]

  def forward(residuals: list[jax.Array], values: list[jax.Array]) -> tuple[list[Any], list[Any]]:
    known, values = jax.tree.map(lambda primal: primal.value, (residuals, values))
    return call(known, values), known

  def backward(residuals: list[jax.Array], cotangents: list[jax.Array]) -> tuple[None, list[Any]]:
    full = outs.fill(cotangents)
    given = outs.nonzero(full)
    return None, interpreter.run(plan(given), [*residuals, *given.keep(full)])

  call.defvjp(forward, backward, symbolic_zeros=True)
  along = functools.partial(call, operands[:count])
  _, found = jax.jvp(along, ([jnp.zeros_like(t) for t in tangents],), (tangents,))
  return outs.fill(found)


def custom_vjp(interpreter: Interprets, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """The body under the policy, with the user's forward and backward pass under the policy."""
  eqn, count, known = step.eqn, len(step.outs), custom_derivatives.closed_over(step.eqn)
  captured, given, run_rule = operands[:known], operands[known:], interpreter.run_of_rules()
  refs = [x for x in given if isinstance(x, jax.Ref)]
  inputs, outs = custom_derivatives.slots(eqn.invars[known:]), custom_derivatives.slots(eqn.outvars)
  inputs = inputs.only([not isinstance(x, jax.Ref) for x in given])
  plans = functools.partial(_vjp_plans, interpreter.planner)
  rules, forward_plan, backward_plan = interpreter.of_step(step, plans)

  @jax.custom_vjp
  def call(*primals: jax.Array) -> list[jax.Array]:
    return interpreter.run(step.bodies[0], [*captured, *primals])

  @custom_derivatives.named(eqn)
  def forward(ins: Slots, primals: Sequence[Any]) -> tuple[list[Any], tuple[Slots, list[Any]]]:
    operands = [*captured, *primals]
    flat = run_rule(forward_plan(ins), operands)
    return flat[:count], (ins, rules(ins).residuals(operands, flat[count:]))

  def forward_of_some(*primals: Any) -> tuple[list[Any], tuple[Slots, list[Any]]]:
    return forward(inputs.only([p.perturbed for p in primals]), [p.value for p in primals])

  @custom_derivatives.named(eqn)
  def backward(residuals: tuple[Slots, list[Any]], cotangents: list[jax.Array]) -> tuple[Any, ...]:
    ins, stored = residuals
    given = outs.nonzero(cotangents)
    flat = iter(run_rule(backward_plan(ins, given), [*stored, *given.keep(cotangents)]))
    return tuple(next(flat) if asked else None for asked in ins.differentiable)

  if not refs:
    call.defvjp(forward_of_some, backward, symbolic_zeros=True)
    return call(*given)
  # A mutable array can be a residual only where JAX does not tell which operands have tangents.
  call.defvjp(lambda *primals: forward(inputs, primals), backward)
  return _beside_constants(refs, call(*given))


@jax.custom_vjp
def _beside_constants(refs: list[Any], values: list[jax.Array]) -> list[jax.Array]:
  """The values, after a look at the mutable arrays: with respect to them nothing is derived."""
  del refs
  return values


def _forward_beside(refs: list[Any], values: list[Any]) -> tuple[list[jax.Array], None]:
  derived = [jax.typeof(ref.value) for ref in refs if ref.perturbed]
  if derived:
    raise ValueError(
      f"Under a policy a custom_vjp takes a mutable array as a constant. Got {derived[0]} that was "
      "made in the function that is differentiated. Pass it what the array holds, ref[...], or "
      "make the array outside of that function."
    )
  return [x.value for x in values], None


def _backward_beside(_: None, cotangents: list[Any]) -> tuple[None, list[Any]]:
  return None, [None if isinstance(x, SymbolicZero) else x for x in cotangents]


_beside_constants.defvjp(_forward_beside, _backward_beside, symbolic_zeros=True)


def _vjp_plans(
  planner: Planner, step: Step
) -> tuple[Callable[[Slots], Vjp], Callable[[Slots], Plan], Callable[[Slots, Slots], Plan]]:
  """The two passes and the plans of each, by the operands whose cotangents are asked for.

  The backward pass goes by the results that have a cotangent, too.
  """
  eqn, count, known = step.eqn, len(step.outs), custom_derivatives.closed_over(step.eqn)

  @functools.cache
  def rules(ins: Slots) -> Vjp:
    return custom_derivatives.trace_vjp(eqn, ins)

  @functools.cache
  def forward_plan(ins: Slots) -> Plan:
    jaxpr = rules(ins).forward
    forward = functools.partial(planner.rule_of, jaxpr, step.operands, step.place, step.outs)
    return forward((*step.outs, *forward().out_forms[count:]))

  @functools.cache
  def backward_plan(ins: Slots, given: Slots) -> Plan:
    computed = forward_plan(ins).out_forms[count:]
    forms = (*rules(ins).residuals(step.operands, computed), *given.keep(step.outs))
    held = tuple(ins.keep(step.operands[known:]))
    backward = rules(ins).backward(given)
    return planner.plan(backward, forms, step.place, held, Known(has_rule=True))

  return rules, forward_plan, backward_plan


def custom_vmap(interpreter: Interprets, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """The body under the policy, with the user's own batching under the policy."""
  run_rule = interpreter.run_of_rules()

  @jax.custom_batching.custom_vmap
  def call(*operands: jax.Array) -> list[jax.Array]:
    return interpreter.run(step.bodies[0], operands)

  @call.def_vmap
  def rule(size: int, batched: list[bool], *operands: jax.Array) -> tuple[list[Any], list[bool]]:
    if not any(batched):  # the tangents alone are
      return interpreter.run(step.bodies[0], operands), [False] * len(step.outs)
    jaxpr, found = custom_derivatives.trace_vmap(step.eqn, size, batched)
    plan = interpreter.planner.rule_of(jaxpr, step.operands, step.place, step.outs, step.outs)
    return run_rule(plan, operands), found

  return call(*operands)


def remat_opt(interpreter: Interprets, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """The forward pass of a ``custom_vjp(..., optimize_remat=True)`` under the policy.

  Where a checkpoint drops all that it stores, JAX takes the function itself, under the policy too.
  """
  params, (body,) = step.params, step.bodies
  known, stored = params["num_consts"], params["num_res"]
  forward, constants = _without_constants(interpreter.rebuild(body))

  @functools.cache
  def function() -> tuple[Any, list[Any]]:
    traced, of_traced = params["fun_jaxpr_thunk"]()
    inner = versions.open_jaxpr(traced)
    avals = [atom.aval for atom in step.eqn.invars[known:]]
    closed = captured.trace(lambda *xs: jaxprs.evaluate_open(inner, of_traced, xs), avals)
    outs = body.out_forms[stored:]
    plan = interpreter.planner.rule_of(closed, body.in_forms[known:], step.place, outs, outs)
    rebuilt = interpreter.rebuild(plan)
    return versions.open_jaxpr(rebuilt), list(versions.constants(rebuilt))

  changed = {
    "num_consts": known + len(constants),
    "fwd_jaxpr": forward,
    "fun_jaxpr_thunk": function,
  }
  return jaxprs.run_with(step.eqn, [*constants, *operands], params | changed)


def _without_constants(closed: AnyJaxpr) -> tuple[Any, list[Any]]:
  """A jaxpr that takes its constants as its first operands, and these."""
  inner, constants = versions.open_jaxpr(closed), list(versions.constants(closed))
  if not constants:
    return closed, []
  count = len(constants)
  avals = [v.aval for v in (*inner.constvars, *inner.invars)]
  return (
    jaxprs.trace(lambda *xs: jaxprs.evaluate_open(inner, xs[:count], xs[count:]), avals),
    constants,
  )


def linear_call(interpreter: Interprets, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A linear function under the policy, with the user's transpose under the policy."""
  eqn, (body,) = step.eqn, step.bodies
  count = step.params["num_callee_consts"] + step.params["num_res"]

  @functools.cache
  def backward() -> Plan:
    outs = custom_derivatives.slots(eqn.outvars)
    jaxpr = custom_derivatives.trace_transpose(eqn, count, outs)
    forms = (*body.in_forms[:count], *step.outs)
    return interpreter.planner.plan(jaxpr, forms, step.place, body.in_forms[count:])

  def forward(residuals: list[jax.Array], values: list[jax.Array]) -> list[jax.Array]:
    return interpreter.run(body, [*residuals, *values])

  def transposed(residuals: list[jax.Array], cotangents: list[jax.Array]) -> list[jax.Array]:
    return interpreter.run(backward(), [*residuals, *cotangents])

  return jax.custom_derivatives.linear_call(forward, transposed, operands[:count], operands[count:])


def custom_partitioning(
  interpreter: Interprets, step: Step, operands: list[jax.Array]
) -> list[jax.Array]:
  """A function under the policy, and the user's function for each device's part of it."""
  params, (body,) = step.params, step.bodies

  def under_policy(fn: Any) -> Any:
    def run(*args: Any) -> Any:
      leaves, tree = jax.tree.flatten(args)
      out_tree: Any = None

      def flat(*parts: Any) -> list[jax.Array]:
        nonlocal out_tree
        out, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(tree, parts)))
        return out

      avals: list[Any] = [atom.aval for atom in step.eqn.invars]
      traced = [
        jaxprs.with_dtype(jax.typeof(x), aval.dtype) for x, aval in zip(leaves, avals, strict=True)
      ]
      closed = captured.trace(flat, traced)
      outs = body.out_forms
      plan = interpreter.planner.rule_of(closed, body.in_forms, step.place, outs, outs)
      return jax.tree.unflatten(out_tree, interpreter.run(plan, leaves))

    return run

  def partition(*given: Any) -> Any:
    mesh, lowered, results, arguments = params["partition"](*given)
    return mesh, under_policy(lowered), results, arguments

  changed = {"call": interpreter.rebuild(body), "partition": partition}
  return jaxprs.run_with(step.eqn, operands, params | changed)
