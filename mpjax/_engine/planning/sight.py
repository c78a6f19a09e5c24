"""What is seen of an equation when its rule is chosen, and what that shows.

Of matmuls `matmul_sight` tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT16
from mpjax._core.primitives import MATMULS, SCALES, Rule
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.analyses.knowledge import Knowledge
from mpjax._engine.planning.plan import Place
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import CONSTANT, FEW, PARAM, Forms, Kind, is_narrow, join
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var


class Sight(NamedTuple):
  """What is seen of an equation when its rule is chosen.

  Attributes:
    eqn: The equation.
    name: The name of its primitive.
    rule: The rule of that.
    forms: How its operands are held.
    compute: The compute dtype that governs it.
    around: What is known of the jaxpr that it stands in.
    place: Where it stands.
  """

  eqn: JaxprEqn
  name: str
  rule: Rule
  forms: Forms
  compute: np.dtype
  around: Knowledge
  place: Place

  @property
  def result(self) -> Any:
    """The first result."""
    return self.eqn.outvars[0]

  @property
  def has_float32(self) -> bool:
    """Whether an operand is float32 in the trace."""
    return any(self.forms)

  @property
  def is_narrow(self) -> bool:
    """Whether its operands are held in 16 bits together."""
    form = join(self.forms)
    return is_narrow(form)

  @property
  def has_narrow(self) -> bool:
    """Whether a layer made one of its operands."""
    return any(map(is_narrow, self.forms))

  @property
  def has_layer(self) -> bool:
    """Whether a layer made one of its operands, or one is a parameter."""
    return self.has_narrow or PARAM in self.forms

  @property
  def are_float16(self) -> Sequence[bool]:
    """Which of its operands came out of a matmul and are held in float16."""
    return [is_narrow(f) and f.dtype == FLOAT16 for f in self.forms]


def held_together(sight: Sight) -> np.dtype | None:
  """The dtype that an equation's operands have together where they follow each other."""
  form = join(sight.forms)
  return sight.compute if form and form.kind < Kind.NARROW else form and form.dtype


def is_near_a_number(sight: Sight) -> bool:
  """Whether a number is added that 16 bits hold with errors as large as what a value varies by."""
  for atom, form in zip(sight.eqn.invars, sight.forms, strict=True):
    if form == CONSTANT:
      known = sight.around.numbers.of(atom)
      return known is None or max(map(abs, known), default=0.0) >= _NEAR
  return False


_NEAR = 0.25


def is_square(sight: Sight) -> bool:
  """X * x and x ** 2 are squares, however they were written."""
  eqn = sight.eqn
  if eqn.primitive.name == "integer_pow":
    return eqn.params["y"] == 2
  return eqn.primitive.name == "square" or (
    eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]
  )


def is_activation(sight: Sight) -> bool:
  """Whether weights alone multiply a square of what a layer gave, in bfloat16: of a `relu`, say.

  Anything else that reads a square sums it up, and float16 has no room for it.
  """
  of_layer = sight.is_narrow and not any(sight.are_float16)
  return of_layer and sight.result in sight.around.uses.weighted


def is_pooled(sight: Sight) -> bool:
  """Whether the largest of some values goes on into a layer, and is no seed of a softmax."""
  around, result = sight.around, sight.result
  is_multiplied = result in around.leading.multiplied or result in around.uses.only_multiplied
  return is_multiplied and result not in around.uses.subtracted


def ends_layer(sight: Sight) -> bool:
  """Whether a sum over a few devices adds up the parts of one matmul before another layer."""
  eqn, around = sight.eqn, sight.around
  return (
    len(eqn.invars) == 1
    and sight.is_narrow
    and (jaxprs.devices(eqn) or FEW + 1) <= FEW
    and sight.result in around.leading.multiplied
    and not around.is_output(sight.result)
    and _made_by_matmul(eqn.invars[0], around.frame)
  )


def _made_by_matmul(atom: Atom, frame: Frame) -> bool:
  """Whether a matmul made a value, seen through what moved it and the calls that it stands in."""
  source = frame.before(atom)
  made = frame.maker(source)
  if made is None:
    return False
  inside = frame.inside(made, source)
  return made.primitive.name in MATMULS or (
    bool(inside) and all(_made_by_matmul(*seen) for seen in inside)
  )


def multiplies_by_much(sight: Sight) -> bool:
  """Whether an operand of a product, or what a quotient divides by, is a number like 5000."""
  eqn, numbers = sight.eqn, sight.around.numbers
  is_product = eqn.primitive.name == "mul"
  known = [n for a in eqn.invars[not is_product :] for n in numbers.of(a) or () if np.isfinite(n)]
  return any(abs(n) >= MUCH if is_product else 0 < abs(n) <= 1 / MUCH for n in known)


MUCH = 2**12
"""A number by which nothing from 16 on is multiplied that is to stay in the range of float16."""


def picks_numbers(sight: Sight) -> bool:
  """Whether a gather takes single narrow numbers: the logits of the labels, in most losses.

  Read in float32, their cotangents meet those of the logsumexp before they round. Scores of an
  attention by relative positions are picked, too, about as many as there are; they lead into a
  matmul.
  """
  if not (set(sight.eqn.params["slice_sizes"]) <= {1} and is_narrow(sight.forms[0])):
    return False
  are_few = 2 * jaxprs.size(sight.result) < jaxprs.size(sight.eqn.invars[0])
  return are_few or sight.result not in sight.around.leading.multiplied


def fills_with_another(sight: Sight) -> bool:
  """Whether a gather gives a number for an index out of bounds that no format holds as it is."""
  fill = sight.eqn.params["fill_value"]
  is_number = fill is not None and jaxprs.is_float32(sight.result) and fill == fill
  return is_number and not sight.around.adapting.holds(fill)


def merges(sight: Sight) -> bool:
  """Whether a whole matrix of parameters is added to what matmuls made of parameters alone.

  Not a vector of them, which is a bias, nor one that is spread over a batch: queries that are
  learned are the first stream of a decoder.
  """
  eqn, around = sight.eqn, sight.around
  pairs = zip(eqn.invars, sight.forms, strict=True)
  matrices = [atom for atom, form in pairs if form == PARAM and len(jaxprs.shape(atom)) > 1]
  return (
    all(not isinstance(atom, Literal) and atom in around.sums.pure for atom in eqn.invars)
    and jaxprs.size(eqn.outvars[0]) in set(map(jaxprs.size, matrices))
    and not any(_was_spread(atom, around.frame.makers) for atom in matrices)
  )


def _was_spread(atom: Atom, makers: Mapping[Var, JaxprEqn]) -> bool:
  """Whether a value is larger than what it was moved or cast from."""
  while not isinstance(atom, Literal) and (made := makers.get(atom)) and len(made.invars) == 1:
    (before,) = made.invars
    if jaxprs.size(before) < jaxprs.size(atom):
      return True
    atom = before
  return False


def scales_parameter(sight: Sight) -> bool:
  """Whether a parameter of many numbers is multiplied or divided by a single one."""
  if sight.name not in SCALES or (size := jaxprs.size(sight.result)) == 1:
    return False
  pairs = zip(sight.eqn.invars, sight.forms, strict=True)
  return all(jaxprs.size(atom) == (size if form == PARAM else 1) for atom, form in pairs)


def looks_up_rows(sight: Sight) -> bool:
  """Whether a gather takes many rows of a parameter, which a matmul reads by and by: an embedding.

  They are cast after the lookup, so that the gradient of a row that is taken often sums up in
  float32; but they are cast, for a sum of embeddings is as large as any activation. One row, or
  rows of few numbers, are still a parameter: the positions of atoms and the corners of a mesh,
  whose differences are small beside them. So is whatever else no matmul reads.
  """
  eqn, (form, *_) = sight.eqn, sight.forms
  if sight.name != "gather" or form is None or form.kind is not Kind.PARAM:
    return False
  indices: Any = eqn.invars[1].aval
  row = jaxprs.size_of(eqn.params["slice_sizes"])
  return (
    jaxprs.size_of(indices.shape[:-1]) > 1
    and row > POINT
    and sight.result in sight.around.leading.multiplied
  )


POINT = 4
"""As many numbers as a point, a box or a rotation has."""
