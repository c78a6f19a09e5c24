"""Policies assigned to modules, as a policy map with few rules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mpjax._core.policy import Policy, as_policy
from mpjax._core.policy_map import PolicyMap
from mpjax._core.scopes import Path

OUTSIDE = "(outside modules)"
WIDE = "float32"

Assignment = dict[Path, str]
"""The name of the policy of each module that computes something."""


class Names:
  """The policies by the names that they were given."""

  def __init__(self, low: Mapping[str, Policy]) -> None:
    self.low = list(low)
    self.policies = {**low, WIDE: as_policy(WIDE)}


def module_path(module: str) -> Path:
  """The path of a module as a flow report spells it."""
  return () if module.startswith("(") else tuple(module.split("/"))


def spelled(path: Path) -> str:
  """A path in a report."""
  return "/".join(path) or OUTSIDE


def default_of(assignment: Assignment) -> str:
  """The policy outside of modules; what most modules have, if nothing is computed there."""
  names = list(assignment.values())
  return assignment.get((), max(names, key=names.count))


def rules_of(assignment: Assignment) -> list[tuple[Path, str]]:
  """The fewest rules that say the same, the narrower before the wider."""

  def below(head: Path, members: list[Path], inherited: str) -> list[tuple[Path, str]]:
    names = {assignment[unit] for unit in members}
    if names == {inherited}:
      return []
    if len(names) == 1 and head:
      return [(head, names.pop())]
    own = assignment.get(head, inherited)
    groups: dict[Path, list[Path]] = {}
    for unit in members:
      if unit != head:
        groups.setdefault(unit[: len(head) + 1], []).append(unit)
    rules = [rule for child, group in groups.items() for rule in below(child, group, own)]
    return rules if own == inherited else [*rules, (head, own)]

  return below((), sorted(assignment), default_of(assignment))


def policy_map(assignment: Assignment, names: Names) -> PolicyMap:
  """The policy map that says what an assignment says."""
  rules = {_pattern(path): names.policies[name] for path, name in rules_of(assignment)}
  return PolicyMap(rules, names.policies[default_of(assignment)])


def _pattern(path: Path) -> str:
  """A path as a pattern that matches it alone, escaped only where it must be."""
  text = "/".join(path)
  return text if re.fullmatch(r"[\w/\-]*", text) else re.escape(text)


def as_text(assignment: Assignment) -> str:
  """The same as Python to paste."""
  rules = [f"    {_pattern(path)!r}: {name!r},\n" for path, name in rules_of(assignment)]
  inside = "{\n" + "".join(rules) + "  }" if rules else "{}"
  text = f"mpjax.PolicyMap(\n  {inside},\n  default={default_of(assignment)!r},\n)"
  return text.replace("'", '"')
