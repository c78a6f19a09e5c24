"""Reading and rebuilding jaxprs through JAX's public interface.

Everything that differs between the supported JAX versions is in this file. Two facts matter:
since JAX 0.12 ``Jaxpr`` and ``ClosedJaxpr`` are one class, and a scan names its constants and
carries by counts before it and by trees after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import DebugInfo, Jaxpr, JaxprEqn, Literal, Var

Path = tuple[str, ...]

_FLOAT32 = np.dtype(np.float32)


def open_jaxpr(jaxpr: Any) -> Jaxpr:
  """The equations of a jaxpr, whether it came closed over its constants or not."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def constants(jaxpr: Any) -> Sequence[Any]:
  """The constants that a closed jaxpr carries; none for an open one."""
  return getattr(jaxpr, "consts", None) or ()


def trace(fn: Callable[..., Any], avals: Sequence[Any]) -> Any:
  """Trace ``fn(*avals)`` to a closed jaxpr."""
  return jax.make_jaxpr(fn)(*avals)


def like(original: Any, closed: Any) -> tuple[Any, Sequence[Any]]:
  """Shape a freshly traced jaxpr like the equation parameter that it replaces.

  Args:
    original: The parameter as it stood in the equation, a closed or an open jaxpr.
    closed: The new jaxpr, as ``trace`` returns it.

  Returns:
    The new parameter, and the constants that must now be passed as leading operands (an open
    jaxpr cannot carry any).
  """
  if hasattr(original, "jaxpr"):
    return closed, ()
  inner, consts = open_jaxpr(closed), list(constants(closed))
  if consts:
    debug = DebugInfo("autocast", "body", None, None)
    inner = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars], debug_info=debug)
  return inner, consts


class LoopShape(NamedTuple):
  """How the operands of a scan or while loop are laid out."""

  consts: int
  carry: int


def scan_shape(eqn: JaxprEqn) -> LoopShape:
  """Count the constants and carries of a scan.

  A scanned operand or a stacked result has one axis more outside the body than inside, in
  every JAX version; a constant and a carry have not.
  """
  body = open_jaxpr(eqn.params["jaxpr"])
  carry = sum(_same_rank(o, i) for o, i in zip(eqn.outvars, body.outvars, strict=True))
  unstacked = sum(_same_rank(o, i) for o, i in zip(eqn.invars, body.invars, strict=True))
  return LoopShape(unstacked - carry, carry)


def _same_rank(outer: Any, inner: Any) -> bool:
  return outer.aval.ndim == inner.aval.ndim


def is_float32(atom: Any) -> bool:
  """Whether a variable or literal of a jaxpr is float32 as traced."""
  return getattr(atom.aval, "dtype", None) == _FLOAT32


def with_dtype(aval: Any, dtype: np.dtype) -> Any:
  """An abstract value with another dtype; its shape, sharding and varying axes are kept."""
  return aval if aval.dtype == dtype else aval.update(dtype=dtype)


def retyped(params: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
  """Equation parameters with every float32 result dtype replaced by ``dtype``."""
  return {
    key: dtype if key in _DTYPE_PARAMS and value == _FLOAT32 else value
    for key, value in params.items()
  }


def without_algorithm(params: dict[str, Any]) -> dict[str, Any]:
  """Matmul parameters without an algorithm made for operands of another dtype."""
  precision = params.get("precision")
  chosen = precision if isinstance(precision, tuple) else (precision,)
  known = all(p is None or isinstance(p, jax.lax.Precision) for p in chosen)
  return params if known else params | {"precision": None}


_DTYPE_PARAMS = frozenset({"preferred_element_type", "out_dtype", "new_dtype", "dtype"})


@contextmanager
def located(eqn: JaxprEqn) -> Iterator[None]:
  """Run under the source line, the name stack and the settings that an equation was traced with."""
  info = eqn.source_info
  names = source_info_util.current_name_stack() + info.name_stack
  with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
    yield


def run_as_traced(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
  """Evaluate one equation with operands of the dtypes that it was traced with."""
  variables = [a for a in eqn.invars if not isinstance(a, Literal)]
  values = [x for a, x in zip(eqn.invars, operands, strict=True) if not isinstance(a, Literal)]
  first = dict(zip(variables, values, strict=True))  # one operand may stand in several places
  alone = Jaxpr(
    constvars=(),
    invars=list(first),
    outvars=list(eqn.outvars),
    eqns=[eqn],
    effects=eqn.effects,
    debug_info=DebugInfo("autocast", eqn.primitive.name, None, None),
  )
  return jax.core.eval_jaxpr(alone, (), *first.values())


def run_with(eqn: JaxprEqn, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
  """Bind an equation's primitive to other operands and parameters; always returns a list."""
  out = eqn.primitive.bind(*operands, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def module_path(name_stack: Any) -> Path:
  """The module path that a name stack spells.

  Transformations wrap a component (``transpose(jvp(encoder))``), a differentiated checkpoint
  repeats the path from its root, and Linen writes a method that is not ``__call__`` as
  ``module.method``: all three are undone.
  """
  path: list[str] = []
  for component in str(name_stack).split("/"):
    name, wrapped = _unwrap(component)
    if not name or name in _NOT_MODULES:
      continue
    owner, _, method = name.partition(".")
    if method and path and owner == path[-1]:
      continue
    if wrapped and path and owner == path[0]:
      path.clear()
    path.append(owner)
  return tuple(path)


def is_backward(name_stack: Any) -> bool:
  """Whether an equation came from transposing, as the backward pass does."""
  return "transpose(" in str(name_stack)


_NOT_MODULES = frozenset({"rematted_computation", "checkpoint"})


def _unwrap(component: str) -> tuple[str, bool]:
  wrapped = False
  while component.endswith(")") and "(" in component:
    component = component[component.index("(") + 1 : -1]
    wrapped = True
  return component, wrapped


__all__ = ["Jaxpr", "JaxprEqn", "Literal", "Path", "Var"]
