"""Mixed-precision training in several processes: the same decision and parameters in all of them.

On one machine, here with two processes, one shell each (any free port):

    python examples/distributed.py --address localhost:12345 --processes 2 --process 0
    python examples/distributed.py --address localhost:12345 --processes 2 --process 1

On a cluster whose scheduler JAX knows (Slurm, Open MPI, Cloud TPU), where it finds the rest:

    srun --ntasks=16 python examples/distributed.py --platform ""

Between CPUs the collectives are Gloo's, between GPUs NCCL's; both come with JAX. ``--fault 1``
puts a NaN into the data of process 1 alone at every tenth step, which all processes then skip.
"""

import argparse
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax

FEATURES, HIDDEN, ROWS = 32, 64, 16  # rows of each process


def loss_fn(params: Any, batch: Any, rng: jax.Array) -> jax.Array:
  """How far a perceptron with one hidden layer, some of it dropped, is from its inputs' sum."""
  hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"])
  hidden = hidden * jax.random.bernoulli(rng, 0.95, hidden.shape)
  return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def local_batch(index: int, fault: bool) -> dict[str, np.ndarray]:
  """The rows that this process feeds: its own, no other process has them."""
  numbers = np.random.default_rng((index, jax.process_index()))
  x = numbers.normal(size=(ROWS, FEATURES)).astype(np.float32)
  y = x.sum(axis=1, keepdims=True)
  if fault and index % 10 == 4:
    x[0, 0] = np.nan
  return {"x": x, "y": y}


def initial_params(mesh: jax.sharding.Mesh) -> Any:
  """The same numbers in every process; the first kernel is sharded over all devices."""
  keys = jax.random.split(jax.random.key(0), 2)
  params = {
    "in": jax.random.normal(keys[0], (FEATURES, HIDDEN)) / FEATURES**0.5,
    "bias": jnp.zeros((1, HIDDEN)),
    "out": jax.random.normal(keys[1], (HIDDEN, 1)) / HIDDEN**0.5,
  }
  specs = {"in": P(None, "data"), "bias": P(), "out": P()}
  return {
    name: jax.make_array_from_process_local_data(
      NamedSharding(mesh, specs[name]), np.asarray(value), value.shape
    )
    for name, value in params.items()
  }


def digest(tree: Any, mesh: jax.sharding.Mesh) -> str:
  """A hash of all numbers of a tree, as this process holds them once they are gathered."""
  whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)
  numbers = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(whole)]
  assert all(np.isfinite(x).all() for x in numbers)
  return hashlib.sha256(b"".join(x.tobytes() for x in numbers)).hexdigest()[:16]


def main() -> None:
  """Joins the other processes, trains with them and prints what this one ends with."""
  parser = argparse.ArgumentParser(description="Mixed precision in several processes.")
  parser.add_argument("--address", help="host:port of process 0; found by itself on a cluster")
  parser.add_argument("--processes", type=int, help="how many there are")
  parser.add_argument("--process", type=int, help="which of them this is, from 0")
  parser.add_argument("--platform", default="cpu", help="empty for what is there")
  parser.add_argument("--policy", default="mixed_float16")
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--fault", type=int, help="the process whose data get a NaN now and then")
  arguments = parser.parse_args()
  if arguments.platform:
    jax.config.update("jax_platforms", arguments.platform)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(arguments.address, arguments.processes, arguments.process)

  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  state = mpjax.TrainState.create(initial_params(mesh), tx, rng=jax.random.key(0))
  step = mpjax.make_train_step(loss_fn, tx, policy=arguments.policy)
  faulty = arguments.fault == jax.process_index()
  rows = NamedSharding(mesh, P("data"))
  for index in range(arguments.steps):
    local = local_batch(index, faulty)
    batch = {name: jax.make_array_from_process_local_data(rows, x) for name, x in local.items()}
    state, metrics = step(state, batch)
  print(
    f"process {jax.process_index()} of {jax.process_count()}: loss {float(metrics.loss):.6f}, "
    f"skipped {int(metrics.total_skips)}, scale {float(metrics.loss_scale):g}, "
    f"state {digest((state.params, state.opt_state.inner_state), mesh)}"
  )


if __name__ == "__main__":
  main()
