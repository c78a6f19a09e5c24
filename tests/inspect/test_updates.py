"""What a function updates is found in its jaxpr, however the update is written."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from _arrays import array
from mpjax.inspect._updates import updated

PARAMS = {"a": array(np.ones((4, 4))), "b": array(np.ones(4))}
X = array(np.ones((2, 4)))


def loss(params, x):
  return jnp.mean((x @ params["a"] + params["b"][None]) ** 2)


def descend(params, x):
  return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params, x))


def with_optax(tx):
  def step(params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state

  return lambda params, x: step(params, tx.init(PARAMS), x)[0]


STEPS = {
  "by hand": descend,
  "jit": jax.jit(descend),
  "scan": lambda p, x: lax.scan(lambda p, _: (descend(p, x), None), p, None, length=3)[0],
  "fori": lambda p, x: lax.fori_loop(0, 3, lambda i, p: descend(p, x), p),
  "while": lambda p, x: lax.while_loop(lambda p: p["b"][0] < 9, lambda p: descend(p, x), p),
  "cond": lambda p, x: lax.cond(x[0, 0] > 0, descend, lambda p, x: p, p, x),
  "skipped": lambda p, x: jax.tree.map(lambda a, b: jnp.where(x[0, 0] > 0, a, b), descend(p, x), p),
  "sgd": with_optax(optax.sgd(0.1, momentum=0.9)),
  "adamw": with_optax(optax.adamw(optax.cosine_decay_schedule(0.1, 10))),
  "clip": with_optax(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))),
}


@pytest.mark.parametrize("name", STEPS)
def test_an_update_is_found(name):
  with jax.numpy_dtype_promotion("standard"):
    assert updated(jax.make_jaxpr(STEPS[name])(PARAMS, X)) == {0: 0, 1: 1}


@pytest.mark.parametrize(
  "fn",
  [lambda w, x: x @ w, lambda w, x: (w, x), lambda w, x: w * x, lambda w, x: 1 / w],
  ids=["matmul", "passed on", "product", "reciprocal"],
)
def test_what_has_the_shape_of_an_argument_by_chance_updates_none(fn):
  assert updated(jax.make_jaxpr(fn)(jnp.eye(4), jnp.eye(4))) == {}


def test_optimizer_states_are_updated_too():
  tx = optax.adam(0.1)
  with jax.numpy_dtype_promotion("standard"):
    step = lambda p, s, x: tx.update(jax.grad(loss)(p, x), s, p)[1][0].mu
    jaxpr = jax.make_jaxpr(step)(PARAMS, tx.init(PARAMS), X)
  assert updated(jaxpr) == {0: 3, 1: 4}  # after the two parameters and the count
