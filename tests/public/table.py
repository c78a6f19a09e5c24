"""The table that a run of the marked group ends with."""

from collections.abc import Iterable
from typing import NamedTuple

from public.model import Public

RECORD = "public model"
"""The name under which a test records its row."""


POLICIES = ("mixed_bfloat16", "mixed_float16")
ERRORS = ("outputs", "gradients")


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
  """One line a model, as Markdown; errors of the model's own `dtype=` stand behind a slash."""
  head = ("model (package)", "narrow matmuls", *(f"{p}: {e}" for p in POLICIES for e in ERRORS))
  models: dict[str, dict[str, Row]] = {}
  for row in (Row(*values) for values in rows):
    models.setdefault(f"{row.model} ({row.package})", {})[row.policy] = row
  lines = [head, ("---",) * len(head), *(_cells(name, models[name]) for name in models)]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(name: str, rows: dict[str, Row]) -> tuple[str, ...]:
  narrow = dict.fromkeys(f"{row.narrow} of {row.matmuls}" for row in rows.values())
  errors = (cell for policy in POLICIES for cell in _errors(rows.get(policy)))
  return name, ", ".join(narrow), *errors


def _errors(row: Row | None) -> tuple[str, str]:
  if row is None:
    return "-", "-"
  pairs = (row.output, row.output_by_hand), (row.gradient, row.gradient_by_hand)
  output, gradient = (" / ".join(f"{e:.1e}" for e in pair if e is not None) for pair in pairs)
  return output, gradient
