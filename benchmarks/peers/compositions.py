"""What a wrong composition does in each tool, as run: an error, a warning or silence.

    python -m benchmarks.peers.compositions

Every case trains one weight by one step or a few, wrongly put together in the way that the tool
makes easy, and says what came of it. Keras is run where it is installed, on its JAX backend.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale

import mpjax
from benchmarks import report

os.environ.setdefault("KERAS_BACKEND", "jax")

Case = Callable[[], str]
W = {"w": jnp.full((4, 1), 0.5)}
X = jnp.ones((8, 4))
SMALL = 1e-8
"""What the loss is multiplied by where float16 gradients are to vanish."""


def loss_fn(params: Any, x: Any) -> jax.Array:
  return jnp.mean((x @ params["w"] - 1.0) ** 2)


def small_loss(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
  """A loss whose gradients are below float16's smallest number at the results of a model."""
  return lambda params, x: jnp.sum(apply(params, x).astype(jnp.float32)) * SMALL


def _moved(before: Any, after: Any) -> float:
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  return float(max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs))


def _is_nan(tree: Any) -> bool:
  return any(np.isnan(np.asarray(leaf)).any() for leaf in jax.tree.leaves(tree))


# A clip that sees scaled gradients ----------------------------------------------------------------


def clip_mpjax() -> str:
  tx = optax.chain(optax.clip_by_global_norm(1.0), mpjax.dynamic_loss_scaling(optax.sgd(0.1)))
  mpjax.TrainState.create(W, tx)
  return "silent"


def clip_keras() -> str:
  keras = importlib.import_module("keras")
  keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), clipnorm=1.0)
  return "silent"


# Gradients of a loss that nobody scaled -----------------------------------------------------------


def unscaled_mpjax() -> str:
  mpjax.value_and_grad(loss_fn)(W, X)
  return "silent"


def unscaled_own_loop() -> str:
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))

  def step(params: Any, state: Any, x: Any) -> Any:
    updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
    return optax.apply_updates(params, updates), state

  mpjax.testing.assert_scale_invariant(step, W, tx.init(W), X)
  return "silent"


def unscaled_keras() -> str:
  keras = importlib.import_module("keras")
  optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
  weight = keras.Variable(np.asarray(W["w"]))
  optimizer.build([weight])
  held, grads = [v.value for v in optimizer.variables], jax.grad(loss_fn)(W, X)
  (after,), _ = optimizer.stateless_apply(held, [grads["w"]], [W["w"]])
  share = _moved(W["w"], after) / (0.1 * float(jnp.abs(grads["w"]).max()))
  return f"silent: the update is 2^{np.log2(share):.0f} of what it should be"


# float16, and nothing scales ----------------------------------------------------------------------


def float16_mpjax() -> str:
  tx = optax.sgd(0.1)
  model = mpjax.apply_policy(Halves(None), "mixed_float16")
  loss = small_loss(lambda params, x: model.apply({"params": params}, x))
  params = model.init(jax.random.key(0), X)["params"]
  mpjax.make_train_step(loss, tx)(mpjax.TrainState.create(params, tx), X)
  return "silent"


class Halves(nn.Module):
  """Two layers of a format that their author chose."""

  dtype: Any = jnp.float16

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(2, dtype=self.dtype)(nn.Dense(4, dtype=self.dtype)(x))


def float16_flax() -> str:
  model = Halves()
  params = model.init(jax.random.key(0), X)["params"]
  loss = small_loss(lambda params, x: model.apply({"params": params}, x))
  largest = _moved(jax.tree.map(jnp.zeros_like, params), jax.grad(loss)(params, X))
  return f"silent: the largest gradient is {largest:g}"


# What is not finite -------------------------------------------------------------------------------


def nan_flax() -> str:
  """The skip is the caller's, by a flag; here he forgot it."""
  scaler, params = DynamicScale(), W
  _, finite, _, grads = scaler.value_and_grad(loss_fn)(params, X * jnp.nan)
  after = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))
  return (
    f"silent: is_finite is {bool(finite)}, parameters are {'NaN' if _is_nan(after) else 'kept'}"
  )


def nan_optax() -> str:
  tx = optax.apply_if_finite(optax.sgd(0.1), 3)
  params, state = W, tx.init(W)
  for _ in range(4):
    updates, state = tx.update(jax.grad(loss_fn)(params, X * jnp.nan), state, params)
    params = optax.apply_updates(params, updates)
  return f"silent: after 4 steps of NaN parameters are {'NaN' if _is_nan(params) else 'kept'}"


def nan_mpjax() -> str:
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  step, state = mpjax.make_train_step(loss_fn, tx), mpjax.TrainState.create(W, tx)
  for _ in range(300):
    state, _ = step(state, X * jnp.nan)
  kept = "NaN" if _is_nan(state.params) else "kept"
  return f"after 300 steps of NaN parameters are {kept}, the scale is {state.opt_state.scale:g}"


# Accumulation around the skip ---------------------------------------------------------------------


def accumulated_optax() -> str:
  tx = optax.MultiSteps(optax.apply_if_finite(optax.sgd(0.1), 100), 2)
  params, state = W, tx.init(W)
  for n in range(8):
    x = X * (jnp.nan if n == 0 else 1.0)
    updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
    params = optax.apply_updates(params, updates)
  still = "NaN" if _is_nan(state.acc_grads) else "finite"
  return (
    f"silent: one NaN, and 6 batches later the accumulator is {still}; "
    f"the weight moved by {_moved(W, params):g}"
  )


def accumulated_mpjax() -> str:
  tx = optax.MultiSteps(mpjax.dynamic_loss_scaling(optax.sgd(0.1)), 2)
  mpjax.TrainState.create(W, tx.gradient_transformation())
  return "silent"


# A scaler for some of the parameters --------------------------------------------------------------


def branch_mpjax() -> str:
  branches: dict[Any, Any] = {"a": mpjax.dynamic_loss_scaling(optax.sgd(0.1)), "b": optax.sgd(0.1)}
  params = {"w": W["w"], "v": W["w"]}
  mpjax.TrainState.create(params, optax.partition(branches, {"w": "a", "v": "b"}))
  return "silent"


CASES: dict[str, dict[str, Case]] = {
  "a clip in front of the scaler": {"Keras": clip_keras, "mpjax": clip_mpjax},
  "gradients of a loss that was not scaled": {
    "Keras": unscaled_keras,
    "mpjax": unscaled_mpjax,
    "mpjax, jax.grad and assert_scale_invariant": unscaled_own_loop,
  },
  "float16, and nothing scales": {"Flax": float16_flax, "mpjax": float16_mpjax},
  "steps of NaN": {"Flax": nan_flax, "optax": nan_optax, "mpjax": nan_mpjax},
  "accumulation around the skip": {"optax": accumulated_optax, "mpjax": accumulated_mpjax},
  "a scaler in one branch": {"mpjax": branch_mpjax},
}


def observe(case: Case) -> str:
  """What a case did: the error it raised, the warning it gave, or what it says itself."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
      text = case()
    except (ValueError, TypeError, AssertionError) as error:
      return f"{type(error).__name__}: {_short(error)}"
  ours = [w for w in caught if issubclass(w.category, mpjax.training.LowPrecisionWarning)]
  return f"{ours[0].category.__name__}: {_short(ours[0].message)}" if ours else text


def _short(message: object) -> str:
  """The first two sentences: what must hold and what came."""
  return ". ".join(" ".join(str(message).split()).split(". ")[:2])


def rows() -> list[report.Row]:
  """Every case of every tool that is installed."""
  has_keras = importlib.util.find_spec("keras") is not None
  return [
    {"composition": composition, "tool": tool, "observed": observe(case)}
    for composition, cases in CASES.items()
    for tool, case in cases.items()
    if tool != "Keras" or has_keras
  ]


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints the table and writes it into the results."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  options = parser.parse_args(arguments)
  found = rows()
  titles = {"composition": "composition", "tool": "tool", "observed": "what happens"}
  text = report.table(found, titles)
  print(text)
  title = "What a wrong composition does"
  report.write(
    "compositions",
    title,
    "python -m benchmarks.peers.compositions",
    "CPU",
    found,
    text,
    options.out,
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
