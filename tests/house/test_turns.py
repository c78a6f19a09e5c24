"""What every run tries of a test that is marked as `quick`, and what it leaves to `.ci/run`."""

import itertools
from types import SimpleNamespace

import pytest

from _turns import leave_the_rest_to_ci, on_the_diagonal


class Item:
  """One test as pytest collects it."""

  def __init__(self, *values, quick=None, slow=False, names="ab"):
    self.nodeid = f"file.py::test[{'-'.join(values)}]"
    params = dict(zip(names, values, strict=False))
    self.callspec = SimpleNamespace(id="-".join(values), params=params)
    axes = [pytest.mark.parametrize(name, []).mark for name in params]
    self.marks = [
      *axes,
      *([quick.mark] if quick else []),
      *([pytest.mark.slow.mark] if slow else []),
    ]

  def iter_markers(self, name):
    return [mark for mark in self.marks if mark.name == name]

  def get_closest_marker(self, name):
    return next(iter(self.iter_markers(name)), None)

  def add_marker(self, mark):
    self.marks.append(mark.mark)


def kept(items):
  leave_the_rest_to_ci(items)
  return [item.callspec.id for item in items if not item.get_closest_marker("ci")]


def square(quick):
  return [Item(*values, quick=quick) for values in itertools.product("uvw", "xy")]


def test_without_quick_everything_is_kept():
  assert len(kept(square(None))) == 6


def test_quick_alone_keeps_each_value_of_each_parameter():
  assert kept(square(pytest.mark.quick)) == ["u-x", "v-y", "w-x"]


def test_policies_take_turns_over_the_other_parameters():
  names = ("a", "policy")
  items = [Item(*values, names=names) for values in itertools.product("uvw", "xy")]
  assert kept(items) == ["u-x", "v-y", "w-x"]
  marks = [{mark.name for mark in item.marks} & {"ci", "turn"} for item in items]
  assert marks == [{"turn"}, {"ci"}, {"ci"}, {"turn"}, {"turn"}, {"ci"}]
  items = [Item(a, policy, names=names, slow=policy != a) for a in "xy" for policy in "xy"]
  assert kept(items) == ["x-x", "x-y", "y-x", "y-y"]  # what is slow is left out by that
  items = [Item(policy, names=names[1:]) for policy in "xy"]
  assert kept(items) == ["x", "y"] and not any(item.get_closest_marker("turn") for item in items)


def test_quick_with_ids_keeps_those_and_one_that_is_not_there_is_an_error():
  assert kept(square(pytest.mark.quick("w-y", "u-x"))) == ["u-x", "w-y"]
  with pytest.raises(pytest.UsageError, match=r"file\.py::test .* that it has not: {'u-z'}"):
    leave_the_rest_to_ci(square(pytest.mark.quick("u-z")))


def test_quick_keeps_each_third_of_what_is_not_slow():
  quick = pytest.mark.quick(every=3)
  items = [Item(name, quick=quick, slow=name in "bd") for name in "abcdefgh"]
  assert kept(items) == ["a", "f"]
  items = [Item(name, quick=pytest.mark.quick(every=3, start=1)) for name in "abcdefgh"]
  assert kept(items) == ["b", "e", "h"]


def test_values_that_come_together_are_one_axis():
  together = [("a", 1), ("b", 1), ("c", 2)]
  assert on_the_diagonal([[each] for each in together]) == [True] * 3
