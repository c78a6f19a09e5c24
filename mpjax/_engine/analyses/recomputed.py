"""Which values of a jaxpr are computed more than once: what is decided of one holds for all.

A derivative of the user's own often stores by a second call what the function returned, as
``lambda x: (gate(x), gate(x))`` does. Inside ``autocast(grad(f))`` both calls stand in one jaxpr.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mpjax._engine.program import versions
from mpjax._engine.program.bodies import bodies_of, repetitions
from mpjax._engine.program.versions import AnyJaxpr, Atom, JaxprEqn, Literal, Var


def same_values(jaxpr: AnyJaxpr) -> dict[Var, int]:
  """A number for each variable of a jaxpr: one number for those that hold one value.

  Two equations compute one value from the same operands if their primitives and parameters are
  the same. A call computes what its body does, whatever its derivative is.

  Args:
    jaxpr: An open or closed jaxpr.

  Example:
    >>> import jax
    >>> twice = lambda x: jax.numpy.sin(x) * jax.jit(jax.numpy.sin)(x)
    >>> [*same_values(jax.make_jaxpr(twice)(1.0)).values()]
    [0, 1, 1, 3]
  """
  values = _Values()
  operands = [next(values.fresh) for _ in versions.open_jaxpr(jaxpr).invars]
  return values.of_variables(jaxpr, operands)


def computed_again(numbers: Mapping[Var, int], found: Collection[Var]) -> set[Var]:
  """The other variables that hold a value which one of those that are found holds.

  Args:
    numbers: Those of the values of a jaxpr, see `same_values`.
    found: Variables; what other jaxprs hold has no number.
  """
  known = {numbers[var] for var in found if var in numbers}
  return {var for var, number in numbers.items() if number in known}.difference(found)


class _Values:
  """Numbers of values, equal for equal ones."""

  def __init__(self) -> None:
    self.fresh = itertools.count()
    self._known: dict[Hashable, int] = {}

  def of_variables(self, jaxpr: AnyJaxpr, operands: Sequence[int]) -> dict[Var, int]:
    """The number of each variable of a jaxpr, of which the operands' are given."""
    inner = versions.open_jaxpr(jaxpr)
    numbers = dict(zip(inner.invars, operands, strict=True))
    numbers |= {var: next(self.fresh) for var in inner.constvars}
    for eqn in inner.eqns:
      read = [self._of(atom, numbers) for atom in eqn.invars]
      numbers |= zip(eqn.outvars, self._results(eqn, read), strict=True)
    return numbers

  def _of(self, atom: Atom, numbers: dict[Var, int]) -> int:
    if not isinstance(atom, Literal):
      return numbers[atom]
    aval: Any = atom.aval
    if not np.issubdtype(aval.dtype, np.number):  # that of a float0 or of a key
      return next(self.fresh)
    return self._number((aval, np.asarray(atom.val).tobytes()))

  def _results(self, eqn: JaxprEqn, read: Sequence[int]) -> list[int]:
    bodies = bodies_of(eqn)
    if len(bodies) == 1 and repetitions(eqn) == 1 and not bodies[0].carry:
      inner = versions.open_jaxpr(bodies[0].jaxpr)
      numbers = self.of_variables(bodies[0].jaxpr, bodies[0].take(read))
      return [self._of(atom, numbers) for atom in inner.outvars]
    if eqn.effects:
      return [next(self.fresh) for _ in eqn.outvars]
    code = eqn.primitive, tuple(sorted(eqn.params.items())), tuple(read)
    return [self._number((*code, place)) for place in range(len(eqn.outvars))]

  def _number(self, code: Hashable) -> int:
    try:
      return self._known.setdefault(code, next(self.fresh))
    except TypeError:  # a parameter that cannot be compared
      return next(self.fresh)
