"""Which floats of a jaxpr are whole numbers: made of integers, booleans and whole constants alone.

Counts, positions and indices are whole. A matmul of such numbers counts: one-hot rows times ones,
``tril(ones) @ mask``, ``coordinates @ strides``. 16 bits hold none of these beyond 256 (bfloat16)
or 2048 (float16), so that the matmul is float32, as `cumsum` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from mpjax._core.primitives import Trait, having
from mpjax._engine import versions
from mpjax._engine.bodies import HAVE_BODIES, Body, bodies_of, settled
from mpjax._engine.versions import AnyJaxpr, Atom, JaxprEqn, Literal, Var

Indices = frozenset[int]

_KEEPS_WHOLE = having(Trait.KEEPS_NUMBERS | Trait.MATMUL) | {
  *("add", "sub", "mul", "neg", "abs", "max", "min", "square", "add_any"),
  *("reduce_sum", "reduce_max", "reduce_min", "cumsum", "scatter-add", "psum"),
}
_MOST = 2**16


class WholeNumbers:
  """Finds the whole numbers of jaxprs; what is known of one is kept."""

  def __init__(self) -> None:
    self._known: dict[Any, frozenset[Var]] = {}

  def variables(self, jaxpr: AnyJaxpr, operands: Indices) -> frozenset[Var]:
    """The floats of a jaxpr that hold whole numbers; integers and booleans do anyway.

    Args:
      jaxpr: The jaxpr, closed or open.
      operands: Which of its operands hold whole numbers.
    """
    key = id(jaxpr), operands
    if key not in self._known:
      inner = versions.open_jaxpr(jaxpr)
      found = {inner.invars[n] for n in operands}
      values = zip(inner.constvars, versions.constants(jaxpr), strict=False)
      found |= {var for var, value in values if _are_whole(value)}
      for eqn in inner.eqns:
        found.update(self._made(eqn, found))
      self._known[key] = frozenset(found)
    return self._known[key]

  def entering(self, eqn: JaxprEqn, body: Body, found: Any) -> Indices:
    """Which operands of an equation's body are whole in every turn, given what is outside."""
    own = [is_whole(atom, found) for atom in body.take(eqn.invars)]

    def turn(carry: Sequence[bool]) -> Sequence[bool]:
      own[body.carry.start : body.carry.stop] = carry
      results = self._results(body.jaxpr, _places(own))
      return list(carry) if body.is_test else results

    settled(own[body.carry.start : body.carry.stop], turn, all)
    return _places(own)

  def _results(self, jaxpr: AnyJaxpr, operands: Indices) -> list[bool]:
    found = self.variables(jaxpr, operands)
    return [is_whole(atom, found) for atom in versions.open_jaxpr(jaxpr).outvars]

  def _made(self, eqn: JaxprEqn, found: Any) -> Sequence[Var]:
    """The results of an equation that are whole."""
    name = eqn.primitive.name
    if name in HAVE_BODIES:
      bodies = [body for body in bodies_of(eqn) if not body.is_test]
      columns = [self._results(b.jaxpr, self.entering(eqn, b, found)) for b in bodies]
      made = zip(eqn.outvars, zip(*columns, strict=True), strict=True)
      return [var for var, column in made if all(column)]
    keeps = name == "iota" or (
      name in _KEEPS_WHOLE and all(is_whole(atom, found) for atom in eqn.invars)
    )
    return eqn.outvars if keeps else ()


def is_whole(atom: Atom, found: Any) -> bool:
  """Whether a variable or a literal holds whole numbers, given which floats do."""
  if isinstance(atom, Literal):
    return _are_whole(atom.val)
  return atom in found or not _is_inexact(atom)


def _are_whole(value: Any) -> bool:
  """Whether a constant holds nothing but whole numbers; large arrays are not looked at."""
  if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
    return False
  dtype = getattr(value, "dtype", np.dtype(type(value)))
  if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf":
    return False
  if dtype.kind != "f":
    return True
  if np.size(value) > _MOST:
    return False
  numbers = np.asarray(jax.device_get(value), np.float64)
  return bool((np.isfinite(numbers) & (numbers == np.round(numbers))).all())


def _is_inexact(var: Any) -> bool:
  dtype = getattr(var.aval, "dtype", None)
  return not isinstance(dtype, np.dtype) or dtype.kind not in "biu"


def _places(own: Sequence[bool]) -> Indices:
  return frozenset(n for n, known in enumerate(own) if known)
