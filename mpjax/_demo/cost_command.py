"""The command `mpjax cost`: what a step of the user's own needs, from a shell."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from mpjax._demo.jobs import UsageError
from mpjax.inspect._cost import CostReport, cost


def report_for(args: argparse.Namespace) -> CostReport:
  """The report that the flags ask for.

  Raises:
    UsageError: If the case cannot be loaded, or the target's compiler is missing or fails.
  """
  step, *operands = load_case(args.case)
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


def load_case(spec: str) -> tuple[Any, ...]:
  """Calls ``module:function``, which returns a step and its arguments.

  Raises:
    UsageError: If there is no such function, or it returns something else.
  """
  module, colon, function = spec.partition(":")
  if not (module and colon and function):
    raise UsageError(f"CASE must have the form module:function. Got {spec!r}.")
  sys.path.insert(0, os.getcwd())
  try:
    make = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise UsageError(
      f"CASE must name a function that can be imported from here. Got {spec!r}: {error}."
    ) from error
  finally:
    sys.path.pop(0)
  made = make()
  if not isinstance(made, tuple) or len(made) < 2 or not callable(made[0]):
    raise UsageError(
      f"CASE must return a tuple: a step, then its arguments or their shapes. {spec} returned "
      f"{type(made).__name__}."
    )
  return made
