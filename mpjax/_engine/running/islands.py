"""Float32 islands between 16-bit values that the backward pass computes again.

The derivative of an elementwise float32 operation needs its operands or its result, and would
store them in float32 from the forward to the backward pass. Where these, and moves, lead from
narrow values to a value that is only ever read in 16 bits, storing the narrow operands is enough,
and so it is for gates that mix float32 states, and where the value leaves in float32, to a norm or
a pool, if more would be stored: the rest is computed again, in a few operations that compilers fuse
(Chen et al. 2016, "Training deep nets with sublinear memory cost", with a segment an island).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import ADDS, SCALES, Trait, having
from mpjax._engine.planning.plan import Plan, Step, is_elementwise, shared_format
from mpjax._engine.program import jaxprs
from mpjax._engine.program.jaxprs import variables_of
from mpjax._engine.program.kinds import Kind, is_data, is_narrow
from mpjax._engine.program.versions import Literal, Var
from mpjax._engine.running import softmax
from mpjax._engine.running.softmax import Softmax

_TRANSCENDENTAL = having(Trait.TRANSCENDENTAL)
_MOVES = having(Trait.MOVES) - {"name"}  # by which a checkpoint would store it
_NONLINEAR = _TRANSCENDENTAL | {"integer_pow", "square"}
_COSTLY = _NONLINEAR | {"div"}
"""What stores float32 between narrow values; the factors of a product are narrow there."""
_MIXES = frozenset({"mul", "add", "sub"})
_MOST = 32
"""So many steps a mixture has at most: Python may have written out a long loop of them."""
_CUTS = 8
"""In so many places it is cut off from the rest of such a loop, until it stores no sum."""


class Island(NamedTuple):
  """Some steps of a plan that run as one when the last of them is due.

  Attributes:
    steps: Their indices in order.
    inputs: What they read that none of them computes.
    dtype: The 16-bit format in which their result may leave, for nobody reads it otherwise; None
      if it leaves in float32.
    merges: Whether a compiler may store what both passes compute: in a loop, where storing it would
      cost, the passes are loops of their own, and a barrier between them would only cost fusions.
  """

  steps: tuple[int, ...]
  inputs: tuple[Var, ...]
  dtype: np.dtype | None
  merges: bool = False


def find(plan: Plan) -> Mapping[int, Island | Softmax]:
  """The islands of a plan that need not store float32, by the index of their last step."""
  steps = plan.steps
  wide = [_keeps_size(step) for step in steps]
  if not any(wide):
    return {}
  search = _Search(plan, wide)
  found: dict[int, Island | Softmax] = {}
  taken: set[int] = set()
  for last in reversed(range(len(steps))):
    may_be_softmax = steps[last].eqn.primitive.name == "div"
    weights = softmax.match(steps, search.readers, search.makers, last) if may_be_softmax else None
    if weights is not None:
      weights = weights.alone() if weights.due in found else weights
      found[weights.due] = weights
      taken |= set(weights.steps)
    elif last not in taken and (island := search.island(last)):
      taken |= {*island.steps}
      found[last] = island
  return found


class _Search:
  """Looks for islands in a plan.

  Args:
    plan: The plan.
    wide: For each step, whether it makes one float32 value of the size of what it reads.

  Attributes:
    readers: Which steps read each variable.
    makers: Which step makes each variable.
  """

  def __init__(self, plan: Plan, wide: Sequence[bool]) -> None:
    self._steps, self._wide = plan.steps, wide
    self.readers = plan.readers
    self.makers = {var: n for n, step in enumerate(plan.steps) for var in step.eqn.outvars}
    pairs = zip(wide, plan.steps, strict=True)
    self._has_costly = any(own and _is_costly(step, _TRANSCENDENTAL) for own, step in pairs)
    self._is_function = self._has_costly and all(map(is_elementwise, plan.steps))

  def island(self, last: int) -> Island | None:
    """The island that ends with a step, if it pays."""
    if not self._wide[last]:
      return None
    found = self._rounded(last)
    if found is None and self._has_costly:
      members = sorted(self._reach_back(last, _MOST))
      found = self._mixed(members) or self._unrounded(members)
    return found or self._product(last)

  def _rounded(self, last: int) -> Island | None:
    """The island whose result is a value that all its readers round."""
    if not self._is_read_narrow(last):
      return None
    members = sorted(self._reach_back(last))
    if not self._narrow_read(members, _COSTLY):
      return None
    return self._of(members, shared_format(self.readers, self._steps[last]))

  def _unrounded(self, members: Sequence[int]) -> Island | None:
    """The island whose result leaves in float32, if its steps store more than it reads.

    Of a swish that a norm or a pool reads: the sigmoid and what it multiplies. None where what it
    reads is added to something later, or taken away: little may be left of their cotangents.
    """
    if self._is_function:  # its caller takes it whole, as a single step
      return None
    read = self._narrow_read(members, _TRANSCENDENTAL)
    if not read:  # as nearly always
      return None
    stored = _stored(self._steps[n] for n in members) - _stores_result(self._steps[members[-1]])
    if read >= 2 * stored:
      return None
    island = self._of(members)
    later = (n for var in island.inputs for n, _ in self.readers[var] if n > members[-1])
    is_added = any(self._steps[n].eqn.primitive.name in ADDS for n in later)
    return None if is_added and len(members) > 1 else island

  def _mixed(self, members: Sequence[int]) -> Island | None:
    """A mixture of float32 values by gates that nothing else reads.

    The derivative of a product stores both factors. A gate in float32 is made of a narrow value,
    which is half as large: ``sigmoid(f) * c`` of a recurrent cell stores f and c, and so does
    ``(1 - z) * n + z * h``.
    """
    inside = [self._steps[n] for n in members]
    if len(members) == 1 or inside[-1].eqn.primitive.name not in _MIXES or not _mixes(inside):
      return None
    cuts = range(_CUTS if len(members) == _MOST else 1)  # the rest of a chain is one of its own
    found = (n for n in cuts if _mixes(inside[n:]) and _stores_factors(inside[n:]))
    start = next(found, None)
    return None if start is None else self._of(members[start:], merges=True)

  def _product(self, last: int) -> Island | None:
    """A float32 product of narrow values: its derivative stores the factors, as it reads them.

    Where others read one of them in float32, all their cotangents add up so. One factor may be
    float32 that is made larger for it, as is the weight of a row.
    """
    step = self._steps[last]
    first, second = step.eqn.invars if step.eqn.primitive.name == "mul" else (None, None)
    if first is second:
      return None
    pairs = zip(step.eqn.invars, step.operands, strict=True)
    factors = variables_of(atom for atom, form in pairs if is_narrow(form))
    widened = [read for var in factors for _, read in self.readers[var] if read.to == FLOAT32]
    if not factors or len(widened) > len(factors):
      return None
    island = self._of(sorted(self._reach_back(last, through=_MOVES)), merges=True)
    size = jaxprs.size(step.eqn.outvars[0])
    return island if factors >= {var for var in island.inputs if jaxprs.size(var) == size} else None

  def _is_read_narrow(self, index: int) -> bool:
    """Whether everything that reads a step's result first casts it to 16 bits."""
    reads = self.readers[self._steps[index].eqn.outvars[0]]
    formats = {read.via or read.to or FLOAT32 for _, read in reads}
    return bool(formats) and FLOAT32 not in formats

  def _reach_back(
    self, last: int, most: float = math.inf, through: Collection[str] | None = None
  ) -> set[int]:
    """The steps whose values only the island reads, in float32; so many and of these at most."""
    members: set[int] = set()
    queue = [-last]  # the latest first: whoever reads a value comes before who makes it
    queued = {last}
    while queue and len(members) < most:
      index = -heapq.heappop(queue)
      step = self._steps[index]
      users = self.readers[step.eqn.outvars[0]]
      others = [n for n, read in users if n not in members or read.via is not None]
      is_led_through = through is None or step.eqn.primitive.name in through
      if index != last and (others or not self._wide[index] or not is_led_through):
        continue
      members.add(index)
      made = {self.makers.get(a, last) for a in step.eqn.invars if not isinstance(a, Literal)}
      for maker in made - queued:
        heapq.heappush(queue, -maker)
      queued |= made
    return members

  def _of(
    self, members: Sequence[int], dtype: np.dtype | None = None, *, merges: bool = False
  ) -> Island:
    """The island of some steps, in order."""
    made = {self._steps[n].eqn.outvars[0] for n in members}
    read = (atom for n in members for atom in self._steps[n].eqn.invars)
    inputs = dict.fromkeys(a for a in read if not isinstance(a, Literal) and a not in made)
    return Island(tuple(members), tuple(inputs), dtype, merges)

  def _narrow_read(self, members: Sequence[int], costly: Collection[str]) -> int:
    """How many narrow values of its size an island reads, to store instead; 0 if it has no need.

    None where one of its operands is float32, for that would be stored.
    """
    large = [*_large([self._steps[n] for n in members], costly).values()]
    return 0 if Kind.DATA in large else large.count(Kind.NARROW)


def _mixes(inside: Sequence[Step]) -> bool:
  return {Kind.NARROW, Kind.DATA} <= {*_large(inside).values()}


def _stores_factors(inside: Sequence[Step]) -> bool:
  """Whether steps store no more float32 of what they read than of what they make.

  What they multiply is stored anyway: of ``h + z * (n - h)`` z and n - h, where h alone will do.
  """
  stored = variables_of(a for s in inside if s.eqn.primitive.name == "mul" for a in s.eqn.invars)
  read = [a for a, kind in _large(inside).items() if kind is Kind.DATA and a not in stored]
  size = jaxprs.size(inside[-1].eqn.outvars[0])
  made = {s.eqn.outvars[0] for s in inside} & stored
  is_step = {*read} <= variables_of(inside[-1].eqn.invars)  # from what it was to what comes
  return not read or (is_step and len(read) < len([v for v in made if jaxprs.size(v) >= size]))


def _stored(inside: Iterable[Step]) -> int:
  """How many values, of the size that they make, the derivatives of steps store at least."""
  return sum(_stored(step.bodies[0].steps) if step.bodies else _stores(step) for step in inside)


def _stores(step: Step) -> bool:
  """Whether the derivative of a step stores what it reads or makes."""
  name, made = step.eqn.primitive.name, step.eqn.outvars[0]
  if name not in SCALES:
    return name in _NONLINEAR
  return all(jaxprs.size(atom) == jaxprs.size(made) for atom in step.eqn.invars)


def _stores_result(step: Step) -> bool:
  """Whether the derivative of a step stores its result, as all may do that read it."""
  if step.bodies:
    return any(map(_stores_result, step.bodies[0].steps[-1:]))
  return step.eqn.primitive.name in _TRANSCENDENTAL


def _keeps_size(step: Step) -> bool:
  """Whether a step computes one float32 value, element by element, or moves one."""
  if len(step.outs) != 1 or not is_data(step.outs[0]):
    return False
  if step.eqn.effects:
    return False
  return is_elementwise(step) or step.eqn.primitive.name in _MOVES


def _large(steps: Sequence[Step], costly: Collection[str] = _TRANSCENDENTAL) -> dict[Any, Kind]:
  """What steps read that is as large as their last result; nothing if none of them is costly."""
  size = jaxprs.size(steps[-1].eqn.outvars[0])
  if not [s for s in steps if jaxprs.size(s.eqn.outvars[0]) == size and _is_costly(s, costly)]:
    return {}
  made = {step.eqn.outvars[0] for step in steps}
  kinds = {a: f.kind for a, f in _operands(steps) if f is not None and jaxprs.size(a) >= size}
  return {a: kind for a, kind in kinds.items() if a not in made}


def _is_costly(step: Step, costly: Collection[str]) -> bool:
  if step.eqn.primitive.name in costly and _stores(step):
    return True
  return any(_is_costly(inner, costly) for body in step.bodies for inner in body.steps)


def _operands(members: Iterable[Step]) -> Iterable[tuple[Any, Any]]:
  for step in members:
    for atom, form in zip(step.eqn.invars, step.operands, strict=True):
      if not isinstance(atom, Literal):
        yield atom, form
