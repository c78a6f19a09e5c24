"""That loops which depend on the loss scale are found, and the others are not accused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import mpjax
from _arrays import array
from mpjax.testing import FaultSchedule, assert_scale_invariant, inject_faults

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

X = array(np.linspace(-1, 1, 24).reshape(6, 4))
PARAMS = {"a": array(np.linspace(0.1, 1, 4)[:, None]), "b": array([[0.5]])}


def loss_fn(params, x):
  return jnp.mean((x @ params["a"] + params["b"] - 1.0) ** 2)


def float16_loss(params, x):
  return mpjax.autocast(loss_fn, "mixed_float16")(params, x)


def scaler(inner=None):
  return mpjax.dynamic_loss_scaling(optax.adam(0.1) if inner is None else inner)


def make_step(tx, gradients, change=lambda grads: grads):
  """A loop of one's own, with the scale found wherever it is."""

  def step(params, opt_state, x):
    grads = change(gradients(params, opt_state, x))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return step


def scaled(params, opt_state, x, loss=loss_fn):
  return mpjax.value_and_grad(loss)(params, x, loss_scale=mpjax.loss_scale(opt_state))[1]


def unscaled(params, opt_state, x, loss=loss_fn):
  del opt_state
  return jax.grad(loss)(params, x)


def unscaled_twice(params, opt_state, x, loss=loss_fn):
  scale = mpjax.loss_scale(opt_state)
  return jax.tree.map(lambda g: g / scale, scaled(params, opt_state, x, loss))


def scaled_twice(params, opt_state, x, loss=loss_fn):
  scale = mpjax.loss_scale(opt_state)
  return scaled(params, opt_state, x, lambda p, x: loss(p, x) * scale)


def clipped(grads):
  return optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]


OPTIMIZERS = {
  "sgd": lambda: optax.sgd(0.1),
  "sgd of small steps": lambda: optax.sgd(1e-7),
  "adamw": lambda: optax.adamw(0.1),
  "clip inside": lambda: optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(0.1)),
}
by_optimizer = pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS)
by_loss = pytest.mark.parametrize("loss", [loss_fn, float16_loss])


# Right loops --------------------------------------------------------------------------------------


@pytest.mark.quick
@by_loss
@by_optimizer
def test_a_right_loop_passes_and_its_arguments_stay_as_they_are(inner, loss):
  tx = scaler(inner())
  state = tx.init(PARAMS)
  step = make_step(tx, functools.partial(scaled, loss=loss))
  assert_scale_invariant(jax.jit(step, donate_argnums=(0, 1)), PARAMS, state, X)
  assert float(mpjax.loss_scale(state)) == 2.0**15
  assert float(PARAMS["b"].item()) == 0.5


@pytest.mark.quick("mixed_float16")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_the_train_steps_pass(policy):
  tx = scaler()
  state = mpjax.TrainState.create(PARAMS, tx)
  assert_scale_invariant(mpjax.make_train_step(loss_fn, tx, policy=policy), state, X)
  model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  kernel = np.array(model.kernel[...])
  step = mpjax.nnx.make_train_step(lambda m, x: jnp.mean((m(x) - 1.0) ** 2), policy=policy)
  assert_scale_invariant(step, model, optimizer, X)
  np.testing.assert_array_equal(model.kernel[...], kernel)
  assert float(mpjax.loss_scale(optimizer.opt_state)) == 2.0**15


@pytest.mark.ci
def test_a_float16_network_passes_whose_gradients_vanish_in_part_at_small_scales():
  # The gradient of the keys' bias is zero but for rounding.
  model = nn.Sequential([nn.Dense(16), nn.MultiHeadDotProductAttention(2), nn.tanh, nn.Dense(8)])
  x = jax.random.normal(jax.random.key(1), (2, 6, 4))
  loss = lambda p, x: jnp.mean(nn.log_softmax(model.apply(p, x))[..., 0])
  tx = scaler()
  state = mpjax.TrainState.create(jax.jit(model.init)(jax.random.key(0), x), tx)
  assert_scale_invariant(mpjax.make_train_step(loss, tx, policy="mixed_float16"), state, x)


@pytest.mark.parametrize("value_and_grad", [mpjax.value_and_grad, jax.value_and_grad])
def test_the_train_state_of_flax_is_compared(value_and_grad):
  model = nn.Dense(1)
  params = model.init(jax.random.key(0), X)
  state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=scaler())

  @jax.jit
  def step(state, x):
    loss = lambda params: jnp.mean((state.apply_fn(params, x) - 1.0) ** 2)
    given = {"loss_scale": mpjax.loss_scale(state.opt_state)}
    given = given if value_and_grad is mpjax.value_and_grad else {}
    value, grads = value_and_grad(loss)(state.params, **given)
    return state.apply_gradients(grads=grads), value

  if value_and_grad is mpjax.value_and_grad:
    assert_scale_invariant(step, state, X)
  else:
    with pytest.raises(AssertionError, match="not scaled, or unscaled before"):
      assert_scale_invariant(step, state, X)


def test_a_carry_and_legal_neighbors_of_the_scaler_pass():
  tx = optax.chain(inject_faults(FaultSchedule.at({})), scaler())
  step = make_step(tx, scaled)
  carried = jax.jit(lambda carry, x: (step(*carry, x), jnp.zeros(())))
  assert_scale_invariant(carried, (PARAMS, tx.init(PARAMS)), X)
  masters = mpjax.master_weights(scaler())
  params = mpjax.cast_floating(PARAMS, jnp.bfloat16)
  step = jax.jit(make_step(masters, scaled))
  assert_scale_invariant(step, params, masters.init(params), X)


def test_a_scale_that_overflows_does_not_count():
  tx = scaler(optax.sgd(1e-3))
  loss = lambda params, x: float16_loss(params, x * 8)
  step = jax.jit(make_step(tx, functools.partial(scaled, loss=loss)))
  assert_scale_invariant(step, PARAMS, tx.init(PARAMS), X, scales=(2, 64, 2**16))
  with pytest.raises(ValueError, match=r"applied at 1 of 64, 65536"):
    assert_scale_invariant(step, PARAMS, tx.init(PARAMS), X, scales=(64, 2**16))


def test_a_step_may_raise_rather_than_skip():
  tx = scaler(optax.sgd(1e-3))
  right = make_step(tx, functools.partial(scaled, loss=float16_loss))

  def step(params, opt_state, x):
    params, opt_state = right(params, opt_state, x)
    if not mpjax.step_is_finite(opt_state):
      raise RuntimeError("diverged")
    return params, opt_state

  assert_scale_invariant(step, PARAMS, tx.init(PARAMS), X)


# Wrong loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "change",
  [jnp.nan_to_num, lambda g: jnp.where(jnp.isfinite(g), g, 0)],
)
def test_gradients_whose_overflow_is_hidden_are_found(change):
  tx = scaler(optax.sgd(1e-3))
  cleaned = functools.partial(jax.tree.map, change)
  step = jax.jit(make_step(tx, functools.partial(scaled, loss=float16_loss), cleaned))
  with pytest.raises(AssertionError, match="whose gradients are inf or NaN must be skipped"):
    assert_scale_invariant(step, PARAMS, tx.init(PARAMS), X)


@pytest.mark.quick
@by_loss
@by_optimizer
@pytest.mark.parametrize("gradients", [unscaled, unscaled_twice], ids=["unscaled", "twice"])
def test_gradients_that_are_not_scaled_are_found(inner, loss, gradients):
  tx = scaler(inner())
  step = make_step(tx, functools.partial(gradients, loss=loss))
  with pytest.raises(AssertionError, match="must not depend on the loss scale"):
    assert_scale_invariant(step, PARAMS, tx.init(PARAMS), X)


@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(1e-7)], ids=["adam", "small"])
@pytest.mark.parametrize("gradients", [unscaled, unscaled_twice], ids=["unscaled", "twice"])
def test_gradients_that_are_not_scaled_are_named(gradients, inner):
  tx = scaler(inner)
  with pytest.raises(AssertionError, match="not scaled, or unscaled before") as caught:
    assert_scale_invariant(jax.jit(make_step(tx, gradients)), PARAMS, tx.init(PARAMS), X)
  assert "mpjax.value_and_grad" in str(caught.value)
  assert len(str(caught.value)) < 600


def test_gradients_that_are_not_scaled_are_named_in_the_middle_of_a_training_too():
  """Moments that are there already decay, the more so the less arrives of the gradients."""
  tx = scaler(optax.adam(1e-3))
  right, params, state = jax.jit(make_step(tx, scaled)), PARAMS, tx.init(PARAMS)
  for _ in range(5):
    params, state = right(params, state, X)
  assert_scale_invariant(right, params, state, X)
  with pytest.raises(AssertionError, match="not scaled, or unscaled before"):
    assert_scale_invariant(jax.jit(make_step(tx, unscaled)), params, state, X)


def test_float16_gradients_that_vanish_in_part_are_named_too():
  wide = {"a": jnp.linspace(0.1, 1.0, 4)[:, None] * jnp.ones((4, 3)), "b": jnp.zeros((1, 3))}
  tx = scaler()
  step = jax.jit(make_step(tx, functools.partial(unscaled_twice, loss=float16_loss)))
  with pytest.raises(AssertionError, match="not scaled, or unscaled before"):
    assert_scale_invariant(step, wide, tx.init(wide), jnp.ones((8, 4)))


def test_a_loss_that_is_scaled_twice_is_named():
  tx = scaler()
  with pytest.raises(AssertionError, match="scaled twice"):
    assert_scale_invariant(make_step(tx, scaled_twice), PARAMS, tx.init(PARAMS), X)


def test_a_clip_in_front_of_the_scaler_is_named():
  tx = scaler(optax.sgd(0.1))
  step = make_step(tx, scaled, clipped)
  with pytest.raises(AssertionError, match=r"in front of the scaler .* such as a clip"):
    assert_scale_invariant(step, PARAMS, tx.init(PARAMS), X)
  chain = optax.chain(optax.clip_by_global_norm(1.0), tx)
  by_hand = lambda params, state, x: scaled(params, state[1], x)
  with pytest.raises(AssertionError, match=r"dynamic_loss_scaling\(optax.chain\(...\)\)"):
    assert_scale_invariant(make_step(chain, by_hand), PARAMS, chain.init(PARAMS), X)


def test_a_scaler_in_one_branch_is_named():
  tx = optax.partition({"a": scaler(), "b": optax.sgd(0.1)}, {"a": "a", "b": "b"})
  find = lambda state: jax.tree.leaves(state)[0]
  by_hand = lambda params, state, x: jax.tree.map(lambda g: g * find(state), unscaled(params, 0, x))
  with pytest.raises(AssertionError, match=r"dynamic_loss_scaling\(optax.partition\(...\)\)"):
    assert_scale_invariant(make_step(tx, by_hand), PARAMS, tx.init(PARAMS), X)


def test_two_optimizers_of_which_one_scales_are_found():
  one, other = scaler(), optax.sgd(0.1)

  def step(params, states, x):
    grads = scaled(params, states["a"], x)
    a, state_a = one.update(grads["a"], states["a"], params["a"])
    b, state_b = other.update(grads["b"], states["b"], params["b"])
    return optax.apply_updates(params, {"a": a, "b": b}), {"a": state_a, "b": state_b}

  states = {"a": one.init(PARAMS["a"]), "b": other.init(PARAMS["b"])}
  with pytest.raises(AssertionError, match=r"reach an optimizer scaled \(0/b\)"):
    assert_scale_invariant(step, PARAMS, states, X)


@pytest.mark.parametrize("wrong", ["unscaled", "clip", "branch"])
def test_wrong_nnx_loops_are_found(wrong):
  make = {
    "unscaled": scaler,
    "clip": lambda: optax.chain(optax.clip(1.0), scaler()),
    "branch": lambda: optax.partition(
      {"a": scaler(), "b": optax.sgd(0.1)}, lambda p: nnx.map_state(lambda path, _: "a", p)
    ),
  }
  model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, make[wrong](), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    return loss

  with pytest.raises(AssertionError, match="loss scale"):
    assert_scale_invariant(step, model, optimizer, X)


# What cannot be tested ----------------------------------------------------------------------------


def test_a_step_that_cannot_be_tested_is_an_error_that_says_why():
  tx, key = scaler(), iter(range(100))
  plain = optax.sgd(0.1)
  with pytest.raises(ValueError, match=r"state of a loss scaler\. Got none"):
    assert_scale_invariant(make_step(plain, unscaled), PARAMS, plain.init(PARAMS), X)
  with pytest.raises(TypeError, match="must return its new state"):
    assert_scale_invariant(lambda p, s, x: jnp.sum(x), PARAMS, tx.init(PARAMS), X)
  noisy = lambda p, s, x: scaled(p, s, x + next(key))
  with pytest.raises(ValueError, match="same results for the same arguments"):
    assert_scale_invariant(make_step(tx, noisy), PARAMS, tx.init(PARAMS), X)
  with pytest.raises(ValueError, match="power of two"):
    assert_scale_invariant(make_step(tx, scaled), PARAMS, tx.init(PARAMS), X, scales=(3, 4))


def test_a_step_that_changes_nothing_shows_nothing():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  params = {"w": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"must change something.*all 1 leaves"):
    assert_scale_invariant(lambda params, opt_state: (params, opt_state), params, tx.init(params))
