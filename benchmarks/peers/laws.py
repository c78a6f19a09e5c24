"""Twelve programs whose state, positions, gates or tolerances 16 bits do not hold, four ways.

    python -m benchmarks.peers.laws

Each program is written once, around its matmuls and its sensitive functions, which a `Way` chooses:
float32; by hand, as Flax's `dtype=` computes, with what a layer takes and loops start from in 16
bits; as PyTorch's autocast does by its lists, all matmuls in 16 bits, exponentials and sums in
float32 and the widest operand elsewhere; and mpjax.autocast around the float32 program. An error is
the relative distance of a result to that of the same program in float64, its mean over draws of the
numbers. Every rounding that a program asks for happens.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mpjax
from benchmarks import report
from benchmarks.peers import flops

FORMATS = {"mixed_bfloat16": jnp.dtype(jnp.bfloat16), "mixed_float16": jnp.dtype(jnp.float16)}
DRAWS = 8
ROUNDING: Any = {"xla_allow_excess_precision": False}
ENDLESS = 2000
"""Turns after which a loop to a tolerance is broken off."""


class Way(NamedTuple):
  """How a program is computed.

  Attributes:
    dtype: The format of its layers; None for that of their operands.
    listed: That of all other matmuls; None for that of their operands.
    held: The dtype in which layers take their input and loops start; None for that which it has.
    sensitive: The dtype of exponentials and sums; None for that of their operand.
  """

  dtype: Any = None
  listed: Any = None
  held: Any = None
  sensitive: Any = None

  def dot(self, x: Any, w: Any) -> Any:
    """A layer without a bias."""
    return jnp.dot(_to(x, self.dtype), _to(w, self.dtype))

  def product(self, x: Any, y: Any) -> Any:
    """A matmul of what was computed."""
    return jnp.dot(_to(x, self.listed), _to(y, self.listed))

  def enter(self, x: Any) -> Any:
    """What a layer takes, or a loop starts from."""
    return _to(x, self.held)

  def full(self, fn: Callable[..., Any], *operands: Any) -> Any:
    """A function that PyTorch's autocast computes in float32."""
    return fn(*(_to(x, self.sensitive) for x in operands))


def _to(x: Any, dtype: Any) -> Any:
  return x if dtype is None else jnp.asarray(x).astype(dtype)


def _steady(turn: Callable[[Any], Any], start: Any) -> Any:
  """What a loop starts from, in the dtypes that its turns make of it."""
  for _ in range(3):
    types = jax.eval_shape(turn, start)
    start = jax.tree.map(lambda x, t: jnp.asarray(x).astype(t.dtype), start, types)
  return start


def loop(turn: Callable[[Any, Any], Any], start: Any, xs: Any) -> Any:
  """A loop over rows."""
  first = jax.tree.map(lambda x: x[0], xs)
  start = _steady(lambda h: turn(h, first), start)
  return lax.scan(lambda h, x: (turn(h, x), None), start, xs)[0]


def until(
  turn: Callable[[Any], Any], change: Callable[[Any], Any], start: Any, least: float
) -> Any:
  """A loop that ends when nothing changes by more than a tolerance."""
  start = _steady(turn, start)

  def goes_on(c: Any) -> Any:
    return (jnp.max(change(c[0])) > least) & (c[1] < ENDLESS)

  return lax.while_loop(goes_on, lambda c: (turn(c[0]), c[1] + 1), (start, 0))[0]


# The programs ------------------------------------------------------------------------------------


def maml(way: Way, p: Any, x: Any) -> Any:
  """Five steps of gradient descent inside of a loss: how far they move the weights."""

  def loss(p: Any) -> Any:
    y = way.dot(jnp.tanh(way.dot(way.enter(x), p["a"])), p["b"])
    return way.full(jnp.mean, (y - 1) ** 2)

  adapted = p
  for _ in range(5):
    adapted = jax.tree.map(lambda w, g: w - 1e-3 * g, adapted, jax.grad(loss)(adapted))
  return jax.tree.map(lambda new, old: new - old, adapted, p)


def delta_rule(way: Way, p: Any, x: Any) -> Any:
  """Test-time training: a matrix that each token of 512 corrects, what it then answers."""
  tokens = way.enter(jnp.tile(x, (16, 1)))
  keys, values = way.dot(tokens, p["a"]), way.dot(tokens, p["b"])

  def turn(w: Any, kv: Any) -> Any:
    key, value = kv
    return w - 1e-3 * jnp.outer(key, way.product(key, w) - value)

  return way.product(keys, loop(turn, way.enter(p["c"]), (keys, values)) - p["c"])


def neural_ode(way: Way, p: Any, x: Any) -> Any:
  """Euler's method in 1000 steps: how far the state goes."""

  def turn(y: Any, _: Any) -> Any:
    return y + 1e-3 * jnp.tanh(way.dot(y, p["a"]))

  return loop(turn, way.enter(x), jnp.arange(1000)) - x


def equilibrium(way: Way, p: Any, x: Any) -> Any:
  """A deep equilibrium model: the fixed point of a layer, to 1e-4."""
  x = way.enter(x)

  def turn(c: Any) -> Any:
    return jnp.tanh(0.5 * way.dot(c[0], p["a"]) + x), c[0]

  return until(turn, lambda c: jnp.abs(c[0] - c[1]), (x, x + 1), 1e-4)[0]


def min_gru(way: Way, p: Any, x: Any) -> Any:
  """A gate that forgets 0.2% a step, by an associative scan over 2048 steps."""
  tokens = way.enter(jnp.tile(x, (64, 1)))
  z = jax.nn.sigmoid(way.dot(tokens, p["a"]) - 6)

  def combine(a: Any, b: Any) -> Any:
    return a[0] * b[0], b[0] * a[1] + b[1]

  return lax.associative_scan(combine, (1 - z, z * way.dot(tokens, p["b"])))[1]


def selective(way: Way, p: Any, x: Any) -> Any:
  """Mamba's recurrence, whose decay is exp(-dt), over 2048 steps."""
  tokens = way.enter(jnp.tile(x, (64, 1)))
  dt = way.full(jax.nn.softplus, way.dot(tokens, p["a"]) - 6)
  decay, drive = way.full(jnp.exp, -dt), dt * way.dot(tokens, p["b"])
  start = way.enter(jnp.zeros_like(p["a"][0]))
  return loop(lambda h, u: u[0] * h + u[1], start, (decay, drive))


def gru(way: Way, p: Any, x: Any) -> Any:
  """A gated recurrent unit over 2048 steps, whose gate is nearly shut."""

  def turn(h: Any, u: Any) -> Any:
    z = jax.nn.sigmoid(way.dot(u, p["a"]) - 6)
    reset = jax.nn.sigmoid(way.dot(u, p["c"]))
    new = jnp.tanh(way.dot(u, p["b"]) + reset * way.dot(h, p["c"]))
    return (1 - z) * h + z * new

  tokens = way.enter(jnp.tile(x, (64, 1)))
  return loop(turn, way.enter(jnp.zeros_like(p["a"][0])), tokens)


def rotary(way: Way, p: Any, x: Any) -> Any:
  """Scores of queries and keys that are turned by their positions, up to 8192, by a matmul."""
  x, half = way.enter(x), p["a"].shape[0] // 2
  positions = jnp.linspace(0, 8191, len(x)).round().astype(p["a"].dtype)
  frequencies = 1 / 1e4 ** (jnp.arange(half, dtype=p["a"].dtype) / half)
  angles = way.product(positions[:, None], frequencies[None])

  def turned(u: Any) -> Any:
    a, b = u[:, :half], u[:, half:]
    sin, cos = _to(jnp.sin(angles), u.dtype), _to(jnp.cos(angles), u.dtype)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], 1)

  q, k = turned(way.dot(x, p["a"])), turned(way.dot(x, p["b"]))
  return way.product(q, k.T)


def router(way: Way, p: Any, x: Any) -> Any:
  """Eight experts of width eight, mixed by a softmax."""
  x = way.enter(x)
  weights = way.full(jax.nn.softmax, way.dot(x, p["a"][:, :8]))
  outs = jnp.tanh(way.dot(x, p["b"]).reshape(len(x), 8, -1))
  return way.full(functools.partial(jnp.sum, axis=1), weights[:, :, None] * outs)


def bisection(way: Way, p: Any, x: Any) -> Any:
  """The root of a function that rises, to 1e-4."""
  h = way.dot(way.enter(x), p["a"])

  def turn(c: Any) -> Any:
    low, high = c
    middle = (low + high) / 2
    up = middle + jnp.tanh(middle) < h
    return jnp.where(up, middle, low), jnp.where(up, high, middle)

  low, high = until(turn, lambda c: c[1] - c[0], (h - 4, h + 4), 1e-4)
  return (low + high) / 2


def newton(way: Way, p: Any, x: Any) -> Any:
  """The root of y^3 + y = h, to 1e-5."""
  h = way.dot(way.enter(x), p["a"])

  def step(y: Any) -> Any:
    return (y**3 + y - h) / (3 * y**2 + 1)

  return until(lambda y: y - step(y), lambda y: jnp.abs(step(y)), h, 1e-5)


def averages(way: Way, p: Any, x: Any) -> Any:
  """300 steps of gradient descent with an average of the weights, inside: how far that moves."""

  def loss(w: Any) -> Any:
    return way.full(jnp.mean, (way.dot(way.enter(x), w) - 1) ** 2)

  def turn(c: Any, _: Any) -> Any:
    w, average = c
    w = w - 1e-3 * jax.grad(loss)(w)
    return w, average + 1e-3 * (w - average)

  return loop(turn, (p["a"], p["a"]), jnp.arange(300))[1] - p["a"]


PROGRAMS: dict[str, Callable[[Way, Any, Any], Any]] = {
  "MAML": maml,
  "TTT, delta rule": delta_rule,
  "neural ODE": neural_ode,
  "DEQ": equilibrium,
  "minGRU": min_gru,
  "Mamba": selective,
  "GRU, 2048 steps": gru,
  "RoPE at 8192": rotary,
  "MoE router": router,
  "bisection": bisection,
  "Newton": newton,
  "EMA inside": averages,
}


# Running them ------------------------------------------------------------------------------------


def ways(policy: str) -> dict[str, Way]:
  """The ways beside mpjax, by what the table calls them."""
  dtype = FORMATS[policy]
  return {
    "float32": Way(),
    "by hand": Way(dtype, held=dtype),
    "torch-like": Way(dtype, dtype, sensitive=jnp.float32),
  }


def numbers(seed: int, dtype: Any) -> tuple[Any, Any]:
  """Three matrices of 64 by 64, and 32 rows."""
  draw = np.random.default_rng(seed)
  matrices = {name: jnp.asarray(draw.normal(size=(64, 64)) / 8, dtype) for name in "abc"}
  return matrices, jnp.asarray(draw.normal(size=(32, 64)), dtype)


def programs(name: str, policy: str) -> dict[str, Callable[[Any, Any], Any]]:
  """A program in each way, as a function of its numbers."""
  fn = PROGRAMS[name]
  found: dict[str, Callable[[Any, Any], Any]] = {
    key: lambda p, x, way=way: fn(way, p, x) for key, way in ways(policy).items()
  }
  return {**found, "mpjax": mpjax.autocast(lambda p, x: fn(Way(), p, x), policy)}


def _flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def exact(name: str, seed: int) -> np.ndarray:
  """What a program returns in float64."""
  with jax.enable_x64(True):
    return _flat(jax.jit(lambda p, x: PROGRAMS[name](Way(), p, x))(*numbers(seed, jnp.float64)))


def measure(name: str, policy: str, draws: int = DRAWS) -> report.Row:
  """The errors of a program and its share of FLOPs of matmuls in 16 bits, in each way."""
  truths = [exact(name, seed) for seed in range(draws)]
  row: report.Row = {"program": name, "policy": policy}
  for way, fn in programs(name, policy).items():
    run = jax.jit(fn, compiler_options=ROUNDING)
    pairs = [(_flat(run(*numbers(n, jnp.float32))), truth) for n, truth in enumerate(truths)]
    errors = [np.linalg.norm(got - truth) / np.linalg.norm(truth) for got, truth in pairs]
    row[way] = float(np.mean(errors))
    row[f"{way}, narrow"] = flops.low_share(flops.contractions(fn, *numbers(0, jnp.float32)))
  return row


COLUMNS = {"program": "program", "policy": "policy", "float32": "float32"}
COLUMNS |= {way: way for way in ("by hand", "torch-like", "mpjax")}
COLUMNS |= {f"{way}, narrow": f"narrow {way}" for way in ("by hand", "torch-like", "mpjax")}


def is_best(row: report.Row) -> bool:
  """Whether mpjax errs no more than the other ways in 16 bits, to what one draw may differ."""
  return row["mpjax"] <= 1.02 * min(row["by hand"], row["torch-like"])


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints the table and writes it into the results; returns in how many rows mpjax is not best."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
  parser.add_argument("--policies", nargs="+", default=list(FORMATS), choices=list(FORMATS))
  parser.add_argument("--draws", type=int, default=DRAWS)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  options = parser.parse_args(arguments)
  rows = []
  for policy in options.policies:
    for name in options.programs:
      rows.append(measure(name, policy, options.draws))
      print(rows[-1], file=sys.stderr, flush=True)
  text = report.table(rows, COLUMNS)
  print(text)
  title = "Programs that 16 bits do not hold"
  report.write("laws", title, "python -m benchmarks.peers.laws", "CPU", rows, text, options.out)
  return sum(not is_best(row) for row in rows)


if __name__ == "__main__":
  sys.exit(min(main(), 1))
