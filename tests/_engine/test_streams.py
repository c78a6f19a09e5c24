"""What is as narrow as by hand: residual streams, what is moved, cached, stored or dispatched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import mpjax
from _arrays import array, normal
from _jaxprs import equations, wide_contractions

W = array(0.3 * normal(0, 3, 16, 16))
X = array(normal(1, 8, 16))
FORMATS = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
both = pytest.mark.parametrize("policy", FORMATS)

ACTIVATIONS = {
  "elu": nn.elu,
  "selu": nn.selu,
  "celu": nn.celu,
  "softplus": nn.softplus,
  "log_sigmoid": nn.log_sigmoid,
  "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
  "squared_relu": lambda x: jnp.square(nn.relu(x)),
  "snake": lambda x: x + jnp.sin(x) ** 2,
  "squareplus": nn.squareplus,
}


def traced(fn, policy, *args):
  return equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(*args))


def dtypes(found, name, shape):
  return [
    e.outvars[0].aval.dtype.name
    for e in found
    if e.primitive.name == name and e.outvars[0].aval.shape == shape
  ]


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_that_joins_a_stream_of_16_bits_is_rounded(activation):
  def network(w, x):
    x = x @ w[0]
    return (x + activation(x @ w[1])) @ w[2]

  policy = "mixed_bfloat16"
  assert dtypes(traced(network, policy, W, X), "add", X.shape)[-1] == "bfloat16"
  scale = jnp.abs(want := network(W, X)).max()
  np.testing.assert_allclose(mpjax.autocast(network, policy)(W, X), want, atol=0.03 * scale)


def divergence(w, x):
  mean, log_variance = x @ w[0], x @ w[1]
  return 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance)


@both
def test_what_no_matmul_reads_is_added_in_float32(policy):
  """Of the terms of a divergence near zero, each about one, little is left."""
  got = mpjax.autocast(divergence, policy)(0.03 * W, X)
  m, v = [(X @ w).astype(FORMATS[policy]).astype(jnp.float32) for w in 0.03 * W[:2]]
  want = 0.5 * jnp.sum(jnp.expm1(v) - v + m**2)
  np.testing.assert_allclose(got, want, rtol=0.05)


@pytest.mark.parametrize(
  "activation",
  [
    lambda h: jnp.expm1(h) - h,
    lambda h: jnp.cumsum(nn.log_sigmoid(h + 5) - (h + 5), 1) / 100,
    lambda h: (lambda h: h - jnp.log1p(h))(jnp.abs(h)),
    lambda h: nn.softplus(2 * h.T).T - 2 * h,
  ],
)
def test_what_is_taken_from_what_it_was_computed_from_is_exact(activation):
  policy = "mixed_bfloat16"
  x = (0.03 * X).astype(policy[6:]).astype(jnp.float32)
  network = lambda w, x: activation(x @ w) @ jnp.eye(16)
  got, want = (f(jnp.eye(16), x) for f in (mpjax.autocast(network, policy), network))
  np.testing.assert_allclose(got, want, atol=0.01 * jnp.abs(want).max())


@both
@pytest.mark.parametrize("cut", [lambda s: s[..., :-1], lambda s: s.T[:-1].T])
def test_a_softmax_that_is_cut_before_a_matmul_stores_16_bits(cut, policy):
  """An attention with a sink: one more score, whose weight is dropped."""

  def attention(w, x):
    h = x @ w[0]
    scores = jnp.concatenate([h @ h.T, jnp.zeros((8, 1))], 1)
    return jnp.sum(cut(nn.softmax(scores)) @ h)

  _, pullback = jax.vjp(mpjax.autocast(attention, policy), W, X)
  stored = {leaf.dtype.name for leaf in jax.tree.leaves(pullback) if leaf.shape == (8, 9)}
  assert stored <= {FORMATS[policy], "bool"}


KEPT = array(np.random.default_rng(2).uniform(size=(8, 8)) < 0.9, bool)
MASKS = {
  "select": lambda s: lax.select(KEPT, s, jnp.zeros_like(s)),
  "mask": lambda s: jnp.where(KEPT, s, 0.0),
  "padding": lambda s: jnp.where(jnp.arange(8)[:, None] < 6, s, 0.0).T,
}


@both
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_softmax_of_which_a_mask_leaves_some_stores_16_bits(mask, policy):
  def attention(w, x):
    h = x @ w[0]
    return mask(nn.softmax(h @ h.T / 4)) @ h

  got, pullback = jax.vjp(mpjax.autocast(attention, policy), W, X)
  want, exact = jax.vjp(attention, W, X)
  stored = {leaf.dtype.name for leaf in jax.tree.leaves(pullback) if leaf.shape == (8, 8)}
  assert stored <= {FORMATS[policy], "bool"}
  pairs = [(got, want), *zip(pullback(want), exact(want), strict=True)]
  for found, wanted in pairs:
    np.testing.assert_allclose(found, wanted, atol=0.02 * float(jnp.abs(wanted).max()))


@both
@pytest.mark.parametrize(
  "compute",
  [
    lambda s: s * jnp.sum(s, 0, keepdims=True),
    lambda s: jax.jit(lambda s: s - 1 / 8)(s),
    lambda s: (s / jnp.max(s)) * 2.0,
    lambda s: jnp.where(KEPT, s / 0.9, 0.0),
  ],
)
def test_a_softmax_of_which_more_is_computed_rounds_behind_that(compute, policy):
  def attention(w, x):
    h = x @ w[0]
    return compute(nn.softmax(h @ h.T)) @ h

  *_, last = [e for e in traced(attention, policy, W, X) if e.primitive.name == "div"]
  assert last.outvars[0].aval.dtype == jnp.float32


def test_a_quotient_that_only_a_number_brings_into_range_does_not_round_before():
  x = jnp.full((1, 2), 12.0)
  for bring in (lambda q: q * 0.1, lambda q: jnp.where(x > 0, q * 0.1, 0.0)):
    fn = lambda w, x, bring=bring: bring(jnp.exp(x) / 2) @ w
    got, want = (f(jnp.eye(2) / 100, x) for f in (mpjax.autocast(fn, "mixed_float16"), fn))
    np.testing.assert_allclose(got, want, rtol=2e-3)


@both
def test_a_checkpoint_in_a_loop_stores_what_a_matmul_reads_in_16_bits(policy):
  def loss(w, x):
    unit = x @ w[0]
    unit = unit / jnp.linalg.norm(unit, axis=1, keepdims=True)
    part = jax.checkpoint(lambda u, v: jnp.sum(nn.log_sigmoid(u @ v.T)))
    return lax.scan(lambda n, v: (n + part(unit, v), None), 0.0, jnp.stack([X, X, X]))[0]

  _, pullback = jax.vjp(mpjax.autocast(loss, policy), W, X)
  narrow = [x for x in jax.tree.leaves(pullback) if x.dtype == FORMATS[policy]]
  assert any(leaf.shape == X.shape for leaf in narrow)
  remats = [e for e in traced(loss, policy, W, X) if "remat" in e.primitive.name]
  assert {a.aval.dtype.name for e in remats for a in e.invars[:1]} == {FORMATS[policy]}


@both
def test_the_cache_of_a_beam_search_is_as_narrow_as_what_is_written(policy):
  def search(w, tokens):
    def turn(carry, n):
      cache, tokens, scores = carry
      x = w[0][tokens]
      cache = lax.dynamic_update_slice(cache, (x @ w[1])[:, None], (0, n, 0))
      h = jnp.einsum("bd,btd->bt", x, cache) @ w[2][:12]
      logits = nn.log_softmax(h @ w[0].T) + scores[:, None]
      scores, best = lax.top_k(logits.ravel(), 4)
      return (cache[best // 16], best % 16, scores), tokens

    start = jnp.zeros((4, 12, 16)), tokens, jnp.zeros(4)
    return lax.scan(turn, start, jnp.arange(12))[1]

  written = dtypes(traced(search, policy, W, jnp.arange(4)), "dynamic_update_slice", (4, 12, 16))
  assert written == [FORMATS[policy]]


def dispatched(w, x):
  """Experts whose rows are counted inside, in functions that recur."""

  def layer(x, w):
    sizes = jnp.full((2,), x.shape[0] // 2, jnp.int32)
    return nn.relu(lax.ragged_dot(x, jnp.stack([w, w]), sizes))

  for _ in range(5):
    x = jax.jit(layer)(x, w[0])
  return jnp.sum(x @ w[1])


@both
def test_matmuls_of_experts_return_16_bits(policy):
  found = traced(dispatched, policy, W, X)
  assert not wide_contractions(
    jax.make_jaxpr(mpjax.autocast(dispatched, policy))(W, X), FORMATS[policy]
  )
  experts = [e for e in found if e.primitive.name.startswith("ragged_dot")]
  assert {e.outvars[0].aval.dtype.name for e in experts} == {FORMATS[policy]}
  got, want = (jax.grad(f)(W, X) for f in (mpjax.autocast(dispatched, policy), dispatched))
  np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))


@both
def test_experts_of_integers_may_count_their_rows_inside_of_functions(policy):
  """Their matmuls return float32, and have derivatives of their own that read the counts."""

  def layer(x, w):
    sizes = jnp.full((1,), x.shape[0], jnp.int32)
    return jnp.tanh(
      lax.ragged_dot(jnp.sign(x).astype(jnp.int8).astype(jnp.float32), w[None], sizes)
    )

  def loss(w, x):
    for _ in range(5):
      x = jax.jit(layer)(x, w[0])
    return jnp.sum(x)

  got, want = (jax.jit(jax.grad(f))(W, X) for f in (mpjax.autocast(loss, policy), loss))
  np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))


@both
def test_a_parameter_over_one_number_rounds_where_it_is_multiplied(policy):
  """As a kernel over its norm: rounded before, and divided by what was rounded, it would thrice."""

  def layer(w, x):
    return x @ (w[0] / (x[:2] @ w[0] @ x[:2].T)[0, 1]) @ (w[1] * (x[:2] @ w[1] @ x[:2].T)[0, 1])

  scaled = [e for e in traced(layer, policy, W, X) if e.primitive.name in ("mul", "div")]
  found = {e.outvars[0].aval.dtype.name for e in scaled if e.outvars[0].aval.shape == (16, 16)}
  assert found == {"float32"}
  assert not wide_contractions(jax.make_jaxpr(mpjax.autocast(layer, policy))(W, X), FORMATS[policy])


def root_mean_square(x):
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def layer_norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def normalized(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


NORMS = {"rms": root_mean_square, "layer": layer_norm, "unit": normalized}


@pytest.mark.usefixtures("promotion_of_users")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_a_norm_behind_a_layer_gives_joins_the_stream(norm):
  """As in Gemma and OLMo, in plain code: ``x + norm(layer(norm(x)))``."""

  def network(w, x):
    x = x @ w[0]
    x, _ = lax.scan(lambda x, w: (x + norm(jnp.tanh(norm(x) @ w)), None), x, w)
    return norm(x) @ w[0]

  found = [*traced(network, "mixed_bfloat16", W, X)]
  (loop,) = (e for e in found if e.primitive.name == "scan")
  assert [v.aval.dtype for v in loop.invars if v.aval.shape == X.shape] == [jnp.bfloat16]
  want, got = network(W, X), mpjax.autocast(network, "mixed_bfloat16")(W, X)
  np.testing.assert_allclose(got, want, atol=0.03 * jnp.abs(want).max())


@pytest.mark.usefixtures("promotion_of_users")
@both
@pytest.mark.parametrize(
  "center",
  [
    lambda h: h - h.mean(0),
    lambda h: (h.T - h.mean(0)[:, None]).T,
    lambda h: h[:4] - h[4:].mean(0),
    lambda h: jnp.stack([h, 2 * h]).sum(0) - h.mean(0),
  ],
  ids=["mean", "turned", "of the other half", "of a sum"],
)
def test_what_a_mean_is_taken_from_is_as_exact_as_it(center, policy):
  """A difference of two that were made of one is small beside them."""
  fn = lambda w, x: (lambda c: c.T @ c)(center(x @ w + 8.0)) @ w
  subtractions = [e for e in traced(fn, policy, W[0], X) if e.primitive.name == "sub"]
  assert {e.outvars[0].aval.dtype.itemsize for e in subtractions} == {4}


ACTIVE = {"relu": nn.relu, "silu": nn.silu, "tanh": jnp.tanh, "gelu": nn.gelu}


@pytest.mark.usefixtures("promotion_of_users")
@pytest.mark.parametrize("name", ACTIVE)
def test_a_network_whose_parameters_are_given_stores_no_more_than_by_hand(name):
  """The actor's loss in SAC or TD3: the critic's biases are float32 data."""

  def loss(actor, critic, x, cast=lambda a: a):
    h = cast(x)
    for w, b in (*actor, *critic):
      h = ACTIVE[name](h @ cast(w) + cast(b))
    return h.astype(jnp.float32).mean()

  layers = [(w, jnp.ones(16)) for w in W]
  x = jnp.tile(X, (64, 1))

  def stored(fn):
    _, backward = jax.eval_shape(lambda actor: jax.vjp(lambda a: fn(a, layers, x), actor), layers)
    kept = [a for a in jax.tree.leaves(backward) if a.shape[:1] == (512,)]
    return sum(a.size * a.dtype.itemsize for a in kept)

  narrow = lambda a: a.astype(jnp.bfloat16)
  by_hand = stored(lambda a, c, x: loss(a, c, x, narrow))
  assert stored(mpjax.autocast(loss, "mixed_bfloat16")) <= 1.2 * by_hand
