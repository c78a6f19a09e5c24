"""A call of a function: its arrays, and with which form each enters, apart from what is static."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._core.dtypes import FLOAT32, is_of
from mpjax._engine import escapes
from mpjax._engine.analyses.power_iteration import Own
from mpjax._engine.program.kinds import DATA, PARAM, Form, Forms
from mpjax._engine.running.environment import to_dtype

STATE = "state"
"""The flag of what a model holds beside its parameters."""

Flag = Any  # whether these are parameters (True or False), STATE, or a sequence of flags
Flags = tuple[Sequence[Flag], dict[str, bool]]


class Result(NamedTuple):
  """What a function returned under a policy: its leaves as they are held.

  Attributes:
    leaves: The leaves of what it returned.
    forms: How each is held; None for what is no float32, or static.
    tree: Their structure.
    inside: Values that static parts of it hold, see `escapes.filled`, and how each is held.
  """

  leaves: Sequence[Any]
  forms: Forms
  tree: Any
  inside: Sequence[tuple[escapes.Escaped, Form | None]] = ()

  def cast(self, dtypes: Any) -> Any:
    """The pytree that the function returned, its float32 leaves in the given dtypes.

    Args:
      dtypes: One dtype, or a tuple of dtypes for the entries of a tuple that was returned, of
        which the first is that of what objects hold, too.

    Raises:
      TypeError: An object holds an array of the call and cannot be copied.
    """
    if not isinstance(dtypes, tuple):
      wanted = [dtypes] * len(self.leaves)
    else:
      entries = self.tree.children()
      wanted = [
        dtype for dtype, entry in zip(dtypes, entries, strict=True) for _ in range(entry.num_leaves)
      ]
    leaves = [
      x if form is None else to_dtype(x, dtype)
      for x, form, dtype in zip(self.leaves, self.forms, wanted, strict=True)
    ]
    first = dtypes[0] if isinstance(dtypes, tuple) else dtypes
    inside = [
      escaped if form is None else escaped._replace(array=to_dtype(escaped.array, first))
      for escaped, form in self.inside
    ]
    leaves, tree = escapes.filled(leaves, self.tree, inside)
    return jax.tree.unflatten(tree, leaves)


class Call:
  """A call of a function, its arrays apart from what is static.

  Attributes:
    operands: The arrays.
    stored: Those of them that are parameters in 16 bits, as they are stored, by index.
    forms: How each is held.
    own: Which of them a model holds, and which floats among them are its state, by index.
    parameters: Which of them are parameters that have a gradient, by index.
  """

  def __init__(
    self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], flags: Flags
  ) -> None:
    self.fn = fn
    self.leaves, self.tree = jax.tree.flatten((tuple(args), kwargs))
    names = sorted(kwargs)
    given = [*flags[0], *(flags[1][name] for name in names)]
    values = [*args, *(kwargs[name] for name in names)]
    spread = spread_flags(given, values)
    entries = [(x, f) for x, f in zip(self.leaves, spread, strict=True) if is_traced(x)]
    pairs = [_enter(jnp.asarray(x), flag is True) for x, flag in entries]
    self._parameters = [*_parameter_trees(given, values)]
    held = tuple(n for n, (_, flag) in enumerate(entries) if flag)
    self.own = Own(held, tuple(n for n in held if _is_state(*entries[n])))
    self.operands = [x for x, _ in pairs]
    self.stored = {
      n: x
      for n, ((x, _), own) in enumerate(zip(entries, pairs, strict=True))
      if x.dtype != own[0].dtype
    }
    marked = (n for n, (_, flag) in enumerate(entries) if flag is True)
    self.parameters = tuple(n for n in marked if is_of(self.operands[n], np.inexact))
    self.forms: Forms = tuple(form for _, form in pairs)
    self.out_tree: Any = None
    self.out_leaves: list[Any] = []
    self.hidden: list[escapes.Escaped] = []

  def flat(self, *arrays: Any) -> list[Any]:
    """The function from arrays to arrays; what else it takes and returns is kept here.

    Traced values in objects that it returns come last: see `escapes.hidden`.
    """
    rest = iter(arrays)
    leaves = [next(rest) if is_traced(x) else x for x in self.leaves]
    args, kwargs = jax.tree.unflatten(self.tree, leaves)
    out, self.out_tree = jax.tree.flatten(self.fn(*args, **kwargs))
    self.out_leaves = [None if is_traced(x) else x for x in out]
    self.hidden = escapes.hidden(self.out_leaves, self.out_tree)
    return [*filter(is_traced, out), *(escaped.tracer for escaped in self.hidden)]

  def flat_and_named(self) -> Callable[..., list[Any]]:
    """`flat` for a trace, whose errors name the user's function and its line by it."""

    def flat(*arrays: Any) -> list[Any]:
      return self.flat(*arrays)

    flat.__name__ = getattr(self.fn, "__name__", type(self.fn).__name__)
    flat.__dict__ |= {"__wrapped__": self.fn, "__signature__": _OF_ARRAYS}
    return flat

  def given_back(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Which results are a tree of parameters again: as a state is that a function updates.

    Args:
      shapes: The shapes of the results, once `flat` has run.
    """
    rest = iter(enumerate(shapes))
    leaves = [next(rest) if x is None else (-1, None) for x in self.out_leaves]
    found: list[int] = []

    def visit(tree: Any, at: int) -> None:
      entries = leaves[at : at + tree.num_leaves]
      alike = [own for own, known in self._parameters if known == tree]
      if any([*map(np.shape, own)] == [shape for _, shape in entries] for own in alike):
        found.extend(n for n, _ in entries)
        return
      for child in tree.children():
        visit(child, at)
        at += child.num_leaves

    visit(self.out_tree, 0)
    return tuple(found)

  def result(self, arrays: Sequence[Any], forms: Forms) -> Result:
    """Put static results back between the arrays, and arrays into objects."""
    rest = iter(zip(arrays, forms, strict=True))
    pairs = [next(rest) if x is None else (x, None) for x in self.out_leaves]
    leaves, held = [x for x, _ in pairs], tuple(form for _, form in pairs)
    inside = [
      (escaped, None) if escaped.array is not None else (escaped._replace(array=x), form)
      for escaped, (x, form) in zip(self.hidden, rest, strict=True)
    ]
    return Result(leaves, held, self.out_tree, inside)


_OF_ARRAYS = inspect.Signature([inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)])


def spread_flags(flag: Flag, value: Any) -> list[bool | str]:
  """One flag for each leaf of a value; a sequence of flags goes with a sequence of values."""
  if isinstance(flag, bool | str):
    return [flag] * len(jax.tree.leaves(value))
  return [
    leaf for part, entry in zip(flag, value, strict=True) for leaf in spread_flags(part, entry)
  ]


def _parameter_trees(flags: Sequence[Flag], values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
  """The leaves and the structure of each tree of parameters among arguments."""
  for flag, value in zip(flags, values, strict=True):
    if flag is True:
      yield jax.tree.flatten(value)
    elif not isinstance(flag, bool | str):
      yield from _parameter_trees(flag, value)


def is_traced(x: Any) -> bool:
  """Whether a leaf is traced; flags, Python numbers, strings and arrays of objects are static."""
  numeric = isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm"
  return numeric or isinstance(x, jax.Array | np.floating)


def _is_state(x: Any, flag: bool | str) -> bool:
  """Whether a leaf is a model's state, as far as that is of floats: not its random keys."""
  return flag == STATE and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _enter(x: Any, param: bool) -> tuple[Any, Form | None]:
  """An operand of the trace and its form; 16-bit parameters enter as float32, to be cast at use."""
  if param and x.dtype.itemsize == 2 and jnp.issubdtype(x.dtype, np.floating):
    return lax.convert_element_type(x, FLOAT32), PARAM
  if x.dtype != FLOAT32:
    return x, None
  return x, PARAM if param else DATA
