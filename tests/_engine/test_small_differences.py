"""Functions of what a layer gave whose terms nearly cancel: as exact as with float32 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy.linalg import expm

import mpjax
from _arrays import array, normal
from _jaxprs import equations
from _turns import in_turns

COMPUTE = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
X = array(normal(0, 12, 64))
SIGNS = array(normal(1, 12, 12))
TARGETS = array(normal(2, 12, 4))
IMAGES = array(np.random.default_rng(3).uniform(size=(12, 12, 12, 1)))
BLUR = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
BLUR = array(BLUR / BLUR.sum())


def parts(h):
  """Inner products of rows, and the products of their squared lengths."""
  lengths = (h**2).sum(1)
  return h @ h.T, lengths[:, None] * lengths[None]


def cosines(h):
  inner, lengths = parts(h)
  return jnp.clip(inner / jnp.sqrt(lengths), -1 + 1e-6, 1 - 1e-6)


def normalized(h):
  units = h / jnp.linalg.norm(h, axis=1, keepdims=True)
  return jnp.clip(units @ units.T, -1 + 1e-6, 1 - 1e-6)


def area(h):
  inner, lengths = parts(h)
  return jnp.sqrt(jnp.maximum(lengths - inner * inner, 1e-12))


def damped(kernel):
  return kernel + 0.1 * jnp.eye(len(kernel))


def solved_kernel(h):
  inner, _ = parts(h / 4)
  return TARGETS.T @ jnp.linalg.solve(damped(inner * (4 - area(h / 4))), TARGETS)


def polynomial_kernel(h):
  kernel = lambda a, b: (a @ b.T / 16 + 1) ** 3
  weights = jnp.linalg.solve(damped(kernel(h[:8], h[:8])), TARGETS[:8])
  return kernel(h[8:], h[:8]) @ weights


def along_axes(x):
  layout = ("NHWC", "HWIO", "NHWC")
  for kernel in (BLUR.reshape(-1, 1, 1, 1), BLUR.reshape(1, -1, 1, 1)):
    x = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
  return x


def convolved(x):
  blur = lambda row: jnp.convolve(row, BLUR, mode="valid")
  return jax.vmap(lambda image: jax.vmap(blur, 1, 1)(jax.vmap(blur)(image)))(x[..., 0])


def by_matrices(x):
  bands = jnp.stack([jnp.roll(jnp.pad(BLUR, (0, 5)), n) for n in range(6)])
  return jnp.einsum("ih,bhwc,jw->bijc", bands, x, bands)


def local_variance(blur):
  def of(h):
    x = jax.nn.sigmoid(jnp.tile(h, (1, 9))).reshape(IMAGES.shape)
    return blur(x**2) - blur(x) ** 2, blur(x * IMAGES) - blur(x) * blur(IMAGES)

  return of


PROGRAMS = {
  "area": lambda h: SIGNS * area(h),
  "angle": lambda h: SIGNS * jnp.arccos(cosines(h)),
  "angle_of_units": lambda h: SIGNS * jnp.arccos(normalized(h)),
  "sine": lambda h: SIGNS * jnp.sqrt(1 - normalized(h) ** 2),
  "solved_kernel": solved_kernel,
  "polynomial_kernel": polynomial_kernel,
  "exponential_of_a_matrix": lambda h: jax.vmap(lambda a: expm(a.reshape(4, 4)))(h),
  "variance_along_axes": local_variance(along_axes),
  "variance_by_convolve": local_variance(convolved),
  "variance_by_matrices": local_variance(by_matrices),
}
ROUNDED_BEFORE = {name for name in PROGRAMS if name.startswith("variance")}
"""Of a sigmoid of what a layer gave, which is float32 by hand."""


def distance(found, want):
  pairs = [*zip(*map(jax.tree.leaves, (found, want)), strict=True)]
  off = sum(jnp.sum((a - b) ** 2) for a, b in pairs)
  return jnp.sqrt(off / sum(jnp.sum(b**2) for _, b in pairs))


@pytest.mark.quick(every=3)
@in_turns(("name", "policy"), [*PROGRAMS], [*COMPUTE])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_as_exact_as_by_hand(name, policy, biased):
  """Of gradients that are taken outside, and inside."""
  w, b = array(normal(4, 64, 16) / 8), jnp.full((1, 16), 0.1)

  def value(p, dtype=jnp.float32):
    h = (X.astype(dtype) @ p["w"].astype(dtype)).astype(jnp.float32)
    return PROGRAMS[name](h + p["b"] if biased else h)

  def gradient(fn, inside=lambda grad: grad):
    loss = lambda p: sum(leaf.sum() / len(leaf) for leaf in jax.tree.leaves(fn(p)))
    return lambda p: inside(jax.grad(loss))(p)["w"]

  def cast(fn):
    return mpjax.autocast(fn, policy)

  def by_hand(p):
    return value(p, COMPUTE[policy])

  most = 6 if name in ROUNDED_BEFORE else 2.5
  for found, hand, want in (
    (cast(value), by_hand, value),
    (gradient(cast(value)), gradient(by_hand), gradient(value)),
    (gradient(value, cast), gradient(by_hand), gradient(value)),
  ):
    own, allowed, exact = (jax.jit(fn)({"w": w, "b": b}) for fn in (found, hand, want))
    assert distance(own, exact) <= most * distance(allowed, exact)


def mass(w):
  return w.sum(0)[:, None]


def mean(w, f):
  return w.T @ f / mass(w)


def at_once(w, f):
  sums = w.T @ jnp.concatenate([f, f**2], axis=1) / mass(w)
  first, second = jnp.split(sums, 2, axis=1)
  return second - first**2


def covariances(w, f):
  mu = mean(w, f)
  second = jnp.einsum("nk,nd,ne->kde", w, f, f) / mass(w)[:, None]
  return second - jnp.einsum("kd,ke->kde", mu, mu)


WEIGHTED = {
  "divided": lambda w, f: w.T @ f**2 / mass(w) - mean(w, f) ** 2,
  "by reciprocals": lambda w, f: (
    w.T @ f**2 * (1 / mass(w)) - (jnp.einsum("nk,nd->kd", w, f) * (1 / mass(w))) ** 2
  ),
  "square divided": lambda w, f: w.T @ f**2 / mass(w) - (w.T @ f) ** 2 / mass(w) ** 2,
  "divided behind": lambda w, f: (w.T @ f**2 - (w.T @ f) ** 2 / mass(w)) / mass(w),
  "masses of the mean": lambda w, f: (w.T @ f**2 - mass(w) * mean(w, f) ** 2) / mass(w),
  "written out": lambda w, f: (
    (w.T @ f**2 - 2 * mean(w, f) * (w.T @ f) + mass(w) * mean(w, f) ** 2) / mass(w)
  ),
  "at once": at_once,
  "covariances": covariances,
}


@pytest.mark.quick(every=3)
@in_turns(("form", "policy"), WEIGHTED, [*COMPUTE])
def test_moments_of_features_may_be_divided_by_the_mass_of_their_weights(form, policy):
  """Of ``E(w, f^2) / n - (E(w, f) / n)^2`` both sums are float32, however n is divided out."""

  def value(p, dtype=jnp.float32):
    x = jnp.concatenate([X, X[::-1] * 0.7]).astype(dtype)
    f, w = ((x @ p[key].astype(dtype)).astype(jnp.float32) for key in "fw")
    return jnp.log(jnp.abs(form(jax.nn.softmax(w), f + 2)) + 0.1).mean()

  params = {k: array(normal(seed, 64, 4) / 8) for seed, k in enumerate("fw", 3)}
  runs = mpjax.autocast(value, policy), lambda p: value(p, COMPUTE[policy]), value
  for key in "fw":
    found, hand, want = jax.jit(lambda p, key=key: [jax.grad(run)(p)[key] for run in runs])(params)
    assert distance(found, want) <= 1.5 * distance(hand, want)


@pytest.mark.parametrize("policy", COMPUTE)
def test_gates_are_no_masses(policy):
  """``a * (w @ h^2) - (b * (w @ h))^2`` is a layer's."""

  def loss(p):
    h, w = X @ p["f"], jax.nn.softmax(X @ p["w"]).T
    gate, other = jax.nn.sigmoid(p["w"][:1]), jax.nn.softplus(p["w"][1:2])
    return jnp.mean((gate * (w @ h**2) - (other * (w @ h)) ** 2) @ p["f"].T)

  params = {k: array(normal(seed, 64, 4) / 8) for seed, k in enumerate("fw", 3)}
  jaxpr = jax.make_jaxpr(mpjax.autocast(loss, policy))(params)
  matmuls = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert {e.invars[0].aval.dtype for e in matmuls} == {jnp.dtype(COMPUTE[policy])}
