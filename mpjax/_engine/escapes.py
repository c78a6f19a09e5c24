"""Finds the values of a trace that leave it in objects which JAX does not look into.

``lambda x: h * x``, or a distribution that keeps ``loc`` in an attribute, is one static result to
JAX. The traced ``h`` in it means nothing once the call has ended.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.core import Tracer

from mpjax._engine.program import versions
from mpjax._engine.program.versions import AnyJaxpr

_MOST = 500
"""Objects that are looked at in one result: what users make is small, what it refers to may not."""

_PLAIN = str | bytes | int | float | complex | bool | type | types.ModuleType | jax.sharding.Mesh


def hidden(leaves: Iterable[Any], tree: Any) -> list[tuple[str, Tracer]]:
  """The traced values that results hold outside of their pytree, with the type that holds each.

  Args:
    leaves: The static leaves among the results, None in the places of arrays.
    tree: The structure of the results, whose nodes may hold such objects too.
  """
  return [
    (name, inside)
    for name, value in (*_named(leaves), *_nodes(tree))
    for inside in _within(value)
    if isinstance(inside, Tracer)
  ]


def check(found: Sequence[tuple[str, Tracer]], jaxpr: AnyJaxpr) -> None:
  """Refuse what `hidden` found if this trace has computed it: it ends, and the value with it.

  Args:
    found: The values, which are the last results of the trace, too.
    jaxpr: The trace. What it did not compute is a constant of it.

  Raises:
    TypeError: A result holds an array of the call that cannot be given back.
  """
  inner = versions.open_jaxpr(jaxpr)
  outs = inner.outvars[len(inner.outvars) - len(found) :]
  for (name, value), out in zip(found, outs, strict=True):
    if not any(out is constant for constant in inner.constvars):
      raise TypeError(
        "What runs under a policy must return its arrays as leaves of pytrees. This call returned "
        f"an object of type {name} that holds {jax.typeof(value).str_short()} where JAX does not "
        "see it. Return the arrays and make the object of them outside of the call, or make and "
        "use it inside of one policy: mpjax.autocast(loss, policy), where loss does both."
      )


def _named(leaves: Iterable[Any]) -> Iterator[tuple[str, Any]]:
  return ((type(leaf).__qualname__, leaf) for leaf in leaves)


def _nodes(tree: Any) -> Iterator[tuple[str, Any]]:
  """What the nodes of a structure hold beside their children, with the names of their types."""
  node = tree.node_data()
  if node is not None:
    yield node[0].__qualname__, node[1]
  for child in tree.children():
    yield from _nodes(child)


def _within(value: Any) -> Iterator[Any]:
  """An object and what it holds, the nearest first."""
  queue, seen = [value], set[int]()
  for found in queue:
    if isinstance(found, _PLAIN) or found is None or id(found) in seen:
      continue
    seen.add(id(found))
    yield found
    if len(queue) < _MOST and not isinstance(found, Tracer | jax.Array):
      queue.extend(_parts(found))


def _parts(value: Any) -> Sequence[Any]:
  """What an object holds; of a function not the module that it stands in."""
  if isinstance(value, types.FunctionType):
    return value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__
  return gc.get_referents(value)
