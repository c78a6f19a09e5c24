"""What is seen of a matmul when its rule is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import BFLOAT16, FLOAT16, is_of
from mpjax._core.primitives import ADDS, MATMULS, RULES, SCALES, UNCHANGED, Rule
from mpjax._engine.analyses.data_transforms import End
from mpjax._engine.analyses.made_of import depends_on_more_than_numbers, is_computed
from mpjax._engine.planning.sight import Sight
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.kinds import CONSTANT, DATA, PARAM, Kind, is_narrow
from mpjax._engine.program.versions import Literal


def is_amplified(sight: Sight) -> bool:
  """Whether what rounds in a matmul is many times as much where a linear system uses it.

  A layer before a linear system is a layer.
  """
  around = sight.around
  is_used = sight.result in around.leading.factored or sight.result in around.solutions.beside
  return is_used and PARAM not in sight.forms


def is_amplified_later(sight: Sight) -> bool:
  """Whether other matmuls multiply it before, and no parameter had part in what it multiplies."""
  is_later = sight.result in sight.around.leading.factored_later
  return is_later and not sight.has_narrow and not is_of_parameters(sight)


def is_of_data(sight: Sight) -> bool:
  """Whether it is so of an operand that is float32, or constant, or of parameters alone."""
  pure, read = sight.around.sums.pure, sight.eqn.invars
  return any(form is not None and form.kind in NOT_NARROW for form in sight.forms) or all(
    not isinstance(a, Literal) and a in pure for a in read
  )


NOT_NARROW = (Kind.DATA, Kind.CONSTANT)


def is_of_float32(sight: Sight) -> bool:
  """Whether its operands are float32 that was meant, or numbers: no layer's, and no parameters."""
  return sight.name in MATMULS and all(
    form is not None and form.kind in NOT_NARROW for form in sight.forms
  )


def leaves_range(sight: Sight) -> bool:
  """Whether a matmul multiplies squares of data, or what else may leave the range of float16.

  A power spectrum, times a bank of filters. What layers make, and first layers, are as by hand.
  """
  if sight.compute != FLOAT16 or not is_of_float32(sight) or is_of_parameters(sight):
    return False
  waiting, frame = list(sight.eqn.invars), sight.around.frame
  for _ in range(_LOOKS):
    made = frame.maker(waiting.pop()) if waiting else None
    if made is not None and RULES.get(made.primitive.name) is Rule.RANGE:
      return True
    if made is not None and made.primitive.name in _KEEPS_RANGE:
      waiting += made.invars
    if not waiting:
      return False
  return False


_KEEPS_RANGE = UNCHANGED | SCALES | ADDS | {"reduce_sum", "slice", "gather"}


_LOOKS = 32
"""How many equations behind an operand are looked at."""


def is_phase(sight: Sight) -> bool:
  """Whether a matmul of data is taken modulo a period, with what is trained if that has few terms.

  As random features of coordinates have, which stand among the parameters, and the first layer of
  a network of sines.
  """
  if sight.result not in sight.around.leading.phases or sight.has_narrow:
    return False
  if sight.name == "dot_general" and matmuls.terms(sight.eqn) <= matmuls.DIMENSIONS:
    return True
  return not sight.has_layer and not is_of_parameters(sight)


def is_of_parameters(sight: Sight) -> bool:
  """Whether an operand is made of a parameter."""
  return bool(sight.around.sums.of_parameters(sight.eqn.invars))


def is_quantized_layer(sight: Sight) -> bool:
  """Whether a parameter had part in a matmul of whole numbers, and 16 bits hold these.

  The weights are made of parameters, or frozen, of 8 bits. Digits that a layer gave are multiplied
  by the powers of their base, which are none.
  """
  sums, read = sight.around.sums, sight.eqn.invars
  made = sums.of_parameters(read)
  others = [atom for n, atom in enumerate(read) if n not in made]
  is_held = any(read[n] in sums.pure for n in made) or all(
    sight.around.holds_whole(sight.compute, atom) for atom in others
  )
  return bool(made) and is_held


def reads_solution(sight: Sight) -> bool:
  """Whether what a linear system or a decomposition gives is multiplied, and no layer's value.

  As ``inv(a) @ b``, ``(u * s) @ v``, or a gradient in the basis of its own (SOAP). Of parameters,
  or of random numbers that are to be some, only the last time: a layer may multiply what is made
  of its own.
  """
  around = sight.around
  solved, values, pure = around.made.solved, around.solutions.values, around.sums.pure
  if not (solved or values):  # as nearly always
    return False
  pairs = zip(sight.eqn.invars, sight.forms, strict=True)
  wide: list[Any] = [a for a, f in pairs if not (isinstance(a, Literal) or is_narrow(f))]
  read = [a for a in wide if a in solved or a in values]
  if not read or sight.has_narrow:
    return bool(read) and _belongs_to_system(sight, read)
  if any(a in pure and a not in read for a in wide):  # weights: a layer, of products of solutions
    read = [a for a in read if a in solved]
  is_layer = around.sums.origins.get if sight.place.has_cotangents else around.sums.may_be_weights
  of_data = [a for a in read if not is_layer(a)]
  if any(depends_on_more_than_numbers(a, around.frame.makers) for a in of_data):
    return True
  return bool(read) and sight.result not in around.leading.multiplied


def _belongs_to_system(sight: Sight, solutions: Sequence[Any]) -> bool:
  """Whether a layer's values and solutions are multiplied for a linear system, not for a layer.

  Whitened values are those of a layer. Few that are made of a large solution are not, nor is what
  other solutions are multiplied by behind it.
  """
  if any(not isinstance(a, Literal) and a in sight.around.sums.pure for a in sight.eqn.invars):
    return False
  few = FEWER * jaxprs.size(sight.result) <= max(map(jaxprs.size, solutions))
  return few or sight.result in sight.around.solutions.beside


def has_integer(sight: Sight) -> bool:
  """Whether a factor is an integer; how many rows each expert has, of `ragged_dot`, is none."""
  return any(is_of(atom.aval, jnp.integer) for atom in sight.eqn.invars[:2])


def is_of_quadratic_form(sight: Sight) -> bool:
  """Whether a matmul multiplies a matrix of data, and is multiplied by its other operand again.

  ``w @ S @ w`` is one sum of products, and so is each of many, or of the trace of ``w.T @ S @ w``.
  A bilinear layer has a parameter in its middle. What a network goes on from, as from the graph
  that it has pooled, is one of its layers.
  """
  if PARAM in sight.forms or all(map(is_narrow, sight.forms)):
    return False
  form = sight.around.uses.quadratic.get(sight.result)
  return form is not None and form not in sight.around.leading.multiplied and is_of_data(sight)


def is_weighted_sum(sight: Sight) -> bool:
  """Whether a matmul weighs terms with constants: a few, as a Runge-Kutta method does.

  Or any number of which an expectation is taken: what a head is of its features.
  """
  if sight.name != "dot_general" or not has_constant_weights(sight):
    return False
  return matmuls.terms(sight.eqn) <= SHORT or is_head(sight)


def has_constant_weights(sight: Sight) -> bool:
  """Whether a vector or small kernel that is multiplied depends on no argument.

  What a kernel is applied to may be a parameter, an image that is sought.
  """
  constant, is_kernel = sight.around.made.constant, sight.name == "conv_general_dilated"
  if not constant or sight.has_narrow or (PARAM in sight.forms and not is_kernel):
    return False
  return bool(jaxprs.places_of(matmuls.weights_of(sight.eqn), constant))


def is_fixed_transform(sight: Sight) -> bool:
  """Whether a matrix that the program computes of numbers is multiplied with data, or a vector.

  Or with an output, where its author asks for all digits, as `jax.image.resize` does.
  """
  if sight.name != "dot_general":
    return False
  sums, makers = sight.around.sums, sight.around.frame.makers
  pairs = list(zip(sight.eqn.invars, sight.forms, strict=True))
  for (matrix, _), (other, form) in (pairs, pairs[::-1]):
    if len(jaxprs.shape(matrix)) < 2 or isinstance(other, Literal) or sums.is_cotangent(matrix):
      continue
    if not is_computed(matrix, makers, sight.around.of_numbers):
      continue
    if not sight.has_narrow and len(jaxprs.shape(other)) == 1:
      return True
    is_given = not sight.has_narrow and not sums.of_parameters([other])
    is_precise = matmuls.asks_for_float32(sight.eqn)
    if form != PARAM and (is_given or (is_precise and is_of_output(sight))):
      return True
  return False


def is_asked_for(sight: Sight) -> bool:
  """Whether the author of a matmul asks for float32, and neither operand is a layer's.

  As for a permutation by a matrix, a rotation, a physical law; not of a network that is frozen. Who
  asks for all matmuls by JAX's default asks for those of layers, too, and chose a policy for them.
  """
  if not (matmuls.asks_for_float32(sight.eqn) and is_of_float32(sight)):
    return False
  around, read = sight.around, jaxprs.variables_of(sight.eqn.invars)
  if any(a in around.weights for a in read):
    return False
  layers = [a for a in read if around.sums.may_be_of_layers([a])]
  if layers:
    return all(a in around.streams_of_data for a in layers)
  return around.data_transforms.end_of(sight.eqn) not in (End.LAYER, End.NORM)


def is_of_output(sight: Sight) -> bool:
  """Whether no layer comes after a matmul, in the forward pass of a whole function."""
  return not sight.place.has_cotangents and sight.around.is_output(sight.result)


def is_of_few_outputs(sight: Sight) -> bool:
  """Whether a matmul multiplies small matrices of layers, in float32, and none comes after.

  As the gradient of a deformation does for a strain.
  """
  if not is_of_float32(sight) or not matmuls.is_of_few(sight.eqn):
    return False
  sums, read = sight.around.sums, sight.eqn.invars
  are_of_layers = all(sums.may_be_of_layers([a]) and a not in sums.pure for a in read)
  return are_of_layers and is_of_output(sight)


def transforms_data(sight: Sight) -> bool:
  """Whether data are multiplied by a matrix that is data, for what no frozen network does.

  Nothing in the matrix is of parameters; what it multiplies may be: a state that a network moves.
  """
  around, read = sight.around, sight.eqn.invars
  made = around.sums.of_parameters(read)
  if not is_of_float32(sight) or sight.place.has_cotangents or len(made) == len(read):
    return False
  if any(not isinstance(a, Literal) and a in around.weights for a in read):
    return False
  end = around.data_transforms.end_of(sight.eqn)
  if end in (End.NORM, End.JOINED):  # of labels and returns, in a loss
    return sight.result not in around.leading.multiplied
  return end is End.DIFFERENCE


def weighs_given(sight: Sight) -> bool:
  """Whether what a layer gave weighs data, or they it, each number of one once, for a difference.

  ``f(z) @ dx`` is ``(f(z) * dx).sum(-1)``: the state of a loop moves by it, or 293 kelvin are taken
  away from it. What a layer goes on from is narrow, as a mean over what a mask leaves; so are
  scores that are returned.
  """
  if sight.name != "dot_general" or not sight.has_narrow or sight.place.has_cotangents:
    return False
  if DATA not in sight.forms:
    return False
  n, around = sight.forms.index(DATA), sight.around
  _, (batch, _) = sight.eqn.params["dimension_numbers"]
  vectors = matmuls.vector_places(sight.eqn)
  if n not in vectors and not (batch and vectors):  # a matrix of no batch may be weights
    return False
  data = sight.eqn.invars[n]
  states = {var for var in around.carried if jaxprs.is_float32(var)}
  is_handed_on = any(var in states for var, _ in jaxprs.behind(data, around.frame.makers))
  if is_handed_on or not around.data_transforms.is_given(data):
    return False
  return around.data_transforms.end_of_sum(sight.eqn, states) is End.DIFFERENCE


def is_centering(sight: Sight) -> bool:
  """Whether a matmul takes means away, by ``eye(n) - 1 / n``: its rows add up to nothing."""
  if sight.name != "dot_general":
    return False
  for atom, form in zip(sight.eqn.invars, sight.forms, strict=True):
    numbers = sight.around.numbers.of(atom) if form == CONSTANT else None
    shape = jaxprs.shape(atom)
    if numbers and len(numbers) == len(shape) == 2 and shape[0] == shape[1]:
      others, own = sorted(numbers)
      return abs(own + (jaxprs.size_of(shape[:1]) - 1) * others) < 1e-3 * own
  return False


SHORT = 16
"""As many terms as a weighted sum may have that another matmul multiplies."""


def is_hidden(sight: Sight) -> bool:
  """Whether a result leads nowhere but into other matmuls."""
  leading = sight.around.leading
  return sight.result in leading.multiplied and sight.result not in leading.returned


def is_head(sight: Sight) -> bool:
  """Whether a matmul makes little of much, and what is returned or no other matmul multiplies.

  Not in a loop to a tolerance that a user's rule differentiates, as an adaptive solver's: a
  backward pass that takes its steps again must accept the same, and what it makes leads elsewhere.
  """
  is_taken_again = sight.around.is_to_tolerance and sight.around.has_rule
  if is_taken_again or is_hidden(sight) or sight.place.has_cotangents:
    return False
  read = [a for a, form in zip(sight.eqn.invars, sight.forms, strict=True) if form != PARAM]
  return FEWER * jaxprs.size(sight.result) <= max(map(jaxprs.size, read), default=0)


def weighs_data(sight: Sight) -> bool:
  """Whether a matmul multiplies data, by no weights of a layer: by those that one gave, say.

  Data that are compared with a query, which a layer gave, give scores.
  """
  sums, frame, read = sight.around.sums, sight.around.frame, sight.eqn.invars
  pairs = zip(read, sight.forms, strict=True)
  data = [atom for atom, form in pairs if form is not None and form.kind is Kind.DATA]
  is_score = sight.has_layer and sight.result in sight.around.uses.scores
  if is_score or len(sums.of_parameters(data)) == len(data):
    return False
  scaled = [eqn for eqn in map(frame.maker, read) if eqn and eqn.primitive.name in SCALES]
  weights = jaxprs.variables_of([*read, *(a for eqn in scaled for a in eqn.invars)])
  return not any(var in sums.pure for var in weights)


FEWER = 8
"""Predictions of which there are this many times fewer than features cost nothing in float32."""


def is_layer_of_one(sight: Sight) -> bool:
  """Whether a hidden layer has one input: what it makes is narrow, though the input did not round.

  But phases, and what drives a system that a loop integrates.
  """
  if sight.name not in MATMULS or not is_hidden(sight):
    return False
  pairs = [*zip(sight.eqn.invars, sight.forms, strict=True)]
  has_weights = any(form == PARAM and len(jaxprs.shape(atom)) > 1 for atom, form in pairs)
  is_of_input = any(form is not None and form.kind is Kind.DATA for _, form in pairs)
  leading, recurrence = sight.around.leading, sight.around.recurrence
  return has_weights and is_of_input and sight.result not in {*leading.phases, *recurrence.leads}


def foreign_format(sight: Sight) -> np.dtype | None:
  """The 16-bit format that its author gave one operand of a matmul whose other is float32."""
  eqn, forms = sight.eqn, sight.forms
  operands: Any = zip(eqn.invars, forms, strict=True)
  formats = {atom.aval.dtype for atom, form in operands if form is None}
  return formats.pop() if any(forms) and len(formats) == 1 and formats <= _NARROW else None


def has_foreign_float(sight: Sight) -> bool:
  """Whether a matmul mixes float32 with another float than 16 bits, or makes a float64 of it."""
  eqn, forms = sight.eqn, sight.forms
  result: Any = sight.result.aval
  operands: Any = zip(eqn.invars, forms, strict=True)
  dtypes = {a.aval.dtype for a, f in operands if f is None}
  if any(forms) and result.dtype == np.float64:
    return True
  return any(jnp.issubdtype(d, np.inexact) for d in dtypes - _NARROW)


_NARROW = {BFLOAT16, FLOAT16}
