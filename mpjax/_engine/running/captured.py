"""Scalars that a function captured: numbers of the program, as those that are written out are.

JAX traces ``0.002`` and ``np.float32(0.002)`` to literals, and ``jnp.float32(0.002)`` to a constant
beside the jaxpr, or beside that of a jitted helper. Here they all become literals, so that nobody
who asks for a number has to look in two places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpjax._engine.analyses.constants import numbers_of
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import HAVE_BODIES
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import AnyJaxpr, ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def trace(fn: Callable[..., Any], avals: Sequence[Any]) -> ClosedJaxpr:
  """Trace what is to be planned to a closed jaxpr, captured scalars written out."""
  return written_out(jaxprs.trace(fn, avals))


def written_out(jaxpr: AnyJaxpr) -> ClosedJaxpr:
  """A jaxpr whose captured scalars stand in it, and in its bodies, as Python's numbers do.

  ``jnp.float32(0.002)`` outside of a function means what ``0.002`` in it means.
  """
  return _written_out(jaxpr, {})


def _written_out(jaxpr: AnyJaxpr, done: dict[int, tuple[Any, Any]]) -> Any:
  """The same; what a jaxpr became is kept beside it, so that what was one object stays one."""
  if id(jaxpr) in done:
    return done[id(jaxpr)][1]
  inner = versions.open_jaxpr(jaxpr)
  values = versions.constants(jaxpr)  # an open one has none
  pairs = list(zip(inner.constvars, values, strict=False))
  numbers = {v: Literal(np.array(x), v.aval) for v, x in pairs if numbers_of(x) is not None}

  def read(atoms: Sequence[Any]) -> list[Any]:
    return [atom if isinstance(atom, Literal) else numbers.get(atom, atom) for atom in atoms]

  changed = {}
  for n, eqn in enumerate(inner.eqns):
    params = _bodies_written_out(eqn, done) if eqn.primitive.name in HAVE_BODIES else {}
    if params or (numbers and not numbers.keys().isdisjoint(variables_of(eqn.invars))):
      changed[n] = eqn.replace(invars=read(eqn.invars), params=eqn.params | params)
  found = jaxpr
  if numbers or changed:
    kept = [(v, x) for v, x in pairs if v not in numbers]
    eqns = [changed.get(n, eqn) for n, eqn in enumerate(inner.eqns)]
    constvars = [v for v in inner.constvars if v not in numbers]
    found = inner.replace(constvars=constvars, eqns=eqns, outvars=read(inner.outvars))
    found = ClosedJaxpr(found, [x for _, x in kept]) if hasattr(jaxpr, "jaxpr") else found
  done[id(jaxpr)] = jaxpr, found
  return found


def _bodies_written_out(eqn: JaxprEqn, done: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
  """The parameters of an equation that hold bodies in which captured scalars stand."""
  found = {}
  for name, value in eqn.params.items():
    bodies = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(body, Jaxpr | ClosedJaxpr) for body in bodies):
      continue
    new = tuple(_written_out(body, done) for body in bodies)
    if any(map(operator.is_not, new, bodies)):
      found[name] = new if isinstance(value, tuple) else new[0]
  return found
