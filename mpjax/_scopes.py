"""Module paths, read from the name stacks of equations."""

from typing import Any

Path = tuple[str, ...]


def module_path(name_stack: Any) -> Path:
  """The module path that a name stack spells.

  Transformations wrap a component (``transpose(jvp(encoder))``), a differentiated checkpoint
  repeats the path from its root, and Linen writes a method that is not ``__call__`` as
  ``module.method``: all three are undone. Haiku's and Equinox's scopes are names as they stand
  (``mlp/linear_0``, ``eqx.nn.MLP/eqx.nn.Linear``).
  """
  path: list[str] = []
  for component in str(name_stack).split("/"):
    name, wrapped = _unwrap(component)
    if not name or name in _NOT_MODULES:
      continue
    owner, method = _of_linen(name)
    if method and path and owner == path[-1]:
      continue
    if wrapped and path and owner == path[0]:
      path.clear()
    path.append(owner)
  return tuple(path)


def is_backward(name_stack: Any) -> bool:
  """Whether an equation came from transposing, as the backward pass does."""
  return "transpose(" in str(name_stack)


def _of_linen(name: str) -> tuple[str, str]:
  """A component's module and its method, if Linen wrote one; Equinox's names have more dots."""
  owner, _, method = name.partition(".")
  return (name, "") if "." in method else (owner, method)


_NOT_MODULES = frozenset({"rematted_computation", "checkpoint"})


def _unwrap(component: str) -> tuple[str, bool]:
  wrapped = False
  while component.endswith(")") and "(" in component:
    component = component[component.index("(") + 1 : -1]
    wrapped = True
  return component, wrapped
