"""The loss scaler around, inside and beside the transformations and loops that people use."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState as FlaxTrainState

import mpjax
from _arrays import array

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

PARAMS = {"w": array([1.0, -2.0]), "b": array([0.5])}
TRUE = {"w": array([3.0, 4.0]), "b": array([0.0])}


def scaled(grads, state):
  return jax.tree.map(lambda g: g * mpjax.loss_scale(state), grads)


def spoiled(grads):
  return {**grads, "w": grads["w"].at[0].set(jnp.nan)}


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b)


def not_frozen(params):
  return {name: name == "w" for name in params}


def labels(params):
  return {name: name for name in params}


INNER = {
  "adam": lambda: optax.adam(1e-1),
  "adamw": lambda: optax.adamw(1e-1, weight_decay=0.1),
  "clip, decay and schedule": lambda: optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.0, 10)),
  ),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
    learning_rate=optax.linear_schedule(0.1, 0.0, 10)
  ),
  "multi_transform": lambda: optax.partition({"w": optax.adam(1e-1), "b": optax.sgd(1.0)}, labels),
  "masked": lambda: optax.masked(optax.sgd(0.5), not_frozen),
  "ema": lambda: optax.chain(optax.sgd(0.5), optax.ema(0.9)),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-1), 2).gradient_transformation(),
  "MultiSteps object": lambda: optax.MultiSteps(optax.adam(1e-1), 2),
  "lookahead-free momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
  "adafactor": lambda: optax.adafactor(0.1),
  "lion": lambda: optax.lion(1e-2),
  "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


def plain(tx):
  return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())
def test_the_optimizer_inside_does_what_it_does_without_scaling(make):
  tx = mpjax.dynamic_loss_scaling(make(), growth_interval=2)
  reference = optax.with_extra_args_support(plain(make()))
  extra = {"value": jnp.float32(1)}
  state, expected = tx.init(PARAMS), reference.init(PARAMS)
  params = reference_params = PARAMS
  update, reference_update = jax.jit(tx.update), jax.jit(reference.update)
  for i in range(5):
    grads = jax.tree.map(lambda g, i=i: g * (1.0 + i), TRUE)
    updates, state = update(scaled(grads, state), state, params, **extra)
    params = optax.apply_updates(params, updates)
    updates, expected = reference_update(grads, expected, reference_params, **extra)
    reference_params = optax.apply_updates(reference_params, updates)
  close(params, reference_params)
  assert jax.tree.structure(state.inner_state) == jax.tree.structure(expected)
  assert [x.dtype for x in jax.tree.leaves(state.inner_state)] == [
    x.dtype for x in jax.tree.leaves(expected)
  ]


@pytest.mark.quick(every=3, start=1)
@pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())
def test_a_skip_changes_nothing_of_the_optimizer_inside(make):
  """Moments, schedule counts, accumulators, hyperparameters, averages, noise keys."""
  tx = mpjax.dynamic_loss_scaling(make())
  update = jax.jit(tx.update)
  state = tx.init(PARAMS)
  _, state = update(scaled(TRUE, state), state, PARAMS, value=jnp.float32(1))
  updates, after = update(spoiled(TRUE), state, PARAMS, value=jnp.float32(jnp.nan))
  assert not after.last_finite
  assert bits(optax.apply_updates(PARAMS, updates)) == bits(PARAMS)

  def raw(state):
    return jax.tree.map(
      lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
      state.inner_state,
    )

  assert bits(raw(after)) == bits(raw(state))


def test_clipping_sees_unscaled_gradients():
  tx = mpjax.dynamic_loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
  state = tx.init(PARAMS)
  updates, _ = tx.update(scaled(TRUE, state), state, PARAMS)
  np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


def test_a_schedule_counts_applied_steps_only():
  schedule = optax.piecewise_constant_schedule(1.0, {2: 0.1})
  tx = mpjax.dynamic_loss_scaling(optax.sgd(schedule))
  state = tx.init(PARAMS)
  rates = []
  for event in ".n.nn.":
    grads = TRUE if event == "." else spoiled(TRUE)
    updates, state = tx.update(scaled(grads, state), state, PARAMS)
    rates.append(round(float(-updates["w"][0]) / 3, 4))
  assert rates == [1.0, 0.0, 1.0, 0.0, 0.0, 0.1]


# Accumulation -------------------------------------------------------------------------------------


def test_growth_counts_optimizer_steps_and_not_micro_steps():
  tx = mpjax.dynamic_loss_scaling(
    optax.MultiSteps(optax.sgd(1.0), 3), init_scale=8, growth_interval=2
  )
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  trail = []
  for _ in range(12):
    _, state = update(scaled(TRUE, state), state, PARAMS)
    trail.append(float(state.scale))
  assert trail == [8] * 5 + [16] * 6 + [32]


def test_a_bad_micro_batch_is_left_out_of_its_window_with_multisteps_inside():
  tx = mpjax.dynamic_loss_scaling(optax.MultiSteps(optax.sgd(1.0), 2), init_scale=8)
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  params = PARAMS
  for event in ".n.":  # the mean of the two good ones, each unscaled by its own scale
    grads = TRUE if event == "." else spoiled(TRUE)
    updates, state = update(scaled(grads, state), state, params)
    params = optax.apply_updates(params, updates)
  close(params, jax.tree.map(lambda p, g: p - g, PARAMS, TRUE))
  assert float(mpjax.loss_scale(state)) == 4


def test_the_accumulator_inside_is_float32_for_float16_gradients():
  tx = mpjax.static_loss_scaling(optax.MultiSteps(optax.sgd(1.0), 2), 2)
  state = tx.init(PARAMS)
  half = jax.tree.map(lambda g: (2 * g).astype(jnp.float16), TRUE)
  _, state = tx.update(half, state, PARAMS)
  assert {x.dtype for x in jax.tree.leaves(state.inner_state.acc_grads)} == {np.dtype("float32")}


def test_multisteps_outside_would_keep_a_nan_for_ever():
  """optax clears its accumulator by ``(1 - emit) * acc``, and 0 * nan is nan: hence the refusal."""
  tx = optax.MultiSteps(mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8), 2)
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  params = PARAMS
  for event in ".n" + "." * 8:
    updates, state = update(TRUE if event == "." else spoiled(TRUE), state, params)
    params = optax.apply_updates(params, updates)
  assert np.isnan(np.asarray(state.acc_grads["w"][0]))
  assert bits(params) == bits(PARAMS)
  assert int(state.inner_opt_state.consecutive_skips) == 5


# Where the state may lie --------------------------------------------------------------------------

NO_FAULTS = mpjax.testing.inject_faults(mpjax.testing.FaultSchedule.at({}))
LEGAL = {
  "alone": lambda tx: tx,
  "chain of one": optax.chain,
  "inject_faults": lambda tx: optax.chain(NO_FAULTS, tx),
  "inject_faults, named": lambda tx: optax.named_chain(("faults", NO_FAULTS), ("scaler", tx)),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda unused: tx)(unused=1.0),
  "master_weights": mpjax.master_weights,
  "all of them": lambda tx: optax.chain(
    NO_FAULTS, mpjax.master_weights(optax.inject_hyperparams(lambda unused: tx)(unused=1.0))
  ),
}


@pytest.mark.parametrize("wrap", LEGAL.values(), ids=LEGAL.keys())
def test_what_hands_gradients_on_may_stand_around_the_scaler(wrap):
  tx = wrap(mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8))
  state = tx.init(PARAMS)
  assert float(mpjax.loss_scale(state)) == 8
  updates, state = tx.update(scaled(TRUE, state), state, PARAMS)
  close(optax.apply_updates(PARAMS, updates), jax.tree.map(lambda p, g: p - g, PARAMS, TRUE))
  assert mpjax.step_is_finite(state)
  _, state = tx.update(spoiled(TRUE), state, PARAMS)
  assert not mpjax.step_is_finite(state)
  assert float(jax.jit(mpjax.loss_scale)(state)) == 4


REFUSED = {
  "clip outside": (lambda tx: optax.chain(optax.clip(1.0), tx), r"at '1'.*optax.chain\(...\)"),
  "decay outside": (lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)), "at '0'"),
  "ema outside": (lambda tx: optax.chain(tx, optax.ema(0.5)), "at '0'"),
  "named chain": (lambda tx: optax.named_chain(("c", optax.clip(1.0)), ("s", tx)), "at 's'"),
  "partition": (
    lambda tx: optax.partition({"w": tx, "b": optax.sgd(0.1)}, labels),
    r"one branch of optax.partition.*dynamic_loss_scaling\(optax.partition",
  ),
  "masked": (lambda tx: optax.masked(tx, not_frozen), r"dynamic_loss_scaling\(optax.masked"),
  "MultiSteps": (
    lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "inside optax.MultiSteps.*accumulate=k",
  ),
  "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 3), "state ApplyIfFiniteState"),
  "chain in inject_hyperparams": (
    lambda tx: optax.inject_hyperparams(lambda f: optax.chain(tx, optax.scale(f)))(f=1.0),
    "at 'inner_state/0'",
  ),
  "chain in master_weights": (
    lambda tx: mpjax.master_weights(optax.chain(optax.clip(1.0), tx)),
    "at 'inner_state/1'",
  ),
}


@pytest.mark.parametrize(("wrap", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_the_scaler_in_any_other_place_is_refused_with_what_to_write(wrap, message):
  tx = wrap(mpjax.dynamic_loss_scaling(optax.sgd(1.0)))
  message = f"must be the outermost transformation. Got it.*{message}"
  for refuse in (mpjax.loss_scale, mpjax.step_is_finite):
    with pytest.raises(ValueError, match=message):
      refuse(tx.init(PARAMS))
  with pytest.raises(ValueError, match=message):
    mpjax.TrainState.create(PARAMS, tx)
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  if "labels" in wrap.__code__.co_names or "not_frozen" in wrap.__code__.co_names:
    return  # they are by the names of PARAMS
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  with pytest.raises(ValueError, match=message):
    mpjax.nnx.make_train_step(lambda m, x: jnp.mean(m(x)))(model, optimizer, jnp.ones((3, 2)))


def test_a_whole_train_state_is_told_to_pass_its_optimizers():
  state = mpjax.TrainState.create(PARAMS, mpjax.dynamic_loss_scaling(optax.sgd(1.0)))
  with pytest.raises(ValueError, match=r"Got a TrainState that has one\. Pass"):
    mpjax.loss_scale(state)


def test_two_optimizers_share_one_scale():
  tx = mpjax.dynamic_loss_scaling(
    optax.partition({"w": optax.adam(1e-1), "b": optax.sgd(1.0)}, labels), init_scale=8
  )
  state = tx.init(PARAMS)
  updates, state = tx.update(spoiled(scaled(TRUE, state)), state, PARAMS)
  assert bits(optax.apply_updates(PARAMS, updates)) == bits(PARAMS)
  assert float(mpjax.loss_scale(state)) == 4


def test_two_optimizers_have_each_their_own_scale():
  def scaler():
    return mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8)

  tx = optax.partition({"w": scaler(), "b": scaler()}, labels)
  state = tx.init(PARAMS)
  _, state = tx.update(spoiled(TRUE), state, PARAMS)
  with pytest.raises(ValueError, match="pass the part of the state"):
    mpjax.loss_scale(state)
  own = {name: branch.inner_state for name, branch in state.inner_states.items()}
  assert {name: float(mpjax.loss_scale(s)) for name, s in own.items()} == {"w": 4, "b": 8}


# The loops of Flax --------------------------------------------------------------------------------


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def test_linens_train_state_needs_the_wrapped_optimizer_and_the_scaled_loss_only():
  model = Classifier()
  x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), growth_interval=2)
  params = model.init(jax.random.key(1), x)["params"]
  state = FlaxTrainState.create(apply_fn=model.apply, params=params, tx=tx)

  @jax.jit
  def step(state, x):
    def loss_fn(params):
      logits = state.apply_fn({"params": params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    scale = mpjax.loss_scale(state.opt_state)
    loss, grads = mpjax.value_and_grad(loss_fn)(state.params, loss_scale=scale)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(20):
    state, loss = step(state, x)
    losses.append(float(loss))
  assert losses[-1] < losses[0]
  assert float(mpjax.loss_scale(state.opt_state)) == 2.0**24
  before = bits((state.params, state.opt_state.inner_state))
  state, _ = step(state, x.at[0, 0].set(jnp.nan))
  assert bits((state.params, state.opt_state.inner_state)) == before
  assert not mpjax.step_is_finite(state.opt_state)


def test_nnx_optimizer_needs_the_wrapped_optimizer_and_the_scaled_loss_only():
  model = nnx.Sequential(
    nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1))
  )
  x, y = jax.random.normal(jax.random.key(0), (16, 4)), jnp.arange(16) % 3
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), growth_interval=2)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    scale = mpjax.loss_scale(optimizer.opt_state)

    def loss_fn(model):
      loss = optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
      return loss * scale, loss

    grads, loss = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer, x)) for _ in range(20)]
  assert losses[-1] < losses[0]
  assert float(mpjax.loss_scale(optimizer.opt_state)) == 2.0**24
  before = bits((nnx.state(model), nnx.as_pure(optimizer.opt_state).inner_state))
  step(model, optimizer, x.at[0, 0].set(jnp.nan))
  assert bits((nnx.state(model), nnx.as_pure(optimizer.opt_state).inner_state)) == before
  assert not mpjax.step_is_finite(optimizer.opt_state)
  assert mpjax.step_is_finite(optimizer.opt_state).shape == ()


def test_nnx_gradients_may_be_taken_through_value_and_grad():
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  x = jnp.ones((3, 2))
  graphdef, params = nnx.split(model)
  loss, grads = mpjax.value_and_grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(x) ** 2))(
    params, loss_scale=8.0
  )
  true = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
  close(jax.tree.map(lambda g: g / 8, nnx.as_pure(grads)), nnx.as_pure(true))
  assert loss.dtype == jnp.float32


# What an optimizer measures -----------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda tx: tx, mpjax.master_weights], ids=["alone", "masters"])
def test_what_optax_monitors_is_zero_until_a_step_is_applied(wrap):
  """Its state has what it measures only from the first update on."""
  measured = {"norm": optax.tree.norm, "mean": optax.measure_with_ema(optax.tree.norm, 0.5)}
  tx = mpjax.dynamic_loss_scaling(
    wrap(optax.chain(optax.monitor(measured), optax.sgd(0.1))), init_scale=4.0
  )
  params = {"w": jnp.full(4, 2.0)}
  state, norms = tx.init(params), []
  update = jax.jit(tx.update)
  for grad in (jnp.inf, 8.0, jnp.nan):
    _, state = update({"w": jnp.full(4, grad)}, state, params)
    norms.append(float(optax.tree.get(state, "norm")))
  assert norms == [0.0, 8.0, 8.0]  # the scale is 2 after the first


def test_a_step_takes_an_optimizer_that_monitors():
  tx = optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.sgd(0.1))
  step = mpjax.make_train_step(lambda params, x: jnp.sum(params["w"] * x), tx)
  state = mpjax.TrainState.create({"w": jnp.ones(4)}, tx)
  for _ in range(3):
    state, _ = step(state, jnp.ones(4))
  assert float(optax.tree.get(state.opt_state, "norm")) == 2.0
