"""A progress bar for one training run at a time, on a terminal or in a log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_BAR_WIDTH = 24
_SECONDS_BETWEEN_DRAWS = 0.1
_LINES_IN_A_LOG = 4


class Progress:
  """Shows how far a run is, with its loss, loss scale and skipped steps.

  On a terminal it is one line that is drawn again in place, at most ten times a second; in a
  log or a pipe it is a line at every quarter of the run.

  Args:
    stream: Where to write, as a rule ``sys.stderr``.
    label_width: The width of the longest label, to line up the bars of several runs.
  """

  def __init__(self, stream: TextIO, label_width: int = 0) -> None:
    self._stream = stream
    self._label_width = label_width
    self._label = ""
    self._total = 0
    self._began = self._drawn = 0.0
    self._first: int | None = None

  @contextmanager
  def run(self, label: str, total: int) -> Iterator[None]:
    """Opens the line of a run of ``total`` steps, and closes it however the run ends."""
    self._label, self._total, self._first = label, total, None
    self._began = time.monotonic()
    self._drawn = 0.0
    if self._stream.isatty():
      self._write(f"{label:<{self._label_width}}  compiling")
    try:
      yield
    finally:
      if self._stream.isatty():
        self._stream.write("\n")
        self._stream.flush()

  def update(self, done: int, loss: float, scale: float, skipped: int) -> None:
    """Shows the state after ``done`` steps, if it is time to."""
    now = time.monotonic()
    if self._first is None:
      self._first, self._began = done, now
    if self._is_due(done, now):
      self._drawn = now
      self._write(
        f"{self._label:<{self._label_width}}  {self._bar(done)} {done}/{self._total}"
        f"  loss {loss:.4f}  scale {scale:.8g}  skips {skipped}  {self._clock(done, now)}"
      )

  def _is_due(self, done: int, now: float) -> bool:
    if done == self._total:
      return True
    if self._stream.isatty():
      return now - self._drawn >= _SECONDS_BETWEEN_DRAWS
    return done * _LINES_IN_A_LOG // self._total > (done - 1) * _LINES_IN_A_LOG // self._total

  def _bar(self, done: int) -> str:
    filled = done * _BAR_WIDTH // self._total
    return f"[{'#' * filled}{'-' * (_BAR_WIDTH - filled)}]"

  def _clock(self, done: int, now: float) -> str:
    taken = done - (self._first or 0)
    left = (now - self._began) / taken * (self._total - done) if taken else 0.0
    return f"{left:.0f} s left" if done < self._total else f"{now - self._began:.0f} s"

  def _write(self, line: str) -> None:
    if self._stream.isatty():
      width = shutil.get_terminal_size().columns - 1
      self._stream.write(f"\r{line[:width]:<{width}}")
    else:
      self._stream.write(f"{line}\n")
    self._stream.flush()
