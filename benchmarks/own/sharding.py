"""Twenty steps on several devices beside the same on one: how far the parameters end apart.

    python -m benchmarks.own.sharding

A transformer block trained with Adam on the CPU. A difference is the distance of all parameters
from those of one device, relative to the distance that training has moved them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from benchmarks import report

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
FEATURES, ROWS, LENGTH = 32, 32, 8


class Block(nn.Module):
  """Attention and a perceptron: [batch, length, FEATURES] -> the same shape."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Adds both to the stream."""
    x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
    y = nn.gelu(nn.Dense(4 * FEATURES, name="up")(nn.LayerNorm()(x)))
    return x + nn.Dense(FEATURES, name="down")(y)


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
  """How far the block is from turning each sequence around."""
  out: Any = Block().apply({"params": params}, batch)
  return jnp.mean((out - batch[:, ::-1]) ** 2)


def batch_of(index: int) -> jax.Array:
  """f32[ROWS, LENGTH, FEATURES]."""
  return jax.random.normal(jax.random.key(index), (ROWS, LENGTH, FEATURES))


def initial_params() -> Any:
  """The parameters that every run begins with."""
  return Block().init(jax.random.key(0), batch_of(0))["params"]


def make_tx(axis_name: str | None = None) -> optax.GradientTransformationExtraArgs:
  """The optimizer of every run."""
  return mpjax.dynamic_loss_scaling(optax.adam(1e-3, eps=1e-3), axis_name=axis_name)


def make_mesh(devices: int, model: int = 1) -> jax.sharding.Mesh:
  """A mesh of a data and a model axis."""
  shape, kinds = (devices // model, model), (AxisType.Auto,) * 2
  return jax.make_mesh(shape, ("data", "model"), axis_types=kinds, devices=jax.devices()[:devices])


def by_compiler(
  devices: int, spec_of: Callable[[Any], P], policy: str, steps: int, model: int = 1
) -> Any:
  """The parameters after some steps of `mpjax.make_train_step` with sharded arrays."""
  mesh, tx = make_mesh(devices, model), make_tx()
  params = jax.tree.map(
    lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf))), initial_params()
  )
  step = mpjax.make_train_step(loss_fn, tx, policy=policy)
  state = mpjax.TrainState.create(params, tx)
  for index in range(steps):
    state, _ = step(state, jax.device_put(batch_of(index), NamedSharding(mesh, P("data"))))
  return state.params


def by_hand(devices: int, policy: str, steps: int, dtype: str) -> Any:
  """The parameters after some steps under `jax.shard_map`, gradients summed in a dtype."""
  mesh, tx = make_mesh(devices), make_tx("data")

  def step(params: Any, opt_state: Any, batch: jax.Array) -> tuple[Any, Any]:
    grad = mpjax.value_and_grad(mpjax.autocast(loss_fn, policy))
    local = lax.pcast(params, "data", to="varying")
    _, grads = grad(local, batch, loss_scale=mpjax.loss_scale(opt_state))
    grads = mpjax.reduce_gradients(grads, "data", dtype)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
  mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
  params = initial_params()
  opt_state = tx.init(params)
  for index in range(steps):
    params, opt_state = mapped(params, opt_state, batch_of(index))
  return params


def whole(leaf: Any) -> P:
  """Replicated."""
  del leaf
  return P()


def first_axis(leaf: Any) -> P:
  """Sharded along the first axis over the data axis, where it can be."""
  return P("data") if leaf.shape[0] % 8 == 0 else P()


def last_axis(leaf: Any) -> P:
  """Sharded along the last axis over the model axis."""
  return P(*[None] * (leaf.ndim - 1), "model")


def difference(params: Any, expected: Any) -> float:
  """How far two trees are apart, relative to how far the second is from the initial one."""
  apart, moved = (
    sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in zip(*trees, strict=True))
    for trees in (
      (jax.tree.leaves(params), jax.tree.leaves(expected)),
      (jax.tree.leaves(jax.device_get(initial_params())), jax.tree.leaves(expected)),
    )
  )
  return (apart / moved) ** 0.5


RUNS = (
  ("data parallel, jit", 2, lambda p, n: by_compiler(2, whole, p, n)),
  ("data parallel, jit", 8, lambda p, n: by_compiler(8, whole, p, n)),
  ("fully sharded, jit", 8, lambda p, n: by_compiler(8, first_axis, p, n)),
  ("tensor parallel 4 x 2, jit", 8, lambda p, n: by_compiler(8, last_axis, p, n, model=2)),
  ("data parallel, shard_map, float32 sums", 8, lambda p, n: by_hand(8, p, n, "float32")),
  ("data parallel, shard_map, bfloat16 sums", 8, lambda p, n: by_hand(8, p, n, "bfloat16")),
)


def main() -> None:
  """Trains every run; prints the table and writes it into the results."""
  parser = argparse.ArgumentParser(description="Several devices beside one.")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  steps = arguments.steps
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  alone = {policy: jax.device_get(by_compiler(1, whole, policy, steps)) for policy in POLICIES}
  rows = []
  for name, devices, run in RUNS:
    apart = {p: difference(jax.device_get(run(p, steps)), alone[p]) for p in POLICIES}
    rows.append({"strategy": name, "devices": devices, **apart})
    print(name, devices, file=sys.stderr, flush=True)
  eps = {p: float(jnp.finfo(mpjax.Policy.parse(p).compute_dtype).eps) for p in POLICIES}
  rows.append({"strategy": "for comparison: epsilon of the compute dtype", **eps})
  columns = {name: name for name in ("strategy", "devices", *POLICIES)}
  table = report.table(rows, columns)
  print(table)
  report.write(
    "sharding",
    "Several devices beside one",
    f"python -m benchmarks.own.sharding --steps {steps}",
    "CPU",
    rows,
    table,
    arguments.out,
  )


if __name__ == "__main__":
  main()
