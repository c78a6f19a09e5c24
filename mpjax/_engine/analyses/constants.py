"""The values that a constant of a trace may have, as far as equations tell.

Each number of a program may fit a 16-bit format and what is computed from them may not:
``(1 - mask) * -300 * 300`` leaves float16, ``exp(-0.001)`` becomes 1 in bfloat16. Constants are few
numbers in large arrays, so their values are followed as small sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray, Tracer

from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from mpjax._core.primitives import KEEPS_NUMBERS, Trait, having
from mpjax._engine.program import jaxprs, matmuls
from mpjax._engine.program.kinds import CONSTANT, DATA, Form, Forms, fits, join, saturated
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

NumberSet = frozenset[float] | None
"""The numbers that occur in a constant; None where they are not known."""

_ZERO_OR_ONE = frozenset({0.0, 1.0})
MASK: NumberSet = _ZERO_OR_ONE
"""What a boolean becomes."""

MOST = 64
"""Numbers computed from more combinations than these are not known."""

_INTEGERS = "iu"
_NARROW = BFLOAT16, FLOAT16

_FUNCTIONS: dict[str, Callable[..., Any]] = {
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "div": np.divide,
  "rem": np.fmod,
  "neg": np.negative,
  "abs": np.abs,
  "sign": np.sign,
  "max": np.maximum,
  "min": np.minimum,
  "pow": np.power,
  "sqrt": np.sqrt,
  "cbrt": np.cbrt,
  "exp": np.exp,
  "exp2": np.exp2,
  "expm1": np.expm1,
  "tanh": np.tanh,
  "logistic": lambda x: 1 / (1 + np.exp(-x)),
  "sin": np.sin,
  "cos": np.cos,
  "tan": np.tan,
  "sinh": np.sinh,
  "cosh": np.cosh,
  "floor": np.floor,
  "ceil": np.ceil,
  "and": lambda x, y: int(x) & int(y),
  "or": lambda x, y: int(x) | int(y),
}
"""What is computed here; what other primitives make of constants is not known."""

_CHOOSES = frozenset({"reduce_max", "reduce_min"})
_MULTIPLIES = frozenset({"reduce_prod", "cumprod"})
_FIND = having(Trait.ORDERS)
_SIGNS = frozenset({-1.0, 0.0, 1.0})


def is_here(value: Any) -> bool:
  """Whether a constant of the trace is an array that this process can look at, and no reference."""
  if not isinstance(value, jax.Array):
    return isinstance(value, np.ndarray | np.generic | bool | int | float | complex)
  is_array = not isinstance(value, Tracer) and isinstance(jax.typeof(value), ShapedArray)
  return is_array and value.is_fully_addressable


def numbers_of(value: Any) -> NumberSet:
  """The numbers that occur in a scalar of the trace; None for an array, whose are not followed.

  None, too, for a scalar of which other processes hold a part.
  """
  if not is_here(value) or np.ndim(value):
    return None
  dtype = getattr(value, "dtype", np.dtype(type(value)))
  real = isinstance(dtype, np.dtype) and (dtype.kind in "iuf" or dtype == BFLOAT16)
  return frozenset({float(value)}) if real else None


class Extremes(NamedTuple):
  """What tells which formats hold an array, infinities and NaN left out.

  Attributes:
    largest: The largest magnitude in it.
    longest: If all numbers are whole, the one with the most digits: 343 before 1024. Else 0.
  """

  largest: float
  longest: float = 0.0

  def lacked_by(self, dtype: np.dtype) -> bool:
    """Whether a 16-bit format makes of it an array of infinities or zeros, or of other numbers."""
    is_beyond = dtype == FLOAT16 and not fits(self.largest, dtype)
    return is_beyond or float(np.asarray(self.longest).astype(dtype)) != self.longest


def extremes_of(value: Any) -> Extremes | None:
  """The extremes of a captured float32 array; None if it is large, and not looked at."""
  is_small = is_here(value) and 0 < np.size(value) <= LOOKED_AT
  if not is_small or getattr(value, "dtype", None) != FLOAT32:
    return None
  magnitudes = np.abs(np.asarray(value)).ravel()
  magnitudes = magnitudes[np.isfinite(magnitudes)]
  largest = float(magnitudes.max(initial=0.0))
  if not 0 < largest < 2**24 or (magnitudes != np.round(magnitudes)).any():
    return Extremes(largest)
  whole = magnitudes.astype(np.int64)
  lowest_bits = np.maximum(whole & -whole, 1)
  return Extremes(largest, float(whole[np.argmax(whole // lowest_bits)]))


LOOKED_AT = 2**16
"""As many numbers as an array has at most that is looked at."""


def only(numbers: NumberSet) -> float | None:
  """The number of a set of one; None for several, or if they are not known."""
  return next(iter(numbers)) if numbers is not None and len(numbers) == 1 else None


def _held(numbers: NumberSet, atom: Atom) -> NumberSet:
  """Numbers as an integer or 16-bit float has them; not known if an integer does not hold one."""
  dtype: Any = jaxprs.dtype(atom)
  if numbers is None or dtype in _NARROW:
    with np.errstate(all="ignore"):
      return numbers and frozenset(float(np.asarray(number).astype(dtype)) for number in numbers)
  info = np.iinfo(dtype)
  is_held = all(info.min <= number <= info.max and number == int(number) for number in numbers)
  return numbers if is_held else None


def _is_followed(atom: Atom) -> bool:
  """Whether what is no float32 has numbers that are followed: an integer, or a 16-bit float."""
  return jaxprs.kind(atom) in _INTEGERS or jaxprs.dtype(atom) in _NARROW


def _may_fill(eqn: JaxprEqn) -> bool:
  """Whether another number than those that are looked up stands for what is out of bounds."""
  fills = jax.lax.GatherScatterMode.FILL_OR_DROP
  return eqn.primitive.name == "gather" and eqn.params["mode"] == fills


def _makes_numbers(primitive: str) -> bool:
  """Whether a primitive computes numbers, rather than moving or choosing among its operands'."""
  return primitive not in KEEPS_NUMBERS


def _after(eqn: JaxprEqn, operands: Sequence[NumberSet]) -> NumberSet:
  """The values of an equation's result, all of whose float operands are constants."""
  primitive, params = matmuls.operation(eqn), eqn.params
  known = [values for values in operands if values is not None]
  if len(known) < len(operands):
    return None
  if not _makes_numbers(primitive):
    return frozenset[float]().union(*known)
  if primitive == "integer_pow":
    primitive, known = "pow", [*known, frozenset({float(params["y"])})]
  if primitive in _CHOOSES:
    return known[0]
  if primitive in _MULTIPLIES and known[0] <= _SIGNS and jaxprs.size(eqn.invars[0]):
    return known[0] | {number * number for number in known[0]}
  if primitive == "reduce_sum" and known[0] <= _ZERO_OR_ONE:
    terms = jaxprs.size(eqn.invars[0]) // max(1, jaxprs.size(eqn.outvars[0]))
    return frozenset(map(float, range(terms + 1))) if terms < MOST else None
  if primitive not in _FUNCTIONS or np.prod([len(values) for values in known]) > MOST:
    return None
  with np.errstate(all="ignore"):
    return frozenset(float(_FUNCTIONS[primitive](*numbers)) for numbers in product(*known))


class Adapting(NamedTuple):
  """What becomes of numbers under a policy: one that every format holds adapts, another is data.

  Attributes:
    formats: The 16-bit formats of the policy.
  """

  formats: frozenset[np.dtype]

  def form(self, value: Any) -> Form:
    """How a float32 number or array of the trace is held."""
    if not is_here(value) or np.ndim(value):
      return DATA
    return CONSTANT if all(fits(value, d) for d in self.formats) else DATA

  def holds(self, value: float | None) -> bool:
    """Whether every format holds a number as it is, if there is one."""
    return value is None or (self.form(value) == CONSTANT and self.saturated(value) == value)

  def saturated(self, value: Any) -> Any:
    """A number, brought into the range of the formats that it fits."""
    return saturated(value, self.formats)


class Numbers:
  """The values of one jaxpr's constants, followed from equation to equation.

  Args:
    adapting: Which numbers adapt.
  """

  def __init__(self, adapting: Adapting) -> None:
    self._adapting = adapting
    self._known: dict[Var, NumberSet] = {}

  def of(self, atom: Atom) -> NumberSet:
    """The values of an operand."""
    return numbers_of(atom.val) if isinstance(atom, Literal) else self._known.get(atom)

  def number(self, atom: Atom) -> float | None:
    """The one number that occurs in an operand; None if there are several, or it is not known."""
    return only(self.of(atom))

  def define(self, var: Any, values: NumberSet) -> None:
    """Say what values a variable has."""
    self._known[var] = values

  def form_after(self, eqn: JaxprEqn, forms: Forms) -> Form:
    """What is made of constants is one if its numbers fit the policy's formats, too."""
    name = eqn.primitive.name
    computed = _makes_numbers(name)  # else what is no float, as an index, tells nothing
    pairs = zip(eqn.invars, forms, strict=True)
    known = [self.of(atom) for atom, form in pairs if form is not None or computed]
    values = _after(eqn, known)
    for var in filter(jaxprs.is_float32, eqn.outvars):
      self.define(var, values)
    if values is None:
      return DATA if computed else CONSTANT
    return self.form_of_all(values)

  def follow_data(self, eqn: JaxprEqn) -> None:
    """Follow numbers that do not adapt: what is made of known ones alone is known."""
    known = [self.of(atom) for atom in eqn.invars]
    if all(numbers is not None for numbers in known):
      self.define(eqn.outvars[0], _after(eqn, known))

  def follow(self, eqn: JaxprEqn) -> None:
    """Follow integers and 16-bit floats: what is moved, chosen or computed of known ones is known.

    But for indices, which are none of the numbers that they are found in.
    """
    if len(eqn.outvars) != 1 or (result := eqn.outvars[0]) in self._known:
      return
    name = eqn.primitive.name
    if not _is_followed(result) or name in _FIND or _may_fill(eqn):
      return
    makes = _makes_numbers(name)
    atoms = [a for a in eqn.invars if makes or _is_followed(a) or jaxprs.is_float32(a)]
    known = [self.of(atom) for atom in atoms]
    if name == "convert_element_type" and jaxprs.kind(eqn.invars[0]) == "b":
      self.define(result, MASK)
    elif name == "sign":
      self.define(result, _SIGNS)
    elif known and all(numbers is not None for numbers in known):
      self.define(result, _held(_after(eqn, known), result))

  def follow_branches(self, eqn: JaxprEqn, numbers: Sequence[Sequence[NumberSet]]) -> None:
    """Follow the results of an equation that runs one of some bodies, which have these."""
    for var, column in zip(eqn.outvars, zip(*numbers, strict=True), strict=True):
      known = [values for values in column if values is not None]
      if len(known) == len(column):
        self.define(var, frozenset[float]().union(*known))

  def form_of_all(self, numbers: NumberSet) -> Form:
    """How floats are held in which certain numbers occur: as data if these are not known."""
    if numbers is None:
      return DATA
    return join(map(self._adapting.form, numbers)) or CONSTANT

  def form_of(self, literal: Literal) -> Form | None:
    """How a literal is held, None for one that is not float32."""
    return self._adapting.form(literal.val) if jaxprs.is_float32(literal) else None
