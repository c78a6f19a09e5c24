"""What goes from device to device in 16 bits.

The gradient of a parameter is summed over devices in float32, and so is that of what many devices
share. Cotangents of activations go back as they came, in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.planning.plan import Step
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import FEW, PARAM
from mpjax._engine.program.versions import JaxprEqn
from mpjax._engine.running.attached_derivatives import constant, with_linear_derivative
from mpjax._engine.running.environment import to_dtype


def in_16_bits(step: Step) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
  """A step that moves its operand between devices, in 16 bits.

  Returns:
    A function that makes its result in float32, and of what that is a copy: in 16 bits, without a
    derivative.
  """
  dtype = step.travels or FLOAT32

  def move(x: jax.Array) -> jax.Array:
    return jaxprs.run_with(step.eqn, [x], step.params)[0]

  def narrow(x: jax.Array) -> jax.Array:
    return move(to_dtype(x, dtype))

  def widened(x: jax.Array) -> jax.Array:
    return to_dtype(narrow(x), FLOAT32)

  adds_few = step.outs[0] != PARAM and _adds_few_up(step.eqn)
  along = widened if adds_few else move

  def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    copy = narrow(constant(x))
    return with_linear_derivative(to_dtype(copy, FLOAT32), x, along), copy

  return run


def _adds_few_up(eqn: JaxprEqn) -> bool:
  """Whether no more terms meet on the way back than 16 bits can count."""
  return eqn.primitive.name in _ONE_TO_ONE or (jaxprs.devices(eqn) or FEW + 1) <= FEW


_ONE_TO_ONE = frozenset({"all_to_all", "ppermute"})
