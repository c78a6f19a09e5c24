"""Where the arrays of a train step are, and that they stay there."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from mpjax._core.dtypes import is_key
from mpjax._core.tree_paths import PyTree


class Placement(NamedTuple):
  """What a step must know of its arguments' devices when it is traced; hashable.

  Attributes:
    shardings: The sharding of each leaf of the state, ``None`` where there is none to keep.
  """

  shardings: tuple[NamedSharding | None, ...] = ()


NOWHERE = Placement()
"""That of a state on one device."""


def placement(state: Sequence[Any]) -> Placement:
  """Reads where the leaves of a step's state are.

  A tracer says nothing of it, so where the results of a step inside another ``jax.jit`` are is left
  to that.
  """
  if all(map(_is_concrete, {*map(type, state)})):  # looked at in every step: most are on one device
    kinds = {*map(type, map(_sharding_of, state))}
    if not any(issubclass(kind, NamedSharding) for kind in kinds):
      return NOWHERE
  shardings = tuple(map(_kept_sharding, state))
  return Placement(shardings if any(shardings) else ())


def keep_placement(tree: PyTree, shardings: tuple[NamedSharding | None, ...]) -> PyTree:
  """Holds the leaves of a tree to the shardings of the one that it takes the place of.

  A compiler that may choose shards what was replicated if the gradient is sharded; the next step
  would then be compiled again, for other shardings, and buffers could not be donated.
  """
  if not shardings:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  pairs = zip(leaves, shardings, strict=True)
  return structure.unflatten(
    [x if s is None else lax.with_sharding_constraint(x, s) for x, s in pairs]
  )


def place_beside(tree: PyTree, params: PyTree) -> PyTree:
  """Replicates over the mesh of the parameters what is not on all of its devices yet."""
  leaves = jax.tree.leaves(params)
  meshes = [s.mesh for s in map(_named_sharding, leaves) if s is not None and s.num_devices > 1]
  if not meshes:
    return tree
  everywhere = NamedSharding(meshes[0], PartitionSpec())

  def place(leaf: Any) -> Any:
    known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if not known or leaf.sharding.device_set == everywhere.device_set:
      return leaf
    if not is_key(leaf):
      return jax.device_put(leaf, everywhere)
    numbers = jax.device_put(jax.random.key_data(leaf), everywhere)  # other processes take no keys
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))

  return jax.tree.map(place, tree)


def strays(leaves: Sequence[Any]) -> list[int]:
  """Which arrays lie on one device, where nobody put them, while others lie on a mesh.

  As the counts of an optimizer. A step hands them back on the mesh: it would be compiled again.
  """
  named = [_named_sharding(leaf) for leaf in leaves]
  if not any(s is not None and s.num_devices > 1 for s in named):
    return []
  return [n for n, x in enumerate(leaves) if is_on_one_device(x) and not x.committed]


def is_on_one_device(x: Any) -> bool:
  """Whether an array lies on a single device; a tracer does not say."""
  return _is_concrete(type(x)) and isinstance(x.sharding, SingleDeviceSharding)


_sharding_of = operator.attrgetter("sharding")


@functools.cache
def _is_concrete(kind: type) -> bool:
  """Whether what has a type is an array that says where it is."""
  return issubclass(kind, jax.Array) and not issubclass(kind, jax.core.Tracer)


def _named_sharding(leaf: Any) -> NamedSharding | None:
  if isinstance(leaf, jax.core.Tracer):
    return None
  sharding = getattr(leaf, "sharding", None)
  return sharding if isinstance(sharding, NamedSharding) else None


def _kept_sharding(leaf: Any) -> NamedSharding | None:
  """The sharding of a leaf on several devices; on an Explicit mesh it is part of the type."""
  sharding = _named_sharding(leaf)
  if sharding is None or sharding.num_devices == 1:
    return None
  if AxisType.Explicit in sharding.mesh.axis_types:
    return None
  spec = tuple(sharding.spec)
  while spec and spec[-1] is None:  # JAX hands (a, None) back as (a,), and compares them
    spec = spec[:-1]
  if len(spec) == len(sharding.spec):
    return sharding
  kind = sharding.memory_kind
  return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=kind)
