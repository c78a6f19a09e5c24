"""Sums that step: a small number of times what was computed from a value, added to that value.

``y + 0.002 * f(y)``, an Euler step, a relaxation, an average that follows: 16 bits round each step
by up to a 512th of y in bfloat16, which is all of it, so that y never moves, however few steps
there are. The number may stand anywhere in a product: ``y + dt * y * (1 - y)``. A step against the
gradient that a backward pass made of y is one whatever the rate, for gradients of means are small,
and all become so. Nor is anything of h left in ``5 + 0.001 * h`` beside the number. A residual of
``h + f(h)``, or one with a learned scale, takes no small steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import ADDS, MATMULS, SCALES, UNCHANGED, Trait, having
from mpjax._engine.analyses.constants import numbers_of, only
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import HAVE_BODIES, bodies_of
from mpjax._engine.program.matmuls import terms
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

SMALL = 1 / 31.5
"""Numbers below it are small, as a 32nd. The cube in a gelu has 0.0447, residuals of large models
0.1."""

_KEEPS_SIZE = UNCHANGED | {"neg"}
_KEEPS_NUMBER = frozenset({"convert_element_type", "broadcast_in_dim"})
_PRODUCTS = _KEEPS_SIZE | SCALES
_PIECES = frozenset({"slice", "dynamic_slice", "gather", "split", "unstack"})
_CHOICES = frozenset(
  {"select_n", "max", "min", "clamp", "concatenate", "dynamic_update_slice", "scatter"}
)
_LINEAR_AT_ZERO = having(Trait.LINEAR_AT_ZERO)
_ROUNDS = frozenset({"round", "floor", "ceil"})
"""Whoever rounds has made numbers large before, and makes them small behind it."""

_LOOKS = 64
"""How many equations behind a step are looked at; what lies behind them counts as 1."""

Makers = Mapping[Var, JaxprEqn]


class View(NamedTuple):
  """What is known of the values of a jaxpr.

  Attributes:
    makers: The equation that makes each variable.
    known: The number that a value is all of, or None.
    is_backward: Whether an equation came from transposing.
    outside: The operand behind each argument, and what is known of the jaxpr that the call stands
      in, if the jaxpr is a body.
    steady: The scalars that are the same in every turn, in the body of a loop: where what these
      are is not known, a learned step, say, they count as small.
  """

  makers: Makers
  known: Callable[[Atom], float | None]
  is_backward: Callable[[JaxprEqn], bool]
  outside: Mapping[Any, tuple[Atom, View]] = {}
  steady: Collection[Any] = ()

  def number(self, atom: Atom) -> float | None:
    """The number that a value is all of, or None."""
    while (made := self.maker(atom)) and made.primitive.name in _KEEPS_NUMBER:
      (atom,) = made.invars
    if not isinstance(atom, Literal) and atom in self.outside:
      atom, view = self.outside[atom]
      return view.number(atom)
    return self.known(atom)

  def maker(self, atom: Atom) -> JaxprEqn | None:
    """The equation that makes a value, or None."""
    return None if isinstance(atom, Literal) else self.makers.get(atom)

  def inside(self, eqn: JaxprEqn, atom: Atom) -> list[Seen]:
    """What the bodies of a call or branch return as one of its results; nothing for a loop."""
    bodies = bodies_of(eqn) if eqn.primitive.name in HAVE_BODIES else ()
    if any(body.carry for body in bodies):
      return []
    place, found = [*eqn.outvars].index(atom), []  # pyright: ignore[reportArgumentType]
    for body in bodies:
      inner = versions.open_jaxpr(body.jaxpr)
      makers = jaxprs.makers_of(inner)
      pairs = zip(inner.invars, body.take(eqn.invars), strict=True)
      outside = {var: (operand, self) for var, operand in pairs}
      view = View(makers, _number_of, self.is_backward, outside)
      found.append((inner.outvars[place], view))
    return found


Seen = tuple[Atom, View]
"""A value, and what is known of the jaxpr that it stands in."""


def is_small_step(eqn: JaxprEqn, view: View, carried: Collection[Var]) -> bool:
  """Whether an equation adds to a value a small number of times what was computed from it.

  Or a multiple of its gradient, outside of the backward pass; or to a number a much smaller one of
  times a value.

  Args:
    eqn: An addition or subtraction.
    view: What is known of the jaxpr that it stands in.
    carried: What a loop hands on: each was computed from all of it in the turns before.
  """
  first, second = eqn.invars
  for value, step in ((first, second), (second, first)):
    factor = _Sizes(has_gradients=not view.is_backward(eqn)).of(step, view)
    if 0 < factor < SMALL and (number := _number_moved(value, view)) is not None:
      return factor < SMALL * abs(number)
    if factor > 0 and (step is second or eqn.primitive.name == "add"):
      if (
        not factor < SMALL and (made := view.maker(value)) and made.primitive.name not in _PRODUCTS
      ):
        continue
      origins = list(_origins(value, view, is_whole=not factor < SMALL))
      if not factor < SMALL * max((times for _, times in origins), default=0.0):
        continue
      read = {var for var, _ in jaxprs.behind(step, view.makers)}
      for origin, times in origins:
        if origin in read or (origin in carried and not read.isdisjoint(carried)):
          return factor < SMALL * times
  return False


def _number_moved(atom: Atom, view: View) -> float | None:
  """The number that a value is all of, whatever moved it or changed its sign; or None."""
  while (made := view.maker(atom)) and made.primitive.name in _KEEPS_SIZE:
    (atom,) = made.invars
  return view.number(atom)


def _origins(atom: Atom, view: View, *, is_whole: bool) -> Iterator[tuple[Any, float]]:
  """A value, and what it is a multiple, a piece, a choice or a sum of, the nearest first.

  Args:
    atom: The value.
    view: What is known of the jaxpr that it stands in.
    is_whole: Whether to look at multiples alone.

  Yields:
    Variables of this jaxpr, each with how many times it the value is.
  """
  waiting = deque([(atom, view, 1.0)])
  for _ in range(_LOOKS):
    if not waiting:
      return
    atom, inner, times = waiting.popleft()
    if isinstance(atom, Literal):
      continue
    if inner is view:
      yield atom, times
    eqn = inner.maker(atom)
    if eqn is None:
      waiting.extend([(*inner.outside[atom], times)] if atom in inner.outside else ())
      continue
    name = eqn.primitive.name
    if name in _KEEPS_SIZE or (name in _PIECES and not is_whole):
      waiting.append((eqn.invars[0], inner, times))
    elif name == "mul":
      whole, number = _without_number(eqn, inner)
      waiting.extend([(whole, inner, times * number)] if number else ())
    elif name == "div":
      number = inner.number(eqn.invars[1])
      waiting.extend([(eqn.invars[0], inner, times / abs(number))] if number else ())
    elif not is_whole:
      waiting.extend((*part, times) for part in _parts(eqn, atom, inner))


class _Sizes:
  """How many times something values are, as far as a limited number of equations tells.

  Args:
    has_gradients: Whether what a backward pass made counts as small: not in that pass itself.
  """

  def __init__(self, has_gradients: bool) -> None:
    self._has_gradients = has_gradients
    self._looks = _LOOKS

  def of(self, atom: Atom, view: View, factor: float = 1.0) -> float:
    """The number of times that a value is something, as far as it is known; else 1.

    Of a sum, or one or the other of several values, the largest; of a gradient half of `SMALL`.
    A matmul is as many times larger or smaller as its operands were made; not smaller where they
    were divided by what the sum multiplies.

    Args:
      atom: The value.
      view: What is known of the jaxpr that it stands in.
      factor: The number of times of it that is asked for.
    """
    ends: list[_End] = []
    factor *= self._product(atom, view, ends)
    for end in ends:
      if end.is_gradient:
        factor = min(factor, SMALL / 2)
      elif end.parts:
        factor = self._of_parts(end, factor)
      elif _undoes_a_sum(factor, end.eqn):
        return 1.0
      elif end.eqn.primitive.name in MATMULS:
        times = math.prod(self.of(a, end.view) for a in end.eqn.invars[:2])
        factor *= 1.0 if _undoes_a_sum(times, end.eqn) else times
    return factor

  def _product(self, atom: Atom, view: View, ends: list[_End]) -> float:
    """The numbers in a product, multiplied; what else is multiplied there is added to `ends`."""
    factor = 1.0
    while self._looks:
      self._looks -= 1
      eqn = view.maker(atom)
      if eqn is None:
        if isinstance(atom, Literal) or atom not in view.outside:
          number = view.known(atom)
          if number is None and atom in view.steady:
            number = SMALL / 2
          return factor if number is None else factor * abs(number)
        atom, view = view.outside[atom]
        continue
      name = eqn.primitive.name
      if name in _KEEPS_SIZE:
        atom = eqn.invars[0]
      elif self._has_gradients and view.is_backward(eqn):
        ends.append(_End(eqn, view, is_gradient=True))
        return factor
      elif name == "mul":
        atom, number = _without_number(eqn, view)
        if number is None:
          return factor * math.prod(self._operand(a, view, ends) for a in eqn.invars)
        factor *= number
      elif name == "div":
        atom, divisor = eqn.invars
        factor /= self._operand(divisor, view, []) or 1.0
      elif name in _ROUNDS:
        before = self._product(eqn.invars[0], view, ends)
        return factor * before if before > 1 else 1.0
      elif name in _LINEAR_AT_ZERO:
        return factor * min(1.0, self.of(eqn.invars[0], view))
      elif len(parts := _parts(eqn, atom, view)) == 1:
        ((atom, view),) = parts
      else:
        ends.append(_End(eqn, view, parts))
        return factor
    return factor

  def _operand(self, atom: Atom, view: View, ends: list[_End]) -> float:
    """The numbers in an operand of a product: none in a mean, or in a sum as large as one."""
    own: list[_End] = []
    factor = self._product(atom, view, own)
    if factor != 1 and any(_undoes_a_sum(factor, end.eqn) for end in own):
      return 1.0
    ends += own
    return factor

  def _of_parts(self, end: _End, factor: float) -> float:
    """The largest of what is added or chosen among; a number is no choice beside other values."""
    numbers, sizes = list[float](), list[float]()
    for atom, view in reversed(end.parts):  # the first of a sum is most often a sum itself
      number = view.number(atom)
      if number is not None:
        numbers.append(factor * abs(number))
        continue
      sizes.append(self.of(atom, view, factor))
      if not sizes[-1] < SMALL:
        return max(1.0, sizes[-1])
    return max(sizes + numbers if end.eqn.primitive.name in ADDS else sizes or numbers)


class _End(NamedTuple):
  """An operand of a product that is no product itself.

  Attributes:
    eqn: The equation that makes it.
    view: What is known of the jaxpr that this stands in.
    parts: What that adds or chooses among.
    is_gradient: Whether a backward pass made it.
  """

  eqn: JaxprEqn
  view: View
  parts: Sequence[Seen] = ()
  is_gradient: bool = False


def _parts(eqn: JaxprEqn, atom: Atom, view: View) -> list[Seen]:
  """What a sum adds, what a choice is among, what a call returns; nothing for other equations."""
  name, invars = eqn.primitive.name, eqn.invars
  if name in ADDS or name in _CHOICES:
    dtype = jaxprs.dtype(eqn.outvars[0])  # an index, and what a choice goes by, are no parts
    return [(part, view) for part in invars if jaxprs.dtype(part) == dtype]
  if name == "optimization_barrier":
    return [(invars[[*eqn.outvars].index(atom)], view)]  # pyright: ignore[reportArgumentType]
  return view.inside(eqn, atom)


def _undoes_a_sum(factor: float, eqn: JaxprEqn) -> bool:
  """Whether a sum of n values times a number is their mean, or as large as one of them.

  ``h @ w / n``, ``h @ w / n ** 0.5`` and ``relu(h @ w) * (2 / n) ** 0.5``, of which half are 0, are
  no smaller than h, however large n is.
  """
  n = _summed(eqn)
  sizes = (n, n / 2, n**0.5, (n / 2) ** 0.5)
  return min([abs(factor * size - 1) for size in sizes]) < 0.01


def _summed(eqn: JaxprEqn) -> int:
  """How many values an equation adds up to one of its result; 0 for one that adds up none."""
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return terms(eqn)
  if name == "conv_general_dilated":
    kernel = jaxprs.shape(eqn.invars[1])
    features = params["dimension_numbers"].rhs_spec[0]
    return jaxprs.size_of([size for dim, size in enumerate(kernel) if dim != features])
  if name == "reduce_sum":
    return jaxprs.size_of([jaxprs.shape(eqn.invars[0])[axis] for axis in params["axes"]])
  return jaxprs.size_of(params["window_dimensions"]) if name == "reduce_window_sum" else 0


def _without_number(eqn: JaxprEqn, view: View) -> tuple[Atom, float | None]:
  """What a product is a multiple of, and how large a one; None if by no number."""
  left, right = eqn.invars
  if (number := view.number(right)) is not None:
    return left, abs(number)
  number = view.number(left)
  return right, None if number is None else abs(number)


def _number_of(atom: Atom) -> float | None:
  return only(numbers_of(atom.val)) if isinstance(atom, Literal) else None
