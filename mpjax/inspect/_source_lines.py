"""Where in a person's own code an equation came from."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Their lines say how an operation is made, not why it is there.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "mpjax")


class Line(NamedTuple):
  """A line of source text.

  Attributes:
    file: The file's full name, as Python knows it; a notebook's cell has one too.
    line: The number of the line, from 1; 0 where none is known.
    function: The name of the function that it stands in.
  """

  file: str
  line: int
  function: str

  @property
  def text(self) -> str:
    """The line itself, if its source can be read."""
    return linecache.getline(self.file, self.line).strip()

  def __str__(self) -> str:
    return f"{_shown(self.file)}:{self.line}" if self.line else "?"


UNKNOWN = Line("", 0, "")


def line_of(eqn: Any, outer: Line = UNKNOWN) -> Line:
  """The innermost line outside of JAX, Flax, optax and mpjax that led to an equation.

  JAX cuts the traceback of an equation at the function that it was traced with, so for a jitted
  helper of JAX's own no such line remains.

  Args:
    eqn: The equation.
    outer: The line of the equation whose body this one stands in; returned if it has none itself.
  """
  trace = eqn.source_info.traceback
  for frame in trace.frames if trace is not None else ():
    if not _is_library(frame.file_name):
      return Line(frame.file_name, frame.line_num, frame.function_name.rpartition(".")[2])
  return outer


def raised_at(error: BaseException) -> Line:
  """The innermost line outside of libraries that an error went through."""
  found = UNKNOWN
  for frame in traceback.extract_tb(error.__traceback__):
    if not _is_library(frame.filename):
      found = Line(frame.filename, frame.lineno or 0, frame.name)
  return found


@functools.lru_cache(maxsize=4096)
def _is_library(file: str) -> bool:
  if any(file.startswith(folder) for folder in _library_folders()):
    return True
  stdlib = sysconfig.get_path("stdlib")
  return (file.startswith(stdlib) and "-packages" not in file) or file.startswith("<frozen ")


@functools.lru_cache(maxsize=1)
def _library_folders() -> tuple[str, ...]:
  specs = [importlib.util.find_spec(name) for name in _LIBRARIES]
  return tuple(
    os.path.join(location, "")  # ends with the separator
    for s in specs
    if s is not None
    for location in s.submodule_search_locations or ()
  )


@functools.lru_cache(maxsize=4096)
def _shown(file: str) -> str:
  """A file's name from the working directory, or its last two components."""
  path = Path(file)
  if path.parent.name.startswith("ipykernel_"):
    return "cell"
  if path.is_relative_to(Path.cwd()):
    return str(path.relative_to(Path.cwd()))
  return str(Path(*path.parts[-2:]))


def texts_of(lines: Iterable[Line]) -> list[str]:
  """What stands in lines of source, each once; not of those whose source is not there."""
  return list(dict.fromkeys(f"{line}: {line.text}" for line in lines if line.text))
