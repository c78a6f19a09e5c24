"""What other backends do to a program, done on a CPU."""

import contextlib

import jax
import numpy as np
from jax import lax

ROUNDING = {"xla_allow_excess_precision": False}
"""Options of XLA with which every rounding that a program asks for happens."""


def rounded(fn):
  """A function all of whose 16-bit values round, as between the kernels of a GPU.

  XLA takes pairs of casts away, from float32 to 16 bits and back, wherever it fuses what makes a
  value with what reads it: on CPUs nearly everywhere, a whole turn of a loop.
  """

  def run(*args):
    return jax.jit(fn, compiler_options=ROUNDING)(*args)

  return run


@contextlib.contextmanager
def branches_of(platform):
  """Runs what `lax.platform_dependent` has for a platform, inside, in what is traced there."""
  choose = lax.platform_dependent

  def chosen(*args, default=None, **branches):
    return branches.get(platform, default)(*args)

  jax.clear_caches()
  lax.platform_dependent = chosen
  try:
    yield
  finally:
    lax.platform_dependent = choose
    jax.clear_caches()


def assert_same_bits(found, want):
  """Two programs made the same numbers; to rounding where a GPU fuses each in its own way."""
  if jax.default_backend() == "cpu":
    np.testing.assert_array_equal(found, want)
  else:
    np.testing.assert_allclose(found, want, rtol=1e-5)
