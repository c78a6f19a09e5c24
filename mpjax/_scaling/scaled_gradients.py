"""Gradients of a scaled loss."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._core.arguments import power_of_two
from mpjax._core.dtypes import FLOAT32, describe


def value_and_grad(
  loss_fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
  """Makes the function that returns a loss and the gradients of the scaled loss.

  The loss is converted to float32 before it is scaled, so a float16 loss does not overflow.
  The gradients are scaled, for a transformation of `dynamic_loss_scaling` to unscale.

  Args:
    loss_fn: Returns a real scalar, or a pair of it and auxiliary output if ``has_aux``.
    argnums: The positions of the arguments to differentiate, as for ``jax.grad``.
    has_aux: Whether ``loss_fn`` returns auxiliary output.

  Returns:
    A function that takes the arguments of ``loss_fn`` and the keyword ``loss_scale``, and
    returns ``(loss, gradients)`` or ``((loss, aux), gradients)``; the loss is float32 and
    unscaled.

  Raises:
    TypeError: If ``loss_fn`` is no function, or ``argnums`` are no positions; when called, if the
      loss is not a real floating-point scalar, or no ``loss_scale`` is passed.
    ValueError: When called, if ``loss_scale`` is a number that is no power of two.

  Example:
    >>> loss_fn = lambda w: (w * w).astype(jnp.float16)
    >>> value_and_grad(loss_fn)(jnp.float32(3), loss_scale=1024.0)
    (Array(9., dtype=float32), Array(6144., dtype=float32))
  """
  check_positions(argnums)

  def scaled_loss(scale: jax.Array, args: Any, kwargs: Any) -> tuple[jax.Array, Any]:
    out = loss_fn(*args, **kwargs)
    loss, aux = split_aux(out) if has_aux else (out, None)
    loss = float32_loss(loss)
    return loss * scale.astype(loss.dtype), (loss, aux)

  def value_and_scaled_grad(
    *args: Any, loss_scale: jax.typing.ArrayLike | None = None, **kwargs: Any
  ) -> tuple[Any, Any]:
    scale = read_scale(loss_scale)
    grad = jax.grad(lambda *a: scaled_loss(scale, a, kwargs), argnums, has_aux=True)
    grads, (loss, aux) = grad(*args)
    return ((loss, aux) if has_aux else loss), grads

  return value_and_scaled_grad


def check_positions(argnums: Any) -> None:
  """Refuses numbers that are no positions; a bool would be the position 0 or 1.

  Raises:
    TypeError: If there are any.
  """
  if isinstance(argnums, bool):
    raise TypeError(
      f"argnums must be positions, integers. Got {argnums}. For auxiliary output write "
      f"has_aux={argnums}."
    )
  if any(isinstance(n, bool | float | str) for n in np.ravel(np.asarray(argnums, object))):
    raise TypeError(
      f"argnums must be positions, integers. Got {argnums!r}. Give those of the arguments to "
      "differentiate."
    )


def named_after(loss_fn: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
  """The gradient of a loss, with the name and the docstring of that."""
  name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
  gradient.__name__ = gradient.__qualname__ = f"value_and_grad({name})"
  gradient.__doc__ = f"The loss and the scaled gradients of {name}. {loss_fn.__doc__ or ''}".strip()
  return gradient


def read_scale(loss_scale: Any) -> jax.Array:
  """Reads the keyword ``loss_scale`` of a function that returns scaled gradients: f32[].

  Raises:
    TypeError: If there is none, or it is not a real scalar.
    ValueError: If it is a number that is no power of two, by which alone floats are scaled exactly.
  """
  if loss_scale is None:
    raise TypeError(
      "The gradients are those of a scaled loss, which needs the scale. Got no loss_scale. Pass "
      "loss_scale=mpjax.loss_scale(opt_state); where one step is to serve policies that need no "
      "scale too, wrap their optimizer: mpjax.static_loss_scaling(tx, 1)."
    )
  if getattr(loss_scale, "shape", None) != () and not isinstance(loss_scale, int | float):
    raise TypeError(
      "loss_scale must be a scalar. Got "
      f"{describe(loss_scale) if hasattr(loss_scale, 'dtype') else type(loss_scale).__name__}. "
      "Pass loss_scale=mpjax.loss_scale(opt_state)."
    )
  if isinstance(loss_scale, int | float):
    power_of_two("loss_scale", loss_scale)
  return jnp.asarray(loss_scale, FLOAT32)


def split_aux(out: Any) -> tuple[Any, Any]:
  """Splits what a loss function with auxiliary output returned, a pair.

  Raises:
    TypeError: If it is no pair.
  """
  if isinstance(out, tuple) and len(out) == 2:
    return out
  raise TypeError(
    "With has_aux=True the loss function must return a pair (loss, aux). "
    f"Got {type(out).__name__}. Return the pair, or drop has_aux."
  )


def float32_loss(loss: Any) -> jax.Array:
  """Converts a loss to float32 (float64 stays).

  Raises:
    TypeError: If it is not a real floating-point scalar.
  """
  dtype, shape = getattr(loss, "dtype", None), getattr(loss, "shape", None)
  if isinstance(loss, float):
    dtype, shape = FLOAT32, ()
  if dtype is None or shape != () or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      "The loss must be a real floating-point scalar. "
      f"Got {describe(loss)}. Reduce it to a scalar, or pass has_aux=True if it is a pair."
    )
  loss = jnp.asarray(loss)
  return loss.astype(FLOAT32) if loss.dtype.itemsize < FLOAT32.itemsize else loss
