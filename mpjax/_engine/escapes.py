"""Finds the values of a trace that outlive it in objects which JAX does not look into.

``lambda x: h * x``, or a distribution that keeps ``loc`` in an attribute, is one static result to
JAX. The traced ``h`` in it means nothing once the call has ended: what comes back is a copy of the
object, as far as it leads to ``h``, that holds the array instead. A derivative rule that closes
over ``h`` runs when the call is differentiated: `read_by_rules` tells what will be asked for.
"""

from __future__ import annotations

import collections
import copy
import functools
import gc
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import DebugInfo
from jax.tree_util import PyTreeDef, default_registry

from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.versions import AnyJaxpr, ClosedJaxpr, Jaxpr, Var
from mpjax._engine.running.custom_derivatives import HAVE_RULES

_MOST = 5000
"""Objects that are looked at in one result: what users make is small, what it refers to may not."""

_ATOMS = str | bytes | int | float | complex | bool | None
_SHARED = type | types.ModuleType | types.CodeType | jax.sharding.Mesh | type(default_registry)
_FACTS = DebugInfo | ShapedArray | np.dtype
_PLAIN = _ATOMS | _SHARED | _FACTS


class Escaped(NamedTuple):
  """A traced value that a result holds outside of its pytree.

  Attributes:
    name: The type of the object that holds it.
    tracer: The value.
    array: What it became.
  """

  name: str
  tracer: Any
  array: Any = None


def hidden(leaves: Iterable[Any], tree: Any) -> list[Escaped]:
  """The traced values that results hold outside of their pytree.

  Args:
    leaves: The static leaves among the results, None in the places of arrays.
    tree: The structure of the results, whose nodes may hold such objects too.

  Raises:
    TypeError: If a coroutine or generator holds one: it has computed nothing yet.
  """
  found: dict[int, Escaped] = {}
  for name, value in (*_named(leaves), *_nodes(tree)):
    for inside, _ in _within(value):
      if isinstance(inside, Tracer):
        _refuse_suspended(value)
        found.setdefault(id(inside), Escaped(name, inside))
  return [*found.values()]


def _refuse_suspended(value: Any) -> None:
  if isinstance(value, _SUSPENDED):
    if not isinstance(value, types.AsyncGeneratorType):
      value.close()  # or Python warns that nobody awaited it
    raise TypeError(
      "What runs under a policy must compute when it is called. This call returned a "
      f"{type(value).__name__}, which has computed nothing yet. Write the function with return "
      "alone, without async and yield, and await or iterate around it."
    )


_SUSPENDED = types.CoroutineType | types.GeneratorType | types.AsyncGeneratorType


def read_by_rules(jaxpr: AnyJaxpr) -> frozenset[Var]:
  """The variables of the values that rules for derivatives and batching close over.

  Args:
    jaxpr: A trace. The rules stand in its equations and in those of its bodies.
  """
  found, seen = set[Var | None](), dict[int, Any]()
  for eqn, _ in jaxprs.equations(jaxpr, None, lambda eqn, known: known):
    params = eqn.params.values() if eqn.primitive.name in HAVE_RULES else ()
    held = [x for x in params if not isinstance(x, Jaxpr | ClosedJaxpr)]
    found |= {versions.variable(x) for x, _ in _within(held, seen) if isinstance(x, Tracer)}
  return frozenset(filter(None, found))


def computed(found: Sequence[Escaped], jaxpr: AnyJaxpr) -> list[Escaped]:
  """The same values, those that a trace has not computed marked as what they are: they stay.

  Args:
    found: The values, which are the last results of the trace, too.
    jaxpr: The trace. What it did not compute is a constant of it.
  """
  inner = versions.open_jaxpr(jaxpr)
  outs = inner.outvars[len(inner.outvars) - len(found) :]
  around = [any(out is constant for constant in inner.constvars) for out in outs]
  return [
    escaped._replace(array=escaped.tracer) if is_around else escaped
    for escaped, is_around in zip(found, around, strict=True)
  ]


def filled(
  leaves: Sequence[Any], tree: Any, values: Sequence[Escaped]
) -> tuple[Sequence[Any], Any]:
  """The leaves and the structure of results, with arrays where objects held traced values.

  Args:
    leaves: The leaves, static ones among them.
    tree: Their structure.
    values: The traced values. One that is its own array is left where it is.

  Raises:
    TypeError: An object that holds one cannot be copied.
  """
  gone = [escaped for escaped in values if escaped.array is not escaped.tracer]
  if not gone:
    return leaves, tree
  copies = _Copies({id(escaped.tracer): escaped.array for escaped in gone})
  try:
    return [copies.of_result(leaf) for leaf in leaves], copies.of_result(tree)
  except _NotCopiedError as unknown:
    name, value, _ = gone[0]
    raise TypeError(
      "What runs under a policy must return its arrays where they can be found. This call returned "
      f"an object of type {name} that holds {jax.typeof(value).str_short()} in a {unknown}, which "
      "cannot be copied. Return the arrays and make the object of them outside of the call, or "
      "make and use it inside of one policy: mpjax.autocast(loss, policy), where loss does both."
    ) from None


def _named(leaves: Iterable[Any]) -> Iterator[tuple[str, Any]]:
  return ((type(leaf).__qualname__, leaf) for leaf in leaves)


def _nodes(tree: Any) -> Iterator[tuple[str, Any]]:
  """What the nodes of a structure hold beside their children, with the names of their types."""
  node = tree.node_data()
  if node is not None:
    yield node[0].__qualname__, node if _is_of_a_call(node[0]) else node[1]
  for child in tree.children():
    yield from _nodes(child)


def _within(value: Any, seen: dict[int, Any] | None = None) -> Iterator[tuple[Any, Any]]:
  """An object and what it holds, the nearest first, each with what holds it.

  Args:
    value: The object.
    seen: What is not looked into again, by its identity; what is met is added.
  """
  queue: list[tuple[Any, Any]] = [(value, None)]
  seen = {} if seen is None else seen
  for found, holder in queue:
    if isinstance(found, _PLAIN) and not _is_of_a_call(found):
      continue
    yield found, holder
    if id(found) in seen or isinstance(found, Tracer | jax.Array):
      continue
    seen[id(found)] = found  # held, so that no other object has its identity
    if len(queue) < _MOST:
      queue.extend((part, found) for part in _parts(found))


def _is_of_a_call(value: Any) -> bool:
  """Whether it is a class that a function made, whose methods may close over what that computed."""
  return isinstance(value, type) and "<locals>" in value.__qualname__


def _parts(value: Any) -> Sequence[Any]:
  """What an object holds; of a function not the module that it stands in."""
  if isinstance(value, types.FunctionType):
    return value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__
  if isinstance(value, PyTreeDef):  # its children are objects that are made when asked for
    return [data for _, data in _nodes(value)]
  return gc.get_referents(value)


class _NotCopiedError(Exception):
  """The name of a type whose objects cannot be copied."""


class _Copies:
  """Copies of objects, each made once, of those alone that lead to certain values.

  Args:
    arrays: What stands in the copies for these values, by their identity.
  """

  def __init__(self, arrays: Mapping[int, Any]) -> None:
    self._made = dict(arrays)
    self._leads = set(arrays)

  def of_result(self, value: Any) -> Any:
    """A leaf or a structure, as it is if it leads to none of the values."""
    pairs = [*_within(value)]
    holders: dict[int, list[int]] = collections.defaultdict(list)
    for part, holder in pairs[1:]:
      holders[id(part)].append(id(holder))
    reached = [id(part) for part, _ in pairs if id(part) in self._made]
    for part in reached:
      reached += [n for n in holders[part] if n not in self._leads]
      self._leads.update(holders[part])
    return self.of(value)

  def of(self, value: Any) -> Any:
    """An object that `of_result` has met."""
    if id(value) not in self._leads:
      return value
    if id(value) not in self._made:
      made = next((make for kind, make in _MAKERS.items() if isinstance(value, kind)), None)
      self._made[id(value)] = made(self, value) if made else self.mutable(value)
    return self._made[id(value)]

  def mutable(self, value: Any) -> Any:
    """An object with attributes, in a dict or in slots, or a collection that can be changed."""
    self.of(type(value))  # a class that leads to a value is refused
    made = self._made[id(value)] = _empty(value)
    if isinstance(value, dict):
      made.update({key: self.of(entry) for key, entry in value.items()})
    elif isinstance(value, set):
      made.update(map(self.of, value))
    elif isinstance(value, list | collections.deque):
      made.extend(map(self.of, value))
    for name, entry in getattr(value, "__dict__", {}).items():
      made.__dict__[name] = self.of(entry)
    for slot in _slots(value):
      slot.__set__(made, self.of(slot.__get__(value)))
    return made

  def cell(self, value: types.CellType) -> types.CellType:
    """A variable that a function closes over: it may close over itself."""
    made = self._made[id(value)] = types.CellType()
    made.cell_contents = self.of(value.cell_contents)
    return made

  def function(self, value: types.FunctionType) -> types.FunctionType:
    """A function with what it closes over, and what its arguments are by default."""
    cells = tuple(map(self.of, value.__closure__ or ()))
    defaults = self.of(value.__defaults__)
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    made.__kwdefaults__ = self.of(value.__kwdefaults__)
    for name in ("__qualname__", "__module__", "__doc__"):
      setattr(made, name, getattr(value, name))
    made.__dict__.update({name: self.of(entry) for name, entry in value.__dict__.items()})
    return made

  def structure(self, tree: Any) -> Any:
    """The structure of a pytree, whose nodes hold objects beside their children."""
    node = tree.node_data()
    if node is None:
      return tree
    children = map(self.structure, tree.children())
    data = self.of(node[0]), self.of(node[1])
    return PyTreeDef.from_node_data_and_children(default_registry, data, children)


_MAKERS: dict[type, Callable[[_Copies, Any], Any]] = {
  types.CellType: _Copies.cell,
  types.FunctionType: _Copies.function,
  types.MethodType: lambda c, x: types.MethodType(c.of(x.__func__), c.of(x.__self__)),
  functools.partial: lambda c, x: type(x)(
    c.of(x.func), *map(c.of, x.args), **{k: c.of(v) for k, v in x.keywords.items()}
  ),
  tuple: lambda c, x: tuple.__new__(type(x), map(c.of, x)),
  frozenset: lambda c, x: type(x)(map(c.of, x)),
  PyTreeDef: _Copies.structure,
}
"""How objects are copied that must be whole when they are made."""


def _empty(value: Any) -> Any:
  """An object of a type, without what it holds."""
  if isinstance(value, type):
    raise _NotCopiedError("class that was made in the call")
  if isinstance(value, dict | list | set | collections.deque):
    made = copy.copy(value)
    made.clear()
    return made
  try:
    return object.__new__(type(value))
  except TypeError:  # an object of an extension, a generator
    raise _NotCopiedError(type(value).__name__) from None


def _slots(value: Any) -> Iterator[types.MemberDescriptorType]:
  """The slots of an object that are set."""
  for base in type(value).__mro__:
    for slot in vars(base).values():
      if isinstance(slot, types.MemberDescriptorType) and _is_set(slot, value):
        yield slot


def _is_set(slot: types.MemberDescriptorType, value: Any) -> bool:
  try:
    slot.__get__(value)
  except AttributeError:
    return False
  return True
