"""What has a unit of its own is float32: means, offsets, outputs, small differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array, normal
from _both_formats import DATA, POLICIES, W, both, cases, in_both_formats, matmuls
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


@both
@cases(
  gram=lambda e, k: (lambda h: h @ k @ h)(jnp.eye(32) - 1 / 32),
  of_ones=lambda e, k: (jnp.eye(32) - jnp.ones((32, 32)) / 32) @ k,
  features=lambda e, k: (jnp.eye(32) - 1 / 32) @ e,
  turned=lambda e, k: e.T @ (jnp.eye(32) - 1 / 32),
)
def test_values_less_their_mean_are_float32(fn, policy):
  """As by hand, who goes on in float32 behind the layers."""
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  w, x = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 6

  def apply(w, x):
    e = jnp.tanh(x @ w) + 5.0
    return fn(e, e @ e.T)

  def by_hand(w, x):
    e = jnp.tanh(x.astype(dtype) @ w.astype(dtype)) + 5.0
    return fn(*(y.astype(jnp.float32) for y in (e, e @ e.T)))

  exact, hand, got = (jax.jit(f)(w, x) for f in (apply, by_hand, mpjax.autocast(apply, policy)))
  assert jnp.linalg.norm(got - exact) < 1.5 * jnp.linalg.norm(hand - exact)


def largest(fn, policy):
  h = jnp.ones((2, 4, 4))
  found = equations(jax.make_jaxpr(mpjax.autocast(lambda w, h: fn(h @ w), policy))(W, h))
  return {
    e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name.startswith("reduce_m")
  }


@both
@cases(
  points=lambda h: h.max(1) @ W,
  maxout=lambda h: h.reshape(2, 4, 2, 2).max(-1) @ W[:2],
  of_both_ends=lambda h: jnp.concatenate([h.max(1), h.min(1)], -1) @ jnp.tile(W, (2, 1)),
)
def test_a_pool_before_a_matmul_is_one_of_the_narrow_values(fn, policy):
  """A float32 one would store a float32 mask as large as what it is of."""
  assert largest(fn, policy) == {2}


@both
@cases(
  softmax=lambda h: jax.nn.softmax(h) @ W,
  by_hand=lambda h: jnp.exp(h - h.max(-1, keepdims=True)) @ W,
  quantized=lambda h: jnp.round(127 * h / jnp.abs(h).max(-1, keepdims=True)) @ W,
  logsumexp=lambda h: jax.nn.logsumexp(h, -1),
  returned=lambda h: h.max(1),
  both_ways=lambda h: (lambda m: (m @ W, m))(h.max(1)),
)
def test_the_largest_that_something_else_reads_is_float32(fn, policy):
  assert largest(fn, policy) == {4}


@both
@cases(
  hard_swish=jax.nn.hard_swish,
  hard_sigmoid=jax.nn.hard_sigmoid,
  gate=lambda h: h * jax.nn.hard_sigmoid(h),
  in_a_function=jax.jit(lambda h: jnp.tanh(h + 3)),
  in_a_checkpoint=jax.checkpoint(lambda h: jnp.tanh(h + 3)),
  in_a_loop=lambda h: lax.scan(lambda c, _: (jnp.tanh(c + 3), None), h, None, length=2)[0],
)
def test_what_a_function_adds_on_the_way_to_a_matmul_is_in_no_unit_of_its_own(fn, policy):
  network = mpjax.autocast(lambda w, x: fn(x @ w) @ w, policy)
  added = [e for e in equations(jax.make_jaxpr(network)(W, DATA)) if e.primitive.name == "add"]
  floats = {e.outvars[0].aval.dtype for e in added if e.outvars[0].aval.shape}
  assert floats == {jnp.dtype(policy.removeprefix("mixed_"))}


@both
@cases(
  kelvin=lambda h: h * 20 + 300,
  taken=lambda h: h - 100.0,
  of_a_module=lambda h: jax.jit(lambda h: h + 273.15)(h),
  strain=lambda h: (1 + h / 8) * (1 - h[::-1] / 8) - 1,
  determinant=lambda h: jnp.linalg.det(jnp.eye(2) + h.reshape(8, 2, 2) / 8) - 1,
)
def test_an_output_comes_back_in_its_own_unit(fn, policy):
  x = jnp.arange(32.0).reshape(8, 4) / 16 - 1  # that both formats hold
  got = mpjax.autocast(lambda w, x: fn(x @ w), policy)(jnp.eye(4), x)
  np.testing.assert_allclose(got, fn(x), rtol=1e-6)


IN_PIXELS = array([1003.0, 2.0, 511.0, 77.0])
affine = lambda p, x: x @ p["w"] + p["b"]


@both
@cases(
  offsets=lambda p, x: p["corners"] + 0.125 * (x @ p["w"]),
  with_a_bias=lambda p, x: p["corners"][None] + (x @ p["w"] + p["b"]),
  reshaped=lambda p, x: p["corners"].reshape(2, 2) - (x @ p["w"] + p["b"]).reshape(8, 2, 2),
  jitted=lambda p, x: jax.jit(lambda x: p["corners"] + (x @ p["w"]) / 8)(x),
  of_a_jitted_network=lambda p, x: p["corners"] + jax.jit(affine)(p, x),
  of_a_checkpoint=lambda p, x: p["corners"] + jax.checkpoint(affine)(p, x),
  negative=lambda p, x: p["corners"] + -affine(p, x),
  of_a_slice=lambda p, x: p["corners"][:2] + affine(p, x)[:, :2],
)
def test_an_output_to_which_a_parameter_is_added_comes_back_in_its_unit(fn, policy):
  x = jnp.arange(32.0).reshape(8, 4) / 16 - 1
  p = {"w": jnp.eye(4), "b": jnp.full(4, 0.5), "corners": IN_PIXELS}
  got = mpjax.autocast(fn, policy)(p, x)
  np.testing.assert_allclose(got, fn(p, x), rtol=1e-6)


@both
@cases(
  stream=lambda p, x: (0.5 * (x @ p["w"]) + p["corners"]) @ p["w"],
  activation=lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) + p["corners"],
  bias=lambda p, x: x @ p["w"] + p["corners"],
)
def test_a_parameter_that_is_added_to_a_stream_or_as_a_bias_follows(fn, policy):
  p = {"w": jnp.eye(4), "b": jnp.full(4, 0.5), "corners": IN_PIXELS}
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(p, DATA))
  adds = [e for e in found if e.primitive.name == "add"]
  assert {e.outvars[0].aval.dtype.itemsize for e in adds} == {2}


@both
@cases(
  centered=lambda h: h * 0.1 + 4.0,
  similarity=lambda h: 4.0 - h / 8,
  of_a_module=lambda h: jax.jit(lambda h: h / 16 + 3.0)(h),
)
def test_an_output_is_centered_in_float32(fn, policy):
  x = jnp.arange(32.0).reshape(8, 4) / 16 - 1
  got = mpjax.autocast(lambda w, x: fn(x @ w), policy)(jnp.eye(4), x)
  np.testing.assert_allclose(got, fn(x), rtol=1e-4)


TARGETS = array(50 + normal(5, 9, 4))
DISCOUNTS = array(0.9 ** abs(np.subtract.outer(range(8), range(8))))


def squared_distances(x, y):
  return jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1) - 2 * x @ y.T


@both
@cases(
  distances=lambda h: jnp.exp(-squared_distances(h + 50, TARGETS) / 8),
  jitted=lambda h: jax.jit(squared_distances)(h + 50, TARGETS),
  covariance=lambda h: jnp.cov(h.T + 50.0),
  advantages=lambda h: DISCOUNTS @ (0.9 * (h + 500)[1:] - (h + 500)[:-1] + 50),
  in_a_gradient=lambda h: jax.grad(lambda h: jnp.sum(squared_distances(h + 50, TARGETS)))(h),
)
def test_an_output_that_no_layer_reads_is_in_its_unit_before_other_matmuls(fn, policy):
  """As by hand, whose network ends before them."""
  x = (128 + jnp.arange(36.0)[::-1].reshape(9, 4) ** 2 % 128) / 256  # that both formats hold
  got = mpjax.autocast(lambda w, x: fn(x @ w), policy)(jnp.eye(4), x)
  np.testing.assert_allclose(got, fn(x), rtol=5e-3, atol=1e-4)


@both
@cases(
  stream=lambda p, h: jnp.tanh((h + 50) @ p) @ p,
  attention=lambda p, h: jax.nn.softmax((h + 50) @ (h + 50).T) @ h @ p,
  of_a_checkpoint=lambda p, h: jax.checkpoint(lambda h: (h + 50) @ p)(h),
)
def test_what_layers_read_behind_other_matmuls_is_in_no_unit_of_its_own(fn, policy):
  found = equations(jax.make_jaxpr(mpjax.autocast(lambda p, x: fn(p, x @ p), policy))(W, DATA))
  adds = [e for e in found if e.primitive.name == "add" and e.outvars[0].aval.shape]
  assert {e.outvars[0].aval.dtype.itemsize for e in adds} == {2}


@both
def test_what_a_matmul_reads_in_no_unit_of_its_own_stays_narrow(policy):
  masked = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), 0.0, -300.0)
  fn = lambda w, x: jax.nn.softmax(x @ w + masked + 100.0) @ w
  first, second = matmuls(mpjax.autocast(fn, policy), W, DATA[:4])
  assert {v.aval.dtype.itemsize for e in (first, second) for v in e.invars} == {2}


def unit(x):
  return x / jnp.linalg.norm(x, axis=1, keepdims=True)


NEAR = array(0.02 * normal(3, 16, 16))
NEARLY_ONE = {
  "cosine_distances": lambda w, x: 1 - unit(x + w[0, 0]) @ unit(x).T,
  "of_pairs": lambda w, x: jnp.diagonal(unit(x + w[0, 0]) @ unit(x).T - 1),
  "diagonal": lambda w, x: 1 - jnp.diag(unit(x + w[0, 0]) @ (4 * unit(x).T) / 4),
  "identity": lambda w, x: (unit(x + w[0, 0]) @ unit(x).T - jnp.eye(16)) * jnp.eye(16),
  "orthogonal": lambda w, x: w.T @ w - jnp.eye(16),
  "by_einsum": lambda w, x: jnp.identity(16) - jnp.einsum("ij,ik->jk", w, w) / 1.0,
  "scaled": lambda w, x: 1.5 * jnp.eye(16) - 1.5 * (w @ w.T),
  "gradient": lambda w, x: jax.grad(lambda w: jnp.sum((w.T @ w - jnp.eye(16)) ** 2))(w),
}


@in_turns(("fn", "policy"), NEARLY_ONE, POLICIES)
def test_what_a_matmul_is_near_to_is_taken_from_what_it_gave_in_float32(fn, policy):
  x = 1 + 0.1 * jax.random.normal(jax.random.key(4), (16, 8))
  found, want = in_both_formats(fn, policy, jnp.eye(16) + NEAR, x)
  np.testing.assert_allclose(found, want, rtol=0.01, atol=0.01 * np.abs(want).max())


@both
def test_a_layer_near_a_number_has_16_bit_products_and_one_near_no_number_a_16_bit_result(policy):
  def layers(w, x):
    h = jnp.tanh(x @ w - 1)
    h = h @ (1 - h @ h[::-1].T)
    bias = -0.5 * jnp.abs(jnp.arange(16)[:, None] - jnp.arange(16))
    return (h @ x.T - bias) @ h

  layer, near, _, scores, _ = matmuls(mpjax.autocast(layers, policy), NEAR, NEAR)
  assert layer.outvars[0].aval.dtype.itemsize == 2
  assert {atom.aval.dtype.itemsize for atom in near.invars} == {2}
  assert near.outvars[0].aval.dtype == jnp.float32
  assert scores.outvars[0].aval.dtype.itemsize == 2


@both
@cases(
  gated=lambda w, x: (x @ w) - (x @ w[::-1]) * jnp.tanh(x @ w),
  jitted=lambda w, x: (x @ w) - jax.nn.silu(x) * (x @ w[::-1]),
  quadratic=lambda w, x: (x @ w) - (x @ w[::-1]) * (x @ (w + 1)),
)
def test_a_difference_of_layers_stays_in_16_bits(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), jnp.eye(4), jnp.ones((2, 4)))
  assert {v.aval.dtype.itemsize for e in found for v in (*e.invars, *e.outvars)} == {2}


STEPS = 6


def rate(p, said, state):
  """A variance with a rate that is a level and little of what a layer said."""
  return jnp.exp(p["level"] + 0.1 * said) + 0.5 * state


def relaxed(p, said, state):
  return state + 0.1 * (p["level"] + 2 * said - state)


def rate_of_numbers(p, said, state):
  return jnp.exp(0.1 * said - 9.5) + 0.5 * state


LEVELS = {
  "rate": (rate, -9.5, 1e-4, lambda h: jnp.log(h) + 9),
  "rate of numbers": (rate_of_numbers, 0.0, 1e-4, lambda h: jnp.log(h) + 9),
  "relaxed": (relaxed, 281.5, 281.0, lambda h: (h - 281.5) / 12),
}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("loop", ["scan", "python"])
@in_turns(("program", "policy"), LEVELS, POLICIES)
def test_a_level_that_a_state_joins_is_float32_though_its_next_turn_reads_it(program, loop, policy):
  update, level, first, read = program
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  keys = jax.random.split(jax.random.key(0), 3)
  p = {
    "in": jax.random.normal(keys[0], (4, 32)) / 2,
    "out": jax.random.normal(keys[1], (32, 1)) / 6,
    "level": jnp.float32(level),
  }
  x = jax.random.normal(keys[2], (STEPS, 64, 3))

  def loss(p, x, cast):
    def turn(state, given):
      seen = cast(jnp.concatenate([given, read(state)[:, None]], -1))
      said = (jnp.tanh(seen @ cast(p["in"])) @ cast(p["out"])).astype(jnp.float32)
      state = update(p, said[:, 0], state)
      return state, state

    state = jnp.full(64, first)
    if loop == "scan":
      _, states = lax.scan(turn, state, x)
    else:
      states = jnp.stack([state := turn(state, given)[0] for given in x])
    return jnp.mean((read(states) - 0.2) ** 2)

  same = lambda a: a
  fns = [
    lambda p, x: loss(p, x, same),
    lambda p, x: loss(p, x, lambda a: a.astype(dtype)),
    mpjax.autocast(lambda p, x: loss(p, x, same), policy),
  ]
  want, hand, got = jax.jit(lambda *given: [jax.grad(fn)(*given) for fn in fns])(p, x)
  flat = lambda tree: jnp.concatenate([*map(jnp.ravel, jax.tree.leaves(tree))])
  error = lambda tree: jnp.linalg.norm(flat(tree) - flat(want))
  assert error(got) <= 1.3 * error(hand)
