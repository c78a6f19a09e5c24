"""A small step moves what came out of a matmul."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _backends import rounded
from _both_formats import DATA, POLICIES, W, both, cases, in_both_formats
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


slope = lambda w, y: jnp.tanh(y @ w)
euler = lambda w, y: y + 0.002 * slope(w, y)


def runge_kutta(w, y):
  k1 = slope(w, y)
  k2 = slope(w, y + 0.001 * k1)
  return y + 0.002 / 6 * (k1 + 2 * k2 + 3 * slope(w, y + 0.001 * k2))


def leapfrog(w, y):
  q, v = jnp.split(y, 2)
  v = v - 0.002 * slope(w, q)
  return jnp.concatenate([q + 0.002 * v, v])


def pair_of_states(w, y):
  """Neither is computed from itself, but in the turn before."""
  turn = lambda s, _: ((s[0] + 0.002 * slope(w, s[1]), s[1] - 0.002 * slope(w, s[0])), None)
  return jnp.stack(lax.scan(turn, (y, y[::-1]), None, length=50)[0]) - jnp.stack([y, y[::-1]])


DT = array(0.002)


@jax.jit
def jitted_slope(w, y):
  return 0.002 * slope(w, y)


@jax.jit
def jitted_euler(w, y, size):
  return y + size * slope(w, y)


def by_halves(w, y):
  first, last = jnp.split(slope(w, y), 2)
  return y + jnp.concatenate([DT * first, 0.002 * last])


def over_times(w, y):
  turn = lambda z, dt: (z + dt * slope(w, z), None)
  return lax.scan(turn, y, jnp.full(50, 0.002))[0] - y


@jax.jit
def jitted_product(w, y, size):
  return size * y * slope(w, y)


def predators(w, y):
  a, b = jnp.split(y, 2)
  return jnp.concatenate([a + 0.002 * a * (1 - b), b + 0.002 * b * (a - 1)])


def packed(w, y):
  q, v = y[:2], y[2:]
  return jnp.stack([q + 0.002 * v, v - 0.002 * jnp.sin(q)]).reshape(y.shape)


def unpacked(w, y):
  a, b, *others = y
  return jnp.stack([a + 0.002 * jnp.cos(b), b - 0.002 * a, *others])


def repeated(step):
  return lambda w, y: functools.reduce(lambda z, _: step(w, z), range(50), y) - y


def in_scan(step):
  return lambda w, y: lax.scan(lambda z, _: (step(w, z), None), y, None, length=50)[0] - y


STEPPED = {
  "written_out": repeated(euler),
  "scanned": in_scan(euler),
  "subtracted": in_scan(lambda w, y: y - slope(w, y) * -0.002),
  "added_first": in_scan(lambda w, y: 0.002 * slope(w, y) + y),
  "divided": in_scan(lambda w, y: y + slope(w, y) / 500),
  "followed": in_scan(lambda w, y: y + 0.002 * (slope(w, y) - y)),
  "two_terms": in_scan(lambda w, y: y + (0.002 * slope(w, y) - 0.002 * jnp.sin(y))),
  "one_by_one": in_scan(lambda w, y: y + 0.002 * slope(w, y) - 0.002 * jnp.sin(y)),
  "elementwise": in_scan(lambda w, y: y + 0.002 * jnp.cos(y)),
  "runge_kutta": in_scan(runge_kutta),
  "leapfrog": in_scan(leapfrog),
  "pair_of_states": pair_of_states,
  "turned": in_scan(lambda w, y: y[::-1] + 0.002 * slope(w, y[::-1])),
  "jitted": repeated(jax.jit(euler)),
  "remat": in_scan(jax.checkpoint(euler)),
  "cond": in_scan(lambda w, y: lax.cond(y[0, 0] < 99, euler, lambda w, y: y, w, y)),
  "mapped": lambda w, y: jax.vmap(in_scan(euler), (None, 0))(w, y[:, None]),
  "number_of_an_array": repeated(lambda w, y: y + DT * slope(w, y)),
  "number_captured_by_a_loop": in_scan(lambda w, y: y + slope(w, y) * DT),
  "numbers_of_a_loop": over_times,
  "jitted_slope": in_scan(lambda w, y: y + jitted_slope(w, y)),
  "number_of_a_helper": in_scan(lambda w, y: jitted_euler(w, y, DT)),
  "where": in_scan(lambda w, y: y + jnp.where(y > 0, jitted_slope(w, y), 0)),
  "relu": in_scan(lambda w, y: y - jax.nn.relu(-0.002 * slope(w, y))),
  "clipped": in_scan(lambda w, y: y + jnp.clip(0.002 * slope(w, y), -1, 1)),
  "barrier": in_scan(lambda w, y: y + lax.optimization_barrier(0.002 * slope(w, y))),
  "by_halves": in_scan(by_halves),
  "of_a_sum": in_scan(lambda w, y: y + DT * (jitted_slope(w, y) * 500 - jnp.sin(y))),
  "branch": in_scan(lambda w, y: y + lax.cond(y[0, 0] < 9, jitted_slope, lambda w, y: 0 * y, w, y)),
  "once_a_step": in_scan(lambda w, y: y + 1.0 * jitted_slope(w, y)),
  "helpers": in_scan(lambda w, y: y + jax.jit(jax.jit(jax.jit(jax.nn.relu)))(jitted_slope(w, y))),
  "product": in_scan(lambda w, y: y + 0.002 * y * (3 - y)),
  "pair": in_scan(predators),
  "learned_rate": repeated(lambda w, y: y + 0.002 * w[0, 0] * (y @ w - y)),
  "in_the_second_factor": in_scan(lambda w, y: y + jnp.cos(y) * (slope(w, y) * 0.002)),
  "divided_in_it": in_scan(lambda w, y: y + slope(w, y) * (jnp.cos(y) / 500)),
  "quotient": in_scan(lambda w, y: y - 0.002 * slope(w, y) / (1 + y)),
  "masked": in_scan(lambda w, y: y + 0.002 * (y > 0).astype(jnp.float32) * slope(w, y)),
  "where_masked": in_scan(lambda w, y: y - 0.002 * slope(w, y) * (jnp.where(y > 0, 1.0, 0.0) * y)),
  "jitted_product": in_scan(lambda w, y: y + jnp.where(y > 9, 0, jitted_product(w, y, DT))),
  "packed": in_scan(packed),
  "unpacked": in_scan(unpacked),
  "a_part_of_it": in_scan(lambda w, y: y.at[0].set(y[0] + 0.002 * slope(w, y)[0])),
  "inner_points": in_scan(
    lambda w, y: y.at[1:-1].set(y[1:-1] + 0.002 * (y[2:] - y[1:-1] + y[:-2]) * y[1:-1])
  ),
  "updated_slice": in_scan(
    lambda w, y: lax.dynamic_update_slice(y, 0.002 * slope(w, y)[1:2] + y[1:2], (1, 0))
  ),
  "clipped_value": in_scan(lambda w, y: jnp.clip(y, -9, 9) + 0.002 * slope(w, y)),
  "clamped_value": in_scan(lambda w, y: 0.002 * slope(w, y) + lax.clamp(-9.0, y, 9.0)),
  "chosen_value": in_scan(lambda w, y: jnp.where(y < 9, y, 0) - 0.002 * slope(w, y)),
  "summed_up": in_scan(lambda w, y: sum([y, 0.002 * slope(w, y), 0.002 * jnp.sin(y)])),
  "scaled_value": in_scan(lambda w, y: 1.0 * y + 0.002 * slope(w, y)),
  "weighed": in_scan(lambda w, y: (499 * y + slope(w, y)) / 500),
  "weighed_by_parts": in_scan(lambda w, y: y / 0.002 + slope(w, y) - y * 499),
  "learned_size": lambda w, y: (lambda size: in_scan(lambda w, y: y + size * slope(w, y))(w, y))(
    jax.nn.softplus(w[0, 0] - 6.9)
  ),
  "learned_size_of_a_helper": lambda w, y: (
    lambda size: in_scan(lambda w, y: jitted_euler(w, y, size))(w, y)
  )(w[0, 0] * 0.003),
  "learned_time": lambda w, y: (
    lax.fori_loop(0, 50, lambda _, z: z - slope(w, z) / (w[0, 0] * 700), y) - y
  ),
  "times_a_sum": in_scan(lambda w, y: y - jnp.cos(y) * (DT * jnp.sin(y) + jitted_slope(w, y))),
  "before_a_matmul": in_scan(lambda w, y: y + (0.002 * slope(w, y)) @ w),
  "in_a_hidden_layer": repeated(lambda w, y: y + jnp.tanh(0.002 * (y @ w)) @ w),
  "by_small_weights": in_scan(lambda w, y: y + slope(w, y) @ (0.002 * w)),
  "into_a_function": in_scan(lambda w, y: y + jnp.expm1(jnp.sin(0.002 * (y @ w)))),
  "of_each_channel": in_scan(lambda w, y: y + jnp.diag(w)[None] / 300 * slope(w, y)),
  "learned_for_each": lambda w, y: (
    lambda sizes: in_scan(lambda w, y: y + sizes * slope(w, y))(w, y)
  )(jax.nn.softplus(jnp.diag(w) - 6.9)[None]),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), STEPPED, POLICIES)
def test_small_steps_move_what_came_out_of_a_matmul(fn, policy):
  w, x = jnp.eye(4) * 0.7, jnp.linspace(0.3, 2, 16).reshape(4, 4)
  found, want = in_both_formats(lambda w, x: fn(w, x @ w), policy, w, x)
  np.testing.assert_allclose(found, want, atol=0.02 * float(np.abs(want).max()))


def refined(gradient, turns=100):
  """What a latent is, by the means of a decoder: the rate is large, and the gradient of a mean."""

  def fn(p, y):
    gradient_of = gradient(lambda y: jnp.mean((jnp.tanh(y @ p["decoder"]) - 0.9) ** 2))
    return lax.fori_loop(0, turns, lambda _, y: y - 0.2 * gradient_of(y), y) - y

  return fn


def clipped_gradient(loss):
  clip = lambda g: g * jnp.where(jnp.max(g) > 1, 0.5, 1.0)
  return lambda y: clip(jax.grad(loss)(y))


REFINED = {
  "gradient": refined(jax.grad),
  "jitted": refined(lambda loss: jax.jit(jax.grad(loss))),
  "remat": refined(lambda loss: jax.grad(jax.checkpoint(loss))),
  "with_the_value": refined(lambda loss: lambda y: jax.value_and_grad(loss)(y)[1]),
  "clipped": refined(clipped_gradient),
}


@in_turns(("fn", "policy"), REFINED, POLICIES)
def test_a_latent_moves_by_its_gradient_whatever_the_rate(fn, policy):
  keys = jax.random.split(jax.random.key(1))
  p = {"encoder": jnp.eye(4) * 0.999, "decoder": jax.random.normal(keys[0], (4, 64)) * 0.4}
  x = jax.random.normal(keys[1], (16, 4)) + 1
  found, want = in_both_formats(lambda p, x: fn(p, x @ p["encoder"]), policy, p, x)
  np.testing.assert_allclose(found, want, atol=0.02 * float(np.abs(want).max()))


@jax.custom_vjp
def _reversible(w, h):
  return h + jnp.tanh(h @ w)


def _reversed(residuals, g):
  w, h = residuals
  by_w, by_h = jax.vjp(lambda w, h: jnp.tanh(h @ w), w, h)[1](g)
  return by_w, g + by_h


_reversible.defvjp(lambda w, h: (_reversible(w, h), (w, h)), _reversed)


def _trained_in_it(w, h):
  """A layer whose weights take a step of their own: what it gives is no gradient."""
  gradient = jax.grad(lambda w: jnp.mean((h @ w - 1) ** 2))(w)
  return h + jnp.tanh(h @ (w - 0.1 * gradient))


@both
@cases(
  residual=lambda w, h: h + jnp.tanh(h @ w),
  gated=lambda w, h: h + jnp.sin(h) * (h @ w),
  remat=jax.checkpoint(lambda w, h: h + jnp.tanh(h @ w)),
  own_rule=_reversible,
  trained=_trained_in_it,
)
def test_the_cotangents_of_a_residual_are_no_steps(fn, policy):
  def loss(w, x):
    h = x @ w
    for _ in range(3):
      h = fn(w, h)
    return jnp.sum(h @ w)

  x = jnp.ones((9, 4))
  for program in (mpjax.autocast(jax.grad(loss), policy), jax.grad(mpjax.autocast(loss, policy))):
    sums = [e for e in equations(jax.make_jaxpr(program)(W, x)) if e.primitive.name == "add"]
    stream = [e for e in sums if e.outvars[0].aval.shape == x.shape]
    assert len(stream) >= 3
    assert {e.outvars[0].aval.dtype.itemsize for e in stream} == {2}


@both
def test_the_32nd_of_an_interval_is_a_small_step(policy):
  fn = lambda w, x: lax.fori_loop(0, 32, lambda _, y: y + slope(w, y) / 32, x @ w)
  found = jax.make_jaxpr(mpjax.autocast(fn, policy))(jnp.eye(4), jnp.ones((4, 4)))
  (loop,) = [eqn for eqn in equations(found) if eqn.primitive.name in ("scan", "while")]
  assert loop.outvars[-1].aval.dtype == jnp.float32


@both
def test_a_small_step_is_differentiated(policy):
  w, x = jnp.eye(4) * 0.7, jnp.linspace(0.3, 2, 16).reshape(4, 4)
  loss = lambda w, x: jnp.sum(STEPPED["scanned"](w, lax.stop_gradient(x @ w)))
  found = rounded(jax.grad(mpjax.autocast(loss, policy)))(w, x)
  np.testing.assert_allclose(found, jax.grad(loss)(w, x), rtol=0.05, atol=1e-3)


@both
@cases(
  added=lambda h: 5 + 0.001 * h,
  subtracted=lambda h: 5 - h / 1000,
  last=lambda h: h * 0.001 - 5,
)
def test_a_number_keeps_a_small_step_beside_it(fn, policy):
  program = lambda w, x: (lambda y: y[1:] - y[:1])(fn(x @ w))
  x = jnp.linspace(0.3, 2, 16).reshape(4, 4)
  found, want = in_both_formats(program, policy, W, x)
  np.testing.assert_allclose(found, want, atol=1e-4)


def convolved(h, kernel):
  images = jnp.broadcast_to(h[:, None, None], (len(h), 1, 1, 4))
  dims = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=dims)[:, 0, 0]


class Position(nn.Module):
  @nn.compact
  def __call__(self, h):
    return 0.01 * lax.broadcasted_iota(jnp.float32, h.shape, 1) + 0.01 * jnp.exp(h)


class Turned(nn.Module):
  @nn.compact
  def __call__(self, h):
    turned = jax.jit(lambda h: lax.convert_element_type(lax.complex(h, h) * 0.5j, jnp.float32))
    return turned(h)


@both
@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("module", [Position, Turned])
def test_a_sum_with_what_is_made_of_no_operand_or_of_complex_numbers_is_planned(module, policy):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.Dense(4)(x)
      return nn.Dense(4)(h + module()(h))

  variables = Model().init(jax.random.key(0), DATA)
  want = Model().apply(variables, DATA)
  found = mpjax.autocast(Model().apply, policy)(variables, DATA)
  np.testing.assert_allclose(found, want, rtol=0.05, atol=0.05)


@both
def test_residuals_and_polynomials_take_no_small_steps(policy):
  """A scaled, a gated and a low-rank residual, branches, means, a leaky relu, the cube of gelu."""

  def fn(w, x):
    h = x @ w
    h = h + 0.1 * jnp.tanh(h @ w)
    h = h + w[0] * (h @ w)
    h = h @ w + 0.01 * (h @ w @ w)
    h = h + 0.01 * (x @ w)
    wide, mixed = jnp.tile(h, 1025), jnp.tile(h, (300, 1))
    h = h + wide @ jnp.tile(w, (1025, 1)) / 4100**0.5
    h = h + (jax.nn.relu(h @ mixed.T) / 1200 @ mixed) + (jax.nn.relu(h @ mixed.T) @ mixed) / 1200
    h = h + jax.jit(lambda h: jnp.where(h > 0, h @ w, 0.001 * h))(h)
    h = h + jax.nn.relu(0.0 * (h @ w)) + jnp.where(h > 0, 0.0 * (h @ w), 0)
    h = h + jax.nn.relu(wide @ jnp.tile(w, (1025, 1)) * (2 / 4100) ** 0.5)
    h = h + jax.jit(lambda h: jnp.round(h * 127) / 127)(h @ w)
    h = h + jax.nn.relu(convolved(h, jnp.tile(w, (12, 12, 1, 1))) / (144 * 4) ** 0.5)
    h = jnp.where(h > 0, h, 0.01 * h) + 1e-3
    return (h + 0 * (h @ w)) / 100

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(W, DATA))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}
  gelu = equations(jax.make_jaxpr(mpjax.autocast(lambda w, x: jax.nn.gelu(x @ w), policy))(W, DATA))
  if policy == "mixed_bfloat16":  # in float16 the cube leaves the format
    assert {e.outvars[0].aval.dtype.itemsize for e in gelu if e.primitive.name == "add"} == {2}


summing = lambda w, h: jnp.tile(h, 1025) @ jnp.tile(w, (1025, 1))
quantized = lambda h: jnp.round(h * 127)
PRODUCTS = {
  "scaled": lambda w, h: h + 0.1 * jnp.tanh(h) * (h @ w),
  "gated": lambda w, h: h + w[0] * jnp.sin(h) * (h @ w),
  "leaky": lambda w, h: h + jnp.where(h > 0, 1.0, 0.01) * (h @ w),
  "offset": lambda w, h: h + (200 * jnp.tanh(h)) * (0.005 * (h @ w)),
  "offset_by_a_sum": lambda w, h: h + 0.005 * jnp.tanh(h) * (200 * (h @ w) + h),
  "offset_by_a_number": lambda w, h: h + 0.005 * jnp.tanh(h) * (200 - h @ w),
  "offset_by_a_matmul": lambda w, h: h + 0.005 * jnp.tanh(h) * ((200 * h) @ w),
  "mean": lambda w, h: h + jnp.tanh(h) * summing(w, h) / 4100,
  "mean_of_a_factor": lambda w, h: h + summing(w, h) * (jnp.tanh(h) / 4100),
  "mean_of_divided_terms": lambda w, h: h + jnp.tanh(h) * summing(w, h / 4100),
  "sum_with_divided_weights": lambda w, h: h + jnp.tanh(h) * summing(w / 4100**0.5, h),
  "capped": lambda w, h: h + jnp.tanh(h) * (50 * jnp.tanh(h @ w / 50)),
  "of_two_sums": lambda w, h: h + (summing(w, h) / 4100**0.5) * (summing(w, h) * (2 / 4100) ** 0.5),
  "quantized": lambda w, h: h + jnp.tanh(h) * (quantized(h) / 127),
  "quantized_matmul": lambda w, h: h + (quantized(h) @ w) * (jnp.tanh(h) / 127),
  "nothing": lambda w, h: h + 0.0 * jnp.tanh(h) * (h @ w),
}


@in_turns(("fn", "policy"), PRODUCTS, POLICIES)
def test_a_product_with_an_ordinary_scale_is_no_small_step(fn, policy):
  layers = mpjax.autocast(lambda w, x: fn(w, x @ w) @ w, policy)
  found = equations(jax.make_jaxpr(layers)(W, DATA))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}


@both
def test_a_residual_of_means_takes_no_small_step(policy):
  class Pooled(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.avg_pool(x, (8, 8), (1, 1), "SAME")

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.Conv(4, (3, 3))(x)
      return nn.Conv(4, (3, 3))(h + Pooled()(h))

  x = jnp.ones((1, 16, 16, 3))
  variables = Model().init(jax.random.key(0), x)
  found = equations(jax.make_jaxpr(mpjax.autocast(Model().apply, policy))(variables, x))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}
