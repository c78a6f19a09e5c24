"""Ctrl-C while the command line imports what it needs: heard, answered, never lost.

The first thing that `mpjax` imports, and nothing outside of the command line's own process. An
exception in the middle of an import ends in a page of frames or, where an extension module is being
initialized, as an `ImportError`, or nowhere: the run then goes on.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def is_the_program(argv: list[str], started: list[str]) -> bool:
  """Whether this process is the command line's.

  Args:
    argv: `sys.argv`, whose first word is ``-m`` while Python looks for the module to run.
    started: `sys.orig_argv`, the words that Python was started with.

  Example:
    >>> is_the_program(["-m", "compare"], ["python", "-X", "dev", "-m", "mpjax", "compare"])
    True
    >>> is_the_program(["/usr/bin/mpjax", "compare"], ["python", "/usr/bin/mpjax", "compare"])
    True
    >>> is_the_program(["train.py"], ["python", "train.py"])
    False
  """
  if argv[:1] == ["-m"]:
    return ("-m", "mpjax") in itertools.pairwise(started)
  return bool(argv) and Path(argv[0]).stem == "mpjax" and not argv[0].endswith(".py")


def end(number: int, frame: FrameType | None) -> None:
  """Ends the process at once: in order it would wait for a compiler that is still at work."""
  with contextlib.suppress(Exception):  # a closed pipe, or the middle of a write
    sys.stdout.flush()
  os.write(2, b"mpjax: interrupted\n")
  os._exit(INTERRUPTED)


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
  """Lets a function answer Ctrl-C; only the main thread can say who does, elsewhere it stays."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGINT, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


if is_the_program(sys.argv, sys.orig_argv):
  signal.signal(signal.SIGINT, end)
