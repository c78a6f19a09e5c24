"""Results of a custom_vjp that a whole batch shares differentiate as without a policy."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

import mpjax
from _jaxprs import contractions, wide_contractions
from _turns import in_turns

POLICIES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


def with_results(more):
  """A matmul with a derivative of its own, and what else it returns of its parameter."""

  @jax.custom_vjp
  def fn(x, w):
    return x @ w, more(w)

  def backward(residuals, cotangents):
    x, w = residuals
    return cotangents[0] @ w.T, jnp.outer(x, cotangents[0])

  fn.defvjp(lambda x, w: (fn(x, w), (x, w)), backward)
  return lambda x, w: fn(x, w)[0]


def nested():
  inner = with_results(lambda w: w.sum())

  @jax.custom_vjp
  def fn(x, w):
    return inner(x, w), w.mean()

  def forward(x, w):
    y, pullback = jax.vjp(inner, x, w)
    return (y, w.mean()), pullback

  fn.defvjp(forward, lambda pullback, cotangents: pullback(cotangents[0]))
  return lambda x, w: fn(x, w)[0]


def differentiated():
  """A rule that differentiates such a function: what JAX leaves of it is transposed."""
  inner = with_results(lambda w: w.sum())

  @jax.custom_jvp
  def fn(x, w):
    return inner(x, w)

  fn.defjvp(lambda primals, tangents: jax.jvp(inner, primals, tangents))
  return fn


def solved():
  """An adjoint by a loop, as solvers of differential equations have, that counts its steps."""
  step = lambda y, w: y + 0.1 * jnp.tanh(y @ w)

  def loop(x, w):
    body = lambda carry: (carry[0] + 1, step(carry[1], w))
    steps, y = lax.while_loop(lambda carry: carry[0] < 4, body, (jnp.int32(0), x))
    return y, {"steps": steps, "done": steps >= 4, "norm": jnp.sqrt(jnp.sum(w**2))}

  solve = jax.custom_vjp(loop)

  def backward(residuals, cotangents):
    x, w = residuals
    trace = [x]
    for _ in range(3):
      trace.append(step(trace[-1], w))
    ys = jnp.stack(trace)

    def body(carry):
      n, ct, total = carry
      ct, dw = jax.vjp(step, ys[n], w)[1](ct)
      return n - 1, ct, total + dw

    carry = (jnp.int32(3), cotangents[0], jnp.zeros_like(w))
    return lax.while_loop(lambda carry: carry[0] >= 0, body, carry)[1:]

  solve.defvjp(lambda x, w: (solve(x, w), (x, w)), backward)
  return lambda x, w: solve(x, w)[0]


def read():
  """Of whose shared result a cotangent comes that JAX can give to what is shared."""

  @jax.custom_vjp
  def fn(x, w):
    return 2.0 * jnp.tanh(x), jnp.sum(w @ w)

  def backward(residuals, cotangents):
    x, w = residuals
    return cotangents[0] * 2.0 * (1.0 - jnp.tanh(x) ** 2), cotangents[1] * 2.0 * (w @ w.T)

  fn.defvjp(lambda x, w: (fn(x, w), (x, w)), backward)
  return lambda x, w: fn(x @ w, w)[0] + 1e-2 * fn(x, w)[1]


FUNCTIONS = {
  "float": with_results(lambda w: w.sum()),
  "integer": with_results(lambda w: jnp.int32(3)),
  "no_numbers": with_results(lambda w: (w > 0, jax.random.key(0))),
  "several": with_results(lambda w: {"a": w.sum(), "b": w @ w, "c": jnp.argmax(w), "d": 1.0}),
  "nested": nested(),
  "scan": lambda x, w: lax.scan(lambda c, _: (FUNCTIONS["several"](c, w), None), x, None, length=2)[
    0
  ],
  "solver": solved(),
  "read": read(),
}


def batched(fn):
  return lambda w, xs: jnp.sum(jnp.sin(jax.vmap(fn, (0, None))(xs, w)))


PLACES = {
  "grad": lambda fn, policy: jax.grad(mpjax.autocast(batched(fn), policy)),
  "grad_inside": lambda fn, policy: mpjax.autocast(jax.grad(batched(fn)), policy),
  "jit": lambda fn, policy: jax.jit(jax.grad(mpjax.autocast(jax.jit(batched(fn)), policy))),
  "checkpoint": lambda fn, policy: jax.grad(mpjax.autocast(jax.checkpoint(batched(fn)), policy)),
  "vmap_outside": lambda fn, policy: jax.grad(batched(mpjax.autocast(fn, policy, argnums=1))),
  "each_row": lambda fn, policy: mpjax.autocast(
    lambda w, xs: jax.vmap(lambda x: jax.grad(lambda w: jnp.sin(fn(x, w)).sum())(w))(xs), policy
  ),
}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_batch_shares_is_differentiated_in_16_bits(name, place):
  narrow_derivative(FUNCTIONS[name], PLACES[place], "mixed_bfloat16")


@pytest.mark.quick(every=3)
@in_turns(("name", "place", "policy"), list(FUNCTIONS), list(PLACES), list(POLICIES), turning=2)
def test_what_a_batch_shares_has_the_gradient_that_it_has_without_a_policy(name, place, policy):
  assert_same_gradient(FUNCTIONS[name], PLACES[place], policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rule_that_differentiates_such_a_function_is_batched_by_rows(policy):
  assert_same_gradient(differentiated(), PLACES["each_row"], policy)


@functools.cache
def gradient_in_float32(fn, place):
  return jax.jit(place(fn, "float32"))(*numbers())


@functools.cache
def numbers():
  w, x = jax.random.normal(jax.random.key(0), (2, 6, 6)) / 3.0
  return w, x[:4]


def narrow_derivative(fn, place, policy):
  jaxpr = jax.make_jaxpr(place(fn, policy))(*numbers())
  assert contractions(jaxpr)
  assert not wide_contractions(jaxpr, POLICIES[policy])
  return jaxpr


def assert_same_gradient(fn, place, policy):
  want = gradient_in_float32(fn, place)
  (got,) = jax.jit(jaxpr_as_fun(narrow_derivative(fn, place, policy)))(*numbers())
  error = jnp.linalg.norm(got - want)
  assert error <= 8 * float(jnp.finfo(POLICIES[policy]).eps) * jnp.linalg.norm(want)
