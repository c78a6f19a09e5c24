"""What of a jaxpr is added up: changes of parameters, and gradients.

``w - rate * (x.T @ error)``: the matmul returns the float32 that it adds up in, since its result is
added to the parameter that it came from, or is the gradient of one. A bias that comes twice,
``b + tanh(b + y @ w) @ v``, is no such parameter: what is added to it is a product by another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import JITTED, MATMULS, UNCHANGED
from mpjax._engine.analyses.lookahead import Needs
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import HAVE_BODIES, Body, bodies_of, settled
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.kinds import PARAM, Forms
from mpjax._engine.program.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var

Indices = tuple[int, ...]


class Summing(NamedTuple):
  """What the equation that holds a jaxpr knows of sums, by index.

  Attributes:
    parameters: Which operands are parameters, or began as such before a loop.
    origins: For each operand what it was computed from, as `Sums.origins` has it; None for a whole
      function, in which every matrix of parameters is a layer.
    gradients: Which results are gradients, if they come out of a backward pass.
    given_back: Which results are a state among the parameters that the function returns.
  """

  parameters: Indices = ()
  origins: Indices | None = None
  gradients: Indices = ()
  given_back: Indices = ()

  def every_turn(self, body: Body, others: Collection[int]) -> Summing:
    """The same for a loop's body, of which this is known in the first turn.

    Args:
      body: The body.
      others: Which parameters among its operands are no weights of a layer; and what is float32.
    """
    carry, origins = body.carry, self.origins or ()
    own = [bool(bits & _LAYER) and n not in others for n, bits in enumerate(origins)]
    found = [bool(bits & _OUTSIDE) for bits in origins]
    if any(found):
      found[carry.start : carry.stop] = [True] * len(carry)

    def turn(carried: Sequence[bool]) -> Sequence[bool]:
      own[carry.start : carry.stop] = carried
      return jaxprs.depending(body.jaxpr, own)

    if any(own):
      settled(own[carry.start : carry.stop], turn, any)
    pairs = zip(found, own, strict=True)
    return self._replace(origins=tuple([_OUTSIDE * of + _LAYER * layer for of, layer in pairs]))

  @property
  def of_parameters(self) -> frozenset[int]:
    """Which operands were computed from a parameter at all, or are one."""
    return frozenset([n for n, bits in enumerate(self.origins or ()) if bits & _OUTSIDE])


def sums_in(
  inner: Jaxpr, known: Summing, is_backward: Callable[[JaxprEqn], bool], needs: Needs
) -> Sums:
  """The updates of parameters in a jaxpr, and the matmuls whose results are added up.

  Args:
    inner: An open jaxpr.
    known: What is known of its operands and results.
    is_backward: Whether an equation came from transposing.
    needs: Tells where values lead.
  """
  outside = [0] * len(inner.invars) if known.origins is None else known.origins
  origins = dict(zip(inner.invars, outside, strict=True))
  pure: dict[Any, int] = {}
  for n in known.parameters:
    var = inner.invars[n]
    is_layer = is_matrix(var) if known.origins is None else outside[n] & _LAYER
    pure[var], origins[var] = 1 << n, 1 << n | (_LAYER if is_layer else 0)
  updates: dict[Any, Any] = {}
  others: dict[Any, Any] = {}
  stack, born, products = None, 0, set[Any]()
  for eqn in inner.eqns:
    read = [a for a in eqn.invars if not isinstance(a, Literal)]
    if eqn.source_info.name_stack is not stack:  # many that follow each other share one
      stack, born = eqn.source_info.name_stack, _BORN if is_backward(eqn) else 0
    origin = born
    for atom in read:
      origin |= origins.get(atom, 0)
    for var in eqn.outvars:
      origins[var] = origin
    if read and pure.keys() >= {*read}:
      pure |= dict.fromkeys(eqn.outvars, origin & ~(_BORN | _LAYER))
    elif eqn.primitive.name in _PRODUCTS:
      of = pure if eqn.primitive.name in MATMULS else products
      products.update(eqn.outvars if any(atom in of for atom in read) else ())
    elif eqn.primitive.name in _STEPS and len(read) == 2:
      for target, change in (read, read[::-1]):
        if _adds_to(eqn, target, pure, inner.invars) and change not in pure:
          is_bias = eqn.primitive.name == "add" and change in products and is_vector(target)
          related = origins.get(change, 0) & (pure[target] | _BORN)
          whole = related and _is_whole(target, pure[target], inner.invars)
          (updates if whole and not is_bias else others)[eqn.outvars[0]] = change
  given_back = known.given_back
  states = _leading(needs, inner, {}, given_back, through_calls=True) if given_back else {}
  updates |= {var: change for var, change in others.items() if var in states}
  leading = _leading(needs, inner, updates, known.gradients)
  return Sums(pure, origins, frozenset(updates), leading, states)


def _leading(
  needs: Needs,
  inner: Jaxpr,
  updates: Mapping[Any, Any],
  outs: Indices,
  *,
  through_calls: bool = False,
) -> dict[Any, bool]:
  """The variables that are added up by and by, with whether in an update: else in a result."""
  results = [inner.outvars[n] for n in outs if n < len(inner.outvars)]
  found = {var: False for var in results if not isinstance(var, Literal)}
  found |= dict.fromkeys(updates.values(), True)
  for eqn in reversed(inner.eqns):
    leads = [found[var] for var in eqn.outvars if var in found]
    read = eqn.invars if leads and needs.passes(eqn.primitive.name) else []
    if leads and through_calls and eqn.primitive.name in JITTED:
      results = jaxprs.places_of(eqn.outvars, found)
      read = [eqn.invars[n] for n in needs.before(eqn, results)]
    for atom in read:
      if not isinstance(atom, Literal):
        found[atom] = found.get(atom, False) or any(leads)
  return found


class Sums(NamedTuple):
  """What of a jaxpr is added up.

  Attributes:
    pure: What is made of parameters alone, each with a bit for each of these.
    origins: From which parameters each variable was computed, 0 if from none; `_BORN` if in a
      backward pass, `_OUTSIDE` if from one that is no operand, `_LAYER` if from a matrix.
    updates: The results of adding to a parameter what was computed from it, or of adding anything
      to one that is given back.
    leading: The variables that are added up by and by, with whether in an update.
    given_back: The variables that lead to a state among the parameters that is returned.
  """

  pure: Mapping[Var, int]
  origins: Mapping[Var, int]
  updates: frozenset[Var]
  leading: Mapping[Any, bool]
  given_back: Collection[Var]

  def is_sum(self, eqn: JaxprEqn) -> bool:
    """Whether a matmul makes what is added to a parameter, or is the gradient of one."""
    (result,) = eqn.outvars
    operands = [a for a in eqn.invars if not isinstance(a, Literal)]
    if result not in self.leading or any(a in self.pure for a in operands):
      return False
    return self.leading[result] or bool(self.origins[result] & _BORN)

  def entering(self, eqn: JaxprEqn, body: Body, forms: Forms) -> Summing:
    """What a body that runs once knows, whose operands are held so."""
    atoms = body.take(eqn.invars)
    return Summing(
      tuple(n for n, form in enumerate(forms) if form == PARAM),
      self.within(atoms),
      jaxprs.ordered_places(eqn.outvars, self.leading),
      jaxprs.ordered_places(eqn.outvars, self.given_back),
    )

  def of_parameters(self, atoms: Sequence[Atom]) -> frozenset[int]:
    """Which operands were computed from a parameter, or are one; not what is a gradient of data."""
    return frozenset([n for n, bits in enumerate(self.origins_of(atoms)) if bits & ~_BORN])

  def may_be_of_layers(self, atoms: Sequence[Atom]) -> bool:
    """Whether an operand is a matrix of parameters, or was computed from one."""
    return any(bits & _LAYER for bits in self.origins_of(atoms))

  def is_cotangent(self, atom: Atom) -> bool:
    """Whether a value was computed in a backward pass."""
    return not isinstance(atom, Literal) and bool(self.origins.get(atom, 0) & _BORN)

  def weights(self, inner: Jaxpr) -> Collection[Var]:
    """What is made of parameters alone, and what gradient steps make of that."""
    if not self.updates:  # as nearly always
      return self.pure
    found = {*self.pure}
    for eqn in inner.eqns:
      if variables_of(eqn.invars).isdisjoint(found):
        continue
      is_step = not self.updates.isdisjoint(eqn.outvars) or any(map(self.is_cotangent, eqn.invars))
      if eqn.primitive.name in UNCHANGED or (eqn.primitive.name in _STEPS and is_step):
        found.update(eqn.outvars)
    return found

  def may_be_weights(self, var: Var) -> bool:
    """Whether a value was computed from a parameter, and from no gradient."""
    bits = self.origins.get(var, 0)
    return bool(bits) and not bits & _BORN

  def origins_of(self, atoms: Sequence[Atom]) -> list[int]:
    """From which parameters some operands were computed."""
    return [0 if isinstance(a, Literal) else self.origins.get(a, 0) for a in atoms]

  def within(self, atoms: Sequence[Atom]) -> tuple[int, ...]:
    """The same of the operands of a body, as it is told there.

    A parameter is one by its place among the operands; all that are not among them are one bit.
    Where no operand mixes any, which is which is left out: equal bodies are planned once.
    """
    known = self.origins_of(atoms)
    own = [0 if isinstance(a, Literal) else self.pure.get(a, 0) for a in atoms]
    bits_of = [(n, bits) for n, bits in enumerate(own) if bits]
    related = [
      (origin & _BORN) | sum([1 << n for n, bits in bits_of if bits & origin]) for origin in known
    ]
    mixed = [kin for kin, bits in zip(related, own, strict=True) if kin and not bits]
    if not mixed:
      related = [0] * len(known)
    pairs = zip(related, known, strict=True)
    return tuple(
      [kin | (_OUTSIDE if bits & ~_BORN else 0) | (bits & _LAYER) for kin, bits in pairs]
    )


_STEPS = frozenset({"add", "sub", "add_any"})
_PRODUCTS = MATMULS | UNCHANGED
"""What multiplies by a parameter, and what moves that."""
_BORN = 1 << 4096
"""The bit of what was computed in a backward pass; the others are those of parameters."""
_OUTSIDE = 1 << 4097
"""The bit of what was computed from a parameter that is no operand of the jaxpr."""
_LAYER = 1 << 4098
"""The bit of a matrix of parameters, and of what was computed from one."""


def multiplied(
  jaxpr: AnyJaxpr, matrices: Collection[int], given: Collection[int], carry: range
) -> frozenset[int]:
  """Which of a loop's operands are multiplied as the weights of a layer are.

  Moved, sliced or cast. One that each turn has of its own, multiplied with what is given, is none
  where what the loop carries is, too: ``a @ x + b @ u`` of a system that controls u drive.

  Args:
    jaxpr: The body.
    matrices: Which operands may be such weights.
    given: Which are the same in every turn.
    carry: Which the loop hands on.
  """
  inner, found = versions.open_jaxpr(jaxpr), set[int]()
  carried, driving, is_system = {inner.invars[n] for n in carry}, set[int](), False
  of = {inner.invars[n]: n for n in matrices}
  same = {*inner.constvars, *(inner.invars[n] for n in given)}
  for eqn in inner.eqns if of else ():
    name, read = eqn.primitive.name, variables_of(eqn.invars)
    mine = [a for a in read if a in of]
    if name in MATMULS:
      is_given = not read.isdisjoint(same - of.keys())
      is_system = is_system or (is_given and not read.isdisjoint(carried - of.keys()))
      drives = is_given and any(a not in same for a in mine)
      (driving if drives else found).update(of[a] for a in mine if is_matrix(a))
    elif name in HAVE_BODIES and mine:
      for body in bodies_of(eqn):
        taken = body.take(eqn.invars)
        places = [n for n, a in enumerate(taken) if a in mine]
        fixed = [n for n in jaxprs.places_of(taken, same) if n not in body.carry]
        weights = multiplied(body.jaxpr, places, fixed, range(0))
        found |= {of[var] for n in weights for var in mine if var is taken[n]}
    elif name in _STAYS and not isinstance(first := eqn.invars[0], Literal):
      of |= dict.fromkeys(eqn.outvars, of[first]) if first in of else {}
      same |= {*eqn.outvars} if read <= same else set()
      carried |= {*eqn.outvars} if first in carried else set()
  return frozenset(found if is_system else found | driving)


_STAYS = UNCHANGED | {"slice", "dynamic_slice", "gather"}


def is_matrix(var: Var) -> bool:
  """Whether a variable has two dimensions or more, as the weights of a layer have."""
  return len(jaxprs.shape(var)) > 1


def is_vector(var: Atom) -> bool:
  """Whether at most one dimension of a variable is longer than one, as a bias has it."""
  return jaxprs.size(var) in (1, *jaxprs.shape(var))


def _adds_to(eqn: JaxprEqn, var: Any, pure: Mapping[Var, int], invars: Sequence[Any]) -> bool:
  """Whether an equation adds to a parameter, or to a part of one: no bias, spread over a batch."""
  bits, size = pure.get(var, 0), jaxprs.size(eqn.outvars[0])
  return bool(bits) and jaxprs.size(var) == size <= max(_sizes(bits, invars), default=0)


def _is_whole(var: Var, bits: int, invars: Sequence[Any]) -> bool:
  """Whether a value made of parameters is as large as one of them."""
  return jaxprs.size(var) in _sizes(bits, invars)


def _sizes(bits: int, invars: Sequence[Any]) -> set[int]:
  """The sizes of the parameters that these bits stand for."""
  return {jaxprs.size(v) for n, v in enumerate(invars) if bits >> n & 1}
