"""An object that holds arrays of a call outside of its pytree is an error that names it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import mpjax

x = jnp.ones((2, 4))


class Normal:
  def __init__(self, loc):
    self.loc = loc


class Slotted:
  __slots__ = ("loc", "unset")

  def __init__(self, loc):
    self.loc = loc

  def log_prob(self, value):
    return -((value - self.loc) ** 2)


@jax.tree_util.register_pytree_node_class
class Half:
  """A pytree that keeps something of its own for itself."""

  def __init__(self, loc, bijector):
    self.loc, self.bijector = loc, bijector

  def tree_flatten(self):
    return (self.loc,), (self.bijector,)

  @classmethod
  def tree_unflatten(cls, aux, children):
    return cls(*children, *aux)


RESULTS = {
  "object": (Normal, "Normal"),
  "slots": (Slotted, "Slotted"),
  "nested": (lambda h: Normal([{"base": Slotted(h)}]), "Normal"),
  "closure": (lambda h: lambda y: h + y, "<lambda>.<locals>.<lambda>|function"),
  "method": (lambda h: Slotted(h).log_prob, "method"),
  "partial": (lambda h: functools.partial(jnp.add, h), "partial"),
  "default": (lambda h: lambda y, h=h: h + y, "function"),
  "pytree": (lambda h: Half(h, lambda y: y * h), "Half"),
}
every_result = pytest.mark.parametrize(("make", "name"), RESULTS.values(), ids=RESULTS.keys())


def refused(name):
  return pytest.raises(
    TypeError, match=rf"an object of type ({name}) that holds .* mpjax.autocast\(loss, policy\)"
  )


@every_result
def test_a_function_that_returns_one_is_refused(make, name):
  cast = mpjax.autocast(lambda w, x: {"y": (x @ w, make(x @ w))}, "mixed_bfloat16")
  with refused(name):
    cast(jnp.eye(4), x)
  with refused(name):
    jax.jit(lambda w: cast(w, x)["y"][0])(jnp.eye(4))


@every_result
def test_what_makes_and_uses_one_runs_under_one_policy(make, name):
  def loss(w, x):
    made = make(x @ w)
    return jnp.sum(x @ w) if made is not None else None

  assert jax.grad(mpjax.autocast(loss, "mixed_bfloat16"))(jnp.eye(4), x).shape == (4, 4)


def test_models_that_return_one_are_refused():
  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Normal(nn.Dense(3)(x))

  class Model(nnx.Module):
    def __init__(self):
      self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return Normal(self.dense(x))

  variables = Linen().init(jax.random.key(0), x)
  with refused("Normal"):
    mpjax.apply_policy(Linen(), "mixed_bfloat16").apply(variables, x)
  with refused("Normal"):
    mpjax.apply_policy(Model(), "mixed_bfloat16")(x)
  with refused("Normal"):
    mpjax.autocast(lambda model, x: model(x), "mixed_bfloat16")(Model(), x)
  model = mpjax.autocast(lambda model, x: jnp.sum(model(x).loc), "mixed_bfloat16")
  assert model(Model(), x).dtype.name == "float32"


def test_objects_with_values_from_around_the_call_come_back():
  table, again = jnp.arange(3.0), []
  again.append(again)

  def around(y):
    cast = mpjax.autocast(lambda w: (w @ w, Normal(y), lambda: y * table, again), "bfloat16")
    _, normal, fn, _ = cast(jnp.eye(3))
    return jnp.sum(normal.loc * fn())

  again.pop()
  assert jax.jit(jax.grad(around))(table).shape == (3,)
  assert jax.vmap(around)(jnp.ones((2, 3))).shape == (2,)
  found = mpjax.autocast(lambda w: (w @ w, re.compile("a"), Normal(table)), "bfloat16")(jnp.eye(3))
  assert found[2].loc is table


def test_constants_written_to_variables_come_back_as_arrays():
  def of(y, tree):
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((y, tree)))

  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
      stats = self.variable("stats", "steps", lambda: {"n": jnp.int32(0), "on": jnp.bool_(0)})
      stats.value = {"n": jnp.asarray(3), "on": jnp.asarray(True)}
      self.sow("intermediates", "scale", jnp.asarray(2.0))
      return nn.Dense(2)(x), jnp.asarray(4)

  class Model(nnx.Module):
    def __init__(self):
      self.dense = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      self.steps, self.on = nnx.BatchStat(jnp.int32(0)), nnx.BatchStat(jnp.bool_(0))
      self.scale = nnx.BatchStat(jnp.float32(0))

    def __call__(self, x):
      self.steps[...], self.on[...], self.scale[...] = 3, True, 2.0
      return self.dense(x), jnp.asarray(4)

  linen = mpjax.apply_policy(Linen(), "mixed_bfloat16")
  variables = linen.init(jax.random.key(0), x)
  of(*linen.apply(variables, x, mutable=["stats", "intermediates"]))
  for run in (
    lambda m: mpjax.apply_policy(m, "mixed_bfloat16")(x),
    lambda m: mpjax.autocast(lambda m, x: m(x), "mixed_bfloat16")(m, x),
  ):
    model = Model()
    of(run(model), nnx.state(model))
    assert int(model.steps[...]) == 3
