"""Recurrences without a network are as exact as in float32; networks in loops stay narrow."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import softmax

import mpjax
from _arrays import array, normal
from _backends import ROUNDING
from _both_formats import (
  DATA,
  POLICIES,
  W,
  both,
  cases,
  in_both_formats,
  loss,
  matmuls,
  operand_bytes,
)
from _turns import in_turns
from mpjax.inspect import explain

pytestmark = pytest.mark.usefixtures("promotion_of_users")


CHAIN = array(softmax(normal(0, 4, 4), -1))
SKEW = array([[0.0, 1.0], [-1.0, 0.0]])


def value_iteration(p, r):
  turn = lambda _, v: jnp.max(r[:, None] + 0.99 * (p @ v)[:, None] * jnp.array([1.0, 0.9]), 1)
  return lax.fori_loop(0, 1000, turn, jnp.zeros(4))


def conjugate_gradients(p, r):
  normal = p.T @ p + 0.1 * jnp.eye(4)
  return jax.scipy.sparse.linalg.cg(lambda v: normal @ v, r, tol=1e-6)[0]


LINEAR = {
  "policy_evaluation": lambda p, r: lax.fori_loop(
    0, 1000, lambda _, v: r + 0.99 * (p @ v), jnp.zeros(4)
  ),
  "value_iteration": value_iteration,
  "to_a_tolerance": lambda p, r: lax.while_loop(
    lambda s: jnp.abs(s[0] - s[1]).max() > 1e-5,
    lambda s: (r + 0.98 * (p @ s[0]), s[0]),
    (r, jnp.zeros(4)),
  )[0],
  "to_a_residual": lambda p, r: lax.while_loop(
    lambda s: (jnp.linalg.norm(r - (jnp.eye(4) + p) @ s[0]) > 1e-4) & (s[1] < 2000),
    lambda s: (s[0] + 0.2 * (r - (jnp.eye(4) + p) @ s[0]), s[1] + 1),
    (jnp.zeros(4), 0),
  ),
  "einsum": lambda p, r: lax.fori_loop(
    0, 1000, lambda _, v: r + 0.99 * jnp.einsum("ij,j->i", p, v), jnp.zeros(4)
  ),
  "jitted": lambda p, r: lax.fori_loop(
    0, 1000, lambda _, v: jax.jit(lambda v: r + 0.99 * (p @ v))(v), jnp.zeros(4)
  ),
  "scan": lambda p, r: lax.scan(
    lambda v, _: (r + 0.99 * (p @ v), None), jnp.zeros(4), None, length=1000
  )[0],
  "rotation": lambda p, r: lax.fori_loop(
    0, 600, lambda _, x: x + 0.01 * (SKEW @ x), r[:2] * p[0, 0]
  ),
  "covariance": lambda p, r: lax.fori_loop(
    0, 300, lambda _, s: 0.99 * (p @ s @ p.T) + 0.01 * jnp.eye(4), jnp.diag(r)
  ),
  "conjugate_gradients": conjugate_gradients,
}


@both
@cases(**LINEAR)
def test_a_long_linear_recurrence_is_as_exact_as_in_float32(fn, policy):
  found = in_both_formats(fn, policy, CHAIN, jnp.arange(1.0, 5.0))
  for got, want in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(got, want, rtol=0.03, atol=0.01 * np.abs(want).max())


STEP = array([[1.0, 0.05], [0.0, 1.0]])
CONTROL = array([[0.00125], [0.05]])
LINKS = array(softmax(3 * normal(1, 24, 24), 0))


def driven(turns, u):
  """Where a mass is that is pushed so."""
  return lax.scan(lambda x, u: (STEP @ x + CONTROL @ u, x), jnp.array([1.0, 0.5]), u[:turns])


WITHOUT_LAYERS = {
  "controls": (
    lambda u, x: driven(60, u[:, None])[0] - jnp.array([6.0, 4.0]),
    array(np.full(60, 2)),
  ),
  "controls_by_index": (
    lambda u, x: (
      lax.fori_loop(0, 60, lambda i, s: STEP @ s + CONTROL @ u[i], jnp.array([1.0, 0.5])) - 6
    ),
    array(np.full((60, 1), 2)),
  ),
  "controls_of_a_batch": (
    lambda u, x: jax.vmap(lambda u: driven(60, u)[0])(u) - jnp.array([6.0, 4.0]),
    array([np.full((60, 1), 2), np.full((60, 1), 1)]),
  ),
  "filter": (
    lambda k, x: lax.scan(
      lambda s, y: (STEP @ s + k * (y - s[0]), None), jnp.ones(2), jnp.arange(60.0)
    )[0],
    array([0.4, 0.3]),
  ),
  "controls_long": (lambda u, x: driven(200, u[:, None])[0] - 30, array(np.full(200, 2))),
  "path": (lambda u, x: driven(40, u[:, None])[1], array(np.full(40, 2))),
  "learned_damping": (
    lambda p, x: lax.fori_loop(0, 50, lambda _, r: p * (x @ r) + (1 - p) / 24, jnp.ones(24) / 24),
    array(0.85),
  ),
  "learned_rewards": (
    lambda r, x: lax.fori_loop(0, 40, lambda _, v: r + 0.99 * (x.T @ v), jnp.zeros(24)),
    array(np.linspace(-1, 1, 24)),
  ),
}


@both
@pytest.mark.parametrize(("fn", "p"), WITHOUT_LAYERS.values(), ids=WITHOUT_LAYERS)
def test_a_recurrence_in_which_no_layer_is_is_exact_though_parameters_drive_it(fn, p, policy):
  loss = lambda p, x: jnp.sum(fn(p, x) ** 2)
  got, want = in_both_formats(loss, policy, p, LINKS)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  both_formats = [mpjax.autocast(loss, policy), loss]
  run = jax.jit(lambda *args: [jax.grad(f)(*args) for f in both_formats], compiler_options=ROUNDING)
  got, want = run(p, LINKS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
  report = explain(loss, policy, p, LINKS)
  assert not report.leaks and {row.reason.split(":")[0] for row in report.wide} == {
    "linear recurrence"
  }


def joseph(p, x):
  """A Kalman filter with learned dynamics, in the form that keeps its covariance symmetric."""

  def turn(state, y):
    s, c = p["f"] @ state[0], p["f"] @ state[1] @ p["f"].T + 0.1 * jnp.eye(3)
    gain = jnp.linalg.solve(p["h"] @ c @ p["h"].T + 0.1 * jnp.eye(2), p["h"] @ c).T
    rest = jnp.eye(3) - gain @ p["h"]
    s = s + gain @ (y - p["h"] @ s)
    return (s, rest @ c @ rest.T + 0.1 * (gain @ gain.T)), s

  return lax.scan(turn, (jnp.zeros(3), jnp.eye(3)), x[:48].reshape(24, 2))[1]


def regulator(p, x):
  """The cost to go of a linear regulator, by Riccati's recursion."""
  a, b = p["f"], p["h"].T

  def turn(c, _):
    gain = jnp.linalg.solve(jnp.eye(2) + b.T @ c @ b, b.T @ c @ a)
    return jnp.eye(3) + a.T @ c @ (a - b @ gain), None

  return lax.scan(turn, jnp.eye(3), None, length=60)[0]


def least_squares(p, x):
  """Recursive least squares, whose covariance nothing but division keeps small."""

  def turn(state, row):
    c, w = state
    cx = c @ row
    gain = cx / (p["forget"] + row @ cx)
    return ((c - jnp.outer(gain, cx)) / p["forget"], w + gain * (row.sum() - row @ w)), w

  return lax.scan(turn, (100 * jnp.eye(4), jnp.zeros(4)), x.reshape(-1, 4))[1]


@both
@pytest.mark.parametrize("fn", [joseph, regulator, least_squares])
def test_a_recursion_that_solves_is_float32_with_learned_matrices_too(fn, policy):
  f = jnp.array([[0.99, 0.1, 0.0], [0.0, 0.98, 0.1], [0.0, 0.0, 0.97]])
  p = {"f": f, "h": jnp.array([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]]), "forget": jnp.array(0.99)}
  loss = lambda p, x: jnp.sum(fn(p, x) ** 2)
  x = jax.random.normal(jax.random.key(0), (120,))
  fns = [jax.value_and_grad(f) for f in (mpjax.autocast(loss, policy), loss)]
  got, want = jax.jit(lambda p, x: [f(p, x) for f in fns], compiler_options=ROUNDING)(p, x)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@both
@cases(
  heads=lambda w, x: lax.scan(
    lambda a, w: (a + jax.nn.softmax((x @ w) @ (x @ w).T) @ (x @ w), None), jnp.zeros((8, 4)), w
  )[0],
  latents=lambda w, x: lax.scan(
    lambda h, w: (h + jax.nn.softmax(nn.standardize(h) @ (x @ w).T) @ (x @ w), None), x[:2], w
  )[0],
  modulated=lambda w, x: lax.scan(lambda h, w: (h + jnp.tanh(h) * (x @ w), None), x, w)[0],
  ensemble=lambda w, x: lax.scan(lambda a, w: (a + x @ w, None), jnp.zeros((8, 4)), w)[0],
)
def test_layers_of_what_every_turn_is_given_stay_narrow(fn, policy):
  w = 0.1 * jax.random.normal(jax.random.key(0), (24, 4, 4))
  found = matmuls(mpjax.autocast(fn, policy), w, DATA)
  assert operand_bytes(found) == {2}


@both
@cases(
  decoded=lambda w, x: lax.scan(
    lambda s, _: (jnp.linalg.qr(s)[0], jax.nn.gelu(s[:8] @ w[0]) @ w[1]), w[0], None, length=20
  )[1],
  equilibrium=lambda w, x: lax.while_loop(
    lambda s: s[1] > 0.1,
    lambda s: (h := jnp.tanh(s[0] @ (w[0] / jnp.linalg.norm(w[0])) + x), jnp.abs(h - s[0]).max()),
    (x, jnp.inf),
  )[0],
)
def test_networks_in_loops_that_factor_matrices_stay_narrow(fn, policy):
  w, x = 0.1 * jax.random.normal(jax.random.key(0), (2, 32, 32)), jnp.ones((8, 32))
  found = matmuls(mpjax.autocast(lambda p, w, x: fn(w * p, x), policy), 1.0, w, x)
  layers = [e for e in found if 8 in e.outvars[0].aval.shape]
  assert layers and operand_bytes(layers) == {2}


def soap(w, basis, x):
  """A training step in a basis that is factored anew in each of them."""
  grad = jax.grad(lambda w: jnp.mean((jax.nn.gelu(x @ w[0]) @ w[1]) ** 2))(w)
  return w - 0.1 * basis @ (basis.T @ grad), jnp.linalg.qr(jnp.tanh(basis) + 0.1)[0]


def test_a_network_that_is_trained_in_a_basis_of_its_own_stays_narrow():
  w, x = 0.1 * jax.random.normal(jax.random.key(0), (2, 32, 32)), jnp.ones((8, 32))
  fn = lambda w, x: lax.fori_loop(0, 20, lambda _, s: soap(*s, x), (w, jnp.eye(32)))[0]
  found = matmuls(mpjax.autocast(fn, "mixed_bfloat16"), w, x)
  layers = [e for e in found if 8 in e.outvars[0].aval.shape]
  assert layers and operand_bytes(layers) == {2}


@both
def test_a_frozen_network_in_a_loop_to_a_time_stays_narrow(policy):
  def flow(p, base, x):
    layer = lambda h: h + 0.1 * jnp.tanh(nn.standardize(h) @ base[0] + h @ p) @ base[1]
    return lax.while_loop(lambda s: s[1] < 1.0, lambda s: (layer(s[0]), s[1] + 0.1), (x, 0.0))[0]

  w = 0.1 * jax.random.normal(jax.random.key(0), (2, 4, 4))
  found = matmuls(mpjax.autocast(flow, policy), W, w, DATA)
  assert operand_bytes(found) == {2}


@both
def test_a_learned_readout_makes_no_layer_of_what_it_reads(policy):
  turn = lambda w: lambda s, u: (STEP @ s + CONTROL @ u, w @ s)
  fn = lambda p: lax.scan(turn(p["w"]), jnp.ones(2), p["u"])[1]
  p = {"w": jnp.ones((3, 2)), "u": jnp.ones((60, 1))}
  found = [
    {a.aval.dtype.itemsize for a in e.invars} for e in matmuls(mpjax.autocast(fn, policy), p)
  ]
  assert sorted(map(tuple, found)) == [(2,), (4,)]


@both
@cases(
  layers=lambda w, x: lax.scan(lambda h, w: (h + 0.5 * (h @ w), None), x, w)[0],
  shared=lambda w, x: lax.scan(lambda h, _: (h @ w[0], None), x, None, length=24)[0],
  driven=lambda w, x: lax.scan(lambda h, u: (h @ w[0] + u @ w[1], h), x, jnp.ones((24, 8, 4)))[1],
  propagated=lambda w, x: lax.scan(
    lambda h, _: (0.9 * (LINKS[:8, :8] @ h) + 0.1 * (x @ w[0]), None), x @ w[0], None, length=24
  )[0],
)
def test_a_recurrence_of_layers_stays_narrow(fn, policy):
  w = 0.1 * jax.random.normal(jax.random.key(0), (24, 4, 4))
  found = matmuls(mpjax.autocast(fn, policy), w, DATA)
  assert operand_bytes(found) == {2}


@both
@cases(
  residual=lambda b, w, x: lax.scan(lambda h, w: (h + jnp.tanh(h) @ w, None), x, w)[0],
  biases=lambda b, w, x: lax.scan(
    lambda h, wb: (h + jax.nn.relu(h / 2 + wb[1]) @ wb[0], None), x, (w, b)
  )[0],
)
def test_frozen_layers_are_layers(fn, policy):
  w, b = 0.1 * jax.random.normal(jax.random.key(0), (24, 4, 4)), jnp.ones((24, 4))
  found = matmuls(mpjax.autocast(fn, policy), b, w, DATA)
  assert operand_bytes(found) == {2}


def followed(w, z):
  """A Kalman filter of two numbers: its gain multiplies what it carries, and depends on it."""
  f, h = jnp.array([[1.0, 0.1], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.5, 1.0]])

  def turn(c, z):
    m, p = f @ c[0], f @ c[1] @ f.T + 1e-3 * jnp.eye(2)
    gain = p @ h.T @ jnp.linalg.inv(h @ p @ h.T + 0.1 * jnp.eye(2))
    return (m + gain @ (z - h @ m), (jnp.eye(2) - gain @ h) @ p), m

  return lax.scan(turn, (jnp.array([900.0, 0.0]), 10 * jnp.eye(2)), jnp.tile(z, 2)[:60] * 300)[1]


rotated = lambda turns, x: lax.fori_loop(0, turns, lambda _, x: x + 0.01 * (SKEW @ x), x)
SHORTER = {
  "of_a_parameter": lambda p, r: rotated(600, p[0, :2]),
  "of_data": lambda p, r: p[0, 0] * rotated(100, r[:2]),
  "in_a_loop": lambda p, r: lax.fori_loop(0, 32, lambda _, x: rotated(16, x), p[0, :2]),
  "filter": followed,
}


@both
@cases(**SHORTER)
def test_what_loops_hand_on_is_exact_whoever_began_it_and_in_loops_together(fn, policy):
  found, want = in_both_formats(fn, policy, CHAIN, 1 + jnp.arange(64.0)[:, None] % 2)
  np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


TURNS = array(np.eye(4) + 0.01 * normal(2, 512, 4, 4))
STATES = lambda u, v: (v[0] @ u[0], (v[0] @ u[1][..., None])[..., 0] + v[1])
ASSOCIATIVE = {
  "products": lambda p, a: lax.associative_scan(lambda u, v: v @ u, a)[-1],
  "einsum": lambda p, a: lax.associative_scan(lambda u, v: jnp.einsum("tij,tjk->tik", v, u), a)[-1],
  "reverse": lambda p, a: lax.associative_scan(jnp.matmul, a, reverse=True)[0],
  "states": lambda p, a: lax.associative_scan(STATES, (a, a[..., 0]))[1][-1],
  "of_a_parameter": lambda p, a: lax.associative_scan(jnp.matmul, jnp.broadcast_to(p, a.shape))[-1],
  "power": lambda p, a: jnp.linalg.matrix_power(a[0], 500),
  "jitted": lambda p, a: lax.associative_scan(jax.jit(lambda u, v: v @ u), a)[-1],
  "checkpointed": lambda p, a: lax.associative_scan(jax.checkpoint(lambda u, v: v @ u), a)[-1],
  "squared_again": lambda p, a: lax.fori_loop(0, 9, lambda _, c: c @ c, a[0]),
  "in_a_function": lambda p, a: jax.vmap(lambda a: lax.associative_scan(jnp.matmul, a)[-1])(
    a[None]
  ),
}


@in_turns(("fn", "policy"), ASSOCIATIVE, POLICIES)
def test_a_linear_recurrence_by_an_associative_scan_is_as_exact_as_in_float32(fn, policy):
  found, want = in_both_formats(fn, policy, TURNS[0], TURNS)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


NOT_LINEAR = {
  "recurrent_network": lambda w, x: lax.scan(
    lambda h, u: (jnp.tanh(h @ w + u), None), jnp.zeros(4), x
  )[0],
  "flow": lambda w, x: lax.fori_loop(
    0, 200, lambda _, h: h + 0.01 * (jax.nn.relu(h @ w) @ w), x[0]
  ),
  "equilibrium": lambda w, x: lax.while_loop(
    lambda h: jnp.sum(h) < 1e3, lambda h: jax.nn.standardize(h @ w + h), x[:2]
  ),
  "short": lambda w, x: lax.fori_loop(0, 16, lambda _, h: h @ w, x),
  "activation_that_is_carried": lambda w, x: lax.scan(
    lambda c, u: ((v := 0.9 * c[0] + 0.1 * (c[1] @ w + u), jnp.tanh(v)), None), (x[0], x[0]), x
  )[0],
  "spikes": lambda w, x: lax.scan(
    lambda c, u: (
      (v := 0.9 * c[0] * (1 - c[1]) + c[1] @ w + u, jax.jit(lambda v: (v > 1) * 1.0)(v)),
      None,
    ),
    (x[0], x[0]),
    x,
  )[0],
  "trained_by_hand": lambda w, x: lax.scan(
    lambda s, u: (s - 0.1 * jnp.outer(u, u @ s - u), None), w, x @ w
  )[0],
  "network_trained_by_hand": lambda w, x: lax.fori_loop(
    0,
    200,
    lambda _, p: (
      (h := jax.nn.relu(x[:8] @ p[0])),
      (e := h @ p[1] - x[:8]),
      (p[0] - 0.01 * x[:8].T @ ((e @ p[1].T) * (h > 0)), p[1] - 0.01 * h.T @ e),
    )[-1],
    (w, w),
  ),
  "delta_rule": lambda w, x: lax.scan(
    lambda s, u: (s + jnp.outer(u - s @ (k := jax.nn.standardize(u @ w)), k), s @ u),
    jnp.zeros((4, 4)),
    x[:64] @ w,
  )[1],
  "layers": lambda w, x: lax.scan(
    lambda h, own: (h + h @ own, None), x, jnp.broadcast_to(w, (200, 4, 4))
  )[0],
  "training": lambda w, x: lax.fori_loop(
    0, 200, lambda _, v: v - 0.1 * jax.grad(lambda v: jnp.mean((x @ v) ** 2))(v), w
  ),
}


@both
@cases(**NOT_LINEAR)
def test_matmuls_of_networks_in_long_loops_stay_narrow(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), 0.1 * jnp.eye(4), jnp.ones((200, 4)))
  assert found and all(a.aval.dtype.itemsize == 2 for eqn in found for a in eqn.invars)


def filtered(w, x):
  """A Kalman filter: its gain depends on what it carries, as what that multiplies."""
  f, h = jnp.array([[1.0, 0.1], [0.0, 1.0]]), jnp.array([[1.0, 0.0]])

  def turn(c, z):
    m, p = f @ c[0], f @ c[1] @ f.T + 1e-3 * jnp.eye(2)
    gain = p @ h.T @ jnp.linalg.inv(h @ p @ h.T + 0.1)
    return (m + gain @ (z - h @ m), p - gain @ (h @ p)), None

  return lax.scan(turn, (jnp.array([900.0, 0.0]), jnp.eye(2)), x)[0][0]


def quasi_newton(w, x):
  """BFGS on a quadratic: its matrix changes by outer products."""
  gradient = lambda y: jnp.sum(jnp.stack([jnp.full(4, 9.0), jnp.arange(1.0, 5)]), 0) * (y - 3)

  def turn(c):
    y, b, n = c
    step = -0.5 * jnp.linalg.solve(b, gradient(y))
    d, bs = gradient(y + step) - gradient(y), b @ step
    rank_two = jnp.outer(d, d) / jnp.sum(d * step) - jnp.outer(bs, bs) / jnp.sum(step * bs)
    return y + step, b + jnp.where(jnp.sum(d * step) > 1e-9, rank_two, 0.0), n + 1

  more = lambda c: (jnp.abs(gradient(c[0])).max() > 1e-2) & (c[2] < 60)
  y, _, n = lax.while_loop(more, turn, (x[0, 0] + jnp.arange(4.0), 20 * jnp.eye(4), 0))
  return jnp.append(y, n)


@both
@cases(filtered=filtered, quasi_newton=quasi_newton)
def test_matmuls_of_nothing_but_data_in_loops_are_float32(fn, policy):
  z = 1000 + jnp.arange(200.0).reshape(200, 1) / 10
  found, want = in_both_formats(fn, policy, W, z)
  np.testing.assert_allclose(found, want, rtol=1e-3)


@both
def test_so_it_does_where_its_parameters_are_made_inside(policy):
  def trained(seed, x):
    def step(w, n):
      target = lambda w: jnp.mean((jnp.tanh(x @ w[0]) @ w[1] - x) ** 2)
      return jax.tree.map(lambda a, g: a - 0.1 * g, w, jax.grad(target)(w)), n

    return lax.scan(step, (seed * jnp.eye(4), seed * jnp.eye(4)), jnp.arange(200))[0]

  found = matmuls(mpjax.autocast(trained, policy), 0.5, DATA)
  assert len(found) > 4 and {v.aval.dtype.itemsize for e in found for v in e.invars} == {2}


@both
def test_a_layer_that_a_loop_trains_stays_narrow(policy):
  def trained(w, x):
    step = lambda n, w: w - 0.1 * jax.grad(loss)(w, lax.dynamic_slice_in_dim(x, n % 4, 4))
    return lax.fori_loop(0, 64, step, w)

  found = matmuls(mpjax.autocast(trained, policy), W, DATA)
  assert {v.aval.dtype.itemsize for e in found for v in e.invars} == {2}


LENGTH, NUMBERS = 40, 4


def in_turn(move):
  """The last state of a scan that moves one by what layers said of every turn."""
  turn = lambda h, said: (move(said[0], h, said[1]), None)
  return lambda a, u: lax.scan(turn, jnp.ones((8, NUMBERS)), (a, u))[0]


def at_once(a, u, wrap=lambda joined: joined):
  """The same by an associative scan."""
  times = lambda a, h: jnp.einsum("tbij,tbj->tbi", a, h)
  joined = wrap(lambda first, then: (then[0] @ first[0], times(then[0], first[1]) + then[1]))
  a, u = lax.associative_scan(joined, (a, u))
  return a[-1].sum(-1) + u[-1]


TRANSITIONS = {
  "einsum": in_turn(lambda a, h, u: jnp.einsum("bij,bj->bi", a, h) + u),
  "from_the_right": in_turn(lambda a, h, u: jnp.einsum("bj,bji->bi", h, a) + u),
  "vmap": in_turn(lambda a, h, u: jax.vmap(jnp.matmul)(a, h + u)),
  "written_out": in_turn(lambda a, h, u: (a * h[:, None]).sum(-1) + u),
  "at_once": at_once,
  "at_once_in_a_jit": lambda a, u: at_once(a, u, jax.jit),
}
DIAGONAL = {
  "diagonal": in_turn(lambda a, h, u: a[:, 0] * h + u),
  "diagonal_at_once": lambda a, u: lax.associative_scan(
    lambda first, then: (first[0] * then[0], first[1] * then[0] + then[1]), (a[:, :, 0], u)
  )[1][-1],
}
MOVED = {name: (array(np.eye(NUMBERS)), state) for name, state in TRANSITIONS.items()} | {
  name: (1.0, state) for name, state in DIAGONAL.items()
}
NEAR_ONE = {
  "tanh": lambda one, a: 0.95 * one + 0.01 * jnp.tanh(a),
  "number": lambda one, a: 0.95 * one + 0.01 * a,
  "taken_away": lambda one, a: one - 0.01 * (a - 0.5),
}


@pytest.mark.quick(every=3)
@in_turns(("moved", "near_one", "policy"), MOVED, NEAR_ONE, POLICIES)
def test_a_state_that_layers_move_is_as_exact_as_by_hand(moved, near_one, policy):
  """What they say of each turn is near one, and multiplied before the loop by nothing."""
  one, state = moved
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  keys = jax.random.split(jax.random.key(7), 3)
  x = jax.random.normal(keys[0], (LENGTH, 8, 6))
  p = [
    jax.random.normal(keys[1], (6, NUMBERS**2)) / 3,
    jax.random.normal(keys[2], (6, NUMBERS)) / 30,
  ]

  def of(layer):
    a = layer(p[0]).reshape(LENGTH, 8, NUMBERS, NUMBERS)
    return state(near_one(one, a), layer(p[1]))

  exact = lambda x: of(lambda w: x @ w)
  by_hand = lambda x: of(lambda w: (x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32))
  fns = (exact, by_hand, mpjax.autocast(lambda p, x: of(lambda w: x @ w), policy))
  run = jax.jit(lambda x: [fns[0](x), fns[1](x), fns[2](p, x)], compiler_options=ROUNDING)
  want, hand, found = run(x)
  error = lambda y: jnp.linalg.norm(y - want)
  assert error(found) <= 1.5 * error(hand)
