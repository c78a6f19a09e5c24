"""Reads what flags of the command line are given: numbers, and names of local files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from mpjax._core.arguments import shown


def flag(read: Callable[[str], object]) -> Callable[[str], object]:
  """A reader of a flag's value whose ValueError argparse reports with its own message."""

  def convert(text: str) -> object:
    try:
      return read(text)
    except ValueError as error:
      raise argparse.ArgumentTypeError(str(error)) from error

  return convert


def count(least: int, most: int = 10**9) -> Callable[[str], object]:
  """A reader of whole numbers between two."""

  def read(text: str) -> int:
    digits = text.lstrip("0") or "0"
    known = text.isdecimal() and len(digits) <= len(str(most))
    if not known or not least <= int(digits) <= most:
      raise ValueError(f"must be a whole number of at least {least}, at most {most}. {_got(text)}")
    return int(digits)

  return flag(read)


def _local(text: str) -> Path:
  if re.match(r"[A-Za-z][\w+.-]*://", text):
    raise ValueError(f"must name a local file or folder. {_got(text)} Copy it when it is written.")
  return Path(text)


def _got(text: str) -> str:
  return f"Got {shown(text)}."


local_path = flag(_local)
"""A reader of the names of files and folders, which refuses the addresses of remote ones."""
