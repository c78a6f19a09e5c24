"""Memory and cost as compilers state them, here and for devices that are not there."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import mpjax
from mpjax import inspect
from mpjax.cli import main
from mpjax.inspect._compiled_text import float8_calls
from mpjax.inspect._cost import read_text
from mpjax.inspect._float8 import float8_work
from mpjax.inspect._target_compiler import read_figures
from mpjax.inspect._targets import (
  TARGETS,
  Target,
  card_here,
  check_installed,
  compile_for,
  read_target,
)

F32 = jnp.float32


def loss(params, x):
  return jnp.mean(jnp.square(jnp.tanh(x @ params["w"])))


def shapes():
  params = {"w": jax.ShapeDtypeStruct((16, 16), F32)}
  return params, jax.ShapeDtypeStruct((4, 16), F32)


def test_a_step_is_compiled_under_each_policy_from_shapes_alone():
  report = inspect.cost(loss, *shapes(), policies={"plain": "float32", "low": "mixed_bfloat16"})
  assert [row.policy for row in report.rows] == ["plain", "low"]
  row = report.rows[0]
  assert row.argument_bytes == 4 * (16 * 16 + 4 * 16) and row.output_bytes == 4
  assert row.flops >= 2 * 4 * 16 * 16 and row.bytes_moved and row.error is None
  assert report.memory_bytes is None and report.fits(row) is None
  assert report.summary.startswith("On cpu: plain needs") and "of plain" in report.summary
  assert json.loads(report.to_json())["rows"][0]["argument_bytes"] == row.argument_bytes


def test_a_step_with_a_parameter_policy_applies_it_by_itself_and_donated_memory_counts_once():
  seen = []

  def step(params, x, policy):
    seen.append(policy)
    grads = jax.grad(mpjax.autocast(loss, policy))(params, x)
    return jax.tree.map(lambda p, g: p - g, params, grads)

  (row,) = inspect.cost(step, *shapes(), policies="mixed_bfloat16", donate_argnums=0).rows
  assert set(seen) == {"mixed_bfloat16"}
  assert row.alias_bytes == row.output_bytes == 4 * 16 * 16
  assert row.peak_bytes == row.argument_bytes + row.temp_bytes


def test_a_policy_inside_is_named_for_it_is_the_same_in_every_row():
  model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
  policed = mpjax.apply_policy(model, "mixed_bfloat16")

  def step(params, x):
    del params
    return jnp.sum(policed(x))

  report = inspect.cost(step, *shapes())
  assert report.inside == "a model that an argument or the function holds"
  head = mpjax.autocast(loss, "mixed_bfloat16")
  assert "test_cost.py" in inspect.cost(lambda p, x: head(p, x) + jnp.sum(p["w"]), *shapes()).inside
  assert "Not compared is what has its own policy" in report.summary
  assert "give the step of the plain model" in str(report)
  plain = inspect.cost(lambda params, x: jnp.sum(model(x)), *shapes())
  own = inspect.cost(lambda p, x, policy: mpjax.autocast(loss, policy)(p, x), *shapes())
  assert plain.inside is own.inside is None


def test_a_compiler_that_states_no_flops_leaves_those_of_the_lowered_program_marked():
  lowered = jax.jit(lambda w, x: x @ w).lower(jnp.ones((16, 16)), jnp.ones((4, 16)))
  says_nothing = dict.fromkeys(["memory_analysis", "cost_analysis", "as_text"], lambda: None)
  figures = read_figures(SimpleNamespace(**says_nothing), lambda: lowered)
  assert figures["flops"] == 2 * 4 * 16 * 16 and figures["flops_lowered"]
  assert figures["bytes_moved"] is None
  (row,) = inspect.cost(loss, *shapes(), policies="float32").rows
  assert not row.flops_lowered
  report = inspect.CostReport("gpu:h100", None, (row._replace(flops=2e9, flops_lowered=True),))
  assert "2.00~" in str(report) and "~: of the program before it is compiled" in str(report)


def test_a_report_shows_the_estimated_time_and_what_it_leaves_out():
  (row,) = inspect.cost(loss, *shapes(), policies="float32").rows
  assert row.estimated_seconds is row.estimated_cycles is None
  low = row._replace(policy="low", estimated_seconds=2e-3, unknown_kernels=3)
  rows = (row._replace(estimated_seconds=4e-3), low)
  shown = str(inspect.CostReport("gpu:h100", None, rows))
  assert re.search(r"policy +ms +to float32\n.*\nlow +2.00 +0.50", shown)
  assert "low: 3 kernels count with their bytes alone." in shown
  rows = row._replace(estimated_cycles=4e6), row._replace(policy="low", error="too large")
  shown = str(inspect.CostReport("tpu:v5e", None, rows))
  assert re.search(r"policy +Mcycles +to float32\nfloat32 +4.00 +1.00\nlow +- +-", shown)
  assert max(map(len, shown.split("Estimated time")[1].splitlines()[:4])) <= 80


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB", "cpu"])
def test_the_card_that_is_present_is_known_by_its_name(name):
  card = card_here(name)
  assert (card is None) == (name == "cpu")
  assert card is None or card.peaks["f16"] == (989.5e12 if "H100" in name else 125e12)


def test_a_gpu_whose_data_sheet_is_not_known_states_all_but_the_time():
  x = jnp.ones((8, 8))
  text = jax.jit(lambda x, y: x @ y).lower(x, x).compile().as_text()
  assert card_here("NVIDIA H200") is None
  found = read_text(text, is_gpu=True, card=None)
  assert found == {"bytes_moved": 3 * 8 * 8 * 4, "float8_calls": (0, 0)}
  assert read_text(text, is_gpu=False, card=None) == {"estimated_cycles": None}
  known = read_text(text, is_gpu=True, card=card_here("NVIDIA H100"))
  assert known["bytes_moved"] == found["bytes_moved"] and known["estimated_seconds"] > 0


def wide(params, x, policy):
  def loss(params, x):
    h = jax.nn.relu(x @ params["body"]) @ params["body"]
    return -jnp.mean(jax.nn.log_softmax(h @ params["head"])[:, 0])

  return jax.grad(mpjax.autocast(loss, policy))(params, x)


def test_what_multiplies_in_float8_is_counted_and_what_is_too_small_to_gain():
  for width, small in ((64, 5), (8192, 0)):
    shapes = {"body": (width, width), "head": (width, 8)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    x = jax.ShapeDtypeStruct((width, width), jnp.float32)
    work = float8_work(jax.make_jaxpr(lambda p, x: wide(p, x, "mixed_float8"))(params, x))
    assert (work.matmuls, work.small) == (5, small), "forward twice, its weights' and one input's"
    assert work.flops == 5 * 2 * width**3
    assert work.rounded_bytes >= 5 * width**2
    assert 0.9 < work.share <= 1


@pytest.mark.ci
def test_a_report_says_what_multiplies_in_float8():
  params = {"body": jnp.ones((8, 8)), "head": jnp.ones((8, 4))}
  report = inspect.cost(wide, params, jnp.ones((2, 8)), policies=("mixed_bfloat16", "mixed_float8"))
  assert report.rows[0].float8 is None
  assert report.rows[1].float8.matmuls == 5
  assert "mixed_float8" not in report.summary or report.rows[1].float8_calls is None
  assert "5 matmuls with 77% of the FLOP in float8" in str(report)
  row = report.rows[1]._replace(policy="mixed_float8", float8_calls=(3, 2))
  turned = dataclasses.replace(report, rows=(row,))
  assert "compiled, they are 3 float8 calls, and 2 of their operands are made 16-bit again" in str(
    turned
  )


def test_the_compiler_of_an_h100_turns_no_planned_float8_matmul_back():
  pytest.importorskip("jax_plugins.xla_cuda12", reason='needs pip install "jax[cuda12]"')
  pytest.importorskip("flatbuffers")
  shapes = {"body": (256, 256), "head": (256, 64)}
  params = {name: jax.ShapeDtypeStruct(shape, F32) for name, shape in shapes.items()}
  x = jax.ShapeDtypeStruct((128, 256), F32)
  report = inspect.cost(wide, params, x, policies=("mixed_float8",), target="gpu:h100")
  (row,) = report.rows
  assert row.float8_calls == (row.float8.matmuls, 0)


PROGRAM = """
%gemm_fusion (param_0: f8e5m2[8,16], param_1: f8e4m3fn[4,16]) -> bf16[8,4] {
  %param_0 = f8e5m2[8,16]{1,0} parameter(0)
  %param_1 = f8e4m3fn[4,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}
}
%gemm_fusion.1 (param_2: f8e5m2[8,16], param_3: f8e4m3fn[4,16]) -> bf16[8,4] {
  %param_2 = f8e5m2[8,16]{1,0} parameter(0)
  %convert.1 = bf16[8,16]{1,0} convert(%param_2)
  %param_3 = bf16[4,16]{1,0} parameter(1)
  ROOT %dot.2 = bf16[8,4]{1,0} dot(%convert.1, %param_3), lhs_contracting_dims={1}
}
ENTRY %main () -> bf16[8,4] {
  %gemm.7 = bf16[8,4]{1,0} custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8"
  %gemm.8 = bf16[8,4]{1,0} custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
}
"""


def test_a_matmul_that_a_compiler_turned_back_into_16_bits_is_no_float8_call():
  assert float8_calls(PROGRAM) == (2, 1)


def test_what_an_nnx_train_step_changes_in_its_arguments_is_part_of_the_cost():
  model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

  def step(model, optimizer, x):
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(jnp.square(m(x))))(model))

  (row,) = inspect.cost(step, model, optimizer, jnp.ones((4, 16)), policies=["float32"]).rows
  held = 4 * (16 * 16 + 16) * 2  # the parameters and their momentum
  assert row.output_bytes >= held and row.flops > 3 * 2 * 4 * 16 * 16 / 2


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_described_and_says_what_to_install(target, monkeypatch):
  described = read_target(target)
  assert described.memory >= 16 * 2**30
  assert ("device_memory_size" in described.config) == target.startswith("gpu:")
  monkeypatch.setattr("mpjax.inspect._targets._has", lambda module: module == "flatbuffers")
  extra = r"jax\[cuda12\]" if target.startswith("gpu:") else r"jax\[tpu\]"
  with pytest.raises(
    ModuleNotFoundError, match=rf'{target} needs .*pip install "{extra}".*python='
  ):
    inspect.cost(loss, *shapes(), target=target)
  check_installed(described, "another/python")  # which finds out by itself


@pytest.mark.parametrize("donated", [2, -3, (0, 5)])
def test_an_argument_to_donate_that_is_not_there_is_refused(donated):
  with pytest.raises(ValueError, match="positions of the step's 2 arguments"):
    inspect.cost(lambda w, x: w @ x, jnp.ones((2, 2)), jnp.ones(2), donate_argnums=donated)


def test_an_unknown_target_lists_those_known():
  with pytest.raises(ValueError, match=r"one of gpu:a100.*tpu:v6e\. Got 'gpu:b200'"):
    inspect.cost(loss, *shapes(), target="gpu:b200")
  with pytest.raises(ValueError, match="at least one policy"):
    inspect.cost(loss, *shapes(), policies=[])


def test_another_process_compiles_what_was_exported():
  pytest.importorskip("flatbuffers")
  here = Target("cpu", "cpu", "cpu", {}, 2**30)
  exported = jax.export.export(jax.jit(lambda x: x @ x))(jax.ShapeDtypeStruct((32, 32), F32))
  (figures,) = compile_for(here, [bytes(exported.serialize())], [], sys.executable)
  assert figures["argument_bytes"] == figures["output_bytes"] == 4 * 32 * 32
  assert figures["error"] is None and figures["compile_seconds"] > 0


def test_a_compiler_that_fails_says_what_it_said():
  missing = Target("nowhere", "cuda", "nowhere", {}, 2**30)
  with pytest.raises(RuntimeError, match=r"nowhere must end without an error(.|\n)*Error"):
    compile_for(missing, [b"no program"], [], None)


def test_a_step_that_a_compiler_finds_too_large_does_not_fit():
  row = inspect.cost(loss, *shapes(), policies=["float32"]).rows[0]
  refused = type(row)("float32", *[None] * 6, 1.0, "RESOURCE_EXHAUSTED: 40.06G of 15.75G")
  report = inspect.CostReport("tpu:v5e", 16 * 2**30, (row, refused))
  assert [report.fits(r) for r in report.rows] == [True, False]
  assert "which fits; float32 does not fit." in report.summary and "40.06G" in str(report)


# The command line -----------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path, monkeypatch):
  """A module with cases, in the present directory."""
  (tmp_path / "cost_case.py").write_text(
    "import jax, jax.numpy as jnp\n"
    "def step(w, x): return jnp.mean(x @ w)\n"
    "def make(): return step, jax.ShapeDtypeStruct((8, 8), 'float32'), jnp.ones((2, 8))\n"
    "def wrong(): return step\n"
    "def fails(): raise KeyError('a\\nb')\n"
    "def ends(): raise SystemExit(0)\n"
    "def mismatched(): return step, jnp.ones((8, 8)), jnp.ones((2, 3))\n"
    "number = 3\n"
  )
  (tmp_path / "cut_off.py").write_text("def make(:\n")
  (tmp_path / "raises.py").write_text("1 / 0\n")
  monkeypatch.chdir(tmp_path)
  yield tmp_path
  sys.modules.pop("cost_case", None)


def test_the_command_prints_the_table_and_writes_its_rows(case, capsys):
  assert main(["cost", "cost_case:make", "--policies", "float32", "--json", "rows.json"]) == 0
  assert capsys.readouterr().out.startswith("On cpu: float32 needs")
  (row,) = json.loads((case / "rows.json").read_text())
  assert row["argument_bytes"] == 4 * (64 + 16)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["cost_case"], "CASE must have the form module:function. Got 'cost_case'"),
    (["nowhere:make"], "can be imported from here. Got 'nowhere:make'"),
    (["cost_case:wrong"], "CASE must return a tuple"),
    (["cost_case:make", "--target", "gpu:h100"], 'pip install "jax[cuda12]" flatbuffers'),
    (["cut_off:make"], "SyntaxError"),
    (["raises:make"], "ZeroDivisionError: division by zero (raises.py:1)"),
    (["cost_case:number"], "CASE must name a function. 'cost_case:number' is int"),
    (["cost_case:" + "x" * 5000], "has no attribute"),
    (["x" * 5000 + ":make"], "can be imported from here"),
    (["cost_case:fails"], "runs without arguments. 'cost_case:fails' raised: KeyError"),
    (["cost_case:ends"], "raised: SystemExit"),
    (["cost_case:mismatched"], "must compile. TypeError"),
    (["cost_case:make", "--donate", "2"], "--donate must be the position of an argument"),
    (["cost_case:make", "--python", "python3"], "Name a target too"),
    (["cost_case:make", "--target", "gpu:h100", "--python", "/no/python"], "can be run"),
    (["cost_case:make", "--target", "gpu:h100", "--python", "."], "can be run"),
  ],
)
def test_what_a_person_can_put_right_is_one_line_and_status_2(
  case, capsys, monkeypatch, arguments, words
):
  monkeypatch.setattr("mpjax.inspect._targets._has", lambda module: False)
  assert main(["cost", *arguments]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1
