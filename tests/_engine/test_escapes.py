"""An object that holds arrays of a call outside of its pytree comes back with them."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mpjax
from _arrays import array

x = array(np.ones((2, 4)))


class Normal:
  def __init__(self, loc):
    self.loc = loc


class Plain(Normal):
  pass


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


@jax.tree_util.register_pytree_node_class
class Registered:
  """A pytree of all its attributes, as distributions are: those that are no arrays are static."""

  def __init__(self, loc):
    self.loc = loc
    self.base = Slotted(loc + 1)
    self.log_prob = self.base.log_prob

  def tree_flatten(self):
    leaves, tree = jax.tree.flatten(self.__dict__)
    arrays = [isinstance(leaf, jax.Array) for leaf in leaves]
    static = [None if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True)]
    moving = [leaf if is_array else None for leaf, is_array in zip(leaves, arrays, strict=True)]
    return moving, (static, arrays, tree)

  @classmethod
  def tree_unflatten(cls, data, moving):
    static, arrays, tree = data
    pairs = zip(moving, static, arrays, strict=True)
    made = object.__new__(cls)
    made.__dict__ = jax.tree.unflatten(tree, [m if is_array else s for m, s, is_array in pairs])
    return made


@dataclasses.dataclass(frozen=True)
class Frozen:
  loc: jax.Array
  names: tuple[str, ...] = ("loc",)


class Cycle:
  def __init__(self, loc):
    self.loc, self.me, self.method = loc, self, self.value

  def value(self, y):
    return self.me.loc + y


def by_keyword(h):
  def fn(y, *, h=h):
    return y + h

  fn.also = [h]
  return fn


def recursive(h):
  def fn(y, depth=1):
    return fn(y, depth - 1) if depth else y + h

  return fn


# what makes an object of h, and what is computed with the object afterwards
RESULTS = {
  "object": (Normal, lambda made, y: made.loc + y),
  "slots": (Slotted, lambda made, y: made.log_prob(y)),
  "frozen": (Frozen, lambda made, y: made.loc + y),
  "nested": (lambda h: Normal([{"base": Slotted(h)}]), lambda made, y: made.loc[0]["base"].loc + y),
  "collections": (
    lambda h: Normal((collections.deque([h]), {Frozen(1): {Plain(h)}}, frozenset([Plain(h)]))),
    lambda made, y: made.loc[0][0] + next(iter(made.loc[1][Frozen(1)])).loc * y,
  ),
  "closure": (lambda h: lambda y: h + y, lambda made, y: made(y)),
  "recursive": (recursive, lambda made, y: made(y)),
  "keyword": (by_keyword, lambda made, y: made(y) + made.also[0]),
  "cycle": (Cycle, lambda made, y: made.method(y) + made.me.me.loc),
  "method": (lambda h: Slotted(h).log_prob, lambda made, y: made(y)),
  "partial": (lambda h: functools.partial(jnp.add, h), lambda made, y: made(y)),
  "default": (lambda h: lambda y, h=h: h + y, lambda made, y: made(y)),
  "pytree": (lambda h: Half(h, lambda y: y * h), lambda made, y: made.bijector(y) + made.loc),
  "registered": (Registered, lambda made, y: made.log_prob(y) + made.base.loc + made.loc),
  "inside of one": (
    lambda h: {"a": [Normal(Registered(h)), Registered(h)]},
    lambda made, y: made["a"][0].loc.log_prob(y) + made["a"][1].log_prob(y),
  ),
}
every_result = pytest.mark.parametrize(("make", "use"), RESULTS.values(), ids=RESULTS.keys())


@every_result
def test_a_function_returns_one_that_holds_the_arrays(make, use):
  w, x = jnp.diag(jnp.arange(1.0, 5.0)), jnp.ones((2, 4))
  cast = mpjax.autocast(lambda w, x: {"y": (x @ w, make(x @ w))}, "mixed_bfloat16")
  whole = mpjax.autocast(lambda w, x: use(make(x @ w), x), "mixed_bfloat16")

  def loss(w, x):
    return use(cast(w, x)["y"][1], x)

  np.testing.assert_allclose(loss(w, x), use(make(x @ w), x), rtol=1e-2)
  assert loss(w, x).dtype == whole(w, x).dtype == jnp.float32
  np.testing.assert_allclose(jax.jit(loss)(w, x), loss(w, x), rtol=1e-6)
  found, expected = (jax.grad(lambda w, fn=fn: jnp.sum(fn(w, x)))(w) for fn in (loss, whole))
  np.testing.assert_allclose(found, expected, rtol=2e-2)


@every_result
def test_what_makes_and_uses_one_runs_under_one_policy(make, use):
  def loss(w, x):
    return jnp.sum(use(make(x @ w), x))

  assert jax.grad(mpjax.autocast(loss, "mixed_bfloat16"))(jnp.eye(4), x).shape == (4, 4)


def test_what_an_object_holds_has_the_output_dtype():
  for output, name in (("float32", "float32"), ("bfloat16", "bfloat16")):
    policy = f"params=float32,compute=bfloat16,output={output}"
    made = mpjax.autocast(lambda w, x: Half(x @ w, Normal(x @ w)), policy)(jnp.eye(4), x)
    assert made.loc.dtype.name == made.bijector.loc.dtype.name == name


def test_only_what_leads_to_a_value_is_copied():
  shared = Normal("shared")
  made = mpjax.autocast(lambda w: Normal((shared, [w @ w], Slotted(shared))), "mixed_bfloat16")(
    jnp.eye(4)
  )
  assert made.loc[0] is shared and made.loc[2].loc is shared
  assert isinstance(made.loc[1][0], jax.Array)


def of_a_class_of_its_own(h, registered=False):
  class Converted:
    def mean(self):
      return h

    def tree_flatten(self):
      return (), None

    @classmethod
    def tree_unflatten(cls, data, children):
      return cls()

  kind = jax.tree_util.register_pytree_node_class(Converted) if registered else Converted
  return kind()


UNKNOWN = {
  "class": (of_a_class_of_its_own, "of_a_class_of_its_own.<locals>.Converted"),
  "node": (
    functools.partial(of_a_class_of_its_own, registered=True),
    "of_a_class_of_its_own.<locals>.Converted",
  ),
  "generator": (lambda h: Normal(h + n for n in range(2)), "Normal"),
  "compiled": (lambda h: Normal(jax.jit(lambda y: y + h)), "Normal"),
}


@pytest.mark.parametrize(("make", "name"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_object_that_cannot_be_copied_is_refused(make, name):
  with pytest.raises(
    TypeError, match=rf"an object of type {name} that holds .* mpjax.autocast\(loss, policy\)"
  ):
    mpjax.autocast(lambda w, x: {"y": (x @ w, make(x @ w))}, "mixed_bfloat16")(jnp.eye(4), x)


async def later(w, x):
  return x @ w


@pytest.mark.parametrize(
  "run",
  [
    lambda *args: mpjax.autocast(later, "mixed_bfloat16")(*args),
    functools.partial(mpjax.inspect.explain, later, "mixed_bfloat16"),
    functools.partial(mpjax.inspect.check, later, "mixed_bfloat16"),
  ],
  ids=["autocast", "explain", "check"],
)
def test_what_has_computed_nothing_yet_is_refused(run):
  """Nothing is known of it, and nothing could be promised."""
  with pytest.raises(TypeError, match="returned a coroutine, which has computed nothing yet"):
    run(jnp.eye(4), jnp.ones((2, 4)))


@pytest.mark.parametrize("make", [Normal, Registered])
def test_models_return_one(make):
  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
      return make(nn.Dense(3)(x))

  class Model(nnx.Module):
    def __init__(self):
      self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return make(self.dense(x))

  variables, model = Linen().init(jax.random.key(0), x), Model()
  for made, plain in (
    (
      mpjax.apply_policy(Linen(), "mixed_bfloat16").apply(variables, x),
      Linen().apply(variables, x),
    ),
    (mpjax.apply_policy(model, "mixed_bfloat16")(x), model(x)),
    (mpjax.autocast(lambda model, x: model(x), "mixed_bfloat16")(model, x), model(x)),
  ):
    assert type(made) is make and made.loc.dtype == jnp.float32
    np.testing.assert_allclose(made.loc, plain.loc, rtol=2e-2, atol=1e-2)


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
