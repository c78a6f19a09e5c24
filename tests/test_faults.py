"""Both built-in jobs train in float16 to float32's metric, with faults on one step in twenty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax import _digits, _text

RATE = 0.05
JOBS = {
  "digits": (_digits, _digits.Digits, 120, 64, 0.02),
  "text": (_text, _text.Text, 100, 16, 0.1),
}


def faults(seed: int) -> optax.GradientTransformation:
  """Puts NaN, inf or -inf into one random leaf of the gradients, on random steps.

  The draw follows from the gradients themselves: a count in the optimizer's state would stand
  still on a skipped step, and strike for ever.
  """

  def update(updates, state, params=None):
    leaves, tree = jax.tree.flatten(updates)
    total = sum(jnp.sum(leaf) for leaf in leaves)
    bits = jax.lax.bitcast_convert_type(total.astype(jnp.float32), jnp.uint32)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), bits), 3)
    struck = jax.random.bernoulli(keys[0], RATE)
    place = jax.random.randint(keys[1], (), 0, len(leaves))
    value = jax.random.choice(keys[2], jnp.array([jnp.nan, jnp.inf, -jnp.inf], jnp.float32))
    hit = [jnp.where(struck & (place == n), value, leaf) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, hit), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def train(session, job, steps, size):
  """Trains, holding every step's state to be finite; returns the metric and the skips."""
  skipped = 0
  for index in range(steps):
    skipped += not bool(session.step(job.batch(index, size, 0)).applied)
    assert bool(mpjax.all_finite(session.state())), index
  return session.evaluate(), skipped


@pytest.mark.parametrize("name", JOBS)
def test_faults_cost_their_steps_and_nothing_else(name, monkeypatch, standard_promotion):
  module, make, steps, size, tolerance = JOBS[name]
  job = make()
  with jax.numpy_rank_promotion("allow"):
    reference, none = train(job.start(mpjax.Policy.parse("float32"), steps, 0), job, steps, size)
    monkeypatch.setattr(
      module,
      "scaled_for",
      lambda policy, tx: optax.chain(faults(6), mpjax.dynamic_loss_scaling(tx, growth_interval=20)),
    )
    session = job.start(mpjax.Policy.parse("mixed_float16"), steps, 0)
    metric, skipped = train(session, job, steps, size)
  assert none == 0
  assert skipped >= 3
  assert np.isclose(metric, reference, rtol=0, atol=tolerance)
