"""Second moments that the product of first ones is subtracted from: variances and covariances.

``conv(x * x, k) - conv(x, k) ** 2``, ``p @ z**2 - (p @ z) ** 2``: what is left is small beside
both, smaller than what 16 bits round of either, and a variance comes out negative. So does the
square of a distance, see `distances`. Either may be divided by the mass of its weights, or cut from
one sum of both. Where the sums are matmuls or convolutions, these are float32; those of operands
that are narrow already multiply in 16 bits, but return float32, and so does their derivative: what
comes back to x by way of the product and of ``|x|**2`` is a small difference, too. The same holds
of a matmul that a constant is subtracted from which it is near:
``1 - a @ b.T`` of unit vectors, ``w.T @ w - eye(n)``, and of one whose arc cosine is taken.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import ADDS, BOUNDS, CUTS, JITTED, SCALES
from mpjax._engine.analyses.distances import (
  beside_their_squares,
  holds_lengths,
  of_bordered,
  picked_from,
)
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.analyses.made_of import is_computed
from mpjax._engine.analyses.origins import Origins, handed_on
from mpjax._engine.analyses.recomputed import computed_again, same_values
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.matmuls import operation
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var


class Moments(NamedTuple):
  """The variables of a jaxpr that are moments.

  Attributes:
    values: Those of which one is subtracted from another.
    derivatives: Matmuls that are tangents or cotangents of such, of derivatives taken inside.
  """

  values: frozenset[Var] = frozenset()
  derivatives: frozenset[Var] = frozenset()


def moments(
  frame: Frame,
  outs: Collection[int],
  is_sum: Callable[[JaxprEqn], bool],
  weights: Collection[Var],
) -> Moments:
  """The moments of a jaxpr of which one is subtracted from another.

  Args:
    frame: The frame of the jaxpr.
    outs: Which of its results are such moments outside.
    is_sum: Whether an equation adds up: a sum, a matmul, or a function that holds one.
    weights: What is made of parameters alone, or of gradient steps from these.
  """
  search, inner = _Search(frame, is_sum, weights), frame.inner
  found = variables_of(inner.outvars[n] for n in outs) if outs else set()
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name == "sub"]:
    for second, product in (eqn.invars, eqn.invars[::-1]):
      found |= search.of_difference(second, product)
      found |= search.near_constant(second, product)
  for eqn in [eqn for eqn in inner.eqns if eqn.primitive.name in _STEEP_NEAR_ONE]:
    found |= search.of_unit_vectors(eqn.invars[0])
  found |= beside_their_squares(inner, search.origins, weights)
  found |= of_bordered(inner, search.origins)
  if not found:
    return Moments()
  found |= computed_again(search.same, found)  # which rounds as they do
  values = frozenset(variables_of(v for var in found for v in frame.back(var, handed_on)))
  return Moments(values, search.derivatives(values))


_MASSES = 2
"""By how many masses a value may be divided, one after the other."""


class _Search:
  """Looks for moments in a jaxpr; its arguments are those of `moments`.

  Attributes:
    origins: The origins of its values.
  """

  def __init__(
    self, frame: Frame, is_sum: Callable[[JaxprEqn], bool], weights: Collection[Var]
  ) -> None:
    self._frame, self._is_sum, self._weights = frame, is_sum, weights
    self.origins = Origins(frame)

  def derivatives(self, values: Collection[Var]) -> frozenset[Var]:
    """The matmuls of what moments multiply with tangents of it, or with cotangents of them."""
    shapes: dict[Any, set[tuple[str, ...]]] = {}  # of the moments so far that multiply a value
    found, is_backward = set[Var](), self._frame.is_backward
    for eqn in (eqn for eqn in self._frame.inner.eqns if eqn.primitive.name == "dot_general"):
      result = eqn.outvars[0]
      for value, other in (eqn.invars, eqn.invars[::-1]):
        for var in variables_of([self.origins.of(value)]):
          if result in values:
            shapes.setdefault(var, set()).add(_sorted_shape(result))
          elif var in shapes and variables_of([other]).isdisjoint(self._weights):
            like = other if is_backward(eqn) else result
            is_inside = is_backward(eqn) or "jvp(" in str(eqn.source_info.name_stack)
            found |= {result} if is_inside and _sorted_shape(like) in shapes[var] else set()
    return frozenset(found)

  def near_constant(self, constant: Atom, value: Atom) -> set[Var]:
    """A matmul less one or the identity, or of a value with itself less another computed matrix.

    Or entries of it, as its diagonal. One less than what a layer gives is as far from it as any.
    """
    number = self.origins.of(constant)
    is_number = isinstance(number, Literal)
    if is_number and not any(abs(abs(number.val) - whole) <= _NEAR for whole in (1, 2)):
      return set()
    if not is_number and len({*jaxprs.shape(constant)[-2:]}) != 1:  # no square matrix
      return set()
    factors = self.origins.of_all(_factors(self.origins.maker(value)))
    if factors and factors[0] is factors[1]:  # of a cosine, for its sine
      value = factors[0]
    made = self._product_behind(value) if is_number else self.origins.maker(value)
    if made is not None and made.primitive.name in _PICKS:
      found = map(self.origins.maker, picked_from(self.origins.of(value), self.origins))
      made = next((eqn for eqn in found if eqn is not None), None)
    if made is None or made.primitive.name != "dot_general":
      return set()
    if is_number:
      return self._unless_layer(made)
    if not is_computed(constant, self.origins.makers):
      return set()
    first, second = self.origins.of_all(made.invars)
    is_own = first is second and not isinstance(first, Literal)
    return (
      {*made.outvars} if is_own else self._unless_layer(made) if self._is_mask(constant) else set()
    )

  def _is_mask(self, constant: Atom) -> bool:
    """Whether a matrix was made of truths, as the identity is."""
    made = self._frame.maker(constant)
    return (
      made is not None
      and made.primitive.name == "convert_element_type"
      and jaxprs.kind(made.invars[0]) == "b"
    )

  def of_unit_vectors(self, value: Atom) -> set[Var]:
    """A matmul that an angle is taken of, clipped or not: that is steep where vectors are near."""
    made = self._product_behind(value)
    return self._unless_layer(made) if made and made.primitive.name == "dot_general" else set()

  def _product_behind(self, value: Atom) -> JaxprEqn | None:
    """What makes a value, before it was clipped, and divided by lengths of what is multiplied."""
    made, divisors = self.origins.maker(value), list[Atom]()
    for _ in range(_CLIPS):
      if made is not None and made.primitive.name == "div":
        divisors.append(made.invars[1])
        made = self.origins.maker(made.invars[0])
      elif made is not None and _clips(made):
        made = self.origins.maker(next((a for a in made.invars if jaxprs.shape(a)), value))
    if made is None or made.primitive.name != "dot_general":
      return None if divisors else made
    is_cosine = all(holds_lengths(divisor, made, self.origins) for divisor in divisors)
    return made if is_cosine else None

  def _unless_layer(self, made: JaxprEqn) -> set[Var]:
    """What a matmul makes that has no weights."""
    return {*made.outvars} if variables_of(made.invars).isdisjoint(self._weights) else set()

  def of_difference(self, second: Atom, product: Atom) -> set[Var]:
    """The moments of a second one less a product of two first ones; none if it is none.

    Each may have been divided by a mass, be it before or behind the product.
    """
    products = [_factors(made) for made in self._undivided(product)]
    seconds = self._sums_of(second) if any(products) else []
    for factors in filter(None, products if seconds else []):
      firsts = [self._sums_of(factor) for factor in factors]
      for sums in itertools.product(seconds, *firsts):
        has_matmul = any(eqn.primitive.name != "reduce_sum" for eqn in sums)
        if has_matmul and (found := self._of_sums(*sums, most=_AXES)):
          return found
    return set()

  def _sums_of(self, value: Atom) -> list[JaxprEqn]:
    """The sums that a value may be, but for masses that it was divided by."""
    return [made for made in self._undivided(value) if self._is_sum(made)]

  def _undivided(self, value: Atom, most: int = _MASSES) -> list[JaxprEqn]:
    """The equations that make a value, and what it was before masses divided it, or it was cut."""
    made = self.origins.maker(value)
    if made is None or not most or operation(made) not in SCALES | CUTS:
      return [] if made is None else [made]
    pairs = [(a, [b for b in made.invars if b is not a]) for a in made.invars]
    pairs = pairs if operation(made) == "mul" else pairs[:1]
    read = [a for a, others in pairs if operation(made) in CUTS or all(map(self._is_mass, others))]
    return [made, *(before for atom in read for before in self._undivided(atom, most - 1))]

  def _is_mass(self, value: Atom) -> bool:
    """Whether a value is a sum, or one of ones, be it bounded, inverted or squared; or is given."""
    for _ in range(_CLIPS):
      made = self.origins.maker(value)
      if made is None:
        return True
      if made.primitive.name == "dot_general":
        return any(self._frame.number(atom) == 1 for atom in made.invars)
      read = [atom for atom in made.invars if not isinstance(self.origins.of(atom), Literal)]
      if made.primitive.name not in _MAKE_MASSES or len(read) != 1:
        return made.primitive.name == "reduce_sum"
      (value,) = read
    return False

  def _of_sums(self, second: JaxprEqn, *firsts: JaxprEqn, most: int) -> set[Var]:
    """What sums make if they are one of products, ``a * b``, and the same of a and of b.

    With the same weights beside them; or a matmul of a and b, and their sums. Or sums of such sums,
    as along one axis after the other.
    """
    read, *of_firsts = [self.origins.of_all(eqn.invars) for eqn in (second, *firsts)]
    made = {var for eqn in (second, *firsts) for var in eqn.outvars}
    for n, atom in enumerate(read):
      weights = [other for m, other in enumerate(read) if m != n]
      for part in self._parts(atom):
        factors = self.origins.of_all(_factors(self.origins.maker(part)))
        if factors and self._match(factors, of_firsts, weights):
          return made
      inner = [self.origins.maker(own[n]) for own in (read, *of_firsts) if n < len(own)]
      known = [eqn for eqn in inner if eqn is not None and self._is_sum(eqn)]
      is_nested = (
        most > 1
        and len(known) == 1 + len(firsts)
        and all(self._is_same_in(weight, own) for weight in weights for own in of_firsts)
      )
      if is_nested and (found := self._of_sums(*known, most=most - 1)):
        return made | found
    sums = all(len(own) == 1 for own in of_firsts)
    return made if sums and len(read) == 2 and self._match(read, of_firsts, []) else set()

  def _match(
    self, factors: Sequence[Any], of_firsts: Sequence[Sequence[Any]], weights: Sequence[Any]
  ) -> bool:
    """Whether each of two sums is of one of two factors, and has all the weights."""
    return any(
      all(
        any(_is_in(factor, self._parts(x)) for x in own)
        and all(self._is_same_in(x, own) for x in weights)
        for factor, own in zip(pair, of_firsts, strict=True)
      )
      for pair in (factors, factors[::-1])
    )

  def _parts(self, value: Any) -> list[Any]:
    """A value, and what was put together to it: moments of both orders may be one matmul."""
    made = self.origins.maker(value)
    if made is None or made.primitive.name != "concatenate":
      return [value]
    return [value, *self.origins.of_all(made.invars)]

  def _is_same_in(self, value: Any, own: Sequence[Any]) -> bool:
    """Whether a value is among the operands of a sum, or what is computed of the same things is."""
    if _is_in(value, own) or isinstance(value, Literal):
      return _is_in(value, own)
    return self.same[value] in map(self.same.get, variables_of(own))

  @functools.cached_property
  def same(self) -> Mapping[Any, int]:
    """Numbers of its values, equal for equal ones."""
    return same_values(self._frame.inner)


def _clips(made: JaxprEqn) -> bool:
  """Whether an equation keeps values within bounds, or calls what does nothing else."""
  if made.primitive.name in JITTED:
    inner = versions.open_jaxpr(bodies_of(made)[0].jaxpr)
    names = {eqn.primitive.name for eqn in inner.eqns}
    return names <= BOUNDS | _CHOOSE and not BOUNDS.isdisjoint(names)
  return made.primitive.name in BOUNDS


_MAKE_MASSES = ADDS | SCALES | BOUNDS | {"integer_pow", "square"}
_PICKS = JITTED | {"gather"}
_CHOOSE = frozenset(
  {"gt", "eq", "lt", "select_n", "broadcast_in_dim", "convert_element_type", "div"}
)
"""What bounds and their derivatives are made of beside."""
_STEEP_NEAR_ONE = frozenset({"acos", "asin", "atanh", "one_minus_square"})
_AXES = 4
"""Along how many axes one after the other sums may be taken."""
_CLIPS = 4
"""How many bounds and divisors a value may have, and makers a mass, one after the other."""
_NEAR = 0.01
"""So near one, or two, a number is meant as it: ``1 + 1e-4 - a @ b.T``."""


def _sorted_shape(atom: Atom) -> tuple[str, ...]:
  return tuple(sorted(map(str, jaxprs.shape(atom))))


def _is_in(value: Any, own: Sequence[Any]) -> bool:
  """Whether a value is among the operands of a sum."""
  if isinstance(value, Literal):
    return any(isinstance(x, Literal) and x.val == value.val for x in own)
  return value in variables_of(own)


def _factors(made: JaxprEqn | None) -> list[Any]:
  """The two values that an equation multiplies; none if it multiplies no two."""
  if made is None:
    return []
  name = operation(made)
  if name == "square" or (name == "integer_pow" and made.params["y"] == 2):
    return [made.invars[0]] * 2
  return list(made.invars) if name == "mul" else []
