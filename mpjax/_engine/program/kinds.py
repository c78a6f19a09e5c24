"""What a float32 of the trace means, and in which dtype it is held for that.

The meanings are a chain of four, `Kind`; what each primitive does to them is in
`mpjax._core.primitives`.
"""

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import FLOAT32


class Kind(enum.IntEnum):
  """What a float32 value of the trace means; a join takes the largest."""

  CONSTANT = 0
  """A Python number or a mask: adapts to whatever it meets."""
  PARAM = 1
  """A parameter, or one moved: adapts, and is cast anew at every use."""
  NARROW = 2
  """What came out of a matmul and what elementwise operations made of it: held in 16 bits."""
  DATA = 3
  """Float32 that was meant: inputs, labels, positions, tables, results of sensitive operations."""


class Form(NamedTuple):
  """How a value that was traced as float32 is held: its meaning and its dtype."""

  kind: Kind
  dtype: np.dtype


CONSTANT = Form(Kind.CONSTANT, FLOAT32)
PARAM = Form(Kind.PARAM, FLOAT32)
DATA = Form(Kind.DATA, FLOAT32)

Forms = tuple[Form | None, ...]
"""How some values are held; None for what was not float32."""


FEW = 16
"""How many terms lose in 16 bits no more than other values do."""


def is_narrow(form: Form | None) -> TypeGuard[Form]:
  """Whether a value is held in 16 bits."""
  return form is not None and form.kind is Kind.NARROW


def is_data(form: Form | None) -> TypeGuard[Form]:
  """Whether a value is float32 that was meant."""
  return form is not None and form.kind is Kind.DATA


def narrow(dtype: np.dtype) -> Form:
  """The form of a value held in a 16-bit format."""
  return Form(Kind.NARROW, dtype)


def join(forms: Iterable[Form | None]) -> Form | None:
  """The least form that holds all the given ones; None where nothing was float32.

  Two different 16-bit formats meet in float32, as JAX promotes them.
  """
  known = [form for form in forms if form is not None]
  if not known:
    return None
  top = max(known)
  formats = {form.dtype for form in known if is_narrow(form)}
  return DATA if top.kind is Kind.NARROW and len(formats) > 1 else top


def fits(value: float, dtype: np.dtype) -> bool:
  """Whether a constant survives a 16-bit format.

  It must neither overflow nor lie below the normals, and must not become 1 if it is not 1: as
  ``1 - 1e-5``, which guards a logarithm, and as the decay 0.999 it would say something else. In a
  format with the range of float32 all finite numbers fit, saturated: float32's own largest, with
  which Flax and others mask attention scores, against bfloat16. In float16 65505 is too large.
  """
  magnitude = abs(float(value))
  if not np.isfinite(magnitude) or magnitude in (0.0, 1.0):
    return True
  info = jnp.finfo(dtype)
  if 0.5 < magnitude < 2.0 and float(np.asarray(magnitude).astype(dtype)) == 1.0:
    return False
  has_range = info.maxexp == jnp.finfo(FLOAT32).maxexp
  return float(info.smallest_normal) <= magnitude and (has_range or magnitude <= float(info.max))


def keeps_its_distance(value: float, dtype: np.dtype) -> bool:
  """Whether a number is as far from one in a format as it was, as well as the format can say it.

  In bfloat16 0.99 is not: as a decay it forgets at 0.988, a sixth faster.
  """
  value = abs(float(value))
  error = abs(float(np.asarray(value).astype(dtype)) - value)
  return error <= abs(1 - value) * float(jnp.finfo(dtype).eps)


def saturated(value: Any, dtypes: Iterable[np.dtype]) -> Any:
  """A float32 number, at most the largest of each format in which it fits."""
  if not np.isfinite(value):
    return value
  limits = [float(jnp.finfo(d).max) for d in dtypes if fits(value, d)]
  limit = min(limits, default=np.inf)
  return value if abs(value) <= limit else np.float32(np.copysign(limit, value))
