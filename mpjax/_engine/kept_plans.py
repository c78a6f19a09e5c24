"""Plans that are kept between calls which nothing compiles, as in a notebook without ``jax.jit``.

Such a call is traced each time, since what the function closes over may have changed; it would be
planned each time, too, and every jitted helper in it, rebuilt, compiled anew. So the plan, and
what the interpreter rebuilt for it, are kept for the next call with the same *program*: a jaxpr
that is equal in all that a plan and its execution look at, under the same policies.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import source_info_util

from mpjax._core.policy_map import PolicyMap
from mpjax._engine import escapes
from mpjax._engine.analyses.known import Known
from mpjax._engine.planning.plan import Plan, Scoping
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import versions
from mpjax._engine.program.kinds import Forms
from mpjax._engine.program.versions import AnyJaxpr, ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from mpjax._engine.running.custom_derivatives import closed_over, slots, trace_jvp, trace_vjp
from mpjax._engine.running.interpreter import Interpreter

PROGRAMS = 32
"""How many programs are kept: those that were called last."""
NUMBERS = 4096
"""How many numbers a program may have captured in arrays: they are compared, and held with it."""


@dataclasses.dataclass(frozen=True)
class Program:
  """What is planned.

  Attributes:
    jaxpr: The traced call.
    forms: How each operand is held.
    known: What else is known of operands and results.
    policies: The policies by module path.
    scoping: How scopes lead to the paths of modules.
  """

  jaxpr: AnyJaxpr
  forms: Forms
  known: Known
  policies: PolicyMap
  scoping: Scoping


class Planned:
  """A program's plan, and what was rebuilt to run it.

  Args:
    program: The program.
    read_by_rules: The variables whose values rules close over that run later. There are none in a
      program that is kept, for such rules are not compared.

  Attributes:
    planner: The planner that made the plan.
    plan: The plan.
  """

  def __init__(self, program: Program, read_by_rules: Collection[Var] = ()) -> None:
    self._read_by_rules = read_by_rules
    self.planner = Planner(program.policies, program.scoping)
    plan = self.planner.plan(program.jaxpr, program.forms, known=program.known)
    if read_by_rules:  # as hardly ever
      plan = dataclasses.replace(plan, read_outside=frozenset(read_by_rules))
    self.plan: Plan = plan
    self._interpreters: dict[tuple[float, bool], Interpreter] = {}

  def interpreter(self, loss_scale: float, *, stepwise: bool) -> Interpreter:
    """What runs the plan, with what it rebuilt in earlier runs of this kind."""
    key = loss_scale, stepwise
    if key not in self._interpreters:
      self._interpreters[key] = Interpreter(
        self.planner,
        stepwise=stepwise,
        loss_scale=loss_scale,
        read_by_rules=self._read_by_rules,
      )
    return self._interpreters[key]


def planned(program: Program, operands: Sequence[jax.Array]) -> Planned:
  """The plan of a program, or the one that was kept for an equal program.

  It is kept where every operand is an array that is there, or the derivative of a call with such
  is taken: under ``jax.jit`` JAX itself keeps what a trace led to.
  """
  is_kept = not program.scoping.located and all(map(_is_there, operands))
  code = _code_of(program, operands) if is_kept else None
  if code is None:
    return Planned(program, escapes.read_by_rules(program.jaxpr))
  return _kept(_Coded(code, program))


class _Coded:
  """A program under a code: equal to every other under an equal one."""

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


def _code_of(program: Program, operands: Sequence[jax.Array]) -> Hashable | None:
  """Equal for programs that are planned and executed alike; None where that cannot be told.

  Of what is differentiated with respect to other operands another case of its rules is asked for;
  of a call with arrays alone none is, so its rules are not looked at.
  """
  rest = program.forms, program.known, program.policies, program.scoping
  settings = _settings(jax.config), source_info_util.current_name_stack()
  kinds = tuple(map(type, operands))
  try:
    constants = _constants(versions.constants(program.jaxpr))
    codes = _Codes(with_rules=any(isinstance(x, Tracer) for x in operands))
    code = codes.jaxpr(program.jaxpr), constants, rest, settings, kinds
  except _NotComparedError:
    return None
  return code if _has_hash(code) else None


def _has_hash(code: Hashable) -> bool:
  try:
    hash(code)
  except TypeError:  # of a parameter of an equation
    return False
  return True


class _Codes:
  """The codes of the jaxprs of one program.

  Args:
    with_rules: Whether the derivative rules of functions are asked for.
  """

  def __init__(self, *, with_rules: bool) -> None:
    self._with_rules = with_rules
    self._done: dict[tuple[int, int], tuple[Any, Hashable]] = {}  # by identity and depth
    self._open: list[Hashable] = []  # the function whose rules are being read, as often as it is

  def jaxpr(self, jaxpr: AnyJaxpr) -> Hashable:
    """The code of a jaxpr, but for its constants; variables are counted as they come."""
    key = id(jaxpr), len(self._open)
    if key not in self._done:
      self._done[key] = jaxpr, self._jaxpr(jaxpr)
    return self._done[key][1]

  def _jaxpr(self, jaxpr: AnyJaxpr) -> Hashable:
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
    return tuple(v.aval for v in bound), tuple(eqns), tuple(map(atom, inner.outvars))

  def _params(self, eqn: JaxprEqn) -> Hashable:
    """The code of an equation's parameters."""
    if eqn.primitive.name in _WITH_RULES:
      return self._rules(eqn)
    return tuple((key, self._value(x)) for key, x in eqn.params.items())

  def _rules(self, eqn: JaxprEqn) -> Hashable:
    """The code of a function with a derivative rule of its own: the traces of both.

    JAX makes the functions that a rule is anew in each trace. One that looks at which tangents are
    zero has a trace for each case, so it is not compared. The rule of a `jax.nn.relu` calls that
    again, whose rules are read once more, and then only named. Another function there is not
    compared, for rules of rules may go on without end: each derivative of an exported function is
    exported itself.
    """
    avals = tuple(atom.aval for atom in eqn.invars)
    function = eqn.primitive, self._body(eqn.params["call_jaxpr"]), avals, closed_over(eqn)
    if not self._with_rules:
      return function
    if eqn.params["symbolic_zeros"]:
      raise _NotComparedError
    if self._open and self._open[0] != function:
      raise _NotComparedError
    if len(self._open) == _DEPTH:
      return function
    self._open.append(function)
    traces, facts = _traced_rules(eqn)
    code = function, facts, *map(self._body, traces)
    self._open.pop()
    return code

  def _body(self, jaxpr: AnyJaxpr) -> Hashable:
    """The code of a jaxpr that may not hold arrays: those of the first call would be used."""
    if len(versions.constants(jaxpr)):
      raise _NotComparedError
    return self.jaxpr(jaxpr)

  def _value(self, x: Any) -> Hashable:
    """The code of a parameter's value."""
    if isinstance(x, Jaxpr | ClosedJaxpr):
      return self._body(x)
    if isinstance(x, tuple | list):
      return type(x), *map(self._value, x)
    if isinstance(x, dict):
      return dict, *((key, self._value(entry)) for key, entry in x.items())
    if isinstance(x, np.ndarray | jax.Array):
      raise _NotComparedError
    is_function = callable(x) and not isinstance(x, jax.sharding.Mesh)
    if is_function or hasattr(x, "call_wrapped"):
      return _function(x)
    return type(x), x.hex() if isinstance(x, float) else x  # 1 == 1.0 == True, 0.0 == -0.0


_WITH_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
_DEPTH = 2
"""How often the rules of a function are read within each other."""


def _traced_rules(eqn: JaxprEqn) -> tuple[list[ClosedJaxpr], Hashable]:
  """The traces of the rules, as they are where everything has a tangent.

  And which operands are residuals, of which the traces do not tell.
  """
  ins, outs = slots(eqn.invars[closed_over(eqn) :]), slots(eqn.outvars)
  try:
    if eqn.primitive.name == "custom_jvp_call":
      return [trace_jvp(eqn, ins)], None
    vjp = trace_vjp(eqn, ins)
    return [vjp.forward, vjp.backward(outs)], vjp.operands
  except Exception as error:  # a user's rule may raise anything, and only where it is needed
    raise _NotComparedError from error


def _function(x: Any) -> Hashable:
  """The code of a function: itself, where a module holds it; others JAX makes at each trace."""
  module, name = getattr(x, "__module__", None), getattr(x, "__name__", "")
  if module is None or getattr(sys.modules.get(module), name, None) is not x:
    raise _NotComparedError
  return x


def _constants(found: Sequence[Any]) -> Hashable:
  """The code of the arrays that a call captured: their numbers, if these are few."""
  sizes = 0
  for x in found:
    is_array = isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer)
    if not is_array or not isinstance(x.dtype, np.dtype):  # the keys of random numbers have others
      raise _NotComparedError
    sizes += x.size
  if sizes > NUMBERS:
    raise _NotComparedError
  return tuple((np.asarray(x).tobytes(), x.dtype, x.shape) for x in found)
