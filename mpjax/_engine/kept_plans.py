"""Plans that are kept between calls which nothing compiles, as in a notebook without ``jax.jit``.

Such a call is traced each time, since what the function closes over may have changed; it would be
planned each time, too, and every jitted helper in it, rebuilt, compiled anew. So the plan, and
what the interpreter rebuilt for it, are kept for the next call with the same *program*: a jaxpr
that is equal in all that a plan and its execution look at, under the same policies.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import sys
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import source_info_util

from mpjax._core.policy_map import PolicyMap
from mpjax._core.primitives import Trait, having
from mpjax._engine import versions
from mpjax._engine.custom_derivatives import closed_over, slots, trace_jvp, trace_vjp
from mpjax._engine.interpreter import Interpreter
from mpjax._engine.jaxprs import Jaxpr, JaxprEqn, Literal
from mpjax._engine.plan import Forms, Plan
from mpjax._engine.planner import Known, Planner
from mpjax._engine.versions import ClosedJaxpr

PROGRAMS = 32
"""How many programs are kept: those that were called last."""
COMPARED = 4096
"""Captured arrays of up to so many numbers are the same where their numbers are."""
HELD = 2**20
"""A larger one is the same where it is the same array, and a program with one of more numbers
than these is not kept, for the array would be, too."""


@dataclasses.dataclass(frozen=True)
class Program:
  """What is planned.

  Attributes:
    jaxpr: The traced call.
    forms: How each operand is held.
    known: What else is known of operands and results.
    policies: The policies by module path.
    root: How many leading components of every scope are not part of a rule's path.
    absolute: Whether scopes inside the body of a loop or jit are full paths all the same.
    located: Whether a body that several modules call is planned for each.
  """

  jaxpr: Any
  forms: Forms
  known: Known
  policies: PolicyMap
  root: int
  absolute: bool
  located: bool


class Planned:
  """A program's plan, and what was rebuilt to run it.

  Attributes:
    planner: The planner that made the plan.
    plan: The plan.
  """

  def __init__(self, program: Program) -> None:
    self.planner = Planner(program.policies, program.root, program.absolute, program.located)
    self.plan: Plan = self.planner.plan(program.jaxpr, program.forms, known=program.known)
    self.interpreter = functools.cache(self._interpreter)

  def _interpreter(self, loss_scale: float) -> Interpreter:
    return Interpreter(self.planner, loss_scale=loss_scale)


def planned(program: Program, operands: Iterable[Any]) -> Planned:
  """The plan of a program, or the one that was kept for an equal program.

  It is kept where every operand is an array that is there, or the derivative of a call with such
  is taken: under ``jax.jit`` JAX itself keeps what a trace led to.
  """
  if program.located or not all(map(_is_there, operands)):
    return Planned(program)
  code = _code_of(program)
  return Planned(program) if code is None else _kept(_Coded(code, program))


class _Coded:
  """A program under a code: equal to every other under an equal one.

  It holds what its code names by identity, so that nothing else can have the same.
  """

  def __init__(self, code: Hashable, program: Program) -> None:
    self.code, self.program, self._hash = code, program, hash(code)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Coded) and self.code == other.code


@functools.lru_cache(maxsize=PROGRAMS)
def _kept(coded: _Coded) -> Planned:
  return Planned(coded.program)


def _is_there(x: Any) -> bool:
  return not isinstance(x, Tracer) or x.to_concrete_value() is not None


# What programs are equal by --------------------------------------------------------------------


class _NotComparedError(Exception):
  """A program holds something of which it cannot be said whether it is the same as before."""


_settings = operator.attrgetter(
  "jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion"
)


def _code_of(program: Program) -> Hashable | None:
  """Equal for programs that are planned and executed alike; None where that cannot be told."""
  rest = program.forms, program.known, program.policies, program.root, program.absolute
  settings = _settings(jax.config), source_info_util.current_name_stack()
  try:
    code = _Codes().jaxpr(program.jaxpr), rest, settings
    hash(code)
  except (_NotComparedError, TypeError):  # not everything has a hash
    return None
  return code


class _Codes:
  """The codes of the jaxprs of one program."""

  def __init__(self) -> None:
    self._done: dict[int, tuple[Any, Hashable]] = {}  # by identity
    self._open: Hashable | None = None  # the function whose rules are being read

  def jaxpr(self, jaxpr: Any) -> Hashable:
    """The code of a jaxpr; variables are counted in the order in which they come."""
    if id(jaxpr) not in self._done:
      self._done[id(jaxpr)] = jaxpr, self._jaxpr(jaxpr)
    return self._done[id(jaxpr)][1]

  def _jaxpr(self, jaxpr: Any) -> Hashable:
    inner = versions.open_jaxpr(jaxpr)
    bound = [*inner.constvars, *inner.invars]
    numbers: dict[Any, int] = {v: n for n, v in enumerate(bound)}

    def atom(x: Any) -> Hashable:
      if isinstance(x, Literal):
        return x.aval, np.asarray(x.val).tobytes()
      return numbers[x]

    eqns = []
    for eqn in inner.eqns:
      operands = tuple(map(atom, eqn.invars))
      info = eqn.source_info.name_stack, eqn.ctx, len(eqn.outvars)
      eqns.append((eqn.primitive, operands, self._params(eqn), info))
      numbers |= {v: n for n, v in enumerate(eqn.outvars, len(numbers))}
    avals, constants = tuple(v.aval for v in bound), map(_constant, versions.constants(jaxpr))
    return avals, tuple(constants), tuple(eqns), tuple(map(atom, inner.outvars))

  def _params(self, eqn: JaxprEqn) -> Hashable:
    """The code of an equation's parameters.

    What a jitted function was traced to JAX keeps, so that it is the same object in the next trace:
    that tells where what stands in it cannot be compared.
    """
    if eqn.primitive.name in _WITH_RULES:
      return self._rules(eqn)
    try:
      return tuple((key, self._value(x)) for key, x in eqn.params.items())
    except _NotComparedError:
      if eqn.primitive.name not in _JITTED:
        raise
      rest = {key: x for key, x in eqn.params.items() if key != "jaxpr"}
      return id(eqn.params["jaxpr"]), *((key, self._value(x)) for key, x in rest.items())

  def _rules(self, eqn: JaxprEqn) -> Hashable:
    """The code of a function with a derivative rule of its own: the traces of both.

    JAX makes the functions that a rule is anew in each trace. One that looks at which tangents are
    zero has a trace for each case, so it is not compared. The rule of a `jax.nn.relu` calls that
    again: within its rules a function is only named. Another one there is not compared, for rules
    of rules may go on without end: each derivative of an exported function is exported itself.
    """
    if eqn.params["symbolic_zeros"]:
      raise _NotComparedError
    avals = tuple(atom.aval for atom in eqn.invars)
    function = eqn.primitive, self.jaxpr(eqn.params["call_jaxpr"]), avals, closed_over(eqn)
    if self._open == function:
      return function
    if self._open is not None:
      raise _NotComparedError
    self._open = function
    try:
      return function, *map(self.jaxpr, _traced_rules(eqn))
    finally:
      self._open = None

  def _value(self, x: Any) -> Hashable:
    """The code of a parameter's value."""
    if isinstance(x, Jaxpr | ClosedJaxpr):
      return self.jaxpr(x)
    if isinstance(x, tuple | list):
      return type(x), *map(self._value, x)
    if isinstance(x, dict):
      return dict, *((key, self._value(entry)) for key, entry in x.items())
    if isinstance(x, np.ndarray | jax.Array):
      return _constant(x)
    if inspect.isroutine(x) or isinstance(x, functools.partial) or hasattr(x, "call_wrapped"):
      return _function(x)
    return type(x), x.hex() if isinstance(x, float) else x  # 1 == 1.0 == True, 0.0 == -0.0


_JITTED = having(Trait.JIT)
_WITH_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})


def _traced_rules(eqn: JaxprEqn) -> list[Any]:
  """The traces of the rules, as they are where everything has a tangent."""
  ins, outs = slots(eqn.invars[closed_over(eqn) :]), slots(eqn.outvars)
  try:
    if eqn.primitive.name == "custom_jvp_call":
      return [trace_jvp(eqn, ins)]
    vjp = trace_vjp(eqn, ins)
    return [vjp.forward, vjp.backward(outs)]
  except Exception as error:  # a user's rule may raise anything, and only where it is needed
    raise _NotComparedError from error


def _function(x: Any) -> Hashable:
  """The code of a function: itself, where a module holds it; others JAX makes at each trace."""
  module, name = getattr(x, "__module__", None), getattr(x, "__name__", "")
  if module is None or getattr(sys.modules.get(module), name, None) is not x:
    raise _NotComparedError
  return x


def _constant(x: Any) -> Hashable:
  """The code of an array that was captured."""
  if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray) or x.size > HELD:
    raise _NotComparedError
  is_jax = isinstance(x, jax.Array)
  if is_jax and (x.size > COMPARED or not isinstance(x.dtype, np.dtype)):
    return id(x)
  placed = (x.sharding, x.weak_type) if is_jax else ()
  return np.asarray(x).tobytes(), x.dtype, x.shape, *placed
