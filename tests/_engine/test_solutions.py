"""What linear systems of features and of data give is multiplied, and what it is multiplied by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from _arrays import array, normal
from _jaxprs import equations

POLICIES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
both = pytest.mark.parametrize("policy", POLICIES)
SUPPORT, QUERIES = array(normal(0, 25, 32) + 2), array(normal(1, 40, 32) + 2)
LABELS = array(np.eye(5)[np.arange(25) % 5])
TARGETS = array(normal(2, 40, 5))
W = array(normal(3, 32, 64) / 6)


def damped(gram):
  return gram + 0.1 * jnp.eye(len(gram))


def whitening(s):
  values, vectors = jnp.linalg.eigh(damped(s.T @ s / len(s)))
  return (vectors * (values**-0.5)[None]) @ vectors.T


SYSTEMS = {
  "factors": lambda s, q: (
    q @ (s.T @ jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(damped(s @ s.T)), LABELS))
  ),
  "factors_of_the_transpose": lambda s, q: (
    q
    @ (
      s.T @ jax.scipy.linalg.lu_solve(jax.scipy.linalg.lu_factor(damped(s @ s.T)), LABELS, trans=1)
    )
  ),
  "dual": lambda s, q: q @ (s.T @ jnp.linalg.solve(damped(s @ s.T), LABELS)),
  "kernel": lambda s, q: (q @ s.T) @ jnp.linalg.solve(damped(s @ s.T), LABELS),
  "einsum": lambda s, q: jnp.einsum(
    "md,dk->mk", q, jnp.einsum("nd,nk->dk", s, jnp.linalg.solve(damped(s @ s.T), LABELS))
  ),
  "inverse": lambda s, q: q @ (jnp.linalg.inv(damped(s.T @ s)) @ (s.T @ LABELS)),
  "inverse_from_the_left": lambda s, q: q @ jnp.linalg.inv(damped(s.T @ s)) @ s.T @ LABELS,
  "projection": lambda s, q: (s @ jnp.linalg.inv(damped(s.T @ s)) @ s.T) @ TARGETS[:25],
  "pseudo_inverse": lambda s, q: q @ jnp.linalg.pinv(damped(s.T @ s)) @ (s.T @ LABELS),
  "correlations": lambda s, q: (lambda s, q: whitening(s) @ (s.T @ q / 25) @ whitening(q))(
    s[:, :16], q[:25, 16:32]
  ),
}


def error(found, want):
  pairs = zip(*map(jax.tree.leaves, (found, want)), strict=True)
  return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.quick(every=2)
@both
@pytest.mark.parametrize("fn", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_what_belongs_to_a_system_of_features_is_as_exact_as_by_hand(fn, policy):
  """Outside of the layer all is float32 by hand; an inverse that rounds is 100 times as far off."""

  def loss(w, dtype=jnp.float32):
    s, q = ((x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32) for x in (SUPPORT, QUERIES))
    return jnp.mean(fn(jnp.tanh(s), jnp.tanh(q)) ** 2)

  losses = loss, lambda w: loss(w, POLICIES[policy]), mpjax.autocast(loss, policy)
  want, by_hand, found = jax.jit(lambda w: [jax.value_and_grad(f)(w) for f in losses])(W)
  assert error(found, want) <= 2 * error(by_hand, want)


@both
@pytest.mark.parametrize("fn", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_a_system_of_data_is_float32(fn, policy):
  program = lambda w, s, q: w[0, 0] * fn(s, q)
  jaxpr = jax.make_jaxpr(mpjax.autocast(program, policy))(W, SUPPORT, QUERIES)
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert products and {v.aval.dtype.itemsize for e in products for v in e.invars} == {4}


def whitened(w, x):
  h = x @ w
  return jax.nn.relu((h - h.mean(0, keepdims=True)) @ whitening(h)) @ w.T


def spectral(w, x):
  """A convolution over a graph by the eigenvectors of its Laplacian."""
  vectors = jnp.linalg.eigh(x @ x.T)[1]
  return (vectors @ (w[:1] * (vectors.T @ (x @ w)))) @ w.T


def attending(w, x):
  """Queries of a layer and keys in the basis of their own."""
  h = x @ w
  u, s, _ = jnp.linalg.svd(h, full_matrices=False)
  return jax.nn.softmax((h[:, :25] @ w[:25, :25]) @ (u * s[None]).T) @ h


def delta_rule(w, x):
  """What the tokens of a chunk write, each less what those before it wrote, and read."""
  k, v = jnp.tanh(x @ w) / 8, x @ w[:, ::-1]
  before = jnp.eye(25) + jnp.tril(k @ k.T, -1)
  turn = jax.scipy.linalg.solve_triangular(before, jnp.eye(25), lower=True, unit_diagonal=True)
  return jnp.tril(v @ k.T) @ (turn @ v)


LAYERS = {
  "delta_rule": (delta_rule, 5),
  "whitened": (whitened, 3),
  "of_whitened_data": (lambda w, x: jnp.tanh((x @ whitening(x)) @ w) @ w.T, 2),
  "of_components": (lambda w, x: jnp.tanh((x @ jnp.linalg.svd(x.T)[0]) @ w) @ w.T, 2),
  "spectral": (spectral, 4),
  "attending": (attending, 3),
}


@both
@pytest.mark.parametrize(("fn", "count"), LAYERS.values(), ids=LAYERS.keys())
def test_layers_beside_and_behind_a_decomposition_stay_narrow(fn, count, policy):
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(W, SUPPORT)
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  narrow = [e for e in products if {v.aval.dtype.itemsize for v in e.invars} == {2}]
  assert len([e for e in narrow if 25 in e.outvars[0].aval.shape]) >= count
