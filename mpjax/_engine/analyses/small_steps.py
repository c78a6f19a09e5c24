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
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from mpjax._core.primitives import ADDS, MATMULS, SCALES, UNCHANGED, Trait, having
from mpjax._engine.analyses.frames import Frame, Seen
from mpjax._engine.program import jaxprs
from mpjax._engine.program.matmuls import terms
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

SMALL = 1 / 31.5
"""Numbers below it are small, as a 32nd. The cube in a gelu has 0.0447, residuals of large models
0.1."""

_KEEPS_SIZE = UNCHANGED | {"neg"}
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


def is_small_step(eqn: JaxprEqn, frame: Frame, carried: Collection[Var]) -> bool:
  """Whether an equation adds to a value a small number of times what was computed from it.

  Or a multiple of its gradient, outside of the backward pass; or to a number a much smaller one of
  times a value.

  Args:
    eqn: An addition or subtraction.
    frame: The frame of the jaxpr that it stands in.
    carried: What a loop hands on: each was computed from all of it in the turns before.
  """
  first, second = eqn.invars
  for value, step in ((first, second), (second, first)):
    factor = _Sizes(has_gradients=not frame.is_backward(eqn)).of(step, frame)
    if 0 < factor < SMALL and (number := frame.number_moved(value)) is not None:
      return factor < SMALL * abs(number)
    if factor > 0 and (step is second or eqn.primitive.name == "add"):
      if (
        not factor < SMALL and (made := frame.maker(value)) and made.primitive.name not in _PRODUCTS
      ):
        continue
      origins = list(_origins(value, frame, is_whole=not factor < SMALL))
      if not factor < SMALL * max((times for _, times in origins), default=0.0):
        continue
      read = {var for var, _ in jaxprs.behind(step, frame.makers)}
      for origin, times in origins:
        if origin in read or (origin in carried and not read.isdisjoint(carried)):
          return factor < SMALL * times
  return False


def _origins(atom: Atom, frame: Frame, *, is_whole: bool) -> Iterator[tuple[Any, float]]:
  """A value, and what it is a multiple, a piece, a choice or a sum of, the nearest first.

  Args:
    atom: The value.
    frame: The frame of the jaxpr that it stands in.
    is_whole: Whether to look at multiples alone.

  Yields:
    Variables of this jaxpr, each with how many times it the value is.
  """
  waiting = deque([(atom, frame, 1.0)])
  for _ in range(_LOOKS):
    if not waiting:
      return
    atom, inner, times = waiting.popleft()
    if isinstance(atom, Literal):
      continue
    if inner is frame:
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

  def of(self, atom: Atom, frame: Frame, factor: float = 1.0) -> float:
    """The number of times that a value is something, as far as it is known; else 1.

    Of a sum, or one or the other of several values, the largest; of a gradient half of `SMALL`.
    A matmul is as many times larger or smaller as its operands were made; not smaller where they
    were divided by what the sum multiplies.

    Args:
      atom: The value.
      frame: The frame of the jaxpr that it stands in.
      factor: The number of times of it that is asked for.
    """
    ends: list[_End] = []
    factor *= self._product(atom, frame, ends)
    for end in ends:
      if end.is_gradient:
        factor = min(factor, SMALL / 2)
      elif end.parts:
        factor = self._of_parts(end, factor)
      elif _undoes_a_sum(factor, end.eqn):
        return 1.0
      elif end.eqn.primitive.name in MATMULS:
        times = math.prod(self.of(a, end.frame) for a in end.eqn.invars[:2])
        factor *= 1.0 if _undoes_a_sum(times, end.eqn) else times
    return factor

  def _product(self, atom: Atom, frame: Frame, ends: list[_End]) -> float:
    """The numbers in a product, multiplied; what else is multiplied there is added to `ends`."""
    factor = 1.0
    while self._looks:
      self._looks -= 1
      eqn = frame.maker(atom)
      if eqn is None:
        if isinstance(atom, Literal) or atom not in frame.outside:
          number, is_variable = frame.known(atom), not isinstance(atom, Literal)
          if number is None and is_variable and atom in frame.steady:  # learned: counts as small
            number = SMALL / 2
          return factor if number is None else factor * abs(number)
        atom, frame = frame.outside[atom]
        continue
      name = eqn.primitive.name
      if name in _KEEPS_SIZE:
        atom = eqn.invars[0]
      elif self._has_gradients and frame.is_backward(eqn):
        ends.append(_End(eqn, frame, is_gradient=True))
        return factor
      elif name == "mul":
        atom, number = _without_number(eqn, frame)
        if number is None:
          return factor * math.prod(self._operand(a, frame, ends) for a in eqn.invars)
        factor *= number
      elif name == "div":
        atom, divisor = eqn.invars
        factor /= self._operand(divisor, frame, []) or 1.0
      elif name in _ROUNDS:
        before = self._product(eqn.invars[0], frame, ends)
        return factor * before if before > 1 else 1.0
      elif name in _LINEAR_AT_ZERO:
        return factor * min(1.0, self.of(eqn.invars[0], frame))
      elif len(parts := _parts(eqn, atom, frame)) == 1:
        ((atom, frame),) = parts
      else:
        ends.append(_End(eqn, frame, parts))
        return factor
    return factor

  def _operand(self, atom: Atom, frame: Frame, ends: list[_End]) -> float:
    """The numbers in an operand of a product: none in a mean, or in a sum as large as one."""
    own: list[_End] = []
    factor = self._product(atom, frame, own)
    if factor != 1 and any(_undoes_a_sum(factor, end.eqn) for end in own):
      return 1.0
    ends += own
    return factor

  def _of_parts(self, end: _End, factor: float) -> float:
    """The largest of what is added or chosen among; a number is no choice beside other values."""
    numbers, sizes = list[float](), list[float]()
    for atom, frame in reversed(end.parts):  # the first of a sum is most often a sum itself
      number = frame.number(atom)
      if number is not None:
        numbers.append(factor * abs(number))
        continue
      sizes.append(self.of(atom, frame, factor))
      if not sizes[-1] < SMALL:
        return max(1.0, sizes[-1])
    return max(sizes + numbers if end.eqn.primitive.name in ADDS else sizes or numbers)


class _End(NamedTuple):
  """An operand of a product that is no product itself.

  Attributes:
    eqn: The equation that makes it.
    frame: The frame of the jaxpr that this stands in.
    parts: What that adds or chooses among.
    is_gradient: Whether a backward pass made it.
  """

  eqn: JaxprEqn
  frame: Frame
  parts: Sequence[Seen] = ()
  is_gradient: bool = False


def _parts(eqn: JaxprEqn, atom: Atom, frame: Frame) -> list[Seen]:
  """What a sum adds, what a choice is among, what a call returns; nothing for other equations."""
  name, invars = eqn.primitive.name, eqn.invars
  if name in ADDS or name in _CHOICES:
    dtype = jaxprs.dtype(eqn.outvars[0])  # an index, and what a choice goes by, are no parts
    return [(part, frame) for part in invars if jaxprs.dtype(part) == dtype]
  if name == "optimization_barrier":
    return [(invars[[*eqn.outvars].index(atom)], frame)]  # pyright: ignore[reportArgumentType]
  return frame.inside(eqn, atom)


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


def _without_number(eqn: JaxprEqn, frame: Frame) -> tuple[Atom, float | None]:
  """What a product is a multiple of, and how large a one; None if by no number."""
  left, right = eqn.invars
  if (number := frame.number(right)) is not None:
    return left, abs(number)
  number = frame.number(left)
  return right, None if number is None else abs(number)
