"""check: values and gradients against a reference, and the modules that lose most."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import _planted as planted
import mpjax
from mpjax.inspect import check

W = planted.WIDTH
X = jax.random.normal(jax.random.key(9), (2, W))
SQUARE = jax.random.normal(jax.random.key(1), (W, W)) / 3


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


def test_a_scan_is_looked_into_and_a_while_loop_is_named_as_not():
  def fn(w, x):
    def cell(carry, scale):
      with jax.named_scope("cell"):
        carry = jnp.tanh(carry @ w) * scale
      return carry, None

    x, _ = jax.lax.scan(cell, x, jnp.ones(20).at[13].set(1e-9))
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 1e9, lambda x: x + 1, x)

  report = check(fn, "mixed_float16", SQUARE, X, gradients=False)
  (row,) = report.rows
  assert row.module == "cell" and row.output.size == 20 * 2 * W
  assert [part.what for part in report.not_looked_into] == ["while"]
  assert "Not looked into: while" in str(report)


def test_a_float32_policy_agrees_to_the_bit():
  report = check(planted.stray, "float32", {"a": SQUARE, "b": SQUARE}, X)
  assert report.agrees
  assert {row.output.error for row in report.rows} == {0.0}
  assert {g.gradient.error for g in report.gradients} == {0.0}


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
