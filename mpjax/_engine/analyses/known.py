"""What is known of a jaxpr's operands and results by the equation that holds it."""

from __future__ import annotations

from typing import NamedTuple

from mpjax._engine.analyses.constants import NumberSet
from mpjax._engine.analyses.linear_recurrences import Recurrence
from mpjax._engine.analyses.lookahead import Leading
from mpjax._engine.analyses.made_of import Made
from mpjax._engine.analyses.near_one import Exact
from mpjax._engine.analyses.power_iteration import Own
from mpjax._engine.analyses.sums import Summing


class Known(NamedTuple):
  """What the equation that holds a jaxpr knows of its operands and results, by index.

  Attributes:
    exact: What in it is needed exactly, see `near_one`; None where that is to be found.
    sums: What is known of sums, see `sums`.
    made: Which operands are made of something alone, see `made_of`.
    leading: Which results lead somewhere, see `lookahead`.
    moments: Which results are moments of which one is subtracted from another, see `moments`.
    of_numbers: Which operands are matrices that the program makes of numbers alone, if there are
      matmuls.
    made_before: Which operands equations made, in float32, or loops hand on, if there are matmuls.
    numbers: For each operand the numbers that occur in it, None where they are not known; empty
      if they are known of none.
    own: Which operands depend on nothing but a model's parameters and state.
    logarithms: Which results lead into a logarithm.
    heads: Which operands are multiplied into one, in it or outside.
    carry: Which operands a loop hands on from turn to turn.
    began: Which of these began as no layer's.
    subtracted: Which results end in a difference outside, as products of data, see
      `data_transforms`.
    steady: Which operands are scalars that are the same in every turn of a loop; vectors of a long
      one, too.
    recurrence: What a long loop hands on with linear operations.
    is_test: Whether it tells a loop to go on.
    is_to_tolerance: Whether it stands in a loop that ends by a float.
    features: Which operands layers gave, outside of such a loop in which there are none.
    has_rule: Whether it is of a function with a derivative rule of its user's, or of that.
    tested: Which operands a loop around it hands to a test that multiplies for a residual.
    systems: Which operands belong to a linear system outside.
    outputs: Which results go into a loss, and no layer comes after.
  """

  exact: Exact | None = None
  sums: Summing = Summing()
  made: Made[int] = Made()
  leading: Leading[int] = Leading()
  moments: tuple[int, ...] = ()
  of_numbers: frozenset[int] = frozenset()
  made_before: frozenset[int] = frozenset()
  numbers: tuple[NumberSet, ...] = ()
  own: Own[int] = Own()
  logarithms: tuple[int, ...] = ()
  heads: tuple[int, ...] = ()
  carry: range = range(0)
  began: frozenset[int] = frozenset()
  subtracted: frozenset[int] = frozenset()
  steady: tuple[int, ...] = ()
  recurrence: Recurrence[int] = Recurrence()
  is_test: bool = False
  is_to_tolerance: bool = False
  features: frozenset[int] = frozenset()
  has_rule: bool = False
  tested: frozenset[int] = frozenset()
  systems: frozenset[int] = frozenset()
  outputs: frozenset[int] = frozenset()

  @property
  def is_whole(self) -> bool:
    """Whether nothing is known: it is the whole function, and no body."""
    return self.exact is None


NOTHING = Known()
