"""Matmuls in distances and variances: what comes back to their ends is a small difference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax
from _arrays import array, normal
from _backends import ROUNDING
from _jaxprs import equations
from mpjax.inspect import explain

POLICIES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
both = pytest.mark.parametrize("policy", POLICIES)
X = array(normal(0, 48, 32))
W1, W2 = array(normal(1, 32, 64) / 32**0.5), array(normal(2, 64, 32) / 8)
NET = {"w1": W1, "w2": W2, "b": array(np.full(32, 3))}


def squares(e):
  return (e**2).sum(-1)


def spread(d):
  """Of near pairs alone: the mean of what is large for them."""
  return jnp.log(jnp.exp(-4 * d / jax.lax.stop_gradient(d.mean())).mean())


def of_modules(e):
  with jax.named_scope("distances"):
    return spread(squares(e)[:, None] + squares(e) - 2 * e @ e.T)


def one_of_a_batch(e):
  return spread(squares(e)[:, None] + squares(e) - 2 * e @ e.T)


DISTANCES = {
  "twice": lambda e: spread(squares(e)[:, None] + squares(e)[None] - 2 * e @ e.T),
  "after": lambda e: spread(squares(e)[:, None] - 2 * (e @ e.T) + squares(e)),
  "einsum": lambda e: spread(
    (e * e).sum(1, keepdims=True) + (e * e).sum(1) - 2 * jnp.einsum("id,jd->ij", e, e)
  ),
  "two": lambda e: (lambda a, b: spread(squares(a)[:, None] + squares(b) - 2 * jnp.dot(a, b.T)))(
    e[:24], e[24:]
  ),
  "jitted": jax.jit(lambda e: spread(squares(e)[:, None] + squares(e) - 2 * e @ e.T)),
  "module": of_modules,
  "batch": lambda e: jax.vmap(one_of_a_batch)(e.reshape(4, 12, 32)).mean(),
  "units": lambda e: (lambda u: jnp.log(jnp.exp(-8 * (1 - u @ u.T)).mean()))(
    e / jnp.linalg.norm(e, axis=1, keepdims=True)
  ),
  "variance": lambda e: (lambda p: jnp.log(p @ e**2 - (p @ e) ** 2).sum())(
    jax.nn.softmax(X[:48, :1] * 4, axis=0).T
  ),
  "mean": lambda e: (lambda p: jnp.log(p @ (e * e) - jnp.square(p @ e)).sum())(
    jnp.full((1, 48), 1 / 48)
  ),
  "covariance": lambda e: (
    lambda m: jnp.linalg.slogdet(e.T @ e / 48 - jnp.outer(m, m) + 0.1 * jnp.eye(32))[1]
  )(e.mean(0)),
  "normalized": lambda e: (lambda u: spread(squares(u)[:, None] + squares(u) - 2 * u @ u.T))(
    e / jnp.linalg.norm(e, axis=1, keepdims=True)
  ),
  "doubled": lambda e: (lambda g: spread(squares(e)[:, None] + squares(e) - (g + g)))(e @ e.T),
  "halved": lambda e: spread(-(e @ e.T - 0.5 * squares(e)[:, None] - 0.5 * squares(e))),
  "norm": lambda e: (lambda n: spread(n[:, None] ** 2 + n**2 - 2 * e @ e.T))(
    jnp.linalg.norm(e, axis=1)
  ),
  "diagonal": lambda e: (lambda g: spread(jnp.diag(g)[:, None] + jnp.diag(g) - 2 * g))(e @ e.T),
  "on_devices": lambda e: jax.shard_map(
    lambda e: jax.lax.pmean(spread(squares(e)[:, None] + squares(e) - 2 * e @ e.T), "d"),
    mesh=jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,)),
    in_specs=P("d"),
    out_specs=P(),
  )(e),
}


def embed(net, x, dtype=None):
  """A network whose matmuls are of a dtype, and whose result is float32."""
  cast = (lambda v: v) if dtype is None else lambda v: v.astype(dtype)
  h = jax.nn.relu(cast(x) @ cast(net["w1"]))
  return (h @ cast(net["w2"]) + cast(net["b"])).astype(jnp.float32)


def off(found, wanted):
  """The norm of the difference of two trees to that of the second."""
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  return np.linalg.norm(flat(found) - flat(wanted)) / np.linalg.norm(flat(wanted))


@pytest.mark.quick(every=3)
@both
@pytest.mark.parametrize("distances", DISTANCES.values(), ids=DISTANCES.keys())
def test_gradients_through_distances_are_as_exact_as_by_hand(distances, policy):
  loss = lambda net, x: distances(embed(net, x))
  by_hand = lambda net, x: distances(embed(net, x, POLICIES[policy]))
  fns = [jax.grad(f) for f in (loss, by_hand, mpjax.autocast(loss, policy))]
  run = jax.jit(lambda *args: [f(*args) for f in fns], compiler_options=ROUNDING)
  with jax.numpy_rank_promotion("allow"):
    exact, hand, ours = jax.device_get(run(NET, X))
  assert off(ours, exact) <= 1.3 * off(hand, exact) + 1e-4


INSIDE = {
  "grad": lambda loss: jax.grad(loss),
  "rematerialized": lambda loss: jax.grad(jax.checkpoint(loss)),
  "per_example": lambda loss: (
    lambda net, x: jax.vmap(jax.grad(loss), (None, 0))(net, x.reshape(4, 12, 32))
  ),
  "tangents": lambda loss: (
    lambda net, x: jax.jvp(lambda net: loss(net, x), (net,), (jax.tree.map(jnp.ones_like, net),))[1]
  ),
}


@both
@pytest.mark.parametrize("derivative", INSIDE.values(), ids=INSIDE.keys())
def test_derivatives_inside_are_as_exact_as_by_hand(derivative, policy):
  distances = DISTANCES["twice"]
  loss = derivative(lambda net, x: distances(embed(net, x)))
  by_hand = derivative(lambda net, x: distances(embed(net, x, POLICIES[policy])))
  fns = loss, by_hand, mpjax.autocast(loss, policy)
  run = jax.jit(lambda *args: [f(*args) for f in fns], compiler_options=ROUNDING)
  with jax.numpy_rank_promotion("allow"):
    exact, hand, ours = jax.device_get(run(NET, X))
  assert off(ours, exact) <= 1.3 * off(hand, exact) + 3e-4


@both
def test_they_multiply_in_16_bits_and_their_derivative_in_float32(policy):
  loss = lambda net, x: DISTANCES["after"](embed(net, x))
  with jax.numpy_rank_promotion("allow"):
    jaxpr = jax.make_jaxpr(jax.grad(mpjax.autocast(loss, policy)))(NET, X)
    report = explain(loss, policy, NET, X)
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  gram = [e for e in products if e.outvars[0].aval.shape == (48, 48)]
  back = [e for e in products if (48, 48) in {v.aval.shape for v in e.invars}]
  assert [{v.aval.dtype for v in e.invars} for e in gram] == [{np.dtype(POLICIES[policy])}]
  assert len(back) == 2
  assert {v.aval.dtype for e in (*gram, *back) for v in e.outvars} == {np.dtype(jnp.float32)}
  assert {v.aval.dtype for e in back for v in e.invars} == {np.dtype(jnp.float32)}
  others = [e for e in products if e not in gram and e not in back]
  assert {v.aval.dtype for e in others for v in e.invars} == {np.dtype(POLICIES[policy])}
  assert report.narrow_share == 1 and report.keeps_promise


@both
@pytest.mark.parametrize("kernel", ["gram", "two"])
def test_data_that_parameters_scale_are_as_exact_as_data(kernel, policy):
  def likelihood(p, x):
    z = x / jnp.exp(p["scales"])
    other = z if kernel == "gram" else p["points"] / jnp.exp(p["scales"])
    d = squares(z)[:, None] + squares(other) - 2 * z @ other.T
    if kernel == "two":
      return jnp.exp(-d / 64).mean()
    c = jnp.linalg.cholesky(jnp.exp(-d / 64) + 0.1 * jnp.eye(48))
    return jnp.log(jnp.diagonal(c)).sum()

  p = {"scales": jnp.linspace(-0.1, 0.1, 32), "points": X[:8] + 3.5}
  fns = [jax.value_and_grad(f) for f in (likelihood, mpjax.autocast(likelihood, policy))]
  with jax.numpy_rank_promotion("allow"):
    exact, ours = jax.jit(lambda p, x: [f(p, x) for f in fns], compiler_options=ROUNDING)(p, X + 3)
  assert off(ours, exact) < 1e-4


@both
def test_a_variance_by_groups_has_their_sizes(policy):
  sizes = jnp.array([20, 12, 16])

  def variances(p, x):
    h = jnp.tanh(x @ p["w"])
    of_groups = lambda h: jax.lax.ragged_dot(h, p["e"], sizes)
    return (of_groups(h * h) - of_groups(h) ** 2).sum()

  p = {"w": 0.1 * NET["w1"], "e": jnp.full((3, 64, 8), 1 / 64)}
  value, grads = jax.value_and_grad(mpjax.autocast(variances, policy))(p, X)
  want, of_want = jax.value_and_grad(variances)(p, X)
  assert off(value, want) < 0.01 and off(grads, of_want) < 0.02


def cell(weights, x, adjacency):
  """A layer of GraphSAGE: the mean of the neighbors beside a layer."""
  pooled = (adjacency[:, :, None] * x[None]).sum(1) / adjacency.sum(1, keepdims=True)
  return jax.nn.gelu(x @ weights + pooled)


def attended(q, k, v, back):
  """The backward pass of attention, as flash attention writes it."""
  p = jax.nn.softmax(q @ k.T)
  return (p * (back @ v.T - (back * (p @ v)).sum(-1, keepdims=True))) @ k


def quantized(w, x):
  """What the nearest codes of a layer's values give, softly."""
  h = jax.nn.relu(x @ w[0])
  return jax.nn.softmax(2 * h @ w[1].T - squares(h)[:, None] - squares(w[1])) @ w[1] @ w[2]


LAYERS = {
  "neighbors": lambda w, x: cell(w[1], cell(w[0], x, jnp.ones((32, 32))), jnp.ones((32, 32))),
  "masked_mean": lambda w, x: x @ w[0] - (x * jnp.ones((32, 1))).sum(0) / 32,
  "context": lambda w, x: (lambda h: h @ w[1] + (jax.nn.softmax(h @ w[2][0])[:, None] * h).sum(0))(
    jax.nn.relu(x @ w[0])
  ),
  "decayed": lambda w, x: (
    jax.checkpoint(lambda z: jax.nn.logsumexp(z, -1).mean())(jax.nn.relu(x @ w[0]) @ w[1])
    + 1e-4 * (w**2).sum()
  ),
  "energy": lambda w, x: x @ w[0] + squares(x)[:, None],
  "residual": lambda w, x: x + x @ w[0] + (x @ w[1]) ** 2,
  "attention": lambda w, x: attended(x @ w[0], x @ w[1], x @ w[2], x @ w[0]),
  "logits": lambda w, x: (
    lambda z: jax.nn.logsumexp(z - z[jnp.arange(32), jnp.arange(32)][:, None], 1)
  )(jax.nn.relu(x @ w[0]) @ w[1]),
  "hinge": lambda w, x: (lambda s: jnp.maximum(0, 0.2 + s - jnp.diag(s)[:, None]))(
    (x @ w[0]) @ (x @ w[1]).T
  ),
}


@both
@pytest.mark.parametrize("fn", LAYERS.values(), ids=LAYERS.keys())
def test_layers_beside_pools_of_what_they_multiply_are_layers(fn, policy):
  w, x = array(normal(3, 3, 32, 32) / 8), X[:32]
  with jax.numpy_rank_promotion("allow"):
    jaxpr = jax.make_jaxpr(jax.grad(lambda w, x: mpjax.autocast(fn, policy)(w, x).sum()))(w, x)
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert {v.aval.dtype.itemsize for e in products for v in e.invars} == {2}


@both
def test_the_codes_that_a_distance_chooses_are_multiplied_in_16_bits(policy):
  w = array(normal(3, 3, 32, 32) / 8)
  with jax.numpy_rank_promotion("allow"):
    jaxpr = jax.make_jaxpr(mpjax.autocast(quantized, policy))(w, X)
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  formats = [{v.aval.dtype.itemsize for v in e.invars} for e in products]
  assert formats == [{2}, {4}, {2}, {2}]  # the distances are those of the codes as they are


def beside(x, y, *, augmented=False):
  """Squared distances of all x from all y."""
  own, other, one = squares(x)[:, None], squares(y)[:, None], jnp.ones((len(x), 1))
  if augmented:
    left = jnp.concatenate([-2 * x, own, one], 1)
    return left @ jnp.concatenate([y, jnp.ones((len(y), 1)), other], 1).T
  return own - 2 * (x @ y.T) + other.T


def hyperbolic(x, y):
  """The product of points of a hyperboloid, whose first entries are roots, less its sign."""
  x, y = (jnp.concatenate([jnp.sqrt(1 + squares(v))[:, None], v], 1) for v in (x, y))
  signature = jnp.where(jnp.arange(x.shape[1]) == 0, -1.0, 1.0)
  return -(x * signature) @ y.T


NEAR = {
  "of_layers": lambda net, e, other: beside(e, other),
  "in_one_matmul": lambda net, e, other: beside(e, other, augmented=True),
  "in_a_call": lambda net, e, other: (
    squares(e)[:, None] + squares(other)[None] - 2 * (jnp.einsum("id,jd->ij", e, other))
  ),
  "of_centers": lambda net, e, other: beside(e, net["centers"]),
  "of_centers_in_one_matmul": lambda net, e, other: beside(e, net["centers"], augmented=True),
  "hyperbolic": lambda net, e, other: hyperbolic(e, other),
}


class Deep(nn.Module):
  """As many equal layers as run as one function."""

  @nn.compact
  def __call__(self, x):
    for _ in range(5):
      x = nn.gelu(nn.Dense(32)(x))
    return 20 * jnp.tanh(x)


OWN = {
  "squares": squares,
  "inner_product": lambda e: jnp.einsum("id,id->i", e, e),
  "vecdot": lambda e: jnp.vecdot(e, e),
}


@both
@pytest.mark.parametrize("own", OWN.values(), ids=OWN.keys())
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_point_is_none_away_from_itself(own, scale, policy):
  deep = Deep()
  params = deep.init(jax.random.key(0), X)

  def distances(params, x):
    e = scale * deep.apply(params, x)
    return own(e)[:, None] - 2 * e @ e.T + own(e)[None], own(e)

  with jax.numpy_rank_promotion("allow"):
    found, large = jax.jit(mpjax.autocast(distances, policy))(params, X)
  assert (jnp.abs(jnp.diagonal(found)) < 1e-5 * large).all()


def units(e):
  return e / jnp.linalg.norm(e, axis=-1, keepdims=True)


def concordance(a, b):
  """Of two heads, by their covariance and variances."""
  mean = lambda v: v.mean(0)
  apart = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2 + (mean(a) - mean(b)) ** 2
  return (1 - 2 * (mean(a * b) - mean(a) * mean(b)) / apart).mean()


def likelihood(a, b):
  """Of a Gaussian process with a linear kernel of features."""
  factor = jnp.linalg.cholesky(a @ a.T + 0.1 * jnp.eye(48))
  solution = jax.scipy.linalg.cho_solve((factor, True), X[:, 0])
  return (X[:, 0] @ solution / 2 + jnp.log(jnp.diagonal(factor)).sum()) / 48


SMALL = {
  "concordance": concordance,
  "cosine": lambda a, b: (1 - (units(a) * units(b)).sum(-1)).mean(),
  "by_norms": lambda a, b: (
    1 - (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
  ).mean(),
  "near_one": lambda a, b: jnp.log(1 + 1e-4 - units(a) @ units(b).T).mean(),
  "angle": lambda a, b: jnp.arccos(jnp.clip(units(a) @ units(b).T, -1 + 1e-6, 1 - 1e-6)).mean(),
  "likelihood": likelihood,
}


@both
@pytest.mark.parametrize("loss", SMALL.values(), ids=SMALL.keys())
def test_what_is_small_beside_its_terms_is_as_by_hand(loss, policy):
  """Under the default compiler; by hand everything behind the layers is float32."""
  near = X + array(0.03 * normal(3, *X.shape))
  total = lambda net, dtype=None: loss(*(embed(net, x, dtype) for x in (X, near)))
  by_hand = lambda net: total(net, POLICIES[policy])
  with jax.numpy_rank_promotion("allow"):
    pairs = (total, {}), (by_hand, ROUNDING), (mpjax.autocast(total, policy), {})
    runs = [jax.jit(jax.value_and_grad(f), compiler_options=options) for f, options in pairs]
    exact, hand, ours = [jax.device_get(run(NET)) for run in runs]
  assert abs(ours[0] - exact[0]) <= 1.5 * abs(hand[0] - exact[0]) + 2e-3 * abs(exact[0])
  assert off(ours[1], exact[1]) <= 1.5 * off(hand[1], exact[1]) + 2e-3


def beside_norms(e, *others):
  return jnp.concatenate([e, jnp.sqrt(squares(e))[:, None], *others], 1)


FEATURES = {
  "frozen": lambda w, e: beside_norms(e) @ jnp.tile(X[:33], 2),
  "masked": lambda w, e: beside_norms(e) @ (w[1] * jnp.sign(X[:33])),
  "neighbors": lambda w, e: jnp.tile(X, 2)[:, :48] @ beside_norms(e),
  "values": lambda w, e: jax.nn.softmax(e @ e.T) @ beside_norms(e),
  "with_a_one": lambda w, e: beside_norms(e, jnp.ones((48, 1))) @ X[:34],
}


@both
@pytest.mark.parametrize("fn", FEATURES.values(), ids=FEATURES.keys())
def test_norms_among_features_are_features(fn, policy):
  w = array(normal(3, 2, 33, 32))
  with jax.numpy_rank_promotion("allow"):
    layers = lambda w, x: fn(w, jax.nn.relu(x @ w[0, :32]))
    jaxpr = jax.make_jaxpr(mpjax.autocast(layers, policy))(w, X)
  products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert {v.aval.dtype.itemsize for e in products for v in e.invars} == {2}


@pytest.mark.quick(every=3)
@both
@pytest.mark.parametrize("rounding", [{}, ROUNDING], ids=["by_default", "rounded"])
@pytest.mark.parametrize("distances", NEAR.values(), ids=NEAR.keys())
def test_points_that_are_near_are_so(distances, rounding, policy):
  """Of squares of 300 nothing is left but 0.03; whatever XLA leaves out of what rounds."""
  near = X + array(0.01 * normal(3, *X.shape))
  with jax.numpy_rank_promotion("allow"):
    net = NET | {"centers": embed(NET, X)[:16] + 0.01}
    ends = lambda net, dtype=None: (embed(net, x, dtype) for x in (X, near))

    def total(net, dtype=None):
      found = distances(net, *ends(net, dtype))
      return jnp.log(jnp.exp(-found).mean()) + jnp.diagonal(found).mean()

    by_hand = lambda net: total(net, POLICIES[policy])
    pairs = (total, {}), (by_hand, ROUNDING), (mpjax.autocast(total, policy), rounding)
    runs = [jax.jit(jax.value_and_grad(f), compiler_options=options) for f, options in pairs]
    exact, hand, ours = [jax.device_get(run(net)) for run in runs]
  assert abs(ours[0] - exact[0]) <= 1.5 * abs(hand[0] - exact[0]) + 1e-4
  assert off(ours[1], exact[1]) <= 1.3 * off(hand[1], exact[1]) + 1e-3
