"""What a format keeps of a histogram, the loss scales that fit, and what updates would be lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mpjax._core.arguments import power_of_two
from mpjax._core.formats import Format, read_format
from mpjax.inspect._histogram import FINITE, INF, LOWEST, NAN, ZERO, Histogram
from mpjax.inspect._report import Report, Table
from mpjax.inspect._statistics import FORMATS, Statistics, stall_counts

_HEADROOM = 4
_CEILING = 24  # of `mpjax.dynamic_loss_scaling`, by default
_TOTAL = "(all)"


class RangeRow(NamedTuple):
  """What a format keeps of one leaf.

  Attributes:
    name: The leaf's path.
    values: How many values were counted, zeros and what is not finite included.
    zeros: The share that is zero already.
    underflow: The share of the finite values other than zero that the format rounds to zero.
    subnormal: The share of them that it keeps with fewer bits.
    overflow: The share that becomes infinite; at most, for what lies between the format's
      largest number and the next power of two counts if the largest value overflows.
    nonfinite: How many values were inf or NaN.
    smallest: A power of two that is at most the smallest magnitude; 0 if there is none.
    largest: The largest finite magnitude.
  """

  name: str
  values: int
  zeros: float
  underflow: float
  subnormal: float
  overflow: float
  nonfinite: int
  smallest: float
  largest: float


@dataclass(frozen=True, repr=False)
class RangeReport(Report):
  """What a format keeps of the values of a histogram at a loss scale.

  Attributes:
    dtype: The format.
    scale: The factor that the values are multiplied by before they are rounded, or "amax".
    rows: One row a leaf, those that lose most first.
    total: All leaves together.
    lowest_scale: The smallest power of two at which at most ``tolerance`` of all values that are
      not zero underflow.
    highest_scale: The largest power of two at which none overflows.
    recommended_scale: A factor of 16 below the highest one, for gradients that will be larger, and
      at most 2^24, the default ceiling of `mpjax.dynamic_loss_scaling`, but not below the lowest
      one; None where no scale fits.
    tolerance: The share that may underflow.
    exponents: ``k`` of each bin of ``density``.
    density: The share of all finite values other than zero with ``2**k < |x| <= 2**(k + 1)``,
      unscaled.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> counted = mpjax.inspect.histogram({"w": jnp.array([1e-8, 1.0])})
    >>> report = mpjax.inspect.range_report(counted, "float16")
    >>> print(report.summary)
    At scale 2^0 float16 rounds 50.00% of the values to zero and overflows on 0.00%. Good scales:
    2^2 to 2^15; recommended: 2^11.
  """

  dtype: str
  scale: float | Literal["amax"]
  rows: tuple[RangeRow, ...]
  total: RangeRow
  lowest_scale: float
  highest_scale: float
  recommended_scale: float | None
  tolerance: float
  exponents: tuple[int, ...]
  density: tuple[float, ...]

  @property
  def exponent(self) -> int:
    """The scale as a power of two; under a scale of each leaf, that of the largest one."""
    return math.frexp(self.highest_scale if self.scale == "amax" else self.scale)[1] - 1

  @property
  def summary(self) -> str:
    """Whether the format holds the values, and at which scales."""
    of_each = "Under the scale of each leaf"
    at = of_each if self.scale == "amax" else f"At scale {_power(self.scale)}"
    kept = (
      f"{at} {self.dtype} rounds {self.total.underflow:.2%} of the values "
      f"to zero and overflows on {self.total.overflow:.2%}."
    )
    if self.scale == "amax":
      return kept
    if self.recommended_scale is None:
      return (
        f"{kept} No scale fits: at {_power(self.highest_scale)}, the highest without overflow, "
        f"more than {self.tolerance:.0%} underflows. Use bfloat16."
      )
    return (
      f"{kept} Good scales: {_power(self.lowest_scale)} to {_power(self.highest_scale)}; "
      f"recommended: {_power(self.recommended_scale)}."
    )

  def tables(self) -> list[Table]:
    """A row a leaf, then all of them."""
    header = ["leaf", "values", "zero", "underflow", "subnormal", "overflow", "inf/nan"]
    rows = [_cells(row) for row in (*self.rows, self.total)]
    notes = [
      "Shares in percent; underflow, subnormal and overflow of the values that are not zero."
    ]
    return [Table([*header, "smallest", "largest"], rows, notes=notes)]


def range_report(
  histogram: Histogram,
  dtype: Any = "float16",
  *,
  scale: float | Literal["amax"] = 1.0,
  tolerance: float = 0.01,
) -> RangeReport:
  """What a format keeps of the values of a histogram, and which loss scales suit them.

  Multiplying a loss by a scale multiplies every gradient by it (Micikevicius et al. 2018, section
  3.2): it moves the histogram, bin by bin, for the scale is a power of two.

  Args:
    histogram: Of gradients, usually: from `histogram`, `record`, or ``statistics(...).gradients``.
    dtype: ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
    scale: The loss scale to look at. ``"amax"`` for a scale of each leaf's own, the power of two
      that brings its ``largest`` magnitude just below the format's: what a float8 matmul does.
    tolerance: The share of the values other than zero that may underflow at a good scale.

  Returns:
    The report.

  Raises:
    TypeError: If ``histogram`` is something else.
    ValueError: If the scale is no power of two and not ``"amax"``, the format not known, or the
      histogram empty.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> grads = {"w": jnp.array([1e-3, 3e-8, 2e-8])}
    >>> report = mpjax.inspect.range_report(mpjax.inspect.histogram(grads))
    >>> round(report.total.underflow, 2), report.lowest_scale, report.recommended_scale
    (0.33, 2.0, 2097152.0)
    >>> weights = mpjax.inspect.histogram({"w": jnp.array([3e-3, 1e-4, 1e-9])})
    >>> report = mpjax.inspect.range_report(weights, "float8_e4m3fn", scale="amax")
    >>> round(report.total.underflow, 2), report.total.overflow
    (0.33, 0.0)
  """
  if not isinstance(histogram, Histogram):
    raise TypeError(
      f"range_report reads a histogram. Got {type(histogram).__name__}. Count one: "
      "mpjax.inspect.histogram(tree), or take that of mpjax.inspect.record or statistics."
    )
  to = read_format(dtype)
  if isinstance(scale, str) and scale != "amax":
    raise ValueError(
      f"scale must be a power of two or 'amax'. Got {scale!r}. Write one of the two."
    )
  if scale != "amax":
    scale = power_of_two("scale", scale)
  if not 0 <= tolerance < 1:
    raise ValueError(f"tolerance must be a share, from 0 to below 1. Got {tolerance!r}. Try 0.01.")
  bins, largest = histogram.bins(), np.asarray(histogram.largest)
  total = bins.sum(axis=0)
  if not total[:FINITE].any():
    raise ValueError(
      "The histogram must hold a finite value other than zero. Got none. Count a step first, in "
      "float32 or bfloat16, where gradients do not vanish."
    )
  entries = zip(histogram.names, bins, largest, strict=True)
  rows = [_row(*entry, to, _shift(float(entry[2]), to, scale)) for entry in entries]
  highest = _highest(float(largest.max()), to)
  everything = _row(
    _TOTAL, total, float(largest.max()), to, _shift(float(largest.max()), to, scale)
  )
  if scale == "amax":
    everything = _averaged(everything, rows, bins)
  lowest = _lowest(total, to, tolerance)
  fits = lowest <= highest
  return RangeReport(
    dtype=to.name,
    scale=scale,
    rows=tuple(sorted(rows, key=lambda row: -(row.underflow + row.overflow))),
    total=everything,
    lowest_scale=2.0**lowest,
    highest_scale=2.0**highest,
    recommended_scale=2.0 ** max(min(highest - _HEADROOM, _CEILING), lowest) if fits else None,
    tolerance=tolerance,
    **_density(total),
  )


def _density(total: np.ndarray) -> dict[str, Any]:
  finite = total[:FINITE]
  (found,) = np.nonzero(finite)
  inside = slice(found[0], found[-1] + 1)
  exponents = tuple(range(LOWEST + int(found[0]), LOWEST + int(found[-1]) + 1))
  return {"exponents": exponents, "density": tuple((finite[inside] / finite.sum()).tolist())}


def underflow_share(finite: np.ndarray, to: Format, shift: int) -> float:
  """The share of finite values other than zero that round to zero, scaled by ``2**shift``."""
  edge = min(max(to.zero - shift - LOWEST, 0), FINITE)
  return float(finite[:edge].sum()) / max(int(finite.sum()), 1)


def _lowest(total: np.ndarray, to: Format, tolerance: float) -> int:
  """The exponent of the smallest scale at which few enough values underflow."""
  shifts = range(-126, 127)
  return next((s for s in shifts if underflow_share(total[:FINITE], to, s) <= tolerance), 126)


def _highest(largest: float, to: Format) -> int:
  """The exponent of the largest scale at which the largest value does not overflow."""
  guess = to.top - (math.frexp(largest)[1] - 1)
  shift = guess - to.overflows(math.ldexp(largest, guess))
  return min(max(shift, -126), 126)


def _shift(largest: float, to: Format, scale: float | Literal["amax"]) -> int:
  """The exponent of the factor that a leaf is multiplied by."""
  if scale == "amax":
    return _highest(largest, to) if largest else 0
  return math.frexp(scale)[1] - 1


def _averaged(total: RangeRow, rows: Sequence[RangeRow], bins: np.ndarray) -> RangeRow:
  """The row of all leaves, its shares from theirs: each has a scale of its own."""
  weights = bins[:, :FINITE].sum(axis=1)

  def mean(shares: list[float]) -> float:
    return float(np.average(shares, weights=weights))

  return total._replace(
    underflow=mean([row.underflow for row in rows]),
    subnormal=mean([row.subnormal for row in rows]),
    overflow=mean([row.overflow for row in rows]),
  )


def _row(name: str, bins: np.ndarray, largest: Any, to: Format, shift: int) -> RangeRow:
  finite = bins[:FINITE]
  count, values = max(int(finite.sum()), 1), int(bins.sum())
  zero = min(max(to.zero - shift - LOWEST, 0), FINITE)
  normal = min(max(to.normal - shift - LOWEST, 0), FINITE)
  # The bin that the format's largest number lies in overflows only if the largest value does.
  over = to.top - shift - LOWEST + (not to.overflows(math.ldexp(float(largest), shift)))
  (found,) = np.nonzero(finite)
  return RangeRow(
    name=name,
    values=values,
    zeros=int(bins[ZERO]) / max(values, 1),
    underflow=int(finite[:zero].sum()) / count,
    subnormal=int(finite[zero:normal].sum()) / count,
    overflow=int(finite[min(max(over, 0), FINITE) :].sum()) / count,
    nonfinite=int(bins[INF]) + int(bins[NAN]),
    smallest=2.0 ** (int(found[0]) + LOWEST) if found.size else 0.0,
    largest=float(largest),
  )


def _cells(row: RangeRow) -> list[str]:
  shares = (row.zeros, row.underflow, row.subnormal, row.overflow)
  ends = (f"{row.smallest:.1e}", f"{row.largest:.1e}")
  percent = [f"{100 * share:.2f}" for share in shares]
  return [row.name or "(root)", str(row.values), *percent, str(row.nonfinite), *ends]


def _power(scale: float) -> str:
  return f"2^{math.frexp(scale)[1] - 1}"


class UpdateRow(NamedTuple):
  """How the updates of one parameter compare with it.

  Attributes:
    name: The parameter's path.
    updates: How many updates were not zero.
    bfloat16: The share of them that a parameter kept in bfloat16 would not notice.
    float16: The share that one kept in float16 would not notice.
    ratio: The median of ``|update / parameter|`` as a power of two; NaN if there is none.
  """

  name: str
  updates: int
  bfloat16: float
  float16: float
  ratio: float


@dataclass(frozen=True, repr=False)
class UpdateReport(Report):
  """Which parameters would stall if they were kept in 16 bits and rounded to the nearest.

  A parameter kept in 16 bits does not change if its update is below half the distance to the next
  number: at most 2^-8 of it in bfloat16 and 2^-11 in float16. `mpjax.stochastic_rounding` moves it
  right on average all the same, `mpjax.master_weights` adds its updates up in float32.

  Attributes:
    steps: The optimizer steps that were counted.
    rows: One row a parameter, the worst first.
    exponents: ``k`` of each bin of ``density``.
    density: The share of the ratios with ``2**k < |update / parameter| <= 2**(k + 1)``.

  Example:
    >>> import jax.numpy as jnp, mpjax, optax
    >>> tx, params = mpjax.inspect.collect_statistics(optax.sgd(1e-3)), {"w": jnp.ones(4)}
    >>> _, opt_state = tx.update(params, tx.init(params), params)
    >>> report = mpjax.inspect.update_report(mpjax.inspect.statistics(opt_state))
    >>> report.rows[0]
    UpdateRow(name='w', updates=4, bfloat16=1.0, float16=0.0, ratio=0.001953125)
  """

  steps: int
  rows: tuple[UpdateRow, ...]
  exponents: tuple[int, ...]
  density: tuple[float, ...]

  @property
  def summary(self) -> str:
    """How many parameters lose most of their updates in each format."""
    counts = [f"{sum(getattr(row, name) > 0.5 for row in self.rows)} in {name}" for name in FORMATS]
    words = (
      f"Of {len(self.rows)} parameters kept in 16 bits, rounded to the nearest, these would lose "
      f"more than half of their updates: {', '.join(counts)} ({self.steps} steps)."
    )
    if any(max(row.bfloat16, row.float16) > 0.5 for row in self.rows):
      words += (
        " To keep them so, wrap the optimizer: mpjax.stochastic_rounding(tx), or "
        "mpjax.master_weights(tx) for 4 bytes a parameter more."
      )
    return words

  def tables(self) -> list[Table]:
    """A row a parameter."""
    header = ["parameter", "updates", "lost in bfloat16", "lost in float16", "median ratio"]
    rows = [
      [
        row.name,
        str(row.updates),
        f"{row.bfloat16:.1%}",
        f"{row.float16:.1%}",
        "-" if math.isnan(row.ratio) else _power(row.ratio),
      ]
      for row in self.rows
    ]
    return [Table(header, rows, notes=["ratio: |update / parameter|, rounded to a power of two."])]


def update_report(collected: Statistics) -> UpdateReport:
  """Which parameters would stall if they were kept in 16 bits, rounded to the nearest.

  Args:
    collected: What `statistics` returns.

  Raises:
    TypeError: If ``collected`` is something else.
    ValueError: If no step has been counted.

  Example:
    >>> import jax.numpy as jnp, mpjax, optax
    >>> tx, params = mpjax.inspect.collect_statistics(optax.sgd(1e-5)), {"w": jnp.ones(4)}
    >>> _, opt_state = tx.update(params, tx.init(params), params)
    >>> print(update_report(mpjax.inspect.statistics(opt_state)).tables()[0])
    parameter  updates  lost in bfloat16  lost in float16  median ratio
    w                4            100.0%           100.0%         2^-16
    <BLANKLINE>
    ratio: |update / parameter|, rounded to a power of two.
  """
  if not isinstance(collected, Statistics):
    raise TypeError(
      f"update_report reads what was collected. Got {type(collected).__name__}. Pass "
      "mpjax.inspect.statistics(opt_state), of an optimizer made with collect_statistics."
    )
  if not int(collected.steps):
    raise ValueError(
      "At least one step must have been counted. Got none. Train a step first; one that the scaler "
      "skips does not count."
    )
  bins, stalls = collected.ratios.bins(), stall_counts(collected)
  entries = zip(collected.ratios.names, bins, stalls, strict=True)
  rows = [_update_row(name, ratios, counts) for name, ratios, counts in entries]
  total = bins.sum(axis=0)
  density = _density(total) if total[:FINITE].any() else {"exponents": (), "density": ()}
  ordered = tuple(sorted(rows, key=lambda row: -(row.bfloat16 + row.float16)))
  return UpdateReport(int(collected.steps), ordered, **density)


def _update_row(name: str, ratios: np.ndarray, stalls: np.ndarray) -> UpdateRow:
  moved, bfloat16, float16 = map(int, stalls)
  finite = ratios[:FINITE]
  middle = int(np.searchsorted(np.cumsum(finite), (int(finite.sum()) + 1) // 2))
  ratio = 2.0 ** (middle + 1 + LOWEST) if finite.any() else math.nan
  return UpdateRow(name, moved, bfloat16 / max(moved, 1), float16 / max(moved, 1), ratio)
