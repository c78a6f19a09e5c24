"""16-bit parameters and moments, rounded stochastically: right on average, alike everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from _arrays import array, normal
from _turns import in_turns
from mpjax._scaling import optimizers, scaling_state, states
from mpjax._scaling.bfloat16_states import BFloat16StatesState
from mpjax._scaling.rounding import StochasticRoundingState, round_by_bits
from mpjax.training import LowPrecisionWarning, TrainState, make_train_step

# bfloat16 + float32 in optax.apply_updates, and optax.adam.
pytestmark = pytest.mark.usefixtures("standard_promotion")

HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def finite_values(dtype):
  """The finite numbers of a 16-bit format, ascending, as float32."""
  x = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
  return np.unique(x[np.isfinite(x)])


def neighbors(x, dtype):
  """The largest number of a format that is not above, the smallest that is not below each of x."""
  values = finite_values(dtype)
  return (
    values[np.searchsorted(values, x, "right") - 1],
    values[np.searchsorted(values, x, "left")],
  )


def random_bits(seed, shape, dtype):
  kind = np.uint16 if dtype == jnp.bfloat16 else np.uint32
  return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


ROUND = {
  name: jax.jit(lambda x, b, d=dtype: round_by_bits(x, d, b)) for name, dtype in HALF.items()
}


# The rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALF)
@given(exponent=st.integers(-126, 127), seed=st.integers(0, 2**32 - 1))
def test_a_number_goes_to_a_neighbor_and_what_the_format_holds_stays(name, exponent, seed):
  dtype = HALF[name]
  draw = np.random.default_rng(seed)
  x = np.ldexp(draw.uniform(1, 2, 512), exponent).astype(np.float32) * draw.choice([-1, 1], 512)
  x = x.astype(np.float32)
  rounded = np.asarray(ROUND[name](x, random_bits(seed, 512, dtype)))
  inside = np.abs(x) <= float(jnp.finfo(dtype).max)
  down, up = neighbors(x[inside], dtype)
  assert np.all((rounded[inside] == down) | (rounded[inside] == up))
  with np.errstate(over="ignore"):
    np.testing.assert_array_equal(rounded[~inside], x[~inside].astype(dtype).astype(np.float32))
  np.testing.assert_array_equal(ROUND[name](rounded, random_bits(seed + 1, 512, dtype)), rounded)


@pytest.mark.parametrize("name", HALF)
def test_every_number_of_the_format_stays_and_so_do_inf_and_nan(name):
  x = np.append(finite_values(HALF[name]), np.float32([np.inf, -np.inf, np.nan]))
  for seed in range(3):
    rounded = np.asarray(ROUND[name](x, random_bits(seed, x.shape, HALF[name])))
    np.testing.assert_array_equal(rounded, x)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(x))


@pytest.mark.parametrize("x", [0.999, -2.3, 1e-20, 1e30, 3e38, 2.0**-126 * 1.003, np.pi])
def test_the_mean_over_all_bits_is_the_number_itself_in_bfloat16(x):
  every = jnp.arange(2**16, dtype=jnp.uint16)
  rounded = np.asarray(ROUND["bfloat16"](jnp.full(2**16, x, jnp.float32), every), np.float64)
  assert rounded.mean() == float(np.float32(x))


# A half of the smallest subnormal, halves between two, what is far below all, and normal numbers.
@pytest.mark.parametrize(
  "x", [0.5 * 2.0**-24, -1.5 * 2.0**-24, 700.5 * 2.0**-24, 1e-10, 3.7e-6, 6.1e-5, 0.999, 65503.0]
)
def test_the_mean_over_draws_is_the_number_itself_in_float16(x):
  draws = 2**20
  given_bits = random_bits(0, draws, jnp.float16)
  rounded = np.asarray(ROUND["float16"](jnp.full(draws, x, jnp.float32), given_bits), np.float64)
  down, up = (float(end[0]) for end in neighbors(np.float32([x]), jnp.float16))
  share = (float(np.float32(x)) - down) / (up - down)
  error = 4 * (up - down) * np.sqrt(share * (1 - share) / draws)
  assert abs(rounded.mean() - float(np.float32(x))) <= error


def test_halves_between_bfloat16_subnormals_go_either_way():
  between = np.uint32([0x00018000, 0x00008000]).view(np.float32)  # 1.5 and 0.5 of the smallest
  for noise, wanted in ((0, [1, 0]), (2**16 - 1, [2, 1])):
    rounded = ROUND["bfloat16"](between, jnp.full(2, noise, jnp.uint16))
    assert (np.asarray(rounded).view(np.uint32) >> 16).tolist() == wanted


# Where a parameter lands --------------------------------------------------------------------------


def move_by(values):
  """An optimizer whose updates are these values."""
  return optax.stateless(lambda updates, params: jax.tree.map(lambda _, v: v, updates, values))


@jax.jit
def one_step(params, step, seed):
  tx = mpjax.stochastic_rounding(move_by(step))
  state = tx.init(params)._replace(step=seed)
  updates, _ = tx.update(params, state, params)
  return optax.apply_updates(params, updates), updates


@pytest.mark.parametrize("name", HALF)
def test_apply_updates_takes_every_parameter_to_a_neighbor_of_its_target_bit_for_bit(name):
  dtype = HALF[name]
  start = finite_values(dtype)
  start = start[(np.abs(start) >= float(jnp.finfo(dtype).smallest_normal)) | (start == 0)]
  rng = np.random.default_rng(0)
  n, limit = len(start), float(jnp.finfo(dtype).max)
  steps = [
    start * (rng.normal(size=n) * 10.0 ** rng.uniform(-8, 1, n)),
    -start * (1 + rng.normal(size=n) * 10.0 ** rng.uniform(-8, 0, n)),
    rng.normal(size=n) * 10.0 ** rng.uniform(-36, 37, n),
    np.zeros(n),
  ]
  for index, step in enumerate(steps):
    # A step that ends within the format, above float32's own subnormals, which XLA flushes.
    with np.errstate(under="ignore", over="ignore"):
      step = np.clip(step, -limit, limit).astype(np.float32)
      target = start + step
    step = np.where((np.abs(target) < 2.0**-100) | (np.abs(target) > limit), 0, step)
    target = start + step
    new, updates = one_step(jnp.asarray(start, dtype), jnp.asarray(step), jnp.int32(index))
    assert (new.dtype, updates.dtype) == (dtype, jnp.float32)
    down, up = neighbors(target, dtype)
    new = np.asarray(new, np.float32)
    assert np.all((new == down) | (new == up))
    short = np.abs(step) * 2.0**-15 < np.abs(start)  # else the last bit of the sum is float32's
    np.testing.assert_array_equal((start + np.asarray(updates))[short], new[short])
    unmoved = target == start
    np.testing.assert_array_equal(new[unmoved], start[unmoved])


def test_a_zero_update_leaves_every_bit_and_nothing_finite_becomes_nan():
  params = jnp.asarray([-0.0, 0.0, 6e-8, 65504.0, jnp.inf, jnp.nan], jnp.float16)
  new, _ = one_step(params, jnp.zeros(6), jnp.int32(0))
  assert bits(new[:5]) == bits(params[:5]) and jnp.isnan(new[5])  # which NaN, a backend chooses
  params = jnp.asarray([1.0, 1.0, 65504.0, jnp.inf, jnp.inf], jnp.float16)
  new, _ = one_step(params, jnp.asarray([jnp.nan, jnp.inf, 60.0, -1.0, -jnp.inf]), jnp.int32(0))
  np.testing.assert_array_equal(new, [np.nan, np.inf, np.inf, np.inf, np.inf])


def descend(tx, params, steps, grads=None):
  """The parameters and state after some updates, in one scan."""
  update = optimizers.as_transformation(tx).update
  grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads

  def body(carry, _):
    params, state = carry
    updates, state = update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = (params, tx.init(params))
  return jax.jit(lambda s: jax.lax.scan(body, s, None, length=steps)[0])(start)


def test_a_bfloat16_one_moves_by_a_hundred_small_updates_on_average():
  ones = {"many": jnp.ones(4096, jnp.bfloat16), "single": jnp.ones((), jnp.bfloat16)}
  nearest, _ = descend(optax.sgd(1e-3), ones, 100)
  assert np.all(np.asarray(nearest["many"], np.float32) == 1.0) and float(nearest["single"]) == 1.0
  moved, _ = descend(mpjax.stochastic_rounding(optax.sgd(1e-3)), ones, 100)
  many = np.asarray(moved["many"], np.float64)
  assert abs(many.mean() - 0.9) < 4 * 0.017 / 64
  assert 0.015 < many.std() < 0.019
  assert abs(float(moved["single"]) - 0.9) < 4 * 0.017


def test_two_parameters_of_one_shape_have_bits_of_their_own_and_so_has_every_seed_and_step():
  params = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}

  def first(seed, steps=1):
    return descend(mpjax.stochastic_rounding(optax.sgd(1e-3), seed=seed), params, steps)[0]

  found = [first(0)["a"], first(0)["b"], first(1)["a"], first(0, 2)["a"]]
  assert len({bits(x)[0] for x in found}) == 4
  assert bits(first(0)) == bits(first(0))


# The same bits everywhere -------------------------------------------------------------------------

WIDE = {
  "w": array(normal(0, 16, 8)),
  "b": array(np.linspace(-1, 1, 8)),
}
GRADS = jax.tree.map(lambda leaf: array(np.cos(leaf)), WIDE)


def six_bytes(inner=None):
  return mpjax.stochastic_rounding(mpjax.bfloat16_states(inner or optax.adamw(1e-2)))


def updated(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def three_steps(place=lambda tree: tree, wrap=jax.jit):
  tx = six_bytes()
  params = mpjax.cast_floating(WIDE, "bfloat16")
  carry = place((params, tx.init(params)))
  step = wrap(updated(tx))
  for _ in range(3):
    carry = step(*carry, place(GRADS))
  return carry


@functools.cache
def bits_of_three_steps():
  return bits(three_steps())


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_bits_are_the_same_however_parameters_are_sharded_over_eight_devices(kind):
  mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))

  def spec(leaf):
    specs = {(16, 8): P("d", "m"), (8,): P(("d", "m"))}
    return NamedSharding(mesh, specs.get(leaf.shape, P()))

  for where in (spec, lambda leaf: NamedSharding(mesh, P())):
    got = three_steps(lambda t, w=where: jax.device_put(t, jax.tree.map(w, t)))
    assert got[0]["w"].sharding.num_devices == 8
    assert bits(got) == bits_of_three_steps()


@pytest.mark.ci
def test_the_bits_are_the_same_on_every_replica_of_shard_map_pmap_and_vmap():
  expected = bits_of_three_steps()
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

  def replicated(step):
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P()))

  got = three_steps(wrap=replicated)
  assert bits(got) == expected
  for leaf in jax.tree.leaves(got):
    assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1

  for transform in (jax.pmap, jax.vmap):

    def stacked(step, transform=transform):
      run = transform(step)
      return lambda *args: jax.tree.map(_only, run(*jax.tree.map(_eightfold, args)))

    assert bits(three_steps(wrap=stacked)) == expected


def _eightfold(x):
  return np.stack([np.asarray(x)] * 8)  # whatever devices it was on


def _only(x):
  assert all(np.array_equal(x[0], other) for other in x[1:])
  return x[0]


def test_a_scan_and_single_updates_give_the_same_bits_and_a_state_is_its_own_type():
  params = mpjax.cast_floating(WIDE, "bfloat16")
  assert bits(descend(six_bytes(), params, 3, GRADS)) == bits_of_three_steps()
  tx = six_bytes()
  state = tx.init(params)
  shapes = jax.eval_shape(lambda s: updated(tx)(params, s, GRADS)[1], state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )


def test_two_states_may_both_be_donated():
  tx = six_bytes()
  params = mpjax.cast_floating(WIDE, "bfloat16")
  step = jax.jit(tx.update, donate_argnums=1)
  first, second = (step(GRADS, tx.init(params), params) for _ in range(2))
  assert bits(first) == bits(second)


@pytest.mark.ci
def test_a_run_that_is_resumed_gives_the_same_bits(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  tx = mpjax.dynamic_loss_scaling(six_bytes())
  step = make_train_step(loss_fn, tx, donate=False)
  state, _ = step(TrainState.create(half_params(), tx), BATCH)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "state", state)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
  for _ in range(2):
    state, restored = step(state, BATCH)[0], step(restored, BATCH)[0]
  assert bits(restored) == bits(state)


# Where they may stand -----------------------------------------------------------------------------


def sparing(tx):
  """One optimizer for ``w``; ``b`` is frozen."""
  return optax.partition(
    {"train": tx, "freeze": optax.set_to_zero()}, {"w": "train", "b": "freeze"}
  )


def rate_injected(learning_rate):
  return optax.inject_hyperparams(optax.adamw)(learning_rate)


scaled = mpjax.dynamic_loss_scaling
PLACES = {
  "alone": six_bytes,
  "around the scaler": lambda: mpjax.stochastic_rounding(
    scaled(mpjax.bfloat16_states(optax.adamw(1e-2)))
  ),
  "inside the scaler": lambda: scaled(six_bytes()),
  "in the static scaler": lambda: mpjax.static_loss_scaling(six_bytes(), 8),
  "around the static scaler": lambda: mpjax.bfloat16_states(
    mpjax.stochastic_rounding(mpjax.static_loss_scaling(optax.adamw(1e-2), 8))
  ),
  "in a chain in the scaler": lambda: scaled(optax.chain(optax.clip(9.0), six_bytes())),
  "around MultiSteps": lambda: scaled(six_bytes(optax.MultiSteps(optax.adamw(1e-2), 2))),
  "inside MultiSteps": lambda: scaled(optax.MultiSteps(six_bytes(), 2)),
  "around partition": lambda: scaled(six_bytes(sparing(optax.adamw(1e-2)))),
  "inside partition": lambda: scaled(sparing(six_bytes())),
  "around inject_hyperparams": lambda: scaled(six_bytes(rate_injected(1e-2))),
  "inside inject_hyperparams": lambda: scaled(
    optax.inject_hyperparams(lambda rate: six_bytes(optax.adamw(rate)))(rate=1e-2)
  ),
}


def scale_of(state):
  found = scaling_state.find_scaling_state(state)
  return 1.0 if found is None else found.scale


@functools.cache
def ten_steps_in_float32(name):
  """The parameters that start from 16-bit ones and are trained in float32."""
  tx, params = optax.adamw(1e-2), mpjax.cast_floating(mpjax.cast_floating(WIDE, name), "float32")
  return descend(tx, params, 10, GRADS)[0]


@pytest.mark.quick(every=3)
@in_turns(("place", "name"), list(PLACES), list(HALF))
def test_parameters_follow_float32_ones_wherever_the_wrappers_stand(place, name):
  """Within the noise of their roundings; and what is held has the dtypes that it should have."""
  half = mpjax.cast_floating(WIDE, name)
  frozen = bits(half["b"]) if "partition" in place else None
  tx = PLACES[place]()
  steps = 20 if "MultiSteps" in place else 10
  state, update = tx.init(half), jax.jit(tx.update)
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  for _ in range(steps):
    scale = scale_of(state)
    grads = jax.tree.map(lambda g, f=scale: g * f, GRADS)
    updates, state = update(grads, state, half)
    half = optax.apply_updates(half, updates)
  wide = ten_steps_in_float32(name)
  assert jax.tree.map(lambda x: x.dtype, state) == dtypes
  assert {x.dtype.name for x in jax.tree.leaves(half)} == {name}
  moved = jax.tree.map(lambda h, w: np.abs(np.asarray(h, np.float32) - w).max(), half, wide)
  assert moved["w"] < 0.06
  assert frozen is None or bits(half["b"]) == frozen
  moments = [x for x in jax.tree.leaves(state) if x.shape == (16, 8)]
  assert sum(x.dtype == jnp.bfloat16 for x in moments) == 2


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
  "place", ["around the scaler", "inside the scaler", "around the static scaler"]
)
def test_a_skip_moves_neither_parameter_nor_moment_nor_the_next_steps_bits(place):
  tx = PLACES[place]()
  params = {"w": jnp.array([[1.0, -0.0, 3.0]], jnp.float16)}
  state = tx.init(params)
  grads = {"w": jnp.full((1, 3), 2.0**15)}
  updates, state = tx.update(grads, state, params)
  params = optax.apply_updates(params, updates)

  def unscaled(state):
    """Everything but the scaler's own figures."""
    is_scaler = lambda x: isinstance(x, states.LossScalingState)
    return jax.tree.map(lambda x: x.inner_state if is_scaler(x) else x, state, is_leaf=is_scaler)

  before = bits((params, unscaled(state)))
  updates, state = tx.update({"w": grads["w"].at[0, 0].set(jnp.nan)}, state, params)
  params = optax.apply_updates(params, updates)
  assert not mpjax.step_is_finite(state)
  assert bits((params, unscaled(state))) == before
  updates, state = tx.update(grads, state, params)
  assert bits((optax.apply_updates(params, updates), unscaled(state))) != before


def test_leaves_that_are_no_16_bit_floats_pass():
  params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2), "none": None, "f": jnp.full(1, 0.1)}
  grads = {
    "w": jnp.ones(2, jnp.bfloat16),
    "n": jnp.ones(2, int),
    "none": None,
    "f": jnp.full(1, 1e-6),
  }
  tx = mpjax.bfloat16_states(mpjax.stochastic_rounding(optax.identity()))
  updates, _ = tx.update(grads, tx.init(params), params)
  assert updates["n"] is grads["n"] and updates["none"] is None
  assert bits(updates["f"]) == bits(grads["f"])
  assert optax.apply_updates(params, updates)["w"].tolist() == [2, 2]


def test_what_is_missing_or_wrong_is_refused():
  tx = mpjax.stochastic_rounding(optax.sgd(1.0))
  with pytest.raises(ValueError, match=r"needs these. Got params=None. Call tx.update"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  for wrap in (mpjax.stochastic_rounding, mpjax.bfloat16_states):
    with pytest.raises(TypeError, match=r"must be an optax.GradientTransformation"):
      wrap(1e-3)
    with pytest.raises(TypeError, match=r"seed must be an integer. Got 0.5 of type float"):
      wrap(optax.sgd(1.0), seed=0.5)


# Moments ------------------------------------------------------------------------------------------

STARTS = np.float32([0.5, 8.0, 0.012, 0.5, 3.0])  # of the second moments, unequal neighbors


def held(inner, hold):
  """A second moment in bfloat16 that starts from `STARTS`, as ``hold`` rounds it: 2000 steps on."""
  params = {"w": jnp.zeros((64, len(STARTS)))}
  tx = hold(inner)

  def started(state):
    put = lambda x: jnp.broadcast_to(STARTS, x.shape).astype(x.dtype) if x.ndim else x
    return jax.tree.map(lambda x: put(x) if x.dtype == jnp.bfloat16 else x, state)

  fresh = optax.GradientTransformation(lambda p: started(tx.init(p)), tx.update)
  _, state = descend(fresh, params, 2000, {"w": jnp.full((64, len(STARTS)), 0.1)})
  (moment,) = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
  return np.asarray(moment, np.float64)


def to_the_nearest(inner):
  """Float32 moments held in bfloat16, rounded to the nearest."""
  narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  def update(updates, state, params=None):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), state)
    updates, state = inner.update(updates, wide, params)
    return updates, narrow(state)

  return optax.GradientTransformation(lambda params: narrow(inner.init(params)), update)


def test_a_second_moment_falls_where_rounding_to_the_nearest_stalls():
  inner = optax.scale_by_rms(decay=0.999)
  exact = STARTS * 0.999**2000 + 0.01 * (1 - 0.999**2000)
  assert round(float(exact[0]), 3) == 0.076
  nearest = held(inner, to_the_nearest)
  np.testing.assert_array_equal(nearest[:, [0, 3]], 0.5)
  falls = held(inner, mpjax.bfloat16_states)
  np.testing.assert_allclose(falls.mean(0), exact, rtol=0.03)
  assert np.all(np.abs(falls[:, [0, 3]] - 0.076) < 0.03)


OPTIMIZERS = {
  "adam": lambda: optax.adam(1e-2),
  "adamw": lambda: optax.adamw(1e-2),
  "lion": lambda: optax.lion(1e-3),
  "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
  "muon": lambda: optax.contrib.muon(1e-2),
  "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}


WRAPPED = {"states": (mpjax.bfloat16_states, "float32"), "both": (six_bytes, "bfloat16")}


@pytest.mark.quick(every=3)
@in_turns(("name", "wrapped"), list(OPTIMIZERS), WRAPPED)
def test_any_optimizer_trains_as_it_does_with_float32_states(name, wrapped):
  """The loss falls as far; scalars, counts and factored moments keep their dtypes."""
  x = jax.random.normal(jax.random.key(1), (64, 16))
  y = jnp.tanh(x @ jax.random.normal(jax.random.key(2), (16, 8)))

  def loss(params):
    w, b = params["w"].astype(jnp.float32), params["b"].astype(jnp.float32)
    return jnp.mean((x @ w + b[None] - y) ** 2)

  def trained(tx, dtype):
    params = mpjax.cast_floating(WIDE, dtype)

    def body(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    return jax.jit(lambda c: jax.lax.scan(body, c, None, length=100)[0])(carry)

  inner = OPTIMIZERS[name]()
  plain, reference = trained(inner, "float32")
  wrap, dtype = wrapped
  params, state = trained(wrap(inner), dtype)
  assert float(loss(params)) < 1.03 * float(loss(plain)) + 0.01 < float(loss(WIDE))
  (found,) = states.find_states(state, BFloat16StatesState) or [
    states.find_states(s.inner_state, BFloat16StatesState)[0]
    for s in states.find_states(state, StochasticRoundingState)
  ]
  for got, leaf in zip(*map(jax.tree.leaves, (found.inner_state, reference)), strict=True):
    # Of w the second moment of adafactor is factored.
    wanted = jnp.bfloat16 if leaf.shape in ((16, 8), (8,)) else leaf.dtype
    if name != "adafactor" or leaf.shape != (8,):
      assert got.dtype == wanted


def paths_in_bfloat16(tx, params):
  inner = tx.init(params).inner_state
  leaves, _ = jax.tree_util.tree_flatten_with_path(inner)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in leaves
    if leaf.dtype == jnp.bfloat16
  }


def test_what_only_looks_like_a_moment_stays_and_a_predicate_chooses_otherwise():
  params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "s": jnp.ones(())}
  muon = mpjax.bfloat16_states(optax.contrib.muon(1e-2))  # has three coefficients in its state
  assert {path.split("/")[-1] for path in paths_in_bfloat16(muon, params)} == {"w", "b", "s"}
  injected = mpjax.bfloat16_states(rate_injected(1e-2))
  assert {path.split("/")[-1] for path in paths_in_bfloat16(injected, params)} == {"w", "b", "s"}
  for sums in (
    mpjax.bfloat16_states(mpjax.master_weights(optax.trace(0.9))),
    mpjax.bfloat16_states(optax.MultiSteps(optax.trace(0.9), 2)),
  ):
    found = paths_in_bfloat16(sums, params)
    assert len(found) == 3 and all("/trace/" in path for path in found)
  only = mpjax.bfloat16_states(
    optax.scale_by_adam(), which=lambda path, leaf: path.startswith("nu/") and leaf.ndim > 1
  )
  assert paths_in_bfloat16(only, params) == {"nu/w"}
  assert paths_in_bfloat16(mpjax.bfloat16_states(optax.scale_by_adam()), jnp.ones(())) == set()
  assert paths_in_bfloat16(mpjax.bfloat16_states(optax.scale_by_adam()), jnp.ones(2)) == {
    "mu",
    "nu",
  }


def test_a_first_moment_that_the_optimizer_itself_holds_in_16_bits_stays_its_own():
  tx = mpjax.bfloat16_states(optax.adam(1e-2, mu_dtype="float16"))
  _, state = descend(tx, WIDE, 2, GRADS)
  adam = state.inner_state[0]
  assert (adam.mu["w"].dtype, adam.nu["w"].dtype) == (jnp.float16, jnp.bfloat16)


# Train steps, warnings, reports -------------------------------------------------------------------

X = array(normal(0, 16, 4))
BATCH = {"x": X, "y": array(np.sin(np.asarray(X)[:, 0]))}


def loss_fn(params, batch):
  out = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
  return jnp.mean((out - batch["y"]) ** 2)


def half_params(dtype="bfloat16"):
  w = jax.random.normal(jax.random.key(1), (4, 8)) / 2
  return mpjax.cast_floating({"w": w, "v": jnp.linspace(-1.0, 1.0, 8)}, dtype)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("place", ["alone", "around the scaler", "inside the scaler"])
def test_a_train_step_takes_both_without_a_warning_and_small_updates_arrive(place):
  make = {
    "alone": six_bytes,
    "around the scaler": lambda tx: mpjax.stochastic_rounding(scaled(mpjax.bfloat16_states(tx))),
    "inside the scaler": lambda tx: scaled(six_bytes(tx)),
  }[place]
  tx = make(optax.adam(1e-4))
  step = make_train_step(loss_fn, tx, policy="bfloat16")
  state = TrainState.create(half_params(), tx)
  start = np.asarray(state.params["w"], np.float32)
  for _ in range(10):
    state, metrics = step(state, BATCH)
  assert metrics.applied and state.params["w"].dtype == jnp.bfloat16
  way = np.abs(np.asarray(state.params["w"], np.float32) - start)
  assert 0 < np.mean(way > 0) < 1 and way.max() < 0.02
  held_now = [x.dtype for x in jax.tree.leaves(state.opt_state) if x.shape == (4, 8)]
  assert held_now == [jnp.bfloat16, jnp.bfloat16]


def test_an_nnx_model_with_bfloat16_parameters_trains_by_them():
  model = nnx.Linear(4, 1, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
  optimizer = nnx.Optimizer(model, scaled(six_bytes(optax.adam(1e-3))), wrt=nnx.Param)
  start = bits(model.kernel[...])
  step = mpjax.nnx.make_train_step(
    lambda model, batch: jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)
  )
  for _ in range(5):
    assert step(model, optimizer, BATCH).applied
  assert model.kernel[...].dtype == jnp.bfloat16 and bits(model.kernel[...]) != start


def test_the_warnings_name_both_as_the_way_out_and_each_silences_its_own():
  def seen(tx):
    state = TrainState.create(half_params(), tx)
    with pytest.warns(LowPrecisionWarning) as found:
      make_train_step(loss_fn, tx)(state, BATCH)
    return [str(warning.message) for warning in found]

  (params,) = seen(mpjax.bfloat16_states(optax.adam(1e-3)))
  assert "rounded to the nearest" in params and "mpjax.stochastic_rounding(tx)" in params
  (moment,) = seen(mpjax.stochastic_rounding(to_the_nearest(optax.scale_by_rms())))
  assert "Second moments should be" in moment and "mpjax.bfloat16_states(tx)" in moment


def test_the_update_report_names_the_way_out_where_one_is_needed():
  def report(size):
    params = {"w": jnp.linspace(0.5, 1, 64)}
    tx = mpjax.inspect.collect_statistics(optax.sgd(1.0))
    _, state = tx.update({"w": jnp.full(64, size)}, tx.init(params), params)
    return mpjax.inspect.update_report(mpjax.inspect.statistics(state)).summary

  assert "mpjax.stochastic_rounding(tx), or mpjax.master_weights(tx)" in report(2.0**-12)
  assert "wrap" not in report(2.0**-5)


@pytest.mark.parametrize(
  ("make", "dtype", "size"),
  [
    (lambda: optax.adam(1e-3), "float32", 12),
    (lambda: mpjax.master_weights(optax.adam(1e-3)), "bfloat16", 14),
    (lambda: mpjax.stochastic_rounding(optax.adam(1e-3)), "bfloat16", 10),
    (lambda: six_bytes(optax.adam(1e-3)), "bfloat16", 6),
  ],
  ids=["float32", "masters", "rounded", "rounded, states too"],
)
def test_the_cost_of_a_step_says_how_many_bytes_a_parameter_takes(make, dtype, size):
  tx = make()
  params = {"w": jnp.ones((64, 64), dtype)}

  def step(params, state, x):
    grads = jax.grad(lambda p: jnp.mean((x @ p["w"].astype(jnp.float32)) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, x

  report = mpjax.inspect.cost(step, params, tx.init(params), jnp.ones((2, 64)), policies="float32")
  assert report.parameters == 64 * 64
  assert abs(report.bytes_per_parameter - size) < 0.01
  assert f"{size}.0 bytes a parameter, of which there are 4,096" in str(report)


def test_bytes_a_parameter_are_those_of_a_train_state_and_of_a_model_with_its_optimizer():
  tx = six_bytes(optax.adam(1e-3))
  state = TrainState.create(half_params(), tx)
  step = make_train_step(loss_fn, tx, donate=False)
  report = mpjax.inspect.cost(lambda s, b: step(s, b), state, BATCH, policies="float32")
  assert report.parameters == 40 and report.bytes_per_parameter == 6 + (2 * (8 + 4) + 2 * 4) / 40
  model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)

  def nnx_step(model, optimizer, x):
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))

  report = mpjax.inspect.cost(nnx_step, model, optimizer, X, policies="float32")
  assert report.parameters == 40 and report.bytes_per_parameter == 8 + 4 / 40
