"""Work in another thread: what it returns, what it raises, and that it can be left behind."""

import threading

import pytest

from mpjax._demo.elsewhere import elsewhere


def test_it_returns_and_raises_what_the_work_does_in_another_thread():
  assert elsewhere(threading.current_thread) is not threading.current_thread()
  with pytest.raises(ZeroDivisionError):
    elsewhere(lambda: 1 / 0)


def test_work_that_nobody_waits_for_any_more_is_left_behind():
  released = threading.Event()

  def check():
    raise KeyboardInterrupt

  try:
    with pytest.raises(KeyboardInterrupt):
      elsewhere(lambda: released.wait(60), check)
  finally:
    released.set()
