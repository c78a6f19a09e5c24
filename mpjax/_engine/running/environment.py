"""The values of a jaxpr's variables while a plan is executed, and their other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh, reshard, use_abstract_mesh

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.planning.plan import Often, Read
from mpjax._engine.program import jaxprs
from mpjax._engine.program.versions import Atom, Literal, Var
from mpjax._engine.running.attached_derivatives import rounded_from
from mpjax._engine.running.kept_rounding import rounded

T = TypeVar("T")


class Key(NamedTuple):
  """A variable as some of its readers share it: after leaving its module, and widened."""

  var: Var
  via: np.dtype | None = None
  wide: bool = False


def shared(var: Var, read: Read) -> Key:
  """What a read shares with others: all but a cast to 16 bits, which each makes anew."""
  return Key(var, read.via, read.to == FLOAT32)


def without_last_cast(key: Key) -> Key:
  """What a shared value is cast from."""
  return key._replace(wide=False) if key.wide else Key(key.var)


def nearest(key: Key, known: Container[Key]) -> Key:
  """A shared value if it is known, or else what it is cast from: at last the variable itself."""
  while key not in known and key != Key(key.var):
    key = without_last_cast(key)
  return key


class Environment:
  """The values of a jaxpr's variables, and their other dtypes that several equations share.

  Shared is what a value became by leaving its module, and a narrow value that was widened: its
  cotangents meet in float32 and round once. A cast to 16 bits at a use is never shared, so that
  the gradient of a weight that is used many times sums up in float32. A 16-bit value that many
  read is held in float32, too, which changes no number: there its cotangents meet.

  Args:
    number: What becomes of a number of the trace.
    often: The 16-bit values that many read, and their formats.
    kept: Those whose rounding must not be left out, see `kept_rounding`.
  """

  def __init__(
    self,
    number: Callable[[Any], Any],
    often: Mapping[Often, np.dtype] = MappingProxyType({}),
    kept: Collection[Var] = (),
  ) -> None:
    self._known: dict[Key, Any] = {}
    self._number, self._often, self._kept = number, often, kept
    self._rounded: dict[Often, Any] = {}

  def write(self, variables: Sequence[Var], values: Sequence[jax.Array]) -> None:
    """Define variables, each in the dtype that it is held in."""
    if self._kept:
      pairs = zip(variables, values, strict=True)
      values = [rounded(x) if var in self._kept else x for var, x in pairs]
    self.fill(map(Key, variables), values)

  def fill(self, keys: Iterable[Key], values: Iterable[Any]) -> None:
    """Put values in their places."""
    for key, value in zip(keys, values, strict=True):
      if key[:2] in self._often:
        self._known[Key(*key[:2])] = to_dtype(value, FLOAT32)
        if value.dtype == self._often[key[:2]]:
          self._rounded[key[:2]] = value
      else:
        self._known[key] = value

  def __contains__(self, var: Var) -> bool:
    return Key(var) in self._known

  def get(self, key: Key) -> Any:
    """A value as some equations share it."""
    if key[:2] in self._often:
      return self._held(key[:2]) if key.wide else self._read_often(key[:2])
    if key in self._known or key == Key(key.var):
      return self._known[key]
    dtype: Any = FLOAT32 if key.wide else key.via
    self._known[key] = to_dtype(self.get(without_last_cast(key)), dtype)
    return self._known[key]

  def _held(self, often: Often) -> Any:
    """A 16-bit value that many read, in float32."""
    key = Key(*often)
    if key not in self._known:  # it leaves its module here
      rounded = to_dtype(self.get(Key(key.var)), self._often[often])
      self._known[key] = to_dtype(rounded, FLOAT32)
    return self._known[key]

  def _read_often(self, often: Often) -> Any:
    """Such a value for one of those that read it in 16 bits, who all may store the same array."""
    held = self._held(often)
    if often not in self._rounded:
      self._rounded[often] = to_dtype(held, self._often[often])
    return rounded_from(self._rounded[often], held)

  def read(self, atom: Atom, read: Read, *, compared: bool = False) -> Any:
    """An operand in the dtype that an equation wants.

    Args:
      atom: The operand.
      read: How it is read.
      compared: Whether the equation makes no float: then a number is what it is.
    """
    if isinstance(atom, Literal):
      return atom.val if compared and read.to in (None, FLOAT32) else self._literal(atom, read.to)
    value = self.get(shared(atom, read))
    return value if read.to is None else to_dtype(value, read.to)

  def _literal(self, atom: Literal, dtype: np.dtype | None) -> Any:
    if not jaxprs.is_float32(atom):
      return atom.val
    value = self._number(atom.val)
    return value if dtype is None else np.asarray(value).astype(dtype)[()]


def to_dtype(x: Any, dtype: np.dtype) -> Any:
  """An array in another dtype, itself if it has it already.

  It is cast on the mesh that its type names: one that goes into `jax.sharding.auto_axes` still has
  explicit axes where the equation that reads it has none.
  """
  if x.dtype == dtype:
    return x
  mesh = _mesh_elsewhere(x)
  if mesh is None:
    return lax.convert_element_type(x, dtype)
  with use_abstract_mesh(mesh):
    return lax.convert_element_type(x, dtype)


def brought_here(compute: Callable[..., T], *values: Any) -> T:
  """What a function makes of values, on the current mesh, although their types may name another.

  Args:
    compute: Makes a pytree of small arrays, which then lie whole on each device.
    *values: Arrays of one mesh.
  """
  mesh = _mesh_elsewhere(values[0])
  if mesh is None:
    return compute(*values)
  with use_abstract_mesh(mesh):
    found = compute(*values)
  return jax.tree.map(lambda x: reshard(x, PartitionSpec()), found)


def _mesh_elsewhere(x: Any) -> Any:
  """The mesh that the type of a value names, if it is not the current one."""
  current = get_abstract_mesh()
  if current.empty:
    return None
  mesh = jax.typeof(x).sharding.mesh
  return None if mesh.empty or mesh == current else mesh
