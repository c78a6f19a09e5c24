"""The test that a step does the same whatever the loss scale is.

A scaler and the loop around it work as a pair: the loop scales the loss, the scaler unscales the
gradients. Where one of the two is missing, or something stands between them, the update depends on
the scale, and nothing else shows it: losses are finite, and Adam trains, if less well. In a right
loop the scale, a power of two, cancels exactly.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpjax._core.arguments import power_of_two
from mpjax._core.dtypes import FLOAT32, is_of
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._flax.nnx_calls import is_node
from mpjax._scaling.scaling_state import misplaced_scaler
from mpjax._scaling.states import LossScalingState

SCALES = (2.0**4, 2.0**8, 2.0**12)
_TINY = (2.0**-20, 2.0**-16)
"""Gradients of a loss that is not scaled are divided by these, factors that no rounding hides."""
_HUGE = 2.0**120
"""Gradients overflow here, or are still the same."""


def assert_scale_invariant(
  step: Callable[..., Any], *args: Any, scales: Sequence[float] = SCALES, rtol: float = 0.02
) -> None:
  """Asserts that a training step does the same whatever the loss scale is.

  For a loop of your own: it runs ``step`` on copies of its arguments, with another scale in the
  state of their loss scaler each time, and compares what the step changes, leaf by leaf,
  parameters and the optimizer's state, the scaler's counters excepted. A scale at which the step
  is skipped, for its float16 gradients overflow there, does not count. At one where they overflow
  for sure it must be skipped.

  Args:
    step: ``step(*args)``: returns the new state, or a tuple with it (parameters and optimizer
      state, a ``TrainState``, with whatever else); or changes NNX models and optimizers among its
      arguments in place. It may be compiled and may donate.
    *args: Its arguments, with the state of an optimizer that holds a loss scaler. They stay as
      they are.
    scales: Powers of two.
    rtol: How much a change may differ, relative to the largest of its leaf. In float32 and
      bfloat16 all are equal bit for bit, in float16 all but the smallest.

  Raises:
    AssertionError: If a change depends on the scale; the message says what of the step does, by
      how much, and what is wrong: gradients of a loss that is not scaled or that are unscaled
      twice, a clip in front of the scaler, a scaler that some parameters do not have, gradients
      whose inf and NaN are replaced before the scaler sees them.
    ValueError: If ``args`` hold no loss scaler, the step is skipped at all scales but one, changes
      nothing or gives other results for the same arguments, or a scale is no power of two.
    TypeError: If the step neither returns a tree like one of its arguments, nor has an NNX object
      among them.

  Example:
    >>> import mpjax, optax
    >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"] - 1) ** 2)
    >>> def step(params, opt_state, x):
    ...   loss, grads = jax.value_and_grad(loss_fn)(params, x)
    ...   updates, opt_state = tx.update(grads, opt_state, params)
    ...   return optax.apply_updates(params, updates), opt_state, loss
    >>> params = {"w": jnp.ones(2)}
    >>> try:
    ...   assert_scale_invariant(step, params, tx.init(params), jnp.ones((4, 2)))
    ... except AssertionError as error:
    ...   print(str(error)[:65])
    The update must not depend on the loss scale. Got gradients that
  """
  powers = sorted({power_of_two("scales", scale) for scale in scales})
  for tree in _states(args):
    if message := misplaced_scaler(tree):
      raise AssertionError(message)
  first, second, *runs = [_run(step, args, scale) for scale in (*_TINY, *powers)]
  tiny = first, second
  applied = [run for run in runs if run.applied]
  if len(applied) < 2:
    raise ValueError(
      "The step must be applied at two scales at least, to compare them. Got one that is applied "
      f"at {len(applied)} of {', '.join(f'{scale:g}' for scale in powers)}. Pass smaller or more "
      "scales, or a batch whose gradients are finite."
    )
  if not any(change.size for run in applied for change in run.changes.values()):
    raise ValueError(
      "The step must change something, or it is the same at every scale. Got one that leaves all "
      f"{len(applied[0].changes)} leaves of parameters and optimizer as they are. Pass a batch "
      "that has a gradient, and have the step return what it computes."
    )
  differing = _differing(tiny, applied, rtol)
  if not differing:
    _check_overflow(step, args, applied[0], rtol)
    return
  again = _run(step, args, applied[0].scale)
  if _differing(None, [applied[0], again], rtol):
    raise ValueError(
      "The step must give the same results for the same arguments. Got others when it ran a "
      "second time. Pass its random key, and what else it keeps, as arguments."
    )
  raise AssertionError(_message(differing, tiny, applied))


class _Change(NamedTuple):
  """What a step made of one leaf, and how much of that may be rounding, in float64."""

  difference: np.ndarray
  rounding: np.ndarray

  @property
  def size(self) -> float:
    return float(np.max(np.abs(self.difference), initial=0.0))


class _Run(NamedTuple):
  """A step at one scale."""

  scale: float
  applied: bool
  changes: dict[str, _Change]


def _check_overflow(
  step: Callable[..., Any], args: tuple[Any, ...], right: _Run, rtol: float
) -> None:
  """Refuses a step that is applied where its gradients overflow, and changes something else."""
  try:
    huge = _run(step, args, _HUGE)
  except Exception:
    return  # it may raise rather than skip: it has noticed
  hidden = _differing(None, [right, huge], rtol) if huge.applied else []
  if hidden:
    raise AssertionError(
      "A step whose gradients are inf or NaN must be skipped, and the scale must fall. Got one "
      f"that is applied at a scale of 2**120, where leaf {hidden[0]} changes by "
      f"{huge.changes[hidden[0]].size:.3g} for {right.changes[hidden[0]].size:.3g}. Pass the "
      "scaler the gradients of mpjax.value_and_grad as they are, without nan_to_num in front."
    )


# Running a step at a scale ------------------------------------------------------------------------


def _run(step: Callable[..., Any], args: tuple[Any, ...], scale: float) -> _Run:
  given = _with_scale(_copied(args), scale)
  nodes = _nodes(given)
  before = _floats_of_nodes(nodes)
  out = step(*given)
  changes = _changes(before, _floats_of_nodes(nodes))
  scalers = [state for _, state in _scalers_of_nodes(nodes)]
  # The step may have donated what it was given; the arguments themselves are as they were.
  for name, old, new in _pairs([x for x in args if not _nodes(x)], out):
    scalers += _scalers(new)
    changes |= _changes(_floats(old, name), _floats(new, name))
  if not changes or not scalers:
    raise TypeError(
      "The step must return its new state, parameters and optimizer state of the structure that "
      "they have among its arguments, or change NNX objects among these in place. Got a "
      f"{type(out).__name__} {'without the state of a loss scaler' if changes else 'like none'}. "
      "Return them."
    )
  return _Run(scale, all(bool(_array(state.last_finite)) for state in scalers), changes)


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
  """Copies of arrays and, with what they share, of NNX objects."""
  leaves, structure = jax.tree.flatten(args, is_leaf=is_node)
  graphdef, state = nnx.split([leaf for leaf in leaves if is_node(leaf)])
  nodes = iter(nnx.merge(graphdef, jax.tree.map(_copy, state)))
  return structure.unflatten([next(nodes) if is_node(x) else _copy(x) for x in leaves])


def _copy(leaf: Any) -> Any:
  return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf


def _with_scale(args: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
  """Sets the scale of every loss scaler; those of NNX objects in place."""
  found = _scalers_of_nodes(_nodes(args))
  for _, state in found:
    jax.tree.leaves(state.scale, is_leaf=is_node)[0][...] = jnp.full((), scale, FLOAT32)
  if not found and not _scalers(args):
    raise ValueError(
      "The arguments of the step must hold the state of a loss scaler. Got none. Wrap the "
      "optimizer: mpjax.dynamic_loss_scaling(tx), and pass the state of that."
    )

  def at_scale(x: Any) -> Any:
    return x._replace(scale=jnp.full((), scale, FLOAT32)) if _is_scaler(x) else x

  return jax.tree.map(at_scale, args, is_leaf=lambda x: _is_scaler(x) or is_node(x))


def _pairs(args: list[Any], out: Any) -> Iterator[tuple[str, Any, Any]]:
  """The results of a step with the arguments whose place they take, and names for them."""
  left = [(x, _signature(x)) for x in args]
  parts = list(out) if isinstance(out, tuple | list) else [out]
  if any(_signature(out) == signature for _, signature in left):
    parts = [out]
  for n, part in enumerate(parts):
    found = [k for k, (_, signature) in enumerate(left) if signature == _signature(part)]
    if found and jax.tree.leaves(part):
      yield "" if part is out else str(n), left.pop(found[0])[0], part


def _signature(tree: PyTree) -> tuple[Any, list[Any]]:
  leaves, structure = jax.tree.flatten(tree)
  # A step count may start as a Python integer, as in Flax's TrainState.
  return structure, [(np.shape(x), x.dtype if is_of(x, jnp.inexact) else None) for x in leaves]


# What is in a state -------------------------------------------------------------------------------


def _is_scaler(x: Any) -> bool:
  return isinstance(x, LossScalingState)


def _scalers(tree: PyTree) -> list[LossScalingState]:
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: _is_scaler(x) or is_node(x))
  return [leaf for leaf in leaves if _is_scaler(leaf)]


def _scalers_of_nodes(nodes: list[Any]) -> list[tuple[tuple[Any, ...], Any]]:
  return [(tuple(path), x) for path, x in nnx.iter_graph(nodes) if _is_scaler(x)]


def _nodes(tree: PyTree) -> list[Any]:
  return [x for x in jax.tree.leaves(tree, is_leaf=is_node) if is_node(x)]


def _states(args: tuple[Any, ...]) -> list[Any]:
  """Where optimizers' states are: the arguments, and what NNX optimizers hold."""
  optimizers = [x for _, x in nnx.iter_graph(_nodes(args)) if isinstance(x, nnx.Optimizer)]
  return [
    *(x for x in args if not _nodes(x)),
    *(nnx.as_pure(optimizer.opt_state) for optimizer in optimizers),
  ]


def _array(x: Any) -> Any:
  return jax.tree.leaves(x)[0]


def _floats(tree: PyTree, name: str) -> dict[str, np.ndarray]:
  """The numbers of a tree by path, without a scaler's own."""
  pure = jax.tree.map(lambda x: x.inner_state if _is_scaler(x) else x, tree, is_leaf=_is_scaler)
  named = {f"{name}/{path}".strip("/"): leaf for path, leaf in leaf_paths(pure)}
  return {path: np.array(leaf) for path, leaf in named.items() if is_of(leaf, jnp.inexact)}


def _floats_of_nodes(nodes: list[Any]) -> dict[str, np.ndarray]:
  own = {(*path, "scale") for path, _ in _scalers_of_nodes(nodes)}
  flat = nnx.to_flat_state(nnx.as_pure(nnx.state(nodes)))
  return {
    "/".join(map(str, path)): np.array(leaf)
    for path, leaf in flat
    if is_of(leaf, jnp.inexact) and tuple(path) not in own
  }


# Comparing ----------------------------------------------------------------------------------------


def _changes(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, _Change]:
  return {path: _change(old, after[path]) for path, old in before.items() if path in after}


def _change(old: np.ndarray, new: np.ndarray) -> _Change:
  unit = float(jnp.finfo(old.dtype).eps)
  wide = np.complex128 if jnp.issubdtype(old.dtype, jnp.complexfloating) else np.float64
  a, b = old.astype(wide), new.astype(wide)
  with np.errstate(invalid="ignore"):  # an infinity that stays one
    difference = np.where(a == b, 0.0, b - a)
  return _Change(difference, unit * np.maximum(np.abs(a), np.abs(b)))


def _differing(tiny: tuple[_Run, _Run] | None, runs: list[_Run], rtol: float) -> list[str]:
  """The paths whose changes are not the same in all runs, or go as the inverse of tiny scales."""
  return [
    path
    for path, change in runs[0].changes.items()
    if any(not _same(change, run.changes[path], rtol) for run in runs[1:])
    or (tiny is not None and _is_inverse(*tiny, path) and _far_larger(tiny[1], runs[0], path))
  ]


def _same(a: _Change, b: _Change, rtol: float) -> bool:
  allowed = rtol * max(a.size, b.size) + np.maximum(a.rounding, b.rounding)
  return bool(np.all(np.abs(a.difference - b.difference) <= allowed))


def _far_larger(tiny: _Run, run: _Run, path: str) -> bool:
  """Whether a change is larger by more than float16 gradients are wrong that vanish in part."""
  change = run.changes[path]
  rounding = float(np.max(change.rounding, initial=0.0))
  return tiny.changes[path].size > 64 * (change.size + rounding)


def _message(paths: list[str], tiny: tuple[_Run, _Run], runs: list[_Run]) -> str:
  what, instead = _cause(paths, tiny, runs)
  path = max(paths, key=lambda path: _spread(runs, path))
  shown = ", ".join(
    f"{run.changes[path].size:.3g} at 2**{round(math.log2(run.scale))}"
    for run in (tiny[1], *runs)
    if run.applied
  )
  return (
    f"The update must not depend on the loss scale. Got {what}: leaf {path} changes by {shown}; "
    f"{len(paths)} of {len(runs[0].changes)} leaves depend on it. {instead}."
  )


def _cause(paths: list[str], tiny: tuple[_Run, _Run], runs: list[_Run]) -> tuple[str, str]:
  """What makes these leaves depend on the scale, and what to do about it."""
  first, last = runs[0], runs[-1]
  # By more than a little: of gradients divided to nothing, the decay of old moments is left.
  least = math.sqrt(last.scale / first.scale)
  rising = [p for p in paths if last.changes[p].size > least * first.changes[p].size]
  if rising:
    return (
      f"gradients that reach an optimizer scaled ({', '.join(rising[:3])}), as where a scaler is "
      "in one branch only, or where the loss is scaled twice",
      "Put the scaler around the whole optimizer, mpjax.dynamic_loss_scaling(optax.partition(...))"
      ", and scale the loss once, by mpjax.value_and_grad",
    )
  if any(_is_inverse(*tiny, path) for path in paths):
    return (
      "gradients that are not scaled, or unscaled before the optimizer unscales them",
      "Take them from mpjax.value_and_grad(loss_fn)(..., loss_scale=mpjax.loss_scale(opt_state)) "
      "and pass them to the optimizer as they are",
    )
  return (
    "something in front of the scaler that sees scaled gradients, such as a clip, or gradients "
    "that are not scaled and clipped after",
    "Move what is in front into the scaler, mpjax.dynamic_loss_scaling(optax.chain(clip, tx)), and "
    "pass it the gradients of mpjax.value_and_grad as they are",
  )


def _is_inverse(smaller: _Run, larger: _Run, path: str) -> bool:
  """Whether a change goes as the inverse of the scale, or of its square, down to tiny ones.

  Nearly so: at tiny scales float16 gradients have few bits left. What is clipped does not change.
  """
  a, b = smaller.changes[path].size, larger.changes[path].size
  if not (smaller.applied and larger.applied and a and b):
    return False
  power = math.log(a / b, larger.scale / smaller.scale)
  return min(abs(power - 1), abs(power - 2)) < 0.15


def _spread(runs: list[_Run], path: str) -> float:
  sizes = [run.changes[path].size for run in runs]
  return max(sizes) / max(min(sizes), 1e-300)
