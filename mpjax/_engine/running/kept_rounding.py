"""Values whose rounding must not be left out, since more than themselves depends on it.

XLA computes bfloat16 in float32, and leaves out the rounding between what it fuses: one reader gets
``100 * h`` as it was rounded, another as it was before (its ``xla_allow_excess_precision``). That
is as good as either, but in ``exp(x - f(x))``, as the derivative of a `logaddexp` has it, whose f
is at least x: where x is 1000 the two x differ by up to 4, and instead of one it gives ``exp(4)``.
Nor is it in a distance, ``|x|**2 - 2 * x @ y.T + |y|**2``, where the matmul gets x as it was
rounded, the squares as it was before: of near points little but the difference of both is left.
Nor behind a Gram matrix that is inverted, whose features come again in its derivative; nor in
``z + (q - z)``, of which z is taken away again.
The rounding of such an x is kept: it is fused as other operations are, and stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import jet

from mpjax._core.primitives import ADDS, SCALES, UNCHANGED, Rule
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.program.bodies import bodies_of
from mpjax._engine.program.jaxprs import behind, makers_of, variables_of
from mpjax._engine.program.kinds import is_data, is_narrow
from mpjax._engine.program.versions import Atom, JaxprEqn, Var, open_jaxpr

_GROWS = frozenset({"exp", "exp2"})
_MOVES = UNCHANGED | {"select_n"}
_LEADS_ON = _MOVES | ADDS | SCALES | {"neg"}
_HANDS_ON = _MOVES | SCALES | {"neg", "slice", "dynamic_slice", "concatenate", "stop_gradient"}
_PICKS = frozenset({"reduce_max", "reduce_min"})
"""One of the values themselves, as a softmax subtracts: all are off alike, and normalized."""


def kept_rounding(plan: Plan, known: dict[Plan, frozenset[Var]]) -> frozenset[Var]:
  """The narrow values of a plan whose rounding is kept.

  Args:
    plan: The plan.
    known: Those of plans that were asked for before; others are added.
  """
  if plan not in known:
    multiplied = _multiplied(plan, known)
    differences = [step for step in plan.steps if _is_difference(step)]
    found = _exponents(plan, differences) if differences else frozenset[Var]()
    known[plan] = found | (_narrow(plan) & multiplied if multiplied else multiplied)
  return known[plan]


def _multiplied(plan: Plan, known: dict[Plan, frozenset[Var]]) -> frozenset[Var]:
  """What is read by moments, by what is amplified or taken back, in the bodies of a plan too."""
  found: list[Atom] = []
  for step in plan.steps:
    if step.rule is Rule.EXACT or step.is_of_difference:
      found += step.eqn.invars
    for body, inner in zip(bodies_of(step.eqn) if step.bodies else (), step.bodies, strict=False):
      kept = kept_rounding(inner, known)
      pairs = zip(open_jaxpr(inner.jaxpr).invars, body.take(step.eqn.invars), strict=True)
      found += [atom for var, atom in pairs if var in kept]
  if not found:  # as nearly always
    return frozenset()
  makers = makers_of(open_jaxpr(plan.jaxpr))
  return frozenset(var for atom in found for var in _moved_from(atom, makers))


def _moved_from(atom: Atom, makers: dict[Var, JaxprEqn]) -> Iterator[Var]:
  """A value, and what it was moved from or is a multiple of."""
  waiting = [atom]
  while waiting:
    for var in variables_of([waiting.pop()]):
      yield var
      made = makers.get(var)
      waiting += made.invars if made is not None and made.primitive.name in _HANDS_ON else ()


def _exponents(plan: Plan, differences: Sequence[Step]) -> frozenset[Var]:
  """The narrow values from which is subtracted what was computed of them, before an exponential."""
  makers = makers_of(open_jaxpr(plan.jaxpr))
  computing = {var: eqn for var, eqn in makers.items() if eqn.primitive.name not in _PICKS}
  grows, narrow = _into_exponentials(plan), _narrow(plan)
  return narrow.intersection(
    var for step in differences if step.eqn.outvars[0] in grows for var in _in_both(step, computing)
  )


def _narrow(plan: Plan) -> frozenset[Var]:
  """What is held in 16 bits."""
  pairs = [(open_jaxpr(plan.jaxpr).invars, plan.in_forms)]
  pairs += [(step.eqn.outvars, step.outs) for step in plan.steps]
  return frozenset(v for pair in pairs for v, form in zip(*pair, strict=True) if is_narrow(form))


def _into_exponentials(plan: Plan) -> set[Var]:
  """What exponentials are taken of: as it is, as a multiple, or with something added."""
  found = set[Var]()
  for eqn in (step.eqn for step in reversed(plan.steps)):
    name = eqn.primitive.name
    if name in _GROWS or (name in _LEADS_ON and not found.isdisjoint(eqn.outvars)):
      found |= variables_of(eqn.invars)
  return found


def _is_difference(step: Step) -> bool:
  """Whether a step subtracts float32 from what is held in 16 bits, or the reverse."""
  if step.eqn.primitive.name != "sub":
    return False
  return any(map(is_narrow, step.operands)) and any(map(is_data, step.operands))


def _in_both(step: Step, makers: dict[Var, JaxprEqn]) -> set[Var]:
  """What the narrow operand of a difference was moved from, of which the other is made."""
  pair = zip(step.eqn.invars, step.operands, strict=True)
  (narrow, _), (other, _) = sorted(pair, key=lambda operand: not is_narrow(operand[1]))
  made, found, waiting = {var for var, _ in behind(other, makers)}, set[Var](), [narrow]
  while waiting:
    here = variables_of([waiting.pop()])
    found |= here & made
    for eqn in (makers[var] for var in here - made if var in makers):
      waiting += eqn.invars if eqn.primitive.name in _MOVES else ()
  return found


jet.jet_rules.setdefault(
  lax.reduce_precision_p,
  lambda primals, series, **params: (
    lax.reduce_precision_p.bind(*primals, **params),
    [lax.reduce_precision_p.bind(term, **params) for term in series[0]],
  ),
)  # it is linear, and JAX has none


def rounded(x: jax.Array) -> jax.Array:
  """A 16-bit value, which all who read it get as it was rounded."""
  info = jnp.finfo(x.dtype)
  return lax.reduce_precision(x, info.nexp, info.nmant)
