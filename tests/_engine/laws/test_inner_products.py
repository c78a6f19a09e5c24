"""Inner products and weighted sums are sums of products, not matmuls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint

import mpjax
from _arrays import array
from _both_formats import DATA, POLICIES, W, both, in_both_formats, loss, matmuls
from _jaxprs import wide_contractions
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


INNER = {
  "matmul": lambda a, b: a[0] @ b[0],
  "vdot": jnp.vdot,
  "einsum": lambda a, b: jnp.einsum("td,td->t", a, b),
  "of_columns": lambda a, b: jnp.einsum("td,td->d", a, b),
  "tensordot": lambda a, b: jnp.tensordot(a, b, 2),
  "turned": lambda a, b: jnp.einsum("td,dt->", a, b.T),
  "mapped": lambda a, b: jax.vmap(jnp.dot)(a, b),
  "jitted": lambda a, b: jax.jit(jnp.vdot)(a, b),
}


@in_turns(("fn", "policy"), INNER, POLICIES)
def test_an_inner_product_is_a_sum_of_products(fn, policy):
  """1e-4 squared is 0 in float16, and 300 squared infinite."""
  sizes = jnp.array([1e-4, 300.0])[:, None, None]
  program = lambda w, x: jax.vmap(lambda size: fn(size * (x @ w), size * x))(sizes)
  x = jnp.arange(1.0, 17).reshape(4, 4) / 16
  found, want = in_both_formats(program, policy, jnp.eye(4), x)
  np.testing.assert_allclose(found, want, rtol=0.01)


QUADRATIC = {
  "left": lambda w, s: w @ s @ w,
  "right": lambda w, s: w @ (s @ w),
  "einsum": lambda w, s: jnp.einsum("i,ij,j->", w, s, w),
  "scaled": lambda w, s: jnp.vdot(w, 2 * (s @ w)) / 2,
}


@both
@pytest.mark.parametrize("form", QUADRATIC.values(), ids=QUADRATIC.keys())
def test_a_quadratic_form_is_one_sum_of_products(form, policy):
  """A Sharpe ratio: at a variance of 1e-5 and a loss scale of 2**15 a cotangent is 1e12."""
  returns = 0.003 * jax.random.normal(jax.random.key(0), (120, 10)) + 0.0004
  covariance, means = jnp.cov(returns.T), returns.mean(0)

  def ratio(w, s):
    w = jax.nn.softmax(w)
    return -(2**15) * jnp.vdot(w, means) / jnp.sqrt(form(w, s))

  w = jax.random.normal(jax.random.key(1), (10,))
  found, want = (jax.grad(f)(w, covariance) for f in (mpjax.autocast(ratio, policy), ratio))
  np.testing.assert_allclose(found, want, rtol=1e-4)


def test_a_bilinear_layer_is_one():
  fn = lambda w, x: jnp.vdot(x[0] @ w, x[0])
  first, _ = matmuls(mpjax.autocast(fn, "mixed_bfloat16"), jnp.eye(4), jnp.ones((4, 4)))
  assert {v.aval.dtype.itemsize for v in first.invars} == {2}


COEFFICIENTS = array([35 / 384, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84])
NHWC = ("NHWC", "HWIO", "NHWC")


def matmuls_of_float32(fn, *args):
  return [e for e in matmuls(fn, *args) if e.invars[0].aval.dtype == jnp.float32]


SUMS = {
  "stages": lambda k, x: jnp.tensordot(
    COEFFICIENTS - COEFFICIENTS[::-1], jnp.stack([x + 9] * 5), 1
  ),
  "einsum": lambda k, x: jnp.einsum(
    "s,sij->ij", COEFFICIENTS - COEFFICIENTS[::-1], 9 + x[None] * k
  ),
  "jitted": lambda k, x: jax.jit(jnp.dot)(
    jnp.array([1.0, -1.0]), jnp.stack([x[0] + 9, x[0] + 9.01])
  ),
  "stencil": lambda k, x: jnp.convolve(1 + x.ravel() / 999, jnp.array([1.0, -2, 1]), "valid"),
  "expectation": lambda k, x: (
    jax.nn.softmax(jnp.ones((4, 512)) * x[:, :1]) @ jnp.linspace(0, 2e5, 512)
  ),
}


@in_turns(("fn", "policy"), SUMS, POLICIES)
def test_a_weighted_sum_is_no_matmul(fn, policy):
  found, want = in_both_formats(fn, policy, jnp.ones((5, 1, 1)), jnp.eye(4))
  np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-5)


@both
def test_a_frozen_network_and_a_short_layer_are_no_weighted_sums(policy):
  frozen = {"conv": jnp.ones((3, 3, 3, 8)), "head": jnp.ones((8, 4))}

  def perceptual(w, x):
    h = lax.conv_general_dilated(x, frozen["conv"], (1, 1), "SAME", dimension_numbers=NHWC)
    return jnp.tanh(h) @ frozen["head"] @ w

  traced = jax.make_jaxpr(mpjax.autocast(perceptual, policy))(W, jnp.ones((1, 4, 4, 3)))
  assert not wide_contractions(traced.jaxpr, policy.removeprefix("mixed_"))
  assert not matmuls_of_float32(mpjax.autocast(lambda w, x: x[0] @ w, policy), W, DATA)


def test_an_adaptive_solver_takes_the_steps_of_float32():
  predator = lambda y, t, p: jnp.stack(
    [p[0] * y[0] - p[1] * y[0] * y[1], p[1] * y[0] * y[1] - y[1]]
  )
  solve = lambda p, y: odeint(predator, y, jnp.linspace(0.0, 4, 3), p, rtol=1e-5, atol=1e-5)[-1]
  found, want = in_both_formats(solve, "mixed_bfloat16", jnp.array([1.1, 0.4]), jnp.full(2, 2.0))
  np.testing.assert_allclose(found, want, rtol=1e-4)


@both
def test_a_head_of_one_output_is_no_inner_product(policy):
  fn = lambda w, x: (x @ w[:, 0], x[:1] @ w[:, :1], jnp.einsum("td,sd->ts", x, x))
  assert {
    v.aval.dtype.itemsize for e in matmuls(mpjax.autocast(fn, policy), W, DATA) for v in e.invars
  } == {2}


@both
def test_the_norm_of_a_parameter_is_differentiated(policy):
  """One operand of the matmul in its derivative is a number that is written out."""
  decay = lambda w, x: loss(w, x) + jnp.vdot(w, w)
  found, want = in_both_formats(jax.grad(decay), policy, W, DATA)
  np.testing.assert_allclose(found, want, rtol=1e-2)
