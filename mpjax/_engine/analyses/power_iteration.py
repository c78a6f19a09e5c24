"""The power iteration of a spectral norm, found by the state that it keeps in a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from mpjax._core.primitives import Trait, having
from mpjax._engine.program import jaxprs
from mpjax._engine.program.matmuls import free
from mpjax._engine.program.versions import Atom, Jaxpr, JaxprEqn, Literal, Var

T = TypeVar("T")

_SATURATING = having(Trait.SATURATES)


class Own(NamedTuple, Generic[T]):
  """What depends on nothing but what a model holds: operands by index, or variables.

  Attributes:
    held: All of it.
    state: That which its state, not its parameters alone, has a part in.
  """

  held: Collection[T] = ()
  state: Collection[T] = ()

  def among(self, atoms: Sequence[Atom]) -> Own[int]:
    """Which of an equation's operands are the model's own; none if no state is among them."""
    held, state = (
      tuple(n for n, atom in enumerate(atoms) if not isinstance(atom, Literal) and atom in part)
      for part in self
    )
    return Own(held, state) if state else Own()

  def without(self, operands: range) -> Own[T]:
    """The same without some operands."""
    held, state = (tuple(n for n in part if n not in operands) for part in self)
    return Own(held, state) if state else Own()


def own_variables(inner: Jaxpr, own: Own[int]) -> Own[Var]:
  """The variables that depend on nothing but a model's own operands; none without state.

  What is made of literals alone is among them. A saturating function makes no more a state of what
  it takes: it ends what is linear in it.
  """
  if not own.state:
    return Own()
  held, state = ({inner.invars[n] for n in part} for part in own)
  for eqn in inner.eqns:
    read = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
    if held.issuperset(read):
      held.update(eqn.outvars)
      if not state.isdisjoint(read) and eqn.primitive.name not in _SATURATING:
        state.update(eqn.outvars)
  return Own(held, state)


def power_iteration(inner: Jaxpr, state: Collection[Var]) -> set[Var]:
  """The results of matmuls that take a model's state, one vector, through a matrix and back.

  And of its inner products, where there is one. So the norm of a spectral norm is found, by which
  every weight is divided (Miyato et al. 2018, "Spectral normalization for generative adversarial
  networks"). Such a matmul reads its matrix once, whatever it multiplies in. A loop's carry is no
  state here, so that an iteration written as `lax.fori_loop` is not found.

  Args:
    inner: An open jaxpr.
    state: Its variables that depend on a model's state, see `own_variables`.
  """
  turned: dict[Any, tuple[Any, tuple[int, ...]]] = {}
  found: dict[Any, dict[tuple[int, ...], list[Any]]] = {}
  products = []
  for eqn in inner.eqns if state else ():
    if eqn.primitive.name == "transpose":
      turned[eqn.outvars[0]] = eqn.invars[0], eqn.params["permutation"]
    elif eqn.primitive.name == "dot_general" and eqn.outvars[0] in state:
      matrices = [(a, along) for a, along, is_vector in _operands(eqn) if not is_vector]
      if not matrices:
        products.append(eqn.outvars[0])
      elif len(matrices) == 1:
        ((matrix, along),) = matrices
        source, axes = turned.get(matrix, (matrix, range(len(jaxprs.shape(matrix)))))
        ways = found.setdefault(source, {})
        ways.setdefault(tuple(sorted(axes[d] for d in along)), []).append(eqn.outvars[0])
  there_and_back = [ways for ways in found.values() if len(ways) > 1]
  results = [var for ways in there_and_back for way in ways.values() for var in way]
  return {*results, *products} if results else set()


def _operands(eqn: JaxprEqn) -> Iterator[tuple[Any, Sequence[int], bool]]:
  """The operands of a matmul, each with its contracted dimensions, and whether it is one vector."""
  contracted, _ = eqn.params["dimension_numbers"]
  for n, atom in enumerate(eqn.invars):
    yield atom, contracted[n], all(size == 1 for size in free(eqn, n))
