"""A mark on values that are to stay float32 under autocast; without it the identity."""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from mpjax._core.arguments import no_array

KEEP_FLOAT32 = "mpjax.keep_float32"

T = TypeVar("T")


def keep_float32(x: T) -> T:
  """Mark values as float32 that was meant, inside a function under `autocast`.

  A marked value stays float32 through elementwise operations up to the next matmul: a residual
  stream that must not round, say. Outside autocast this is the identity.

  Args:
    x: A pytree of arrays, of any shapes and dtypes.

  Returns:
    The same values.

  Raises:
    TypeError: If ``x`` is a function or a module, or a leaf of it no array.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> fn = lambda w, x: mpjax.keep_float32(x @ w) + 1
    >>> w = x = jnp.ones((4, 4))
    >>> mpjax.autocast(fn, "p=f32, c=bf16, o=f32")(w, x).dtype.name
    'float32'
  """
  if callable(x):  # a module may be a pytree
    name = getattr(x, "__name__", type(x).__name__)
    raise TypeError(
      f"keep_float32 marks values. Got {name}, which is called. Mark what it returns. To run it in "
      'float32, write mpjax.autocast(fn, "float32") for a function, and '
      'mpjax.apply_policy(module, "float32") for a Flax module.'
    )
  try:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, KEEP_FLOAT32), x)
  except TypeError as error:
    if not (got := no_array(x)):
      raise
    raise TypeError(
      f"keep_float32 marks arrays. Got {got}. Mark the value itself, keep_float32(x); for a module "
      "by its path write a rule: mpjax.PolicyMap({'head': 'float32'}, default=...)."
    ) from error
