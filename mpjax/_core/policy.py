"""The triple of dtypes: what parameters, computation and outputs are held in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np

from mpjax._core.arguments import shown
from mpjax._core.casting import cast_floating
from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32, parse_dtype

T = TypeVar("T")

Preset = Literal[
  "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16", "mixed_float8"
]
"""The policies that have a name."""

FLOAT8 = "fp8"
"""The one format to multiply in that is none to compute in: e4m3 forwards, e5m2 backwards."""

_PRESETS: dict[str, tuple[Any, ...]] = {
  "float32": (FLOAT32, FLOAT32, FLOAT32, None),
  "bfloat16": (BFLOAT16, BFLOAT16, BFLOAT16, None),
  "float16": (FLOAT16, FLOAT16, FLOAT16, None),
  "mixed_bfloat16": (FLOAT32, BFLOAT16, FLOAT32, None),
  "mixed_float16": (FLOAT32, FLOAT16, FLOAT32, None),
  "mixed_float8": (FLOAT32, BFLOAT16, FLOAT32, FLOAT8),
}
_KEYS = {
  "params": "param_dtype",
  "p": "param_dtype",
  "compute": "compute_dtype",
  "c": "compute_dtype",
  "output": "output_dtype",
  "o": "output_dtype",
  "matmul": "matmul_format",
  "m": "matmul_format",
}
_FORMS = (
  f"A policy must be a preset ({', '.join(_PRESETS)}) or name each of params (p), compute (c) "
  "and output (o) once"
)
_EXAMPLE = (
  "Write for example 'mixed_bfloat16' or 'params=float32,compute=bfloat16,output=float32'; matmul "
  "(m) may follow, as m=fp8."
)


@dataclass(frozen=True)
class Policy:
  """What parameters, computation and outputs are held in: three dtypes.

  And, if it is not what computation is held in, what matmuls multiply: ``"fp8"``, float8 under a
  scale of each operand, for the matmuls of a parameter. What they return, and everything else, has
  the compute dtype.

  A policy is a value: immutable, hashable, equal to another with the same dtypes however those
  were given, and so usable as a static argument of ``jax.jit``. ``str`` prints a spec that
  `Policy.parse` reads back.

  Attributes:
    param_dtype: The dtype that parameters are stored in.
    compute_dtype: The dtype that matmuls and convolutions take their operands in.
    output_dtype: The dtype of what the function or module returns.
    matmul_format: ``"fp8"``, or None where matmuls multiply in the compute dtype.

  Raises:
    ValueError: If a dtype is not float32, bfloat16 or float16; if matmuls are to multiply in a
      format other than float8, or in float8 while parameters are not float32 or computation is not
      in bfloat16.
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
  matmul_format: str | None = None

  def __new__(cls, *args: Any, **kwargs: Any) -> Policy:
    """Names `parse` to those who pass a spec, and the three dtypes to those who pass others."""
    if len(args) == 1 and isinstance(args[0], str) and not kwargs:
      raise TypeError(
        f"Policy takes three dtypes: param, compute and output. Got one string, {shown(args[0])}. "
        f"Write mpjax.Policy.parse({shown(args[0])})."
      )
    if args or kwargs:  # `copy` and `pickle` make one without
      _check_names([field.name for field in fields(cls)], len(args), kwargs)
    return super().__new__(cls)

  def __post_init__(self) -> None:
    for field in fields(self)[:3]:
      given = getattr(self, field.name)
      if _is_float8(given):
        raise ValueError(
          f"{field.name} must be float32, bfloat16 or float16. Got {shown(given)}, in which values "
          "are multiplied, not held. Write m=fp8 beside it: 'p=f32, c=bf16, o=f32, m=fp8', which "
          "is 'mixed_float8'."
        )
      object.__setattr__(self, field.name, parse_dtype(given))
    object.__setattr__(self, "matmul_format", _read_matmul_format(self))

  @classmethod
  def parse(cls, spec: Preset | str) -> Policy:
    """Reads a policy from a preset's name or from a spec string.

    Args:
      spec: "float32", "bfloat16", "float16" (all three dtypes the same), "mixed_bfloat16",
        "mixed_float16" (parameters and outputs float32), "mixed_float8" (the same as
        "mixed_bfloat16", and its large matmuls multiply in float8), or three assignments in any
        order, such as "params=float32, compute=bfloat16, output=float32" or "p=f32,c=bf16,o=f32",
        and a fourth, "matmul=fp8" or "m=fp8". White space is free.

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
      + (f",matmul={self.matmul_format}" if self.matmul_format else "")
    )

  def __repr__(self) -> str:
    return f"Policy.parse({str(self)!r})"


_FLOAT8_NAMES = {"fp8", "float8"}


def _is_float8(value: Any) -> bool:
  """Whether a dtype, or the name of one, is a float8 format."""
  if isinstance(value, str):
    name = value.strip().lower()
    return name in _FLOAT8_NAMES or name.startswith(("float8_", "f8_", "e4m3", "e5m2"))
  return getattr(value, "__name__", getattr(value, "name", "")).startswith("float8_")


def _read_matmul_format(policy: Policy) -> str | None:
  given = policy.matmul_format
  if given is None:
    return None
  if not (isinstance(given, str) and given.strip().lower() in _FLOAT8_NAMES):
    raise ValueError(
      f"Matmuls multiply in the compute dtype, or in 'fp8', float8. Got {shown(given)}. Write "
      "m=fp8, or drop it: each operand's format and scale are chosen where it is used."
    )
  held = policy.param_dtype.name, policy.compute_dtype.name
  if held != (FLOAT32.name, BFLOAT16.name) or policy.output_dtype == FLOAT16:
    raise ValueError(
      "Matmuls in float8 (m=fp8) need params=float32, compute=bfloat16 and an output of one of "
      f"the two. Got params={held[0]},compute={held[1]},output={policy.output_dtype.name}. Write "
      "'mixed_float8', or drop m=fp8."
    )
  return FLOAT8


def _read_assignments(spec: str) -> dict[str, Any]:
  dtypes: dict[str, Any] = {}
  if ";" in spec:
    raise ValueError(
      f"The parts of a policy are set apart by commas. Got {shown(spec)}. Write "
      f"{shown(spec.replace(';', ','))}."
    )
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
    dtypes[field] = name if field == "matmul_format" or _is_float8(name) else parse_dtype(name)
  missing = [key for key in ("params", "compute", "output") if _KEYS[key] not in dtypes]
  if missing:
    raise ValueError(f"{_FORMS}. Got no {' and no '.join(missing)} in {shown(spec)}. {_EXAMPLE}")
  return dtypes


def _check_names(names: Sequence[str], count: int, kwargs: Mapping[str, Any]) -> None:
  """Refuses keywords that are none of a Policy's, and the lack of one that it needs.

  Args:
    names: The names of its fields; the last may be left out.
    count: How many came by position.
    kwargs: What came by name.
  """
  unknown = [shown(name) for name in kwargs if name not in names]
  missing = [name for name in names[count:-1] if name not in kwargs]
  if not (unknown or missing):
    return
  got = f"the unknown keyword {unknown[0]}" if unknown else f"no {' and no '.join(missing)}"
  raise TypeError(
    f"Policy takes three dtypes: {', '.join(names[:2])} and {names[2]}. Got {got}. Write them all, "
    "mpjax.Policy('float32', 'bfloat16', 'float32'), or wherever a policy is taken a string: "
    "'mixed_bfloat16', or 'params=float32,compute=bfloat16,output=float32'."
  )


def _part(part: str, spec: str) -> str:
  """A part of a spec, and the spec if that is more."""
  return shown(part.strip()) + (f" in {shown(spec)}" if part.strip() != spec else "")


_SHORT_NAMES = {
  "fp8": "float8",
  "bf16": "bfloat16",
  "fp16": "float16",
  "f16": "float16",
  "half": "float16",
}


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
  held = tuple(getattr(policy, field.name) for field in fields(policy))
  return next((name for name, preset in _PRESETS.items() if preset == held), str(policy))


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


FLOAT32_POLICY = Policy(FLOAT32, FLOAT32, FLOAT32)
