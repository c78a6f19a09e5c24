"""Questions that tests ask a jaxpr: which dtypes its matmuls have, what it is made of."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn

CONTRACTIONS = frozenset(
  {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
)


class Contraction(NamedTuple):
  """A matmul or convolution: its primitive, and the dtypes of its factors and of its result.

  Inner products add up all that they multiply: each number is read once. One with weights
  multiplies with a vector, or with one for each matrix of a batch.
  """

  primitive: str
  factors: tuple[str, ...]
  result: str
  is_inner: bool
  has_weights: bool


def sub_jaxprs(value: Any) -> Iterator[Jaxpr]:
  """The jaxprs that an equation's parameter holds: itself, or in tuples, lists and dicts."""
  opened = getattr(value, "jaxpr", value)
  if hasattr(opened, "eqns"):
    yield opened
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from sub_jaxprs(item)
  elif isinstance(value, dict):
    for item in value.values():
      yield from sub_jaxprs(item)


def equations(jaxpr: Any) -> Iterator[JaxprEqn]:
  """Every equation of a jaxpr and of the jaxprs inside it, at any depth.

  Scan, while, cond, jit, remat, shard_map, custom_jvp and custom_vjp (the primal function; the
  rules stand in the jaxpr of the gradient) and kernels keep theirs in parameters. Of branches by
  platform one is compiled, and counts: the last, which is for those not named.
  """
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    yield eqn
    by_platform = eqn.params.get("branches_platforms") is not None
    for value in [eqn.params["branches"][-1]] if by_platform else eqn.params.values():
      for inner in sub_jaxprs(value):
        yield from equations(inner)


def _are_vectors(eqn: JaxprEqn) -> list[bool]:
  """Whether an operand of a matmul has no dimensions of its own, for each."""
  if eqn.primitive.name != "dot_general":
    return [False]
  (left, _), (batch, _) = eqn.params["dimension_numbers"]
  return [atom.aval.ndim == len(left) + len(batch) for atom in eqn.invars]


def contractions(jaxpr: Any) -> list[Contraction]:
  """Every matmul and convolution of a jaxpr."""
  return [
    Contraction(
      eqn.primitive.name,
      tuple(atom.aval.dtype.name for atom in eqn.invars[:2]),
      eqn.outvars[0].aval.dtype.name,
      all(_are_vectors(eqn)),
      any(_are_vectors(eqn)),
    )
    for eqn in equations(jaxpr)
    if eqn.primitive.name in CONTRACTIONS
  ]


def as_many_matmuls(ours: Any, plain: Any) -> bool:
  """Whether a jaxpr has the matmuls of another, those that contract nothing left out.

  Such a one is a multiplication, and so may be the two of its derivative.
  """
  before, after = (len(contractions(jaxpr)) for jaxpr in (plain, ours))
  return after > 0 and before - 3 * outer_products(plain) <= after <= before


def outer_products(jaxpr: Any) -> int:
  """How many matmuls of a jaxpr contract dimensions of size one, or none."""
  dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  contracted = [(e.invars[0].aval.shape, e.params["dimension_numbers"][0][0]) for e in dots]
  return sum(all(shape[dim] == 1 for dim in dims) for shape, dims in contracted)


def wide_contractions(jaxpr: Any, compute_dtype: str) -> list[Contraction]:
  """The matmuls and convolutions with a floating factor that is not of the compute dtype."""
  return [
    found
    for found in contractions(jaxpr)
    if any("float" in dtype and dtype != compute_dtype for dtype in found.factors)
  ]


def primitives(jaxpr: Any) -> Counter[str]:
  """How often each primitive occurs in a jaxpr."""
  return Counter(eqn.primitive.name for eqn in equations(jaxpr))


def result_dtypes(jaxpr: Any, primitive: str) -> set[str]:
  """The dtypes of the results of one primitive."""
  return {
    var.aval.dtype.name
    for eqn in equations(jaxpr)
    if eqn.primitive.name == primitive
    for var in eqn.outvars
  }
