"""Matmuls whose result is turned at once, computed so that it lies as it is read.

XLA lays the result of a matmul out as it stands: what is matched, the rows of the first operand,
those of the second. An einsum that wants another order is a matmul and a transposition, which on
GPUs is a pass over the result, and over what stands behind it in the same layout: of the scores of
grouped attention (``bqgrd,bkgd->bgrqk``) over their softmax and, until XLA of JAX 0.12, over a
second copy of its weights that waits for the backward pass. With the queries first, and turned
while they are a query's features wide and not yet all keys long, the scores lie as they are read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._core.primitives import Rule
from mpjax._engine.planning.plan import Order, Plan, Step
from mpjax._engine.program import jaxprs
from mpjax._engine.program.matmuls import free_dims


def turned(plan: Plan) -> dict[int, Order]:
  """The 16-bit matmuls of a plan, by index, that are computed in another order than written."""
  if not any(_is_transpose(step) for step in plan.steps):
    return {}
  readers = plan.readers
  found = {}
  for index, step in enumerate(plan.steps):
    matmul = step.rule is Rule.LOWER and step.eqn.primitive.name == "dot_general"
    if not matmul or step.parameter is not None or _is_particular(step):
      continue
    reads = readers[step.eqn.outvars[0]]
    (reader, _), *others = reads or [(-1, None)]
    if others or reader < 0 or not _is_transpose(plan.steps[reader]):
      continue
    order = _order(step, plan.steps[reader].eqn.params["permutation"])
    if order is not None:
      found[index] = order
  return found


def _is_particular(step: Step) -> bool:
  """Whether a matmul says more of its operands or result than what it multiplies."""
  sharding, precision = step.params.get("out_sharding"), step.params["precision"]
  return sharding is not None or (isinstance(precision, tuple) and len(set(precision)) > 1)


def _is_transpose(step: Step) -> bool:
  return step.eqn.primitive.name == "transpose"


def _order(step: Step, permutation: Sequence[int]) -> Order | None:
  """The order in which a matmul is computed whose result is read under a permutation.

  Operands are exchanged where all rows of the second are read ahead of those of the first. Where
  the result then lies as it is read, the rows of an operand that is at most half as large are
  turned, too: its copy stays for the backward pass. What XLA does by itself is left to it: halves
  that are in order once exchanged.
  """
  free, read = free_dims(step.eqn), [*map(int, permutation)]
  rows = _rows(free, len(read))
  first, second = as_read = [sorted(half, key=read.index) for half in rows]
  exchanged = bool(first and second) and read.index(second[-1]) < read.index(first[0])
  order = free
  if read == [*range(rows[0].start), *(second + first if exchanged else first + second)]:
    if all(map(operator.eq, as_read, map(list, rows))):
      return None
    small = [2 * jaxprs.size(atom) <= jaxprs.size(step.eqn.outvars[0]) for atom in step.eqn.invars]
    order = tuple(
      tuple(dims[row - half.start] for row in wanted) if turns else dims
      for dims, half, wanted, turns in zip(free, rows, as_read, small, strict=True)
    )
  return Order(exchanged, order) if exchanged or order != free else None


def _rows(free: tuple[tuple[int, ...], ...], rank: int) -> tuple[range, range]:
  """Where the dimensions of the two operands stand in a result of a rank, as written."""
  middle = rank - len(free[1])
  return range(middle - len(free[0]), middle), range(middle, rank)


def run(step: Step, order: Order, left: jax.Array, right: jax.Array) -> jax.Array:
  """The matmul of a step, computed in another order; its result has the one that is written."""
  contracted, batch = step.params["dimension_numbers"]
  rest = {k: v for k, v in step.params.items() if k != "dimension_numbers"}
  natural, matched = free_dims(step.eqn), range(len(batch[0]))
  rows = _rows(natural, len(jaxprs.shape(step.eqn.outvars[0])))
  labels: list[int] = [*matched]
  sides = []
  for n in (1, 0) if order.exchanged else (0, 1):
    dims, x = order.free[n], (left, right)[n]
    labels += [rows[n][natural[n].index(dim)] for dim in dims]
    along = tuple(contracted[n]), tuple(batch[n])
    if dims != natural[n]:
      x = jnp.transpose(x, (*batch[n], *dims, *contracted[n]))
      along = tuple(range(len(batch[n] + dims), x.ndim)), tuple(matched)
    sides.append((x, along))
  (first, ahead), (second, last) = sides
  numbers = tuple(zip(ahead, last, strict=True))
  found = lax.dot_general_p.bind(first, second, dimension_numbers=numbers, **rest)
  return jnp.transpose(found, [labels.index(n) for n in range(found.ndim)])
