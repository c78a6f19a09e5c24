"""Both built-in jobs train in float16 to float32's metric, with faults on one step in twenty."""

import jax
import numpy as np
import optax
import pytest

import mpjax
from mpjax._demo import digits, text
from mpjax.testing import FaultSchedule, inject_faults

JOBS = {
  "digits": (digits, lambda: digits.Digits(digits.ResNet(widths=(16,))), 140, 32, 0.02),
  "text": (text, lambda: text.Text(width=32, depth=1, heads=2), 80, 8, 0.1),
}


def train(session, job, steps, size):
  """Trains, holding every step's state to be finite; returns the metric and the skipped steps."""
  finite = jax.jit(mpjax.all_finite)
  skipped = []
  for index in range(steps):
    if not session.step(job.batch(index, size, 0)).applied:
      skipped.append(index)
    assert finite(session.state()), index
  return session.evaluate(), skipped


@pytest.mark.ci
@pytest.mark.parametrize("name", JOBS)
def test_faults_cost_their_steps_and_nothing_else(name, monkeypatch, standard_promotion):
  """NaN, inf or -inf in one element of one gradient."""
  module, make, steps, size, tolerance = JOBS[name]
  job = make()
  schedule = FaultSchedule.random(steps, 0.05, seed=6)
  with jax.numpy_rank_promotion("allow"):
    reference, none = train(job.start(mpjax.Policy.parse("float32"), steps, 0), job, steps, size)
    monkeypatch.setattr(
      module,
      "scaled_for",
      lambda policy, tx: optax.chain(
        inject_faults(schedule), mpjax.dynamic_loss_scaling(tx, growth_interval=20)
      ),
    )
    session = job.start(mpjax.Policy.parse("mixed_float16"), steps, 0)
    metric, skipped = train(session, job, steps, size)
  assert none == []
  assert len(schedule.struck) >= 3
  assert set(schedule.struck) <= set(skipped)
  assert np.isclose(metric, reference, rtol=0, atol=tolerance)
