"""What an equation shows of loops: what decides their ends, and what recurs in them."""

from __future__ import annotations

from mpjax._engine.planning.matmul_sight import NOT_NARROW, is_of_float32
from mpjax._engine.planning.sight import Sight
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.kinds import DATA, is_data, is_narrow
from mpjax._engine.program.versions import Atom, Literal


def decides_an_end(sight: Sight) -> bool:
  """Whether a matmul multiplies what was computed, in float32, in a loop to a tolerance."""
  if not (sight.around.is_to_tolerance and is_of_float32(sight)):
    return False
  return all(map(sight.around.iterations.was_made, sight.eqn.invars))


def seeks_of_features(sight: Sight) -> bool:
  """Whether a matmul multiplies what a loop without layers seeks by what layers gave before it.

  A head that is fitted to features, to a tolerance.
  """
  around = sight.around
  if not around.features:
    return False
  pairs = zip(sight.eqn.invars, sight.forms, strict=True)
  others = [pair for pair in pairs if not (is_narrow(pair[1]) and around.is_feature(pair[0]))]
  return 0 < len(others) < len(sight.forms) and all(
    form is not None and form.kind in NOT_NARROW and around.iterations.was_made(atom)
    for atom, form in others
  )


def iterates(sight: Sight) -> bool:
  """Whether a computed matrix is multiplied by a vector, as it is by others or in a loop.

  Or a matrix that a loop carries by a vector, if no layer made that: the keys of a fast weight
  programmer. What was given may be the frozen layer of a network, and its one example. Those of a
  batch are kept for the backward pass, in 16 bits, as what the experts of a router say. The state
  of a filter, of a few numbers, is one that recurs, whatever vector it is multiplied by. Few
  numbers that no layer had part in, as the stages of a solver, need not recur.
  """
  around, carried, known = sight.around, sight.around.carried, sight.around.iterations
  for vector, matrix in matmuls.vectors(sight.eqn):
    if not isinstance(matrix, Literal) and matrix in carried:
      return not around.sums.may_be_of_layers([vector])
    if not known.was_made(matrix):
      continue
    are_few = matmuls.is_of_few(sight.eqn)
    if are_few and not around.sums.may_be_of_layers([vector, matrix]):
      return True
    if known.was_made(vector):
      recurs = known.depends_on_carry(vector) or (are_few and known.depends_on_carry(matrix))
      return recurs or known.multiplies_vectors(matrix)
  return False


def hands_on(sight: Sight) -> bool:
  """Whether a long loop's next turn has what it carries from a matmul; no weights of a layer.

  What it carries may come of rewards that a layer gave, where the matrix does not, or is float32.

  Or whether that multiplies two values that the loop carries, and no layer made; or makes, of
  nothing that the loop carries, what each turn adds, where no layer is. Or reads a few numbers that
  the loop carries where that solves a linear system of them, as filters and regulators do.
  """
  found = sight.around.recurrence
  if not found.linear or sight.place.has_cotangents:
    return False
  if found.solves and not sight.has_narrow and matmuls.is_of_few(sight.eqn):
    return bool(jaxprs.places_of(sight.eqn.invars, found.linear))
  read = [a for a in sight.eqn.invars if not isinstance(a, Literal) and a in found.linear]
  by = ([matrix] for vector, matrix in matmuls.vectors(sight.eqn) if [vector] == read)
  others = next(by, sight.eqn.invars)
  has_layer = sight.has_narrow or sight.around.sums.may_be_of_layers(others)
  has_layer = has_layer and not (len(read) == 1 and _is_moved_by_data(sight, read[0]))
  if not found.is_long(has_layer=has_layer):
    return False
  trained = [a for a in read if a in sight.around.sums.pure]
  if len(read) > 1:
    return all(map(is_data, sight.forms)) and not trained
  if not read or sight.result not in found.leads:
    depends = jaxprs.places_of(sight.eqn.invars, found.reads)
    return not (has_layer or depends) and sight.result in found.leads
  is_state = jaxprs.size(read[0]) == jaxprs.size(sight.result) and not sight.has_narrow
  return is_state or not trained


def _is_moved_by_data(sight: Sight, vector: Atom) -> bool:
  """Whether a vector, or one of each of a batch, is multiplied by a matrix that float32 holds."""
  places = matmuls.vector_places(sight.eqn)
  return any(sight.eqn.invars[n] is vector and sight.forms[1 - n] == DATA for n in places)


def multiplies_neighbors(sight: Sight) -> bool:
  """Whether a matmul multiplies every other entry of values, as an associative scan writes it.

  One of which float32 holds.
  """
  skipped = sight.around.made.skipped
  if not skipped or sight.name != "dot_general" or all(map(is_narrow, sight.forms)):
    return False
  return all(not isinstance(a, Literal) and a in skipped for a in sight.eqn.invars)
