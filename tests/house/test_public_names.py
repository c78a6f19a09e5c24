"""What every public name must have: an example that runs, and types for a user's script."""

import ast
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest

import mpjax

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "_user_script.py"
MODULES = ("", ".linen", ".nnx", ".training", ".testing", ".inspect", ".plot", ".checkpoint")


def public_names() -> dict[str, object]:
  """Each public name, as `mpjax.inspect.check`, with what it names."""
  modules = [importlib.import_module(f"mpjax{suffix}") for suffix in MODULES]
  return {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in modules
    for name in module.__all__
    if not isinstance(getattr(module, name), ModuleType)
  }


def examples(docstring: str | None) -> list[str]:
  """The lines of a docstring that run as a doctest."""
  lines = (docstring or "").splitlines()
  return [line for line in map(str.strip, lines) if line.startswith((">>>", "..."))]


def test_every_public_function_and_class_has_an_example() -> None:
  bare = [
    name
    for name, value in public_names().items()
    if callable(value) and not examples(inspect.getdoc(value))
  ]
  assert not bare


def test_every_public_constant_is_in_an_example() -> None:
  shown = "\n".join(
    line
    for path in (ROOT / "mpjax").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    for line in examples(ast.get_docstring(node))
  )
  constants = [name.rpartition(".")[2] for name, v in public_names().items() if not callable(v)]
  missing = [name for name in constants if not name.startswith("_") and name not in shown]
  assert not missing


def test_the_users_script_has_every_public_name() -> None:
  """The script that mypy and pyright read; see `.ci/run`."""
  tree = ast.parse(SCRIPT.read_text())
  used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  assert not set(public_names()) - used


@pytest.mark.slow
def test_the_users_script_runs() -> None:
  result = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


def test_a_function_under_a_policy_has_the_signature_of_the_function() -> None:
  def loss(params: dict, x: float, *, smoothing: float = 0.1) -> float:
    """The loss."""
    return params["w"] * x + smoothing

  for autocast in (mpjax.autocast, mpjax.nnx.autocast):
    for policy in ("float32", "mixed_bfloat16"):
      cast = autocast(loss, policy)
      assert inspect.signature(cast) == inspect.signature(loss)
      assert (cast.__name__, cast.__doc__) == ("loss", "The loss.")


def test_wherever_a_policy_is_an_argument_the_presets_are_literals() -> None:
  """So that an editor offers their names."""
  taken = {"policy", "policies", "default", "candidates"}
  functions = [value for value in public_names().values() if inspect.isfunction(value)]
  found = {
    f"{function.__name__}({name})": str(typing.get_type_hints(inspect.unwrap(function))[name])
    for function in [*functions, mpjax.PolicyMap.__init__]
    for name in taken & inspect.signature(function).parameters.keys()
  }
  assert len(found) >= 10
  assert not [name for name, hint in found.items() if "'mixed_bfloat16'" not in hint]
