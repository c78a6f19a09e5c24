"""Solvers inside a loss: what they seek they find, and what is taken again is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from _arrays import array, normal
from _jaxprs import equations

POLICIES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
both = pytest.mark.parametrize("policy", POLICIES)
NET = {
  "w1": array(normal(0, 8, 64) / 8**0.5),
  "w2": array(normal(1, 64, 6) / 8),
}
X = array(normal(2, 40, 8))
Y = array(np.random.default_rng(3).integers(0, 2, 40))


def fitted(update):
  """How many turns it takes to fit a logistic head to features to a tolerance."""

  def turns(p, x, y):
    h = jax.nn.relu(x @ p["w1"]) @ p["w2"]
    inner = lambda w: optax.sigmoid_binary_cross_entropy(h @ w, y).mean() + 0.05 * jnp.sum(w**2)

    def body(carry):
      w, _, n = carry
      g = jax.grad(inner)(w)
      return update(w, g, h), jnp.linalg.norm(g), n + 1

    going_on = lambda carry: (carry[1] > 1e-5) & (carry[2] < 500)
    return jax.lax.while_loop(going_on, body, (jnp.zeros(6), jnp.inf, 0))[2]

  return turns


UPDATES = {
  "gradient_descent": lambda w, g, h: w - 1.0 * g,
  "preconditioned": lambda w, g, h: w - jnp.linalg.solve(h.T @ h / 160 + 0.1 * jnp.eye(6), g),
}


@both
@pytest.mark.parametrize("update", UPDATES)
def test_a_head_that_is_fitted_to_features_reaches_its_tolerance(update, policy):
  turns = fitted(UPDATES[update])
  wanted = int(jax.jit(turns)(NET, X, Y))
  assert wanted < 200
  assert abs(int(jax.jit(mpjax.autocast(turns, policy))(NET, X, Y)) - wanted) <= 5


@both
def test_a_loop_to_a_tolerance_with_layers_multiplies_in_16_bits(policy):
  def fixed_point(p, x):
    turn = lambda c: (jnp.tanh(c[0] @ p["w"] + x @ p["u"]), jnp.abs(c[0]).max(), c[2] + 1)
    return jax.lax.while_loop(lambda c: (c[1] < 0.9) & (c[2] < 9), turn, (x, 0.0, 0))[0]

  p = {"w": jnp.eye(8), "u": jnp.ones((8, 8)) / 8}
  jaxpr = jax.make_jaxpr(mpjax.autocast(fixed_point, policy))(p, X)
  matmuls = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
  assert matmuls
  assert {a.aval.dtype for eqn in matmuls for a in eqn.invars} == {jnp.dtype(POLICIES[policy])}


# Steps that a backward pass takes again ----------------------------------------------------------

FIELD = [
  (array(normal(4, *shape) / shape[0] ** 0.5), array(np.zeros(shape[1])))
  for shape in ((2, 64), (64, 64), (64, 2))
]


def field(p, y):
  for n, (w, b) in enumerate(p):
    y = y @ w + b
    y = jnp.tanh(y) if n < 2 else y
  return y


def adaptive(p, carry):
  """A step of Heun's method, which is taken if its error is small."""
  t, dt, y = carry
  dt = jnp.minimum(dt, 1 - t)
  k1 = field(p, y)
  k2 = field(p, y + dt * k1)
  error = jnp.sqrt(jnp.mean((dt * 0.5 * (k2 - k1)) ** 2)) / 1e-4
  factor = jax.lax.stop_gradient(jnp.clip(0.9 * (error + 1e-8) ** -0.5, 0.3, 3.0))
  is_taken = error < 1
  y = jnp.where(is_taken, y + dt * 0.5 * (k1 + k2), y)
  return jnp.where(is_taken, t + dt, t), dt * factor, y


@jax.custom_vjp
def solve(p, y):
  return _forward(p, y)[0]


def _forward(p, y):
  start = (0.0, 0.3, y, 0)
  more = lambda c: c[0] < 1.0
  *_, end, turns = jax.lax.while_loop(more, lambda c: (*adaptive(p, c[:3]), c[3] + 1), start)
  return end, (p, y, turns)


def _backward(residuals, g):
  p, y, turns = residuals
  chosen = lambda n, new, old: jax.tree.map(lambda a, b: jnp.where(n < turns, a, b), new, old)
  again = lambda carry, n: (chosen(n, adaptive(p, carry), carry), carry)
  _, taken = jax.lax.scan(again, (0.0, 0.3, y), jnp.arange(256))

  def back(carry, step):
    (gt, gy, gp), (before, n) = carry, step
    _, vjp = jax.vjp(adaptive, p, before)
    dp, (*dt, dy) = vjp((*gt, gy))
    return chosen(n, ((*dt,), dy, jax.tree.map(jnp.add, gp, dp)), carry), None

  start = ((0.0, 0.0), g, jax.tree.map(jnp.zeros_like, p))
  (_, gy, gp), _ = jax.lax.scan(back, start, (taken, jnp.arange(256)), reverse=True)
  return gp, gy


solve.defvjp(_forward, _backward)


@pytest.mark.quick(every=3)
@both
@pytest.mark.parametrize("seed", range(3))
def test_an_adaptive_solver_accepts_the_same_steps_in_its_backward_pass(seed, policy):
  y = jax.random.normal(jax.random.key(seed), (2,))
  loss = lambda p: jnp.sum(solve(p, y) ** 2)
  slope = jax.jit(jax.grad(loss))(FIELD)
  found = jax.jit(jax.grad(mpjax.autocast(loss, policy)))(FIELD)
  error = optax.tree.norm(jax.tree.map(jnp.subtract, found, slope))
  assert float(error) < 0.03 * float(optax.tree.norm(slope))


@both
def test_a_bias_that_is_used_twice_is_no_update(policy):
  p = [(jnp.ones((4, 4)), jnp.ones(4))]
  jaxpr = jax.make_jaxpr(mpjax.autocast(lambda p, y: field(p, field(p, y)), policy))(p, X[0, :4])
  sums = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "add"]
  assert [eqn.outvars[0].aval.dtype for eqn in sums] == [POLICIES[policy]] * 2


# What is made of data alone ----------------------------------------------------------------------


def state_space(frequency, t, y):
  """The likelihood of an oscillator (Foreman-Mackey et al. 2017), its Cholesky factor in a scan."""
  w = jnp.exp(frequency)
  x = 0.25 * 15**0.5 * w * jnp.diff(t, prepend=t[:1])
  s, c = jnp.sin(x) / 15**0.5, jnp.cos(x)
  moves = jnp.array([[c + s, -4 * w * s], [4 * s / w, c - s]])
  a = (jnp.exp(-x / 15**0.5)[None, None] * moves).transpose(2, 1, 0)
  h = jnp.tile(jnp.array([1.0, 0.0]), (len(t), 1))
  q = h @ jnp.diag(jnp.array([1.0, w**2]))
  d = jnp.sum(q * h, 1) + 0.01
  p = jnp.einsum("ti,tij->tj", h, a)

  def cholesky(state, row):
    d, p, q, a = row
    c = jnp.sqrt(d - p @ state @ p)
    turned = state @ a.T
    g = (q - p @ turned) / c
    return a @ turned + jnp.outer(g, g), (c, g)

  def forward(f, row):
    p, a, g, c, y = row
    z = (y - p @ f) / c
    return a @ f + g * z, z

  c, g = jax.lax.scan(cholesky, jnp.zeros((2, 2)), (d, p, q, a))[1]
  z = jax.lax.scan(forward, jnp.zeros(2), (p, a, g, c, y))[1]
  return 0.5 * jnp.sum(z**2) + jnp.sum(jnp.log(c))


@both
def test_a_filter_of_few_numbers_is_that_of_float32(policy):
  t = jnp.linspace(0.0, 10.0, 60)
  args = jnp.float32(0.0), t, jnp.sin(t)
  value, slope = jax.jit(jax.value_and_grad(mpjax.autocast(state_space, policy)))(*args)
  wanted, wanted_slope = jax.jit(jax.value_and_grad(state_space))(*args)
  np.testing.assert_allclose(value, wanted, rtol=1e-4)
  np.testing.assert_allclose(slope, wanted_slope, rtol=1e-4)


BANK = array(np.maximum(0, 1 - abs(np.arange(257)[None] / 32 - np.arange(1, 8)[:, None])))


def mel(p, wave):
  """Logarithms of a filter bank of a power spectrum, in a unit that is learned."""
  return p * jnp.log(jnp.abs(jnp.fft.rfft(wave)) ** 2 @ BANK.T + 1e-6)


@both
@pytest.mark.parametrize("peak", [1.0, 20000.0])
def test_a_spectrum_of_16_bit_audio_is_finite(peak, policy):
  wave = array(peak * normal(5, 4, 512))
  unit = jnp.float32(1.0)
  np.testing.assert_allclose(mpjax.autocast(mel, policy)(unit, wave), mel(unit, wave), atol=0.02)


@both
def test_a_curve_divides_by_the_number_that_its_author_wrote(policy):
  def pixels(p, x):
    c = jax.nn.sigmoid(x @ p)
    return jnp.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92).sum()

  jaxpr = jax.make_jaxpr(mpjax.autocast(pixels, policy))(jnp.ones((8, 64)), X)
  quotients = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "div"]
  assert [eqn.outvars[0].aval.dtype for eqn in quotients] == [jnp.float32] * 2


# What is none of these ---------------------------------------------------------------------------


@both
def test_a_state_that_is_given_back_adds_up(policy):
  p = {"count": jnp.full(32, 100.0), "w": array(normal(0, 32, 32) / 600)}
  x = array(normal(1, 32))
  turn = jax.jit(mpjax.autocast(lambda p, x: {**p, "count": p["count"] + x @ p["w"]}, policy))
  state = p
  for _ in range(50):
    state = turn(state, x)
  wanted = 50 * x @ p["w"]
  np.testing.assert_allclose(state["count"] - 100, wanted, atol=0.02 * float(jnp.abs(wanted).max()))


@both
def test_a_vector_steps_by_a_preconditioner(policy):
  p = {"w": array(normal(0, 32)), "inverse": jnp.eye(32) / 100}
  x = array(normal(1, 64, 32))
  step = lambda p: p["w"] - p["inverse"] @ (x.T @ (x @ p["w"] - 1) / 64)
  change, wanted = mpjax.autocast(step, policy)(p) - p["w"], step(p) - p["w"]
  assert float(jnp.linalg.norm(change - wanted)) < 0.02 * float(jnp.linalg.norm(wanted))


@both
def test_what_a_rollout_predicts_is_read_in_its_own_unit(policy):
  p = {"w": jnp.eye(32), "r": jnp.full((32, 1), 31.25).at[0].set(34.25)}

  def total(p, state):
    def body(carry):
      state, total, is_done, n = carry
      state = jax.nn.relu(state @ p["w"])
      reward = (state @ p["r"])[:, 0]
      return state, total + reward, is_done | (reward < 0), n + 1

    start = state, jnp.zeros(2), jnp.zeros(2, bool), 0
    return jax.lax.while_loop(lambda c: ~jnp.all(c[2]) & (c[3] < 5), body, start)[1]

  found = mpjax.autocast(total, policy)(p, jnp.ones((2, 32)))
  np.testing.assert_array_equal(found, total(p, jnp.ones((2, 32))))


@both
def test_attention_to_a_cache_stays_narrow_in_a_loop_that_ends_by_a_flag(policy):
  def decode(p, h, memory):
    keys = memory @ p["k"]

    def body(carry):
      h, is_done, n = carry
      weights = jax.nn.softmax(jnp.einsum("bd,btd->bt", h @ p["q"], keys))
      h = jnp.tanh(jnp.einsum("bt,btd->bd", weights, keys) @ p["o"])
      return h, is_done | (h[:, 0] > 0.99), n + 1

    start = h, jnp.zeros(2, bool), 0
    return jax.lax.while_loop(lambda c: ~jnp.all(c[1]) & (c[2] < 5), body, start)[0]

  p = {name: jnp.eye(16) for name in "kqo"}
  jaxpr = jax.make_jaxpr(mpjax.autocast(decode, policy))(p, jnp.ones((2, 16)), jnp.ones((2, 9, 16)))
  matmuls = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
  assert len(matmuls) == 5
  assert {a.aval.dtype for eqn in matmuls for a in eqn.invars} == {jnp.dtype(POLICIES[policy])}


@both
def test_weights_that_are_scaled_in_a_function_stay_narrow_in_a_loop_to_a_tolerance(policy):
  def refine(p, x, quantized):
    w = jax.jit(lambda q: q.astype(jnp.float32) / 127)(quantized)
    turn = lambda c: (jnp.tanh(jnp.tanh(c[0] @ w) @ w), jnp.abs(c[0]).max(), c[2] + 1)
    return p * jax.lax.while_loop(lambda c: (c[1] > 0.1) & (c[2] < 9), turn, (x, 1.0, 0))[0]

  args = jnp.float32(1.0), X, jnp.ones((8, 8), jnp.int8)
  jaxpr = jax.make_jaxpr(mpjax.autocast(refine, policy))(*args)
  matmuls = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
  assert len(matmuls) == 2
  assert {a.aval.dtype for eqn in matmuls for a in eqn.invars} == {jnp.dtype(POLICIES[policy])}


DENSE = array([[0.6, 0.2, 0.3], [0.9, -0.3, 0.2], [1.0, 0.1, -0.2], [0.5, 0.6, 0.1]])


@both
@pytest.mark.parametrize("argnums", [(), 0], ids=["data", "parameter"])
def test_newton_finds_an_event_on_a_dense_output(argnums, policy):
  """Four stages that no layer had part in, weighed at a time that a loop to a tolerance seeks."""

  def event(rate, y):
    stages = jnp.stack([jnp.sin(rate * y * s) + 1 for s in (1.0, 1.1, 1.2, 1.3)])
    at = lambda t: y + (t * DENSE[:, 0] + t**2 * DENSE[:, 1] + t**3 * DENSE[:, 2]) @ stages

    def turn(carry):
      t, _, n = carry
      off, slope = jax.jvp(lambda t: at(t)[0] - y[0] - 1.4, (t,), (1.0,))
      return t - off / slope, jnp.abs(off), n + 1

    going_on = lambda carry: (carry[1] > 1e-5) & (carry[2] < 60)
    t, _, n = jax.lax.while_loop(going_on, turn, (jnp.float32(0.5), jnp.inf, 0))
    return jnp.append(at(t), t), n

  for y in (jnp.array([0.3, 1.0]), jnp.array([20.3, 1.0])):
    found, turns = jax.jit(mpjax.autocast(event, policy, argnums=argnums))(1.0, y)
    want, wanted = jax.jit(event)(1.0, y)
    assert abs(int(turns) - int(wanted)) <= 1
    np.testing.assert_allclose(found, want, rtol=1e-5)
