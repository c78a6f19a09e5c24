"""A small sharded training run that saves as it goes; killed and resumed by test_checkpoint.py.

python tests/_resumed_job.py DIRECTORY STEPS
"""

import sys
from pathlib import Path

import jax

if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import checkpoint

SAVE_EVERY = 4
WIDTH = 1024  # a save of some megabytes takes long enough to be killed in it


def loss_fn(params, batch, rng):
  keep = jax.random.bernoulli(rng, 0.9, batch.shape)
  return jnp.mean((jnp.where(keep, batch, 0.0) @ params["w"] - 1.0) ** 2)


def make_tx():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-0.1))
  return mpjax.dynamic_loss_scaling(tx, growth_interval=3)


def make_step():
  return mpjax.make_train_step(loss_fn, make_tx(), policy="mixed_float16")


def make_mesh(devices=8):
  return jax.make_mesh(
    (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
  )


def create(mesh, width=WIDTH):
  w = jnp.zeros((width, width)).at[:, 0].set(jnp.linspace(-1, 1, width))
  params = jax.device_put({"w": w}, NamedSharding(mesh, P("data")))
  return mpjax.TrainState.create(params, make_tx(), rng=jax.random.key(1))


def batch_of(index, mesh, width=WIDTH):
  """The batch of a step: random, and every fifth one with a NaN, which is skipped."""
  x = np.random.default_rng(index).normal(size=(16, width)).astype(np.float32)
  if index % 5 == 4:
    x[3, 5] = np.nan
  return jax.device_put(x, NamedSharding(mesh, P("data")))


def manager_of(directory, keep=2):
  options = ocp.CheckpointManagerOptions(max_to_keep=keep)
  handler = ocp.StandardCheckpointHandler()
  return ocp.CheckpointManager(Path(directory).resolve(), options=options, item_handlers=handler)


def main(directory, steps):
  mesh, step = make_mesh(), make_step()
  state, done = create(mesh), 0
  with manager_of(directory) as manager:
    if manager.latest_step() is not None:
      done = manager.latest_step()
      state = checkpoint.restore(manager, state)
    sys.stdout.write(f"from {done}\n")
    sys.stdout.flush()
    for index in range(done, steps):
      state, _ = step(state, batch_of(index, mesh))
      if (index + 1) % SAVE_EVERY == 0:
        manager.save(index + 1, args=ocp.args.StandardSave(state))
      sys.stdout.write(f"step {index + 1}\n")
      sys.stdout.flush()
    manager.wait_until_finished()


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
