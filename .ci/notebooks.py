"""Executes notebooks, given as percent-format sources, and holds each `.ipynb` to its source."""

import sys
import time
from pathlib import Path

import jupytext
import nbclient

LIMIT_SECONDS = 120  # of one cell; a whole notebook is meant to take under a minute


def check(source: Path) -> None:
  """Executes one notebook from its source; raises if a cell does, or if the `.ipynb` differs.

  Args:
    source: the percent-format `.py` file.
  """
  notebook = jupytext.read(source)
  rendered = jupytext.read(source.with_suffix(".ipynb"))
  if [cell.source for cell in notebook.cells] != [cell.source for cell in rendered.cells]:
    raise SystemExit(
      f"{source} and its .ipynb must hold the same cells, and differ. "
      f"Run `jupytext --to ipynb --execute {source}` and commit both."
    )
  began = time.monotonic()
  nbclient.NotebookClient(
    notebook,
    timeout=LIMIT_SECONDS,
    kernel_name="python3",
    resources={"metadata": {"path": str(source.parent)}},
  ).execute()
  print(f"{source}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
  for name in sys.argv[1:]:
    check(Path(name))
