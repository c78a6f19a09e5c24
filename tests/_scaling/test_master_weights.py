"""Float32 masters: parameters are their roundings bit for bit, wherever the wrapper is placed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from _arrays import array, normal
from mpjax._scaling import scaling_state, states
from mpjax._scaling.master_weights import MasterWeightsState, _bfloat16, _float16
from mpjax.training import LowPrecisionWarning, TrainState, make_train_step

# bfloat16 + float32 in optax.apply_updates, and optax.adam.
pytestmark = pytest.mark.usefixtures("standard_promotion")

HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def set_to(values):
  """An optimizer that takes the parameters to these values."""

  def update(updates, state, params=None):
    return jax.tree.map(lambda v, p: v - p, values, params), state

  return optax.GradientTransformation(lambda p: optax.EmptyState(), update)


def all_values(dtype):
  """Every finite number of a 16-bit format."""
  x = np.arange(2**16, dtype=np.uint16).view(dtype)
  return x[np.isfinite(x.astype(np.float32))]


# The rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF.keys())
def test_a_parameter_is_its_masters_rounding_for_every_number_and_any_target(dtype):
  """Every finite 16-bit parameter, and for each many targets: near, far, zero, tiny, huge."""
  start = all_values(dtype)
  rng = np.random.default_rng(0)
  n = len(start)
  limit = float(jnp.finfo(dtype).max)
  wide = start.astype(np.float32)
  with np.errstate(over="ignore", under="ignore"):
    targets = [
      wide * np.float32(1 + 1e-3),
      wide * (1 + rng.normal(size=n) * 0.01).astype(np.float32),
      -wide,
      np.zeros(n, np.float32),
      -np.zeros(n, np.float32),
      wide * np.float32(2.0**-17) * rng.normal(size=n).astype(np.float32),
      (rng.normal(size=n) * 10.0 ** rng.uniform(-40, 38, n)).astype(np.float32),
      np.full(n, 1e-45, np.float32),
    ]
  targets = [np.clip(target, -limit, limit) for target in targets]

  @jax.jit
  def step(params, target):
    tx = mpjax.master_weights(set_to(target))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state.masters, updates

  for target in targets:
    new, master, updates = step(jnp.asarray(start), jnp.asarray(target))
    assert updates.dtype == jnp.float32
    assert new.dtype == dtype
    np.testing.assert_array_equal(new.view(jnp.uint16), master.astype(dtype).view(jnp.uint16))
    # One float32 rounding of the way from the parameter to the target, and none if that is short;
    # and what is subnormal, XLA takes for zero on a CPU.
    master, way = np.asarray(master), np.abs(wide.astype(np.float64) - target)
    reached = way < 2.0**127  # else the way itself is none that float32 holds
    error = np.abs(master.astype(np.float64) - target)[reached]
    np.testing.assert_array_less(error, 2.0**-125 + 2.0**-23 * way[reached])
    near = (target == wide) | ((wide / 2 <= target) & (target / 2 <= wide) & (wide > 0))
    near &= np.abs(target) >= 2.0**-100
    np.testing.assert_array_equal(master[near], target[near])


@pytest.mark.parametrize("name", HALF)
def test_over_many_steps_a_parameter_stays_the_rounding_of_a_sum_in_float32(name):
  start = jnp.asarray([1.0, -0.0, 3e-7, 100.0], HALF[name])
  tx = mpjax.master_weights(optax.sgd(1.0))
  steps = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32) * [1e-3, 1, 1e-6, 1e-2]

  def body(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, state.masters)

  grads = jnp.asarray(steps, jnp.float32)
  _, (params, masters) = jax.jit(lambda s: jax.lax.scan(body, s, grads))((start, tx.init(start)))
  assert bits(params) == bits(masters.astype(HALF[name]))
  total = np.asarray(start, np.float64) - np.cumsum(steps, axis=0)
  np.testing.assert_allclose(masters, total, rtol=500 * 2.0**-24, atol=500 * 2.0**-23)


@pytest.mark.parametrize("name", HALF)
def test_the_roundings_are_those_of_a_cast(name):
  rng = np.random.default_rng(0)
  values = all_values(HALF[name]).astype(np.float32)
  x = np.concatenate(
    [
      rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32),
      (rng.normal(size=10_000) * 3e-6).astype(np.float32),
      values[1:] / 2 + values[:-1] / 2,  # the ties
    ]
  )
  x = x[np.isfinite(x)]
  rounded = {"bfloat16": _bfloat16, "float16": _float16}[name](jnp.asarray(x))
  with np.errstate(over="ignore"):
    np.testing.assert_array_equal(rounded, x.astype(HALF[name]).astype(np.float32))


def test_a_bfloat16_one_does_not_move_under_a_hundred_small_updates_and_its_master_does():
  one = jnp.ones((), jnp.bfloat16)
  for tx, expected in ((optax.sgd(1e-3), 1.0), (mpjax.master_weights(optax.sgd(1e-3)), 0.9)):
    params, state = one, tx.init(one)
    for _ in range(100):
      updates, state = tx.update(one, state, params)
      params = optax.apply_updates(params, updates)
    assert params.dtype == jnp.bfloat16
    assert float(params) == float(jnp.bfloat16(expected))


def test_an_overflowed_parameter_does_not_become_nan():
  params = jnp.asarray([60000.0], jnp.float16)
  tx = mpjax.master_weights(optax.sgd(1.0))
  state = tx.init(params)
  for grads in (jnp.asarray([-20000.0]), jnp.asarray([0.0]), jnp.asarray([100.0])):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert np.isposinf(params[0])


# Where it may stand -------------------------------------------------------------------------------

ADAM = lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
PLACES = {
  "alone": lambda: mpjax.master_weights(ADAM()),
  "around the scaler": lambda: mpjax.master_weights(mpjax.dynamic_loss_scaling(ADAM())),
  "inside the scaler": lambda: mpjax.dynamic_loss_scaling(mpjax.master_weights(ADAM())),
  "in a chain in the scaler": lambda: mpjax.static_loss_scaling(
    optax.chain(optax.clip(9.0), mpjax.master_weights(optax.adamw(1e-3))), 1
  ),
  "around MultiSteps": lambda: mpjax.master_weights(optax.MultiSteps(ADAM(), 2)),
}
PARAMS = {"w": array([1.0, -2.0, 1e-3]), "b": array([0.5])}


def scale_of(state):
  found = scaling_state.find_scaling_state(state)
  return 1.0 if found is None else found.scale


def masters_of(state):
  (found,) = states.find_states(state, MasterWeightsState) or [
    f
    for s in states.find_states(state, states.LossScalingState)
    for f in states.find_states(s.inner_state, MasterWeightsState)
  ]
  return found.masters


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
  ("place", "dtype"), [*((place, "bfloat16") for place in PLACES), ("inside the scaler", "float16")]
)
def test_the_masters_train_as_float32_parameters_do(place, dtype):
  """The gradients are given, so that the reference in float32 takes the same steps."""
  make = PLACES[place]
  half = mpjax.cast_floating(PARAMS, dtype)
  wide = mpjax.cast_floating(half, "float32")
  tx, plain = make(), make()
  state, reference = tx.init(half), plain.init(wide)
  update, plain_update = jax.jit(tx.update, donate_argnums=1), jax.jit(plain.update)
  for i in range(4):
    factor = scale_of(state) * (1.0 + i)
    grads = jax.tree.map(lambda p, f=factor: jnp.cos(p * f) * f, wide)
    updates, state = update(grads, state, half)
    half = optax.apply_updates(half, updates)
    updates, reference = plain_update(grads, reference, wide)
    wide = optax.apply_updates(wide, updates)
    masters = masters_of(state)
    assert bits(half) == bits(mpjax.cast_floating(masters, dtype))
    jax.tree.map(lambda m, w: np.testing.assert_allclose(m, w, rtol=1e-6, atol=1e-9), masters, wide)
  moments = {x.dtype.name for x in jax.tree.leaves(state)}
  assert moments <= {"float32", "int32", "bool"}


@pytest.mark.parametrize("place", ["around the scaler", "inside the scaler"])
def test_a_skip_moves_neither_parameter_nor_master(place):
  tx = PLACES[place]()
  params = {"w": jnp.array([1.0, -0.0, 0.0, 1e-7], jnp.float16)}
  state = tx.init(params)
  for grads in (jnp.full(4, 2.0**15), jnp.array([jnp.nan, 1.0, 1.0, 1.0])):
    before = params, masters_of(state)
    updates, state = tx.update({"w": grads}, state, params)
    params = optax.apply_updates(params, updates)
  assert not mpjax.step_is_finite(state)
  assert bits((params, masters_of(state))) == bits(before)


def test_leaves_that_are_no_16_or_32_bit_floats_pass():
  params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2), "none": None, "f": jnp.ones(1)}
  tx = mpjax.master_weights(optax.identity())
  state = tx.init(params)
  assert state.masters["n"] == optax.MaskedNode()
  assert state.masters["none"] is None
  grads = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.ones(2, int), "none": None, "f": jnp.ones(1)}
  updates, state = tx.update(grads, state, params)
  new = optax.apply_updates(params, updates)
  assert jax.tree.map(lambda x: x.tolist(), new) == {
    "w": [2, 2],
    "n": [1, 2],
    "none": None,
    "f": [2],
  }


def test_parameters_that_somebody_else_has_set_take_over():
  params = jnp.ones(3, jnp.bfloat16)
  tx = mpjax.master_weights(optax.sgd(1e-3))
  state = tx.init(params)
  _, state = tx.update(jnp.ones(3), state, params)
  loaded = jnp.array([5.0, 1.0, -3.0], jnp.bfloat16)
  updates, state = tx.update(jnp.ones(3), state, loaded)
  np.testing.assert_allclose(state.masters, [4.999, 0.998, -3.001], rtol=1e-6)
  assert bits(optax.apply_updates(loaded, updates)) == bits(state.masters.astype(jnp.bfloat16))


def test_an_update_without_parameters_is_refused():
  tx = mpjax.master_weights(optax.sgd(1.0))
  with pytest.raises(ValueError, match=r"needs these. Got params=None. Call tx.update"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  with pytest.raises(TypeError, match=r"must be an optax.GradientTransformation"):
    mpjax.master_weights(1e-3)


# Train steps --------------------------------------------------------------------------------------

X = array(normal(0, 16, 4))
BATCH = {"x": X, "y": array(np.sin(np.asarray(X)[:, 0]))}


def loss_fn(params, batch):
  out = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
  return jnp.mean((out - batch["y"]) ** 2)


def half_params(dtype="bfloat16"):
  w = jax.random.normal(jax.random.key(1), (4, 8)) / 2
  return mpjax.cast_floating({"w": w, "v": jnp.linspace(-1.0, 1.0, 8)}, dtype)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("place", ["around the scaler", "inside the scaler"])
def test_a_step_of_bfloat16_parameters_with_masters_is_silent_and_donates(place):
  tx = PLACES[place]()
  step = make_train_step(loss_fn, tx, policy="bfloat16")
  state = TrainState.create(half_params(), tx)
  for _ in range(5):
    state, _ = step(state, BATCH)
    assert bits(state.params) == bits(mpjax.cast_floating(masters_of(state.opt_state), "bfloat16"))


def test_masters_resume_from_a_checkpoint_with_the_same_bits(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  tx = PLACES["inside the scaler"]()
  step = make_train_step(loss_fn, tx, donate=False)
  state, _ = step(TrainState.create(half_params(), tx), BATCH)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "state", state)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
  assert bits(step(restored, BATCH)[0]) == bits(step(state, BATCH)[0])


def half_linear(param_dtype=jnp.bfloat16):
  return nnx.Linear(4, 1, rngs=nnx.Rngs(0), param_dtype=param_dtype, dtype=param_dtype)


def model_loss(model, batch):
  return jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)


def test_an_nnx_model_with_bfloat16_parameters_trains_by_its_masters():
  model = half_linear()
  model.count = nnx.Param(jnp.int32(3))
  only_floats = lambda path, x: isinstance(x, nnx.Param) and path[-1] != "count"
  optimizer = nnx.Optimizer(model, PLACES["inside the scaler"](), wrt=only_floats)
  step = mpjax.nnx.make_train_step(model_loss)
  for _ in range(5):
    assert step(model, optimizer, BATCH).applied
  masters = nnx.as_pure(optimizer.opt_state).inner_state.masters
  assert masters["kernel"].dtype == jnp.float32
  assert bits(model.kernel[...]) == bits(masters["kernel"].astype(jnp.bfloat16))


# Warnings -----------------------------------------------------------------------------------------

WARNED = r"should be float32, or have float32 masters.*Got {}.*mpjax.master_weights\(tx\)"


@pytest.mark.parametrize("policy", [None, "bfloat16"])
def test_trained_bfloat16_parameters_are_warned_of_once(policy):
  tx = optax.sgd(0.1)
  step = make_train_step(loss_fn, tx, policy=policy)
  state = TrainState.create(half_params(), tx)
  with pytest.warns(LowPrecisionWarning, match=WARNED.format(r"v: bf16\[8\] and 1 more")) as seen:
    state, _ = step(state, BATCH)
  assert len(seen) == 1
  step(state, BATCH)  # a warning is an error here


def test_an_nnx_model_is_warned_of_too_and_of_its_moments():
  model = half_linear()
  step = mpjax.nnx.make_train_step(model_loss)
  with pytest.warns(LowPrecisionWarning) as seen:
    step(model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), BATCH)
  texts = [str(warning.message) for warning in seen]
  assert len(texts) == 2
  assert "Got bias: bf16[1] and 1 more" in texts[0]
  assert "a decay of 0.999 is 1" in texts[1]
  assert "Got 0/nu/bias: bf16[1]" in texts[1]


def test_first_moments_may_be_bfloat16_but_not_float16():
  params = half_params("float32")
  for dtype, fails in (("bfloat16", False), ("float16", True)):
    tx = mpjax.dynamic_loss_scaling(optax.adam(1e-3, mu_dtype=dtype))
    step = make_train_step(loss_fn, tx)
    state = TrainState.create(params, tx)
    if fails:
      with pytest.warns(LowPrecisionWarning, match=r"not be float16.*mu/v: f16\[8\].*mu_dtype="):
        step(state, BATCH)
    else:
      step(state, BATCH)


def test_what_the_warnings_say_is_so():
  one = jnp.ones((), jnp.bfloat16)
  assert one - jnp.bfloat16(1 / 512) == one
  assert one - jnp.bfloat16(1 / 500) != one
  assert jnp.ones((), jnp.float16) - jnp.float16(1 / 4096) == 1
  assert jnp.bfloat16(0.999) == 1
  assert jnp.float16(2e-4) * jnp.float16(1.2e-4) == 0
  tx = optax.adam(1.0, mu_dtype="float16")
  w = jnp.ones(1)
  lost, _ = tx.update(jnp.full(1, 2e-7), tx.init(w), w)
  kept, _ = optax.adam(1.0).update(jnp.full(1, 2e-7), optax.adam(1.0).init(w), w)
  assert abs(float(kept[0])) > 0.9
  assert abs(float(lost[0])) < 0.9
