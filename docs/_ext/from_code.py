"""Sphinx directives that write pages from the code: public names, and the table of primitives."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import mpjax

MODULES = (
  "mpjax",
  "mpjax.linen",
  "mpjax.nnx",
  "mpjax.training",
  "mpjax.testing",
  "mpjax.inspect",
  "mpjax.plot",
  "mpjax.checkpoint",
)
"""The public modules, in the order of the reference."""

_GROUPS = (
  ("lower", "In the compute dtype"),
  ("range", "In float32 if the compute dtype is float16"),
  ("full", "In float32"),
  ("follow", "In what the operands have"),
)


def public_names(module: ModuleType) -> list[str]:
  """The names of a public module that are no modules themselves, in alphabetical order."""
  names = sorted(module.__all__, key=str.lower)
  return [name for name in names if not isinstance(getattr(module, name), ModuleType)]


class PublicNames(SphinxDirective):
  """``public-names MODULE``: the docstring of a module, and of each of its public names.

  For pages in reStructuredText, as autodoc's own directives are.
  """

  required_arguments = 1

  def run(self) -> list[nodes.Node]:
    """One autodoc directive a name; a name that another module has already refers to it."""
    module = importlib.import_module(self.arguments[0])
    lines = [*(inspect.getdoc(module) or "").splitlines(), ""]
    for name in public_names(module):
      lines += _entry(module, name)
    return self.parse_text_to_nodes("\n".join(lines))


def _entry(module: ModuleType, name: str) -> Iterator[str]:
  value, full = getattr(module, name), f"{module.__name__}.{name}"
  first = _first_home(value)
  if first not in (None, full):
    yield from [f".. py:data:: {full}", "", f"   The same as `{first}`.", ""]
  elif inspect.isclass(value):
    yield from [f".. autoclass:: {full}"]
    members = ", ".join(_members(value))
    yield from [f"   :members: {members}", ""] if members else [""]
  elif callable(value):
    yield from [f".. autofunction:: {full}", ""]
  else:
    text = _text_of(name, value)
    yield from [f".. py:data:: {full}", "", *(f"   {line}" for line in text.splitlines()), ""]


def _first_home(value: Any) -> str | None:
  """The first public name of an object that has one in several modules."""
  if not callable(value):
    return None
  for module in map(importlib.import_module, MODULES):
    for name in public_names(module):
      if getattr(module, name) is value:
        return f"{module.__name__}.{name}"
  return None


def _members(cls: type) -> list[str]:
  """The methods and properties that a class adds and says something about, fields left out."""
  fields = (
    {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
  )
  if issubclass(cls, tuple):  # a named tuple
    fields = getattr(cls, "_fields", ())
  return [
    name
    for name, value in vars(cls).items()
    if not name.startswith("_")
    and name not in fields
    and inspect.getdoc(value)
    and (callable(value) or isinstance(value, property | classmethod | staticmethod))
  ]


def _text_of(name: str, value: Any) -> str:
  """The string below the assignment of a constant, wherever in the package that stands."""
  for found in pkgutil.walk_packages(mpjax.__path__, "mpjax."):
    module = importlib.import_module(found.name)
    if vars(module).get(name) is value:
      documented = ModuleAnalyzer.for_module(found.name)
      documented.analyze()
      if ("", name) in documented.attr_docs:
        return "\n".join(documented.attr_docs["", name])
  return f"``{value!r}``"


class Primitives(SphinxDirective):
  """``primitives``: what a 16-bit policy does with each primitive, by class, with reasons."""

  def run(self) -> list[nodes.Node]:
    """One paragraph of names a class, from `mpjax.DEFAULT_OPS`."""
    reasons = _reasons()
    made: list[nodes.Node] = []
    for group, title in _GROUPS:
      names = sorted(name for name, found in mpjax.DEFAULT_OPS.items() if found == group)
      made.append(nodes.rubric("", f"{title} ({group}): {len(names)}"))
      explained = [name for name in names if reasons.get(name)]
      plain = [name for name in names if name not in explained]
      if explained:
        made.append(_definitions([(name, reasons[name]) for name in explained]))
      if plain:
        made.append(nodes.paragraph("", "", *_separated(plain)))
    return made


def _reasons() -> dict[str, str]:
  """The reason of each primitive, where its row in the code states one."""
  from mpjax._core import primitives

  rows = primitives.FACTS
  return {name: row.reason for name, row in rows.items()}


def _definitions(rows: list[tuple[str, str]]) -> nodes.Node:
  """A list of reasons, each with the primitives that share it."""
  by_reason: dict[str, list[str]] = {}
  for name, reason in rows:
    by_reason.setdefault(reason, []).append(name)
  items = [
    nodes.list_item("", nodes.paragraph("", "", *_separated(names), nodes.Text(f": {reason}")))
    for reason, names in by_reason.items()
  ]
  return nodes.bullet_list("", *items)


def _separated(names: list[str]) -> list[nodes.Node]:
  made: list[nodes.Node] = []
  for name in names:
    made += [nodes.literal("", name), nodes.Text(", ")]
  return made[:-1]


def setup(app: Sphinx) -> dict[str, Any]:
  """Makes the directives known to Sphinx."""
  app.add_directive("public-names", PublicNames)
  app.add_directive("primitives", Primitives)
  return {"version": "1", "parallel_read_safe": True}
