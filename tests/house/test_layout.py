"""The floors of `mpjax/`, and what every public name must carry.

Nothing is imported here: the sources are parsed, so an import inside a function counts too.
Run as a script this draws the house, and counts: ``python tests/house/test_layout.py``.
"""

import ast
import functools
import graphlib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mpjax"

# The ground floor first: a room imports from its own floor's room, itself, and from floors below.
FLOORS = (
  ("_core",),
  ("_engine",),
  ("_scaling",),
  ("_train",),
  ("_flax",),
  ("inspect",),
  ("checkpoint", "linen", "nnx", "plot", "testing", "training"),
  ("__init__",),
  ("_demo",),
  ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# The floors of the engine, in the same order; what stands beside its folders leads into it.
ENGINE = ("program", "analyses", "planning", "running", "doors")

# The rooms that may import a package: what has to do with Flax or a picture stays above.
FIRST_FLOOR = {
  "optax": "_scaling",
  "flax": "_train",
  "matplotlib": "plot",
  "orbax": "checkpoint",
  "sklearn": "_demo",
}

MODULES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parsed(path: Path) -> ast.Module:
  return ast.parse(path.read_text())


def module_name(path: Path) -> str:
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_names(path: Path) -> Iterator[str]:
  """Dotted names of all that a module imports: `mpjax._core.policy.Policy`, `jax.numpy`, ..."""
  for node in ast.walk(parsed(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      package = ["mpjax", *path.relative_to(PACKAGE).parts[:-1]]
      base = package[: len(package) + 1 - node.level] if node.level else []
      prefix = ".".join([*base, *([node.module] if node.module else [])])
      yield from (f"{prefix}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
  """The folder or face of mpjax that a module stands in."""
  return module.split(".")[0].replace("__main__", "cli")


def engine_floor(module: str) -> int | None:
  """On which floor of the engine a module stands; None for one that stands elsewhere."""
  if room_of(module) != "_engine":
    return None
  _, *folders, _ = module.split(".")
  return ENGINE.index(folders[0] if folders else "doors")


@functools.cache
def known_modules() -> set[str]:
  return {module_name(module) for module in MODULES}


def imported_siblings(path: Path) -> set[str]:
  """The modules of mpjax that a module imports."""
  known = known_modules()
  found = set()
  for name in imported_names(path):
    package, *rest = name.split(".")
    if package == "mpjax":
      candidates = [".".join(rest[:n]) for n in range(len(rest), 0, -1)]
      modules = (m for c in candidates for m in (c, f"{c}.__init__") if m in known)
      found.add(next(modules, "__init__"))
  return found - {module_name(path)}


@functools.cache
def imports() -> dict[str, set[str]]:
  """Of every module, by name."""
  return {module_name(path): imported_siblings(path) for path in MODULES}


def public_functions(node: ast.Module | ast.ClassDef, where: str) -> Iterator[tuple[str, Function]]:
  for child in node.body:
    name = getattr(child, "name", "_")
    if isinstance(child, Function) and not name.startswith("_"):
      yield f"{where}.{name}", child
    elif isinstance(child, ast.ClassDef) and not name.startswith("_"):
      yield from public_functions(child, f"{where}.{name}")


def public_definitions(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef]]:
  """Public functions, methods and classes of a module, whether the module is private or not."""
  tree = parsed(path)
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


def test_every_room_has_a_floor() -> None:
  assert len(FLOOR) == sum(map(len, FLOORS)) and len(FLOORS) <= 10
  assert {room_of(module) for module in imports()} == set(FLOOR)


def test_an_import_points_down_or_stays_in_its_room() -> None:
  upward = [
    f"{module} -> {other}"
    for module, others in imports().items()
    for other in others
    if room_of(module) != room_of(other) and FLOOR[room_of(other)] >= FLOOR[room_of(module)]
  ]
  assert not upward


def test_an_import_inside_the_engine_points_down() -> None:
  pairs = [(module, other) for module, others in imports().items() for other in others]
  floors = [(a, b, engine_floor(a), engine_floor(b)) for a, b in pairs]
  upward = [
    f"{a} -> {b}" for a, b, at, to in floors if at is not None and to is not None and to > at
  ]
  assert not upward
  assert {floor for _, _, floor, _ in floors} == {None, *range(len(ENGINE))}


def test_no_module_imports_itself_by_way_of_others() -> None:
  assert len(list(graphlib.TopologicalSorter(imports()).static_order())) == len(imports())


def test_only_public_jax_is_used() -> None:
  private = [
    f"{module_name(path)}: {name}"
    for path in MODULES
    for name in imported_names(path)
    if re.match(r"(jax|flax|optax)\.(.+\.)?_", name)
  ]
  private += [str(path) for path in MODULES if re.search(r"\bjax\._src\b", path.read_text())]
  assert not private


def test_a_package_is_imported_only_from_its_floor_upwards() -> None:
  stray = [
    f"{module_name(path)}: {package}"
    for path in MODULES
    for package in {name.split(".")[0] for name in imported_names(path)} & set(FIRST_FLOOR)
    if FLOOR[room_of(module_name(path))] < FLOOR[FIRST_FLOOR[package]]
  ]
  assert not stray


def test_every_public_definition_has_a_docstring() -> None:
  bare = [module_name(path) for path in MODULES if not ast.get_docstring(parsed(path))]
  bare += [
    name
    for path in MODULES
    for name, node in public_definitions(path)
    if not ast.get_docstring(node) and not is_overload(node)
  ]
  assert not bare


def test_every_public_signature_is_annotated() -> None:
  missing = {
    name: unannotated(node)
    for path in MODULES
    for name, node in public_definitions(path)
    if isinstance(node, Function) and unannotated(node)
  }
  assert not missing


def body_lines(node: Function) -> int:
  """The lines of a function without its signature and docstring."""
  statements = node.body[1:] if ast.get_docstring(node) else node.body
  return (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def test_no_function_is_longer_than_50_lines() -> None:
  long = {
    f"{module_name(path)}.{node.name}": body_lines(node)
    for path in MODULES
    for node in ast.walk(parsed(path))
    if isinstance(node, Function) and body_lines(node) > 50
  }
  assert not long


def test_what_differs_between_jax_versions_is_in_one_short_file() -> None:
  """No other module asks which JAX it runs on."""
  asking = [
    module_name(path)
    for path in MODULES
    if re.search(r"\bjax\.__version|\bversion_info\b", path.read_text())
  ]
  assert set(asking) <= {"_engine.program.versions"}
  assert len((PACKAGE / "_engine" / "program" / "versions.py").read_text().splitlines()) < 100


def test_the_package_ships_its_type_marker() -> None:
  assert (PACKAGE / "py.typed").exists()


def drawing() -> str:
  """The rooms, the highest floor first, each with how many modules it has and what it imports."""
  floors = reversed([*enumerate(FLOORS, 1)])
  lines = [f"{number:2}  {drawn(room, room_of)}" for number, rooms in floors for room in rooms]
  lines += ["", "The engine:"]
  lines += [f"{n + 1:2}  {drawn(n, engine_floor)}" for n in reversed(range(len(ENGINE)))]
  return "\n".join(lines)


def drawn(place: str | int, place_of: Callable[[str], str | int | None]) -> str:
  """A place, how many modules it has, and what these import from elsewhere."""
  inside = [module for module in imports() if place_of(module) == place]
  arrows = Counter(place_of(other) for module in inside for other in imports()[module])
  named = [
    (ENGINE[other] if isinstance(other, int) else other, count)
    for other, count in arrows.most_common()
    if other not in (place, None)
  ]
  below = ", ".join(f"{other} {count}" for other, count in named)
  name = ENGINE[place] if isinstance(place, int) else place
  return f"{name:11} {len(inside):3}  {f'-> {below}' if below else ''}".rstrip()


def annotations(path: Path) -> list[ast.expr]:
  """Of parameters, results, variables and fields."""
  nodes = [*ast.walk(parsed(path))]
  found = [n.annotation for n in nodes if isinstance(n, ast.arg | ast.AnnAssign)]
  found += [n.returns for n in nodes if isinstance(n, Function)]
  return [annotation for annotation in found if annotation is not None]


def counts() -> str:
  """How large the house is, and how much of its annotations says nothing."""
  lines = {module_name(path): len(path.read_text().splitlines()) for path in MODULES}
  largest = max(lines, key=lambda module: lines[module])
  aside = sum(n for module, n in lines.items() if room_of(module) in ("inspect", "plot", "_demo"))
  words = [ast.unparse(a) for path in MODULES for a in annotations(path)]
  loose = sum(bool(re.search(r"\bAny\b", word)) for word in words)
  return (
    f"{len(lines)} modules, {sum(lines.values())} lines, {aside} of them of reports and the "
    f"demonstration; median {statistics.median(lines.values()):.0f}, largest {largest} with "
    f"{lines[largest]}; {loose} of {len(words)} annotations, {loose / len(words):.1%}, hold an Any"
  )


if __name__ == "__main__":
  print(drawing())
  print(counts())
