"""Matmuls whose result is turned at once, with their operands the other way round.

XLA lays the result of a matmul out as it stands: what is matched, the rows of the first operand,
those of the second. An einsum that wants the rows of the second ahead of the first's is a matmul
and a transposition, which on GPUs is a pass over the result: of the scores of grouped attention
(``bqgrd,bkgd->bgrqk``, keys first) with every operation behind it, since these stand in the layout
of the scores. With the queries first the scores lie as the softmax reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from mpjax._core.primitives import Rule
from mpjax._engine import jaxprs
from mpjax._engine.plan import Plan, Step, readers_of


def turned(plan: Plan) -> frozenset[int]:
  """The 16-bit matmuls of a plan, by index, whose result is read with its halves exchanged."""
  if not any(_is_transpose(step) for step in plan.steps):
    return frozenset()
  readers = readers_of(plan)
  found = set()
  for index, step in enumerate(plan.steps):
    matmul = step.rule is Rule.LOWER and step.eqn.primitive.name == "dot_general"
    if not matmul or step.parameter is not None or _is_particular(step):
      continue
    reads = readers.get(step.eqn.outvars[0], [])
    (reader, _), *others = reads or [(-1, None)]
    if others or reader < 0 or not _is_transpose(plan.steps[reader]):
      continue
    if _exchanges(step, plan.steps[reader].eqn.params["permutation"]):
      found.add(index)
  return frozenset(found)


def _is_particular(step: Step) -> bool:
  """Whether a matmul says more of its operands or result than what it multiplies."""
  sharding, precision = step.params.get("out_sharding"), step.params["precision"]
  return sharding is not None or (isinstance(precision, tuple) and len(set(precision)) > 1)


def _is_transpose(step: Step) -> bool:
  return step.eqn.primitive.name == "transpose"


def _exchanges(step: Step, permutation: Sequence[int]) -> bool:
  """Whether all rows of the second operand come ahead of those of the first, and not in order.

  In order they come by exchanging the operands alone, which XLA does by itself.
  """
  matched, first, second = _parts(step)
  order = [*map(int, permutation)]
  ahead = range(matched, matched + first)
  last = range(matched + first, matched + first + second)
  if order == [*range(matched), *last, *ahead]:
    return False
  return bool(last and ahead) and max(map(order.index, last)) < min(map(order.index, ahead))


def _parts(step: Step) -> tuple[int, int, int]:
  """How many dimensions of the result are matched, the first operand's and the second's."""
  contracted, batch = step.params["dimension_numbers"]
  first, second = (
    len(jaxprs.shape(atom)) - len(c) - len(b)
    for atom, c, b in zip(step.eqn.invars, contracted, batch, strict=True)
  )
  return len(batch[0]), first, second


def run(step: Step, left: Any, right: Any) -> Any:
  """The matmul of a step, computed with its operands exchanged."""
  contracted, batch = (tuple(reversed(pair)) for pair in step.params["dimension_numbers"])
  params = {k: v for k, v in step.params.items() if k != "dimension_numbers"}
  found = lax.dot_general_p.bind(right, left, dimension_numbers=(contracted, batch), **params)
  matched, first, second = _parts(step)
  along, ahead = range(matched), range(matched, matched + second)
  return jnp.transpose(found, (*along, *range(matched + second, matched + second + first), *ahead))
