"""Errors of sensitive operations against float64, under a policy and written by hand in 16 bits.

    python -m benchmarks.own.numerics

Every operation gets the output of a matmul with the identity, so that its 16-bit input is exact
and all error is its own; the gradient is that of the matmul's input, for a cotangent drawn at
random. By hand means what Flax does with `dtype=` or, for a function, what it makes of 16-bit
input: its results are stored in 16 bits, those of a policy in float32.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mpjax
from benchmarks import report

FORMATS = {"mixed_bfloat16": jnp.dtype(jnp.bfloat16), "mixed_float16": jnp.dtype(jnp.float16)}
ROWS, WIDTH = 64, 16
COLUMNS = {
  "operation": "operation",
  "format": "format",
  "policy_error": "error under the policy",
  "hand_error": "by hand",
  "ratio": "ratio",
  "policy_gradient": "error of the gradient",
  "hand_gradient": "by hand",
  "gradient_ratio": "ratio",
}
DRAWS = 8
Runner = Callable[[Any, str, jax.Array, int], jax.Array]
"""Takes a dtype for the layers or None, a policy, the input, and a seed for the parameters."""


class Case(NamedTuple):
  """One operation: how it is run, and the mean and the spread of its input."""

  run: Runner
  mean: float = 0.0
  spread: float = 2.0
  repeatable: bool = True
  """Whether float64 draws the same random numbers as float32."""
  by_hand: tuple[str, ...] = ("bfloat16", "float16")
  """The formats in which it runs by hand on a CPU."""
  policies: tuple[str, ...] = tuple(FORMATS)
  """The policies under which it runs on one."""


class Row(NamedTuple):
  """The relative distances to float64 of an operation's results and gradient, in the 2-norm.

  Each is the root of the mean square over draws of input, cotangent and parameters.
  """

  operation: str
  format: str
  policy_error: float
  hand_error: float | None
  policy_gradient: float
  hand_gradient: float | None


def identity(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """The initial value of a projection that changes nothing."""
  del key
  return jnp.eye(*shape, dtype=dtype)


class Linen(nn.Module):
  """A projection, then a layer."""

  layer: Callable[..., nn.Module]
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    project = nn.Dense(WIDTH, use_bias=False, kernel_init=identity, dtype=self.dtype)
    return self.layer(dtype=self.dtype, name="layer")(project(x))


class Nnx(nnx.Module):
  """The same in NNX."""

  def __init__(self, layer: Callable[..., nnx.Module], dtype: Any, seed: int) -> None:
    rngs = nnx.Rngs(seed)
    self.project = nnx.Linear(
      WIDTH, WIDTH, use_bias=False, kernel_init=identity, dtype=dtype, rngs=rngs
    )
    self.layer = layer(dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    layer: Any = self.layer
    return layer(self.project(x))


def function(fn: Callable[[jax.Array], jax.Array]) -> Runner:
  """Runs a function; by hand means 16-bit input."""

  def run(dtype: Any, policy: str, x: jax.Array, seed: int) -> jax.Array:
    del seed
    weights = jnp.eye(WIDTH, dtype=x.dtype)
    return jax.jit(mpjax.autocast(lambda w, x: fn(x @ w), policy))(
      weights if dtype is None else weights.astype(dtype), x if dtype is None else x.astype(dtype)
    )

  return run


def linen(layer: Callable[..., nn.Module]) -> Runner:
  """Runs a Linen layer."""

  def run(dtype: Any, policy: str, x: jax.Array, seed: int) -> jax.Array:
    model = mpjax.apply_policy(Linen(layer, dtype), policy)
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed + 1)}
    with jax.enable_x64(False):
      variables = jax.jit(Linen(layer).init)(rngs, jnp.zeros(x.shape, jnp.float32))
    apply = jax.jit(lambda v, x: model.apply(v, x, rngs=rngs, mutable=["batch_stats"])[0])
    return apply(variables, x)

  return run


def of_nnx(layer: Callable[..., nnx.Module]) -> Runner:
  """Runs an NNX layer."""

  def run(dtype: Any, policy: str, x: jax.Array, seed: int) -> jax.Array:
    with jax.enable_x64(False):
      model = mpjax.apply_policy(Nnx(layer, dtype, seed), policy)
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x))(state, x)

  return run


ATTEND: Callable[..., jax.Array] = jax.nn.dot_product_attention


def self_attention(x: jax.Array, attend: Callable[..., jax.Array] = ATTEND) -> jax.Array:
  """`jax.nn.dot_product_attention` of a sequence with itself."""
  heads = x.reshape(1, ROWS, 2, WIDTH // 2)
  return attend(heads, heads, heads)


def pictures(x: jax.Array) -> jax.Array:
  """Rows as pictures, over whose places an InstanceNorm averages."""
  return x.reshape(4, -1, WIDTH)


class Spectral(nn.Module):
  """A layer divided by its spectral norm."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    layer = nn.Dense(WIDTH, dtype=self.dtype)
    return nn.SpectralNorm(layer, dtype=self.dtype)(x, update_stats=False)


def linen_attention(rate: float) -> Callable[..., nn.Module]:
  """Linen's attention with a dropout rate."""

  def make(**options: Any) -> nn.Module:
    return nn.MultiHeadDotProductAttention(2, dropout_rate=rate, deterministic=False, **options)

  return make


def nnx_attention(rate: float) -> Callable[..., nnx.Module]:
  """NNX's attention with a dropout rate."""

  def make(**options: Any) -> nnx.Module:
    options |= {"deterministic": rate == 0.0, "decode": False, "dropout_rate": rate}
    return nnx.MultiHeadAttention(2, WIDTH, **options)

  return make


def around_linear(norm: Callable[..., nnx.Module], **own: Any) -> Callable[..., nnx.Module]:
  """A norm of a linear layer's weights."""

  def make(**options: Any) -> nnx.Module:
    return norm(nnx.Linear(WIDTH, WIDTH, **options), **options, **own)

  return make


def labels_loss(x: jax.Array) -> jax.Array:
  """The cross-entropy of every row with a label."""
  return optax.softmax_cross_entropy_with_integer_labels(x, jnp.arange(ROWS) % WIDTH)


CASES: dict[str, Case] = {
  "softmax": Case(function(jax.nn.softmax)),
  "log_softmax": Case(function(jax.nn.log_softmax)),
  "logsumexp": Case(function(lambda x: jax.nn.logsumexp(x, axis=-1))),
  "cross-entropy": Case(function(labels_loss)),
  "gelu": Case(function(jax.nn.gelu)),
  "gelu, exact": Case(function(lambda x: jax.nn.gelu(x, approximate=False))),
  "silu": Case(function(jax.nn.silu)),
  "softplus": Case(function(jax.nn.softplus)),
  "cumsum": Case(function(lambda x: jnp.cumsum(x, axis=0)), mean=1.0),
  "cumprod": Case(function(lambda x: jnp.cumprod(x, axis=-1)), mean=1.0, spread=0.1),
  "sum": Case(function(lambda x: jnp.sum(x, axis=0)), mean=1.0),
  "variance": Case(function(lambda x: jnp.var(x, axis=-1)), mean=8.0),
  "standardize": Case(function(lambda x: jax.nn.standardize(x)), mean=8.0),
  "norm of vectors": Case(function(lambda x: jnp.linalg.norm(x, axis=-1))),
  "segment_sum": Case(
    function(lambda x: jax.ops.segment_sum(x, jnp.arange(ROWS) // 32, 2)), mean=1.0
  ),
  "dot_product_attention": Case(function(self_attention), by_hand=("bfloat16",)),
  "dot_product_attention, cast_inputs": Case(
    function(functools.partial(self_attention, attend=mpjax.cast_inputs(ATTEND))),
    by_hand=("bfloat16",),
    policies=("mixed_bfloat16",),
  ),
  "Linen LayerNorm": Case(linen(nn.LayerNorm), mean=8.0),
  "Linen RMSNorm": Case(linen(nn.RMSNorm), mean=8.0),
  "Linen GroupNorm": Case(linen(lambda **o: nn.GroupNorm(4, **o)), mean=8.0),
  "Linen BatchNorm": Case(
    linen(lambda **o: nn.BatchNorm(use_running_average=False, **o)), mean=8.0
  ),
  "Linen InstanceNorm": Case(
    linen(lambda name, **o: nn.Sequential([pictures, nn.InstanceNorm(**o)], name=name)), mean=8.0
  ),
  "Linen SpectralNorm": Case(linen(Spectral)),
  "Linen WeightNorm": Case(
    linen(lambda name, **o: nn.WeightNorm(nn.Dense(WIDTH, **o), name=name, **o))
  ),
  "Linen attention": Case(linen(linen_attention(0.0))),
  "Linen attention, dropout": Case(linen(linen_attention(0.3)), repeatable=False),
  "NNX LayerNorm": Case(of_nnx(lambda **o: nnx.LayerNorm(WIDTH, **o)), mean=8.0),
  "NNX RMSNorm": Case(of_nnx(lambda **o: nnx.RMSNorm(WIDTH, **o)), mean=8.0),
  "NNX GroupNorm": Case(of_nnx(lambda **o: nnx.GroupNorm(WIDTH, 4, **o)), mean=8.0),
  "NNX BatchNorm": Case(of_nnx(lambda **o: nnx.BatchNorm(WIDTH, **o)), mean=8.0),
  "NNX InstanceNorm": Case(
    of_nnx(lambda **o: nnx.Sequential(pictures, nnx.InstanceNorm(WIDTH, **o))), mean=8.0
  ),
  "NNX WeightNorm": Case(of_nnx(around_linear(nnx.WeightNorm))),
  "NNX SpectralNorm": Case(of_nnx(around_linear(nnx.SpectralNorm, update_stats=False))),
  "NNX attention": Case(of_nnx(nnx_attention(0.0)), by_hand=("bfloat16",)),
  "NNX attention, dropout": Case(of_nnx(nnx_attention(0.3)), repeatable=False),
}


def both(
  case: Case, dtype: Any, policy: str, x: jax.Array, cotangent: np.ndarray, seed: int
) -> tuple[jax.Array, jax.Array]:
  """An operation's results, and the gradient of their product with a cotangent."""
  out, pullback = jax.vjp(lambda x: case.run(dtype, policy, x, seed), x)
  (gradient,) = pullback(
    jnp.asarray(cotangent.reshape(-1)[: out.size].reshape(out.shape), out.dtype)
  )
  return out, gradient


def distance(found: jax.Array, truth: np.ndarray) -> float:
  """The relative distance in the 2-norm."""
  return float(np.linalg.norm(np.asarray(found, np.float64) - truth) / np.linalg.norm(truth))


def measure(operation: str, policy: str, draws: int = DRAWS) -> Row:
  """Runs one operation under a policy, by hand and in float64."""
  case, dtype = CASES[operation], FORMATS[policy]
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    errors = np.asarray([errors_of(case, dtype, policy, seed) for seed in range(draws)])
  error, gradient, hand, hand_gradient = map(float, np.sqrt(np.mean(errors**2, axis=0)))
  if dtype.name not in case.by_hand:
    return Row(operation, dtype.name, error, None, gradient, None)
  return Row(operation, dtype.name, error, hand, gradient, hand_gradient)


def errors_of(case: Case, dtype: Any, policy: str, seed: int) -> tuple[float, ...]:
  """The errors of results and gradient under a policy, then by hand where that runs, or NaN."""
  rng = np.random.default_rng(seed)
  draw, cotangent = (
    rng.normal(case.mean, case.spread, (ROWS, WIDTH)),
    rng.normal(size=(ROWS, WIDTH)),
  )
  x = jnp.asarray(draw, dtype).astype(jnp.float32)
  cotangent = np.asarray(jnp.asarray(cotangent, dtype))
  runs = [both(case, None, policy, x, cotangent, seed)]
  if dtype.name in case.by_hand:
    runs.append(both(case, dtype, "float32", x, cotangent, seed))
  with jax.enable_x64(case.repeatable):
    wide = jnp.float64 if case.repeatable else jnp.float32
    truth = both(case, wide, "float32", jnp.asarray(np.asarray(x), wide), cotangent, seed)
  exact = [np.asarray(one, np.float64) for one in truth]
  found = [distance(*pair) for run in runs for pair in zip(run, exact, strict=True)]
  return (*found, np.nan, np.nan)[:4]


def shown(row: Row) -> report.Row:
  """A row with the ratios of its errors; nothing by hand where that does not run on a CPU."""
  return {
    **row._asdict(),
    "ratio": _ratio(row.policy_error, row.hand_error),
    "gradient_ratio": _ratio(row.policy_gradient, row.hand_gradient),
  }


def _ratio(error: float, hand: float | None) -> str | None:
  if hand is None:
    return None
  return "1.00" if error == hand else f"{error / hand:.2f}" if hand else "inf"


def main() -> None:
  """Prints the table and writes it into the results."""
  parser = argparse.ArgumentParser(description="Errors of sensitive operations against float64.")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  parser.add_argument("--operations", nargs="+", choices=list(CASES), default=list(CASES))
  arguments = parser.parse_args()
  cells = [(name, policy) for name, case in CASES.items() for policy in case.policies]
  new = [shown(measure(*cell)) for cell in cells if cell[0] in arguments.operations]
  key = ("operation", "format")
  found = report.merged(report.rows_in(arguments.out / "numerics.json"), new, key)
  order = [(name, FORMATS[policy].name) for name, policy in cells]
  rows = [found[cell] for cell in order if cell in found]
  table = report.table(rows, COLUMNS)
  print(table)
  report.write(
    "numerics",
    "Errors of sensitive operations against float64",
    "python -m benchmarks.own.numerics",
    "CPU",
    rows,
    table,
    arguments.out,
  )


if __name__ == "__main__":
  main()
