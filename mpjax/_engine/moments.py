"""Second moments that the product of first ones is subtracted from: variances and covariances.

``conv(x * x, k) - conv(x, k) ** 2``, ``p @ z**2 - (p @ z) ** 2``, ``h.T @ h / n - outer(m, m)``:
what is left is small beside both, smaller than what 16 bits round of either, and a variance comes
out negative. Where the sums are matmuls or convolutions, these are float32; of operands that are
narrow already only what they return is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mpjax._core.primitives import MATMULS, Trait, having
from mpjax._engine import jaxprs
from mpjax._engine.bodies import HAVE_BODIES
from mpjax._engine.jaxprs import operation, variables_of
from mpjax._engine.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

_MOVED = having(Trait.MOVES) | {
  *("convert_element_type", "broadcast_in_dim", "neg", "slice", "dynamic_slice")
}
_SCALED = frozenset({"mul", "div"})
_SUMS = MATMULS | {"reduce_sum"}


def moments(inner: Jaxpr, makers: Mapping[Any, JaxprEqn], outs: Collection[int]) -> frozenset[Var]:
  """The variables of a jaxpr that are moments of which one is subtracted from another.

  Args:
    inner: The jaxpr, open.
    makers: Its equations, by what they make.
    outs: Which of its results are such moments outside.
  """
  found = variables_of(inner.outvars[n] for n in outs) if outs else set()
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name == "sub"]:
    for second, product in (eqn.invars, eqn.invars[::-1]):
      found |= _of_difference(second, product, makers)
  return frozenset(var for start in found for var in _chain(start, makers))


def _of_difference(second: Atom, product: Atom, makers: Mapping[Any, JaxprEqn]) -> set[Var]:
  """The moments of a second one less a product of two first ones; none if it is none."""
  factors = _factors(_source(product, makers), makers)
  sums = [_source(atom, makers) for atom in (second, *factors)] if factors else []
  made = [None if isinstance(atom, Literal) else makers.get(atom) for atom in sums]
  if not made or not all(eqn is not None and _adds_up(eqn) for eqn in made):
    return set()
  of_second, *of_first = [_summed(eqn, makers) for eqn in made if eqn is not None]
  related = all(not of_second.isdisjoint(own) for own in of_first)
  multiplied = any(eqn is not None and eqn.primitive.name != "reduce_sum" for eqn in made)
  return variables_of(sums) if related and multiplied else set()


def _adds_up(eqn: JaxprEqn) -> bool:
  """Whether an equation is a sum, a matmul, or a function that may hold one."""
  return eqn.primitive.name in HAVE_BODIES or operation(eqn) in _SUMS


def _factors(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> list[Any]:
  """The two values that an operand is the product of; none if it is no product of two."""
  made = None if isinstance(atom, Literal) else makers.get(atom)
  if made is None:
    return []
  name = operation(made)
  if name == "square" or (name == "integer_pow" and made.params["y"] == 2):
    return [made.invars[0]] * 2
  return list(made.invars) if name == "mul" else []


def _summed(eqn: JaxprEqn, makers: Mapping[Any, JaxprEqn]) -> set[Any]:
  """What a sum is taken of, and what that is a product of."""
  read = [_source(atom, makers) for atom in eqn.invars]
  return variables_of(read) | variables_of(
    _source(factor, makers) for atom in read for factor in _factors(atom, makers)
  )


def _source(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> Any:
  """What an operand was moved from, or is a multiple of."""
  *_, source = _chain(atom, makers)
  return source


def _chain(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> Iterator[Any]:
  """An operand, and one after the other what it was moved from or is a multiple of."""
  yield atom
  while not isinstance(atom, Literal) and (made := makers.get(atom)) is not None:
    name = made.primitive.name
    read = [made.invars[0]] if name in _MOVED else []
    if name in _SCALED:
      read = [a for a in made.invars if jaxprs.shape(a)]
      read = read if len(read) == 1 and (name == "mul" or read[0] is made.invars[0]) else []
    if not read:
      return
    (atom,) = read
    yield atom
