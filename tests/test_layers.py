"""The import layering of `mpjax/`, and what every public name must carry.

Nothing is imported here: the sources are parsed, so an import inside a function counts too.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mpjax"

# Lowest row first: a module imports only from rows above its own in this list. The first number is
# the layer of the design that a row belongs to. A private helper has its place here too; a module
# without one fails the test.
LAYERS = (
  (0, "_dtypes", "_jaxpr", "_numbers", "_paths", "_report", "_scopes", "_versions"),
  (0, "_source"),
  (1, "_casting", "_derivatives", "_finite", "_formats", "_markers", "_placement", "_reduction"),
  (1, "_scaled_loss"),
  (2, "_histogram", "_loss_scaling", "_policy", "_precision"),
  (2, "_master_weights", "testing"),
  (2, "_low_precision", "_statistics"),
  (2, "_ranges"),
  (3, "_policy_map"),
  (3, "_plan"),
  (3, "_borders", "_constants", "_idioms", "_values"),
  (3, "_call", "_matmuls", "_softmax"),
  (3, "_islands", "_planner"),
  (3, "_custom_rules", "_nonfinite", "_segments"),
  (3, "_interpreter"),
  (3, "_flow_costs", "_flow_data", "_lockstep_stats"),
  (3, "_flow"),
  (3, "_autocast", "_lockstep"),
  (4, "_accumulation", "_steps"),
  (4, "_nnx_autocast"),
  (4, "_nnx_training", "linen", "training"),
  (4, "nnx"),
  (4, "_apply", "_assignment", "_objective", "_subject", "_target_compiler"),
  (4, "_flow_report", "_record", "_targets"),
  (4, "_cost", "_explain"),
  (4, "_check_report", "_locate", "_tune_report"),
  (4, "_tune"),
  (4, "_check"),
  (4, "inspect"),
  (5, "_axes"),
  (5, "_plot_reports"),
  (5, "plot"),
  (5, "__init__"),
  (6, "_jobs", "checkpoint"),
  (6, "_checkpoint", "_cost_command", "_digits", "_progress", "_text"),
  (6, "_compare"),
  (6, "_table"),
  (6, "cli"),
  (6, "__main__"),
)
RANK = {name: row for row, (_, *names) in enumerate(LAYERS) for name in names}
LAYER = {name: number for number, *names in LAYERS for name in names}

# The lowest layer that may import a package. What has to do with Flax or a picture stays above.
LOWEST_LAYER = {"optax": 2, "flax": 4, "matplotlib": 5, "orbax": 6, "sklearn": 6}

MODULES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_names(path: Path) -> Iterator[str]:
  """Dotted names of all that a module imports: `mpjax._policy.Policy`, `jax.numpy`, ..."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      package = ["mpjax", *path.relative_to(PACKAGE).parts[:-1]]
      base = package[: len(package) + 1 - node.level] if node.level else []
      prefix = ".".join([*base, *([node.module] if node.module else [])])
      yield from (f"{prefix}.{alias.name}" for alias in node.names)


def imported_siblings(path: Path) -> set[str]:
  """The modules of mpjax that a module imports."""
  known = {module_name(module) for module in MODULES}
  siblings = set()
  for name in imported_names(path):
    package, *rest = name.split(".")
    if package == "mpjax":
      siblings.add(rest[0] if rest and rest[0] in known else "__init__")
  return siblings


def public_functions(node: ast.Module | ast.ClassDef, where: str) -> Iterator[tuple[str, Function]]:
  for child in node.body:
    name = getattr(child, "name", "_")
    if isinstance(child, Function) and not name.startswith("_"):
      yield f"{where}.{name}", child
    elif isinstance(child, ast.ClassDef) and not name.startswith("_"):
      yield from public_functions(child, f"{where}.{name}")


def public_definitions(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef]]:
  """Public functions, methods and classes of a module, whether the module is private or not."""
  tree = ast.parse(path.read_text())
  where = module_name(path)
  for child in tree.body:
    if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
      yield f"{where}.{child.name}", child
  yield from public_functions(tree, where)


def is_overload(node: Function | ast.ClassDef) -> bool:
  return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def unannotated(function: Function) -> list[str]:
  """Parameters of a function that have no annotation, and `return` if it has none."""
  args = function.args
  parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
  missing = [
    parameter.arg
    for parameter in parameters
    if parameter and not parameter.annotation and parameter.arg not in ("self", "cls")
  ]
  return missing if function.returns else [*missing, "return"]


def test_every_module_has_a_layer_and_every_row_its_modules_once() -> None:
  assert len(RANK) == sum(len(names) for _, *names in LAYERS)
  present = {module_name(path) for path in MODULES}
  assert not present - set(RANK), f"give them a row in LAYERS: {sorted(present - set(RANK))}"
  assert not set(RANK) - present, f"not in mpjax/: {sorted(set(RANK) - present)}"
  assert sorted(number for number, *_ in LAYERS) == [number for number, *_ in LAYERS]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_an_import_only_points_down(path: Path) -> None:
  here = RANK[module_name(path)]
  upward = sorted(name for name in imported_siblings(path) if RANK[name] >= here)
  assert not upward, f"{module_name(path)} imports {upward}, which are not below it"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_public_jax_is_used(path: Path) -> None:
  private = [name for name in imported_names(path) if re.match(r"(jax|flax|optax)\.(.+\.)?_", name)]
  assert not private, f"{module_name(path)} imports private names: {private}"
  assert not re.search(r"\bjax\._src\b", path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_package_is_imported_only_from_its_layer_upwards(path: Path) -> None:
  here = LAYER[module_name(path)]
  packages = {name.split(".")[0] for name in imported_names(path)}
  stray = sorted(package for package in packages if LOWEST_LAYER.get(package, 0) > here)
  assert not stray, f"{module_name(path)} is in layer {here} and imports {stray}: {LOWEST_LAYER}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_public_definition_has_a_docstring(path: Path) -> None:
  assert ast.get_docstring(ast.parse(path.read_text())), f"{module_name(path)} has no docstring"
  bare = [
    name
    for name, node in public_definitions(path)
    if not ast.get_docstring(node) and not is_overload(node)
  ]
  assert not bare, f"no docstring: {bare}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_public_signature_is_annotated(path: Path) -> None:
  missing = {
    name: unannotated(node)
    for name, node in public_definitions(path)
    if isinstance(node, Function) and unannotated(node)
  }
  assert not missing, f"not annotated: {missing}"


def body_lines(node: Function) -> int:
  """The lines of a function without its signature and docstring."""
  statements = node.body[1:] if ast.get_docstring(node) else node.body
  return (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_function_is_longer_than_50_lines(path: Path) -> None:
  functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
  long = {node.name: body_lines(node) for node in functions if body_lines(node) > 50}
  assert not long, f"{module_name(path)}: make several functions of {long}"


def test_what_differs_between_jax_versions_is_in_one_short_file() -> None:
  """No other module asks which JAX it runs on."""
  asking = [
    module_name(path)
    for path in MODULES
    if re.search(r"\bjax\.__version|\bversion_info\b", path.read_text())
  ]
  assert set(asking) <= {"_versions"}
  assert len((PACKAGE / "_versions.py").read_text().splitlines()) < 100


def test_the_package_ships_its_type_marker() -> None:
  assert (PACKAGE / "py.typed").exists()
