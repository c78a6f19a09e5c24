"""Precision policies for Flax NNX models."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.extend import source_info_util

from mpjax._casting import cast_floating
from mpjax._interpreter import evaluate

from mpjax._policy import Policy
from mpjax._policy_map import PolicyMap, as_policy_map

__all__ = ["apply_policy", "autocast"]

M = TypeVar("M", bound=nnx.Module)

_FLOAT32 = np.dtype(np.float32)
_PATH = "mpjax_path"
_PLAIN = "mpjax_plain_class"


def apply_policy(
  model: M, policy: Policy | PolicyMap | str, *, methods: Sequence[str] = ("__call__",)
) -> M:
  """Make an NNX model compute under a precision policy.

  The result is an object of a subclass of the model's class. It shares its submodules and its
  Variables with the model given: paths, `nnx.state`, optimizers and checkpoints are those of the
  model, and what a call updates (BatchStat, RngState, caches) arrives in both. The named methods
  run under `mpjax.autocast` with the ``nnx.Param`` as parameters; all other Variables are data and
  stay float32. ``dtype=`` arguments that the model gives its layers are overridden by the policy.

  Parameters that do not have the policy's ``param_dtype`` cannot be shared: then the result is a
  model of its own, with cast copies of the parameters.

  Args:
    model: The model.
    policy: A `Policy`, a `PolicyMap` whose paths are attribute paths (``blocks/0/attn``), or a
      spec string.
    methods: The methods that run under the policy.

  Returns:
    The model under the policy; ``model`` itself if the policy is all float32.

  Raises:
    ValueError: A spec cannot be parsed, a rule matches no module of the model, or the model has
      no such method.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> from flax import nnx
    >>> plain = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = mpjax.apply_policy(plain, "params=float32, compute=bfloat16, output=bfloat16")
    >>> model(jnp.ones((2, 8))).dtype.name, model.kernel is plain.kernel
    ('bfloat16', True)
  """
  policies = as_policy_map(policy)
  plain = getattr(type(model), _PLAIN, type(model))
  _check_methods(plain, methods)
  policies.check_used(tuple(map(str, path)) for path, _ in nnx.iter_modules(model))
  if policies.is_float32():
    return model
  under_policy = _with_param_dtypes(model, policies)
  object.__setattr__(under_policy, "__class__", _policy_class(plain, policies, tuple(methods)))
  return under_policy


def autocast(
  fn: Callable[..., Any], policy: Policy | PolicyMap | str, *, argnums: int | Sequence[int] = 0
) -> Callable[..., Any]:
  """`mpjax.autocast` for functions that take NNX models: a whole loss, say.

  Updates that the function makes to Variables of its arguments arrive. The ``nnx.Param`` of all
  models are parameters, and so are the arrays of the arguments that ``argnums`` names.

  Args:
    fn: A function of NNX models, other graph nodes (``nnx.Rngs``) and pytrees.
    policy: A `Policy`, a `PolicyMap` with paths from the first model, or a spec string.
    argnums: Which positional arguments hold parameters if they are pytrees of arrays.

  Returns:
    A function with the signature of ``fn`` whose float32 results have the output dtype.
  """
  policies = as_policy_map(policy)
  if policies.is_float32():
    return fn
  numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

  @functools.wraps(fn)
  def cast(*args: Any, **kwargs: Any) -> Any:
    inside = {n % len(args) for n in numbers if -len(args) <= n < len(args)}
    flags = [n in inside for n in range(len(args))]
    return _run(fn, policies, args, kwargs, flags, strict=True)

  return cast


def _run(
  fn: Callable[..., Any],
  policies: PolicyMap,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  flags: Sequence[bool],
  *,
  strict: bool,
  plain: type[nnx.Module] | None = None,
) -> Any:
  """Run a function of graph nodes and arrays, then bring the nodes' updates back."""
  leaves, tree = jax.tree.flatten((tuple(args), kwargs), is_leaf=_is_node)
  nodes = [leaf for leaf in leaves if _is_node(leaf)]
  graphdef, params, rest = nnx.split(nodes, nnx.Param, ...)
  blanks = jax.tree.unflatten(tree, [None if _is_node(leaf) else leaf for leaf in leaves])

  def pure(params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    merged = nnx.merge(graphdef, params, rest)
    before = {path: _value(var) for path, var in _variables(merged)}
    _name_modules(merged)
    if plain is not None:
      object.__setattr__(merged[0], "__class__", plain)
    inner, inner_kwargs = _fill(tree, (args, kwargs), merged)
    out = fn(*inner, **inner_kwargs)
    changed = nnx.state(merged, lambda path, var: before.get(tuple(path)) is not _value(var))
    return out, changed

  result = evaluate(
    pure,
    policies,
    (params, rest, *blanks),
    {},
    ([True, False, list(flags), False], {}),
    absolute=True,
    strict=strict,
  )
  out, changed = result.cast((policies.default.output_dtype, _FLOAT32))
  nnx.update(nodes, changed)
  return out


def _is_node(x: Any) -> bool:
  return isinstance(x, nnx.Pytree | nnx.Variable)


def _variables(nodes: Any) -> list[tuple[tuple[Any, ...], Any]]:
  return [(tuple(path), var) for path, var in nnx.to_flat_state(nnx.state(nodes))]


def _value(var: Any) -> Any:
  return var.get_raw_value() if isinstance(var, nnx.Variable) else var


def _fill(tree: Any, blanks: tuple[Any, Any], nodes: Sequence[Any]) -> tuple[Any, Any]:
  """Put graph nodes back into their places among the arguments."""
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
  methods = {name: _named(value) for name, value in _methods_of(cls).items()}
  return _subclass(cls, methods)


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(function)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    path = getattr(self, _PATH, None)
    if path is None:  # made during the call: it belongs to the module that made it
      return function(self, *args, **kwargs)
    with source_info_util.set_name_stack(source_info_util.new_name_stack(path)):
      return function(self, *args, **kwargs)

  return call


def _methods_of(cls: type[nnx.Module]) -> dict[str, Callable[..., Any]]:
  """The public methods that a class and its bases define beside those of ``nnx.Module``."""
  own = [base for base in cls.__mro__ if base not in nnx.Module.__mro__]
  found = {name: value for base in reversed(own) for name, value in vars(base).items()}
  return {
    name: value
    for name, value in found.items()
    if inspect.isfunction(value) and (name == "__call__" or not name.startswith("_"))
  }


def _subclass(cls: type[nnx.Module], namespace: dict[str, Any]) -> Any:
  described = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
  return type(cls)(cls.__name__, (cls,), namespace | described)


# The class of a model under a policy --------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _policy_class(
  plain: type[nnx.Module], policies: PolicyMap, methods: tuple[str, ...]
) -> Any:
  """The subclass of a model class whose named methods run under a policy map."""
  wrapped = {name: _under_policy(plain, policies, name) for name in methods}
  return _subclass(plain, {_PLAIN: plain, **wrapped})


def _under_policy(
  plain: type[nnx.Module], policies: PolicyMap, method: str
) -> Callable[..., Any]:
  function = getattr(plain, method)

  @functools.wraps(function)
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    operands, flags = (self, *args), [False] * (1 + len(args))
    return _run(function, policies, operands, kwargs, flags, strict=False, plain=plain)

  return call


def _check_methods(plain: type[nnx.Module], methods: Sequence[str]) -> None:
  known = _methods_of(plain)
  for name in methods:
    if name not in known:
      raise ValueError(
        f"methods must name methods of {plain.__name__}; got {name!r}. It has: "
        f"{', '.join(sorted(known)) or 'none'}."
      )


def _with_param_dtypes(model: M, policies: PolicyMap) -> M:
  """A shallow copy that shares all Variables, or a cast copy if parameters have other dtypes."""

  def cast(path: Any, var: Any) -> Any:
    module = tuple(map(str, path))[:-1]
    dtype = policies.policy_of(policies.rule_at(module)).param_dtype
    return jax.tree.map(lambda leaf: cast_floating(leaf, dtype), var)

  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  cast_params = nnx.map_state(cast, params)
  same = [a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(cast_params), strict=True)]
  return copy.copy(model) if all(same) else nnx.merge(graphdef, cast_params, rest)
