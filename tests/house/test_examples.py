"""The examples run as their first lines say; several processes end with the same numbers.

They are `ci`: `tests/_train/test_sharding.py` holds the steps that they run, in one process.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # an example that hangs is killed; none takes a tenth of it


def start(name, *arguments):
  inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  return subprocess.Popen(
    [sys.executable, str(ROOT / "examples" / name), *arguments],
    env=inherited | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def outputs(processes):
  """What processes print; all of them are killed if one fails or hangs."""
  try:
    texts = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)
    return texts
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


@pytest.mark.ci
def test_parameters_lie_sharded_over_both_axes_of_a_mesh_and_train():
  (text,) = outputs([start("fsdp.py", "--model-axis", "2")])
  held, whole = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:of|bytes)", text))
  assert held < whole / 3
  losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
  assert losses[0] > 4.5 and losses[-1] < losses[0] / 2
  assert re.search(r"float32\[64, 256\] sharded P\w*\('data', 'model'\)", text)


@pytest.mark.ci
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"])
def test_processes_end_with_the_same_state_though_one_meets_nan(count):
  shared = ("--address", f"localhost:{free_port()}", "--processes", str(count), "--fault", "1")
  texts = outputs([start("distributed.py", *shared, "--process", str(n)) for n in range(count)])
  lines = [line for text in texts for line in text.splitlines() if line.startswith("process ")]
  assert sorted(line.split()[1] for line in lines) == [str(n) for n in range(count)]
  (result,) = {line.split(": ")[1] for line in lines}
  assert "skipped 5," in result
  loss = float(re.search(r"loss ([\d.]+)", result)[1])
  assert loss < 15  # it begins at 32, the variance of a sum of 32 numbers
