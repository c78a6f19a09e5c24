"""Every optimizer of optax and optax.contrib runs in the train steps with a loss scaler.

The list is read from the packages: one that a new optax adds is tried, or must be given the
arguments that it needs. The two steps take turns; `-m slow` runs every one in both and compares
them. `python -m benchmarks.own.every_optimizer` trains each of them with faults.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import mpjax
from _arrays import array
from _turns import in_turns
from benchmarks.own import optimizers

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

X = array(np.linspace(-1, 1, 24).reshape(6, 4))
W = array(np.ones((4, 3)))  # one leaf: what these tests cost is compiling


def loss_fn(params, x):
  return jnp.mean((x @ params["w"] - 1.0) ** 2)


class Model(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.copy(W))  # the step takes its buffer


def model_loss(model, x):
  return jnp.mean((x @ model.w[...] - 1.0) ** 2)


def by_functions(tx, steps):
  """The last metrics and parameters of the step of pure functions."""
  step, state = mpjax.make_train_step(loss_fn, tx), mpjax.TrainState.create({"w": W}, tx)
  for _ in range(steps):
    state, metrics = step(state, X)
  return metrics, state.params["w"]


def by_nnx(tx, steps):
  """Those of the step of NNX."""
  model = Model()
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  step = mpjax.nnx.make_train_step(model_loss)
  for _ in range(steps):
    metrics = step(model, optimizer, X)
  return metrics, model.w[...]


TRAINED = {"functions": by_functions, "nnx": by_nnx}
STEPS = 2  # some learn the size of gradients first


@pytest.mark.quick(every=5)
@in_turns(("name", "train"), optimizers.NAMES, TRAINED)
def test_an_optimizer_of_optax_is_applied_with_a_loss_scaler(name, train):
  metrics, w = train(mpjax.dynamic_loss_scaling(optimizers.build(name)), STEPS)
  assert metrics.applied
  assert np.isfinite(w).all()
  assert (w != W).any()


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name == "adamw" else pytest.mark.slow)
    for name in optimizers.NAMES
  ],
)
def test_both_steps_take_an_optimizer_to_the_same_parameters(name):
  tx = mpjax.dynamic_loss_scaling(optimizers.build(name))
  one, other = (train(tx, STEPS)[1] for train in TRAINED.values())
  np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_listed_is_still_there():
  assert len(optimizers.FOUND) >= 45
  assert {*optimizers.MADE, *optimizers.NOT_OURS} <= set(optimizers.FOUND)


def sam():
  """It names all extra arguments that it takes, and a chain passes it those of the others, too."""
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  return optax.contrib.sam(optax.sgd(0.1), adversary, sync_period=2, opaque_mode=True)


HOLDERS = {
  "chain": lambda tx: optax.chain(optax.clip_by_global_norm(10.0), tx),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
  "partition": lambda tx: optax.partition({"a": tx}, "a"),
  "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda r: tx)(r=0.1),
}


@functools.cache
def sam_alone():
  return by_functions(mpjax.dynamic_loss_scaling(sam()), 3)


@pytest.mark.quick(every=3)
@in_turns(("hold", "train"), HOLDERS, TRAINED)
def test_sam_inside_of_another_transformation_does_what_it_does_alone(hold, train):
  metrics, w = train(mpjax.dynamic_loss_scaling(hold(sam())), 3)
  alone, alone_w = sam_alone()
  np.testing.assert_allclose(metrics.loss, alone.loss, rtol=1e-5)
  np.testing.assert_allclose(w, alone_w, rtol=1e-5)
