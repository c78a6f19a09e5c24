"""Every benchmark's smallest case runs, and its rows have the columns that its table shows.

Nothing is timed, and no figure is asserted but those that follow from counting. Most of it is `ci`:
what the benchmarks measure of mpjax, its own tests hold.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import gpu, gpu_cell, harness, meters, models, report, workloads
from benchmarks.own import convergence, float8_rows, rounding
from benchmarks.peers import compositions, flops, laws, peers
from mpjax.inspect._float8 import float8_work

pytestmark = pytest.mark.usefixtures("loose")


@pytest.fixture
def loose():
  """The benchmarked models mix ranks and dtypes, as models do."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def test_no_table_needs_one_of_the_other_folder_but_that_of_a_gpu():
  for file in report.RESULTS.parent.rglob("*.py"):
    needed = set(re.findall(r"^ *from benchmarks\.(own|peers) import", file.read_text(), re.M))
    of_a_gpu = file.name in ("gpu.py", "gpu_cell.py", "torch_cell.py")
    assert of_a_gpu or needed <= {file.parent.name}, file


def traced(peer: str, workload: workloads.Workload, policy: str):
  training = peers.PEERS[peer].build(workload, policy, optax.adamw(1e-3), harness.Scaling())
  state = jax.eval_shape(training.init, jax.random.key(0), workload.inputs)
  return training.step, (state, workload.inputs, workload.labels)


INSTALLED = [peer.name for peer in peers.ALL if peers.installed(peer)]


@pytest.mark.quick(every=6)
@pytest.mark.parametrize("name", INSTALLED)
def test_a_peer_hands_back_the_state_that_it_was_given(name):
  policy = peers.PEERS[name].policies[-1]
  step, arguments = traced(name, workloads.TINY["gpt"](), policy)
  state, loss = jax.eval_shape(step, *arguments)
  before, after = (
    [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one)] for one in (arguments[0], state)
  )
  assert before == after
  assert loss.dtype == jnp.float32


@pytest.mark.quick("resnet", "float8")
@pytest.mark.parametrize("name", [n for n in workloads.TINY if n != "gpt"])
def test_every_model_runs_its_matmuls_in_16_bits_under_the_policy(name):
  step, arguments = traced(peers.INSIDE, workloads.TINY[name](), "mixed_bfloat16")
  assert flops.low_share(flops.contractions(step, *arguments)) == 1


def test_every_workload_goes_by_one_name():
  named = [*workloads.FULL.items(), *workloads.TINY.items()]
  assert [name for name, make in named] == [make().name for name, make in named]
  assert len(dict(named)) == len(named)


def test_of_branches_by_platform_one_counts():
  def fn(x):
    return jax.lax.platform_dependent(x, cuda=lambda x: (x @ x) * 1, default=lambda x: x @ x)

  assert flops.contractions(fn, jnp.ones((4, 4))).total() == 2 * 4**3


def test_operations_are_counted_as_in_the_textbook():
  def fn(x, kernel, w):
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.lax.scan(lambda c, _: (c @ w, None), y.reshape(2, 4), None, length=3)[0]

  shapes = [(2, 3, 3, 5), (2, 2, 5, 1), (4, 4)]
  found = flops.contractions(fn, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
  assert found == {"float32": 2 * (2 * 2 * 2) * (2 * 2 * 5) + 3 * 2 * (2 * 4 * 4)}


def test_a_poisoned_batch_makes_a_loss_that_is_not_finite():
  workload = workloads.PROBES["embedding"]
  inputs, labels = workloads.batch_of(workload)
  training = harness.float32(workload, "float32", optax.sgd(0.1), harness.Scaling())
  state = jax.jit(training.init)(jax.random.key(0), inputs)
  _, loss = jax.jit(training.step)(state, workloads.poisoned(inputs), labels)
  assert not jnp.isfinite(loss)


def test_the_parameters_workload_has_its_input_as_gradient():
  workload = workloads.FULL["optimizer-1m"]()._replace(
    inputs=jax.ShapeDtypeStruct((2, 3), jnp.float32)
  )
  assert workload.model is models.Parameters
  model = harness.linen(workload)
  x = jnp.arange(6.0).reshape(2, 3)
  params, model_state = model.init(jax.random.key(0), x)
  grads, _ = jax.grad(harness.loss_of(workload, model), has_aux=True)(
    params, model_state, x, jnp.zeros(1)
  )
  np.testing.assert_array_equal(jnp.stack([grads["w0"], grads["w1"]]), x)


def test_the_cells_of_the_gpu_table_are_distinct_and_lead_with_the_main_peers():
  cells = gpu.cells(["gpt", "resnet"], 1)
  keys = [tuple(cell[name] for name in gpu.KEY) for cell in cells]
  assert len(set(keys)) == len(keys)
  assert {cell["peer"] for cell in cells[:6]} >= {peers.FLOAT32, peers.BY_HAND, peers.INSIDE}


@pytest.mark.ci
def test_a_cell_of_the_gpu_table_has_its_columns():
  cell = {"kind": "fixed", "workload": "gpt", "batch": 1, "peer": peers.INSIDE}
  cell |= {"policy": "mixed_bfloat16", "precision": "default", "seconds": 0}
  row = gpu.shown({**cell, "error": None, **gpu_cell.KINDS["fixed"](cell)})
  assert set(gpu.COLUMNS) <= set(row)
  assert row["steps"] == meters.GROUPS
  assert np.isfinite(row["loss"])


@pytest.mark.ci
@pytest.mark.parametrize(
  ("name", "size"),
  [("float32", 12), ("bfloat16, Kahan", 12), ("bfloat16 and states stochastic", 6)],
)
def test_a_row_of_the_rounding_table_holds_the_bytes_that_it_names(name, size, monkeypatch):
  picture, digit = np.ones((8, 64), np.float32), np.zeros(8, np.int32)
  monkeypatch.setattr(convergence, "pictures", lambda: (picture, digit, np.arange(8) % 2 == 0))
  (run,) = rounding.train(convergence.digits(10), name, [0], 10)
  assert round(run.held, 1) == size and np.isfinite(run.loss)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")  # a row of what it was
def test_every_float8_row_multiplies_the_same_matmuls_in_float8():
  workload = workloads.language("text", models.Transformer, 2, 8, 16, layers=1, width=16, heads=2)
  found = {}
  for name in set(float8_rows.ROWS) - {"Qwix"}:  # which is there where it is installed
    model, loss_fn = float8_rows.ROWS[name](workload)
    params, scales = jax.eval_shape(model.init, jax.random.key(0), workload.inputs)
    step = float8_rows.step_of(loss_fn, tx := optax.sgd(0.1))
    shapes = (params, scales, tx.init(params), workload.inputs, workload.labels)
    found[name] = float8_work(jax.make_jaxpr(step)(*shapes)).matmuls
  assert found["mixed_float8"] == found["Flax, delayed scaling"] == 18, "six layers, three each"
  assert found["bfloat16 by hand"] == found["mixed_bfloat16"] == 0


def test_a_report_holds_its_rows_and_where_they_were_measured(tmp_path):
  rows = [{"peer": "a", "ms": 1.5}, {"peer": "b", "ms": None}]
  table = report.table(rows, {"peer": "peer", "ms": "ms"})
  report.write("x", "Title", "python x", "this CPU", rows, table, tmp_path)
  assert "| a | 1.5 |" in (tmp_path / "x.md").read_text()
  assert '"device": "this CPU"' in (tmp_path / "x.json").read_text()


def test_an_unknown_peer_is_refused_with_the_names_that_are_known():
  with pytest.raises(ValueError, match=r"Peers must be among float32, .* Got nobody\."):
    peers.chosen(["nobody"], "mixed_bfloat16", workloads.TINY["gpt"]())


@pytest.mark.ci
def test_no_wrong_composition_is_silent_here_and_those_of_others_are_as_the_table_says():
  found = {(row["composition"], row["tool"]): row["observed"] for row in compositions.rows()}
  ours = {key: seen for key, seen in found.items() if key[1].startswith("mpjax")}
  kinds = {key[0]: seen.partition(":")[0] for key, seen in ours.items() if key[1] == "mpjax"}
  assert kinds.pop("steps of NaN") == ("after 300 steps of NaN parameters are kept, the scale is 1")
  assert kinds.pop("float16, and nothing scales") == "LowPrecisionWarning"
  assert kinds.pop("gradients of a loss that was not scaled") == "TypeError"
  assert set(kinds.values()) == {"ValueError"}
  assert not any(seen.startswith("silent") for seen in ours.values())
  assert all(
    seen.startswith("silent") for (_, tool), seen in found.items() if tool in ("Flax", "optax")
  )


# Programs that 16 bits do not hold ----------------------------------------------------------------


@pytest.mark.quick("MoE router-mixed_bfloat16")
@pytest.mark.parametrize(
  ("name", "policy"), list(zip(laws.PROGRAMS, 6 * list(laws.FORMATS), strict=True))
)
def test_mpjax_errs_no_more_than_others_in_16_bits_with_all_matmuls_narrow(name, policy):
  row = laws.measure(name, policy, draws=1)
  assert row["mpjax"] <= 1.1 * min(row["by hand"], row["torch-like"])
  assert row["mpjax"] < 0.02
  assert row["mpjax, narrow"] == 1
  assert {*laws.COLUMNS} <= {*row}


def test_a_row_in_which_another_errs_less_is_found():
  row = {"by hand": 1e-3, "torch-like": 2e-3, "mpjax": 1e-3}
  assert laws.is_best(row)
  assert not laws.is_best({**row, "mpjax": 1.5e-3})
