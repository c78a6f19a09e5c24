"""What was decided for a jaxpr: made by the planner, read by the interpreter and by reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import FUNCTIONS, MATMULS, Rule, Trait, having
from mpjax._core.scopes import Path
from mpjax._engine.analyses.constants import NumberSet
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import bodies_of, repetitions
from mpjax._engine.program.kinds import DATA, FEW, Forms, is_narrow, narrow
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn, Literal, Var

ONE_FLOAT32: Forms = (DATA,)
"""The results of what makes one float32 value."""


class Read(NamedTuple):
  """The casts on the way from where a value is held to where it is used."""

  via: np.dtype | None = None
  """The dtype that the value took on by leaving its module."""
  to: np.dtype | None = None
  """The dtype that the equation wants."""


AS_HELD = Read()
"""No cast, as of most operands."""


class Place(NamedTuple):
  """Where equations stand.

  Attributes:
    path: The module.
    backward: Whether in its backward pass.
    has_policy: Whether in a region that has a policy of its own, which governs there.
    forward_again: Whether in the forward pass that a checkpoint computes again.
  """

  path: Path = ()
  backward: bool = False
  has_policy: bool = False
  forward_again: bool = False

  @property
  def has_cotangents(self) -> bool:
    """Whether derivatives are propagated there."""
    return self.backward and not self.forward_again

  def within(self, outer: Place) -> Place:
    """The place of an equation of a body that stands in another place."""
    if outer == ROOT:
      return self
    return Place(
      outer.path + self.path,
      outer.backward or self.backward,
      outer.has_policy or self.has_policy,
      self.forward_again or (outer.forward_again and not self.backward),
    )


ROOT = Place()


class Scoping(NamedTuple):
  """How the scopes of a traced function lead to the paths by which rules name modules.

  Attributes:
    root: How many leading components of every scope are not part of a rule's path.
    absolute: Whether scopes inside the body of a loop or jit are full paths all the same.
    located: Whether a body that several modules call is planned for each of them, as a report
      that names modules must have it.
    modules: The paths that modules have behind the root, if they are known: where no rule fits
      the scopes that lead to one, it goes by this path, see `scopes.as_module`.
  """

  root: int = 0
  absolute: bool = False
  located: bool = False
  modules: frozenset[Path] = frozenset()


PLAIN = Scoping()
LOCATED = Scoping(located=True)


class Order(NamedTuple):
  """How a matmul is computed whose result is read in another order than it is written.

  Attributes:
    exchanged: Whether the second operand comes first.
    free: For each operand, its dimensions that are neither matched nor summed over, in the order
      in which the result is to have them.
  """

  exchanged: bool
  free: tuple[tuple[int, ...], ...]


class Float8(NamedTuple):
  """What was decided for a matmul whose policy asks for float8.

  Attributes:
    parameter: Which operand is the parameter; None if it multiplies in 16 bits.
    backward: Whether the other operand is a cotangent.
    reason: Why it multiplies in 16 bits; empty if it does not.
  """

  parameter: int | None = None
  backward: bool = False
  reason: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Step:
  """One equation with what was decided for it."""

  eqn: JaxprEqn
  rule: Rule
  won: int | None
  place: Place
  reads: tuple[Read, ...]
  operands: Forms
  outs: Forms
  params: dict[str, Any]
  bodies: tuple[Plan, ...] = ()
  parameter: int | None = None
  """Which operand is a parameter, if its cotangent is to be summed in float32."""
  order: Order | None = None
  """The order in which it is computed, if it is a matmul that has another than written."""
  float8: Float8 | None = None
  """What its policy's wish for float8 came to; None if it has none, or this is no matmul."""
  because: str = ""
  """Why its rule is not that of its primitive, if it is told; or would not be, if the policy map
  did not change it."""
  is_of_difference: bool = False
  """Whether little is left of it beside other terms, which read the same values."""
  travels: np.dtype | None = None
  """The format in which its float32 operand goes from device to device, if not in float32."""

  @property
  def in_float8(self) -> bool:
    """Whether it multiplies in float8."""
    return self.float8 is not None and not self.float8.reason

  @property
  def wide(self) -> int | None:
    """Which operand is read as it is held: a parameter that rounds inside."""
    in_float8 = None if self.float8 is None else self.float8.parameter
    return self.parameter if in_float8 is None else in_float8


Readers = dict[Var, list[tuple[int, Read]]]

Often = tuple[Var, np.dtype | None]
"""A variable, and the dtype that it took on by leaving its module."""


@dataclass(frozen=True, eq=False)
class Plan:
  """A jaxpr with what was decided for each of its equations and results."""

  jaxpr: AnyJaxpr
  in_forms: Forms
  steps: tuple[Step, ...]
  out_reads: tuple[Read, ...]
  out_forms: Forms
  cast: tuple[int, ...] = ()
  """Which results are parameters that their author cast to 16 bits."""
  lasting: tuple[int, ...] = ()
  """Which results are float32 behind the module that they leave, too."""

  numbers: tuple[NumberSet, ...] = ()
  """The numbers that occur in each result, None where they are not known."""

  read_outside: frozenset[Var] = frozenset()
  """The variables that are read outside, as its results are, so that each has a value."""

  @property
  def in_float8(self) -> bool:
    """Whether some matmul in it multiplies in float8."""
    return any(step.in_float8 or any(b.in_float8 for b in step.bodies) for step in self.steps)

  @property
  def multiplies(self) -> bool:
    """Whether it has a matmul in it."""
    return any(multiplies(step.eqn, step.bodies) for step in self.steps)

  @cached_property
  def readers(self) -> Readers:
    """Which steps read each variable, by index, and how; its results are read by step -1.

    Nothing reads some variables, as tracing keeps what is computed for nobody.
    """
    inner = versions.open_jaxpr(self.jaxpr)
    readers: Readers = {var: [] for var in (*inner.constvars, *inner.invars)}
    for index, step in enumerate(self.steps):
      for atom, read in zip(step.eqn.invars, step.reads, strict=True):
        if not isinstance(atom, Literal):
          readers[atom].append((index, read))
      readers |= {var: [] for var in step.eqn.outvars}
    for atom, read in zip(inner.outvars, self.out_reads, strict=True):
      if not isinstance(atom, Literal):
        readers[atom].append((-1, read))
    for var in self.read_outside & readers.keys():
      readers[var].append((-1, AS_HELD))
    return readers

  @cached_property
  def read_often(self) -> dict[Often, np.dtype]:
    """The 16-bit values that many steps read as such, and their formats.

    What comes back to one in the backward pass is a sum of as many terms. Readers that widen it
    share the widened value, to which float32 comes back.
    """
    if len(self.steps) <= FEW:
      return {}
    found = ((var, reads) for var, reads in self.readers.items() if len(reads) > FEW)
    count = Counter((var, r.via) for var, reads in found for _, r in reads if r.to != FLOAT32)
    often = [key for key, n in count.items() if n > FEW]
    if not often:
      return {}
    made = [(versions.open_jaxpr(self.jaxpr).invars, self.in_forms)]
    made += [(step.eqn.outvars, step.outs) for step in self.steps]
    forms = {var: form for pair in made for var, form in zip(*pair, strict=True)}
    formats = {}
    for var, via in often:
      form = forms.get(var)
      if form is not None and (via or form.dtype) != FLOAT32:
        formats[var, via] = via or form.dtype
    return formats


def multiplies(eqn: JaxprEqn, bodies: Sequence[Plan]) -> bool:
  """Whether an equation is a matmul of floats or has one in a body, of which these are the plans.

  One of complex numbers runs as it was traced, on the way of what came in as 16 bits.
  """
  if not bodies:  # few have any
    return eqn.primitive.name in MATMULS and jaxprs.kind(eqn.outvars[0]) != "c"
  return any(body.multiplies for body in bodies)


def shared_format(readers: Readers, step: Step) -> np.dtype | None:
  """The format of a step's one result if it is read once, or by all as it left its module.

  Other readers cast to 16 bits each for itself, so that their cotangents meet in float32.
  """
  reads = [read for _, read in readers[step.eqn.outvars[0]]]
  formats = {read.via or (read.to if len(reads) == 1 else None) for read in reads}
  return formats.pop() if len(formats) == 1 else None


def widened(body: Plan) -> Forms:
  """The operand forms of a body, float32 where it reads a narrow operand in nothing else.

  What rounds inside of a matmul there is read narrow: else it would be taken for data.
  """
  wanted = {
    v: {None if n < 0 or body.steps[n].rule is Rule.EXACT else read.to for n, read in reads}
    for v, reads in body.readers.items()
  }
  return tuple(
    DATA if is_narrow(form) and wanted.get(var) == {FLOAT32} else form
    for var, form in zip(versions.open_jaxpr(body.jaxpr).invars, body.in_forms, strict=True)
  )


def narrowed(body: Plan, operands: range) -> Forms:
  """The forms of some operands of a body, 16-bit where it reads one of float32 once, and so.

  What it is read by rounds it anyway; so it is not held twice, rounded for the backward pass too.
  """
  forms = list(body.in_forms[operands.start : operands.stop])
  for n, var in enumerate(versions.open_jaxpr(body.jaxpr).invars[operands.start : operands.stop]):
    reads = body.readers[var]
    wanted = reads[0][1].to if len(reads) == 1 else None
    if forms[n] == DATA and wanted is not None and wanted != FLOAT32:
      forms[n] = narrow(wanted)
  return tuple(forms)


def shared_by_turns(eqn: JaxprEqn, plan: Plan) -> tuple[int, ...]:
  """Which 16-bit operands of a scan all of its turns read, if they do so many times together.

  As the context that a decoder reads with every token: what comes back to it in the backward pass
  is a sum of as many terms.

  Args:
    eqn: The scan.
    plan: The plan of its body.
  """
  turns, (body,) = repetitions(eqn) or FEW + 1, bodies_of(eqn)
  variables = versions.open_jaxpr(plan.jaxpr).invars
  return tuple(
    n
    for n, form in enumerate(plan.in_forms[: body.carry.start])
    if is_narrow(form) and turns * len(plan.readers[variables[n]]) > FEW
  )


ELEMENTWISE = having(Trait.ARITHMETIC | Trait.TRANSCENDENTAL)


def is_elementwise(step: Step) -> bool:
  """Whether a step computes element by element, itself or in the function that it calls."""
  name = step.eqn.primitive.name
  if name in FUNCTIONS and step.bodies:
    return all(is_elementwise(inner) for inner in step.bodies[0].steps)
  return name in ELEMENTWISE
