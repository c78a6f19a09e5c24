"""Work in another thread, so that Ctrl-C is heard while a compiler is at it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_SECONDS_TO_HEAR_CTRL_C = 0.2

Result = TypeVar("Result")


def elsewhere(work: Callable[[], Result], check: Callable[[], None] = lambda: None) -> Result:
  """Works in another thread while this one waits, and hears signals.

  Python hears them between its own instructions only: tracing and compiling may be minutes of
  one instruction, and an exception out of the middle of them has crashed the interpreter as it
  ended (jaxlib 0.10.2). JAX's settings of this thread alone do not hold in the other.

  Args:
    work: What to do.
    check: Raises where there is no more need to wait; asked several times a second.

  Returns:
    What ``work`` returns.

  Raises:
    BaseException: What ``work`` raises; or ``check``, or Ctrl-C here: the work is then left behind,
      and a process that must end does so by `os._exit`.

  Example:
    >>> elsewhere(lambda: 6 * 7)
    42
  """
  future: Future[Result] = Future()

  def run() -> None:
    try:
      future.set_result(work())
    except BaseException as error:  # raised again where the result is asked for
      future.set_exception(error)

  threading.Thread(target=run, name="mpjax-elsewhere", daemon=True).start()
  while not wait([future], timeout=_SECONDS_TO_HEAR_CTRL_C).done:
    check()
  return future.result()
