"""Second moments that the product of first ones is subtracted from: variances and covariances.

``conv(x * x, k) - conv(x, k) ** 2``, ``p @ z**2 - (p @ z) ** 2``, ``h.T @ h / n - outer(m, m)``:
what is left is small beside both, smaller than what 16 bits round of either, and a variance comes
out negative. So does the square of a distance, ``|x|**2 + |y|**2 - 2 * x @ y``. Where the sums are
matmuls or convolutions, these are float32; of operands that are narrow already only what they
return is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from mpjax._core.primitives import Trait, having
from mpjax._engine import jaxprs
from mpjax._engine.jaxprs import operation, variables_of
from mpjax._engine.recomputed import same_values
from mpjax._engine.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

_MOVED = having(Trait.MOVES) | {
  *("convert_element_type", "broadcast_in_dim", "neg", "slice", "dynamic_slice")
}
_SCALED = frozenset({"mul", "div"})
_ADDS = frozenset({"add", "sub", "add_any"})


def moments(
  inner: Jaxpr,
  makers: Mapping[Any, JaxprEqn],
  outs: Collection[int],
  is_sum: Callable[[JaxprEqn], bool],
) -> frozenset[Var]:
  """The variables of a jaxpr that are moments of which one is subtracted from another.

  Args:
    inner: The jaxpr, open.
    makers: Its equations, by what they make.
    outs: Which of its results are such moments outside.
    is_sum: Whether an equation adds up: a sum, a matmul, or a function that holds one.
  """
  found = variables_of(inner.outvars[n] for n in outs) if outs else set()
  same = functools.cache(functools.partial(same_values, inner))
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name == "sub"]:
    for second, product in (eqn.invars, eqn.invars[::-1]):
      found |= _of_difference(second, product, makers, is_sum, same)
  found |= _of_distances(inner, makers)
  return frozenset(var for start in found for var in _chain(start, makers))


def _of_distances(inner: Jaxpr, makers: Mapping[Any, JaxprEqn]) -> set[Var]:
  """The matmuls of values to which, or from which, sums of squares of these are added."""

  def squared(eqn: JaxprEqn) -> list[Any]:
    factors = _factors(_source(eqn.invars[0], makers), makers)
    first, *_ = sources = [_source(factor, makers) for factor in factors] or [None]
    return sources[:1] if len(sources) == 2 and first is sources[1] else []

  sums = {e.outvars[0]: squared(e) for e in inner.eqns if e.primitive.name == "reduce_sum"}
  squares = {value for values in sums.values() for value in values}
  products = {
    eqn.outvars[0]: own
    for eqn in (inner.eqns if squares else ())
    if eqn.primitive.name == "dot_general"
    and (own := squares.intersection(variables_of(_source(a, makers) for a in eqn.invars)))
  }
  terms: dict[Any, set[Any]] = {}
  for eqn in inner.eqns if products else ():
    if eqn.primitive.name in _ADDS:
      read = [_source(atom, makers) for atom in eqn.invars]
      terms[eqn.outvars[0]] = set[Any]().union(
        *(terms.get(atom, {atom}) for atom in read if not isinstance(atom, Literal))
      )
  met = [own for own in terms.values() if not own.isdisjoint(products)]
  return {
    product
    for own in met
    for product in own & products.keys()
    if any(not products[product].isdisjoint(sums.get(term, ())) for term in own)
  }


def _of_difference(
  second: Atom,
  product: Atom,
  makers: Mapping[Any, JaxprEqn],
  is_sum: Callable[[JaxprEqn], bool],
  same: Callable[[], Mapping[Any, int]],
) -> set[Var]:
  """The moments of a second one less a product of two first ones; none if it is none."""
  factors = _factors(_source(product, makers), makers)
  sums = [_source(atom, makers) for atom in (second, *factors)] if factors else []
  made = [None if isinstance(atom, Literal) else makers.get(atom) for atom in sums]
  known = [eqn for eqn in made if eqn is not None and is_sum(eqn)]
  if not known or len(known) < len(made) or all(e.primitive.name == "reduce_sum" for e in known):
    return set()
  return variables_of(sums) if _are_moments(*known, makers=makers, same=same) else set()


def _are_moments(
  second: JaxprEqn,
  *firsts: JaxprEqn,
  makers: Mapping[Any, JaxprEqn],
  same: Callable[[], Mapping[Any, int]],
) -> bool:
  """Whether sums are one of products, ``a * b``, and the same of the factors, of a and of b.

  With the same weights beside them; or a matmul of a and b, and their sums.
  """
  read, *of_firsts = [[_source(atom, makers) for atom in eqn.invars] for eqn in (second, *firsts)]
  for n, atom in enumerate(read):
    factors = [_source(factor, makers) for factor in _factors(atom, makers)]
    weights = [other for m, other in enumerate(read) if m != n]
    if factors and _match(factors, of_firsts, weights, same):
      return True
  sums = all(len(own) == 1 for own in of_firsts)
  return sums and len(read) == 2 and _match(read, of_firsts, [], same)


def _match(
  factors: Sequence[Any],
  of_firsts: Sequence[Sequence[Any]],
  weights: Sequence[Any],
  same: Callable[[], Mapping[Any, int]],
) -> bool:
  """Whether each of two sums is of one of two factors, and has all the weights."""
  return any(
    all(
      _is_in(factor, own) and all(_is_in(x, own, same) for x in weights)
      for factor, own in zip(pair, of_firsts, strict=True)
    )
    for pair in (factors, factors[::-1])
  )


def _is_in(
  value: Any, own: Sequence[Any], same: Callable[[], Mapping[Any, int]] | None = None
) -> bool:
  """Whether a value is among the operands of a sum, or what is computed of the same things is."""
  if isinstance(value, Literal):
    return any(isinstance(x, Literal) and x.val == value.val for x in own)
  others = [x for x in own if not isinstance(x, Literal)]
  return value in others or (same is not None and same()[value] in map(same().get, others))


def _factors(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> list[Any]:
  """The two values that an operand is the product of; none if it is no product of two."""
  made = None if isinstance(atom, Literal) else makers.get(atom)
  if made is None:
    return []
  name = operation(made)
  if name == "square" or (name == "integer_pow" and made.params["y"] == 2):
    return [made.invars[0]] * 2
  return list(made.invars) if name == "mul" else []


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
