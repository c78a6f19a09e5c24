"""The rules of derivatives and batching that a user gave, read out of an equation as jaxprs.

``custom_jvp``, ``custom_vjp`` and ``custom_vmap`` equations hold their rules as Python functions of
a private form. Transforming the equation itself calls them, by public means: ``jax.jvp`` of it is
the one rule, the outputs and the residuals of ``jax.vjp`` are the forward pass, and the function
that ``jax.vjp`` returns is the backward pass; ``jax.vmap`` of it is the rule for batching.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.versions import ClosedJaxpr, JaxprEqn
from mpjax._engine.running import captured

T = TypeVar("T")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Slots:
  """Which values of a list have tangents.

  Those that are no floats never have; `only` leaves out more, whose tangents are known to be zero.
  """

  differentiable: tuple[bool, ...]
  shapes: tuple[tuple[int, ...], ...]

  def only(self, asked: Sequence[bool]) -> Slots:
    """The slots of those of them that are asked for."""
    pairs = zip(self.differentiable, asked, strict=True)
    return dataclasses.replace(self, differentiable=tuple(d and a for d, a in pairs))

  def nonzero(self, values: Sequence[Any]) -> Slots:
    """The slots of those tangents or cotangents that are not known to be zero."""
    return self.only([not isinstance(value, SymbolicZero) for value in values])

  def keep(self, values: Sequence[T]) -> list[T]:
    """The entries that have tangents."""
    return [v for v, d in zip(values, self.differentiable, strict=True) if d]

  def fill(self, values: Sequence[Any]) -> list[Any]:
    """A full list again, with float0 zeros in the other places."""
    rest = iter(values)
    return [
      next(rest) if d else np.zeros(shape, jax.dtypes.float0)
      for d, shape in zip(self.differentiable, self.shapes, strict=True)
    ]


def slots(atoms: Sequence[Any]) -> Slots:
  """The slots of an equation's operands or results."""
  return slots_of([a.aval for a in atoms])


def slots_of(avals: Sequence[Any]) -> Slots:
  """The slots of abstract values."""
  return Slots(
    tuple(bool(jnp.issubdtype(a.dtype, jnp.inexact)) for a in avals), tuple(a.shape for a in avals)
  )


HAVE_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vmap_call"})
"""The primitives whose equations hold functions that run when they are transformed."""


def closed_over(eqn: JaxprEqn) -> int:
  """How many leading operands are values that the function with a rule of its own closed over.

  The rule says nothing about them, and JAX refuses to differentiate with respect to them.
  """
  return eqn.params.get("num_consts", 0)


def trace_jvp(eqn: JaxprEqn, ins: Slots) -> ClosedJaxpr:
  """The jaxpr of an equation's derivative: (primals, tangents) -> (outputs, output tangents).

  Args:
    eqn: The equation.
    ins: The operands that have a tangent; those of the others are zero, and its rule may know.
  """
  outs = slots(eqn.outvars)
  avals = [a.aval for a in eqn.invars]

  def rule(*flat: Any) -> list[jax.Array]:
    primals, tangents = flat[: len(avals)], flat[len(avals) :]
    fn, values = _differentiable(eqn, ins, primals)
    out, out_tangents = jax.jvp(fn, tuple(values), tuple(tangents))
    return [*out, *outs.keep(out_tangents)]

  return captured.trace(rule, [*avals, *ins.keep(avals[closed_over(eqn) :])])


@contextlib.contextmanager
def named(eqn: JaxprEqn) -> Iterator[None]:
  """Says what to write where a rule reads an array that it cannot.

  Rules run when the trace that their equation stands in has ended. In float32, too, JAX refuses
  what is differentiated itself, and what a jitted function or a loop around the rule computed.
  """
  try:
    yield
  except jax.errors.UnexpectedTracerError as error:
    inner = versions.open_jaxpr(eqn.params["call_jaxpr"])
    raise TypeError(
      f"A derivative rule of {inner.debug_info.func_src_info} reads an array that is gone when the "
      "rule runs, because it is differentiated as well, or was computed in a function that JAX "
      "traced first. Make it an argument of the function with the rule."
    ) from error


def _differentiable(
  eqn: JaxprEqn, ins: Slots, operands: Sequence[jax.Array]
) -> tuple[Any, list[Any]]:
  """The equation as a function of those operands that its rule is about, and these operands."""
  count = closed_over(eqn)

  def fn(*values: jax.Array) -> list[jax.Array]:
    rest = iter(values)
    slots = zip(ins.differentiable, operands[count:], strict=True)
    merged = [next(rest) if d else x for d, x in slots]
    return jaxprs.run_as_traced(eqn, [*operands[:count], *merged])

  return fn, ins.keep(operands[count:])


class Vjp(NamedTuple):
  """A custom_vjp's two halves as jaxprs, the second traced when it is asked for.

  A backward pass that raises when it is traced does so only where one is needed.

  A residual that is an operand is no result of the forward pass: a mutable array (``jax.new_ref``)
  may be handed to the backward pass, and a jaxpr cannot return one.
  """

  forward: Any
  """operands -> (outputs, residuals that are no operands)"""
  operands: tuple[int | None, ...]
  """For each residual, which operand it is; None for what the forward pass computes"""
  backward: Callable[[Slots], Any]
  """From the results that have a cotangent: (residuals, cotangents) -> cotangents of the operands
  that were asked for"""

  def residuals(self, operands: Sequence[T], computed: Sequence[T]) -> list[T]:
    """All residuals, or what is known of each, of the operands and of those that are computed."""
    rest = iter(computed)
    return [next(rest) if n is None else operands[n] for n in self.operands]


def trace_vjp(eqn: JaxprEqn, ins: Slots) -> Vjp:
  """The jaxprs of an equation's forward and backward pass.

  Args:
    eqn: The equation.
    ins: The operands whose cotangents are asked for, which its forward pass may know.
  """
  avals: list[Any] = [a.aval for a in eqn.invars]
  results: list[Any] = [v.aval for v in eqn.outvars]
  residual_tree, places = None, []

  def forward(*operands: jax.Array) -> list[jax.Array]:
    nonlocal residual_tree, places
    fn, values = _differentiable(eqn, ins, operands)
    out, pullback = jax.vjp(fn, *values)
    residuals, residual_tree = jax.tree.flatten(pullback)
    numbers = {id(x): n for n, x in enumerate(operands)}
    places = [numbers.get(id(x)) for x in residuals]
    return [*out, *(x for x, n in zip(residuals, places, strict=True) if n is None)]

  closed = captured.trace(forward, avals)
  computed = [v.aval for v in versions.open_jaxpr(closed).outvars[len(results) :]]

  def backward(outs: Slots) -> Any:
    def back(*flat: Any) -> list[jax.Array]:
      pullback = jax.tree.unflatten(residual_tree, flat[: len(stored)])
      given = iter(flat[len(stored) :])
      pairs = zip(outs.differentiable, results, strict=True)
      # A zero that JAX knows to be one: an array would count, for what a batch shares, each time.
      return list(pullback([next(given) if d else ad.Zero(a.to_ct_aval()) for d, a in pairs]))

    return captured.trace(back, [*stored, *outs.keep(results)])

  vjp = Vjp(closed, tuple(places), backward)
  stored = vjp.residuals(avals, computed)
  return vjp


def trace_transpose(eqn: JaxprEqn, count: int, outs: Slots) -> ClosedJaxpr:
  """The jaxpr of an equation's transpose: (residuals, cotangents) -> cotangents.

  Args:
    eqn: The equation, linear in its last operands.
    count: How many residuals stand before these.
    outs: The results that have a cotangent; those of the others are zero.
  """
  avals = [a.aval for a in eqn.invars]

  def transpose(*flat: Any) -> list[jax.Array]:
    def linear(*tangents: jax.Array) -> list[jax.Array]:
      return outs.keep(jaxprs.run_as_traced(eqn, [*flat[:count], *tangents]))

    return list(jax.linear_transpose(linear, *avals[count:])(list(flat[count:])))

  return captured.trace(transpose, [*avals[:count], *outs.keep([v.aval for v in eqn.outvars])])


def trace_vmap(eqn: JaxprEqn, size: int, batched: Sequence[bool]) -> tuple[ClosedJaxpr, list[bool]]:
  """The jaxpr of an equation's own batching, and which of its results have a leading axis.

  Args:
    eqn: The equation.
    size: The length of the batch, and of that axis.
    batched: Which operands have it as their leading axis.
  """
  axes = [0 if b else None for b in batched]
  operands: list[Any] = [a.aval for a in eqn.invars]
  avals = [
    jax.ShapeDtypeStruct((size, *a.shape) if b else a.shape, a.dtype)
    for a, b in zip(operands, batched, strict=True)
  ]
  found = [False] * len(eqn.outvars)

  def over(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(lambda *xs: fn(jaxprs.run_as_traced(eqn, xs)), axes, axis_size=size)

  def rule(*xs: jax.Array) -> list[jax.Array]:
    return [x if b else x[0] for x, b in zip(over(list)(*xs), found, strict=True)]

  noting = over(lambda outs: [_noting(found, n)(x) for n, x in enumerate(outs)])
  jax.eval_shape(noting, *avals)
  return captured.trace(rule, avals), found


def _noting(found: list[bool], n: int) -> Callable[[jax.Array], jax.Array]:
  """The identity, which notes in a list, at a place, that its operand is batched."""

  @jax.custom_batching.custom_vmap
  def identity(x: jax.Array) -> jax.Array:
    return x

  @identity.def_vmap
  def rule(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    found[n] = True
    return x, True

  return identity
