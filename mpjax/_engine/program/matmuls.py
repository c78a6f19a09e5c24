"""What a matmul multiplies and adds up, as the dimension numbers of a `dot_general` say it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import jax
from jax import lax

from mpjax._engine.program.jaxprs import shape, size, size_of
from mpjax._engine.program.kinds import FEW
from mpjax._engine.program.versions import Atom, JaxprEqn

DIMENSIONS = 3
"""Of space."""

_KERNEL = 64
"""Numbers of a kernel that is a stencil, and no layer."""


def operation(eqn: JaxprEqn) -> str:
  """What an equation does, as the name of a primitive: an outer product multiplies."""
  name = eqn.primitive.name
  return "mul" if name == "dot_general" and contracts_nothing(eqn) else name


def contracts_nothing(eqn: JaxprEqn) -> bool:
  """Whether a matmul multiplies pairs of numbers and adds up none: an outer product."""
  return eqn.primitive.name == "dot_general" and terms(eqn) == 1


def asks_for_float32(eqn: JaxprEqn) -> bool:
  """Whether the author of a matmul asks for all digits of float32; JAX's default does not count."""
  asked = eqn.params.get("precision")
  default = _default_precision(jax.config)
  if asked is lax.DotAlgorithmPreset.F32_F32_F32:
    return default != asked.name
  is_highest = isinstance(asked, tuple) and {*asked} == {lax.Precision.HIGHEST}
  return is_highest and default not in _HIGHEST


_default_precision = operator.attrgetter("jax_default_matmul_precision")

_HIGHEST = "highest", "float32"
"""What JAX calls that as a default."""


def terms(eqn: JaxprEqn) -> int:
  """How many products a `dot_general` adds up to a number of its result."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  summed = shape(eqn.invars[0])
  return size_of([summed[dim] for dim in contracted])


def free_dims(eqn: JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Which dimensions of each operand of a `dot_general` the other does not have."""
  contracted, batch = eqn.params["dimension_numbers"]
  first, second = (len(shape(atom)) for atom in eqn.invars)
  return free_of(first, contracted[0], batch[0]), free_of(second, contracted[1], batch[1])


def free_of(rank: int, contracted: Sequence[int], batch: Sequence[int]) -> tuple[int, ...]:
  """Those of so many dimensions that are neither summed nor matched."""
  return tuple([dim for dim in range(rank) if dim not in contracted and dim not in batch])


def free(eqn: JaxprEqn, operand: int) -> list[int]:
  """How long these are, of one operand."""
  contracted, batch = eqn.params["dimension_numbers"]
  shared = (*contracted[operand], *batch[operand])  # asked of every matmul
  return [size for dim, size in enumerate(shape(eqn.invars[operand])) if dim not in shared]


def may_transform_points(eqn: JaxprEqn) -> bool:
  """Whether a matmul has an operand as small as a matrix that rotates or projects points."""
  if eqn.primitive.name != "dot_general" or terms(eqn) > DIMENSIONS:
    return False
  return any(1 < min(free(eqn, n), default=0) <= DIMENSIONS for n in (0, 1))


def is_inner(eqn: JaxprEqn) -> bool:
  """Whether a matmul adds up all the pairs that it multiplies: ``vdot``, a norm's ``x @ x``."""
  if eqn.primitive.name != "dot_general" or contracts_nothing(eqn):
    return False
  return not (free(eqn, 0) or free(eqn, 1))


def vectors(eqn: JaxprEqn) -> Iterator[tuple[Atom, Atom]]:
  """The vectors that a matmul multiplies, each with what it does so by; none of a batch."""
  if eqn.primitive.name != "dot_general" or any(eqn.params["dimension_numbers"][1]):
    return
  for n, pair in enumerate((eqn.invars, eqn.invars[::-1])):
    if size_of(free(eqn, n)) == 1:
      yield pair[0], pair[1]


def vector_places(eqn: JaxprEqn) -> list[int]:
  """Which operands of a `dot_general` are vectors, or one of each of a batch, times a matrix."""
  if eqn.primitive.name != "dot_general":
    return []
  first, second = (size_of(free(eqn, n)) for n in (0, 1))
  return [
    n for n, (own, other) in enumerate(((first, second), (second, first))) if own == 1 < other
  ]


def is_of_few(eqn: JaxprEqn) -> bool:
  """Whether no dimension of a matmul is longer than a state's, as those of layers are."""
  if eqn.primitive.name != "dot_general":
    return False
  return max(size_of([dim]) for dim in (terms(eqn), *free(eqn, 0), *free(eqn, 1))) <= FEW


def is_square_product(eqn: JaxprEqn) -> bool:
  """Whether a matmul is one of square matrices, ``a @ b``, none of them turned."""
  (contracted, batch), first = eqn.params["dimension_numbers"], shape(eqn.invars[0])
  rows, along = len(first) - 2, tuple(range(len(first) - 2))
  wanted = [(rows + 1,), (rows,), along, along]
  return first == shape(eqn.invars[1]) and [*map(tuple, (*contracted, *batch))] == wanted


def weights_of(eqn: JaxprEqn) -> list[Atom]:
  """The operands of a matmul or convolution that may be weights: vectors, and small kernels.

  A vector has one dimension, along which the other operand is summed.
  """
  if eqn.primitive.name == "conv_general_dilated":
    return [atom for atom in eqn.invars[1:] if size(atom) <= _KERNEL]
  contracted, _ = eqn.params["dimension_numbers"]
  pairs = zip(eqn.invars, contracted, strict=True)
  return [atom for atom, dims in pairs if len(dims) == 1 and len(shape(atom)) == 1]
