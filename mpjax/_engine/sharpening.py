"""What an equation shows beyond its primitive's name: squares, lookups, ways into a logarithm."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax._core.primitives import Rule
from mpjax._engine import jaxprs
from mpjax._engine.jaxprs import JaxprEqn, Literal
from mpjax._engine.kinds import Kind
from mpjax._engine.plan import Forms

SATURATING = frozenset({"logistic", "tanh", "erf", "erfc"})
"""What becomes a constant for arguments that are far from zero."""

_LOGARITHMS = frozenset({"log", "log1p", "log2", "atanh", "erf_inv"})
_ELEMENTWISE = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CALL, Rule.CONVERT, Rule.CUSTOM_JVP})


def into_log(inner: Any, exact: tuple[int, ...], table: Mapping[str, Rule]) -> set[Any]:
  """The variables from which elementwise operations alone lead into a logarithm.

  A sigmoid or tanh among them runs in float32: in 16 bits it is 1 from an argument of 6 on, and
  the loss of a confident wrong answer loses its gradient.
  """
  found: set[Any] = {inner.outvars[n] for n in exact if not isinstance(inner.outvars[n], Literal)}
  for eqn in reversed(inner.eqns):
    name = eqn.primitive.name
    passes = table.get(name) in _ELEMENTWISE and not found.isdisjoint(eqn.outvars)
    if name in _LOGARITHMS or passes:
      found.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
  return found


def is_square(eqn: JaxprEqn) -> bool:
  """X * x and x ** 2 are squares, however they were written."""
  if eqn.primitive.name == "integer_pow":
    return eqn.params["y"] == 2
  return eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]


def picks_numbers(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a gather picks single narrow numbers: the logits of the labels, in most losses.

  Read in float32, their cotangents meet those of the logsumexp before they round.
  """
  picks = eqn.primitive.name == "gather" and set(eqn.params["slice_sizes"]) <= {1}
  return picks and forms[0] is not None and forms[0].kind is Kind.NARROW


def fill_value(eqn: JaxprEqn) -> float | None:
  """What a gather of floats gives for an index that is out of bounds, if that is a number."""
  fill = eqn.params.get("fill_value") if eqn.primitive.name == "gather" else None
  return fill if fill is not None and jaxprs.is_float32(eqn.outvars[0]) and fill == fill else None


def is_grouped_scores(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a float32 matmul is the one that makes scores in `jax.nn.dot_product_attention`.

  Its queries ``[..., t, k, g, h]`` and keys ``[..., s, k, h]`` are matched by batch and head.
  """
  if eqn.primitive.name != "dot_general" or None in forms or not jaxprs.is_float32(eqn.outvars[0]):
    return False
  contracted, batch = eqn.params["dimension_numbers"]
  factors: Any = eqn.invars[:2]
  ranks = [len(atom.aval.shape) for atom in factors]
  last = tuple((rank - 1,) for rank in ranks)
  heads = (*range(ranks[1] - 3), ranks[1] - 2)
  grouped = ranks[0] == ranks[1] + 1 and ranks[1] >= 3
  return grouped and contracted == last and batch == (heads, heads)


class Own(NamedTuple):
  """What depends on nothing but what a model holds: operands by index, or variables.

  Attributes:
    held: All of it.
    state: That which its state, not its parameters alone, has a part in.
  """

  held: Collection[Any] = ()
  state: Collection[Any] = ()

  def among(self, atoms: Sequence[Any]) -> Own:
    """Which of an equation's operands are the model's own; none if no state is among them."""
    held, state = (
      tuple(n for n, atom in enumerate(atoms) if not isinstance(atom, Literal) and atom in part)
      for part in self
    )
    return Own(held, state) if state else Own()

  def without(self, operands: range) -> Own:
    """The same without some operands."""
    held, state = (tuple(n for n in part if n not in operands) for part in self)
    return Own(held, state) if state else Own()


def own_variables(inner: Any, own: Own) -> Own:
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
      if not state.isdisjoint(read) and eqn.primitive.name not in SATURATING:
        state.update(eqn.outvars)
  return Own(held, state)


def power_iteration(inner: Any, state: Collection[Any]) -> set[Any]:
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
      matrices = [(a, along) for a, along, is_vector in _factors(eqn) if not is_vector]
      if not matrices:
        products.append(eqn.outvars[0])
      elif len(matrices) == 1:
        ((matrix, along),) = matrices
        source, axes = turned.get(matrix, (matrix, range(len(matrix.aval.shape))))
        ways = found.setdefault(source, {})
        ways.setdefault(tuple(sorted(axes[d] for d in along)), []).append(eqn.outvars[0])
  there_and_back = [ways for ways in found.values() if len(ways) > 1]
  results = [var for ways in there_and_back for way in ways.values() for var in way]
  return {*results, *products} if results else set()


def _factors(eqn: JaxprEqn) -> Iterator[tuple[Any, Sequence[int], bool]]:
  """The factors of a matmul, each with its contracted dimensions, and whether it is one vector."""
  for atom, contracted, batch in zip(eqn.invars, *eqn.params["dimension_numbers"], strict=True):
    shape: Any = atom.aval.shape
    free = (size for d, size in enumerate(shape) if d not in contracted and d not in batch)
    yield atom, contracted, all(size == 1 for size in free)


def applies_a_function(eqn: JaxprEqn) -> bool:
  """Whether a scatter holds a function of the values that it meets, traced in float32."""
  return eqn.primitive.name == "scatter" and eqn.params.get("update_jaxpr") is not None


def looks_up_rows(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a gather takes many rows of a parameter: an embedding.

  They are cast after the lookup, so that the gradient of a row that is taken often sums up in
  float32; but they are cast, for a sum of embeddings is as large as any activation. One row, or
  single numbers, are still a parameter.
  """
  if eqn.primitive.name != "gather" or forms[0] is None or forms[0].kind is not Kind.PARAM:
    return False
  indices: Any = eqn.invars[1].aval
  rows = np.prod(indices.shape[:-1], dtype=int)
  return rows > 1 and np.prod(eqn.params["slice_sizes"], dtype=int) > 1


def has_foreign_float(eqn: JaxprEqn, forms: Forms, compute: np.dtype) -> bool:
  """Whether a matmul mixes float32 with a float of the caller's own choice, or makes a float64."""
  result: Any = eqn.outvars[0].aval
  operands: Any = zip(eqn.invars, forms, strict=True)
  dtypes = {a.aval.dtype for a, f in operands if f is None}
  if any(forms) and result.dtype == np.float64:
    return True
  return any(jnp.issubdtype(d, np.inexact) and d != compute for d in dtypes)
