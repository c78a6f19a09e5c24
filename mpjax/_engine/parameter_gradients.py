"""Which equations sum the gradient of a parameter, which is then float32.

Matmuls among them multiply in float8 where a policy says so.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jax.sharding import AxisType

from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine.jaxprs import JaxprEqn, is_float32
from mpjax._engine.kinds import PARAM
from mpjax._engine.plan import Forms

_ELEMENTWISE = having(Trait.ARITHMETIC)


def parameter_of(eqn: JaxprEqn, rule: Rule, forms: Forms) -> int | None:
  """The one operand that is a parameter, whose gradient an equation sums: it is to be float32.

  That of a matmul, or of an equation that spreads it, as a bias. None where types say how arrays
  lie on devices: there the gradient is as JAX makes it.
  """
  if rule not in (Rule.LOWER, Rule.FOLLOW) or len(forms) != 2 or None in forms:
    return None
  if PARAM not in forms or forms == (PARAM, PARAM) or not is_float32(eqn.outvars[0]):
    return None
  found = [n for n, form in enumerate(forms) if form == PARAM]
  if rule is Rule.FOLLOW and not _is_spread(eqn, found[0]):
    return None
  placed = any(_is_placed(atom.aval, eqn) for atom in eqn.invars)
  return None if placed else found[0]


def why_not_float8(
  eqn: JaxprEqn, rule: Rule, parameter: int | None, logarithms: Collection[Any], is_head: bool
) -> str:
  """Why a matmul multiplies in 16 bits although its policy says float8; empty if it does not.

  Args:
    eqn: The matmul.
    rule: Its rule.
    parameter: Which operand is a parameter, by `parameter_of`.
    logarithms: The variables that lead into a logarithm.
    is_head: Whether it is the backward pass of one whose result does.
  """
  if rule is not Rule.LOWER:
    return "what it returns is held in float32"
  if eqn.primitive.name != "dot_general":
    return f"{eqn.primitive.name} has no float8 form"
  if parameter is None:
    placed = any(_is_placed(atom.aval, eqn) for atom in eqn.invars)
    return "its arrays lie on an Explicit mesh" if placed else "no single operand is a parameter"
  if any(eqn.params["dimension_numbers"][1]):
    return "it has batch dimensions"
  if is_head:
    return "it is the derivative of one that leads into a logarithm"
  return "it leads into a logarithm" if eqn.outvars[0] in logarithms else ""


def _is_spread(eqn: JaxprEqn, operand: int) -> bool:
  """Whether an equation repeats an operand along dimensions in which that has size one."""
  given: Any = eqn.invars[operand].aval
  made: Any = eqn.outvars[0].aval
  return eqn.primitive.name in _ELEMENTWISE and given.shape != made.shape


def _is_placed(aval: Any, eqn: JaxprEqn) -> bool:
  """Whether the type of a matmul's operand says on which devices it lies."""
  axes = aval.sharding.mesh.axis_types
  in_shard_map = AxisType.Manual in axes and eqn.primitive.name != "dot_general"
  return AxisType.Explicit in axes or in_shard_map
