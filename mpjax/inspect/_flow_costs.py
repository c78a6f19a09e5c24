"""What one step of a plan costs: its dtypes, floating-point operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._core.dtypes import FLOAT32, is_of
from mpjax._core.primitives import MATMULS, Rule
from mpjax._engine.planning.decisions import PRODUCTS
from mpjax._engine.planning.plan import Step
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import repetitions
from mpjax._engine.program.kinds import Form, Kind
from mpjax._engine.program.versions import Jaxpr, JaxprEqn
from mpjax._engine.running.float8 import FORWARD


def is_float(aval: Any) -> bool:
  """Whether an abstract value holds floats."""
  return is_of(aval, jnp.inexact)


def is_matmul(step: Step) -> bool:
  """Whether a step is a matmul or convolution: not one that only multiplies, or weighs terms."""
  return step.eqn.primitive.name in MATMULS and step.rule is not Rule.MULTIPLY


def has_floats(eqn: JaxprEqn) -> bool:
  """Whether an equation reads or makes floats."""
  return any(is_float(a.aval) for a in (*eqn.invars, *eqn.outvars))


def runs_in(step: Step) -> np.dtype:
  """The dtype that a step computes in: that of its float operands as it reads them, or rounds."""
  if step.in_float8:
    return FORWARD
  if step.rule is Rule.EXACT:
    return step.params[PRODUCTS]
  atoms: Any = step.eqn.invars
  for atom, read, form in zip(atoms, step.reads, step.operands, strict=True):
    if form is not None:
      return read.to or read.via or form.dtype
    if is_float(atom.aval):
      return atom.aval.dtype
  return returns(step)


def runs_narrow(step: Step) -> bool:
  """Whether a step computes in 16 bits or fewer."""
  return runs_in(step).itemsize <= 2


def returns(step: Step) -> np.dtype:
  """The dtype of a step's first float result; float32 if it has none, as comparisons."""
  outvars: Any = step.eqn.outvars
  for var, form in zip(outvars, step.outs, strict=True):
    if is_float(var.aval):
      return var.aval.dtype if form is None else form.dtype
  return FLOAT32


def integer_operand(eqn: JaxprEqn) -> str:
  """The dtype of a matmul's first integer operand; empty if it has none."""
  if eqn.primitive.name not in MATMULS:
    return ""
  avals: list[Any] = [atom.aval for atom in eqn.invars[:2]]
  return next((aval.dtype.name for aval in avals if aval.dtype.kind in "biu"), "")


def matmuls_inside(
  eqn: JaxprEqn, params: dict[str, Any] | None = None
) -> Iterator[tuple[JaxprEqn, int]]:
  """The matmuls in jaxprs that an equation holds and no plan has, each with how often it runs.

  Args:
    eqn: The equation.
    params: Its parameters as it runs; those that it was traced with when None.
  """
  params = eqn.params if params is None else params
  grid = getattr(params.get("grid_mapping"), "grid", ())  # of a Pallas kernel
  times = math.prod(n for n in grid if isinstance(n, int)) * (repetitions(eqn) or 1)
  for jaxpr in _jaxprs_in(tuple(params.values())):
    for inner in jaxpr.eqns:
      if inner.primitive.name in MATMULS:
        yield inner, times
      else:
        yield from ((matmul, times * n) for matmul, n in matmuls_inside(inner))


def _jaxprs_in(value: Any) -> Iterator[Jaxpr]:
  """The jaxprs that a parameter is, or holds in tuples, lists and dicts."""
  opened = versions.open_jaxpr(value)
  if isinstance(opened, Jaxpr):
    yield opened
  elif isinstance(value, tuple | list | dict):
    for entry in value.values() if isinstance(value, dict) else value:
      yield from _jaxprs_in(entry)


def dtype_inside(matmul: JaxprEqn) -> str:
  """The dtype of a matmul that runs as traced: of the widest of its operands."""
  dtypes: list[Any] = [atom.aval.dtype for atom in matmul.invars[:2]]  # type: ignore[union-attr]
  return max(dtypes, key=lambda dtype: dtype.itemsize).name


def bytes_of(var: Any, form: Form | None) -> int:
  """The bytes of an activation; parameters that were moved and constants are none."""
  if not is_float(var.aval) or (form is not None and form.kind < Kind.NARROW):
    return 0
  dtype = var.aval.dtype if form is None else form.dtype
  return math.prod(var.aval.shape) * dtype.itemsize


def flops(eqn: JaxprEqn) -> int:
  """The multiplications and additions of a matmul or convolution."""
  left, right = (atom.aval for atom in eqn.invars[:2])
  out: Any = eqn.outvars[0].aval
  lhs: Any = left
  rhs: Any = right
  size = math.prod(out.shape)
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * size * math.prod(lhs.shape[n] for n in contracted)
  if eqn.primitive.name == "conv_general_dilated":
    features = rhs.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * size * math.prod(rhs.shape) // features
  return 2 * size * lhs.shape[-1]
