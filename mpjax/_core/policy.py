"""The triple of dtypes: what parameters, computation and outputs are held in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np

from mpjax._core.arguments import shown
from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32, parse_dtype

T = TypeVar("T")

Preset = Literal["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"]
"""The policies that have a name."""

_PRESETS: dict[str, tuple[np.dtype, np.dtype, np.dtype]] = {
  "float32": (FLOAT32, FLOAT32, FLOAT32),
  "bfloat16": (BFLOAT16, BFLOAT16, BFLOAT16),
  "float16": (FLOAT16, FLOAT16, FLOAT16),
  "mixed_bfloat16": (FLOAT32, BFLOAT16, FLOAT32),
  "mixed_float16": (FLOAT32, FLOAT16, FLOAT32),
}
_KEYS = {
  "params": "param_dtype",
  "p": "param_dtype",
  "compute": "compute_dtype",
  "c": "compute_dtype",
  "output": "output_dtype",
  "o": "output_dtype",
}
_FORMS = (
  f"A policy must be a preset ({', '.join(_PRESETS)}) or name each of params (p), compute (c) "
  "and output (o) once"
)
_EXAMPLE = "Write for example 'mixed_bfloat16' or 'params=float32,compute=bfloat16,output=float32'."


@dataclass(frozen=True)
class Policy:
  """What parameters, computation and outputs are held in: three dtypes.

  A policy is a value: immutable, hashable, equal to another with the same dtypes however those
  were given, and so usable as a static argument of ``jax.jit``. ``str`` prints a spec that
  `Policy.parse` reads back.

  Attributes:
    param_dtype: The dtype that parameters are stored in.
    compute_dtype: The dtype that matmuls and convolutions take their operands in.
    output_dtype: The dtype of what the function or module returns.

  Raises:
    ValueError: If a dtype is not float32, bfloat16 or float16.
    TypeError: If an argument is not a name, a ``np.dtype`` or a scalar type.

  Example:
    >>> import jax.numpy as jnp
    >>> policy = Policy("float32", jnp.bfloat16, "f32")
    >>> policy == Policy.parse("mixed_bfloat16")
    True
    >>> print(policy)
    params=float32,compute=bfloat16,output=float32
  """

  param_dtype: np.dtype
  compute_dtype: np.dtype
  output_dtype: np.dtype

  def __new__(cls, *args: Any, **kwargs: Any) -> Policy:
    """Names `parse` to those who pass a spec."""
    if len(args) == 1 and isinstance(args[0], str) and not kwargs:
      raise TypeError(
        f"Policy takes three dtypes: param, compute and output. Got one string, {shown(args[0])}. "
        f"Write mpjax.Policy.parse({shown(args[0])})."
      )
    return super().__new__(cls)

  def __post_init__(self) -> None:
    for field in fields(self):
      object.__setattr__(self, field.name, parse_dtype(getattr(self, field.name)))

  @classmethod
  def parse(cls, spec: Preset | str) -> Policy:
    """Reads a policy from a preset's name or from a spec string.

    Args:
      spec: "float32", "bfloat16", "float16" (all three dtypes the same), "mixed_bfloat16",
        "mixed_float16" (parameters and outputs float32), or three assignments in any order,
        such as "params=float32, compute=bfloat16, output=float32" or "p=f32,c=bf16,o=f32".
        White space is free.

    Returns:
      The policy.

    Raises:
      ValueError: If a key is unknown, missing or given twice, or a dtype is unknown; the
        message lists what is legal.
      TypeError: If ``spec`` is not a string.

    Example:
      >>> Policy.parse("p=f32, c=bf16, o=f32").compute_dtype
      dtype(bfloat16)
    """
    if not isinstance(spec, str):
      raise TypeError(f"{_FORMS}, in a string. Got {shown(spec)}. {_EXAMPLE}")
    preset = _PRESETS.get(spec.strip().lower())
    return cls(*preset) if preset else cls(**_read_assignments(spec))

  def cast_to_param(self, tree: T) -> T:
    """Casts the float leaves of a tree to ``param_dtype``; see `cast_floating`."""
    return cast_floating(tree, self.param_dtype)

  def cast_to_compute(self, tree: T) -> T:
    """Casts the float leaves of a tree to ``compute_dtype``; see `cast_floating`."""
    return cast_floating(tree, self.compute_dtype)

  def cast_to_output(self, tree: T) -> T:
    """Casts the float leaves of a tree to ``output_dtype``; see `cast_floating`."""
    return cast_floating(tree, self.output_dtype)

  def __str__(self) -> str:
    return (
      f"params={self.param_dtype.name},compute={self.compute_dtype.name},"
      f"output={self.output_dtype.name}"
    )

  def __repr__(self) -> str:
    return f"Policy.parse({str(self)!r})"


FLOAT32_POLICY = Policy(FLOAT32, FLOAT32, FLOAT32)


def _read_assignments(spec: str) -> dict[str, np.dtype]:
  dtypes: dict[str, np.dtype] = {}
  for part in spec.split(","):
    key, equals, name = (piece.strip() for piece in part.partition("="))
    if not equals:
      raise ValueError(f"{_FORMS}. Got {_part(part, spec)}. {_closest(part)}{_EXAMPLE}")
    field = _KEYS.get(key.lower())
    if field is None:
      raise ValueError(f"{_FORMS}. Got the unknown key {_part(key, spec)}. {_EXAMPLE}")
    if field in dtypes:
      raise ValueError(
        f"{_FORMS}. Got {shown(key)} a second time in {shown(spec)}. Drop one of them."
      )
    dtypes[field] = parse_dtype(name)
  missing = [key for key in ("params", "compute", "output") if _KEYS[key] not in dtypes]
  if missing:
    raise ValueError(f"{_FORMS}. Got no {' and no '.join(missing)} in {shown(spec)}. {_EXAMPLE}")
  return dtypes


def _part(part: str, spec: str) -> str:
  """A part of a spec, and the spec if that is more."""
  return shown(part.strip()) + (f" in {shown(spec)}" if part.strip() != spec else "")


_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}


def _closest(word: str) -> str:
  """The presets that a word may have meant: by other names of their dtypes, then by spelling."""
  words = word[:80].strip().lower().replace("-", "_").split("_")
  name = "_".join(_SHORT_NAMES.get(w, w) for w in words if w != "mixed")
  meant = [known for known in (f"mixed_{name}", name) if known in _PRESETS]
  found = meant or difflib.get_close_matches("_".join(words), _PRESETS, n=2)
  return f"Closest: {', '.join(found)}. " if found else ""


def spec(policy: Policy) -> str:
  """The shortest spec that `Policy.parse` reads as this policy: a preset's name if there is one.

  Example:
    >>> spec(Policy("float32", "float16", "float32")), spec(Policy("float32", "float32", "bf16"))
    ('mixed_float16', 'params=float32,compute=float32,output=bfloat16')
  """
  triple = (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
  return next((name for name, preset in _PRESETS.items() if preset == triple), str(policy))


def as_policy(policy: Policy | Preset | str) -> Policy:
  """The policy itself, or the policy that a spec string names.

  Raises:
    ValueError: If the string is not a spec; see `Policy.parse`.
    TypeError: If ``policy`` is neither a Policy nor a string.

  Example:
    >>> as_policy("float32")
    Policy.parse('params=float32,compute=float32,output=float32')
  """
  if isinstance(policy, Policy):
    return policy
  if isinstance(policy, str):
    return Policy.parse(policy)
  if isinstance(policy, Mapping):
    raise TypeError(
      f"A policy must be a mpjax.Policy or a spec string. Got a {type(policy).__name__}. Policies "
      "by module path are mpjax.PolicyMap(rules, default=...)."
    )
  raise TypeError(
    f"A policy must be a mpjax.Policy or a spec string. Got {shown(policy)} of type "
    f"{type(policy).__name__}. {_EXAMPLE}"
  )
