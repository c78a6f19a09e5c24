"""check: values and gradients against a reference, and the modules that lose most."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import _planted as planted
import mpjax
from _arrays import array, normal
from mpjax.inspect import check, explain, locate_nonfinite, record, tune

W = planted.WIDTH
X = array(normal(9, 2, W))
SQUARE = array(normal(1, W, W) / 3)


def test_the_layer_whose_head_overflows_is_named_and_not_those_behind_it():
  xs = jax.random.normal(jax.random.key(5), (2, 3, W))
  params = planted.layer_params(jax.random.key(0))
  report = check(planted.layers, "mixed_float16", params, xs, gradients=False)
  assert not report.agrees
  worst = report.worst[0]
  assert worst.module.startswith("layer_7/") and planted.at(worst.line, "overflow")
  assert worst.output.overflow == 2 * 3 * 3 and worst.output.size == 2 * 4 * 3 * 3
  assert report.faults[0].startswith("layer_7/")
  assert not any(fault.startswith("layer_8") for fault in report.faults)


@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_a_branch_that_underflows_is_named(kind):
  small = jnp.full((W, W), 1e-4)
  if kind == "function":
    args = (planted.underflow, "mixed_float16", {"large": SQUARE, "a": small, "b": small}, X)
  elif kind == "linen":
    kernels = {"a": {"kernel": small}, "b": {"kernel": small}}
    large = {"kernel": SQUARE, "bias": jnp.zeros(W)}
    variables = {"params": {"large": large, "small": kernels}}
    args = (planted.LinenUnderflow(), "mixed_float16", variables, X)
  else:
    model = mpjax.apply_policy(planted.NNXUnderflow(nnx.Rngs(0)), "mixed_float16")
    args = (model, None, X)
  report = check(*args, gradients=False)
  assert not report.agrees
  worst = report.worst[0]
  assert worst.module == "small" and planted.at(worst.line, "underflow")
  assert worst.output.underflow == worst.output.size == 2 * W
  assert report.faults[0] == f"small underflows ({2 * W} of {2 * W} numbers are zero)"


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("reference", ["float32", "float64"])
def test_errors_are_those_of_the_two_functions(reference):
  def fn(w, x):
    with jax.named_scope("first"):
      h = x @ w
    with jax.named_scope("second"):
      return jnp.mean(jnp.tanh(h @ w) ** 2)

  report = check(fn, "mixed_bfloat16", SQUARE, X, reference=reference)
  w, x = (np.asarray(a, np.float64) for a in (SQUARE, X))
  narrow = mpjax.autocast(lambda w, x: x @ w, "bfloat16")(SQUARE, X)
  expected = np.linalg.norm(x @ w - np.asarray(narrow, np.float64)) / np.linalg.norm(x @ w)
  first, second = report.rows
  assert first.module == "first" and first.error_in == 0.0
  np.testing.assert_allclose(first.output.error, expected, rtol=1e-4)
  assert second.module == "second" and second.error_in == first.output.error

  exact, mixed = (
    np.asarray(jax.grad(f)(SQUARE, X), np.float64)
    for f in (fn, mpjax.autocast(fn, "mixed_bfloat16"))
  )
  (gradient,) = report.gradients
  error = np.linalg.norm(mixed - exact) / np.linalg.norm(exact)
  assert gradient.parameter == "w"
  np.testing.assert_allclose(gradient.gradient.error, error, rtol=2e-2)
  assert report.agrees and "agrees" in report.summary
  assert report.to_dict()["reference"] == reference


def test_gradients_that_underflow_come_back_with_a_loss_scale():
  loss = lambda w, x: jnp.mean((x @ w) ** 2) * 1e-6
  w, x = jnp.full((W, W), 0.01), jnp.ones((4, W))
  lost = check(loss, "mixed_float16", w, x)
  assert lost.gradients[0].gradient.underflow == W * W
  assert "gradient of w underflows" in lost.summary
  scaled = check(loss, "mixed_float16", w, x, loss_scale=2.0**15)
  assert scaled.agrees and scaled.gradients[0].gradient.error < 1e-3


def test_a_scan_is_looked_into():
  def fn(w, x):
    def cell(carry, scale):
      with jax.named_scope("cell"):
        carry = jnp.tanh(carry @ w) * scale
      return carry, None

    return jax.lax.scan(cell, x, jnp.ones(20).at[13].set(1e-9))[0]

  (row,) = check(fn, "mixed_float16", SQUARE, X, gradients=False).rows
  assert row.module == "cell" and row.output.size == 20 * 2 * W


def overflowing(w, x):
  with jax.named_scope("cell"):
    return (x @ w) * 16.0  # planted: while and cond


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("reference", ["float32", "float64"])
def test_the_iteration_of_a_while_loop_that_overflows_is_named(reference):
  def fn(w, x):
    step = lambda state: (state[0] + 1, overflowing(w, jax.nn.relu(state[1])))
    return jax.lax.while_loop(lambda state: state[0] < 6, step, (0, x))[1] * 1e-9

  args = (jnp.eye(W), jnp.ones((2, W)))
  report = check(fn, "mixed_float16", *args, reference=reference, gradients=False)
  (row,) = report.rows
  assert row.module == "cell" and row.worst_iteration == 3  # 16 ** 4 is beyond float16
  assert row.output.overflow == row.output.size == 2 * W
  assert row.line.file == __file__ and "planted" in row.line.text
  assert not report.agrees and report.not_looked_into == ()


def test_each_side_ends_its_while_loop_by_itself():
  def fn(w, x):
    step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ w))
    return jax.lax.while_loop(lambda state: jnp.sum(state[1]) > 1.0, step, (0, x))

  w, x = 0.9 * jnp.eye(W), jnp.linspace(0.1, 1.0, W)[None]
  report = check(fn, "mixed_bfloat16", w, x, gradients=False)
  wide, narrow = fn(w, x), mpjax.autocast(fn, "mixed_bfloat16")(w, x)
  assert wide[0] == narrow[0] > 1
  error = jnp.linalg.norm(narrow[1] - wide[1]) / jnp.linalg.norm(wide[1])
  np.testing.assert_allclose(report.result.error, float(error), rtol=1e-3)


def branches(w, x, index):
  def second(x):
    with jax.named_scope("second"):
      return overflowing(w, x)

  def first(x):
    with jax.named_scope("first"):
      return x @ w

  return jnp.mean(jax.lax.switch(index, [first, second], x))


def test_the_branch_that_is_taken_is_looked_into_and_its_gradients_are_compared():
  args = 1e3 * jnp.eye(W), 1e2 * jnp.ones((2, W))
  report = check(branches, "mixed_float16", *args, jnp.int32(1))
  assert {row.module for row in report.rows} == {"second", "second/cell"}
  assert report.worst[0].module == "second/cell" and report.worst[0].output.overflow == 2 * W
  other = check(branches, "mixed_float16", SQUARE, X, jnp.int32(0))
  assert [row.module for row in other.rows] == ["first"] and other.agrees
  exact, narrow = (
    jax.grad(f)(SQUARE, X, jnp.int32(0)) for f in (branches, mpjax.autocast(branches, "float16"))
  )
  error = jnp.linalg.norm(narrow - exact) / jnp.linalg.norm(exact)
  np.testing.assert_allclose(other.gradients[0].gradient.error, float(error), rtol=0.1)


def test_a_branch_that_only_one_side_takes_shows_in_the_result():
  def fn(w, x):
    h = jnp.sum(x @ w) * 1.0
    return jax.lax.cond(jnp.isfinite(h), lambda h: h * 0.0, lambda h: jnp.ones_like(h), h)

  args = jnp.full((W, W), 200.0), jnp.full((2, W), 200.0)
  report = check(fn, "mixed_float16", *args, gradients=False)
  assert report.result.error == np.inf and not report.agrees


def test_what_overflows_on_one_device_of_a_shard_map_is_counted_in_its_module():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def fn(w, x):
    step = lambda w, x: jax.lax.psum(jnp.sum(loop(w, x)), "data")
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(w, x)

  def loop(w, x):
    return jax.lax.scan(lambda x, _: (overflowing(w, x), None), x, None, length=2)[0]

  x = jnp.ones((4, W)).at[2].set(1e3)
  report = check(fn, "mixed_float16", jnp.eye(W), x)
  (row,) = report.rows
  assert row.module == "cell" and row.worst_iteration == 1
  assert row.output.overflow == W and row.output.size == 2 * 4 * W
  assert report.not_looked_into == ()


def test_a_custom_derivative_is_named_as_not_looked_into():
  @jax.custom_vjp
  def square(x, w):
    return x @ w

  square.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
  report = check(lambda w, x: jnp.mean(square(x, w)), "mixed_float16", SQUARE, X)
  assert [part.what for part in report.not_looked_into] == ["custom_vjp_call"]
  assert "Not looked into: custom_vjp_call" in str(report)


def test_a_float32_policy_agrees_to_the_bit():
  report = check(planted.stray, "float32", {"a": SQUARE, "b": SQUARE}, X)
  assert report.agrees
  assert {row.output.error for row in report.rows} == {0.0}
  assert {g.gradient.error for g in report.gradients} == {0.0}


def test_a_module_that_loses_nothing_is_not_among_those_that_lose_most():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(W, name="rounds")(x)
      return nn.Sequential([lambda x: 2 * x], name="doubles")(x)

  x = jax.random.normal(jax.random.key(0), (2, W))
  report = check(Model(), "mixed_bfloat16", Model().init(jax.random.key(1), x), x)
  assert [row.module for row in report.worst] == ["rounds", "doubles"]
  assert report.summary.splitlines()[1].startswith("Most is lost in rounds (")
  assert "doubles" not in report.summary


def test_updates_of_a_model_are_no_results():
  class Counted(nnx.Module):
    def __init__(self, rngs):
      self.linear, self.norm = nnx.Linear(W, W, rngs=rngs), nnx.BatchNorm(W, rngs=rngs)

    def __call__(self, x):
      return self.norm(self.linear(x))

  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    report = check(Counted(nnx.Rngs(0)), "mixed_bfloat16", X, gradients=False)
  assert report.result.size == 2 * W
  assert {row.module for row in report.rows} == {"linear", "norm"}


def test_collections_that_a_linen_module_returns_are_compared_and_not_differentiated():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      norm = nn.BatchNorm(use_running_average=False, name="norm")
      return nn.Dense(4, name="head")(nn.relu(norm(nn.Dense(32, name="layer")(x))))

  x = jax.random.normal(jax.random.key(1), (64, 16))
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    variables = Normed().init(jax.random.key(0), x)
    rest = {"batch_stats": variables["batch_stats"]}
    apply = lambda p, x: Normed().apply({"params": p, **rest}, x, mutable=["batch_stats"])
    alone = check(lambda p, x: apply(p, x)[0], "mixed_bfloat16", variables["params"], x)
    report = check(Normed(), "mixed_bfloat16", variables, x, mutable=["batch_stats"])
    back = explain(Normed(), "mixed_bfloat16", variables, x, mutable=["batch_stats"], grad=True)
    out = explain(
      lambda p, x: apply(p, x)[0].sum(), "mixed_bfloat16", variables["params"], x, grad=True
    )
  assert report.agrees and alone.agrees
  errors = [[g.gradient.error for g in r.gradients] for r in (report, alone)]
  np.testing.assert_allclose(*errors, rtol=1e-3)
  assert report.result.size == alone.result.size + 2 * 32
  assert back.flops == out.flops


def test_what_cannot_be_checked_is_refused():
  with pytest.raises(ValueError, match="reference must be 'float32' or 'float64'"):
    check(planted.stray, "mixed_bfloat16", {"a": SQUARE}, X, reference="float16")
  with pytest.raises(TypeError, match="The arguments must be arrays"):
    check(planted.stray, "mixed_bfloat16", {"a": SQUARE}, jax.ShapeDtypeStruct((2, W), jnp.float32))


def test_a_gradient_that_is_zero_but_for_rounding_does_not_count():
  def fn(params, x):
    h = x @ params["w"] + params["shift"]
    return jnp.mean(jax.nn.softmax(h) ** 2)  # a shift of all logits changes nothing

  params = {"w": SQUARE, "shift": jnp.full((1, 1), 0.1)}
  report = check(fn, "mixed_float16", params, X)
  counts = {g.parameter: g.counts for g in report.gradients}
  assert counts == {"params/w": True, "params/shift": False}
  assert report.agrees, report.faults


def test_a_batched_while_loop_goes_on_while_one_of_the_batch_does():
  def grown(w, x):
    return jax.lax.while_loop(
      lambda s: (s * s).sum() < 2, lambda s: s * 1.5 + jnp.tanh(s @ w) / 8, x
    )

  w, x = jnp.eye(3) / 2, jnp.array([[0.5, 0.1, 0.2], [0.1, 0.2, 0.1]])
  batched = lambda w, x: jax.vmap(lambda row: grown(w, row))(x)
  assert check(batched, "mixed_bfloat16", w, x, gradients=False).agrees
  assert mpjax.inspect.locate_nonfinite(batched, w, x, policy="mixed_bfloat16").first is None


IDLE = mpjax.PolicyMap({"sub@": "bfloat16"}, default="mixed_bfloat16")
"""A policy whose own rule makes ``w - 1e-4 * g`` stand still."""


def quadratic(w, x):
  return jnp.mean((x @ w) ** 2)


def gradient_step(w, x):
  return quadratic(w, x), w - 1e-4 * jax.grad(quadratic)(w, x)


def test_a_step_that_does_nothing_does_not_agree():
  w, x = jnp.eye(8), jax.random.normal(jax.random.key(0), (4, 8))
  report = check(gradient_step, IDLE, w, x, gradients=False)
  (change,) = report.changes
  assert change.argument == "w" and change.change.error > 0.5
  assert report.result.error < report.tolerance  # what is returned says nothing
  assert not report.agrees and "the change of w" in report.summary
  assert "Changes" in str(report)


def test_a_step_that_moves_agrees_and_its_change_is_in_the_report():
  w, x = jnp.eye(8), jax.random.normal(jax.random.key(0), (4, 8))
  policies = mpjax.PolicyMap({"sub@": "float32"}, default="mixed_bfloat16")
  report = check(gradient_step, policies, w, x, gradients=False)
  assert report.agrees and 0 < report.changes[0].change.error < report.tolerance
  assert "what it changes by at most" in report.summary


def test_what_does_not_move_beyond_rounding_has_no_say():
  w, x = jnp.eye(8), jax.random.normal(jax.random.key(0), (4, 8))
  step = lambda w, x: w - 1e-9 * jax.grad(quadratic)(w, x)
  report = check(step, IDLE, w, x, gradients=False)
  assert not report.changes[0].counts and report.agrees


def test_the_change_of_an_nnx_model_is_compared():
  def step(model, x):
    grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
    model.kernel[...] = model.kernel[...] - 1e-4 * grads.kernel[...]
    return jnp.mean(model(x))

  model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
  report = check(step, IDLE, model, jnp.ones((2, 8)), gradients=False)
  assert [change.argument for change in report.changes] == ["kernel"]
  assert any(fault.startswith("the change of kernel") for fault in report.faults)


class Overflowing(nn.Module):
  @nn.compact
  def __call__(self, x):
    return (nn.Dense(8, name="up")(x * 1000.0) * 1000.0).sum()


def policed_losses():
  """Losses of one model and its parameters, with a policy inside, by how it got there."""
  plain, x = Overflowing(), jnp.ones((4, W))
  params = plain.init(jax.random.key(0), x)["params"]
  policed = mpjax.apply_policy(plain, "p=f32, c=f16, o=f16")
  loss = lambda p, x: plain.apply({"params": p}, x)
  inner = mpjax.autocast(loss, "mixed_float16")
  return (
    params,
    x,
    {
      "apply_policy": lambda p, x: policed.apply({"params": p}, x).astype(jnp.float32),
      "autocast": lambda p, x: inner(p, x) + 0.0,
      "autocast in autocast": lambda p, x: mpjax.autocast(inner, "mixed_bfloat16")(p, x),
    },
  )


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("kind", ["apply_policy", "autocast", "autocast in autocast"])
def test_a_policy_inside_is_compared_with_what_runs_without_it(kind):
  params, x, losses = policed_losses()
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    report = check(losses[kind], "mixed_float16", params, x)
  assert not report.agrees and report.result.overflow == 1
  assert any("a policy of its own" in note.what for note in report.not_looked_into)


def test_an_nnx_model_that_has_a_policy_is_compared_with_what_it_is_without():
  model = mpjax.apply_policy(nnx.Linear(W, W, rngs=nnx.Rngs(0)), "bfloat16")
  loss = lambda model, x: jnp.mean(model(x).astype(jnp.float32) ** 2)
  with jax.numpy_rank_promotion("allow"):
    report = check(loss, "mixed_bfloat16", model, X)
  assert 0 < report.result.error < report.tolerance


def test_a_policy_that_cannot_be_left_out_is_refused():
  params, x, losses = policed_losses()
  jitted = jax.jit(losses["autocast"])
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    before = str(jax.make_jaxpr(jitted)(params, x))
    with pytest.raises(ValueError, match=r"got one with a 16-bit policy inside, .* plain model"):
      check(jitted, "mixed_float16", params, x)
    assert str(jax.make_jaxpr(jitted)(params, x)) == before
    with pytest.raises(ValueError, match="tune must trace its function in float32"):
      mpjax.inspect.tune(losses["autocast"], (params, x))
    with pytest.raises(ValueError, match="record must trace its function in float32"):
      mpjax.inspect.record(losses["autocast"], "mixed_float16")(params, x)


# What its author made 16-bit ----------------------------------------------------------------------


def of_dtypes(*dtypes):
  """A loss of layers whose author gave them these dtypes, and its arguments."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      for n, dtype in enumerate(dtypes):
        x = nn.Dense(4, dtype=dtype, name=f"layer{n}")(x)
      return x

  x = jnp.ones((2, 4))
  params = Net().init(jax.random.key(0), x)["params"]
  return lambda p, x: jnp.sum(Net().apply({"params": p}, x).astype(jnp.float32)), params, x


@pytest.mark.parametrize("tool", ["check", "tune"])
def test_a_function_that_is_16_bit_throughout_is_not_compared_with_itself(tool):
  loss, *args = of_dtypes(jnp.float16, jnp.float16)
  with pytest.raises(ValueError, match=rf"{tool} must have a reference.*2 matmuls.*in Net/layer0"):
    check(loss, "mixed_float16", *args) if tool == "check" else tune(loss, args)


def test_of_one_that_is_so_in_part_the_report_says_it():
  loss, *args = of_dtypes(None, jnp.float16)
  report = check(loss, "mixed_float16", *args)
  (note,) = report.not_looked_into
  assert "1 of 2 matmuls" in note.what
  assert note.module == "Net/layer1"
  assert note.what in str(report)


def batched_loops(test):
  """Loops of one batch that end after one and after three turns."""

  def program(w, n):
    turn = lambda carry: (carry[0] + 1, carry[1] + 1 / (3 - carry[0]))
    one = lambda n: jax.lax.while_loop(lambda c: test(c[0], n), turn, (0.0, w.sum()))[1]
    return jax.vmap(one)(n)

  return program


@pytest.mark.parametrize("test", [jnp.less, jnp.not_equal], ids=["less", "not_equal"])
def test_what_has_ended_in_a_batch_of_loops_keeps_what_it_has(test):
  """1 / (3 - n) is inf in a fourth turn, and a test for equality has no end behind it."""
  program, args = batched_loops(test), (jnp.full((2, 2), 0.5), jnp.array([1.0, 3.0]))
  report = check(program, "mixed_float16", *args, gradients=False)
  assert report.agrees, report
  assert "nothing that is not finite" in str(locate_nonfinite(program, *args))
  out, _ = jax.jit(record(program, "mixed_float16"))(*args)
  np.testing.assert_allclose(out, program(*args))


UNDEFINED = {
  "a result": (lambda w, x: jnp.log(x @ w - 100).mean(), "the result is not finite in float32"),
  "a gradient": (lambda w, x: jnp.sqrt(x @ w - 8).sum(), r"gradient of w .* \(64 of 64 numbers\)"),
  "in float32 alone": (
    lambda w, x: jnp.log(x @ (w * 0.1) - x[:, :1] * 0.8005).mean(),
    "the result is not finite in float32",
  ),
}


@pytest.mark.parametrize(("loss", "said"), UNDEFINED.values(), ids=UNDEFINED)
def test_what_is_not_finite_in_float32_does_not_agree(loss, said):
  report = check(loss, "mixed_bfloat16", jnp.ones((8, 8)), jnp.ones((4, 8)))
  assert not report.agrees and re.search(said, report.faults[0])
  assert "locate_nonfinite" in report.summary


def test_infinities_that_mask_on_both_sides_agree():
  scores = lambda w, x: jnp.where(jnp.tri(4, dtype=bool), x @ w @ x.T, -jnp.inf)
  report = check(scores, "mixed_bfloat16", jnp.eye(8), jnp.ones((4, 8)), gradients=False)
  assert report.agrees, report.summary


def test_a_gradient_that_overflows_as_a_whole_does_not_agree():
  loss = lambda w, x: jnp.log(jnp.abs(x @ w) + jnp.float32(1e-7)).mean()
  x = jnp.ones((4, 8)).at[0].set(0.0)
  report = check(loss, "mixed_float16", jnp.full((8, 8), 0.1), x)
  assert not report.agrees and report.gradients[0].gradient.overflow == 64
  assert "gradient of" in report.faults[0]


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: jax.lax.while_loop(
      lambda c: ~c[0], lambda c: (jnp.sum(c[1]) > 1e3, c[1] @ w), (False, x)
    )[1],
    lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: (x @ w, True), lambda: (x, False))[0],
  ],
  ids=["while", "cond"],
)
def test_a_flag_may_begin_as_a_literal(fn):
  assert check(fn, "mixed_bfloat16", 2 * jnp.eye(4), jnp.ones((2, 4)), gradients=False).agrees


def test_the_kernel_of_another_platform_is_not_compiled():
  def elsewhere(h):
    return jax.ffi.ffi_call("of_another_platform", jax.ShapeDtypeStruct(h.shape, h.dtype))(h)

  def fn(w, x):
    return jax.lax.platform_dependent(x @ w, cpu=jnp.sin, tpu=elsewhere)

  report = check(fn, "mixed_bfloat16", jnp.eye(4), jnp.ones((2, 4)), gradients=False)
  assert report.agrees


def test_float16_gradients_that_vanish_ask_for_the_scale_of_training():
  loss = lambda w, x: jnp.mean((x @ w) ** 2) * 1e-5
  w, x = jnp.full((8, 8), 0.01), jnp.ones((4, 8))
  advice = "scales the loss: pass that scale here, loss_scale=2.0**15"
  assert advice in mpjax.inspect.check(loss, "mixed_float16", w, x).summary
  scaled = mpjax.inspect.check(loss, "mixed_float16", w, x, loss_scale=2.0**15)
  assert scaled.agrees and advice not in scaled.summary


def test_a_derivative_rule_reads_what_the_function_around_it_computed():
  def loss(w, x):
    scale = jnp.tanh(x).mean(0, keepdims=True)
    scaled = jax.custom_vjp(lambda y: y * scale)
    scaled.defvjp(lambda y: (y * scale, None), lambda _, ct: (ct * scale,))
    return jnp.mean(scaled(jnp.sin(x @ w)))

  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8))
  report = check(loss, "mixed_bfloat16", w, x)
  assert report.agrees
  assert 0 < report.gradients[0].gradient.error < 0.02
  for policy in ("mixed_bfloat16", "float32"):
    assert locate_nonfinite(loss, w, x, policy=policy, backward=True).finite


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: jnp.fft.fft(x @ w),
    lambda w, x: (x @ w).astype(jnp.int32),
    lambda w, x: jnp.isfinite(x @ w),
  ],
  ids=["complex", "integers", "bools"],
)
def test_results_that_are_no_floats_are_compared(fn):
  """In float16 the product overflows: these have nothing of the float32 ones left."""
  assert not check(fn, "mixed_float16", 1e5 * SQUARE, X).agrees
  assert check(fn, "mixed_float16", SQUARE, X, tolerance=0.5).agrees


def test_counts_that_are_the_same_do_not_hide_what_differs():
  fn = lambda w, x: (x @ w, jnp.int32(10**6), jnp.arange(1000))
  report = check(fn, "mixed_bfloat16", SQUARE, X)
  assert report.result == check(lambda w, x: x @ w, "mixed_bfloat16", SQUARE, X).result


def test_gradients_of_numbers_and_of_complex_and_8_bit_parameters_are_compared():
  def fn(p, x):
    spun = jnp.abs(p["spin"]) * jnp.sum(x @ p["w"])
    return p["rate"] * spun + jnp.sum(p["scale"].astype(jnp.float32))

  scale = jnp.ones(2, jnp.float8_e5m2)
  params = {"w": SQUARE, "rate": 2.0, "spin": jnp.complex64(1 + 2j), "scale": scale, "turns": 3}
  report = check(fn, "mixed_bfloat16", params, X)
  assert [row.parameter for row in report.gradients] == ["p/rate", "p/scale", "p/spin", "p/w"]
  assert all(row.gradient.error < 0.05 for row in report.gradients)
  assert [row.gradient.size for row in report.gradients] == [1, 2, 1, W * W]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pooling:
  """A model as Equinox makes them: settings are leaves beside its weights."""

  weights: jax.Array
  rate: float
  begin: float
  is_training: bool

  def __call__(self, x):
    h = jnp.tanh(x @ self.weights)
    h = h * (1 - self.rate) if self.is_training and self.rate > 0 else h
    return lax.reduce_window(h, self.begin, lax.max, (1, 2), (1, 2), "VALID")


def test_numbers_and_flags_of_a_model_whose_arrays_are_trained_stay_what_they_are():
  """The model branches on them, and its pooling begins at -inf: no gradient is theirs."""
  model = Pooling(SQUARE, 0.5, -jnp.inf, True)
  loss = lambda model, x: jnp.mean(model(x) ** 2)
  report = check(loss, "mixed_bfloat16", model, X)
  assert report.agrees and [row.parameter for row in report.gradients] == ["model/weights"]
  tuned = tune(loss, (model, X), candidates=["mixed_bfloat16"])
  assert tuned.rows[0].worst == "weights"
  assert locate_nonfinite(loss, model, X, policy="mixed_bfloat16", backward=True).finite


def test_the_error_of_what_has_no_gradient_says_how_to_do_without():
  fn = lambda w, x: jax.lax.while_loop(lambda h: jnp.max(h) > 0.1, lambda h: jnp.tanh(h @ w), x)
  with pytest.raises(ValueError, match="Reverse-mode") as caught:
    check(fn, "mixed_bfloat16", 0.3 * jnp.eye(W), X)
  assert any("gradients=False" in note for note in caught.value.__notes__)
  with pytest.raises(TypeError, match=r"tolerance must be a number or None\. Got '5%'"):
    check(fn, "mixed_bfloat16", jnp.eye(W), X, tolerance="5%")
