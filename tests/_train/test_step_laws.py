"""What both train steps owe: skips that heal, frozen parameters, settings of restored states."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mpjax
from _arrays import array, normal
from mpjax.training import LowPrecisionWarning, TrainState, make_train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

X = array(np.linspace(-1, 1, 24).reshape(6, 4))


def loss_fn(params, x):
  return jnp.mean((x @ params["w"] - 1.0) ** 2)


def pointers(tree):
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


# A skip heals -------------------------------------------------------------------------------------


def test_the_keys_of_a_run_with_skips_are_all_different_and_resume_where_they_were():
  tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1)

  def loss(params, x, *, rng):
    bad = jnp.where(x[0, 0] > 5, jnp.nan, 1.0)
    return loss_fn(params, x) * bad, jax.random.key_data(rng)

  step = make_train_step(loss, tx, has_aux=True, donate=False)
  state, keys = TrainState.create({"w": jnp.ones((4, 1))}, tx, rng=jax.random.key(3)), []
  for i in range(8):
    state, metrics = step(state, X + 10 * (i in (2, 3, 6)))
    keys.append(metrics.aux.tolist())
  folded = [jax.random.fold_in(jax.random.key(3), i) for i in range(8)]
  assert keys == [jax.random.key_data(key).tolist() for key in folded]
  assert (int(state.step), int(metrics.total_skips)) == (5, 3)


def test_a_typed_key_in_the_model_state_moves_on_when_a_step_is_skipped():
  def loss(params, model_state, x):
    key, _ = jax.random.split(model_state["key"])
    return loss_fn(params, x), {"key": key, "mean": model_state["mean"] + 1}

  tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1)
  start = {"key": jax.random.key(0), "mean": jnp.zeros(())}
  state = TrainState.create({"w": jnp.ones((4, 1))}, tx, model_state=start)
  state, metrics = make_train_step(loss, tx)(state, X * jnp.nan)
  assert not metrics.applied
  assert float(state.model_state["mean"]) == 0
  assert not bool(state.model_state["key"] == start["key"])


def test_an_infinity_that_a_state_holds_on_purpose_is_no_reason_to_skip():
  def loss(params, model_state, x):
    return loss_fn(params, x), {**model_state, "seen": model_state["seen"] + jnp.min(x)}

  tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1)
  start = {"lowest": jnp.array(jnp.inf), "seen": jnp.zeros(())}
  state = TrainState.create({"w": jnp.ones((4, 1))}, tx, model_state=start)
  step = make_train_step(loss, tx, max_consecutive_skips=3)
  state, metrics = step(state, X)
  assert metrics.applied
  _, metrics = make_train_step(
    lambda p, s, x: (loss_fn(p, x), {**s, "seen": s["seen"] * jnp.nan}), tx
  )(state, X)
  assert not metrics.applied


def test_statistics_of_nnx_that_are_not_finite_are_a_skip():
  model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, mpjax.static_loss_scaling(optax.sgd(0.1), 1), wrt=nnx.Param)

  def loss(model, x):
    out = jnp.mean(model(x) ** 2)
    model.mean[...] = model.mean[...] * jnp.where(x[0, 0] > 5, jnp.nan, 1.0)
    return out

  step = mpjax.nnx.make_train_step(loss)
  assert step(model, optimizer, X).applied
  before = np.array(model.mean[...])
  metrics = step(model, optimizer, X + 10)
  assert not metrics.applied
  assert np.isfinite(metrics.grad_norm)
  np.testing.assert_array_equal(model.mean[...], before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_jax_debug_nans_stops_no_skip_of_an_overflow(accumulate):
  tx = mpjax.dynamic_loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
  step = make_train_step(lambda p, x: jnp.sum(p["w"][None] * x), tx, accumulate=accumulate)
  state = TrainState.create({"w": jnp.ones(2)}, tx)
  with jax.debug_nans(True):
    _, metrics = step(state, jnp.array([[1e36, 1.0], [1e36, 1.0]]))
  assert not metrics.applied
  assert np.isposinf(metrics.grad_norm)


# float16 without a scaler -------------------------------------------------------------------------


class Halves(nn.Module):
  """The format is the author's: no policy is in sight."""

  dtype: Any = jnp.float16

  @nn.compact
  def __call__(self, x):
    hidden = nn.relu(nn.Dense(4, dtype=self.dtype)(x))
    return nn.Dense(1, dtype=self.dtype)(hidden).astype(jnp.float32)


def halves_loss(module):
  return lambda params, x: jnp.mean(module.apply({"params": params}, x) ** 2)


def scanned(params, x):
  """Where the format is chosen in a loop inside a `jax.jit`."""

  def layer(carry, _):
    return jnp.tanh(carry.astype(jnp.float16) @ params["w"].astype(jnp.float16)), None

  return jnp.mean(jax.jit(lambda x: jax.lax.scan(layer, x, None, 3)[0])(x.astype(jnp.float16)))


PLAIN = Halves(None)
LINEN = {
  f"Dense_{n}": {"kernel": array(normal(n, 4, width) / 2), "bias": array(np.zeros(width))}
  for n, width in enumerate((4, 1))
}
HEADS = mpjax.PolicyMap({"Halves/Dense_1": "mixed_float16"}, default="float32")
FLOAT16 = {
  "policy of the step": (halves_loss(PLAIN), LINEN, "mixed_float16"),
  "rule of the step": (halves_loss(PLAIN), LINEN, HEADS),
  "policy of the model": (
    halves_loss(mpjax.apply_policy(PLAIN, "mixed_float16")),
    LINEN,
    None,
  ),
  "policy of a part of the loss": (
    lambda p, x: mpjax.autocast(halves_loss(PLAIN), "mixed_float16")(p, x) + 1,
    LINEN,
    None,
  ),
  "dtype of the model": (halves_loss(Halves()), LINEN, None),
  "by hand in a scan": (scanned, {"w": array(np.eye(4))}, None),
}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("case", FLOAT16)
def test_float16_without_a_scaler_warns_once_and_names_it(case):
  loss, params, policy = FLOAT16[case]
  tx = optax.sgd(0.1)
  step, state = make_train_step(loss, tx, policy=policy), TrainState.create(params, tx)
  with pytest.warns(LowPrecisionWarning, match="without a loss scaler.*dynamic_loss_scaling"):
    state, _ = step(state, X)
  step(state, X)  # warnings are errors in the tests


NOT_LOST = {
  "bfloat16": (halves_loss(Halves(jnp.bfloat16)), None),
  "a policy that the model leaves no matmul to": (
    halves_loss(PLAIN),
    mpjax.PolicyMap({"Halves/Dense_.*": "float32"}, default="mixed_float16"),
  ),
  "a scale inside of the model": (
    halves_loss(mpjax.apply_policy(PLAIN, "mixed_float16", loss_scale=2**10)),
    None,
  ),
  "a part that is not differentiated": (
    lambda p, x: halves_loss(PLAIN)(p, x) + jax.lax.stop_gradient(halves_loss(Halves())(p, x)),
    None,
  ),
}


@pytest.mark.parametrize("case", NOT_LOST)
def test_where_no_float16_gradient_is_lost_a_step_says_nothing(case):
  loss, policy = NOT_LOST[case]
  tx = optax.sgd(0.1)
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    make_train_step(loss, tx, policy=policy)(TrainState.create(LINEN, tx), X)
  assert [str(warning.message) for warning in said] == []


class Small(nnx.Module):
  def __init__(self, dtype=None):
    self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0), dtype=dtype)
    self.last = nnx.Linear(4, 1, rngs=nnx.Rngs(1), dtype=dtype)

  def __call__(self, x):
    return self.last(nnx.relu(self.first(x)))


@pytest.mark.quick(every=2)
@pytest.mark.parametrize(
  ("made", "policy"),
  [
    (Small, "mixed_float16"),
    (lambda: mpjax.apply_policy(Small(), "mixed_float16"), None),
    (lambda: Small(jnp.float16), None),
  ],
  ids=["policy of the step", "policy of the model", "dtype of the model"],
)
def test_float16_in_an_nnx_step_without_a_scaler_warns_once(made, policy):
  model, traces = made(), []

  def loss(model, x):
    traces.append(0)
    return jnp.mean(model(x).astype(jnp.float32) ** 2)

  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  step = mpjax.nnx.make_train_step(loss, policy=policy)
  with pytest.warns(LowPrecisionWarning, match="without a loss scaler"):
    step(model, optimizer, X)
  step(model, optimizer, X)
  assert len(traces) == 1
  with pytest.warns(LowPrecisionWarning, match="without a loss scaler"):
    mpjax.nnx.make_train_step(loss, policy=policy).lower(model, optimizer, X)


def test_a_missing_scale_is_told_which_scaler_serves_several_policies():
  with pytest.raises(TypeError, match=r"mpjax.static_loss_scaling\(tx, 1\)"):
    mpjax.value_and_grad(loss_fn)({"w": jnp.ones((4, 1))}, X)
  with pytest.raises(ValueError, match=r"mpjax.static_loss_scaling\(tx, 1\)"):
    mpjax.loss_scale(optax.sgd(0.1).init({}))


# Frozen parameters --------------------------------------------------------------------------------


def labels(params):
  return {name: "train" if name.startswith("lora") else "frozen" for name in params}


def lora_loss(params, x):
  hidden = x.astype(jnp.float32) @ params["base"].astype(jnp.float32)
  return jnp.mean((hidden + x @ params["lora_a"] @ params["lora_b"] - 1.0) ** 2)


def lora_params():
  base = jnp.ones((4, 3), jnp.bfloat16)
  return {"base": base, "lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_a_frozen_bfloat16_base_keeps_dtype_and_buffer_and_gets_no_gradient(policy, scaled):
  tx = optax.partition({"train": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels)
  tx = mpjax.dynamic_loss_scaling(tx) if scaled else tx
  state = TrainState.create(lora_params(), tx)
  base = pointers(state.params["base"])
  state, metrics = make_train_step(lora_loss, tx, policy=policy)(state, X)
  assert metrics.applied
  assert state.params["base"].dtype == jnp.bfloat16
  assert pointers(state.params["base"]) == base
  np.testing.assert_array_equal(state.params["base"].astype(jnp.float32), 1.0)
  trained = {name: lora_params()[name] for name in ("lora_a", "lora_b")}
  grads = jax.grad(lambda p: lora_loss({**lora_params(), **p}, X))(trained)
  np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=0.02)


BRANCHES = {"train": optax.adam(0.1), "frozen": optax.set_to_zero()}
FREEZING = {
  "partition": lambda: optax.partition(BRANCHES, labels),
  "freeze": lambda: optax.chain(
    optax.freeze({"base": True, "mask": True, "key": True, "lora_a": False, "lora_b": False}),
    optax.masked(optax.adam(0.1), lambda p: {name: name.startswith("lora") for name in p}),
  ),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("make", FREEZING)
def test_a_frozen_integer_bool_or_key_stays_and_the_others_train(make, scaled, accumulate):
  tx = mpjax.dynamic_loss_scaling(FREEZING[make]()) if scaled else FREEZING[make]()
  base, mask, key = jnp.full((4, 3), 3, jnp.int8), jnp.arange(3) > 0, jax.random.key(3)
  params = {**lora_params(), "base": base, "mask": mask, "key": key}

  def loss(params, x):
    noise = jax.random.normal(params["key"], (1, 3))
    hidden = x @ (params["base"] * 0.01 + params["lora_a"] @ params["lora_b"])
    return jnp.mean(jnp.where(params["mask"][None], hidden - noise, 0.0) ** 2)

  step = make_train_step(loss, tx, policy="mixed_bfloat16", accumulate=accumulate)
  state, first = step(TrainState.create(params, tx), X)
  before = pointers(state.params["base"])
  state, metrics = step(state, X)
  assert metrics.applied
  assert jnp.all(state.params["lora_b"][:, 1:] != 0)  # the mask hides the first
  assert pointers(state.params["base"]) == before
  for name, value in {"base": base, "mask": mask, "key": key}.items():
    assert state.params[name].dtype == value.dtype
    assert jnp.array_equal(state.params[name], value)
  rest = {name: params[name] for name in ("base", "mask", "key")}
  grads = jax.grad(lambda own: loss({**rest, **own}, X))(
    {n: params[n] for n in ("lora_a", "lora_b")}
  )
  np.testing.assert_allclose(first.grad_norm, optax.tree.norm(grads), rtol=0.02)


def test_a_frozen_integer_base_of_nnx_is_left_where_it_is():
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  model.base = nnx.Param(jnp.full((4, 3), 3, jnp.int8))
  label = lambda path, _: "frozen" if "base" in str(path) else "train"
  tx = optax.partition(BRANCHES, lambda params: jax.tree.map_with_path(label, params))
  tx = mpjax.dynamic_loss_scaling(tx)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  loss = lambda m, x: jnp.mean((m(x) + x @ (m.base * 0.1)) ** 2)
  step = mpjax.nnx.make_train_step(loss, policy="mixed_bfloat16")
  assert step(model, optimizer, X).applied
  before, bias = pointers(model.base[...]), model.bias[...].copy()
  assert step(model, optimizer, X).applied
  assert jnp.all(model.bias[...] != bias)
  assert model.base.dtype == jnp.int8
  assert pointers(model.base[...]) == before


def test_a_frozen_gradient_that_a_clip_reads_is_part_of_what_it_clips():
  branches = {"train": optax.sgd(1.0), "frozen": optax.set_to_zero()}
  tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.partition(branches, labels))
  params = {name: p.astype(jnp.float32) for name, p in lora_params().items()}
  state, _ = make_train_step(lora_loss, tx)(TrainState.create(params, tx), X)
  updates, _ = tx.update(jax.grad(lora_loss)(params, X), tx.init(params), params)
  expected = optax.apply_updates(params, updates)
  for name, value in expected.items():
    np.testing.assert_allclose(state.params[name], value, rtol=1e-6)


def test_a_frozen_lora_base_of_nnx_is_left_where_it_is():
  base = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
  model = nnx.LoRA(4, 2, 3, base_module=base, rngs=nnx.Rngs(1))
  tx = mpjax.dynamic_loss_scaling(optax.adam(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
  before = pointers(base.kernel[...])
  step = mpjax.nnx.make_train_step(lambda m, x: jnp.mean((m(x) - 1) ** 2), policy="mixed_bfloat16")
  assert step(model, optimizer, X).applied
  assert model.base_module.kernel.dtype == jnp.bfloat16
  assert pointers(base.kernel[...]) == before


def test_a_wrt_that_matches_nothing_is_refused():
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
  with pytest.raises(ValueError, match="Got wrt=LoRAParam, and a model of Param"):
    mpjax.nnx.make_train_step(lambda m, x: jnp.mean(m(x)))(model, optimizer, X)


# Optimizers that take more than gradients ---------------------------------------------------------


def sam():
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  return optax.contrib.sam(optax.sgd(0.1), adversary, sync_period=2, opaque_mode=True)


@pytest.mark.quick(every=6)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("make", [sam, optax.lbfgs, optax.polyak_sgd], ids=lambda f: f.__name__)
def test_optimizers_get_the_extra_arguments_that_they_take(make, scaled):
  tx = mpjax.dynamic_loss_scaling(make()) if scaled else make()
  step = make_train_step(loss_fn, tx)
  state = TrainState.create({"w": jnp.ones((4, 1))}, tx)
  model = nnx.Linear(4, 1, use_bias=False, rngs=nnx.Rngs(0))
  model.kernel[...] = jnp.ones((4, 1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  nnx_step = mpjax.nnx.make_train_step(lambda m, x: jnp.mean((m(x) - 1.0) ** 2))
  for _ in range(5):
    state, metrics = step(state, X)
    nnx_metrics = nnx_step(model, optimizer, X)
  assert metrics.applied
  assert float(metrics.loss) < float(loss_fn({"w": jnp.ones((4, 1))}, X))
  np.testing.assert_allclose(nnx_metrics.loss, metrics.loss, rtol=1e-5)


def test_an_argument_of_the_caller_that_an_optimizer_does_not_take_is_not_hidden():
  tx, params = mpjax.static_loss_scaling(sam(), 1), {"w": jnp.ones(2)}
  with pytest.raises(TypeError, match="gradfn"):
    tx.update(params, tx.init(params), params, gradfn=lambda p, i: p)


# Restored states ----------------------------------------------------------------------------------


def test_a_restored_state_follows_the_settings_of_the_scaler_that_it_is_passed_to():
  params, good, bad = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.inf])}
  old = mpjax.dynamic_loss_scaling(optax.sgd(0.1), init_scale=2**20).init(params)
  lower = mpjax.dynamic_loss_scaling(optax.sgd(0.1), max_scale=2**16)
  assert float(mpjax.loss_scale(lower.update(good, old, params)[1])) == 2.0**16
  higher = mpjax.dynamic_loss_scaling(
    optax.sgd(0.1), init_scale=2**22, min_scale=2**22, max_scale=2**24
  )
  assert float(mpjax.loss_scale(higher.update(good, old, params)[1])) == 2.0**22
  static = mpjax.static_loss_scaling(optax.sgd(0.1), 2**10)
  updates, new = static.update(good, old, params)
  np.testing.assert_array_equal(updates["w"], -0.1 * 2.0**-20 * jnp.ones(2))
  assert float(mpjax.loss_scale(new)) == 2.0**10
  patient = mpjax.dynamic_loss_scaling(optax.sgd(0.1), hysteresis=3)
  scales = []
  for _ in range(3):
    _, old = patient.update(bad, old, params)
    scales.append(float(mpjax.loss_scale(old)))
  assert scales == [2.0**20, 2.0**20, 2.0**19]
