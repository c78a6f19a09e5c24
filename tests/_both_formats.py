"""Functions in 16 bits beside the same in float32, by one compilation.

Every 16-bit value is rounded, as on the backend that fuses least.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from _arrays import array, normal
from _backends import ROUNDING
from _jaxprs import equations

POLICIES = ("mixed_bfloat16", "mixed_float16")
both = pytest.mark.parametrize("policy", POLICIES)

W = array(np.full((4, 4), 0.5))
DATA = array(np.ones((8, 4)))
KEYS = array(normal(0, 2048, 4) + 1)


def loss(w, x):
  return jnp.mean((x @ w) ** 2)


def cases(**functions):
  return pytest.mark.parametrize("fn", functions.values(), ids=functions.keys())


def in_both_formats(fn, policy, *args):
  """What a function returns under a policy and in float32."""
  fns = [mpjax.autocast(fn, policy), mpjax.autocast(fn, "float32")]
  run = jax.jit(lambda *args: [f(*args) for f in fns], compiler_options=ROUNDING)
  return jax.device_get(run(*args))


def operand_bytes(found):
  """How many bytes the numbers have that some matmuls multiply."""
  return {atom.aval.dtype.itemsize for eqn in found for atom in eqn.invars}


def matmuls(fn, *args):
  """The matmuls of a function's jaxpr."""
  found = equations(jax.make_jaxpr(fn)(*args))
  return [e for e in found if e.primitive.name == "dot_general"]
