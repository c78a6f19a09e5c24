"""The command `mpjax cost`: what a step of the user's own needs, from a shell."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from typing import Any

from mpjax._core.arguments import shown
from mpjax._demo.jobs import UsageError
from mpjax.inspect._cost import cost
from mpjax.inspect._cost_report import CostReport
from mpjax.inspect._source_lines import raised_at


def report_for(args: argparse.Namespace) -> CostReport:
  """The report that the flags ask for.

  Raises:
    UsageError: If the case cannot be loaded or traced, ``--donate`` or ``--python`` names nothing
      that there is, or the target's compiler is missing or fails.
  """
  if args.python is not None and shutil.which(args.python) is None:
    raise UsageError(
      f"--python must name an interpreter that can be run. Got {shown(args.python)}."
    )
  step, *operands = load_case(args.case)
  for position in args.donate:
    if position >= len(operands):
      raise UsageError(
        f"--donate must be the position of an argument of the step, 0 to {len(operands) - 1}. "
        f"Got {position}."
      )
  try:
    return cost(
      step,
      *operands,
      policies=args.policies,
      target=args.target,
      donate_argnums=args.donate,
      python=args.python,
    )
  except (ModuleNotFoundError, RuntimeError) as error:
    raise UsageError(str(error)) from error
  except Exception as error:
    raise UsageError(f"The step of {shown(args.case)} must compile. {_in_words(error)}") from error


def load_case(spec: str) -> tuple[Any, ...]:
  """Calls ``module:function``, which returns a step and its arguments.

  Raises:
    UsageError: If there is no such function, it or its module raises, or it returns something else.
  """
  module, colon, function = spec.partition(":")
  if not (module and colon and function):
    raise UsageError(f"CASE must have the form module:function. Got {shown(spec)}.")
  make = _imported(module, function, spec)
  if not callable(make):
    raise UsageError(
      f"CASE must name a function. {shown(spec)} is {type(make).__name__}. Name one without "
      "arguments that returns the step and its arguments."
    )
  try:
    made = make()
  except (Exception, SystemExit) as error:
    raise UsageError(
      f"CASE must name a function that runs without arguments. {shown(spec)} raised: "
      f"{_in_words(error)}"
    ) from error
  if not isinstance(made, tuple) or len(made) < 2 or not callable(made[0]):
    raise UsageError(
      f"CASE must return a tuple: a step, then its arguments or their shapes. {shown(spec)} "
      f"returned {type(made).__name__}."
    )
  return made


def _imported(module: str, function: str, spec: str) -> Any:
  sys.path.insert(0, os.getcwd())
  try:
    return getattr(importlib.import_module(module), function)
  except (Exception, SystemExit) as error:  # whatever the user's module raises
    raise UsageError(
      f"CASE must name a function that can be imported from here. Got {shown(spec)}: "
      f"{_in_words(error)}"
    ) from error
  finally:
    sys.path.pop(0)


def _in_words(error: BaseException) -> str:
  """An error with the line that raised it, where it is the user's."""
  line = raised_at(error)
  where = f" ({line})" if line.line else ""
  return f"{type(error).__name__}: {str(error).rstrip('.')}{where}."
