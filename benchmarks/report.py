"""Writes what a benchmark measured: JSON for programs, Markdown for readers."""

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

PACKAGES = ("mpjax", "jax", "jaxlib", "flax", "optax", "jmp", "mixed-precision-for-jax")
PACKAGES += ("dm-haiku", "keras", "torch", "libtpu", "jax-cuda12-plugin", "numpy")

Row = dict[str, Any]


def versions() -> dict[str, str]:
  """The versions of all packages that a benchmark may use, of those that are installed."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return found


def environment(device: str) -> Row:
  """Date, versions and machine of a run.

  Args:
    device: what was measured on, or compiled for.
  """
  return {
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
    "device": device,
    "processor": platform.machine(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": versions(),
  }


def table(rows: list[Row], columns: dict[str, str]) -> str:
  """A Markdown table.

  Args:
    rows: one a line.
    columns: the title of each column that is shown, by its key; a row without it shows nothing.
  """
  lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
  lines += ["| " + " | ".join(_show(row.get(key)) for key in columns) + " |" for row in rows]
  return "\n".join(lines)


def _show(value: Any) -> str:
  if value is None:
    return ""
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
  return str(value)


def rows_in(path: Path) -> list[Row]:
  """The rows of a file that `write` wrote; none if there is no file yet."""
  return json.loads(path.read_text())["rows"] if path.exists() else []


def merged(old: list[Row], new: list[Row], key: Sequence[str]) -> dict[tuple[Any, ...], Row]:
  """Rows by the values of their key, old ones that were measured again replaced."""
  return {tuple(row[name] for name in key): row for row in [*old, *new]}


def write(
  name: str,
  title: str,
  command: str,
  device: str,
  rows: list[Row],
  tables: str,
  folder: Path = RESULTS,
) -> None:
  """Writes `name.json` and `name.md` into a folder.

  Rows may come from several environments: the versions of packages that are not installed here
  stay as the file has them.

  Args:
    name: the name of the files, without its ending.
    title: the heading.
    command: what prints it again.
    device: what was measured on, or compiled for.
    rows: the measurements; each has the same keys.
    tables: Markdown made of them.
    folder: where to write.
  """
  where = environment(device)
  path = folder / f"{name}.json"
  if path.exists():
    earlier = json.loads(path.read_text())["environment"]["versions"]
    where["versions"] = {**earlier, **where["versions"]}
  found = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
  text = f"# {title}\n\n{where['date']}, {device}, {where['cores']} cores. {found}.\n\n"
  text += f"```bash\n{command}\n```\n\n{tables}\n"
  folder.mkdir(parents=True, exist_ok=True)
  result = {"title": title, "command": command, "environment": where, "rows": rows}
  path.write_text(json.dumps(result, indent=1) + "\n")
  (folder / f"{name}.md").write_text(text)
