"""Executes notebooks, given as percent-format sources, and holds each `.ipynb` to what comes out.

``python .ci/notebooks.py notebooks/NAME.py ...`` checks that the `.ipynb` has the cells of its
source and the outputs that the code gives now: the same words, whole numbers below a thousand and
kinds of output, and other numbers nearly so. With ``--write`` it writes the `.ipynb` instead.
"""

import difflib
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 300  # of one cell; a whole notebook is meant to take under a minute
# What runs once is not worth optimizing. The memory that a compiler states depends on it.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
  QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # later versions do not know it

# Training on another machine rounds otherwise, and an error of 1e-5 is rounding itself.
RELATIVE, ABSOLUTE, EXACT_BELOW = 0.2, 0.02, 1000
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?"
_TOKEN = re.compile(rf"{_NUMBER}|\w+|[^\w\s]")


def agree(ours: str, theirs: str) -> bool:
  """Whether two outputs say the same: white space and colors do not count, numbers nearly.

  Example:
    >>> agree("off by 0.0123 in 3 of 4 modules", "off by  0.0119 in 3 of 4 modules")
    True
    >>> agree("3 of 4 modules", "4 of 4 modules")
    False
  """
  pair = [_TOKEN.findall(_COLOR.sub("", text)) for text in (ours, theirs)]
  return len(pair[0]) == len(pair[1]) and all(map(_alike, *pair))


def _alike(one: str, other: str) -> bool:
  numbers = [re.fullmatch(_NUMBER, text) for text in (one, other)]
  if one == other or not all(numbers):
    return one == other
  if all(re.fullmatch(r"[-+]?\d+", text) and abs(int(text)) < EXACT_BELOW for text in (one, other)):
    return False
  a, b = (float(text.replace(",", "")) for text in (one, other))
  return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def outputs(cell: Any) -> Iterator[tuple[str, str]]:
  """What a cell shows: what it printed, as one text, then each object's kinds and its text."""
  found = cell.get("outputs", [])
  yield "printed", "".join(out["text"] for out in found if out["output_type"] == "stream")
  for out in found:
    if out["output_type"] != "stream":
      data = out.get("data", {})
      yield f"{out['output_type']}: {', '.join(sorted(data))}", data.get("text/plain", "")


def differences(executed: Any, committed: Any) -> Iterator[str]:
  """A line for each output that the committed notebook has otherwise."""
  for number, (now, before) in enumerate(zip(executed.cells, committed.cells, strict=True)):
    ours, theirs = list(outputs(now)), list(outputs(before))
    if [kind for kind, _ in ours] != [kind for kind, _ in theirs]:
      yield f"cell {number}: {[k for k, _ in ours]}, committed {[k for k, _ in theirs]}"
      continue
    for (_, new), (_, old) in zip(ours, theirs, strict=True):
      if not agree(new, old):
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "committed", "now", n=0)
        yield f"cell {number}:\n" + "\n".join(map(str.rstrip, lines))


def execute(source: Path) -> Any:
  """The notebook of a source, with the outputs that its code gives; raises if a cell does."""
  import jupytext
  import nbclient

  notebook = jupytext.read(source)
  nbclient.NotebookClient(
    notebook,
    timeout=LIMIT_SECONDS,
    kernel_name="python3",
    resources={"metadata": {"path": str(source.parent)}},
  ).execute()
  return notebook


def check(source: Path, *, write: bool) -> None:
  """Executes one notebook from its source; raises if a cell does, or if the `.ipynb` differs.

  Args:
    source: The percent-format `.py` file.
    write: Whether to write the `.ipynb` instead of comparing it.
  """
  import jupytext

  began = time.monotonic()
  rendered = source.with_suffix(".ipynb")
  executed = execute(source)
  if write:
    jupytext.write(executed, rendered)
    return print(f"{rendered}: written")
  committed = jupytext.read(rendered)
  advice = f"Run `python .ci/notebooks.py --write {source}` and commit both files."
  if [cell.source for cell in executed.cells] != [cell.source for cell in committed.cells]:
    raise SystemExit(f"{source} and its .ipynb must hold the same cells, and differ. {advice}")
  if found := list(differences(executed, committed)):
    found = "\n".join(found)
    raise SystemExit(f"{rendered} must hold what its code gives, and differs. {advice}\n{found}")
  print(f"{source}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE
  for name in sys.argv[1:]:
    if name != "--write":
      check(Path(name), write="--write" in sys.argv)
