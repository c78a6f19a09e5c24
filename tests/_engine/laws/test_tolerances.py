"""Loops to a tolerance, and what is found by them, end when they do in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _backends import rounded
from _both_formats import DATA, W, both, cases, in_both_formats, matmuls, operand_bytes
from _jaxprs import equations

pytestmark = pytest.mark.usefixtures("promotion_of_users")


@both
@cases(
  bisection=lambda w, x: _bisect(x @ w),
  newton=lambda w, x: _until(lambda y: y - (y * y - x @ w) / (2 * y), x @ w),
  fixed_point=lambda w, x: _until(lambda y: jnp.cos(y * 0.5 + 0.1 * (x @ w)), x @ w),
)
def test_a_loop_to_a_tolerance_ends_when_it_does_in_float32(fn, policy):
  w, x = jnp.eye(4), jnp.full((1, 4), 0.707)
  assert abs(int(rounded(mpjax.autocast(fn, policy))(w, x)) - int(fn(w, x))) <= 2


@both
@cases(
  of_all=lambda w, x: _root_tested_by(lambda: jnp.sum((x @ w) ** 2)),
  in_a_function=lambda w, x: _root_tested_by(jax.jit(lambda: jnp.sum((x @ w) ** 2))),
  moved=lambda w, x: _root_tested_by(lambda: jnp.sum((w.T @ x.T) ** 2)),
)
def test_a_loop_multiplies_as_its_test_does(fn, policy):
  """The root of what the loop computes is that of what the test does, or it never ends."""
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)) * 0.5
  assert int(jax.jit(mpjax.autocast(fn, policy))(w, x)) == int(fn(w, x)) < 20


@both
@cases(
  by_an_index=lambda w, h: jnp.argmax(h @ w) != 3,
  by_a_level=lambda w, h: jnp.mean(jax.nn.sigmoid(h @ w)) < 0.9,
)
def test_a_loop_whose_test_seeks_no_residual_multiplies_in_16_bits(fn, policy):
  def loop(w, x):
    more = lambda c: fn(w, c[0]) & (c[1] < 5)
    return lax.while_loop(more, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0))[0]

  found = equations(jax.make_jaxpr(mpjax.autocast(loop, policy))(W, DATA))
  (body,) = (e.params["body_jaxpr"] for e in found if e.primitive.name == "while")
  (matmul,) = (e for e in equations(body) if e.primitive.name == "dot_general")
  assert {a.aval.dtype.itemsize for a in matmul.invars} == {2}


def _root_tested_by(square):
  def test(c):
    return (jnp.abs(c[0] ** 2 - 2 - square()) > 1e-3) & (c[1] < 200)

  def turn(c):
    return 0.5 * (c[0] + (2 + square()) / c[0]), c[1] + 1

  return lax.while_loop(test, turn, (1.0, 0))[1]


def _until(turn, start):
  def body(c):
    return turn(c[0]), jnp.max(jnp.abs(turn(c[0]) - c[0])), c[2] + 1

  return lax.while_loop(lambda c: (c[1] > 1e-4) & (c[2] < 10_000), body, (start, jnp.inf, 0))[2]


def _bisect(h):
  def body(c):
    low, high, n = c
    middle = (low + high) / 2
    up = middle + jnp.tanh(middle) < h
    return jnp.where(up, middle, low), jnp.where(up, high, middle), n + 1

  wide = lambda c: (jnp.max(c[1] - c[0]) > 1e-4) & (c[2] < 10_000)
  return lax.while_loop(wide, body, (h - 4, h + 4, 0))[2]


def power_iteration(a):
  """The largest eigenvalue, in a few turns."""
  v = jnp.sin(jnp.arange(1.0, 1 + len(a)))
  for _ in range(4):
    v = a @ (v / jnp.linalg.norm(a @ v))
  return v


@both
@cases(
  powers=lambda w, x: power_iteration(jnp.exp(-((x[:4, None] - x[None, :4]) ** 2).sum(-1))),
  transposed=lambda w, x: (lambda k: k.T @ (1 / (k @ jnp.sin(x[0]))))(jnp.exp(x)),
  einsum=lambda w, x: (
    lambda k: jnp.einsum("ij,j->i", k, jnp.einsum("ij,i->j", k, jnp.sin(x[:, 0])))
  )(jnp.exp(-(x @ w))),
  in_a_loop=lambda w, x: (
    lambda k: lax.fori_loop(0, 8, lambda _, v: 1 / (k.T @ (1 / (k @ v))), x[0])
  )(jnp.exp(x)),
)
def test_a_float32_matrix_times_what_it_made_is_float32(fn, policy):
  x = 3 + jnp.sin(jnp.arange(64.0)).reshape(16, 4)
  *_, product = matmuls(mpjax.autocast(fn, policy), 0.1 * jnp.eye(4), x)
  assert {v.aval.dtype for v in (*product.invars, *product.outvars)} == {np.dtype(jnp.float32)}


@both
@cases(
  one_example=lambda w, x: jnp.tanh(x[0] @ w) @ w,
  a_row_of_weights=lambda w, x: x @ w[0],
  given=lambda w, x: jnp.tanh(x.T @ x[:, 0]) @ w,
  normalizer=lambda w, x: (lambda q, k: q @ k.sum(0))(
    jax.nn.elu(x @ w) + 1, jax.nn.elu(x @ w.T) + 1
  ),
  one_query=lambda w, x: (lambda h: jax.nn.softmax(h[:1] @ h.T) @ h)(x @ w),
)
def test_a_vector_of_a_layer_is_multiplied_in_16_bits(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), W, jnp.ones((16, 4)))
  assert operand_bytes(found) == {2}


def sinkhorn(cost):
  """A plan of transport, and how many rounds it took."""
  kernel, n = jnp.exp(-cost / 0.05), len(cost)

  def turn(state):
    u, v, _, rounds = state
    u = 1 / n / (kernel @ v)
    v = 1 / n / (kernel.T @ u)
    return u, v, jnp.abs(u * (kernel @ v) - 1 / n).sum(), rounds + 1

  start = jnp.ones(n), jnp.ones(n), jnp.inf, 0
  u, v, _, rounds = lax.while_loop(lambda s: (s[2] > 1e-5) & (s[3] < 2000), turn, start)
  return u[:, None] * kernel * v, rounds


def until_done(cost):
  """The same, which carries whether it is done."""
  kernel, n = jnp.exp(-cost / 0.05), len(cost)

  def turn(state):
    u, v, _, rounds = state
    u = 1 / n / (kernel @ v)
    v = 1 / n / (kernel.T @ u)
    return u, v, jnp.abs(u * (kernel @ v) - 1 / n).sum() < 1e-5, rounds + 1

  start = jnp.ones(n), jnp.ones(n), False, 0
  u, v, _, rounds = lax.while_loop(lambda s: ~s[2] & (s[3] < 2000), turn, start)
  return u[:, None] * kernel * v, rounds


def inverse_root(a):
  """Of Denman and Beavers 1976, by products; and how many rounds it took."""
  a = a + a.T + 16 * jnp.eye(len(a))
  size = jnp.linalg.norm(a)

  def turn(state):
    y, z, _, rounds = state
    middle = 1.5 * jnp.eye(len(a)) - 0.5 * (z @ y)
    next_y = y @ middle
    return next_y, middle @ z, jnp.abs(next_y - y).max(), rounds + 1

  start = a / size, jnp.eye(len(a)), jnp.inf, 0
  _, z, _, rounds = lax.while_loop(lambda s: (s[2] > 1e-6) & (s[3] < 200), turn, start)
  return z / jnp.sqrt(size), rounds


@both
@pytest.mark.parametrize("fn", [sinkhorn, until_done, inverse_root])
def test_a_loop_to_a_tolerance_takes_as_many_rounds_as_in_float32(fn, policy):
  draw = jax.random.uniform(jax.random.key(0), (16, 16))
  (got, rounds), (want, of_float32) = in_both_formats(lambda w, x: fn(x), policy, W, draw)
  assert abs(rounds - of_float32) <= 1
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@both
def test_an_equilibrium_of_layers_is_sought_in_16_bits(policy):
  def fn(w, x):
    turn = lambda s: (jnp.tanh(s[0] @ w + x), jnp.abs(jnp.tanh(s[0] @ w + x) - s[0]).max())
    return lax.while_loop(lambda s: s[1] > 0.1, turn, (x, jnp.inf))[0]

  found = matmuls(mpjax.autocast(fn, policy), 0.1 * W, DATA)
  assert operand_bytes(found) == {2}
