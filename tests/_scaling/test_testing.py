"""Fault injection: what strikes, where, when, and that training comes through it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from _arrays import array, normal
from _jaxprs import contractions
from mpjax.testing import FAULTS, FaultSchedule, inject, inject_faults, inject_gradients
from mpjax.training import TrainState, make_train_step

TREE = {
  "a": {"w": array(np.ones((2, 3))), "b": array(np.ones(3), jnp.bfloat16)},
  "n": array(np.arange(4), jnp.int32),
  "none": None,
  "empty": array(np.ones((0, 2))),
  "h": array(1, jnp.float16),
}


def changed(tree, original=TREE):
  """The paths that differ and in how many elements."""
  found = {}
  pairs = zip(mpjax._core.tree_paths.leaf_paths(tree), jax.tree.leaves(original), strict=True)
  for (path, new), old in pairs:
    assert new.dtype == old.dtype
    assert new.shape == old.shape
    count = int(np.sum(np.asarray(new) != np.asarray(old)))
    if count:
      found[path] = count
  return found


def test_each_kind_is_put_into_one_element_of_a_float_array():
  run = jax.jit(inject)
  for seed in range(4):
    for kind in FAULTS:
      schedule = FaultSchedule.at({2: kind}, seed=seed)
      ((path, count),) = changed(run(TREE, schedule, 2)).items()
      assert path in ("a/w", "a/b", "h")
      assert count == 1
      assert not changed(run(TREE, schedule, 1))
      assert not changed(run(TREE, schedule, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_values_are_those_of_the_dtype(dtype):
  run = jax.jit(inject)
  limits = jnp.finfo(dtype)
  x = jnp.ones((2, 2), dtype)
  for kind, value in {"huge": limits.max, "subnormal": limits.smallest_subnormal}.items():
    struck = np.asarray(run(x, FaultSchedule.at({0: kind}), 0))
    (found,) = struck[struck != 1]
    assert found.tobytes() == np.asarray(value, struck.dtype).tobytes()


def test_a_schedule_is_reproducible_data_and_an_argument_of_a_compiled_function():
  one, two = (FaultSchedule.random(500, 0.1, seed=3, kinds=FAULTS) for _ in range(2))
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))
  other = FaultSchedule.random(500, 0.1, seed=4, kinds=FAULTS)
  assert one.struck != other.struck
  assert 30 < len(one.struck) < 70
  assert set(np.unique(one.kind)) == set(range(6))
  run = jax.jit(chex.assert_max_traces(lambda x, schedule, i: inject(x, schedule, i), n=1))
  for schedule in (one, other):
    run(jnp.ones(3), schedule, jnp.int32(0))
  assert FaultSchedule.at({}).struck == []
  steps = jax.vmap(lambda i: inject(jnp.ones(5), one, i))(jnp.arange(600))
  assert np.flatnonzero(np.asarray(steps != 1).any(1)).tolist() == one.struck


@pytest.mark.parametrize(
  ("pattern", "paths"), [("a", {"a/w", "a/b"}), ("a/w", {"a/w"}), (".*[hb]", {"a/b", "h"})]
)
def test_a_pattern_chooses_arrays_by_path_or_parent(pattern, paths):
  schedule = FaultSchedule.random(20, 1.0)
  run = jax.jit(inject, static_argnames="pattern")
  assert {p for i in range(20) for p in changed(run(TREE, schedule, i, pattern=pattern))} == paths


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: FaultSchedule.at({1: "NaN"}), "must be one of nan, inf.*Got 'NaN'"),
    (lambda: FaultSchedule.at({-1: "nan"}), "Steps count from 0. Got -1"),
    (lambda: FaultSchedule.random(10, 5), "rate must lie between 0 and 1. Got 5"),
    (lambda: FaultSchedule.random(0, 0.5), "steps must be at least 1"),
    (lambda: inject(TREE, FaultSchedule.at({}), 0, "w"), r"pattern 'w' must match.*a/b, a/w, h"),
    (lambda: inject({"n": 1}, FaultSchedule.at({}), 0), "Paths seen: none"),
  ],
)
def test_what_cannot_strike_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_gradient_is_struck_and_its_array_is_not():
  schedule = FaultSchedule.at({1: "nan"})

  def loss(params, step):
    struck = inject_gradients(params, schedule, step, "w")
    return jnp.sum(struck["w"] ** 2) + jnp.sum(struck["b"])

  params = {"w": jnp.ones(3), "b": jnp.ones(2)}
  run = jax.jit(jax.value_and_grad(loss))
  value, grads = run(params, 1)
  assert float(value) == 5
  assert int(jnp.isnan(grads["w"]).sum()) == 1
  np.testing.assert_array_equal(grads["b"], [1, 1])
  assert mpjax.all_finite(run(params, 0))


def test_an_activation_stays_narrow_where_it_may_be_struck():
  schedule = FaultSchedule.at({1: "nan", 2: "inf"})

  def fn(params, x, step):
    hidden = inject(x @ params["a"], schedule, step)
    return hidden @ params["b"]

  params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
  narrow = mpjax.autocast(fn, "mixed_float16")
  args = params, jnp.ones((2, 4)), jnp.int32(1)
  jaxpr = jax.make_jaxpr(narrow)(*args)
  assert [c.factors[0] for c in contractions(jaxpr)] == ["float16", "float16"]
  assert "convert_element_type[new_dtype=float32" not in str(jaxpr).split("dot_general")[1]
  run = jax.jit(narrow)
  assert not mpjax.all_finite(run(*args))
  assert mpjax.all_finite(run(*args[:2], jnp.int32(0)))


X = array(normal(0, 60, 16, 4))
PARAMS = {"w": array(normal(1, 4, 8) / 2), "v": array(np.linspace(-0.5, 0.5, 8))}


def loss_fn(params, batch):
  out = jnp.tanh(batch @ params["w"]) @ params["v"]
  return jnp.mean((out - jnp.sin(batch[:, 0])) ** 2)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_run_with_faults_ends_as_one_that_never_saw_the_struck_batches(
  policy, standard_promotion
):
  """The scale has moved, which is exact; nothing else tells that there were faults."""
  schedule = FaultSchedule.random(60, 0.2)
  scaled = mpjax.dynamic_loss_scaling(
    optax.adamw(optax.linear_schedule(1e-2, 0, 60)), growth_interval=5
  )
  faulty = optax.chain(inject_faults(schedule), scaled)
  clean = optax.chain(inject_faults(FaultSchedule.at({})), scaled)
  kept = np.setdiff1d(np.arange(60), schedule.struck)

  def train(tx, batches):
    step = make_train_step(loss_fn, tx, policy=policy, donate=False)
    state = TrainState.create(PARAMS, tx)
    return jax.jit(lambda state: jax.lax.scan(step, state, batches))(state)

  state, metrics = train(faulty, X)
  expected, _ = train(clean, X[kept])
  assert np.flatnonzero(~np.asarray(metrics.applied)).tolist() == schedule.struck
  assert int(state.step) == len(kept)
  # Two programs: their rounding may differ, and nothing else.
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-4, atol=1e-5)
  inner, wanted = (s.opt_state[1].inner_state for s in (state, expected))
  chex.assert_trees_all_close(inner, wanted, rtol=1e-3, atol=1e-5)


def test_faults_around_an_optimizer_are_answered_with_what_to_write():
  with pytest.raises(TypeError, match=r"Got GradientTransformation.* optax.chain\(inject_faults"):
    inject_faults(optax.sgd(0.1))
