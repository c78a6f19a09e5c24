"""Derivatives of the functions that `cast_inputs` marks, which are marked themselves.

A derivative taken inside autocast, or without a policy, is one of a function whose format is not
known yet. Its forward and its backward pass are functions in every format, and what goes from the
one to the other is laid out as in the first format that the function has. A format that stores
something else (a softmax that was widened, say) stores nothing: its backward pass computes the
forward pass again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.kernels import (
  Kernel,
  Run,
  as_float32,
  batched,
  cast_inputs_p,
  corresponds,
  in_every_format,
)
from mpjax._engine.program.versions import AnyJaxpr, Literal
from mpjax._engine.running.custom_derivatives import slots_of


class _Forward(NamedTuple):
  """A forward pass in one format.

  Attributes:
    jaxpr: operands -> (results, residuals)
    sources: Where each residual stands first in the list of operands, results and residuals.
    residuals: The abstract residuals.
    tree: Of the residuals, as the function that is the backward pass.
  """

  jaxpr: AnyJaxpr
  sources: tuple[int, ...]
  residuals: list[Any]
  tree: Any

  def run(self, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Results and residuals."""
    return jaxprs.evaluate(self.jaxpr, operands)

  def stores_as(self, other: _Forward) -> bool:
    """Whether its residuals may take the places of those of another format."""
    return self.sources == other.sources and all(map(corresponds, other.residuals, self.residuals))


class _Derivative:
  """The derivative of a kernel in some of its operands.

  Attributes:
    forward: operands -> (results, what is stored)
    stored: Which of these the backward pass is handed, by index.
    back: (operands, stored, cotangents) -> cotangents of the operands that were asked for
    results: The abstract results that have tangents.
    along: (operands, stored, tangents) -> tangents of the results; made only if it is asked for
  """

  def __init__(self, kernel: Kernel, asked: tuple[bool, ...]) -> None:
    self._kernel, self._asked = kernel, asked
    self._count, self._outs = len(asked), slots_of(kernel.results)
    passes = in_every_format(self._trace_forward)
    self._passes = passes
    layout = next((p for p in passes.values() if isinstance(p, _Forward)), None)
    first = next((d for d, p in passes.items() if isinstance(p, _Forward)), FLOAT32)
    if layout is None:
      raise passes[kernel.first]
    self._layout = layout._replace(residuals=[as_float32(a, first) for a in layout.residuals])
    before = self._count + len(kernel.results)
    self._new = [n for n, place in enumerate(layout.sources) if place == before + n]
    self._places = sorted({place for place in layout.sources if place >= self._count})
    made = [*range(self._count, before), *(before + n for n in self._new)]
    self.stored = tuple(map(made.index, self._places))
    self.results = self._outs.keep(kernel.results)
    self.forward = kernel.derived(self._forward_in, f"{kernel.name}, its forward pass")
    self.along = functools.cache(
      lambda: kernel.derived(self._along_in, f"{kernel.name}, its tangent")
    )
    self.back = kernel.derived(self._back_in, f"{kernel.name}, its backward pass")

  def asked_for(self, values: Sequence[jax.Array]) -> list[jax.Array]:
    """The entries of a list as long as that of the operands in whose place one was asked for."""
    return [v for v, asked in zip(values, self._asked, strict=True) if asked]

  def _function(
    self, dtype: np.dtype, operands: Sequence[jax.Array]
  ) -> Callable[..., list[jax.Array]]:
    """The kernel as a function of the operands that were asked for."""

    def fn(*values: jax.Array) -> list[jax.Array]:
      rest = iter(values)
      slots = zip(operands, self._asked, strict=True)
      return self._kernel.run(dtype, *(next(rest) if asked else x for x, asked in slots))

    return fn

  def _trace_forward(self, dtype: np.dtype) -> _Forward:
    tree: Any = None

    def fn(*operands: jax.Array) -> list[jax.Array]:
      nonlocal tree
      out, pullback = jax.vjp(self._function(dtype, operands), *self.asked_for(operands))
      residuals, tree = jax.tree.flatten(pullback)
      return [*out, *residuals]

    closed = jaxprs.trace(fn, self._operands(dtype))
    inner = versions.open_jaxpr(closed)
    places: list[Any] = [*inner.invars, *inner.outvars]
    found = inner.outvars[len(self._kernel.results) :]
    first = len(places) - len(found)
    sources = tuple(
      first + n if isinstance(atom, Literal) else next(m for m, v in enumerate(places) if v is atom)
      for n, atom in enumerate(found)
    )
    return _Forward(closed, sources, [atom.aval for atom in found], tree)

  def _in(self, dtype: np.dtype) -> tuple[_Forward, bool]:
    """The forward pass in a format, and whether it stores what it should."""
    found = self._passes[dtype]
    if isinstance(found, Exception):
      raise found
    return found, found.stores_as(self._layout)

  def _operands(self, dtype: np.dtype) -> Sequence[Any]:
    return self._kernel.traced_in(dtype).in_avals

  def _handed(self, dtype: np.dtype) -> list[jax.Array]:
    """The abstract operands of the derivative in a format, before tangents or cotangents."""
    forward, fits = self._in(dtype)
    residuals = forward.residuals if fits else self._layout.residuals
    known = [*self._operands(dtype), *self._kernel.traced_in(dtype).out_avals, *residuals]
    return [*self._operands(dtype), *(known[place] for place in self._places)]

  def _forward_in(self, dtype: np.dtype) -> tuple[Run, Sequence[Any]]:
    forward, fits = self._in(dtype)
    count, unused = len(self._kernel.results), self._layout.residuals

    def run(*operands: jax.Array) -> list[jax.Array]:
      found = forward.run(operands)
      stored = found[count:] if fits else [jnp.zeros(a.shape, a.dtype) for a in unused]
      return [*found[:count], *(stored[n] for n in self._new)]

    return run, self._operands(dtype)

  def _back_in(self, dtype: np.dtype) -> tuple[Run, Sequence[Any]]:
    forward, fits = self._in(dtype)
    handed = self._handed(dtype)

    def run(*flat: Any) -> list[jax.Array]:
      operands, cotangents = flat[: self._count], flat[len(handed) :]
      if fits:
        place = dict(zip([*range(self._count), *self._places], flat[: len(handed)], strict=True))
        pullback = jax.tree.unflatten(forward.tree, [place[n] for n in forward.sources])
      else:
        _, pullback = jax.vjp(self._function(dtype, operands), *self.asked_for(operands))
      return list(pullback(self._outs.fill(cotangents)))

    return run, [*handed, *self._outs.keep(self._kernel.traced_in(dtype).out_avals)]

  def _along_in(self, dtype: np.dtype) -> tuple[Run, Sequence[Any]]:
    handed = self._handed(dtype)

    def run(*flat: Any) -> list[jax.Array]:
      operands, tangents = flat[: self._count], flat[len(handed) :]
      values = self.asked_for(operands)
      _, found = jax.jvp(self._function(dtype, operands), tuple(values), tuple(tangents))
      return self._outs.keep(found)

    return run, [*handed, *self.asked_for(self._operands(dtype))]


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[jax.Array], *, kernel: Kernel) -> Any:
  asked = tuple(not isinstance(t, ad.Zero) for t in tangents)
  derivative = _Derivative(kernel, asked)
  found = cast_inputs_p.bind(*primals, kernel=derivative.forward)
  results = found[: len(kernel.results)]
  handed = [*primals, *(found[n] for n in derivative.stored)]
  moved = _tangent_p.bind(
    *handed,
    *derivative.asked_for(tangents),
    kernel=derivative.along,
    back=derivative.back,
    results=tuple(derivative.results),
    known=len(handed),
  )
  rest = iter(moved)
  has_tangent = slots_of(kernel.results).differentiable
  filled = [
    next(rest) if has else ad.Zero(jax.typeof(x).to_tangent_aval())
    for x, has in zip(results, has_tangent, strict=True)
  ]
  return results, filled


ad.primitive_jvps[cast_inputs_p] = _jvp

_tangent_p = Primitive("mpjax_cast_inputs_tangent")
"""The derivative of a `Kernel` as a linear function of its last operands."""
_tangent_p.multiple_results = True


@_tangent_p.def_impl
def _impl(*operands: jax.Array, kernel: Callable[[], Kernel], **_: Any) -> list[jax.Array]:
  return kernel().run(FLOAT32, *operands)


@_tangent_p.def_abstract_eval
def _abstract_eval(*avals: Any, results: tuple[Any, ...], **_: Any) -> list[jax.Array]:
  del avals
  return list(results)


def _tangent_jvp(primals: Any, tangents: Any, *, kernel: Callable[[], Kernel], **_: Any) -> Any:
  return _jvp(primals, tangents, kernel=kernel())


def _transpose(
  cotangents: Any, *operands: jax.Array, back: Kernel, known: int, **_: Any
) -> list[Any | None]:
  given = map(ad.instantiate_zeros, cotangents)
  found = cast_inputs_p.bind(*operands[:known], *given, kernel=back)
  linear = map(ad.is_undefined_primal, operands[known:])
  return [
    *[None] * known,
    *(ct if is_in else None for ct, is_in in zip(found, linear, strict=True)),
  ]


def _batch(
  axis: Any,
  operands: Sequence[jax.Array],
  dims: Sequence[Any],
  *,
  kernel: Callable[[], Kernel],
  back: Kernel,
  results: tuple[Any, ...],
  known: int,
) -> tuple[list[Any], list[int]]:
  """Every tangent gets the batch as its leading axis, so that every cotangent has it."""
  tangents = [
    jnp.broadcast_to(x, (axis.size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
    for x, d in zip(operands[known:], dims[known:], strict=True)
  ]
  handed = [jax.typeof(x) for x in operands[:known]]
  many = [_with_axis(aval, axis.size) for aval in results]
  at, ahead = [*dims[:known]], [jax.typeof(x) for x in tangents]
  along = functools.cache(
    lambda: batched(kernel(), axis, [*handed, *ahead], [*at, *[0] * len(ahead)])
  )
  return _tangent_p.bind(
    *operands[:known],
    *tangents,
    kernel=along,
    back=batched(back, axis, [*handed, *many], [*at, *[0] * len(many)]),
    results=tuple(many),
    known=known,
  ), [0] * len(many)


def _with_axis(aval: Any, size: int) -> Any:
  """An abstract value with one more axis ahead."""
  (found,) = jaxprs.trace(lambda x: jnp.broadcast_to(x, (size, *x.shape)), [aval]).out_avals
  return found


ad.primitive_jvps[_tangent_p] = _tangent_jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.fancy_primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_impl, multiple_results=True))
