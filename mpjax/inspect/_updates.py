"""Finds what a function updates: the arguments that come back with something added to them.

A step that does nothing differs from the true one by no more than its length, which is small
beside the parameters: whoever compares must compare the change.
"""

from __future__ import annotations

from typing import Any

from mpjax._core.primitives import ADDS, SCALES
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import Body, bodies_of, repetitions
from mpjax._engine.program.versions import AnyJaxpr, Jaxpr, JaxprEqn, Literal

_SUMS = ADDS | {"add_any"}
_KEEPS = frozenset(
  {"convert_element_type", "select_n", "copy", "copy_p", "reduce_precision", "name"}
  | {"optimization_barrier", "sharding_constraint", "stop_gradient", "reshard"}
)


def updated(jaxpr: AnyJaxpr) -> dict[int, int]:
  """Which operand each result of a jaxpr updates, both by index; results that update none are out.

  A result updates an operand of its shape that it was made of by additions, scaling and choice
  alone, or by a loop that carries it: ``w - 0.1 * g``, ``0.9 * m + 0.1 * g``.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> step = lambda w, x: (jnp.mean(x @ w), w - 0.1 * x)
    >>> updated(jax.make_jaxpr(step)(jnp.ones((4, 4)), jnp.ones((4, 4))))
    {1: 0}
  """
  return _Search().updated(versions.open_jaxpr(jaxpr))


class _Search:
  """Looks from results back to what they are sums of, through the bodies of equations."""

  def __init__(self) -> None:
    self._makers: dict[int, dict[Any, tuple[JaxprEqn, int]]] = {}

  def updated(self, inner: Jaxpr) -> dict[int, int]:
    places = {var: n for n, var in reversed([*enumerate(inner.invars)])}
    found: dict[int, int] = {}
    for n, out in enumerate(inner.outvars):
      sources = (v for v in self.sources(inner, out) if v is not out and _alike(v, out))
      first = min((places[v] for v in sources if v in places), default=None)
      if first is not None:
        found[n] = first
    return found

  def sources(self, inner: Jaxpr, out: Any) -> set[Any]:
    """The variables that a value is a sum of, with factors; itself, and what nothing makes."""
    makers = self.makers(inner)
    seen: set[Any] = set()
    waiting = [out]
    while waiting:
      atom = waiting.pop()
      if isinstance(atom, Literal) or atom in seen:
        continue
      seen.add(atom)
      if atom in makers:
        waiting += self.terms(*makers[atom])
    return seen

  def makers(self, inner: Jaxpr) -> dict[Any, tuple[JaxprEqn, int]]:
    """Which equation makes a variable, and as which of its results."""
    if id(inner) not in self._makers:
      made = {var: (eqn, n) for eqn in inner.eqns for n, var in enumerate(eqn.outvars)}
      self._makers[id(inner)] = made
    return self._makers[id(inner)]

  def terms(self, eqn: JaxprEqn, result: int) -> list[Any]:
    """The operands of an equation that one of its results is a sum of, with factors."""
    name, out = eqn.primitive.name, eqn.outvars[result]
    if name in _SUMS:
      return [*eqn.invars]
    if name in _KEEPS:
      return [eqn.invars[result]] if len(eqn.outvars) > 1 else [*eqn.invars]
    if name in SCALES:
      first, second = eqn.invars
      if _is_number(second):
        return [first]
      return [second] if name == "mul" and _is_number(first) else []
    inside = (atom for body in bodies_of(eqn) for atom in self.through(body, eqn, result))
    return [atom for atom in inside if _alike(atom, out)]

  def through(self, body: Body, eqn: JaxprEqn, result: int) -> list[Any]:
    """The same for one of its bodies: what a loop carries comes from where it starts."""
    operands, inner = body.take(eqn.invars), versions.open_jaxpr(body.jaxpr)
    if body.is_test:
      return []
    if result < len(body.carry):
      return [operands[body.carry.start + result]]
    if repetitions(eqn) != 1:
      return []
    sources = self.sources(inner, inner.outvars[result])
    return [o for o, var in zip(operands, inner.invars, strict=True) if var in sources]


def _is_number(atom: Any) -> bool:
  """Whether a factor is the same for all: a number, or one that was spread."""
  return isinstance(atom, Literal) or atom.aval.size == 1


def _alike(first: Any, second: Any) -> bool:
  return first.aval.shape == second.aval.shape and first.aval.dtype == second.aval.dtype
