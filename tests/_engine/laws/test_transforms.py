"""Transforms that the program computes, and phases, are as exact as in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _both_formats import (
  DATA,
  KEYS,
  POLICIES,
  W,
  both,
  cases,
  in_both_formats,
  matmuls,
  operand_bytes,
)
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


@both
@cases(
  drawn=lambda x, b: jnp.sin(6 * x @ (10 * jax.random.normal(jax.random.key(2), (3, 16)))),
  passed=lambda x, b: jnp.cos(6 * jnp.einsum("nd,df->nf", x, b)),
  jitted=lambda x, b: jax.jit(jnp.sin)(6 * x @ b),
  complex_exponential=lambda x, b: jnp.cos(x @ b) + 2 * jnp.sin((x @ b).T).T,
  complex_number=lambda x, b: jnp.exp(6j * (x @ b)).real,
  of_two_parts=lambda x, b: jnp.exp(lax.complex(0 * (x @ b), 6 * (x @ b))).imag,
  tangent=lambda x, b: jnp.arctan(jnp.tan(x @ b) / 8),
  triangle=lambda x, b: (lambda a: jnp.abs(a - jnp.round(a)))(x @ b),
  modulus=lambda x, b: jnp.sin(6.28 * ((x @ b) % 1.0)),
  cardinal=lambda x, b: jnp.sinc(x @ b),
)
def test_phases_of_data_are_exact(fn, policy):
  points = jax.random.uniform(jax.random.key(0), (32, 3))
  frequencies = 10 * jax.random.normal(jax.random.key(1), (3, 16))
  found, want = in_both_formats(lambda w, x, b: w * fn(x, b), policy, 1.0, points, frequencies)
  np.testing.assert_allclose(found, want, atol=1e-3)
  of_parameters = lambda b, x: fn(x, lax.stop_gradient(b))
  found, want = in_both_formats(of_parameters, policy, frequencies, points)
  np.testing.assert_allclose(found, want, atol=1e-3)


@both
def test_the_gradient_of_data_is_of_no_parameter(policy):
  """As the force of a known potential, of whose positions are phases."""
  potential = lambda x: jnp.sum(jnp.cos(x) * x)
  phases = lambda w, x: jnp.sin(30 * jax.grad(potential)(x) @ x.T) @ w
  x = jnp.linspace(-2, 2, 64).reshape(8, 8)
  found = matmuls(mpjax.autocast(phases, policy), jnp.ones((8, 2)), x)
  assert [operand_bytes([eqn]) for eqn in found] == [{4}, {2}]


@both
def test_phases_of_layers_stay_narrow(policy):
  network = lambda w, x: jnp.sin(30 * jnp.sin(30 * x @ w) @ w) @ w
  found = matmuls(mpjax.autocast(network, policy), W, DATA)
  assert operand_bytes(found) == {2}


@both
def test_what_comes_back_to_complex_numbers_is_no_phase(policy):
  """A state space of complex numbers, and a skip around it, behind a layer of three features."""

  def loss(p, x):
    h = x @ p["w"]
    states = h @ p["b"].astype(complex)
    return jnp.mean(((states @ p["c"].astype(complex)).real + p["d"] * h) ** 2)

  p = {"w": jnp.ones((3, 16)), "b": jnp.ones((16, 8)), "c": jnp.ones((8, 16)), "d": jnp.ones(16)}
  x = jnp.ones((24, 3))
  found = {}
  for name, fn in (
    ("inside", lambda f: mpjax.autocast(jax.grad(f), policy)),
    ("outside", lambda f: jax.grad(mpjax.autocast(f, policy))),
  ):
    read = [e for e in matmuls(fn(loss), p, x) if e.outvars[0].aval.dtype.kind != "c"]
    found[name] = operand_bytes(read)
  assert found["inside"] == found["outside"] == {2}


@both
def test_phases_are_so_in_what_a_checkpoint_computes_again(policy):
  """In a second derivative that is taken inside, too."""
  b = jnp.ones((2, 8))

  def loss(w, x):
    network = lambda x: (jnp.tanh(jax.checkpoint(lambda x: jnp.sin(x @ b))(x) @ w) @ w)[0]
    return sum(jnp.trace(jax.hessian(network)(row)) for row in x)

  w, x = jnp.ones((8, 8)), jnp.ones((2, 2))
  for fn in (mpjax.autocast(jax.grad(loss), policy), jax.grad(mpjax.autocast(loss, policy))):
    phases = [e for e in matmuls(fn, w, x) if e.outvars[0].aval.shape == (8,) and is_of_points(e)]
    assert len(phases) > 2 and operand_bytes(phases) == {4}


def is_of_points(eqn):
  """Whether two products are added up to each number."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  return [eqn.invars[0].aval.shape[dim] for dim in contracted] == [2]


second = lambda n: (jnp.eye(n, k=1) - 2 * jnp.eye(n) + jnp.eye(n, k=-1)) * n**2
cosines = lambda n: jnp.cos(jnp.pi / n * (jnp.arange(n)[:, None] + 0.5) * jnp.arange(n))
rows_of = lambda x: jnp.stack([x, x[::-1]])
FIXED = {
  "resized": lambda p, x: jax.image.resize(rows_of(x), (2, 16), "bilinear"),
  "resized_cubic": lambda p, x: jax.image.resize(rows_of(x), (4, 32), "bicubic"),
  "differentiated": lambda p, x: rows_of(x) @ second(len(x)),
  "of_a_vector": lambda p, x: second(len(x)) @ x,
  "of_a_parameter": lambda p, x: second(len(p)) @ p,
  "cosine_transform": lambda p, x: (rows_of(x) @ cosines(len(x)))[:, 1:],
  "jitted": lambda p, x: jax.jit(lambda x: rows_of(x) @ second(len(x)))(x),
  "mapped": lambda p, x: lax.map(lambda x: second(len(x)) @ x, rows_of(x)),
  "made_before_a_jit": lambda p, x: (lambda d: jax.jit(lambda x: rows_of(x) @ d)(x))(second(32)),
  "made_before_a_map": lambda p, x: (lambda d: lax.map(lambda x: d @ x, rows_of(x)))(second(32)),
  "made_before_a_scan": lambda p, x: (
    lambda d: lax.scan(lambda u, _: (u + 1e-5 * (u @ d), None), rows_of(x), None, length=20)[0]
  )(second(32)),
  "energy_gradient": lambda p, x: jax.grad(lambda x: jnp.sum((x @ second(len(p)).T) ** 2))(
    rows_of(x)
  ),
  "image_that_is_sought": lambda p, x: jnp.convolve(p, jnp.array([1.0, -2.0, 1.0]), "valid") * 1e3,
}


@in_turns(("fn", "policy"), FIXED, POLICIES)
def test_a_transform_that_the_program_computes_is_as_exact_as_in_float32(fn, policy):
  x = 1000 + jnp.arange(32.0) ** 2 / 100
  found, want = in_both_formats(fn, policy, x, x)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


@both
@cases(
  grid=lambda w, x: jax.nn.relu(jnp.stack([jnp.linspace(0, 1, 8)] * 4, 1) @ w) @ w,
  made_inside=lambda w, x: (
    x @ jax.random.normal(jax.random.key(0), (4, 4)) @ jax.random.normal(jax.random.key(1), (4, 4))
  ),
  of_a_stream=lambda w, x: jnp.tril(jnp.ones((16, 16))) @ jax.nn.relu(x @ w),
  captured=lambda w, x: jax.nn.relu(x @ KEYS[:4]) @ KEYS[:4],
  resized=lambda w, x: jax.image.resize(jax.nn.standardize(x @ w), (32, 4), "linear") @ w,
  mixed=lambda w, x: lax.scan(
    lambda h, w: (h + cosines(16) @ jax.nn.standardize(h) @ w, None), x @ w, jnp.stack([w, w])
  )[0],
  mixed_in_a_jit=lambda w, x: jax.jit(lambda h: cosines(16) @ h)(jax.nn.standardize(x @ w)) @ w,
  strided=lambda w, x: jax.nn.standardize(x @ w)[::2] @ (w / jnp.linalg.norm(w)),
  of_a_teacher=lambda w, x: jax.nn.relu(x[::2] @ KEYS[:4]) @ w,
  binary=lambda w, x: jnp.sign(x @ w) @ jnp.sign(x @ w).T,
)
def test_layers_of_what_is_computed_or_captured_stay_narrow(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), jnp.eye(4), jnp.ones((16, 4)))
  assert found and {v.aval.dtype.itemsize for e in found for v in e.invars} == {2}
