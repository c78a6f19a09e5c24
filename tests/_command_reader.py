"""Gives commands to the parsers that would read them, and nothing more: no command is run.

A script: ``python tests/_command_reader.py COMMANDS``, of which each is the JSON list of the words
behind ``python``. Modules and scripts are run as far as their parser of arguments, pytest as far as
what it collects. It prints what a parser refuses, and ends with status 1 then.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import sys

import pytest


class Read(BaseException):
  """The arguments were read; what the program would do with them does not follow."""


def stop_behind_the_parser():
  """Lets every `ArgumentParser` of this process raise `Read` where it is done."""
  parse_known = argparse.ArgumentParser.parse_known_args
  depth = [0]  # a subcommand has a parser inside of its parser

  def parse(self, *args, **kwargs):
    depth[0] += 1
    try:
      known, unknown = parse_known(self, *args, **kwargs)
    finally:
      depth[0] -= 1
    if depth[0]:
      return known, unknown
    if unknown:
      self.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Read

  argparse.ArgumentParser.parse_known_args = parse


def refused(words):
  """What is wrong with a command; nothing if its parser takes it."""
  heard = io.StringIO()
  with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
    if words[:2] == ["-m", "pytest"]:
      status = pytest.main([*words[2:], "--collect-only", "-qq", "-p", "no:cacheprovider"])
      return "" if status == 0 else f"status {status}: {heard.getvalue()[-1000:]}"
    try:
      if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
      else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    except Read:
      return ""
    except SystemExit as end:
      return "" if not end.code else heard.getvalue()
    except Exception as error:
      return repr(error)
  return "it has no parser, and ran"


if __name__ == "__main__":
  sys.path.insert(0, os.getcwd())
  asked = [json.loads(argument) for argument in sys.argv[1:]]
  if any(words[:2] != ["-m", "pytest"] for words in asked):
    stop_behind_the_parser()  # but not behind pytest's own
  wrong = {" ".join(words): refused(words) for words in asked}
  for command, why in wrong.items():
    if why:
      print(f"python {command}: {why}")
  raise SystemExit(any(wrong.values()))
