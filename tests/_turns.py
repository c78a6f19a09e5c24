"""Squares of which every run tries each thing, and `-m slow` or `.ci/run` every combination."""

import itertools
import math
import re

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


def leave_the_rest_to_ci(items, whole=True):
  """Marks as `ci` what a test that is marked as `quick` has beyond what that mark names.

  `quick` without ids is the diagonal: each value of each parameter once, the shorter lists over
  again. With ids it is those; with ``every=3`` each third of what is not slow, from ``start`` on.
  If ``whole``, all parameters of every test are among the items, and an id that none of them has is
  an error.

  A test without that mark that has a parameter `policy` beside others is tried with each of the
  others once, and with the policies by turns: these are marked as `turn`.
  """
  squares = {}
  for item in items:
    if hasattr(item, "callspec"):
      squares.setdefault(item.nodeid.partition("[")[0], []).append(item)
  for name, square in squares.items():
    mark = square[0].get_closest_marker("quick")
    if mark is None:
      leave_other_policies_to_ci(square)
      continue
    ids, how = mark.args, mark.kwargs
    unknown = set(ids) - {item.callspec.id for item in square}
    if whole and unknown:
      raise pytest.UsageError(f"{name} is marked as quick with ids that it has not: {unknown}")
    if ids:
      quick = [item for item in square if item.callspec.id in ids]
    elif how:
      quick = [item for item in square if not item.get_closest_marker("slow")]
      quick = quick[how.get("start", 0) :: how["every"]]
    else:
      diagonal = on_the_diagonal([coordinates(item) for item in square])
      quick = [item for item, its_turn in zip(square, diagonal, strict=True) if its_turn]
    kept = set(map(id, quick))
    for item in square:
      if id(item) not in kept:
        item.add_marker(pytest.mark.ci)


def leave_other_policies_to_ci(square):
  """Marks as `ci` all but one policy of those that are not slow with the same other parameters.

  And that one as `turn`.
  """
  others = {}
  for item in square:
    params = item.callspec.params
    if len(params) > 1 and "policy" in params and not item.get_closest_marker("slow"):
      key = tuple(id(value) for name, value in params.items() if name != "policy")
      others.setdefault(key, []).append(item)
  for turn, same in enumerate(others.values()):
    for n, item in enumerate(same):
      if n != turn % len(same):
        item.add_marker(pytest.mark.ci)
      elif len(same) > 1:
        item.add_marker(pytest.mark.turn)


def coordinates(item):
  """What a test is run with, a tuple for each of its `parametrize`, each fixture its own."""
  params = item.callspec.params
  names = [mark.args[0] for mark in item.iter_markers("parametrize")]
  axes = [re.findall(r"\w+", each) if isinstance(each, str) else each for each in names]
  axes += [[name] for name in params if not any(name in axis for axis in axes)]
  return [tuple(id(params[name]) for name in axis) for axis in axes]


def on_the_diagonal(points):
  """Of each point whether it is the n-th value of every axis, the shorter axes over again."""
  axes = [list(dict.fromkeys(values)) for values in zip(*points, strict=True)]
  turns = range(max(map(len, axes)))
  diagonal = {tuple(axis[n % len(axis)] for axis in axes) for n in turns}
  return [tuple(point) in diagonal for point in points]
