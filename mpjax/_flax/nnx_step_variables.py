"""The Variables of an NNX model and its optimizer that a train step reads, writes and puts back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpjax._core.dtypes import FLOAT16, describe, is_key
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._scaling.finiteness import select
from mpjax._scaling.scaling_state import find_scaling_state
from mpjax._train.accumulation import check_flow
from mpjax._train.buffers import own_buffer, shared_buffers
from mpjax._train.shardings import Placement, keep_placement, place_beside, strays
from mpjax._train.step_core import StepCore
from mpjax._train.step_parts import keep_if_skipped


def arrays_of(nodes: Any) -> dict[Any, Any]:
  """The arrays of graph nodes by path: pure ones, for the Variables themselves change."""
  return dict(nnx.to_flat_state(nnx.as_pure(nnx.state(nodes))))


def give_own_buffers(nodes: Any, variables: dict[Any, Any], others: list[Any]) -> None:
  """Gives Variables that share an array, or share one with the batch, arrays of their own."""
  paths = list(variables)
  for n in shared_buffers([*variables.values()], others):
    variables[paths[n]] = own_buffer(variables[paths[n]])
    nnx.update(nodes, nnx.from_flat_state([(paths[n], variables[paths[n]])]))


def place_strays(nodes: Any, variables: dict[Any, Any]) -> bool:
  """Replicates Variables that lie on no mesh, put there by nobody, over that of the others.

  Returns:
    Whether there were any.
  """
  paths, arrays = list(variables), [*variables.values()]
  found = strays(arrays)
  placed = place_beside([arrays[n] for n in found], arrays) if found else []
  moved = {paths[n]: array for n, array in zip(found, placed, strict=True)}
  if moved:
    variables.update(moved)
    nnx.update(nodes, nnx.from_flat_state(moved.items()))
  return bool(moved)


def hold_placement(nodes: Any, paths: list[Any], where: Placement) -> None:
  """Holds the Variables that a step was given to the shardings that they had."""
  if not where.shardings:
    return
  now = arrays_of(nodes)
  kept = keep_placement([now[path] for path in paths], where.shardings)
  nnx.update(nodes, nnx.from_flat_state(zip(paths, kept, strict=True)))


def of_the_first(wrt: Any) -> Callable[[Any, Any], bool]:
  """A filter for the Variables that ``wrt`` selects in the first of several graph nodes."""
  selects = nnx.filterlib.to_predicate(wrt)
  return lambda path, variable: path[0] == 0 and selects(path[1:], variable)


def update_model(
  core: StepCore,
  nodes: tuple[Any, ...],
  optimizer: nnx.Optimizer,
  loss: jax.Array,
  grads: nnx.State,
  before: dict[Any, Any],
  loss_at: Any,
) -> None:
  """Updates model and optimizer; what the optimizer leaves alone stays the same array."""
  model = nodes[0]
  now, params = arrays_of(nodes), nnx.as_pure(nnx.state(model, optimizer.wrt))
  paths = [path for path in before if _has_form_of(now[path], before[path])]
  written = [[arrays[path] for path in paths] for arrays in (now, before)]
  args = (grads,) if isinstance(optimizer, nnx.ModelAndOptimizer) else (model, grads)
  core.update(optimizer.update, args, loss, grads, (written[0], written[1]), loss_at)
  if any(core.frozen):
    nnx.update(model, core.choose_frozen(params, nnx.as_pure(nnx.state(model, optimizer.wrt))))


def _has_form_of(value: Any, old: Any) -> bool:
  """Whether what a Variable holds has the structure and the shapes of what it held before."""
  same = jax.tree.structure(value) == jax.tree.structure(old)
  return same and jax.tree.map(jnp.shape, value) == jax.tree.map(jnp.shape, old)


def _by_name(variables: nnx.State) -> dict[str, Any]:
  """The arrays of a model by their paths in it, and those of nodes beside it as of the batch."""

  def name(path: str) -> str:
    node, _, inside = path.partition("/")
    return inside if node == "0" else f"batch/{path}"

  return {name(path): leaf for path, leaf in leaf_paths(variables)}


def check_wrt(parts: list[nnx.State], optimizer: nnx.Optimizer) -> None:
  """Refuses an optimizer that trains nothing of a model."""
  if jax.tree.leaves(parts[0]):
    return
  kinds = sorted({type(v).__name__ for _, v in nnx.to_flat_state(nnx.merge_state(*parts))})
  wrt = getattr(optimizer.wrt, "__name__", optimizer.wrt)
  raise ValueError(
    f"The optimizer's wrt must match a Variable of the model. Got wrt={wrt}, and a model of "
    f"{', '.join(kinds) or 'no Variable'}. Make the optimizer with a wrt that selects what it is "
    "to train."
  )


def check_trained(model: nnx.Module, optimizer: nnx.Optimizer, params: nnx.State) -> None:
  """Refuses a Variable that a loss adds and the optimizer would train: it has no gradient."""
  had = {path for path, _ in nnx.to_flat_state(params)}
  trained = nnx.to_flat_state(nnx.state(model, optimizer.wrt))
  added = [(path, variable) for path, variable in trained if path not in had]
  if added:
    path, variable = added[0]
    name = "/".join(map(str, path))
    raise ValueError(
      "What an optimizer trains must be in the model before the step. Got "
      f"{name!r}, of type {type(variable).__name__}, which the loss adds. Add it "
      "first and make the optimizer after it, or hold it in a Variable of another type."
    )


def sorted_into(parts: list[nnx.State], changed: nnx.State) -> tuple[list[nnx.State], nnx.State]:
  """Puts the Variables of a changed model into the parts that they came from; what is new is left.

  Raises:
    TypeError: If one has another dtype or shape now, or is gone.
  """
  now = dict(nnx.to_flat_state(changed))
  for part in parts:
    check_flow(_by_name(nnx.from_flat_state(now)), _by_name(part))
  sorted_parts = [
    nnx.map_state(lambda path, leaf: _with_value(leaf, _value(now.pop(path))), part)
    for part in parts
  ]
  return sorted_parts, nnx.from_flat_state(now)


def restore_if_skipped(
  applied: jax.Array,
  nodes: tuple[Any, ...],
  optimizer: nnx.Optimizer,
  old: dict[Any, Any],
  old_opt_state: PyTree,
  old_step: jax.Array,
) -> None:
  """Puts back what a skipped step wrote: all but the loss scaler, random streams and what is new.

  Random streams move on, or the step that follows would draw what made this one's NaN. New is a
  Variable that the loss adds, or makes larger, as one that it sows into in every step.
  """
  now = arrays_of(nodes)
  kept = [
    path for path, variable in nnx.to_flat_state(nnx.state(nodes)) if not _is_random(variable)
  ]
  kept = [path for path in kept if path in old and _has_form_of(now[path], old[path])]
  chosen = select(applied, [now[path] for path in kept], [old[path] for path in kept])
  nnx.update(nodes, nnx.from_flat_state(zip(kept, chosen, strict=True)))
  opt_state = keep_if_skipped(applied, nnx.as_pure(optimizer.opt_state), old_opt_state)
  nnx.update(optimizer.opt_state, nnx.state(opt_state))
  optimizer.step[...] = jnp.where(applied, optimizer.step[...], old_step)


def _is_random(variable: nnx.Variable) -> bool:
  return isinstance(variable, nnx.RngState) or is_key(_value(variable))


def _value(leaf: Any) -> Any:
  """The array of a leaf of a state: a Variable, or an array that is an attribute by itself."""
  return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
  return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def check_opt_state(optimizer: nnx.Optimizer, params: PyTree, opt_state: PyTree) -> None:
  """Refuses the state of an optimizer that cannot step these parameters.

  Adam on float16 moments gives NaN: its epsilon is zero there (optax#1754).

  Raises:
    ValueError: If it is float16, or the optimizer was made for another model.
  """
  _check_is_of_model(optimizer, params, opt_state)
  if find_scaling_state(opt_state) is not None:
    return
  for path, leaf in leaf_paths(opt_state):
    if getattr(leaf, "dtype", None) == FLOAT16:
      raise ValueError(
        "The optimizer's state must not be float16, where Adam's epsilon is zero. Got "
        f"{path}: {describe(leaf)}. Keep the parameters in float32, or wrap the optimizer: "
        "mpjax.static_loss_scaling(tx, 1) holds its state in float32."
      )


def _check_is_of_model(optimizer: nnx.Optimizer, params: PyTree, opt_state: PyTree) -> None:
  """Refuses the optimizer of another model.

  Raises:
    ValueError: If it would not make the state that it has, or that with more in it, as
      ``optax.monitor`` has after a step.
  """
  own = dict(leaf_paths(jax.eval_shape(optimizer.tx.init, params)))
  held = dict(leaf_paths(opt_state))
  for path, leaf in own.items():
    got = held.get(path)
    if got is None or jnp.shape(got) != leaf.shape:
      raise ValueError(
        "An optimizer steps the model that it was made for. Got one of another model, whose state "
        f"has {path}: {describe(got) if got is not None else 'nothing'} for {describe(leaf)}. "
        "Make it of this model: nnx.Optimizer(model, tx, wrt=nnx.Param)."
      )
