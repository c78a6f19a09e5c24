"""How matmuls run: in 16 bits or 8, with float32 sums, or as the multiplications that they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import Rule
from mpjax._engine.planning.decisions import PRODUCTS
from mpjax._engine.planning.plan import Step
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.kinds import PARAM
from mpjax._engine.running import operand_order
from mpjax._engine.running.attached_derivatives import with_derivative
from mpjax._engine.running.environment import to_dtype
from mpjax._engine.running.float8 import in_float8
from mpjax._engine.running.float32_products import Matmul, but_on_gpus, in_order, unfolded
from mpjax._engine.running.matmul_derivatives import (
  Contraction,
  product_of,
  with_wide_cotangent,
)


def _lower(step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A matmul in 16 bits, or 8; the gradient of a parameter leaves its own in float32."""
  if step.float8 is not None and step.float8.parameter is not None:
    wide, other = operands[step.float8.parameter], operands[1 - step.float8.parameter]
    contraction = Contraction.of(step.params, step.float8.parameter, other.dtype)
    return [in_float8(contraction, step.float8.backward)(wide, other)]
  if step.parameter is None:
    if step.order is not None:
      return [operand_order.run(step, step.order, *operands)]
    return jaxprs.run_with(step.eqn, operands, step.params)
  wide, other = operands[step.parameter], operands[1 - step.parameter]
  product = product_of(step.eqn, step.params, step.parameter, other.dtype)
  run = with_wide_cotangent(product, casts_once=step.operands[step.parameter] == PARAM)
  return [run(wide, other)]


def _wide(step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A matmul from 16 bits to float32, the matmuls of whose derivative have 16-bit operands too."""
  if step.parameter is not None:
    return _lower(step, operands)
  run, moved = _with_float32_sums(step, step.params, operands[0].dtype)
  return [with_derivative(run, moved, moved)(*operands)]


def _exact(step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """The same of float32 operands, which round inside; the derivative is that of float32."""
  params = {key: value for key, value in step.params.items() if key != PRODUCTS}
  dtype = step.params[PRODUCTS]
  run, _ = _with_float32_sums(step, params, dtype)

  def rounded(*operands: Any) -> Any:
    pairs = zip(operands, step.operands, strict=True)  # sizes of groups are no factors
    return run(*(x if form is None else to_dtype(x, dtype) for x, form in pairs))

  def moved(*operands: Any) -> Any:
    return jaxprs.run_with(step.eqn, operands, params)[0]

  return [with_derivative(rounded, moved, moved)(*operands)]


def _with_float32_sums(
  step: Step, params: dict[str, Any], dtype: np.dtype
) -> tuple[Matmul, Matmul]:
  """A matmul of operands in a format to float32, and one whose sums rounded to that before."""
  narrow = params | {"preferred_element_type": dtype}

  def matmul(*operands: Any) -> Any:
    return jaxprs.run_with(step.eqn, operands, params)[0]

  def moved(*operands: Any) -> Any:
    return to_dtype(jaxprs.run_with(step.eqn, operands, narrow)[0], FLOAT32)

  name = step.eqn.primitive.name
  if name == "dot_general" and not jaxprs.is_sharded_explicitly(step.eqn.outvars[0].aval):
    contracted, batch = params["dimension_numbers"]
    return in_order(contracted, batch, params["precision"]), moved
  run = but_on_gpus(matmul, moved) if name == "conv_general_dilated" else unfolded(matmul)
  return run, moved


def _multiply(step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A matmul that contracts nothing, as the multiplication that it is: exact on every device."""
  if not matmuls.contracts_nothing(step.eqn):
    return _weigh(step, operands)
  contracted, batch = step.params["dimension_numbers"]
  shaped = []
  free = matmuls.free_dims(step.eqn)
  for n, (x, ones, along) in enumerate(zip(operands, contracted, batch, strict=True)):
    x = jnp.asarray(x)  # a number that is differentiated is no array
    x = lax.squeeze(lax.transpose(x, (*along, *free[n], *ones)), range(x.ndim - len(ones), x.ndim))
    start = len(along) + (len(free[0]) if n == 0 else 0)
    shaped.append(lax.expand_dims(x, range(start, start + len(free[1 - n]))))
  return [jnp.multiply(*(to_dtype(x, FLOAT32) for x in shaped))]


def _weigh(step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A matmul with a vector, as the sum of products that it is."""
  contracted, _ = step.params["dimension_numbers"]
  n = 0 if operands[0].ndim == 1 else 1
  (along,) = contracted[1 - n]
  terms, weights = operands[1 - n], operands[n]
  others = [dim for dim in range(terms.ndim) if dim != along]
  return [jnp.sum(terms * lax.expand_dims(weights, others), along)]


MATMUL_RULES: dict[Rule, Callable[[Step, list[jax.Array]], list[jax.Array]]] = {
  Rule.LOWER: _lower,
  Rule.WIDE: _wide,
  Rule.EXACT: _exact,
  Rule.MULTIPLY: _multiply,
}
"""How the rules of matmuls run."""
