"""What a step, a state and their helpers are not given: one sentence each, and no whole tree."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import mpjax

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

PARAMS = {f"w{i}": jnp.ones((4, 1)) for i in range(50)}
TX = mpjax.dynamic_loss_scaling(optax.adam(0.1))
X = jnp.ones((3, 4))


def loss_fn(params, x):
  return jnp.mean(x @ params["w0"])


def flax_state():
  return train_state.TrainState.create(apply_fn=loss_fn, params=PARAMS, tx=TX)


def make_model():
  return nnx.Linear(4, 1, rngs=nnx.Rngs(0))


def again():
  step, state = mpjax.make_train_step(loss_fn, TX), mpjax.TrainState.create(PARAMS, TX)
  step(state, X)
  return step(state, X)


def in_a_jit(transform):
  step = mpjax.make_train_step(loss_fn, TX, max_consecutive_skips=3)
  return transform(lambda state, x: step(state, x))(mpjax.TrainState.create(PARAMS, TX), X)


nnx_step = mpjax.nnx.make_train_step(lambda model, x: jnp.mean(model(x) ** 2))


def optimizer_of(model):
  return nnx.Optimizer(model, TX, wrt=nnx.Param)


WRONG = {
  "a state that was donated": (again, "A step that donates takes a state once"),
  "a limit in a jit": (lambda: in_a_jit(jax.jit), "told on the host"),
  "a limit in a scan": (
    lambda: in_a_jit(lambda f: lambda s, x: jax.lax.scan(lambda s, x: (f(s, x)[0], 0), s, X[None])),
    "told on the host",
  ),
  "autocast of a model": (
    lambda: mpjax.nnx.autocast(make_model(), "mixed_bfloat16"),
    "Got the NNX model Linear. Use mpjax.apply_policy(module, policy)",
  ),
  "nnx.autocast as in torch": (
    lambda: mpjax.nnx.autocast(enabled=True),
    "autocast is no context manager",
  ),
  "swapped": (
    lambda: mpjax.make_train_step(loss_fn, TX)(X, mpjax.TrainState.create(PARAMS, TX)),
    "Got the batch first. Write step(state, batch)",
  ),
  "a Flax state": (
    lambda: mpjax.make_train_step(loss_fn, TX)(flax_state(), X),
    "Got flax.training.train_state.TrainState. Make one: mpjax.TrainState.create(params, tx)",
  ),
  "a Linen module for a loss": (
    lambda: mpjax.make_train_step(nn.Dense(2), TX),
    "made from a loss function. Got Dense",
  ),
  "an NNX model for a loss": (
    lambda: mpjax.nnx.make_train_step(make_model()),
    "made from a loss function. Got Linear",
  ),
  "autocast of a class": (
    lambda: mpjax.autocast(nn.Dense, "mixed_bfloat16"),
    "Got the class Dense. Make an instance",
  ),
  "an optimizer before its model": (
    lambda: nnx_step(optimizer_of(make_model()), make_model(), X),
    "Got the optimizer first. Write step(model,",
  ),
  "an optimizer without its model": (
    lambda: nnx_step(optimizer_of(make_model()), X),
    "Got the optimizer first. Write step(model,",
  ),
  "a transformation for an optimizer": (
    lambda: nnx_step(make_model(), TX, X),
    "Got GradientTransformationExtraArgs for the optimizer. Write step(model, nnx.Optimizer(",
  ),
  "a state for a model": (
    lambda: nnx_step(mpjax.TrainState.create(PARAMS, TX), X),
    "Got TrainState for the model",
  ),
  "lowered": (
    lambda: mpjax.make_train_step(loss_fn, TX).lower(PARAMS, X),
    "Got builtins.dict. Make one",
  ),
  "another optimizer": (
    lambda: mpjax.make_train_step(loss_fn, optax.sgd(0.1, momentum=0.9))(
      mpjax.TrainState.create(PARAMS, TX), X
    ),
    "The state must be that of the step's optimizer",
  ),
  "no scaler in the state": (
    lambda: mpjax.make_train_step(loss_fn, TX)(mpjax.TrainState.create(PARAMS, optax.adam(0.1)), X),
    "The state must be that of the step's optimizer",
  ),
  "created in the other order": (
    lambda: mpjax.TrainState.create(TX, PARAMS),
    "Got the optimizer first. Write TrainState.create(params, tx)",
  ),
  "the state for the scale": (
    lambda: mpjax.value_and_grad(loss_fn)(PARAMS, X, loss_scale=TX.init(PARAMS)),
    "Got LossScalingState. Pass loss_scale=mpjax.loss_scale(opt_state)",
  ),
  "no scale": (
    lambda: mpjax.nnx.value_and_grad(lambda m, x: jnp.mean(m(x)))(make_model(), X),
    "Got no loss_scale. Pass loss_scale=mpjax.loss_scale(opt_state)",
  ),
  "many scales": (
    lambda: mpjax.value_and_grad(loss_fn)(PARAMS, X, loss_scale=jnp.ones(3)),
    "loss_scale must be a scalar. Got f32[3]",
  ),
  "a predicate for each element": (
    lambda: mpjax.select(jnp.ones(4, bool), PARAMS, PARAMS),
    "must be one boolean, for the whole tree. Got bool[4]",
  ),
  "a number for a predicate": (lambda: mpjax.select(1.0, PARAMS, PARAMS), "Got 1.0"),
  "a tree for a predicate": (lambda: mpjax.select(PARAMS, PARAMS, PARAMS), "one boolean"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_short_error(case):
  call, text = WRONG[case]
  with pytest.raises((TypeError, ValueError)) as caught:
    call()
  assert text in str(caught.value)
  assert len(str(caught.value)) < 500


@pytest.mark.parametrize("pred", [True, jnp.array(True), jax.numpy.bool_(True)])
def test_booleans_select(pred):
  assert mpjax.select(pred, {"a": jnp.ones(())}, {"a": jnp.zeros(())})["a"] == 1
