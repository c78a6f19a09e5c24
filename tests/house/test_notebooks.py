"""What `.ci/notebooks.py` takes for the same output; to execute them it needs more packages."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpjax.plot import _axes

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci" / "notebooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ("now", "committed", "same"),
  [
    ("accuracy 0.983", "accuracy 0.978", True),
    ("error 3.9e-05", "error 8.1e-05", True),
    ("error 0.39", "error 0.81", False),
    ("26 of 26 matmuls", "25 of 26 matmuls", False),
    ("4,162,568 -> 3,703,816 bytes", "4,162,570 -> 3,703,810 bytes", True),
    ("4,162,568 bytes", "2,162,568 bytes", False),
    ("scale 2^-11", "scale 2^-10", False),
    ("bf16[2,4] f16[3]", "bf16[2,4] f16[4]", False),
    ("mixed_bfloat16", "mixed_float16", False),
    ("a   b\n", "a b", True),
    ("\x1b[34;1mlambda\x1b[39m a", "lambda a", True),
    ("nan", "1.0", False),
    ("-2268 to 1910", "-2270 to 1908", True),
  ],
)
def test_words_and_small_whole_numbers_must_agree_and_others_nearly(script, now, committed, same):
  assert script.agree(now, committed) is same


def cell(*shown):
  return SimpleNamespace(cells=[{"outputs": list(shown)}])


def test_what_is_printed_counts_as_one_text_and_a_picture_must_stay_one(script):
  printed = [{"output_type": "stream", "text": text} for text in ("one\n", "two\n")]
  whole = {"output_type": "stream", "text": "one\ntwo\n"}
  picture = {"output_type": "display_data", "data": {"image/png": "", "text/plain": "<Figure>"}}
  assert not list(script.differences(cell(*printed, picture), cell(whole, picture)))
  assert list(script.differences(cell(*printed), cell(whole, picture)))
  (line,) = script.differences(cell(whole), cell({**whole, "text": "one\nthree\n"}))
  assert "-three" in line and "+two" in line


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(source):
  cells = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
  assert any(cell.get("outputs") for cell in cells)
  kinds = [out["output_type"] for cell in cells for out in cell.get("outputs", [])]
  assert "error" not in kinds


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda source: source.stem[:2])
def test_what_a_notebook_draws_by_itself_has_a_color_of_the_palette(source):
  palette = {color.upper() for color in (*_axes.SERIES, _axes.GREY)}
  text = source.read_text()
  drawn = re.findall(r"\bax\w*\.(?:plot|loglog|semilog[xy]|bar|barh|scatter|step)\((.*)\)", text)
  assert all("color=" in arguments for arguments in drawn)
  assert {color.upper() for color in re.findall(r"#[0-9a-fA-F]{6}\b", text)} <= palette
