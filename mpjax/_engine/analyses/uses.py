"""What all that reads a value does with it: its uses, found backwards in one jaxpr.

`lookahead` follows a value to where one of its ways ends, in bodies and outside. Here the question
is what is made of it by everything that reads it, or next; most jaxprs are never asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mpjax._core.primitives import (
  ADDS,
  BOUNDS,
  FUNCTIONS,
  JITTED,
  MATMULS,
  SCALES,
  UNCHANGED,
  Trait,
  having,
)
from mpjax._engine.analyses.contents import Contents
from mpjax._engine.analyses.frames import Frame
from mpjax._engine.analyses.lookahead import LOGARITHMS, MOVES
from mpjax._engine.analyses.origins import handed_on
from mpjax._engine.analyses.recomputed import same_values
from mpjax._engine.program import jaxprs
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var


class Uses:
  """How the values of one jaxpr are used.

  Args:
    frame: The jaxpr.
    contents: Tells what functions do that are called.
    is_layer: Whether a matmul has weights that are trained.
    may_be_layer: Whether it has some that may be, as those of a network that is given.
    is_rounding: Whether a policy below float32 governs an equation.
    is_whole: Whether it is the whole function, and no body.
  """

  def __init__(
    self,
    frame: Frame,
    contents: Contents,
    is_layer: Callable[[JaxprEqn], bool],
    may_be_layer: Callable[[JaxprEqn], bool],
    is_rounding: Callable[[JaxprEqn], bool],
    *,
    is_whole: bool,
  ) -> None:
    self._frame, self._inner, self._is_whole = frame, frame.inner, is_whole
    self._contents, self._is_layer, self._may_be_layer = contents, is_layer, may_be_layer
    self._is_rounding = is_rounding

  @functools.cached_property
  def totaled(self) -> Collection[Var]:
    """The variables of which a sum, a root or a logarithm is taken.

    Moved, with another sign, as a multiple, or with something added to it: ``(a * b).sum()``,
    ``sqrt(a * a + b * b + 1e-6)``.
    """
    found = set[Var]()
    for eqn in reversed(self._inner.eqns):
      name = eqn.primitive.name
      if name in _TOTALS or (name in _STAYS_A_TERM and not found.isdisjoint(eqn.outvars)):
        found |= variables_of(eqn.invars)
      elif name in SCALES and not found.isdisjoint(eqn.outvars):
        factors = variables_of(eqn.invars)
        found |= factors if len(factors) < len(eqn.invars) else set()  # by a number
    return found

  @functools.cached_property
  def summed(self) -> Collection[Var]:
    """The variables of which sums are taken and nothing else, moved before, or as a multiple."""
    found, read = set[Var](), variables_of(self._inner.outvars)
    for eqn in reversed(self._inner.eqns):
      name, variables = eqn.primitive.name, variables_of(eqn.invars)
      is_multiple = name in SCALES and len(variables) < len(eqn.invars)
      leads_on = name in _STAYS_ALONE or is_multiple
      if name == "reduce_sum" or (leads_on and not found.isdisjoint(eqn.outvars)):
        found |= variables
      else:
        read |= variables
    return found - read

  @functools.cached_property
  def subtracted(self) -> Collection[Var]:
    """The variables that are subtracted or divided by, or are exponents, or multiples of which are.

    As the largest of some scores is subtracted from these. What a jaxpr returns may be so outside.
    """
    return self._read_by(_TAKES_AWAY, variables_of(self._inner.outvars))

  @functools.cached_property
  def scores(self) -> Collection[Var]:
    """The variables that are exponents or put in order, or multiples of which are."""
    return self._read_by(_ORDERS, set())

  def _read_by(self, names: frozenset[str], found: set[Var]) -> set[Var]:
    """What some primitives read last, and some variables; moved, chosen, added, scaled before."""
    for eqn in reversed(self._inner.eqns):
      name, bodies = eqn.primitive.name, bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ()
      leads_on = (name in _LEADS_ON or bodies) and not found.isdisjoint(eqn.outvars)
      if leads_on or any(self._contents.any_of(names, body.jaxpr) for body in bodies):
        found |= variables_of(eqn.invars)
      elif name in names:
        found |= variables_of(eqn.invars[-1:])
    return found

  @functools.cached_property
  def only_multiplied(self) -> Collection[Var]:
    """What nothing but matmuls read."""
    return self._read_by_matmuls(lambda matmul: True, _STAYS_WEIGHTED)

  @functools.cached_property
  def weighted(self) -> Collection[Var]:
    """What nothing but layers read, after it was added to or put beside other values, too."""
    return self._read_by_matmuls(self._is_layer, _LEADS_TO_LAYERS)

  @functools.cached_property
  def before_layers(self) -> Collection[Var]:
    """What leads into a layer, whatever is made of it before; what a body returns may do so."""
    return self.before(
      self._is_layer, set() if self._is_whole else variables_of(self._inner.outvars)
    )

  def before(self, is_one: Callable[[JaxprEqn], bool], found: Collection[Var]) -> Collection[Var]:
    """What leads into matmuls of a kind, or functions with such, or to some variables.

    Args:
      is_one: Whether a matmul, or what holds one, is of the kind.
      found: Those variables.
    """
    found = {*found}
    for eqn in reversed(self._inner.eqns):
      name = eqn.primitive.name
      if self._frame.is_backward(eqn):
        continue
      bodies = bodies_of(eqn) if name in HAVE_BODIES else ()
      multiplies = name in MATMULS or any(self._contents.matmuls(b.jaxpr) for b in bodies)
      if not found.isdisjoint(eqn.outvars) or (multiplies and is_one(eqn)):
        found |= variables_of(eqn.invars)
    return found

  @functools.cached_property
  def activated(self) -> Collection[Var]:
    """What nothing but layers read in the forward pass that round it, or an activation of it."""
    return self._read_by_rounding(_LEADS_TO_LAYERS | _ACTIVATES, self._is_layer)

  @functools.cached_property
  def activated_alone(self) -> Collection[Var]:
    """The same of what nothing is added to or multiplied by on the way: no larger, no smaller."""
    return self._read_by_rounding((_LEADS_TO_LAYERS | _ACTIVATES) - ADDS - SCALES, self._is_layer)

  @functools.cached_property
  def moved_to_layers(self) -> Collection[Var]:
    """What nothing but layers read that round it, be their weights trained or given."""
    return self._read_by_rounding(_LEADS_TO_LAYERS - ADDS - SCALES, self._may_be_layer)

  def _read_by_rounding(
    self, leading: frozenset[str], is_layer: Callable[[JaxprEqn], bool]
  ) -> Collection[Var]:
    """What is led on by some primitives, or by activations, to nothing but layers that round it."""

    def leads_on(eqn: JaxprEqn) -> bool:
      if eqn.primitive.name not in FUNCTIONS:
        return eqn.primitive.name in leading
      return self._contents.primitives(bodies_of(eqn)[0].jaxpr) <= _ACTIVATIONS

    is_one = lambda matmul: is_layer(matmul) and self._is_rounding(matmul)  # noqa: E731
    forward = [eqn for eqn in self._inner.eqns if not self._frame.is_backward(eqn)]
    divisors = variables_of(e.invars[1] for e in forward if e.primitive.name == "div")
    return self._read_only_by(is_one, leads_on, forward, divisors)

  def is_activation(self, call: JaxprEqn) -> bool:
    """Whether a function that is called is an activation."""
    held = self._contents.primitives(bodies_of(call)[0].jaxpr)
    return held <= _ACTIVATIONS and not held.isdisjoint(_BENDS)

  def _read_by_matmuls(
    self, is_one: Callable[[JaxprEqn], bool], leading: frozenset[str]
  ) -> Collection[Var]:
    """What is led on by some primitives, or by functions of these, to nothing but some matmuls."""

    def leads_on(eqn: JaxprEqn) -> bool:
      if eqn.primitive.name not in JITTED:
        return eqn.primitive.name in leading
      return self._contents.primitives(bodies_of(eqn)[0].jaxpr) <= leading

    return self._read_only_by(is_one, leads_on, self._inner.eqns, set())

  def _read_only_by(
    self,
    is_one: Callable[[JaxprEqn], bool],
    leads_on: Callable[[JaxprEqn], bool],
    eqns: Sequence[JaxprEqn],
    others: set[Var],
  ) -> Collection[Var]:
    """What some equations lead on to nothing but some matmuls, and is not among others."""
    others, made = others | variables_of(self._inner.outvars), set[Var]()
    for eqn in reversed(eqns):
      is_end = eqn.primitive.name in MATMULS and is_one(eqn)
      if not is_end and not (leads_on(eqn) and others.isdisjoint(eqn.outvars)):
        others |= variables_of(eqn.invars)
      made |= {*eqn.outvars}
    return frozenset(made - others)

  @functools.cached_property
  def taken_back(self) -> Collection[Var]:
    """Sums and differences with a value that the next one takes away again: ``z + (q - z)``."""
    return {var for before in self.restoring.values() for var in before.outvars}

  @functools.cached_property
  def restoring(self) -> Mapping[Var, JaxprEqn]:
    """These next ones, by what they make, each with the sum of which it leaves a part."""
    found, made = dict[Var, JaxprEqn](), dict[Any, JaxprEqn]()  # the sums behind values
    for eqn in self._inner.eqns:
      name = eqn.primitive.name
      if name not in _LEADS_TO_SUMS:  # most
        continue
      known = {n: made[a] for n, a in enumerate(eqn.invars) if isinstance(a, Var) and a in made}
      if name in ADDS:
        for place, before in known.items():
          is_pair = "sub" in (name, before.primitive.name)
          if is_pair and self._cancels(eqn, place, before):
            found[eqn.outvars[0]] = before
        made[eqn.outvars[0]] = eqn
      elif known:
        for atom in _as_it_is(eqn):
          made |= dict.fromkeys(eqn.outvars, made[atom]) if atom in made else {}
    return found

  def _cancels(self, eqn: JaxprEqn, place: int, made: JaxprEqn) -> bool:
    """Whether nothing is left of a sum's other operand in it, since the one at a place has it."""
    other, *inside = map(self._before, [eqn.invars[1 - place], *made.invars])
    signs = (_sign(made, n) for n, atom in enumerate(inside) if self._is_same(atom, other))
    return _sign(eqn, 1 - place) + _sign(eqn, place) * sum(signs) == 0

  def _is_same(self, first: Any, second: Any) -> bool:
    """Whether two operands are one value, or computed alike."""
    if isinstance(first, Literal) or isinstance(second, Literal):
      return False
    if first is second or not self._are_alike(first, second):
      return first is second
    return self._numbered[first] == self._numbered[second]

  def _are_alike(self, first: Var, second: Var) -> bool:
    """Whether two values may be one, as far as their types and their equations tell."""
    made = [self._frame.maker(var) for var in (first, second)]
    names = {eqn and eqn.primitive.name for eqn in made}
    return None not in names and len(names) == 1 and first.aval == second.aval

  @functools.cached_property
  def _numbered(self) -> Mapping[Var, int]:
    return same_values(self._inner)

  def _before(self, atom: Any) -> Any:
    """What an operand was before it was moved, held from derivatives, or multiplied by one."""
    return self._frame.back(atom, _as_it_is)[-1]

  @functools.cached_property
  def quadratic(self) -> Mapping[Any, Var]:
    """The matmuls of ``x.T @ a @ x``, and of its diagonal, ``((x.T @ a) * x.T).sum(1)``.

    With what they are for. None of a layer, whose a is its weights, nor of powers of one x. A
    vector may be the parameter itself.
    """
    found, of = dict[Any, Var](), functools.cache(lambda: jaxprs.sources(self._inner, MOVES))
    for eqn in self._inner.eqns:
      name = eqn.primitive.name
      if name != "dot_general" and not (name == "mul" and eqn.outvars[0] in self.summed):
        continue
      for product, factor in (eqn.invars, eqn.invars[::-1]):
        made = self._frame.maker(self._frame.back(product, handed_on)[-1])
        if made is None or made.primitive.name != "dot_general":
          continue
        if len(jaxprs.shape(made.outvars[0])) > 1 and self._is_layer(made):
          continue
        if [self._is_same(of()(factor), of()(atom)) for atom in made.invars].count(True) == 1:
          found[made.outvars[0]] = eqn.outvars[0]
          if name == "dot_general":
            found[eqn.outvars[0]] = eqn.outvars[0]
    return found


def _as_it_is(eqn: JaxprEqn) -> list[Atom]:
  """What an equation hands on as it is; none if it does something else."""
  name = eqn.primitive.name
  if name in _AS_IT_IS:
    return eqn.invars[:1]
  ones = [isinstance(a, Literal) and not jaxprs.shape(a) and a.val == 1 for a in eqn.invars]
  return [eqn.invars[1 - ones.index(True)]] if name == "mul" and True in ones else []


def _sign(eqn: JaxprEqn, place: int) -> int:
  """With which sign a sum or difference takes an operand."""
  return -1 if place == 1 and eqn.primitive.name == "sub" else 1


_AS_IT_IS = MOVES | {"stop_gradient"}
_LEADS_TO_SUMS = _AS_IT_IS | ADDS | {"mul"}
_TAKES_AWAY = frozenset({"sub", "div", "neg", "exp", "exp2", "rsqrt"})
_ORDERS = frozenset({"exp", "exp2", "argmax", "argmin", "top_k", "sort", "reduce_max"})
_LEADS_ON = (
  having(Trait.KEEPS_NUMBERS)
  | {"max", "min", "reduce_max", "reduce_min", "scatter-max", "scatter-min"}
  | SCALES
  | ADDS
)
_STAYS_WEIGHTED = UNCHANGED | SCALES | {"select_n", "neg", "convert_element_type"}
_LEADS_TO_LAYERS = _STAYS_WEIGHTED | {"add", "concatenate", "pad", "slice"}
_ACTIVATES = BOUNDS | {"tanh", "logistic", "erf"}
_ACTIVATIONS = (
  _LEADS_TO_LAYERS
  | _ACTIVATES
  | FUNCTIONS
  | having(Trait.ARITHMETIC)
  | {"erfc", "atan", "exp", "expm1", "integer_pow", "square"}
) - ADDS
"""What functions hold that are activations, or lead to one; they take no 300 away before."""
_BENDS = _ACTIVATES | {"erfc", "atan", "expm1", "select_n"}
"""By what they are known."""
_STAYS_ALONE = MOVES | {"neg", "convert_element_type"}
_TOTALS = LOGARITHMS.ends | {"reduce_sum", "sqrt", "rsqrt"}
_STAYS_A_TERM = MOVES | {"neg", "add", "sub", "convert_element_type"}
