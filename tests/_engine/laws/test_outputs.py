"""What no layer comes after is an output: it rounds where the layer made it, and never again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _both_formats import POLICIES, ROUNDING, both
from _jaxprs import equations
from _turns import in_turns

WIDTH = 32
LOW, RANGE = array(np.linspace(0.5, 1.5, WIDTH)), array(np.linspace(1, 3, WIDTH))
TIMES = array(np.linspace(0, 1, WIDTH))


def hertz(o):
  """Phases of an oscillator whose frequency a layer says at fewer times."""
  frequency = 100 + 100 * jax.nn.sigmoid(o[:, :8])
  return jnp.sin(jnp.cumsum(jax.image.resize(frequency, (len(o), WIDTH), "linear"), 1) / 500)


def strain(o):
  """The energy of a deformation by what it does to distances, small beside these."""
  moved = jnp.eye(3) + 0.1 * o[:, :9].reshape(-1, 3, 3)
  return jnp.trace(jnp.swapaxes(moved, 1, 2) @ moved, axis1=1, axis2=2) / 2 - 1.5


OUTPUTS = {
  "sign": lambda o: 2 * jax.nn.sigmoid(o) - 1,
  "normalized": lambda o: (jax.nn.sigmoid(o) - 0.449) / 0.226,
  "range": lambda o: LOW + RANGE * jax.nn.sigmoid(o),
  "bounds": lambda o: jnp.clip(jax.nn.sigmoid(o), 0.01, 0.99),
  "depth": lambda o: 1 / (0.1 + 9.9 * jax.nn.sigmoid(o)),
  "gamma": lambda o: (jax.nn.sigmoid(o) + 0.01) ** 2.2,
  "masked": lambda o: jax.nn.sigmoid(o) * (LOW > 0.7),
  "wave": lambda o: jnp.sin(6 * (1 + 2 * jax.nn.sigmoid(o)) * TIMES),
  "jitted": jax.jit(lambda o: 2 * jax.nn.sigmoid(o) - 1),
  "shifted": lambda o: (o - 0.449) / 0.226,
  "blended": lambda o: jnp.tanh(o[:, ::2]) * 2.2 + (1 - jax.nn.sigmoid(o[:, 1::2])) * 3.3,
  "hertz": hertz,
  "strain": strain,
}


RETURNED = ("sign", "normalized", "depth", "gamma", "wave", "jitted", "shifted")


def layers(p, x, dense):
  return dense(jnp.tanh(dense(x, p["in"])), p["out"])


@pytest.fixture(scope="module")
def example():
  keys = jax.random.split(jax.random.key(3), 3)
  p = {
    "in": jax.random.normal(keys[0], (6, 64)) / 2,
    "out": jax.random.normal(keys[1], (64, WIDTH)) / 4,
  }
  return p, jax.random.normal(keys[2], (128, 6))


@pytest.mark.quick(every=2)
@in_turns(("output", "policy"), OUTPUTS, POLICIES)
@pytest.mark.parametrize("has_aux", [False, True])
def test_outputs_are_as_exact_as_by_hand(output, has_aux, policy, example, promotion_of_users):
  """Near what they are compared with, as after a training."""
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  plain = lambda x, w: x @ w
  by_hand = lambda x, w: (x.astype(dtype) @ w.astype(dtype)).astype(dtype)
  p, x = example
  made = jax.jit(lambda: output(layers(p, x, plain)))()
  labels = made + 0.002 * jax.random.normal(jax.random.key(5), made.shape)

  def loss(p, x, dense=plain):
    said = output(layers(p, x, dense).astype(jnp.float32))
    return jnp.mean((said - labels) ** 2), said if has_aux else None

  fns = [loss, lambda p, x: loss(p, x, by_hand), mpjax.autocast(loss, policy)]
  run = jax.jit(
    lambda *given: [jax.grad(fn, has_aux=True)(*given)[0] for fn in fns], compiler_options=ROUNDING
  )
  want, hand, found = (jnp.concatenate([*map(jnp.ravel, g.values())]) for g in run(p, x))
  error = lambda g: jnp.linalg.norm(g - want)
  assert error(found) <= 1.02 * error(hand)


@both
def test_a_stream_through_layers_that_are_not_trained_is_no_output(policy):
  w = jnp.eye(WIDTH) + 0.01

  def stream(prompt, x):
    h = jnp.concatenate([prompt, x]) @ w
    for gate in (0.3, 0.7):
      h = h + jnp.tanh(gate) * jnp.tanh(h @ w)
    return jnp.sum(jnp.square(h @ w))

  jaxpr = jax.make_jaxpr(mpjax.autocast(stream, policy))(jnp.ones((2, WIDTH)), jnp.ones((8, WIDTH)))
  found = [e for e in equations(jaxpr) if e.primitive.name in ("add", "tanh", "mul")]
  sizes = {e.outvars[0].aval.dtype.itemsize for e in found if e.outvars[0].aval.shape}
  assert sizes == {2}


@both
def test_what_a_function_returns_alone_is_as_narrow_as_its_layers(policy):
  fn = lambda w, x: jnp.tanh(x @ w) * lax.logistic(x @ w)
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(jnp.ones((4, WIDTH)), jnp.ones((8, 4)))
  found = [e for e in equations(jaxpr) if e.primitive.name in ("mul", "tanh", "logistic")]
  assert {e.outvars[0].aval.dtype.itemsize for e in found} == {2}


@pytest.mark.quick(every=2)
@in_turns(("output", "policy"), {key: OUTPUTS[key] for key in RETURNED}, POLICIES)
def test_what_is_returned_for_a_loss_outside_is_as_exact_as_by_hand(
  output, policy, example, promotion_of_users
):
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  by_hand = lambda x, w: (x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32)
  model = lambda p, x, dense=jnp.matmul: output(layers(p, x, dense))
  fns = [model, lambda p, x: model(p, x, by_hand), mpjax.autocast(model, policy)]
  run = jax.jit(lambda *given: [fn(*given) for fn in fns], compiler_options=ROUNDING)
  want, hand, found = run(*example)
  assert jnp.linalg.norm(found - want) <= 1.3 * jnp.linalg.norm(hand - want)


def error(p, h, y):
  return jnp.mean((2 * jax.nn.sigmoid(h @ p["out"]) - 1 - y) ** 2)


def hidden(p, x):
  return jnp.tanh(x @ p["in"])


def in_microbatches(p, x, y):
  turn = lambda total, xy: (total + error(p, hidden(p, xy[0]), xy[1]), None)
  return lax.scan(turn, 0.0, (x, y))[0] / len(x)


def checkpointed(p, x, y):
  """Whole turns, which take and return the sum so far."""
  turn = jax.checkpoint(lambda total, xy: (total + error(p, hidden(p, xy[0]), xy[1]), None))
  return lax.scan(turn, 0.0, (x, y))[0] / len(x)


def mapped(p, x, y):
  return lax.map(lambda xy: error(p, hidden(p, xy[0]), xy[1]), (x, y)).mean()


def in_turns_of_a_network(p, x, y):
  def turn(state, xy):
    h, total = state
    h = jnp.tanh(xy[0] @ p["in"] + h @ p["in"].T @ p["in"])
    return (h, total + error(p, h, xy[1])), h

  begin = jnp.zeros((x.shape[1], 64)), 0.0
  return lax.scan(turn, begin, (x, y))[0][1]


def in_branches(p, x, y):
  own = lambda h: error(p, h, y[0])
  return lax.cond(y[0, 0, 0] > 0, own, lambda h: 2 * own(h), hidden(p, x[0]))


def on_devices(p, x, y):
  mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.PartitionSpec("d")
  own = lambda x, y: lax.pmean(error(p, hidden(p, x), y), "d")
  specs = {"in_specs": (spread, spread), "out_specs": jax.sharding.PartitionSpec()}
  return jax.shard_map(own, mesh=mesh, **specs)(x[0], y[0])


BODIES = [in_microbatches, checkpointed, mapped, in_turns_of_a_network, in_branches, on_devices]


@both
@pytest.mark.parametrize("loss", BODIES)
def test_outputs_round_no_more_in_the_body_that_makes_the_loss(loss, policy, example):
  p, x = example
  jaxpr = jax.make_jaxpr(mpjax.autocast(loss, policy))(p, x[None], jnp.ones((1, 128, WIDTH)))
  made = {"logistic": set(), "mul": set(), "sub": set(), "tanh": set()}
  for eqn in equations(jaxpr):
    if eqn.primitive.name in made and eqn.outvars[0].aval.shape == eqn.invars[-1].aval.shape:
      made[eqn.primitive.name].add(eqn.outvars[0].aval.dtype.itemsize)
  assert made["logistic"] == made["sub"] == {4}
  assert made["tanh"] == {2}


@both
def test_what_a_loop_hands_on_to_its_layers_is_no_output_of_it(policy, example):
  """Though nobody reads it behind the loop."""

  def loss(p, x):
    def turn(state, _):
      h, total = state
      h = jnp.tanh(jnp.tanh(h @ p["out"]) @ p["out"].T)
      return (h, total + jnp.mean(h)), None

    return lax.scan(turn, (hidden(p, x), 0.0), None, length=4)[0][1]

  jaxpr = jax.make_jaxpr(mpjax.autocast(loss, policy))(*example)
  made = [e.outvars[0].aval.dtype for e in equations(jaxpr) if e.primitive.name == "tanh"]
  assert [dtype.itemsize for dtype in made] == [2, 2, 2]
