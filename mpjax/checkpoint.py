"""Restoring Orbax checkpoints without a silent cast.

Saving needs nothing of mpjax: a ``TrainState``, the state of a loss scaler and the pure state of
an NNX model and its optimizer are pytrees of arrays, and Orbax writes them as they are. On restore
Orbax casts every array to the dtype that it is asked for, without a word; `restore` refuses that.

It needs Orbax: ``pip install orbax-checkpoint``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from mpjax._core.arguments import shown
from mpjax._core.dtypes import describe, is_key

__all__ = ["restore"]

T = TypeVar("T")


def restore(manager: ocp.CheckpointManager, like: T, *, step: int | None = None) -> T:
  """Restores a checkpoint into arrays like those given, dtype, shape and sharding.

  Args:
    manager: The manager of the run's checkpoints, of one item, made with
      ``item_handlers=ocp.StandardCheckpointHandler()``, and saved by ``ocp.args.StandardSave``.
    like: What was saved, or its shapes (``jax.ShapeDtypeStruct`` with a ``sharding``). The
      shardings decide where the restored arrays are; they need not be those that were saved, nor
      the mesh the same.
    step: The step to restore; the latest by default.

  Returns:
    A pytree like ``like``, with the numbers of the checkpoint.

  Raises:
    TypeError: If ``manager`` is no manager but, say, its directory.
    FileNotFoundError: If there is no such checkpoint.
    ValueError: If an array of the checkpoint has another dtype or shape than in ``like``, or is
      in one of the two only; the message names it. Or the manager has no handler, or several items.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> handler = ocp.StandardCheckpointHandler()
    >>> with ocp.CheckpointManager(tempfile.mkdtemp(), item_handlers=handler) as manager:
    ...   _ = manager.save(0, args=ocp.args.StandardSave({"scale": jnp.float32(8)}))
    ...   manager.wait_until_finished()
    ...   restored = restore(manager, {"scale": jnp.float32(1)})
    >>> restored["scale"]
    Array(8., dtype=float32)
  """
  if not hasattr(manager, "latest_step"):
    raise TypeError(_no_manager(manager))
  step = manager.latest_step() if step is None else step
  if step is None or step not in manager.all_steps():
    raise FileNotFoundError(
      f"restore needs a checkpoint. Got {'none' if step is None else f'no step {step}'} in "
      f"{manager.directory}, which has steps {sorted(manager.all_steps())}. Ask "
      "manager.latest_step() first, and begin anew if it is None."
    )
  _check(_written(manager, step), like, f"{manager.directory}, step {step},")
  target = jax.tree.map(_target, like)
  restored: Any = manager.restore(step, args=ocp.args.StandardRestore(target))
  return restored


def _no_manager(given: Any) -> str:
  """What to write for what came in the place of a manager."""
  is_path = isinstance(given, str | os.PathLike)
  directory = shown(os.fspath(given)) if is_path else "directory"
  got = f"the path {directory}" if is_path else type(given).__name__
  return (
    f"restore takes the ocp.CheckpointManager of a run. Got {got}. Write restore(manager, like) "
    f"with manager = ocp.CheckpointManager({directory}, "
    "item_handlers=ocp.StandardCheckpointHandler())."
  )


def _written(manager: ocp.CheckpointManager, step: int) -> dict[str, str]:
  metadata = manager.item_metadata(step)
  if metadata is None:
    raise ValueError(
      "restore needs a manager that can read what its checkpoint holds. Got one without a handler. "
      "Make it with item_handlers=ocp.StandardCheckpointHandler()."
    )
  if isinstance(metadata, Mapping):
    raise ValueError(
      f"restore needs a manager of one item. Got one of {', '.join(sorted(metadata))}. Restore it "
      "with Orbax, manager.restore(step, args=ocp.args.Composite(...)), or keep the state in a "
      "manager of its own, made with item_handlers=ocp.StandardCheckpointHandler()."
    )
  return _described(metadata)


def _described(tree: Any) -> dict[str, str]:
  """What each leaf is, by the path that Orbax saves it under."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  return {path: describe(leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)}


def _check(written: dict[str, str], like: Any, where: str) -> None:
  wanted, given = _described(jax.tree.map(_as_saved, like)), _described(like)
  for path in sorted(written.keys() | wanted.keys()):
    if written.get(path) != wanted.get(path):
      raise ValueError(
        f"A checkpoint must hold the arrays that it is restored into. {where} has "
        f"{path}: {written.get(path, 'nothing')} for {given.get(path, 'nothing')}. Restore into "
        "arrays like those that were saved, and cast afterwards (mpjax.cast_floating)."
      )


def _as_saved(leaf: Any) -> Any:
  """Orbax saves a key as its integers, and a number as an array of 64 bits."""
  if is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf)
  return np.asarray(leaf) if isinstance(leaf, float | int) else leaf


def _target(leaf: Any) -> Any:
  is_done = isinstance(leaf, jax.ShapeDtypeStruct | float | int)
  return leaf if is_done else ocp.utils.to_shape_dtype_struct(leaf)
