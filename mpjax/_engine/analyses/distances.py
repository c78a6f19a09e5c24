"""Matmuls beside sums of squares of what they multiply: distances, and covariances.

``|x|**2 + |y|**2 - 2 * x @ y``, ``h.T @ h / n - outer(m, m)`` with the means m of h, the diagonal
of ``x @ x.T`` beside that: to a matmul is added, or from it subtracted, what sums up squares of
what it multiplies, or multiplies sums of that. What is left is small beside both. A pool of its
input beside a layer is no such thing, nor is one of its outputs that is subtracted from all.
The squares may stand in the vectors themselves, ``[x, |x|**2, 1] @ [-2 * y, 1, |y|**2]``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import ADDS, CALLS
from mpjax._engine.analyses.origins import Origins
from mpjax._engine.program import matmuls
from mpjax._engine.program.bodies import HAVE_BODIES
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.matmuls import operation
from mpjax._engine.program.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

_SQUARES = frozenset({"mul", "square", "integer_pow"})
_PRODUCTS = _SQUARES | {"pow"}
_LEADS_ON = ADDS | _PRODUCTS | {"div", "sqrt", "max", "abs", "reduce_sum"}

_LOOKS = 32
"""How many equations behind a term are looked at."""

_PRODUCTS_OF_A_SUM = 4
"""How many matmuls a sum has whose terms are looked at: a distance has one or two."""

_EQUATIONS_OF_A_PRODUCT = 8
"""How many equations a function has that is taken for a matmul."""


def beside_their_squares(inner: Jaxpr, origins: Origins, weights: Collection[Var]) -> set[Var]:
  """The matmuls to which sums of products of what they multiply are added, as in a distance.

  Or the diagonal of the matmul itself, which holds such sums.

  Args:
    inner: The jaxpr, open.
    origins: The origins of its values.
    weights: What makes a matmul a layer: parameters, or what gradient steps make of them.
  """
  seen = _Seen(origins, weights)
  for eqn in inner.eqns:
    name = eqn.primitive.name
    if name == "dot_general" or name in CALLS:
      seen.product(eqn)
    elif name in ADDS and seen.products:
      seen.sum(eqn)
    elif name in _SQUARES and seen.products:
      seen.square(eqn)
  return seen.found


def of_bordered(inner: Jaxpr, origins: Origins) -> set[Var]:
  """The matmuls of vectors in which sums of their own squares stand beside them, both of them.

  Distances in one matmul, and the product of a hyperboloid, whose first entry is a root of these.
  In a distance a one stands beside the squares, for those of the other; the product has a sign.
  Without either the squares are features as others are.

  Args:
    inner: The jaxpr, open.
    origins: The origins of its values.
  """
  found = set[Var]()
  for eqn in (eqn for eqn in inner.eqns if eqn.primitive.name == "dot_general"):
    first, second = (_bordered(atom, origins) for atom in eqn.invars)
    if first and second and (first.has_number or second.has_number):
      found |= {*eqn.outvars}
  return found


class _Bordered(NamedTuple):
  """A vector in which sums of its squares stand.

  Attributes:
    has_number: Whether a number stands in it, too, or it is multiplied as a whole, as by signs.
  """

  has_number: bool


def _bordered(atom: Atom, origins: Origins) -> _Bordered | None:
  """What an operand is, if it was put together of a value and of sums of its squares."""
  made, is_signed = origins.maker(atom), False
  if made is not None and made.primitive.name == "mul":
    joined = [eqn for eqn in map(origins.maker, made.invars) if _joins(eqn)]
    made, is_signed = joined[0] if joined else None, True
  if made is None or not _joins(made):
    return None
  parts = origins.of_all(made.invars)
  values = variables_of(parts)
  holds = any(
    before.value in values and before.value is not part and before.is_sum and before.is_square
    for part in values
    for before in _behind(part, origins)
  )
  return _Bordered(is_signed or len(values) < len(parts)) if holds else None


def _joins(eqn: JaxprEqn | None) -> bool:
  return eqn is not None and eqn.primitive.name == "concatenate"


class _Product(NamedTuple):
  """A matmul, or a call of one.

  Attributes:
    result: What it makes.
    operands: What it multiplies, as it was before it was moved.
    is_layer: Whether that has weights.
  """

  result: Var
  operands: tuple[Any, Any]
  is_layer: bool


class _Seen:
  """The matmuls of a jaxpr so far, and what is added to them.

  Attributes:
    products: They, by the sums that they are terms of, a few to a sum.
    found: Those beside the squares of what they multiply.
  """

  def __init__(self, origins: Origins, weights: Collection[Var]) -> None:
    self._origins, self._weights = origins, weights
    self.products: dict[Any, dict[Var, _Product]] = {}
    self.found = set[Var]()
    self._squares: dict[Var, set[Var]] = {}  # of what they multiply, that are added to them

  def product(self, eqn: JaxprEqn) -> None:
    """Notes a matmul, a call of one, or a call that picks entries of one: its diagonal."""
    if operands := _multiplies(eqn, self._origins):
      is_layer = not variables_of(eqn.invars).isdisjoint(self._weights)
      product = _Product(eqn.outvars[0], operands, is_layer)
      self.products[product.result] = {product.result: product}
    elif self.products and len(eqn.invars) == len(eqn.outvars) == 1:
      entries = picked_from(eqn.outvars[0], self._origins)
      whole = [self.products[var] for var in entries if var in self.products]
      self.products |= dict.fromkeys(eqn.outvars, whole[0]) if whole else {}

  def sum(self, eqn: JaxprEqn) -> None:
    """Notes what is added to matmuls, or subtracted."""
    terms = [atom for atom in self._origins.of_all(eqn.invars) if not isinstance(atom, Literal)]
    inside = [self.products.get(atom, {}) for atom in terms]
    for term, others in zip(terms, reversed(inside), strict=True):
      for product in others.values() if term in self._origins.makers else ():
        self._add(product, _squared(term, product, self._origins))
    # A residual stream is a sum of layers, none of which has the squares of anything beside it.
    own = {
      var: product
      for of in inside
      for var, product in of.items()
      if not product.is_layer or self._squares.get(var)
    }
    if 0 < len(own) <= _PRODUCTS_OF_A_SUM:
      self.products[eqn.outvars[0]] = own

  def square(self, eqn: JaxprEqn) -> None:
    """Notes the square of a matmul: less products of squares it is that of an area, or a sine."""
    first, last = (self._origins.of(eqn.invars[n]) for n in (0, -1))
    if first is last and not isinstance(first, Literal) and first in self.products:
      self.products[eqn.outvars[0]] = self.products[first]

  def _add(self, product: _Product, squared: set[Var]) -> None:
    """Adds what a term sums up squares of to what others did; a layer needs those of both."""
    known = self._squares.setdefault(product.result, set())
    known |= squared
    wanted = variables_of(product.operands) if product.is_layer else squared
    if squared and wanted <= known:
      self.found.add(product.result)


def _multiplies(eqn: JaxprEqn, origins: Origins) -> tuple[Any, Any] | None:
  """What a matmul multiplies, or one that a call is of; None of any other call."""
  if eqn.primitive.name == "dot_general":
    first, second = origins.of_all(eqn.invars)
    return first, second
  called = origins.in_call(eqn, eqn.outvars[0]) if len(eqn.outvars) == 1 else None
  if called is None or len(called.origins.makers) > _EQUATIONS_OF_A_PRODUCT:
    return None
  made = called.origins.maker(called.made)
  if made is None or made.primitive.name != "dot_general":
    return None
  read = [called.outside.get(var) for var in variables_of(called.origins.of_all(made.invars))]
  return (read[0], read[-1]) if read and None not in read else None


def _squared(term: Var, product: _Product, origins: Origins) -> set[Var]:
  """Of which of the values that a matmul multiplies a term sums up squares, or multiplies sums.

  Of a layer no sums of what it multiplies: a pool of its input, and of its weights, is no moment;
  and of both the squares: a distance from codes. Entries of a product are its diagonal if it is
  one of a value with itself.
  """
  first, second = product.operands
  multiplied, sides = variables_of(product.operands), set[tuple[int, int]]()
  found = set[Var]()
  for before in _behind(term, origins):
    if before.is_entry and before.value is product.result and first is second:
      found |= multiplied
    elif before.value in multiplied:
      if before.is_sum and before.is_square:
        found.add(before.value)
      if before.factor and before.is_mean and not product.is_layer:
        node, side = before.factor
        sides.add((node, side))
        found |= {before.value} if (node, 1 - side) in sides else set()
  return found


def holds_lengths(divisor: Atom, matmul: JaxprEqn, origins: Origins) -> bool:
  """Whether sums of squares of what a matmul multiplies stand behind what it is divided by."""
  term, operands = origins.of(divisor), _multiplies(matmul, origins)
  if isinstance(term, Literal) or operands is None:
    return False
  return bool(_squared(term, _Product(matmul.outvars[0], operands, is_layer=False), origins))


def picked_from(value: Var, origins: Origins) -> set[Var]:
  """What a value holds entries of, or a call of a function that picks them gives: a diagonal."""
  return {before.value for before in _behind(value, origins) if before.is_entry}


class _Before(NamedTuple):
  """What stands behind a term.

  Attributes:
    value: It.
    is_sum: Whether what is made of it is summed up on the way to the term.
    is_square: Whether it, or what is made of it, is squared on the way.
    factor: Of which product on the way it makes a factor, the last one, and which.
    is_mean: Whether that factor is a sum of it.
    is_entry: Whether entries of it are picked last.
  """

  value: Var
  is_sum: bool = False
  is_square: bool = False
  factor: tuple[int, int] | None = None
  is_mean: bool = False
  is_entry: bool = False

  def within(self, result: _Before, value: Var) -> _Before:
    """The same of an operand of a call, behind whose result this stands in its body."""
    return _Before(
      value,
      self.is_sum or result.is_sum,
      self.is_square or result.is_square,
      self.factor or result.factor,
      self.is_mean if self.factor else result.is_mean or bool(result.factor and self.is_sum),
      self.is_entry,
    )


def _behind(term: Var, origins: Origins) -> Iterator[_Before]:
  """What sums, products, quotients and roots make a term of, in the bodies of calls, too."""
  waiting = [_Before(term)]
  for _ in range(_LOOKS):
    if not waiting:
      return
    yield (before := waiting.pop())
    if (made := origins.makers.get(before.value)) is None:
      continue
    name, read = operation(made), origins.of_all(made.invars)
    read = read[:1] if name == "pow" else read  # to a power that is a number
    is_inner = name == "dot_general" and matmuls.is_inner(made)
    if name == "dot_general" and any(isinstance(atom, Literal) for atom in read):
      name = "reduce_sum"  # by a vector of ones
    if name in HAVE_BODIES:
      waiting += _behind_call(made, before, origins)
    elif name == "gather":
      waiting += [before._replace(value=var, is_entry=True) for var in variables_of(read[:1])]
    elif is_inner or name in _LEADS_ON:
      if is_inner or name == "reduce_sum":
        before = before._replace(is_sum=True, is_mean=before.factor is not None)
      if is_inner or name in _PRODUCTS:
        waiting += _factors_of(before, made, read)
      else:
        waiting += [before._replace(value=var, is_entry=False) for var in variables_of(read)]


def _factors_of(product: _Before, made: JaxprEqn, read: Sequence[Any]) -> list[_Before]:
  """What stands behind the factors of a product, a square among them."""
  pairs = [(n, var) for n, var in enumerate(read) if not isinstance(var, Literal)]
  if len(pairs) == 2 and pairs[0][1] is not pairs[1][1]:
    return [_Before(v, product.is_sum, product.is_square, (id(made), n)) for n, v in pairs]
  is_square = product.is_square or len(pairs) == len(read)  # and not times a mask
  return [product._replace(value=v, is_square=is_square, is_entry=False) for _, v in pairs[:1]]


def _behind_call(eqn: JaxprEqn, result: _Before, origins: Origins) -> list[_Before]:
  """What of its operands stands behind the result of a call; nothing behind that of a loop."""
  called = origins.in_call(eqn, result.value)
  if called is None or isinstance(called.made, Literal):
    return []
  found = [
    (own, called.outside[own.value])
    for own in _behind(called.made, called.origins)
    if own.value in called.outside
  ]
  return [own.within(result, value) for own, value in found if not isinstance(value, Literal)]
