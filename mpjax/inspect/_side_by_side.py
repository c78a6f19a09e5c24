"""Runs one jaxpr under two plans side by side, and compares what crosses the borders of modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mpjax._core.dtypes import FLOAT32, is_of
from mpjax._core.primitives import Rule
from mpjax._core.scopes import Path
from mpjax._engine.planning.module_exits import common_depth
from mpjax._engine.planning.plan import Plan, Read, Step
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import after_turn, bodies_of, mapped
from mpjax._engine.program.kinds import Form, Kind
from mpjax._engine.program.versions import Literal
from mpjax._engine.running.environment import Environment, Key
from mpjax._engine.running.interpreter import Interpreter
from mpjax.inspect._differences import Stats, compare, nothing, worse_of
from mpjax.inspect._source_lines import UNKNOWN, Line, line_of


class Border(NamedTuple):
  """A value that crosses the border of modules, with what is to be known of it.

  Attributes:
    leaves: The modules that it leaves.
    enters: The modules that it enters.
    line: The line that made it.
    size: How many numbers it has.
    loop: How many iterations its statistics are stacked over, outermost first.
  """

  leaves: tuple[Path, ...]
  enters: tuple[Path, ...]
  line: Line
  size: int
  loop: tuple[int, ...] = ()


class Opaque(NamedTuple):
  """A part of the program that was compared from outside only."""

  what: str
  path: Path
  line: Line


class Crossing(NamedTuple):
  """A border with its statistics."""

  border: Border
  stats: Stats


class Pair(NamedTuple):
  """A value under the reference plan and under the other."""

  reference: Any
  narrow: Any


Results = tuple[list[Pair], list[Crossing]]


class Traced(NamedTuple):
  """The borders in a body, and the shapes of their statistics."""

  borders: list[Border]
  stats: Any


class Lockstep:
  """Runs two plans of one jaxpr.

  Attributes:
    opaque: What was not looked into.
  """

  def __init__(self, reference: Interpreter, narrow: Interpreter) -> None:
    self.opaque: dict[Opaque, None] = {}
    self._run = Pair(reference, narrow)

  def run(
    self, plans: Pair, operands: Sequence[Pair], base: Path = (), line: Line = UNKNOWN
  ) -> Results:
    """Execute both plans; returns the results and what crossed a border on the way."""
    inner = versions.open_jaxpr(plans.narrow.jaxpr)
    consts = versions.constants(plans.narrow.jaxpr)
    values = Pair(
      *(Environment(interpreter.planner.adapting.saturated) for interpreter in self._run)
    )
    for side, column in zip(values, _columns(operands), strict=True):
      side.write(inner.invars, column)
      side.write(inner.constvars, consts)
    crossings: list[Crossing] = []
    borders = _borders(plans.narrow, base, line)
    with self._run.reference.running(values.reference), self._run.narrow.running(values.narrow):
      for steps in zip(plans.reference.steps, plans.narrow.steps, strict=True):
        pair = Pair(*steps)
        crossings += self._step(pair, values, line_of(pair.narrow.eqn, line))
        for var in pair.narrow.eqn.outvars:
          if var in borders:
            both = [side.get(Key(var)) for side in values]
            crossings.append(Crossing(borders[var], compare(*both)))
    for var in inner.invars:
      if var in borders:
        crossings.append(Crossing(borders[var], compare(*(side.get(Key(var)) for side in values))))
    results = [
      Pair(values.reference.read(atom, first), values.narrow.read(atom, second))
      for atom, first, second in zip(
        inner.outvars, plans.reference.out_reads, plans.narrow.out_reads, strict=True
      )
    ]
    return results, crossings

  def _step(self, steps: Pair, values: Pair, line: Line) -> list[Crossing]:
    step: Step = steps.narrow
    bodies = [Pair(*bodies) for bodies in zip(steps.reference.bodies, step.bodies, strict=True)]
    if step.rule in _ENTERED:
      outs, crossings = _ENTERED[step.rule](self, steps, bodies, _read(steps, values), line)
      _write(steps, values, outs)
      return crossings
    if any(body.multiplies for body in step.bodies):
      self.opaque[Opaque(step.eqn.primitive.name, step.place.path, line)] = None
    for interpreter, side, values_of_side in zip(self._run, steps, values, strict=True):
      with jaxprs.located(side.eqn):
        interpreter.run_step(side, values_of_side)
    return []

  def call(self, steps: Pair, bodies: list[Pair], operands: list[Pair], line: Line) -> Results:
    """Run what a call calls; what crosses borders in a shard_map is stacked over the devices."""
    base, eqn = steps.narrow.place.path, steps.narrow.eqn
    if eqn.primitive.name != "shard_map":
      return self.run(bodies[0], operands, base, line)
    borders: list[Border] = []

    def shard(*operands: Pair) -> Any:
      outs, crossings = self.run(bodies[0], operands, base, line)
      borders[:] = [crossing.border for crossing in crossings]
      return outs, jax.tree.map(lambda x: x[None], [crossing.stats for crossing in crossings])

    stacked = PartitionSpec(tuple(eqn.params["newly_manual_axes"]))
    run = mapped(eqn, shard, (list(eqn.params["out_specs"]), stacked))
    with jaxprs.located(eqn):
      outs, stats = jax.jit(run)(*operands)
    last = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), stats)  # after the axes of loops
    return outs, _crossings(borders, last)

  def cond(self, steps: Pair, bodies: list[Pair], operands: list[Pair], line: Line) -> Results:
    """Run the branch that both take; where they take two, only the results are compared."""
    base, eqn = steps.narrow.place.path, steps.narrow.eqn
    index, rest = operands[0], bodies_of(eqn)[0].take(operands)
    taken = [self._traced(body, base, line, rest) for body in bodies]

    def together(k: int, rest: list[Pair]) -> Any:
      outs, crossings = self.run(bodies[k], rest, base, line)
      own = [crossing.stats for crossing in crossings]
      return _strong(outs), [own if n == k else nothing(t.stats) for n, t in enumerate(taken)]

    def apart(rest: list[Pair]) -> Any:
      columns = [
        lax.switch(chosen, [functools.partial(run.run, body) for body in plans], column)
        for run, chosen, plans, column in zip(
          self._run, index, _columns(bodies), _columns(rest), strict=True
        )
      ]
      return _strong([Pair(*pair) for pair in zip(*columns, strict=True)]), nothing(
        [t.stats for t in taken]
      )

    branches = [functools.partial(together, k) for k in range(len(bodies))]
    with jaxprs.located(eqn):
      if platforms := eqn.params.get("branches_platforms"):
        outs, stats = _on_platform(platforms, branches, rest)
      else:
        last = len(bodies) - 1
        first, second = (jnp.clip(i.astype(jnp.int32), 0, last) for i in index)
        chosen = jnp.where(first == second, first, jnp.full_like(first, len(bodies)))
        outs, stats = lax.switch(chosen, [*branches, apart], rest)
    return outs, [
      c for t, own in zip(taken, stats, strict=True) for c in _crossings(t.borders, own)
    ]

  def loop(self, steps: Pair, bodies: list[Pair], operands: list[Pair], line: Line) -> Results:
    """Run a while loop until both sides have ended; kept is the worst iteration."""
    eqn, base = steps.narrow.eqn, steps.narrow.place.path
    (of_test, _, _), (consts, start, _) = (body.split(operands) for body in bodies_of(eqn))
    traced = self._traced(bodies[1], base, line, [*consts, *start])

    def goes_on(carry: list[Pair]) -> Pair:
      (more,), _ = self.run(bodies[0], [*of_test, *carry], base, line)
      return more

    def advance(state: Any) -> Any:
      n, carry, active, worst = state
      outs, crossings = self.run(bodies[1], [*consts, *carry], base, line)
      both = jnp.any(active.reference & active.narrow)
      worse = [worse_of(old, c.stats, n) for old, c in zip(worst, crossings, strict=True)]
      worst = jax.tree.map(functools.partial(jnp.where, both), worse, worst)
      carry = [Pair(*map(after_turn, active, *pairs)) for pairs in zip(outs, carry, strict=True)]
      return n + 1, _strong(carry), Pair(*map(jnp.logical_and, active, goes_on(carry))), worst

    with jaxprs.located(eqn):
      state = jnp.int32(0), _strong(start), goes_on(start), nothing(traced.stats)
      _, carry, _, worst = lax.while_loop(
        lambda state: jnp.any(state[2].reference | state[2].narrow), advance, state
      )
    return carry, _crossings(traced.borders, worst)

  def _traced(self, body: Pair, base: Path, line: Line, operands: list[Pair]) -> Traced:
    """The borders in a body, and the shapes of what is known of them."""
    borders: list[Border] = []

    def trace(operands: list[Pair]) -> list[Stats]:
      _, crossings = self.run(body, operands, base, line)
      borders[:] = [crossing.border for crossing in crossings]
      return [crossing.stats for crossing in crossings]

    return Traced(borders, jax.eval_shape(trace, operands))

  def scan(self, steps: Pair, bodies: list[Pair], operands: list[Pair], line: Line) -> Results:
    """Run a scan; what crosses borders in it is stacked over the iterations."""
    (body,) = bodies
    eqn, base = steps.narrow.eqn, steps.narrow.place.path
    consts, start, stacked = bodies_of(eqn)[0].split(operands)
    borders: list[Border] = []

    def iteration(carry: list[Pair], xs: list[Pair]) -> Any:
      outs, crossings = self.run(body, [*consts, *carry, *xs], base, line)
      borders[:] = [crossing.border for crossing in crossings]
      own = [crossing.stats for crossing in crossings]
      return outs[: len(start)], (outs[len(start) :], own)

    length = eqn.params["length"]
    with jaxprs.located(eqn):
      last, (ys, stats) = lax.scan(
        iteration, start, stacked, length=length, reverse=eqn.params["reverse"]
      )
    looped = [border._replace(loop=(length, *border.loop)) for border in borders]
    return [*last, *ys], _crossings(looped, stats)


_ENTERED = {
  Rule.CALL: Lockstep.call,
  Rule.SCAN: Lockstep.scan,
  Rule.WHILE: Lockstep.loop,
  Rule.COND: Lockstep.cond,
}


def _on_platform(
  platforms: Sequence[Sequence[str] | None], branches: Sequence[Callable[..., Any]], rest: Any
) -> Any:
  """The branch for the platform that runs it: the kernels of others compile nowhere else."""
  pairs = [*zip(platforms, branches, strict=True)]
  own = {name: branch for names, branch in pairs for name in names or ()}
  default = next((branch for names, branch in pairs if names is None), None)
  return lax.platform_dependent(rest, default=default, **own)


def _crossings(borders: Sequence[Border], stats: Sequence[Stats]) -> list[Crossing]:
  return [Crossing(*entry) for entry in zip(borders, stats, strict=True)]


def _strong(pairs: Sequence[Pair]) -> list[Pair]:
  """Values without weak types, so that those of all branches and iterations are of one type."""

  def strong(x: Any) -> Any:
    dtype = jax.typeof(x).dtype  # that of a literal False, too
    return x if jnp.issubdtype(dtype, jax.dtypes.extended) else lax.convert_element_type(x, dtype)

  return [Pair(*map(strong, pair)) for pair in pairs]


def _read(steps: Pair, values: Pair) -> list[Pair]:
  step, other = steps.narrow, steps.reference
  compared = not any(step.outs)
  return [
    Pair(
      values.reference.read(atom, first, compared=compared),
      values.narrow.read(atom, second, compared=compared),
    )
    for atom, first, second in zip(step.eqn.invars, other.reads, step.reads, strict=True)
  ]


def _write(steps: Pair, values: Pair, outs: Sequence[Pair]) -> None:
  for side, column in zip(values, _columns(outs), strict=True):
    side.write(steps.narrow.eqn.outvars, column)


def _columns(pairs: Sequence[Pair]) -> tuple[list[Any], list[Any]]:
  return [pair.reference for pair in pairs], [pair.narrow for pair in pairs]


# Borders -----------------------------------------------------------------------------------------


def _borders(plan: Plan, base: Path, line: Line) -> dict[Any, Border]:
  """The float variables of a jaxpr that leave or enter modules within the one it stands in."""
  inner = versions.open_jaxpr(plan.jaxpr)
  homes: dict[Any, tuple[Path, Line]] = dict.fromkeys(inner.invars, (base, line))
  leaves: dict[Any, dict[Path, None]] = {}
  enters: dict[Any, dict[Path, None]] = {}
  for step in plan.steps:
    _cross(homes, step.eqn.invars, step.place.path, leaves, enters)
    made = step.place.path, line_of(step.eqn, line)
    homes.update((var, made) for var in step.eqn.outvars)
  _cross(homes, inner.outvars, base, leaves, enters)
  return {
    var: Border(
      tuple(leaves.get(var, ())),
      tuple(enters.get(var, ())),
      homes[var][1],
      int(np.prod(var.aval.shape, dtype=int)),
    )
    for var in {**leaves, **enters}
    if is_of(var.aval, jnp.floating)
  }


def _cross(
  homes: dict[Any, tuple[Path, Line]],
  atoms: Iterable[Any],
  path: Path,
  leaves: dict[Any, dict[Path, None]],
  enters: dict[Any, dict[Path, None]],
) -> None:
  for atom in atoms:
    if isinstance(atom, Literal) or atom not in homes:
      continue
    home = homes[atom][0]
    depth = common_depth(home, path)
    for n in range(depth + 1, len(home) + 1):
      leaves.setdefault(atom, {})[home[:n]] = None
    for n in range(depth + 1, len(path) + 1):
      enters.setdefault(atom, {})[path[:n]] = None


# The same plan in float64 ------------------------------------------------------------------------

FLOAT64 = np.dtype(np.float64)
_DOUBLE = Form(Kind.DATA, FLOAT64)
_AS_TRACED = frozenset(
  {
    *(Rule.TRACED, Rule.ALWAYS, Rule.LOSS_SCALE, Rule.MARKER, Rule.WHILE, Rule.COND),
    *(Rule.CUSTOM_JVP, Rule.CUSTOM_VJP, Rule.CUSTOM_LIN, Rule.CUSTOM_VMAP),
  }
)


def doubled(plan: Plan) -> Plan:
  """A float32 plan in float64; what holds functions of its own still runs in float32."""
  steps = tuple(map(_doubled_step, plan.steps))
  return Plan(
    plan.jaxpr,
    _double_forms(plan.in_forms),
    steps,
    tuple(Read(None, f and FLOAT64) for f in plan.out_forms),
    _double_forms(plan.out_forms),
  )


def _doubled_step(step: Step) -> Step:
  if step.rule in _AS_TRACED or step.eqn.primitive.name == "shard_map":
    reads = tuple(Read(None, f and FLOAT32) for f in step.operands)
    return dataclasses.replace(step, reads=reads)
  return dataclasses.replace(
    step,
    reads=tuple(Read(None, f and FLOAT64) for f in step.operands),
    operands=_double_forms(step.operands),
    outs=_double_forms(step.outs),
    params=jaxprs.retyped(step.params, FLOAT64),
    bodies=tuple(map(doubled, step.bodies)),
  )


def _double_forms(forms: Sequence[Form | None]) -> tuple[Form | None, ...]:
  return tuple(f and _DOUBLE for f in forms)
