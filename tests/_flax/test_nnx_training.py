"""The train step of NNX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from _arrays import array, normal
from mpjax._flax.nnx_step import make_train_step
from mpjax._train.step_parts import NonFiniteError, StepMetrics
from mpjax.testing import FaultSchedule, inject_gradients
from mpjax.training import LowPrecisionWarning

# optax.adam and Flax's BatchNorm mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

X = array(normal(0, 16, 4))
Y = array(np.sin(np.asarray(X) @ [1.0, -2.0, 0.5, 0.3]))
BATCH = {"x": X, "y": Y, "factor": array(1)}
BAD = {**BATCH, "factor": array(np.nan)}


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


@functools.cache
def scaled_adam(**settings):
  """One for all tests, so that a step which several of them take is compiled once."""
  return mpjax.dynamic_loss_scaling(optax.adam(1e-2), **settings)


@functools.cache
def step_of(policy=None):
  return make_train_step(loss_fn, policy=policy)


POLICIES = [None, "float32", "mixed_bfloat16", "mixed_float16"]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_trains_in_place_and_reports(policy):
  model, optimizer = make(scaled_adam())
  step = step_of(policy)
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
  step = step_of(policy)
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
  scaler = ("applies stablehlo.and", "select")
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


@pytest.mark.ci  # `tests/_train/test_training.py` holds it for the core that both steps share
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


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_a_loss_may_sow_in_every_step_and_a_skipped_one_changes_nothing_else():
  class Sower(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
      self.sow(nnx.Intermediate, "hidden", jnp.mean(x))
      return self.layer(x)[:, 0]

  for tx in (optax.sgd(0.1), mpjax.dynamic_loss_scaling(optax.sgd(0.1))):
    model = Sower(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = make_train_step(loss_fn)
    losses = [float(step(model, optimizer, BATCH).loss) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert len(model.hidden.get_value()) == 3
  before = np.asarray(model.layer.kernel[...])
  assert not step(model, optimizer, BAD).applied
  np.testing.assert_array_equal(model.layer.kernel[...], before)


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
  step_of()(model, optimizer, BATCH)
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
  step = step_of()
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


# What Flax's own loops pass -----------------------------------------------------------------------


class Noisy(nnx.Module):
  """Noise comes from a stream that the caller passes; a plain array is an attribute."""

  def __init__(self):
    self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))
    self.offset = jnp.float32(0.5)

  def __call__(self, x, rngs):
    noise = nnx.Dropout(0.5)(jnp.ones_like(x), rngs=rngs)
    return self.linear(self.norm(x) * noise)[:, 0] + self.offset


def noisy_loss(model, x, y, rngs, metrics):
  loss = jnp.mean((model(x, rngs) - y) ** 2)
  metrics.update(values=loss)
  return loss


def noisy(tx, kind=nnx.Optimizer):
  model = Noisy()
  return model, kind(model, tx, wrt=nnx.Param), nnx.Rngs(7), nnx.metrics.Average()


def test_a_model_and_optimizer_may_come_alone_as_in_flaxs_own_loops():
  loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
  step = make_train_step(loss)
  (alone, both), x = (nnx.Linear(4, 2, rngs=nnx.Rngs(0)) for _ in range(2)), jnp.ones((3, 4))
  optimizers = [
    nnx.ModelAndOptimizer(model, optax.sgd(0.1), wrt=nnx.Param) for model in (alone, both)
  ]
  step(optimizers[0], x, y=jnp.ones((3, 2)))
  step(both, optimizers[1], x, y=jnp.ones((3, 2)))
  np.testing.assert_array_equal(alone.kernel[...], both.kernel[...])
  assert step.lower(optimizers[0], x, jnp.ones((3, 2)))


@pytest.mark.quick
@pytest.mark.parametrize("policy", [None, "mixed_float16"])
@pytest.mark.parametrize("kind", [nnx.Optimizer, nnx.ModelAndOptimizer])
def test_a_step_takes_streams_metrics_and_several_batches_as_flaxs_own_loops_do(kind, policy):
  model, optimizer, rngs, metrics = noisy(mpjax.dynamic_loss_scaling(optax.sgd(0.05)), kind)
  other, plain, other_rngs, other_metrics = noisy(optax.sgd(0.05))
  step = make_train_step(noisy_loss, policy=policy)
  reference = nnx.jit(nnx.value_and_grad(noisy_loss))
  x, y = BATCH["x"], BATCH["y"]
  for _ in range(3):
    loss = step(model, optimizer, x, y, rngs=rngs, metrics=metrics).loss
    expected, grads = reference(other, x, y, other_rngs, other_metrics)
    plain.update(other, grads)
    np.testing.assert_allclose(loss, expected, rtol=1e-5 if policy is None else 1e-2)
  np.testing.assert_allclose(metrics.compute(), other_metrics.compute(), rtol=1e-2)
  assert int(rngs.default.count[...]) == int(other_rngs.default.count[...]) == 3
  kernel, wanted = model.linear.kernel[...], other.linear.kernel[...]
  np.testing.assert_allclose(kernel, wanted, rtol=1e-5 if policy is None else 1e-2, atol=1e-3)
  np.testing.assert_allclose(model.norm.mean[...], other.norm.mean[...], rtol=1e-4, atol=1e-6)


def test_a_skipped_step_moves_the_streams_that_it_was_passed_and_nothing_else_of_them():
  model, optimizer, rngs, metrics = noisy(mpjax.dynamic_loss_scaling(optax.sgd(0.05)))
  step = make_train_step(noisy_loss)
  step(model, optimizer, BATCH["x"], BATCH["y"], rngs, metrics)
  before = bits(nnx.state((model, metrics)))
  found = step(model, optimizer, BATCH["x"], BATCH["y"] * jnp.inf, rngs, metrics)
  assert not found.applied
  assert bits(nnx.state((model, metrics))) == before
  assert int(rngs.default.count[...]) == 2


def test_streams_and_metrics_go_from_one_micro_batch_into_the_next():
  model, optimizer, rngs, metrics = noisy(mpjax.dynamic_loss_scaling(optax.sgd(0.05)))
  step = make_train_step(noisy_loss, accumulate=4)
  x, y = BATCH["x"][:8], BATCH["y"][:8]
  loss = step(model, optimizer, x, y, rngs=rngs, metrics=metrics).loss
  assert int(rngs.default.count[...]) == 4
  np.testing.assert_allclose(metrics.compute(), loss, rtol=1e-6)


def test_another_model_beside_the_trained_one_is_not_trained():
  def distilled(model, x, teacher):
    return jnp.mean((model(x) - teacher(x)) ** 2)

  model, teacher = (nnx.Linear(4, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1))
  optimizer = nnx.Optimizer(model, scaled_adam(), wrt=nnx.Param)
  before = bits(nnx.state(teacher))
  step = make_train_step(distilled, policy="mixed_bfloat16")
  losses = [float(step(model, optimizer, BATCH["x"], teacher).loss) for _ in range(5)]
  assert losses == sorted(losses, reverse=True)
  assert bits(nnx.state(teacher)) == before
  step.lower(model, optimizer, BATCH["x"], teacher=teacher)


# What cannot be brought back is refused -----------------------------------------------------------


def add_a_flag(model):
  model.flag = 1


def count_in_python(model):
  model.calls += 1


def add_a_layer(model):
  model.more = nnx.Linear(4, 4, rngs=nnx.Rngs(1))


def delete_a_layer(model):
  del model.unused


def add_an_array(model):
  model.cache = jnp.ones(3)


class Changing(nnx.Module):
  def __init__(self):
    self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    self.unused = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    self.calls = 0


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
@pytest.mark.parametrize(
  ("change", "name"),
  [
    (add_a_flag, "flag"),
    (count_in_python, "calls"),
    (add_a_layer, "more"),
    (delete_a_layer, "unused"),
    (add_an_array, "cache"),
  ],
  ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_a_loss_changes_beside_variables_would_be_lost_and_is_refused(change, name, policy):
  def loss(model, batch):
    change(model)
    return jnp.mean(model.linear(batch["x"]))

  model = Changing()
  optimizer = nnx.Optimizer(model, scaled_adam(), wrt=nnx.Param)
  with pytest.raises(ValueError, match=f"must be held in nnx.Variables; this call .* '{name}'"):
    make_train_step(loss, policy=policy)(model, optimizer, BATCH)


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_a_cached_property_is_no_change(policy):
  class Scaled(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    @functools.cached_property
    def scale(self):
      return self.linear.in_features**-0.5

    def __call__(self, x):
      return self.linear(x) * self.scale

  model = Scaled()
  optimizer = nnx.Optimizer(model, scaled_adam(), wrt=nnx.Param)
  step = make_train_step(lambda model, batch: jnp.mean(model(batch["x"])), policy=policy)
  assert step(model, optimizer, BATCH).applied
  under = mpjax.apply_policy(model, "mixed_bfloat16")
  want = model.linear(BATCH["x"]) / 2
  np.testing.assert_allclose(under(BATCH["x"]), want, atol=0.02)
  np.testing.assert_allclose(model(BATCH["x"]), want)  # caches
  np.testing.assert_allclose(under(BATCH["x"]), want, atol=0.02)


def test_an_array_that_is_an_attribute_arrives_and_is_restored():
  class Counting(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
      self.seen = jnp.zeros(())

  def loss(model, batch):
    model.seen = model.seen + 1
    return jnp.mean(model.linear(batch["x"])) * batch["factor"]

  model = Counting()
  optimizer = nnx.Optimizer(model, scaled_adam(), wrt=nnx.Param)
  step = make_train_step(loss)
  assert step(model, optimizer, BATCH).applied
  assert not step(model, optimizer, BAD).applied
  assert float(model.seen) == 1


def test_a_model_whose_arrays_a_step_has_taken_is_told_so():
  model, optimizer = make(scaled_adam())
  twin = nnx.clone(model)
  nnx.update(twin, nnx.state(model))  # the same arrays in both
  of_twin = nnx.Optimizer(twin, scaled_adam(), wrt=nnx.Param)
  step = step_of()
  step(model, optimizer, BATCH)
  with pytest.raises(ValueError, match=r"Got calls, of which a step has taken the buffer.*clone"):
    step(twin, of_twin, BATCH)


def test_a_limit_on_skips_is_refused_where_it_cannot_raise():
  model, optimizer = make(scaled_adam())
  step = make_train_step(loss_fn, max_consecutive_skips=2)
  with pytest.raises(TypeError, match=r"told on the host.*Got a step inside of a jax.jit"):
    nnx.jit(step)(model, optimizer, BATCH)
