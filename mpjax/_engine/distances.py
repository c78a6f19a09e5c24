"""Matmuls beside sums of squares of what they multiply: distances, and covariances.

``|x|**2 + |y|**2 - 2 * x @ y``, ``h.T @ h / n - outer(m, m)`` with the means m of h, the diagonal
of ``x @ x.T`` beside that: to a matmul is added, or from it subtracted, what sums up squares of
what it multiplies, or multiplies sums of that. What is left is small beside both. A pool of its
input beside a layer is no such thing, nor is one of its outputs that is subtracted from all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import UNCHANGED, Trait, having
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import HAVE_BODIES, made_in
from mpjax._engine.jaxprs import operation, variables_of
from mpjax._engine.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

Source = Callable[[Atom], Any]
"""Tells what an operand was moved from, or is a multiple of."""

_MOVED = UNCHANGED | {"neg", "slice", "dynamic_slice"}
_SCALED = frozenset({"mul", "div"})
_HANDS_ON = _MOVED | _SCALED
_ADDS = frozenset({"add", "sub"})
_PRODUCTS = frozenset({"mul", "square", "integer_pow", "pow"})
_LEADS_ON = _ADDS | _PRODUCTS | {"div", "sqrt", "max", "abs", "reduce_sum"}
_CALLS = having(Trait.JIT | Trait.REMAT)

_LOOKS = 32
"""How many equations behind a term are looked at."""

_PRODUCTS_OF_A_SUM = 4
"""How many matmuls a sum has whose terms are looked at: a distance has one or two."""

_EQUATIONS_OF_A_PRODUCT = 8
"""How many equations a function has that is taken for a matmul."""


def source_in(inner: Jaxpr) -> Source:
  """What tells in a jaxpr what an operand was moved from, or is a multiple of.

  Of a part that is cut twice, what was cut first.
  """
  known: dict[Any, Any] = {}
  parts: dict[Any, Var] = {}
  for eqn in inner.eqns:
    if eqn.primitive.name not in _HANDS_ON:  # most; this is asked of every equation
      continue
    for atom in handed_on(eqn):
      before = atom if isinstance(atom, Literal) else known.get(atom, atom)
      if eqn.primitive.name == "slice" and not isinstance(before, Literal):
        place = before, *(eqn.params[key] for key in ("start_indices", "limit_indices", "strides"))
        before = parts.setdefault(place, eqn.outvars[0])
      known[eqn.outvars[0]] = before
  return lambda atom: atom if isinstance(atom, Literal) else known.get(atom, atom)


def handed_on(eqn: JaxprEqn) -> list[Atom]:
  """What an equation moves, or multiplies by a number; none if it does something else."""
  return eqn.invars[:1] if eqn.primitive.name in _MOVED else _multiplied(eqn)


def _multiplied(eqn: JaxprEqn) -> list[Atom]:
  """What an equation multiplies by a single number or divides by one; none if it does not."""
  name = eqn.primitive.name
  if name not in _SCALED:
    return []
  read: list[Any] = [atom for atom in eqn.invars if getattr(atom.aval, "shape", ())]
  return read if len(read) == 1 and (name == "mul" or read[0] is eqn.invars[0]) else []


class _Product(NamedTuple):
  """A matmul, or a call of one.

  Attributes:
    result: What it makes.
    operands: What it multiplies, as it was before it was moved.
    is_layer: Whether that has weights: parameters, or what gradient steps make of them.
  """

  result: Var
  operands: tuple[Any, Any]
  is_layer: bool


def beside_their_squares(
  inner: Jaxpr, makers: Mapping[Any, JaxprEqn], source: Source, weights: Collection[Var]
) -> set[Var]:
  """The matmuls to which sums of products of what they multiply are added, as in a distance.

  Or the diagonal of the matmul itself, which holds such sums.
  """
  products: dict[Any, dict[Var, _Product]] = {}  # by the sums that they are terms of, a few
  squares: dict[Var, set[Var]] = {}  # of what they multiply, that are terms of these sums
  found = set[Var]()
  for eqn in inner.eqns:
    name = eqn.primitive.name
    if name == "dot_general" or name in _CALLS:
      if operands := _multiplies(eqn, source):
        is_layer = not variables_of(eqn.invars).isdisjoint(weights)
        product = _Product(eqn.outvars[0], operands, is_layer)
        products[product.result] = {product.result: product}
      elif products and len(eqn.invars) == 1 and len(eqn.outvars) == 1:
        entries = {
          b.value for b in _behind_call(eqn, _Before(eqn.outvars[0]), source) if b.is_entry
        }
        whole = [products[var] for var in entries if var in products]  # of which this is a diagonal
        products |= dict.fromkeys(eqn.outvars, whole[0]) if whole else {}
    elif name in _ADDS and products:
      terms = [source(atom) for atom in eqn.invars]
      terms = [atom for atom in terms if not isinstance(atom, Literal)]
      inside = [products.get(atom, {}) for atom in terms]
      for term, others in zip(terms, reversed(inside), strict=True):
        if others and term in makers:
          for product in others.values():
            squared = _squared(term, product, makers, source)
            squares.setdefault(product.result, set()).update(squared)
            of = variables_of(product.operands) if product.is_layer else squared
            found |= {product.result} if squared and of <= squares[product.result] else set()
      # A residual stream is a sum of layers, none of which has the squares of anything beside it.
      own = {
        var: product
        for of in inside
        for var, product in of.items()
        if not product.is_layer or squares.get(var)
      }
      if 0 < len(own) <= _PRODUCTS_OF_A_SUM:
        products[eqn.outvars[0]] = own
  return found


def _multiplies(eqn: JaxprEqn, source: Source) -> tuple[Any, Any] | None:
  """What a matmul multiplies, or one that a call is of; None of any other call."""
  if eqn.primitive.name == "dot_general":
    first, second = map(source, eqn.invars)
    return first, second
  if len(eqn.outvars) != 1:
    return None
  body, result = made_in(eqn, eqn.outvars[0])
  inner = versions.open_jaxpr(body.jaxpr)
  if result is None or len(inner.eqns) > _EQUATIONS_OF_A_PRODUCT:
    return None
  within = source_in(inner)
  makers = jaxprs.makers_of(inner)
  makes = [makers[var] for var in variables_of([within(result)]) if var in makers]
  if not makes or makes[0].primitive.name != "dot_general":
    return None
  outside = dict(zip(inner.invars, map(source, body.take(eqn.invars)), strict=True))
  read = [outside.get(var) for var in variables_of(map(within, makes[0].invars))]
  return (read[0], read[-1]) if read and None not in read else None


def _squared(
  term: Var, product: _Product, makers: Mapping[Any, JaxprEqn], source: Source
) -> set[Var]:
  """Of which of the values that a matmul multiplies a term sums up squares, or multiplies sums.

  Of a layer no sums of what it multiplies: a pool of its input, and of its weights, is no moment;
  and of both the squares: a distance from codes. Entries of a product are its diagonal if it is
  one of a value with itself.
  """
  first, second = product.operands
  multiplied, sides = variables_of(product.operands), set[tuple[int, int]]()
  found = set[Var]()
  for before in _behind(term, makers, source):
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


def _behind(term: Var, makers: Mapping[Any, JaxprEqn], source: Source) -> Iterator[_Before]:
  """What sums, products, quotients and roots make a term of, in the bodies of calls, too."""
  waiting = [_Before(term)]
  for _ in range(_LOOKS):
    if not waiting:
      return
    yield (before := waiting.pop())
    if (made := makers.get(before.value)) is None:
      continue
    name, read = operation(made), [*map(source, made.invars)]
    read = read[:1] if name == "pow" else read  # to a power that is a number
    is_inner = name == "dot_general" and jaxprs.is_inner(made)
    if name == "dot_general" and any(isinstance(atom, Literal) for atom in read):
      name = "reduce_sum"  # by a vector of ones
    if name in HAVE_BODIES:
      waiting += _behind_call(made, before, source)
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


def _behind_call(eqn: JaxprEqn, result: _Before, around: Source) -> list[_Before]:
  """What of its operands stands behind the result of a call; nothing behind that of a loop."""
  body, made = made_in(eqn, result.value)
  if made is None:
    return []
  inner = versions.open_jaxpr(body.jaxpr)
  outside = dict(zip(inner.invars, map(around, body.take(eqn.invars)), strict=True))
  source = source_in(inner)
  makers = jaxprs.makers_of(inner)
  found = [own for var in variables_of([source(made)]) for own in _behind(var, makers, source)]
  pairs = [(own, outside[own.value]) for own in found if own.value in outside]
  return [own.within(result, value) for own, value in pairs if not isinstance(value, Literal)]
