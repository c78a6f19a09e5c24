"""What values of a jaxpr are made of, where all of it tells: whole numbers, constants.

Counts, positions and indices are whole. A matmul of such numbers counts: one-hot rows times ones,
``tril(ones) @ mask``, ``coordinates @ strides``. 16 bits hold none of these beyond 256 (bfloat16)
or 2048 (float16), so that the matmul is float32, as `cumsum` is. What is rounded is whole, too.

What depends on no float of an argument is constant. A matmul with a vector of constants is a sum
of terms with weights, of which some may cancel: those of a Runge-Kutta method's error. So is a
convolution with a small kernel of them: a difference of neighbors. A matrix that the program makes
of nothing but numbers is no layer either: it interpolates, differentiates or transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from mpjax._core.primitives import UNCHANGED, Trait, having
from mpjax._engine.analyses.constants import LOOKED_AT, is_here
from mpjax._engine.analyses.contents import SOLVES, Contents, skips_entries
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import HAVE_BODIES, Body, bodies_of, settled
from mpjax._engine.program.jaxprs import behind, kind
from mpjax._engine.program.versions import AnyJaxpr, Atom, JaxprEqn, Literal, Var

T = TypeVar("T")
Indices = frozenset[int]

_KEEPS_WHOLE = having(Trait.KEEPS_NUMBERS | Trait.MATMUL) | {
  *("add", "sub", "mul", "neg", "abs", "max", "min", "square", "add_any"),
  *("reduce_sum", "reduce_max", "reduce_min", "cumsum", "scatter-add", "psum"),
}
STAYS_SOLVED = UNCHANGED | {
  *("neg", "slice", "dynamic_slice", "gather", "select_n", "mul", "div", "add", "sub")
}
"""What makes a solution of one, whatever else it reads."""
_MAKES_WHOLE = frozenset({"iota", "round", "floor", "ceil", "sign"})
_STAYS_SKIPPED = UNCHANGED | {"slice", "pad", "concatenate"}


class MadeOf:
  """Finds the values of jaxprs that are made of something alone; what is known of one is kept.

  Args:
    is_value: Whether a constant of a trace is such a value.
    kinds: The kinds of numbers that are such values by their type.
    makes: Which primitives make one, whatever their operands are.
    keeps: Which make one of operands that all are such values; all primitives where None.
    of: ``all``, or ``any`` where one operand is enough.
    joins: Where one is enough, which make one of operands that all are such values, as a matmul of
      two orthogonal matrices does.
    when: In which equations of primitives that make one they do; in all where None.
  """

  def __init__(
    self,
    is_value: Callable[[Any], bool],
    kinds: str = "",
    makes: Collection[str] = (),
    keeps: Collection[str] | None = None,
    of: Callable[[Iterable[bool]], bool] = all,
    joins: Collection[str] = (),
    when: Callable[[JaxprEqn], bool] | None = None,
  ) -> None:
    self._is_value, self._kinds = is_value, kinds
    self._makes, self._keeps, self._of, self._joins = makes, keeps, of, joins
    self._when = when
    self._known: dict[Any, frozenset[Var]] = {}

  def variables(self, jaxpr: AnyJaxpr, operands: Collection[int]) -> frozenset[Var]:
    """The variables of a jaxpr that hold such values, without those whose type tells it.

    Args:
      jaxpr: The jaxpr, closed or open.
      operands: Which of its operands hold such values.
    """
    key = id(jaxpr), operands
    if key not in self._known:
      inner = versions.open_jaxpr(jaxpr)
      found = {inner.invars[n] for n in operands}
      values = zip(inner.constvars, versions.constants(jaxpr), strict=False)
      found |= {var for var, value in values if self._is_value(value)}
      for eqn in inner.eqns:
        found.update(self._made(eqn, found))
      self._known[key] = frozenset(found)
    return self._known[key]

  def entering(self, eqn: JaxprEqn, body: Body, found: Any) -> Indices:
    """Which operands of an equation's body are so in every turn, given what is outside."""
    own = [self.holds(atom, found) for atom in body.take(eqn.invars)]

    def turn(carry: Sequence[bool]) -> Sequence[bool]:
      own[body.carry.start : body.carry.stop] = carry
      results = self._results(body.jaxpr, _places(own))
      return list(carry) if body.is_test else results

    settled(own[body.carry.start : body.carry.stop], turn, self._of)
    return _places(own)

  def holds(self, atom: Atom, found: Any) -> bool:
    """Whether a variable or a literal holds such values, given which variables do."""
    if isinstance(atom, Literal):
      return self._is_value(atom.val)
    return atom in found or (self._kinds != "" and kind(atom) in self._kinds)

  def _results(self, jaxpr: AnyJaxpr, operands: Indices) -> list[bool]:
    found = self.variables(jaxpr, operands)
    return [self.holds(atom, found) for atom in versions.open_jaxpr(jaxpr).outvars]

  def _made(self, eqn: JaxprEqn, found: Any) -> Sequence[Var]:
    """The results of an equation that are such values."""
    name = eqn.primitive.name
    if name in HAVE_BODIES:
      bodies = [body for body in bodies_of(eqn) if not body.is_test]
      columns = [self._results(b.jaxpr, self.entering(eqn, b, found)) for b in bodies]
      made = zip(eqn.outvars, zip(*columns, strict=True), strict=True)
      return [var for var, column in made if self._of(column)]
    keeps = self._keeps is None or name in self._keeps
    of = all if name in self._joins else self._of
    made = (name in self._makes and (self._when is None or self._when(eqn))) or (
      (keeps or name in self._joins) and of(self.holds(atom, found) for atom in eqn.invars)
    )
    return eqn.outvars if made else ()


class Made(NamedTuple, Generic[T]):
  """What is made of something alone: operands of a jaxpr by index, or its variables.

  Attributes:
    whole: Whole numbers, but for those whose type tells it.
    solved: What linear systems and decompositions give, moved and scaled too.
    skipped: Every other entry of something, and products of such, as associative scans write them:
      these lay the entries of two between each other, padding both and adding them.
    constant: What depends on no float of an argument, if there may be weighted sums: an index may
      pick among them.
  """

  whole: Collection[T] = frozenset()
  solved: Collection[T] = frozenset()
  skipped: Collection[T] = frozenset()
  constant: Collection[T] = frozenset()


def _may_be_large(eqn: JaxprEqn) -> bool:
  """Whether what an equation solves may be divided by something small: by no diagonal of ones.

  A triangular system that has one is a recurrence, as that of a delta rule over a chunk of tokens.
  """
  return not eqn.params.get("unit_diagonal", False)


class Makings:
  """Finds all of that.

  Args:
    contents: Tells which primitives jaxprs hold: most need not be asked for all.
  """

  def __init__(self, contents: Contents) -> None:
    self._contents = contents
    self._whole = MadeOf(_are_whole, "biu", _MAKES_WHOLE, _KEEPS_WHOLE)
    self._solved = MadeOf(
      _none,
      makes=SOLVES,
      keeps=STAYS_SOLVED | {"triangular_solve"},
      of=any,
      joins={"dot_general"},
      when=_may_be_large,
    )
    self._skipped = MadeOf(
      _none, "", {"slice"}, _STAYS_SKIPPED, any, {"dot_general", "add"}, skips_entries
    )
    self._constant = MadeOf(lambda value: True, "biu")

  def variables(self, jaxpr: AnyJaxpr, known: Made[int]) -> Made[Var]:
    """The variables of a jaxpr that are so made, given which operands are."""
    solves = known.solved or self._contents.solutions(jaxpr)
    skips = known.skipped or self._contents.skips(jaxpr)
    weighs = self._contents.weights(jaxpr)
    return Made(
      self._whole.variables(jaxpr, known.whole),
      self._solved.variables(jaxpr, known.solved) if solves else frozenset(),
      self._skipped.variables(jaxpr, known.skipped) if skips else frozenset(),
      self._constant.variables(jaxpr, known.constant) if weighs else frozenset(),
    )

  def entering(self, eqn: JaxprEqn, body: Body, found: Made[Var]) -> Made[int]:
    """Which operands of an equation's body are so made, in every turn of a loop."""
    weighs = self._contents.weights(body.jaxpr)
    return Made(
      self._whole.entering(eqn, body, found.whole),
      self._solved.entering(eqn, body, found.solved) if found.solved else frozenset(),
      self._skipped.entering(eqn, body, found.skipped) if found.skipped else frozenset(),
      self._constant.entering(eqn, body, found.constant) if weighs else frozenset(),
    )


def is_computed(
  atom: Atom, makers: Mapping[Any, JaxprEqn], known: Collection[Var] = frozenset()
) -> bool:
  """Whether a value is made of nothing but numbers of the program itself, none of them random.

  Args:
    atom: A variable or literal of a jaxpr.
    makers: The equations of that, by what they make.
    known: Operands of it that are so made.
  """
  found = (eqn for _, eqn in behind(atom, makers, known))
  return not any(eqn is None or eqn.primitive.name.startswith(_FROM_OUTSIDE) for eqn in found)


_FROM_OUTSIDE = "random_", "rng_", "pure_callback", "io_callback"


def depends_on_more_than_numbers(atom: Atom, makers: Mapping[Any, JaxprEqn]) -> bool:
  """Whether a value is made of an operand of its jaxpr, or of what that captured."""
  return any(eqn is None for _, eqn in behind(atom, makers))


def _are_whole(value: Any) -> bool:
  """Whether a constant holds nothing but whole numbers; large arrays are not looked at."""
  if not is_here(value):
    return False
  dtype = getattr(value, "dtype", np.dtype(type(value)))
  if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf":
    return False
  if dtype.kind != "f":
    return True
  if np.size(value) > LOOKED_AT:
    return False
  numbers = np.asarray(value, np.float64)
  return bool((np.isfinite(numbers) & (numbers == np.round(numbers))).all())


def _none(value: Any) -> bool:
  return False


def _places(own: Sequence[bool]) -> Indices:
  return frozenset(n for n, known in enumerate(own) if known)
