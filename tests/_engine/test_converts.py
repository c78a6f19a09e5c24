"""What a compiler makes of an all-narrow function: no more casts than written by hand."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import mpjax

pytestmark = pytest.mark.usefixtures("standard_promotion")

COMPUTE = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}


class Mlp(nn.Module):
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x):
    for width in (32, 32, 16):
      x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
    return x


class Convolutions(nn.Module):
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x):
    x = x.reshape(-1, 4, 4, 2)
    for width in (8, 8):
      x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype)(x))
    return nn.max_pool(x, (2, 2))


def step(model, policy):
  """The gradient of a sum that leaves 16 bits at the end, as text of the lowered module."""
  model = mpjax.apply_policy(model, policy)
  x = jnp.ones((4, 32))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  loss = lambda variables, x: model.apply(variables, x).astype(jnp.float32).sum()
  return jax.jit(jax.grad(loss)).lower(variables, x)


# As lowered: what a CPU's compiler makes of 16 bits says little, for it multiplies in float32.
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("model", [Mlp, Convolutions])
def test_an_all_narrow_function_has_no_more_converts_than_by_hand(model, policy):
  def converts(lowered):
    return len(re.findall(r"stablehlo\.convert ", lowered.as_text()))

  ours, by_hand = step(model(), policy), step(model(COMPUTE[policy]), "float32")
  assert 0 < converts(ours) <= converts(by_hand)
