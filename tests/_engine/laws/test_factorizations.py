"""What is factored, solved or decomposed, and moments and distances by matmuls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _both_formats import DATA, KEYS, POLICIES, W, both, cases, in_both_formats, matmuls
from _turns import in_turns
from mpjax.inspect import explain

pytestmark = pytest.mark.usefixtures("promotion_of_users")


damp = lambda gram: gram + 1e-3 * jnp.eye(len(gram))
FACTORED = {
  "cholesky": lambda h: jnp.diag(jnp.linalg.cholesky(damp(h @ h.T))),
  "eigh": lambda h: jnp.linalg.eigvalsh(damp(h @ h.T)),
  "eigenvalues_to_a_power": lambda h: jnp.linalg.eigh(damp(h @ h.T))[0] ** -0.25,
  "slogdet": lambda h: jnp.linalg.slogdet(damp(h @ h.T))[1],
  "einsum": lambda h: jnp.linalg.cholesky(damp(jnp.einsum("ik,jk->ij", h, h)))[-1],
  "mean": lambda h: jnp.diag(jnp.linalg.cholesky(damp(h @ h.T / 2))),
  "sum": lambda h: jnp.diag(jnp.linalg.cholesky(damp(sum(2 * a @ a.T for a in (h, h[::-1]))))),
  "batched": lambda h: jnp.linalg.eigvalsh(jax.vmap(lambda h: damp(h @ h.T))(jnp.stack([h, h]))),
  "jitted": lambda h: jnp.linalg.eigvalsh(jax.jit(lambda h: damp(h @ h.T))(h)),
  "jitted_factorization": lambda h: jax.jit(jnp.linalg.eigvalsh)(damp(h @ h.T)),
  "mapped": lambda h: lax.map(lambda h: jnp.linalg.eigvalsh(damp(h @ h.T)), jnp.stack([h, h])),
  "in_scan": lambda h: lax.scan(
    lambda g, h: (g + h @ h.T, jnp.linalg.eigvalsh(g)), 1e-3 * jnp.eye(6), jnp.stack([h, h])
  )[1],
  "kernel": lambda h: jnp.diag(jnp.linalg.cholesky(damp(jnp.exp(h @ h.T)))),
  "cond": lambda h: lax.cond(h[0, 0] < 9, jnp.linalg.eigvalsh, lambda g: g[0], damp(h @ h.T)),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), FACTORED, POLICIES)
def test_a_damped_gram_matrix_stays_definite(fn, policy):
  """It has rank two of six: what a rounding adds to it is more than the damping."""
  program = lambda w, x: fn(x @ w[:, :2])
  w = jnp.eye(4) * 0.5
  x = KEYS[:6].astype(mpjax.Policy.parse(policy).compute_dtype).astype(jnp.float32)
  found, want = in_both_formats(program, policy, w, x)
  np.testing.assert_allclose(found, want, rtol=0.01, atol=1e-4)
  for product in matmuls(mpjax.autocast(lambda w, x: fn(x @ w), policy), w, x)[:2]:
    assert {v.aval.dtype.itemsize for v in product.invars} == {2}


@both
def test_what_is_factored_behind_another_matmul_stays_in_16_bits(policy):
  fn = lambda w, x: jnp.linalg.eigvalsh((x @ w) @ x.T)
  first, second = matmuls(mpjax.autocast(fn, policy), W, DATA)
  assert [e.outvars[0].aval.dtype.itemsize for e in (first, second)] == [2, 4]


TIMES = array(np.linspace(0, 3, 64))
normal = lambda v, y: (v.T @ v + 1e-6 * jnp.eye(4), v.T @ y)
SYSTEMS = {
  "solve": lambda v, y: jnp.linalg.solve(*normal(v, y)),
  "inverse": lambda v, y: jnp.linalg.inv(normal(v, y)[0]) @ jnp.sum(v * y[:, None], 0),
  "cholesky": lambda v, y: (
    lambda a, b: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(a), b)
  )(*normal(v, y)),
  "conjugate_gradients": lambda v, y: jax.scipy.sparse.linalg.cg(*normal(v, y), maxiter=40)[0],
}


@in_turns(("fn", "policy"), SYSTEMS, POLICIES)
def test_a_linear_system_of_data_is_solved_as_in_float32(fn, policy):
  """What rounds in a Gram matrix is multiplied by its condition: 30% off in bfloat16."""
  fit = lambda w, t: jnp.sum(jnp.vander(t, 4) * fn(jnp.vander(t, 4), jnp.sin(t)), -1)
  found, want = in_both_formats(fit, policy, W, TIMES)
  np.testing.assert_allclose(found, want, atol=0.01)


orthogonal = lambda w: jnp.linalg.qr(w)[0]
LOW_RANK = array(
  np.outer(np.arange(1, 9), np.arange(3, 9)) + 0.01 * np.cos(np.arange(48)).reshape(8, 6)
)
logarithm = lambda s: (lambda w, v: (v * jnp.log(w)) @ v.T)(*jnp.linalg.eigh(s))
DECOMPOSED = {
  "eigh": lambda m: logarithm(m.T @ m + jnp.eye(6)) - logarithm(m.T @ m + 1.01 * jnp.eye(6)),
  "svd": lambda m: m - (lambda u, s, v: (u[:, :1] * s[:1]) @ v[:1])(*jnp.linalg.svd(m)),
  "qr": lambda m: m - (lambda q: q @ (q.T @ m))(jnp.linalg.qr(m[:, :1])[0]),
  "lu": lambda m: m[:6] - (lambda p, low, up: p @ low @ up)(*jax.scipy.linalg.lu(m[:6])),
  "reflected": lambda m: (lambda q: (jnp.eye(8) - 2 * q @ q.T) @ (m - 2 * q @ (q.T @ m)) - m)(
    jnp.linalg.qr(m[:, :1])[0]
  ),
  "procrustes": lambda m: m @ (lambda u, _, v: u @ v)(*jnp.linalg.svd(m.T @ m)) - m,
  "jitted": lambda m: m - jax.jit(lambda q, m: q @ (q.T @ m))(jnp.linalg.qr(m[:, :1])[0], m),
  "mapped": lambda m: (
    m - jnp.sum(lax.map(lambda q: jnp.outer(q, q @ m), jnp.linalg.qr(m[:, :1])[0].T), 0)
  ),
}


@in_turns(("fn", "policy"), DECOMPOSED, POLICIES)
def test_what_a_decomposition_gives_is_multiplied_in_float32(fn, policy):
  found, want = in_both_formats(lambda w, m: fn(m), policy, W, LOW_RANK)
  np.testing.assert_allclose(found, want, atol=2e-4 * float(jnp.abs(want).max() + 1e-2))


@both
def test_a_gradient_is_turned_into_the_basis_of_its_own_in_float32(policy):
  def turned(w, x):
    g = jax.grad(lambda w: jnp.sum(jnp.tanh(w) * x))(w)
    q = jnp.linalg.eigh(g @ g.T + 1e-3 * jnp.eye(4))[1]
    return x @ (q @ jnp.tanh(9 * (q.T @ g)))

  ops = explain(turned, policy, W, DATA[:4]).ops
  assert sum(op.count for op in ops if op.op == "dot_general" and op.rule == "full") >= 3


def _rnn(w, x):
  return lax.scan(lambda h, u: (jnp.tanh(h @ w + u), None), x[0], x)[0]


@both
@cases(
  layers=lambda w, x: functools.reduce(lambda x, q: jax.nn.relu(x @ q), [orthogonal(w)] * 3, x) @ w,
  recurrent=lambda w, x: _rnn(orthogonal(w), x[:, None]) @ w,
  spectral=lambda w, x: _rnn(w / jnp.linalg.svd(w, compute_uv=False)[0], x[:, None]) @ w,
  cayley=lambda w, x: jax.nn.relu(x @ (jnp.eye(4) + jnp.linalg.inv(jnp.eye(4) + w))) @ w,
  made_inside=lambda w, x: (
    jax.nn.relu(x @ jax.nn.initializers.orthogonal()(jax.random.key(0), (4, 4))) @ w
  ),
)
def test_layers_with_orthogonal_or_normalized_weights_stay_narrow(fn, policy):
  ops = explain(fn, policy, jnp.eye(4), jnp.ones((2, 4))).ops
  found = [op for op in ops if op.op == "dot_general" and op.rule != "traced"]  # of an inverse
  assert sum(op.count for op in found) >= 2 and {op.rule for op in found} == {"lower"}


blur = lambda x: jnp.convolve(x, jnp.full(5, 0.2), "valid")
weigh = lambda p, x: jnp.einsum("ts,sd->td", p, x)
MOMENTS = {
  "convolution": lambda p, x: blur(x[:, 0] ** 2) - blur(x[:, 0]) ** 2,
  "written_first": lambda p, x: -(jnp.square(blur(x[:, 0])) - blur(x[:, 0] * x[:, 0])),
  "covariance": lambda p, x: blur(x[:, 0] * x[:, 1]) - blur(x[:, 0]) * blur(x[:, 1]),
  "weighted": lambda p, x: p @ x**2 - (p @ x) ** 2,
  "deviation": lambda p, x: jnp.sqrt(jnp.maximum(weigh(p, x * x) - weigh(p, x) ** 2, 1e-8)),
  "jitted": lambda p, x: jax.jit(weigh)(p, x * x) - jax.jit(weigh)(p, x) ** 2,
  "scaled": lambda p, x: 8 / 7 * (p @ x**2 / 2 - (p @ x / 2) * (p @ x)),
  "gram": lambda p, x: x.T @ x / len(x) - jnp.outer(x.mean(0), x.mean(0)),
}


@in_turns(("fn", "policy"), MOMENTS, POLICIES)
def test_a_variance_by_matmuls_is_as_exact_as_in_float32(fn, policy):
  """The moments are about 25, and what is left of them a hundredth."""
  x = 5 + 0.1 * jnp.sin(jnp.arange(64.0)).reshape(16, 4)
  p = jax.nn.softmax(jnp.cos(jnp.arange(256.0)).reshape(16, 16))
  found, want = in_both_formats(lambda p, x: fn(jnp.abs(p), x), policy, p, x)
  np.testing.assert_allclose(found, want, rtol=0.03, atol=0.02 * float(jnp.abs(want).max()))


lengths = lambda x: jnp.sum(x**2, -1)
DISTANCES = {
  "written_first": lambda x, y: lengths(x)[:, None] + lengths(y) - 2 * x @ y.T,
  "in_between": lambda x, y: lengths(x)[:, None] - 2 * (x @ y.T) + lengths(y),
  "written_last": lambda x, y: (
    -2 * jnp.einsum("nd,md->nm", x, y) + lengths(x)[:, None] + lengths(y)
  ),
  "scaled_before": lambda x, y: lengths(x)[:, None] + lengths(y) + jnp.dot(-2 * x, y.T),
  "transposed": lambda x, y: (jnp.sum(y * y, 1)[:, None] + jnp.sum(x * x, 1) - 2 * y @ x.T).T,
  "kernel": lambda x, y: jnp.exp(-(lengths(x)[:, None] + lengths(y) - 2 * x @ y.T)),
  "jitted": jax.jit(lambda x, y: lengths(x)[:, None] + lengths(y) - 2 * x @ y.T),
  "lengths_by_einsum": lambda x, y: (lambda of: of(x)[:, None] + of(y) - 2 * x @ y.T)(
    lambda x: jnp.einsum("nd,nd->n", x, x)
  ),
  "lengths_by_norm": lambda x, y: (
    jnp.linalg.norm(x, axis=1)[:, None] ** 2 + jnp.linalg.norm(y, axis=1) ** 2 - 2 * x @ y.T
  ),
  "jitted_lengths": lambda x, y: jax.jit(lengths)(x)[:, None] + jax.jit(lengths)(y) - 2 * x @ y.T,
  "diagonal": lambda x, y: (lambda g: jnp.diag(g)[:, None] + jnp.diag(g)[None] - 2 * g)(x @ x.T),
}


@in_turns(("fn", "policy"), DISTANCES, POLICIES)
def test_squares_of_distances_by_a_matmul_are_as_exact_as_in_float32(fn, policy):
  x = 5 + 0.1 * jnp.sin(jnp.arange(64.0)).reshape(16, 4)
  found, want = in_both_formats(lambda w, x: fn(x, x[::3]), policy, W, x)
  np.testing.assert_allclose(found, want, atol=1e-4)


@both
def test_distances_of_what_is_narrow_already_have_16_bit_products(policy):
  fn = lambda w, x: DISTANCES["written_first"](x @ w, (x + 1) @ w)
  *_, product = matmuls(mpjax.autocast(fn, policy), jnp.eye(4), jnp.ones((4, 4)))
  assert {v.aval.dtype.itemsize for v in product.invars} == {2}
  assert product.outvars[0].aval.dtype == jnp.float32


@both
def test_a_linear_system_of_what_a_layer_gave_is_solved_in_float32(policy):
  """The last layer of a Bayesian network: 16-bit features, whose Gram matrix is inverted."""

  def posterior(w, x):
    features = jnp.tanh(jnp.tanh(x @ w[:4]) @ w[4:])
    precision = features.T @ features / 0.01 + jnp.eye(32)
    return features @ (jnp.linalg.inv(precision) @ (features.T @ (x[:, 0] + 30))) / 0.01

  draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
  w = jnp.concatenate([0.5 * draw(1, 4, 32), 0.3 * draw(2, 32, 32)])
  found, want = in_both_formats(posterior, policy, w, draw(3, 40, 4))
  np.testing.assert_allclose(found, want, atol=0.2 * np.abs(want).max())


@both
def test_a_layer_of_whitened_values_stays_narrow(policy):
  def layer(w, x):
    h = x @ w
    return h @ jnp.linalg.inv(jnp.linalg.cholesky(h.T @ h / 64 + jnp.eye(4)))

  *_, whitened = matmuls(mpjax.autocast(layer, policy), W, jnp.ones((64, 4)))
  assert {atom.aval.dtype.itemsize for atom in whitened.invars} == {2}


@both
def test_what_is_narrow_already_has_a_variance_of_16_bit_products(policy):
  fn = lambda w, x: (lambda h: weigh(h, h * h) - weigh(h, h) ** 2)(x @ w)
  _, second, first = matmuls(mpjax.autocast(fn, policy), jnp.eye(4), jnp.ones((4, 4)))
  assert {v.aval.dtype.itemsize for v in first.invars} == {2}
  assert first.outvars[0].aval.dtype == second.outvars[0].aval.dtype == jnp.float32
