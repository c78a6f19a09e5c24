"""Precision policies for Flax Linen modules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax.core import lift
from flax.linen.transforms import lift_transform

from mpjax._core.casting import as_held, cast_floating
from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy_map import PolicyLike, PolicyMap, as_policy_map
from mpjax._core.scopes import Path
from mpjax._core.tree_paths import PyTree, names_in
from mpjax._engine.autocast import in_a_region
from mpjax._engine.calls import STATE
from mpjax._engine.execute import decide, runs_as_written
from mpjax._engine.planning.plan import Scoping
from mpjax._engine.running.scaled_cotangents import UNSCALED, read_loss_scale
from mpjax._flax.policed import (
  asks_for_keywords,
  facts,
  in_words,
  plain_class,
  refuse_module,
  subclass,
)

M = TypeVar("M", bound=nn.Module)

_APPLIED, _LOSS_SCALE = "applied", "mpjax_loss_scale"

_SCOPING = Scoping(root=1)  # without the scope of the whole module


def apply_policy(module: M, policy: PolicyLike, *, loss_scale: float | None = None) -> M:
  """Make a Linen module compute under a precision policy.

  The result is a module of the same class, with the same fields, the same parameter paths and the
  same initial values: a checkpoint of the one is a checkpoint of the other. Its methods run under
  `mpjax.autocast`, with the ``params`` collection as parameters; other collections (the running
  statistics of BatchNorm) are data and stay float32. A layer's ``dtype=float32`` is overridden by
  the policy; a layer that was given a 16-bit dtype by hand keeps it. ``init`` computes in float32
  and stores the parameters in the policy's ``param_dtype``.

  Args:
    module: The module, unbound or made inside another module's ``setup`` or compact method.
    policy: A `Policy`, a `PolicyMap` whose paths are written from this module, or a spec string.
    loss_scale: A power of two by which cotangents are larger inside of the module, for trainers
      that own their gradients. What comes out is true; see `mpjax.autocast`.

  Returns:
    The module under the policy, which replaces one that ``module`` had; submodules with policies
    of their own keep them. Under an all-float32 policy the result computes what the plain module
    does, and inside of a module or function under another policy too: the innermost policy governs.
    A submodule taken out of the result with ``bind`` is the plain one.

  Raises:
    TypeError: ``module`` is no Linen module.
    ValueError: A spec cannot be parsed, or ``loss_scale`` is no power of two; or, at ``init`` or a
      call, a rule matches no module.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> from flax import linen as nn
    >>> x = jnp.ones((2, 8))
    >>> model = mpjax.apply_policy(nn.Dense(4), "p=float32, c=bfloat16, o=bfloat16")
    >>> variables = model.init(jax.random.key(0), x)
    >>> variables["params"]["kernel"].dtype.name, model.apply(variables, x).dtype.name
    ('float32', 'bfloat16')
  """
  policies, scale = as_policy_map(policy), read_loss_scale(loss_scale)
  if not isinstance(module, nn.Module):
    refuse_module(module, "mpjax.linen.apply_policy", "a Linen module", "mpjax.nnx.apply_policy")
  plain = plain_class(type(module))
  fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
  attributes = {key: value for key, value in fields.items() if key not in ("name", "parent")}
  cls = _policy_class(plain, policies, UNSCALED if policies.is_float32() else scale)
  if module.scope is None:
    return cls(**attributes, name=module.name, parent=module.parent)
  return _take_place(cls(**attributes, parent=module.scope), module)


def _take_place(new: M, old: nn.Module) -> M:
  """Put a module where another one stands in its parent, with its name and scope."""
  object.__setattr__(new, "name", old.name)
  object.__setattr__(new, "parent", old.parent)
  if isinstance(old.parent, nn.Module) and old.name is not None:
    old.parent._state.children[old.name] = new
  return new


@functools.lru_cache(maxsize=256)
def _policy_class(plain: type[nn.Module], policies: PolicyMap, loss_scale: float) -> Any:
  """The subclass of a module class whose methods run under a policy map."""
  return _new_policy_class(plain, policies, loss_scale)


def _new_policy_class(plain: type[nn.Module], policies: PolicyMap, loss_scale: float) -> Any:
  how = {"policies": policies, "loss_scale": loss_scale}
  methods = {name: {**how, "method": name} for name in _method_names(plain)}
  is_region = policies.is_float32()
  base: Any = subclass(plain, nn.Module, {}) if asks_for_keywords(plain) else plain
  if not is_region:
    base = lift_transform(_under_policy, base, methods=methods)
  entries = {name: _entry(name, plain, methods) for name in ("apply", "init", "init_with_output")}
  namespace = {
    **facts(plain, policies, _policy_class, loss_scale),
    **_shown(plain, in_words(policies, loss_scale)),
    _LOSS_SCALE: loss_scale,
    "__init__": plain.__init__,  # it may set more than the fields (diffusers' configs)
  }
  outer = {
    name: _region(plain, name) if is_region else _outside_setup(plain, base, name)
    for name in methods
  }
  return subclass(plain, nn.Module, namespace | entries | outer, base)


def _shown(plain: type[nn.Module], words: str) -> dict[str, Callable[..., Any]]:
  """Methods that print a module with its policy; its class keeps its name, which makes paths."""

  @nn.nowrap
  def show(self: Any) -> str:
    head, opened, rest = plain.__repr__(self).partition("(\n")
    return f"{head if opened else head[:-2]}(\n    # policy {words}\n{rest or ')'}"

  @nn.nowrap
  @functools.wraps(plain.tabulate)
  def tabulate(self: Any, *args: Any, **kwargs: Any) -> str:
    return f"\nPolicy: {words}{plain.tabulate(self, *args, **kwargs)}"

  return {"__repr__": show, "tabulate": tabulate}


def _outside_setup(plain: type[nn.Module], lifted: Any, name: str) -> Callable[..., Any]:
  """A method under the policy; in ``setup``, where it may make submodules, or unbound, as it is."""
  function = getattr(plain, name)

  @nn.nowrap
  @functools.wraps(function, updated=())
  def method(self: Any, *args: Any, **kwargs: Any) -> Any:
    unbound = getattr(self, "scope", None) is None
    owner = plain if unbound or self._state.in_setup else lifted
    return getattr(owner, name)(self, *args, **kwargs)

  return method


def _region(plain: type[nn.Module], name: str) -> Callable[..., Any]:
  """A method as it is, marked as a region that a policy around it leaves alone."""
  function = getattr(plain, name)

  @nn.nowrap
  @functools.wraps(function, updated=())
  def method(self: Any, *args: Any, **kwargs: Any) -> Any:
    return in_a_region(getattr(plain, name))(self, *args, **kwargs)

  return method


def _entry(name: str, plain: type[nn.Module], lifted: Mapping[str, Any]) -> Callable[..., Any]:
  """``apply`` or ``init``: any function or method given as ``method`` runs under the policy."""

  @nn.nowrap
  @functools.wraps(getattr(nn.Module, name))
  def call(self: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
    run = getattr(plain, name)
    if isinstance(method, str) and method not in lifted and callable(getattr(plain, method, None)):
      method = getattr(plain, method)
    if method is None or isinstance(method, str):
      return run(self, *args, method=method, **kwargs)
    function = getattr(method, "__func__", method)
    own = {_APPLIED: function, "__init__": plain.__init__}
    extended = subclass(plain, nn.Module, own)
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
    scale = getattr(self, _LOSS_SCALE)
    policed = _new_policy_class(extended, self.mpjax_policies, scale)(**fields)
    return run(policed, *args, method=_APPLIED, **kwargs)

  return call


def _method_names(cls: type[nn.Module]) -> list[str]:
  """The methods of a module class that a caller can run on variables."""
  fields = {f.name for f in dataclasses.fields(cls)}
  own = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
  found = {name: value for base in reversed(own) for name, value in vars(base).items()}
  return [
    name
    for name, value in found.items()
    if inspect.isfunction(value)
    and not getattr(value, "nowrap", False)
    and name not in fields
    and (name == "__call__" or not (name.startswith("_") or hasattr(nn.Module, name)))
  ]


def _under_policy(
  core: Callable[..., Any], *, policies: PolicyMap, method: str, loss_scale: float
) -> Callable[..., Any]:
  """Lift a function of scopes to run under a policy map."""

  def pure(
    scope_fn: Callable[..., Any], repack: Callable[..., Any]
  ) -> Callable[..., tuple[Any, Any]]:
    def run(params: PyTree, others: Any, rngs: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
      scopes = scope_fn((params, others), rngs)
      return core(scopes, *args, **kwargs), repack(scopes)

    return run

  def inner(
    scope_fn: Callable[..., Any],
    repack: Callable[..., Any],
    variables: tuple[Any, Any],
    rngs: Any,
    *args: Any,
    **kwargs: Any,
  ) -> tuple[Any, Any]:
    run, operands = pure(scope_fn, repack), (*variables, rngs, args, kwargs)
    strict, flags = method == "__call__", ([True, STATE, False, False, False], {})
    own = [group[-1] for group in variables] if policies.rules else ()
    scoping = _SCOPING._replace(modules=modules_of(own))
    plan = functools.partial(decide, run, policies, operands, {}, flags, scoping=scoping)
    scopes = scope_fn(variables, rngs)
    if scopes[-1].get_flag("initializing", False):
      if strict and policies.rules:  # one that matches nothing is an error here too
        with _random_streams_kept(scopes):
          plan(known=_paths(scopes[-1].rng_counters))
      out, made = run(*operands)
      return cast_floating(out, policies.default.output_dtype), _as_params(made, policies)
    known = _paths(scopes[-1].rng_counters)
    decided = plan(strict=strict, known=known)
    out, updated = decided.run(loss_scale).cast((policies.default.output_dtype, FLOAT32))
    as_it_is, updated = runs_as_written(), as_held(updated, variables[:1])
    return out if as_it_is else cast_floating(out, policies.default.output_dtype), updated

  return lift.pack(inner, ("params", True), (True,), (True,), enable_kwargs=True)


def modules_of(scopes: Iterable[Mapping[str, Any]]) -> frozenset[Path]:
  """The paths of the modules that have variables.

  Args:
    scopes: Variables by their collections, of the same scope each.
  """
  leaves = (jax.tree_util.tree_leaves_with_path(dict(variables)) for variables in scopes)
  paths = {names_in(path)[1:-1] for found in leaves for path, _ in found}
  return frozenset(path[: n + 1] for path in paths for n in range(len(path)))


@contextlib.contextmanager
def _random_streams_kept(scopes: Sequence[Any]) -> Iterator[None]:
  """Lets a function of scopes run once more without moving the streams that they draw from."""
  before = [_counts(scope.rng_counters) for scope in scopes]
  yield
  for scope, counts in zip(scopes, before, strict=True):
    _rewind(scope.rng_counters, counts)


def _paths(counters: dict[Any, Any], parent: Path = ()) -> Iterator[Path]:
  """The paths of all submodules that have a scope, also of those that compute nothing."""
  for key, inner in counters.items():
    if isinstance(inner, dict):
      path = (*parent, key[-1])
      yield path
      yield from _paths(inner, path)


def _counts(counters: dict[Any, Any]) -> dict[Any, Any]:
  """A copy of a scope's counts, those of its submodules within."""
  return {k: _counts(v) if isinstance(v, dict) else v for k, v in counters.items()}


def _rewind(counters: dict[Any, Any], counts: dict[Any, Any]) -> None:
  """Puts counts back in place, for the scopes of submodules hold the dictionaries within."""
  for key, now in counters.items():
    if isinstance(now, dict):
      _rewind(now, counts.get(key, {}))
    else:
      counters[key] = counts.get(key, 0)


def _as_params(groups: Any, policies: PolicyMap) -> Any:
  """Cast the parameters that ``init`` made to the param dtype that governs each of them."""

  def cast(path: Any, leaf: Any) -> Any:
    module = names_in(path)[:-1]
    return cast_floating(leaf, policies.policy_of(policies.rule_at(module)).param_dtype)

  def of_scope(collections: Mapping[str, Any]) -> dict[str, Any]:
    return {
      name: jax.tree_util.tree_map_with_path(cast, values) if name == "params" else values
      for name, values in collections.items()
    }

  return tuple(tuple(of_scope(collections) for collections in group) for group in groups)
