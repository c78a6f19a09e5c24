"""What values become where they leave a module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy import Policy
from mpjax._core.primitives import Trait, having
from mpjax._core.scopes import Path
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import DATA, Form, Kind, narrow
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var

_GO_ON = having(Trait.KEEPS_NUMBERS) | {"add", "sub", "neg"}

Governs = Callable[[Path], tuple[int | None, Policy]]
"""The rule, by its index, and the policy of a module."""

_Births = dict[tuple[int, ...], Path]


class Borders:
  """The borders of the modules that the equations of one jaxpr stand in.

  Args:
    governs: What rule and policy a path has, as it stands in this jaxpr.
    multiplied: The variables that lead into a matmul.
  """

  def __init__(self, governs: Governs, multiplied: Collection[Var]) -> None:
    self._governs, self._multiplied = governs, multiplied
    self._homes: dict[Var, Path] = {}
    self._births: dict[Atom, _Births] = {}
    self.lasting = set[Atom]()
    self._entered: dict[Path, dict[tuple[int, ...], np.dtype | None]] = {}

  def settle(
    self, eqn: JaxprEqn, path: Path, *, multiplies: bool, lasts: Sequence[Var] = ()
  ) -> None:
    """Note in which module an equation stands, and where its results began.

    Args:
      eqn: The equation.
      path: Its module.
      multiplies: Whether it has a matmul in it: what comes out of one begins there.
      lasts: Which of its results are float32 behind their module, too; so is what moves them or
        is added to them.
    """
    if lasts:
      self.lasting.update(lasts)
    if self.lasting and eqn.primitive.name in _GO_ON:
      read = jaxprs.variables_of(eqn.invars)
      self.lasting.update(() if self.lasting.isdisjoint(read) else eqn.outvars)
    begun: _Births = {}
    read: Any = () if multiplies else eqn.invars
    for atom in read:
      if isinstance(atom, Literal):
        continue
      births = self._births.get(atom)
      births = _births(atom, (), {}) if births is None else births
      for of_shape, birth in births.items() if begun else ():
        known = begun.get(of_shape, birth)
        begun[of_shape] = known if known == birth else known[: common_depth(known, birth)]
      begun = begun or dict(births)
    made: Any = eqn.outvars
    for var in made:
      self._homes[var] = path
      self._births[var] = _births(var, path, begun)

  def cross(self, atom: Atom, form: Form | None, path: Path) -> Form | None:
    """The form of a value that is read in another module than it was computed in."""
    home = () if form is None or isinstance(atom, Literal) else self._homes.get(atom, ())
    if form is None or home == path:
      return form
    form = self._leave(atom, form, home, path)
    if form.kind is not Kind.PARAM:
      self._enter(atom, form, home, path)
    return form

  def _leave(self, atom: Atom, form: Form, home: Path, path: Path) -> Form:
    """The form of a value after it left every module between its home and a path.

    Data that lead on into a layer go on in 16 bits where they are what came in, made over: every
    value of their shape came in as such, and one of them leads to them with no matmul between. So
    do the results of norms and activations, but no loss or statistic, no weights that a router
    computes, and not the float32 state of a recurrent cell; nor what a small step changed, a sum,
    and a gate that is needed near one. A module that a rule matched hands out the rule's output
    dtype.
    """
    if form.kind < Kind.NARROW:
      return form
    for depth in range(len(home), common_depth(home, path), -1):
      rule, policy = self._governs(home[:depth])
      if rule is not None and rule != self._governs(home[: depth - 1])[0]:
        form = held_as(policy.output_dtype)
      elif self._may_round(atom, form, policy):
        shape = jaxprs.shape(atom)
        dtype = self._entered.get(home[:depth], {}).get(shape)
        birth = self._births.get(atom, {}).get(shape, home)
        dtype = None if birth[:depth] == home[:depth] else dtype
        form = form if dtype is None else narrow(dtype)
    return form

  def _may_round(self, atom: Atom, form: Form, policy: Policy) -> bool:
    """Whether data may go on in 16 bits: they lead on into a layer, and are no more than that."""
    is_stream = atom in self._multiplied and atom not in self.lasting
    return form.kind is Kind.DATA and policy.compute_dtype != FLOAT32 and is_stream

  def _enter(self, atom: Atom, form: Form, home: Path, path: Path) -> None:
    """Remember the format in which every module gets values of a shape: None if in float32."""
    for depth in range(common_depth(home, path) + 1, len(path) + 1):
      formats = self._entered.setdefault(path[:depth], {})
      dtype = form.dtype if form.kind is Kind.NARROW else None
      shape = jaxprs.shape(atom)
      formats[shape] = dtype if formats.get(shape, dtype) == dtype else None


def held_as(dtype: np.dtype) -> Form:
  """The form of a result that has a dtype by its policy."""
  return DATA if dtype == FLOAT32 else narrow(dtype)


def _births(var: Var, path: Path, begun: _Births) -> _Births:
  """Where the values began that lead to one, by their shapes; a scalar is no stream."""
  shape = getattr(var.aval, "shape", ())
  return {shape: path} | begun if shape else {}


def common_depth(a: Path, b: Path) -> int:
  """How many components two paths have in common."""
  for depth, (x, y) in enumerate(zip(a, b, strict=False)):
    if x != y:
      return depth
  return min(len(a), len(b))
