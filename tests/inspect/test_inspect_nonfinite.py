"""locate_nonfinite: the module, the line and the iteration where numbers stop being finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import _planted as planted
import mpjax
from _arrays import array, normal
from mpjax.inspect import locate_nonfinite

W = planted.WIDTH
KEY = jax.random.key(0)
XS = array(normal(5, 2, 3, W))
ZEROS = array(np.zeros((2, W)))
EYE = {"w": array(np.eye(W))}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_an_overflow_in_one_head_of_layer_7_is_found_there(kind):
  if kind == "function":
    args = (planted.layers, planted.layer_params(KEY), XS)
  elif kind == "linen":
    args = (planted.LinenLayers(), planted.linen_layer_variables(KEY), XS)
  else:
    args = (mpjax.apply_policy(planted.nnx_layers(KEY), "mixed_float16"), XS)
  policy = None if kind == "nnx" else "mixed_float16"
  report = locate_nonfinite(*args, policy=policy)
  first = report.first
  layer = "layers/7" if kind == "nnx" else "layer_7"
  assert first.module.startswith(layer) and planted.at(first.line, "overflow")
  assert (first.op, first.made) == ("dot_general", "inf")
  assert first.where == f"[:, {planted.HEAD}, :, :]"
  assert first.result.array.startswith("f16[2,4,3,3]")
  assert all(operand.infs == operand.nans == 0 for operand in first.operands)
  assert not report.finite and "layer" in report.summary


def test_the_same_layers_are_finite_in_float32():
  report = locate_nonfinite(planted.layers, planted.layer_params(KEY), XS)
  assert report.finite and report.first is None and not report.rows
  assert "nothing that is not finite arrives" in report.summary


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_a_nan_in_iteration_13_of_a_scan_is_found_in_that_iteration(kind):
  xs = planted.bad_inputs()
  if kind == "function":
    report = locate_nonfinite(jax.jit(planted.scanned), EYE, xs)
  elif kind == "linen":
    model = planted.LinenScanned()
    variables = {"params": {"cell": {"Dense_0": {"kernel": jnp.eye(W), "bias": jnp.zeros(W)}}}}
    report = locate_nonfinite(model, variables, xs, policy="mixed_bfloat16")
  else:
    report = locate_nonfinite(planted.NNXScanned(nnx.Rngs(0)), xs)
  first = report.first
  assert first.within == ("iteration 13 of scan (0 to 19)",)
  assert planted.at(first.line, "scan" if kind == "function" else f"scan {kind}")
  assert (first.op, first.made, first.where) == ("log", "nan", "[0, 3]")
  assert first.operands[0].low == -1.0
  assert kind == "nnx" or first.module == "cell"


@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_a_bad_custom_vjp_is_found_in_the_backward_pass_with_its_rule(kind):
  if kind == "function":
    report = locate_nonfinite(planted.normed, EYE, ZEROS, backward=True)
  elif kind == "linen":
    variables = {"params": {"dense": {"kernel": jnp.eye(W), "bias": jnp.zeros(W)}}}
    report = locate_nonfinite(planted.LinenNormed(), variables, ZEROS, backward=True)
  else:
    report = locate_nonfinite(planted.NNXNormed(nnx.Rngs(0)), ZEROS, backward=True)
  first = report.first
  assert first.backward and first.module == "norm"
  assert (first.op, first.made) == ("div", "nan")
  # JAX gives what a rule computes the line of the call; the rule is named with its own.
  assert planted.at(first.line, f"call {kind}")
  rule = planted.line_of("custom_vjp") - 2
  assert first.rule.startswith("_norm_backward at ") and first.rule.endswith(f":{rule}")
  assert any(name.startswith("gradient of") for name in report.arrived)


def test_a_gradient_given_as_a_function_is_looked_into_too():
  report = locate_nonfinite(jax.jit(jax.grad(planted.normed)), EYE, ZEROS, policy="mixed_float16")
  assert report.first.backward and report.first.op == "div" and report.first.module == "norm"


def test_a_branch_a_while_loop_and_a_checkpoint_are_named_and_entered():
  def fn(x):
    x = jax.lax.cond(x[0] > 0, lambda x: x, lambda x: x + 1, x)
    x = jax.lax.while_loop(lambda x: x[0] > -3, lambda x: x - 1 + jnp.sqrt(x + 2), x)
    return jax.checkpoint(jnp.sum)(x)

  report = locate_nonfinite(fn, jnp.array([-2.5, 1.0]))
  assert report.first.op == "sqrt"
  assert report.first.within == ("iteration 2 of while",)
  branch = locate_nonfinite(lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.log, x), jnp.float32(-1.0))
  assert branch.first.within == ("branch 0 of cond",)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("start", [4.0, jnp.nan], ids=["made in the loop", "given"])
def test_a_while_loop_that_nan_keeps_from_ending_is_left_and_named(start):
  def fn(x):
    return jax.lax.while_loop(lambda c: ~(c > 5), lambda c: jnp.sqrt(c - 3), x) + 1

  report = locate_nonfinite(fn, jnp.float32(start))
  (line,) = report.unended
  assert line.function == "fn" and "had not ended after 10,000 iterations" in report.summary
  assert not report.finite
  if start == 4.0:
    assert (report.first.op, report.first.within) == ("sqrt", ("iteration 1 of while",))
  else:
    assert report.first.op == "argument x"


def test_a_while_loop_that_ends_with_nan_is_followed_to_its_end():
  def fn(x):
    step = lambda state: (state[0] + 1, jnp.where(state[0] == 3, 0.0, jnp.log(state[1] - 2)))
    return jax.lax.while_loop(lambda state: state[0] < 5, step, (0, x))[1]

  report = locate_nonfinite(fn, jnp.float32(1.0))
  assert report.unended == () and report.rows[0].within == ("iteration 0 of while",)


def test_what_is_masked_does_not_arrive_until_its_gradient_does():
  def guarded(x):
    return jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0))

  x = jnp.array([1.0, 0.0])
  report = locate_nonfinite(guarded, x)
  assert report.finite and [(row.op, row.arrives) for row in report.rows] == [("log", False)]
  backward = locate_nonfinite(guarded, x, backward=True)
  assert backward.first.backward and backward.first.op == "div"
  assert backward.arrived == ("gradient of x",)


def test_a_mask_of_infinities_is_meant_until_a_row_is_fully_masked():
  def attend(scores, mask):
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))

  scores = jnp.ones((2, 3))
  mask = jnp.array([[True, False, True], [True, True, True]])
  assert not locate_nonfinite(attend, scores, mask).rows
  report = locate_nonfinite(attend, scores, mask.at[0].set(False))
  assert (report.first.op, report.first.made) == ("sub", "nan")
  assert report.first.where == "[0, :]"


def test_an_argument_that_is_not_finite_is_named_first():
  report = locate_nonfinite(lambda x: x * 2, jnp.array([1.0, jnp.nan]))
  assert report.first.op == "argument x" and report.first.where == "[1]"


def test_loss_scaling_too_large_for_the_backward_pass_is_found():
  loss = lambda w, x: jnp.mean(jnp.square(x @ w["w"]))
  x = jnp.ones((2, W))
  found = locate_nonfinite(loss, EYE, x, policy="mixed_float16", backward=True, loss_scale=2.0**20)
  assert found.first.backward and found.first.made == "inf"
  assert locate_nonfinite(loss, EYE, x, policy="mixed_float16", backward=True).finite


def test_shapes_are_refused():
  with pytest.raises(TypeError, match="The arguments must be arrays"):
    locate_nonfinite(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float32))


@pytest.mark.parametrize(
  "zero",
  [0.0, array(0, jnp.complex64), array(0, jnp.float8_e5m2), array(0, jnp.bfloat16)],
  ids=["number", "complex", "float8", "bfloat16"],
)
def test_gradients_of_parameters_of_every_kind_are_looked_at(zero):
  fn = lambda p: jnp.sum(p["w"]) + jnp.sqrt(jnp.abs(jnp.asarray(p["c"]).astype(jnp.complex64)))
  report = locate_nonfinite(fn, {"c": zero, **EYE}, backward=True)
  assert report.first.op == "div" and report.arrived == ("gradient of p/c",)


def test_a_nan_that_the_program_states_is_no_inf():
  report = locate_nonfinite(lambda x: jnp.where(x > 0, x, jnp.nan), -jnp.ones(3))
  assert "an inf or a NaN that the program states" in report.summary


def test_a_function_may_hold_a_mutable_reference():
  last = jax.new_ref(jnp.zeros(()))

  def loss(w, x):
    value = jnp.log(jnp.sum(x @ w["w"]))
    last[...] = jax.lax.stop_gradient(value)
    return value

  report = locate_nonfinite(loss, EYE, ZEROS)
  assert (report.first.op, report.first.made) == ("log", "inf")


def test_a_jitted_loss_of_a_model_that_draws_is_searched_backwards():
  """Differentiated, it returns another part of the model's state."""

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.linear, self.dropout = nnx.Linear(W, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      return self.dropout(self.linear(x))

  loss = nnx.jit(lambda model, x: jnp.mean(model(x) ** 2))
  assert locate_nonfinite(loss, Net(nnx.Rngs(0)), ZEROS, backward=True).finite
