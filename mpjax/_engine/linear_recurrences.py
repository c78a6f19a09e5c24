"""Matmuls through which a long loop hands on what it carries, with nothing but linear operations.

``v = r + 0.99 * (p @ v)``, ``x = x + dt * (a @ x)``, conjugate gradients: what 16 bits round of the
operand in one turn is there in every later one, and adds up to more than is added. No activation
forgets it, as in a recurrent network, and no weights of its own, as in a layer of a stack. So such
a matmul is float32; and so is one of two values that the loop carries, neither of which a layer
made, as ``h @ s`` of a quasi-Newton method. A gradient leads to what is trained, which does not
depend on it so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from mpjax._core.primitives import MATMULS, RULES, Rule, Trait, having
from mpjax._core.scopes import is_backward
from mpjax._engine import versions
from mpjax._engine.bodies import Body, bodies_of
from mpjax._engine.jaxprs import places_of, variables_of
from mpjax._engine.loop_carries import TERMS
from mpjax._engine.versions import AnyJaxpr, JaxprEqn

T = TypeVar("T")

_ADDS = having(Trait.MOVES) | {
  *("add", "sub", "add_any", "neg", "reduce_sum", "convert_element_type", "broadcast_in_dim"),
  *("reduce_max", "reduce_min"),  # of the values of actions: no nearer to each other than these
}
_MULTIPLIES = MATMULS | {"mul"}


class Recurrence(NamedTuple, Generic[T]):
  """What a loop hands on, in one jaxpr: operands and results by index, or variables.

  Attributes:
    reads: What depends on what the loop carries.
    linear: What depends on it linearly, on some way.
    leads: What linear operations, and matmuls with whatever it carries, as a gain, lead from to
      what the next turn is given.
  """

  reads: Collection[T] = ()
  linear: Collection[T] = ()
  leads: Collection[T] = ()


def of_loop(carry: range, turns: int | None) -> Recurrence[int]:
  """What is known of the operands and results of a loop's body.

  Args:
    carry: The operands that it carries.
    turns: How often it turns, if that is known.
  """
  if turns is not None and turns <= TERMS:
    return Recurrence()
  return Recurrence((*carry,), (*carry,), (*range(len(carry)),))


def recurrence(jaxpr: AnyJaxpr, known: Recurrence[int]) -> Recurrence[Any]:
  """The variables of a jaxpr that stand between what a loop is given and what it hands on.

  Args:
    jaxpr: A jaxpr, the body of a loop or of a call in one.
    known: What is known of its operands and results.
  """
  if not known.linear or not known.leads:
    return Recurrence()
  inner, (reads, linear, _) = versions.open_jaxpr(jaxpr), _read(jaxpr, known)
  leads = variables_of(inner.outvars[n] for n in known.leads)
  for eqn in reversed(inner.eqns):
    if not leads.isdisjoint(eqn.outvars) and not is_backward(eqn.source_info.name_stack):
      leads |= variables_of(_leading_operands(eqn, Recurrence(reads, linear, leads)))
  return Recurrence(reads, linear, leads)


def _read(jaxpr: AnyJaxpr, known: Recurrence[int]) -> Recurrence[Any]:
  """What in a jaxpr depends on what the loop carries, whatever it leads to."""
  inner = versions.open_jaxpr(jaxpr)
  reads, linear = ({inner.invars[n] for n in part} for part in known[:2])
  for eqn in inner.eqns:
    if not reads.isdisjoint(variables_of(eqn.invars)):
      linear.update(eqn.outvars[n] for n in _linear_results(eqn, Recurrence(reads, linear)))
      reads.update(eqn.outvars)
  return Recurrence(reads, linear)


def entering(eqn: JaxprEqn, body: Body, around: Recurrence[Any]) -> Recurrence[int]:
  """What is known of the operands and results of a body that runs once."""
  atoms = body.take(eqn.invars)
  return Recurrence(
    tuple(sorted(places_of(atoms, around.reads))),
    tuple(sorted(places_of(atoms, around.linear))),
    tuple(sorted(places_of(eqn.outvars, around.leads))),
  )


def _linear_results(eqn: JaxprEqn, around: Recurrence[Any]) -> Collection[int]:
  """Which results of an equation depend linearly on what the loop carries."""
  if _is_call(eqn):
    (body,) = bodies_of(eqn)
    inside = _read(body.jaxpr, entering(eqn, body, around))
    return places_of(versions.open_jaxpr(body.jaxpr).outvars, inside.linear)
  return (0,) if _is_linear(eqn, around.reads) and places_of(eqn.invars, around.linear) else ()


def _leading_operands(eqn: JaxprEqn, around: Recurrence[Any]) -> Sequence[Any]:
  """The operands of an equation from which linear operations lead to results that are handed on."""
  if _is_call(eqn):
    (body,) = bodies_of(eqn)
    inside = recurrence(body.jaxpr, entering(eqn, body, around))
    invars = versions.open_jaxpr(body.jaxpr).invars
    return [eqn.invars[body.operands[n]] for n in places_of(invars, inside.leads)]
  is_free = eqn.primitive.name in MATMULS or _is_linear(eqn, around.reads)
  return eqn.invars if is_free else ()


def _is_linear(eqn: JaxprEqn, reads: Collection[Any]) -> bool:
  """Whether an equation is linear in those of its operands that depend on what a loop carries."""
  name, places = eqn.primitive.name, places_of(eqn.invars, reads)
  if name in _MULTIPLIES:
    return len(places) == 1
  return name in _ADDS or (name == "div" and 1 not in places)


def _is_call(eqn: JaxprEqn) -> bool:
  return RULES.get(eqn.primitive.name) is Rule.CALL
