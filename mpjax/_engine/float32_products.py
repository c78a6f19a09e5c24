"""Matmuls of 16-bit factors that return the float32 that they sum in, on every backend.

XLA's CPU backend multiplies 16-bit factors into float32 as the matmul stands, but takes a
transposition beside it, of a factor or of the result, into the matmul; for some of those it has no
kernel and raises ``Unsupported element type for DotThunk``. So `fixed_p` stands between them. It
is the identity, and on CPUs a barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Matmul = Callable[[jax.Array, jax.Array], jax.Array]


def unfolded(matmul: Matmul) -> Matmul:
  """A matmul of 16-bit factors with a float32 result, as one that a CPU can run anywhere."""

  def run(left: jax.Array, right: jax.Array) -> jax.Array:
    return fixed(matmul(fixed(left), fixed(right)))

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


fixed_p = Primitive("mpjax_fixed")
"""The identity, which nothing is moved across on a CPU."""


@fixed_p.def_impl
def _impl(x: jax.Array) -> jax.Array:
  return x


@fixed_p.def_abstract_eval
def _abstract_eval(aval: Any) -> Any:
  return aval


ad.deflinear2(fixed_p, lambda cotangent, x: [fixed(cotangent)])
batching.defvectorized(fixed_p)
mlir.register_lowering(fixed_p, mlir.lower_fun(_impl, multiple_results=False))
mlir.register_lowering(
  fixed_p, mlir.lower_fun(lax.optimization_barrier, multiple_results=False), platform="cpu"
)
