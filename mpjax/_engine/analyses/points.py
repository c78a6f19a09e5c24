"""Rotations, projections and other small transforms of points.

``x @ rotation.T``, ``points @ camera.T``, ``einsum("bij,nj->bni", theta, grid)``: sums of two or
three products each, which are coordinates. They are written as matmuls, and no layers: where a
pixel lies at 500, bfloat16 tells it in steps of 2, and no hardware multiplies so few numbers
faster. So they are float32, as if they were written out. The weights of a layer may be as small;
those are parameters as they came, which such a matrix is not: it is made of fewer, as of angles, or
by a layer, or is given. One of four rows and columns is put together from a rotation and a shift,
or what it multiplies has a one beside its coordinates. What a layer gave for points has rounded
before, and is multiplied in 16 bits, but where that one stands beside it. Points may be parameters
themselves, of a cloud that is sought: rows that a square matrix turns, as no layer's data are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mpjax._core.primitives import CALLS, MATMULS, UNCHANGED
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.kinds import DATA, PARAM, Form, Forms, is_narrow
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal

_PUTS_TOGETHER = frozenset({"concatenate", "stack"})
_JOINS = frozenset({"add", "sub", "mul", "dot_general"})
_TAKES = frozenset({"neg", "slice", "dynamic_slice", "gather", "split", "unstack", "pad"})
_LEADS_ON = UNCHANGED | _JOINS | _TAKES
_CHOOSES = frozenset({"select_n"})
"""As `jnp.diag` puts numbers on a diagonal."""

_LOOKS = 64
"""How many equations behind a matrix are looked at."""


def transforms_points(eqn: JaxprEqn, forms: Forms, frame: Frame, pure: Collection[Any]) -> bool:
  """Whether a matmul multiplies points by a matrix as small, which is no layer's.

  Args:
    eqn: The matmul.
    forms: How its operands are held.
    frame: The frame of its jaxpr.
    pure: What is made of parameters alone.
  """
  if eqn.primitive.name != "dot_general":
    return False
  terms, makers = matmuls.terms(eqn), frame.makers
  if terms > matmuls.DIMENSIONS + 1:
    return False
  for n, (matrix, points) in enumerate((eqn.invars, eqn.invars[::-1])):
    of_matrix, of_points = forms[n], forms[1 - n]
    if not _has_few_rows(matmuls.free(eqn, n), terms) or _are_weights(matrix, of_matrix, makers):
      continue
    if terms > matmuls.DIMENSIONS and _have_ones(points, frame):
      return True
    if is_narrow(of_points):
      continue
    if terms > matmuls.DIMENSIONS:
      found = _is_put_together(matrix, frame, by_rows_and_columns=True)
    else:
      found = of_matrix in (DATA, PARAM) and _is_put_together(matrix, frame)
    is_given = of_matrix != PARAM and _is_given(matrix, of_matrix, makers)
    are_many = max(matmuls.free(eqn, 1 - n), default=1) > matmuls.DIMENSIONS >= terms
    is_pure = not isinstance(points, Literal) and points in pure
    are_weights = _are_weights(points, PARAM if is_pure else of_points, makers)
    if found or (is_given and are_many and (not are_weights or _turns_rows(eqn, n))):
      return True
  return False


def _have_ones(points: Atom, frame: Frame) -> bool:
  """Whether points are homogeneous: coordinates, and a one behind them."""
  made = frame.maker(frame.before(points))
  return (
    made is not None
    and made.primitive.name == "concatenate"
    and len(made.invars) == 2
    and frame.number(made.invars[1]) == 1
  )


def _turns_rows(eqn: JaxprEqn, operand: int) -> bool:
  """Whether an operand of a matmul is a square matrix that multiplies the rows of the other."""
  (contracted, _), other = eqn.params["dimension_numbers"], eqn.invars[1 - operand]
  rows, columns = jaxprs.shape(eqn.invars[operand])[-2:]
  return rows == columns and contracted[1 - operand] == (len(jaxprs.shape(other)) - 1,)


def _has_few_rows(free: list[int], terms: int) -> bool:
  """Whether a matrix has as few rows as a rotation, or the three or four of a homogeneous one."""
  if terms > matmuls.DIMENSIONS:
    return matmuls.DIMENSIONS in free or terms in free
  return bool(free) and 1 < min(free) <= matmuls.DIMENSIONS


def _is_given(atom: Atom, form: Form | None, makers: Mapping[Any, JaxprEqn]) -> bool:
  """Whether a matrix came in, or a layer made it; moved, or with a number added or multiplied."""
  if is_narrow(form):
    return True
  for _ in range(_LOOKS):
    made = None if isinstance(atom, Literal) else makers.get(atom)
    if made is None or made.primitive.name in MATMULS:
      return True
    if made.primitive.name not in _LEADS_ON:
      return False
    atom = made.invars[0]
  return False


def _is_put_together(atom: Atom, frame: Frame, *, by_rows_and_columns: bool = False) -> bool:
  """Whether a value was made of others that are parts of it, or is a sum or product with such.

  Args:
    atom: The value.
    frame: The frame of its jaxpr.
    by_rows_and_columns: Whether some of the parts must have been, too: not so the two halves of
      what a rotary embedding turns.
  """
  waiting = [(atom, frame)]
  for _ in range(_LOOKS):
    if not waiting:
      return False
    atom, frame = waiting.pop()
    made = frame.maker(atom)
    if made is None:
      waiting += frame.behind(atom)
      continue
    name, read = made.primitive.name, list[Atom]()
    if name in _PUTS_TOGETHER:
      return not by_rows_and_columns or any(_is_put_together(a, frame) for a in made.invars)
    if name in _LEADS_ON:
      read = made.invars[::-1] if name in _JOINS else made.invars[:1]
    elif name in _CHOOSES:
      read = made.invars[1:]
    elif name in CALLS:
      waiting += frame.inside(made, atom)[-1:]
    waiting += [(before, frame) for before in read]
  return False


def _are_weights(atom: Atom, form: Form | None, makers: Mapping[Any, JaxprEqn]) -> bool:
  """Whether a value is a parameter, spread or not, or made of one that has as many numbers."""
  if form != PARAM:
    return False
  waiting, seen = [(atom, 1)], set[Any]()
  while waiting:
    before, copies = waiting.pop()
    if isinstance(before, Literal) or before in seen:
      continue
    seen.add(before)
    made = makers.get(before)
    if made is not None:
      spread = made.primitive.name == "broadcast_in_dim"
      copies *= jaxprs.size(before) // max(1, jaxprs.size(made.invars[0])) if spread else 1
      waiting += [(operand, copies) for operand in made.invars]
    if len(seen) > _LOOKS or (made is None and copies * jaxprs.size(before) >= jaxprs.size(atom)):
      return True
  return False
