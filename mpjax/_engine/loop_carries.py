"""How the values that a loop carries are held: a sum that its format cannot count is float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpjax._core.primitives import KEEPS_NUMBERS, MATMULS
from mpjax._engine import versions
from mpjax._engine.bodies import Body, bodies_of, repetitions
from mpjax._engine.kinds import DATA, PARAM, Form, Kind
from mpjax._engine.versions import AnyJaxpr, JaxprEqn, Literal, Var

TERMS = 128
"""How many terms a sum in 16 bits may have: no stack of layers is higher.

256 + 1 is 256 in bfloat16. float16 counts to 2048, but the roundings of a thousand terms often have
one sign, and make a hundredth of the sum.
"""


def long_sums(body: Body, turns: int | None) -> list[bool]:
  """Which values a loop carries that it adds more than `TERMS` terms to.

  Args:
    body: The loop's body.
    turns: How often it runs, None if it does not say.
  """
  terms = accumulates(body.jaxpr, body.carry)
  return [bool(term) and (turns is None or turns * term > TERMS) for term in terms]


def accumulator(form: Form | None, is_long: bool) -> Form | None:
  """How a carry is held that starts in a form.

  One that starts from a constant is an accumulator or the state of a recurrent cell: it is
  float32, as is a 16-bit one that more than `TERMS` are added to.
  """
  if form is None or form.kind is Kind.PARAM:
    return form
  return DATA if form.kind is Kind.CONSTANT or is_long else form


def carried(held: Form | None, out: Form | None) -> Form | None:
  """How a carry is held that a body hands on in a form: a parameter that changes is float32."""
  return out if held != PARAM or out == PARAM else DATA


def accumulates(jaxpr: AnyJaxpr, carry: range) -> tuple[float, ...]:
  """How many terms a turn of a loop may add to each value that it carries; 0 if it adds none.

  A value is added to if elementwise arithmetic leads to it from what is carried; loops inside
  count as often as they run.

  Args:
    jaxpr: The body.
    carry: Which of its operands its first results become in the next turn.
  """
  return tuple(_through(jaxpr, carry, len(carry)))


def _terms(eqn: JaxprEqn, before: float, terms: Mapping[Var, float]) -> list[float]:
  """How many terms were added to each result of an equation that reads what is carried."""
  bodies = [body for body in bodies_of(eqn) if not body.is_test]
  if not bodies:
    adds = eqn.primitive.name not in KEEPS_NUMBERS
    return [max(before, float(adds))] * len(eqn.outvars)
  counts = []
  for body in bodies:
    taken = body.take(eqn.invars)
    reading = [n for n, a in enumerate(taken) if not isinstance(a, Literal) and a in terms]
    counts.append(_through(body.jaxpr, reading, len(eqn.outvars)))
  turns = repetitions(eqn)
  turns = float("inf") if turns is None else max(1, turns)
  return [max(before, turns * max(column)) for column in zip(*counts, strict=True)]


def _through(jaxpr: AnyJaxpr, reading: Iterable[int], results: int) -> list[float]:
  """How many terms a jaxpr adds to those operands that are carried, in each of its results."""
  inner = versions.open_jaxpr(jaxpr)
  terms: dict[Var, float] = {inner.invars[n]: 0.0 for n in reading}
  for eqn in inner.eqns:
    known = [terms[a] for a in eqn.invars if not isinstance(a, Literal) and a in terms]
    if known and eqn.primitive.name not in MATMULS:
      terms |= dict(zip(eqn.outvars, _terms(eqn, max(known), terms), strict=True))
  return [0.0 if isinstance(a, Literal) else terms.get(a, 0.0) for a in inner.outvars[:results]]
