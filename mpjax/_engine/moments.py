"""Second moments that the product of first ones is subtracted from: variances and covariances.

``conv(x * x, k) - conv(x, k) ** 2``, ``p @ z**2 - (p @ z) ** 2``, ``h.T @ h / n - outer(m, m)``:
what is left is small beside both, smaller than what 16 bits round of either, and a variance comes
out negative. So does the square of a distance, ``|x|**2 + |y|**2 - 2 * x @ y``. Where the sums are
matmuls or convolutions, these are float32; those of operands that are narrow already multiply in
16 bits, but return float32, and so does their derivative: what comes back to x by way of the
product and of ``|x|**2`` is a small difference, too. The same holds of a matmul that a constant is
subtracted from which it is near: ``1 - a @ b.T`` of unit vectors, ``w.T @ w - eye(n)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mpjax._core.primitives import Trait, having
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import HAVE_BODIES, Body, bodies_of
from mpjax._engine.jaxprs import operation, variables_of
from mpjax._engine.made_of import is_computed
from mpjax._engine.recomputed import same_values
from mpjax._engine.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

_MOVED = having(Trait.MOVES) | {
  *("convert_element_type", "broadcast_in_dim", "neg", "slice", "dynamic_slice")
}
_SCALED = frozenset({"mul", "div"})
_ADDS = frozenset({"add", "sub", "add_any"})
_SQUARES = ("mul", "square", "integer_pow")


def moments(
  inner: Jaxpr,
  makers: Mapping[Any, JaxprEqn],
  outs: Collection[int],
  is_sum: Callable[[JaxprEqn], bool],
  pure: Collection[Var],
) -> frozenset[Var]:
  """The variables of a jaxpr that are moments of which one is subtracted from another.

  Args:
    inner: The jaxpr, open.
    makers: Its equations, by what they make.
    outs: Which of its results are such moments outside.
    is_sum: Whether an equation adds up: a sum, a matmul, or a function that holds one.
    pure: What is made of parameters alone.
  """
  found = variables_of(inner.outvars[n] for n in outs) if outs else set()
  same = functools.cache(functools.partial(same_values, inner))
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name == "sub"]:
    for second, product in (eqn.invars, eqn.invars[::-1]):
      found |= _of_difference(second, product, makers, is_sum, same)
      found |= _near_constant(second, product, makers, pure)
  found |= _of_distances(inner, makers)
  return frozenset(var for start in found for var in _chain(start, makers))


def _of_distances(inner: Jaxpr, makers: Mapping[Any, JaxprEqn]) -> set[Var]:
  """The matmuls of values to which, or from which, sums of squares of these are added.

  Or the diagonal of the matmul itself, which holds such sums. All have a product twice.
  """
  scaled = [eqn for eqn in inner.eqns if eqn.primitive.name == "mul"]
  if not any(isinstance(a, Literal) and abs(a.val) == 2 for eqn in scaled for a in eqn.invars):
    return set()
  dots = [eqn for eqn in inner.eqns if eqn.primitive.name == "dot_general"]
  lengths, _ = _lengths(inner, makers) if dots else ({}, {})
  of = set(lengths.values())
  products = {
    eqn.outvars[0]: own
    for eqn in (dots if of else ())
    if (own := of & {*variables_of(_source(atom, makers) for atom in eqn.invars), *eqn.outvars})
  }
  terms: dict[Any, set[Any]] = {}
  for eqn in inner.eqns if products else ():
    if eqn.primitive.name in _ADDS:
      read = variables_of(_source(atom, makers) for atom in eqn.invars)
      terms[eqn.outvars[0]] = set[Any]().union(*(terms.get(atom, {atom}) for atom in read))
  return {
    product
    for own in terms.values()
    for product in own & products.keys()
    if any(lengths.get(term) in products[product] for term in own)
  }


def _near_constant(
  constant: Atom, value: Atom, makers: Mapping[Any, JaxprEqn], pure: Collection[Var]
) -> set[Var]:
  """A matmul less one, or of a value with itself less a matrix that the program computes.

  Or entries of it, as its diagonal. One less than what a layer gives is as far from it as any.
  """
  is_number = isinstance(constant, Literal)
  if isinstance(value, Literal) or (is_number and abs(constant.val) != 1):
    return set()
  if not is_number and len({*jaxprs.shape(constant)[-2:]}) != 1:  # no square matrix
    return set()
  source = _variable(value, makers)
  made = makers.get(source)
  if made is not None and made.primitive.name == "gather":
    source = _variable(made.invars[0], makers)
    made = makers.get(source)
  if made is None or made.primitive.name != "dot_general":
    return set()
  if is_number:
    return set() if any(a in pure for a in variables_of(made.invars)) else {source}
  return {source} if _same(made.invars, makers) and is_computed(constant, makers) else set()


def _lengths(inner: Jaxpr, makers: Mapping[Any, JaxprEqn]) -> tuple[dict[Any, Any], dict[Any, Any]]:
  """What holds sums of squares of a value, by that value, and what holds their roots.

  Or entries of a value, as a diagonal does.
  """
  found: dict[Any, Any] = {}
  roots: dict[Any, Any] = {}
  for eqn in inner.eqns:
    name, result = eqn.primitive.name, eqn.outvars[0] if eqn.outvars else None
    if name == "gather":
      found[result] = _variable(eqn.invars[0], makers)
    elif name == "reduce_sum":
      found[result] = _of_square(_source(eqn.invars[0], makers), makers)
    elif name == "dot_general" and jaxprs.is_inner(eqn):
      found[result] = _same(eqn.invars, makers)
    elif name == "sqrt" and found:
      roots[result] = found.get(_variable(eqn.invars[0], makers))
    elif name in _SQUARES and roots:
      found[result] = roots.get(_of_square(result, makers))
    elif name in HAVE_BODIES:
      for body in bodies_of(eqn)[-1:]:  # of a choice the one that runs everywhere else
        inside = () if body.carry else _lengths_inside(eqn, body, makers)
        for outside, of in zip((found, roots), inside, strict=False):
          outside |= of
  return _without_none(found), _without_none(roots)


def _lengths_inside(
  eqn: JaxprEqn, body: Body, makers: Mapping[Any, JaxprEqn]
) -> list[dict[Any, Any]]:
  """What the results of a body hold of its operands, by the results of its equation."""
  own, read = versions.open_jaxpr(body.jaxpr), body.take(eqn.invars)
  values = {var: _variable(atom, makers) for var, atom in zip(own.invars, read, strict=True)}
  inside = _lengths(own, jaxprs.makers_of(own))
  return [
    {eqn.outvars[n]: values.get(of[own.outvars[n]]) for n in jaxprs.places_of(own.outvars, of)}
    for of in inside
  ]


def _variable(atom: Any, makers: Mapping[Any, JaxprEqn]) -> Any:
  """What an operand was moved from, or is a multiple of; None if that is a number."""
  source = _source(atom, makers)
  return None if isinstance(source, Literal) else source


def _without_none(values: Mapping[Any, Any]) -> dict[Any, Any]:
  return {key: value for key, value in values.items() if value is not None}


def _of_square(atom: Any, makers: Mapping[Any, JaxprEqn]) -> Any:
  """The value that an operand is the square of; None if it is none."""
  return _same(_factors(atom, makers), makers)


def _same(factors: Sequence[Any], makers: Mapping[Any, JaxprEqn]) -> Any:
  """What two factors were both moved from, or are multiples of; None if they are no such two."""
  values = [_source(factor, makers) for factor in factors]
  is_one = len(values) == 2 and values[0] is values[1] and not isinstance(values[0], Literal)
  return values[0] if is_one else None


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
  return _chain(atom, makers)[-1]


def _chain(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> list[Any]:
  """An operand, and one after the other what it was moved from or is a multiple of."""
  found = [atom]
  while not isinstance(atom, Literal) and atom in makers:
    made = makers[atom]
    name, read = made.primitive.name, made.invars
    if name in _SCALED:
      read = [a for a in made.invars if jaxprs.shape(a)]
      if len(read) > 1 or (name == "div" and read[:1] != made.invars[:1]):
        return found
    elif name not in _MOVED:
      return found
    if not read:
      return found
    found += read[:1]
    atom = read[0]
  return found
