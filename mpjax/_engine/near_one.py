"""Which values 16 bits would make 1 or 0, found before any equation is decided.

``log(sigmoid(x))``, ``1 - sigmoid(x)``, a gate that multiplies itself or what a long loop carries:
the sigmoid runs in float32, for in 16 bits it is 1 from an argument of 6 on, and 0.999 is 1 in
bfloat16. A hard sigmoid, ``clip((x + 3) / 6, 0, 1)``, is arithmetic that is cut off: all of that
runs in float32. The sigmoid may stand in another body than what needs it, as the gates
do that are computed for all steps at once before the loop that they rule. A gate that is computed
twice is needed as exactly at both places: the second may be what a derivative multiplies by.

A decay may be learned, or a number: in ``d * h + (1 - d) * u`` a parameter d is held in float32, so
that ``1 - d`` is exact, and would be cast where it multiplies: the two would add up to one no more,
and 0.99 would forget a sixth faster. Where what it multiplies recurs, the product is in float32.

So a jaxpr is read twice. Forwards, for what its values are made of: a `Role` each. Backwards, from
what needs a value exactly to the sigmoids that elementwise operations lead to it from. Bodies are
read with the roles of their operands and the needs of their results; a loop's carry is a fixed
point of both.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine import versions
from mpjax._engine.bodies import Body, bodies_of, repetitions, settled
from mpjax._engine.jaxprs import JaxprEqn, Literal, Var, sources
from mpjax._engine.kinds import keeps_its_distance
from mpjax._engine.loop_carries import terms_of
from mpjax._engine.recomputed import recomputed

Indices = frozenset[int]

_BOUNDS = frozenset({"max", "min", "clamp"})
_NEED = having(Trait.LOGARITHM | Trait.MULTIPLIES_UP)
_SATURATE = having(Trait.SATURATES)
_KEEP_NUMBERS = having(Trait.KEEPS_NUMBERS)
_KEEP_ONE = having(Trait.MOVES) | {"broadcast_in_dim", "convert_element_type"}
_PRODUCTS = _KEEP_NUMBERS | {"mul", "add"}  # what a recurrence makes of its gates
_RECUR = _KEEP_NUMBERS | having(Trait.ARITHMETIC)  # what it makes of its state
_ELEMENTWISE = frozenset({Rule.FOLLOW, Rule.RANGE, Rule.CONVERT})


class Exact(NamedTuple):
  """What of a jaxpr is needed exactly and may come near one: sigmoids, and sums with one.

  Attributes:
    values: The results of such equations.
    inside: The same of the bodies of equations, by the equation's identity; without those in
      which there are none.
  """

  values: frozenset[Var] = frozenset()
  inside: frozenset[tuple[int, tuple[Exact, ...]]] = frozenset()


class Needed(NamedTuple):
  """Which results of a jaxpr, or which of its operands, are needed exactly.

  Attributes:
    exact: Those that are.
    bounded: Those of them that only arithmetic and a bound lead on from, as ``x + 3`` in a hard
      sigmoid: what is lost of them is lost of it.
  """

  exact: Indices = frozenset()
  bounded: Indices = frozenset()


class Role(NamedTuple):
  """What a value is made of; by default nothing that matters here.

  A sigmoid is named by whatever tells it from the others of its jaxpr; so is a parameter that is
  subtracted from one, and a number near one by its value.

  Attributes:
    gates: The sigmoids that it is a moved piece of.
    products: The sigmoids that products and sums lead to it from, those among them.
    turns: How often loops hand on what arithmetic leads to it from; 0 if none do.
    is_one: Whether it is 1 everywhere.
    is_own: Whether it is a number near one, or made of nothing but parameters and numbers.
  """

  gates: frozenset[Any] = frozenset()
  products: frozenset[Any] = frozenset()
  turns: float = 0
  is_one: bool = False
  is_own: bool = False


Roles = tuple[Role, ...]
_NONE = Role()
_ONE = Role(is_one=True)
_OWN = Role(is_own=True)


class _Forward(NamedTuple):
  """The roles of a jaxpr's variables, and of the operands of each body of its equations."""

  roles: Mapping[Var, Role]
  inside: Mapping[int, tuple[Roles, ...]]
  dtypes: Collection[np.dtype]

  def of(self, atom: Any) -> Role:
    if not isinstance(atom, Literal):
      return self.roles.get(atom, _NONE)
    aval: Any = atom.aval  # that of a float0 or of a key is no number
    is_real = np.issubdtype(aval.dtype, np.floating) or np.issubdtype(aval.dtype, np.integer)
    if not is_real or not 0.5 < (value := float(atom.val)) < 2:
      return _NONE
    if value == 1:
      return _ONE
    if all(keeps_its_distance(value, dtype) for dtype in self.dtypes):
      return _NONE
    return Role(products=frozenset((value,)), is_own=True)


class NearOne:
  """Finds what is needed exactly in jaxprs; what is known of one is kept.

  Args:
    table: The rule of each primitive.
    dtypes: The 16-bit formats.
  """

  def __init__(self, table: Mapping[str, Rule], dtypes: Collection[np.dtype]) -> None:
    self._table, self._dtypes = table, dtypes
    self._most = min(map(terms_of, dtypes), default=float("inf"))
    self._subtracted: dict[Any, tuple[set[Any], Indices]] = {}
    self._forwards: dict[Any, _Forward] = {}
    self._leads: dict[Any, tuple[set[Any], Indices]] = {}
    self._backwards: dict[Any, tuple[Exact, Needed]] = {}

  def exact(self, jaxpr: Any, outs: Iterable[int] = (), parameters: Iterable[int] = ()) -> Exact:
    """The sigmoids from which elementwise operations lead to where 16 bits would be 1 or 0.

    Args:
      jaxpr: A closed or open jaxpr that nothing else is known of the operands of.
      outs: Which of its results are needed exactly.
      parameters: Which of its operands are parameters.
    """
    roles = [_NONE] * len(versions.open_jaxpr(jaxpr).invars)
    for n in self._from_one(jaxpr)[1].intersection(parameters):
      roles[n] = _OWN
    return self._backward(jaxpr, tuple(roles), Needed(frozenset(outs)), frozenset())[0]

  # First of all: which operands may be decays -----------------------------------------------------

  def _from_one(self, jaxpr: Any) -> tuple[set[Any], Indices]:
    """What is subtracted from one in a jaxpr, and which of its operands lead to such a value.

    Or multiplies what a loop carries in every turn.
    """
    key = id(jaxpr)
    if key not in self._subtracted:
      inner = versions.open_jaxpr(jaxpr)
      source, found = functools.cache(functools.partial(sources, inner, _KEEP_ONE)), set[Any]()
      for eqn in inner.eqns:
        if eqn.primitive.name == "sub" and _is_one(source()(eqn.invars[0])):
          found |= _variables(map(source(), eqn.invars[1:]))
        for body in bodies_of(eqn):
          operands = self._from_one(body.jaxpr)[1] | _multiplies_carry(body)
          found |= _variables(source()(eqn.invars[body.operands[n]]) for n in operands)
      leading = set(found)
      for eqn in reversed(inner.eqns) if found else ():
        leading |= set() if leading.isdisjoint(eqn.outvars) else _variables(eqn.invars)
      self._subtracted[key] = found, _places(inner.invars, leading)
    return self._subtracted[key]

  # Forwards: what values are made of ------------------------------------------------------------

  def _forward(self, jaxpr: Any, operands: Roles) -> _Forward:
    key = id(jaxpr), operands
    if key not in self._forwards:
      inner, (decays, _) = versions.open_jaxpr(jaxpr), self._from_one(jaxpr)
      pairs = zip(inner.invars, operands, strict=True)
      roles = {v: _decay(v, r) if v in decays else r for v, r in pairs if r != _NONE}
      found = _Forward(roles, inside := {}, self._dtypes)
      for eqn in inner.eqns:
        read = [found.of(atom) for atom in eqn.invars]
        if eqn.primitive.name in _SATURATE:
          made = [_gate(eqn)]
        elif bodies_of(eqn):
          inside[id(eqn)], made = self._through(eqn, read)
        elif read.count(_NONE) < len(read):
          made = [_derived(eqn, read)] * len(eqn.outvars)
        else:
          continue
        pairs = zip(eqn.outvars, made, strict=True)
        roles |= {v: _decay(v, r) if v in decays else r for v, r in pairs if r != _NONE}
      self._forwards[key] = found
    return self._forwards[key]

  def _results(self, jaxpr: Any, operands: Roles) -> list[Role]:
    forward = self._forward(jaxpr, operands)
    return [forward.of(atom) for atom in versions.open_jaxpr(jaxpr).outvars]

  def _through(self, eqn: JaxprEqn, read: Sequence[Role]) -> tuple[tuple[Roles, ...], list[Role]]:
    """The roles of the operands of an equation's bodies, and of its results."""
    is_own = any(role.is_own for role in read)
    held, sigmoids = _numbered(_with_numbers(eqn, read) if is_own else read)
    bodies = bodies_of(eqn)
    for body in bodies:
      if body.carry and not body.is_test:
        slices = body.operands[body.carry.stop :]  # of other numbers in every turn
        held = [_NONE if n in slices and r.is_own else r for n, r in enumerate(held)]
        held = self._carried(eqn, body, held)
    entering = tuple(tuple(body.take(held)) for body in bodies)
    turns, made = _joined(read).turns, []

    def outer(body: int, known: Any) -> Iterable[Any]:
      return sigmoids.get(known, (known,) if _is_number(known) else ((id(eqn), body, known),))

    for n, (body, operands) in enumerate(zip(bodies, entering, strict=True)):
      if not body.is_test:
        outs = self._results(body.jaxpr, operands)
        names = functools.partial(outer, n)
        outs = [_renamed(role._replace(turns=role.turns and turns), names) for role in outs]
        made.append(outs)
    return entering, [_joined(column) for column in zip(*made, strict=True)]

  def _carried(self, eqn: JaxprEqn, body: Body, held: Sequence[Role]) -> list[Role]:
    """The roles of a loop's operands in every turn."""
    turns, places = repetitions(eqn), [body.operands[n] for n in body.carry]
    operands = list(held)

    def started(place: int) -> Role:
      times = float("inf") if turns is None else turns
      return held[place]._replace(turns=times * max(1, held[place].turns))

    def turn(carry: Sequence[Role]) -> list[Role]:
      """What a turn makes is, in the next one, what the last made."""
      for place, role in zip(places, carry, strict=True):
        operands[place] = role
      made = self._results(body.jaxpr, tuple(body.take(operands)))[: len(places)]
      return [_renamed(role._replace(turns=0), last(n)) for n, role in enumerate(made)]

    def last(n: int) -> Callable[[Any], tuple[int]]:
      return lambda known: (known if isinstance(known, int) or _is_number(known) else -1 - n,)

    turn(settled([started(place) for place in places], turn, _joined))
    return operands

  # Backwards: what is needed exactly ------------------------------------------------------------

  def _leading(self, jaxpr: Any, recurring: Indices) -> tuple[set[Any], Indices]:
    """What arithmetic leads from to results that recur, in a jaxpr and among its operands."""
    key = id(jaxpr), recurring
    if key not in self._leads:
      inner = versions.open_jaxpr(jaxpr)
      found = _variables(inner.outvars[n] for n in recurring)
      for eqn in reversed(inner.eqns):
        read = []
        if bodies := bodies_of(eqn):
          for body, outs in zip(bodies, _recurring(eqn, bodies, found), strict=True):
            read += [eqn.invars[body.operands[n]] for n in self._leading(body.jaxpr, outs)[1]]
        elif eqn.primitive.name in _RECUR and not found.isdisjoint(eqn.outvars):
          read = eqn.invars
        found |= _variables(read)
      self._leads[key] = found, frozenset(n for n, v in enumerate(inner.invars) if v in found)
    return self._leads[key]

  def _backward(
    self, jaxpr: Any, operands: Roles, outs: Needed, recurring: Indices
  ) -> tuple[Exact, Needed]:
    """What is needed exactly in a jaxpr, and which of its operands are.

    Args:
      jaxpr: The jaxpr.
      operands: The roles of its operands.
      outs: Which of its results are needed exactly.
      recurring: Which of them a loop around it hands on, whatever is done to them before.
    """
    key = id(jaxpr), operands, outs, recurring
    if key not in self._backwards:
      inner, forward = versions.open_jaxpr(jaxpr), self._forward(jaxpr, operands)
      leading, _ = self._leading(jaxpr, recurring)
      found = _variables(inner.outvars[n] for n in outs.exact)
      near, forgetting = self._near_one(inner, forward, leading)
      found |= near
      bounded = _variables(inner.outvars[n] for n in outs.bounded)
      inside, gates = self._swept(inner, forward, leading, found, bounded)
      while (inside or gates & found) and (again := _computed_again(inner, found)):
        found |= again
        inside, gates = self._swept(inner, forward, leading, found, bounded)
      exact = Exact(frozenset(gates & found | forgetting), frozenset(inside.items()))
      places = (_places(inner.invars, variables) for variables in (found, bounded & found))
      self._backwards[key] = exact, Needed(*places)
    return self._backwards[key]

  def _swept(
    self,
    inner: Any,
    forward: _Forward,
    leading: Collection[Any],
    found: set[Any],
    bounded: set[Any],
  ) -> tuple[dict[int, tuple[Exact, ...]], set[Any]]:
    """Adds to what is needed exactly what leads to it; returns what of bodies is, and the gates."""
    inside, gates = {}, set()
    for eqn in reversed(inner.eqns):
      if id(eqn) in forward.inside:
        results = Needed(*(_places(eqn.outvars, variables) for variables in (found, bounded)))
        entering = forward.inside[id(eqn)]
        exact, needed = self._of_bodies(eqn, entering, results, leading)
        inside |= {id(eqn): exact} if any(map(any, exact)) else {}
        found |= _variables(eqn.invars[n] for n in needed.exact)
        bounded |= _variables(eqn.invars[n] for n in needed.bounded)
        continue
      if _is_bound(eqn, found) or _is_within(eqn, bounded):
        bounded |= _variables(eqn.invars)
        gates.add(eqn.outvars[0])
      elif _comes_near_one(eqn, forward):
        gates.add(eqn.outvars[0])
      found |= _variables(self._needed(eqn, found))
    return inside, gates

  def _needed(self, eqn: JaxprEqn, found: Set[Any]) -> Iterable[Any]:
    """The operands of an equation that are needed exactly, given which values are."""
    name = eqn.primitive.name
    if name in _NEED:
      return eqn.invars
    passes = not found.isdisjoint(eqn.outvars) and self._table.get(name) in _ELEMENTWISE
    return eqn.invars if passes else ()

  def _of_bodies(
    self, eqn: JaxprEqn, entering: Sequence[Roles], results: Needed, leading: Collection[Any]
  ) -> tuple[tuple[Exact, ...], Needed]:
    """What is needed exactly in an equation's bodies, and which of its operands are."""
    bodies = bodies_of(eqn)
    recurring = _recurring(eqn, bodies, leading)
    while True:
      found = [
        self._backward(body.jaxpr, roles, Needed() if body.is_test else results, again)
        for body, roles, again in zip(bodies, entering, recurring, strict=True)
      ]
      pairs = list(zip(bodies, found, strict=True))
      needed = Needed(
        frozenset(body.operands[n] for body, (_, operands) in pairs for n in operands.exact),
        frozenset(body.operands[n] for body, (_, operands) in pairs for n in operands.bounded),
      )
      carries = ((n, body.operands[c]) for body in bodies for n, c in enumerate(body.carry))
      grown = results.exact | {n for n, operand in carries if operand in needed.exact}
      if grown == results.exact:
        return tuple(exact for exact, _ in found), needed
      results = results._replace(exact=grown)

  def _near_one(
    self, inner: Any, forward: _Forward, leading: Collection[Any]
  ) -> tuple[set[Any], set[Any]]:
    """The gates that are subtracted from one, and what multiplies itself or a long loop's carry.

    And the products of decays with what they made.
    """
    found, forgetting = set(), set()
    readers = functools.cache(functools.partial(_readers, inner))
    for eqn in inner.eqns if forward.roles else ():
      if eqn.primitive.name not in ("sub", "mul"):
        continue
      pair = [(atom, forward.of(atom)) for atom in eqn.invars]
      for (atom, role), (_, other) in (pair, pair[::-1]):
        if eqn.primitive.name == "sub":
          near = other.is_one and role.gates and not _is_slope(eqn, atom, readers())
        else:
          recurs = other.turns > self._most and eqn.outvars[0] in leading
          again, decays = role.products & other.products, role.is_own != other.is_own
          forgetting.update(eqn.outvars if again and decays else ())
          near = recurs or (again and not decays)
        found |= _variables([atom]) if near else set()
    return found, forgetting


def _computed_again(inner: Any, found: set[Any]) -> set[Any]:
  """The variables that hold a value which is needed exactly, and are not known to."""
  same = (holding for holding in recomputed(inner) if not found.isdisjoint(holding))
  return set[Any]().union(*same) - found


def _variables(atoms: Iterable[Any]) -> set[Any]:
  return {atom for atom in atoms if not isinstance(atom, Literal)}


def _recurring(eqn: JaxprEqn, bodies: Sequence[Body], leading: Collection[Any]) -> list[Indices]:
  """Which results of each body recur: a loop's carry, and what leads on to what does outside."""
  outer = {n for n, var in enumerate(eqn.outvars) if var in leading}
  return [
    frozenset() if body.is_test else frozenset(outer | set(range(len(body.carry))))
    for body in bodies
  ]


def _places(variables: Iterable[Any], found: Collection[Any]) -> Indices:
  return frozenset(n for n, v in enumerate(variables) if not isinstance(v, Literal) and v in found)


def _is_bound(eqn: JaxprEqn, found: Collection[Any]) -> bool:
  """Whether an equation cuts off what is needed exactly: a hard sigmoid does."""
  return eqn.primitive.name in _BOUNDS and eqn.outvars[0] in found


def _is_within(eqn: JaxprEqn, bounded: Collection[Any]) -> bool:
  """Whether an equation is part of the arithmetic that a bound cuts off."""
  return eqn.primitive.name in _RECUR and eqn.outvars[0] in bounded


def _comes_near_one(eqn: JaxprEqn, forward: _Forward) -> bool:
  """Whether an equation is a sigmoid, or adds to one, as a decay ``1 - rate * x`` does."""
  if eqn.primitive.name in ("add", "sub"):
    return any(forward.of(atom).is_one for atom in eqn.invars)
  return eqn.primitive.name in _SATURATE


def _is_one(atom: Any) -> bool:
  return isinstance(atom, Literal) and bool(atom.val == 1)


def _multiplies_carry(body: Body) -> set[int]:
  """Which operands of a loop's body, the same in every turn, multiply what it carries."""
  inner, found = versions.open_jaxpr(body.jaxpr), set[int]()
  products = [e for e in inner.eqns if e.primitive.name == "mul"] if body.carry else []
  if products:
    source, own = sources(inner, _KEEP_ONE), inner.invars[: body.carry.stop]
    operands = {var: n for n, var in enumerate(own)}
    for eqn in products:
      places = [operands[v] for v in _variables(map(source, eqn.invars)) if v in operands]
      if any(n in body.carry for n in places):
        found.update(n for n in places if n < body.carry.start)
  return found


def _gate(eqn: JaxprEqn) -> Role:
  own = frozenset(eqn.outvars[:1])
  return Role(gates=own, products=own)


def _decay(var: Var, role: Role) -> Role:
  """The role of a value that is subtracted from one: a parameter has a name from then on."""
  if not role.is_own or role.gates:
    return role
  return role._replace(gates=frozenset((var,)), products=role.products | {var})


def _derived(eqn: JaxprEqn, read: Sequence[Role]) -> Role:
  """The role of an equation's results, from those of its operands."""
  name, role = eqn.primitive.name, _joined(read)
  keeps = name in _KEEP_NUMBERS
  is_own = any(r.is_own for r in read) and _joined(_with_numbers(eqn, read)).is_own
  return Role(
    gates=role.gates if keeps or is_own else frozenset(),
    products=role.products if name in _PRODUCTS or is_own else frozenset(),
    turns=role.turns if name in _RECUR else 0,
    is_one=name in _KEEP_ONE and all(r.is_one for r in read),
    is_own=is_own,
  )


def _with_numbers(eqn: JaxprEqn, read: Sequence[Role]) -> list[Role]:
  """The roles of an equation's operands, numbers being as a parameter is."""
  pairs = zip(eqn.invars, read, strict=True)
  return [_OWN if isinstance(atom, Literal) and role == _NONE else role for atom, role in pairs]


def _joined(roles: Iterable[Role]) -> Role:
  """The role of a value that is made of others, or is one of them; it is not known to be 1."""
  gates, products, turns, one, own = zip(_NONE, *roles, strict=True)
  is_own = any(own) and all(map(operator.or_, one[1:], own[1:]))
  return Role(frozenset().union(*gates), frozenset().union(*products), max(turns), is_own=is_own)


def _renamed(role: Role, names: Callable[[Any], Iterable[Any]]) -> Role:
  """A role whose sigmoids have other names, several or one each."""
  gates, products = (
    frozenset(name for known in part for name in names(known)) for part in role[:2]
  )
  return role._replace(gates=gates, products=products)


def _numbered(roles: Sequence[Role]) -> tuple[list[Role], dict[int, frozenset[Any]]]:
  """Roles whose sigmoids are numbered, those that occur in the same places as one; with names.

  So that a body is read once for all equations that use it alike.
  """
  places: dict[Any, list[tuple[int, bool]]] = {}
  for n, role in enumerate(roles):
    for known in itertools.filterfalse(_is_number, role.products):
      places.setdefault(known, []).append((n, known in role.gates))
  order = {place: n for n, place in enumerate(sorted(set(map(tuple, places.values()))))}
  numbers = {known: order[tuple(place)] for known, place in places.items()}
  names = {n: frozenset(k for k, m in numbers.items() if m == n) for n in order.values()}
  return [_renamed(role, lambda known: (numbers.get(known, known),)) for role in roles], names


def _is_number(known: Any) -> bool:
  """Whether it is a number near one, which is the same in every jaxpr, that has a name."""
  return isinstance(known, float)


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


def _is_slope(eqn: JaxprEqn, gate: Var, readers: Mapping[Any, Sequence[JaxprEqn | None]]) -> bool:
  """Whether ``1 - s`` only multiplies s: the derivative of a sigmoid or tanh, as JAX writes it.

  That of a tanh is ``g (1 - s) + (g (1 - s)) s`` in older versions: s multiplies a product.
  """

  def multiplies(user: JaxprEqn | None) -> bool:
    return user is not None and user.primitive.name == "mul" and gate in user.invars

  def leads_on(user: JaxprEqn | None) -> bool:
    if user is None or user.primitive.name != "mul":
      return False
    return multiplies(user) or any(map(multiplies, readers.get(user.outvars[0], [])))

  users = readers.get(eqn.outvars[0], [])
  return bool(users) and all(map(leads_on, users))
