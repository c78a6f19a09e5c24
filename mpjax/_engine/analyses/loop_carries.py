"""How the values that a loop carries are held: a sum that its format cannot count is float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mpjax._core.primitives import KEEPS_NUMBERS, MATMULS
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import Body, bodies_of, repetitions
from mpjax._engine.program.jaxprs import kind, places_of
from mpjax._engine.program.kinds import DATA, FEW, PARAM, Form, Kind
from mpjax._engine.program.versions import AnyJaxpr, JaxprEqn, Literal, Var

TERMS = 128
"""How many terms a sum in 16 bits may have: no stack of layers is higher.

256 + 1 is 256 in bfloat16. float16 counts to 2048, but the roundings of a thousand terms often have
one sign, and make a hundredth of the sum.
"""


def accumulators(
  body: Body, forms: Sequence[Form | None], turns: int | None, *, has_matmuls: bool
) -> list[Form | None]:
  """How the values that a loop carries are held, by how they start.

  One that starts from a constant is an accumulator or the state of a recurrent cell: it is
  float32, as is a 16-bit one that more than `TERMS` are added to, or more than `FEW` in a loop that
  is no stack of layers, for it multiplies no matrices: a score, a distance along a path. But not
  one that is only written to, as a cache is: that is as narrow as what is written.

  Args:
    body: The loop's body.
    forms: How what it carries is held before the loop.
    turns: How often it runs, None if it does not say.
    has_matmuls: Whether it holds a matmul.
  """
  counts, most = _counts(body, turns), _most(has_matmuls=has_matmuls)
  return [_accumulator(*pair, most) for pair in zip(forms, counts, strict=True)]


def long_sums(body: Body, turns: int | None, *, has_matmuls: bool) -> list[bool]:
  """To which of the values that a loop carries it adds more terms than 16 bits may count.

  Args:
    body: The loop's body.
    turns: How often it runs, None if it does not say.
    has_matmuls: Whether it holds a matmul.
  """
  most = _most(has_matmuls=has_matmuls)
  return [bool(terms and terms > most) for terms in _counts(body, turns)]


def _most(*, has_matmuls: bool) -> int:
  return TERMS if has_matmuls else FEW


def _counts(body: Body, turns: int | None) -> list[float | None]:
  terms = accumulates(body.jaxpr, body.carry)
  return [n and (math.inf if turns is None else turns * n) for n in terms]


def _accumulator(form: Form | None, terms: float | None, most: int) -> Form | None:
  if form is None or form.kind is Kind.PARAM:
    return form
  if form.kind is Kind.CONSTANT:
    return form if terms == 0 else DATA
  return DATA if terms and terms > most else form


def carried(held: Form | None, out: Form | None) -> Form | None:
  """How a carry is held that a body hands on in a form: a parameter that changes is float32."""
  return out if held != PARAM or out == PARAM else DATA


def accumulates(jaxpr: AnyJaxpr, carry: range) -> tuple[float | None, ...]:
  """How many terms a turn of a loop may add to each value that it carries; 0 if it adds none.

  A value is added to if elementwise arithmetic leads to it from floats that are carried; loops
  inside count as often as they run. None for one that is made anew in every turn.

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
    reading = places_of(body.take(eqn.invars), terms)
    counts.append([n or 0.0 for n in _through(body.jaxpr, reading, len(eqn.outvars))])
  turns = repetitions(eqn)
  turns = float("inf") if turns is None else max(1, turns)
  return [max(before, turns * max(column)) for column in zip(*counts, strict=True)]


def _through(jaxpr: AnyJaxpr, reading: Iterable[int], results: int) -> list[float | None]:
  """How many terms a jaxpr adds to those operands that are carried, in each of its results."""
  inner = versions.open_jaxpr(jaxpr)
  floats = (inner.invars[n] for n in reading if kind(inner.invars[n]) not in "biu")
  terms: dict[Var, float] = dict.fromkeys(floats, 0.0)
  for eqn in inner.eqns:
    known = [terms[a] for a in eqn.invars if not isinstance(a, Literal) and a in terms]
    if known and eqn.primitive.name not in MATMULS:
      made = zip(eqn.outvars, _terms(eqn, max(known), terms), strict=True)
      terms |= {var: n for var, n in made if kind(var) not in "biu"}  # an index is no term
  return [None if isinstance(a, Literal) else terms.get(a) for a in inner.outvars[:results]]
