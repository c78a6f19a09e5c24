"""What an equation shows beyond its primitive's name: squares, lookups, sums, outer products.

`SHARPENINGS` is the list: the first that fits an equation replaces the rule of its primitive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

from mpjax._core.dtypes import FLOAT16, FLOAT32
from mpjax._core.primitives import ADDS, MATMULS, SCALES, Rule
from mpjax._engine.analyses.points import transforms_points
from mpjax._engine.analyses.roles import GATES
from mpjax._engine.analyses.running_sums import adds_neighbors
from mpjax._engine.analyses.small_steps import is_small_step
from mpjax._engine.planning import matmul_sight, recurring, sight
from mpjax._engine.planning.own_unit import adds_much
from mpjax._engine.planning.sight import Sight
from mpjax._engine.program import matmuls
from mpjax._engine.program.bodies import RULES_WITH_BODIES
from mpjax._engine.program.keep_float32 import KEEP_FLOAT32
from mpjax._engine.program.kinds import PARAM, is_narrow


class Sharpening(NamedTuple):
  """A rule for equations that their primitive's rule does not fit.

  Attributes:
    name: What they are.
    of: Among which they are: names of primitives, or rules that primitives have.
    fits: Whether one of these is such an equation.
    rule: The rule.
    reason: Why.
    lasts: Whether what such an equation makes is float32 behind the module that it stands in, too:
      it was computed for what others do with it.
    is_of_difference: Whether little is left of what it makes beside other terms, which read the
      same values: the rounding of these is kept.
  """

  name: str
  of: Collection[str | Rule]
  fits: Callable[[Sight], bool]
  rule: Rule
  reason: str
  lasts: bool = False
  is_of_difference: bool = False

  @property
  def because(self) -> str:
    """Both in words."""
    return f"{self.name}: {self.reason}"


SHARPENINGS: tuple[Sharpening, ...] = (
  Sharpening(
    "number that does not adapt",
    {"gather"},
    sight.fills_with_another,
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
      not s.around.exact.isdisjoint(s.eqn.outvars)
      and (s.name in GATES or s.name == "div" or s.is_narrow)
    ),
    Rule.FULL,
    "in bfloat16 a sigmoid is 1 from an argument of 6.3 on, in float16 of 8.4, and 0.999 is 1",
    lasts=True,
  ),
  Sharpening(
    "near a number",
    ADDS,
    lambda s: s.is_narrow and s.result in s.around.shifts and sight.is_near_a_number(s),
    Rule.FULL,
    "what multiplies a state again and again is a number and little more: 0.9 + 0.01 * x",
    lasts=True,
  ),
  Sharpening(
    "square",
    {"integer_pow", "mul", "square"},
    lambda s: sight.is_square(s) and not sight.is_activation(s),
    Rule.FULL,
    "nearly always feeds a sum: a variance, a norm",
  ),
  Sharpening(
    "square before a layer",
    {"square"},
    sight.is_activation,
    Rule.FOLLOW,
    "weights alone multiply it: it rounds there anyway",
  ),
  Sharpening(
    "term of a total",
    {"mul"},
    lambda s: all(s.are_float16) and s.result in s.around.uses.totaled,
    Rule.FULL,
    "a product of two values, of which a sum or a root is taken: 300 times 300 exceeds float16",
  ),
  Sharpening(
    "sum of products",
    {"mul"},
    lambda s: (
      not s.place.has_cotangents
      and all(map(is_narrow, s.forms))
      and s.result in s.around.uses.summed
    ),
    Rule.FULL,
    "an inner product written out: a covariance is a small difference of such sums",
  ),
  Sharpening(
    "sum over a few devices",
    {"psum", "psum_invariant", "reduce_scatter"},
    sight.ends_layer,
    Rule.FOLLOW,
    "each has a part of one matmul, whose result goes on into a layer",
  ),
  Sharpening(
    "pool",
    {"reduce_max", "reduce_min", "scatter-max", "scatter-min"},
    lambda s: s.is_narrow and sight.is_pooled(s),
    Rule.FOLLOW,
    "the largest goes on into a layer, subtracted from nothing: it is one of the narrow values",
  ),
  Sharpening(
    "picked numbers",
    {"gather"},
    sight.picks_numbers,
    Rule.FULL,
    "their cotangents meet those of the logsumexp before they round",
  ),
  Sharpening(
    "matmul with another format",
    {Rule.LOWER},
    matmul_sight.has_foreign_float,
    Rule.TRACED,
    "float64, complex and 8-bit operands are their author's",
  ),
  Sharpening(
    "matmul without float32",
    {Rule.LOWER},
    lambda s: not s.has_float32,
    Rule.LOWER,
    "there is nothing to cast",
  ),
  Sharpening(
    "numbers that the format does not hold",
    {Rule.LOWER},
    lambda s: (
      any(s.around.is_lacked_by(s.compute, atom) for atom in s.eqn.invars)
      or matmul_sight.leaves_range(s)
    ),
    Rule.FULL,
    "a matrix of 100000s, or of squares, would be one of infinities in float16, and one of 1e-9s "
    "of zeros; of whole numbers 343 would be 344 in bfloat16",
  ),
  Sharpening(
    "inner product",
    MATMULS,
    lambda s: matmuls.is_inner(s.eqn) or matmul_sight.is_of_quadratic_form(s),
    Rule.FULL,
    "a sum of products, as (x * y).sum() is: 257 is 256 in bfloat16, 1e-4 squared 0 in float16",
  ),
  Sharpening(
    "weighted sum",
    MATMULS,
    matmul_sight.is_weighted_sum,
    Rule.MULTIPLY,
    "terms times numbers of which some cancel: an error estimate, an expectation",
  ),
  Sharpening(
    "stencil",
    MATMULS,
    lambda s: s.name == "conv_general_dilated" and matmul_sight.has_constant_weights(s),
    Rule.FULL,
    "differences of neighbors are small beside these",
  ),
  Sharpening(
    "power iteration",
    MATMULS,
    lambda s: s.result in s.around.iterated,
    Rule.FULL,
    "every weight is divided by the norm that it finds",
  ),
  Sharpening(
    "outer product",
    MATMULS,
    lambda s: matmuls.contracts_nothing(s.eqn) and not s.is_narrow,
    Rule.MULTIPLY,
    "a product that contracts nothing is a multiplication: positions survive",
  ),
  Sharpening(
    "quantized layer",
    MATMULS,
    lambda s: s.result in s.around.made.whole and matmul_sight.is_quantized_layer(s),
    Rule.WIDE,
    "16 bits hold the grid of 8 that its weights are rounded to, and the sums are float32",
  ),
  Sharpening(
    "whole numbers",
    MATMULS,
    lambda s: s.result in s.around.made.whole,
    Rule.FULL,
    "it counts, or finds positions and indices: 256 + 1 is 256 in bfloat16",
  ),
  Sharpening(
    "rotation or projection",
    MATMULS,
    lambda s: transforms_points(s.eqn, s.forms, s.around.frame, s.around.sums.pure),
    Rule.FULL,
    "a few terms of coordinates, as if it were written out: pixels come in steps of 2 in bfloat16",
  ),
  Sharpening(
    "fixed transform",
    MATMULS,
    matmul_sight.is_fixed_transform,
    Rule.FULL,
    "it interpolates or differentiates data, as what is no matmul would: labels survive",
  ),
  Sharpening(
    "centering",
    MATMULS,
    matmul_sight.is_centering,
    Rule.FULL,
    "what is left of values less their mean is small beside them",
  ),
  Sharpening(
    "phase",
    MATMULS,
    matmul_sight.is_phase,
    Rule.FULL,
    "only what is left of it modulo a period counts: of 100 that is 6",
  ),
  Sharpening(
    "derivative of a distance or variance",
    MATMULS,
    lambda s: s.result in s.around.moments.derivatives,
    Rule.FULL,
    "what comes back to the ends of a distance, or to a variance, is a small difference, too",
  ),
  Sharpening(
    "solver of features",
    MATMULS,
    recurring.seeks_of_features,
    Rule.FULL,
    "rounded in each turn, what a loop seeks of what layers gave never comes near enough",
  ),
  Sharpening(
    "amplified",
    MATMULS,
    lambda s: (
      (matmul_sight.is_amplified(s) and matmul_sight.is_of_data(s))
      or matmul_sight.is_amplified_later(s)
      or matmul_sight.reads_solution(s)
    ),
    Rule.FULL,
    "a linear system multiplies what rounds by its condition",
  ),
  Sharpening(
    "what is added up",
    MATMULS,
    lambda s: s.around.sums.is_sum(s.eqn),
    Rule.WIDE,
    "16-bit products, float32 sums: a gradient leaves its matmul as that summed it up",
  ),
  Sharpening(
    "precision of its author",
    MATMULS,
    matmul_sight.is_asked_for,
    Rule.FULL,
    "float32 by float32, of which none is a layer's, and precision=HIGHEST is asked of it",
  ),
  Sharpening(
    "test of a loop",
    MATMULS,
    lambda s: s.around.is_test or any(map(s.around.is_tested, s.eqn.invars)),
    Rule.FULL,
    "a residual is a small difference: rounded, it never falls below a tolerance, nor if the loop "
    "multiplies in another format than its test",
  ),
  Sharpening(
    "loop to a tolerance",
    MATMULS,
    recurring.decides_an_end,
    Rule.FULL,
    "float32 by float32, on which a loop's end depends: rounded, it never comes near enough",
  ),
  Sharpening(
    "iteration",
    MATMULS,
    lambda s: matmul_sight.is_of_float32(s) and recurring.iterates(s),
    Rule.FULL,
    "a float32 matrix times a vector, again and again: to cast it costs as much as to multiply it",
  ),
  Sharpening(
    "linear recurrence",
    MATMULS,
    recurring.hands_on,
    Rule.FULL,
    "what rounds in one turn of a long loop is there in all later ones: 64 for 100",
  ),
  Sharpening(
    "product of neighbors, or power",
    MATMULS,
    lambda s: (
      recurring.multiplies_neighbors(s) or (not s.has_layer and s.result in s.around.powers)
    ),
    Rule.FULL,
    "an associative scan of matrices is a linear recurrence, too, and so is squaring one again",
  ),
  Sharpening(
    "distance or variance",
    MATMULS,
    lambda s: (
      s.result in s.around.moments.values and (PARAM in s.forms or matmul_sight.is_of_data(s))
    ),
    Rule.FULL,
    "a small difference of this and of what is added to it: what rounds in either is large beside",
    is_of_difference=True,
  ),
  Sharpening(
    "distance or variance of narrow values",
    MATMULS,
    lambda s: s.result in s.around.moments.values,
    Rule.EXACT,
    "they round no more, but what comes back to them is a small difference, too",
    is_of_difference=True,
  ),
  Sharpening(
    "transform of data",
    MATMULS,
    matmul_sight.transforms_data,
    Rule.FULL,
    "a matrix that is data is no layer's: what is left of 293 kelvin less what it makes of them "
    "would be rounding",
  ),
  Sharpening(
    "small matrices of outputs",
    MATMULS,
    matmul_sight.is_of_few_outputs,
    Rule.FULL,
    "float32 that no layer reads, as the strain of a deformation: an energy is little beside it",
  ),
  Sharpening(
    "weighted data",
    MATMULS,
    matmul_sight.weighs_given,
    Rule.FULL,
    "a product and a sum, as (f(z) * dx).sum(): it moves a state by less than 16 bits hold",
  ),
  Sharpening(
    "sum that is taken back",
    ADDS,
    lambda s: s.has_narrow and s.result in s.around.uses.taken_back,
    Rule.FULL,
    "what is left, as the code of a straight-through estimator, may be small beside both",
    is_of_difference=True,
  ),
  Sharpening(
    "amplified, of narrow values",
    MATMULS,
    matmul_sight.is_amplified,
    Rule.EXACT,
    "they round no more, but what comes back from a linear system is multiplied by its condition",
  ),
  Sharpening(
    "layer before a linear system",
    MATMULS,
    lambda s: s.result in s.around.leading.factored,
    Rule.WIDE,
    "what rounds in a matrix makes its eigenvalues negative, however much its diagonal is damped",
  ),
  Sharpening(
    "integers",
    MATMULS,
    matmul_sight.has_integer,
    Rule.WIDE,
    "the scale of integers stands behind the matmul: its sums are beyond what 16 bits tell apart",
  ),
  Sharpening(
    "few sums of data",
    MATMULS,
    lambda s: matmul_sight.is_head(s) and matmul_sight.weighs_data(s),
    Rule.FULL,
    "what is made of data may be in their unit, and compared with them: 1001 is 1000 in bfloat16",
  ),
  Sharpening(
    "few outputs",
    MATMULS,
    matmul_sight.is_head,
    Rule.WIDE,
    "what a model predicts is read in its own unit: 1001 is 1000 in bfloat16",
  ),
  Sharpening(
    "own unit",
    ADDS,
    lambda s: s.is_narrow and adds_much(s),
    Rule.FULL,
    "300, or a parameter, and what a model says: its output comes back in its own unit",
    lasts=True,
  ),
  Sharpening(
    "small step",
    ADDS,
    lambda s: s.is_narrow and is_small_step(s.eqn, s.around.frame, s.around.carried),
    Rule.FULL,
    "0.002 times what a value gave, or its gradient, is lost where 16 bits add it to that value",
    lasts=True,
  ),
  Sharpening(
    "running sum",
    ADDS,
    lambda s: (
      s.is_narrow and (s.result in s.around.running or adds_neighbors(s.eqn, s.around.frame.makers))
    ),
    Rule.FULL,
    "a sum of many terms that a Python loop or an associative scan writes out, as a cumsum",
    lasts=True,
  ),
  Sharpening(
    "merged parameter",
    ADDS,
    lambda s: s.is_narrow and sight.merges(s),
    Rule.FULL,
    "a parameter with a low-rank change merged into it is a parameter, in float32",
    lasts=True,
  ),
  Sharpening(
    "divides by a narrow value",
    {"div"},
    lambda s: s.rule is Rule.FOLLOW and s.are_float16[1],
    Rule.FULL,
    "its derivative divides by the square of that, which leaves the range of float16",
  ),
  Sharpening(
    "large number",
    SCALES,
    lambda s: any(s.are_float16) and sight.multiplies_by_much(s),
    Rule.FULL,
    "times 30000 a value of 3 exceeds float16: an output comes back in its own unit",
    lasts=True,
  ),
  Sharpening(
    "leaves the range of float16",
    {Rule.RANGE},
    lambda s: sight.held_together(s) == FLOAT16,
    Rule.FULL,
    "256 squared exceeds float16",
  ),
  Sharpening(
    "within range", {Rule.RANGE}, lambda s: True, Rule.FOLLOW, "bfloat16 has float32's range"
  ),
)
"""What replaces the rule of a primitive where an equation shows more than its name, in order."""


def sharpening_of(seen: Sight) -> Sharpening | None:
  """The first sharpening that fits an equation; None where the rule of its primitive holds."""
  for sharpening in _of(seen.name, seen.rule):
    if sharpening.fits(seen):
      return sharpening
  return None


@functools.cache
def _of(name: str, rule: Rule) -> tuple[Sharpening, ...]:
  """The sharpenings that an equation with this primitive, which has this rule, may have."""
  lowered = rule is Rule.LOWER  # a policy may lower other operations, and keep matmuls
  return tuple(
    s for s in SHARPENINGS if rule in s.of or (name in s.of and (s.of is not MATMULS or lowered))
  )
