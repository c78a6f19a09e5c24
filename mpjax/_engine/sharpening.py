"""What an equation shows beyond its primitive's name: squares, lookups, sums, outer products.

`SHARPENINGS` is the list: the first that fits an equation replaces the rule of its primitive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from mpjax._core.primitives import MATMULS, Rule
from mpjax._engine import jaxprs
from mpjax._engine.bodies import RULES_WITH_BODIES
from mpjax._engine.constants import Numbers
from mpjax._engine.keep_float32 import KEEP_FLOAT32
from mpjax._engine.kinds import PARAM, Form, Kind, join
from mpjax._engine.knowledge import Knowledge
from mpjax._engine.made_of import weights_of
from mpjax._engine.plan import Forms, Place
from mpjax._engine.roles import GATES
from mpjax._engine.running_sums import adds_neighbors
from mpjax._engine.small_steps import is_small_step
from mpjax._engine.versions import Atom, JaxprEqn, Literal, Var


class Sight(NamedTuple):
  """What is seen of an equation when its rule is chosen.

  Attributes:
    eqn: The equation.
    name: The name of its primitive.
    rule: The rule of that.
    forms: How its operands are held.
    compute: The compute dtype that governs it.
    around: What is known of the jaxpr that it stands in.
    place: Where it stands.
  """

  eqn: JaxprEqn
  name: str
  rule: Rule
  forms: Forms
  compute: np.dtype
  around: Knowledge
  place: Place

  @property
  def result(self) -> Any:
    """The first result."""
    return self.eqn.outvars[0]

  @property
  def has_float32(self) -> bool:
    """Whether an operand is float32 in the trace."""
    return any(self.forms)


class Sharpening(NamedTuple):
  """A rule for equations that their primitive's rule does not fit.

  Attributes:
    name: What they are.
    of: Among which they are: names of primitives, or rules that primitives have.
    fits: Whether one of these is such an equation.
    rule: The rule; None for that of the primitive, which nothing sharpens further.
    reason: Why.
    lasts: Whether what such an equation makes is float32 behind the module that it stands in, too:
      it was computed for what others do with it.
  """

  name: str
  of: Collection[str | Rule]
  fits: Callable[[Sight], bool]
  rule: Rule | None
  reason: str
  lasts: bool = False


SHARPENINGS: tuple[Sharpening, ...] = (
  Sharpening(
    "number that does not adapt",
    {"gather"},
    lambda s: not s.around.adapting.holds(fill_value(s.eqn)),
    Rule.FULL,
    "what an index out of bounds gives would be another number in 16 bits",
  ),
  Sharpening(
    "body of references",
    RULES_WITH_BODIES,
    lambda s: not all(hasattr(a.aval, "dtype") for a in s.eqn.invars),
    Rule.TRACED,
    "a mutable reference cannot change its dtype",
  ),
  Sharpening(
    "keep_float32",
    {"name"},
    lambda s: s.eqn.params["name"] == KEEP_FLOAT32,
    Rule.FULL,
    "its author said so",
  ),
  Sharpening(
    "scatter of a function",
    {"scatter"},
    lambda s: s.eqn.params.get("update_jaxpr") is not None,
    Rule.ALWAYS,
    "the function was traced in float32",
  ),
  Sharpening("no 16-bit kernel", {Rule.ALWAYS}, lambda s: True, None, "as the table says"),
  Sharpening(
    "float32 policy",
    {Rule.LOWER, Rule.RANGE, Rule.FOLLOW},
    lambda s: s.compute == FLOAT32,
    Rule.FULL,
    "the policy computes in float32",
  ),
  Sharpening(
    "near one or into a logarithm",
    frozenset(Rule),
    lambda s: (
      not s.around.exact.isdisjoint(s.eqn.outvars) and (s.name in GATES or _is_narrow(s.forms))
    ),
    Rule.FULL,
    "a 16-bit sigmoid is 1 from an argument of 6 on, and 0.999 is 1 in bfloat16",
    lasts=True,
  ),
  Sharpening(
    "square",
    {"integer_pow", "mul"},
    lambda s: is_square(s.eqn),
    Rule.FULL,
    "nearly always feeds a sum: a variance, a norm",
  ),
  Sharpening(
    "term of a total",
    {"mul"},
    lambda s: all(map(_is_float16, s.forms)) and s.result in s.around.totaled,
    Rule.FULL,
    "a product of two values, of which a sum or a root is taken: 300 times 300 exceeds float16",
  ),
  Sharpening(
    "picked numbers",
    {"gather"},
    lambda s: picks_numbers(s.eqn, s.forms),
    Rule.FULL,
    "their cotangents meet those of the logsumexp before they round",
  ),
  Sharpening(
    "matmul with another format",
    {Rule.LOWER},
    lambda s: has_foreign_float(s.eqn, s.forms),
    Rule.TRACED,
    "float64, complex and 8-bit operands are their author's",
  ),
  Sharpening(
    "inner product",
    {Rule.LOWER},
    lambda s: s.has_float32 and jaxprs.is_inner(s.eqn),
    Rule.FULL,
    "a sum of products, as (x * y).sum() is, and no more a matmul: 1e-4 squared is 0 in float16",
  ),
  Sharpening(
    "weighted sum",
    {"dot_general"},
    lambda s: s.rule is Rule.LOWER and s.has_float32 and _is_weighted_sum(s),
    Rule.WEIGH,
    "terms times numbers of which some cancel: an error estimate, an expectation",
  ),
  Sharpening(
    "stencil",
    {"conv_general_dilated"},
    lambda s: s.rule is Rule.LOWER and s.has_float32 and _has_constant_weights(s),
    Rule.FULL,
    "differences of neighbors are small beside these",
  ),
  Sharpening(
    "power iteration",
    {Rule.LOWER},
    lambda s: s.has_float32 and s.result in s.around.iterated,
    Rule.FULL,
    "every weight is divided by the norm that it finds",
  ),
  Sharpening(
    "whole numbers",
    {Rule.LOWER},
    lambda s: s.has_float32 and s.result in s.around.whole,
    Rule.FULL,
    "it counts, or finds positions and indices: 256 + 1 is 256 in bfloat16",
  ),
  Sharpening(
    "outer product",
    {Rule.LOWER},
    lambda s: s.has_float32 and jaxprs.contracts_nothing(s.eqn) and _is_float32(s.forms),
    Rule.MULTIPLY,
    "a product that contracts nothing is a multiplication: positions survive",
  ),
  Sharpening(
    "what is added up",
    {Rule.LOWER},
    lambda s: s.has_float32 and s.around.sums.is_sum(s.eqn),
    Rule.WIDE,
    "16-bit products, float32 sums: a gradient leaves its matmul as that summed it up",
  ),
  Sharpening(
    "test of a loop",
    {Rule.LOWER},
    lambda s: s.has_float32 and s.around.is_test,
    Rule.FULL,
    "a residual is a small difference: rounded, it never falls below a tolerance",
  ),
  Sharpening(
    "linear recurrence",
    {Rule.LOWER},
    lambda s: s.has_float32 and _hands_on(s),
    Rule.FULL,
    "what rounds in one turn of a long loop is there in all later ones: 64 for 100",
  ),
  Sharpening(
    "amplified",
    {Rule.LOWER},
    lambda s: (_is_amplified(s) and _is_of_data(s)) or _reads_solution(s),
    Rule.FULL,
    "a linear system multiplies what rounds by its condition, and a variance is a small difference",
  ),
  Sharpening(
    "amplified, of narrow values",
    {Rule.LOWER},
    lambda s: _is_amplified(s),
    Rule.WIDE,
    "a Gram matrix that rounds has negative eigenvalues, however much its diagonal is damped",
  ),
  Sharpening(
    "integers",
    {Rule.LOWER},
    lambda s: s.has_float32 and s.name in MATMULS and any(map(_is_integer, s.eqn.invars)),
    Rule.WIDE,
    "the scale of integers stands behind the matmul: its sums leave the range of float16",
  ),
  Sharpening(
    "few outputs",
    {"dot_general"},
    lambda s: s.rule is Rule.LOWER and s.has_float32 and _is_head(s),
    Rule.WIDE,
    "what a model predicts is read in its own unit: 1003 is 1000 in bfloat16",
  ),
  Sharpening(
    "small step",
    {"add", "sub"},
    lambda s: _is_narrow(s.forms) and is_small_step(s.eqn, s.around.view, s.around.carried),
    Rule.FULL,
    "0.002 times what a value gave, or its gradient, is lost where 16 bits add it to that value",
    lasts=True,
  ),
  Sharpening(
    "running sum",
    {"add", "sub"},
    lambda s: (
      _is_narrow(s.forms)
      and (s.result in s.around.running or adds_neighbors(s.eqn, s.around.view.makers))
    ),
    Rule.FULL,
    "a sum of many terms that a Python loop or an associative scan writes out, as a cumsum",
    lasts=True,
  ),
  Sharpening(
    "merged parameter",
    {"add", "sub"},
    lambda s: _is_narrow(s.forms) and merges(s.eqn, s.forms, s.around),
    Rule.FULL,
    "a parameter with a low-rank change merged into it is a parameter, in float32",
    lasts=True,
  ),
  Sharpening(
    "divides by a narrow value",
    {"div"},
    lambda s: s.rule is Rule.FOLLOW and _is_float16(s.forms[1]),
    Rule.FULL,
    "its derivative divides by the square of that, which leaves the range of float16",
  ),
  Sharpening(
    "large number",
    {"mul", "div"},
    lambda s: any(map(_is_float16, s.forms)) and multiplies_by_much(s.eqn, s.around.numbers),
    Rule.FULL,
    "times 30000 a value of 3 exceeds float16: an output comes back in its own unit",
    lasts=True,
  ),
  Sharpening(
    "leaves the range of float16",
    {Rule.RANGE},
    lambda s: _held(s) == FLOAT16,
    Rule.FULL,
    "256 squared exceeds float16",
  ),
  Sharpening(
    "within range", {Rule.RANGE}, lambda s: True, Rule.FOLLOW, "bfloat16 has float32's range"
  ),
)
"""What replaces the rule of a primitive where an equation shows more than its name, in order."""


def sharpening_of(sight: Sight) -> Sharpening | None:
  """The first sharpening that fits an equation; None where the rule of its primitive holds."""
  for sharpening in _of(sight.name, sight.rule):
    if sharpening.fits(sight):
      return sharpening
  return None


@functools.cache
def _of(name: str, rule: Rule) -> tuple[Sharpening, ...]:
  """The sharpenings that an equation with this primitive, which has this rule, may have."""
  return tuple(s for s in SHARPENINGS if name in s.of or rule in s.of)


def _is_float32(forms: Forms) -> bool:
  """Whether operands are held in float32 together."""
  form = join(forms)
  return form is not None and form.dtype == FLOAT32


def _is_narrow(forms: Forms) -> bool:
  """Whether operands are held in 16 bits together."""
  form = join(forms)
  return form is not None and form.kind is Kind.NARROW


def _is_data(form: Form | None) -> bool:
  """Whether a value is float32, and no parameter."""
  return form is not None and form.kind is Kind.DATA


def _is_amplified(sight: Sight) -> bool:
  """Whether what rounds in a matmul is many times as much where its result is used."""
  factored, moments = sight.around.factored, sight.around.moments
  if not (factored or moments) or not sight.has_float32:
    return False
  return sight.result in factored or sight.result in moments


def _is_of_data(sight: Sight) -> bool:
  """Whether it is so of a float32 operand; a layer before a linear system is a layer."""
  is_layer = PARAM in sight.forms and sight.result not in sight.around.moments
  return not is_layer and any(map(_is_data, sight.forms))


def _reads_solution(sight: Sight) -> bool:
  """Whether what a linear system gives is multiplied once: ``inv(a) @ b``, ``v @ fit``."""
  found, around = sight.around.solved, sight.around
  is_last = bool(found) and sight.result not in around.multiplied
  is_last = is_last and sight.has_float32 and not _any_is_narrow(sight.forms)
  return is_last and bool(jaxprs.places_of(sight.eqn.invars, found))


def _any_is_narrow(forms: Forms) -> bool:
  """Whether a layer made one of some operands."""
  return any(form is not None and form.kind is Kind.NARROW for form in forms)


def _is_integer(atom: Atom) -> bool:
  dtype = jaxprs.dtype(atom)
  return dtype is not None and jnp.issubdtype(dtype, jnp.integer)


def _is_float16(form: Form | None) -> bool:
  """Whether a value that came out of a matmul is held in float16."""
  return form is not None and form.kind is Kind.NARROW and form.dtype == FLOAT16


def _held(sight: Sight) -> np.dtype | None:
  """The dtype that an equation's operands have together where they follow each other."""
  form = join(sight.forms)
  return sight.compute if form and form.kind < Kind.NARROW else form and form.dtype


def is_square(eqn: JaxprEqn) -> bool:
  """X * x and x ** 2 are squares, however they were written."""
  if eqn.primitive.name == "integer_pow":
    return eqn.params["y"] == 2
  return eqn.primitive.name == "mul" and eqn.invars[0] is eqn.invars[1]


def _is_weighted_sum(sight: Sight) -> bool:
  """Whether a matmul weighs terms with constants: a few, as a Runge-Kutta method does.

  Or any number of which an expectation is taken: what a head is of its features.
  """
  if not _has_constant_weights(sight):
    return False
  (contracted, _), _ = sight.eqn.params["dimension_numbers"]
  terms = jaxprs.size_of([jaxprs.shape(sight.eqn.invars[0])[dim] for dim in contracted])
  return terms <= SHORT or _is_head(sight)


def _has_constant_weights(sight: Sight) -> bool:
  """Whether a vector or small kernel that is multiplied depends on no argument."""
  constant = sight.around.constant
  if not constant or PARAM in sight.forms or _any_is_narrow(sight.forms):
    return False
  return bool(jaxprs.places_of(weights_of(sight.eqn), constant))


SHORT = 16
"""As many terms as a weighted sum may have that another matmul multiplies."""


def _hands_on(sight: Sight) -> bool:
  """Whether a long loop's next turn has what it carries from a matmul; no parameter in training.

  Or whether that multiplies two values that the loop carries, and no layer made.
  """
  found, pure = sight.around.recurrence, sight.around.sums.pure
  if not found.linear or sight.place.has_cotangents:
    return False
  read = [a for a in sight.eqn.invars if not isinstance(a, Literal) and a in found.linear]
  if len(read) > 1:
    return all(map(_is_data, sight.forms))
  return bool(read) and sight.result in found.leads and read[0] not in pure


def multiplies_by_much(eqn: JaxprEqn, numbers: Numbers) -> bool:
  """Whether an operand of a product, or what a quotient divides by, is a number like 5000."""
  is_product = eqn.primitive.name == "mul"
  known = [n for a in eqn.invars[not is_product :] for n in numbers.of(a) or () if np.isfinite(n)]
  return any(abs(n) >= MUCH if is_product else 0 < abs(n) <= 1 / MUCH for n in known)


def _is_head(sight: Sight) -> bool:
  """Whether a matmul makes little of much, and nothing that another matmul multiplies."""
  if sight.result in sight.around.multiplied or sight.place.has_cotangents:
    return False
  read = [a for a, form in zip(sight.eqn.invars, sight.forms, strict=True) if form != PARAM]
  return FEW * jaxprs.size(sight.result) <= max(map(jaxprs.size, read), default=0)


FEW = 8
"""Predictions of which there are this many times fewer than features cost nothing in float32."""

MUCH = 2**12
"""A number by which nothing from 16 on is multiplied that is to stay in the range of float16."""


def picks_numbers(eqn: JaxprEqn, forms: Forms) -> bool:
  """Whether a gather takes single narrow numbers: the logits of the labels, in most losses.

  Read in float32, their cotangents meet those of the logsumexp before they round.
  """
  picks = set(eqn.params["slice_sizes"]) <= {1}
  return picks and forms[0] is not None and forms[0].kind is Kind.NARROW


def fill_value(eqn: JaxprEqn) -> float | None:
  """What a gather of floats gives for an index that is out of bounds, if that is a number."""
  fill = eqn.params["fill_value"]
  return fill if fill is not None and jaxprs.is_float32(eqn.outvars[0]) and fill == fill else None


def merges(eqn: JaxprEqn, forms: Forms, around: Knowledge) -> bool:
  """Whether a whole matrix of parameters is added to what matmuls made of parameters alone.

  Not a vector of them, which is a bias, nor one that is spread over a batch: queries that are
  learned are the first stream of a decoder.
  """
  pairs = zip(eqn.invars, forms, strict=True)
  matrices = [atom for atom, form in pairs if form == PARAM and len(jaxprs.shape(atom)) > 1]
  return (
    all(not isinstance(atom, Literal) and atom in around.sums.pure for atom in eqn.invars)
    and jaxprs.size(eqn.outvars[0]) in set(map(jaxprs.size, matrices))
    and not any(_was_spread(atom, around.view.makers) for atom in matrices)
  )


def _was_spread(atom: Atom, makers: Mapping[Var, JaxprEqn]) -> bool:
  """Whether a value is larger than what it was moved or cast from."""
  while not isinstance(atom, Literal) and (made := makers.get(atom)) and len(made.invars) == 1:
    (before,) = made.invars
    if jaxprs.size(before) < jaxprs.size(atom):
      return True
    atom = before
  return False


def looks_up_rows(sight: Sight) -> bool:
  """Whether a gather takes many rows of a parameter, which a matmul reads by and by: an embedding.

  They are cast after the lookup, so that the gradient of a row that is taken often sums up in
  float32; but they are cast, for a sum of embeddings is as large as any activation. One row, or
  single numbers, are still a parameter; so are the corners of a mesh, whose differences are its
  edges, and whatever else no matmul reads.
  """
  eqn, (form, *_) = sight.eqn, sight.forms
  if sight.name != "gather" or form is None or form.kind is not Kind.PARAM:
    return False
  indices: Any = eqn.invars[1].aval
  is_many = jaxprs.size_of(indices.shape[:-1]) > 1 and jaxprs.size_of(eqn.params["slice_sizes"]) > 1
  return is_many and sight.result in sight.around.multiplied


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
