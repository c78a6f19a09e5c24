"""Precision policies for Flax NNX models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from mpjax._core.casting import cast_floating
from mpjax._core.policy_map import PolicyLike, PolicyMap, as_policy_map
from mpjax._engine.autocast import in_a_region
from mpjax._engine.execute import runs_as_written
from mpjax._engine.running.scaled_cotangents import UNSCALED, read_loss_scale
from mpjax._flax.nnx_calls import methods_of, module_paths, run
from mpjax._flax.policed import facts, in_words, pickling, plain_class, refuse_module, subclass

M = TypeVar("M", bound=nnx.Module)

_METHODS = "mpjax_methods"


def apply_policy(
  model: M,
  policy: PolicyLike,
  *,
  methods: str | Sequence[str] | None = None,
  loss_scale: float | None = None,
) -> M:
  """Make an NNX model compute under a precision policy.

  The result is an object of a subclass of the model's class. It shares its submodules and its
  Variables with the model given: paths, `nnx.state`, optimizers and checkpoints are those of the
  model, and what a call updates (BatchStat, RngState, caches) arrives in both. The named methods
  run under `mpjax.autocast` with the ``nnx.Param`` as parameters; all other Variables are data and
  stay float32. A layer's ``dtype=float32`` is overridden by the policy; a layer that was given a
  16-bit dtype by hand keeps it.

  Parameters that do not have the policy's ``param_dtype`` cannot be shared: then the result is a
  model of its own, with cast copies of the parameters.

  Args:
    model: The model.
    policy: A `Policy`, a `PolicyMap` whose paths are attribute paths (``blocks/0/attn``), or a
      spec string.
    methods: The methods that run under the policy; by default ``__call__``, or those that ran
      under the policy that this one replaces.
    loss_scale: A power of two by which cotangents are larger inside of these methods, for trainers
      that own their gradients. What comes out is true; see `mpjax.autocast`.

  Returns:
    The model under the policy, which replaces one that ``model`` had; submodules with policies of
    their own keep them. Under an all-float32 policy the result shares everything, computes what the
    plain model does, and does so inside of a model or function under another policy too: the
    innermost policy governs.

  Raises:
    TypeError: ``model`` is no NNX model.
    ValueError: A spec cannot be parsed, a rule matches no module of the model, the model has no
      such method, or ``loss_scale`` is no power of two.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> from flax import nnx
    >>> plain = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = mpjax.apply_policy(plain, "params=float32, compute=bfloat16, output=bfloat16")
    >>> model(jnp.ones((2, 8))).dtype.name, model.kernel is plain.kernel
    ('bfloat16', True)
  """
  policies, scale = as_policy_map(policy), read_loss_scale(loss_scale)
  if not isinstance(model, nnx.Module):
    refuse_module(model, "mpjax.nnx.apply_policy", "an NNX model", "mpjax.linen.apply_policy")
  plain = plain_class(type(model))
  chosen = getattr(type(model), _METHODS, ("__call__",)) if methods is None else methods
  names = (chosen,) if isinstance(chosen, str) else tuple(chosen)
  _check_methods(plain, names)
  policies.check_used(module_paths(model))
  is_float32 = policies.is_float32()
  cls = _policy_class(plain, policies, names, UNSCALED if is_float32 else scale)
  return _of_class(copy.copy(model) if is_float32 else _with_param_dtypes(model, policies), cls)


def _of_class(model: M, cls: type[Any]) -> M:
  object.__setattr__(model, "__class__", cls)
  return model


# The class of a model under a policy --------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _policy_class(
  plain: type[nnx.Module], policies: PolicyMap, methods: tuple[str, ...], loss_scale: float
) -> Any:
  """The subclass of a model class whose named methods run under a policy map."""
  wrapped = {
    name: _region(plain, name)
    if policies.is_float32()
    else _under_policy(plain, policies, name, loss_scale)
    for name in methods
  }
  own = facts(plain, policies, _policy_class, methods, loss_scale)
  namespace = {**own, _METHODS: methods, **wrapped}
  cls = subclass(plain, nnx.Module, namespace, metaclass=pickling(type(plain)))
  # Flax prints and tabulates a model by the name of its class, and needs it for nothing else.
  words = in_words(policies, loss_scale)
  cls.__name__ = f"{plain.__name__}<{words}>"
  cls.__qualname__ = f"{plain.__qualname__}<{words}>"
  return cls


def _region(plain: type[nnx.Module], method: str) -> Callable[..., Any]:
  """A method as it is, marked as a region that a policy around it leaves alone."""

  @functools.wraps(getattr(plain, method))
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return in_a_region(getattr(plain, method))(self, *args, **kwargs)

  return call


def _under_policy(
  plain: type[nnx.Module], policies: PolicyMap, method: str, loss_scale: float
) -> Callable[..., Any]:
  @functools.wraps(getattr(plain, method))
  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    function = getattr(plain, method)  # as it is now: nnx.tabulate replaces methods for a while
    operands, flags = (self, *args), [False] * (1 + len(args))
    # Rules for modules were checked when the policy was applied; operations show in a call.
    strict = policies.has_op_rules and method == "__call__"
    known = module_paths(self) if strict else ()
    out = run(
      function,
      policies,
      operands,
      kwargs,
      flags,
      strict=strict,
      plain=plain,
      known=known,
      loss_scale=loss_scale,
    )
    return out if runs_as_written() else cast_floating(out, policies.default.output_dtype)

  return call


def _check_methods(plain: type[nnx.Module], methods: Sequence[str]) -> None:
  known = methods_of(plain)
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
  same = [
    a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(cast_params), strict=True)
  ]
  return copy.copy(model) if all(same) else nnx.merge(graphdef, cast_params, rest)
