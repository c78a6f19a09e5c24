"""Optimizers of optax, as the scaler and the train steps call them."""

import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax._core.arguments import shown
from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32
from mpjax._core.tree_paths import PyTree, leaf_paths
from mpjax._scaling.states import find_states

OFFERED = ("value", "grad", "value_fn", "grad_fn", "obj_fn")
"""The extra arguments that the train steps pass to every optimizer, for those that use them."""


def as_transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
  """An optax transformation, or ``optax.MultiSteps``, as one that takes extra arguments.

  Raises:
    TypeError: If it is neither.
  """
  if isinstance(inner, optax.MultiSteps):
    # Its own conversion to a transformation drops extra arguments.
    update: Any = inner.update
    return optax.GradientTransformationExtraArgs(inner.init, update)
  if not isinstance(inner, optax.GradientTransformation):
    value = f"{shown(inner)} of type " if isinstance(inner, str | numbers.Number) else ""
    raise TypeError(
      "The optimizer must be an optax.GradientTransformation. Got "
      f"{value}{type(inner).__name__}. Pass for example optax.adam(1e-3)."
    )
  inner = optax.with_extra_args_support(inner)
  if all(_takes(inner, name) for name in OFFERED):
    return inner

  def update_with_what_it_takes(
    updates: optax.Updates, state: PyTree, params: optax.Params | None = None, **extra_args: Any
  ) -> tuple[optax.Updates, Any]:
    return inner.update(updates, state, params, **those_taken(inner, extra_args))

  return optax.GradientTransformationExtraArgs(inner.init, update_with_what_it_takes)


def initial_state(tx: optax.GradientTransformation, params: PyTree) -> Any:
  """The state of an optimizer before its first update, for parameters held in float32.

  ``optax.monitor`` starts without what it measures and has it from the first update on. Here that
  is zeros from the start, so that a skipped step can keep what there was.

  Args:
    tx: The optimizer.
    params: The parameters, whatever they are held in.
  """
  wide = cast_floating(params, FLOAT32)
  state = tx.init(wide)
  if not find_states(state, optax.MonitorState):
    return state
  extra = those_taken(tx, {"value": jnp.zeros((), FLOAT32), "grad": wide})
  updated = jax.eval_shape(lambda state: tx.update(wide, state, wide, **extra)[1], state)
  own = dict(leaf_paths(state))
  filled = [own.get(path, jnp.zeros(x.shape, x.dtype)) for path, x in leaf_paths(updated)]
  return jax.tree.structure(updated).unflatten(filled)


def those_taken(tx: optax.GradientTransformation, extra: Mapping[str, Any]) -> dict[str, Any]:
  """The extra arguments without those that train steps offer and this transformation cannot take.

  optax asks every transformation of extra arguments to take any, and use what it knows; one like
  ``optax.contrib.sam`` has a signature that names all it takes. What a caller adds of his own is
  passed on, so that a misspelled name is refused as it is without mpjax.

  Args:
    tx: The transformation.
    extra: Arguments by name.

  Example:
    >>> offered = {"value": 1.0, "grad_fn": abs}
    >>> list(those_taken(optax.polyak_sgd(), offered))
    ['value', 'grad_fn']
    >>> sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))
    >>> list(those_taken(sam, offered))
    ['grad_fn']
  """
  return {name: x for name, x in extra.items() if name not in OFFERED or _takes(tx, name)}


def call_with_those_taken(update: Callable[..., Any], extra: Mapping[str, Any]) -> Any:
  """Calls an update with the extra arguments that nothing inside of it refuses.

  ``optax.chain``, ``optax.partition`` and their kind hand what they are given to all that they
  hold; one among them whose signature names all it takes refuses the rest. The update is then
  traced anew without what was refused.

  Args:
    update: Takes extra arguments by name.
    extra: What a train step offers, by name.
  """
  while True:
    try:
      return update(**extra)
    except TypeError as error:
      refused = [name for name in extra if f"unexpected keyword argument '{name}'" in str(error)]
      if not refused:
        raise
      extra = {name: x for name, x in extra.items() if name not in refused}


def _takes(tx: optax.GradientTransformation, name: str) -> bool:
  if not isinstance(tx, optax.GradientTransformationExtraArgs):
    return False
  parameters = inspect.signature(tx.update).parameters
  return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
