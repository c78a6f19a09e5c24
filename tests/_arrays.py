"""Arrays that test modules hold, made by NumPy: what JAX makes at import it compiles there."""

import jax
import numpy as np


def array(numbers, dtype=np.float32):
  """An array of JAX, for which nothing is compiled."""
  return jax.device_put(np.asarray(numbers, dtype))


def normal(seed, *shape):
  """Normally distributed numbers for `array`."""
  return np.random.default_rng(seed).normal(size=shape)
