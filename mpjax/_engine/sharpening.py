"""What an equation shows beyond its primitive's name: squares, lookups, sums, outer products.

`SHARPENINGS` is the list: the first that fits an equation replaces the rule of its primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine import jaxprs
from mpjax._engine.constants import Adapting
from mpjax._engine.jaxprs import JaxprEqn, Literal
from mpjax._engine.keep_float32 import KEEP_FLOAT32
from mpjax._engine.kinds import Form, Kind, join
from mpjax._engine.lookahead import Sums
from mpjax._engine.plan import Forms

SATURATING = having(Trait.SATURATES)
_MOVES = having(Trait.MOVES)
_FLAT = frozenset({Rule.LOWER, Rule.RANGE, Rule.FOLLOW})
_WITH_BODIES = frozenset(
  {
    Rule.CALL,
    Rule.SCAN,
    Rule.WHILE,
    Rule.COND,
    Rule.CUSTOM_JVP,
    Rule.CUSTOM_VJP,
    Rule.CUSTOM_VMAP,
    Rule.REMAT_OPT,
    Rule.LINEAR_CALL,
    Rule.CUSTOM_PARTITIONING,
  }
)


class Sight(NamedTuple):
  """What is seen of an equation when its rule is chosen.

  Attributes:
    eqn: The equation.
    rule: The rule of its primitive.
    forms: How its operands are held.
    compute: The compute dtype that governs it.
    exact: The variables that are needed exactly and may come near one.
    sums: What is added up.
    iterated: The results of the matmuls of power iterations.
    whole: The variables that hold whole numbers.
    makers: The equation that makes each variable of the jaxpr.
  """

  eqn: JaxprEqn
  rule: Rule
  forms: Forms
  compute: np.dtype
  exact: Collection[Any]
  sums: Sums
  iterated: Collection[Any]
  whole: Collection[Any]
  makers: Mapping[Any, JaxprEqn]

  @property
  def name(self) -> str:
    """The name of the primitive."""
    return self.eqn.primitive.name

  @property
  def result(self) -> Any:
    """The first result."""
    return self.eqn.outvars[0]

  @property
  def is_lower(self) -> bool:
    """Whether a matmul of float32 is to run in 16 bits."""
    return self.rule is Rule.LOWER and any(self.forms)


class Sharpening(NamedTuple):
  """A rule for equations that their primitive's rule does not fit.

  Attributes:
    name: What they are.
    fits: Whether an equation is one.
    rule: The rule; None for that of the primitive, which nothing sharpens further.
    reason: Why.
  """

  name: str
  fits: Callable[[Sight], bool]
  rule: Rule | None
  reason: str


SHARPENINGS: tuple[Sharpening, ...] = (
  Sharpening(
    "body of references",
    lambda s: s.rule in _WITH_BODIES and not all(hasattr(a.aval, "dtype") for a in s.eqn.invars),
    Rule.TRACED,
    "a mutable reference cannot change its dtype",
  ),
  Sharpening(
    "keep_float32",
    lambda s: s.name == "name" and s.eqn.params["name"] == KEEP_FLOAT32,
    Rule.FULL,
    "its author said so",
  ),
  Sharpening(
    "scatter of a function",
    lambda s: applies_a_function(s.eqn),
    Rule.ALWAYS,
    "the function was traced in float32",
  ),
  Sharpening("no 16-bit kernel", lambda s: s.rule is Rule.ALWAYS, None, "as the table says"),
  Sharpening(
    "float32 policy",
    lambda s: s.rule in _FLAT and s.compute == FLOAT32,
    Rule.FULL,
    "the policy computes in float32",
  ),
  Sharpening(
    "near one or into a logarithm",
    lambda s: (
      any(var in s.exact for var in s.eqn.outvars) and (s.name in SATURATING or _is_narrow(s.forms))
    ),
    Rule.FULL,
    "a 16-bit sigmoid is 1 from an argument of 6 on, and 0.999 is 1 in bfloat16",
  ),
  Sharpening(
    "square",
    lambda s: is_square(s.eqn, s.makers),
    Rule.FULL,
    "nearly always feeds a sum: a variance, a norm",
  ),
  Sharpening(
    "picked numbers",
    lambda s: picks_numbers(s.eqn, s.forms),
    Rule.FULL,
    "their cotangents meet those of the logsumexp before they round",
  ),
  Sharpening(
    "matmul with another format",
    lambda s: s.rule is Rule.LOWER and has_foreign_float(s.eqn, s.forms),
    Rule.TRACED,
    "float64, complex and 8-bit operands are their author's",
  ),
  Sharpening(
    "power iteration",
    lambda s: s.is_lower and s.result in s.iterated,
    Rule.FULL,
    "every weight is divided by the norm that it finds",
  ),
  Sharpening(
    "whole numbers",
    lambda s: s.is_lower and s.result in s.whole,
    Rule.FULL,
    "it counts, or finds positions and indices: 256 + 1 is 256 in bfloat16",
  ),
  Sharpening(
    "what is added up",
    lambda s: s.is_lower and s.sums.is_sum(s.eqn),
    Rule.WIDE,
    "16-bit products, float32 sums: a gradient leaves its matmul as that summed it up",
  ),
  Sharpening(
    "outer product",
    lambda s: s.is_lower and contracts_nothing(s.eqn) and _is_float32(s.forms),
    Rule.MULTIPLY,
    "a product that contracts nothing is a multiplication: positions survive",
  ),
  Sharpening(
    "divides by a narrow value",
    lambda s: s.name == "div" and s.rule is Rule.FOLLOW and _is_float16(s.forms[1]),
    Rule.FULL,
    "its derivative divides by the square of that, which leaves the range of float16",
  ),
  Sharpening(
    "leaves the range of float16",
    lambda s: s.rule is Rule.RANGE and _held(s) == FLOAT16,
    Rule.FULL,
    "256 squared exceeds float16",
  ),
  Sharpening(
    "within range", lambda s: s.rule is Rule.RANGE, Rule.FOLLOW, "bfloat16 has float32's range"
  ),
)
"""What replaces the rule of a primitive where an equation shows more than its name, in order."""


def sharpened(sight: Sight, adapting: Adapting) -> Rule:
  """The rule of an equation: that of its primitive, or the first sharpening that fits."""
  if not adapting.holds(fill_value(sight.eqn)):
    return Rule.FULL
  for sharpening in SHARPENINGS:
    if sharpening.fits(sight):
      return sharpening.rule or sight.rule
  return sight.rule


def _is_float32(forms: Forms) -> bool:
  """Whether operands are held in float32 together."""
  form = join(forms)
  return form is not None and form.dtype == FLOAT32


def _is_narrow(forms: Forms) -> bool:
  """Whether operands are held in 16 bits together."""
  form = join(forms)
  return form is not None and form.kind is Kind.NARROW


def _is_float16(form: Form | None) -> bool:
  """Whether a value that came out of a matmul is held in float16."""
  return form is not None and form.kind is Kind.NARROW and form.dtype == FLOAT16


def _held(sight: Sight) -> np.dtype | None:
  """The dtype that an equation's operands have together where they follow each other."""
  form = join(sight.forms)
  return sight.compute if form and form.kind < Kind.NARROW else form and form.dtype


def is_square(eqn: JaxprEqn, makers: Mapping[Any, JaxprEqn]) -> bool:
  """X * x and x ** 2 are squares, however they were written, and so are x @ x and ``vdot(x, x)``.

  A matmul of a value with itself is the sum of its squares where it adds up all that it multiplies.
  """
  if eqn.primitive.name == "integer_pow":
    return eqn.params["y"] == 2
  if eqn.primitive.name == "dot_general":
    (left, right), (batch, other) = eqn.params["dimension_numbers"]
    rank = len(left) + len(batch)
    first, second = eqn.invars
    is_inner = {_rank(first), _rank(second)} == {rank} and (left, batch) == (right, other)
    return is_inner and _source(first, makers) == _source(second, makers)
  return eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]


def _source(atom: Any, makers: Mapping[Any, JaxprEqn]) -> tuple[Any, ...]:
  """What a value was before it was moved, and how it was."""
  moves = []
  while not isinstance(atom, Literal) and atom in makers and makers[atom].primitive.name in _MOVES:
    eqn = makers[atom]
    moves.append((eqn.primitive.name, str(eqn.params)))
    (atom,) = eqn.invars
  return (id(atom), *moves)


def _rank(atom: Any) -> int:
  return len(atom.aval.shape)


def picks_numbers(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a gather picks single narrow numbers: the logits of the labels, in most losses.

  Read in float32, their cotangents meet those of the logsumexp before they round.
  """
  picks = eqn.primitive.name == "gather" and set(eqn.params["slice_sizes"]) <= {1}
  return picks and forms[0] is not None and forms[0].kind is Kind.NARROW


def fill_value(eqn: JaxprEqn) -> float | None:
  """What a gather of floats gives for an index that is out of bounds, if that is a number."""
  fill = eqn.params.get("fill_value") if eqn.primitive.name == "gather" else None
  return fill if fill is not None and jaxprs.is_float32(eqn.outvars[0]) and fill == fill else None


def contracts_nothing(eqn: JaxprEqn) -> bool:
  """Whether a matmul multiplies pairs of numbers and adds up none: an outer product."""
  if eqn.primitive.name != "dot_general":
    return False
  (contracted, _), _ = eqn.params["dimension_numbers"]
  operand: Any = eqn.invars[0].aval
  return all(operand.shape[dim] == 1 for dim in contracted)


class Own(NamedTuple):
  """What depends on nothing but what a model holds: operands by index, or variables.

  Attributes:
    held: All of it.
    state: That which its state, not its parameters alone, has a part in.
  """

  held: Collection[Any] = ()
  state: Collection[Any] = ()

  def among(self, atoms: Sequence[Any]) -> Own:
    """Which of an equation's operands are the model's own; none if no state is among them."""
    held, state = (
      tuple(n for n, atom in enumerate(atoms) if not isinstance(atom, Literal) and atom in part)
      for part in self
    )
    return Own(held, state) if state else Own()

  def without(self, operands: range) -> Own:
    """The same without some operands."""
    held, state = (tuple(n for n in part if n not in operands) for part in self)
    return Own(held, state) if state else Own()


def own_variables(inner: Any, own: Own) -> Own:
  """The variables that depend on nothing but a model's own operands; none without state.

  What is made of literals alone is among them. A saturating function makes no more a state of what
  it takes: it ends what is linear in it.
  """
  if not own.state:
    return Own()
  held, state = ({inner.invars[n] for n in part} for part in own)
  for eqn in inner.eqns:
    read = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
    if held.issuperset(read):
      held.update(eqn.outvars)
      if not state.isdisjoint(read) and eqn.primitive.name not in SATURATING:
        state.update(eqn.outvars)
  return Own(held, state)


def power_iteration(inner: Any, state: Collection[Any]) -> set[Any]:
  """The results of matmuls that take a model's state, one vector, through a matrix and back.

  And of its inner products, where there is one. So the norm of a spectral norm is found, by which
  every weight is divided (Miyato et al. 2018, "Spectral normalization for generative adversarial
  networks"). Such a matmul reads its matrix once, whatever it multiplies in. A loop's carry is no
  state here, so that an iteration written as `lax.fori_loop` is not found.

  Args:
    inner: An open jaxpr.
    state: Its variables that depend on a model's state, see `own_variables`.
  """
  turned: dict[Any, tuple[Any, tuple[int, ...]]] = {}
  found: dict[Any, dict[tuple[int, ...], list[Any]]] = {}
  products = []
  for eqn in inner.eqns if state else ():
    if eqn.primitive.name == "transpose":
      turned[eqn.outvars[0]] = eqn.invars[0], eqn.params["permutation"]
    elif eqn.primitive.name == "dot_general" and eqn.outvars[0] in state:
      matrices = [(a, along) for a, along, is_vector in _factors(eqn) if not is_vector]
      if not matrices:
        products.append(eqn.outvars[0])
      elif len(matrices) == 1:
        ((matrix, along),) = matrices
        source, axes = turned.get(matrix, (matrix, range(len(matrix.aval.shape))))
        ways = found.setdefault(source, {})
        ways.setdefault(tuple(sorted(axes[d] for d in along)), []).append(eqn.outvars[0])
  there_and_back = [ways for ways in found.values() if len(ways) > 1]
  results = [var for ways in there_and_back for way in ways.values() for var in way]
  return {*results, *products} if results else set()


def _factors(eqn: JaxprEqn) -> Iterator[tuple[Any, Sequence[int], bool]]:
  """The factors of a matmul, each with its contracted dimensions, and whether it is one vector."""
  for atom, contracted, batch in zip(eqn.invars, *eqn.params["dimension_numbers"], strict=True):
    shape: Any = atom.aval.shape
    free = (size for d, size in enumerate(shape) if d not in contracted and d not in batch)
    yield atom, contracted, all(size == 1 for size in free)


def applies_a_function(eqn: JaxprEqn) -> bool:
  """Whether a scatter holds a function of the values that it meets, traced in float32."""
  return eqn.primitive.name == "scatter" and eqn.params.get("update_jaxpr") is not None


def looks_up_rows(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a gather takes many rows of a parameter: an embedding.

  They are cast after the lookup, so that the gradient of a row that is taken often sums up in
  float32; but they are cast, for a sum of embeddings is as large as any activation. One row, or
  single numbers, are still a parameter.
  """
  if eqn.primitive.name != "gather" or forms[0] is None or forms[0].kind is not Kind.PARAM:
    return False
  indices: Any = eqn.invars[1].aval
  rows = np.prod(indices.shape[:-1], dtype=int)
  return rows > 1 and np.prod(eqn.params["slice_sizes"], dtype=int) > 1


def foreign_format(eqn: JaxprEqn, forms: Forms) -> np.dtype | None:
  """The 16-bit format that its author gave one operand of a matmul whose other is float32."""
  operands: Any = zip(eqn.invars, forms, strict=True)
  formats = {atom.aval.dtype for atom, form in operands if form is None}
  return formats.pop() if any(forms) and len(formats) == 1 and formats <= _NARROW else None


def has_foreign_float(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a matmul mixes float32 with another float than 16 bits, or makes a float64 of it."""
  result: Any = eqn.outvars[0].aval
  operands: Any = zip(eqn.invars, forms, strict=True)
  dtypes = {a.aval.dtype for a, f in operands if f is None}
  if any(forms) and result.dtype == np.float64:
    return True
  return any(jnp.issubdtype(d, np.inexact) for d in dtypes - _NARROW)


_NARROW = {BFLOAT16, FLOAT16}
