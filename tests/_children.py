"""Programs that a test starts in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from _documents import ROOT

_SHARED = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")


def run_python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
  """Runs Python on these arguments, the checkout on its path, JAX's settings a reader's own.

  But for what makes it quick: XLA compiles it as quickly as it compiles the tests, and what these
  or another process compiled before is read.
  """
  kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or k.startswith(_SHARED)}
  settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
  return subprocess.run(
    [sys.executable, *arguments], cwd=cwd, env=kept | settings, capture_output=True, text=True
  )
