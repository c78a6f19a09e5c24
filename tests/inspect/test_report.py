"""Reports: what they print, show and export."""

import enum
import gc
import json
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax.inspect
from mpjax.inspect._report import Report, Table


class Color(enum.IntEnum):
  RED = 1


@dataclass(frozen=True)
class Row:
  path: str
  dtype: np.dtype
  bytes: dict
  worst: float


@dataclass(frozen=True, repr=False)
class Example(Report):
  rows: tuple[Row, ...]
  color: Color = Color.RED

  @property
  def summary(self):
    return "a < b & c"

  def tables(self):
    cells = [[row.path, row.dtype.name, f"{row.worst:g}"] for row in self.rows]
    return [Table(["module", "dtype", "worst"], cells, align="<<>", title="T", notes=["n"])]


@pytest.fixture
def report():
  return Example(
    (
      Row("<script>", np.dtype(jnp.bfloat16), {"f32": np.int64(3)}, np.float32(0.5)),
      Row("head", np.dtype("float32"), {"f32": 4}, math.inf),
    )
  )


def test_a_report_prints_its_summary_and_aligned_tables(report):
  assert str(report).splitlines() == [
    "a < b & c",
    "",
    "T",
    "module    dtype     worst",
    "<script>  bfloat16    0.5",
    "head      float32     inf",
    "",
    "n",
  ]
  assert repr(report) == str(report)


def test_html_is_escaped_and_has_no_script(report):
  text = report._repr_html_()
  assert "<script" not in text and "&lt;script&gt;" in text and "a &lt; b &amp; c" in text
  assert text.count("<tr>") == 3
  assert '<td style="text-align:right">inf</td>' in text


def test_rows_are_flat_dicts_of_plain_values(report):
  rows = report.to_rows()
  assert rows[0] == {"path": "<script>", "dtype": "bfloat16", "bytes.f32": 3, "worst": 0.5}
  assert {type(value) for row in rows for value in row.values()} == {str, int, float}


def test_json_is_strict_and_names_what_is_no_number(report):
  def refuse(name):
    raise AssertionError(name)

  loaded = json.loads(report.to_json(), parse_constant=refuse)
  assert loaded["summary"] == report.summary and loaded["color"] == "red"
  assert [row["worst"] for row in loaded["rows"]] == [0.5, "Infinity"]
  assert report.to_dict()["rows"][1]["worst"] == math.inf


def test_a_table_without_rows_still_has_its_header():
  assert str(Table(["a", "b"], [])) == "a  b"


def test_reports_are_not_made_of_something_else():
  gradients = {"w": jnp.ones(3)}
  with pytest.raises(
    TypeError, match=r"reads a histogram. Got dict. Count one: mpjax.inspect.hist"
  ):
    mpjax.inspect.range_report(gradients, "float16")
  with pytest.raises(TypeError, match=r"Got dict. Pass mpjax.inspect.statistics\(opt_state\)"):
    mpjax.inspect.update_report(gradients)


POLICY = "mixed_bfloat16"
TOOLS = {
  "explain": lambda fn, *args: mpjax.inspect.explain(fn, POLICY, *args),
  "gradient": lambda fn, *args: mpjax.inspect.explain(fn, POLICY, *args, grad=True),
  "check": lambda fn, *args: mpjax.inspect.check(fn, POLICY, *args),
  "locate": lambda fn, *args: mpjax.inspect.locate_nonfinite(fn, *args, policy=POLICY),
  "record": lambda fn, *args: mpjax.inspect.record(fn, POLICY)(*args)[1],
  "cost": lambda fn, *args: mpjax.inspect.cost(fn, *args, policies=[POLICY]),
  "tune": lambda fn, *args: mpjax.inspect.tune(fn, args, candidates=[POLICY]),
}


@pytest.fixture
def few_objects():
  """JAX collects garbage to find leaks: it need not look at what other tests left."""
  gc.freeze()


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_report_leaves_nothing_of_a_trace_behind(tool):
  def loss(params, x):
    return jnp.mean(jax.nn.relu(x @ params["w"]) ** 2)

  args = {"w": jnp.eye(4)}, jnp.ones((2, 4))
  with jax.checking_leaks():
    report = tool(loss, *args)
  assert report is not None
