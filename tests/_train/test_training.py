"""The train steps of Linen and of pure functions."""

import pickle
import re
from collections import Counter
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from _arrays import array, normal
from mpjax.testing import FaultSchedule, inject_gradients
from mpjax.training import (
  LowPrecisionWarning,
  NonFiniteError,
  StepMetrics,
  TrainState,
  make_train_step,
)

# optax.adam and Flax's BatchNorm mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

X = array(normal(0, 16, 4))
Y = array(np.sin(np.asarray(X) @ [1.0, -2.0, 0.5, 0.3]))
BATCH = {"x": X, "y": Y, "factor": array(1)}
BAD = {**BATCH, "factor": array(np.nan)}


def init_params(seed=0):
  k1, k2 = jax.random.split(jax.random.key(seed))
  return {
    "hidden": {"w": jax.random.normal(k1, (4, 8)) / 2, "b": jnp.zeros(8)},
    "out": {"w": jax.random.normal(k2, (8,)) / 3},
  }


def predict(params, x):
  hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
  return hidden @ params["out"]["w"]


def loss_fn(params, batch):
  return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2) * batch["factor"]


class Net(nn.Module):
  """Dropout and BatchNorm, so that a step has a key and statistics."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(8)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
    return nn.Dense(1)(x)[:, 0]


def net_loss(params, model_state, batch, *, rng):
  out, new_state = Net().apply(
    {"params": params, **model_state},
    batch["x"],
    train=True,
    rngs={"dropout": rng},
    mutable=["batch_stats"],
  )
  return jnp.mean((out - batch["y"]) ** 2) * batch["factor"], new_state, {"mean": jnp.mean(out)}


def net_state(tx):
  variables = Net().init({"params": jax.random.key(0)}, X, train=False)
  params = variables.pop("params")
  return TrainState.create(params, tx, model_state=variables, rng=jax.random.key(7))


def bits(tree):
  def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def primitives(jaxpr):
  names = set()
  for eqn in jaxpr.eqns:
    names.add(eqn.primitive.name)
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      names |= primitives(inner) if hasattr(inner, "eqns") else set()
  return names


def step_jaxpr(tx, policy):
  step = make_train_step(loss_fn, tx, policy=policy)
  return jax.make_jaxpr(step)(TrainState.create(init_params(), tx), BATCH).jaxpr


POLICIES = [None, "float32", "mixed_bfloat16", "mixed_float16"]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_trains_and_reports(policy):
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(loss_fn, tx, policy=policy)
  state = TrainState.create(init_params(), tx)
  first = loss_fn(init_params(), BATCH)
  for i in range(30):
    state, metrics = step(state, BATCH)
    if i == 0:
      np.testing.assert_allclose(metrics.loss, first, rtol=2e-2)
  assert isinstance(metrics, StepMetrics)
  assert {
    name: (x.dtype.name, x.shape) for name, x in metrics._asdict().items() if name != "aux"
  } == {
    "loss": ("float32", ()),
    "grad_norm": ("float32", ()),
    "loss_scale": ("float32", ()),
    "applied": ("bool", ()),
    "consecutive_skips": ("int32", ()),
    "total_skips": ("int32", ()),
  }
  assert metrics.loss < first / 2
  assert int(state.step) == 30
  assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
  assert {x.dtype.name for x in jax.tree.leaves(state.opt_state.inner_state)} <= {
    "float32",
    "int32",
  }


def test_a_step_equals_the_one_written_by_hand():
  adam = optax.adam(1e-2)
  tx = mpjax.dynamic_loss_scaling(adam, growth_interval=2)
  step = make_train_step(loss_fn, tx)
  state = TrainState.create(init_params(), tx)
  params, opt_state = init_params(), adam.init(init_params())
  for _ in range(6):
    state, metrics = step(state, BATCH)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, BATCH)
    updates, opt_state = adam.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-4)
  chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", [None, "float32", "mixed_bfloat16"])
def test_without_scaling_no_scaler_operation_is_in_the_step(policy):
  scaler = {"is_finite", "select_n", "pmin", "reduce_and"}
  tx = optax.sgd(1e-2, momentum=0.9)  # optax.adam has a select of its own, around its count
  assert not primitives(step_jaxpr(tx, policy)) & scaler
  scaled = primitives(step_jaxpr(mpjax.dynamic_loss_scaling(tx), policy))
  assert {"reduce_and", "select_n"} <= scaled


def compiled_operations(step, *args):
  """How often each operation stands in a compiled program, results that nobody reads left out."""
  text = jax.jit(step).lower(*args).compile().as_text()
  return Counter(re.findall(r" = \S+ ([a-z\-]+)\(", text))


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_without_scaling_a_step_is_the_program_of_the_one_written_by_hand(policy):
  """Without its metrics: the norm and the count of steps are what it adds."""
  tx = optax.adam(1e-2)
  state, step = TrainState.create(init_params(), tx), make_train_step(loss_fn, tx, policy=policy)

  def ours(state, batch):
    state, metrics = step(state, batch)
    return state.params, state.opt_state, metrics.loss

  def by_hand(state, batch):
    loss, grads = jax.value_and_grad(mpjax.autocast(loss_fn, policy))(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state, loss

  found = compiled_operations(ours, state, BATCH)
  assert found == compiled_operations(by_hand, state, BATCH)
  assert found["dot"] + found["fusion"] > 4
  scaled = TrainState.create(init_params(), mpjax.static_loss_scaling(tx))
  step = make_train_step(loss_fn, mpjax.static_loss_scaling(tx), policy=policy)
  assert compiled_operations(ours, scaled, BATCH) != found


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("scaler", [None, mpjax.static_loss_scaling], ids=["plain", "scaled"])
def test_a_step_reads_its_gradients_once_for_the_norm_and_the_skip(policy, scaler):
  """As many reductions as in a step by hand with the norm of optax."""
  inner = optax.adam(1e-2)
  tx = scaler(inner) if scaler else inner
  state, step = TrainState.create(init_params(), tx), make_train_step(loss_fn, tx, policy=policy)

  def by_hand(params, opt_state, batch):
    loss, grads = jax.value_and_grad(mpjax.autocast(loss_fn, policy))(params, batch)
    updates, opt_state = inner.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads)

  args = init_params(), inner.init(init_params()), BATCH
  reductions = [
    len(re.findall(r" reduce\(", jax.jit(fn).lower(*args).compile().as_text()))
    for fn, args in ((step, (state, BATCH)), (by_hand, args))
  ]
  # Sums over leaves are one more, and which of these can be squared another.
  assert reductions[0] - reductions[1] == (1 if scaler is None else 2)


def test_without_scaling_the_metrics_are_constants():
  tx = optax.sgd(0.1)
  _state, metrics = make_train_step(loss_fn, tx)(TrainState.create(init_params(), tx), BATCH)
  assert (float(metrics.loss_scale), bool(metrics.applied)) == (1.0, True)
  assert (int(metrics.consecutive_skips), int(metrics.total_skips)) == (0, 0)
  assert metrics.aux is None


def test_metrics_may_be_donated():
  """To what adds them up, say: those of each step are its own."""
  tx = optax.sgd(0.1)
  step, state = make_train_step(loss_fn, tx), TrainState.create(init_params(), tx)
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
  state, total = step(state, BATCH)
  for _ in range(2):
    state, metrics = step(state, BATCH)
    total = add(total, metrics)
  assert (float(total.loss_scale), int(total.total_skips)) == (3.0, 0)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_whole_loss_runs_under_the_policy(policy):
  text = str(step_jaxpr(mpjax.static_loss_scaling(optax.sgd(0.1)), policy))
  narrow = "bf16" if policy == "mixed_bfloat16" else "f16"
  assert f"{narrow}[16,8] = dot_general" in text
  assert "f32[16,8] = dot_general" not in text.replace("b" + narrow, "")


def test_a_step_is_traced_once():
  traced = chex.assert_max_traces(loss_fn, 1)
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), growth_interval=2)
  step = make_train_step(traced, tx)
  state = TrainState.create(init_params(), tx)
  for batch in (BATCH, BAD, BATCH, BATCH, BATCH):
    state, _ = step(state, batch)


def test_a_step_is_a_fixed_point_of_scan():
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(loss_fn, tx, donate=False)
  state = TrainState.create(init_params(), tx)
  batches = jax.tree.map(lambda x: jnp.stack([x] * 4), BATCH)
  final, metrics = jax.lax.scan(step, state, batches)
  for _ in range(4):
    state, _ = step(state, BATCH)
  assert jax.tree.structure(final) == jax.tree.structure(state)
  chex.assert_trees_all_close(final.params, state.params, rtol=1e-5)
  assert metrics.loss.shape == (4,)


def test_the_state_is_donated_and_yours_is_not():
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  mine = init_params()
  state = TrainState.create(mine, tx, rng=jax.random.key(0))

  def with_rng(params, batch, *, rng):
    return loss_fn(params, batch)

  new, _ = make_train_step(with_rng, tx)(state, BATCH)
  assert state.params["out"]["w"].is_deleted()
  assert not mine["out"]["w"].is_deleted()
  kept, _ = make_train_step(with_rng, tx, donate=False)(new, BATCH)
  assert not new.params["out"]["w"].is_deleted()
  assert int(kept.step) == 2


def test_arrays_that_the_optimizer_shares_with_the_parameters_can_be_donated():
  shared = optax.GradientTransformation(
    lambda params: params, lambda updates, state, params=None: (updates, state)
  )
  tx = optax.chain(shared, optax.sgd(0.1))
  w = jnp.ones(4)
  state = TrainState.create({"a": w, "b": w}, tx)
  step = make_train_step(lambda p, batch: jnp.sum(p["a"] * p["b"]), tx)
  state, _ = step(state, BATCH)
  assert int(state.step) == 1


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_batch_may_hold_arrays_of_the_state_that_is_donated(first):
  tx = optax.sgd(0.1)
  loss = lambda params, batch: jnp.sum((params["w"] - batch["x"]) ** 2)
  step = make_train_step(loss, tx)
  state = TrainState.create({"w": jnp.ones(4)}, tx)
  for n in range(4):
    x = state.params["w"] if n >= first else jnp.zeros(4)
    state, metrics = step(state, {"x": x})
    assert float(metrics.loss) == 0 if n >= first else float(metrics.loss) > 0
  assert not state.params["w"].is_deleted()


# Model state, keys, auxiliary output --------------------------------------------------------------


def test_statistics_keys_and_aux_go_through_a_step():
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(net_loss, tx, has_aux=True)
  state = net_state(tx)
  start = bits(state.model_state)
  key = bits(state.rng)
  state, metrics = step(state, BATCH)
  assert bits(state.model_state) != start
  assert bits(state.rng) == key
  assert metrics.aux["mean"].shape == ()


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_statistics_stay_float32_under_a_policy(policy):
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(net_loss, tx, has_aux=True, policy=policy)
  state, metrics = step(net_state(tx), BATCH)
  assert {x.dtype.name for x in jax.tree.leaves(state.model_state)} == {"float32"}
  assert metrics.aux["mean"].dtype == jnp.float32


def test_each_step_has_a_key_of_its_own_after_a_skip_too():
  seen = []

  def spy(params, batch, *, rng):
    return loss_fn(params, batch) + 0 * jax.random.uniform(rng), jax.random.key_data(rng)

  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  step = make_train_step(spy, tx, has_aux=True)
  state = TrainState.create(init_params(), tx, rng=jax.random.key(3))
  for batch in (BATCH, BAD, BATCH):
    state, metrics = step(state, batch)
    seen.append(metrics.aux.tolist())
  expected = [
    jax.random.key_data(jax.random.fold_in(jax.random.key(3), i)).tolist() for i in (0, 1, 2)
  ]
  assert seen == expected


def test_a_raw_key_works_too():
  tx = optax.sgd(0.1)
  state = TrainState.create(init_params(), tx, rng=jax.random.PRNGKey(3))
  step = make_train_step(lambda p, b, *, rng: loss_fn(p, b) + 0 * jax.random.uniform(rng), tx)
  state, _ = step(state, BATCH)
  assert state.rng.tolist() == [0, 3]


@pytest.mark.parametrize(
  ("returned", "stateful", "has_aux", "message"),
  [
    ((1.0, 2.0), False, False, r"the loss alone: the state has no .* Got a tuple of 2"),
    (1.0, False, True, r"\(loss, aux\)"),
    (1.0, True, False, r"\(loss, new_model_state\): the state has a model_state .*Got float"),
    ((1.0, {}), True, True, r"\(loss, new_model_state, aux\): .*Got a tuple of 2"),
  ],
)
def test_a_loss_function_that_returns_something_else_is_told_what_to_return(
  returned, stateful, has_aux, message
):
  tx = optax.sgd(0.1)
  state = TrainState.create(init_params(), tx, model_state={"n": jnp.ones(1)} if stateful else None)
  step = make_train_step(lambda *args: returned, tx, has_aux=has_aux)
  with pytest.raises(TypeError, match=f"loss_fn must return {message}"):
    step(state, BATCH)


@pytest.mark.parametrize(
  ("new", "message"),
  [
    ({"n": array([1], jnp.bfloat16)}, r"n: bf16\[1\] for f32\[1\]"),
    ({}, r"n: nothing for f32\[1\]"),
    ({"n": array([1]), "m": array([1, 1])}, r"m: f32\[2\] for nothing"),
    ([array([1])], "Got 0: "),
  ],
)
@pytest.mark.parametrize("scaled", [True, False])
def test_a_model_state_of_another_shape_is_refused(new, message, scaled):
  tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1) if scaled else optax.sgd(0.1)
  state = TrainState.create(init_params(), tx, model_state={"n": jnp.ones(1)})
  step = make_train_step(lambda p, s, b: (loss_fn(p, b), new), tx)
  with pytest.raises(TypeError, match=f"model_state like the one.*{message}"):
    step(state, BATCH)


# Skips --------------------------------------------------------------------------------------------


def without_scaler(state):
  inner = state.opt_state.inner_state
  return state.replace(opt_state=inner)


def test_a_skipped_step_changes_nothing_but_the_scaler():
  tx = mpjax.dynamic_loss_scaling(
    optax.chain(optax.clip(1.0), optax.adam(optax.linear_schedule(1e-2, 0, 10)), optax.ema(0.9))
  )
  step = make_train_step(net_loss, tx, has_aux=True, policy="mixed_float16", donate=False)
  state, _ = step(net_state(tx), BATCH)
  after, metrics = step(state, BAD)
  assert not metrics.applied
  assert (int(metrics.consecutive_skips), int(metrics.total_skips)) == (1, 1)
  assert not np.isfinite(metrics.grad_norm)
  assert bits(without_scaler(after)) == bits(without_scaler(state))
  assert float(mpjax.loss_scale(after.opt_state)) == float(metrics.loss_scale) / 2
  after, metrics = step(after, BATCH)
  assert metrics.applied
  assert int(after.step) == 2


@pytest.mark.quick(every=2, start=1)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_scheduled_faults_in_random_leaves_leave_everything_finite_and_train(policy):
  """NaN or inf in random gradient leaves on 5% of the steps."""
  schedule = FaultSchedule.random(300, 0.05)

  def faulty_loss(params, batch):
    return loss_fn(inject_gradients(params, schedule, batch["step"]), batch)

  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), growth_interval=20)
  step = make_train_step(faulty_loss, tx, policy=policy)
  state = TrainState.create(init_params(), tx)
  losses = []
  for i in range(300):
    struck = i in schedule.struck
    before = jax.device_get(without_scaler(state)) if struck else None
    state, metrics = step(state, {**BATCH, "step": jnp.int32(i)})
    losses.append(metrics.loss)
    if struck:
      assert not metrics.applied
      assert bits(without_scaler(state)) == bits(before)
  assert mpjax.all_finite(state)
  assert int(metrics.total_skips) >= len(schedule.struck) > 5
  assert losses[-1] < losses[0] / 10


def test_too_many_skips_raise_with_the_leaves_and_lose_nothing():
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(loss_fn, tx, max_consecutive_skips=3)
  state, _ = step(TrainState.create(init_params(), tx), BATCH)
  start = bits(without_scaler(state))
  bad = {**BATCH, "x": X.at[0, 0].set(jnp.inf)}
  for _ in range(2):
    state, _ = step(state, bad)
  message = r"at least once in 3 steps. Got 3 skipped .*inf, NaN or .* in hidden/w, at loss"
  with pytest.raises(NonFiniteError, match=message) as caught:
    step(state, bad)
  assert "hidden/w" in caught.value.paths
  assert bits(without_scaler(caught.value.state)) == start
  assert int(caught.value.state.opt_state.total_skips) == 3
  assert isinstance(caught.value, FloatingPointError)
  state, metrics = step(caught.value.state, BATCH)
  assert metrics.applied


def test_a_limit_on_skips_needs_a_scaler_and_a_positive_number():
  tx = optax.sgd(0.1)
  step = make_train_step(loss_fn, tx, max_consecutive_skips=3)
  with pytest.raises(
    ValueError, match=r"needs an optimizer with a loss scaler.*static_loss_scaling"
  ):
    step(TrainState.create(init_params(), tx), BATCH)
  with pytest.raises(ValueError, match="max_consecutive_skips must be at least 1"):
    make_train_step(loss_fn, tx, max_consecutive_skips=0)


# Dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_float16_parameters_train_with_float32_optimizer_state(scaled):
  """By itself Adam is NaN at zero gradient on float16 parameters (optax#1754)."""
  tx = mpjax.static_loss_scaling(optax.adam(1e-2), 8) if scaled else optax.adam(1e-2)
  policy = mpjax.Policy.parse("float16")
  state = TrainState.create(policy.cast_to_param(init_params()), tx)
  step = make_train_step(lambda p, b: 0 * loss_fn(p, b), tx, policy=policy)
  start = bits(state.params)
  with pytest.warns(LowPrecisionWarning) as warned:
    state, metrics = step(state, BATCH)
  found = [str(w.message) for w in warned]
  assert re.search(r"float32 masters.*Got hidden/b: f16\[8\]", found[0])
  assert ["without a loss scaler" in text for text in found[1:]] == [True] * (not scaled)
  for _ in range(2):
    state, metrics = step(state, BATCH)
  assert metrics.loss.dtype == jnp.float32
  assert bits(state.params) == start
  assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float16"}
  assert {x.dtype.name for x in jax.tree.leaves(state.opt_state)} <= {"float32", "int32", "bool"}


def test_parameters_in_another_dtype_than_the_policys_are_refused():
  tx = optax.sgd(0.1)
  step = make_train_step(loss_fn, tx, policy="bfloat16")
  with pytest.raises(
    ValueError, match=r"held in bfloat16.*Got hidden/b: f32\[8\]. Create the state"
  ):
    step(TrainState.create(init_params(), tx), BATCH)


def test_an_unknown_policy_or_optimizer_is_refused_at_once():
  with pytest.raises(ValueError, match="A policy must be"):
    make_train_step(loss_fn, optax.sgd(0.1), policy="half")
  with pytest.raises(TypeError, match=r"must be an optax.GradientTransformation"):
    make_train_step(loss_fn, "adam")


@pytest.mark.parametrize("size", [1e18, 1e30])
def test_the_norm_of_gradients_is_what_a_clip_would_see_and_none_have_zero(size):
  tx = optax.sgd(0.0)
  step = make_train_step(lambda p, b: jnp.sum(p["w"]) * b["factor"], tx)
  state = TrainState.create({"w": jnp.ones(4)}, tx)
  state, metrics = step(state, {**BATCH, "factor": jnp.float32(size)})
  np.testing.assert_allclose(metrics.grad_norm, 2 * size if size < 1e19 else np.inf, rtol=1e-6)
  _, metrics = step(state, {**BATCH, "factor": jnp.float32(0)})
  assert metrics.grad_norm == 0


# The state ----------------------------------------------------------------------------------------


def test_every_field_of_the_state_survives():
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  state = net_state(tx)
  leaves, structure = jax.tree.flatten(state)
  assert bits(jax.jit(lambda s: s)(state)) == bits(state)
  assert bits(structure.unflatten(leaves)) == bits(state)
  assert structure.unflatten([None] * len(leaves)).step is None
  shapes = jax.eval_shape(lambda: net_state(tx))
  assert jax.tree.map(lambda x: x.dtype, shapes) == jax.tree.map(lambda x: x.dtype, state)
  assert not any(getattr(x, "weak_type", False) for x in leaves)
  plain = TrainState.create(init_params(), tx)
  assert bits(pickle.loads(pickle.dumps(plain))) == bits(plain)


class StateWithAverage(TrainState):
  average: Any = None


def test_a_subclass_of_the_state_is_a_pytree_whose_fields_a_step_hands_on():
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  state = StateWithAverage.create({"w": jnp.ones(3)}, tx)
  state = state.replace(average={"w": jnp.zeros(3)})
  step = mpjax.make_train_step(lambda p, x: jnp.sum(p["w"] * x), tx)
  state, _ = step(state, jnp.ones(3))
  assert isinstance(state, StateWithAverage)
  np.testing.assert_allclose(state.params["w"], jnp.full(3, 0.9))
  np.testing.assert_array_equal(state.average["w"], jnp.zeros(3))


def test_weakly_typed_parameters_become_strong():
  state = TrainState.create({"w": jnp.asarray(1.0), "n": np.ones(2, np.float32)}, optax.sgd(0.1))
  assert not state.params["w"].weak_type
  assert isinstance(state.params["n"], jax.Array)


def test_the_state_resumes_from_an_orbax_checkpoint_with_the_same_bits(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), growth_interval=2)
  step = make_train_step(loss_fn, tx, donate=False)
  state = TrainState.create(init_params(), tx)
  for batch in (BATCH, BAD, BATCH):
    state, _ = step(state, batch)
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(tmp_path / "state", state)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
  for batch in (BATCH, BAD, BATCH):
    state, _ = step(state, batch)
    restored, _ = step(restored, batch)
  assert bits(restored) == bits(state)


def test_a_step_can_be_lowered_and_tells_its_memory():
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(loss_fn, tx, max_consecutive_skips=3)
  compiled = step.lower(TrainState.create(init_params(), tx), BATCH).compile()
  assert compiled.memory_analysis().argument_size_in_bytes > 0


def test_a_step_shards_its_batch_and_skips_everywhere():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
  step = make_train_step(loss_fn, tx, policy="mixed_float16", donate=False)

  def put(x):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec("data") if x.ndim else spec()))

  state = jax.device_put(
    TrainState.create(init_params(), tx), jax.sharding.NamedSharding(mesh, spec())
  )
  state, metrics = step(state, jax.tree.map(put, BATCH))
  assert metrics.applied
  bad = {**BATCH, "x": X.at[13, 0].set(jnp.nan)}
  after, metrics = step(state, jax.tree.map(put, bad))
  assert not metrics.applied
  assert bits(without_scaler(after)) == bits(without_scaler(state))
