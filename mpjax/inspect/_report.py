"""Reports: frozen data that prints as text tables, shows as HTML and exports as plain Python."""

from __future__ import annotations

import dataclasses
import enum
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Table:
  """Cells as they are shown, with their header.

  Attributes:
    header: The names of the columns.
    rows: One sequence of cells a row, as many as the header has.
    align: "<" or ">" for each column; the last one holds for the rest.
    title: What stands above the table, if anything.
    notes: Lines that stand below it.

  Example:
    >>> print(Table(["module", "ops"], [["encoder", "12"], ["head", "3"]]))
    module   ops
    encoder   12
    head       3
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  align: str = "<>"
  title: str = ""
  notes: Sequence[str] = ()

  def __str__(self) -> str:
    return "\n".join([*filter(None, [self.title]), *self._lines(), *self._notes()])

  def to_html(self) -> str:
    """The table as static HTML; every cell is escaped."""
    caption = f'<caption style="{_CAPTION}">{html.escape(self.title)}</caption>' * bool(self.title)
    head = f"<thead>{self._html_row('th', self.header)}</thead>"
    body = "".join(self._html_row("td", row) for row in self.rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
    return f"<table>{caption}{head}<tbody>{body}</tbody></table>{notes}"

  def _sides(self) -> list[str]:
    return list(self.align.ljust(len(self.header), self.align[-1]))[: len(self.header)]

  def _lines(self) -> Iterator[str]:
    rows = [self.header, *self.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
      cells = zip(row, self._sides(), widths, strict=True)
      yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

  def _notes(self) -> list[str]:
    return ["", *self.notes] if self.notes else []

  def _html_row(self, tag: str, row: Sequence[str]) -> str:
    cells = (
      f'<{tag} style="text-align:{_SIDES[side]}">{html.escape(cell)}</{tag}>'
      for cell, side in zip(row, self._sides(), strict=True)
    )
    return f"<tr>{''.join(cells)}</tr>"


_SIDES = {"<": "left", ">": "right"}
_CAPTION = "text-align:left;caption-side:top"


@dataclass(frozen=True, repr=False)
class Report:
  """What every report can do; a subclass is a frozen dataclass that holds nothing but data.

  Subclasses are declared with ``repr=False``, so that they show as tables. They define `summary`,
  `tables`, and, as a field or a property, ``rows``: dataclasses, named tuples or mappings.

  Example:
    >>> @dataclass(frozen=True, repr=False)
    ... class Words(Report):
    ...   rows: tuple[dict, ...]
    ...   summary = "Words by length."
    ...   def tables(self):
    ...     return [Table(["word", "letters"], [[r["word"], str(r["n"])] for r in self.rows])]
    >>> Words(({"word": "bits", "n": 4},))
    Words by length.
    <BLANKLINE>
    word  letters
    bits        4
  """

  @property
  def summary(self) -> str:
    """The verdict, in a line."""
    raise NotImplementedError

  @property
  def code(self) -> str:
    """The part of the summary that is Python to paste; empty if none is."""
    return ""

  def tables(self) -> Sequence[Table]:
    """What is shown below the summary."""
    raise NotImplementedError

  def __str__(self) -> str:
    return "\n\n".join([self.summary, *map(str, self.tables())])

  def __repr__(self) -> str:
    return str(self)

  def _repr_html_(self) -> str:
    tables = "".join(table.to_html() for table in self.tables())
    code = self.code
    before, _, behind = self.summary.partition(code) if code else (self.summary, "", "")
    pre = f"<pre>{html.escape(code)}</pre>" * bool(code)
    return f"<div>{_paragraph(before)}{pre}{_paragraph(behind)}{tables}</div>"

  def to_rows(self) -> list[dict[str, Any]]:
    """The rows of the main table as flat dicts; ``pandas.DataFrame`` takes them as they are.

    What lies nested in a row has its keys joined by dots.
    """
    rows: Any = getattr(self, "rows")  # noqa: B009  # a field or a property of the subclass
    return [dict(_flat(plain(row))) for row in rows]

  def to_dict(self) -> dict[str, Any]:
    """Everything in the report as dicts, lists, numbers and strings."""
    rows: Any = getattr(self, "rows")  # noqa: B009
    return {"summary": self.summary, "rows": plain(rows), **plain(self)}

  def to_json(self, *, indent: int | None = None) -> str:
    """The same as JSON; numbers that it cannot hold are "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False)


def _paragraph(text: str) -> str:
  shown = html.escape(text.strip())
  return f'<p style="white-space:pre-line">{shown}</p>' * bool(shown)


def in_units(value: float, unit: str = "") -> str:
  """A count with three digits and a decimal prefix.

  Example:
    >>> in_units(1_234_567, "FLOP"), in_units(12), in_units(0)
    ('1.23 MFLOP', '12', '0')
  """
  for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(value) >= 0.9995 * size:
      return f"{_three(value / size)} {prefix}{unit}"
  return f"{_three(value)} {unit}".rstrip()


def in_bytes(value: float) -> str:
  """A number of bytes in binary units.

  Example:
    >>> in_bytes(2048), in_bytes(3 * 2**20), in_bytes(0)
    ('2 KiB', '3 MiB', '0 B')
  """
  for prefix, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
    if abs(value) >= size:
      return f"{_three(value / size)} {prefix}B"
  return f"{_three(value)} B"


def _three(value: float) -> str:
  return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain(value: Any) -> Any:
  """A value as dicts, lists, numbers, strings and None.

  Dataclasses and named tuples become dicts, dtypes their names, enumeration members their names
  in lower case, and what else is unknown its ``str``.

  Example:
    >>> plain({"dtype": np.dtype("float16"), "path": ("a", np.int32(3))})
    {'dtype': 'float16', 'path': ['a', 3]}
  """
  if isinstance(value, enum.Enum):
    return value.name.lower()
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: plain(entry) for name, entry in named.items()}
  if isinstance(value, Mapping):
    return {str(plain(key)): plain(entry) for key, entry in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return plain(value.tolist())
  if isinstance(value, tuple) and hasattr(value, "_asdict"):
    return plain(value._asdict())  # type: ignore[attr-defined]  # a named tuple
  if isinstance(value, tuple | list | set | frozenset):
    return [plain(entry) for entry in value]
  return value.name if isinstance(value, np.dtype) else str(value)


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in row.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _strict(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _strict(entry) for key, entry in value.items()}
  if isinstance(value, list):
    return [_strict(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
  return value
