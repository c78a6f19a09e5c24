"""Exponent histograms of pytrees: exact, additive, and computed under ``jit``.

A bin holds the values with ``2**k < |x| <= 2**(k + 1)``. The edges are powers of two and belong to
the bin below, so that the rounding of a format to zero falls on an edge: everything up to and with
half its smallest subnormal becomes zero (ties go to even).
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.sharding import PartitionSpec, auto_axes, use_abstract_mesh

from mpjax._core.dtypes import FLOAT32, is_of
from mpjax._core.tree_paths import leaf_paths
from mpjax._engine.program.jaxprs import is_sharded_explicitly
from mpjax.inspect._report import Table

LOWEST = -150
"""The exponent ``k`` of the first bin, which holds float32's smallest subnormal, 2**-149."""
FINITE = 278
"""The number of bins of finite values; the last one ends at 2**128."""
ZERO, INF, NAN = FINITE, FINITE + 1, FINITE + 2
_BINS = FINITE + 3
_SHOWN = 20


@dataclass(frozen=True, repr=False)
class Histogram:
  """How many values of each leaf of a tree lie in each power of two; ``+`` adds two.

  A pytree: it goes through ``jit`` and ``scan``, into train states and checkpoints. Counts are
  exact up to 2**64. It shows as one line; ``str`` and notebooks have a row for each leaf.

  Attributes:
    counts: u32[2, leaves, 281], high and low word of each count: 278 bins of
      ``2**k < |x| <= 2**(k + 1)`` from ``k = -150`` on, then zeros, infinities and NaN.
    largest: f32[leaves], the largest finite magnitude.
    names: The paths of the leaves.

  Example:
    >>> h = histogram({"w": jnp.array([0.75, 1.0, 3.0, 0.0])})
    >>> h.names, h.bins()[0, -LOWEST - 1 : -LOWEST + 2].tolist(), h.largest.tolist()
    (('w',), [2, 0, 1], [3.0])
    >>> h
    Histogram(1 leaf, 4 values: 1 zero, others above 2^-1, up to 3)
    >>> print(h)
    leaf  values  zeros  above  largest  inf  NaN
    w          4      1   2^-1        3    0    0
  """

  counts: jax.Array
  largest: jax.Array
  names: tuple[str, ...] = field(metadata={"static": True})

  def __add__(self, other: Histogram) -> Histogram:
    if not isinstance(other, Histogram):
      return NotImplemented
    if self.names != other.names:
      only = sorted(set(self.names) ^ set(other.names)) or list(self.names)
      raise ValueError(
        "Histograms are added leaf by leaf, so their leaves must be the same. Got "
        f"{len(self.names)} and {len(other.names)} leaves; not alike: {', '.join(only[:5])}. Take "
        "both of trees of one structure."
      )
    counts = add_counts(self.counts, other.counts)
    return Histogram(counts, jnp.maximum(self.largest, other.largest), self.names)

  def bins(self) -> np.ndarray:
    """The counts as u64[leaves, 281]."""
    high, low = np.asarray(self.counts).astype(np.uint64)
    return (high << np.uint64(32)) + low

  def __repr__(self) -> str:
    leaves = f"{len(self.names)} leaf" if len(self.names) == 1 else f"{len(self.names)} leaves"
    if not self._can_be_read():
      shape = getattr(self.counts, "shape", None)
      held = "not here" if shape is None else f"u32[{','.join(map(str, shape))}]"
      return f"Histogram({leaves}, counts {held})"
    bins = self.bins().sum(0)
    special = ((ZERO, "zero" if bins[ZERO] == 1 else "zeros"), (INF, "inf"), (NAN, "NaN"))
    said = [f"{bins[place]} {name}" for place, name in special if bins[place]]
    if bins[:FINITE].any():
      largest = np.max(np.asarray(self.largest))
      said.append(f"{'others ' * bool(said)}above {_lowest(bins)}, up to {largest:.3g}")
    values = f"{bins.sum()} values" + ": " * bool(said) + ", ".join(said)
    return f"Histogram({leaves}, {values})"

  def __str__(self) -> str:
    return str(self._table()) if self._can_be_read() else repr(self)

  def _repr_html_(self) -> str:
    return self._table().to_html() if self._can_be_read() else f"<p>{html.escape(repr(self))}</p>"

  def _can_be_read(self) -> bool:
    """Not in a trace, among stacked ones, donated, with another process or shapes alone."""
    counts = self.counts
    return (
      isinstance(counts, np.ndarray | jax.Array)
      and not isinstance(counts, core.Tracer)
      and counts.ndim == 3
      and (isinstance(counts, np.ndarray) or _is_here(counts))
    )

  def _table(self) -> Table:
    header = ["leaf", "values", "zeros", "above", "largest", "inf", "NaN"]
    rows = [
      [name, *map(str, (bins.sum(), bins[ZERO], _lowest(bins), f"{largest:.3g}", *bins[INF:]))]
      for name, bins, largest in zip(self.names, self.bins(), np.asarray(self.largest), strict=True)
    ]
    more = len(rows) - _SHOWN
    return Table(header, rows[:_SHOWN], notes=[f"and {more} more leaves"] if more > 0 else ())


def _lowest(bins: np.ndarray) -> str:
  """What the smallest finite magnitude lies above, as a power of two."""
  found = np.flatnonzero(bins[:FINITE])
  return f"2^{found[0] + LOWEST}" if found.size else ""


def _is_here(counts: jax.Array) -> bool:
  return counts.is_fully_addressable and not counts.is_deleted()


jax.tree_util.register_dataclass(
  Histogram, data_fields=["counts", "largest"], meta_fields=["names"]
)


def histogram(tree: Any) -> Histogram:
  """The exponent histogram of every float leaf of a tree.

  Floats of every format count, as float32 would hold them; what is no real float is left out.
  Add the histograms of several steps: ``total = total + mpjax.inspect.histogram(grads)``. Under
  ``shard_map`` every device counts its own shard.

  Args:
    tree: Any pytree of arrays.

  Returns:
    The histogram, its leaves in the order of the tree.

  Raises:
    ValueError: If a leaf has 2**32 values or more.

  Example:
    >>> counted = histogram({"w": jnp.array([1.0, 0.0, jnp.inf]), "step": jnp.arange(3)})
    >>> counted.names, counted.bins()[0, [ZERO, INF, NAN]].tolist(), float(counted.largest[0])
    (('w',), [1, 1, 0], 1.0)
  """
  leaves = [(path, leaf) for path, leaf in leaf_paths(tree) if is_of(leaf, jnp.floating)]
  for path, leaf in leaves:
    if leaf.size >= 2**32:
      raise ValueError(
        f"A leaf must have fewer than 2**32 values to be counted in one step. Got {leaf.size} in "
        f"{path!r}. Split the array, or count a part of it."
      )
  tallies = [tally(leaf) for _, leaf in leaves]
  names = tuple(path for path, _ in leaves)
  return stack(tallies, names)


Tally = tuple[jax.Array, jax.Array]
"""The counts of one array, u32[2, 281], and its largest finite magnitude, f32[]."""


def tally(x: jax.Array) -> Tally:
  """Counts one array."""
  aval = jax.typeof(x)
  if not is_sharded_explicitly(aval):
    return _tally(x)
  # A scatter there must be told where its result lies.
  with use_abstract_mesh(aval.sharding.mesh):
    counted: Any = auto_axes(_tally, out_sharding=PartitionSpec())
    return counted(x)


@partial(jax.jit, inline=True)  # outside of a `jit` one program, not fifteen
def _tally(x: jax.Array) -> Tally:
  x = jnp.asarray(x).astype(FLOAT32)
  finite = jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)
  counted = _count(_bin_of(x).ravel())
  counts = jnp.stack([jnp.zeros_like(counted), counted])
  return counts, jnp.max(finite, initial=0.0)


def zero_tally() -> Tally:
  """The tally of nothing."""
  return jnp.zeros((2, _BINS), jnp.uint32), jnp.zeros((), FLOAT32)


def add_tallies(a: Tally, b: Tally) -> Tally:
  """The tally of two arrays together."""
  return add_counts(a[0], b[0]), jnp.maximum(a[1], b[1])


def stack(tallies: list[Tally], names: tuple[str, ...]) -> Histogram:
  """A histogram with one leaf for each tally."""
  if not tallies:
    return Histogram(jnp.zeros((2, 0, _BINS), jnp.uint32), jnp.zeros((0,), FLOAT32), ())
  counts = jnp.stack([counts for counts, _ in tallies], axis=1)
  return Histogram(counts, jnp.stack([largest for _, largest in tallies]), names)


@partial(jax.jit, inline=True)
def add_counts(a: jax.Array, b: jax.Array) -> jax.Array:
  """The sum of 64-bit counts held as u32[2, ...], high word and low word.

  A float32 counter stalls at 2**24 and an int32 counter overflows at 2**31, which a leaf of a
  hundred million parameters reaches in 22 steps.

  Example:
    >>> full = jnp.array([0, 2**32 - 1], jnp.uint32)
    >>> add_counts(full, jnp.array([0, 1], jnp.uint32)).tolist()
    [1, 0]
  """
  low = a[1] + b[1]
  carry = (low < a[1]).astype(jnp.uint32)
  return jnp.stack([a[0] + b[0] + carry, low])


def _bin_of(x: jax.Array) -> jax.Array:
  """The bin of each value, from its bits, so that no backend flushes subnormals."""
  bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
  below = bits - jnp.uint32(1)
  exponent = (below >> 23).astype(jnp.int32)
  subnormal = 32 - lax.clz(below).astype(jnp.int32)
  found = jnp.where(exponent > 0, exponent - 127 - LOWEST, subnormal)
  found = jnp.where(bits == 0, ZERO, found)
  infinite = jnp.uint32(0x7F800000)
  return jnp.where(bits < infinite, found, jnp.where(bits == infinite, INF, NAN))


def _count(found: jax.Array) -> jax.Array:
  """How often each bin was found: u32[281].

  CPUs are fast at scattering and slow at 281 comparisons a value; GPUs and TPUs the other way
  round.
  """
  return lax.platform_dependent(found, cpu=_scattered, default=_compared)


def _scattered(found: jax.Array) -> jax.Array:
  nothing = jnp.zeros(_BINS, jnp.uint32)
  return nothing.at[found].add(jnp.uint32(1), mode="promise_in_bounds")


def _compared(found: jax.Array) -> jax.Array:
  hits = found[None, :] == jnp.arange(_BINS, dtype=found.dtype)[:, None]
  return jnp.sum(hits, axis=1, dtype=jnp.uint32)
