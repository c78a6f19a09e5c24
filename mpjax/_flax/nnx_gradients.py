"""Gradients of a scaled loss of NNX models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from mpjax._flax.nnx_calls import is_node
from mpjax._scaling.scaled_gradients import (
  check_positions,
  float32_loss,
  named_after,
  read_scale,
  split_aux,
)
from mpjax._train.step_parts import check_is_loss


def value_and_grad(
  loss_fn: Callable[..., Any],
  argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
  has_aux: bool = False,
  *,
  wrt: Any = nnx.Param,
) -> Callable[..., Any]:
  """`mpjax.value_and_grad` for losses of NNX models.

  What the loss changes in its arguments arrives there, as under ``nnx.value_and_grad``: BatchNorm
  statistics, random streams (so that dropout draws anew), caches, and Variables and submodules
  that it adds. So it does when the gradients turn out not to be finite and the step is skipped;
  `mpjax.nnx.make_train_step` puts it back then, a loop of one's own does it with `mpjax.select`.

  Made under ``nnx.set_graph_mode(False)`` or ``nnx.set_graph_updates(False)``, it does what
  ``nnx.value_and_grad`` does there: it differentiates all that a model holds, which must be floats,
  and returns the gradients as such a model, of which ``nnx.Optimizer`` takes its own. The values of
  Variables that the loss changes arrive; Variables and submodules that it adds do not.

  Args:
    loss_fn: Returns a real scalar, or a pair of it and auxiliary output if ``has_aux``. Its
      arguments are NNX models, other graph nodes (``nnx.Rngs``) and pytrees of arrays.
    argnums: The positions of the arguments to differentiate: models or pytrees of float arrays;
      an ``nnx.DiffState`` says of a model which Variables.
    has_aux: Whether ``loss_fn`` returns auxiliary output.
    wrt: Which Variables of the models to differentiate, as ``wrt`` of ``nnx.Optimizer``.

  Returns:
    A function that takes the arguments of ``loss_fn`` and the keyword ``loss_scale``, and returns
    ``(loss, gradients)`` or ``((loss, aux), gradients)``. The loss is float32 and unscaled. The
    gradients of a model are an ``nnx.State`` of its ``wrt`` Variables, in their dtypes; they are
    scaled, for an optimizer made with `mpjax.dynamic_loss_scaling` to unscale.

  Raises:
    TypeError: If ``loss_fn`` is no function, or ``argnums`` a bool; when called, if the loss is not
      a real floating-point scalar.
    ValueError: If ``wrt`` or an ``nnx.DiffState`` chooses Variables where all are differentiated;
      when called, if a model to differentiate has no Variable that ``wrt`` names.

  Example:
    >>> import mpjax, optax
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> grad_fn = value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))
    >>> scale = mpjax.loss_scale(optimizer.opt_state)
    >>> loss, grads = grad_fn(model, jnp.ones((4, 2)), loss_scale=scale)
    >>> _ = optimizer.update(model, grads)
    >>> loss.dtype.name, grads["kernel"].dtype.name
    ('float32', 'float32')
  """
  check_is_loss(loss_fn, "mpjax.nnx.value_and_grad takes")
  check_positions(argnums)
  single = isinstance(argnums, int | nnx.DiffState)
  numbers: tuple[Any, ...] = (argnums,) if single else tuple(argnums)  # pyright: ignore
  graph, updates = nnx.set_graph_mode.current_value(), nnx.set_graph_updates.current_value()
  chooses = graph and updates
  if not chooses:
    _check_chooses_none(numbers, wrt)

  def value_and_scaled_grad(
    *args: Any, loss_scale: jax.typing.ArrayLike | None = None, **kwargs: Any
  ) -> tuple[Any, Any]:
    scale = read_scale(loss_scale)
    names = tuple(kwargs)

    def scaled_loss(*operands: Any) -> tuple[jax.Array, Any]:
      keywords = dict(zip(names, operands[len(args) :], strict=True))
      out = loss_fn(*operands[: len(args)], **keywords)
      loss, aux = split_aux(out) if has_aux else (out, None)
      loss = float32_loss(loss)
      return loss * scale.astype(loss.dtype), (loss, aux)

    positions = [_position(args, number) for number in numbers]
    filters = [getattr(number, "filter", wrt) for number in numbers]
    places = [*map(functools.partial(_place, args), positions, filters)] if chooses else positions
    chosen = places[0] if single else tuple(places)
    grad = nnx.grad(scaled_loss, argnums=chosen, has_aux=True, graph=graph, graph_updates=updates)
    # Graph nodes move only among the positional arguments of nnx.grad.
    grads, (loss, aux) = grad(*args, *kwargs.values())
    return ((loss, aux) if has_aux else loss), grads

  return named_after(loss_fn, value_and_scaled_grad)


def _check_chooses_none(numbers: Sequence[int | nnx.DiffState], wrt: Any) -> None:
  """Refuses a choice of Variables.

  Raises:
    ValueError: If there is one.
  """
  chosen = [number for number in numbers if isinstance(number, nnx.DiffState)]
  if chosen or wrt is not nnx.Param:
    got = chosen[0] if chosen else f"wrt={wrt!r}"
    raise ValueError(
      "Under nnx.set_graph_mode(False) or nnx.set_graph_updates(False) all Variables of a model "
      f"are differentiated. Got {got}. Leave it out, for an optimizer takes its own of the "
      "gradients, or make the function under nnx.set_graph_mode(True) and "
      "nnx.set_graph_updates(True)."
    )


def _position(args: Sequence[Any], number: int | nnx.DiffState) -> int:
  """The position of an argument that is differentiated, counted from the first."""
  if isinstance(number, nnx.DiffState):
    number = number.argnum
  if not -len(args) <= number < len(args):
    raise ValueError(
      f"argnums must name arguments of the call. Got {number} for {len(args)} positional "
      "arguments. Pass what is differentiated by position."
    )
  return number % len(args)


def _place(args: Sequence[Any], number: int, wrt: Any) -> int | nnx.DiffState:
  """What ``nnx.grad`` takes for an argument: its position, for a model with the Variables."""
  if not is_node(args[number]):
    return number
  if not jax.tree.leaves(nnx.state(args[number], wrt)):
    raise ValueError(
      f"wrt must name Variables that the model has. Got {wrt!r}, and "
      f"{type(args[number]).__name__} has none of these. Name for example nnx.Param."
    )
  return nnx.DiffState(number, wrt)
