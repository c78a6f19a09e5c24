"""Runs a function under a precision policy, by interpreting its jaxpr."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax

from mpjax._core.policy_map import PolicyLike, as_policy_map
from mpjax._core.scopes import POLICY_REGION
from mpjax._engine.execute import decide
from mpjax._engine.running.scaled_cotangents import read_loss_scale

P = ParamSpec("P")
R = TypeVar("R")


def autocast(
  fn: Callable[P, R],
  policy: PolicyLike,
  *,
  argnums: int | Sequence[int] = 0,
  loss_scale: float | None = None,
) -> Callable[P, R]:
  """Transform a pure function so that it computes under a precision policy.

  ``fn`` is traced once, as written, in float32; whatever runs in float32 therefore runs under
  autocast. Matmuls and convolutions then run in the compute dtype, what follows them stays in
  16 bits, and operations that need range or precision (softmax, logarithms, sums, norms) run in
  float32. Integers, booleans, keys, complex, float64 and arrays that are 16-bit already pass
  untouched. Parameters that are 16-bit are float32 in ``fn``, as all parameters are, and are cast
  where they are used. Gradients taken through the result have the dtype of the parameters.

  Args:
    fn: A function of pytrees. Like under ``jax.jit`` its control flow must not depend on the
      values of arrays; arguments that are no arrays (numbers, strings, flags) are static. A
      derivative rule inside may close over what ``fn`` computes, as in float32, but for that of a
      ``jax.custom_jvp`` under a ``jax.vmap`` inside.
      NNX models and other graph nodes may be among the arguments: what the call changes in their
      Variables arrives.
    policy: A `Policy`, a `PolicyMap`, or a spec string.
    argnums: Which positional arguments hold the parameters. Their float leaves adapt to what
      they meet and are cast at every use; floats in other arguments are data, which stays
      float32 until a matmul takes it. The ``nnx.Param`` of all models are parameters.
    loss_scale: A power of two by which cotangents are larger inside of ``fn``, for trainers that
      own their gradients: float16 keeps what it would lose. A cotangent is multiplied where it
      enters at a float result and divided, in float32, where it leaves at an argument or a traced
      value that ``fn`` closes over; so every derivative is true, of any order and mode. Take it
      outside: ``grad(autocast(fn, ...))``. What overflows float16 comes out as inf or NaN:
      ``static_loss_scaling(tx, 1)`` around the optimizer then skips the step. Inside of another
      ``loss_scale`` the inner one governs.

  Returns:
    A function with the signature of ``fn``. Its float32 results have the policy's output dtype.
    Where functions under policies call each other the innermost policy governs. So under an
    all-float32 policy, which changes nothing by itself, ``fn`` is float32 inside of another policy
    as well.

  Raises:
    ValueError: A policy spec cannot be parsed; ``loss_scale`` is no power of two; or, at the call,
      a rule of a `PolicyMap` matches no scope of ``fn`` (modules of Linen, or
      ``jax.named_scope``).
    TypeError: At the call, ``fn`` returns an object that holds arrays of the call outside of its
      pytree and cannot be copied. Others (a closure, a distribution with a method among its
      attributes) come back as copies that hold the arrays, as far as they lead to them.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> def loss(params, x, y):
    ...   return jnp.mean((x @ params["w"] - y) ** 2)
    >>> params = {"w": jnp.ones((8, 4))}
    >>> x, y = jnp.ones((2, 8)), jnp.ones((2, 4))
    >>> grads = jax.grad(mpjax.autocast(loss, "mixed_bfloat16"))(params, x, y)
    >>> grads["w"].dtype.name
    'float32'
    >>> "bf16[2,4] = dot_general" in str(jax.make_jaxpr(mpjax.autocast(loss, "mixed_bfloat16"))(
    ...   params, x, y))
    True

    A cotangent of 1e-9 is 0 in float16, and larger inside of a function with a loss scale.

    >>> small = lambda params, x: jnp.mean((x @ params["w"]) * 1e-9)
    >>> for loss_scale in (None, 2**20):
    ...   of_float16 = mpjax.autocast(small, "mixed_float16", loss_scale=loss_scale)
    ...   print(bool(jnp.any(jax.grad(of_float16)(params, x)["w"])))
    False
    True
  """
  policies, scale = as_policy_map(policy), read_loss_scale(loss_scale)
  if not callable(fn):
    raise TypeError(
      f"autocast takes a function; got {type(fn).__name__}. Call it as autocast(fn, policy)(*args)."
    )
  if policies.is_float32():
    return in_a_region(fn)
  numbers = tuple(argnums) if isinstance(argnums, Iterable) else (argnums,)
  if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
    raise TypeError(
      f"argnums must be positions, integers; got {argnums!r}. Give the positions of the arguments "
      "that hold the parameters."
    )
  names = names_of(fn, numbers)

  @functools.wraps(fn)
  def cast(*args: P.args, **kwargs: P.kwargs) -> R:
    flags = parameter_flags(numbers, names, args, kwargs)
    result = decide(fn, policies, args, kwargs, flags).run(scale)
    return result.cast(policies.default.output_dtype)

  return cast


def in_a_region(fn: Callable[P, R]) -> Callable[P, R]:
  """The function itself, its equations marked as those of a region that has a policy."""

  @functools.wraps(fn)
  def marked(*args: P.args, **kwargs: P.kwargs) -> R:
    with jax.named_scope(POLICY_REGION):
      return fn(*args, **kwargs)

  return marked


def names_of(fn: Callable[..., Any], numbers: Sequence[int]) -> set[str]:
  """The names under which the parameters may come as keyword arguments."""
  try:
    parameters = inspect.signature(fn).parameters.values()
  except (TypeError, ValueError):  # some callables have no signature: then only positions count
    return set()
  names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
  return {names[n] for n in numbers if -len(names) <= n < len(names)}


def which(argnums: int | Sequence[int], count: int) -> list[bool]:
  """Which of so many arguments ``argnums`` names, where negative ones count from the last."""
  numbers = (argnums,) if isinstance(argnums, int) else argnums
  inside = {n % count for n in numbers if -count <= n < count}
  return [n in inside for n in range(count)]


def parameter_flags(
  numbers: Sequence[int], names: set[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[bool], dict[str, bool]]:
  """For each argument whether it holds parameters."""
  flags = which(numbers, len(args))
  if sum(flags) < len(set(numbers)) and not names:
    raise ValueError(
      f"argnums={tuple(numbers)} must name arguments that hold the parameters; the call has "
      f"{len(args)} positional argument{'s' * (len(args) != 1)}. Pass the parameters by "
      "position, or set argnums; argnums=() if there are none."
    )
  return flags, {key: key in names for key in kwargs}
