"""What differs between the supported JAX versions, all of it.

Since JAX 0.12 ``Jaxpr`` and ``ClosedJaxpr`` are one class, and a scan names its constants and
carries by trees where it gave their counts before. The rest of the library knows neither.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var

Atom = Var | Literal
"""An operand of an equation, or a result of a jaxpr."""
AnyJaxpr = Jaxpr | ClosedJaxpr
"""A jaxpr as a parameter of an equation holds it, open or closed over its constants."""


def open_jaxpr(jaxpr: AnyJaxpr) -> Jaxpr:
  """The equations of a jaxpr, whether it came closed over its constants or not."""
  inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
  return inner


def constants(jaxpr: AnyJaxpr) -> Sequence[Any]:
  """The constants that a closed jaxpr carries; none for an open one."""
  return getattr(jaxpr, "consts", None) or ()


def like(original: Any, closed: Any) -> tuple[Any, Sequence[Any]]:
  """Shape a freshly traced jaxpr like the equation parameter that it replaces.

  Args:
    original: The parameter as it stood in the equation, a closed or an open jaxpr.
    closed: The new jaxpr, as ``jax.make_jaxpr`` returns it.

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


def variable(tracer: Any) -> Var | None:
  """The variable that stands for a value of a trace in its jaxpr, where the value has one."""
  found = getattr(tracer, "val", None)
  return found if isinstance(found, Var) else None


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
