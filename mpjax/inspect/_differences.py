"""How a value differs from its reference, in numbers that can be carried through loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.running.environment import brought_here


class Stats(NamedTuple):
  """How a value differs from its reference; norms leave out what is not finite in either.

  Attributes:
    error: The norm of the difference.
    norm: The norm of the reference.
    cosine: Of the angle between the two; 1 if either is zero.
    overflow: How many numbers are not finite although the reference is.
    underflow: How many are zero although the reference is not.
    largest: The largest magnitude in the reference.
    undefined: How many are NaN in the reference, or infinite there and something else here.
    times: How often the value was computed: once, or not at all in a branch that was not taken.
    iteration: The iteration of a while loop that this is of, the worst one; -1 outside of loops.
  """

  error: Any
  norm: Any
  cosine: Any
  overflow: Any
  underflow: Any
  largest: Any
  undefined: Any
  times: Any
  iteration: Any


def compare(reference: Any, narrow: Any) -> Stats:
  """The statistics of a value against its reference, in the dtype of the reference."""
  return brought_here(_stats, lax.stop_gradient(reference), lax.stop_gradient(narrow))


@jax.jit
def _stats(reference: Any, narrow: Any) -> Stats:
  dtype = reference.dtype if reference.dtype.itemsize == 8 else FLOAT32
  exact, value = (x.astype(dtype) for x in (reference, _rounded(narrow)))
  known, finite = jnp.isfinite(exact), jnp.isfinite(value)
  both = known & finite
  a, b = (jnp.where(both, x, jnp.zeros_like(x)) for x in (exact, value))
  largest = jnp.max(jnp.abs(jnp.where(known, exact, jnp.zeros_like(exact))), initial=0)
  unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
  a, b = a / unit, b / unit
  norm, other = jnp.linalg.norm(a.ravel()), jnp.linalg.norm(b.ravel())
  product = norm * other
  one = jnp.ones_like(product)
  cosine = jnp.where(product > 0, jnp.sum(a * b) / jnp.where(product > 0, product, one), one)
  return Stats(
    jnp.linalg.norm((a - b).ravel()) * unit,
    norm * unit,
    cosine,
    jnp.sum(known & ~finite),
    jnp.sum(known & (exact != 0) & (value == 0)),
    largest,
    jnp.sum(~known & (exact != value)),
    jnp.int32(1),
    jnp.int32(-1),
  )


def _rounded(x: Any) -> Any:
  """A value as its format holds it: compilers may carry it in more bits than that."""
  info = jnp.finfo(x.dtype)
  if x.dtype.itemsize != 2:
    return x
  return lax.reduce_precision(x.astype(FLOAT32), info.nexp, info.nmant)


def nothing(like: Any) -> Any:
  """Statistics of values that were not computed, of the shapes given."""

  def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    varying = tuple(getattr(x, "vma", None) or ())
    empty = jnp.zeros(x.shape, x.dtype)
    return lax.pcast(empty, varying, to="varying") if varying else empty

  return jax.tree.map(zeros, like)


def worse_of(old: Stats, new: Stats, iteration: Any) -> Stats:
  """Those of the iteration of a while loop that is worse: first by overflows, then by error."""
  new = new._replace(iteration=jnp.full_like(new.iteration, iteration))
  as_bad = new.overflow == old.overflow
  larger = (new.times > 0) & ((old.times == 0) | (_ratio(new) > _ratio(old)))
  worse = (new.overflow > old.overflow) | (as_bad & larger)
  return Stats(*(jnp.where(worse, y, x) for x, y in zip(old, new, strict=True)))


def _ratio(stats: Stats) -> Any:
  known = stats.norm > 0
  ratio = stats.error / jnp.where(known, stats.norm, jnp.ones_like(stats.norm))
  endless = jnp.where(stats.error > 0, jnp.full_like(ratio, jnp.inf), jnp.zeros_like(ratio))
  return jnp.where(known, ratio, endless)
