"""What is shipped, and what messages say to install."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SDIST = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]

BY_ITSELF = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}  # the builder adds these
# Of no use in a source distribution, which has no history and whose CI is `.ci/run`.
LEFT_OUT = {".git", ".github", ".gitignore", ".pre-commit-config.yaml"}


def ignored(path: Path) -> bool:
  """Whether git does not look at something at the top of a checkout."""
  names = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
  return path.name in names or path.match("*.egg-info")


def requirements() -> set[str]:
  """The packages that the extras install, without their versions."""
  extras = PROJECT["project"]["optional-dependencies"].values()
  return {re.split(r"[<>=]", entry)[0] for extra in extras for entry in extra}


def test_a_source_distribution_has_all_that_a_checkout_has() -> None:
  if (ROOT / ".gitignore").exists():  # this is a checkout
    there = {path.name for path in ROOT.iterdir() if not ignored(path)}
    assert there - {*SDIST, *BY_ITSELF, *LEFT_OUT} == set()
  assert not [name for name in SDIST if not (ROOT / name).exists()]


def test_the_workflow_runs_the_one_script_on_every_python() -> None:
  workflow = ROOT / ".github" / "workflows" / "ci.yml"
  if workflow.exists():  # not in a source distribution
    text = workflow.read_text()
    named = [entry.rpartition(" :: ")[2] for entry in PROJECT["project"]["classifiers"]]
    pythons = [version for version in named if version.startswith("3.")]
    assert len(pythons) == 3 and not [v for v in pythons if not re.search(rf"^ +.*{v}", text, re.M)]
    assert "run: .ci/run\n" in text


def test_what_a_message_installs_can_be_installed_wherever_it_is_read() -> None:
  """The packages themselves: no index has ``mpjax[plot]``, and only a checkout ``.[plot]``."""
  said = {
    package.strip('"`')
    for path in (ROOT / "mpjax").rglob("*.py")
    for line in path.read_text().splitlines()
    for command in re.findall(r"pip install ([^,();:]+?)(?:\.|``| \(|[\"'],?$|,|$)", line)
    for package in command.split()
    if "{" not in package  # of a target: `tests/inspect/test_cost.py`
  }
  assert {"matplotlib", "scikit-learn", "orbax-checkpoint"} <= said
  assert said <= requirements()
