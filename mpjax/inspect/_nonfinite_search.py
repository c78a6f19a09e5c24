"""Finds the operation that turned finite numbers into inf or NaN, by running one at a time.

The jaxpr is evaluated eagerly, so that every value exists in the dtype that the program gives it;
a loop runs compiled until its result is no longer finite, and then again, iteration by iteration.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import describe, is_of
from mpjax._core.primitives import RULES, Rule
from mpjax._core.scopes import Path
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import after_turn, bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn, Literal
from mpjax.inspect._source_lines import UNKNOWN, Line, line_of

PATIENCE = 10_000
"""How many iterations a while loop is followed whose carry is not finite."""


class State(enum.IntEnum):
  """The worst number in an array."""

  FINITE = 0
  INF = 1
  NAN = 2


class Range(NamedTuple):
  """What an array holds.

  Attributes:
    array: Its dtype and shape, ``f16[2,3]``.
    low: The smallest finite number; NaN if there is none.
    high: The largest one.
    infs: How many are inf or -inf.
    nans: How many are NaN.
  """

  array: str
  low: float
  high: float
  infs: int
  nans: int

  def __str__(self) -> str:
    bad = [f"{n} {name}" for n, name in ((self.infs, "inf"), (self.nans, "NaN")) if n]
    return " ".join([self.array, f"{self.low:.4g} to {self.high:.4g}", *map("and {}".format, bad)])


@dataclass(frozen=True)
class Birth:
  """An operation whose result is worse than its operands: inf from finite, or NaN from those.

  Attributes:
    module: The module's path.
    line: The line of the user's code.
    op: The primitive; "argument" for what was handed in so.
    made: "inf" or "nan".
    within: In which iterations and branches, from the outermost in.
    backward: Whether it stands in the backward pass.
    operands: What it was given.
    result: What came out.
    where: Which elements are concerned, as an index; a colon where they are spread.
    arrives: Whether a result of the function is not finite because of it.
    rule: The backward rule of a ``custom_vjp`` that it stands in, and where that is defined, if
      known.
  """

  module: str
  line: Line
  op: str
  made: str
  within: tuple[str, ...]
  backward: bool
  operands: tuple[Range, ...]
  result: Range
  where: str
  arrives: bool = False
  rule: str = ""


Taint = frozenset[int]
_CLEAN: Taint = frozenset()


class Spot(NamedTuple):
  """Where a jaxpr stands that is run."""

  path: Path = ()
  backward: bool = False
  line: Line = UNKNOWN
  within: tuple[str, ...] = ()


class Hunt:
  """Runs a jaxpr and notes every birth of a non-finite number.

  Attributes:
    births: What was found, in the order of the program.
    unended: While loops that were left, for what is not finite may keep them from ending.
    name: Prints a module's path.
  """

  def __init__(self, planner: Planner, name: Callable[[Path], str]) -> None:
    self.births: list[Birth] = []
    self.unended: list[Line] = []
    self.name = name
    self._planner = planner
    self._compiled: dict[int, Any] = {}

  def arrived(self, array: Any, name: str) -> Taint:
    """Note an argument, and whether it is finite."""
    if state_of(array) is State.FINITE:
      return _CLEAN
    return self._add(Spot((), False, UNKNOWN), name, (), array)

  def run(
    self, jaxpr: AnyJaxpr, operands: Sequence[Any], taints: Sequence[Taint], spot: Spot
  ) -> tuple[list[Any], list[Taint]]:
    """Evaluate a jaxpr; the taint of a value says which births made it non-finite."""
    inner = versions.open_jaxpr(jaxpr)
    env = _Values(inner, zip(operands, taints, strict=True), versions.constants(jaxpr))
    for index, eqn in enumerate(inner.eqns):
      values, marks = env.read(eqn.invars)
      outs, made = self._eqn(eqn, values, marks, self._spot(eqn, spot))
      env.write(eqn.outvars, outs, made, index)
    return env.read(inner.outvars)

  def _spot(self, eqn: JaxprEqn, spot: Spot) -> Spot:
    path, backward, *_ = self._planner.place_of(eqn, spot.path)
    return Spot(spot.path + path, spot.backward or backward, line_of(eqn, spot.line), spot.within)

  def _eqn(
    self, eqn: JaxprEqn, values: list[Any], taints: list[Taint], spot: Spot
  ) -> tuple[list[Any], list[Taint]]:
    name = eqn.primitive.name
    if RULES.get(name) in _CALLS and name != "shard_map":
      (body,) = bodies_of(eqn)
      return self.run(body.jaxpr, values, taints, spot)
    if name == "cond":
      return self._cond(eqn, values, taints, spot)
    if name == "while":
      return self._while(eqn, values, taints, spot)
    with jaxprs.located(eqn):
      outs = jaxprs.run_as_traced(eqn, values)
    if name == "scan" and _is_worse(outs, values):
      return outs, self._scan(eqn, values, taints, outs, spot)
    return outs, self._compare(eqn.primitive.name, values, taints, outs, spot)

  def _compare(
    self, op: str, values: list[Any], taints: list[Taint], outs: list[Any], spot: Spot
  ) -> list[Taint]:
    """What each result is tainted with, a new birth if it is worse than every operand."""
    before = max(map(state_of, values), default=State.FINITE)
    inherited = _CLEAN.union(*taints)
    marks: list[Taint] = []
    for out in outs:
      state = state_of(out)
      if state is State.FINITE:
        marks.append(_CLEAN)
      elif state > before:
        marks.append(inherited | self._add(spot, op, values, out))
      else:
        marks.append(inherited)
    return marks

  def _add(self, spot: Spot, op: str, values: Sequence[Any], out: Any) -> Taint:
    made = state_of(out).name.lower()
    ranges = tuple(range_of(x) for x in values if _can_be_bad(x) or np.size(x))
    found = Birth(
      self.name(spot.path),
      spot.line,
      op,
      made,
      spot.within,
      spot.backward,
      ranges,
      range_of(out),
      _where(out),
    )
    self.births.append(found)
    return frozenset([len(self.births) - 1])

  def _cond(
    self, eqn: JaxprEqn, values: list[Any], taints: list[Taint], spot: Spot
  ) -> tuple[list[Any], list[Taint]]:
    branches = bodies_of(eqn)
    taken = min(max(int(values[0]), 0), len(branches) - 1)
    branch = branches[taken]
    within = (*spot.within, f"branch {taken} of cond")
    own = branch.take(values), branch.take(taints)
    return self.run(branch.jaxpr, *own, spot._replace(within=within))

  def _scan(
    self,
    eqn: JaxprEqn,
    values: list[Any],
    taints: list[Taint],
    outs: list[Any],
    spot: Spot,
  ) -> list[Taint]:
    """Run the iterations of a scan that went wrong until the first bad one."""
    (body,), length = bodies_of(eqn), eqn.params["length"]
    consts, carry, slices = body.split(values)
    order = range(length)[::-1] if eqn.params["reverse"] else range(length)
    known = len(self.births)
    for n in order:
      operands = [*consts, *carry, *(x[n] for x in slices)]
      results = self._jitted(body.jaxpr)(*operands)
      if _is_worse(results, operands):
        within = (*spot.within, f"iteration {n} of scan (0 to {length - 1})")
        self.run(body.jaxpr, operands, [_CLEAN] * len(operands), spot._replace(within=within))
        break
      carry = results[: len(carry)]
    return self._marks_of_loop(eqn, values, taints, outs, spot, known)

  def _while(
    self, eqn: JaxprEqn, values: list[Any], taints: list[Taint], spot: Spot
  ) -> tuple[list[Any], list[Taint]]:
    test, body = bodies_of(eqn)
    of_test, (consts, carry, _) = test.split(values).consts, body.split(values)
    known, n, bad = len(self.births), 0, 0

    def more(carry: Sequence[Any]) -> jax.Array:
      return self._jitted(test.jaxpr)(*of_test, *carry)[0]

    def goes_on(carry: Sequence[Any]) -> jax.Array:
      return jnp.any(more(carry))

    def advance(*carry: Any) -> list[Any]:
      new = self._jitted(body.jaxpr)(*consts, *carry)
      return [*map(functools.partial(after_turn, more(carry)), new, carry)]

    while bad < PATIENCE and bool(goes_on(carry)):
      operands = [*consts, *carry]
      carry = advance(*carry)
      if _is_worse(carry, operands):
        within = (*spot.within, f"iteration {n} of while")
        self.run(body.jaxpr, operands, [_CLEAN] * len(operands), spot._replace(within=within))
        carry = _followed(goes_on, advance, carry)
        break
      n, bad = n + 1, bad + 1 if any(map(state_of, carry)) else 0
    if any(map(state_of, carry)) and bool(goes_on(carry)):
      self.unended.append(spot.line)
    return carry, self._marks_of_loop(eqn, values, taints, carry, spot, known)

  def _marks_of_loop(
    self,
    eqn: JaxprEqn,
    values: list[Any],
    taints: list[Taint],
    outs: list[Any],
    spot: Spot,
    known: int,
  ) -> list[Taint]:
    """The taints of a loop's results: what was born in it, or the loop as a whole."""
    born = frozenset(range(known, len(self.births)))
    if not born:
      return self._compare(eqn.primitive.name, values, taints, outs, spot)
    mark = _CLEAN.union(born, *taints)
    return [_CLEAN if state_of(out) is State.FINITE else mark for out in outs]

  def _jitted(self, jaxpr: AnyJaxpr) -> Any:
    if id(jaxpr) not in self._compiled:
      inner, consts = versions.open_jaxpr(jaxpr), versions.constants(jaxpr)
      self._compiled[id(jaxpr)] = jax.jit(lambda *xs: jax.core.eval_jaxpr(inner, consts, *xs))
    return self._compiled[id(jaxpr)]


def _followed(goes_on: Callable[..., Any], advance: Callable[..., Any], carry: list[Any]) -> Any:
  """The carry when a loop ends, or after some iterations."""
  _, carry = jax.lax.while_loop(
    lambda state: (state[0] < PATIENCE) & goes_on(state[1]),
    lambda state: (state[0] + 1, advance(*state[1])),
    (0, carry),
  )
  return carry


_CALLS = frozenset({Rule.CALL, Rule.CUSTOM_JVP, Rule.CUSTOM_VJP, Rule.CUSTOM_VMAP})


def custom_rules(
  jaxpr: AnyJaxpr, planner: Planner, spot: Spot
) -> Iterator[tuple[tuple[Path, Line], str]]:
  """The backward rules of a jaxpr's ``custom_vjp`` calls, by the module and line of the call.

  JAX gives what a rule computes the line of that call, so its own name must say where to look.
  """

  def inside(eqn: JaxprEqn, around: Spot) -> Spot:
    path = planner.place_of(eqn, around.path).path
    return Spot(around.path + path, False, line_of(eqn, around.line))

  for eqn, here in jaxprs.equations(jaxpr, spot, inside):
    if eqn.primitive.name == "custom_vjp_call":
      info = getattr(eqn.params["bwd"], "debug_info", None)
      if info is not None:
        yield (here.path, here.line), _short_source(info.func_src_info)


def _short_source(text: str) -> str:
  """A function's name and line, the file named as in reports."""
  name, _, where = text.partition(" at ")
  file, _, line = where.rpartition(":")
  return f"{name} at {Line(file, int(line), name)}" if line.isdecimal() else text


class _Values:
  """The values and taints of a jaxpr's variables; each is let go after its last use."""

  def __init__(self, jaxpr: AnyJaxpr, operands: Iterator[tuple[Any, Taint]], consts: Any) -> None:
    self._held: dict[Any, tuple[Any, Taint]] = dict(zip(jaxpr.invars, operands, strict=True))
    self._held.update((v, (x, _CLEAN)) for v, x in zip(jaxpr.constvars, consts, strict=True))
    last = {a: n for n, e in enumerate(jaxpr.eqns) for a in e.invars if not isinstance(a, Literal)}
    kept = variables_of(jaxpr.outvars)
    self._dying: dict[int, list[Any]] = {}
    for var, index in last.items():
      if var not in kept:
        self._dying.setdefault(index, []).append(var)

  def read(self, atoms: Sequence[Any]) -> tuple[list[Any], list[Taint]]:
    pairs = [(a.val, _CLEAN) if isinstance(a, Literal) else self._held[a] for a in atoms]
    return [x for x, _ in pairs], [taint for _, taint in pairs]

  def write(
    self, variables: Sequence[Any], values: Sequence[Any], taints: Sequence[Taint], index: int
  ) -> None:
    self._held.update(zip(variables, zip(values, taints, strict=True), strict=True))
    for var in self._dying.get(index, ()):
      self._held.pop(var, None)


def _can_be_bad(x: Any) -> bool:
  return isinstance(x, float) or is_of(x, jnp.inexact)


def _numbers(x: Any) -> np.ndarray:
  """What an array, a number or a mutable reference holds."""
  return np.asarray(x[...] if isinstance(x, jax.Ref) else x)


def state_of(x: Any) -> State:
  """The worst number in an array."""
  if not _can_be_bad(x):
    return State.FINITE
  values = _numbers(x)
  if np.isfinite(values).all():
    return State.FINITE
  return State.NAN if np.isnan(values).any() else State.INF


def _is_worse(outs: Sequence[Any], operands: Sequence[Any]) -> bool:
  worst = max(map(state_of, outs), default=State.FINITE)
  return worst > max(map(state_of, operands), default=State.FINITE)


def range_of(x: Any) -> Range:
  """What an array holds; keys and flags have no range."""
  if not jnp.issubdtype(getattr(x, "dtype", np.asarray(x).dtype), np.number):
    return Range(describe(x), np.nan, np.nan, 0, 0)
  values = _numbers(x)
  wide = values if values.dtype.kind == "c" else values.astype(np.float64)
  magnitudes = np.abs(wide) if values.dtype.kind == "c" else wide
  finite = magnitudes[np.isfinite(magnitudes)]
  low, high = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
  nans = int(np.isnan(wide).sum())
  return Range(describe(values), low, high, int((~np.isfinite(wide)).sum()) - nans, nans)


def _where(x: Any) -> str:
  """The index of what is not finite: one number where all of it has the same, else a colon."""
  bad = np.argwhere(~np.isfinite(_numbers(x)))
  if not bad.shape[1]:
    return "[]"
  same = [len(set(column)) == 1 for column in bad.T]
  return "[" + ", ".join(str(n) if s else ":" for n, s in zip(bad[0], same, strict=True)) + "]"
