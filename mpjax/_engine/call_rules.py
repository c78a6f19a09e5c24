"""Runs calls that hold, beside their body, a function of the user's that takes its place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.custom_derivatives

from mpjax._engine import captured, custom_derivatives, jaxprs, versions
from mpjax._engine.plan import Plan, Step
from mpjax._engine.planner import Planner
from mpjax._engine.versions import AnyJaxpr, ClosedJaxpr


class Rebuilds(Protocol):
  """What plans functions, runs their plans and makes jaxprs of them."""

  planner: Planner

  def run(self, plan: Plan, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Execute a plan on operands that are held as its forms say."""
    ...

  def rebuild(self, plan: Plan) -> ClosedJaxpr:
    """The closed jaxpr of a plan."""
    ...


def remat_opt(interpreter: Rebuilds, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
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


def linear_call(interpreter: Rebuilds, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
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
  interpreter: Rebuilds, step: Step, operands: list[jax.Array]
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
