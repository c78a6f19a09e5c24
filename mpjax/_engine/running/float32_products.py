"""Matmuls of 16-bit factors that return the float32 that they sum in, on every backend.

XLA's CPU backend multiplies 16-bit factors into float32 as the matmul stands, but takes a
transposition beside it, of a factor or of the result, into the matmul; for some of those, and for
some that a program writes so, it has no kernel and raises ``Unsupported element type for
DotThunk``. So factors are brought into one order first, and `fixed_p` stands between them. It is
the identity, and on CPUs a barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import jet
from jax.interpreters import mlir

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.program.matmuls import free_of
from mpjax._engine.program.new_primitive import new_primitive

Matmul = Callable[[jax.Array, jax.Array], jax.Array]


Dims = tuple[int, ...]


def in_order(contracted: Sequence[Dims], batch: Sequence[Dims], precision: Any) -> Matmul:
  """A ``dot_general`` of 16-bit factors with a float32 result, in the order that CPUs have it in.

  The dimensions that are summed stand last in the left factor, and behind those of the batch in
  the right one.

  Args:
    contracted: The dimensions that are summed, of each factor.
    batch: Those of the batch.
    precision: The precision of `lax.dot_general`.
  """
  along = range(len(batch[0]))
  behind = range(len(along), len(along) + len(contracted[1]))

  def run(left: jax.Array, right: jax.Array) -> jax.Array:
    free = [free_of(x.ndim, contracted[n], batch[n]) for n, x in enumerate((left, right))]
    left = fixed(lax.transpose(left, (*batch[0], *free[0], *contracted[0])))
    right = fixed(lax.transpose(right, (*batch[1], *contracted[1], *free[1])))
    dims: Any = ((range(left.ndim - len(behind), left.ndim), behind), (along, along))
    return fixed(
      lax.dot_general(left, right, dims, precision=precision, preferred_element_type=FLOAT32)
    )

  return run


def unfolded(matmul: Matmul) -> Matmul:
  """A matmul of 16-bit factors with a float32 result, beside which a CPU moves nothing into it."""

  def run(left: jax.Array, right: jax.Array, *rest: jax.Array) -> jax.Array:
    return fixed(matmul(fixed(left), fixed(right), *rest))

  return run


def but_on_gpus(matmul: Matmul, rounded: Matmul) -> Matmul:
  """A convolution that returns float32, on GPUs one that rounds.

  There XLA would run the whole of it in float32, since cuDNN returns what it takes.

  Args:
    matmul: The convolution with a float32 result.
    rounded: The same, its result rounded and float32 again.
  """

  def run(left: jax.Array, right: jax.Array) -> jax.Array:
    return lax.platform_dependent(left, right, cuda=rounded, rocm=rounded, default=matmul)

  return run


def fixed(x: jax.Array) -> jax.Array:
  """An array whose dimensions stay in this order on a CPU."""
  return fixed_p.bind(x)


fixed_p = new_primitive(
  "mpjax_fixed", lambda x: x, shape=lambda x: x, transpose=lambda cotangent, x: [fixed(cotangent)]
)
"""The identity, which nothing is moved across on a CPU."""
jet.jet_rules[fixed_p] = lambda primals, series: (primals[0], series[0])

mlir.register_lowering(
  fixed_p, mlir.lower_fun(lax.optimization_barrier, multiple_results=False), platform="cpu"
)
