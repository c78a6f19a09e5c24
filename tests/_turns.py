"""Squares of which every run tries each thing, and `-m slow` every combination."""

import itertools
import math

import pytest


def in_turns(names, *axes, turning=1):
  """Parametrizes a test by all combinations of several axes; most of them are `slow`.

  Every run has all combinations of the first axes. The last axis, or the last ``turning`` ones,
  take turns over them: ``in_turns(("name", "policy"), NAMES, POLICIES)`` tries the first name with
  the first policy, the second name with the second. An axis is a dictionary, whose keys are the
  ids, or a list of what has a readable `str`.
  """
  axes = [
    axis if isinstance(axis, dict) else {str(value): value for value in axis} for axis in axes
  ]
  return pytest.mark.parametrize(
    names,
    [
      pytest.param(
        *(list(axis.values())[place] for axis, place in zip(axes, places, strict=True)),
        id="-".join(list(axis)[place] for axis, place in zip(axes, places, strict=True)),
        marks=() if is_its_turn(places, list(map(len, axes)), turning) else pytest.mark.slow,
      )
      for places in itertools.product(*(range(len(axis)) for axis in axes))
    ],
  )


def is_its_turn(places, sizes, turning):
  """Whether the last places are those whose turn it is at the first ones.

  Each axis moves on at every turn, and once more when those before it have been round.
  """
  fixed = len(places) - turning
  turn = sum(places[:fixed])
  rounds = [0, *(turn // math.prod(sizes[fixed:n]) for n in range(fixed + 1, len(places)))]
  return all(
    place == (turn + more) % size
    for place, more, size in zip(places[fixed:], rounds, sizes[fixed:], strict=True)
  )
