"""Which parameters an optimizer leaves alone, read from the jaxpr of its update.

A frozen parameter is one whose update is zero whatever its gradient, as under
``optax.partition({..., "frozen": optax.set_to_zero()}, labels)`` or ``optax.freeze``. What makes
it so is inside closures of optax, but the update as traced shows it::

  { lambda ; a:f32[4] b:f32[4]. let     # the gradients of a trained and of a frozen parameter
      c:f32[4] = mul a -0.1             # depends on a
      d:f32[4] = broadcast_in_dim 0.0   # zero, and b is read nowhere
    in (c, d) }
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mpjax._core.tree_paths import PyTree
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import Jaxpr, JaxprEqn, Literal


def left_alone(update: Callable[[Any], tuple[Any, Any]], grads: PyTree) -> tuple[bool, ...]:
  """Finds the parameters whose update is zero and whose gradient nothing reads.

  Args:
    update: Returns updates and the optimizer's next state for gradients.
    grads: The gradients, or their shapes.

  Returns:
    A flag for each leaf of ``grads``; an update that cannot be told from its jaxpr to be zero
    counts as one that trains.
  """
  closed = jax.make_jaxpr(update)(grads)
  jaxpr = versions.open_jaxpr(closed)
  known = dict(zip(jaxpr.constvars, versions.constants(closed), strict=True))
  zero = {var for var, value in known.items() if _is_zero_array(value)}
  zero |= _zeros(jaxpr, zero)
  read = _read(jaxpr)
  count = len(jaxpr.invars)
  pairs = zip(jaxpr.invars, jaxpr.outvars[:count], strict=True)
  return tuple(_is_zero(out, zero) and var not in read for var, out in pairs)


_OF_ONE = frozenset(
  {"abs", "broadcast_in_dim", "convert_element_type", "copy", "neg", "reduce_precision", "reshape"}
  | {"sharding_constraint", "slice", "squeeze", "transpose"}
)
"""Operations that make zeros of zeros."""


def _zeros(jaxpr: Jaxpr, known: set[Any]) -> set[Any]:
  """The variables of a jaxpr that are zero if those of ``known`` are."""
  zero = set(known)
  for eqn in jaxpr.eqns:
    flags = [_is_zero(atom, zero) for atom in eqn.invars]
    zero.update(out for out, flag in zip(eqn.outvars, _results(eqn, flags), strict=True) if flag)
  return zero


def _results(eqn: JaxprEqn, flags: Sequence[bool]) -> Sequence[bool]:
  """Which results of an equation are zero, from which of its operands are."""
  name, nothing, bodies = eqn.primitive.name, [False] * len(eqn.outvars), bodies_of(eqn)
  if any(body.carry for body in bodies):
    return nothing
  if bodies:
    found = [_body_results(body.jaxpr, body.take(flags)) for body in bodies]
    return [all(column) for column in zip(*found, strict=True)]
  if name == "optimization_barrier":
    return flags
  if name in _OF_ONE:
    return flags[:1]
  if name == "mul":  # by a learning rate, which is finite
    return [any(flags)]
  if name == "div":
    return flags[:1]
  if name in ("add", "add_any", "sub"):
    return [all(flags)]
  return [all(flags[1:])] if name == "select_n" else nothing


def _body_results(body: Any, flags: Sequence[bool]) -> list[bool]:
  jaxpr = versions.open_jaxpr(body)
  known = {var for var, flag in zip(jaxpr.invars, flags, strict=True) if flag}
  zero = _zeros(jaxpr, known)
  return [_is_zero(atom, zero) for atom in jaxpr.outvars]


def _is_zero(atom: Any, zero: set[Any]) -> bool:
  return _is_zero_array(atom.val) if isinstance(atom, Literal) else atom in zero


def _is_zero_array(value: Any) -> bool:
  if isinstance(value, jax.core.Tracer) or np.ndim(value):
    return False
  return jnp.issubdtype(jnp.result_type(value), jnp.number) and bool(value == 0)


def _read(jaxpr: Jaxpr) -> set[Any]:
  """The variables that a result of a jaxpr depends on; of an operation, all operands or none."""
  read = variables_of(jaxpr.outvars)
  for eqn in reversed(jaxpr.eqns):
    if any(out in read for out in eqn.outvars):
      read |= variables_of(eqn.invars)
  return read
