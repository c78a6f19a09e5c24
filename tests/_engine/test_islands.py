"""Float32 between 16-bit values is computed again in the backward pass, not stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import mpjax
from _arrays import array
from _jaxprs import equations, primitives
from _turns import in_turns
from mpjax._core.scopes import module_path
from mpjax._engine.running import interpreter

ACTIVATIONS = {
  "gelu": nn.gelu,
  "exact_gelu": lambda x: nn.gelu(x, approximate=False),
  "softplus": nn.softplus,
  "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
  "elu": nn.elu,
  "exp": lambda x: jnp.exp(-jnp.abs(x)),
}
SIZE = (16, 32)


@pytest.fixture(scope="module")
def operands():
  w = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 6.0
  return w, jax.random.normal(jax.random.key(1), SIZE)


def make(activation):
  return lambda w, x: (activation(x @ w[0]) @ w[1]).sum()


def stored(fn, operands):
  """The dtypes of what the backward pass stores in the size of an activation."""
  _, pullback = jax.vjp(lambda w: fn(w, operands[1]), operands[0])
  return [leaf.dtype.name for leaf in jax.tree.leaves(pullback) if leaf.shape == SIZE]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_float16_islands_store_nothing_wide(activation, operands, monkeypatch):
  fn = make(activation)
  kept = stored(mpjax.autocast(fn, "mixed_float16"), operands)
  # The input is the caller's own float32 array; all else is float16.
  assert kept.count("float32") <= 1
  monkeypatch.setattr(interpreter.islands, "find", lambda plan: {})
  without = stored(mpjax.autocast(fn, "mixed_float16"), operands)
  assert sum(np.dtype(d).itemsize for d in kept) <= sum(np.dtype(d).itemsize for d in without)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_gradients_are_those_of_storing(activation, operands, monkeypatch):
  fn = make(activation)
  grads = jax.grad(mpjax.autocast(fn, "mixed_float16"))(*operands)
  monkeypatch.setattr(interpreter.islands, "find", lambda plan: {})
  storing = jax.grad(mpjax.autocast(fn, "mixed_float16"))(*operands)
  np.testing.assert_allclose(grads, storing, rtol=2e-3, atol=2e-3)


READERS = {
  "layer": lambda h: h @ jnp.ones((32, 4), h.dtype),
  "pad": lambda h: jnp.pad(h, ((0, 0), (1, 1))) @ jnp.ones((34, 4), h.dtype),
  "concatenate": lambda h: jnp.concatenate([h, h], 1) @ jnp.ones((64, 4), h.dtype),
  "pool": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")[:, :4],
  "mean": lambda h: h.mean(1),
  "norm": lambda h: (h - h.mean(1, keepdims=True)) * lax.rsqrt(h.var(1, keepdims=True) + 1e-6),
}
ARITHMETIC = {
  "snake": lambda x: x + jnp.sin(1.5 * x) ** 2 / 1.5,
  "softsign": lambda x: x / (1 + jnp.abs(x)),
  "squared_relu": lambda x: x + nn.relu(x) ** 2,
}
READ = {
  (name, reader): (activation, READERS[reader])
  for names, activations in ((READERS, ACTIVATIONS), (["layer"], ARITHMETIC))
  for reader in names
  for name, activation in activations.items()
  if name in ("softplus", "mish", "elu", *ARITHMETIC)
}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("read", READ.values(), ids=map("-".join, READ))
def test_whatever_reads_an_activation_it_stores_no_more_than_by_hand(read, policy, operands):
  """Where its result leaves in float32, too: to a norm or a pool, or to be moved."""
  activation, reader = read
  dtype = {"mixed_float16": jnp.float16, "mixed_bfloat16": jnp.bfloat16}[policy]

  def by_hand(w, x):
    return reader(activation(x.astype(dtype) @ w[0].astype(dtype))).astype(jnp.float32).sum()

  own = mpjax.autocast(lambda w, x: reader(activation(x @ w[0])).sum(), policy)
  sizes = [sum(np.dtype(d).itemsize for d in stored(fn, operands)) for fn in (own, by_hand)]
  assert 0 < sizes[0] <= sizes[1]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("activation", [nn.silu, nn.gelu, nn.elu, jnp.tanh])
def test_a_norm_before_an_activation_that_is_pooled_is_computed_again(activation, policy, operands):
  """Its mean and variance read in float32 what the island reads."""

  def fn(w, x):
    return jnp.sum(activation(READERS["norm"](x @ w[0])).mean(1) ** 2)

  assert stored(mpjax.autocast(fn, policy), operands).count("float32") <= 1  # the data


@pytest.mark.parametrize("reader", ["pad", "concatenate"])
@pytest.mark.parametrize("activation", [ARITHMETIC["snake"], ARITHMETIC["squared_relu"]])
def test_squares_that_are_padded_for_a_layer_stay_narrow(activation, reader, operands):
  """In bfloat16: float16 has no room for them."""
  fn = lambda w, x: READERS[reader](activation(x @ w[0])).sum()
  assert stored(mpjax.autocast(fn, "mixed_bfloat16"), operands).count("float32") <= 1


@in_turns(
  ("gate", "policy"), {"silu": nn.silu, "gelu": nn.gelu}, ["mixed_float16", "mixed_bfloat16"]
)
def test_halves_of_an_activation_are_multiplied_in_16_bits(gate, policy, operands):
  def fn(w, x):
    one, other = jnp.split(gate(x @ w[0]), 2, 1)
    return ((one * other) @ w[1][:16]).sum()

  _, pullback = jax.vjp(lambda w: mpjax.autocast(fn, policy)(w, operands[1]), operands[0])
  halves = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == (16, 16)]
  assert halves and {leaf.dtype.itemsize for leaf in halves} == {2}


def cells(gate):
  """A recurrence whose state is float32, as it starts from a number."""
  turn = lambda w, c, u: (gate(u @ w) * c + 0.1 * jnp.tanh(u @ w), None)
  return lambda w, x: lax.scan(functools.partial(turn, w[0]), jnp.zeros(SIZE[1]), x)[0].sum()


GATES = {
  "sigmoid": lambda y: nn.sigmoid(y + 5),
  "jitted": jax.jit(nn.sigmoid),
  "decay": lambda y: jnp.exp(-nn.softplus(y)),
}


@in_turns(("gate", "policy"), GATES, ["mixed_bfloat16", "mixed_float16"])
def test_a_gate_in_float32_is_computed_again_where_it_multiplies(gate, policy, operands):
  """Of each turn the state alone is stored in float32, and its input, which came in so."""
  fn = cells(gate)
  kept = stored(mpjax.autocast(fn, policy), operands)
  assert kept.count("float32") <= 2
  got, want = (jax.grad(f)(*operands) for f in (mpjax.autocast(fn, policy), fn))
  np.testing.assert_allclose(got, want, atol=0.05 * float(jnp.abs(want).max()))


MIXTURES = {
  "weighed": lambda z, n, h: (1 - z) * n + z * h,
  "a_step": lambda z, n, h: h + z * (n - h),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_gates_that_mix_are_computed_again(policy, mixture, operands):
  """Of a GRU's turn the state is stored in float32, and the input, which came in so."""

  def gated_units(w, x):
    def turn(h, u):
      z = nn.sigmoid(u @ w[0] + h @ w[1] + 2)
      return mixture(z, jnp.tanh(u @ w[1] + h @ w[0]), h), None

    return lax.scan(turn, jnp.zeros(SIZE[1]), x)[0].sum()

  kept = stored(mpjax.autocast(gated_units, policy), operands)
  assert kept.count("float32") <= 2
  got, want = (jax.grad(f)(*operands) for f in (mpjax.autocast(gated_units, policy), gated_units))
  np.testing.assert_allclose(got, want, atol=0.05 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("moved", [lambda y: y, lambda y: y.reshape(4, -1, SIZE[1])])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixture_that_a_matmul_reads_is_computed_again(policy, moved, operands):
  """As that of a highway network, which stores its input, and no gate."""

  def fn(w, x):
    z = nn.sigmoid(x @ w[0])
    return jnp.sum(moved((1 - z) * jnp.tanh(x @ w[1]) + z * x) @ w[0])

  assert stored(mpjax.autocast(fn, policy), operands).count("float32") <= 1


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "exact_gelu"])
def test_nothing_wide_crosses_the_border_of_an_island(name, operands):
  """Compilers put in memory whatever enters or leaves a checkpoint, cotangents too.

  The error function of the exact gelu runs in float16 and makes no island.
  """
  grad = jax.grad(mpjax.autocast(make(ACTIVATIONS[name]), "mixed_float16"))
  islands = [e for e in equations(jax.make_jaxpr(grad)(*operands)) if e.primitive.name == "remat2"]
  crossing = [a.aval for e in islands for a in (*e.invars, *e.outvars) if a.aval.shape == SIZE]
  assert crossing and {aval.dtype.name for aval in crossing} <= {"float16", "bool"}


@pytest.mark.parametrize("readers", [1, 2])
def test_cotangents_of_several_readers_meet_in_float32(readers, operands):
  """Only a result that is read once leaves its island in 16 bits."""

  def fn(w, x):
    hidden = nn.gelu(x @ w[0])
    return sum((hidden @ w[1]).sum() for _ in range(readers))

  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, "mixed_float16"))(*operands)
  (island,) = [e for e in equations(jaxpr) if e.primitive.name == "remat2"]
  assert island.outvars[0].aval.dtype.name == {1: "float16", 2: "float32"}[readers]


def test_gelu_is_computed_again_in_float16_only(operands):
  fn = make(nn.gelu)
  for policy, again in (("mixed_float16", 1), ("mixed_bfloat16", 0)):
    jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(*operands)
    assert primitives(jaxpr)["remat2"] == again


def mixed(w, h):
  shares = nn.softmax(h @ w[0, :, :4])
  return h + jnp.tanh(sum(shares[:, k : k + 1] * (h @ w[k % 2]) for k in range(4)))


def demodulated(w, h):
  norms = lax.rsqrt(1 + jnp.square(h.mean(0) @ w[0]).sum(-1, keepdims=True))
  return h + (h @ w[1]) * norms[None]


WEIGHTED = {
  "mixed": (mixed, 2),  # of the tanh
  "demodulated": (demodulated, 0),
  "scaled_by_a_layer": (lambda w, h: h + (h @ w[0]) * nn.softmax(h @ w[1])[:, :1], 1),
  "masked": (lambda w, h: h + (h @ w[0]) * jnp.cos(h.mean(0))[None] * jnp.arange(16.0)[:, None], 0),
}


@in_turns(("weighted", "policy"), WEIGHTED, ["mixed_bfloat16", "mixed_float16"])
def test_what_small_float32_weights_multiply_is_stored_in_16_bits(weighted, policy, operands):
  """In a scan, whose stored values no compiler can compute again."""
  layer, most = weighted

  def loss(w, x):
    scanned = jax.lax.scan(lambda h, w: (layer(w, h), None), x @ w[0], jnp.stack([w, w, w]))[0]
    return scanned.sum()

  w, x = operands
  _, pullback = jax.vjp(lambda w: mpjax.autocast(loss, policy)(w, x), w)
  kept = [leaf.dtype for leaf in jax.tree.leaves(pullback) if leaf.shape == (3, *SIZE)]
  assert [dtype.itemsize for dtype in kept].count(4) <= most
  found, wanted = jax.grad(mpjax.autocast(loss, policy))(w, x), jax.grad(loss)(w, x)
  assert jnp.linalg.norm(found - wanted) < 0.02 * jnp.linalg.norm(wanted)


@pytest.mark.parametrize("activation", [nn.gelu, nn.silu], ids=["gelu", "silu"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_an_island_reaches_through_a_reshape(policy, activation, operands):
  def normalized(h):  # in groups, as a user's own GroupNorm
    groups = h.reshape(SIZE[0], 4, -1)
    less = groups - groups.mean(-1, keepdims=True)
    return (less * lax.rsqrt(groups.var(-1, keepdims=True) + 1e-6)).reshape(SIZE)

  fn = lambda w, x: (activation(1.1 * normalized(x @ w[0]) + 0.1) @ w[1]).sum()
  assert stored(mpjax.autocast(fn, policy), operands).count("float32") == 0


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_scale_of_a_norm_is_not_stored_in_the_size_of_what_it_scales(policy, operands):
  def fn(p, x):
    h = x @ p["w"]
    h = h * (jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p["scale"][None])
    return (h @ p["w"]).sum()

  w, x = operands
  p = {"w": w[0], "scale": jnp.full(32, 1.25)}
  _, pullback = jax.vjp(lambda p: mpjax.autocast(fn, policy)(p, x), p)
  sized = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == SIZE]
  assert not any(np.all(np.asarray(leaf, np.float32) == 1.25) for leaf in sized)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_the_scopes_of_an_island_are_those_of_its_operations_once(wrap):
  def attend(w, x):
    with jax.named_scope("attn"):
      return jax.nn.gelu(x @ w) @ w

  def loss(w, x):
    with jax.named_scope("block"):
      return jnp.sum(wrap(attend)(w, x) ** 2)

  grad = jax.grad(mpjax.autocast(loss, "mixed_float16"))
  jaxpr = jax.make_jaxpr(grad)(jnp.eye(4), jnp.ones((2, 4)))
  paths = {module_path(eqn.source_info.name_stack) for eqn in equations(jaxpr)}
  assert paths <= {(), ("block",), ("attn",), ("block", "attn")}


def attend(softmax):
  """Mixes rows by the weights that a softmax makes of their products."""

  def fn(w, x):
    scores = (x @ w[0]) @ (x @ w[1]).T
    return softmax(scores) @ x @ w[0]

  return fn


def by_hand(scores):
  weights = jnp.exp(scores - scores.max(1, keepdims=True))
  return weights / weights.sum(1, keepdims=True)


KEPT = array(np.random.default_rng(0).uniform(size=(SIZE[0], SIZE[0])) < 0.9, bool)
DROPOUTS = {
  "chosen": lambda s: jnp.where(KEPT, nn.softmax(s) / 0.9, 0.0),
  "multiplied": lambda s: nn.softmax(s) * (KEPT.astype(s.dtype) / 0.9),
  "for_all_rows": lambda s: nn.softmax(s) * (KEPT[:1].astype(s.dtype) / 0.9),
  "masked_first": lambda s: nn.softmax(s) * KEPT.astype(s.dtype) / 0.9,
  "of_float32_scores": lambda s: nn.softmax(s + TABLE) * KEPT.astype(s.dtype) * 1.1,
}
TABLE = array(np.sin(np.arange(256)).reshape(16, 16))
SOFTMAXES = DROPOUTS | {
  "softmax": nn.softmax,
  "by_hand": by_hand,
  "masked": lambda s: nn.softmax(jnp.where(jnp.tri(16, dtype=bool), s, -1e9)),
  "along_columns": lambda s: nn.softmax(s, 0),
  "of_all": lambda s: nn.softmax(s, (0, 1)),
}
POLICIES = ("mixed_bfloat16", "mixed_float16")
every_policy = pytest.mark.parametrize("policy", POLICIES)


@pytest.mark.quick(every=3)
@in_turns(("softmax", "policy"), SOFTMAXES, POLICIES)
def test_a_softmax_stores_its_weights_in_16_bits_alone(softmax, policy, operands):
  fn = mpjax.autocast(attend(softmax), policy)
  _, pullback = jax.vjp(lambda w: fn(w, operands[1]), operands[0])
  # A mask is stored as it is, and the derivative of `where` brings a float32 zero of that size.
  found = [x for x in jax.tree.leaves(pullback) if x.shape == (16, 16)]
  kept = [x.dtype for x in found if len(jnp.unique(x)) > 2]
  assert kept and jnp.float32 not in kept


DERIVATIVES = {
  "reverse": lambda fn, operands: jax.vjp(fn, *operands)[1](jnp.ones(SIZE)),
  "forward": lambda fn, operands: jax.jvp(fn, operands, operands)[1:],
}


@pytest.mark.quick(every=5)
@in_turns(("softmax", "derivative", "policy"), SOFTMAXES, DERIVATIVES, POLICIES)
def test_the_derivative_by_16_bit_weights_is_about_as_exact(
  softmax, derivative, policy, operands, monkeypatch
):
  fn = attend(softmax)
  unit = {"mixed_bfloat16": 2.0**-8, "mixed_float16": 2.0**-11}[policy]

  def errors():
    pairs = zip(derivative(mpjax.autocast(fn, policy), operands), plain, strict=True)
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]

  plain = derivative(fn, operands)
  found = errors()
  monkeypatch.setattr(interpreter.islands.softmax, "match", lambda *_: None)
  for error, storing in zip(found, errors(), strict=True):
    assert error < 1.5 * storing + unit


READ_OTHERWISE = {
  "in_float32": lambda s: nn.softmax(s) ** 2,
  "exponentials_too": lambda s: by_hand(s) + jnp.exp(s - s.max(1, keepdims=True)),
  "another_sum": lambda s: jnp.exp(s - s.max(1, keepdims=True)) / jnp.exp(s).sum(1, keepdims=True),
  "not_along_the_axis": lambda s: jnp.exp(s - s.max(1, keepdims=True)) / jnp.exp(s - s).sum(0),
  "a_shift_of_its_own": lambda s: jnp.exp(s - s**2) / jnp.exp(s - s**2).sum(1, keepdims=True),
}


@pytest.mark.quick(every=6, start=1)
@in_turns(("softmax", "policy"), READ_OTHERWISE, POLICIES)
def test_what_only_looks_like_a_softmax_is_differentiated_as_written(softmax, policy, operands):
  with jax.numpy_rank_promotion("allow"):
    fn = attend(softmax)
    cast = mpjax.autocast(fn, policy)
    assert "name=run" not in str(jax.make_jaxpr(cast)(*operands))
    found, want = (DERIVATIVES["reverse"](f, operands)[0] for f in (cast, fn))
  assert jnp.linalg.norm(found - want) < 0.1 * jnp.linalg.norm(want)


def made_by_rules(fn, operands):
  """The dtypes of what exponentials with a derivative of their own return: softmaxes, here."""
  calls = [e for e in equations(jax.make_jaxpr(fn)(*operands)) if "jvp_jaxpr_fun" in e.params]
  softmaxes = [e for e in calls if "exp" in primitives(e.params["call_jaxpr"])]
  return [var.aval.dtype for eqn in softmaxes for var in eqn.outvars]


@every_policy
def test_weights_are_float32_only_where_their_cotangents_add_up(policy, operands):
  once = lambda w, x: nn.softmax(x @ w[0] @ x.T) @ x
  twice = lambda w, x: (lambda weights: (weights @ x, weights @ (x @ w[1])))(
    nn.softmax(x @ w[0] @ x.T)
  )
  narrow = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}[policy]
  assert made_by_rules(mpjax.autocast(once, policy), operands) == [narrow]
  assert made_by_rules(mpjax.autocast(twice, policy), operands) == [jnp.float32]


@every_policy
@pytest.mark.parametrize(("platform", "barriers"), [("cuda", 1), ("rocm", 1), ("tpu", 0)])
def test_gpus_store_the_weights_behind_a_barrier(platform, barriers, policy, operands):
  fn = mpjax.autocast(lambda w, x: jnp.sum(attend(nn.softmax)(w, x)), policy)
  lowered = jax.jit(jax.grad(fn)).trace(*operands).lower(lowering_platforms=(platform,))
  assert lowered.as_text().count("optimization_barrier") == barriers


@every_policy
def test_gpus_choose_what_they_store_where_a_mask_reads_the_weights(policy, operands):
  kept = jax.random.bernoulli(jax.random.key(0), 0.9, (SIZE[0], SIZE[0]))
  drop = lambda scores: jnp.where(kept, nn.softmax(scores), 0.0)
  fn = mpjax.autocast(lambda w, x: jnp.sum(attend(drop)(w, x)), policy)
  lowered = jax.jit(jax.grad(fn)).trace(*operands).lower(lowering_platforms=("cuda",))
  assert "optimization_barrier" not in lowered.as_text()


@pytest.mark.ci
@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_gradients_of_attention_are_as_exact_where_keys_and_values_share_a_part(bias):
  """The mean of the weights' cotangent is taken from the weights: their rounding cancels in it."""
  q, k, v, c = jax.random.normal(jax.random.key(0), (4, 2, 64, 2, 32))

  def loss(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8
    return jnp.sum(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v) * c.astype(q.dtype))

  with jax.enable_x64(True):
    exact = jax.jit(jax.grad(loss))(*(x.astype(jnp.float64) for x in (q, k + bias, v + bias)))
  wanted = exact.astype(jnp.float32)
  operands = [x.astype(jnp.bfloat16) for x in (q, k + bias, v + bias)]
  by_hand = jax.grad(loss)(*operands)
  fn = mpjax.autocast(lambda *args: loss(*args), "mixed_bfloat16", argnums=())
  found = jax.grad(fn)(*(x.astype(jnp.float32) for x in operands))
  errors = [
    jnp.linalg.norm(g.astype(jnp.float32) - wanted.astype(jnp.float32)) for g in (found, by_hand)
  ]
  assert errors[0] < 1.2 * errors[1]


def spelled_out(q):
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, q) / 2
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), q)


ATTENTIONS = {
  "spelled_out": spelled_out,
  "of_jax": lambda q: jax.nn.dot_product_attention(q, q, q),
  "grouped": lambda q: jax.nn.dot_product_attention(q, q[:, :, :2], q[:, :, :2]),
  "causal": lambda q: jax.nn.dot_product_attention(q, q, q, is_causal=True),
}


@in_turns(("attend", "policy"), ATTENTIONS, ("mixed_bfloat16", "mixed_float16"))
def test_a_scan_over_layers_stores_the_weights_of_an_attention_once(attend, policy):
  """In float16 causal ones are stored as they left the softmax and as they were multiplied."""

  def layer(h, w):
    return h + attend((h @ w).reshape(1, 8, 4, 4)).reshape(h.shape), None

  loss = lambda ws, x: lax.scan(layer, x, ws)[0].sum()
  grad = jax.grad(mpjax.autocast(loss, policy))
  jaxpr = jax.make_jaxpr(grad)(jnp.ones((3, 16, 16)), jnp.ones((1, 8, 16)))
  scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  kept = [v.aval for eqn in scans for v in eqn.outvars if v.aval.shape[-2:] == (8, 8)]
  is_twice = attend is ATTENTIONS["causal"] and policy == "mixed_float16"
  assert len(kept) == 1 + is_twice
  assert {aval.dtype.itemsize for aval in kept} == {2}
