"""The loss scaler by itself: its schedule, its state, its exactness, its skips."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from _arrays import array
from _backends import assert_same_bits
from mpjax._scaling.scaling_state import find_scaling_state
from mpjax._scaling.states import LossScalingState

GOOD = array([1.0, -2.0])
BAD = {
  "i": array([1.0, jnp.inf]),
  "n": array([jnp.nan, 1.0]),
  "m": array([-jnp.inf, 1.0]),
}


def run(tx, events, params=None):
  """The states after each event: '.' a good step, 'i' inf, 'm' -inf, 'n' NaN."""
  params = jnp.zeros(2) if params is None else params
  update = jax.jit(tx.update)
  states = [tx.init(params)]
  for event in events:
    grads = GOOD * mpjax.loss_scale(states[-1]) if event == "." else BAD[event]
    updates, state = update(grads, states[-1], params)
    params = optax.apply_updates(params, updates)
    states.append(state)
  return states[1:]


def scales(tx, events):
  return [float(state.scale) for state in run(tx, events)]


# The schedule -------------------------------------------------------------------------------------

EVENTS = "..i..n...nn....i.i......"
TABLE = {
  "torch": (
    {"min_scale": 2**-20},
    "8 8 4 4 4 2 2 2 4 2 1 1 1 2 2 1 1 .5 .5 .5 1 1 1 2",
  ),
  "tf_keras": ({"min_scale": 1}, "8 8 4 4 4 2 2 2 4 2 1 1 1 2 2 1 1 1 1 1 2 2 2 4"),
  "Megatron": (
    {"min_scale": 2**-20, "hysteresis": 2},
    "8 8 8 8 8 4 4 4 8 8 4 4 4 8 8 8 8 4 4 4 8 8 8 16",
  ),
  "DeepSpeed, consecutive": (
    {"min_scale": 2**-20, "hysteresis": 2, "consecutive_hysteresis": True},
    "8 8 8 8 8 8 8 8 16 16 8 8 8 16 16 16 16 16 16 16 32 32 32 64",
  ),
}


@pytest.mark.parametrize(("settings", "expected"), TABLE.values(), ids=TABLE.keys())
@pytest.mark.parametrize("inf", ["i", "m"], ids=["+inf", "-inf"])
def test_the_scale_follows_the_schedule_of_its_peers(settings, expected, inf):
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, growth_interval=3, **settings)
  assert scales(tx, EVENTS.replace("i", inf)) == [float(x) for x in expected.split()]


def test_the_settings_are_those_of_the_readme_unless_told_otherwise():
  """Start and backoff are Keras's, growth torch's, the floor tf_keras's, the ceiling Apex's."""
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0))
  assert float(tx.init(GOOD).scale) == 2.0**15
  low, high = (tx.init(GOOD)._replace(scale=jnp.float32(s)) for s in (1, 2.0**24))
  update = jax.jit(tx.update)
  assert float(update(BAD["i"], low, GOOD)[1].scale) == 1
  assert float(update(BAD["i"], high, GOOD)[1].scale) == 2.0**23
  nearly = {"good_steps": jnp.int32(1999)}
  assert float(update(GOOD, high._replace(**nearly), GOOD)[1].scale) == 2.0**24
  assert float(update(GOOD, low._replace(**nearly), GOOD)[1].scale) == 2
  assert float(update(GOOD, low._replace(good_steps=jnp.int32(1998)), GOOD)[1].scale) == 1


def test_an_inf_in_any_single_leaf_of_many_is_found():
  tx = mpjax.static_loss_scaling(optax.sgd(1.0), 2)
  grads = {str(i): jnp.ones((i % 3, 2)[: i % 2 + 1]) for i in range(1, 12) if i % 3}
  update = jax.jit(tx.update)
  assert update(grads, tx.init(grads), grads)[1].last_finite
  for name in grads:
    bad = {**grads, name: grads[name].at[(-1,) * grads[name].ndim].set(-jnp.inf)}
    assert not update(bad, tx.init(grads), grads)[1].last_finite, name


def test_the_scale_grows_up_to_its_ceiling():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=2, growth_interval=1, max_scale=32)
  assert scales(tx, "." * 8) == [4, 8, 16, 32, 32, 32, 32, 32]


def test_growth_at_the_top_of_float32_stays_finite():
  tx = mpjax.dynamic_loss_scaling(
    optax.sgd(1.0),
    init_scale=2.0**126,
    max_scale=2.0**126,
    growth_factor=2.0**100,
    growth_interval=1,
  )
  params = jnp.zeros(2)
  state = tx.init(params)
  for _ in range(3):
    _, state = tx.update(jnp.full((2,), 1e30), state, params)
  assert float(state.scale) == 2.0**126


def test_the_scale_is_never_backed_off_below_its_floor():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=2, min_scale=1)
  assert scales(tx, "iiiii") == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_growth_comes_after_exactly_n_good_steps_and_a_skip_restarts_the_count(interval):
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, growth_interval=interval)
  assert scales(tx, "." * interval) == [8] * (interval - 1) + [16]
  after_skip = scales(tx, "." * (interval - 1) + "i" + "." * interval)
  assert after_skip == [8] * (interval - 1) + [4] * interval + [8]


def test_a_static_scale_never_changes_but_still_skips():
  tx = mpjax.static_loss_scaling(optax.sgd(1.0), 4)
  states = run(tx, "..in.")
  assert [float(s.scale) for s in states] == [4] * 5
  assert [bool(s.last_finite) for s in states] == [True, True, False, False, True]


def test_skips_are_counted():
  states = run(mpjax.dynamic_loss_scaling(optax.sgd(1.0)), ".ii.n..")
  assert [int(s.consecutive_skips) for s in states] == [0, 1, 2, 0, 1, 0, 0]
  assert [int(s.total_skips) for s in states] == [0, 1, 2, 2, 3, 3, 3]
  assert [int(s.good_steps) for s in states] == [1, 0, 0, 1, 0, 1, 2]


@given(
  st.text(".in", max_size=40),
  st.integers(1, 4),
  st.integers(1, 3),
  st.sampled_from([0.5, 0.25]),
  st.sampled_from([2, 4]),
)
def test_the_scale_stays_a_power_of_two_between_floor_and_ceiling(
  events, interval, hysteresis, backoff, growth
):
  tx = mpjax.dynamic_loss_scaling(
    optax.sgd(1.0),
    init_scale=8,
    min_scale=0.5,
    max_scale=64,
    growth_interval=interval,
    hysteresis=hysteresis,
    backoff_factor=backoff,
    growth_factor=growth,
  )
  state = tx.init(jnp.zeros(2))
  for event in events:
    _, state = tx.update(GOOD if event == "." else BAD[event], state, None)
    scale = float(state.scale)
    assert np.frexp(scale)[0] == 0.5
    assert 0.5 <= scale <= 64


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"init_scale": 400}, r"init_scale must be a positive power of two.*400.*2\*\*9 = 512"),
    ({"init_scale": 0}, "init_scale must be a positive power of two"),
    ({"init_scale": -8}, "init_scale must be a positive power of two"),
    ({"init_scale": float("inf")}, "init_scale must be a positive power of two"),
    ({"init_scale": float("nan")}, "init_scale must be a positive power of two"),
    ({"init_scale": True}, "init_scale must be a power of two"),
    ({"init_scale": 2.0**127}, r"init_scale must lie between 2\*\*-126 and 2\*\*126"),
    ({"min_scale": 2.0**-130}, "min_scale must lie between"),
    ({"min_scale": 3}, "min_scale must be a positive power of two"),
    ({"max_scale": float("inf")}, "max_scale must be a positive power of two"),
    ({"growth_factor": 1.5}, "growth_factor must be a positive power of two"),
    ({"growth_factor": 1}, "growth_factor must be above 1"),
    ({"growth_factor": 0.5}, "growth_factor must be above 1"),
    ({"growth_factor": True}, "growth_factor must be a power of two"),
    ({"backoff_factor": 0.3}, "backoff_factor must be a positive power of two"),
    ({"backoff_factor": 1}, "backoff_factor must be below 1"),
    ({"backoff_factor": 2}, "backoff_factor must be below 1"),
    ({"backoff_factor": 0}, "backoff_factor must be a positive power of two"),
    ({"growth_interval": 0}, "growth_interval must be at least 1"),
    ({"growth_interval": True}, "growth_interval must be an integer"),
    ({"hysteresis": 0}, "hysteresis must be at least 1"),
    ({"init_scale": 2, "min_scale": 4}, "init_scale must lie between min_scale and max_scale"),
    ({"init_scale": 2**20, "max_scale": 2**16}, "init_scale must lie between min_scale and max"),
  ],
  ids=str,
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings, message):
  with pytest.raises(ValueError, match=message):
    mpjax.dynamic_loss_scaling(optax.sgd(1.0), **settings)


@pytest.mark.parametrize("scale", [0, 3, -1, float("inf"), float("nan"), True])
def test_a_static_scale_that_cannot_work_is_refused(scale):
  with pytest.raises(ValueError, match="scale must be a"):
    mpjax.static_loss_scaling(optax.sgd(1.0), scale)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"init_scale": "2**15"}, r"init_scale must be a power of two. Got '2[*][*]15' of type str"),
    ({"growth_interval": 2.0}, "growth_interval must be an integer. Got 2.0 of type float"),
  ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(settings, message):
  with pytest.raises(TypeError, match=message):
    mpjax.dynamic_loss_scaling(optax.sgd(1.0), **settings)


def test_a_number_that_is_traced_is_refused():
  make = optax.inject_hyperparams(mpjax.dynamic_loss_scaling, static_args="inner")
  init = jax.jit(make(inner=optax.sgd(0.1)).init)
  with pytest.raises(TypeError, match=r"known when the function is made.* in static_args"):
    init({"w": jnp.ones(2)})


def test_what_is_no_optimizer_is_refused():
  with pytest.raises(TypeError, match=r"must be an optax.GradientTransformation. Got .*float"):
    mpjax.dynamic_loss_scaling(1e-3)


def test_a_setting_may_be_any_number_type():
  tx = mpjax.dynamic_loss_scaling(
    optax.sgd(1.0), init_scale=np.float32(8), growth_interval=np.int64(3), max_scale=jnp.float32(16)
  )
  assert float(tx.init(jnp.zeros(2)).scale) == 8


# Exactness ----------------------------------------------------------------------------------------


def identity_scaling(**settings):
  """A scaler whose updates are what the optimizer saw."""
  return mpjax.dynamic_loss_scaling(optax.identity(), **settings)


def test_scale_and_unscale_use_the_same_scale_on_a_growth_step():
  """The unscaling of mpx uses the scale after its growth: gradients are half."""
  tx = identity_scaling(init_scale=8, growth_interval=2)
  w = jnp.array([3.0, 5.0])
  state = tx.init(w)
  for _ in range(6):
    _, grads = mpjax.value_and_grad(lambda w: jnp.sum(w * w))(w, loss_scale=mpjax.loss_scale(state))
    updates, state = tx.update(grads, state, w)
    np.testing.assert_array_equal(updates, [6.0, 10.0])
  assert float(state.scale) == 64


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.integers(0, 24))
def test_scale_then_unscale_is_exact(values, exponent):
  tx = mpjax.static_loss_scaling(optax.identity(), 2.0**exponent)
  grads = jnp.asarray(np.array(values, np.float32))
  grads = jnp.where(jnp.abs(grads) < 2.0**-100, 0.0, grads)
  updates, _ = tx.update(grads * jnp.float32(2.0**exponent), tx.init(grads), grads)
  np.testing.assert_array_equal(updates, grads)


def test_gradients_are_float32_before_they_are_unscaled():
  tx = mpjax.static_loss_scaling(optax.identity(), 2.0**15)
  grads = jnp.full((2,), 1e-3, jnp.float16)
  updates, _ = tx.update(grads, tx.init(grads), grads)
  assert updates.dtype == jnp.float32
  np.testing.assert_allclose(updates, np.float32(np.float16(1e-3)) / 2**15, rtol=1e-7)


def test_a_scale_below_one_that_overflows_on_unscaling_is_not_applied():
  tx = mpjax.static_loss_scaling(optax.sgd(1.0), 2.0**-20)
  w = jnp.ones(2)
  updates, state = tx.update(jnp.full((2,), 1e37), tx.init(w), w)
  assert not state.last_finite
  np.testing.assert_array_equal(optax.apply_updates(w, updates), w)


def test_finite_entries_of_an_overflowing_leaf_are_unscaled_for_whoever_looks():
  seen = []

  def look(updates, state, params=None):
    seen.append(updates)
    return updates, state

  tx = mpjax.static_loss_scaling(optax.GradientTransformation(lambda p: (), look), 4)
  grads = jnp.array([4.0, jnp.inf])
  tx.update(grads, tx.init(grads), grads)
  np.testing.assert_array_equal(seen[0], [1.0, np.inf])


def test_large_finite_gradients_are_not_mistaken_for_infinite_ones():
  tx = mpjax.static_loss_scaling(optax.sgd(1.0), 1)
  grads = [jnp.full((4,), 1e18), jnp.full((4,), 9e18)]
  _, state = tx.update(grads, tx.init(grads), grads)
  assert state.last_finite


# Gradients of a scaled loss -----------------------------------------------------------------------


def test_a_float16_loss_is_float32_before_it_is_scaled():
  """With the default scale and a float16 mean, the first step is applied."""
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0))

  def loss_fn(w):
    return jnp.mean(w.astype(jnp.float16) * jnp.float16(3))

  w = jnp.full((4,), 2.0)
  state = tx.init(w)
  loss, grads = mpjax.value_and_grad(loss_fn)(w, loss_scale=mpjax.loss_scale(state))
  assert (loss.dtype, float(loss)) == (jnp.float32, 6.0)
  updates, state = tx.update(grads, state, w)
  assert state.last_finite
  np.testing.assert_array_equal(updates, [-0.75] * 4)


def test_an_underflowing_gradient_is_rescued():
  def loss_fn(x):
    x = x.astype(jnp.float16)
    return x * jnp.float16(1e4) * jnp.float16(1e-4) * jnp.float16(1e-4)

  x = jnp.float32(1)
  _, lost = mpjax.value_and_grad(loss_fn)(x, loss_scale=1.0)
  _, kept = mpjax.value_and_grad(loss_fn)(x, loss_scale=2.0**15)
  assert lost == 0
  np.testing.assert_allclose(kept / 2**15, 1e-4, rtol=0.01)


def test_value_and_grad_returns_aux_and_the_unscaled_loss():
  def loss_fn(a, b, *, power):
    loss = jnp.sum(a**power) + jnp.sum(b)
    return loss, {"a": a}

  a, b = jnp.array([2.0]), jnp.array([3.0])
  grad = mpjax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
  (loss, aux), grads = jax.jit(lambda a, b: grad(a, b, loss_scale=8.0, power=2))(a, b)
  assert float(loss) == 7
  assert aux["a"] == a
  assert [float(g[0]) for g in grads] == [32.0, 8.0]


def test_a_gradient_penalty_needs_no_unscaling():
  def penalized(w):
    inner = jax.grad(lambda w: jnp.sum(w**3))(w)
    return jnp.sum(inner**2)

  w = jnp.array([1.0, 2.0])
  loss, grads = mpjax.value_and_grad(penalized)(w, loss_scale=2.0**10)
  np.testing.assert_array_equal(grads / 2**10, jax.grad(penalized)(w))
  assert loss == penalized(w)


@pytest.mark.parametrize(
  ("loss", "found"),
  [
    (jnp.ones(2), r"f32\[2\]"),
    (jnp.int32(1), r"i32\[\]"),
    ((jnp.float32(1), 2), "tuple"),
    (1, "int"),
  ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, found):
  with pytest.raises(TypeError, match=f"real floating-point scalar. Got {found}"):
    mpjax.value_and_grad(lambda w: loss)(jnp.ones(2), loss_scale=1.0)


def test_aux_without_a_pair_is_refused():
  with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\)"):
    mpjax.value_and_grad(lambda w: jnp.sum(w), has_aux=True)(jnp.ones(2), loss_scale=1.0)


# Skips --------------------------------------------------------------------------------------------


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_skip_leaves_parameters_and_moments_bit_identical(standard_promotion):
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-1))
  params = {"w": jnp.array([1.0, -0.0, 0.0]), "b": jnp.array([2e-38, -3.0, jnp.inf])}
  state = tx.init(params)
  good = {"w": jnp.ones(3), "b": jnp.ones(3)}
  updates, state = tx.update(good, state, params)
  for leaf in ("w", "b"):
    for value in (jnp.nan, jnp.inf, -jnp.inf):
      bad = {**good, leaf: good[leaf].at[1].set(value)}
      updates, after = tx.update(bad, state, params)
      assert bits(optax.apply_updates(params, updates)) == bits(params)
      assert bits(after.inner_state) == bits(state.inner_state)


def test_a_storm_of_nan_is_never_applied_and_training_recovers(standard_promotion):
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-1), init_scale=2.0**15)
  params = {"w": jnp.array([1.0, -0.0])}
  state = tx.init(params)
  step = jax.jit(tx.update)
  start = bits((params, state.inner_state))
  for _ in range(300):
    updates, state = step({"w": jnp.array([jnp.nan, 1.0])}, state, params)
    params = optax.apply_updates(params, updates)
    assert float(state.scale) >= 1.0
  assert bits((params, state.inner_state)) == start
  assert int(state.consecutive_skips) == 300
  true = {"w": jnp.array([0.3, -0.2])}
  updates, state = step(jax.tree.map(lambda g: g * state.scale, true), state, params)
  expected, _ = optax.adam(1e-1).update(true, optax.adam(1e-1).init(params), params)
  assert_same_bits(updates["w"], expected["w"])


def test_the_test_comes_before_any_masking_transform():
  hiding = {
    "clip": optax.clip(1.0),
    "zero_nans": optax.zero_nans(),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "scale by zero": optax.scale(0.0),
  }
  for name, hide in hiding.items():
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
      tx = mpjax.dynamic_loss_scaling(optax.chain(hide, optax.sgd(1.0)))
      w = jnp.ones(2)
      updates, state = tx.update(jnp.array([bad, 1.0]), tx.init(w), w)
      assert not state.last_finite, name
      assert bits(optax.apply_updates(w, updates)) == bits(w), name


def test_the_choice_is_a_select_and_no_product():
  tx = mpjax.static_loss_scaling(optax.identity(), 1)
  w = jnp.ones(2)
  updates, _ = tx.update(jnp.array([jnp.nan, jnp.inf]), tx.init(w), w)
  np.testing.assert_array_equal(updates, [0.0, 0.0])


def test_a_float16_parameter_does_not_lose_adam_its_epsilon(standard_promotion):
  """Adam on float16 parameters is NaN at zero gradient by itself (optax#1754)."""
  w = jnp.ones(2, jnp.float16)
  adam = optax.adam(1e-2)
  alone, _ = adam.update(jnp.zeros(2, jnp.float16), adam.init(w), w)
  assert np.isnan(np.asarray(alone, np.float32)).all()
  tx = mpjax.static_loss_scaling(adam, 1)
  state = tx.init(w)
  for _ in range(3):
    updates, state = tx.update(jnp.zeros(2, jnp.float16), state, w)
    w = optax.apply_updates(w, updates)
  assert {x.dtype for x in jax.tree.leaves(state.inner_state)} == {
    np.dtype(np.float32),
    np.dtype(np.int32),
  }
  np.testing.assert_array_equal(w, jnp.ones(2, jnp.float16))


def test_float16_gradients_do_not_underflow_in_the_second_moment(standard_promotion):
  w = jnp.ones(2)
  tx = mpjax.static_loss_scaling(optax.adam(1e-2), 1)
  updates, _ = tx.update(jnp.full((2,), 1e-4, jnp.float16), tx.init(w), w)
  np.testing.assert_allclose(updates, -1e-2, rtol=1e-3)


@pytest.mark.parametrize(
  "grads",
  [
    {"a": array([1, 1]), "none": None},
    {"a": array([1, 1]), "int": array([0, 1, 2], jnp.int32)},
    {"a": array([1, 1]), "float0": np.zeros(3, jax.dtypes.float0)},
    {"a": array([1, 1]), "empty": array(np.ones((0, 2)))},
    {"a": array([1, 1]), "scalar": array(1)},
    {"a": array([1, 1]), "complex": array([1 + 2j] * 2, jnp.complex64)},
    {"a": array([1, 1]), "bool": array([1, 1], bool)},
    {"a": array([1, 1]), "float8": array([1, 1], jnp.float8_e5m2)},
    {"a": array([1, 1]), "python": 2.0},
    {"a": array([1, 1]), "numpy": np.ones(2, np.float32)},
    {},
    (),
  ],
  ids=lambda g: list(g)[-1] if g else type(g).__name__,
)
@pytest.mark.parametrize("finite", [True, False], ids=["good", "bad"])
def test_leaves_that_are_no_float_arrays_pass(grads, finite):
  if not finite and not grads:
    return
  tx = mpjax.static_loss_scaling(optax.identity(), 2)
  grads = grads if finite else {**grads, "a": jnp.array([1.0, jnp.nan])}
  updates, state = tx.update(grads, tx.init({}), None)
  assert bool(state.last_finite) is finite
  assert jax.tree.structure(updates) == jax.tree.structure(grads)
  if "complex" in grads:
    expected = 0.5 + 1j if finite else 0
    np.testing.assert_array_equal(updates["complex"], np.full(2, expected))
  if "int" in grads and finite:
    np.testing.assert_array_equal(updates["int"], grads["int"])
  if "python" in grads:
    assert float(updates["python"]) == (1.0 if finite else 0.0)


def test_extra_arguments_reach_the_optimizer():
  def update(updates, state, params=None, *, value, **extra):
    return jax.tree.map(lambda u: u * value, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
  tx = mpjax.static_loss_scaling(inner, 2)
  updates, _ = tx.update(jnp.full((2,), 2.0), tx.init(jnp.ones(2)), None, value=jnp.float32(5))
  np.testing.assert_array_equal(updates, [5.0, 5.0])
  plain = mpjax.static_loss_scaling(optax.sgd(1.0), 2)
  plain.update(jnp.ones(2), plain.init(jnp.ones(2)), None, value=jnp.float32(5))


# The state ----------------------------------------------------------------------------------------

SETTINGS = {"init_scale": 8, "growth_interval": 2, "min_scale": 4, "max_scale": 16, "hysteresis": 2}
WANTED = {
  "scale": jnp.float32,
  "good_steps": jnp.int32,
  "consecutive_skips": jnp.int32,
  "total_skips": jnp.int32,
  "hysteresis": jnp.int32,
  "last_finite": jnp.bool_,
}


def make_state():
  return mpjax.dynamic_loss_scaling(optax.trace(0.9), **SETTINGS)


def check(state):
  assert isinstance(state, LossScalingState)
  for name, dtype in WANTED.items():
    field = getattr(state, name)
    assert field.dtype == dtype, name
    assert not getattr(field, "weak_type", False), name


def test_every_field_is_a_strongly_typed_scalar_from_the_first_state_on():
  for state in [make_state().init(jnp.ones(2)), *run(make_state(), "..i.nn")]:
    check(state)
    assert all(getattr(state, name).shape == () for name in WANTED)


def test_weakly_typed_inner_state_becomes_strong_and_is_traced_once():
  inner = optax.GradientTransformation(
    lambda p: {"count": jnp.asarray(1.0)}, lambda u, s, p=None: (u, {"count": s["count"] + 1.0})
  )
  tx = mpjax.static_loss_scaling(inner, 1)
  update = jax.jit(chex.assert_max_traces(tx.update, 1))
  state = tx.init(jnp.ones(2))
  for _ in range(3):
    _, state = update(jnp.ones(2), state, jnp.ones(2))
  assert not state.inner_state["count"].weak_type


def test_three_jitted_steps_are_traced_once():
  tx = make_state()
  update = jax.jit(chex.assert_max_traces(tx.update, 1))
  state = tx.init(jnp.ones(2))
  for grads in (GOOD, BAD["n"], GOOD):
    _, state = update(grads, state, jnp.ones(2))


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).dtype == np.asarray(y).dtype
    np.testing.assert_array_equal(x, y)


def test_every_field_survives_jit_and_tree_map_and_pickle():
  state = run(make_state(), ".i.")[-1]
  for copy in (
    jax.jit(lambda s: s)(state),
    jax.tree.map(lambda x: x, state),
    pickle.loads(pickle.dumps(state)),
    jax.device_put(jax.device_get(state)),
  ):
    check(copy)
    same(copy, state)


@pytest.mark.parametrize("leaf", [None, object(), "x"], ids=["None", "object", "str"])
def test_the_state_flattens_and_unflattens_with_any_leaves(leaf):
  leaves, structure = jax.tree.flatten(make_state().init(jnp.ones(2)))
  hollow = structure.unflatten([leaf] * len(leaves))
  assert isinstance(hollow, LossScalingState)
  assert hollow.scale is leaf
  same(structure.unflatten(leaves), make_state().init(jnp.ones(2)))


def test_the_step_is_a_fixed_point_of_scan_and_equal_to_a_loop():
  tx = make_state()
  w = jnp.zeros(2)
  events = "..i..nn..."
  grads = jnp.stack([GOOD if e == "." else BAD[e] for e in events])

  def body(state, g):
    updates, state = tx.update(g, state, w)
    return state, (updates, state.scale)

  final, (_, trail) = jax.jit(lambda s: jax.lax.scan(body, s, grads))(tx.init(w))
  check(final)
  state = tx.init(w)
  for g, scale in zip(grads, trail, strict=True):
    _, state = tx.update(g, state, w)
    assert state.scale == scale
  same(final, state)


def test_a_vmapped_step_keeps_its_lanes_apart():
  tx = make_state()
  w = jnp.zeros((3, 2))
  state = jax.vmap(tx.init)(w)
  grads = jnp.stack([GOOD, BAD["n"], GOOD])
  updates, state = jax.vmap(tx.update)(grads, state, w)
  check(state)
  assert state.last_finite.tolist() == [True, False, True]
  np.testing.assert_array_equal(updates[1], [0.0, 0.0])
  _, state = jax.vmap(tx.update)(grads, state, w)
  assert state.scale.tolist() == [16, 4, 16]


def test_floor_ceiling_and_hysteresis_outlive_jit():
  """The floor of jmp's scaler is its default again after one jitted step (jmp#44)."""
  assert scales(make_state(), "iiiiii") == [8, 4, 4, 4, 4, 4]
  assert scales(make_state(), "." * 8) == [8, 16, 16, 16, 16, 16, 16, 16]


def test_eval_shape_gives_the_state_of_a_step():
  tx = make_state()
  shapes = jax.eval_shape(tx.init, jnp.ones(2))
  _, after = jax.eval_shape(tx.update, jnp.ones(2), shapes, jnp.ones(2))
  check(shapes)
  check(after)
  assert jax.tree.structure(after) == jax.tree.structure(shapes)


def test_the_state_can_be_donated():
  tx = make_state()
  update = jax.jit(tx.update, donate_argnums=(0, 1))
  state = tx.init(jnp.ones(2))
  for _ in range(3):
    _, state = update(GOOD.copy(), state, jnp.ones(2))
  check(state)


def test_the_state_goes_through_an_orbax_checkpoint(tmp_path):
  """The scaler of jmp crashes an Orbax save."""
  ocp = pytest.importorskip("orbax.checkpoint")
  tx = make_state()
  state = run(tx, ".i.n")[-1]
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "scaled", state)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(tmp_path / "scaled", jax.eval_shape(tx.init, jnp.zeros(2)))
  check(restored)
  same(restored, state)
  _, after = tx.update(GOOD, restored, jnp.zeros(2))
  same(after, tx.update(GOOD, state, jnp.zeros(2))[1])


def test_a_run_with_scaling_goes_on_without_it_and_the_reverse():
  inner = optax.trace(0.9)
  tx = mpjax.dynamic_loss_scaling(inner, **SETTINGS)
  w = jnp.ones(2)
  scaled = run(tx, "..")[-1]
  plain_updates, plain = inner.update(GOOD, scaled.inner_state, w)
  scaled_updates, after = tx.update(GOOD * scaled.scale, scaled, w)
  same(plain, after.inner_state)
  np.testing.assert_array_equal(plain_updates, scaled_updates)
  back = tx.init(w)._replace(inner_state=plain)
  same(tx.update(GOOD * back.scale, back, w)[0], inner.update(GOOD, plain, w)[0])


def test_no_callback_reaches_the_host_inside_a_step():
  tx = make_state()
  jaxpr = jax.make_jaxpr(tx.update)(GOOD, tx.init(jnp.ones(2)), jnp.ones(2))
  assert "callback" not in str(jaxpr)


# Finding the state --------------------------------------------------------------------------------


def test_a_state_without_a_scaler_is_refused():
  for read in (mpjax.loss_scale, mpjax.step_is_finite):
    with pytest.raises(ValueError, match=r"Got the optimizer itself. Pass opt_state"):
      read(mpjax.dynamic_loss_scaling(optax.sgd(1.0)))
    with pytest.raises(ValueError, match=r"must hold a loss scaler.*Wrap the optimizer"):
      read(optax.adam(1e-3).init(jnp.ones(2)))
  assert find_scaling_state(()) is None


def test_a_state_with_two_scalers_is_refused():
  one = mpjax.static_loss_scaling(optax.sgd(1.0), 1)
  for tx in (optax.chain(one, one), mpjax.static_loss_scaling(one, 1)):
    with pytest.raises(ValueError, match=r"must hold one loss scaler. Got 2"):
      mpjax.loss_scale(tx.init(jnp.ones(2)))


# Devices ------------------------------------------------------------------------------------------


def mesh():
  return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("bad_shard", [None, 0, 3])
@pytest.mark.parametrize("axis_name", ["data", ("data",)], ids=["name", "tuple"])
def test_one_bad_shard_makes_all_shards_skip_under_shard_map(bad_shard, axis_name):
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, axis_name=axis_name)
  w = jnp.arange(8.0)
  grads = jnp.full((8,), 8.0)
  if bad_shard is not None:
    grads = grads.at[2 * bad_shard].set(jnp.nan)
  state = tx.init(w)

  def step(g, w, state):
    updates, state = tx.update(g, state, w)
    return optax.apply_updates(w, updates), state

  sharded = jax.shard_map(
    step, mesh=mesh(), in_specs=(P("data"), P("data"), P()), out_specs=(P("data"), P())
  )
  new, state = jax.jit(sharded)(grads, w, state)
  check(state)
  assert bool(state.last_finite) is (bad_shard is None)
  assert float(state.scale) == (8 if bad_shard is None else 4)
  np.testing.assert_array_equal(new, w - 1 if bad_shard is None else w)


def test_averaged_gradients_also_agree_under_shard_map():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, axis_name="data")
  w = jnp.zeros(2)

  def step(g, state):
    g = jax.lax.pmean(jnp.squeeze(g, 0), "data")
    updates, state = tx.update(g, state, w)
    return updates, state

  sharded = jax.shard_map(step, mesh=mesh(), in_specs=(P("data"), P()), out_specs=(P(), P()))
  grads = jnp.full((4, 2), 8.0)
  updates, state = jax.jit(sharded)(grads, tx.init(w))
  np.testing.assert_array_equal(updates, [-1.0, -1.0])
  _, state = jax.jit(sharded)(grads.at[2, 0].set(jnp.inf), state)
  assert not state.last_finite


def test_one_bad_shard_makes_all_skip_under_plain_jit_over_a_mesh():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8)
  sharding = NamedSharding(mesh(), P("data"))
  w = jax.device_put(jnp.arange(8.0), sharding)
  grads = jax.device_put(jnp.full((8,), 8.0).at[6].set(jnp.nan), sharding)

  @jax.jit
  def step(g, w, state):
    updates, state = tx.update(g, state, w)
    return optax.apply_updates(w, updates), state

  new, state = step(grads, w, tx.init(w))
  assert not state.last_finite
  np.testing.assert_array_equal(new, w)
  assert new.sharding.is_equivalent_to(sharding, 1)


def test_a_vmapped_axis_agrees_too():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(1.0), init_scale=8, axis_name="lanes")
  w = jnp.zeros((3, 2))
  grads = jnp.stack([GOOD, BAD["n"], GOOD])
  state = jax.vmap(tx.init)(w)
  _, state = jax.vmap(tx.update, axis_name="lanes")(grads, state, w)
  assert state.last_finite.tolist() == [False] * 3


# Numbers that are finite and too large ------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scale", [1.0, 2.0**20])
def test_a_gradient_whose_square_is_inf_is_a_skip(scale):
  """Applied, it would make Adam's second moment inf for ever."""
  tx = mpjax.static_loss_scaling(optax.adam(0.1), scale)
  params = {"w": jnp.ones(2)}
  state = tx.init(params)
  for true, applied in ((2.0**62, True), (2.0**64, False), (1e25, False)):
    updates, after = tx.update({"w": jnp.array([1.0, true * scale])}, state, params)
    assert bool(mpjax.step_is_finite(after)) is applied
    assert bool(mpjax.all_finite((updates, after)))
    assert bool((updates["w"] == 0).all()) is not applied


# Wrong arguments ---------------------------------------------------------------------------------

PARAMS = {"w": jnp.ones(3)}
ADAM = mpjax.dynamic_loss_scaling(optax.adam(0.1))


def mean(params, batch=1.0):
  return jnp.mean(params["w"]) * batch


WRONG = {
  "the parameters before the state": (
    lambda: ADAM.update(PARAMS, PARAMS, ADAM.init(PARAMS)),
    "Got the state in the place of the parameters. Write tx.update(grads, opt_state, params)",
  ),
  "no state": (lambda: ADAM.update(PARAMS, {}, PARAMS), "Got dict for its state"),
  "an axis that nothing maps": (
    lambda: mpjax.dynamic_loss_scaling(optax.sgd(0.1), axis_name="data").update(
      PARAMS, mpjax.dynamic_loss_scaling(optax.sgd(0.1)).init(PARAMS), PARAMS
    ),
    "Got 'data', and none around maps it. Call this inside of one, or drop axis_name",
  ),
  "a mean over an axis that nothing maps": (
    lambda: mpjax.reduce_gradients(PARAMS, ("data", "model")),
    "Got ('data', 'model'), and none around maps it",
  ),
  "a state for an optimizer": (
    lambda: mpjax.dynamic_loss_scaling(ADAM.init(PARAMS)),
    "must be an optax.GradientTransformation. Got LossScalingState. Pass",
  ),
  "a bool for positions": (
    lambda: mpjax.value_and_grad(mean, True),
    "Got True. For auxiliary output write has_aux=True",
  ),
  "a scale of zero": (
    lambda: mpjax.value_and_grad(mean)(PARAMS, loss_scale=0.0),
    "loss_scale must be a positive power of two, so that scaling is exact. Got 0.0",
  ),
  "a scale that rounds": (
    lambda: mpjax.value_and_grad(mean)(PARAMS, loss_scale=300.0),
    "Got 300.0. Choose 2**8 = 256",
  ),
  "a fraction for positions": (
    lambda: mpjax.value_and_grad(mean, 1.5),
    "argnums must be positions, integers. Got 1.5",
  ),
  "a negative scale": (lambda: mpjax.value_and_grad(mean)(PARAMS, loss_scale=-2), "Got -2"),
  "no loss": (lambda: mpjax.value_and_grad(None), "takes a loss function. Got NoneType"),
  "parameters for a loss": (lambda: mpjax.value_and_grad(PARAMS, mean), "Got dict. Write a func"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_short_error(case):
  call, text = WRONG[case]
  with pytest.raises((TypeError, ValueError)) as caught:
    call()
  assert text in str(caught.value)
  assert len(str(caught.value)) < 400


def test_a_gradient_is_named_after_its_loss():
  """loss_scale is a keyword of it, so it has a signature of its own."""
  for make in (mpjax.value_and_grad, mpjax.nnx.value_and_grad):
    assert make(mean).__name__ == "value_and_grad(mean)" in repr(make(mean))
    assert make(jnp.mean).__doc__.startswith("The loss and the scaled gradients of mean. ")
