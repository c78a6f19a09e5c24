"""Functions of arrays in every format: what `cast_inputs` leaves in a trace.

Autocast rewrites what it can read. A kernel it cannot, so the function around it is traced once in
every format, where it is called, and the policy chooses among the traces. They are all made there
and then because only there the function's surroundings are at hand: what it closes over, the axes
and meshes of its place. And they are made whether there is a policy or not, because JAX keeps
traces: that of a jitted function made without a policy is used again inside one. So the mark says
the same everywhere, and a trace-time switch, which could say which policy governs, would lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from mpjax._core.dtypes import CASTABLE, FLOAT16, FLOAT32, describe
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.versions import AnyJaxpr, ClosedJaxpr

Run = Callable[..., list[jax.Array]]
Dims = Sequence[int | None]


class Kernel:
  """One function of arrays in every format, traced where it was called.

  Attributes:
    name: The function's name, for messages.
    results: Its abstract results in float32, or as they are in a format that it has, with that
      format's floats taken for float32.

  Args:
    name: The function's name.
    formats: For each format its jaxpr, or what was raised when it was traced.
    likeliest: The format whose error is raised if the function has none.
  """

  def __init__(
    self, name: str, formats: Mapping[np.dtype, Any], likeliest: np.dtype = FLOAT32
  ) -> None:
    self.name = name
    self._formats = formats
    first = next((d for d, found in formats.items() if not isinstance(found, Exception)), None)
    if first is None:
      raise _in_no_format(formats, likeliest)
    self.first = first
    self.results = [as_float32(aval, first) for aval in formats[first].out_avals]
    self.effects = versions.open_jaxpr(formats[first]).effects

  def jaxprs(self) -> list[ClosedJaxpr]:
    """Its closed jaxprs, in every format that it has."""
    return [found for found in self._formats.values() if not isinstance(found, Exception)]

  def has(self, dtype: np.dtype) -> bool:
    """Whether it can be traced in a format."""
    return not isinstance(self._formats[dtype], Exception)

  def traced_in(self, dtype: np.dtype) -> ClosedJaxpr:
    """Its closed jaxpr in a format.

    Raises:
      Exception: What the function raised when it was traced in this format.
      ValueError: Its results differ from those in another format by more than a float's width.
    """
    closed = self._formats[dtype]
    if isinstance(closed, Exception):
      raise closed
    if not all(map(corresponds, self.results, closed.out_avals)):
      raise ValueError(
        "A function under cast_inputs must return the same shapes in every format; "
        f"{self.name} returns {_listed(self.results)} in {self.first.name} and "
        f"{_listed(closed.out_avals)} in {dtype.name}. Cast its operands by hand instead."
      )
    return closed

  def run(self, dtype: np.dtype, *operands: jax.Array) -> list[jax.Array]:
    """Evaluate it in a format, on operands of the dtypes that its jaxpr has."""
    return jaxprs.evaluate(self.traced_in(dtype), operands)

  def derived(self, make: Callable[[np.dtype], tuple[Run, Sequence[Any]]], name: str) -> Kernel:
    """Another function, made of this one in every format that this one has.

    Args:
      make: For a format the function, and its abstract operands.
      name: Its name.
    """

    def trace(dtype: np.dtype) -> ClosedJaxpr:
      if not self.has(dtype):
        raise self._formats[dtype]
      run, avals = make(dtype)
      return jaxprs.trace(run, avals)

    return Kernel(name, in_every_format(trace), self.first)


def in_every_format(trace: Callable[[np.dtype], Any]) -> dict[np.dtype, Any]:
  """What a function gives for every format, or what it raises, to be raised where it is needed."""
  found: dict[np.dtype, Any] = {}
  for dtype in CASTABLE:
    try:
      found[dtype] = trace(dtype)
    except Exception as error:  # a kernel without this format: raised if it is asked for
      found[dtype] = error.with_traceback(None)
  return found


def _in_no_format(errors: Mapping[np.dtype, Exception], likeliest: np.dtype) -> Exception:
  """One format's error, to raise where a function runs in none; it tells the others'."""
  raised = errors[likeliest]
  for dtype, error in errors.items():
    if str(error) != str(raised):
      raised.add_note(f"With {dtype.name} operands: {error}")
  return raised


def as_float32(aval: Any, dtype: np.dtype) -> Any:
  """An abstract value, float32 if it has a format."""
  return jaxprs.with_dtype(aval, FLOAT32) if aval.dtype == dtype else aval


def corresponds(declared: Any, aval: Any) -> bool:
  """Whether a result in a format may stand for one that was declared."""
  same = declared.dtype == aval.dtype or (declared.dtype == FLOAT32 and aval.dtype in CASTABLE)
  return same and declared.shape == aval.shape


def _listed(avals: Sequence[Any]) -> str:
  return ", ".join(map(describe, avals))


def traced(name: str, fn: Run, arrays: Sequence[jax.Array]) -> tuple[Kernel, list[Any]]:
  """A function in every format, and the tracers that it closes over, its first operands.

  Args:
    name: Its name, for messages.
    fn: The function, of arrays.
    arrays: The arrays that it is called with.

  Raises:
    Exception: What it raised in float32, if it can be traced in no format.
  """
  avals = [jax.typeof(x) for x in arrays]

  def trace(dtype: np.dtype) -> ClosedJaxpr:
    cast = [jaxprs.with_dtype(a, dtype) if a.dtype == FLOAT32 else a for a in avals]
    closed = jaxprs.trace(fn, cast)
    return jaxprs.without_presets(closed) if dtype == FLOAT16 else closed

  formats = in_every_format(trace)
  jaxpr_of = {d: f for d, f in formats.items() if not isinstance(f, Exception)}
  constants = [x for closed in jaxpr_of.values() for x in versions.constants(closed)]
  captured = list({id(x): x for x in constants if isinstance(x, Tracer)}.values())
  if captured:
    formats |= {d: _with_operands(closed, captured) for d, closed in jaxpr_of.items()}
  return Kernel(name, formats), captured


def _with_operands(closed: AnyJaxpr, captured: Sequence[jax.Array]) -> Any:
  """A jaxpr that takes some of its constants as its first operands."""
  inner, count = versions.open_jaxpr(closed), len(captured)

  def fn(*operands: jax.Array) -> list[jax.Array]:
    given = {id(x): operand for x, operand in zip(captured, operands[:count], strict=True)}
    constants = [given.get(id(x), x) for x in versions.constants(closed)]
    return jaxprs.evaluate_open(inner, constants, operands[count:])

  return jaxprs.trace(fn, [*map(jax.typeof, captured), *(v.aval for v in inner.invars)])


# The primitive -----------------------------------------------------------------------------------

cast_inputs_p = Primitive("mpjax_cast_inputs")
"""A call of a `Kernel`: in float32, where no policy took its place."""
cast_inputs_p.multiple_results = True


@cast_inputs_p.def_impl
def _impl(*operands: jax.Array, kernel: Kernel) -> list[jax.Array]:
  return kernel.run(FLOAT32, *operands)


@cast_inputs_p.def_effectful_abstract_eval
def _abstract_eval(*avals: Any, kernel: Kernel) -> tuple[list[Any], Any]:
  del avals
  return kernel.results, kernel.effects


def _batch(axis: Any, operands: Any, dims: Any, *, kernel: Kernel) -> tuple[list[Any], Dims]:
  many = batched(kernel, axis, [*map(jax.typeof, operands)], dims)
  return cast_inputs_p.bind(*operands, kernel=many), _batched_results(kernel, dims)


def batched(kernel: Kernel, axis: Any, avals: Sequence[Any], dims: Dims) -> Kernel:
  """A function over a batch, which is the leading axis of the results that depend on it.

  Args:
    kernel: The function.
    axis: What JAX knows of the batch: its size and its names.
    avals: The abstract operands, as traced.
    dims: Which axis of each is the batch, None for one that all share.
  """
  out_dims = list(_batched_results(kernel, dims))
  options = {"axis_name": axis.name, "axis_size": axis.size, "spmd_axis_name": axis.spmd_name}

  def make(dtype: np.dtype) -> tuple[Run, Sequence[Any]]:
    dtypes = [a.dtype for a in kernel.traced_in(dtype).in_avals]
    fn = jax.vmap(functools.partial(kernel.run, dtype), tuple(dims), out_dims, **options)
    return fn, [jaxprs.with_dtype(a, d) for a, d in zip(avals, dtypes, strict=True)]

  return kernel.derived(make, kernel.name)


def _batched_results(kernel: Kernel, dims: Dims) -> Dims:
  """Which results depend on a batch, in some format: in all of them those have its axis ahead."""
  batched = [dim is not None for dim in dims]
  flags = zip(*(jaxprs.depending(j, batched) for j in kernel.jaxprs()), strict=True)
  return [0 if any(column) else None for column in flags]


batching.fancy_primitive_batchers[cast_inputs_p] = _batch
mlir.register_lowering(cast_inputs_p, mlir.lower_fun(_impl, multiple_results=True))


def kernel_of(params: Mapping[str, Any]) -> Kernel:
  """The function that an equation calls, by the equation's parameters."""
  kernel = params["kernel"]
  return kernel if isinstance(kernel, Kernel) else kernel()
