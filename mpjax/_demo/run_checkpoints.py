"""Checkpoints of `mpjax compare`: written by Orbax, checked before they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpjax._core.tree_paths import leaf_paths
from mpjax._demo.jobs import UsageError

_KEPT = 2


class Checkpoints:
  """The checkpoints of one training run: trees of arrays by step, and the run's settings.

  Args:
    directory: Where they are; made if it does not exist.
    settings: What decides the bits of the run, as JSON.

  Raises:
    UsageError: If there are checkpoints of other settings.
  """

  def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
    self._directory = directory
    self._settings = settings
    # Synchronous: what has been saved is on disk before the next step is taken.
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "settings": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(
      directory.resolve(), options=options, item_handlers=handlers
    )
    try:
      self._check_settings(self._manager.latest_step())
    except UsageError:
      self._manager.close()
      raise

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
  ) -> None:
    self._manager.close()

  def save(self, step: int, tree: Any) -> None:
    """Writes the tree of a step, unless that step is there already.

    Raises:
      UsageError: If it cannot be written.
    """
    if self._manager.latest_step() == step:
      return
    items = ocp.args.Composite(
      arrays=ocp.args.StandardSave(_by_name(tree)), settings=ocp.args.JsonSave(self._settings)
    )
    try:
      self._manager.save(step, args=items)
    except (OSError, ValueError) as error:  # of a full disk TensorStore raises the latter
      raise UsageError(
        f"--checkpoint needs a directory with room. Step {step} of {self._directory}: "
        f"{_first_line(error)}. Make room and go on with --resume, or name another directory."
      ) from error

  def restore(self, like: Any) -> Any:
    """The tree of the last step that was written.

    Args:
      like: A tree of the structure, shapes and dtypes that it must have.

    Returns:
      The tree, or ``None`` if none was written.

    Raises:
      UsageError: If its arrays are others.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    with self._readable(step):
      written = _shapes(self._manager.item_metadata(step)["arrays"])
    self._check_arrays(written, like)
    target = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in _by_name(like).items()}
    items = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
    with self._readable(step):
      arrays = self._manager.restore(step, args=items)["arrays"]
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in target])

  def _check_settings(self, step: int | None) -> None:
    if step is None:
      return
    items = ocp.args.Composite(settings=ocp.args.JsonRestore())
    with self._readable(step):
      written = self._manager.restore(step, args=items)["settings"]
    for key, now in self._settings.items():
      if written.get(key) != now:
        raise UsageError(
          f"--resume needs the settings that the checkpoint was written with. {self._directory} "
          f"has {key} {written.get(key)}, this run {now}. Give the former, or another directory."
        )

  @contextlib.contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    """Reports what Orbax raises of files that are damaged, cut off or no checkpoint."""
    try:
      yield
    except Exception as error:  # of an array that is cut off it raises no narrower one
      raise UsageError(
        f"--resume needs checkpoints that can be read. Step {step} of {self._directory}: "
        f"{_first_line(error)}. Delete that step, or name another directory."
      ) from error

  def _check_arrays(self, written: dict[str, str], like: Any) -> None:
    """Orbax casts silently to the dtype that it is asked for; a mismatch is refused here."""
    wanted = _shapes(_by_name(like))
    for name in sorted(written.keys() | wanted.keys()):
      if written.get(name) != wanted.get(name):
        raise UsageError(
          f"--resume needs a checkpoint of the same arrays. {self._directory} has {name} as "
          f"{written.get(name, 'nothing')}, this run as {wanted.get(name, 'nothing')}. "
          "Name another directory."
        )


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)


def _by_name(tree: Any) -> dict[str, Any]:
  return {path.replace("/", "."): leaf for path, leaf in leaf_paths(tree)}


def _shapes(arrays: dict[str, Any]) -> dict[str, str]:
  return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}
