"""The table that a run of the marked group ends with."""

from collections.abc import Iterable
from typing import NamedTuple

from public.model import Public

RECORD = "public model"
"""The name under which a test records its row."""


class Row(NamedTuple):
  """What one policy made of one model; errors are relative to float32."""

  model: str
  package: str
  policy: str
  narrow: int
  matmuls: int
  output: float
  gradient: float
  output_by_hand: float | None
  gradient_by_hand: float | None


def row(model: Public, policy: str, counts: tuple[int, int], *errors: float | None) -> Row:
  """The row of a model and a policy: matmuls in 16 bits and in all, then four errors."""
  return Row(model.name, model.package, policy, *counts, *errors)


def table(rows: Iterable[Iterable[object]]) -> str:
  """The rows as a Markdown table."""
  head = (
    "model (package)",
    "policy",
    "narrow matmuls",
    "output error",
    "gradient error",
    "output, its own `dtype=`",
    "gradient, its own `dtype=`",
  )
  lines = [head, ("---",) * len(head), *(_cells(Row(*values)) for values in rows)]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
  errors = (row.output, row.gradient, row.output_by_hand, row.gradient_by_hand)
  shown = ("-" if error is None else f"{error:.1e}" for error in errors)
  return f"{row.model} ({row.package})", row.policy, f"{row.narrow} of {row.matmuls}", *shown
