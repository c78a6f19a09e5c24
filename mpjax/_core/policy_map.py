"""Policies by module path and by operation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._core.arguments import shown
from mpjax._core.policy import Policy, Preset, as_policy
from mpjax._core.primitives import DEFAULT_OPS, Rule, read_ops
from mpjax._core.scopes import Path

# A dict is an Iterable too, and mypy cannot infer a dict's type where it may be either.
_Pairs = Sequence[tuple[str, Policy | Preset | str]] | Iterator[tuple[str, Policy | Preset | str]]
Rules = Mapping[str, Policy | Preset | str] | _Pairs
"""Patterns and their policies, in order."""

Ops = Mapping[Path, Collection[str]]
"""The operations that were met in each module."""


class PolicyMap:
  """An ordered list of patterns, each with its policy, and a default for the rest.

  A pattern names modules by their path, operations within them, or both:

  - ``"encoder/attn"`` governs the modules whose path it matches as a whole (``re.fullmatch``) and
    all that lie beneath them. Paths are written with slashes, from the model's root. Where values
    leave a module that a rule matched, they are cast to the rule's output dtype.
  - ``"reduce_.*|exp@encoder/attn"`` governs the operations there that it matches, by the names of
    their primitives: they run in the rule's compute dtype whatever `mpjax.DEFAULT_OPS` says of
    them, and what they return has the rule's output dtype. ``"exp@"`` governs them everywhere.

  The first pattern that matches wins, so the narrower rule stands first.

  Args:
    rules: Patterns and policies, in order. A policy is a `Policy` or a spec string.
    default: The policy of everything that no rule governs.
    ops: Changes to `mpjax.DEFAULT_OPS`, which says what a 16-bit policy does with each primitive:
      ``"lower"``, ``"range"``, ``"full"`` or ``"follow"``.

  Raises:
    ValueError: A pattern is no regular expression, a policy cannot be parsed, or ``ops`` names no
      known primitive or class.
    TypeError: A pattern is not a string, or the default came first or not at all.

  Example:
    >>> policies = PolicyMap(
    ...   {"dot_general@head": "bfloat16", "head": "float32"}, default="mixed_float16"
    ... )
    >>> policies.policy_at("head/kernel").compute_dtype.name
    'float32'
    >>> policies.policy_at("head", op="dot_general").compute_dtype.name
    'bfloat16'
    >>> policies.policy_at("encoder/dense").compute_dtype.name
    'float16'
    >>> changed = PolicyMap({}, default="mixed_bfloat16", ops={"exp": "follow"})
    >>> DEFAULT_OPS["exp"], changed.ops
    ('full', (('exp', 'follow'),))
  """

  __slots__ = ("_patterns", "default", "ops", "rules")

  rules: tuple[tuple[str, Policy], ...]
  default: Policy
  ops: tuple[tuple[str, str], ...]

  def __new__(cls, *args: Any, **kwargs: Any) -> PolicyMap:
    """Names what is missing to those who leave out the default or the rules."""
    missing = [name for name in ("rules", "default")[len(args) :] if name not in kwargs]
    if missing:
      raise TypeError(
        "A PolicyMap takes rules, and the default for everything that no rule governs. Got no "
        f"{' and no '.join(missing)}. Write "
        "mpjax.PolicyMap({'head': 'float32'}, default='mixed_bfloat16')."
      )
    return super().__new__(cls)

  def __init__(
    self,
    rules: Rules,
    default: Policy | Preset | str,
    *,
    ops: Mapping[str, str] | Iterable[tuple[str, str]] = (),
  ) -> None:
    if isinstance(rules, str | Policy):
      raise TypeError(
        f"A PolicyMap takes rules, then the default. Got {shown(str(rules))} for the rules. Write "
        "mpjax.PolicyMap({'head': 'float32'}, default='mixed_bfloat16')."
      )
    pairs: Any = tuple(rules.items() if isinstance(rules, Mapping) else map(_pair, rules))
    patterns = tuple(_compiled(pattern) for pattern, _ in pairs)
    changes = {name: rule for name, rule in dict(ops).items() if DEFAULT_OPS.get(name) != rule}
    read_ops(changes)
    object.__setattr__(self, "rules", tuple((p, _of_rule(p, policy)) for p, policy in pairs))
    object.__setattr__(self, "default", as_policy(default))
    object.__setattr__(self, "ops", tuple(sorted(changes.items())))
    object.__setattr__(self, "_patterns", patterns)

  def __setattr__(self, name: str, value: object) -> None:
    raise AttributeError(f"A PolicyMap cannot be changed; build a new one to set {name!r}.")

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, PolicyMap):
      return NotImplemented
    return self._fields() == other._fields()

  def __hash__(self) -> int:
    return hash(self._fields())

  def __reduce__(self) -> tuple[Any, ...]:
    return _rebuild, self._fields()

  def __repr__(self) -> str:
    rules = ", ".join(f"{pattern!r}: {str(policy)!r}" for pattern, policy in self.rules)
    ops = f", ops={dict(self.ops)!r}" if self.ops else ""
    return f"PolicyMap({{{rules}}}, default={str(self.default)!r}{ops})"

  def _fields(self) -> tuple[Any, ...]:
    return self.rules, self.default, self.ops

  def with_default(self, default: Policy | Preset | str) -> PolicyMap:
    """The same rules with another default."""
    return PolicyMap(self.rules, default, ops=self.ops)

  def rule_at(self, path: Path, op: str | None = None) -> int | None:
    """The index of the rule that governs a module path, or an operation there; None for none."""
    heads = _heads(path) if self._patterns else ()
    for index, pattern in enumerate(self._patterns):
      if pattern.matches(op) and pattern.in_module(heads):
        return index
    return None

  def is_for_op(self, rule: int | None) -> bool:
    """Whether a rule has the form ``op@path``."""
    return rule is not None and self._patterns[rule].op is not None

  def policy_of(self, rule: int | None) -> Policy:
    """The policy of a rule by its index, the default for None."""
    return self.default if rule is None else self.rules[rule][1]

  def policy_at(self, path: str, *, op: str | None = None) -> Policy:
    """The policy that governs a module path such as ``'encoder/dense'``, or an operation there."""
    return self.policy_of(self.rule_at(tuple(path.split("/")), op))

  def table(self) -> Mapping[str, Rule]:
    """What a 16-bit policy does with each primitive, the changes of this map included."""
    return read_ops(dict(self.ops))

  @property
  def policies(self) -> tuple[Policy, ...]:
    """Every policy of the map, the default last."""
    return (*(policy for _, policy in self.rules), self.default)

  @property
  def has_op_rules(self) -> bool:
    """Whether a rule has the form ``op@path``."""
    return any(pattern.op is not None for pattern in self._patterns)

  def narrow_dtypes(self) -> frozenset[np.dtype]:
    """The 16-bit formats that something is computed in."""
    return frozenset(p.compute_dtype for p in self.policies if p.compute_dtype.itemsize == 2)

  def multiplies_in_float8(self) -> bool:
    """Whether the matmuls of something multiply in float8."""
    return any(policy.matmul_format for policy in self.policies)

  def is_float32(self) -> bool:
    """Whether nothing is computed, kept or returned in anything but float32."""
    dtypes = {d for p in self.policies for d in (p.param_dtype, p.compute_dtype, p.output_dtype)}
    return dtypes == {np.dtype(np.float32)}

  def check_used(self, paths: Iterable[Path], ops: Ops | None = None) -> None:
    """Refuse a rule that matches nothing.

    Args:
      paths: Every module path that was seen.
      ops: The operations seen in each module that ran; None where only modules are known.

    Raises:
      ValueError: A rule matched none of them; the message lists the nearest and what was seen.
    """
    paths = tuple(paths)
    heads = sorted({head for path in paths for head in _heads(path)})
    for (text, _), pattern in zip(self.rules, self._patterns, strict=True):
      if not pattern.in_module(heads):
        raise ValueError(_unused(text, text.rpartition("@")[2], "module", "Paths", heads))
      if pattern.op is None or ops is None:
        continue
      seen = {name for path in ops if pattern.in_module(_heads(path)) for name in ops[path]}
      if seen and not any(map(pattern.matches, seen)):
        named = text.rpartition("@")[0]
        raise ValueError(_unused(text, named, "operation", "Operations", sorted(seen)))

  def shadowed(self, paths: Iterable[Path]) -> list[tuple[str, tuple[str, ...]]]:
    """The rules that match modules and win in none, each with the rules above that win there.

    A rule that says what those above it say is none of them.

    Args:
      paths: Every module path that was seen.
    """
    seen = [_heads(path) for path in paths]
    found = []
    for index, (text, policy) in enumerate(self.rules):
      matched = [heads for heads in seen if self._patterns[index].in_module(heads)]
      winners = {self._above(index, heads) for heads in matched}
      others = [self.rules[n] for n in sorted(n for n in winners if n is not None)]
      if None not in winners and any(other != policy for _, other in others):
        found.append((text, tuple(name for name, _ in others)))
    return found

  def _above(self, index: int, heads: list[str]) -> int | None:
    """The first rule above another one that takes a module as a whole."""
    above = enumerate(self._patterns[:index])
    return next((n for n, p in above if p.op is None and p.in_module(heads)), None)


PolicyLike = Policy | PolicyMap | Preset | str
"""What an argument ``policy`` may be."""


def as_policy_map(policy: PolicyLike) -> PolicyMap:
  """Read a policy argument: a `PolicyMap` as it is, anything else as a map without rules."""
  return policy if isinstance(policy, PolicyMap) else PolicyMap({}, as_policy(policy))


def _rebuild(rules: Any, default: Policy, ops: Any) -> PolicyMap:
  return PolicyMap(rules, default, ops=ops)


class _Pattern(NamedTuple):
  """A rule's pattern, its two parts apart."""

  path: re.Pattern[str] | None
  """Matches a module; None for all."""
  op: re.Pattern[str] | None
  """Matches an operation; None for all."""

  def matches(self, op: str | None) -> bool:
    """Whether the pattern speaks of an operation; of modules as a whole for None."""
    return self.op is None or (op is not None and self.op.fullmatch(op) is not None)

  def in_module(self, heads: Iterable[str]) -> bool:
    """Whether the pattern matches one of a path's heads."""
    return self.path is None or any(map(self.path.fullmatch, heads))


def _heads(path: Path) -> list[str]:
  """A path and the paths of its parents: what a rule for it may match."""
  return ["/".join(path[: n + 1]) for n in range(len(path))]


def _of_rule(pattern: str, given: Policy | str) -> Policy:
  policy = as_policy(given)
  if policy.matmul_format and "@" in pattern:
    raise ValueError(
      f"A rule for an operation, here {shown(pattern)}, says in which dtype it runs and what it "
      f"returns. Got {shown(str(policy))}. Name the module alone, or drop {policy.matmul_format}."
    )
  return policy


def _pair(rule: Any) -> tuple[str, Any]:
  if not isinstance(rule, tuple | list) or len(rule) != 2:
    raise TypeError(
      f"A rule of a PolicyMap must be a pair of a path pattern and a policy; got {shown(rule)}. "
      "Write a dictionary, e.g. {'head': 'float32'}, or pairs."
    )
  return rule[0], rule[1]


def _compiled(pattern: str) -> _Pattern:
  if not isinstance(pattern, str):
    raise TypeError(
      f"A rule of a PolicyMap must be a path pattern; got {shown(pattern)}. Write it as a string, "
      "e.g. 'encoder/.*' or 'exp@encoder/.*'."
    )
  op, at, path = pattern.rpartition("@")
  try:
    return _Pattern(re.compile(path) if path or not at else None, re.compile(op) if at else None)
  except re.error as error:
    raise ValueError(
      f"A rule of a PolicyMap must be a regular expression; {shown(pattern)} is none ({error}). "
      "Escape special characters with a backslash, and write '.*' for '*'."
    ) from error


def _unused(rule: str, named: str, what: str, plural: str, seen: list[str]) -> str:
  close = difflib.get_close_matches(named, seen, n=3)
  hint = f" Closest: {', '.join(close)}." if close else ""
  listed = ", ".join(seen[:40]) + (f", and {len(seen) - 40} more" if len(seen) > 40 else "")
  return (
    f"Rule {shown(rule)} matched no {what}.{hint} {plural} seen: {listed or 'none'}. "
    "Fix the pattern or drop the rule."
    + ("" if seen else " In plain functions jax.named_scope makes paths.")
  )
