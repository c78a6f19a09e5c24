"""Matmuls whose derivatives have other dtypes than JAX would give them.

JAX multiplies a cotangent in the dtype of the matmul's result and returns it in that of the
operand. Here a float32 result has 16-bit derivatives, and a 16-bit result a float32 cotangent.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import Trait, having
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.new_primitive import new_primitive
from mpjax._engine.program.versions import AnyJaxpr, Atom, JaxprEqn, Literal
from mpjax._engine.running.attached_derivatives import tangent_of, with_derivative
from mpjax._engine.running.environment import to_dtype
from mpjax._engine.running.float32_products import Dims, Matmul, but_on_gpus, fixed, in_order

# A float32 cotangent -----------------------------------------------------------------------------


class Contraction(NamedTuple):
  """A `lax.dot_general` in a 16-bit format, of a wide operand, which is float32, and another.

  Attributes:
    wide: Which operand is wide, 0 or 1.
    contracted: The contracted dimensions of the first and of the second operand.
    batch: Their batch dimensions.
    dtype: The format: of the other operand, and of the wide one where it is multiplied.
    precision: The precision of `lax.dot_general`.
    result: The dtype of the result: the format, or float32.
  """

  wide: int
  contracted: tuple[Dims, ...]
  batch: tuple[Dims, ...]
  dtype: np.dtype
  precision: Any
  result: np.dtype

  @classmethod
  def of(cls, params: Mapping[str, Any], wide: int, dtype: np.dtype) -> Contraction:
    """The contraction that the parameters of a `lax.dot_general` describe."""
    contracted, batch = (tuple(map(_dims, pair)) for pair in params["dimension_numbers"])
    result = params.get("preferred_element_type") or dtype
    return cls(wide, contracted, batch, dtype, params["precision"], result)

  def run(self, wide: jax.Array, other: jax.Array) -> jax.Array:
    """The matmul: the wide operand is rounded."""
    narrow = to_dtype(wide, self.dtype)
    left, right = (narrow, other) if self.wide == 0 else (other, narrow)
    if self.result != self.dtype:
      return in_order(self.contracted, self.batch, self.precision)(left, right)
    dims: Any = (self.contracted, self.batch)
    return lax.dot_general(
      left, right, dims, precision=self.precision, preferred_element_type=self.dtype
    )

  @property
  def rounded(self) -> Contraction:
    """The same with a result in its format."""
    return self._replace(result=self.dtype)

  def transpose(self, cotangent: jax.Array, other: jax.Array, aval: Any) -> jax.Array:
    """The float32 cotangent of the wide operand."""
    rank = len(aval.shape)
    batch, contracted = (
      [f"{kind}{n}" for n in range(len(dims[0]))] for kind, dims in self._kinds()
    )
    wide = self._labels(self.wide, rank)
    others = self._labels(1 - self.wide, other.ndim)
    kept, summed = ([x for x in labels if x.startswith("free")] for labels in (wide, others))
    # In the order of a CPU. The cotangent stays as it is: compilers compute it where it is read.
    given = cotangent, [*batch, *kept, *summed] if self.wide == 0 else [*batch, *summed, *kept]
    factors = [(*given, kept), (other, others, contracted)]
    (left, of_left, first), (right, of_right, second) = factors[:: 1 if self.wide == 0 else -1]
    left = fixed(_turned(left, of_left, [*batch, *first, *summed]))
    right = fixed(_turned(right, of_right, [*batch, *summed, *second]))
    along = range(len(batch))
    in_left, in_right = (range(n, n + len(summed)) for n in (len(batch + first), len(batch)))
    found = lax.dot_general(
      left,
      right,
      ((in_left, in_right), (along, along)),
      precision=self.precision,
      preferred_element_type=FLOAT32,
    )
    return _turned(fixed(found), [*batch, *first, *second], wide)

  def _kinds(self) -> tuple[tuple[str, tuple[Dims, ...]], ...]:
    return ("batch", self.batch), ("contracted", self.contracted)

  def _labels(self, operand: int, rank: int) -> list[str]:
    """A name for each dimension of an operand: the same for those that are matched."""
    labels = [f"free{operand}.{n}" for n in range(rank)]
    for kind, dims in self._kinds():
      for n, dim in enumerate(dims[operand]):
        labels[dim] = f"{kind}{n}"
    return labels

  def batched(self, *operands: int) -> Contraction:
    """The same with one more dimension ahead of some operands: if of both, they are matched."""
    ahead = [n in operands for n in (0, 1)]
    contracted, batch = (
      tuple(_shifted(dims, by) for dims, by in zip(pair, ahead, strict=True))
      for pair in (self.contracted, self.batch)
    )
    if all(ahead):
      batch = tuple((0, *dims) for dims in batch)
    return self._replace(contracted=contracted, batch=batch)


def _dims(dims: Iterable[Any]) -> Dims:
  return tuple(map(int, dims))


def _shifted(dims: Dims, by: int) -> Dims:
  return tuple(dim + by for dim in dims)


def _turned(x: jax.Array, labels: Sequence[str], order: Sequence[str]) -> jax.Array:
  """An array whose dimensions have names, in another order."""
  return lax.transpose(x, [labels.index(label) for label in order])


class Convolution(NamedTuple):
  """A convolution in a 16-bit format, of a wide operand, which is float32, and another.

  Attributes:
    primitive: The primitive.
    params: Its parameters, sorted by name.
    wide: Which operand is wide, 0 or 1.
    dtype: The format.
    mapped: For each `jax.vmap` around it, the outermost last, which operands it maps: a bit each.
  """

  primitive: Primitive
  params: tuple[tuple[str, Any], ...]
  wide: int
  dtype: np.dtype
  mapped: tuple[tuple[bool, bool], ...] = ()

  @property
  def rounded(self) -> Convolution:
    """The same with a result in its format, as it is."""
    return self

  @property
  def result(self) -> np.dtype:
    """The dtype of the result: the format."""
    return self.dtype

  def run(self, wide: jax.Array, other: jax.Array) -> jax.Array:
    """The convolution: the wide operand is rounded."""
    return self._bind(to_dtype(wide, self.dtype), other)

  def _bind(self, narrow: jax.Array, other: jax.Array) -> jax.Array:
    pair = (narrow, other) if self.wide == 0 else (other, narrow)
    run: Matmul = functools.partial(self.primitive.bind, **dict(self.params))
    for first, second in self.mapped:
      run = jax.vmap(run, (0 if first else None, 0 if second else None))
    return run(*pair)

  def transpose(self, cotangent: jax.Array, other: jax.Array, aval: Any) -> jax.Array:
    """The float32 cotangent of the wide operand.

    It is a convolution and moves, as JAX writes it, with another dtype of the result.
    """
    operand = jaxprs.with_dtype(aval, self.dtype)

    def transposed(cotangent: jax.Array, other: jax.Array) -> Any:
      return jax.linear_transpose(lambda x: self._bind(x, other), operand)(cotangent)[0]

    traced = jaxprs.trace(transposed, [cotangent, other])
    return to_dtype(_summing_in_float32(traced, [cotangent, other])[0], FLOAT32)

  def batched(self, *operands: int) -> Convolution:
    """The same with one more dimension ahead of some operands."""
    return self._replace(mapped=(*self.mapped, (0 in operands, 1 in operands)))


def _summing_in_float32(jaxpr: AnyJaxpr, operands: Sequence[Any]) -> list[Any]:
  """Evaluate the transpose of a convolution, whose result leaves it in float32."""
  inner = versions.open_jaxpr(jaxpr)
  known = dict(zip(inner.constvars, versions.constants(jaxpr), strict=True))
  known |= dict(zip(inner.invars, operands, strict=True))

  def read(atom: Atom) -> Any:
    return atom.val if isinstance(atom, Literal) else known[atom]

  for eqn in inner.eqns:
    values = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name == "conv_general_dilated":
      outs = [_convolved(eqn, values)]
    elif eqn.primitive.name in _DTYPE_FREE:
      outs = jaxprs.run_with(eqn, values, eqn.params)
    else:
      atoms: Any = eqn.invars
      held = [to_dtype(x, atom.aval.dtype) for x, atom in zip(values, atoms, strict=True)]
      outs = jaxprs.run_as_traced(eqn, held)
    known |= dict(zip(eqn.outvars, outs, strict=True))
  return [read(atom) for atom in inner.outvars]


def _convolved(eqn: JaxprEqn, values: Sequence[Any]) -> jax.Array:
  def returning(dtype: np.dtype) -> Matmul:
    params = eqn.params | {"preferred_element_type": dtype}
    return lambda *pair: to_dtype(jaxprs.run_with(eqn, pair, params)[0], FLOAT32)

  return but_on_gpus(returning(FLOAT32), returning(values[0].dtype))(*values)


_DTYPE_FREE = having(Trait.MOVES) | {"reduce_sum", "broadcast_in_dim", "slice", "squeeze"}


def product_of(eqn: JaxprEqn, params: Mapping[str, Any], wide: int, dtype: np.dtype) -> Product:
  """The matmul or convolution of an equation, in a 16-bit format, with a wide operand."""
  if eqn.primitive.name == "dot_general":
    return Contraction.of(params, wide, dtype)
  return Convolution(eqn.primitive, tuple(sorted(params.items())), wide, dtype)


Product = Contraction | Convolution


@functools.lru_cache(maxsize=1024)
def with_wide_cotangent(contraction: Product, *, casts_once: bool = False) -> Matmul:
  """The matmul of a wide operand and another, whose wide cotangent does not round.

  So the gradients of a parameter add up in float32: over its uses, over devices. And the derivative
  of a softmax takes a mean from the cotangent of its weights: if that was rounded before, the small
  difference has the rounding error of the large cotangent.

  Args:
    contraction: The matmul.
    casts_once: Whether the derivative by the other operand reads the cast that the matmul made, and
      makes none of its own: the partitioner gathers each cast of a sharded parameter.
  """

  def along_wide(tangent: jax.Array, other: jax.Array, *cast: jax.Array) -> jax.Array:
    del cast
    return _tangent_p.bind(tangent, other, contraction=contraction)

  def along_other(wide: jax.Array, tangent: jax.Array, *cast: jax.Array) -> jax.Array:
    """Its cotangent is multiplied in 16 bits."""
    moved = contraction.rounded.run(cast[0] if cast else wide, tangent)
    return to_dtype(moved, contraction.result)

  def multiply(other: jax.Array, cast: jax.Array) -> jax.Array:
    return contraction.run(cast, other)

  if not casts_once:
    return with_derivative(contraction.run, along_wide, along_other)
  run = with_derivative(multiply, along_wide, along_other, reads=slice(1, 3))
  return lambda wide, other: run(wide, other, to_dtype(wide, contraction.dtype))


def _impl(wide: jax.Array, other: jax.Array, *, contraction: Product) -> jax.Array:
  return contraction.run(wide, other)


def _jvp(primals: Any, tangents: Any, *, contraction: Product) -> Any:
  run = functools.partial(_tangent_p.bind, contraction=contraction)
  return run(*primals), tangent_of((run, run), primals, tangents)


def _transpose(
  cotangent: jax.Array, wide: jax.Array, other: jax.Array, *, contraction: Product
) -> Any:
  if isinstance(cotangent, ad.Zero):
    return None, None
  cotangent = to_dtype(cotangent, contraction.dtype)
  if ad.is_undefined_primal(wide):
    return contraction.transpose(cotangent, other, wide.aval), None
  along = jax.linear_transpose(functools.partial(contraction.rounded.run, wide), other.aval)
  return None, *along(cotangent)


def _batch(args: Any, dims: Any, *, contraction: Product) -> Any:
  """An operand that has no examples is not copied for each: theirs is a free dimension."""
  moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
  mapped = [
    n for n, d in zip((contraction.wide, 1 - contraction.wide), dims, strict=True) if d is not None
  ]
  out = _tangent_p.bind(*moved, contraction=contraction.batched(*mapped))
  if len(mapped) == 2 or isinstance(contraction, Convolution):
    return out, 0
  batch = len(contraction.batch[0])
  free_of_left = args[contraction.wide].ndim - batch - len(contraction.contracted[0])
  return out, batch + (free_of_left if mapped == [1] else 0)


_tangent_p = new_primitive(
  "mpjax_wide_tangent", _impl, jvp=_jvp, transpose=_transpose, batch=_batch
)
"""`Contraction.run` as a linear function of its wide operand."""
