"""How exact a policy is: weights used often, leaks, norms, softmax, masks, carries, sums, data.

Where Flax has a `dtype=` of its own, its error is the limit.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import mpjax
from _jaxprs import contractions, equations, result_dtypes, wide_contractions
from _turns import in_turns
from zoo import linen_models, nnx_models
from zoo.cases import Batch, Case

# Flax's norms and its 16-bit models mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

COMPUTE = {"mixed_bfloat16": jnp.dtype(jnp.bfloat16), "mixed_float16": jnp.dtype(jnp.float16)}
every_policy = pytest.mark.parametrize("policy", COMPUTE)


def error(found, truth) -> float:
  """The relative distance of two trees, in float64."""
  pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True))
  exact = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
  return float(
    np.sqrt(sum(((a - b) ** 2).sum() for a, b in exact) / sum((b**2).sum() for _, b in exact))
  )


# Parameters that are used often ------------------------------------------------------------------


def scanned(weight, x):
  return lax.scan(lambda total, _: (total + (x @ weight).sum(), None), 0.0, None, length=4000)[0]


def unrolled(weight, x):
  return sum((x @ weight).sum() for _ in range(300))


def scanned_elementwise(weight, x):
  step = lambda total, _: (total + ((x @ x) * weight).sum(), None)
  return lax.scan(step, 0.0, None, length=4000)[0]


USES = {
  "scanned": (scanned, 4000),
  "unrolled": (unrolled, 300),
  "rows": (scanned_elementwise, 4000),
}


@pytest.mark.quick(every=5)
@in_turns(("used", "order", "policy"), USES, ("around", "inside"), reversed(COMPUTE))
def test_a_weight_used_many_times_gets_an_exact_gradient(used, order, policy):
  fn, uses = used
  transforms = [jax.grad, functools.partial(mpjax.autocast, policy=policy)]
  outer, inner = transforms if order == "inside" else transforms[::-1]
  assert outer(inner(fn))(jnp.ones((1, 1)), jnp.ones((1, 1))) == uses


@pytest.mark.quick(every=3)
@every_policy
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_token_seen_4096_times_gets_gradient_4096_where_flax_gets_256(api, policy):
  tokens, table = jnp.zeros(4096, jnp.int32), jnp.ones((4, 1))

  def gradient(dtype=None, policy="float32"):
    if api == "linen":
      embed = mpjax.apply_policy(nn.Embed(4, 1, dtype=dtype), policy)
      loss = lambda table: embed.apply({"params": {"embedding": table}}, tokens).sum()
      return jax.grad(loss)(table)[0, 0]
    embed = nnx.Embed(4, 1, dtype=dtype, rngs=nnx.Rngs(0))
    embed.embedding[...] = table
    loss = lambda embed: embed(tokens).astype(jnp.float32).sum()
    return nnx.grad(loss)(mpjax.apply_policy(embed, policy))["embedding"][...][0, 0]

  assert gradient(policy=policy) == 4096
  assert gradient(COMPUTE[policy]) < 4096


@every_policy
def test_tied_embeddings_get_the_gradients_of_both_uses(policy):
  tokens = jnp.zeros(2048, jnp.int32)

  def loss(table):
    return (table[tokens] @ table.T).sum()

  table = jnp.ones((2, 1))
  grads = jax.grad(mpjax.autocast(loss, policy))(table)
  assert error(grads, jax.grad(loss)(table)) < 1e-6


# Leaks -------------------------------------------------------------------------------------------

TABLE = np.linspace(0, 1, 8, dtype=np.float32)
STRAYS = {
  "numpy_scalar": lambda x: x * np.float32(0.5),
  "numpy_sqrt": lambda x: x / np.sqrt(2.0),
  "numpy_table": lambda x: x + TABLE[None],
  "jax_table": lambda x: x + jnp.asarray(TABLE)[None],
  "astype": lambda x: x.astype(jnp.float32) * 2,
  "softmax": jax.nn.softmax,
  "norm": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
  "where": lambda x: jnp.where(x > 0, x, jnp.float32(-1)),
}


@every_policy
@pytest.mark.parametrize("op", ["dot", "conv"])
@pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS.keys())
def test_a_leak_does_not_reach_the_next_matmul_or_convolution(stray, op, policy):
  def fn(weights, x):
    hidden = stray(x @ weights[0])
    if op == "dot":
      return (hidden @ weights[1].astype(jnp.float32)).sum()
    return lax.conv(hidden[None, None], weights[1][None, None], (1, 1), "SAME").sum()

  args = [jnp.full((8, 8), 0.1), jnp.full((8, 8), 0.2)], jnp.full((8, 8), 0.3)
  jaxpr = jax.make_jaxpr(jax.grad(mpjax.autocast(fn, policy)))(*args)
  assert wide_contractions(jaxpr, COMPUTE[policy].name) == []


# Norms -------------------------------------------------------------------------------------------


class LinenNorm(nn.Module):
  """A projection, then a norm."""

  norm: str
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x):
    options = {"BatchNorm": {"use_running_average": False}, "GroupNorm": {"num_groups": 4}}
    x = nn.Dense(16, use_bias=False, dtype=self.dtype, name="proj")(x)
    return getattr(nn, self.norm)(dtype=self.dtype, **options.get(self.norm, {}))(x)


class NnxNorm(nnx.Module):
  """A projection, then a norm."""

  def __init__(self, norm, dtype=None):
    rngs = nnx.Rngs(0)
    options = {"num_groups": 4} if norm == "GroupNorm" else {}
    self.proj = nnx.Linear(16, 16, use_bias=False, dtype=dtype, rngs=rngs)
    self.norm = getattr(nnx, norm)(16, dtype=dtype, rngs=rngs, **options)

  def __call__(self, x):
    return self.norm(self.proj(x))


@functools.cache
def linen_norm_variables(norm):
  variables = dict(jax.jit(LinenNorm(norm).init)(jax.random.key(0), jnp.zeros((64, 16))))
  return variables | {"params": variables["params"] | {"proj": {"kernel": jnp.eye(16)}}}


def linen_norm(norm, x, dtype=None, policy="float32"):
  """The output of a fresh Linen model whose projection is the identity, and its statistics."""
  model = mpjax.apply_policy(LinenNorm(norm, dtype), policy)
  variables = linen_norm_variables(norm)
  call = jax.jit(lambda x: model.apply(variables, x, mutable=["batch_stats"])).trace(x)
  return call.jaxpr, *call.lower().compile()(x)


def nnx_norm(norm, x, dtype=None, policy="float32"):
  """The same in NNX."""
  model = NnxNorm(norm, dtype)
  model.proj.kernel[...] = jnp.eye(16)
  graph, state = nnx.split(mpjax.apply_policy(model, policy))

  @jax.jit
  def run(x):
    model = nnx.merge(graph, state, copy=True)
    return model(x), nnx.state(model, nnx.BatchStat)

  call = run.trace(x)
  return call.jaxpr, *call.lower().compile()(x)


NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm")


@pytest.mark.quick(every=3)
@in_turns(("norm", "run", "policy"), NORMS, {"linen": linen_norm, "nnx": nnx_norm}, list(COMPUTE))
def test_statistics_are_float32_and_as_good_as_flaxs(norm, run, policy):
  dtype = COMPUTE[policy]
  draw = 8 + np.random.default_rng(0).standard_normal((64, 16))
  x = jnp.asarray(draw, dtype).astype(jnp.float32)  # so that the projection is exact
  jaxpr, ours, stats = run(norm, x, policy=policy)
  _, truth, true_stats = run(norm, x)
  _, by_hand, hand_stats = run(norm, x, dtype=dtype)
  assert result_dtypes(jaxpr, "reduce_sum") == {"float32"}
  assert result_dtypes(jaxpr, "rsqrt") == {"float32"}
  assert error(ours, truth) <= 1.001 * error(by_hand, truth)
  if norm == "BatchNorm":
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stats)} == {"float32"}
    assert error(stats, true_stats) <= max(1e-6, error(hand_stats, true_stats))


class Spectral(nn.Module):
  """A layer divided by its spectral norm."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    return nn.SpectralNorm(nn.Dense(16, dtype=self.dtype), dtype=self.dtype)(x, update_stats=False)


def linen_spectral(x, seed, policy="float32", dtype=None):
  variables = Spectral().init(jax.random.key(seed), x)
  apply = mpjax.apply_policy(Spectral(dtype), policy).apply
  return jax.make_jaxpr(apply)(variables, x), jax.jit(apply)(variables, x)


def nnx_spectral(x, seed, policy="float32", dtype=None):
  rngs = nnx.Rngs(seed)
  layer = nnx.Linear(16, 16, dtype=dtype, rngs=rngs)
  norm = nnx.SpectralNorm(layer, dtype=dtype, update_stats=False, rngs=rngs)
  graph, state = nnx.split(mpjax.apply_policy(norm, policy))
  call = lambda state, x: nnx.merge(graph, state, copy=True)(x)
  return jax.make_jaxpr(call)(state, x), jax.jit(call)(state, x)


@pytest.mark.quick(every=3)
@in_turns(("run", "policy"), {"linen": linen_spectral, "nnx": nnx_spectral}, list(COMPUTE))
def test_a_power_iteration_is_float32_as_flaxs_is(run, policy):
  dtype = COMPUTE[policy]
  ours_off, by_hand_off = [], []
  for seed in range(8):  # a single layer and example says which rounding was lucky
    draw = np.random.default_rng(seed).standard_normal((1, 16))  # not a model's own
    x = jnp.asarray(draw, dtype).astype(jnp.float32)
    jaxpr, ours = run(x, seed, policy=policy)
    (_, truth), (_, by_hand) = run(x, seed), run(x, seed, dtype=dtype)
    ours_off.append(error(ours, truth))
    by_hand_off.append(error(by_hand, truth))
  assert len(wide_contractions(jaxpr, dtype.name)) == 4
  assert len(contractions(jaxpr)) == 5
  assert np.mean(ours_off) <= np.mean(by_hand_off)


@pytest.mark.quick(every=2, start=1)
@every_policy
def test_a_power_iteration_is_float32_in_a_scan_too(policy):
  layer = lambda: nn.SpectralNorm(nn.Dense(16))
  scanned = nn.scan(
    lambda layer, x, _: (layer(x, update_stats=True), None),
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    length=3,
  )

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      return scanned(layer(), x, None)[0]

  x = jnp.ones((2, 16))
  variables = Stack().init(jax.random.key(0), x)

  def statistics(model):
    apply = jax.jit(lambda v: model.apply(v, x, mutable=["batch_stats"])[1])
    return apply(variables)

  found, want = map(statistics, (mpjax.apply_policy(Stack(), policy), Stack()))
  assert error(found, want) < 1e-6


class Quotient(nnx.Module):
  """A weight by its norm, which an array guards from zero."""

  def __init__(self):
    self.kernel, self.u = nnx.Param(jnp.ones((4, 6))), nnx.BatchStat(jnp.ones((1, 6)))

  def __call__(self, x):
    kernel, guard = self.kernel[...], jnp.full((1, 1), 1e-12)
    unit = lambda v: v / jnp.maximum(jnp.sqrt(jnp.sum(v * v, keepdims=True)), guard)
    v = unit(self.u[...] @ kernel.T)
    u = unit(v @ kernel)
    return x @ (kernel / (v @ kernel @ u.T))


@every_policy
def test_a_power_iteration_may_meet_arrays_of_numbers(policy):
  graph, state = nnx.split(mpjax.apply_policy(Quotient(), policy))
  call = lambda state, x: nnx.merge(graph, state, copy=True)(x)
  jaxpr = jax.make_jaxpr(call)(state, jnp.ones((2, 4)))
  assert len(wide_contractions(jaxpr, COMPUTE[policy].name)) == 4
  assert len(contractions(jaxpr)) == 5


class Memory(nnx.Module):
  """Layers that multiply a model's own vectors, but no state of it there and back."""

  def __init__(self, rngs):
    self.state = nnx.BatchStat(jnp.ones((1, 16)))
    self.probe = nnx.Param(jnp.ones((1, 16)))
    self.recurrent, self.query = (nnx.Linear(16, 16, rngs=rngs) for _ in range(2))
    self.norm = nnx.LayerNorm(16, rngs=rngs)
    self.matrix = nnx.Param(jnp.ones((16, 16)))
    self.rngs = rngs.fork()

  def __call__(self, x):
    noise = jax.random.normal(self.rngs.noise(), (1, 16))
    state = self.recurrent(self.recurrent(self.state[...]))
    there_and_back = lambda vector, matrix: vector @ matrix @ matrix.T
    probe, matrix = self.norm(self.probe[...]), self.matrix[...]
    for wrap in (jax.jit, jax.checkpoint):
      state += wrap(there_and_back)(probe, matrix)
    cell = jnp.tanh(self.state[...] @ matrix) @ matrix.T
    return x + state + cell + there_and_back(noise, matrix) + self.query(probe + noise)


@every_policy
def test_parameters_that_are_multiplied_repeatedly_are_16_bit(policy):
  fn = lambda w, x: jnp.sum(w["first"] @ w["hidden"] @ w["hidden"].T * x)
  w = {"first": jnp.ones((1, 16)), "hidden": jnp.ones((16, 16))}
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(w, jnp.ones((1, 16)))
  assert contractions(jaxpr) and wide_contractions(jaxpr, COMPUTE[policy].name) == []


@every_policy
def test_vectors_that_a_model_does_not_multiply_back_are_16_bit(policy):
  graph, state = nnx.split(mpjax.apply_policy(Memory(nnx.Rngs(0)), policy))
  call = lambda state, x: nnx.merge(graph, state, copy=True)(x)
  jaxpr = jax.make_jaxpr(call)(state, jnp.ones((1, 16)))
  assert len(contractions(jaxpr)) == 11 and wide_contractions(jaxpr, COMPUTE[policy].name) == []


@every_policy
def test_a_running_average_of_ones_reaches_one(policy):
  norm = mpjax.apply_policy(nn.BatchNorm(use_running_average=False, momentum=0.99), policy)
  x = jnp.ones((4, 2))
  variables = norm.init(jax.random.key(0), x)

  def step(stats, _):
    _, new = norm.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
    return new["batch_stats"], None

  stats, _ = lax.scan(step, variables["batch_stats"], None, length=1000)
  np.testing.assert_allclose(stats["mean"], 1 - 0.99**1000, rtol=1e-4)


# Softmax, losses, masks --------------------------------------------------------------------------


def ulp(truth, dtype):
  """The distance to the next number of a format."""
  info = jnp.finfo(dtype)
  magnitude = np.maximum(np.abs(truth), float(info.smallest_normal))
  return 2.0 ** np.floor(np.log2(magnitude)) * float(info.eps)


def softmax64(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def logsumexp64(x):
  top = x.max(-1)
  return top + np.log(np.exp(x - top[..., None]).sum(-1))


LABELS = np.arange(32) % 16
SENSITIVE = {
  "softmax": (jax.nn.softmax, softmax64),
  "log_softmax": (jax.nn.log_softmax, lambda x: x - logsumexp64(x)[:, None]),
  "logsumexp": (jax.nn.logsumexp, lambda x: logsumexp64(x.reshape(-1))),
  "cross_entropy": (
    lambda x: optax.softmax_cross_entropy_with_integer_labels(x, jnp.asarray(LABELS)),
    lambda x: logsumexp64(x) - x[np.arange(32), LABELS],
  ),
  "one_hot_cross_entropy": (
    lambda x: optax.softmax_cross_entropy(x, jax.nn.one_hot(LABELS, 16)),
    lambda x: logsumexp64(x) - x[np.arange(32), LABELS],
  ),
  "binary_cross_entropy": (
    lambda x: optax.sigmoid_binary_cross_entropy(x, jnp.ones_like(x)),
    lambda x: np.logaddexp(0, -x),
  ),
}


@pytest.mark.quick(every=3)
@in_turns(("sensitive", "scale", "policy"), SENSITIVE, {"small": 1.0, "large": 8.0}, list(COMPUTE))
def test_softmax_and_losses_are_within_an_ulp_of_float64(sensitive, scale, policy):
  fn, truth = sensitive
  dtype = COMPUTE[policy]
  draw = scale * np.random.default_rng(1).standard_normal((32, 16))
  logits = np.asarray(jnp.asarray(draw, dtype), np.float32)
  cast = mpjax.autocast(lambda weight, x: fn(x @ weight), policy)
  found = np.asarray(cast(jnp.eye(16), jnp.asarray(logits)), np.float64)
  exact = truth(logits.astype(np.float64))
  in_float32 = np.abs(np.asarray(fn(jnp.asarray(logits)), np.float64) - exact)
  assert np.all(np.abs(found - exact) <= np.maximum(ulp(exact, dtype), 2 * in_float32))


@every_policy
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_weights_are_within_an_ulp_of_float64(dropout, policy):
  rng = np.random.default_rng(2)
  query, key = rng.integers(-4, 5, (2, 1, 8, 2, 4)).astype(np.float32)  # exact logits

  def weights(scale, query, key):
    return nn.dot_product_attention_weights(
      query * scale,
      key,
      dropout_rate=dropout,
      dropout_rng=jax.random.key(0),
      broadcast_dropout=False,
    )

  found = mpjax.autocast(weights, policy)(jnp.float32(1), jnp.asarray(query), jnp.asarray(key))
  kept = np.asarray(weights(jnp.float32(1), jnp.asarray(query), jnp.asarray(key))) != 0
  logits = np.einsum("bqhd,bkhd->bhqk", query.astype(np.float64), key) / 2
  exact = np.where(kept, softmax64(logits) / (1 - dropout), 0)
  assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= ulp(exact, COMPUTE[policy]))
  assert kept.mean() == pytest.approx(1 - dropout, abs=0.15)


MASKS = {
  "where_1e9": lambda logits, keep: jnp.where(keep, logits, -1e9),
  "where_numpy": lambda logits, keep: jnp.where(keep, logits, np.float32(-1e9)),
  "where_finfo": lambda logits, keep: jnp.where(keep, logits, jnp.finfo(jnp.float32).min),
  "added": lambda logits, keep: logits + (1.0 - keep.astype(jnp.float32)) * -1e9,
  "added_bias": lambda logits, keep: logits + jnp.where(keep, 0.0, -1e9),
  "select": lambda logits, keep: lax.select(keep, logits, jnp.full_like(logits, -1e9)),
}


def attention_by_einsum(q, k, v, *, is_causal):
  scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.dtype.type(q.shape[-1] ** -0.5)
  keep = np.tri(q.shape[1], dtype=bool) if is_causal else True
  scores = jnp.where(keep, scores, jnp.finfo(scores.dtype).min)
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


JAX_ATTENTION = {
  "kernel": (mpjax.cast_inputs(jax.nn.dot_product_attention), jax.nn.dot_product_attention),
  "traced": (jax.nn.dot_product_attention, attention_by_einsum),
}


@pytest.mark.quick(every=2)
@in_turns(("attention", "masked"), JAX_ATTENTION, [False, True])
def test_jax_attention_is_as_exact_as_by_hand(attention, masked):
  """As a kernel it keeps its float32 scores, else it rounds them as an einsum by hand does.

  Float16 by hand does not run on a CPU.
  """
  ours, theirs = attention
  weights = np.cos(np.arange(16)).reshape(1, 1, 1, 16).astype(np.float32)
  operands = [
    x.astype(jnp.bfloat16) for x in jax.random.normal(jax.random.key(0), (3, 2, 32, 4, 16))
  ]
  wide = [x.astype(jnp.float32) for x in operands]
  jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})

  def both(fn):
    attend = functools.partial(fn, is_causal=masked)
    return attend, jax.grad(lambda q, k, v: (attend(q, k, v) * weights).sum(), (0, 1, 2))

  for fn, by_hand in zip(both(ours), both(theirs), strict=True):
    with jax.enable_x64(True):
      truth = jit(by_hand)(*(np.asarray(x, np.float64) for x in operands))
    found = jit(mpjax.autocast(fn, "mixed_bfloat16", argnums=(0, 1, 2)))(*wide)
    assert error(found, truth) <= 1.05 * error(jit(by_hand)(*operands), truth)


@every_policy
def test_the_scores_of_jax_attention_have_16_bit_derivatives(policy):
  loss = mpjax.autocast(lambda q, k: jax.nn.dot_product_attention(q, k, k).sum(), policy)
  operands = jax.random.normal(jax.random.key(0), (2, 2, 8, 4, 16))
  for fn in (jax.grad(loss), jax.grad(loss, 1), lambda *qk: jax.jvp(loss, qk, qk)):
    assert wide_contractions(jax.make_jaxpr(fn)(*operands), COMPUTE[policy].name) == []


@pytest.mark.quick(every=3)
@in_turns(("mask", "order", "policy"), MASKS, ["value", "gradient"], list(COMPUTE))
def test_a_masked_softmax_is_finite_where_float32_is(mask, order, policy):
  keep = jnp.asarray(np.tri(8, dtype=bool) & (np.arange(8) != 3)[:, None])  # row 3: nothing kept
  x = jnp.asarray(np.random.default_rng(3).integers(-2, 3, (8, 8)), jnp.float32)

  def attend(weight, x):
    return jax.nn.softmax(mask(x @ weight, keep)) @ x

  def total(weight, x):
    return (attend(weight, x) ** 2).sum()

  fn = attend if order == "value" else total
  cast, weight = mpjax.autocast(fn, policy), jnp.eye(8)
  ours, truth = [(f if order == "value" else jax.grad(f))(weight, x) for f in (cast, fn)]
  assert np.isfinite(ours).all()
  assert error(ours, truth) < 3 * float(jnp.finfo(COMPUTE[policy]).eps)


def masked_attention(api, dropout, policy):
  """What a layer of attention, of whose rows one sees nothing, returns with and without policy."""
  x = jax.random.normal(jax.random.key(0), (2, 6, 8))
  keep = jnp.ones((2, 1, 6, 6), bool).at[0, :, 2].set(False)
  if api == "linen":
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=dropout, deterministic=False)
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = jax.jit(layer.init)(rngs, x)

    def run(policy):
      apply = mpjax.apply_policy(layer, policy).apply
      return apply(variables, x, mask=keep, rngs={"dropout": jax.random.key(3)})

  else:
    layer = nnx.MultiHeadAttention(2, 8, dropout_rate=dropout, decode=False, rngs=nnx.Rngs(1))
    graph, state = nnx.split(layer)

    def run(policy):
      model = mpjax.apply_policy(nnx.merge(graph, state, copy=True), policy)
      return model(x, mask=keep, deterministic=False)

  return jax.jit(lambda: (run(policy), run("float32")))()


@pytest.mark.quick(every=3)
@in_turns(("api", "dropout", "policy"), ["linen", "nnx"], [0.0, 0.3], list(COMPUTE))
def test_multi_head_attention_with_a_fully_masked_row_is_finite(api, dropout, policy):
  ours, truth = masked_attention(api, dropout, policy)
  assert np.isfinite(ours).all()
  assert error(ours, truth) < 4 * float(jnp.finfo(COMPUTE[policy]).eps)


# Recurrent carries -------------------------------------------------------------------------------


def named(api, *cells):
  return {f"{api}-{cell.__name__}": (api, cell) for cell in cells}


CELLS = {
  **named("linen", nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell),
  **named("nnx", nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell),
}
SIMPLE_CELLS = {**named("linen", nn.SimpleCell), **named("nnx", nnx.SimpleCell)}


def long_text(seed):
  tokens = np.random.default_rng(seed).integers(0, 31, (2, 100))
  return Batch(jnp.asarray(tokens, jnp.int32), jnp.zeros(()))


@functools.cache
def recurrent(api, cell):
  """A case whose "loss" is the outputs."""
  build = linen_models.Recurrent if api == "linen" else nnx_models.Recurrent
  outputs_only = lambda outputs, _: outputs
  return Case(cell.__name__, api, functools.partial(build, cell=cell), long_text, outputs_only)


def recurrent_outputs(case, module):
  """The jaxpr and the outputs of a recurrent model on a long sequence."""
  pure, plain = case.pure(module), case.pure(case.module())
  args = plain.params, plain.state, case.batch(0)
  traced = jax.jit(lambda *args: pure.loss(*args)[0]).trace(*args)
  return traced.jaxpr, traced.lower().compile()(*args)


@functools.cache
def recurrent_truth(case):
  return recurrent_outputs(case, case.module())[1]


@pytest.mark.quick(every=5)
@in_turns(("cell", "policy"), CELLS, list(COMPUTE))
def test_a_cell_runs_a_long_sequence_as_well_as_flaxs(cell, policy):
  case = recurrent(*cell)
  jaxpr, ours = recurrent_outputs(case, mpjax.apply_policy(case.module(), policy))
  _, by_hand = recurrent_outputs(case, case.module(COMPUTE[policy]))
  assert wide_contractions(jaxpr, COMPUTE[policy].name) == []
  assert error(ours, recurrent_truth(case)) <= 1.01 * error(by_hand, recurrent_truth(case))


@in_turns(("cell", "policy"), SIMPLE_CELLS, list(COMPUTE))
def test_a_simple_cell_runs_where_flaxs_dtype_breaks_its_carry(cell, policy):
  case = recurrent(*cell)
  jaxpr, ours = recurrent_outputs(case, mpjax.apply_policy(case.module(), policy))
  assert wide_contractions(jaxpr, COMPUTE[policy].name) == []
  assert error(ours, recurrent_truth(case)) < 4 * float(jnp.finfo(COMPUTE[policy]).eps)
  if case.api == "linen":
    with pytest.raises(TypeError, match="carry"):
      recurrent_outputs(case, case.module(COMPUTE[policy]))


@every_policy
def test_the_carry_of_a_users_own_scan_keeps_one_dtype(policy):
  def fn(weight, xs):
    def step(state, x):
      hidden, count = state
      hidden = jnp.tanh((hidden * np.float32(0.5) + x) @ weight)
      return (hidden, count + 1.0), hidden

    (hidden, count), outs = lax.scan(step, (jnp.zeros((2, 8)), 0.0), xs)
    return hidden.sum() + count + outs.sum()

  args = jnp.full((8, 8), 0.1), jnp.ones((300, 2, 8))
  jaxpr = jax.make_jaxpr(jax.grad(mpjax.autocast(fn, policy)))(*args)
  assert wide_contractions(jaxpr, COMPUTE[policy].name) == []
  assert any(eqn.primitive.name == "scan" for eqn in equations(jaxpr))
  counted = mpjax.autocast(lambda w, xs: fn(w, xs) - fn(w, xs) + len(xs), policy)
  assert counted(*args) == 300


# Sums --------------------------------------------------------------------------------------------

SUMS = {
  "sum": (lambda x: x.sum(), 70000),
  "lax_reduce": (lambda x: lax.reduce(x, 0.0, lax.add, (0, 1)), 70000),
  "einsum": (lambda x: jnp.einsum("ij->", x), 70000),
  "mean": (lambda x: x.mean(), 1),
  "cumsum": (lambda x: jnp.cumsum(x)[-1], 70000),
  "segment_sum": (lambda x: jax.ops.segment_sum(x[:, 0], jnp.zeros(70000, int), 2)[0], 70000),
  "scatter_add": (lambda x: jnp.zeros(2).at[jnp.zeros(70000, int)].add(x[:, 0])[0], 70000),
  "sum_of_squares": (lambda x: ((300 * x) ** 2).sum(), 70000 * 300**2),
  "norm": (lambda x: jnp.linalg.norm(300 * x), 300 * 70000**0.5),
  "product_with_itself": (lambda x: (lambda y: y @ y)(300 * x[:, 0]), 70000 * 300**2),
  "vdot": (lambda x: (lambda y: jnp.vdot(y, y))(300 * x), 70000 * 300**2),
  "einsum_of_squares": (
    lambda x: (lambda y: jnp.einsum("td,td->d", y, y))(300 * x),
    70000 * 300**2,
  ),
  "tensordot": (lambda x: (lambda y: jnp.tensordot(y, y, 2))(x / 4096), 70000 / 4096**2),
  "tree_norm": (lambda x: optax.tree.norm({"x": 300 * x}), 300 * 70000**0.5),
  "average_pool": (lambda x: nn.avg_pool(x.reshape(1, 100, 700, 1), (100, 700)).sum(), 1),
  "variance": (lambda x: (x * 1000).var() + 1, 1),
  "prod": (lambda x: (2 * x[:20, 0]).prod(), 2**20),
  "logsumexp": (lambda x: jax.nn.logsumexp(x), 1 + np.log(70000)),
}


@pytest.mark.quick(every=3)
@every_policy
@pytest.mark.parametrize(("fn", "truth"), SUMS.values(), ids=SUMS.keys())
def test_a_sum_of_narrow_values_does_not_stall_or_overflow(fn, truth, policy):
  cast = mpjax.autocast(lambda weight, x: fn(x @ weight), policy)
  found = cast(jnp.ones((1, 1)), jnp.ones((70000, 1)))
  np.testing.assert_allclose(found, truth, rtol=1e-4)


# Quotients ---------------------------------------------------------------------------------------

QUOTIENTS = {
  "large": lambda h: h[:8] / (4000 * jnp.abs(h[8:]) + 1000) * 1000,
  "of_numbers": lambda h: 2000 / (4000 * jnp.abs(h) + 1000),
  "small": lambda h: (h[:8] / 2048) / (h[8:] / 2048),
  "small_angles": lambda h: jnp.arctan2(h[:8] / 2048, h[8:] / 2048) / 512,
  "large_angles": lambda h: jnp.arctan2(h[:8] * 512, h[8:] * 512) * 512,
}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("fn", QUOTIENTS.values(), ids=QUOTIENTS.keys())
def test_a_quotient_has_its_derivative_in_float16(fn):
  """One divided by the square of what divides leaves float16 from 256 on, and below 1 / 256."""
  x = jax.random.normal(jax.random.key(0), (16, 4))
  weight = jax.random.normal(jax.random.key(1), (4, 4))
  loss = lambda weight, x: fn(jnp.sin(x @ weight) + 2).sum()
  ours, truth = (jax.grad(f)(weight, x) for f in (mpjax.autocast(loss, "mixed_float16"), loss))
  assert error(ours, truth) < 8e-3


def test_what_is_divided_by_a_number_or_a_parameter_stays_in_16_bits():
  fn = lambda scale, x: (x @ x / 8.0 / scale) @ x
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, "mixed_float16"))(jnp.float32(3), jnp.eye(4))
  assert result_dtypes(jaxpr, "div") == {"float16"}


# Data --------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("target", [2049.0, 4097.0, 1e-8])
def test_float_targets_survive(target, policy):
  loss = mpjax.autocast(lambda weight, x, y: ((x @ weight - y) ** 2).mean() ** 0.5, policy)
  found = loss(jnp.zeros((2, 1)), jnp.ones((3, 2)), jnp.full((3, 1), target))
  np.testing.assert_allclose(found, target, rtol=1e-6)


@every_policy
def test_integer_parameters_keep_their_dtype_and_value(policy):
  def fn(params, x):
    return (x @ params["w"]).sum() + params["count"], params["count"]

  params = {"w": jnp.ones((2, 2)), "count": jnp.int32(16777217)}
  _, count = mpjax.autocast(fn, policy)(params, jnp.ones((2, 2)))
  assert (count.dtype, int(count)) == (jnp.int32, 16777217)


@every_policy
def test_positions_beyond_256_stay_apart(policy):
  def rotate(weight, x):
    angles = jnp.arange(4990, 5010)[:, None] / 10000 ** (jnp.arange(4) / 4)[None]
    return jnp.cos(angles) + 0 * (x @ weight).sum()

  ours, truth = (
    f(jnp.ones((2, 2)), jnp.ones((2, 2))) for f in (mpjax.autocast(rotate, policy), rotate)
  )
  assert error(ours, truth) < 1e-6


def test_only_float32_scores_are_scores():
  """Grouped matmuls of integers and of a caller's own bfloat16 run as they were traced."""
  whole = lambda i, j: jnp.einsum("btkgh,bskh->bkgts", i, j)
  ints = jnp.full((1, 1, 1, 1, 1), 4097), jnp.full((1, 1, 1, 1), 4097)
  halves = jnp.ones((1, 2, 1, 1, 4), jnp.bfloat16), jnp.ones((1, 2, 1, 4), jnp.bfloat16)
  for operands in (ints, halves):
    plain = whole(*operands)
    found = mpjax.autocast(lambda w, i, j: whole(i, j), "mixed_bfloat16")(jnp.ones(1), *operands)
    assert found.dtype == plain.dtype and (found == plain).all()


def test_a_batched_matrix_times_a_vector_is_narrow():
  fn = lambda w, x: jnp.einsum("bth,bh->bt", x @ w, x[:, 0])
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, "mixed_bfloat16"))(jnp.eye(4), jnp.ones((2, 3, 4)))
  assert result_dtypes(jaxpr, "dot_general") == {"bfloat16"}
