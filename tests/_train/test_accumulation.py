"""Gradient accumulation: k micro-batches are one step, of Linen, of NNX, and of optax."""

import contextlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from _arrays import array, normal
from mpjax._train.accumulation import check_divides, run_window
from mpjax.training import TrainState, make_train_step

# optax.adam and Flax's norms mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

X = array(normal(0, 24, 4))
Y = array(np.sin(np.asarray(X) @ [1.0, -2.0, 0.5, 0.3]))
BATCH = {"x": X, "y": Y, "factor": array(1)}
NAN_IN_ONE = {**BATCH, "x": array(np.where(np.arange(96).reshape(24, 4) == 41, np.nan, X))}
PARAMS = {"w": array(normal(1, 4, 8) / 2), "v": array(np.linspace(-0.5, 0.5, 8))}


def loss_fn(params, batch):
  out = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
  return jnp.mean((out - batch["y"]) ** 2) * batch["factor"]


def bits(tree):
  def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def scaled_adam(**settings):
  return mpjax.dynamic_loss_scaling(optax.adam(1e-2), **settings)


def scaled_sgd(**settings):
  return mpjax.dynamic_loss_scaling(optax.sgd(0.1, momentum=0.9), **settings)


def all_but_the_scaler(state):
  return bits(state.replace(opt_state=state.opt_state.inner_state))


# One step, whatever the number of micro-batches ---------------------------------------------------


@pytest.mark.parametrize("count", [3, 8])
def test_k_micro_batches_are_one_big_batch_to_float32_rounding(count):
  tx = scaled_sgd(growth_interval=2)
  whole, parts = TrainState.create(PARAMS, tx), TrainState.create(PARAMS, tx)
  step, accumulating = make_train_step(loss_fn, tx), make_train_step(loss_fn, tx, accumulate=count)
  for _ in range(4):
    whole, expected = step(whole, BATCH)
    parts, metrics = accumulating(parts, BATCH)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-5)
  chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-7)
  assert int(parts.step) == 4
  assert float(mpjax.loss_scale(parts.opt_state)) == float(mpjax.loss_scale(whole.opt_state))


def test_one_micro_batch_is_the_step_without_accumulation():
  tx = scaled_adam()
  state = TrainState.create(PARAMS, tx)
  texts = [
    make_train_step(loss_fn, tx, **settings).lower(state, BATCH).as_text()
    for settings in ({}, {"accumulate": 1})
  ]
  assert texts[0] == texts[1]


def test_micro_batches_run_in_a_scan_of_one_trace():
  traced = chex.assert_max_traces(loss_fn, 1)
  tx = scaled_adam()
  step = make_train_step(traced, tx, accumulate=4, policy="mixed_float16")
  state = TrainState.create(PARAMS, tx)
  text = str(jax.make_jaxpr(step)(state, BATCH))
  assert "scan[" in text
  assert "f16[6,8] = dot_general" in text
  assert "f16[24,8] = dot_general" not in text


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_accumulator_is_float32_and_the_scale_is_divided_out_once(param_dtype):
  params = mpjax.cast_floating(PARAMS, param_dtype)
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  step = make_train_step(loss_fn, tx, accumulate=4)
  expected = contextlib.nullcontext()
  if param_dtype == "bfloat16":
    expected = pytest.warns(mpjax.training.LowPrecisionWarning)
  with expected:
    jaxpr = jax.make_jaxpr(step)(TrainState.create(params, tx), BATCH).jaxpr
  (scan,) = [eqn for eqn in flat(jaxpr) if eqn.primitive.name == "scan"]
  carry = [v.aval for v in scan.outvars if v.aval.shape in {(4, 8), (8,)}]
  assert {aval.dtype.name for aval in carry} == {"float32"}
  outside = [e.primitive.name for e in flat(jaxpr, through=("jit", "pjit"))]
  assert outside.count("is_finite") == len(jax.tree.leaves(params))
  assert outside.count("reduce_and") == 1
  inside = [e.primitive.name for e in flat(scan.params["jaxpr"].jaxpr)]
  assert not {"is_finite", "reduce_and"} & set(inside)


def flat(jaxpr, through=None):
  """All equations of a jaxpr and of those inside it, or inside of some primitives only."""
  for eqn in jaxpr.eqns:
    yield eqn
    if through is None or eqn.primitive.name in through:
      for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
      ):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          yield from flat(inner, through)


def test_a_sum_of_tiny_gradients_is_not_rounded_to_16_bits():
  """The mean of 256 bfloat16 gradients 1 and 255 times 1/256 is known; bfloat16 would keep 1."""
  batch = {"x": jnp.concatenate([jnp.ones(1), jnp.full(255, 1 / 256)])}
  params = {"w": jnp.zeros((), jnp.bfloat16)}
  tx = optax.sgd(1.0)
  step = make_train_step(
    lambda p, b: jnp.mean(p["w"].astype(jnp.float32) * b["x"]), tx, accumulate=256
  )
  with pytest.warns(mpjax.training.LowPrecisionWarning):
    _, metrics = step(TrainState.create(params, tx), batch)
  np.testing.assert_allclose(metrics.grad_norm, (1 + 255 / 256) / 256, rtol=1e-6)


def test_finite_gradients_near_the_top_of_float32_stay_finite():
  tx = optax.sgd(1.0)
  step = make_train_step(lambda p, b: jnp.sum(p["w"] * jnp.mean(b["x"])), tx, accumulate=3)
  state, _ = step(TrainState.create({"w": jnp.ones(2)}, tx), {"x": jnp.full(3, 3e38)})
  np.testing.assert_allclose(state.params["w"], -3e38, rtol=1e-6)


def test_every_kth_example_goes_into_a_micro_batch_and_scalars_into_all():
  batch = {
    "x": jnp.arange(6),
    "pair": jnp.arange(12).reshape(6, 2),
    "n": jnp.int32(7),
    "none": None,
  }
  seen = run_window(
    lambda flow, part, index: mpjax._train.accumulation.Window(
      jnp.float32(0), flow, (part, index), jnp.float32(0)
    ),
    3,
    jnp.float32(0),
    None,
    batch,
  ).extras
  parts, index = seen
  np.testing.assert_array_equal(parts["x"], [[0, 3], [1, 4], [2, 5]])
  np.testing.assert_array_equal(parts["pair"][1], [[2, 3], [8, 9]])
  np.testing.assert_array_equal(parts["n"], [7, 7, 7])
  np.testing.assert_array_equal(index, [0, 1, 2])


@pytest.mark.parametrize(
  ("batch", "count", "message"),
  [
    (
      {"a": {"x": array(np.ones((7, 2)))}},
      2,
      r"accumulate=2 must divide.*a/x: f32\[7,2\].*multiple of 2",
    ),
    (
      {"x": array(range(6)), "y": array(range(4))},
      2,
      r"one leading axis.*batch/y: f32\[4\] beside batch/x: f32\[6\]",
    ),
    ({"n": array(1)}, 2, "batch without any array"),
  ],
)
def test_a_batch_that_does_not_split_is_refused_by_name(batch, count, message):
  with pytest.raises(ValueError, match=message):
    check_divides(batch, count)


def test_a_count_that_is_none_is_refused_at_once():
  for make in (
    lambda n: make_train_step(loss_fn, optax.sgd(0.1), accumulate=n),
    lambda n: mpjax.nnx.make_train_step(loss_fn, accumulate=n),
  ):
    with pytest.raises(ValueError, match=r"accumulate must be at least 1. Got 0"):
      make(0)
    with pytest.raises(TypeError, match=r"accumulate must be an integer. Got 2.0"):
      make(2.0)


# Skips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_a_nan_in_one_micro_batch_drops_its_window_and_shifts_nothing(policy):
  tx = scaled_adam()
  step = make_train_step(loss_fn, tx, accumulate=4, policy=policy, donate=False)
  clean = TrainState.create(PARAMS, tx)
  state, _ = step(clean, BATCH)
  after, metrics = step(state, NAN_IN_ONE)
  assert not metrics.applied
  assert all_but_the_scaler(after) == all_but_the_scaler(state)
  assert float(mpjax.loss_scale(after.opt_state)) == 2.0**14
  assert (int(metrics.consecutive_skips), int(metrics.total_skips)) == (1, 1)
  resumed, metrics = step(after, BATCH)
  undisturbed, _ = step(state, BATCH)
  assert metrics.applied
  chex.assert_trees_all_close(resumed.params, undisturbed.params, rtol=1e-3 if policy else 1e-6)


def test_growth_counts_windows():
  tx = scaled_sgd(init_scale=8, growth_interval=3)
  step = make_train_step(loss_fn, tx, accumulate=2)
  state = TrainState.create(PARAMS, tx)
  scales = []
  for _ in range(6):
    state, _ = step(state, BATCH)
    scales.append(float(mpjax.loss_scale(state.opt_state)))
  assert scales == [8, 8, 16, 16, 16, 32]


def test_a_limit_on_skips_names_the_leaves_of_the_window():
  tx = scaled_adam()
  step = make_train_step(loss_fn, tx, accumulate=4, max_consecutive_skips=1)
  with pytest.raises(mpjax.training.NonFiniteError, match=r"inf, NaN or .* in v, w, at loss nan"):
    step(TrainState.create(PARAMS, tx), NAN_IN_ONE)


# Statistics, keys, auxiliary output ---------------------------------------------------------------


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x))[:, 0]


def net_loss(params, model_state, batch, *, rng):
  out, updated = Net().apply({"params": params, **model_state}, batch["x"], mutable=["batch_stats"])
  return jnp.mean((out - batch["y"]) ** 2), updated, {"key": jax.random.key_data(rng), "out": out}


def net_state(tx):
  variables = Net().init(jax.random.key(0), X)
  params = variables.pop("params")
  return TrainState.create(params, tx, model_state=variables, rng=jax.random.key(7))


def test_statistics_go_through_the_micro_batches_in_order_and_a_dropped_window_restores_them():
  tx = scaled_sgd()
  step = make_train_step(net_loss, tx, has_aux=True, accumulate=3, donate=False)
  start = net_state(tx)
  state, metrics = step(start, BATCH)
  mean = jnp.zeros(4)
  for i in range(3):
    mean = 0.5 * mean + 0.5 * X[i::3].mean(0)
  found = state.model_state["batch_stats"]["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7)
  assert metrics.aux["out"].shape == (3, 8)
  after, metrics = step(state, NAN_IN_ONE)
  assert not metrics.applied
  assert all_but_the_scaler(after) == all_but_the_scaler(state)


def test_each_micro_batch_has_a_key_of_its_own():
  tx = scaled_sgd()
  step = make_train_step(net_loss, tx, has_aux=True, accumulate=2)
  state = net_state(tx)
  seen = []
  for _ in range(2):
    state, metrics = step(state, BATCH)
    seen += metrics.aux["key"].tolist()
  keys = [jax.random.fold_in(jax.random.key(7), n) for n in range(2)]
  expected = [
    jax.random.key_data(jax.random.fold_in(k, i)).tolist() for k in keys for i in range(2)
  ]
  assert seen == expected


# Memory and devices -------------------------------------------------------------------------------


def wide_loss(params, batch):
  h = batch["x"]
  for w in params:
    h = jnp.tanh(h @ w)
  return jnp.mean(h**2)


def temp_bytes(size, count):
  tx = optax.sgd(0.1)
  params = [jnp.zeros((32, 32)) for _ in range(8)]
  step = make_train_step(wide_loss, tx, accumulate=count)
  lowered = step.lower(TrainState.create(params, tx), {"x": jnp.zeros((size, 32))})
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_compiled_memory_grows_with_one_micro_batch_and_not_with_their_number():
  one, two = temp_bytes(2048, 1), temp_bytes(1024, 1)
  assert two < 0.6 * one  # activations are most of it
  eight = temp_bytes(8 * 1024, 8)
  assert eight < 1.15 * two


def test_a_sharded_batch_is_split_where_it_lies():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  tx = scaled_sgd()
  step = make_train_step(loss_fn, tx, accumulate=3, donate=False)
  state = jax.device_put(TrainState.create(PARAMS, tx), replicated)
  batch = {k: jax.device_put(v, sharding if v.ndim else replicated) for k, v in BATCH.items()}
  text = step.lower(state, batch).compile().as_text()
  assert "all-reduce" in text
  assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
  sharded, _ = step(state, batch)
  plain, _ = step(TrainState.create(PARAMS, tx), BATCH)
  chex.assert_trees_all_close(jax.device_get(sharded.params), plain.params, rtol=1e-5, atol=1e-7)


def test_it_runs_under_shard_map():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  tx = scaled_sgd(axis_name="data")
  step = make_train_step(
    lambda p, b: jax.lax.pmean(loss_fn(p, b), "data"), tx, accumulate=3, donate=False
  )
  specs = {"x": spec("data"), "y": spec("data"), "factor": spec()}
  sharded = jax.shard_map(step, mesh=mesh, in_specs=(spec(), specs), out_specs=spec())
  state = TrainState.create(PARAMS, tx)
  new, metrics = jax.jit(sharded)(state, BATCH)
  plain, expected = make_train_step(loss_fn, scaled_sgd())(state, BATCH)
  np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
  chex.assert_trees_all_close(new.params, plain.params, rtol=1e-5, atol=1e-7)


# NNX ----------------------------------------------------------------------------------------------


class Model(nnx.Module):
  """Statistics, a random stream and a counter: what a micro-batch leaves to the next."""

  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
    self.drop = nnx.Dropout(0.25, rngs=rngs)
    self.last = nnx.Linear(4, 1, rngs=rngs)
    self.calls = nnx.Variable(jnp.int32(0))

  def __call__(self, x):
    self.calls[...] += 1
    self.mean = nnx.Intermediate(jnp.mean(x))
    return self.last(self.drop(self.norm(x)))[:, 0]


def model_loss(model, batch):
  return jnp.mean((model(batch["x"]) - batch["y"]) ** 2) * batch["factor"]


def make_model(tx):
  model = Model(nnx.Rngs(0))
  return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_an_nnx_model_goes_through_its_micro_batches_in_order():
  """As by hand: the model called on each, the gradients averaged, one update."""
  model, optimizer = make_model(optax.sgd(0.1))
  step = mpjax.nnx.make_train_step(model_loss, accumulate=3)
  metrics = step(model, optimizer, BATCH)

  other, plain = make_model(optax.sgd(0.1))
  grad = nnx.jit(nnx.value_and_grad(model_loss))
  parts = [{"x": X[i::3], "y": Y[i::3], "factor": 1.0} for i in range(3)]
  losses, grads = zip(*(grad(other, part) for part in parts), strict=True)
  plain.update(other, jax.tree.map(lambda *g: sum(g) / 3, *grads))

  np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
  assert int(model.calls[...]) == 3
  np.testing.assert_allclose(model.mean[...], X[2::3].mean(), rtol=1e-5)
  expected, found = (dict(nnx.to_flat_state(nnx.as_pure(nnx.state(m)))) for m in (other, model))
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_the_micro_batches_of_an_nnx_model_run_under_the_policy_in_a_scan():
  step = mpjax.nnx.make_train_step(model_loss, accumulate=3, policy="mixed_float16")
  text = step.lower(*make_model(scaled_sgd()), BATCH).as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  assert "stablehlo.while" in text
  assert any("tensor<8x4xf16>" in line for line in dots)
  assert not any("tensor<8x4xf32>" in line or "tensor<24x4" in line for line in dots)


def test_a_bad_micro_batch_leaves_an_nnx_model_as_it_was():
  model, optimizer = make_model(scaled_sgd())
  step = mpjax.nnx.make_train_step(model_loss, accumulate=4, donate=False)
  step(model, optimizer, BATCH)

  def everything():
    kept = nnx.state(model, nnx.Not(nnx.RngState))  # the numbers that made a NaN do not return
    return bits((kept, optimizer.step, nnx.as_pure(optimizer.opt_state).inner_state))

  del model.mean  # it is no part of what a step restores
  before = everything()
  metrics = step(model, optimizer, NAN_IN_ONE)
  del model.mean
  assert not metrics.applied
  assert everything() == before
  assert int(metrics.total_skips) == 1
  assert step(model, optimizer, BATCH).applied
  assert int(model.calls[...]) == 8


def test_a_variable_that_changes_its_type_between_micro_batches_is_refused_by_path():
  class Growing(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.ones(4))
      self.seen = nnx.Variable(jnp.zeros(1))

    def __call__(self, x):
      self.seen.set_value(jnp.concatenate([self.seen[...], x[:1, 0]]))
      return x @ self.w[...]

  model = Growing()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  with pytest.raises(TypeError, match=r"as it found it.*Got seen: f32\[2\] for f32\[1\]"):
    mpjax.nnx.make_train_step(model_loss, accumulate=2)(model, optimizer, BATCH)


# optax.MultiSteps ---------------------------------------------------------------------------------


def test_multisteps_inside_the_scaler_leaves_a_bad_micro_batch_out_of_its_window():
  """And takes one more instead: what `dynamic_loss_scaling` says."""
  tx = mpjax.dynamic_loss_scaling(optax.MultiSteps(optax.sgd(0.1), 2), growth_interval=2)
  step = make_train_step(loss_fn, tx)
  state = TrainState.create(PARAMS, tx)
  half = {**BATCH, "x": X[:12], "y": Y[:12]}
  moved, scales = [], []
  for batch in (half, {**half, "factor": jnp.float32(jnp.nan)}, half, half, half):
    before = bits(state.params)
    state, metrics = step(state, batch)
    moved.append(bits(state.params) != before)
    scales.append(float(mpjax.loss_scale(state.opt_state)))
  assert moved == [False, False, True, False, True]
  assert int(metrics.total_skips) == 1
  # Halved by the bad micro-batch, doubled by the second optimizer step, not by micro-batches.
  assert scales == [2.0**15, 2.0**14, 2.0**14, 2.0**14, 2.0**15]


@pytest.mark.parametrize("skip", [None, optax.skip_not_finite], ids=["plain", "skip_not_finite"])
def test_multisteps_around_the_scaler_is_refused_by_the_train_steps(skip):
  tx = optax.MultiSteps(scaled_sgd(), 2, should_skip_update_fn=skip)
  message = r"must be the outermost.*inside optax.MultiSteps.*accumulate=k"
  with pytest.raises(ValueError, match=message):
    TrainState.create(PARAMS, tx)
  model, optimizer = make_model(tx.gradient_transformation())
  with pytest.raises(ValueError, match=message):
    mpjax.nnx.make_train_step(model_loss)(model, optimizer, BATCH)


def test_why_it_is_refused_with_skip_not_finite_too():
  """The scaler is never told of an overflow, so a scale that is too high stays too high."""
  tx = optax.MultiSteps(scaled_sgd(), 2, should_skip_update_fn=optax.skip_not_finite)
  state = tx.init(PARAMS)
  for _ in range(3):
    _, state = tx.update({"w": jnp.full((4, 8), jnp.inf), "v": jnp.ones(8)}, state, PARAMS)
  assert float(state.inner_opt_state.scale) == 2.0**15


def test_multisteps_without_a_scaler_is_not_refused():
  tx = optax.MultiSteps(optax.sgd(0.1), 2)
  state, _ = make_train_step(loss_fn, tx)(TrainState.create(PARAMS, tx), BATCH)
  assert int(state.step) == 1
