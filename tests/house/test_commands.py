"""Every command that documents and docstrings name is of a known kind, and can be typed as it is.

What is quick is run, at a few steps; what trains for an hour or needs another machine is read by
its own parser; an installation is held to `pyproject.toml`; and what `.ci/run` runs is there.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_docs import PROJECT

from _children import run_python
from _documents import CODE, DOCUMENTS, NOTEBOOKS, PAGES, ROOT, TABLES, commands, parts, said

EXTRAS = PROJECT["project"]["optional-dependencies"]
# Of the tools beside which benchmarks measure, and of a compiler for TPUs: installed by name.
OTHERS = {"jmp", "mixed-precision-for-jax", "libtpu"}
CHECKS = ("ruff", "pyright", "mypy")
# What stands for a word of the reader's own.
PLACEHOLDERS = {
  "TARGET": "h100",
  "WORKLOAD": "gpt-small",
  "POLICY": "mixed_bfloat16",
  "notebooks/NAME.py": "notebooks/01_quickstart.py",
}


@functools.cache
def named() -> list[list[str]]:
  """The words of each command that a document or a docstring names, each command once."""
  found: dict[tuple[str, ...], None] = {}
  for file in [*DOCUMENTS, ROOT / "benchmarks" / "README.md", *PAGES, *TABLES, *NOTEBOOKS, *CODE]:
    lines = [*said(file), *(commands(file) if file.suffix == ".md" else ())]
    for line in lines:
      for words in parts(line):
        words = ["python", "-m", "mpjax", *words[1:]] if words[0] == "mpjax" else words
        words = words[2:] if words[0] == "srun" else words  # a scheduler, with one flag of its own
        found[tuple(PLACEHOLDERS.get(word, word) for word in words if word != "...")] = None
  return [list(words) for words in found]


KINDS = {
  "installs": r"pip install ",
  "makes an environment": r"python -m venv |source ",
  "hooks": r"pre-commit install$",
  "is .ci/run": r"\.ci/run$",
  "is a stage of .ci/run": r"(?:ruff|pyright|mypy)\b|python (?:-m sphinx|\.ci/notebooks\.py) ",
  "tests": r"python -m pytest\b",
  "measures": r"python -m benchmarks\.(?:gpu|own\.\w+|peers\.\w+)(?: |$)",
  "compares": r"python -m mpjax compare\b",
  "costs": r"python -m mpjax cost\b|python -m mpjax$",
  "is an example": r"python examples/",
  "draws": r"python tests/house/test_layout\.py$",
  "is started by another": r"python -P _target_compiler\.py FOLDER$|python tests/_\w+\.py ",
}


def of_kind(kind: str) -> list[list[str]]:
  return [words for words in named() if re.match(KINDS[kind], " ".join(words))]


def longest(asked: list[list[str]]) -> list[list[str]]:
  """Those with which no other command only goes on."""
  return [
    words
    for words in asked
    if not any(words == other[: len(words)] for other in asked if other is not words)
  ]


def start(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
  """Runs a command with this Python, as a reader would in a checkout."""
  return run_python(command[1:], cwd)


def read(asked: list[list[str]]) -> None:
  """Fails on what the parsers of these commands refuse."""
  reader = ["python", "tests/_command_reader.py", *(json.dumps(words[1:]) for words in asked)]
  result = start(reader)
  assert result.returncode == 0, result.stdout + result.stderr


def test_every_command_is_of_one_known_kind():
  kinds = {
    " ".join(words): [kind for kind, begins in KINDS.items() if re.match(begins, " ".join(words))]
    for words in named()
  }
  assert {command: found for command, found in kinds.items() if len(found) != 1} == {}


def test_every_kind_has_commands():
  assert all(of_kind(kind) for kind in KINDS)


def test_what_is_installed_is_an_extra_or_a_package_that_is_known():
  projects = [*PROJECT["project"]["dependencies"], *(r for e in EXTRAS.values() for r in e)]
  known = OTHERS | {Requirement(each).name for each in projects}
  for command in of_kind("installs"):
    for what in command[2:]:
      if what.startswith("."):
        extras = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", what)
        assert extras and set(filter(None, (extras[1] or "").split(","))) <= set(EXTRAS), command
      elif what != "-e":
        assert Requirement(what).name in known, command


def test_what_ci_runs_is_what_the_documents_name():
  script, site = (ROOT / ".ci" / "run").read_text(), (ROOT / "tests/house/test_site.py").read_text()
  stages = of_kind("is a stage of .ci/run")
  for tool in CHECKS:
    assert f'bin/{tool}"' in script and f'"{tool}' in " ".join(map(json.dumps, EXTRAS["dev"]))
  assert ["python", "-m", "sphinx", "-W", "--keep-going", "docs", "build/docs"] in stages
  assert '"-m", "sphinx", "-W", "--keep-going"' in site and "-m docs tests/house" in script
  assert ".ci/notebooks.py" in script and '"--write"' in (ROOT / ".ci/notebooks.py").read_text()
  assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_call_what_ci_runs():
  hooks = ROOT / ".pre-commit-config.yaml"
  if hooks.exists():  # not in a source distribution
    assert all(tool in hooks.read_text() for tool in ("ruff check", "ruff format", "pyright"))
  assert any(Requirement(each).name == "pre-commit" for each in EXTRAS["dev"])


def test_the_floors_are_drawn():
  (command,) = of_kind("draws")
  result = start(command)
  assert result.returncode == 0 and "_engine" in result.stdout, result.stderr


@pytest.mark.ci
def test_an_environment_is_made_and_entered(tmp_path):
  line = " && ".join(" ".join(words) for words in of_kind("makes an environment"))
  script = f"{line.replace('python ', f'{sys.executable} ', 1)} && command -v python"
  result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
  assert result.stdout.strip() == str(tmp_path / ".venv" / "bin" / "python"), result.stderr


@pytest.mark.ci
def test_benchmarks_examples_and_the_command_line_read_their_arguments():
  costs = [words for words in of_kind("costs") if words[4:]]  # others only say its name
  read([*of_kind("measures"), *of_kind("is an example"), *of_kind("compares"), *costs])


@pytest.mark.ci
def test_the_tests_that_are_named_are_there():
  read([words for words in of_kind("tests") if words[3:]])  # without arguments it is this run


def test_what_another_starts_is_there():
  for command in of_kind("is started by another"):
    script = next(word for word in command if word.endswith(".py"))
    assert list(ROOT.glob(script)) or list(ROOT.glob(f"mpjax/**/{script}"))


@pytest.mark.ci
def test_the_costs_that_the_guide_asks_for_are_stated(tmp_path):
  (tmp_path / "my_model.py").write_text(
    "import jax.numpy as jnp\n\n\ndef train_case():\n  return jnp.sin, jnp.ones(3)\n"
  )
  for command in longest(of_kind("costs")):
    if "my_model:train_case" in command and "--python" not in command:
      here = command[: command.index("--target")] if "--target" in command else command
      result = start(here, tmp_path)
      assert result.returncode == 0 and "mixed_bfloat16" in result.stdout, result.stderr


@pytest.mark.ci
def test_the_comparisons_of_the_documents_run_at_two_steps(tmp_path):
  (tmp_path / "docs" / "_static").mkdir(parents=True)
  for command in longest(of_kind("compares")):
    if "--help" in command or "--checkpoint" in command:  # `tests/_demo/test_cli.py` resumes runs
      continue
    result = start([*command, "--steps", "2", "--batch-size", "4"], tmp_path)
    assert result.returncode == 0 and "float32" in result.stdout, result.stderr
    for file in (word for word in command if word.endswith((".json", ".png"))):
      assert (tmp_path / file).stat().st_size
