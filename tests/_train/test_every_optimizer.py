"""Every optimizer of optax and optax.contrib runs in a train step with a loss scaler.

The list is read from the packages: one that a new optax adds is tried, or must be given the
arguments that it needs.
"""

import inspect

import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import mpjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

X = jnp.linspace(-1.0, 1.0, 24).reshape(6, 4)

MADE = {
  "mechanize": lambda make: make(optax.sgd(0.1)),
  "noisy_sgd": lambda make: make(0.1, key=0),
  "sam": lambda make: make(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
  "schedule_free": lambda make: make(optax.sgd(0.1), 0.1),
}
"""How those are made that need more than a learning rate."""

NOT_OURS = {
  "dpsgd": "its gradients have an axis of examples, which it averages itself",
  "optimistic_adam": "deprecated for optimistic_adam_v2",
}


def optimizers():
  """What has a learning rate, or is named above; transformations without one are parts of these."""
  for package in (optax, optax.contrib):
    for name, make in sorted(vars(package).items()):
      if name.startswith(("_", "scale_by_")) or not inspect.isfunction(make):
        continue
      signature = inspect.signature(make)
      known = name in MADE or "learning_rate" in signature.parameters
      if known and "GradientTransformation" in str(signature.return_annotation):
        yield name, make


FOUND = dict(optimizers())


def loss_fn(params, x):
  return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


@pytest.mark.parametrize("name", [name for name in FOUND if name not in NOT_OURS])
def test_an_optimizer_of_optax_is_applied_in_a_step_with_a_loss_scaler(name):
  build = MADE.get(name, lambda make: make(learning_rate=0.1))
  params = {"w": jnp.ones((4, 3)), "b": jnp.full((1, 3), 0.5)}
  tx = mpjax.dynamic_loss_scaling(build(FOUND[name]))
  step, state = mpjax.make_train_step(loss_fn, tx), mpjax.TrainState.create(params, tx)
  for _ in range(2):  # some learn the size of gradients from the first
    state, metrics = step(state, X)
  assert metrics.applied
  assert bool(mpjax.all_finite(state))
  assert any(bool(jnp.any(state.params[leaf] != params[leaf])) for leaf in params)


def test_what_is_listed_is_still_there():
  assert len(FOUND) >= 45
  assert {*MADE, *NOT_OURS} <= set(FOUND)
