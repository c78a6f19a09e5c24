"""What the values of a jaxpr are made of, where that matters near one: sigmoids, decays.

Read forwards, bodies with the roles of their operands; a loop's carry is a fixed point. `near_one`
reads the same jaxprs backwards, for what needs such values exactly.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.primitives import BOUNDS, KEEPS_NUMBERS, MATMULS, UNCHANGED, Trait, having
from mpjax._engine.analyses.contents import taken_of_pairs
from mpjax._engine.analyses.loop_carries import accumulates
from mpjax._engine.analyses.ranges import ANYWHERE, Range, hull, range_after, widened
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import HAVE_BODIES, Body, bodies_of, repetitions, settled
from mpjax._engine.program.jaxprs import kind, places_of, sources, variables_of
from mpjax._engine.program.kinds import keeps_its_distance
from mpjax._engine.program.matmuls import operation
from mpjax._engine.program.versions import AnyJaxpr, Atom, Jaxpr, JaxprEqn, Literal, Var

Indices = frozenset[int]

GATES = having(Trait.SATURATES | Trait.ONE_AT_ZERO)
"""What comes near one for many arguments, or for small ones."""

RECUR = KEEPS_NUMBERS | having(Trait.ARITHMETIC)
"""What a recurrence makes of its state, element by element."""

HAND_ON = RECUR | MATMULS | {"reduce_sum"}
"""What a recurrence makes of its state; of ``0.99 * (transitions @ values)`` both."""

POWERS = frozenset({"integer_pow", "square", "pow", "sqrt", "cbrt"})
"""Of a gate they are near one where it is."""

_OFTEN = 32
_FROM_ANYTHING = GATES | {"abs"}  # of which something is known whatever they are computed from
_PRODUCTS = KEEPS_NUMBERS | {"mul", "add", "neg"}  # what a recurrence makes of its gates


class Role(NamedTuple):
  """What a value is made of; by default nothing that matters here.

  A sigmoid is named by whatever tells it from the others of its jaxpr; so is a parameter that is
  subtracted from one, and a number near one by its value.

  Attributes:
    gates: The sigmoids that it is a moved piece of, or a power.
    products: The sigmoids that products and sums lead to it from, those among them.
    turns: How often loops hand on what arithmetic leads to it from; 0 if none do.
    is_own: Whether it is a number near one, or made of nothing but parameters and numbers.
    taken: Whether it is the first or the second of pairs, 0 or 1, as associative scans take them.
    range: Within which numbers it lies, as far as saturating functions, bounds and numbers tell.
  """

  gates: frozenset[Var] = frozenset()
  products: frozenset[Var] = frozenset()
  turns: float = 0
  is_own: bool = False
  taken: Indices = frozenset()
  range: Range = ANYWHERE

  @property
  def is_known(self) -> bool:
    """Whether it is made of nothing but parameters and numbers."""
    return self.is_own or self.range.is_number


Roles = tuple[Role, ...]
NONE = Role()
OWN = Role(is_own=True)


class Forward(NamedTuple):
  """The roles of a jaxpr's variables, and of the operands of each body of its equations."""

  roles: Mapping[Var, Role]
  inside: Mapping[int, tuple[Roles, ...]]
  dtypes: frozenset[np.dtype]

  def of(self, atom: Atom) -> Role:
    """The role of an operand."""
    if not isinstance(atom, Literal):
      return self.roles.get(atom, NONE)
    # That of a float0 or of a key is no number.
    if kind(atom) not in "fiu" or math.isnan(value := float(atom.val)):
      return NONE
    return _of_number(value, self.dtypes)


@functools.cache
def _of_number(value: float, dtypes: frozenset[np.dtype]) -> Role:
  """The role of a number, which has a name if 16 bits bring it nearer to one."""
  number = Role(range=Range(value, value))
  if value == 1 or not 0.5 < value < 2:
    return number
  if all(keeps_its_distance(value, dtype) for dtype in dtypes):
    return number
  return number._replace(products=frozenset((value,)), is_own=True)


class RoleFinder:
  """Finds the roles of the values of jaxprs; what is known of one is kept.

  Args:
    dtypes: The 16-bit formats.
  """

  def __init__(self, dtypes: frozenset[np.dtype]) -> None:
    self._dtypes = dtypes
    self._subtracted: dict[Any, tuple[set[Var], Indices]] = {}
    self._forwards: dict[Any, Forward] = {}
    self._loops = set[int]()  # the identities of equations

  # First of all: which operands may be decays -----------------------------------------------------

  def from_one(self, jaxpr: AnyJaxpr) -> tuple[set[Var], Indices]:
    """What is subtracted from one in a jaxpr, and which of its operands lead to such a value.

    Or multiplies what a loop carries in every turn, or one thing after the other.
    """
    key = id(jaxpr)
    if key not in self._subtracted:
      inner = versions.open_jaxpr(jaxpr)
      source = functools.cache(functools.partial(sources, inner, UNCHANGED))
      found = _multiplies_often(inner, source)
      for eqn in inner.eqns:
        if eqn.primitive.name == "sub" and _is_one(source()(eqn.invars[0])):
          found |= variables_of(map(source(), eqn.invars[1:]))
        for body in bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ():
          operands = self.from_one(body.jaxpr)[1] | _multiplies_carry(body)
          found |= variables_of(source()(eqn.invars[body.operands[n]]) for n in operands)
      leading = set(found)
      for eqn in reversed(inner.eqns) if found else ():
        leading |= set() if leading.isdisjoint(eqn.outvars) else variables_of(eqn.invars)
      self._subtracted[key] = found, places_of(inner.invars, leading)
    return self._subtracted[key]

  # Forwards: what values are made of ------------------------------------------------------------

  def forward(self, jaxpr: AnyJaxpr, operands: Roles) -> Forward:
    """The roles in a jaxpr, given those of its operands."""
    key = id(jaxpr), operands
    if key not in self._forwards:
      inner, (decays, _) = versions.open_jaxpr(jaxpr), self.from_one(jaxpr)
      pairs = zip(inner.invars, operands, strict=True)
      roles = {v: _decay(v, r) if v in decays else r for v, r in pairs if r != NONE}
      found = Forward(roles, inside := {}, self._dtypes)
      makers: dict[Var, JaxprEqn] = {}
      for eqn in inner.eqns:
        name = operation(eqn)
        read = [found.of(a) if isinstance(a, Literal) else roles.get(a, NONE) for a in eqn.invars]
        if name in HAVE_BODIES:
          inside[id(eqn)], made = self._through(eqn, read)
        elif eqn.outvars and (_begins(eqn, name) or read.count(NONE) < len(read)):
          role = _gate(eqn) if name in GATES else _derived(eqn, read)
          place = range_after(eqn, [r.range for r in read], makers, lambda a: found.of(a).range)
          made = [role._replace(range=place)] * len(eqn.outvars)
          makers[eqn.outvars[0]] = eqn
        else:
          continue
        pairs = zip(eqn.outvars, made, strict=True)
        roles |= {v: _decay(v, r) if v in decays else r for v, r in pairs if r != NONE}
      self._forwards[key] = found
    return self._forwards[key]

  def sigmoids(self, jaxpr: AnyJaxpr, operands: Roles) -> list[int]:
    """Which results are a sigmoid that no loop makes, scaled and shifted too; no product of two."""
    return [
      n
      for n, role in enumerate(self._results(jaxpr, operands))
      if len(role.products) == 1
      and not role.range.is_number
      and role.range.high < math.inf
      and not any(map(self._is_of_loop, role.products))
    ]

  def _is_of_loop(self, known: Any) -> bool:
    """Whether a sigmoid stands in the body of a loop, by its name."""
    while isinstance(known, tuple):
      eqn, _, known = known
      if eqn in self._loops:
        return True
    return False

  def _results(self, jaxpr: AnyJaxpr, operands: Roles) -> list[Role]:
    forward = self.forward(jaxpr, operands)
    return [forward.of(atom) for atom in versions.open_jaxpr(jaxpr).outvars]

  def _through(self, eqn: JaxprEqn, read: Sequence[Role]) -> tuple[tuple[Roles, ...], list[Role]]:
    """The roles of the operands of an equation's bodies, and of its results."""
    held, sigmoids = _numbered(read)
    bodies = bodies_of(eqn)
    for body in bodies:
      if body.carry and not body.is_test:
        slices = body.operands[body.carry.stop :]  # of other numbers in every turn, if not of one
        changes = [n in slices and r.is_own and not r.range.is_number for n, r in enumerate(held)]
        held = [NONE if other else r for r, other in zip(held, changes, strict=True)]
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
    self._loops.add(id(eqn))
    turns, places = repetitions(eqn), [body.operands[n] for n in body.carry]
    operands, added = list(held), accumulates(body.jaxpr, body.carry)
    # Nothing recurs of a token, nor of a cache but what else does that is written to it.
    recurs = [
      terms != 0 and kind(eqn.invars[place]) not in "biu"
      for terms, place in zip(added, places, strict=True)
    ]

    def started(place: int, recurs: bool) -> Role:
      times = float("inf") if turns is None else turns
      role = held[place]
      return role._replace(turns=times * max(1, role.turns)) if recurs else role

    def turn(carry: Sequence[Role]) -> list[Role]:
      """What a turn makes is, in the next one, what the last made."""
      for place, role in zip(places, carry, strict=True):
        operands[place] = role
      made = self._results(body.jaxpr, tuple(body.take(operands)))[: len(places)]
      made = [r._replace(turns=0) if own else r for r, own in zip(made, recurs, strict=True)]
      return [_renamed(role, last(n)) for n, role in enumerate(made)]

    def last(n: int) -> Callable[[Any], tuple[int]]:
      return lambda known: (known if isinstance(known, int) or _is_number(known) else -1 - n,)

    def in_every_turn(pair: tuple[Role, Role]) -> Role:
      return _joined(pair)._replace(range=widened(*(role.range for role in pair)))

    turn(settled([*map(started, places, recurs)], turn, in_every_turn))
    return operands


def _begins(eqn: JaxprEqn, name: str) -> bool:
  """Whether something is known of an equation's result, whatever is of its operands."""
  return name in _FROM_ANYTHING or bool(_taken(eqn, name))


def _taken(eqn: JaxprEqn, name: str) -> Indices:
  """Of which place in pairs an equation's result is, if it is a slice of such."""
  place = taken_of_pairs(eqn) if name == "slice" else None
  return frozenset(() if place is None else (place,))


def _is_one(atom: Atom) -> bool:
  return isinstance(atom, Literal) and bool(atom.val == 1)


def _multiplies_carry(body: Body) -> set[int]:
  """Which operands of a loop's body, the same in every turn, multiply what it carries."""
  inner, found = versions.open_jaxpr(body.jaxpr), set[int]()
  products = [e for e in inner.eqns if operation(e) == "mul"] if body.carry else []
  if products:
    source, own = sources(inner, UNCHANGED), inner.invars[: body.carry.stop]
    operands = {var: n for n, var in enumerate(own)}
    for eqn in products:
      places = [operands[v] for v in variables_of(map(source, eqn.invars)) if v in operands]
      if any(n in body.carry for n in places):
        found.update(n for n in places if n < body.carry.start)
  return found


def _multiplies_often(inner: Jaxpr, source: Callable[[], Callable[[Any], Any]]) -> set[Var]:
  """What multiplies more often than the scale of any stack of layers, and its derivatives, do."""
  likely = [eqn for eqn in inner.eqns if eqn.primitive.name in ("mul", "dot_general")]
  products = [eqn for eqn in likely if operation(eqn) == "mul"] if len(likely) > _OFTEN else []
  if len(products) <= _OFTEN:
    return set()
  factors = map(source(), (atom for eqn in products for atom in eqn.invars))
  times = Counter(atom for atom in factors if not isinstance(atom, Literal))
  return {var for var, count in times.items() if count > _OFTEN}


def _gate(eqn: JaxprEqn) -> Role:
  own = frozenset(eqn.outvars[:1])
  return Role(gates=own, products=own)


def _decay(var: Var, role: Role) -> Role:
  """The role of a value that is subtracted from one: a parameter has a name from then on."""
  if not role.is_own or role.gates:
    return role
  return role._replace(gates=frozenset((var,)), products=role.products | {var})


def _derived(eqn: JaxprEqn, read: Sequence[Role]) -> Role:
  """The role of an equation's results, from those of its operands; but for where they lie."""
  name = operation(eqn)
  taken = _taken(eqn, name)
  if not taken and all(role[:-1] == NONE[:-1] for role in read):
    return NONE
  role = _joined(read)
  keeps = name in KEEPS_NUMBERS or name in POWERS
  keeps = keeps or (name in BOUNDS and any(r.range.is_number for r in read))
  recurs = name in _PRODUCTS or (name == "sub" and not read[0].range.is_number)
  return Role(
    gates=role.gates if keeps or role.is_own else frozenset(),
    products=role.products if keeps or recurs or role.is_own else frozenset(),
    turns=role.turns if name in HAND_ON else 0,
    is_own=role.is_own,
    taken=taken or (role.taken if name in KEEPS_NUMBERS else taken),
  )


def _joined(roles: Iterable[Role]) -> Role:
  """The role of a value that is made of others, or is one of them."""
  roles = tuple(roles) or (NONE,)
  gates, products, turns, own, taken, ranges = zip(*roles, strict=True)
  is_own = any(own) and all(role.is_known for role in roles)
  found = frozenset().union(*gates), frozenset().union(*products)
  return Role(*found, max(turns), is_own, frozenset().union(*taken), hull(ranges))


def _renamed(role: Role, names: Callable[[Any], Iterable[Any]]) -> Role:
  """A role whose sigmoids have other names, several or one each."""
  gates, products = (
    frozenset(name for known in part for name in names(known))
    for part in (role.gates, role.products)
  )
  return role._replace(gates=gates, products=products)


def _numbered(roles: Sequence[Role]) -> tuple[list[Role], dict[int, frozenset[Var]]]:
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
