"""What later equations of a jaxpr need of earlier ones, found before any is decided.

Two needs are read backwards from where they arise:

``exact``  ``log(sigmoid(x))``, ``1 - sigmoid(x)``, a gate that multiplies itself or what a long
           loop carries: the sigmoid runs in float32, for in 16 bits it is 1 from an argument of 6
           on, and 0.999 is 1 in bfloat16.
``summed`` ``w - rate * (x.T @ error)``: the matmul returns the float32 that it adds up in, since
           its result is added to the parameter that it came from, or is the gradient of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine import jaxprs, versions
from mpjax._engine.bodies import Body, bodies_of
from mpjax._engine.jaxprs import JaxprEqn, Literal, Var

Indices = tuple[int, ...]

_MULTIPLY_UP = having(Trait.MULTIPLIES_UP)
_LOGARITHMS = having(Trait.LOGARITHM)
_KEEP_NUMBERS = having(Trait.KEEPS_NUMBERS)
_PRODUCTS = _KEEP_NUMBERS | {"mul", "add"}  # what a recurrence makes of its gates
_SATURATE = having(Trait.SATURATES)
_FUNCTIONS = having(Trait.JIT | Trait.REMAT | Trait.INLINE)
_ELEMENTWISE = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CONVERT})
# What a gradient passes on its way to where it is added up.
_PASSED = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CONVERT, Rule.EACH, Rule.FULL})


class Needs:
  """What is asked of the values of jaxprs; what is known of one is kept.

  Args:
    table: The rule of each primitive.
  """

  def __init__(self, table: Mapping[str, Rule]) -> None:
    self._table = table
    self._exact: dict[Any, frozenset[Any]] = {}
    self._gates: dict[int, bool] = {}

  # Exact values ---------------------------------------------------------------------------------

  def exact(
    self, jaxpr: Any, outs: Indices = (), carried: Indices = (), gates: Indices = ()
  ) -> frozenset[Any]:
    """The variables from which elementwise operations lead to where 16 bits would be 1 or 0.

    Args:
      jaxpr: A closed or open jaxpr.
      outs: Which of its results are needed exactly.
      carried: Which of its operands a long loop carries.
      gates: Which of its operands are gates that its caller made.
    """
    key = id(jaxpr), outs, carried, gates
    if key not in self._exact:
      inner = versions.open_jaxpr(jaxpr)
      found = {inner.outvars[n] for n in outs if not isinstance(inner.outvars[n], Literal)}
      made = self._gates_of(inner, gates)
      state = _moved(inner, {inner.invars[n]: {inner.invars[n]} for n in carried})
      found |= _near_one(inner, made, state)
      for eqn in reversed(inner.eqns):
        needed = self._needed(eqn, found, made, state)
        found.update(a for a in needed if not isinstance(a, Literal))
      self._exact[key] = frozenset(found)
    return self._exact[key]

  def _needed(
    self, eqn: JaxprEqn, found: set[Any], gates: Collection[Any], state: Collection[Any]
  ) -> Iterable[Any]:
    """The operands of an equation that are needed exactly, given which of its results are."""
    name = eqn.primitive.name
    if name in _LOGARITHMS or name in _MULTIPLY_UP:
      return eqn.invars
    if name in _FUNCTIONS or name == "custom_vjp_call":
      (body,) = bodies_of(eqn) or (None,)
      return () if body is None else self._needed_by(body, eqn, found, gates, state)
    passes = self._table.get(name) in _ELEMENTWISE and not found.isdisjoint(eqn.outvars)
    return eqn.invars if passes else ()

  def _needed_by(
    self,
    body: Body,
    eqn: JaxprEqn,
    found: set[Any],
    gates: Collection[Any],
    state: Collection[Any],
  ) -> Iterable[Any]:
    operands = body.take(eqn.invars)
    outs = tuple(n for n, var in enumerate(eqn.outvars) if var in found)
    needed = self.exact(body.jaxpr, outs, _places(operands, state), _places(operands, gates))
    pairs = zip(versions.open_jaxpr(body.jaxpr).invars, operands, strict=True)
    return [atom for var, atom in pairs if var in needed]

  def _gates_of(self, inner: Any, given: Indices = ()) -> dict[Any, set[Any]]:
    """The variables that are moved pieces of a sigmoid, with those that they are pieces of."""
    made = {inner.invars[n]: {inner.invars[n]} for n in given}
    made |= {
      eqn.outvars[0]: {eqn.outvars[0]}
      for eqn in inner.eqns
      if eqn.primitive.name in _SATURATE or self._saturates(eqn)
    }
    return _moved(inner, made) if made else {}

  def _saturates(self, eqn: JaxprEqn) -> bool:
    """Whether an equation calls a function whose one result is a moved sigmoid."""
    if eqn.primitive.name not in _FUNCTIONS or len(eqn.outvars) != 1:
      return False
    jaxpr = bodies_of(eqn)[0].jaxpr
    if id(jaxpr) not in self._gates:
      inner = versions.open_jaxpr(jaxpr)
      self._gates[id(jaxpr)] = inner.outvars[0] in self._gates_of(inner)
    return self._gates[id(jaxpr)]

  # Sums -----------------------------------------------------------------------------------------

  def summed(
    self,
    inner: Any,
    parameters: Indices,
    kin: Sequence[int],
    outs: Indices,
    is_backward: Callable[[JaxprEqn], bool],
  ) -> Sums:
    """The updates of parameters in a jaxpr, and the matmuls whose results are added up.

    Args:
      inner: An open jaxpr.
      parameters: Which of its operands are parameters.
      kin: For each operand from which parameters it was computed: a bit for each of them; none
        where nothing is known.
      outs: Which of its results are gradients if they come out of a backward pass.
      is_backward: Whether an equation came from transposing.
    """
    origins = dict(zip(inner.invars, kin or [0] * len(inner.invars), strict=True))
    pure: dict[Any, int] = {}
    for n in parameters:
      pure[inner.invars[n]] = origins[inner.invars[n]] = 1 << n
    updates: dict[Any, Any] = {}
    for eqn in inner.eqns:
      read = [a for a in eqn.invars if not isinstance(a, Literal)]
      origin = _BORN if is_backward(eqn) else 0
      for atom in read:
        origin |= origins.get(atom, 0)
      for var in eqn.outvars:
        origins[var] = origin
      if read and all(atom in pure for atom in read):
        pure |= dict.fromkeys(eqn.outvars, origin & ~_BORN)
      elif eqn.primitive.name in ("add", "sub", "add_any") and len(read) == 2:
        updates |= _updates(eqn, read, pure, origins, inner.invars)
    return Sums(pure, origins, frozenset(updates), self._leading(inner, updates, outs))

  def _leading(self, inner: Any, updates: Mapping[Any, Any], outs: Indices) -> dict[Any, bool]:
    """The variables that are added up by and by, with whether in an update: else in a result."""
    results = [inner.outvars[n] for n in outs if n < len(inner.outvars)]
    found = {var: False for var in results if not isinstance(var, Literal)}
    found |= dict.fromkeys(updates.values(), True)
    for eqn in reversed(inner.eqns):
      leads = [found[var] for var in eqn.outvars if var in found]
      if leads and self._table.get(eqn.primitive.name) in _PASSED:
        for atom in eqn.invars:
          if not isinstance(atom, Literal):
            found[atom] = found.get(atom, False) or any(leads)
    return found


class Sums(NamedTuple):
  """What of a jaxpr is added up.

  Attributes:
    pure: What is made of parameters alone, each with a bit for each of these.
    origins: From which parameters each variable was computed; `_BORN` if in a backward pass.
    updates: The results of adding to a parameter what was computed from it.
    leading: The variables that are added up by and by, with whether in an update.
  """

  pure: Mapping[Any, int]
  origins: Mapping[Any, int]
  updates: frozenset[Any]
  leading: Mapping[Any, bool]

  def is_sum(self, eqn: JaxprEqn) -> bool:
    """Whether a matmul makes what is added to a parameter, or is the gradient of one."""
    (result,) = eqn.outvars
    if result not in self.leading or any(a in self.pure for a in eqn.invars):
      return False
    return self.leading[result] or bool(self.origins[result] & _BORN)

  def kin(self, atoms: Sequence[Any]) -> tuple[int, ...]:
    """For each operand of a body from which of its parameters it was computed; none if from none.

    A parameter is one by its place among the operands.
    """
    known = [0 if isinstance(a, Literal) else self.origins.get(a, 0) for a in atoms]
    own = [0 if isinstance(a, Literal) else self.pure.get(a, 0) for a in atoms]
    related = tuple(
      (origin & _BORN) | sum(1 << n for n, bits in enumerate(own) if bits & origin)
      for origin in known
    )
    mixed = (kin for kin, bits in zip(related, own, strict=True) if not bits)
    return related if any(mixed) else ()


_BORN = 1 << 4096
"""The bit of what was computed in a backward pass; the others are those of parameters."""


def _updates(
  eqn: JaxprEqn, read: list[Any], pure: Mapping[Any, int], origins: Any, invars: Sequence[Any]
) -> dict[Any, Any]:
  """The result of an equation that adds to a whole parameter what was computed from it."""
  for target, change in (read, read[::-1]):
    bits = pure.get(target, 0)
    related = origins.get(change, 0) & (bits | _BORN)
    grows = jaxprs.size(target) != jaxprs.size(eqn.outvars[0])
    if bits and change not in pure and related and not grows and _is_whole(target, bits, invars):
      return {eqn.outvars[0]: change}
  return {}


def _is_whole(var: Var, bits: int, invars: Sequence[Any]) -> bool:
  """Whether a value made of parameters is as large as one of them: no bias, spread over a batch."""
  sizes = (jaxprs.size(v) for n, v in enumerate(invars) if bits >> n & 1)
  return jaxprs.size(var) in sizes


def _readers(inner: Any) -> dict[Any, list[JaxprEqn | None]]:
  readers: dict[Any, list[JaxprEqn | None]] = {}
  for eqn in inner.eqns:
    for atom in eqn.invars:
      if not isinstance(atom, Literal):
        readers.setdefault(atom, []).append(eqn)
  for atom in inner.outvars:
    if not isinstance(atom, Literal):
      readers.setdefault(atom, []).append(None)
  return readers


def _moved(inner: Any, sources: Mapping[Any, set[Any]]) -> dict[Any, set[Any]]:
  """The variables that are moved pieces of others, with those that they are pieces of."""
  return _derived(inner, sources, _KEEP_NUMBERS)


def _derived(
  inner: Any, sources: Mapping[Any, set[Any]], through: Collection[str]
) -> dict[Any, set[Any]]:
  """The variables to which some primitives alone lead from others, with these others."""
  pieces = dict(sources)
  for eqn in inner.eqns:
    found = [pieces[a] for a in eqn.invars if not isinstance(a, Literal) and a in pieces]
    if found and eqn.primitive.name in through:
      for var in eqn.outvars:
        pieces[var] = pieces.get(var, set()).union(*found)
  return pieces


def _places(atoms: Sequence[Any], among: Collection[Any]) -> Indices:
  return tuple(n for n, a in enumerate(atoms) if not isinstance(a, Literal) and a in among)


def _near_one(inner: Any, gates: Mapping[Any, set[Any]], state: Mapping[Any, set[Any]]) -> set[Any]:
  """The gates that are subtracted from one, and what multiplies itself or a long loop's carry."""
  if not gates and not state:
    return set()
  readers = _readers(inner)
  products = _derived(inner, gates, _PRODUCTS)
  found: set[Any] = set()
  for eqn in inner.eqns:
    read = [a for a in eqn.invars if not isinstance(a, Literal)]
    if eqn.primitive.name == "sub":
      if len(read) == 1 and read[0] in gates and _is_one(eqn) and not _is_slope(eqn, readers):
        found.update(read)
    elif eqn.primitive.name == "mul" and len(read) == 2:
      first, second = read
      if not products.get(first, set()).isdisjoint(products.get(second, ())):
        found.update(read)
      found.update(a for a, other in ((first, second), (second, first)) if other in state)
  return found


def _is_one(eqn: JaxprEqn) -> bool:
  """Whether a subtraction has a 1 in it."""
  return any(isinstance(a, Literal) and a.val == 1 for a in eqn.invars)


def _is_slope(eqn: JaxprEqn, readers: Mapping[Any, list[JaxprEqn | None]]) -> bool:
  """Whether ``1 - s`` only multiplies s: the derivative of a sigmoid or tanh, as JAX writes it.

  That of a tanh is ``g (1 - s) + (g (1 - s)) s`` in older versions: s multiplies a product.
  """
  (gate,) = (a for a in eqn.invars if not isinstance(a, Literal))

  def multiplies(user: JaxprEqn | None) -> bool:
    return user is not None and user.primitive.name == "mul" and gate in user.invars

  def leads_on(user: JaxprEqn | None) -> bool:
    if user is None or user.primitive.name != "mul":
      return False
    return multiplies(user) or any(map(multiplies, readers.get(user.outvars[0], [])))

  users = readers.get(eqn.outvars[0], [])
  return bool(users) and all(map(leads_on, users))
