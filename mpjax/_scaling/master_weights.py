"""Float32 masters of 16-bit parameters, kept by an optax transformation.

A bfloat16 number has 8 bits: 1.0 - 1e-3 is 1.0 again, and so is every further step. The sum of the
steps is therefore kept in float32, and the parameter is that sum, rounded (Micikevicius et al.,
2018, section 3.1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import FLOAT32, is_castable
from mpjax._core.tree_paths import PyTree
from mpjax._scaling.optimizers import as_transformation, initial_state
from mpjax._scaling.rounding import way_to


class MasterWeightsState(NamedTuple):
  """The state of `master_weights`.

  Attributes:
    masters: The parameters in float32; ``optax.MaskedNode()`` in place of leaves that are no
      float32, bfloat16 or float16 arrays.
    inner_state: The state of the wrapped transformation, made for the masters.
  """

  masters: Any
  inner_state: PyTree


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it trains float32 masters of 16-bit parameters.

  ``inner`` sees float32 gradients and the masters as its parameters. The updates are float32 too,
  and such that ``optax.apply_updates(params, updates)`` gives every parameter the master's value,
  rounded to the parameter's dtype, bit for bit. Nothing else of the training loop changes.

  It goes around `dynamic_loss_scaling` or inside of it, into Flax's ``TrainState``,
  `mpjax.TrainState` and ``nnx.Optimizer``. Around both there must be nothing that changes
  updates. The masters take 4 bytes a parameter, of float32 parameters too; a model whose
  parameters are all float32 needs none.

  Parameters that were changed from outside, by loading a checkpoint say, take the place of their
  masters at the next update.

  Args:
    inner: The optimizer.

  Returns:
    A transformation whose state is a `MasterWeightsState`; its ``update`` needs ``params``.

  Raises:
    TypeError: If ``inner`` is no optax transformation.
    ValueError: When called, if ``update`` is not given the parameters.

  Example:
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> tx = master_weights(optax.sgd(1e-3))
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(1, jnp.bfloat16)}, state, params)
    >>> params["w"].dtype, state.masters["w"], updates["w"].dtype
    (dtype(bfloat16), Array([0.999], dtype=float32), dtype('float32'))
  """
  inner = as_transformation(inner)

  def init(params: optax.Params) -> MasterWeightsState:
    # Two copies: no array of the state is another's or the parameter's, so all can be donated.
    masters = jax.tree.map(_master, params)
    return MasterWeightsState(masters, initial_state(inner, params))

  def update(
    updates: optax.Updates,
    state: PyTree,  # a MasterWeightsState; optax types every state alike
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, MasterWeightsState]:
    if params is None:
      raise ValueError(
        "master_weights rounds masters to parameters and needs these. Got params=None. Call "
        "tx.update(grads, state, params)."
      )
    masters = jax.tree.map(_follow, params, state.masters)
    seen = jax.tree.map(_or_parameter, params, masters)
    grads = cast_floating(updates, FLOAT32)
    steps, inner_state = inner.update(grads, state.inner_state, seen, **extra_args)
    steps = jax.tree.map(_way, params, masters, steps)
    return steps, MasterWeightsState(jax.tree.map(_landed, params, masters, steps), inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _master(param: Any) -> Any:
  return jnp.array(param, FLOAT32, copy=True) if is_castable(param) else optax.MaskedNode()


def _is_masked(master: Any) -> bool:
  return isinstance(master, optax.MaskedNode)


def _or_parameter(param: Any, master: Any) -> Any:
  return param if _is_masked(master) else master


def _follow(param: Any, master: Any) -> Any:
  """The master, or the parameter where that is no rounding of it: somebody else has set it.

  The parameter may come as a float32 view of what it is held in, so each format will do.
  """
  if _is_masked(master):
    return master
  param = param.astype(FLOAT32)
  is_rounded = (param == master) | (param == _bfloat16(master)) | (param == _float16(master))
  return jnp.where(is_rounded, master, param)


def _way(param: Any, master: Any, step: Any) -> Any:
  """What must be added to a parameter, in float32, to come to where the step takes its master."""
  if _is_masked(master):
    return step
  param, target = param.astype(FLOAT32), master + step.astype(FLOAT32)
  # One value for the caller and for `_landed`: without the barrier a compiler may compute it
  # twice, and contract a product and a sum in one place only.
  return lax.optimization_barrier(way_to(target, param))


def _landed(param: Any, master: Any, step: Any) -> Any:
  """The master for a parameter that will be ``(param + step)``, rounded.

  The sum is the target itself if that is within a factor of 2 of the parameter (Sterbenz, 1974),
  and one float32 rounding away otherwise. Taking it for the master keeps the two together.
  """
  return master if _is_masked(master) else param.astype(FLOAT32) + step


def _bfloat16(x: jax.Array) -> jax.Array:
  """Rounds as a cast would; a compiler may leave out a cast and back, but not this."""
  return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _float16(x: jax.Array) -> jax.Array:
  """Rounds as a cast would; ``reduce_precision`` alone makes subnormal results zero."""
  subnormal = lax.round(x * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
  normal = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
  return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal)
