"""tokamax's operations in XLA; its kernels for accelerators refuse to compile where there is none.

It is in no extra, for it brings 60 packages: ``pip install tokamax``, then ``pytest -m models``.
"""

import jax
import jax.numpy as jnp
import pytest

import mpjax
from _jaxprs import contractions, wide_contractions

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def tokamax():
  return pytest.importorskip("tokamax")


def attention(tokamax, w, x):
  heads = x.reshape(2, 64, 4, 32)
  return tokamax.dot_product_attention(
    heads @ w, heads, heads, is_causal=True, implementation="xla"
  )


def ragged(tokamax, w, x):
  return tokamax.ragged_dot(x, jnp.stack([w, w]), jnp.array([200, 312]), implementation="xla")


def gated(tokamax, w, x):
  both = jnp.stack([w, w], axis=1)
  return tokamax.gated_linear_unit(x, both, activation=jax.nn.silu, implementation="xla")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(("fn", "count"), [(attention, 8), (ragged, 3), (gated, 3)])
def test_every_matmul_is_narrow_forwards_and_backwards(fn, count, policy, tokamax):
  loss = lambda w, x: jnp.sum(fn(tokamax, w, x))
  gradient = jax.grad(mpjax.autocast(loss, policy), (0, 1))
  traced = jax.make_jaxpr(gradient)(jnp.eye(32), jnp.ones((512, 32)))
  assert len(contractions(traced)) >= count
  assert not wide_contractions(traced, policy.removeprefix("mixed_"))
