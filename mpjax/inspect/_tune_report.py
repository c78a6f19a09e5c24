"""What `tune` returns: the policy map that it chose, and what it tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mpjax._core.policy_map import PolicyMap
from mpjax.inspect._report import Report, Table


class Trial(NamedTuple):
  """One policy map that was tried.

  Attributes:
    tried: What was tried, in words.
    loss_error: The loss, relative to that in float32.
    gradient_error: The largest error of a parameter's gradient, relative to its norm; norms below
      a thousandth of the largest one count as that.
    worst: The parameter that it belongs to.
    float32_flops: The FLOPs of matmuls and convolutions of the forward pass in float32.
    bytes_moved: The bytes that loss and gradients read and write, as the compiler's cost analysis
      states them for the lowered program: before operations are fused, the body of a loop once;
      None if it states none.
    policy_map: The policy map.
    within: Whether both errors are within the tolerance.
    best: Whether no cheaper map has errors as small: the frontier of cost against error.
  """

  tried: str
  loss_error: float
  gradient_error: float
  worst: str
  float32_flops: float
  bytes_moved: float | None
  policy_map: PolicyMap
  within: bool
  best: bool = False

  @property
  def error(self) -> float:
    """The larger of both errors."""
    return max(self.loss_error, self.gradient_error)

  @property
  def rank(self) -> tuple[float, ...]:
    """The smaller the better: FLOPs in float32, then bytes moved, number of rules, error."""
    return self.float32_flops, self.bytes_moved or 0.0, len(self.policy_map.rules), self.error


class Sensitivity(NamedTuple):
  """What one module, or several beneath one path, does to the loss alone in low precision.

  Attributes:
    module: The path.
    policy: The candidate that it ran under, everything else in float32.
    loss_error: See `Trial`.
    gradient_error: See `Trial`.
    within: Whether both are within the tolerance.
  """

  module: str
  policy: str
  loss_error: float
  gradient_error: float
  within: bool


@dataclass(frozen=True, repr=False)
class TuneReport(Report):
  """The cheapest policy map that was found, and how.

  Attributes:
    policy_map: The policy map.
    text: The same as Python to paste.
    modules: The modules that do not run under the default, with their policies.
    rows: The maps that were tried, the cheapest first; of equal ones that with fewer rules.
    sensitivity: What each module does alone.
    tolerance: The largest error allowed.
    flops: The FLOPs of all matmuls and convolutions of the forward pass.
    compilations: How often loss and gradient were compiled here.
    note: What to know before pasting.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> def loss_fn(params, x):
    ...   with jax.named_scope("dense"):
    ...     return jnp.mean((x @ params["w"]) ** 2)
    >>> report = mpjax.inspect.tune(loss_fn, ({"w": jnp.ones((4, 2))}, jnp.ones((2, 4))))
    >>> report.policy_map.rules, report.chosen.tried
    ((), 'all in mixed_bfloat16')
    >>> [row.tried for row in report.rows]
    ['all in mixed_bfloat16', 'all in float32']
  """

  policy_map: PolicyMap
  text: str
  modules: tuple[tuple[str, str], ...]
  rows: tuple[Trial, ...]
  sensitivity: tuple[Sensitivity, ...]
  tolerance: float
  flops: float
  compilations: int
  note: str = ""

  @property
  def chosen(self) -> Trial:
    """The row of the map that was chosen."""
    return next(row for row in self.rows if row.within)

  @property
  def summary(self) -> str:
    """What is in float32 now, what that costs, and the map to paste."""
    share = self.chosen.float32_flops / self.flops if self.flops else 0.0
    named = ", ".join(f"{module} in {policy}" for module, policy in self.modules) or "nothing"
    return (
      f"Apart from the default: {named}. {share:.1%} of the FLOPs are in float32; loss error "
      f"{self.chosen.loss_error:.2g}, gradient error {self.chosen.gradient_error:.2g} (tolerance "
      f"{self.tolerance:g}; {self.compilations} compilations).\n{self.text}"
      + (f"\n{self.note}" if self.note else "")
    )

  @property
  def code(self) -> str:
    """The map as Python to paste."""
    return self.text

  def tables(self) -> list[Table]:
    """What was tried, and what each module does alone."""
    return [self._tried(), self._alone()] if self.sensitivity else [self._tried()]

  def _tried(self) -> Table:
    header = ["tried", "float32 GFLOP", "moved MiB", "loss error", "gradient error", "within"]
    rows = [
      [
        row.tried,
        f"{row.float32_flops / 1e9:.4g}",
        "-" if row.bytes_moved is None else f"{row.bytes_moved / 2**20:.4g}",
        f"{row.loss_error:.2g}",
        f"{row.gradient_error:.2g}" + (f" ({row.worst})" if row.worst else ""),
        _yes(row.within) + " *" * row.best,
      ]
      for row in self.rows
    ]
    notes = [
      "float32: FLOPs of the forward pass, as planned; *: no cheaper one has less error.",
      "moved: what loss and gradients read and write, by XLA's cost analysis of the lowered "
      "program: before fusion, the body of a loop once.",
    ]
    return Table(header, rows, notes=notes)

  def _alone(self) -> Table:
    header = ["alone in low precision", "policy", "loss error", "gradient error", "within"]
    rows = [
      [s.module, s.policy, f"{s.loss_error:.2g}", f"{s.gradient_error:.2g}", _yes(s.within)]
      for s in self.sensitivity
    ]
    return Table(header, rows, "<<>")


def _yes(true: bool) -> str:
  return "yes" if true else "no"
