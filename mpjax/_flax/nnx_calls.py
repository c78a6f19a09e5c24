"""Runs functions of NNX models under a precision policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.extend import source_info_util

from mpjax._core.arguments import shown
from mpjax._core.casting import as_held
from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy import Policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.scopes import AS_WRITTEN, POLICY_REGION, Path, has_policy, is_as_written
from mpjax._core.tree_paths import PyTree
from mpjax._engine.calls import STATE
from mpjax._engine.execute import decide
from mpjax._engine.planning.plan import Scoping
from mpjax._engine.running.scaled_cotangents import UNSCALED
from mpjax._flax.policed import plain_class, subclass

_PATH = "_pytree__mpjax_path"  # Flax takes what begins so for its own, and no variable
F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")


def refuses_what_is_no_function(transform: F) -> F:
  """Answers what users of torch type first, and modules, in one sentence."""

  @functools.wraps(transform)
  def checked(*args: Any, **kwargs: Any) -> Any:
    foreign = [
      name for name in ("device_type", "dtype", "enabled", "cache_enabled") if name in kwargs
    ]
    first = args[0] if args else kwargs.get("fn")
    if foreign or first is None or isinstance(first, str | Policy | PolicyMap):
      got = f"{foreign[0]}=" if foreign else "no function" if first is None else shown(first)
      raise TypeError(
        "autocast is no context manager: it takes a function and a policy and returns a function. "
        f"Got {got}. Write mpjax.autocast(fn, policy)(*args); the policy 'float32' switches it off."
      )
    if isinstance(first, type) and issubclass(first, nn.Module | nnx.Module):
      raise TypeError(
        f"autocast takes a function. Got the class {first.__name__}. Make an instance, and use "
        "mpjax.apply_policy(module, policy)."
      )
    if isinstance(first, nn.Module | nnx.Module):
      kind = "Linen module" if isinstance(first, nn.Module) else "NNX model"
      raise TypeError(
        f"autocast takes a function. Got the {kind} {type(first).__name__}. Use "
        "mpjax.apply_policy(module, policy), or autocast a function that takes it or its variables."
      )
    return transform(*args, **kwargs)

  return cast(F, checked)


def run(
  fn: Callable[..., Any],
  policies: PolicyMap,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  flags: Sequence[bool],
  *,
  strict: bool,
  plain: type[nnx.Module] | None = None,
  known: Iterable[Path] = (),
  loss_scale: float = UNSCALED,
) -> Any:
  """Run a function of graph nodes and arrays, then bring the nodes' updates back."""
  call = pure_call(fn, args, kwargs, flags, plain)
  decided = decide(
    call.fn,
    policies,
    call.args,
    {},
    (call.flags, {}),
    scoping=Scoping(absolute=True),
    strict=strict,
    known=known,
  )
  out, changed = decided.run(loss_scale).cast((policies.default.output_dtype, FLOAT32))
  params, *_ = call.args
  update(call.nodes, as_held(changed, params))
  return out


class PureCall(NamedTuple):
  """A call with graph nodes as one of a pure function of their states.

  It returns what the call returned, and the states of the Variables that the call changed.
  """

  fn: Callable[..., tuple[Any, Any]]
  args: tuple[Any, ...]
  flags: list[Any]
  nodes: list[Any]


def pure_call(
  fn: Callable[..., Any],
  args: Sequence[Any],
  kwargs: dict[str, Any],
  flags: Sequence[bool],
  plain: type[nnx.Module] | None = None,
) -> PureCall:
  """Separate the graph nodes of a call from their states."""
  leaves, tree = jax.tree.flatten((tuple(args), kwargs), is_leaf=is_node)
  nodes = [leaf for leaf in leaves if is_node(leaf)]
  graphdef, params, rest = nnx.split(nodes, nnx.Param, ...)
  blanks = jax.tree.unflatten(tree, [None if is_node(leaf) else leaf for leaf in leaves])

  def pure(params: PyTree, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    merged = nnx.merge(graphdef, params, rest, copy=True)  # Variables of the trace that it runs in
    before = {tuple(path): _leaves(var) for path, var in nnx.to_flat_state(nnx.state(merged))}
    _name_modules(merged)
    if plain is not None:
      object.__setattr__(merged[0], "__class__", plain)
    as_given = structure(merged)
    inner, inner_kwargs = fill(tree, (args, kwargs), merged)
    out = fn(*inner, **inner_kwargs)
    check_structure(as_given, structure(merged))
    return out, nnx.state(merged, lambda path, var: before.get(tuple(path)) != _leaves(var))

  return PureCall(pure, (params, rest, *blanks), [True, STATE, list(flags), False], nodes)


def update(nodes: Sequence[Any], changed: Any) -> None:
  """Brings Variables back into graph nodes, new ones too.

  Args:
    nodes: The nodes.
    changed: The state of the Variables, by the number of the node and the path in it.
  """
  for full, variable in nnx.to_flat_state(changed):
    number, *path = map(str, full)
    holder = functools.reduce(_attribute, path[:-1], nodes[int(number)])
    if path and getattr(holder, "__dict__", {}).get(path[-1], ...) is None:
      setattr(holder, path[-1], variable)  # Flax would look for a subtree in None
  nnx.update(nodes, changed)


def _attribute(holder: Any, name: str) -> Any:
  return getattr(holder, name, ...)


def module_paths(model: nnx.Module) -> list[Path]:
  """The paths of a model's modules, the model itself first."""
  return [tuple(map(str, path)) for path, _ in nnx.iter_modules(model)]


def is_node(x: Any) -> bool:
  """Whether a call may update this in place: models, Rngs, other ``nnx.Pytree``s, Variables."""
  return type(x) not in _PLAIN and isinstance(x, nnx.Pytree | nnx.Variable)


_PLAIN = frozenset({dict, list, tuple, type(None), bool, int, float, str, np.ndarray})
"""Types of what is no node, of which most is asked; Flax takes ten calls to answer for each."""


def has_nodes(tree: PyTree) -> bool:
  """Whether there are NNX graph nodes in a pytree, such as the arguments of a call."""
  found: list[bool] = []

  def is_leaf(x: Any) -> bool:
    found.append(is_node(x))
    return found[-1]

  jax.tree.leaves(tree, is_leaf=is_leaf)
  return any(found)


def _leaves(var: Any) -> list[int]:
  """The identities of a Variable's arrays: what a call did not touch need not be brought back."""
  return [id(leaf) for leaf in jax.tree.leaves(var)]


def structure(nodes: Sequence[Any]) -> dict[str, Any]:
  """All that a call may set in graph nodes beside the values of Variables, by its path.

  Submodules by their class, and the plain attributes of all: numbers, flags, functions. Of arrays
  that are attributes, and of Variables, only that they are there: their values are brought back.
  What a cached property keeps is no change: it is computed again.
  """
  found: dict[str, Any] = {}
  for node in nodes:
    for path, module in nnx.iter_modules(node):
      found["/".join(map(str, path))] = plain_class(type(module))
      for name, value in vars(module).items():
        if isinstance(value, nnx.Variable):
          found["/".join(map(str, (*path, name)))] = nnx.Variable
        elif not (is_node(value) or _of_flax(name) or _is_cache(type(module), name)):
          held = jax.Array if isinstance(value, jax.Array) else value
          found["/".join(map(str, (*path, name)))] = held
  return found


def _of_flax(name: Any) -> bool:
  """Whether an attribute is bookkeeping: of Flax, of ours, or of a table of Flax."""
  return str(name).startswith(("_pytree__", "_nnx_"))


def _is_cache(cls: type[Any], name: Any) -> bool:
  return isinstance(getattr(cls, str(name), None), functools.cached_property)


def check_structure(before: dict[str, Any], after: dict[str, Any]) -> None:
  """Refuse what cannot be brought back, rather than lose it.

  Raises:
    ValueError: A call has set, added or deleted a submodule or an attribute.
  """
  changed = [name for name in {**before, **after} if not _same(before, after, name)]
  if changed:
    raise ValueError(
      "What a call under a policy or in a train step changes in a model must be held in "
      f"nnx.Variables; this call set, added or deleted {changed[0]!r}. Make it an nnx.Variable, or "
      "set it outside the call."
    )


def _same(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
  old, new = before.get(name), after.get(name)
  if new is nnx.Variable:  # it may be new, where there was nothing or None, as a cache is
    return old in (None, nnx.Variable)
  if name not in after:
    return old is nnx.Variable
  if name not in before:
    return False
  if old is new:
    return True
  # A transform inside, as nnx.jit, makes the containers of nodes anew.
  leaves, tree = jax.tree.flatten(old, is_leaf=is_node)
  others, other_tree = jax.tree.flatten(new, is_leaf=is_node)
  return tree == other_tree and all(map(_alike, leaves, others))


def _alike(old: Any, new: Any) -> bool:
  """Whether an attribute, or an item of one, is what it was, but for arrays, which are returned."""
  if isinstance(old, jax.Array):
    return isinstance(new, jax.Array)
  if is_node(old):
    return plain_class(type(old)) is plain_class(type(new))
  return old is new or (isinstance(old, bool | int | float | str) and old == new)


def fill(tree: Any, blanks: Any, nodes: Sequence[Any]) -> PyTree:
  """Put graph nodes back into their places among the arguments, where there is ``None``."""
  rest = iter(nodes)
  leaves = tree.flatten_up_to(blanks)
  return jax.tree.unflatten(tree, [next(rest) if x is None else x for x in leaves])


# Scopes: every module's methods run under the name of its path ---------------------------------


def _name_modules(nodes: Sequence[Any]) -> None:
  """Give every submodule of freshly merged nodes a class that names what it computes.

  The nodes are this call's own copies; a user's object is never changed.
  """
  for node in nodes:
    for path, module in nnx.iter_modules(node):
      if path:
        object.__setattr__(module, "__class__", _named_class(type(module)))
        setattr(module, _PATH, "/".join(map(str, path)))


@functools.lru_cache(maxsize=1024)
def _named_class(cls: type[nnx.Module]) -> Any:
  """The subclass of a module class whose methods run in the scope of the module's path."""
  own = _own_attributes(cls)
  methods: dict[str, Any] = {
    name: _named(value, functools.partial(getattr, cls, name))
    for name, value in own.items()
    if _is_method(value) and _may_compute(name)
  }
  for name, value in own.items():
    if type(value) is property and value.fget and _may_compute(name):
      getter = functools.partial(_getter, cls, name)
      methods[name] = property(_named(value.fget, getter), value.fset, value.fdel, value.__doc__)
  return subclass(cls, nnx.Module, methods)


def _getter(cls: type[nnx.Module], name: str) -> Any:
  return getattr(cls, name).fget


def _may_compute(name: str) -> bool:
  """Whether what a class calls so is its author's, or an operator; hooks of Python are neither."""
  return name in _OPERATORS or not name.startswith(("__", "_pytree__", "_nnx_", "_graph_node_"))


_OPERATORS = frozenset(
  f"__{name}__"
  for name in ("call", "getitem", "matmul", "rmatmul", "add", "radd", "mul", "rmul", "pow")
)


def _named(original: Any, current: Callable[[], Any]) -> Callable[..., Any]:
  """A method in the scope of its module's path.

  Args:
    original: The method.
    current: Gives it as it is now: nnx.tabulate replaces methods for a while.
  """

  @functools.wraps(original)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    function = current()
    path = getattr(self, _PATH, None)
    if path is None:  # made during the call: it belongs to the module that made it
      return function(self, *args, **kwargs)
    around = source_info_util.current_name_stack()
    facts = [POLICY_REGION] * has_policy(around) + [AS_WRITTEN] * is_as_written(around)
    name = "/".join([*facts, path])
    with source_info_util.set_name_stack(source_info_util.new_name_stack(name)):
      return function(self, *args, **kwargs)

  return call


def methods_of(cls: type[nnx.Module]) -> dict[str, Callable[..., Any]]:
  """The public methods that a class and its bases define beside those of ``nnx.Module``."""
  return {
    name: value
    for name, value in _own_attributes(cls).items()
    if _is_method(value) and (name == "__call__" or not name.startswith("_"))
  }


def _own_attributes(cls: type[nnx.Module]) -> dict[str, Any]:
  """What a class and its bases define beside what ``nnx.Module`` does."""
  own = [base for base in cls.__mro__ if base not in nnx.Module.__mro__]
  return {name: value for base in reversed(own) for name, value in vars(base).items()}


def _is_method(value: Any) -> bool:
  """A function, or what a transform such as ``nnx.jit`` made of one."""
  other = isinstance(value, staticmethod | classmethod | property | type)
  return callable(value) and hasattr(value, "__get__") and not other
