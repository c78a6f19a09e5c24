"""Mixed precision with parameters sharded over a mesh (FSDP), optionally tensor parallel besides.

    python examples/fsdp.py                       # eight devices on the CPU
    python examples/fsdp.py --devices 0           # the GPUs or TPUs that are there
    python examples/fsdp.py --model-axis 2        # 4 x 2: layers split over pairs of devices too

Parameters and optimizer state lie sharded in float32. Each layer's weights are gathered where they
are used, in bfloat16, and their gradients are summed over the devices in float32. All of it is
`jax.jit` with shardings: nothing in the model, the loss or the step knows of devices.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax

WIDTH, VOCABULARY, LENGTH, BATCH = 64, 128, 16, 32


class Block(nn.Module):
  """Causal attention and a perceptron; the perceptron's kernels name their axes."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[batch, length, WIDTH] -> the same shape."""
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2], jnp.int32))
    x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x), mask=mask)
    init = nn.initializers.lecun_normal()
    up = nn.with_partitioning(init, ("data", "model"))
    down = nn.with_partitioning(init, ("model", "data"))
    y = nn.gelu(nn.Dense(4 * WIDTH, kernel_init=up, name="up")(nn.LayerNorm()(x)))
    return x + nn.Dense(WIDTH, kernel_init=down, name="down")(y)


class LanguageModel(nn.Module):
  """i32[batch, length] -> logits[batch, length, VOCABULARY]."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Predicts each next token."""
    x = nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens)
    x = Block(name="block")(x)
    return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm()(x))


def fully_sharded(leaf: Any, mesh: jax.sharding.Mesh) -> NamedSharding:
  """Shards the first axis that the data axis divides; a small array is left whole."""
  size = mesh.shape["data"]
  if leaf.size < 1024:
    return NamedSharding(mesh, P())
  axis = next((n for n, length in enumerate(leaf.shape) if length % size == 0), None)
  return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, "data"))


def shardings_of(state: Any, mesh: jax.sharding.Mesh) -> Any:
  """A leaf that names its axes is sharded so; any other by `fully_sharded`."""

  def sharding(leaf: Any) -> Any:
    if isinstance(leaf, nn.Partitioned):
      return leaf.replace_boxed(NamedSharding(mesh, leaf.get_partition_spec()))
    return fully_sharded(leaf, mesh)

  return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
  """The cross-entropy of every token but the first."""
  logits = LanguageModel().apply({"params": params}, tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batch_of(index: int, mesh: jax.sharding.Mesh) -> jax.Array:
  """Sequences that count upwards in steps of 1 to 7, each from a token of its own."""
  first, stride = jax.random.randint(jax.random.key(index), (2, BATCH, 1), 0, VOCABULARY)
  tokens = (first + (1 + stride % 7) * jnp.arange(LENGTH)[None]) % VOCABULARY
  return jax.device_put(tokens, NamedSharding(mesh, P("data")))


def main() -> None:
  """Trains, and shows where the parameters are."""
  parser = argparse.ArgumentParser(description="Mixed precision with sharded parameters.")
  parser.add_argument("--devices", type=int, default=8, help="CPU devices; 0 takes what is there")
  parser.add_argument("--model-axis", type=int, default=1, help="devices that share a layer")
  parser.add_argument("--policy", default="mixed_bfloat16")
  parser.add_argument("--steps", type=int, default=40)
  arguments = parser.parse_args()
  if arguments.devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    # Steps under way at once may block each other where there are fewer cores than devices.
    jax.config.update("jax_cpu_enable_async_dispatch", False)

  shape = (len(jax.devices()) // arguments.model_axis, arguments.model_axis)
  mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = mpjax.make_train_step(loss_fn, tx, policy=arguments.policy)

  def create() -> mpjax.TrainState:
    params = LanguageModel().init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    return mpjax.TrainState.create(params, tx)

  # Made sharded: no device ever holds the whole state.
  state = jax.jit(create, out_shardings=shardings_of(jax.eval_shape(create), mesh))()
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  print(f"mesh {dict(mesh.shape)}: each device holds {held:,} of {whole:,} bytes of state")
  for index in range(arguments.steps):
    state, metrics = step(state, batch_of(index, mesh))
    if index == 0 or (index + 1) % 10 == 0:
      scale, skips = float(metrics.loss_scale), int(metrics.total_skips)
      print(f"step {index + 1}: loss {metrics.loss:.3f}, scale {scale:g}, skipped {skips}")
  kernel = state.params["block"]["up"]["kernel"].value
  print(f"block/up/kernel: {kernel.dtype}{list(kernel.shape)} sharded {kernel.sharding.spec}")


if __name__ == "__main__":
  main()
