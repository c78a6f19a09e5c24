"""Runs one jaxpr under two plans side by side, and compares what crosses the borders of modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax import _jaxpr, _versions
from mpjax._dtypes import FLOAT32
from mpjax._flow_costs import MATMULS
from mpjax._interpreter import Interpreter
from mpjax._jaxpr import Literal
from mpjax._plan import Plan, Read, Step
from mpjax._precision import Form, Kind, Rule
from mpjax._scopes import Path
from mpjax._source import UNKNOWN, Line, line_of
from mpjax._values import Key, Values


class Stats(NamedTuple):
  """How a value differs from its reference; norms leave out what is not finite in either.

  Attributes:
    error: The norm of the difference.
    norm: The norm of the reference.
    cosine: Of the angle between the two; 1 if either is zero.
    overflow: How many numbers are not finite although the reference is.
    underflow: How many are zero although the reference is not.
    largest: The largest magnitude in the reference.
  """

  error: Any
  norm: Any
  cosine: Any
  overflow: Any
  underflow: Any
  largest: Any


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
  ) -> tuple[list[Pair], list[Crossing]]:
    """Execute both plans; returns the results and what crossed a border on the way."""
    inner = _versions.open_jaxpr(plans.narrow.jaxpr)
    consts = _versions.constants(plans.narrow.jaxpr)
    values = Pair(*(Values(interpreter.planner.number) for interpreter in self._run))
    for side, column in zip(values, _columns(operands), strict=True):
      side.write(inner.invars, column)
      side.write(inner.constvars, consts)
    crossings: list[Crossing] = []
    borders = _borders(plans.narrow, base, line)
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
    if step.rule is Rule.CALL and step.eqn.primitive.name != "shard_map":
      outs, crossings = self.run(bodies[0], _read(steps, values), step.place.path, line)
      _write(steps, values, outs)
      return crossings
    if step.rule is Rule.SCAN:
      outs, crossings = self._scan(steps, bodies[0], _read(steps, values), line)
      _write(steps, values, outs)
      return crossings
    if step.bodies and (step.rule in _LOOPS or any(map(_has_matmul, step.bodies))):
      self.opaque[Opaque(step.eqn.primitive.name, step.place.path, line)] = None
    for interpreter, side, values_of_side in zip(self._run, steps, values, strict=True):
      with _jaxpr.located(side.eqn):
        interpreter.run_step(side, values_of_side)
    return []

  def _scan(
    self, steps: Pair, body: Pair, operands: list[Pair], line: Line
  ) -> tuple[list[Pair], list[Crossing]]:
    eqn, base = steps.narrow.eqn, steps.narrow.place.path
    consts, held = _versions.scan_shape(eqn)
    borders: list[Border] = []

    def iteration(carry: list[Pair], xs: list[Pair]) -> Any:
      outs, crossings = self.run(body, [*operands[:consts], *carry, *xs], base, line)
      borders[:] = [crossing.border for crossing in crossings]
      return outs[:held], (outs[held:], [crossing.stats for crossing in crossings])

    start, stacked = operands[consts : consts + held], operands[consts + held :]
    length = eqn.params["length"]
    with _jaxpr.located(eqn):
      last, (ys, stats) = lax.scan(
        iteration, start, stacked, length=length, reverse=eqn.params["reverse"]
      )
    looped = [border._replace(loop=(length, *border.loop)) for border in borders]
    return [*last, *ys], [Crossing(*entry) for entry in zip(looped, stats, strict=True)]


_LOOPS = frozenset({Rule.WHILE, Rule.COND, Rule.CALL})


def _read(steps: Pair, values: Pair) -> list[Pair]:
  step, other = steps.narrow, steps.reference
  return [
    Pair(values.reference.read(atom, first), values.narrow.read(atom, second))
    for atom, first, second in zip(step.eqn.invars, other.reads, step.reads, strict=True)
  ]


def _write(steps: Pair, values: Pair, outs: Sequence[Pair]) -> None:
  for side, column in zip(values, _columns(outs), strict=True):
    side.write(steps.narrow.eqn.outvars, column)


def _columns(pairs: Sequence[Pair]) -> tuple[list[Any], list[Any]]:
  return [pair.reference for pair in pairs], [pair.narrow for pair in pairs]


def _has_matmul(plan: Plan) -> bool:
  return any(
    step.eqn.primitive.name in MATMULS or any(map(_has_matmul, step.bodies)) for step in plan.steps
  )


# Borders -----------------------------------------------------------------------------------------


def _borders(plan: Plan, base: Path, line: Line) -> dict[Any, Border]:
  """The float variables of a jaxpr that leave or enter modules within the one it stands in."""
  inner = _versions.open_jaxpr(plan.jaxpr)
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
    if jnp.issubdtype(getattr(var.aval, "dtype", np.int32), jnp.floating)
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
    depth = 0
    while depth < min(len(home), len(path)) and home[depth] == path[depth]:
      depth += 1
    for n in range(depth + 1, len(home) + 1):
      leaves.setdefault(atom, {})[home[:n]] = None
    for n in range(depth + 1, len(path) + 1):
      enters.setdefault(atom, {})[path[:n]] = None


def compare(reference: Any, narrow: Any) -> Stats:
  """The statistics of a value against its reference, in the dtype of the reference."""
  return _stats(lax.stop_gradient(reference), lax.stop_gradient(narrow))


@jax.jit
def _stats(reference: Any, narrow: Any) -> Stats:
  dtype = reference.dtype if reference.dtype.itemsize == 8 else FLOAT32
  exact, value = (x.astype(dtype) for x in (reference, _rounded(narrow)))
  known, finite = jnp.isfinite(exact), jnp.isfinite(value)
  both = known & finite
  a, b = (jnp.where(both, x, jnp.zeros_like(x)) for x in (exact, value))
  largest = jnp.max(jnp.abs(jnp.where(known, exact, jnp.zeros_like(exact))), initial=0)
  unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
  a, b = a / unit, b / unit
  norm, other = jnp.linalg.norm(a.ravel()), jnp.linalg.norm(b.ravel())
  product = norm * other
  one = jnp.ones_like(product)
  cosine = jnp.where(product > 0, jnp.sum(a * b) / jnp.where(product > 0, product, one), one)
  return Stats(
    jnp.linalg.norm((a - b).ravel()) * unit,
    norm * unit,
    cosine,
    jnp.sum(known & ~finite),
    jnp.sum(known & (exact != 0) & (value == 0)),
    largest,
  )


def _rounded(x: Any) -> Any:
  """A value as its format holds it: compilers may carry it in more bits than that."""
  info = jnp.finfo(x.dtype)
  if x.dtype.itemsize != 2:
    return x
  return lax.reduce_precision(x.astype(FLOAT32), info.nexp, info.nmant)


# The same plan in float64 ------------------------------------------------------------------------

FLOAT64 = np.dtype(np.float64)
_DOUBLE = Form(Kind.DATA, FLOAT64)
_AS_TRACED = frozenset(
  {
    *(Rule.TRACED, Rule.ALWAYS, Rule.MARKER, Rule.WHILE, Rule.COND),
    *(Rule.CUSTOM_JVP, Rule.CUSTOM_VJP, Rule.CUSTOM_VMAP),
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
    params=_jaxpr.retyped(step.params, FLOAT64),
    bodies=tuple(map(doubled, step.bodies)),
  )


def _double_forms(forms: Sequence[Form | None]) -> tuple[Form | None, ...]:
  return tuple(f and _DOUBLE for f in forms)
