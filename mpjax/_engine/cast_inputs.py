"""The mark that hands a function compute-dtype operands under autocast."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from mpjax._core.dtypes import FLOAT32, describe
from mpjax._engine.program.kernels import traced
from mpjax._engine.running.kernel_derivatives import cast_inputs_p

P = ParamSpec("P")
R = TypeVar("R")


def cast_inputs(fn: Callable[P, R]) -> Callable[P, R]:
  """Hand a function compute-dtype operands when it is called under `autocast`.

  Autocast leaves what it does not know (a Pallas kernel, cuDNN's attention, a foreign call) in
  float32. A function marked so gets its float32 arrays in the compute dtype of its scope instead,
  and its derivative too: what ``torch.amp.custom_fwd(cast_inputs=...)`` does. Arrays of other
  dtypes, and what is no array (strings, flags, numbers, NumPy's scalars, functions, ``None``),
  reach it as they are, by position or by keyword. What it closes over is not cast: pass it.

  Without a policy, and where the compute dtype is float32, it is called as it is. As under
  ``jax.jit`` its control flow must not depend on the values of arrays that are traced. It is
  traced in each of float32, bfloat16 and float16, and need not have all three: only what is
  asked for must run.

  Where the derivative is taken inside autocast, as in ``autocast(jax.grad(loss))``, and the
  function stores other intermediates in 16 bits than in float32, its backward pass computes the
  forward pass again; XLA merges the two where both stand outside of loops.

  Args:
    fn: A function from pytrees to a pytree of arrays, in the same shapes for every format. One
      that stands in code of others is marked by ``module.fn = mpjax.cast_inputs(module.fn)``.

  Returns:
    A function with the same signature.

  Raises:
    TypeError: ``fn`` is a module, of Python or of Flax, a class of such, or no function at all.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> def kernel(x, w, *, flavor):
    ...   if x.dtype == jnp.float32 or flavor != "fast":
    ...     raise NotImplementedError("16-bit operands only")
    ...   return x @ w
    >>> loss = lambda w, x: mpjax.cast_inputs(kernel)(x, w, flavor="fast").sum()
    >>> w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    >>> jax.grad(mpjax.autocast(loss, "mixed_bfloat16"))(w, x).dtype.name
    'float32'
  """
  _check_is_function(fn)
  call: Callable[..., Any] = fn

  @functools.wraps(fn, updated=())
  def marked(*args: P.args, **kwargs: P.kwargs) -> R:
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [x for x in leaves if _is_array(x)]
    if not any(isinstance(x, Tracer) for x in arrays) or not any(map(_is_float32, arrays)):
      return fn(*args, **kwargs)
    out_tree: Any = None

    def flat(*operands: Any) -> list[Any]:
      nonlocal out_tree
      rest = iter(operands)
      merged = [next(rest) if _is_array(x) else x for x in leaves]
      flat_args, flat_kwargs = jax.tree.unflatten(tree, merged)
      out, out_tree = jax.tree.flatten(call(*flat_args, **flat_kwargs))
      return out

    kernel, captured = traced(_name(fn), flat, arrays)
    out = cast_inputs_p.bind(*captured, *arrays, kernel=kernel)
    return jax.tree.unflatten(out_tree, out)

  return marked


def _is_array(x: Any) -> bool:
  """Whether an argument is an array; NumPy's scalars are numbers, as kernels take them."""
  return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm")


def _is_float32(x: Any) -> bool:
  return x.dtype == FLOAT32


def _name(fn: Any) -> str:
  return getattr(fn, "__name__", type(fn).__name__)


def _check_is_function(fn: Any) -> None:
  if isinstance(fn, types.ModuleType):
    raise TypeError(
      f"cast_inputs takes a function; got the Python module {fn.__name__}. Mark the function in "
      f"it: {fn.__name__}.name = mpjax.cast_inputs({fn.__name__}.name)."
    )
  kind = fn if isinstance(fn, type) else type(fn)
  if any(base.__module__.partition(".")[0] == "flax" for base in kind.__mro__):
    got = f"the class {kind.__name__}, which makes" if kind is fn else f"{kind.__name__},"
    raise TypeError(
      f"cast_inputs takes a function of arrays; got {got} a Flax module. Mark the "
      "kernel that it calls; a module gets its policy by mpjax.apply_policy(module, policy)."
    )
  if not callable(fn):
    raise TypeError(
      f"cast_inputs takes a function; got {describe(fn)}. Call it as cast_inputs(fn)(*args)."
    )
