"""Models with a loss scale inside: Linen and NNX, their state, their names, their pickles."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mpjax
from _arrays import array

SCALE, SMALL = 2.0**15, 1e-7
X = array(np.linspace(-1, 1, 32).reshape(4, 8))


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(8)(x))
    self.sow("losses", "small", jnp.sum(x) * SMALL)
    self.variable("stats", "mean", jnp.zeros, (8,)).value = x.mean(0)
    return self.head(x)

  @nn.nowrap
  def head(self, x):
    return x * SMALL

  @nn.compact
  def twice(self, x):
    return self(x) + x


class Model(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(8, 8, rngs=rngs)
    self.mean = nnx.BatchStat(jnp.zeros(8))
    self.small = nnx.Intermediate(jnp.zeros(()))

  def __call__(self, x):
    x = nnx.tanh(self.linear(x))
    self.mean[...] = x.mean(0)
    self.small[...] = jnp.sum(x) * SMALL
    return x * SMALL


def near(got, want, rtol=0.02):
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * float(jnp.abs(other).max()))
    assert float(jnp.abs(other).max()) > 0


@pytest.mark.parametrize("method", ["__call__", "twice"])
def test_linen_gradients_are_true_with_what_is_sown_and_the_state_as_it_is(method):
  plain = Net()
  variables = plain.init(jax.random.key(0), X)
  collections = {"params": variables["params"], "stats": variables["stats"]}

  def grads(model):
    def loss(params, x):
      out, state = model.apply(
        collections | {"params": params}, x, mutable=["losses", "stats"], method=method
      )
      return jnp.sum(out) + state["losses"]["small"][0], state["stats"]

    return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], X)

  (to_params, to_x), stats = grads(mpjax.apply_policy(plain, "mixed_float16", loss_scale=SCALE))
  (want_params, want_x), _ = grads(plain)
  near(to_params, want_params)
  near(to_x, want_x)
  _, unscaled = grads(mpjax.apply_policy(plain, "mixed_float16"))
  jax.tree.map(np.testing.assert_array_equal, stats, unscaled)


@pytest.mark.parametrize("how", ["model", "loss"])
def test_nnx_gradients_are_true_with_what_a_variable_hands_on(how):
  def loss(model, x):
    return jnp.sum(model(x)) + model.small[...]

  want = nnx.grad(loss)(Model(nnx.Rngs(0)), X)
  model, fn = Model(nnx.Rngs(0)), loss
  if how == "model":
    model = mpjax.nnx.apply_policy(model, "mixed_float16", loss_scale=SCALE)
  else:
    fn = mpjax.nnx.autocast(loss, "mixed_float16", loss_scale=SCALE)
    model = Model(nnx.Rngs(0))
  near(nnx.grad(fn)(model, X), want)
  assert float(jnp.abs(model.mean[...]).max()) > 0


def test_one_autocast_takes_models_and_pytrees():
  model = Model(nnx.Rngs(0))
  loss = mpjax.autocast(lambda model, x: jnp.sum(model(x)), "mixed_float16", loss_scale=SCALE)
  near(nnx.grad(loss)(model, X), nnx.grad(lambda model, x: jnp.sum(model(x)))(model, X))


def test_a_linen_function_given_as_method_has_the_scale():
  model = mpjax.apply_policy(nn.Dense(8), "mixed_float16", loss_scale=SCALE)
  variables = model.init(jax.random.key(0), X)

  def loss(model):
    def small(module, x):
      return jnp.sum(nn.tanh(module(x))) * SMALL

    return jax.grad(lambda v: model.apply(v, X, method=small))(variables)

  near(loss(model), loss(nn.Dense(8)))


@pytest.mark.parametrize("make", [Net, lambda: Model(nnx.Rngs(0))])
def test_the_scale_shows_copies_and_pickles(make):
  model = mpjax.apply_policy(make(), "mixed_float16", loss_scale=SCALE)
  assert "mixed_float16, loss scale 32768" in repr(model)
  assert mpjax.policy_of(model) == mpjax.Policy.parse("mixed_float16")
  for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    assert type(again) is type(model)
  other = mpjax.apply_policy(model, "mixed_float16")
  assert "loss scale" not in repr(other)
  assert "loss scale" not in repr(mpjax.apply_policy(model, "float32", loss_scale=SCALE))


@pytest.mark.parametrize("make", [lambda: nn.Dense(8), lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0))])
def test_a_scale_that_is_no_power_of_two_is_refused(make):
  with pytest.raises(ValueError, match="loss_scale must be a positive power of two"):
    mpjax.apply_policy(make(), "mixed_float16", loss_scale=3)
