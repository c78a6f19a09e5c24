"""Module paths, read from the name stacks of equations."""

from collections.abc import Iterator, Set

Path = tuple[str, ...]

POLICY_REGION = "mpjax.policy"
"""The scope of what ran, or runs, under a policy of its own: an outer policy leaves it alone."""

AS_WRITTEN = "mpjax.as_written"
"""The scope in which functions and modules under a policy run as if they had none: a reference."""


def module_path(name_stack: object) -> Path:
  """The module path that a name stack spells.

  Transformations wrap a component (``transpose(jvp(encoder))``), a differentiated checkpoint
  repeats the path from its root, and Linen writes a method that is not ``__call__`` as
  ``module.method``: all three are undone. Haiku's and Equinox's scopes are names as they stand
  (``mlp/linear_0``, ``eqx.nn.MLP/eqx.nn.Linear``).
  """
  path: list[str] = []
  around = False
  for name, is_wrapped in _components(str(name_stack)):
    wrapped, around = is_wrapped or around, False
    if name == POLICY_REGION:  # what wraps it wraps the module in it
      around = wrapped
    if not name or name in _NOT_MODULES:
      continue
    owner, method = _of_linen(name)
    if method and path and owner == path[-1]:
      continue
    if wrapped and path and owner == path[0]:
      path.clear()
    path.append(owner)
  return tuple(path)


def as_module(path: Path, modules: Set[Path]) -> Path:
  """The path of the module that scopes lead to, wherever it is called, given all modules' paths.

  A module may be called within scopes that are no modules, within other modules than the one that
  holds it, or once more within itself, as ``super().__call__`` and lifted functions of Linen do: it
  is looked for in the module that it is called in, then in those around it, as a name in Python is.

  Example:
    >>> modules = {("decoder",), ("decoder", "out"), ("embed",)}
    >>> as_module(("Sequential_0", "decoder", "out"), modules)
    ('decoder', 'out')
    >>> as_module(("decoder", "embed"), modules), as_module(("decoder", "decoder", "out"), modules)
    (('embed',), ('decoder', 'out'))
  """
  found: Path = ()
  for name in path:
    within = ((*found[:n], name) for n in range(len(found), -1, -1))
    found = next((module for module in within if module in modules), found)
  return found


def is_recomputed(name_stack: object) -> bool:
  """Whether an equation computes a second time what a checkpoint did not store."""
  return "rematted_computation" in str(name_stack)


def _components(stack: str) -> Iterator[tuple[str, bool]]:
  """The names of a stack, each with whether a transformation wraps it.

  A wrapped scope may be a path itself, as NNX modules write them: ``transpose(jvp(layers/1))``.
  """
  depth, start = 0, 0
  for end, character in enumerate(f"{stack}/"):
    depth += (character == "(") - (character == ")")
    if character == "/" and depth <= 0:
      name, wrapped = _unwrap(stack[start:end])
      yield from ((part, wrapped and not n) for n, part in enumerate(name.split("/")))
      start = end + 1


NARROW_SUMS = "mpjax.narrow_sums"
"""The scope in which the gradients of parameters have the dtype of their matmuls."""


def has_narrow_sums(name_stack: object) -> bool:
  """Whether gradients are asked for in the dtype of their matmuls."""
  return NARROW_SUMS in str(name_stack)


def has_policy(name_stack: object) -> bool:
  """Whether an equation stands in a region that has a policy of its own."""
  return POLICY_REGION in str(name_stack)


def is_as_written(name_stack: object) -> bool:
  """Whether what runs under a name stack is asked for without the policies that it has."""
  return AS_WRITTEN in str(name_stack)


def is_backward(name_stack: object) -> bool:
  """Whether an equation came from transposing, as the backward pass does."""
  return "transpose(" in str(name_stack)


def is_forward_again(name_stack: object) -> bool:
  """Whether an equation is of the forward pass that a checkpoint computes again."""
  _, again, then = str(name_stack).rpartition("rematted_computation")
  return bool(again) and "transpose(" not in then


def _of_linen(name: str) -> tuple[str, str]:
  """A component's module and its method, if Linen wrote one; Equinox's names have more dots."""
  owner, _, method = name.partition(".")
  return (name, "") if "." in method else (owner, method)


_NOT_MODULES = frozenset(
  {"rematted_computation", "checkpoint", POLICY_REGION, AS_WRITTEN, NARROW_SUMS}
)


def _unwrap(component: str) -> tuple[str, bool]:
  wrapped = False
  while component.endswith(")") and "(" in component:
    component = component[component.index("(") + 1 : -1]
    wrapped = True
  return component, wrapped
