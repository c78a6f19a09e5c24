"""A short soak; `python -m benchmarks.own.soak` is the long one."""

import jax
import pytest

from benchmarks.own import every_optimizer, soak

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places


def check(case):
  with jax.numpy_rank_promotion("allow"):
    result = soak.run_case(case)
  assert result.failures == []
  assert result.faults > 5
  assert result.skipped > 5


@pytest.mark.ci
@pytest.mark.parametrize(
  "case",
  [
    soak.Case("adamw", "clip", "mixed_float16", 400, 1),
    pytest.param(soak.Case("lion", "accumulate", "mixed_float16", 400, 2), marks=pytest.mark.slow),
    soak.Case("sgd, momentum", "master_weights", "bfloat16", 400, 3),
  ],
  ids=lambda case: f"{case.optimizer} {case.wrapper}",
)
def test_training_comes_through_faults_to_the_loss_without_them(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", soak.draw_cases(10_000, 16, 0), ids=lambda case: case.optimizer)
def test_the_whole_soak(case):
  check(case)


def test_a_soak_draws_every_optimizer_and_wrapper():
  cases = soak.draw_cases(10_000, len(soak.OPTIMIZERS), 0)
  assert {case.optimizer for case in cases} == set(soak.OPTIMIZERS)
  assert {case.wrapper for case in cases} == set(soak.WRAPPERS)
  assert sum(case.steps for case in cases) == 10_000


def test_what_must_not_be_is_reported():
  good = soak.Result(100, 30, 20, 0, 1.0, 2.0**15, 0.01, 0.01)
  assert good.failures == []
  bad = {"nonfinite": 1, "lowest": 0.5, "highest": 2.0**30, "loss": float("nan"), "skipped": 0}
  for name, value in bad.items():
    assert len(good._replace(**{name: value}).failures) == 1


# Every optimizer ----------------------------------------------------------------------------------


@pytest.mark.quick(every=2, start=1)
@pytest.mark.parametrize("name", ["adamw", "noisy_sgd"])
def test_a_run_with_faults_has_the_bits_of_one_that_never_saw_the_struck_batches(name):
  """`python -m benchmarks.own.every_optimizer` is the run over all."""
  result = every_optimizer.train(name, 100)
  assert result.failures == []
  assert result.struck == result.skipped > 5


def test_what_must_not_be_with_any_optimizer_is_reported():
  good = every_optimizer.Result(30, 30, 0, 0, True)
  assert good.failures == []
  for bad in ({"struck": 0}, {"applied": 1}, {"nonfinite": 1}, {"same": False}):
    assert len(good._replace(**bad).failures) == 1
