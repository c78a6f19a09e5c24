"""Precision policies for Flax Linen modules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax.core import lift
from flax.linen.transforms import lift_transform

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy import Policy
from mpjax._core.policy_map import PolicyMap, as_policy_map
from mpjax._core.tree_paths import path_str
from mpjax._engine.calls import STATE
from mpjax._engine.execute import decide

M = TypeVar("M", bound=nn.Module)

_APPLIED = "applied"


def apply_policy(module: M, policy: Policy | PolicyMap | str) -> M:
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

  Returns:
    The module under the policy; ``module`` itself if the policy is all float32. A submodule taken
    out of it with ``bind`` is the plain one.

  Raises:
    ValueError: A spec cannot be parsed; or, at a call, a rule matches no module.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> from flax import linen as nn
    >>> x = jnp.ones((2, 8))
    >>> model = mpjax.apply_policy(nn.Dense(4), "p=float32, c=bfloat16, o=bfloat16")
    >>> variables = model.init(jax.random.key(0), x)
    >>> variables["params"]["kernel"].dtype.name, model.apply(variables, x).dtype.name
    ('float32', 'bfloat16')
  """
  policies = as_policy_map(policy)
  if policies.is_float32():
    return module
  fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
  attributes = {key: value for key, value in fields.items() if key not in ("name", "parent")}
  cls = _policy_class(_plain_class(type(module)), policies)
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


def _plain_class(cls: type[nn.Module]) -> type[nn.Module]:
  return getattr(cls, "mpjax_plain_class", cls)


@functools.lru_cache(maxsize=256)
def _policy_class(plain: type[nn.Module], policies: PolicyMap) -> Any:
  """The subclass of a module class whose methods run under a policy map."""
  return _new_policy_class(plain, policies)


def _new_policy_class(plain: type[nn.Module], policies: PolicyMap) -> Any:
  methods = {name: {"policies": policies, "method": name} for name in _method_names(plain)}
  lifted: Any = lift_transform(_under_policy, plain, methods=methods)
  entries = {name: _entry(name, plain, methods) for name in ("apply", "init", "init_with_output")}
  namespace = {
    "mpjax_plain_class": plain,
    "mpjax_policies": policies,
    "__module__": plain.__module__,
    "__qualname__": plain.__qualname__,
    "__doc__": plain.__doc__,
    "__init__": plain.__init__,  # it may set more than the fields (diffusers' configs)
  }
  outer = {name: _outside_setup(plain, lifted, name) for name in methods}
  return type(plain.__name__, (lifted,), namespace | entries | outer)


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
    extended = type(plain.__name__, (plain,), {_APPLIED: function, "__init__": plain.__init__})
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
    policed = _new_policy_class(extended, self.mpjax_policies)(**fields)
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
  core: Callable[..., Any], *, policies: PolicyMap, method: str
) -> Callable[..., Any]:
  """Lift a function of scopes to run under a policy map."""

  def pure(
    scope_fn: Callable[..., Any], repack: Callable[..., Any]
  ) -> Callable[..., tuple[Any, Any]]:
    def run(params: Any, others: Any, rngs: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
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
    if scope_fn(variables, rngs)[-1].get_flag("initializing", False):
      out, made = run(*operands)
      return cast_floating(out, policies.default.output_dtype), _as_params(made, policies)
    decided = decide(
      run,
      policies,
      operands,
      {},
      ([True, STATE, False, False, False], {}),
      root=1,
      strict=method == "__call__",
    )
    out, updated = decided.run().cast((policies.default.output_dtype, FLOAT32))
    return cast_floating(out, policies.default.output_dtype), updated

  return lift.pack(inner, ("params", True), (True,), (True,), enable_kwargs=True)


def _as_params(groups: Any, policies: PolicyMap) -> Any:
  """Cast the parameters that ``init`` made to the param dtype that governs each of them."""

  def cast(path: Any, leaf: Any) -> Any:
    module = tuple(path_str(path).split("/"))[:-1]
    return cast_floating(leaf, policies.policy_of(policies.rule_at(module)).param_dtype)

  def of_scope(collections: Mapping[str, Any]) -> dict[str, Any]:
    return {
      name: jax.tree_util.tree_map_with_path(cast, values) if name == "params" else values
      for name, values in collections.items()
    }

  return tuple(tuple(of_scope(collections) for collections in group) for group in groups)
