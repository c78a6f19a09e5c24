"""Second moments that the product of first ones is subtracted from: variances and covariances.

``conv(x * x, k) - conv(x, k) ** 2``, ``p @ z**2 - (p @ z) ** 2``: what is left is small beside
both, smaller than what 16 bits round of either, and a variance comes out negative. So does the
square of a distance, see `distances`. Where the sums are matmuls or convolutions, these are
float32; those of operands that are narrow already multiply in 16 bits, but return float32, and so
does their derivative: what comes back to x by way of the product and of ``|x|**2`` is a small
difference, too. The same holds of a matmul that a constant is subtracted from which it is near:
``1 - a @ b.T`` of unit vectors, ``w.T @ w - eye(n)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._engine import jaxprs
from mpjax._engine.distances import Source, beside_their_squares, handed_on, source_in
from mpjax._engine.jaxprs import operation, variables_of
from mpjax._engine.made_of import is_computed
from mpjax._engine.recomputed import same_values
from mpjax._engine.versions import Atom, Jaxpr, JaxprEqn, Literal, Var


class Moments(NamedTuple):
  """The variables of a jaxpr that are moments.

  Attributes:
    values: Those of which one is subtracted from another.
    derivatives: Matmuls that are tangents or cotangents of such, of derivatives taken inside.
  """

  values: frozenset[Var] = frozenset()
  derivatives: frozenset[Var] = frozenset()


def moments(
  inner: Jaxpr,
  makers: Mapping[Any, JaxprEqn],
  outs: Collection[int],
  is_sum: Callable[[JaxprEqn], bool],
  weights: Collection[Var],
  is_backward: Callable[[JaxprEqn], bool],
) -> Moments:
  """The moments of a jaxpr of which one is subtracted from another.

  Args:
    inner: The jaxpr, open.
    makers: Its equations, by what they make.
    outs: Which of its results are such moments outside.
    is_sum: Whether an equation adds up: a sum, a matmul, or a function that holds one.
    weights: What is made of parameters alone, or of gradient steps from these.
    is_backward: Whether an equation stands in a backward pass.
  """
  found = variables_of(inner.outvars[n] for n in outs) if outs else set()
  same = functools.cache(functools.partial(same_values, inner))
  source = source_in(inner)
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name == "sub"]:
    for second, product in (eqn.invars, eqn.invars[::-1]):
      found |= _of_difference(second, product, makers, is_sum, source, same)
      found |= _near_constant(second, product, makers, source, weights)
  found |= beside_their_squares(inner, makers, source, weights)
  if not found:
    return Moments()
  values = frozenset(var for start in found for var in _chain(start, makers))
  return Moments(values, _derivatives(inner, values, source, weights, is_backward))


def _derivatives(
  inner: Jaxpr,
  values: Collection[Var],
  source: Source,
  weights: Collection[Var],
  is_backward: Callable[[JaxprEqn], bool],
) -> frozenset[Var]:
  """The matmuls of what moments multiply with tangents of it, or with cotangents of them."""
  shapes: dict[Any, set[tuple[str, ...]]] = {}  # of the moments so far that multiply a value
  found = set[Var]()
  for eqn in (eqn for eqn in inner.eqns if eqn.primitive.name == "dot_general"):
    result = eqn.outvars[0]
    for value, other in (eqn.invars, eqn.invars[::-1]):
      for var in variables_of([source(value)]):
        if result in values:
          shapes.setdefault(var, set()).add(_sorted_shape(result))
        elif var in shapes and variables_of([other]).isdisjoint(weights):
          like = other if is_backward(eqn) else result
          is_inside = is_backward(eqn) or "jvp(" in str(eqn.source_info.name_stack)
          found |= {result} if is_inside and _sorted_shape(like) in shapes[var] else set()
  return frozenset(found)


def _sorted_shape(atom: Atom) -> tuple[str, ...]:
  return tuple(sorted(map(str, jaxprs.shape(atom))))


def _near_constant(
  constant: Atom,
  value: Atom,
  makers: Mapping[Any, JaxprEqn],
  source: Source,
  weights: Collection[Var],
) -> set[Var]:
  """A matmul less one, or of a value with itself less a matrix that the program computes.

  Or entries of it, as its diagonal. One less than what a layer gives is as far from it as any.
  """
  number = source(constant)
  is_number = isinstance(number, Literal)
  if isinstance(value, Literal) or (is_number and abs(number.val) not in (1, 2)):
    return set()
  if not is_number and len({*jaxprs.shape(constant)[-2:]}) != 1:  # no square matrix
    return set()
  product = source(value)
  made = None if isinstance(product, Literal) else makers.get(product)
  if made is not None and made.primitive.name == "gather":
    product = source(made.invars[0])
    made = None if isinstance(product, Literal) else makers.get(product)
  if made is None or made.primitive.name != "dot_general":
    return set()
  if is_number:
    return set() if any(a in weights for a in variables_of(made.invars)) else {*made.outvars}
  first, second = map(source, made.invars)
  is_own = first is second and not isinstance(first, Literal)
  return {*made.outvars} if is_own and is_computed(constant, makers) else set()


def _of_difference(
  second: Atom,
  product: Atom,
  makers: Mapping[Any, JaxprEqn],
  is_sum: Callable[[JaxprEqn], bool],
  source: Source,
  same: Callable[[], Mapping[Any, int]],
) -> set[Var]:
  """The moments of a second one less a product of two first ones; none if it is none."""
  factors = _factors(source(product), makers)
  sums = [source(atom) for atom in (second, *factors)] if factors else []
  made = [None if isinstance(atom, Literal) else makers.get(atom) for atom in sums]
  known = [eqn for eqn in made if eqn is not None and is_sum(eqn)]
  if not known or len(known) < len(made) or all(e.primitive.name == "reduce_sum" for e in known):
    return set()
  matches = _are_moments(*known, makers=makers, source=source, same=same)
  return variables_of(sums) if matches else set()


def _are_moments(
  second: JaxprEqn,
  *firsts: JaxprEqn,
  makers: Mapping[Any, JaxprEqn],
  source: Source,
  same: Callable[[], Mapping[Any, int]],
) -> bool:
  """Whether sums are one of products, ``a * b``, and the same of the factors, of a and of b.

  With the same weights beside them; or a matmul of a and b, and their sums.
  """
  read, *of_firsts = [[*map(source, eqn.invars)] for eqn in (second, *firsts)]
  for n, atom in enumerate(read):
    factors = [*map(source, _factors(atom, makers))]
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


def _chain(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> list[Any]:
  """An operand, and one after the other what it was moved from or is a multiple of."""
  found = [atom]
  while not isinstance(atom, Literal) and (made := makers.get(atom)) is not None:
    if not (before := handed_on(made)):
      break
    (atom,) = before
    found.append(atom)
  return found
