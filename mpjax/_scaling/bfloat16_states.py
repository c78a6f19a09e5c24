"""The moments of any optimizer in bfloat16, rounded stochastically, by an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import tree_util

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import BFLOAT16, FLOAT32, is_castable
from mpjax._core.tree_paths import PyTree, path_str
from mpjax._scaling.master_weights import MasterWeightsState
from mpjax._scaling.optimizers import as_transformation, initial_state
from mpjax._scaling.rounding import (
  first_key,
  rounded_stochastically,
  seen_parameters,
  step_key,
)
from mpjax._scaling.stochastic_rounding import was_applied

# States with sums beside the state of what they wrap; the sums stay float32.
_WRAPPED = {MasterWeightsState: "inner_state", optax.MultiStepsState: "inner_opt_state"}

Test = Callable[[tree_util.KeyPath, Any], bool]


class BFloat16StatesState(NamedTuple):
  """The state of `bfloat16_states`.

  Attributes:
    key: u32[2], the key that every step's bits are drawn from. It never changes.
    step: i32[], the number of updates; a skipped one does not count.
    inner_state: The state of the wrapped transformation, its moments in bfloat16.
  """

  key: jax.Array
  step: jax.Array
  inner_state: PyTree


def bfloat16_states(
  inner: optax.GradientTransformation,
  *,
  seed: int = 0,
  which: Callable[[str, jax.Array], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that its moments are held in bfloat16, rounded stochastically.

  ``inner`` computes as ever: it gets its state in float32 and hands it back in float32, which is
  then rounded up or down at random, such that it is right on average (Ozkara et al., 2025,
  arXiv:2502.20566). Rounded to the nearest, a second moment with a decay of 0.999 could never
  fall: the thousandth part that it should lose is below half the distance to the next number.

  Held in bfloat16 is every float32 leaf of the state that has a parameter's shape and stands where
  that does in a tree of all of them (``mu/dense/kernel`` for ``dense/kernel``): moments, averages,
  the second iterate of schedule-free optimizers. Counts, scales, schedules and factored moments
  stay as they are. ``which`` chooses otherwise. In either case the masters of
  `mpjax.master_weights` and the gradients that ``optax.MultiSteps`` adds up stay float32.

  The random bits are those of `mpjax.stochastic_rounding`, by the path of a leaf in the state. It
  goes around a loss scaler or inside of it, and inside of `mpjax.stochastic_rounding` and
  `mpjax.master_weights`. A skipped step changes no bit.

  Args:
    inner: The optimizer.
    seed: Of the random bits.
    which: Called with the path of a float32 leaf in the state of ``inner``, such as
      ``0/nu/dense/kernel``, and the leaf; returns whether to hold it in bfloat16.

  Returns:
    A transformation whose state is a raw key, the number of updates (a step that a loss scaler
    skips does not count), and the state of ``inner``.

  Raises:
    TypeError: If ``inner`` is no optax transformation, or the seed no integer.

  Example:
    >>> tx = bfloat16_states(optax.adam(1e-3))
    >>> state = tx.init({"w": jnp.ones(4)})
    >>> adam = state.inner_state[0]
    >>> adam.mu["w"].dtype, adam.nu["w"].dtype, adam.count.dtype
    (dtype(bfloat16), dtype(bfloat16), dtype('int32'))
  """
  inner, start = as_transformation(inner), first_key(seed)

  def init(params: optax.Params) -> BFloat16StatesState:
    held = _as_test(which) if which else _of_parameters(params)
    state = _narrowed(initial_state(inner, params), held, ())
    return BFloat16StatesState(jnp.copy(start), jnp.zeros((), jnp.int32), state)

  def update(
    updates: optax.Updates,
    state: PyTree,  # a BFloat16StatesState; optax types every state alike
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, BFloat16StatesState]:
    before = state.inner_state
    steps, after = inner.update(
      cast_floating(updates, FLOAT32),
      jax.tree.map(_widened, before),
      seen_parameters(before, params),
      **extra_args,
    )
    rounded = tree_util.tree_map_with_path(
      _rounding(step_key(state.key, state.step)), before, after
    )
    step = state.step + was_applied(after).astype(jnp.int32)
    return steps, BFloat16StatesState(state.key, step, rounded)

  return optax.GradientTransformationExtraArgs(init, update)


def _as_test(which: Callable[[str, jax.Array], bool]) -> Test:
  return lambda path, leaf: which(path_str(path), leaf)


def _of_parameters(params: PyTree) -> Test:
  """The test for leaves with the shape of a parameter, whose path ends with that of it."""
  leaves, _ = tree_util.tree_flatten_with_path(params)
  shapes = {path: leaf.shape for path, leaf in leaves if is_castable(leaf)}
  if shapes.get(()) == ():  # every scale and rate looks like a scalar that is all parameters
    return lambda path, leaf: False

  def held(path: tree_util.KeyPath, leaf: Any) -> bool:
    return any(shapes.get(path[n:]) == leaf.shape for n in range(len(path) + 1))

  return held


def _narrowed(state: PyTree, held: Test, path: tree_util.KeyPath) -> Any:
  """A new state with the chosen leaves in bfloat16, rounded to the nearest."""

  def narrow(below: tree_util.KeyPath, node: Any) -> Any:
    here = (*path, *below)
    field = _WRAPPED.get(type(node))
    if field is not None:
      wrapped = _narrowed(getattr(node, field), held, (*here, tree_util.GetAttrKey(field)))
      return node._replace(**{field: wrapped})
    chosen = is_castable(node) and node.dtype == FLOAT32 and held(here, node)
    return node.astype(BFLOAT16) if chosen else node

  return tree_util.tree_map_with_path(narrow, state, is_leaf=lambda x: type(x) in _WRAPPED)


def _is_bfloat16(leaf: Any) -> bool:
  return is_castable(leaf) and leaf.dtype == BFLOAT16


def _widened(leaf: Any) -> Any:
  return leaf.astype(FLOAT32) if _is_bfloat16(leaf) else leaf


def _rounding(key: jax.Array) -> Callable[[Any, Any, Any], Any]:
  """The function from a leaf's key path, its old and its new value to what is held."""

  def hold(path: tree_util.KeyPath, old: Any, new: Any) -> Any:
    if not _is_bfloat16(old) or new.dtype != FLOAT32:
      return new
    name = f"state/{path_str(path)}"
    return rounded_stochastically(new, BFLOAT16, key, name).astype(BFLOAT16)

  return hold
