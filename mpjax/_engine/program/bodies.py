"""The bodies of an equation: which of its operands each of them takes, and what it gives.

===============  =============  ============================  ====================================
primitive        body           takes                         gives
===============  =============  ============================  ====================================
jit, remat, ...  the function   all operands                  all results
shard_map        the function   one device's parts of them    its parts of the results
scan             the body       constants, carry, slices      carry, one slice of what is stacked
while            the condition  constants of its own, carry   whether the loop goes on
..               the body       constants of its own, carry   carry
cond             each branch    all operands but the index    all results
===============  =============  ============================  ====================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._core.primitives import RULES, Rule
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn

T = TypeVar("T")


class Operands(NamedTuple, Generic[T]):
  """The operands of a body, by what they are in it; all are constants where nothing recurs."""

  consts: list[T]
  carry: list[T]
  slices: list[T]


class Body(NamedTuple):
  """A jaxpr that an equation holds, and what it has to do with the equation.

  Attributes:
    jaxpr: The jaxpr, as the equation holds it.
    operands: Which of the equation's operands it takes, by index, in its order.
    carry: Which of its own operands its first results become in the next turn of a loop.
    is_test: Whether its one result tells a loop to go on, and is none of the equation's.
  """

  jaxpr: AnyJaxpr
  operands: Sequence[int]
  carry: range
  is_test: bool = False

  def take(self, values: Sequence[T]) -> list[T]:
    """Its operands, of those of the equation (or what is known of these)."""
    return [values[n] for n in self.operands]

  def split(self, values: Sequence[T]) -> Operands[T]:
    """Its operands by what they are, of those of the equation."""
    own, (first, last) = self.take(values), (self.carry.start, self.carry.stop)
    return Operands(own[:first], own[first:last], own[last:])


def bodies_of(eqn: JaxprEqn) -> tuple[Body, ...]:
  """The bodies of an equation, in the order in which its plan has them; none if it has no known.

  Example:
    >>> import jax
    >>> loop = lambda x: jax.lax.while_loop(lambda i: i < x, lambda i: i + x, 0)
    >>> test, body = bodies_of(jax.make_jaxpr(loop)(3).eqns[0])
    >>> test.split(["x", "also x", "i"]), test.is_test
    (Operands(consts=['x'], carry=['i'], slices=[]), True)
    >>> body.split(["x", "also x", "i"]).consts
    ['also x']
  """
  find = _FINDERS.get(eqn.primitive.name)
  return () if find is None else find(eqn)


def _call(eqn: JaxprEqn) -> tuple[Body, ...]:
  (jaxpr,) = (eqn.params[key] for key in _HOLDS if key in eqn.params)
  return (_function(jaxpr, range(len(eqn.invars))),)


def _scan(eqn: JaxprEqn) -> tuple[Body, ...]:
  consts, carry = versions.scan_shape(eqn)
  return (Body(eqn.params["jaxpr"], range(len(eqn.invars)), range(consts, consts + carry)),)


def _while(eqn: JaxprEqn) -> tuple[Body, ...]:
  of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
  first, last = of_test + of_body, len(eqn.invars)
  carry = last - first
  return (
    Body(
      eqn.params["cond_jaxpr"],
      [*range(of_test), *range(first, last)],
      range(of_test, of_test + carry),
      is_test=True,
    ),
    Body(eqn.params["body_jaxpr"], range(of_test, last), range(of_body, of_body + carry)),
  )


def _cond(eqn: JaxprEqn) -> tuple[Body, ...]:
  rest = range(1, len(eqn.invars))
  return tuple(_function(branch, rest) for branch in eqn.params["branches"])


def _function(jaxpr: AnyJaxpr, operands: range) -> Body:
  """A body that runs once: nothing is carried from turn to turn."""
  return Body(jaxpr, operands, range(len(operands), len(operands)))


_HOLDS = ("jaxpr", "call_jaxpr", "call", "fwd_jaxpr", "callee")
_BODIES: dict[Rule, Callable[[JaxprEqn], tuple[Body, ...]]] = {
  Rule.CALL: _call,
  Rule.SCAN: _scan,
  Rule.WHILE: _while,
  Rule.COND: _cond,
  Rule.CUSTOM_JVP: _call,
  Rule.CUSTOM_VJP: _call,
  Rule.CUSTOM_VMAP: _call,
  Rule.REMAT_OPT: _call,
  Rule.LINEAR_CALL: _call,
  Rule.CUSTOM_PARTITIONING: _call,
}
RULES_WITH_BODIES = frozenset(_BODIES)
_FINDERS = {name: _BODIES[rule] for name, rule in RULES.items() if rule in _BODIES}


HAVE_BODIES = _FINDERS.keys()  # few do, so who asks of every equation looks here first


def repetitions(eqn: JaxprEqn) -> int | None:
  """How often an equation runs its bodies, on all devices together; None if it does not say."""
  name = eqn.primitive.name
  if name == "shard_map":
    sizes = eqn.params["mesh"].shape
    return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
  if name == "scan" and jaxprs.is_known(eqn.params["length"]):
    return eqn.params["length"]
  return None if name in ("scan", "while") else 1


def settled(
  carry: Sequence[T], turn: Callable[[list[T]], Sequence[T]], join: Callable[[tuple[T, T]], T]
) -> list[T]:
  """What is known of a loop's carry in every turn: the least fixed point from where it starts.

  Args:
    carry: What is known at the start.
    turn: What the body's results are then known to be, of which the first are the carry again.
    join: What is known of a value that is either of two.
  """
  held = list(carry)
  while True:
    outs = turn(held)
    grown = [join(pair) for pair in zip(held, outs[: len(held)], strict=True)]
    if grown == held:
      return held
    held = grown


def mapped(eqn: JaxprEqn, fn: Callable[..., Any], out_specs: Any = None) -> Callable[..., Any]:
  """Another function over the devices as a ``shard_map`` equation has its body.

  Args:
    eqn: The equation.
    fn: What runs on one device, on its parts of the operands.
    out_specs: How its results lie on the devices; as those of the equation when None.
  """
  params = eqn.params
  return jax.shard_map(
    fn,
    mesh=params["mesh"],
    in_specs=tuple(params["in_specs"]),
    out_specs=tuple(params["out_specs"]) if out_specs is None else out_specs,
    axis_names=params["newly_manual_axes"],
    check_vma=params["check_vma"],
  )


def after_turn(more: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """What a ``while`` carries after a turn: in a batch of loops, what has ended keeps what it had.

  JAX leaves the test of such a loop a batch of booleans, and chooses where it lowers the loop.

  Args:
    more: bool[...], what the test said before the turn: its shape begins that of the values.
    new: What the body made.
    old: What it was given.
  """
  spread = jnp.expand_dims(more, [*range(more.ndim, new.ndim)])
  return lax.select(jnp.broadcast_to(spread, new.shape), new, old)
