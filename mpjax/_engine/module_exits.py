"""What values become where they leave a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy import Policy
from mpjax._core.scopes import Path
from mpjax._engine.jaxprs import JaxprEqn, Literal, Var
from mpjax._engine.kinds import DATA, Form, Kind, narrow

Governs = Callable[[Path], tuple[int | None, Policy]]
"""The rule, by its index, and the policy of a module."""


class Borders:
  """The borders of the modules that the equations of one jaxpr stand in.

  Args:
    governs: What rule and policy a path has, as it stands in this jaxpr.
  """

  def __init__(self, governs: Governs) -> None:
    self._governs = governs
    self._homes: dict[Var, Path] = {}
    self._births: dict[Var, dict[tuple[int, ...], Path]] = {}
    self._entered: dict[Path, dict[tuple[int, ...], np.dtype | None]] = {}

  def settle(self, eqn: JaxprEqn, path: Path, *, multiplies: bool) -> None:
    """Note in which module an equation stands, and where its results began.

    Args:
      eqn: The equation.
      path: Its module.
      multiplies: Whether it has a matmul in it: what comes out of one begins there.
    """
    begun: dict[tuple[int, ...], Path] = {}
    read: Any = () if multiplies else eqn.invars
    for atom in read:
      if not isinstance(atom, Literal) and getattr(atom.aval, "ndim", 0):
        for shape, birth in self._births.get(atom, {atom.aval.shape: ()}).items():
          known = begun.get(shape, birth)
          begun[shape] = known[: common_depth(known, birth)]
    made: Any = eqn.outvars
    for var in made:
      self._homes[var] = path
      self._births[var] = {getattr(var.aval, "shape", ()): path} | begun

  def cross(self, atom: Any, form: Form | None, path: Path) -> Form | None:
    """The form of a value that is read in another module than it was computed in."""
    form = self._leave(atom, form, path)
    if form is not None and form.kind is not Kind.PARAM:
      self._enter(atom, form, path)
    return form

  def _home(self, atom: Any) -> Path:
    return () if isinstance(atom, Literal) else self._homes.get(atom, ())

  def _leave(self, atom: Any, form: Form | None, path: Path) -> Form | None:
    """The form of a value after it left every module between its home and a path.

    Data goes on in 16 bits where it is what came in, made over: every value of its shape came in as
    such, and one of them leads to it with no matmul between. So do the results of norms and
    activations, but no loss or statistic, no weights that a router computes, and not the float32
    state of a recurrent cell. A module that a rule matched hands out the rule's output dtype.
    """
    home = self._home(atom)
    if form is None or form.kind < Kind.NARROW or len(home) == common_depth(home, path):
      return form
    for depth in range(len(home), common_depth(home, path), -1):
      rule, policy = self._governs(home[:depth])
      if rule is not None and rule != self._governs(home[: depth - 1])[0]:
        form = held_as(policy.output_dtype)
      elif form.kind is Kind.DATA and policy.compute_dtype != FLOAT32:
        shape = atom.aval.shape
        dtype = self._entered.get(home[:depth], {}).get(shape)
        birth = self._births.get(atom, {}).get(shape, home)
        dtype = None if birth[:depth] == home[:depth] else dtype
        form = form if dtype is None else narrow(dtype)
    return form

  def _enter(self, atom: Any, form: Form, path: Path) -> None:
    """Remember the format in which every module gets values of a shape: None if in float32."""
    for depth in range(common_depth(self._home(atom), path) + 1, len(path) + 1):
      formats = self._entered.setdefault(path[:depth], {})
      dtype = form.dtype if form.kind is Kind.NARROW else None
      formats[atom.aval.shape] = dtype if formats.get(atom.aval.shape, dtype) == dtype else None


def held_as(dtype: np.dtype) -> Form:
  """The form of a result that has a dtype by its policy."""
  return DATA if dtype == FLOAT32 else narrow(dtype)


def common_depth(a: Path, b: Path) -> int:
  """How many components two paths have in common."""
  depth = 0
  while depth < min(len(a), len(b)) and a[depth] == b[depth]:
    depth += 1
  return depth
