"""Lookups in 16-bit values, whose cotangents add up in float32.

``h = x @ w; h[sources]``: a node of a graph may be read by thousands of edges, and what comes back
to it is a sum of as many terms. JAX scatters cotangents in the dtype of what was looked up in; here
they are float32 until they are added. The lookup itself stays in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.planning.plan import Step
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import is_narrow
from mpjax._engine.running.attached_derivatives import with_derivative
from mpjax._engine.running.environment import to_dtype


def may_repeat(step: Step) -> bool:
  """Whether a step looks up in a 16-bit value, and perhaps the same more than once."""
  if step.eqn.primitive.name != "gather" or step.eqn.params["unique_indices"]:
    return False
  form, (_, indices) = step.operands[0], step.eqn.invars
  several = jaxprs.size_of(jaxprs.shape(indices)[:-1]) > 1
  return several and is_narrow(form) and step.outs[0] == form


def adding_up(step: Step) -> Callable[..., jax.Array]:
  """The lookup of a step, from operands to its result, with such a derivative.

  Args:
    step: One that `may_repeat`.
  """

  def look_up(values: jax.Array, indices: jax.Array) -> jax.Array:
    return jaxprs.run_with(step.eqn, [values, indices], step.params)[0]

  def along_values(tangent: jax.Array, indices: jax.Array) -> jax.Array:
    return to_dtype(look_up(to_dtype(tangent, FLOAT32), indices), tangent.dtype)

  return with_derivative(look_up, along_values, _of_indices)


def _of_indices(values: jax.Array, tangent: jax.Array) -> jax.Array:
  """Never asked for: integers have no tangents."""
  del values
  return tangent
