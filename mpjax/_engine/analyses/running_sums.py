"""Sums that their author wrote out term by term, with no loop that says how many there are.

A loop in Python adds to one value again and again; an associative scan adds neighbors, and
neighbors of neighbors. 256 + 1 is 256 in bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpjax._core.primitives import ADDS, SCALES, UNCHANGED
from mpjax._engine.analyses.small_steps import SMALL
from mpjax._engine.program import jaxprs
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal

SUMMANDS = round(1 / SMALL)
"""How many terms a sum in 16 bits may have of which nothing else reads a part.

From there on a term is as small beside the sum as a small step. A stream of layers is no such sum:
what is added to it is computed from it, which reads it, too.
"""

_HANDS_ON = UNCHANGED | {"neg"}


def additions(eqns: Sequence[JaxprEqn], outvars: Sequence[Atom]) -> frozenset[Any]:
  """The results of the additions of all sums of more than `SUMMANDS` terms that are written out.

  ``m = 0.9 * m + x`` counts as one, too: a number may stand between one addition and the next.

  Args:
    eqns: The equations of a jaxpr.
    outvars: Its results, which are read outside.
  """
  if len([eqn for eqn in eqns if eqn.primitive.name in ADDS]) < SUMMANDS:
    return frozenset()
  read = [atom for eqn in eqns for atom in eqn.invars] + [*outvars]
  reads = Counter([atom for atom in read if not isinstance(atom, Literal)])
  terms: dict[Any, int] = {}
  before: dict[Any, list[Any]] = {}
  long = set[Any]()
  for eqn in eqns:
    sums = [a for a in _summands(eqn) if not isinstance(a, Literal)]
    own = [a for a in sums if reads[a] == 1 and a in terms]
    adds = eqn.primitive.name in ADDS
    if adds or own:
      (result,) = eqn.outvars
      before[result] = own
      terms[result] = sum(terms[a] for a in own) + adds * (2 - len(own))
      if adds and terms[result] > SUMMANDS:
        long.add(result)
  ends = list(long)
  while ends:
    parts = before[ends.pop()]
    ends += parts
    long.update(parts)
  return frozenset(long)


def _summands(eqn: JaxprEqn) -> Sequence[Any]:
  """The operands of an equation in which a sum may go on."""
  name = eqn.primitive.name
  if name in SCALES:
    weighted = eqn.invars if name == "mul" else eqn.invars[:1]
    others = eqn.invars[::-1] if name == "mul" else eqn.invars[1:]
    return [a for a, by in zip(weighted, others, strict=True) if not jaxprs.shape(by)]
  return eqn.invars if name in ADDS or name in _HANDS_ON else ()


def adds_neighbors(eqn: JaxprEqn, makers: Mapping[Any, JaxprEqn]) -> bool:
  """Whether every other entry of a value, but for the last, is added to the entry behind it.

  `jax.lax.associative_scan` writes ``x[0:-1:2] + x[1::2]``; ``x[::2] + x[1::2]`` is a pooling.
  """
  made = [makers.get(atom) for atom in eqn.invars if not isinstance(atom, Literal)]
  slices = [m for m in made if m is not None and m.primitive.name == "slice"]
  if len(slices) < 2 or slices[0].invars[0] is not slices[1].invars[0]:
    return False
  first, second = sorted((m.params for m in slices), key=_start)
  ends = zip(first["limit_indices"], jaxprs.shape(slices[0].invars[0]), strict=True)
  places = enumerate(zip(_start(first), _start(second), ends, strict=True))
  axes = [n for n, (low, behind, (end, size)) in places if (low, behind, end) == (0, 1, size - 1)]
  strides = [params["strides"] or () for params in (first, second)]
  return any(all(steps[n : n + 1] == (2,) for steps in strides) for n in axes)


def _start(params: Mapping[str, Any]) -> tuple[int, ...]:
  return params["start_indices"]
