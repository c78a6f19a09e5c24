"""A progress bar for one training run at a time, on a terminal or in a log."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_WIDEST_BAR, _NARROWEST_BAR = 40, 6
_SECONDS_BETWEEN_DRAWS = 0.1
_LINES_IN_A_LOG = 4
# How often the clock of a compilation is drawn: in place on a terminal, a line in a log.
_TICK, _TICK_IN_A_LOG = 1.0, 10.0


class Progress:
  """Shows how far a run is, with its loss, loss scale and skipped steps.

  On a terminal it is one line that is drawn again in place, at most ten times a second, as wide as
  the terminal allows; in a log or a pipe it is a line at every quarter of the run. Until the first
  step is done a clock shows that the compiler is at work.

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
    self._compiled = threading.Event()
    self._writing = threading.Lock()

  @contextmanager
  def run(self, label: str, total: int) -> Iterator[None]:
    """Opens the line of a run of ``total`` steps, and closes it however the run ends."""
    self._label, self._total, self._first = label, total, None
    self._began = time.monotonic()
    self._drawn = 0.0
    self._compiled.clear()
    self._write(f"{label:<{self._label_width}}  compiling")
    clock = threading.Thread(target=self._tick, name="mpjax-clock", daemon=True)
    clock.start()
    try:
      yield
    finally:
      self._compiled.set()
      clock.join()
      if self._stream.isatty():
        self._stream.write("\n")
        self._stream.flush()

  def update(self, done: int, loss: float, scale: float, skipped: int) -> None:
    """Shows the state after ``done`` steps, if it is time to."""
    self._compiled.set()
    now = time.monotonic()
    if self._first is None:
      self._first, self._began = done, now
    if self._is_due(done, now):
      self._drawn = now
      before = f"{self._label:<{self._label_width}}  "
      after = (
        f" {done}/{self._total}  loss {loss:.4f}  scale {scale:.8g}  skips {skipped}"
        f"  {self._clock(done, now)}"
      )
      self._write(before + self._bar(done, self._room() - len(before) - len(after)) + after)

  def say(self, message: str) -> None:
    """Writes a line of its own, below the bar."""
    self._stream.write(f"\n{message}\n" if self._stream.isatty() else f"{message}\n")
    self._stream.flush()

  def _tick(self) -> None:
    """Draws the clock of the compilation until the first step is done."""
    every = _TICK if self._stream.isatty() else _TICK_IN_A_LOG
    began = time.monotonic()
    while not self._compiled.wait(every):
      self._write(
        f"{self._label:<{self._label_width}}  compiling, {time.monotonic() - began:.0f} s"
      )

  def _is_due(self, done: int, now: float) -> bool:
    if done == self._total:
      return True
    if self._stream.isatty():
      return now - self._drawn >= _SECONDS_BETWEEN_DRAWS
    return done * _LINES_IN_A_LOG // self._total > (done - 1) * _LINES_IN_A_LOG // self._total

  def _room(self) -> int:
    """The columns of a line, the last one left free: a terminal may wrap behind it."""
    return shutil.get_terminal_size().columns - 1

  def _bar(self, done: int, room: int) -> str:
    """The bar in at most so many columns; nothing where it would be too short to read."""
    width = min(room - 2, _WIDEST_BAR)
    if width < _NARROWEST_BAR:
      return ""
    filled = done * width // self._total
    return f"[{'#' * filled}{'-' * (width - filled)}]"

  def _clock(self, done: int, now: float) -> str:
    taken = done - (self._first or 0)
    left = (now - self._began) / taken * (self._total - done) if taken else 0.0
    return f"{left:.0f} s left" if done < self._total else f"{now - self._began:.0f} s"

  def _write(self, line: str) -> None:
    with self._writing:
      if self._stream.isatty():
        width = self._room()
        self._stream.write(f"\r{line[:width]:<{width}}")
      else:
        self._stream.write(f"{line}\n")
      self._stream.flush()
