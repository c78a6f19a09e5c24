"""Ctrl-C while the command line imports: heard where an import would swallow an exception."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mpjax
from mpjax._core import ctrl_c

ROOT = Path(__file__).resolve().parents[2]
# In the place of JAX: what is being imported swallows exceptions, as extension modules do.
SLOW = """
import sys, time
print("importing", file=sys.stderr, flush=True)
for _ in range(100):
  try:
    time.sleep(1)
  except BaseException:
    pass
"""


@pytest.mark.parametrize("command", [["-m", "mpjax"], ["mpjax"]], ids=["module", "script"])
def test_ctrl_c_during_the_imports_ends_the_process_in_one_line(command, tmp_path):
  (tmp_path / "jax.py").write_text(SLOW)
  (tmp_path / "mpjax").write_text("from mpjax.cli import program\n")  # as pip writes it
  env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
  with subprocess.Popen(
    [sys.executable, *command, "compare"], stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path
  ) as process:
    try:
      assert "importing" in process.stderr.readline()
      process.send_signal(signal.SIGINT)
      said = process.communicate(timeout=60)[1]
    finally:
      process.kill()
  assert (process.returncode, said) == (130, "mpjax: interrupted\n")


def test_a_program_that_imports_mpjax_keeps_its_own_handler():
  assert mpjax.__version__ and signal.getsignal(signal.SIGINT) is not ctrl_c.end
