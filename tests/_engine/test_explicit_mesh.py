"""On a mesh of explicit axes runs what runs there in float32, and its results lie as they lay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P
from test_coverage import CONSTRUCTS, NO_REVERSE, OPS, POLICIES, TRANSFORMS, in_turn, make

import battery
import mpjax
from _jaxprs import contractions, wide_contractions
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


@pytest.fixture(autouse=True)
def mesh():
  """Two devices, whose axis is in every array's type."""
  mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    yield mesh


@functools.cache
def numbers():
  """A parameter on every device, and data of which each has a row."""
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)) * 0.5
  mesh = jax.sharding.get_mesh()
  return [
    jax.device_put(value, NamedSharding(mesh, spec))
    for value, spec in ((w, P(None, None)), (x[:2] + 0.1, P("rows", None)))
  ]


def types(jaxpr):
  """What each result is: its shape, dtype and place."""
  return [(aval.shape, aval.dtype, aval.sharding.spec) for aval in jaxpr.out_avals]


def traced(transformed, plain):
  """The jaxpr of a function under a policy, or None where plain JAX refuses it, as it then does."""
  try:
    want = jax.make_jaxpr(plain)(*numbers())
  except Exception as refused:  # whatever a case raises here is what must be raised
    with pytest.raises(type(refused)):
      jax.make_jaxpr(transformed)(*numbers())
    return None
  got = jax.make_jaxpr(transformed)(*numbers())
  assert types(got) == types(want)
  return got


REFUSED = {"map", "shard_map", "pallas", "associative_scan"}
"""What JAX refuses on such a mesh, of the matrix; and a convolution that has a batching rule."""


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_the_coverage_matrix_holds(construct, op):
  """In the format in which trying it is slow in test_coverage.py."""
  (policy,) = set(POLICIES) - {in_turn(construct, op)}
  fn = make(op, construct)
  refused = construct in REFUSED or (construct, op) == ("custom_vmap", "conv")
  for name in ("forward",) if construct in NO_REVERSE else TRANSFORMS:
    jaxpr = traced(TRANSFORMS[name](fn, policy), TRANSFORMS[name](fn, "float32"))
    assert (jaxpr is None) == refused
    if jaxpr is not None:
      assert contractions(jaxpr) and not wide_contractions(jaxpr, POLICIES[policy])


def total(y):
  return jnp.sum(jnp.abs(y) ** 2).astype(jnp.float32)


def gradient(fn):
  def loss(w, x):
    leaves = jax.tree.leaves(fn(w, x))
    return sum(total(y) for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact))

  return jax.grad(loss)


@pytest.mark.quick(every=7, start=3)
@pytest.mark.parametrize("name", battery.CASES)
def test_the_battery_runs(name):
  """Places do not depend on the format; the two that there are take turns over the cases."""
  fn = battery.CASES[name]
  policy = list(POLICIES)[list(battery.CASES).index(name) % len(POLICIES)]
  if name in battery.FORWARD_ONLY:
    traced(mpjax.autocast(fn, policy), fn)
  else:
    traced(gradient(mpjax.autocast(fn, policy)), gradient(fn))


BY_ONE_OPERATION = {
  "maximum": lambda h: jnp.maximum(h, 0.0),
  "minimum": lambda h: jnp.minimum(h, jnp.float32(0.5)),
  "maximum_of_two": lambda h: jnp.maximum(h, -h),
  "clip": lambda h: jnp.clip(h, -1.0, 1.0),
  "relu": jax.nn.relu,
  "relu6": jax.nn.relu6,
  "softmax": lambda h: jax.nn.softmax(h) ** 2,
  "logsumexp": lambda h: jax.nn.logsumexp(h, axis=-1),
  "cross_entropy": lambda h: optax.softmax_cross_entropy(h, jax.nn.softmax(-h)),
  "largest": lambda h: jnp.max(h, axis=-1),
  "attention": lambda h: jax.nn.dot_product_attention(*[h.reshape(2, 2, 1, 4)] * 3),
}


@pytest.mark.quick(every=5)
@in_turns(("fn", "policy"), BY_ONE_OPERATION, list(POLICIES))
def test_gradients_are_taken_operation_by_operation_too(fn, policy):
  loss = lambda w, x: total(fn(x @ w))
  kernel = lambda w, x: total(mpjax.cast_inputs(lambda w, x: fn(x @ w))(w, x))
  want = jax.jit(jax.grad(loss))(*numbers())
  cast = [mpjax.autocast(f, policy) for f in (loss, kernel)]
  for grad in (*map(jax.grad, cast), mpjax.autocast(jax.grad(loss), policy)):
    got = grad(*numbers())
    assert got.sharding == want.sharding
    assert jnp.linalg.norm(got - want) <= 8 * jnp.finfo(POLICIES[policy]).eps * (
      jnp.linalg.norm(want) + 1e-3
    )


def weighed(y):
  return jnp.sum(y * jnp.cos(jnp.arange(y.shape[-1])))


def normalized(h):
  with jax.named_scope("norm"):
    return h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)


INTO_AUTO_AXES = {
  "function": lambda h: auto_axes(jnp.tanh, out_sharding=P("rows"))(normalized(h)),
  "data": lambda h: auto_axes(jnp.tanh, out_sharding=P("rows"))(h * h),
  "matmul": lambda h: auto_axes(lambda h: jnp.tanh(h @ h.T), out_sharding=P("rows"))(normalized(h)),
  "two": lambda h: auto_axes(lambda a, b: a + b, out_sharding=P("rows"))(normalized(h), h),
  "back": lambda h: normalized(auto_axes(normalized, out_sharding=P("rows"))(h)),
  "scan": lambda h: lax.scan(
    lambda c, _: (auto_axes(normalized, out_sharding=P("rows", None))(normalized(c)), None),
    h,
    None,
    length=2,
  )[0],
  "remat": lambda h: jax.checkpoint(auto_axes(normalized, out_sharding=P("rows")))(normalized(h)),
  "resharded": lambda h: reshard(normalized(h), P()),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), INTO_AUTO_AXES, list(POLICIES))
def test_a_value_may_leave_its_module_into_auto_axes(fn, policy):
  loss = lambda w, x: weighed(fn(x @ w))
  want = jax.grad(loss)(*numbers())
  cast = mpjax.autocast(loss, policy)
  for grad in (jax.grad(cast), jax.jit(jax.grad(cast)), mpjax.autocast(jax.grad(loss), policy)):
    got = grad(*numbers())
    error = jnp.linalg.norm(got - want)
    assert error <= 8 * jnp.finfo(POLICIES[policy]).eps * jnp.linalg.norm(want)


@pytest.mark.quick(every=4)
@in_turns(("fn", "policy"), INTO_AUTO_AXES, list(POLICIES))
def test_reports_follow_a_value_into_auto_axes(fn, policy):
  loss = lambda w, x: weighed(fn(x @ w))
  report = mpjax.inspect.check(loss, policy, *numbers())
  assert report.agrees and report.gradients[0].gradient.error > 0
  out, values = mpjax.inspect.record(loss, policy)(*numbers())
  assert jnp.allclose(out, loss(*numbers()), rtol=1e-5)
  assert values.activations.bins().sum() >= 16


@pytest.mark.parametrize("where", ["on_the_mesh", "in_no_context"])
def test_statistics_of_sharded_arrays_are_counted(where):
  _, x = numbers()
  tx = mpjax.inspect.collect_statistics(optax.sgd(0.1))

  def counted():
    updates, state = jax.jit(tx.update)(x, tx.init(x), x)
    assert jax.typeof(updates) == jax.typeof(x)
    return mpjax.inspect.statistics(state).gradients.bins().sum(), mpjax.inspect.histogram(x).bins()

  none = jax.sharding.Mesh(np.empty((), object), ())
  with jax.set_mesh(none if where == "in_no_context" else jax.sharding.get_mesh()):
    total, bins = counted()
  assert total == bins.sum() == x.size


def second(fn):
  return jax.jit(jax.grad(lambda w, x: jnp.sum(jax.grad(fn)(w, x) ** 2)))


@in_turns(
  ("fn", "policy"),
  {"largest": BY_ONE_OPERATION["largest"], "softmax": jax.nn.softmax},
  list(POLICIES),
)
def test_second_derivatives_run(fn, policy):
  loss = lambda w, x: total(fn(x @ w))
  want = second(loss)(*numbers())
  got = second(mpjax.autocast(loss, policy))(*numbers())
  assert jnp.linalg.norm(got - want) <= 0.1 * jnp.linalg.norm(want)
