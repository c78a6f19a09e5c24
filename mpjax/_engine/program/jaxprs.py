"""Reading, running and rebuilding equations through JAX's public interface."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import DebugInfo, jaxprs_in_params
from jax.sharding import AxisType

from mpjax._engine.program import versions
from mpjax._engine.program.versions import (
  AnyJaxpr,
  Atom,
  ClosedJaxpr,
  Jaxpr,
  JaxprEqn,
  Literal,
  Var,
)

_FLOAT32 = np.dtype(np.float32)
_T = TypeVar("_T")


def trace(fn: Callable[..., Any], avals: Sequence[Any]) -> ClosedJaxpr:
  """Trace ``fn(*avals)`` to a closed jaxpr."""
  return jax.make_jaxpr(fn)(*avals)


def is_float32(atom: Atom) -> bool:
  """Whether a variable or literal of a jaxpr is float32 as traced."""
  return getattr(atom.aval, "dtype", None) == _FLOAT32


def dtype(atom: Atom) -> np.dtype | None:
  """The dtype of the array that a variable or literal of a jaxpr holds, if it holds one."""
  return getattr(atom.aval, "dtype", None)


def kind(atom: Atom) -> str:
  """The kind of number that an array holds, as NumPy abbreviates it; "V" for what it has not."""
  aval: Any = atom.aval
  try:  # asked of every operand
    return aval.dtype.kind
  except AttributeError:  # a key, or no array
    return "V"


def shape(atom: Atom) -> tuple[int, ...]:
  """The shape of an array that a variable or literal of a jaxpr holds."""
  aval: Any = atom.aval
  return aval.shape


def size(atom: Atom) -> int:
  """How many numbers a variable or literal of a jaxpr holds."""
  return size_of(shape(atom))


def size_of(dims: Sequence[Any]) -> int:
  """How many numbers an array of these dimensions holds; a symbolic one is taken for a large one.

  `jax.export` leaves dimensions symbolic: of ``2 * batch`` nothing can be asked but what holds for
  every batch.
  """
  product = math.prod(dims)
  if is_known(product):
    return product
  return math.prod([dim if is_known(dim) else SYMBOLIC for dim in dims])


def is_known(dim: Any) -> bool:
  """Whether a dimension is a number, and not the symbol of one."""
  return isinstance(dim, int | np.integer)


SYMBOLIC = 2**16 + 1
"""What a symbolic dimension is taken for: large, and unlikely to be the size of anything else."""


def with_dtype(aval: Any, dtype: np.dtype) -> Any:
  """An abstract value with another dtype; its shape, sharding and varying axes are kept."""
  return aval if aval.dtype == dtype else aval.update(dtype=dtype)


def retyped(params: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
  """Equation parameters with every float32 result dtype replaced by ``dtype``."""
  found = {
    key: dtype if key in _DTYPE_PARAMS and value == _FLOAT32 else value
    for key, value in params.items()
  }
  pair: Any = found.get("update_jaxpr")
  if pair is not None:  # what a scatter does with two numbers
    found["update_jaxpr"] = _of_numbers(pair, dtype)
  return found


def _of_numbers(jaxpr: AnyJaxpr, dtype: np.dtype) -> AnyJaxpr:
  """A jaxpr of float32 numbers as one of numbers of another dtype."""
  inner = versions.open_jaxpr(jaxpr)
  avals = [with_dtype(v.aval, dtype) if is_float32(v) else v.aval for v in inner.invars]
  closed = trace(lambda *numbers: evaluate(jaxpr, numbers), avals)
  return versions.like(jaxpr, closed)[0]


def without_algorithm(params: dict[str, Any]) -> dict[str, Any]:
  """Matmul parameters without an algorithm made for operands of another dtype."""
  precision = params.get("precision")
  chosen = precision if isinstance(precision, tuple) else (precision,)
  known = all(p is None or isinstance(p, jax.lax.Precision) for p in chosen)
  return params if known else params | {"precision": None}


def without_presets(jaxpr: Any) -> Any:
  """A jaxpr whose float16 matmuls are asked for float32 sums by the dtype of their results alone.

  JAX's attention asks for them by an algorithm, too, which CPUs do not have.
  """
  inner = versions.open_jaxpr(jaxpr)
  eqns = [eqn.replace(params=_params_without_presets(eqn.params)) for eqn in inner.eqns]
  changed = inner.replace(eqns=eqns)
  return ClosedJaxpr(changed, versions.constants(jaxpr)) if hasattr(jaxpr, "jaxpr") else changed


def _params_without_presets(params: dict[str, Any]) -> dict[str, Any]:
  if params.get("precision") is jax.lax.DotAlgorithmPreset.F16_F16_F32:
    return params | {"precision": None}

  def changed(value: Any) -> Any:
    if isinstance(value, tuple):
      return tuple(map(changed, value)) if any(map(_is_jaxpr, value)) else value
    return without_presets(value) if _is_jaxpr(value) else value

  return {key: changed(value) for key, value in params.items()}


def _is_jaxpr(value: Any) -> bool:
  return isinstance(value, Jaxpr | ClosedJaxpr)


_DTYPE_PARAMS = frozenset({"preferred_element_type", "out_dtype", "new_dtype", "dtype"})


@contextmanager
def located(eqn: JaxprEqn, scopes: slice = slice(None)) -> Iterator[None]:
  """Run under the source line, the name stack and the settings that an equation was traced with.

  Args:
    eqn: The equation.
    scopes: Which part of its name stack is added to what is current.
  """
  info = eqn.source_info
  names = source_info_util.current_name_stack() + info.name_stack[scopes]
  with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
    yield


def sources(inner: Jaxpr, moves: Collection[str]) -> Callable[[Any], Any]:
  """Tells what an operand was before primitives that are called moves moved or spread it.

  Args:
    inner: The open jaxpr that it stands in.
    moves: The names of the primitives.
  """
  moved = {eqn.outvars[0]: eqn.invars[0] for eqn in inner.eqns if eqn.primitive.name in moves}

  def source(atom: Atom) -> Any:
    while not isinstance(atom, Literal) and atom in moved:
      atom = moved[atom]
    return atom

  return source


def equations(
  jaxpr: AnyJaxpr, known: _T, enter: Callable[[JaxprEqn, _T], _T]
) -> Iterator[tuple[JaxprEqn, _T]]:
  """Every equation of a jaxpr, at any depth, with what is known of it.

  Args:
    jaxpr: The jaxpr.
    known: What is known of it.
    enter: What is then known of an equation, and of the jaxprs that it holds.
  """
  for eqn in versions.open_jaxpr(jaxpr).eqns:
    inside = enter(eqn, known)
    yield eqn, inside
    for body in jaxprs_in_params(eqn.params):
      yield from equations(body, inside, enter)


def makers_of(inner: Jaxpr) -> dict[Var, JaxprEqn]:
  """What makes each variable of a jaxpr that an equation makes."""
  return {var: eqn for eqn in inner.eqns for var in eqn.outvars}


def behind(
  atom: Atom, makers: Mapping[Any, JaxprEqn], known: Collection[Var] = frozenset()
) -> Iterator[tuple[Var, JaxprEqn | None]]:
  """A value and what it is made of, by and by, each with what makes it; None if no equation does.

  Args:
    atom: A variable or literal of a jaxpr.
    makers: The equations of that, by what they make.
    known: What is left out, with what it is made of.
  """
  queue, seen = [atom], set[Var](known)
  while queue:
    before = queue.pop()
    if not isinstance(before, Literal) and before not in seen:
      seen.add(before)
      made = makers.get(before)
      yield before, made
      queue += made.invars if made is not None else ()


def variables_of(atoms: Iterable[Atom]) -> set[Var]:
  """Those of some operands that are no literals."""
  return {atom for atom in atoms if not isinstance(atom, Literal)}


def places_of(atoms: Iterable[Atom], found: Collection[Any]) -> frozenset[int]:
  """Where among operands variables are that are found."""
  return frozenset(n for n, v in enumerate(atoms) if not isinstance(v, Literal) and v in found)


def ordered_places(atoms: Iterable[Atom], found: Collection[Any]) -> tuple[int, ...]:
  """The same, in order."""
  return tuple(sorted(places_of(atoms, found)))


def common_scopes(eqns: Sequence[JaxprEqn]) -> int:
  """How many scopes lie around all of the equations, from the outermost in.

  None of them is a transformation whose name wraps the next: ``vmap(attend)`` stays whole.
  """
  stacks = [eqn.source_info.name_stack for eqn in eqns]
  columns = zip(*[stack.stack for stack in stacks], strict=False)
  depth = len([*takewhile(lambda column: len({*column}) == 1, columns)])
  while depth and str(stacks[0][depth - 1 : depth]).endswith("()"):
    depth -= 1
  return depth


def evaluate(closed: AnyJaxpr, operands: Sequence[jax.Array]) -> list[jax.Array]:
  """The results of a closed jaxpr on operands of the dtypes that it has."""
  return evaluate_open(versions.open_jaxpr(closed), versions.constants(closed), operands)


def evaluate_open(
  inner: Jaxpr, constants: Sequence[Any], operands: Sequence[jax.Array]
) -> list[jax.Array]:
  """The results of a jaxpr with these for its constants."""
  run = functools.partial(jax.core.eval_jaxpr, inner, constants)
  return (
    jax.jit(run, inline=True)(*operands)
    if any(map(_loses_sharding, inner.eqns))
    else run(*operands)
  )


def depending(closed: AnyJaxpr, on: Sequence[bool]) -> list[bool]:
  """Which results of a jaxpr may depend on some of its operands."""
  inner = versions.open_jaxpr(closed)
  found = {var for var, is_on in zip(inner.invars, on, strict=True) if is_on}
  for eqn in inner.eqns:
    if any(not isinstance(atom, Literal) and atom in found for atom in eqn.invars):
      found.update(eqn.outvars)
  return [not isinstance(atom, Literal) and atom in found for atom in inner.outvars]


def run_as_traced(eqn: JaxprEqn, operands: Sequence[jax.Array]) -> list[jax.Array]:
  """Evaluate one equation with operands of the dtypes that it was traced with."""
  variables = [a for a in eqn.invars if not isinstance(a, Literal)]
  values = [x for a, x in zip(eqn.invars, operands, strict=True) if not isinstance(a, Literal)]
  first = dict(zip(variables, values, strict=True))  # one operand may stand in several places
  unnamed = eqn.source_info.replace(name_stack=source_info_util.new_name_stack())
  alone = Jaxpr(
    constvars=(),
    invars=list(first),
    outvars=list(eqn.outvars),
    eqns=[eqn.replace(source_info=unnamed)],  # the scope is current already
    effects=eqn.effects,
    debug_info=DebugInfo("autocast", eqn.primitive.name, None, None),
  )
  return jax.core.eval_jaxpr(alone, (), *first.values())


# JAX 0.12 loses an explicit sharding in the derivatives of these when it computes them one
# operation after the other, as it does for nobody else: `jax.numpy` calls them in a `jax.jit`.
_TRACED_DERIVATIVES = frozenset({"max", "min"})


def _loses_sharding(eqn: JaxprEqn) -> bool:
  """Whether the derivative of an equation has to be traced."""
  name = eqn.primitive.name
  return name in _TRACED_DERIVATIVES and is_sharded_explicitly(eqn.outvars[0].aval)


@functools.cache
def _jitted(primitive: Any) -> Callable[..., Any]:
  """A primitive without parameters, whose derivative JAX traces."""
  return jax.jit(lambda *operands: primitive.bind(*operands), inline=True)


def is_sharded_explicitly(aval: Any) -> bool:
  """Whether an array's type says how it is sharded, as those of what is computed from it must."""
  return AxisType.Explicit in aval.sharding.mesh.axis_types


def run_with(
  eqn: JaxprEqn, operands: Sequence[jax.Array], params: dict[str, Any]
) -> list[jax.Array]:
  """Bind an equation's primitive to other operands and parameters; always returns a list."""
  bind = _jitted(eqn.primitive) if _loses_sharding(eqn) else eqn.primitive.bind
  out = bind(*operands, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def devices(eqn: JaxprEqn) -> int | None:
  """How many devices a collective moves numbers between, None if its operands do not say it."""
  params, sizes = eqn.params, dict[Any, int]()
  for atom in eqn.invars:
    aval: Any = atom.aval
    sizes.update(aval.sharding.mesh.shape)
  axes = params.get("axes", params.get("axis_name"))
  names = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(sizes[n] for n in names) if sizes.keys() >= {*names} else None
