"""What a train state is created from: parameters and a key, or an error that says what to pass."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from mpjax._core.arguments import shown
from mpjax._core.dtypes import describe, is_key, is_of
from mpjax._core.tree_paths import PyTree, path_str


def check_params(params: PyTree) -> None:
  """Refuses what is no pytree of arrays.

  Raises:
    TypeError: If so; the message names what came, or the path of the leaf that is no array.
  """
  if isinstance(params, optax.GradientTransformation | optax.MultiSteps):
    raise TypeError(
      "A state is created from parameters and an optimizer, in this order. Got the optimizer "
      "first. Write TrainState.create(params, tx)."
    )
  if isinstance(params, nn.Module):
    raise TypeError(
      "A state is created from a module's parameters. Got the Linen module "
      f"{type(params).__name__}. Pass module.init(key, x)['params']."
    )
  if params is None:
    raise TypeError(
      "A state is created from parameters. Got None. Pass a pytree of arrays, such as "
      "module.init(key, x)['params']."
    )
  leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_of_nnx)
  for path, leaf in leaves:
    if isinstance(leaf, nnx.Module | _KEPT):
      raise TypeError(
        "A state is created from a pytree of parameters, each of which is trained. Got the NNX "
        f"{type(leaf).__name__}{_at(path)}. Use mpjax.nnx.make_train_step with nnx.Optimizer."
      )
    if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number | nnx.Variable)):
      raise TypeError(
        f"Parameters must be arrays. Got {shown(leaf)} of type {type(leaf).__name__}{_at(path)}. "
        "Take it out of them."
      )


def refuse_shapes(tree: PyTree) -> None:
  """Refuses shapes where arrays must be.

  Raises:
    TypeError: If there is a ``jax.ShapeDtypeStruct``; the message says how to get a state of these.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise TypeError(
        f"A state is created from arrays. Got the shape {describe(leaf)}{_at(path)}. For a state "
        "of shapes write jax.eval_shape(lambda params: TrainState.create(params, tx), params)."
      )


_KEPT = nnx.BatchStat | nnx.Cache | nnx.Intermediate | nnx.RngState
"""Variables that no optimizer moves: a state of a whole model holds them."""


def _is_of_nnx(x: Any) -> bool:
  return isinstance(x, nnx.Module | nnx.Variable)


def _at(path: Any) -> str:
  return f" at {path_str(path)}" if path else ""


def check_key(rng: Any) -> None:
  """Refuses what is not one key, typed or raw; ``None`` passes.

  Raises:
    TypeError: If so.
  """
  if rng is None or (isinstance(rng, jax.Array) and is_key(rng) and rng.shape == ()):
    return
  is_array = isinstance(rng, jax.Array | np.ndarray)
  if is_array and is_of(rng, jnp.uint32) and len(rng.shape) == 1:
    return
  got = describe(rng) if is_array else shown(rng) if isinstance(rng, int) else type(rng).__name__
  raise TypeError(f"rng must be one key. Got {got}. Pass for example jax.random.key(0).")
