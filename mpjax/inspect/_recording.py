"""Runs a function in float32 and counts what a policy would hold in 16 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._core.policy_map import PolicyLike, as_policy_map
from mpjax._core.primitives import Rule
from mpjax._core.scopes import Path, is_recomputed
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import after_turn, bodies_of
from mpjax._engine.program.kinds import is_data, is_narrow
from mpjax._engine.program.versions import Literal, Var
from mpjax._engine.running.environment import brought_here
from mpjax.inspect._histogram import Histogram, Tally, add_tallies, stack, tally, zero_tally
from mpjax.inspect._inspected import subject_of
from mpjax.inspect._policies_by_module import spelled
from mpjax.inspect._policies_inside import refuse_regions

_Key = tuple[bool, Path]
_Tallies = dict[_Key, Tally]


class Values(NamedTuple):
  """What a policy would hold in 16 bits, by module; ``+`` its parts to add calls.

  Attributes:
    activations: Of the forward pass.
    gradients: Of the backward pass: gradients of activations and parameters, as they are computed.
      Empty if the function takes no gradient.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> matmul = mpjax.inspect.record(lambda w, x: x @ w, "mixed_float16")
    >>> _, values = matmul(jnp.ones((2, 2)), jnp.ones((3, 2)))
    >>> int(values.activations.bins().sum()), values.gradients.names  # operand and result
    (12, ())
  """

  activations: Histogram
  gradients: Histogram


def record(
  fn: Callable[..., Any], policy: PolicyLike, *, argnums: int | Sequence[int] = 0
) -> Callable[..., tuple[Any, Values]]:
  """Transform a function so that it also counts the values that a policy would hold in 16 bits.

  The function runs in float32, as written: nothing is rounded, so what a format would lose can be
  counted. Which values these are is decided as `mpjax.autocast` would: results of matmuls, what
  follows them elementwise, and what is cast for a matmul; parameters are left out.

  Give it the gradient of a loss, ``record(jax.grad(loss), "mixed_float16")``, and the backward
  pass is counted apart: the values that loss scaling is for.

  Args:
    fn: A function of pytrees as written in float32, without a policy inside. NNX
      models may be among the arguments; what a call changes in them is not brought back.
    policy: A `Policy`, a `PolicyMap` or a spec string.
    argnums: Which positional arguments hold the parameters.

  Returns:
    A function of the same positional arguments that returns what ``fn`` returns, and `Values`.
    Called as it is, it is traced and compiled at every call; to call it more than once, wrap it:
    ``jax.jit(record(...))`` compiles once, ``nnx.jit`` with models among the arguments.

  Raises:
    ValueError: A policy cannot be parsed or holds nothing in 16 bits; or, at a call, ``fn`` has a
      16-bit policy inside.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> def loss(params, x):
    ...   with jax.named_scope("dense"):
    ...     return jnp.mean((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
    >>> grads, values = mpjax.inspect.record(jax.grad(loss), "mixed_float16")(params, x)
    >>> values.activations.names, values.gradients.names
    (('dense',), ('dense',))
  """
  policies = as_policy_map(policy)
  if not policies.narrow_dtypes():
    raise ValueError(
      f"record counts what a policy holds in 16 bits; {policies} holds nothing so. Name the policy "
      "that you consider, for example 'mixed_float16'."
    )

  @functools.wraps(fn)
  def recorded(*args: Any) -> tuple[Any, Values]:
    subject = subject_of(fn, policies, args, {}, argnums)
    decided = subject.decide()
    refuse_regions(decided.plan, "record", "what it records")
    operands = decided.call.operands
    flags = [False] * len(operands)
    flat, tallies = jax.jit(lambda xs: _run(decided.plan, xs, flags))(operands)
    out = decided.call.result(flat, (None,) * len(flat))
    return subject.results(jax.tree.unflatten(out.tree, out.leaves)), _values(tallies)

  return recorded


def _values(tallies: _Tallies) -> Values:
  return Values(*(_histogram(tallies, backward) for backward in (False, True)))


def _histogram(tallies: _Tallies, backward: bool) -> Histogram:
  paths = [path for wanted, path in tallies if wanted == backward]
  names = tuple(map(spelled, paths))
  return stack([tallies[backward, path] for path in paths], names)


def _merge(a: Mapping[_Key, Tally], b: Mapping[_Key, Tally]) -> _Tallies:
  both = {key: add_tallies(a[key], b[key]) for key in a if key in b}
  return {**a, **b, **both}


class _Env:
  """The values of a jaxpr's variables as traced, which are gradients, and what was counted."""

  def __init__(self, plan: Plan, operands: Sequence[Any], flags: Sequence[bool]) -> None:
    inner = versions.open_jaxpr(plan.jaxpr)
    self.values: dict[Var, Any] = dict(zip(inner.invars, operands, strict=True))
    self.values.update(zip(inner.constvars, versions.constants(plan.jaxpr), strict=True))
    self.gradients = {var for var, flag in zip(inner.invars, flags, strict=True) if flag}
    self.tallies: _Tallies = {}
    self.counted: set[Var] = set()

  def read(self, atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else self.values[atom]

  def is_gradient(self, atom: Any) -> bool:
    return not isinstance(atom, Literal) and atom in self.gradients

  def count(self, step: Step, value: Any) -> None:
    key = step.place.backward, step.place.path
    self.tallies = _merge(self.tallies, {key: brought_here(tally, value)})


def _run(plan: Plan, operands: Sequence[Any], flags: Sequence[bool]) -> tuple[list[Any], _Tallies]:
  """Execute the jaxpr of a plan as traced; counts on the way.

  Args:
    plan: The plan.
    operands: The operands of its jaxpr.
    flags: Which of them are gradients, not activations that the backward pass reads.
  """
  env = _Env(plan, operands, flags)
  for step in plan.steps:
    read = [env.read(atom) for atom in step.eqn.invars]
    if is_recomputed(step.eqn.source_info.name_stack):  # it was counted when it was first computed
      outs, inside = _as_traced(step, read, [])
    else:
      inner_flags = [env.is_gradient(atom) for atom in step.eqn.invars]
      outs, inside = _RUN.get(step.rule, _as_traced)(step, read, inner_flags)
      env.gradients.update(step.eqn.outvars if step.place.backward else ())
      _count_casts(env, step, read)
      _count_results(env, step, outs)
    env.tallies = _merge(env.tallies, inside)
    env.values.update(zip(step.eqn.outvars, outs, strict=True))
  inner = versions.open_jaxpr(plan.jaxpr)
  return [env.read(atom) for atom in inner.outvars], env.tallies


def _count_results(env: _Env, step: Step, outs: Sequence[Any]) -> None:
  """Count what comes out narrow; what has bodies has counted it inside."""
  if step.bodies:
    return
  for value, form in zip(outs, step.outs, strict=True):
    if is_narrow(form):
      env.count(step, value)


def _count_casts(env: _Env, step: Step, read: Sequence[Any]) -> None:
  """Count float32 data that is cast to 16 bits where it is used, once for each value.

  Activations that the backward pass reads were counted in the forward pass.
  """
  entries = zip(step.eqn.invars, step.operands, step.reads, read, strict=True)
  for atom, form, cast, value in entries:
    if not is_data(form) or isinstance(atom, Literal):
      continue
    if step.place.backward and not env.is_gradient(atom):
      continue
    if cast.to is not None and cast.to.itemsize == 2 and atom not in env.counted:
      env.counted.add(atom)
      env.count(step, value)


_Flags = list[bool]


def _as_traced(step: Step, operands: list[Any], flags: _Flags) -> tuple[list[Any], _Tallies]:
  del flags
  return jaxprs.run_as_traced(step.eqn, operands), {}


def _call(step: Step, operands: list[Any], flags: _Flags) -> tuple[list[Any], _Tallies]:
  if not step.bodies or step.eqn.primitive.name == "shard_map":
    return _as_traced(step, operands, flags)
  return _run(step.bodies[0], operands, flags)


def _scan(step: Step, operands: list[Any], flags: _Flags) -> tuple[list[Any], _Tallies]:
  (shape,), (body,), params = bodies_of(step.eqn), step.bodies, step.eqn.params
  consts, carry, slices = shape.split(operands)
  carried = len(carry)
  if step.place.backward:  # its carry sums up gradients, from zeros
    before, _, after = shape.split(flags)
    flags = [*before, *[True] * carried, *after]

  def advance(state: Any, slices: Any) -> Any:
    carry, counts = state
    outs, new = _run(body, [*consts, *carry, *slices], flags)
    return (outs[:carried], _merge(counts, new)), outs[carried:]

  first = jax.eval_shape(lambda xs: advance((carry, {}), [x[0] for x in xs])[0][1], slices)
  (carry, counts), stacked = lax.scan(
    advance,
    (carry, {key: zero_tally() for key in first}),
    slices,
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  return [*carry, *stacked], counts


def _while(step: Step, operands: list[Any], flags: _Flags) -> tuple[list[Any], _Tallies]:
  (test, shape), (cond, body) = bodies_of(step.eqn), step.bodies
  of_test, (consts, start, _) = test.split(operands).consts, shape.split(operands)

  def more(carry: list[Any]) -> jax.Array:
    return _run(cond, [*of_test, *carry], test.take(flags))[0][0]

  def advance(state: Any) -> Any:
    outs, new = _run(body, [*consts, *state[0]], shape.take(flags))
    goes_on = more(state[0])
    if goes_on.ndim:
      outs = [*map(functools.partial(after_turn, goes_on), outs, state[0])]
    return outs, _merge(state[1], new)

  first = jax.eval_shape(lambda xs: advance((xs, {}))[1], start)
  return lax.while_loop(
    lambda state: jnp.any(more(state[0])),
    advance,
    (start, {key: zero_tally() for key in first}),
  )


def _cond(step: Step, operands: list[Any], flags: _Flags) -> tuple[list[Any], _Tallies]:
  branch = bodies_of(step.eqn)[0]
  index, rest, own = operands[0], branch.take(operands), branch.take(flags)
  shapes = [jax.eval_shape(lambda xs, b=b: _run(b, xs, own)[1], rest) for b in step.bodies]
  keys = {key: zero_tally() for shape in shapes for key in shape}

  def run(body: Plan, xs: Any) -> tuple[list[Any], _Tallies]:
    outs, counts = _run(body, xs, own)
    return outs, {key: counts.get(key, nothing) for key, nothing in keys.items()}

  branches = [functools.partial(run, body) for body in step.bodies]
  return lax.switch(index, branches, rest)


_RUN: dict[Rule, Callable[[Step, list[Any], _Flags], tuple[list[Any], _Tallies]]] = {
  Rule.CALL: _call,
  Rule.CUSTOM_JVP: _call,
  Rule.CUSTOM_VJP: _call,
  Rule.CUSTOM_VMAP: _call,
  Rule.SCAN: _scan,
  Rule.WHILE: _while,
  Rule.COND: _cond,
}
