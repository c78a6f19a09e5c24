"""Runs the Python blocks of Markdown documents, and holds what they print to what they say.

A script: ``python tests/_document_runner.py README.md docs/start.md``. The blocks of a document run
in order, in one namespace, as a reader would type them, compiled under the document's name and
line numbers, so that a traceback points into it. A comment behind a ``print`` is what it prints;
``...`` in it stands for anything.
"""

import ast
import re
import sys
from pathlib import Path


def blocks(text):
  """The Python blocks of a document, each below as many empty lines as stand above it."""
  for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
    yield "\n" * text[: found.start(1)].count("\n") + found[1]


def said(block):
  """What the comments behind calls of ``print`` say, by the line that the call begins in."""
  lines = block.splitlines()
  for node in ast.walk(ast.parse(block)):
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
      comment = lines[node.end_lineno - 1][node.end_col_offset :].strip()
      if comment.startswith("# "):
        yield node.lineno, comment[2:]


def agrees(printed, comment):
  """Whether a text is what a comment says; white space does not count."""
  parts = (re.escape(" ".join(part.split())) for part in comment.split("..."))
  return re.fullmatch(r".*".join(parts).strip(), " ".join(printed.split())) is not None


def run(path):
  """Runs one document; raises SystemExit if it prints something else than it says."""
  printed = {}

  def note(*values, sep=" ", end="\n"):
    printed[sys._getframe(1).f_lineno] = sep.join(map(str, values))

  namespace = {"__name__": "__main__", "print": note}
  for block in blocks(path.read_text()):
    exec(compile(block, str(path), "exec"), namespace)
    for line, comment in said(block):
      if not agrees(printed.get(line, "nothing"), comment):
        raise SystemExit(f"{path}:{line} says {comment!r} and prints {printed.get(line)!r}")


if __name__ == "__main__":
  for name in sys.argv[1:]:
    run(Path(name))
