"""Executes plans."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.core import Tracer

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import REMATS, SCALES, Rule, Trait, having
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import mapped
from mpjax._engine.program.versions import ClosedJaxpr, JaxprEqn, Var
from mpjax._engine.running import (
  custom_rules,
  islands,
  lookups,
  loops,
  operand_order,
  repeats,
  softmax,
  travelling,
)
from mpjax._engine.running.copies import NONE_ALIKE, Copies, widened
from mpjax._engine.running.environment import Environment, Key, to_dtype
from mpjax._engine.running.islands import Island
from mpjax._engine.running.kept_rounding import kept_rounding
from mpjax._engine.running.multiplying import MATMUL_RULES
from mpjax._engine.running.repeats import Repeat, Unit
from mpjax._engine.running.scaled_cotangents import UNSCALED, within
from mpjax._engine.running.softmax import Softmax

T = TypeVar("T")


class Interpreter:
  """Executes plans. A body is rebuilt once for each plan that it has.

  Args:
    planner: The planner that made the plans.
    stepwise: Whether to run every step by itself, so that each keeps its own line and scope and
      none is computed again in the backward pass: for reports, not for speed.
    loss_scale: What cotangents are multiplied by inside.
    read_by_rules: The variables, of the plan that is run first, whose values rules close over.
  """

  def __init__(
    self,
    planner: Planner,
    *,
    stepwise: bool = False,
    loss_scale: float = UNSCALED,
    read_by_rules: Collection[Var] = (),
  ) -> None:
    self.planner, self.loss_scale = planner, loss_scale
    self._stepwise, self._read_by_rules = stepwise, read_by_rules
    self._around: Environment | None = None  # of the outermost plan that runs now
    self._rebuilt: dict[Hashable, Any] = {}
    self._units: dict[Plan, list[Unit | Repeat]] = {}
    self._kept: dict[Plan, frozenset[Var]] = {}
    self._functions: dict[Hashable, Callable[..., list[jax.Array]]] = {}
    self._of_steps: dict[int, tuple[Step, Any]] = {}
    self.copies = Copies()

  def run(
    self, plan: Plan, operands: Sequence[jax.Array], captured: Sequence[jax.Array] | None = None
  ) -> list[jax.Array]:
    """Execute a plan on operands that are held as its forms say.

    Args:
      plan: The plan.
      operands: The operands.
      captured: What stands for the constants of its jaxpr, if not they themselves.
    """
    inner = versions.open_jaxpr(plan.jaxpr)
    values = self._environment(plan)
    values.write(inner.invars, operands)
    constants = versions.constants(plan.jaxpr) if captured is None else captured
    values.write(inner.constvars, constants)
    with self.running(values), self.copies.noted():
      for unit in self._units_of(plan):
        self._run_unit(plan, unit, values)
    return [values.read(a, r) for a, r in zip(inner.outvars, plan.out_reads, strict=True)]

  @contextlib.contextmanager
  def running(self, values: Environment) -> Iterator[None]:
    """Where steps run that write these values, and bodies of theirs: the outermost are kept."""
    around = self._around
    self._around = around or values
    try:
      yield
    finally:
      self._around = around

  def run_of_rules(self) -> Callable[[Plan, Sequence[jax.Array]], list[jax.Array]]:
    """`run` for rules of the step that runs: later, with what they close over as it is now."""
    around = self._around
    if around is None or not self._read_by_rules:
      return self.run
    known = {v: around.get(Key(v)) for v in self._read_by_rules if v in around}

    def now(constant: Any) -> Any:
      variable = versions.variable(constant)
      return to_dtype(known[variable], constant.dtype) if variable in known else constant

    def run(plan: Plan, operands: Sequence[jax.Array]) -> list[jax.Array]:
      return self.run(plan, operands, [*map(now, versions.constants(plan.jaxpr))])

    return run

  def _environment(self, plan: Plan) -> Environment:
    """Where the values of a plan's variables are while it runs."""
    kept = kept_rounding(plan, self._kept)
    return Environment(self.planner.adapting.saturated, plan.read_often, kept)

  def _units_of(self, plan: Plan) -> list[Unit | Repeat]:
    """What a plan executes one after the other."""
    if self._stepwise:
      return list(plan.steps)
    if plan not in self._units:
      found = islands.find(plan)
      taken = {index for island in found.values() for index in island.steps}
      turned = operand_order.turned(plan)
      rest = {
        n: replace(step, order=turned[n]) if n in turned else step
        for n, step in enumerate(plan.steps)
        if n not in taken
      }
      units, kept = dict(sorted({**rest, **found}.items())), kept_rounding(plan, self._kept)
      self._units[plan] = repeats.joined(plan, units, kept)
    return self._units[plan]

  def _run_unit(
    self, plan: Plan, unit: Unit | Repeat, values: Environment, scopes: int = 0
  ) -> None:
    """Run a unit; so many scopes of its equations, from the outermost in, are current already."""
    if isinstance(unit, Step):
      with jaxprs.located(unit.eqn, slice(scopes, None)):
        self.run_step(unit, values)
    elif isinstance(unit, Repeat):
      self._run_repeat(plan, unit, values)
    else:
      self._run_island(plan, unit, values, scopes)

  def run_step(self, step: Step, values: Environment) -> None:
    """Execute one step on the values that the steps before it wrote."""
    reads = list(step.reads)
    if step.wide is not None:  # it rounds inside, and its cotangent does not
      reads[step.wide] = reads[step.wide]._replace(to=None)
    compared = not any(step.outs)
    pairs = zip(step.eqn.invars, reads, strict=True)
    read = [values.read(atom, read, compared=compared) for atom, read in pairs]
    multiply = MATMUL_RULES.get(step.rule)
    outs = multiply(step, read) if multiply else _RUN.get(step.rule, _bind)(self, step, read)
    held = [x if f is None else to_dtype(x, f.dtype) for x, f in zip(outs, step.outs, strict=True)]
    values.write(step.eqn.outvars, held)

  def _run_repeat(self, plan: Plan, repeat: Repeat, values: Environment) -> None:
    """Run units that recur: traced as one function that all their recurrences call."""
    with jaxprs.located(repeat.eqn, slice(repeat.scopes)):
      operands = [values.get(key) for key in repeat.inputs]
    if not any(isinstance(x, Tracer) for x in operands):
      for unit in repeat.units:
        self._run_unit(plan, unit, values)
      return

    function = self._functions.get(repeat.code)
    if function is None:
      compute = self._function(plan, repeat.units, repeat.inputs, repeat.outputs, repeat.scopes)
      self._functions[repeat.code] = function = jax.jit(compute, inline=True)
    with jaxprs.located(repeat.eqn, slice(repeat.scopes)):
      values.fill(repeat.outputs, function(*operands))

  def _run_island(
    self, plan: Plan, island: Island | Softmax, values: Environment, scopes: int
  ) -> None:
    """Run the steps of an island so that nothing in float32 is stored for the backward pass."""
    steps = [plan.steps[index] for index in island.steps]
    inner = jaxprs.common_scopes([step.eqn for step in steps])
    last = steps[-1].eqn
    inputs, outputs = ([*map(Key, v)] for v in (island.inputs, last.outvars))
    compute = self._function(plan, steps, inputs, outputs, inner)
    if isinstance(island, Softmax):
      run = softmax.storing_weights(compute, island)
    else:
      run = _rounding(compute, island.dtype, last, inner)
      run = jax.checkpoint(run, prevent_cse=not island.merges)
    with jaxprs.located(last, slice(scopes, inner)):
      values.write(last.outvars, run(*map(values.get, inputs)))
    if isinstance(island, Softmax) and island.matmul is not None:
      self._run_weighting(plan.steps[island.matmul], outputs[0], values, scopes)

  def _run_weighting(self, step: Step, weights: Key, values: Environment, scopes: int) -> None:
    """Run a matmul so that the cotangent of its weights does not round."""
    wide = 0 if step.eqn.invars[0] is weights.var else 1
    with jaxprs.located(step.eqn, slice(scopes, None)):
      self.run_step(replace(step, parameter=wide, float8=None), values)

  def _function(
    self,
    plan: Plan,
    units: Sequence[Unit],
    inputs: Sequence[Key],
    outputs: Sequence[Key],
    scopes: int,
  ) -> Callable[..., list[jax.Array]]:
    """Some units as a function from what they read to what others read of them."""

    def compute(*operands: jax.Array) -> list[jax.Array]:
      inside = self._environment(plan)
      inside.fill(inputs, operands)
      with self.copies.noted():
        for unit in units:
          self._run_unit(plan, unit, inside, scopes)
      return [inside.get(key) for key in outputs]

    return compute

  def rebuild(
    self, plan: Plan, rounding: tuple[int, ...] = (), alike: Mapping[int, np.dtype] = NONE_ALIKE
  ) -> ClosedJaxpr:
    """The closed jaxpr of a plan: what its jaxpr becomes under the policy.

    Args:
      plan: The plan.
      rounding: Which operands come in float32, and are rounded first to how they are held.
      alike: Of which operands there are copies, which come first, and in which formats.
    """
    key = plan, rounding, tuple(alike.items())

    def make() -> ClosedJaxpr:
      invars = versions.open_jaxpr(plan.jaxpr).invars
      held = [form and form.dtype for form in plan.in_forms]
      given = [FLOAT32 if n in rounding else dtype for n, dtype in enumerate(held)]
      avals = [
        v.aval if dtype is None else jaxprs.with_dtype(v.aval, dtype)
        for v, dtype in zip(invars, given, strict=True)
      ]

      def run(*xs: jax.Array) -> list[jax.Array]:
        copies = dict(zip(alike, xs, strict=False))
        pairs = enumerate(zip(xs[len(alike) :], held, strict=True))
        rounded = [to_dtype(x, d) if n in rounding and d else x for n, (x, d) in pairs]
        operands = [widened(copies[n], x) if n in copies else x for n, x in enumerate(rounded)]
        with self.copies.noted(operands, copies):
          return self.run(plan, operands)

      of_copies = [jaxprs.with_dtype(avals[n], dtype) for n, dtype in alike.items()]
      return jaxprs.trace(run, [*of_copies, *avals])

    return self.kept(key, make)

  def kept(self, key: Hashable, make: Callable[[], ClosedJaxpr]) -> ClosedJaxpr:
    """What is rebuilt once for a key."""
    if key not in self._rebuilt:
      self._rebuilt[key] = make()
    return self._rebuilt[key]

  def of_step(self, step: Step, make: Callable[[Step], T]) -> T:
    """What is made of a step the first time that it runs."""
    if id(step) not in self._of_steps:
      self._of_steps[id(step)] = step, make(step)
    return self._of_steps[id(step)][1]


def _rounding(
  compute: Callable[..., list[jax.Array]],
  dtype: np.dtype | None,
  last: JaxprEqn,
  scopes: int,
) -> Callable[..., list[jax.Array]]:
  """A function whose one result is cast to a format, if there is one, in its last step's scope.

  What crosses the border of a checkpoint lies in memory: so the result rounds inside, and with it
  the cotangent that comes in.
  """

  def run(*operands: jax.Array) -> list[jax.Array]:
    (result,) = compute(*operands)
    with jaxprs.located(last, slice(scopes, None)):
      return [result if dtype is None else to_dtype(result, dtype)]

  return run


# How each other rule runs ------------------------------------------------------------------------


def _bind(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  del interpreter
  return jaxprs.run_with(step.eqn, operands, step.params)


def _traced(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  del interpreter
  return jaxprs.run_as_traced(step.eqn, operands)


def _follow(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """An elementwise operation; a parameter that it spreads rounds after it was spread.

  ``add h:bf16[8,4] b:f32[1,4]`` becomes ``c:f32[8,4] = broadcast_in_dim b``, then
  ``add h d:bf16[8,4]``, so that the gradient of b sums up in float32. Where the result is float32
  it does so as written, and c is not stored.
  """
  out = step.outs[0] if step.parameter is not None else None
  if step.parameter is not None and out is not None and out.dtype != FLOAT32:
    run = functools.partial(_spreading, interpreter, step, step.parameter, out.dtype)
    if step.eqn.primitive.name in SCALES:  # whose derivative would store c
      run = jax.checkpoint(run, prevent_cse=False)
    return run(*operands)
  if step.travels is not None:
    moved, copy = interpreter.of_step(step, travelling.in_16_bits)(*operands)
    interpreter.copies.add(moved, copy)
    return [moved]
  if lookups.may_repeat(step):
    return [interpreter.of_step(step, lookups.adding_up)(*operands)]
  return _bind(interpreter, step, operands)


def _spreading(
  interpreter: Interpreter, step: Step, place: int, dtype: np.dtype, *operands: jax.Array
) -> list[jax.Array]:
  """An elementwise operation of a parameter, a number or of as many dimensions as the result."""
  parameter, given = operands[place], [*operands]
  spread = lax.broadcast_in_dim(parameter, jaxprs.shape(step.eqn.outvars[0]), range(parameter.ndim))
  given[place] = to_dtype(spread, dtype)
  return _bind(interpreter, step, given)


def _call(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  name, (body,) = step.eqn.primitive.name, step.bodies
  if name == "shard_map":
    return _shard_map(interpreter, step, operands)
  if name not in _KEEPS_ITS_CALL:
    return interpreter.run(body, operands)
  held = "jaxpr" if "jaxpr" in step.params else "call_jaxpr"
  copies = interpreter.copies.among(body, operands) if name in REMATS else {}
  rebuilt = interpreter.rebuild(body, (), {n: x.dtype for n, x in copies.items()})
  jaxpr, consts = versions.like(step.params[held], rebuilt)
  given = [*consts, *copies.values(), *operands]
  return jaxprs.run_with(step.eqn, given, step.params | {held: jaxpr})


_KEEPS_ITS_CALL = having(Trait.JIT | Trait.REMAT | Trait.MARKED)


def _loss_scale(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  return jaxprs.run_with(step.eqn, operands, within(step.params, interpreter.loss_scale))


def _marked(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  del interpreter
  return jaxprs.evaluate(step.params["jaxpr"], operands)


def _shard_map(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  (body,) = step.bodies
  run = mapped(step.eqn, lambda *shards: tuple(interpreter.run(body, shards)))
  is_traced = any(isinstance(x, Tracer) for x in operands)
  return list(
    (run if is_traced else jax.jit(run))(*operands)
  )  # a rule runs only where it is traced


def _cond(interpreter: Interpreter, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  branches = tuple(map(interpreter.rebuild, step.bodies))
  return jaxprs.run_with(step.eqn, operands, step.params | {"branches": branches})


_RUN: dict[Rule, Callable[[Interpreter, Step, list[Any]], list[Any]]] = {
  Rule.FOLLOW: _follow,
  Rule.TRACED: _traced,
  Rule.CALL: _call,
  Rule.SCAN: loops.scan,
  Rule.WHILE: loops.while_loop,
  Rule.COND: _cond,
  Rule.CUSTOM_JVP: custom_rules.custom_jvp,
  Rule.CUSTOM_VJP: custom_rules.custom_vjp,
  Rule.CUSTOM_LIN: custom_rules.custom_lin,
  Rule.CUSTOM_VMAP: custom_rules.custom_vmap,
  Rule.REMAT_OPT: custom_rules.remat_opt,
  Rule.LINEAR_CALL: custom_rules.linear_call,
  Rule.CUSTOM_PARTITIONING: custom_rules.custom_partitioning,
  Rule.MARKER: _marked,
  Rule.LOSS_SCALE: _loss_scale,
}
