"""What a step looks at anew, and what it knows of the state that it returned."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from _arrays import array
from mpjax._train import train_step
from mpjax.training import TrainState, make_train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH = {"x": array(np.ones((4, 2))), "y": array(np.ones(4))}


def params():
  return {"w": jnp.ones(2), "b": jnp.zeros(())}


def loss(p, batch):
  return jnp.mean((batch["x"] @ p["w"] + p["b"] - batch["y"]) ** 2)


@pytest.fixture
def looked_at(monkeypatch):
  """The states that a step looked at before it ran, by the number of their arrays."""
  seen = []
  place = train_step.placement
  monkeypatch.setattr(
    train_step, "placement", lambda leaves: (seen.append(len(leaves)), place(leaves))[1]
  )
  return seen


def test_a_state_that_a_step_returned_is_not_looked_at_again(looked_at):
  tx = optax.adam(1e-2)
  step = make_train_step(loss, tx)
  state = TrainState.create(params(), tx)
  for _ in range(3):
    state, _ = step(state, BATCH)
  assert len(looked_at) == 1
  state = dataclasses.replace(state, params=jax.tree.map(jnp.copy, state.params))
  state, _ = step(state, BATCH)
  assert len(looked_at) == 2


def test_a_batch_that_holds_a_parameter_of_a_returned_state_is_no_reason_to_fail():
  tx = optax.sgd(0.1)
  step = make_train_step(lambda p, batch: jnp.sum((p["w"] - batch) ** 2), tx)
  state, _ = step(TrainState.create({"w": jnp.ones(4)}, tx), jnp.zeros(4))
  state, metrics = step(state, state.params["w"])
  assert metrics.loss == 0


def test_a_returned_state_that_was_changed_in_place_is_looked_at_again():
  tx = optax.sgd(0.1)
  step = make_train_step(lambda p, batch: jnp.sum((p["a"] + p["b"]) * batch), tx)
  params = {"a": jnp.ones(4), "b": jnp.zeros(4)}
  state, _ = step(TrainState.create(params, tx), np.ones(4, np.float32))
  state.params["b"] = state.params["a"]
  state, metrics = step(state, np.ones(4, np.float32))
  np.testing.assert_allclose(metrics.loss, 4 * 2 * 0.9, rtol=1e-6)
  state, _ = step(state, np.ones(4, np.float32))
  assert int(state.step) == 3


def test_a_returned_state_is_not_kept_alive():
  tx = optax.sgd(0.1)
  step = make_train_step(loss, tx)
  state, _ = step(TrainState.create(params(), tx), BATCH)
  held = weakref.ref(state)
  del state
  gc.collect()
  assert held() is None
