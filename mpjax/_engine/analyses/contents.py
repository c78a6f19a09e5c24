"""Which primitives a jaxpr holds, those of its bodies too: what it holds none of is not sought."""

from __future__ import annotations

from collections.abc import Collection

from mpjax._core.primitives import JITTED, MATMULS, Trait, having
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.jaxprs import kind, shape
from mpjax._engine.program.matmuls import operation, weights_of
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn

SOLVES = having(Trait.FACTORS) | {"householder_product", "ormqr"}
"""What solves a linear system or decomposes a matrix."""

_SUMS = MATMULS | {"reduce_sum"}
_MAY_WEIGH = frozenset({"dot_general", "conv_general_dilated"})
_WEIGHTED = "weighted sum"
"""Stands beside the names of primitives for matmuls with what may be weights."""
_SKIPS = "every other entry"
"""And that for slices that skip."""


class Contents:
  """Tells what jaxprs hold; what is known of one is kept."""

  def __init__(self) -> None:
    self._names: dict[int, set[str]] = {}

  def any_of(self, names: Collection[str], jaxpr: AnyJaxpr) -> bool:
    """Whether a jaxpr, or a body in it, holds one of some primitives."""
    return not self.primitives(jaxpr).isdisjoint(names)

  def matmuls(self, jaxpr: AnyJaxpr) -> bool:
    """Whether it holds a matmul."""
    return self.any_of(MATMULS, jaxpr)

  def sums(self, jaxpr: AnyJaxpr) -> bool:
    """Whether it holds a sum or a matmul."""
    return self.any_of(_SUMS, jaxpr)

  def solutions(self, jaxpr: AnyJaxpr) -> bool:
    """Whether it solves a linear system or decomposes a matrix."""
    return self.any_of(SOLVES, jaxpr)

  def weights(self, jaxpr: AnyJaxpr) -> bool:
    """Whether it holds a matmul or convolution with what may be weights, see `weights_of`."""
    return self.any_of({_WEIGHTED}, jaxpr)

  def skips(self, jaxpr: AnyJaxpr) -> bool:
    """Whether it takes every other entry of something."""
    return self.any_of({_SKIPS}, jaxpr)

  def is_sum(self, eqn: JaxprEqn) -> bool:
    """Whether an equation is a sum or a matmul, or a call of a function that holds one."""
    if eqn.primitive.name not in JITTED:
      return operation(eqn) in _SUMS
    (body,) = bodies_of(eqn)
    return self.sums(body.jaxpr)

  def primitives(self, jaxpr: AnyJaxpr) -> set[str]:
    """The names of the primitives in a jaxpr, its bodies among it."""
    found = self._names.get(id(jaxpr))
    if found is None:
      eqns = versions.open_jaxpr(jaxpr).eqns
      self._names[id(jaxpr)] = found = {eqn.primitive.name for eqn in eqns}
      weighing = (eqn for eqn in eqns if eqn.primitive.name in _MAY_WEIGH)
      found |= {_WEIGHTED} if any(map(weights_of, weighing)) else set()
      slices = eqns if "slice" in found else ()
      found |= {_SKIPS} if any(map(skips_entries, slices)) else set()
      converts = eqns if "convert_element_type" in found else ()
      found |= {"complex"} if any(map(makes_complex, converts)) else set()
      holding = [eqn for eqn in eqns if eqn.primitive.name in HAVE_BODIES]
      for body in (body for eqn in holding for body in bodies_of(eqn)):
        found |= self.primitives(body.jaxpr)
    return found


def makes_complex(eqn: JaxprEqn) -> bool:
  """Whether an equation makes a complex number of a float, as in ``exp(1j * x)``."""
  return eqn.primitive.name == "convert_element_type" and kind(eqn.outvars[0]) == "c"


def taken_of_pairs(eqn: JaxprEqn) -> int | None:
  """Whether a slice takes the first or the second of all pairs, 0 or 1, as associative scans do.

  Every other entry but for the last, ``x[:-1:2]``, or from the second on; ``x[::2]`` is no such.
  """
  strides = eqn.params["strides"] or ()
  if strides.count(2) != 1:
    return None
  along = strides.index(2)
  start, limit = (eqn.params[key][along] for key in ("start_indices", "limit_indices"))
  size = shape(eqn.invars[0])[along]
  return {(0, size - 1): 0, (1, size): 1}.get((start, limit))


def skips_entries(eqn: JaxprEqn) -> bool:
  """Whether an equation takes every other entry of something."""
  return eqn.primitive.name == "slice" and 2 in (eqn.params["strides"] or ())
