"""What training with a Linen model or a pure function changes, as one pytree."""

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from mpjax._core.dtypes import is_key
from mpjax._core.tree_paths import PyTree
from mpjax._scaling.optimizers import as_transformation, initial_state
from mpjax._scaling.scaling_state import find_scaling_state
from mpjax._scaling.states import find_states
from mpjax._train.created import check_key, check_params, refuse_shapes
from mpjax._train.shardings import place_beside
from mpjax._train.step_parts import check_is_own_state


class TrainState(struct.PyTreeNode):
  """All that training changes, as one pytree.

  A subclass with more fields is one, too, as of Flax's; a step hands these on as they are.

  Attributes:
    step: i32[], the number of applied steps; a skipped one does not count.
    params: The parameters.
    opt_state: The optimizer's state.
    model_state: The mutable collections of the model, such as ``{"batch_stats": ...}``, or
      ``None``.
    rng: The key that every step's key is folded from, or ``None``. It never changes.

  Example:
    >>> state = TrainState.create({"w": jnp.ones(2)}, optax.sgd(0.1), rng=jax.random.key(0))
    >>> int(state.replace(step=jnp.int32(7)).step), state.model_state
    (7, None)
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  model_state: PyTree = None
  rng: Any = None

  @classmethod
  def create(
    cls,
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    model_state: PyTree = None,
    rng: Any = None,
  ) -> Self:
    """The state before the first step.

    The arrays are copied, so that a step may donate the state's buffers without deleting yours.
    The optimizer's state is made for float32 parameters, whatever they are held in, and sharded
    as they are; what has no shape of theirs is replicated over their mesh.

    A state of shapes, such as `mpjax.checkpoint.restore` takes, is the ``jax.eval_shape`` of this.

    Args:
      params: The parameters.
      tx: The optimizer.
      model_state: The mutable collections of the model, if it has any.
      rng: A key, if the loss function takes one.

    Returns:
      The state.

    Raises:
      TypeError: If ``tx`` is not an optax transformation, ``params`` is one, a module, or no
        pytree of arrays, there are shapes (``jax.ShapeDtypeStruct``) in the place of arrays, or
        ``rng`` is not one key.
      ValueError: If ``tx`` holds a loss scaler that is not the outermost transformation.

    Example:
      >>> state = TrainState.create({"w": jnp.ones(2)}, optax.sgd(0.1))
      >>> state.step, state.params
      (Array(0, dtype=int32), {'w': Array([1., 1.], dtype=float32)})
      >>> shapes = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
      >>> jax.eval_shape(lambda params: TrainState.create(params, optax.sgd(0.1)), shapes).params
      {'w': ShapeDtypeStruct(shape=(2,), dtype=float32)}
    """
    check_params(params)
    refuse_shapes(params)
    refuse_shapes({"model_state": model_state})
    check_key(rng)
    opt_state = initial_state(as_transformation(tx), params)
    find_scaling_state(opt_state)
    state = cls(jnp.zeros((), jnp.int32), params, opt_state, model_state, rng)
    return place_beside(jax.tree.map(_owned, state), params)


def _owned(leaf: Any) -> Any:
  """A strongly typed array of its own; what is no array passes."""
  if not hasattr(leaf, "dtype"):
    return leaf
  if is_key(leaf):
    return jnp.copy(leaf)
  return jnp.array(leaf, dtype=leaf.dtype, copy=True)


def check_is_state(state: PyTree, batch: PyTree) -> None:
  """Refuses what is no ``TrainState``.

  Raises:
    TypeError: If so; the message says what to pass.
  """
  if isinstance(state, TrainState):
    return
  got, instead = (
    f"{type(state).__module__}.{type(state).__name__}",
    "Make one: mpjax.TrainState.create(params, tx)",
  )
  if isinstance(batch, TrainState):
    got, instead = "the batch first", "Write step(state, batch)"
  elif isinstance(state, tuple) and any(isinstance(part, TrainState) for part in state):
    got = "what a step returned, the pair (state, metrics)"
    instead = "Write state, metrics = step(state, batch)"
  elif isinstance(state, nnx.Module):
    got = f"the NNX model {type(state).__name__}"
    instead = "Use mpjax.nnx.make_train_step with nnx.Optimizer"
  raise TypeError(f"A step takes an mpjax.TrainState and a batch. Got {got}. {instead}.")


def check_optimizer(tx: optax.GradientTransformation, state: TrainState) -> None:
  """Refuses the state of another optimizer, or of other parameters.

  Raises:
    ValueError: If the optimizer's own state would have other leaves, or leaves of other shapes, or
      the parameters are those of ``optax.lookahead``.
  """
  if find_states(state.params, optax.LookaheadParams):
    raise ValueError(
      "A train step differentiates and updates one set of parameters. Got those of "
      "optax.lookahead, a fast and a slow set. Write a loop of your own, which differentiates "
      "params.fast."
    )
  own = jax.eval_shape(functools.partial(initial_state, tx), state.params)
  instead = "Create it with this optimizer: mpjax.TrainState.create(params, tx)."
  check_is_own_state(own, state.opt_state, instead)
