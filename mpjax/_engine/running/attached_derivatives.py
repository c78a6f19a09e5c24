"""Results with a derivative that was chosen for them, which no transformation takes away.

`jax.custom_jvp` would do, but before JAX 0.12 a scan that is differentiated drops the rules in its
body where it moves ahead what does not depend on its carry; what stays has the derivative of what
the function computes, and a second derivative goes through that. So the result of a function passes
a primitive, `attached_p`, whose derivative is the one that was chosen::

    r = dot_general c d       # c, d: a and b, as constants
    y = mpjax_attached r a b  # the value of r, a derivative by a and b

So does what many read in 16 bits, for each of them: its cotangent goes to the float32 value that it
was rounded from, where those of all add up, and what they store is one array::

    n = convert_element_type[new_dtype=bfloat16] x
    y = mpjax_rounded n x  # n itself where it is differentiated
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import jet
from jax.interpreters import ad

from mpjax._engine.program.new_primitive import new_primitive

Bilinear = Callable[..., jax.Array]
"""A function of two arrays, and of further ones that have no derivative here."""


def with_derivative(
  fn: Bilinear, along_first: Bilinear, along_second: Bilinear, reads: slice = slice(None)
) -> Bilinear:
  """A function of two arrays whose derivative is the sum of two others.

  It stands in the trace as it is, so that a policy of `jax.checkpoint` can save its result.

  Args:
    fn: The function.
    along_first: Its derivative, from a tangent of the first operand, the second operand, and those
      that follow.
    along_second: The same, from the first operand and a tangent of the second.
    reads: Which operands the function itself is given.
  """
  along = along_first, along_second

  def run(*operands: jax.Array) -> jax.Array:
    return attached_p.bind(fn(*map(constant, operands[reads])), *operands, along=along)

  return run


def constant(x: jax.Array) -> jax.Array:
  """`lax.stop_gradient` that can be transposed: linear functions are evaluated, too."""
  return _constant_p.bind(x)


def with_linear_derivative(
  result: jax.Array, x: jax.Array, along: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """What was made of an array as a constant, with a derivative by that.

  Args:
    result: What was made of it.
    x: The array.
    along: The derivative, from a tangent of the array.
  """
  return attached_p.bind(result, x, along=(along,))


def tangent_of(
  along: Sequence[Callable[..., jax.Array]], primals: Sequence[Any], tangents: Sequence[Any]
) -> Any:
  """The tangent of a function by its terms; None if none of its operands has one.

  Args:
    along: The term of each operand that has one: linear in that, of which it gets the tangent.
    primals: The operands.
    tangents: Their tangents.
  """
  pairs = enumerate(zip(along, tangents, strict=False))
  terms = [
    fn(*primals[:n], tangent, *primals[n + 1 :])
    for n, (fn, tangent) in pairs
    if not isinstance(tangent, ad.Zero)
  ]
  return functools.reduce(operator.add, terms) if terms else None


def _zero(x: jax.Array) -> ad.Zero:
  return ad.Zero(jax.typeof(x).to_tangent_aval())


def _jvp(primals: Any, tangents: Any, *, along: tuple[Any, ...]) -> Any:
  out = attached_p.bind(*primals, along=along)
  moved = tangent_of(along, primals[1:], tangents[1:])
  return out, _zero(out) if moved is None else moved


def _transpose(cotangent: jax.Array, _: Any, *operands: Any, along: Any) -> list[Any]:
  """A linear function is evaluated, so that its result is the linear operand."""
  del along
  return [cotangent, *(None for _ in operands)]


def _batch(args: Any, dims: Any, *, along: tuple[Any, ...]) -> Any:
  """What has no examples is not copied for each."""
  moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
  axes = tuple(None if d is None else 0 for d in dims[1:])
  mapped = tuple(jax.vmap(fn, axes) for fn in along)
  return attached_p.bind(*moved, along=mapped), 0


attached_p = new_primitive(
  "mpjax_attached",
  lambda result, *operands, along: result,
  shape=lambda result, *operands, along: result,
  jvp=_jvp,
  transpose=_transpose,
  batch=_batch,
)
"""The first operand, with a derivative by the next one or two, which may read what follows."""


def _series(primals: Any, series: Any, *, along: tuple[Any, ...]) -> Any:
  """The terms of a function's Taylor series, each with the derivatives chosen for it."""
  out = attached_p.bind(*primals, along=along)
  if len(along) == 1:
    return out, [*map(along[0], series[1])]
  (first, second, *rest), (along_first, along_second) = primals[1:], along
  firsts, seconds = [first, *series[1]], [second, *series[2]]
  has_second = jnp.issubdtype(second.dtype, jnp.inexact)  # and is no index
  terms = []
  for k in range(1, len(firsts)):
    pairs = zip(firsts[k : 0 if has_second else k - 1 : -1], seconds, strict=False)
    found = [along_first(*pair, *rest) for pair in pairs]
    found += [along_second(first, seconds[k], *rest)] if has_second else []
    terms.append(functools.reduce(operator.add, found))
  return out, terms


jet.jet_rules[attached_p] = _series


def _constant_jvp(primals: Any, tangents: Any) -> Any:
  del tangents
  out = _constant_p.bind(*primals)
  return out, _zero(out)


_constant_p = new_primitive(
  "mpjax_constant",
  lambda x: x,
  shape=lambda x: x,
  jvp=_constant_jvp,
  transpose=lambda cotangent, x: [cotangent],
)
"""The identity, without a derivative."""
jet.jet_rules[_constant_p] = lambda primals, series: (primals[0], series[0])


def rounded_from(rounded: jax.Array, x: jax.Array) -> jax.Array:
  """A value that was rounded, whose derivative is one by what it was rounded from."""
  return _rounded_p.bind(rounded, x)


def _rounded_jvp(primals: Any, tangents: Any) -> Any:
  rounded, tangent = primals[0], tangents[1]
  if isinstance(tangent, ad.Zero):
    return rounded, _zero(rounded)
  return rounded, lax.convert_element_type(tangent, rounded.dtype)


def _rounded_transpose(cotangent: jax.Array, _: Any, x: Any) -> list[Any]:
  return [None, lax.convert_element_type(cotangent, x.aval.dtype)]


def _rounded_batch(args: Any, dims: Any) -> Any:
  """Both have examples: the one was made of the other."""
  moved = [jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
  return _rounded_p.bind(*moved), 0


_rounded_p = new_primitive(
  "mpjax_rounded",
  lambda rounded, x: rounded,
  shape=lambda rounded, x: rounded,
  jvp=_rounded_jvp,
  transpose=_rounded_transpose,
  batch=_rounded_batch,
)
"""The first operand, with the derivative of a cast by the second."""
jet.jet_rules[_rounded_p] = lambda primals, series: (primals[0], series[0])
