"""What linear systems and decompositions give, and what is multiplied by that.

``x @ inv(s.T @ s) @ s.T @ y``: an inverse is large where a matrix nearly loses a dimension, and
what is large cancels behind the last of the products. So they all belong to one linear system, and
so does what is multiplied by a solution. Weights that are made so, as orthogonal ones, are those of
a layer, as is what multiplies a solution by weights. Eigenvectors are no larger than one: only what
is scaled by their eigenvalues is a solution in this sense, ``(v * w**-0.5) @ v.T``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from mpjax._core.primitives import JITTED, MATMULS, SCALES, Trait, having
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.lookahead import Needs
from mpjax._engine.analyses.made_of import STAYS_SOLVED
from mpjax._engine.analyses.origins import handed_on
from mpjax._engine.program import jaxprs
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import Jaxpr, JaxprEqn, Var


class Solutions(NamedTuple):
  """The variables of a jaxpr that belong to linear systems and decompositions.

  Attributes:
    values: What these give, and products of what may be large of it.
    beside: What is multiplied by such, if it is not made of parameters alone.
  """

  values: Collection[Var] = frozenset()
  beside: Collection[Var] = frozenset()


def solutions(
  inner: Jaxpr,
  solved: Collection[Var],
  given: Collection[Var],
  weights: Collection[Var],
  contents: Contents,
  needs: Needs,
) -> Solutions:
  """What belongs to linear systems and decompositions in a jaxpr.

  Args:
    inner: The jaxpr, open.
    solved: What these give, before any matmul, and multiples of it.
    given: Which operands belong to such outside.
    weights: What is made of parameters alone.
    contents: Tells what functions hold that are called.
    needs: Tells where values lead.
  """
  if not (solved or given):  # as nearly always
    return Solutions()
  values, beside, of = {*given}, set[Var](), {*solved}
  for eqn in inner.eqns:
    read, name = variables_of(eqn.invars), eqn.primitive.name
    if name in SCALES and len(read) == 2 and read <= of:
      is_large = not read.isdisjoint(solved)  # vectors times a function of their values
    elif name in STAYS_SOLVED:  # but x times a gate of x
      is_large = not values.isdisjoint(read) and (name not in SCALES or bool(handed_on(eqn)))
    elif not values.isdisjoint(read) and _holds(MATMULS, eqn, contents):
      is_large = not any(var in weights for var in read)
      beside |= read if is_large else set()
    else:
      is_large = _holds(_SOLVES, eqn, contents) and any(var in solved for var in eqn.outvars)
    values |= {var for var in eqn.outvars if var not in weights} if is_large else set()
    of |= {*eqn.outvars} if not of.isdisjoint(read) and name not in MATMULS else set()
  return Solutions(values, _before(inner, beside, needs))


def _holds(names: Collection[str], eqn: JaxprEqn, contents: Contents) -> bool:
  """Whether an equation is one of some primitives, or calls a function that holds one."""
  bodies = bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ()
  return eqn.primitive.name in names or any(contents.any_of(names, b.jaxpr) for b in bodies)


def _before(inner: Jaxpr, found: set[Var], needs: Needs) -> Collection[Var]:
  """Some variables, and those that they are multiples, sums or functions of, one by one.

  Behind a function of a value nothing is looked at that adds it to another: a kernel is one of
  what was multiplied, and the last activation of a network is none.
  """
  behind_function = set[Var]()
  for eqn in reversed(inner.eqns if found else []):
    read = variables_of(eqn.invars)
    if found.isdisjoint(eqn.outvars):
      if not behind_function.isdisjoint(eqn.outvars) and eqn.primitive.name in _LEADS_ON:
        behind_function |= read if len(read) == 1 else set()
      continue
    if eqn.primitive.name in JITTED:
      places = needs.before(eqn, jaxprs.places_of(eqn.outvars, found))
      found |= variables_of(eqn.invars[n] for n in places)
    elif eqn.primitive.name in STAYS_SOLVED:
      found |= read
    elif eqn.primitive.name in _LEADS_ON and len(read) == 1:
      behind_function |= read
  return found | behind_function


_LEADS_ON = STAYS_SOLVED | having(Trait.ARITHMETIC | Trait.TRANSCENDENTAL)
_SOLVES = MATMULS | {"custom_linear_solve", "triangular_solve", "tridiagonal_solve"}
"""What gives more than vectors of length one: a function that multiplies what it solved, too."""
