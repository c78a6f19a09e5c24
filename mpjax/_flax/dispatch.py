"""Dispatches `apply_policy` to the kind of module that it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
from flax import linen as nn
from flax import nnx

from mpjax._core.policy_map import PolicyLike, as_policy_map
from mpjax._engine.autocast import autocast as autocast_of_pytrees
from mpjax._engine.autocast import which
from mpjax._engine.running.scaled_cotangents import read_loss_scale
from mpjax._flax import linen_modules, nnx_models
from mpjax._flax.nnx_calls import has_nodes, is_node, refuses_what_is_no_function, run
from mpjax._flax.policed import mark
from mpjax._scaling import scaled_gradients
from mpjax._train.step_parts import check_is_loss

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def _documented_as(other: Callable[..., Any]) -> Callable[[F], F]:
  """``functools.wraps`` for type checkers: of a generic function mypy would make one of Never."""
  return lambda function: cast(F, functools.wraps(other)(function))


@refuses_what_is_no_function
@_documented_as(autocast_of_pytrees)
def autocast(
  fn: Callable[P, R],
  policy: PolicyLike,
  *,
  argnums: int | Sequence[int] = 0,
  loss_scale: float | None = None,
) -> Callable[P, R]:
  """The autocast of functions of pytrees; a call with NNX models is one of their states."""
  of_pytrees = autocast_of_pytrees(fn, policy, argnums=argnums, loss_scale=loss_scale)
  policies, scale = as_policy_map(policy), read_loss_scale(loss_scale)
  mark(of_pytrees, policies)
  if policies.is_float32():
    return of_pytrees

  @functools.wraps(fn)
  def under_policy(*args: P.args, **kwargs: P.kwargs) -> R:
    if not has_nodes((args, kwargs)):
      return of_pytrees(*args, **kwargs)
    flags = which(argnums, len(args))
    return run(fn, policies, args, kwargs, flags, strict=True, loss_scale=scale)

  mark(under_policy, policies)
  return under_policy


@_documented_as(scaled_gradients.value_and_grad)
def value_and_grad(
  loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
  """That of functions of pytrees, which refuses NNX models: their Variables would not move."""
  check_is_loss(loss_fn, "mpjax.value_and_grad takes")
  of_pytrees = scaled_gradients.value_and_grad(loss_fn, argnums, has_aux)

  def value_and_scaled_grad(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    for node in jax.tree.leaves((args, kwargs), is_leaf=lambda x: is_node(x) or _is_state(x)):
      if is_node(node):
        raise TypeError(
          "mpjax.value_and_grad takes the loss of a pytree of arrays. Got an NNX "
          f"{type(node).__name__} among its arguments, whose updates would be lost. Use "
          "mpjax.nnx.value_and_grad."
        )
    return of_pytrees(*args, **kwargs)

  return scaled_gradients.named_after(loss_fn, value_and_scaled_grad)


def _is_state(x: Any) -> bool:
  """Whether something is the state of a model apart from it: a pytree like any other."""
  return isinstance(x, nnx.State)


def apply_policy(module: M, policy: PolicyLike, *, loss_scale: float | None = None) -> M:
  """Make a Flax module compute under a precision policy.

  Args:
    module: A Linen module (see `mpjax.linen.apply_policy`) or an NNX model (see
      `mpjax.nnx.apply_policy`, which also takes the names of methods other than ``__call__``).
    policy: A `Policy`, a `PolicyMap`, or a spec string.
    loss_scale: A power of two by which cotangents are larger inside of the module, for trainers
      that own their gradients. What comes out is true; see `mpjax.autocast`.

  Returns:
    A module of the same kind and class.

  Raises:
    TypeError: ``module`` is neither.
    ValueError: ``loss_scale`` is no power of two.

  Example:
    >>> import mpjax
    >>> from flax import linen as nn
    >>> model = mpjax.apply_policy(nn.Dense(4), "mixed_float16", loss_scale=2**15)
    >>> print(repr(model).splitlines()[1].strip())
    # policy mixed_float16, loss scale 32768
  """
  if isinstance(module, nn.Module):
    return linen_modules.apply_policy(module, policy, loss_scale=loss_scale)
  if isinstance(module, nnx.Module):
    return nnx_models.apply_policy(module, policy, loss_scale=loss_scale)
  raise TypeError(
    f"apply_policy takes a Linen module or an NNX model; got {type(module).__name__}. For a "
    "function use mpjax.autocast; for a module class make an instance first."
  )
