"""Train steps for `python -m mpjax cost`, from shapes alone.

python -m mpjax cost benchmarks.own.cost_cases:mlp --target gpu:h100
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mpjax


class MLP(nn.Module):
  """Residual blocks of two dense layers, each block behind a LayerNorm.

  Attributes:
    width: the width of the residual stream; the hidden layers are four times as wide.
    depth: the number of blocks.
  """

  width: int
  depth: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps f32[batch, width] to logits, f32[batch, 10]."""
    for n in range(self.depth):
      h = nn.gelu(nn.Dense(4 * self.width, name=f"up_{n}")(nn.LayerNorm(name=f"norm_{n}")(x)))
      x = x + nn.Dense(self.width, name=f"down_{n}")(h)
    return nn.Dense(10, name="head")(x)


def mlp(width: int = 512, depth: int = 3, batch: int = 4096) -> tuple[Any, ...]:
  """A step with a parameter `policy`, the shapes of its state, and those of a batch."""
  model, tx = MLP(width, depth), optax.adamw(1e-3)

  def loss_fn(params: Any, batch: Any) -> jax.Array:
    logits: Any = model.apply({"params": params}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

  def step(state: Any, batch: Any, policy: str) -> Any:
    return mpjax.make_train_step(loss_fn, tx, policy=policy)(state, batch)

  def init(key: jax.Array, x: jax.Array) -> Any:
    return mpjax.TrainState.create(model.init(key, x)["params"], tx)

  x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
  state = jax.eval_shape(init, jax.random.key(0), x)
  return step, state, (x, jax.ShapeDtypeStruct((batch,), jnp.int32))
