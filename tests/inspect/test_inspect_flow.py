"""explain: on faults that were planted it names the module, the line and the operand."""

import ntpath
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export, lax
from jax.experimental import pallas as pl
from jax.experimental import sparse
from jax.extend.core import Primitive
from jax.interpreters import mlir

import _planted as planted
import mpjax
from _jaxprs import contractions
from mpjax.inspect import _flow, _source_lines, check, explain

W = planted.WIDTH
X = jax.ShapeDtypeStruct((2, W), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((W, W), jnp.float32)


def variables_of(module, *args):
  return jax.eval_shape(module.init, jax.random.key(0), *args)


def explained(case, policy):
  """The report on a planted model, from shapes alone."""
  fn, model, inputs = case
  if model is None:
    return explain(fn, policy, {"a": SQUARE, "b": SQUARE}, inputs)
  if isinstance(model, nn.Module):
    return explain(model, policy, variables_of(model, inputs), inputs)
  return explain(model(nnx.Rngs(0)), policy, inputs)


STRAY = {
  "function": (planted.stray, None, X),
  "linen": (None, planted.LinenStray(), X),
  "nnx": (None, planted.NNXStray, X),
}
CAST = {
  "function": (planted.cast_param, None, X),
  "linen": (None, planted.LinenCastParam(), X),
  "nnx": (None, planted.NNXCastParam, X),
}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind", STRAY)
def test_a_stray_float32_table_is_named_with_its_line_and_what_reads_it(kind, policy):
  report = explained(STRAY[kind], policy)
  (leak,) = report.leaks
  assert leak.module == "hidden" and planted.at(leak.line, f"stray {kind}")
  assert leak.op == "mul" and leak.widened_by == (f"the constant f32[1,{W}]",)
  assert leak.read_by.startswith("dot_general")
  assert leak.bytes == 2 * W * 2  # one f32[2,8] in place of a 16-bit one
  assert not report.keeps_promise and "hidden" in report.summary
  assert report.narrow_share == 1.0 and report.flops == 2 * 2 * (2 * W * W)


@pytest.mark.parametrize("kind", CAST)
def test_a_parameter_cast_to_float32_leaks_nothing(kind):
  report = explained(CAST[kind], "mixed_bfloat16")
  assert report.keeps_promise and not report.absorbed
  assert report.narrow_share == 1.0
  assert "does what it promises" in report.summary


def test_a_table_on_the_residual_stream_leaks_and_a_label_or_a_mask_does_not():
  def block(params, x):
    scores = (x @ params["a"]) @ (x @ params["a"]).T + np.tril(np.ones((2, 2), np.float32))
    with jax.named_scope("softmax"):
      return x + jax.nn.softmax(scores) @ x

  def loss(params, x, y, table):
    h = x @ params["a"] + table
    for _ in range(2):
      h = block(params, h)
    return jnp.mean((h @ params["b"] - y) ** 2)

  report = explain(loss, "mixed_bfloat16", {"a": SQUARE, "b": SQUARE}, X, X, X)
  (leak,) = report.leaks
  assert leak.widened_by == (f"the argument table f32[2,{W}]",)
  assert leak.also == 2
  assert {by for entry in report.absorbed for by in entry.widened_by} == {
    f"the argument y f32[2,{W}]",
    "the constant f32[2,2]",
  }


def test_flops_and_bytes_of_a_scan_count_every_iteration():
  def fn(w, x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x @ w, None, length=5)[0]

  report = explain(fn, "mixed_bfloat16", SQUARE, X)
  assert report.flops == 6 * 2 * 2 * W * W
  assert report.to_rows()[0]["bytes.bfloat16"] == (6 + 5) * 2 * W * 2
  assert sum(op.count for op in report.ops if op.op == "dot_general") == 2


def nested(depth):
  def fn(w, x):
    body = lambda c: jnp.tanh(c @ w) * planted.TABLE
    for _ in range(depth):
      body = lambda c, inner=body: jax.lax.scan(lambda c, _: (inner(c), None), c, None, length=2)[0]
    return body(x)

  return fn


def test_nested_scans_cost_no_more_than_their_number(monkeypatch):
  visited = []
  monkeypatch.setattr(_flow, "line_of", lambda eqn, outer: visited.append(eqn) or outer)
  counts = []
  for depth in (2, 4, 8):
    visited.clear()
    report = explain(nested(depth), "mixed_bfloat16", SQUARE, X)
    counts.append(len(visited))
    assert report.flops == 2**depth * 2 * 2 * W * W and len(report.leaks) == 1
  assert counts[2] - counts[1] <= 2.5 * (counts[1] - counts[0])  # twice as many more scans


def test_library_folders_end_with_the_separator_of_the_system(monkeypatch):
  spec = SimpleNamespace(submodule_search_locations=["C:\\site\\jax"])
  monkeypatch.setattr(_source_lines.importlib.util, "find_spec", lambda name: spec)
  monkeypatch.setattr(_source_lines.os, "path", ntpath)
  assert set(_source_lines._library_folders.__wrapped__()) == {"C:\\site\\jax\\"}


def test_what_widens_a_carry_is_named_in_the_body_of_the_loop():
  def fn(w, x):
    def body(c, t):
      return jnp.tanh(c @ w) * t, None

    return jax.lax.scan(body, x @ w, np.ones((5, 1, W), np.float32))[0] @ w

  report = explain(fn, "mixed_bfloat16", SQUARE, X)
  assert [leak.op for leak in report.leaks] == ["mul"]
  assert report.leaks[0].line.function == "body"


def test_float32_in_a_branch_and_in_a_jitted_function_is_found():
  @jax.jit
  def inner(h):
    return h * planted.TABLE

  def fn(w, x):
    h = x @ w
    h = jax.lax.cond(x[0, 0] > 0, lambda h: h * planted.TABLE, lambda h: -h, h) @ w
    return inner(h) @ w

  assert [leak.op for leak in explain(fn, "mixed_bfloat16", SQUARE, X).leaks] == ["mul", "mul"]


@jax.custom_vjp
def doubled(x):
  return 2 * x


def double_backward(_, g):
  weighted = g * planted.TABLE
  return (weighted @ jnp.eye(W),)


doubled.defvjp(lambda x: (2 * x, None), double_backward)


def custom_loss(params, x):
  with jax.named_scope("body"):
    h = doubled(x @ params["a"])
  return jnp.mean((h @ params["b"]) ** 2)


def test_a_leak_in_the_backward_pass_alone_is_seen_with_grad():
  params = {"a": SQUARE, "b": SQUARE}
  assert explain(custom_loss, "mixed_bfloat16", params, X).keeps_promise
  report = explain(custom_loss, "mixed_bfloat16", params, X, grad=True)
  (leak,) = report.leaks
  assert leak.backward and leak.module == "body" and leak.op == "mul"
  assert leak.widened_by == (f"the constant f32[1,{W}]",)
  assert leak.read_by.startswith("dot_general")
  assert report.name == "gradient of custom_loss" and "(backward)" in str(report)
  # forward 2, backward: two of each layer but for x's own gradient, and the rule's
  assert report.flops == 6 * 2 * 2 * W * W and report.narrow_share == 1.0


@pytest.mark.parametrize("kind", STRAY)
def test_grad_follows_models_and_results_that_are_no_scalars(kind):
  fn, model, inputs = STRAY[kind]
  model = model(nnx.Rngs(0)) if kind == "nnx" else model
  args = {
    "function": (fn, "mixed_bfloat16", {"a": SQUARE, "b": SQUARE}, inputs),
    "linen": (model, "mixed_bfloat16", variables_of(model, inputs) if kind == "linen" else 0, X),
    "nnx": (model, "mixed_bfloat16", inputs),
  }[kind]
  with jax.numpy_dtype_promotion("standard"):
    report = explain(*args, grad=True)
  backward = [op for op in report.ops if op.op == "dot_general" and op.backward]
  assert {op.module.split("/")[0] for op in backward} == {"hidden", "head"}
  assert report.leaks[0].module == "hidden" and not report.leaks[0].backward
  assert report.narrow_share == 1.0


def test_the_state_of_a_module_is_as_under_its_policy():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.SpectralNorm(nn.Dense(W, name="layer"))(x, update_stats=False)

  variables = variables_of(Normed(), X)
  report = explain(Normed(), "mixed_bfloat16", variables, X)
  net = mpjax.apply_policy(Normed(), "mixed_bfloat16")
  found = [c.factors for c in contractions(jax.make_jaxpr(net.apply)(variables, X))]
  assert sum(row.count for row in report.wide) == found.count(("float32", "float32")) > 0


def test_grad_without_a_parameter_says_what_to_set():
  with pytest.raises(ValueError, match=r"grad=True differentiates .* Set argnums"):
    explain(lambda n, x: n * x, "mixed_bfloat16", jnp.arange(3), jnp.ones(3), grad=True)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
def test_positions_and_unknown_operations_are_named_as_origins(backward):
  twice = Primitive("twice")
  twice.def_abstract_eval(lambda x: x)
  mlir.register_lowering(twice, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))

  def fn(w, x):
    positions = jnp.arange(W).astype(jnp.float32)[None]
    h = (x @ w) * positions
    h = h @ w + (twice.bind(x) if not backward else 0.0)
    return jnp.sum(h @ w)

  report = explain(jax.grad(fn) if backward else fn, "mixed_bfloat16", SQUARE, X)
  causes = [by for leak in report.leaks for by in leak.widened_by]
  assert causes[0].startswith(f"integers made float: i32[{W}] at ")
  if not backward:
    assert causes[1].startswith("the unknown operation twice at ")
    assert [op.op for op in report.unknown] == ["twice"]
    assert "mpjax does not know" in str(report) and "twice" in str(report)


def test_the_rules_of_a_map_are_listed_with_what_they_won():
  policies = mpjax.PolicyMap(
    {"tanh@": "float32", "head": "float32", "hidden": "mixed_float16"}, default="mixed_bfloat16"
  )
  report = explain(planted.stray, policies, {"a": SQUARE, "b": SQUARE}, X)
  won = {use.rule: (use.modules, use.ops) for use in report.rules}
  assert won["tanh@"] == (("hidden",), 1)
  assert won["head"] == (("head",), 1)
  assert won["hidden"][0] == ("hidden",)
  assert won["default"] == ((), 0)
  assert report.narrow_share == 0.5
  assert [row.rule for row in report.rows] == ["hidden", "head"]


def test_a_module_under_a_policy_is_explained_under_its_own():
  model = planted.LinenStray(stray=False)
  policed = mpjax.apply_policy(model, "mixed_float16")
  report = explain(policed, None, variables_of(model, X), X)
  assert report.policy.default == mpjax.Policy.parse("mixed_float16") and report.keeps_promise
  plain = planted.NNXStray(nnx.Rngs(0))
  own = explain(mpjax.apply_policy(plain, "mixed_bfloat16"), None, X)
  assert own.policy.default == mpjax.Policy.parse("mixed_bfloat16") and own.leaks
  with pytest.raises(ValueError, match="A policy must be given"):
    explain(plain, None, X)


def test_reports_fold_to_operations_and_to_fewer_modules():
  report = explained(STRAY["linen"], "mixed_bfloat16")
  assert [row.module for row in report.rows] == ["hidden/Dense_0", "hidden", "head"]
  folded = report.fold(1)
  assert [row.module for row in folded.rows] == ["hidden", "head"]
  assert sum(row.flops for row in folded.rows) == report.flops
  ops = report.by_op("hidden")
  assert {op.op for op in ops.rows} == {
    "dot_general",
    "add",
    "mul",
    "reshape",
    "broadcast_in_dim",
  } & {op.op for op in ops.rows}
  assert [op.returns for op in ops.rows if op.op == "mul"] == ["float32"]
  assert "dot_general" in str(ops) and len(ops.to_rows()) == len(ops.rows)
  assert "<table>" in report._repr_html_()
  assert report.to_dict()["leaks"][0]["line"]["line"] == planted.line_of("stray linen")


def test_an_island_is_named_with_what_asked_for_it():
  def fn(w, x):
    with jax.named_scope("attention"):
      return jax.nn.softmax(x @ w) @ w

  (island,) = explain(fn, "mixed_bfloat16", SQUARE, X).islands
  assert island.module == "attention" and island.cause == "reduce_max"
  assert {"exp", "reduce_sum", "div"} <= set(island.ops)


def test_what_cannot_be_explained_is_refused_with_what_to_do():
  with pytest.raises(TypeError, match="A report is about a function"):
    explain(3, "mixed_bfloat16")
  with pytest.raises(ValueError, match="needs its variables"):
    explain(planted.LinenStray(), "mixed_bfloat16", X)
  with pytest.raises(ValueError, match=r"matched no module\. Closest: head"):
    explained(STRAY["linen"], mpjax.PolicyMap({"heda": "float32"}, default="mixed_bfloat16"))
  for tool in (explain, check):
    with pytest.raises(TypeError, match=r"Got the class Dense\. Make an instance first"):
      tool(nn.Dense, "mixed_bfloat16", {"params": {}}, jnp.ones((2, 3)))


@pytest.mark.parametrize("tool", [explain, check])
def test_a_report_without_the_policy_asks_for_the_plain_function_and_the_policy(tool):
  loss = lambda params, batch: (batch[0] @ params["w"]).sum()
  policed, params, batch = mpjax.autocast(loss, "mixed_bfloat16"), {"w": SQUARE}, (X, X)
  wanted = r"the plain function.*: explain\(loss, 'mixed_bfloat16', params, batch\)"
  with pytest.raises(TypeError, match=rf"its policy, then its arg.*Got dict for.*{wanted}"):
    tool(policed, params, batch)
  with pytest.raises(TypeError, match=rf"Got f32\[{W},{W}\] for the policy\. Pass {wanted}"):
    tool(lambda w, x: x @ w, SQUARE, X)
  model = mpjax.apply_policy(planted.NNXStray(nnx.Rngs(0)), "mixed_bfloat16")
  with pytest.raises(TypeError, match=r"Got f32\[.*Pass None for .*: explain\(model, None, x\)"):
    tool(model, X)
  with pytest.raises(TypeError, match=r"Got a dict\. Policies by module path are mpjax\.PolicyMap"):
    tool(loss, {"head": "float32"}, params, batch)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_reason_of_an_inner_product_holds_in_both_formats(policy):
  (row,) = explain(lambda w, x: jnp.vdot(x @ w, x), policy, SQUARE, X).wide
  assert row.reason.startswith("inner product: ")
  narrow = row.reason.partition(": ")[2]
  assert "257 is 256 in bfloat16" in narrow and "1e-4 squared 0 in float16" in narrow
  assert jnp.bfloat16(257) == 256 and jnp.float16(1e-4) ** 2 == 0


def test_gradients_of_results_without_a_float_are_refused():
  with pytest.raises(ValueError, match="sum of the float results, and there is none"):
    explain(lambda w: (w > 0).sum(), "mixed_bfloat16", jnp.ones(3), grad=True)


def test_results_of_several_dtypes_have_a_backward_pass():
  fn = lambda w: (w.astype(jnp.bfloat16), w)
  report = explain(fn, "mixed_bfloat16", jnp.ones(3), grad=True)
  assert any(op.backward for op in report.ops)


def kernel(a, b, out):
  out[...] = a[...] @ b[...]


def with_a_kernel(w, x):
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return pl.pallas_call(kernel, out_shape=shape)(x @ w, w)


def with_a_solve(w, x):
  solve = lambda matvec, b: jnp.linalg.solve(w, b)
  b = (jnp.tanh(x @ w) @ w)[0]
  return lax.custom_linear_solve(lambda v: w @ v, b, solve, symmetric=True)


def test_matmuls_inside_of_what_runs_as_traced_count_as_float32():
  report = explain(with_a_kernel, "mixed_bfloat16", SQUARE, X)
  (traced,) = report.unknown
  assert traced.op == "pallas_call" and traced.line.function == "with_a_kernel"
  assert traced.matmuls == float32_matmuls(report) >= 1
  assert 0 < report.narrow_share < 1 and not report.keeps_promise
  assert "100%" not in report.summary and "does what it promises" not in report.summary
  assert "pallas_call" in report.summary and "mpjax.cast_inputs" in report.summary


def test_those_of_a_linear_system_are_float32_for_what_they_compute():
  report = explain(with_a_solve, "mixed_bfloat16", SQUARE, X)
  (row,) = report.wide
  assert row.reason.startswith("linear system: ") and row.line.function == "with_a_solve"
  assert row.count == float32_matmuls(report) >= 1
  assert 0 < report.narrow_share < 1 and report.keeps_promise and not report.unknown
  assert "100%" not in report.summary and "in float32 for what they compute" in report.summary
  assert "cast_inputs" not in str(report)


def float32_matmuls(report):
  found = [op for op in report.ops if op.op == "dot_general" and op.dtype == "float32"]
  return sum(op.count for op in found)


def moved_by_a_camera(p, points):
  with jax.named_scope("camera"):
    rotation = jnp.stack([jnp.stack([p["a"], -p["b"]]), jnp.stack([p["b"], p["a"]])])
    return (points @ rotation.T) @ p["w"]


POINTS = jax.ShapeDtypeStruct((64, 2), jnp.float32)
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.mark.parametrize("grad", [False, True])
def test_a_matmul_that_stays_in_float32_is_named_with_the_reason(grad):
  p = {"a": SCALAR, "b": SCALAR, "w": jax.ShapeDtypeStruct((2, 16), jnp.float32)}
  report = explain(moved_by_a_camera, "mixed_bfloat16", p, POINTS, grad=grad)
  (row,) = report.wide  # the gradient of its angles sums up 16-bit products in float32
  assert row.module == "camera" and "rotation.T" in row.line.text
  assert row.reason.startswith("rotation or projection: ")
  assert row.count == 1 and row.flops == 2 * 64 * 2 * 2
  assert report.flops * (1 - report.narrow_share) == pytest.approx(row.flops)
  assert report.keeps_promise and "in float32 for what they compute" in report.summary
  assert "pixels come in steps" in str(report)


def test_what_a_rule_makes_float32_or_nothing_makes_is_not_named():
  p = {"a": SCALAR, "b": SCALAR, "w": jax.ShapeDtypeStruct((2, 16), jnp.float32)}
  policies = mpjax.PolicyMap({"camera": "float32"}, default="mixed_bfloat16")
  report = explain(moved_by_a_camera, policies, p, POINTS)
  assert report.wide == () and "for what they compute" not in report.summary
  assert explain(lambda w, x: x @ w, "mixed_bfloat16", SQUARE, X).wide == ()


def test_in_a_float32_module_a_kernel_is_as_the_rule_says():
  def fn(w, x):
    with jax.named_scope("kernel"):
      return with_a_kernel(w, x)

  policies = mpjax.PolicyMap({"kernel": "float32"}, default="mixed_bfloat16")
  assert explain(fn, policies, SQUARE, X).keeps_promise


def test_a_kernel_that_is_handed_16_bits_counts_as_narrow():
  def fn(w, x):
    h = (x @ w).astype(jnp.bfloat16)
    return with_a_kernel(w.astype(jnp.bfloat16), h)

  report = explain(fn, "mixed_bfloat16", SQUARE, X)
  assert report.narrow_share == 1.0 and report.flops == 3 * 2 * 2 * W * W


def of_a_callback(w, x):
  return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def of_an_exported_function(w, x):
  exported = export.export(jax.jit(lambda w, x: jnp.tanh(x @ w) @ w))
  return exported(SQUARE, X).call(w, x)


def of_a_sparse_matrix(w, x):
  return sparse.BCOO.fromdense(jnp.eye(2), nse=2) @ x


HIDDEN = {
  "callback": (of_a_callback, "pure_callback"),
  "exported": (of_an_exported_function, "call_exported"),
  "sparse": (of_a_sparse_matrix, "bcoo_dot_general"),
}


@pytest.mark.parametrize(("hidden", "name"), HIDDEN.values(), ids=HIDDEN)
def test_what_cannot_be_looked_into_is_no_hundred_percent_of_everything(hidden, name):
  def fn(w, x):
    with jax.named_scope("hidden"):
      x = hidden(w, x @ w)
    return x @ w

  report = explain(fn, "mixed_bfloat16", SQUARE, X)
  assert "2 of 2 matmuls and convolutions that can be seen" in report.summary
  assert name in report.summary and not report.keeps_promise
  assert np.isnan(report.narrow_share) and "%" not in report.summary
  assert {row.module: row.matmuls for row in report.rows} == {"(top)": 1, "hidden": 1}
  assert re.search(r"hidden +bf16 +1 +\?", str(report)) and str(report).count("100%") == 1


@pytest.mark.parametrize(("hidden", "name"), HIDDEN.values(), ids=HIDDEN)
def test_nothing_is_no_hundred_percent_either(hidden, name):
  report = explain(hidden, "mixed_bfloat16", SQUARE, X)
  assert "No matmul or convolution can be seen in it" in report.summary
  assert "%" not in str(report) and np.isnan(report.narrow_share)
  report = explain(lambda w, x: jnp.tanh(x), "mixed_bfloat16", SQUARE, X)
  assert "No matmul or convolution of floats is in it; nothing widens" in report.summary
  assert "%" not in str(report) and report.keeps_promise


def test_what_a_marked_function_multiplies_is_counted_in_its_format():
  fn = lambda w, x: mpjax.cast_inputs(lambda a, b: a @ b)(x @ w, w)
  report = explain(fn, "mixed_bfloat16", SQUARE, X)
  assert report.flops == 2 * 2 * 2 * W * W and report.narrow_share == 1.0
  assert report.keeps_promise


PRODUCTS = {
  "einsum": lambda a, b: jnp.einsum("t,k->tk", a, b),
  "outer": jnp.outer,
  "matmul": lambda a, b: a[:, None] @ b[None],
  "tensordot": lambda a, b: jnp.tensordot(a, b, 0),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_that_contracts_nothing_is_no_matmul(product):
  def fn(w, x):
    return (x @ w + product(x[:, 0], jnp.arange(8.0))) @ w

  report = explain(fn, "mixed_bfloat16", SQUARE, X)
  assert report.narrow_share == 1.0 and report.flops == 2 * 2 * 2 * W * W
  assert "2 of 2 matmuls" in report.summary
  (leak,) = report.leaks  # a table of float32 widens, whichever way it is written
  assert leak.op == "add"


@pytest.mark.parametrize("way", ["forward", "gradient", "step"])
def test_a_label_is_no_leak_in_the_gradient_of_a_loss_either(way):
  def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

  def step(params, x, y):
    grads = jax.grad(loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  params = {"a": SQUARE, "b": SQUARE}
  fn = step if way == "step" else loss
  report = explain(fn, "mixed_bfloat16", params, X, X, grad=way == "gradient")
  assert report.keeps_promise and report.narrow_share == 1.0
