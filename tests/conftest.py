"""The strict session that every test runs in."""

import os

# Read when JAX is first imported, so before it is; eight devices stand in for a small mesh.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles, which says nothing about the law under test.
settings.register_profile("mpjax", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("mpjax")


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
  """Each test counts its own traces."""
  chex.clear_trace_counter()


@pytest.fixture
def standard_promotion():
  """For code of optax or Flax that mixes dtypes and so raises under strict promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def params():
  """A small tree of float32 parameters."""
  return {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.full((3,), 0.5)}}
