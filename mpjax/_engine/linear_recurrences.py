"""Matmuls through which a long loop hands on what it carries, with nothing but linear operations.

``v = r + 0.99 * (p @ v)``, ``x = x + dt * (a @ x)``, conjugate gradients: what 16 bits round of the
operand in one turn is there in every later one, and adds up to more than is added. No activation
forgets it, as in a recurrent network, and no weights of its own, as in a layer of a stack. So such
a matmul is float32; and so is one of two values that the loop carries, neither of which a layer
made, as ``h @ s`` of a quasi-Newton method. A gradient leads to what is trained, which does not
depend on it so. Nor does what goes round by way of an activation: ``v = 0.9 * v + r @ w`` with
``r = tanh(v)``, however much of it the loop carries.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from mpjax._core.primitives import MATMULS, RULES, Rule, Trait, having
from mpjax._core.scopes import is_backward
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import Body, bodies_of
from mpjax._engine.jaxprs import places_of, variables_of
from mpjax._engine.loop_carries import TERMS
from mpjax._engine.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var

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


def of_loop(body: Body, turns: int | None) -> Recurrence[int]:
  """What is known of the operands and results of a loop's body.

  Args:
    body: The body.
    turns: How often it turns, if that is known.
  """
  if not body.carry or (turns is not None and turns <= TERMS):
    return Recurrence()
  start = body.carry.start
  masks = _linear(body.jaxpr, body.carry, {n: 1 << n - start for n in body.carry})
  made = versions.open_jaxpr(body.jaxpr).outvars[: len(body.carry)]
  after = [0 if isinstance(var, Literal) else masks.get(var, 0) for var in made]
  again = _that_return(after)
  return Recurrence((*body.carry,), tuple(start + n for n in again), again)


def _that_return(made: Sequence[int]) -> tuple[int, ...]:
  """Which of some values come back to themselves, given a bit for each that one is made of."""
  found = list(made)
  for n in range(len(found)):  # Warshall 1962, "A theorem on Boolean matrices"
    found = [bits | found[n] if bits >> n & 1 else bits for bits in found]
  return tuple(n for n, bits in enumerate(found) if bits >> n & 1)


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
  reads = {inner.invars[n] for n in known.reads}
  for eqn in inner.eqns:
    if not reads.isdisjoint(variables_of(eqn.invars)):
      reads.update(eqn.outvars)
  return Recurrence(reads, _linear(jaxpr, known.reads, dict.fromkeys(known.linear, 1)).keys())


def _linear(jaxpr: AnyJaxpr, carried: Collection[int], masks: Mapping[int, int]) -> dict[Var, int]:
  """What in a jaxpr depends linearly on some of its operands, on some way.

  Args:
    jaxpr: The jaxpr.
    carried: Which operands depend on what a loop carries.
    masks: The bits of such operands, by index.

  Returns:
    The variables, with the bits of all such operands.
  """
  inner = versions.open_jaxpr(jaxpr)
  reads = {inner.invars[n] for n in carried}
  found = {inner.invars[n]: bits for n, bits in masks.items()}
  for eqn in inner.eqns:
    if reads.isdisjoint(variables_of(eqn.invars)):
      continue
    if _is_call(eqn):
      (body,) = bodies_of(eqn)
      atoms = body.take(eqn.invars)
      inside = _linear(body.jaxpr, places_of(atoms, reads), _bits_of(atoms, found))
      made = _bits_of(versions.open_jaxpr(body.jaxpr).outvars, inside)
    else:
      own = _bits_of(eqn.invars, found) if _is_linear(eqn, reads) else {}
      made = {0: functools.reduce(operator.or_, own.values())} if own else {}
    found |= {eqn.outvars[n]: bits for n, bits in made.items()}
    reads.update(eqn.outvars)
  return found


def _bits_of(atoms: Sequence[Atom], found: Mapping[Var, int]) -> dict[int, int]:
  """The bits of those of some operands or results that have any, by index."""
  return {n: found[v] for n, v in enumerate(atoms) if not isinstance(v, Literal) and v in found}


def entering(eqn: JaxprEqn, body: Body, around: Recurrence[Any]) -> Recurrence[int]:
  """What is known of the operands and results of a body that runs once."""
  atoms = body.take(eqn.invars)
  return Recurrence(
    tuple(sorted(places_of(atoms, around.reads))),
    tuple(sorted(places_of(atoms, around.linear))),
    tuple(sorted(places_of(eqn.outvars, around.leads))),
  )


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


def powers(inner: Jaxpr, carried: Collection[Var]) -> frozenset[Var]:
  """The products of powers of a square matrix, as squaring it again and again makes them.

  Not that of ``a @ a`` alone, if no loop hands it on.

  Args:
    inner: A jaxpr.
    carried: What a loop hands on to it.
  """
  bases: dict[Var, Atom] = {}
  again = set[Var](carried)
  for eqn in inner.eqns:
    if eqn.primitive.name == "dot_general" and jaxprs.is_square_product(eqn):
      first, second = [a if isinstance(a, Literal) else bases.get(a, a) for a in eqn.invars]
      if first is second:
        bases[eqn.outvars[0]] = first
        read = variables_of(eqn.invars)
        again |= {*eqn.outvars, *(read & bases.keys())} if read & (again | bases.keys()) else set()
  return frozenset(bases.keys() & again)


def _is_call(eqn: JaxprEqn) -> bool:
  return RULES.get(eqn.primitive.name) is Rule.CALL
