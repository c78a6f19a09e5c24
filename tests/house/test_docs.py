"""What the documents promise: their Python runs, their commands and links lead somewhere."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpjax
from _children import run_python
from _documents import (
  COPIED,
  DOCUMENTS,
  NOTEBOOKS,
  PAGES,
  README,
  ROOT,
  SITE,
  TABLES,
  blocks,
  commands,
  text_of,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What comes with the extra `docs` alone; pages that import it run with `-m docs`.
EXTRA = ("equinox", "haiku")
LONGEST_PAGE, LONGEST_README = 1000, 150
# All that a reader meets but the reference and the list of every change.
LIMITED = [
  README,
  ROOT / "CONTRIBUTING.md",
  ROOT / "benchmarks" / "README.md",
  *PAGES,
  *TABLES,
  *NOTEBOOKS,
]


def imports_the_extra(page: Path) -> bool:
  return any(
    re.search(rf"^import {name}\b", block, re.M)
    for block in blocks(page, "python")
    for name in EXTRA
  )


def batches() -> Iterator[object]:
  """Documents that share a process: it takes longer to import JAX than to run most of them."""
  plain = [page for page in PAGES if not imports_the_extra(page)]
  with_code = [page for page in plain if blocks(page, "python")]
  half = len(with_code) // 2
  yield pytest.param(DOCUMENTS, id="top")
  yield pytest.param(with_code[:half], id=f"to {with_code[half - 1].stem}")
  yield pytest.param(with_code[half:], id=f"from {with_code[half].stem}")
  extra = [page for page in PAGES if imports_the_extra(page)]
  yield pytest.param(extra, id="extra", marks=pytest.mark.docs)


@pytest.mark.ci  # what they show, the tests of each piece hold
@pytest.mark.parametrize("documents", list(batches()))
def test_the_python_of_the_documents_runs_and_prints_what_they_say(
  documents: list[Path], tmp_path: Path
) -> None:
  script = ROOT / "tests" / "_document_runner.py"
  result = run_python([str(script), *map(str, documents)], cwd=tmp_path)
  assert result.returncode == 0, result.stderr


def test_the_readme_has_python_to_run() -> None:
  assert blocks(README, "python")


def test_the_readme_begins_with_the_two_commands() -> None:
  lines = "\n".join(commands(README))
  install, compare = 'pip install ".[demo]"', "python -m mpjax compare"
  test_install, test = 'pip install ".[test]"', "python -m pytest"
  places = [lines.find(part) for part in (install, compare, test_install, test)]
  assert -1 not in places, f"missing from the README's commands: {lines}"
  assert places == sorted(places)
  assert lines.startswith(install)


@pytest.mark.parametrize("page", LIMITED, ids=lambda page: page.stem)
def test_a_page_is_short(page: Path) -> None:
  words = len(text_of(page).split())
  assert words <= LONGEST_PAGE, f"{page.name} has {words} words"


def test_what_is_longer_is_tables_that_benchmarks_write() -> None:
  """`docs/reference.rst` is made of docstrings; all else that the site shows is a page."""
  assert all(table.with_suffix(".json").exists() for table in TABLES)
  assert {file.name for file in SITE.rglob("*.rst")} == {"reference.rst"}


def test_the_readme_is_short() -> None:
  assert len(README.read_text().splitlines()) <= LONGEST_README


def test_every_page_with_code_is_run() -> None:
  run_in_batches = {page for batch in batches() for page in batch.values[0]}  # type: ignore[attr-defined]
  assert {page for page in PAGES if blocks(page, "python")} <= run_in_batches


@pytest.mark.parametrize(
  "document",
  [*DOCUMENTS, ROOT / "benchmarks" / "README.md", *PAGES],
  ids=["top", "how", "new", "measured", *(str(page.relative_to(SITE)) for page in PAGES)],
)
def test_the_files_that_a_document_links_to_exist(document: Path) -> None:
  targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text())
  copies = {SITE / folder for folder in COPIED}  # which a plain checkout does not have
  files = {target: (document.parent / target).resolve() for target in targets}
  missing = [
    target
    for target, file in files.items()
    if not file.exists() or not copies.isdisjoint(file.parents)
  ]
  assert not missing, f"{document.name} links to {missing}"


def test_the_supported_versions_agree() -> None:
  project = PROJECT["project"]
  assert project["requires-python"] == ">=3.11,<3.14"
  script = (ROOT / ".ci" / "run").read_text()
  for name in ("jax", "flax", "optax"):
    (requirement,) = [d for d in project["dependencies"] if d.startswith(f"{name}>=")]
    oldest = requirement.split(">=")[1].split(",")[0]
    assert f"{name}=={oldest}" in script, f".ci/run does not test {name}=={oldest}"


def test_the_citation_names_this_version() -> None:
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {mpjax.__version__}\n" in citation
