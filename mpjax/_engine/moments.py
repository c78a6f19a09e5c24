"""Second moments that the product of first ones is subtracted from: variances and covariances.

``conv(x * x, k) - conv(x, k) ** 2``, ``p @ z**2 - (p @ z) ** 2``, ``h.T @ h / n - outer(m, m)``:
what is left is small beside both, smaller than what 16 bits round of either, and a variance comes
out negative. So does the square of a distance, ``|x|**2 + |y|**2 - 2 * x @ y``. The law: to a
matmul is added, or from it subtracted, what is computed of the same values by products and sums
alone. Where the sums are matmuls or convolutions, these are float32; those of operands that are
narrow already multiply in 16 bits, but return float32, and so does their derivative: what comes
back to x by way of the product and of ``|x|**2`` is a small difference, too. The same holds of a
matmul that a constant is subtracted from which it is near: ``1 - a @ b.T`` of unit vectors,
``w.T @ w - eye(n)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import UNCHANGED
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.jaxprs import operation, variables_of
from mpjax._engine.made_of import is_computed
from mpjax._engine.recomputed import same_values
from mpjax._engine.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

Source = Callable[[Atom], Any]
"""Tells what an operand was moved from, or is a multiple of."""

_MOVED = UNCHANGED | {"neg", "slice", "dynamic_slice"}
_SCALED = frozenset({"mul", "div"})
_ADDS = frozenset({"add", "sub"})
_PRODUCTS = frozenset({"mul", "square", "integer_pow"})
_LEADS_ON = _ADDS | _PRODUCTS | {"div", "sqrt", "max", "reduce_sum"}

_LOOKS = 64
"""How many equations behind a term are looked at."""


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
  pure: Collection[Var],
) -> Moments:
  """The moments of a jaxpr of which one is subtracted from another.

  Args:
    inner: The jaxpr, open.
    makers: Its equations, by what they make.
    outs: Which of its results are such moments outside.
    is_sum: Whether an equation adds up: a sum, a matmul, or a function that holds one.
    pure: What is made of parameters alone.
  """
  found = variables_of(inner.outvars[n] for n in outs) if outs else set()
  same = functools.cache(functools.partial(same_values, inner))
  source = _source_in(inner)
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name == "sub"]:
    for second, product in (eqn.invars, eqn.invars[::-1]):
      found |= _of_difference(second, product, makers, is_sum, source, same)
      found |= _near_constant(second, product, makers, source, pure)
  found |= _beside_their_own(inner, makers, source, pure)
  if not found:
    return Moments()
  values = frozenset(var for start in found for var in _chain(start, makers))
  return Moments(values, _derivatives(inner, values, source, pure))


def _source_in(inner: Jaxpr) -> Source:
  """What tells in a jaxpr what an operand was moved from, or is a multiple of."""
  known: dict[Any, Any] = {}
  for eqn in inner.eqns:
    before = eqn.invars[:1] if eqn.primitive.name in _MOVED else _multiplied(eqn)
    for atom in before:
      known[eqn.outvars[0]] = atom if isinstance(atom, Literal) else known.get(atom, atom)
  return lambda atom: atom if isinstance(atom, Literal) else known.get(atom, atom)


def _multiplied(eqn: JaxprEqn) -> list[Atom]:
  """What an equation multiplies by a single number or divides by one; none if it does not."""
  name = eqn.primitive.name
  if name not in _SCALED:
    return []
  read = [atom for atom in eqn.invars if jaxprs.shape(atom)]
  return read if len(read) == 1 and (name == "mul" or read[0] is eqn.invars[0]) else []


def _beside_their_own(
  inner: Jaxpr, makers: Mapping[Any, JaxprEqn], source: Source, pure: Collection[Var]
) -> set[Var]:
  """The matmuls to which sums of products of what they multiply are added, as in a distance.

  Or the diagonal of the matmul itself, which holds such sums.
  """
  products: dict[Any, set[Var]] = {}  # by the sums that they are terms of
  layers, found = set[Var](), set[Var]()
  for eqn in inner.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      products[eqn.outvars[0]] = {*eqn.outvars}
      is_layer = not variables_of(eqn.invars).isdisjoint(pure)
      layers |= {*eqn.outvars} if is_layer else set()
    elif name in _ADDS and products:
      terms = [source(atom) for atom in eqn.invars]
      terms = [atom for atom in terms if not isinstance(atom, Literal)]
      inside = [products.get(atom, set[Var]()) for atom in terms]
      for term, others in zip(terms, reversed(inside), strict=True):
        if others and term in makers:
          found |= {var for var in others if _is_of_the_same(term, makers[var], makers, source)}
      if own := set[Var]().union(*inside) - layers:  # a residual stream is a sum of layers
        products[eqn.outvars[0]] = own
  return found


def _is_of_the_same(
  term: Var, product: JaxprEqn, makers: Mapping[Any, JaxprEqn], source: Source
) -> bool:
  """Whether sums of products of what a matmul multiplies make a term, and nothing else does so."""
  multiplied = variables_of(map(source, product.invars))
  for before in _behind(term, makers, source):
    if before.value in (multiplied if before.is_sum and before.is_product else ()):
      return True
    if before.is_entry and before.value is product.outvars[0]:
      return True
  return False


class _Before(NamedTuple):
  """What stands behind a term.

  Attributes:
    value: It.
    is_sum: Whether what it is made to is summed up on the way to the term.
    is_product: Whether it, or that, is multiplied with another on the way.
    is_entry: Whether entries of it are picked last.
  """

  value: Var
  is_sum: bool = False
  is_product: bool = False
  is_entry: bool = False


def _behind(term: Var, makers: Mapping[Any, JaxprEqn], source: Source) -> Iterator[_Before]:
  """What sums, products, quotients and roots make a term of, in the bodies of calls, too."""
  waiting = [_Before(term)]
  for _ in range(_LOOKS):
    if not waiting:
      return
    yield (before := waiting.pop())
    if (made := makers.get(before.value)) is None:
      continue
    name, read = operation(made), made.invars
    is_inner = name == "dot_general" and jaxprs.is_inner(made)
    if name in HAVE_BODIES:
      waiting += _behind_call(made, before, source)
    elif name == "gather":
      waiting += [before._replace(value=var, is_entry=True) for var in _sources(read[:1], source)]
    elif is_inner or name in _LEADS_ON:
      is_sum = before.is_sum or is_inner or name == "reduce_sum"
      is_product = before.is_product or is_inner or name in _PRODUCTS
      waiting += [_Before(var, is_sum, is_product) for var in _sources(read, source)]


def _sources(atoms: Sequence[Atom], source: Source) -> set[Var]:
  return variables_of(map(source, atoms))


def _behind_call(eqn: JaxprEqn, result: _Before, around: Source) -> list[_Before]:
  """What of its operands stands behind the result of a call; nothing behind that of a loop."""
  *_, body = bodies_of(eqn)  # of a choice the one that runs everywhere else
  inner = versions.open_jaxpr(body.jaxpr)
  made = inner.outvars[eqn.outvars.index(result.value)] if not body.carry else None
  if made is None or isinstance(made, Literal):
    return []
  read, source = body.take(eqn.invars), _source_in(inner)
  outside = dict(zip(inner.invars, read, strict=True))
  return [
    _Before(
      around(outside[own.value]),
      result.is_sum or own.is_sum,
      result.is_product or own.is_product,
      own.is_entry,
    )
    for own in _behind(source(made), jaxprs.makers_of(inner), source)
    if own.value in outside and not isinstance(around(outside[own.value]), Literal)
  ]


def _derivatives(
  inner: Jaxpr, values: Collection[Var], source: Source, pure: Collection[Var]
) -> frozenset[Var]:
  """The matmuls of what moments multiply with tangents of it, or with cotangents of them."""
  sizes: dict[Any, set[int]] = {}  # of the moments so far that multiply a value
  found = set[Var]()
  for eqn in (eqn for eqn in inner.eqns if eqn.primitive.name == "dot_general"):
    result = eqn.outvars[0]
    for value, other in (eqn.invars, eqn.invars[::-1]):
      for var in variables_of([source(value)]):
        if result in values:
          sizes.setdefault(var, set()).add(jaxprs.size(result))
        elif variables_of([other]).isdisjoint(pure):
          sized = {jaxprs.size(other), jaxprs.size(result)}
          found |= set() if sized.isdisjoint(sizes.get(var, ())) else {result}
  return frozenset(found)


def _near_constant(
  constant: Atom,
  value: Atom,
  makers: Mapping[Any, JaxprEqn],
  source: Source,
  pure: Collection[Var],
) -> set[Var]:
  """A matmul less one, or of a value with itself less a matrix that the program computes.

  Or entries of it, as its diagonal. One less than what a layer gives is as far from it as any.
  """
  number = source(constant)
  is_number = isinstance(number, Literal)
  if isinstance(value, Literal) or (is_number and abs(number.val) != 1):
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
    return set() if any(a in pure for a in variables_of(made.invars)) else {*made.outvars}
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
    before = made.invars[:1] if made.primitive.name in _MOVED else _multiplied(made)
    if not before:
      break
    (atom,) = before
    found.append(atom)
  return found
