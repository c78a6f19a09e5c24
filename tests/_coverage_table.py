"""The table of the coverage matrix: what stands where, and how exact it is."""

from collections.abc import Iterable

RECORD = "coverage cell"


def table(cells: Iterable[tuple[str, str, str, str, float]]) -> str:
  """One line a construct, one column an operation and transform; "-" where plain JAX has no cell.

  Args:
    cells: Construct, operation, transform, policy, and the largest error relative to float64, in
      units of the policy's 16-bit format.
  """
  errors: dict[str, dict[str, dict[str, float]]] = {}
  for construct, op, transform, policy, error in sorted(cells):
    errors.setdefault(construct, {}).setdefault(f"{op}, {transform}", {})[policy] = error
  columns = list(dict.fromkeys(column for row in errors.values() for column in row))
  lines = [("construct", *columns), ("---",) * (len(columns) + 1)]
  lines += [(name, *(_cell(row.get(column)) for column in columns)) for name, row in errors.items()]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(errors: dict[str, float] | None) -> str:
  return " / ".join(f"{error:.1f}" for error in errors.values()) if errors else "-"
