"""What devices exchange in a compiled train step: how much, and in which dtype.

    python -m benchmarks.own.collectives --target h100

A language model without attention (embedding, perceptron, LayerNorm, head) on a mesh of four
devices; the compiler's own program is read, so the figures are exact and the same every time.
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

DEVICES = 4
STRATEGIES = ("data parallel", "fully sharded")
LOOKUPS_TOO = "mixed_bfloat16, lookups too"
ROWS = (
  ("float32", "float32"),
  ("mixed_bfloat16", "float32"),
  ("mixed_bfloat16", "compute"),
  (LOOKUPS_TOO, "compute"),
)
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")
MIB = 2**20

_CALL = re.compile(
  rf"= (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def exchanged(text: str) -> Iterator[tuple[str, str, int]]:
  """The collectives of a compiled program: `(kind, dtype, bytes)` of each array.

  A collective that starts apart from its end has its operands and its results in its type. An
  array counts whole, as it is before a reduce-scatter and after an all-gather.
  """
  for call in _CALL.finditer(text):
    arrays = [
      (dtype, math.prod(int(n) for n in shape.split(",") if n) * _BYTES[dtype])
      for dtype, shape in _ARRAY.findall(call["type"])
    ]
    if call["start"] and call["kind"] != "all-reduce":
      half = len(arrays) // 2
      arrays = [max(pair) for pair in zip(arrays[:half], arrays[half:], strict=True)]
    elif call["kind"] == "reduce-scatter":
      arrays = [(dtype, size * DEVICES) for dtype, size in arrays]
    yield from ((call["kind"], dtype, size) for dtype, size in arrays)


def compiled_text(target: str, strategy: str, policy: str, reduce_dtype: str) -> str:
  """The compiled train step of one row, for four devices of a target."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from jax.sharding import AxisType, Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  import mpjax
  from benchmarks import workloads

  layers = [nn.Embed(4096, 512), nn.Dense(2048), jnp.tanh, nn.Dense(512), nn.LayerNorm()]
  model = nn.Sequential([*layers, nn.Dense(4096)])
  tokens = jax.ShapeDtypeStruct((64, 256), jnp.int32)
  devices = np.array(compilers.target_devices(target, DEVICES))
  mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
  tx = mpjax.static_loss_scaling(optax.sgd(1e-3, momentum=0.9), 1)

  def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    return workloads.cross_entropy(model.apply({"params": params}, batch), batch)  # pyright: ignore

  def create() -> mpjax.TrainState:
    params = model.init(jax.random.key(0), jnp.zeros(tokens.shape, tokens.dtype))["params"]
    return mpjax.TrainState.create(params, tx)

  def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    split = [n for n, size in enumerate(leaf.shape) if size % DEVICES == 0]
    if strategy == "data parallel" or leaf.size < 1024 or not split:
      spec = P()
    else:
      spec = P(*[None] * split[0], "data")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  state = jax.tree.map(placed, jax.eval_shape(create))
  rows = NamedSharding(mesh, P("data"))
  batch = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=rows)
  lookups = mpjax.PolicyMap({}, default="mixed_bfloat16", ops={"gather": "lower"})
  used = lookups if policy == LOOKUPS_TOO else policy
  step = mpjax.make_train_step(loss_fn, tx, policy=used, reduce_dtype=reduce_dtype)
  lowered = step.lower(state, batch, lowering_platforms=(compilers.PLATFORM[target],))
  return lowered.compile().as_text()


def cell(found: list[tuple[str, str, int]], kind: str) -> str:
  """The MiB of one kind of collective by dtype; below 0.05 MiB nothing is shown."""
  sizes: Counter[str] = Counter()
  for other, dtype, size in found:
    sizes[dtype] += size if other == kind else 0
  shown = [f"{dtype} {size / MIB:.1f}" for dtype, size in sizes.items() if size / MIB >= 0.05]
  return ", ".join(shown) or "-"


def measure(target: str, strategy: str, policy: str, reduce_dtype: str) -> report.Row:
  """Compiles one row for a target."""
  found = list(exchanged(compiled_text(target, strategy, policy, reduce_dtype)))
  row = {"target": target, "strategy": strategy, "policy": policy, "reduce_dtype": reduce_dtype}
  return {**row, **{kind: cell(found, kind) for kind in KINDS}}


def markdown(rows: list[report.Row]) -> str:
  """A table for every target: MiB a step."""
  columns = {name: name for name in ("strategy", "policy", "reduce_dtype", *KINDS)}
  parts = []
  for target in dict.fromkeys(row["target"] for row in rows):
    parts.append(f"## {target}, {DEVICES} devices, MiB a step\n")
    parts.append(report.table([row for row in rows if row["target"] == target], columns) + "\n")
  return "\n".join(parts)


def main() -> None:
  """Compiles every row for a target; adds them to the results."""
  parser = argparse.ArgumentParser(description="What devices exchange in a train step.")
  parser.add_argument("--target", choices=compilers.TARGETS, default="h100")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  compilers.prepare(arguments.target)
  if arguments.target == "cpu":
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)

  new = []
  for strategy in STRATEGIES:
    for policy, reduce_dtype in ROWS:
      print(strategy, policy, reduce_dtype, "...", file=sys.stderr, flush=True)
      new.append(measure(arguments.target, strategy, policy, reduce_dtype))
  print(markdown(new))
  old = report.rows_in(arguments.out / "collectives.json")
  rows = [row for row in old if row["target"] != arguments.target] + new
  report.write(
    "collectives",
    "What devices exchange",
    "python -m benchmarks.own.collectives --target TARGET",
    "compilers of the targets named in each heading",
    rows,
    markdown(rows),
    arguments.out,
  )


if __name__ == "__main__":
  main()
