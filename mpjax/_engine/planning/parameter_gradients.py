"""Which equations sum the gradient of a parameter, which is then float32.

Matmuls among them multiply in float8 where a policy says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import AxisType

from mpjax._core.dtypes import BFLOAT16, is_of
from mpjax._core.primitives import KEEPS_NUMBERS, MATMULS, Rule, Trait, having
from mpjax._engine.program.jaxprs import is_float32
from mpjax._engine.program.kinds import PARAM, Form, Forms
from mpjax._engine.program.matmuls import contracts_nothing, is_inner
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

_ARITHMETIC = having(Trait.ARITHMETIC)


def parameter_of(eqn: JaxprEqn, rule: Rule, forms: Forms) -> int | None:
  """The one operand that is a parameter, whose gradient an equation sums: it is to be float32.

  That of a matmul, or of an equation that spreads it, as a bias. None where types say how arrays
  lie on devices: there the gradient is as JAX makes it.

  Args:
    eqn: An equation that reads a parameter.
    rule: Its rule.
    forms: How its operands are held.
  """
  name = eqn.primitive.name
  is_matmul = (rule is Rule.LOWER and name in MATMULS) or (
    rule is Rule.WIDE and name == "dot_general"
  )
  if not (is_matmul or rule is Rule.FOLLOW) or len(forms) != 2 or None in forms:
    return None
  if forms == (PARAM, PARAM) or not is_float32(eqn.outvars[0]):
    return None
  found = [n for n, form in enumerate(forms) if form == PARAM]
  if rule is Rule.FOLLOW and not _is_spread(eqn, found[0]):
    return None
  placed = any(_is_placed(atom.aval) for atom in eqn.invars)
  return None if placed else found[0]


class CastParameters:
  """Parameters that a model casts to 16 bits itself, as by ``dtype=``, in one jaxpr.

  In ``c:bf16 = convert_element_type w``, ``d:bf16 = transpose c`` both are. Rows that are looked up
  are none, as those of an embedding.

  Args:
    variables: Those that come in so.
  """

  def __init__(self, variables: Iterable[Any]) -> None:
    self._cast = set(variables)

  def follow(
    self, eqn: JaxprEqn, forms: Mapping[Var, Form | None], called: Sequence[int] = ()
  ) -> None:
    """Add what an equation casts or moves, and these results of the function that it calls."""
    self._cast.update(eqn.outvars[n] for n in called)
    if eqn.primitive.name not in _CASTS:
      return
    operands: list[Any] = [a for a in eqn.invars if is_of(a.aval, jnp.inexact)]
    if operands and all(self._is_parameter(atom, forms) for atom in operands):
      self._cast.update(v for v in eqn.outvars if is_of(v.aval, jnp.inexact) and not is_float32(v))

  def among(self, atoms: Sequence[Atom]) -> tuple[int, ...]:
    """Which of some operands are cast parameters, by index."""
    pairs = enumerate(atoms)
    return tuple(n for n, a in pairs if not isinstance(a, Literal) and a in self._cast)

  def sole(self, eqn: JaxprEqn, forms: Mapping[Var, Form | None]) -> int | None:
    """The one operand of a matmul that is a parameter, in whatever format."""
    found = [n for n, atom in enumerate(eqn.invars[:2]) if self._is_parameter(atom, forms)]
    return found[0] if len(found) == 1 else None

  def _is_parameter(self, atom: Atom, forms: Mapping[Var, Form | None]) -> bool:
    return not isinstance(atom, Literal) and (forms[atom] == PARAM or atom in self._cast)


_CASTS = KEEPS_NUMBERS - {"gather"}


def why_not_float8(
  eqn: JaxprEqn,
  rule: Rule,
  forms: Forms,
  parameter: int | None,
  logarithms: Collection[Var],
  is_head: bool,
) -> str:
  """Why a matmul multiplies in 16 bits although its policy says float8; empty if it does not.

  Args:
    eqn: The matmul.
    rule: Its rule.
    forms: How its operands are held, None for what is not float32.
    parameter: Which operand is a parameter, by `CastParameters.sole`.
    logarithms: The variables that lead into a logarithm.
    is_head: Whether it is the backward pass of one whose result does.
  """
  if rule is not Rule.LOWER:
    return "what it returns is held in float32"
  if eqn.primitive.name != "dot_general":
    return f"{eqn.primitive.name} has no float8 form"
  if any(_is_placed(atom.aval) for atom in eqn.invars):
    return "its arrays lie on an Explicit mesh"
  if parameter is None:
    return "no single operand is a parameter"
  if any(eqn.params["dimension_numbers"][1]):
    return "it has batch dimensions"
  if contracts_nothing(eqn) or is_inner(eqn):
    return "it is a product or a sum of products, no matmul"
  if foreign := _other_format(eqn, forms):
    return f"its author gave it {foreign}"
  if is_head:
    return "it is the derivative of one that leads into a logarithm"
  return "it leads into a logarithm" if eqn.outvars[0] in logarithms else ""


def _other_format(eqn: JaxprEqn, forms: Forms) -> str:
  """The format other than bfloat16 that a matmul's author gave an operand, or 16-bit ones' result.

  Empty if there is none.
  """
  given: list[Any] = [a.aval for a, form in zip(eqn.invars, forms, strict=True) if form is None]
  if not any(forms):
    given.append(eqn.outvars[0].aval)
  return next((aval.dtype.name for aval in given if aval.dtype != BFLOAT16), "")


def _is_spread(eqn: JaxprEqn, operand: int) -> bool:
  """Whether an equation repeats an operand along dimensions in which that has size one."""
  given: Any = eqn.invars[operand].aval
  made: Any = eqn.outvars[0].aval
  return eqn.primitive.name in _ARITHMETIC and given.shape != made.shape


def _is_placed(aval: Any) -> bool:
  """Whether the type of an operand says on which devices it lies."""
  return AxisType.Explicit in aval.sharding.mesh.axis_types
