"""Sees that a function is 16-bit already, by a policy or by its author: it is no reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._core.dtypes import is_of
from mpjax._core.primitives import MATMULS
from mpjax._core.scopes import AS_WRITTEN, Path, has_policy, module_path
from mpjax._engine.calls import Call
from mpjax._engine.planning.plan import Plan
from mpjax._engine.program import jaxprs
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn
from mpjax.inspect._source_lines import UNKNOWN, Line, line_of


def first_region(plan: Plan, line: Line = UNKNOWN) -> tuple[Path, Line] | None:
  """The module and line of the first operation on 16 bits in a region that has its own policy."""
  for step in plan.steps:
    here = line_of(step.eqn, line)
    if step.place.has_policy and _is_narrow(step.eqn):
      return step.place.path, here
    for body in step.bodies:
      found = first_region(body, here)
      if found is not None:
        return found
  return None


def where_traced(jaxpr: AnyJaxpr) -> str | None:
  """Where a traced function has a 16-bit policy inside, in words; None if it has none."""
  found = list(_regions(jaxpr))
  if not found:
    return None
  path, line = next((place for place in found if place[1] != UNKNOWN), found[0])
  words = [str(line)] * (line != UNKNOWN) + [f"in {'/'.join(path)}"] * bool(path)
  return " ".join(words) or "a model that an argument or the function holds"


def _regions(jaxpr: AnyJaxpr) -> Iterator[tuple[Path, Line]]:
  """The module and line of every operation on 16 bits in a region that has its own policy."""
  for eqn, here in jaxprs.equations(jaxpr, UNKNOWN, line_of):
    stack = eqn.source_info.name_stack
    if has_policy(stack) and _is_narrow(eqn):
      yield module_path(stack), here


def _is_narrow(eqn: JaxprEqn) -> bool:
  avals: list[Any] = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
  return any(is_of(aval, jnp.floating) and aval.dtype.itemsize == 2 for aval in avals)


def as_written(call: Call) -> Any:
  """The jaxpr of a call without the policies inside of it, as far as they can be left out."""

  def plain(*operands: Any) -> list[Any]:
    with jax.named_scope(AS_WRITTEN):
      return call.flat(*operands)

  return jaxprs.trace(plain, call.operands)


@dataclass(frozen=True)
class AuthorsOwn:
  """The matmuls of a function that its author made 16-bit, by ``dtype=`` or 16-bit arguments.

  Attributes:
    count: How many there are.
    total: How many matmuls and convolutions of floats there are.
    path: The module of the first.
    line: The line of the first.
  """

  count: int
  total: int
  path: Path
  line: Line

  @classmethod
  def of(cls, plan: Plan) -> AuthorsOwn:
    """Those of a function that is planned without a policy."""
    found = list(_matmuls(plan, UNKNOWN))
    own = [(path, line) for narrow, path, line in found if narrow]
    return cls(len(own), len(found), *(own[0] if own else ((), UNKNOWN)))

  def refuse(self, tool: str) -> None:
    """Refuse a function all of whose matmuls are 16-bit, which agrees with itself whatever it does.

    Raises:
      ValueError: It is such a function.
    """
    if 0 < self.count == self.total:
      where = f" in {'/'.join(self.path)}" if self.path else ""
      raise ValueError(
        f"{tool} must have a reference in float32; got a function whose {self.total} matmuls its "
        f"author made 16-bit, first at {self.line}{where}. Leave out its dtype= and pass float32 "
        "arguments: the policy makes it 16-bit."
      )


def _matmuls(plan: Plan, line: Line) -> Iterator[tuple[bool, Path, Line]]:
  """Whether each matmul of floats multiplies 16 bits alone, its module and its line."""
  for step in plan.steps:
    here = line_of(step.eqn, line)
    factors: list[Any] = [atom.aval for atom in step.eqn.invars[:2]]
    if step.eqn.primitive.name in MATMULS and all(is_of(aval, jnp.floating) for aval in factors):
      yield all(aval.dtype.itemsize == 2 for aval in factors), step.place.path, here
    for body in step.bodies:
      yield from _matmuls(body, here)


def refuse_regions(plan: Plan, tool: str, what: str) -> None:
  """Refuse a function that has a 16-bit policy inside.

  Raises:
    ValueError: It has.
  """
  found = first_region(plan)
  if found is not None:
    path, line = found
    where = f" in {'/'.join(path)}" if path else ""
    raise ValueError(
      f"{tool} must trace its function in float32; got one with a 16-bit policy inside, first at "
      f"{line}{where}, so that {what} would be 16-bit too. Give it the function of the plain "
      "model or loss, as it was before apply_policy or autocast, and the policy as an argument."
    )
