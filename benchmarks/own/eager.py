"""What a call costs that nothing compiles, as in a notebook, beside a plain one.

    python -m benchmarks.own.eager

Forward passes and gradients of small models from their second call on, in ``mixed_bfloat16`` and
without a policy: the least of several repetitions, in which the two take turns.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

compilers.prepare("cpu", quick=True)

COLUMNS = {
  "what": "what",
  "call": "call",
  "plain": "milliseconds, plain",
  "mpjax": "milliseconds, mpjax",
  "ratio": "ratio",
}
Calls = tuple[str, str, Callable[[Any], Any], tuple[Any, Any]]


def linen_models() -> Iterator[tuple[str, Any, Any]]:
  """Models of Linen, each with its input."""
  import flax.linen as nn
  import jax

  from benchmarks import workloads

  layers = [layer for _ in range(3) for layer in (nn.Dense(128), nn.relu)]
  normal = jax.random.normal(jax.random.key(0), (32, 64))
  yield "a perceptron of four layers, Linen", nn.Sequential([*layers, nn.Dense(10)]), normal
  for name, title in (
    ("vit", "a vision transformer of a layer, Linen"),
    ("gpt", "a GPT of a layer, Linen"),
  ):
    workload = workloads.TINY[name]()
    yield title, workload.model(**workload.sizes), jax.numpy.zeros(*_spread(workload.inputs))


def _spread(shape: Any) -> tuple[Any, Any]:
  return shape.shape, shape.dtype


def calls() -> Iterator[Calls]:
  """What is called, how, the call of one, and the two that are called: plain, under a policy."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  import mpjax

  policy = "mixed_bfloat16"
  for name, model, x in linen_models():
    variables = model.init(jax.random.key(0), x)

    def loss(variables: Any, model: Any = model, x: Any = x) -> jax.Array:
      return jnp.mean(model.apply(variables, x) ** 2)

    both = model, mpjax.apply_policy(model, policy)
    yield name, "forward", lambda model, v=variables, x=x: model.apply(v, x), both
    gradients = jax.grad(loss), jax.grad(mpjax.autocast(loss, policy))
    yield name, "gradient", lambda gradient, v=variables: gradient(v), gradients

  def layers() -> list[Any]:
    rngs = nnx.Rngs(0)
    return [nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs)]

  x = jax.random.normal(jax.random.key(0), (32, 64))
  nets = nnx.Sequential(*layers()), mpjax.apply_policy(nnx.Sequential(*layers()), policy)
  gradient = nnx.grad(lambda model: jnp.mean(model(x) ** 2))
  yield "a perceptron of two layers, NNX", "forward", lambda model: model(x), nets
  yield "a perceptron of two layers, NNX", "gradient", gradient, nets
  w = jnp.ones((64, 64))

  def product(w: Any) -> jax.Array:
    return jnp.tanh(x @ w)

  both = product, mpjax.autocast(product, policy)
  yield "tanh(x @ w)", "forward", lambda fn: fn(w), both


def measure(found: Calls, times: int, repetitions: int) -> report.Row:
  """The row of one call, the two in turns."""
  import jax

  what, kind, call, both = found
  seconds: tuple[list[float], list[float]] = [], []
  for one in both:
    jax.block_until_ready((call(one), call(one)))
  for _ in range(repetitions):
    for one, taken in zip(both, seconds, strict=True):
      began = time.perf_counter()
      for _ in range(times):
        jax.block_until_ready(call(one))
      taken.append((time.perf_counter() - began) / times)
  plain, narrow = map(min, seconds)
  figures = {name: float(f"{1e3 * x:.3g}") for name, x in (("plain", plain), ("mpjax", narrow))}
  return {"what": what, "call": kind, **figures, "ratio": round(narrow / plain, 2)}


def main() -> None:
  """Measures each call; writes the table to the results."""
  parser = argparse.ArgumentParser(description="What a call costs that nothing compiles.")
  parser.add_argument("--times", type=int, default=10)
  parser.add_argument("--repetitions", type=int, default=15)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  rows: list[report.Row] = []
  for found in calls():
    print(f"{found[0]}, {found[1]} ...", file=sys.stderr, flush=True)
    rows.append(measure(found, arguments.times, arguments.repetitions))
  report.write(
    "eager",
    "Calls that nothing compiles, from the second on, in mixed_bfloat16",
    "python -m benchmarks.own.eager",
    "CPU",
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
