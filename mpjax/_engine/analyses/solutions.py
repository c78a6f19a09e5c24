"""What linear systems and decompositions give, and what is multiplied by that.

``x @ inv(s.T @ s) @ s.T @ y``: an inverse is large where a matrix nearly loses a dimension, and
what is large cancels behind the last of the products. So they all belong to one linear system, and
so does what is multiplied by a solution. Weights that are made so, as orthogonal ones, are those of
a layer; and what multiplies a solution by weights is a layer, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from mpjax._core.primitives import JITTED, SCALES, UNCHANGED
from mpjax._engine.analyses.lookahead import Needs
from mpjax._engine.analyses.origins import handed_on
from mpjax._engine.program import jaxprs
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import Jaxpr, JaxprEqn, Var

STAYS_SOLVED = UNCHANGED | {
  *("neg", "slice", "dynamic_slice", "gather", "select_n", "mul", "div", "add", "sub")
}
"""What makes a solution of one, whatever else it reads."""


class Solutions(NamedTuple):
  """The variables of a jaxpr that belong to linear systems and decompositions.

  Attributes:
    values: What these give, and products of that.
    beside: What is multiplied by such, if it is not made of parameters alone.
  """

  values: Collection[Var] = frozenset()
  beside: Collection[Var] = frozenset()


def solutions(
  inner: Jaxpr,
  solved: Collection[Var],
  weights: Collection[Var],
  is_product: Callable[[JaxprEqn], bool],
  needs: Needs,
) -> Solutions:
  """What belongs to linear systems and decompositions in a jaxpr.

  Args:
    inner: The jaxpr, open.
    solved: What these give, before any matmul, and multiples of it.
    weights: What is made of parameters alone.
    is_product: Whether an equation is a matmul, or a call of a function that holds one.
    needs: Tells where values lead.
  """
  values, beside = {var for var in solved if var not in weights}, set[Var]()
  if not values:  # as nearly always
    return Solutions(solved)
  for eqn in inner.eqns:
    read = variables_of(eqn.invars)
    if values.isdisjoint(read):
      continue
    if eqn.primitive.name in STAYS_SOLVED:
      is_activation = eqn.primitive.name in SCALES and not handed_on(eqn)  # x times a gate of x
      values |= set() if is_activation else {*eqn.outvars}
    elif is_product(eqn) and not any(var in weights for var in read):
      values |= {*eqn.outvars}
      beside |= read
  for eqn in reversed(inner.eqns if beside else []):
    if beside.isdisjoint(eqn.outvars):
      continue
    if eqn.primitive.name in JITTED:
      places = needs.before(eqn, jaxprs.places_of(eqn.outvars, beside))
      beside |= variables_of(eqn.invars[n] for n in places)
    elif needs.passes(eqn.primitive.name):
      beside |= variables_of(eqn.invars)
  return Solutions(values | {*solved}, beside)
