"""The documents of the repository, and what a reader would type of them."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SITE = ROOT / "docs"
COPIED = ("notebooks", "results")  # into docs/, when the site is built
PAGES = sorted(page for page in SITE.rglob("*.md") if page.relative_to(SITE).parts[0] not in COPIED)
TABLES = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CODE = sorted(
  file
  for folder in ("mpjax", "benchmarks", "examples", "docs", ".ci")
  for file in (ROOT / folder).rglob("*.py")
)


def text_of(page: Path) -> str:
  """What a page says: its text with what it includes, without its code and its tables."""
  text = page.read_text()
  for whole, path, end in re.findall(
    r'^(```\{include\} (\S+)\n(?::end-before: "(.*)"\n)?```)$', text, re.M
  ):
    included = (page.parent / path).read_text()
    text = text.replace(whole, included.partition(end)[0] if end else included)
  text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
  if page.suffix == ".py":  # a notebook's source: prose is what is commented out
    text = "\n".join(re.findall(r"^# (.*)$", text, re.M))
  return re.sub(r"^\|.*$", "", text, flags=re.M)


SHELL = ("bash", "sh", "shell", "console")
# How a command begins, so that a name in backticks is none: `pip`, `mpjax.plot`.
_BEGINS = r"(?:python3? [-\w.]|pip install |mpjax (?:compare|cost)\b|srun |\.ci/run$)"


def blocks(document: Path, *languages: str) -> list[str]:
  """The fenced code blocks of a document in these languages."""
  pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
  return re.findall(pattern, document.read_text(), re.M | re.S)


def lines(text: str) -> Iterator[str]:
  """The command lines of a shell block, without prompt, continuation or comment."""
  for line in text.replace("\\\n", " ").splitlines():
    command = re.sub(r"(^|\s)#.*$", "", line.strip().removeprefix("$ ")).strip()
    if command:
      yield command


def commands(document: Path) -> Iterator[str]:
  """The command lines of a document's shell blocks."""
  for block in blocks(document, *SHELL):
    yield from lines(block)


def said(document: Path) -> Iterator[str]:
  """The commands that a document, or the texts of a Python file, name in backticks or indented."""
  if document.suffix == ".md" or document.parent.name == "notebooks":
    texts = [re.sub(r"^# ?", "", document.read_text(), flags=re.M)]
  else:
    nodes = ast.walk(ast.parse(document.read_text()))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
  for text in texts:
    for _, code in re.findall(rf"(?<!`)(`{{1,2}})({_BEGINS}[^`]*)\1(?!`)", text):
      yield " ".join(code.split())
    for line in re.findall(rf"^(?:  |    )({_BEGINS}.*)$", text, re.M):
      yield from lines(line)


def parts(command: str) -> Iterator[list[str]]:
  """The words of each command of a line, without the environment variables before them."""
  lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
  lexer.whitespace_split = True
  words: list[str] = []
  for word in [*lexer, "&&"]:
    if word == "&&":
      yield words
      words = []
    elif words or not re.match(r"\w+=", word):
      words.append(word)
