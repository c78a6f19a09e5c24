"""Fault injection: NaN, inf and other bad numbers at chosen steps, to test that training survives.

A schedule is data: which steps are struck, with what, and where. Under ``jax.jit`` it is an
argument like any other, and the same schedule strikes the same places every time.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mpjax._core.arguments import positive_integer
from mpjax._core.dtypes import is_of
from mpjax._core.tree_paths import PyTree, leaf_paths

FAULTS = ("nan", "inf", "-inf", "huge", "subnormal")
"""The kinds of fault. "huge" is the largest finite number of an array's dtype, "subnormal" its
smallest positive one. A scaler skips a huge float32 gradient, whose square is inf; a huge number in
a batch or an activation it skips where that makes the loss or a gradient overflow."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FaultSchedule:
  """Which steps are struck, with what, and where; made by `at` or `random`.

  Attributes:
    kind: i32[steps], 0 for no fault and n for ``kinds[n - 1]``. Later steps have no fault.
    place: i32[steps], a random number from which array and element follow.
    kinds: The kinds of fault that may occur.

  Example:
    >>> schedule = FaultSchedule.at({step: kind for step, kind in enumerate(FAULTS, start=2)})
    >>> schedule.struck, schedule.kinds
    ([2, 3, 4, 5, 6], ('-inf', 'huge', 'inf', 'nan', 'subnormal'))
  """

  kind: Any
  place: Any
  kinds: tuple[str, ...] = field(metadata={"static": True})

  @classmethod
  def at(cls, faults: Mapping[int, str], *, seed: int = 0) -> "FaultSchedule":
    """A schedule of chosen steps.

    Args:
      faults: The kind of fault, one of `FAULTS`, by step.
      seed: Decides which array and element are struck.

    Returns:
      The schedule.

    Raises:
      ValueError: If a step is negative, or a kind is none.

    Example:
      >>> FaultSchedule.at({1: "nan", 4: "inf"}).struck
      [1, 4]
    """
    kinds = _read_kinds(faults.values())
    if any(step < 0 for step in faults):
      raise ValueError(f"Steps count from 0. Got {min(faults)}. Name a step of the run.")
    kind = np.zeros(max(faults, default=0) + 1, np.int32)
    for step, name in faults.items():
      kind[step] = kinds.index(name) + 1
    return cls(jnp.asarray(kind), _places(len(kind), seed), kinds)

  @classmethod
  def random(
    cls, steps: int, rate: float, *, seed: int = 0, kinds: Sequence[str] = FAULTS[:3]
  ) -> "FaultSchedule":
    """A schedule of random steps.

    Args:
      steps: The number of steps.
      rate: The share of them that is struck, on average.
      seed: Decides which steps, arrays and elements are struck.
      kinds: The kinds of fault to draw from; NaN, inf and -inf unless told otherwise.

    Returns:
      The schedule.

    Raises:
      ValueError: If ``steps`` is below 1, ``rate`` is no share, or a kind is none.

    Example:
      >>> schedule = FaultSchedule.random(100, 0.05, kinds=["nan"])
      >>> schedule.kind.shape, len(schedule.struck)
      ((100,), 6)
    """
    if not 0 <= rate <= 1:
      raise ValueError(f"rate must lie between 0 and 1. Got {rate!r}. Choose for example 0.05.")
    steps, kinds = positive_integer("steps", steps), _read_kinds(kinds)
    draw = np.random.default_rng(seed)
    kind = np.where(draw.random(steps) < rate, draw.integers(1, len(kinds) + 1, steps), 0)
    return cls(jnp.asarray(kind, jnp.int32), _places(steps, seed), kinds)

  @property
  def struck(self) -> list[int]:
    """The steps that have a fault."""
    return np.flatnonzero(np.asarray(self.kind)).tolist()


class FaultState(NamedTuple):
  """The state of `inject_faults`.

  Attributes:
    step: i32[], the number of updates, skipped ones included: a train step leaves it alone when
      it skips, so that a fault strikes once.

  Example:
    >>> inject_faults(FaultSchedule.at({0: "nan"})).init({})
    FaultState(step=Array(0, dtype=int32))
  """

  step: jax.Array


def inject(
  tree: PyTree, schedule: FaultSchedule, step: jax.typing.ArrayLike, pattern: str = ".*"
) -> PyTree:
  """Puts a step's fault, if it has one, into one element of one float array of a tree.

  For batches, for activations inside of a model, and for gradients: a pure function.

  Args:
    tree: Any pytree; integers and whatever else is no float array stay as they are.
    schedule: The faults.
    step: i32[], the step.
    pattern: What may be struck: a regular expression that matches a whole path, such as
      ``encoder/.*/kernel``, or that of a parent.

  Returns:
    The tree.

  Raises:
    ValueError: If nothing that may be struck is in the tree.

  Example:
    >>> schedule = FaultSchedule.at({3: "nan"})
    >>> batch = {"x": jnp.ones(2), "label": jnp.arange(2)}
    >>> bool(jnp.isnan(inject(batch, schedule, 3)["x"]).any())
    True
    >>> inject(batch, schedule, 4)["x"]
    Array([1., 1.], dtype=float32)
  """
  leaves, structure = jax.tree.flatten(tree)
  targets = _targets(tree, pattern)
  kind = jnp.asarray(schedule.kind).at[step].get(mode="fill", fill_value=0)
  place = jnp.asarray(schedule.place).at[step].get(mode="fill", fill_value=0)
  for n, index in enumerate(targets):
    here = jnp.where(place % len(targets) == n, kind, 0)
    leaves[index] = _strike(jnp.asarray(leaves[index]), schedule.kinds, here, place // len(targets))
  return structure.unflatten(leaves)


def inject_gradients(
  tree: PyTree, schedule: FaultSchedule, step: jax.typing.ArrayLike, pattern: str = ".*"
) -> PyTree:
  """Returns a tree as it is; what is struck is its gradient.

  Around the parameters in a loss function it strikes their gradients, scaled, as the backward
  pass computes them.

  Args:
    tree: A pytree of arrays.
    schedule: The faults.
    step: i32[], the step.
    pattern: See `inject`.

  Returns:
    The tree.

  Example:
    >>> schedule = FaultSchedule.at({0: "inf"})
    >>> jax.grad(lambda w: jnp.sum(inject_gradients(w, schedule, 0)))(jnp.ones(1))
    Array([inf], dtype=float32)
  """
  return _identity(pattern, tree, schedule, jnp.asarray(step))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(pattern: str, tree: PyTree, schedule: FaultSchedule, step: jax.Array) -> PyTree:
  del pattern, schedule, step
  return tree


def _identity_fwd(pattern: str, tree: PyTree, schedule: FaultSchedule, step: jax.Array) -> PyTree:
  del pattern
  return tree, (schedule, step)


def _identity_bwd(pattern: str, residuals: Any, cotangent: Any) -> Any:
  schedule, step = residuals
  return inject(cotangent, schedule, step, pattern), None, None


_identity.defvjp(_identity_fwd, _identity_bwd)


def inject_faults(schedule: FaultSchedule, pattern: str = ".*") -> optax.GradientTransformation:
  """Makes the transformation that strikes the gradients that it is given.

  It belongs in front of the loss scaler, where the backward pass would have made the fault:
  ``optax.chain(inject_faults(schedule), mpjax.dynamic_loss_scaling(tx))``.

  Args:
    schedule: The faults, by number of the update.
    pattern: See `inject`.

  Returns:
    A transformation whose state is a `FaultState`.

  Raises:
    TypeError: If ``schedule`` is none, such as the optimizer.

  Example:
    >>> tx = inject_faults(FaultSchedule.at({0: "-inf"}))
    >>> updates, state = tx.update({"w": jnp.ones(1)}, tx.init({}))
    >>> updates, state
    ({'w': Array([-inf], dtype=float32)}, FaultState(step=Array(1, dtype=int32)))
  """
  if not isinstance(schedule, FaultSchedule):
    raise TypeError(
      f"inject_faults takes a FaultSchedule. Got {type(schedule).__name__}. Write "
      "optax.chain(inject_faults(FaultSchedule.at({3: 'nan'})), mpjax.dynamic_loss_scaling(tx))."
    )

  def init(params: optax.Params) -> FaultState:
    del params
    return FaultState(jnp.zeros((), jnp.int32))

  def update(
    updates: optax.Updates, state: PyTree, params: optax.Params | None = None
  ) -> tuple[optax.Updates, FaultState]:
    del params
    return inject(updates, schedule, state.step, pattern), FaultState(state.step + 1)

  return optax.GradientTransformation(init, update)


def _read_kinds(names: Any) -> tuple[str, ...]:
  kinds = tuple(sorted(set(names)))
  if unknown := sorted(set(kinds) - set(FAULTS)):
    raise ValueError(
      f"A fault must be one of {', '.join(FAULTS)}. Got {unknown[0]!r}. Write one of these."
    )
  return kinds or FAULTS[:1]


def _places(steps: int, seed: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng((seed, 1)).integers(0, 2**31 - 1, steps), jnp.int32)


def _targets(tree: PyTree, pattern: str) -> list[int]:
  """The positions, among the leaves, of float arrays with a path that matches."""
  floats = [(n, path) for n, (path, leaf) in enumerate(leaf_paths(tree)) if _is_float(leaf)]
  found = [n for n, path in floats if _matches(pattern, path)]
  if not found:
    raise ValueError(
      f"pattern {pattern!r} must match the path of a float array, or of a parent. Paths seen: "
      f"{', '.join(path for _, path in floats) or 'none'}. Fix the pattern."
    )
  return found


def _is_float(leaf: Any) -> bool:
  return isinstance(leaf, float) or (is_of(leaf, jnp.floating) and leaf.size > 0)


def _matches(pattern: str, path: str) -> bool:
  names = path.split("/")
  parents = ("/".join(names[: n + 1]) for n in range(len(names)))
  return any(re.fullmatch(pattern, parent) for parent in parents)


def _strike(x: jax.Array, kinds: Sequence[str], kind: jax.Array, element: jax.Array) -> jax.Array:
  here = _is_element(x.shape, element)
  for n, name in enumerate(kinds, start=1):
    x = jnp.where(here & (kind == n), jnp.asarray(_value(name, x.dtype), x.dtype), x)
  return x


def _is_element(shape: tuple[int, ...], element: jax.Array) -> jax.Array:
  """A mask of this shape, True at one element."""
  # Compared rather than scattered, so that an array may be sharded.
  here = jnp.ones(shape, jnp.bool_)
  for axis, size in reversed(list(enumerate(shape))):
    here &= lax.broadcasted_iota(jnp.int32, shape, axis) == element % size
    element = element // size
  return here


def _value(name: str, dtype: Any) -> Any:
  limits = jnp.finfo(dtype)
  named = {"huge": limits.max, "subnormal": limits.smallest_subnormal}
  return named[name] if name in named else float(name)
