"""The train step of NNX."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from mpjax._flax.nnx_step import make_train_step
from mpjax._train.step_parts import NonFiniteError, StepMetrics
from mpjax.testing import FaultSchedule, inject_gradients
from mpjax.training import LowPrecisionWarning

# optax.adam and Flax's BatchNorm mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jnp.sin(X @ jnp.array([1.0, -2.0, 0.5, 0.3]))
BATCH = {"x": X, "y": Y, "factor": jnp.float32(1)}
BAD = {**BATCH, "factor": jnp.float32(jnp.nan)}


class Net(nnx.Module):
  """BatchNorm statistics, a dropout stream and a counter, so that a step has much to restore."""

  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.last = nnx.Linear(8, 1, rngs=rngs)
    self.calls = nnx.Variable(jnp.int32(0))

  def __call__(self, x):
    self.calls[...] += 1
    return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))[:, 0]


def loss_fn(model, batch):
  return jnp.mean((model(batch["x"]) - batch["y"]) ** 2) * batch["factor"]


def make(tx, seed=0):
  model = Net(nnx.Rngs(seed))
  return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def bits(tree):
  def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def all_but_the_scaler(model, optimizer):
  """And the random streams, which move on."""
  inner = nnx.as_pure(optimizer.opt_state).inner_state
  held = nnx.state(model, nnx.Not(nnx.RngState))
  return bits((held, optimizer.step, inner))


def scaled_adam(**settings):
  return mpjax.dynamic_loss_scaling(optax.adam(1e-2), **settings)


POLICIES = [None, "float32", "mixed_bfloat16", "mixed_float16"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_trains_in_place_and_reports(policy):
  model, optimizer = make(scaled_adam())
  step = make_train_step(loss_fn, policy=policy)
  kernel = model.first.kernel
  losses = []
  for _ in range(40):
    metrics = step(model, optimizer, BATCH)
    losses.append(float(metrics.loss))
  assert isinstance(metrics, StepMetrics)
  assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
  assert np.mean(losses[-5:]) < losses[0] / 2
  assert model.first.kernel is kernel
  assert int(optimizer.step[...]) == 40
  assert int(model.calls[...]) == 40
  assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model, nnx.Param, nnx.BatchStat))} == {
    "float32"
  }
  opt_state = nnx.as_pure(optimizer.opt_state)
  assert {x.dtype.name for x in jax.tree.leaves(opt_state)} <= {"float32", "int32", "bool"}


def test_a_step_equals_nnxs_own_loop():
  """With momentum: the bias before BatchNorm has no gradient but rounding, which Adam makes big."""
  sgd = optax.sgd(0.05, momentum=0.9)
  model, optimizer = make(mpjax.dynamic_loss_scaling(sgd, growth_interval=2))
  other, plain = make(sgd)
  step = make_train_step(loss_fn)

  @nnx.jit
  def reference(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_fn)(model, BATCH)
    optimizer.update(model, grads)
    return loss, optax.tree.norm(nnx.as_pure(grads))

  for _ in range(5):
    metrics = step(model, optimizer, BATCH)
    loss, norm = reference(other, plain)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  expected = nnx.to_pure_dict(nnx.state(other, nnx.Param))
  chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_a_skipped_step_leaves_every_variable_but_the_scalers(policy):
  model, optimizer = make(scaled_adam())
  step = make_train_step(loss_fn, policy=policy)
  step(model, optimizer, BATCH)
  before, drawn = all_but_the_scaler(model, optimizer), int(model.drop.rngs.count[...])
  scale = float(mpjax.loss_scale(optimizer.opt_state))
  metrics = step(model, optimizer, BAD)
  assert not metrics.applied
  assert (int(metrics.consecutive_skips), int(metrics.total_skips)) == (1, 1)
  assert all_but_the_scaler(model, optimizer) == before
  assert int(model.drop.rngs.count[...]) == drawn + 1
  assert float(mpjax.loss_scale(optimizer.opt_state)) == scale / 2
  assert not mpjax.step_is_finite(optimizer.opt_state)
  metrics = step(model, optimizer, BATCH)
  assert metrics.applied
  assert all_but_the_scaler(model, optimizer) != before


def test_a_step_is_traced_once():
  traced = chex.assert_max_traces(loss_fn, 1)
  model, optimizer = make(scaled_adam(growth_interval=2))
  step = make_train_step(traced)
  for batch in (BATCH, BAD, BATCH, BATCH):
    step(model, optimizer, batch)


def test_a_step_without_scaling_applies_and_reports_constants():
  model, optimizer = make(optax.sgd(0.1))
  metrics = make_train_step(loss_fn)(model, optimizer, BATCH)
  assert (float(metrics.loss_scale), bool(metrics.applied)) == (1.0, True)
  assert int(metrics.total_skips) == 0


@pytest.mark.parametrize("policy", [None, "float32", "mixed_bfloat16"])
def test_without_scaling_no_scaler_operation_is_in_the_step(policy):
  model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
  step = make_train_step(lambda m, b: jnp.mean((m(b["x"])[:, 0] - b["y"]) ** 2), policy=policy)
  scaler = ("is_finite", "select")
  for tx, present in ((optax.sgd(0.1), False), (mpjax.static_loss_scaling(optax.sgd(0.1)), True)):
    text = step.lower(model, nnx.Optimizer(model, tx, wrt=nnx.Param), BATCH).as_text()
    assert [name in text for name in scaler] == [present] * 2


def test_auxiliary_output_is_returned():
  model, optimizer = make(scaled_adam())
  step = make_train_step(lambda m, b: (loss_fn(m, b), {"n": jnp.int32(3)}), has_aux=True)
  assert int(step(model, optimizer, BATCH).aux["n"]) == 3
  step = make_train_step(loss_fn, has_aux=True)
  with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\)"):
    step(model, optimizer, BATCH)


def test_only_the_variables_of_the_optimizer_are_trained():
  class Frozen(nnx.Param):
    pass

  model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
  model.bias = Frozen(jnp.ones(1))
  optimizer = nnx.Optimizer(model, scaled_adam(), wrt=nnx.Not(Frozen))
  kernel = bits(model.kernel)
  step = make_train_step(
    lambda m, b: jnp.mean((m(b["x"])[:, 0] - b["y"]) ** 2), policy="mixed_bfloat16"
  )
  step(model, optimizer, BATCH)
  assert bits(model.kernel) != kernel
  np.testing.assert_array_equal(model.bias[...], [1.0])


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_scheduled_faults_in_random_leaves_leave_everything_finite_and_train(policy):
  """NaN or inf in random gradient leaves on 5% of the steps."""
  schedule = FaultSchedule.random(200, 0.05, seed=1)

  def faulty_loss(model, batch):
    params = nnx.state(model, nnx.Param)
    nnx.update(model, inject_gradients(params, schedule, batch["step"]))
    return loss_fn(model, batch)

  model, optimizer = make(scaled_adam(growth_interval=20))
  step = make_train_step(faulty_loss, policy=policy)
  losses = []
  for i in range(200):
    struck = i in schedule.struck
    before = all_but_the_scaler(model, optimizer) if struck else None
    metrics = step(model, optimizer, {**BATCH, "step": jnp.int32(i)})
    losses.append(float(metrics.loss))
    if struck:
      assert not metrics.applied
      assert all_but_the_scaler(model, optimizer) == before
  assert mpjax.all_finite((nnx.state(model), nnx.as_pure(optimizer.opt_state)))
  assert int(metrics.total_skips) >= len(schedule.struck) > 5
  assert np.mean(losses[-10:]) < losses[0] / 4


def test_too_many_skips_raise_with_the_leaves():
  model, optimizer = make(scaled_adam())
  step = make_train_step(loss_fn, max_consecutive_skips=2)
  step(model, optimizer, BATCH)
  before = all_but_the_scaler(model, optimizer)
  step(model, optimizer, BAD)
  with pytest.raises(
    NonFiniteError, match=r"Got 2 skipped steps.*first/bias.*at loss nan"
  ) as caught:
    step(model, optimizer, BAD)
  assert "last/kernel" in caught.value.paths
  assert caught.value.state == (model, optimizer)
  assert all_but_the_scaler(model, optimizer) == before
  with pytest.raises(ValueError, match="needs an optimizer with a loss scaler"):
    step(*make(optax.sgd(0.1)), BATCH)


def test_buffers_are_donated_unless_told_otherwise():
  model, optimizer = make(scaled_adam())
  old = model.first.kernel.get_value()
  make_train_step(loss_fn, donate=False)(model, optimizer, BATCH)
  assert not old.is_deleted()
  old = model.first.kernel.get_value()
  make_train_step(loss_fn)(model, optimizer, BATCH)
  assert old.is_deleted()


def test_parameters_in_another_dtype_than_the_policys_are_refused():
  model, optimizer = make(scaled_adam())
  with pytest.raises(ValueError, match=r"held in bfloat16.*Got first/bias: f32\[8\]"):
    make_train_step(loss_fn, policy="bfloat16")(model, optimizer, BATCH)


def test_float16_moments_without_a_scaler_are_refused():
  """By itself Adam is NaN at zero gradient on float16 parameters (optax#1754)."""

  def half(tx):
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float16, dtype=jnp.float16)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

  def zero(model, batch):
    return 0 * jnp.mean(model(batch["x"]))

  with pytest.raises(
    ValueError, match=r"must not be float16.*Got 0/mu/bias: f16\[1\].*static_loss"
  ):
    make_train_step(zero)(*half(optax.adam(1e-2)), BATCH)
  model, optimizer = half(mpjax.static_loss_scaling(optax.adam(1e-2), 1))
  before = bits(nnx.state(model))
  with pytest.warns(LowPrecisionWarning, match=r"float32 masters.*Got bias: f16\[1\] and 1 more"):
    metrics = make_train_step(zero)(model, optimizer, BATCH)
  assert metrics.applied
  assert bits(nnx.state(model)) == before


def test_the_states_go_through_split_and_merge_between_steps():
  model, optimizer = make(scaled_adam())
  step = make_train_step(loss_fn)
  step(model, optimizer, BATCH)
  model, optimizer = nnx.merge(*nnx.split((model, optimizer)))
  assert step(model, optimizer, BATCH).applied
  assert float(mpjax.loss_scale(optimizer.opt_state)) == 2.0**15


def test_a_variable_that_the_loss_adds_is_kept():
  class Noting(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
      y = self.linear(x)[:, 0]
      self.mean = nnx.Intermediate(jnp.mean(y))
      return y

  model = Noting(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, scaled_adam(), wrt=nnx.Param)
  assert make_train_step(loss_fn)(model, optimizer, BATCH).applied
  assert model.mean.shape == ()


def test_rules_by_module_path_govern_the_loss():
  model, optimizer = make(scaled_adam())
  policies = mpjax.PolicyMap({"last": "float32"}, default="mixed_bfloat16")
  text = make_train_step(loss_fn, policy=policies).lower(model, optimizer, BATCH).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  assert any("xbf16>" in line for line in dots)
  assert any("tensor<16x8xf32>, tensor<8x1xf32>" in line for line in dots)
  with pytest.raises(ValueError, match="Rule 'lost' matched no module"):
    make_train_step(loss_fn, policy=mpjax.PolicyMap({"lost": "float32"}, default="float16"))(
      model, optimizer, BATCH
    )
