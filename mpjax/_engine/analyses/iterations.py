"""What equations made, and what is multiplied by a vector again and again.

A matrix that was computed, times a vector: a power method, conjugate gradients, an ensemble of
solvers. To cast the matrix costs as much as to multiply it, and what rounds comes back.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from mpjax._core.primitives import CALLS, UNCHANGED
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.program import jaxprs, matmuls, versions
from mpjax._engine.program.bodies import Body, bodies_of
from mpjax._engine.program.kinds import DATA, Forms
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var


class Iterations:
  """Tells of the values of a jaxpr whether equations made them, and of matrices what they multiply.

  Args:
    frame: The frame of the jaxpr.
    contents: Tells what bodies hold.
    weights: What is made of parameters alone.
    source: Tells what an operand was before it was moved.
    made_before: Operands that equations made in float32, or loops hand on.
    carried: The variables that a loop hands on from turn to turn.
  """

  def __init__(
    self,
    frame: Frame,
    contents: Contents,
    weights: Collection[Any],
    source: Callable[[Any], Any],
    made_before: Collection[Var],
    carried: Collection[Var],
  ) -> None:
    self._frame, self._contents, self._weights = frame, contents, weights
    self._source, self._made_before, self._carried = source, made_before, carried

  def was_made(self, atom: Atom) -> bool:
    """Whether a value was computed, and not only moved, cut or scaled since it was given.

    As the weights of a quantized layer are, times their scale. Nor of parameters alone: what is
    made of these may be weights, as an orthogonal matrix.
    """
    if not isinstance(atom, Literal) and atom in self._weights:
      return False
    waiting, primitives = [(atom, self._frame)], self._contents.primitives
    for _ in range(_LOOKS):
      if not waiting:
        return isinstance(atom, Literal)
      before, frame = waiting.pop()
      if isinstance(before, Literal) or not jaxprs.is_float32(before):
        continue  # a mask, or the integers of a quantized layer
      made = frame.maker(before)
      if before in self._made_before:
        return True
      if made is None:
        waiting += frame.behind(before)
        continue
      if any("random_bits" in primitives(own.jaxpr) for own in bodies_of(made)):
        continue  # drawn, as weights are
      if made.primitive.name in CALLS:
        waiting += frame.inside(made, before)
      elif made.primitive.name in _SCALED:
        waiting += [(operand, frame) for operand in _as_large(made, frame)]
      else:
        return True
    return False

  def multiplies_vectors(self, matrix: Atom) -> bool:
    """Whether several equations multiply a matrix by a vector, or one in a loop does."""
    return self._by_vectors[id(self._source(matrix))] > 1

  @functools.cached_property
  def _by_vectors(self) -> Counter[int]:
    found = Counter[int]()
    for eqn in self._frame.inner.eqns:
      found.update(id(self._source(matrix)) for _, matrix in matmuls.vectors(eqn))
      for body in bodies_of(eqn):
        if body.carry and self._contents.matmuls(body.jaxpr):
          inner = versions.open_jaxpr(body.jaxpr)
          pairs = (pair for own in inner.eqns for pair in matmuls.vectors(own))
          places = jaxprs.places_of(inner.invars, jaxprs.variables_of(m for _, m in pairs))
          found.update(2 * [id(self._source(eqn.invars[body.operands[n]])) for n in places])
    return found

  def depends_on_carry(self, atom: Atom) -> bool:
    """Whether a value is made of what a loop hands on, a few equations before."""
    if not self._carried:
      return False
    found = itertools.islice(jaxprs.behind(atom, self._frame.makers), _LOOKS)
    return any(var in self._carried for var, _ in found)

  def entering(self, body: Body, atoms: Sequence[Atom], forms: Forms) -> frozenset[int]:
    """Which operands of a body, held so, equations made, or it hands on; none without matmuls."""
    if not self._contents.matmuls(body.jaxpr):
      return frozenset()
    pairs = enumerate(zip(atoms, forms, strict=True))
    found = (n for n, (atom, form) in pairs if form == DATA and self.was_made(atom))
    return frozenset(found).union(body.carry)


_SCALED = UNCHANGED | {
  *("slice", "dynamic_slice", "gather", "split", "concatenate", "select_n"),
  *("mul", "div", "add", "sub", "neg"),
}

_LOOKS = 16
"""How many equations behind a value are looked at."""


def _as_large(eqn: JaxprEqn, frame: Frame) -> list[Atom]:
  """The operands of an equation that are no smaller than its result: what is scaled, no scale."""
  size, found = jaxprs.size(eqn.outvars[0]), list[Atom]()
  for atom in eqn.invars:
    made = frame.maker(atom)
    is_spread = made is not None and made.primitive.name == "broadcast_in_dim"
    found += [] if is_spread or jaxprs.size(atom) < size else [atom]
  return found or list(eqn.invars)
