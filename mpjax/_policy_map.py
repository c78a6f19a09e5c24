"""Policies by module path."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpjax._jaxpr import Path
from mpjax._policy import Policy, as_policy


class PolicyMap:
  """An ordered list of path patterns, each with its policy, and a default for the rest.

  A pattern governs the modules whose path it matches as a whole (``re.fullmatch``) and all that
  lie beneath them; the first matching pattern wins. Paths are written with slashes, from the
  model's root: ``encoder/layers_0/attn``.

  Where values leave a module that a rule matched, they are cast to the rule's output dtype.

  Args:
    rules: Patterns and policies, in order. A policy is a `Policy` or a spec string.
    default: The policy of everything that no rule governs.

  Raises:
    ValueError: A pattern is no regular expression, or a policy cannot be parsed.
    TypeError: A pattern is not a string.

  Example:
    >>> policies = PolicyMap({"head": "float32"}, default="mixed_bfloat16")
    >>> policies.policy_at("head/kernel").compute_dtype.name
    'float32'
    >>> policies.policy_at("encoder/dense").compute_dtype.name
    'bfloat16'
  """

  __slots__ = ("_patterns", "default", "rules")

  rules: tuple[tuple[str, Policy], ...]
  default: Policy

  def __init__(
    self,
    rules: Mapping[str, Policy | str] | Iterable[tuple[str, Policy | str]],
    default: Policy | str,
  ) -> None:
    pairs: Any = tuple(rules.items() if isinstance(rules, Mapping) else rules)
    patterns = tuple(_compiled(pattern) for pattern, _ in pairs)
    object.__setattr__(self, "rules", tuple((p, as_policy(policy)) for p, policy in pairs))
    object.__setattr__(self, "default", as_policy(default))
    object.__setattr__(self, "_patterns", patterns)

  def __setattr__(self, name: str, value: object) -> None:
    raise AttributeError(f"A PolicyMap cannot be changed; build a new one to set {name!r}.")

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, PolicyMap):
      return NotImplemented
    return (self.rules, self.default) == (other.rules, other.default)

  def __hash__(self) -> int:
    return hash((self.rules, self.default))

  def __reduce__(self) -> tuple[type, tuple[object, ...]]:
    return PolicyMap, (self.rules, self.default)

  def __repr__(self) -> str:
    rules = ", ".join(f"{pattern!r}: {str(policy)!r}" for pattern, policy in self.rules)
    return f"PolicyMap({{{rules}}}, default={str(self.default)!r})"

  def rule_at(self, path: Path) -> int | None:
    """The index of the rule that governs a module path, None where the default does."""
    heads = ["/".join(path[: n + 1]) for n in range(len(path))]
    for index, pattern in enumerate(self._patterns):
      if any(pattern.fullmatch(head) for head in heads):
        return index
    return None

  def policy_of(self, rule: int | None) -> Policy:
    """The policy of a rule by its index, the default for None."""
    return self.default if rule is None else self.rules[rule][1]

  def policy_at(self, path: str) -> Policy:
    """The policy that governs a module path such as ``'encoder/dense'``."""
    return self.policy_of(self.rule_at(tuple(path.split("/"))))

  @property
  def policies(self) -> tuple[Policy, ...]:
    """Every policy of the map, the default last."""
    return (*(policy for _, policy in self.rules), self.default)

  def narrow_dtypes(self) -> frozenset[np.dtype]:
    """The 16-bit formats that something is computed in."""
    return frozenset(p.compute_dtype for p in self.policies if p.compute_dtype.itemsize == 2)

  def is_float32(self) -> bool:
    """Whether nothing is computed, kept or returned in anything but float32."""
    dtypes = {d for p in self.policies for d in (p.param_dtype, p.compute_dtype, p.output_dtype)}
    return dtypes == {np.dtype(np.float32)}

  def check_used(self, paths: Iterable[Path]) -> None:
    """Refuse a rule that matches none of the given module paths.

    Args:
      paths: Every module path that was seen.

    Raises:
      ValueError: A rule matched none of them; the message lists the nearest and all paths.
    """
    heads = sorted({"/".join(path[: n + 1]) for path in paths for n in range(len(path))})
    for (pattern, _), compiled in zip(self.rules, self._patterns, strict=True):
      if not any(compiled.fullmatch(head) for head in heads):
        raise ValueError(_unused(pattern, heads))


def as_policy_map(policy: Policy | PolicyMap | str) -> PolicyMap:
  """Read a policy argument: a `PolicyMap` as it is, anything else as a map without rules."""
  return policy if isinstance(policy, PolicyMap) else PolicyMap({}, as_policy(policy))


def _compiled(pattern: str) -> re.Pattern[str]:
  if not isinstance(pattern, str):
    raise TypeError(
      f"A rule of a PolicyMap must be a path pattern; got {pattern!r}. Write it as a string, "
      "e.g. 'encoder/.*'."
    )
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"A rule of a PolicyMap must be a regular expression; {pattern!r} is none ({error}). "
      "Escape special characters with a backslash."
    ) from error


def _unused(pattern: str, heads: list[str]) -> str:
  close = difflib.get_close_matches(pattern, heads, n=3)
  hint = f" Closest: {', '.join(close)}." if close else ""
  shown = ", ".join(heads[:40]) + (f", and {len(heads) - 40} more" if len(heads) > 40 else "")
  return (
    f"Rule {pattern!r} matched no module.{hint} Paths seen: {shown or 'none'}. "
    "Fix the pattern or drop the rule."
    + ("" if heads else " In plain functions jax.named_scope makes paths.")
  )
