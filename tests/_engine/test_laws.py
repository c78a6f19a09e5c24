"""What no program may suffer under a 16-bit policy, whichever way it is written.

The programs run with every 16-bit value rounded, as on the backend that fuses least.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental.ode import odeint

import mpjax
from _backends import ROUNDING, rounded
from _jaxprs import equations, wide_contractions
from _turns import in_turns
from mpjax.inspect import explain

POLICIES = ("mixed_bfloat16", "mixed_float16")
both = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture(autouse=True)
def _promotion_of_users():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def cases(**functions):
  return pytest.mark.parametrize("fn", functions.values(), ids=functions.keys())


def in_both_formats(fn, policy, *args):
  """What a function returns under a policy and in float32, by one compilation."""
  fns = [mpjax.autocast(fn, policy), mpjax.autocast(fn, "float32")]
  run = jax.jit(lambda *args: [f(*args) for f in fns], compiler_options=ROUNDING)
  return jax.device_get(run(*args))


def operand_bytes(found):
  """How many bytes the numbers have that some matmuls multiply."""
  return {atom.aval.dtype.itemsize for eqn in found for atom in eqn.invars}


def matmuls(fn, *args):
  found = equations(jax.make_jaxpr(fn)(*args))
  return [e for e in found if e.primitive.name == "dot_general"]


# Sums ---------------------------------------------------------------------------------------------

W = jnp.full((4, 4), 0.5)
DATA = jnp.ones((8, 4))
loss = lambda w, x: jnp.mean((x @ w) ** 2)


def sgd(w, x):
  return w - 1e-3 * jax.grad(loss)(w, x)


def by_hand(w, x):
  y = x @ w
  return w - 1e-3 * (x.T @ (y * (2 / y.size)))


def rows(w, x):
  """The delta rule, one example after the other."""
  step = lambda w, u: (w - 1e-3 / 8 * jnp.outer(u, u @ w) / 2, None)
  return lax.scan(step, w, x)[0]


def optimizer(tx):
  def step(w, x):
    state = tx.init(w)
    for _ in range(2):
      updates, state = tx.update(jax.grad(loss)(w, x), state, w)
      w = optax.apply_updates(w, updates)
    return w

  return step


STEPS = {
  "sgd": sgd,
  "by_hand": by_hand,
  "rows": rows,
  "jitted": jax.jit(sgd),
  "jitted_update": lambda w, x: jax.jit(lambda w, g: w - 1e-3 * g)(w, jax.grad(loss)(w, x)),
  "added": lambda w, x: w + -1e-3 * jax.grad(loss)(w, x),
  "remat": lambda w, x: w - 1e-3 * jax.grad(jax.checkpoint(loss))(w, x),
  "decayed": lambda w, x: w * (1 - 1e-5) - 1e-3 * jax.grad(loss)(w, x),
  "linear": lambda w, x: w - 1e-3 * jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w) / 32,
  "momentum": optimizer(optax.sgd(1e-3, momentum=0.9)),
  "adam": optimizer(optax.adam(1e-4)),
}
LOOPS = {
  "once": lambda step: step,
  "scan": lambda step: (
    lambda w, x: lax.scan(lambda w, _: (step(w, x), None), w, None, length=50)[0]
  ),
  "fori": lambda step: lambda w, x: lax.fori_loop(0, 50, lambda _, w: step(w, x), w),
  "while": lambda step: (
    lambda w, x: lax.while_loop(lambda c: c[1] < 50, lambda c: (step(c[0], x), c[1] + 1), (w, 0))[0]
  ),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "loop", "policy"), STEPS, LOOPS, POLICIES, turning=2)
def test_a_gradient_step_moves_a_parameter_by_what_float32_moves_it(fn, loop, policy):
  found, want = in_both_formats(loop(fn), policy, W, DATA)
  np.testing.assert_allclose(found - W, want - W, rtol=0.03)


@both
def test_the_gradients_of_an_inner_loop_leave_their_matmuls_in_float32(policy):
  """Model-agnostic meta-learning: a step inside of a loss that is differentiated itself."""

  def meta(w, x):
    return loss(sgd(w, x), x)

  (*_, inner, _) = matmuls(mpjax.autocast(meta, policy), W, DATA)
  assert inner.outvars[0].aval.dtype == jnp.float32
  assert {v.aval.dtype.itemsize for v in inner.invars} == {2}
  exact = jax.grad(meta)(W, DATA)
  got = rounded(jax.grad(mpjax.autocast(meta, policy)))(W, DATA)
  np.testing.assert_allclose(got, exact, rtol=0.03)


@both
def test_a_bias_and_a_table_of_positions_still_follow_the_matmul(policy):
  def fn(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) + p["positions"]

  p = {"w": W, "b": jnp.ones(4), "positions": jnp.ones((1, 4))}
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(p, DATA)
  adds = [e for e in equations(jaxpr) if e.primitive.name == "add"]
  assert {e.outvars[0].aval.dtype.itemsize for e in adds} == {2}


@both
def test_a_bias_that_is_spread_has_its_gradient_summed_in_float32(policy):
  fn = mpjax.autocast(lambda b, x: (x @ W + b[None]).sum(), policy)
  grad = rounded(jax.grad(fn))(jnp.zeros(4), jnp.ones((4096, 4)))
  np.testing.assert_array_equal(grad, np.full(4, 4096.0))


@both
def test_so_has_a_number_that_scales_all(policy):
  """W is an operand: XLA's CPU backend missums a matmul with a constant of equal numbers."""
  fn = mpjax.autocast(lambda s, x, w: (s * (x @ w)).sum(), policy)
  assert float(rounded(jax.grad(fn))(jnp.float32(1), jnp.ones((4096, 4)), W)) == 4096 * 4 * 2


@both
def test_a_class_token_is_put_before_the_sequence(policy):
  fn = lambda p, x: jnp.concatenate([p["token"], x @ p["w"]]).sum(0)
  p = {"token": jnp.ones((1, 4)), "w": W}
  np.testing.assert_allclose(rounded(mpjax.autocast(fn, policy))(p, DATA), fn(p, DATA), rtol=1e-2)


MERGED = {
  "added": lambda p: p["w"] + p["a"] @ p["b"],
  "scaled": lambda p: p["w"] + 0.5 * (p["a"] @ p["b"]),
  "subtracted": lambda p: p["w"] - p["a"] @ p["b"],
  "second": lambda p: jnp.einsum("ir,rj->ij", p["a"], p["b"]) + p["w"],
  "turned": lambda p: p["w"].T + (p["a"] @ p["b"]).T,
  "jitted": lambda p: jax.jit(lambda w, a, b: w + a @ b)(p["w"], p["a"], p["b"]),
  "jitted_change": lambda p: p["w"] + jax.jit(jnp.matmul)(p["a"], p["b"]),
  "mapped": lambda p: lax.map(
    lambda p: p["w"] + p["a"] @ p["b"], jax.tree.map(lambda v: v[None], p)
  )[0],
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), MERGED, POLICIES)
def test_a_parameter_with_a_low_rank_change_is_as_exact_as_it_was(fn, policy):
  p = {"w": W + 1e-4, "a": jnp.full((4, 2), 1e-2), "b": jnp.full((2, 4), 1e-2)}
  found, want = in_both_formats(fn, policy, p)
  np.testing.assert_allclose(found, want, rtol=1e-6)
  forward = mpjax.autocast(lambda p, x: x @ fn(p), policy)
  *_, product = matmuls(forward, p, DATA)
  assert {v.aval.dtype.itemsize for v in (*product.invars, *product.outvars)} == {2}


@both
@cases(
  queries=lambda p: (lambda t: t + t @ p["w"])(jnp.broadcast_to(p["w"], (8, 4, 4))),
  bias=lambda p: p["w"] @ p["w"] + p["a"][:, 0],
  vector=lambda p: p["w"][0] @ p["w"] + p["a"][:, 0],
)
def test_what_is_spread_over_a_batch_or_is_a_bias_is_no_merged_parameter(fn, policy):
  p = {"w": W, "a": jnp.full((4, 2), 1e-2)}
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(p))
  (add,) = (e for e in found if e.primitive.name == "add")
  assert add.outvars[0].aval.dtype.itemsize == 2


def kept(update):
  """A function that gives back the state that it was given, one entry updated."""
  return lambda s, x: {**s, "m": update(s["m"], x @ s["w"])}


STATES = {
  "sum": kept(lambda m, h: m + h.T @ h),
  "sum_of_rows": kept(lambda m, h: m + (jnp.ones(8) @ h)[:, None]),
  "average": kept(lambda m, h: 0.995 * m + 0.005 * h[:4]),
  "second_moment": kept(lambda m, h: 0.995 * m + 0.005 * (h.T @ h) / 8),
  "guarded": kept(lambda m, h: jnp.where(jnp.isfinite(h[:4]), 0.995 * m + 0.005 * h[:4], m)),
  "jitted": kept(jax.jit(lambda m, h: 0.995 * m + 0.005 * h[:4])),
  "branch": kept(
    lambda m, h: lax.cond(h.sum() > 0, lambda m, h: 0.995 * m + 0.005 * h, lambda m, _: m, m, h[:4])
  ),
  "slot": kept(lambda m, h: jnp.concatenate([m[:1] + h[:1], m[1:]])),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), STATES, POLICIES)
def test_a_state_that_is_returned_is_updated_in_float32(fn, policy):
  """As a program outside of the function hands it on: nothing inside tells that it is a sum."""
  state = {"w": W, "m": jnp.full((4, 4), 5.0)}

  def steps(state, x, policy):
    step = mpjax.autocast(fn, policy)
    return lax.fori_loop(0, 300, lambda _, s: step(s, x), state)["m"]

  run = jax.jit(steps, static_argnums=2, compiler_options=ROUNDING)
  found, want = (run(state, DATA, p) - 5.0 for p in (policy, "float32"))
  np.testing.assert_allclose(found, want, rtol=0.01, atol=1e-6)


@both
def test_a_slope_and_a_scale_that_layers_share_are_no_decays(policy):
  def fn(p, x):
    h = x @ p["w"]
    for _ in range(6):
      h = h + h @ p["w"]
      h = jnp.where(h > 0, h, p["slope"] * h)
      h = (h + jnp.tanh(h @ p["w"])) * p["scale"]
    return h

  p = {"w": W, "slope": jnp.array(0.9), "scale": jnp.full(4, 0.9)}
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(p, DATA))
  products = [e for e in found if e.primitive.name in ("mul", "add")]
  assert {e.outvars[0].aval.dtype.itemsize for e in products} == {2}


ONES = jnp.ones((4001, 1))
KEYS = jax.random.normal(jax.random.key(0), (2048, 4)) + 1
one = jnp.ones((1, 1))
_first = lambda y: (y[0], y[1:])
_one_more = lambda h: (h[0] + 1, h[1] + 1)
COUNTS = {
  "parameter": lambda p, x: lax.scan(lambda h, u: (h + u, None), p, x @ one)[0],
  "matmul": lambda p, x: lax.scan(lambda h, u: (h + u, None), x[:1] @ p - 1, x @ p)[0],
  "first_element": lambda p, x: lax.scan(lambda h, u: (h + u, None), *_first(x @ p))[0],
  "fori": lambda p, x: lax.fori_loop(0, 4000, lambda i, h: h + 1, x[0] @ p),
  "while": lambda p, x: lax.while_loop(lambda h: h[1] < 4000, _one_more, (x[0] @ p, 0))[0],
  "nested": lambda p, x: lax.scan(
    lambda h, us: (lax.scan(lambda h, u: (h + u, None), h, us)[0], None),
    x[0] @ p,
    (x[:4000] @ p).reshape(80, 50, 1),
  )[0],
  "where": lambda p, x: lax.scan(
    lambda h, u: (jnp.where(u > 0, h + u, h), None), x[0] @ p, x[:4000] @ p
  )[0],
  "associative": lambda p, x: lax.associative_scan(jnp.add, x @ p)[-1],
  "associative_backwards": lambda p, x: lax.associative_scan(
    lambda a, b: a + b, (x @ p).T, axis=1, reverse=True
  )[0, 0],
}


@pytest.mark.quick(every=3)
@both
@cases(**COUNTS)
def test_a_long_loop_counts(fn, policy):
  p = jnp.ones((1, 1))
  got = np.asarray(rounded(mpjax.autocast(fn, policy))(p, ONES)).ravel()[0]
  assert got == pytest.approx(float(np.asarray(fn(p, ONES)).ravel()[0]), rel=1e-3)


def averaged(ys, decay=0.99):
  mean = ys[0]
  for y in ys[1:]:
    mean = decay * mean + (1 - decay) * y
  return mean


def from_both_ends(ys):
  return functools.reduce(jnp.add, ys[::2]) - functools.reduce(jnp.subtract, ys[1::2], -ys[0])


@pytest.mark.quick(every=2)
@both
@cases(
  python=sum,
  taken_away=lambda ys: 100 - functools.reduce(lambda a, y: a - jnp.squeeze(y[None]), ys, 90),
  joined=from_both_ends,
  averaged=averaged,
  by_a_traced_decay=lambda ys: averaged(ys, jnp.tanh(jnp.float32(2.5))),
)
def test_a_sum_that_is_written_out_counts(fn, policy):
  program = lambda w, x: fn(jnp.split(jnp.abs(x @ w), 800))
  found, want = in_both_formats(program, policy, W * 0.3, jnp.tile(KEYS[:100], (8, 1)))
  np.testing.assert_allclose(found, want, rtol=1e-3 if policy == "mixed_float16" else 1e-2)


@both
@cases(
  residuals=lambda w, h: functools.reduce(lambda h, _: h + jnp.tanh(h @ w), range(40), h),
  experts=lambda w, h: sum(jnp.tanh(h @ (w * n)) for n in range(1, 17)),
)
def test_a_stream_of_layers_and_a_sum_of_experts_stay_in_16_bits(fn, policy):
  found = equations(jax.make_jaxpr(mpjax.autocast(lambda w, x: fn(w, x @ w), policy))(W, DATA))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}


@both
@cases(
  ones=lambda h, us: h + us,
  own_rule=lambda h, us: _own_sum(h, us),
  where=lambda h, us: jnp.where(us > 1, h + us, h + 0.3),
)
def test_a_loop_of_a_thousand_turns_does_not_drift(fn, policy):
  """float16 counts as far, but each of its roundings may have the same sign."""
  program = lambda w, x: lax.scan(lambda h, u: (fn(h, u), None), *_first(x @ w))[0]
  found, want = in_both_formats(program, policy, W * 0.3, jnp.tile(KEYS[:100], (10, 1)))
  np.testing.assert_allclose(found, want, rtol=2e-3 if policy == "mixed_float16" else 1e-2)


@jax.custom_vjp
def _own_sum(h, u):
  return h + u


_own_sum.defvjp(lambda h, u: (h + u, None), lambda _, g: (g, g))


@both
@cases(
  scan=lambda f, h, us: lax.scan(lambda h, u: (f(h, u), None), h, us)[0],
  fori=lambda f, h, us: lax.fori_loop(0, 100, lambda n, h: f(h, us[n]), h),
  jitted=lambda f, h, us: lax.scan(lambda h, u: (jax.jit(f)(h, u), None), h, us)[0],
)
def test_what_a_loop_without_layers_adds_up_counts(fn, policy):
  """Distances along a path, and best scores: 256 and 3 are 260 in bfloat16."""
  path = lambda h, u: jnp.maximum(h, h - 1) + u
  program = lambda w, x: fn(path, *_first(x @ w))
  lengths = jnp.full((100, 4), 3.0).at[0].set(256.0)
  found, want = in_both_formats(program, policy, jnp.eye(4), lengths)
  np.testing.assert_array_equal(found, want)


def with_context(turn):
  """A loss over many items, each of which reads the context that a layer gave."""
  return lambda w, x: lax.scan(lambda n, u: (n + turn(w, x @ w, u).mean(), None), 0.0, ITEMS)[0]


ITEMS = 0.5 + 0.3 * jax.random.normal(jax.random.key(5), (600, 4))
IN_EVERY_TURN = {
  "decoder": with_context(lambda w, c, u: jnp.tanh(u @ w + c)),
  "gated": with_context(lambda w, c, u: jax.nn.sigmoid(u * c)),
  "attended": with_context(lambda w, c, u: jax.nn.softmax(c @ u) @ c),
  "checkpointed": with_context(jax.checkpoint(lambda w, c, u: jnp.tanh(u @ w + c))),
  "jitted": with_context(jax.jit(lambda w, c, u: jnp.tanh(u @ w + c))),
  "mapped": lambda w, x: lax.map(functools.partial(_distance, x @ w), ITEMS).sum() / 600,
  "nested": lambda w, x: lax.map(lambda n: with_context(_gate(n))(w, x), jnp.arange(3.0)).sum(),
  "given_to_a_jit": lambda w, x: jax.jit(with_items)(x @ w),
}


def with_items(c):
  return lax.scan(lambda n, u: (n + jnp.tanh(u * c).mean(), None), 0.0, ITEMS)[0]


def _distance(c, u):
  return jnp.mean((c - u) ** 2)


def _gate(n):
  return lambda w, c, u: jnp.tanh(c * u + n)


@in_turns(("fn", "policy"), IN_EVERY_TURN, POLICIES)
def test_what_every_turn_of_a_loop_reads_gets_the_sum_of_their_cotangents(fn, policy):
  x = jax.random.normal(jax.random.key(6), (8, 4))
  got = jax.jit(jax.grad(mpjax.autocast(fn, policy)), compiler_options=ROUNDING)(W, x)
  want = jax.grad(fn)(W, x)
  tolerance = 0.01 if policy == "mixed_bfloat16" else 2e-3
  np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()))


OFTEN = {
  "unrolled": lambda h: sum(jnp.tanh(h + n / 64).mean() for n in range(100)),
  "by_layers": lambda h: sum(jnp.tanh(h @ (W * n / 64)).mean() for n in range(100)),
  "of_equal_modules": lambda h: sum(jax.jit(lambda h: jnp.tanh(h).mean())(h) for _ in range(100)),
  "handed_in": jax.jit(lambda h: sum(jnp.tanh(h * n / 64).mean() for n in range(100))),
  "behind_a_module": lambda h: (
    lambda c: sum(jnp.tanh(c * (n + 1) / 64).mean() for n in range(100))
  )(jax.named_scope("encoder")(lambda h: h * jax.nn.softmax(h))(h)),
  "in_a_few_turns": lambda h: lax.scan(
    lambda n, u: (n + sum(jnp.tanh(h + (m + u) / 64).mean() for m in range(14)), None),
    0.0,
    jnp.linspace(0.5, 1, 14),
  )[0],
}


@in_turns(("fn", "policy"), OFTEN, POLICIES)
def test_what_a_python_loop_reads_often_gets_the_sum_of_its_cotangents(fn, policy):
  x = jax.random.normal(jax.random.key(6), (8, 4)) + 0.5
  loss = lambda w, x: fn(x @ w)
  got = jax.jit(jax.grad(mpjax.autocast(loss, policy)), compiler_options=ROUNDING)(W, x)
  want = jax.grad(loss)(W, x)
  tolerance = 0.008 if policy == "mixed_bfloat16" else 1e-3
  np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()))


@both
def test_modules_that_read_one_value_in_float32_alone_run(policy):
  def loss(w):
    h = jnp.eye(4) @ w
    total = 0.0
    for n in range(20):
      with jax.named_scope(f"module_{n}"):
        total += jnp.mean(jnp.exp(h) * jnp.exp(h))
    return total

  got = jax.jit(jax.grad(mpjax.autocast(loss, policy)))(W)
  np.testing.assert_allclose(got, jax.grad(loss)(W), rtol=0.01)


@both
def test_who_reads_a_value_often_stores_it_once(policy):
  x = jax.random.normal(jax.random.key(6), (8, 4))

  def decoder(w, x):
    h = context = jnp.tanh(x @ w)
    for _ in range(20):
      h = h + 0.1 * jnp.tanh(context @ w)
    return h

  leaves = jax.tree.leaves(jax.vjp(mpjax.autocast(decoder, policy), W, x)[1])
  context = jnp.tanh(x @ W)
  stored = [leaf for leaf in leaves if leaf.shape == context.shape]
  assert (
    sum(bool(jnp.allclose(leaf.astype(jnp.float32), context, atol=0.02)) for leaf in stored) == 1
  )


SOURCES = jnp.where(jnp.arange(1200) % 2, 3, jnp.arange(1200) % 8)  # of edges, half of one node
TAKEN = {
  "indexed": lambda h: h[SOURCES],
  "taken": lambda h: jnp.take(h, SOURCES, axis=0),
  "by_halves": lambda h: h[SOURCES.reshape(2, 600)].reshape(1200, 4),
  "of_columns": lambda h: h.T[:, SOURCES].T,
  "jitted": jax.jit(lambda h: h[SOURCES]),
  "checkpointed": jax.checkpoint(lambda h: h[SOURCES]),
  "mapped": lambda h: jax.vmap(lambda n: h[n])(SOURCES),
  "mapped_over_columns": lambda h: jax.vmap(lambda c: c[SOURCES], 1, 1)(h),
}


@in_turns(("take", "policy"), TAKEN, POLICIES)
def test_what_a_lookup_takes_often_gets_the_sum_of_its_cotangents(take, policy):
  x = jax.random.normal(jax.random.key(6), (8, 4))
  edges = 0.5 + jax.random.uniform(jax.random.key(7), (1200, 4))
  loss = lambda w, x: jnp.mean(jnp.tanh(take(x @ w) * edges))
  got = jax.jit(jax.grad(mpjax.autocast(loss, policy)), compiler_options=ROUNDING)(W, x)
  inside = mpjax.autocast(jax.grad(loss), policy)(W, x)
  want = jax.grad(loss)(W, x)
  tolerance = 0.01 if policy == "mixed_bfloat16" else 2e-3
  for found in (got, inside):
    np.testing.assert_allclose(found, want, atol=tolerance * float(jnp.abs(want).max()))


@both
def test_a_lookup_in_what_a_layer_gave_stays_in_16_bits(policy):
  network = mpjax.autocast(lambda w, x: (x @ w)[jnp.array([1, 0, 1])] @ w, policy)
  found = [e for e in equations(jax.make_jaxpr(network)(W, DATA)) if e.primitive.name == "gather"]
  assert [e.invars[0].aval.dtype.itemsize for e in found] == [2]
  tangent = jax.jvp(lambda w: network(w, DATA), (W,), (W,))[1]
  want = jax.jvp(lambda w: (DATA @ w)[jnp.array([1, 0, 1])] @ w, (W,), (W,))[1]
  np.testing.assert_allclose(tangent, want, rtol=0.02)


@both
def test_a_scan_over_layers_keeps_its_16_bit_stream(policy):
  def layers(ws, x):
    return lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x @ ws[0], ws)[0]

  ws = jnp.ones((12, 4, 4)) / 4
  (scan,) = [
    e
    for e in equations(jax.make_jaxpr(mpjax.autocast(layers, policy))(ws, DATA))
    if e.primitive.name == "scan"
  ]
  assert scan.outvars[0].aval.dtype.itemsize == 2


@both
def test_so_it_does_where_the_layers_share_a_scale(policy):
  def layers(p, x):
    turn = lambda h, w: (h + p["scale"] * jnp.tanh(h @ w), None)
    return lax.scan(turn, x @ p["w"][0], p["w"])[0]

  p = {"w": jnp.ones((12, 4, 4)) / 4, "scale": jnp.float32(0.2)}
  found = equations(jax.make_jaxpr(mpjax.autocast(layers, policy))(p, DATA))
  (scan,) = [e for e in found if e.primitive.name == "scan"]
  assert scan.outvars[0].aval.dtype.itemsize == 2


slope = lambda w, y: jnp.tanh(y @ w)
euler = lambda w, y: y + 0.002 * slope(w, y)


def runge_kutta(w, y):
  k1 = slope(w, y)
  k2 = slope(w, y + 0.001 * k1)
  return y + 0.002 / 6 * (k1 + 2 * k2 + 3 * slope(w, y + 0.001 * k2))


def leapfrog(w, y):
  q, v = jnp.split(y, 2)
  v = v - 0.002 * slope(w, q)
  return jnp.concatenate([q + 0.002 * v, v])


def pair_of_states(w, y):
  """Neither is computed from itself, but in the turn before."""
  turn = lambda s, _: ((s[0] + 0.002 * slope(w, s[1]), s[1] - 0.002 * slope(w, s[0])), None)
  return jnp.stack(lax.scan(turn, (y, y[::-1]), None, length=50)[0]) - jnp.stack([y, y[::-1]])


DT = np.float32(0.002) * jnp.float32(1)


@jax.jit
def jitted_slope(w, y):
  return 0.002 * slope(w, y)


@jax.jit
def jitted_euler(w, y, size):
  return y + size * slope(w, y)


def by_halves(w, y):
  first, last = jnp.split(slope(w, y), 2)
  return y + jnp.concatenate([DT * first, 0.002 * last])


def over_times(w, y):
  turn = lambda z, dt: (z + dt * slope(w, z), None)
  return lax.scan(turn, y, jnp.full(50, 0.002))[0] - y


@jax.jit
def jitted_product(w, y, size):
  return size * y * slope(w, y)


def predators(w, y):
  a, b = jnp.split(y, 2)
  return jnp.concatenate([a + 0.002 * a * (1 - b), b + 0.002 * b * (a - 1)])


def packed(w, y):
  q, v = y[:2], y[2:]
  return jnp.stack([q + 0.002 * v, v - 0.002 * jnp.sin(q)]).reshape(y.shape)


def unpacked(w, y):
  a, b, *others = y
  return jnp.stack([a + 0.002 * jnp.cos(b), b - 0.002 * a, *others])


def repeated(step):
  return lambda w, y: functools.reduce(lambda z, _: step(w, z), range(50), y) - y


def in_scan(step):
  return lambda w, y: lax.scan(lambda z, _: (step(w, z), None), y, None, length=50)[0] - y


STEPPED = {
  "written_out": repeated(euler),
  "scanned": in_scan(euler),
  "subtracted": in_scan(lambda w, y: y - slope(w, y) * -0.002),
  "added_first": in_scan(lambda w, y: 0.002 * slope(w, y) + y),
  "divided": in_scan(lambda w, y: y + slope(w, y) / 500),
  "followed": in_scan(lambda w, y: y + 0.002 * (slope(w, y) - y)),
  "two_terms": in_scan(lambda w, y: y + (0.002 * slope(w, y) - 0.002 * jnp.sin(y))),
  "one_by_one": in_scan(lambda w, y: y + 0.002 * slope(w, y) - 0.002 * jnp.sin(y)),
  "elementwise": in_scan(lambda w, y: y + 0.002 * jnp.cos(y)),
  "runge_kutta": in_scan(runge_kutta),
  "leapfrog": in_scan(leapfrog),
  "pair_of_states": pair_of_states,
  "turned": in_scan(lambda w, y: y[::-1] + 0.002 * slope(w, y[::-1])),
  "jitted": repeated(jax.jit(euler)),
  "remat": in_scan(jax.checkpoint(euler)),
  "cond": in_scan(lambda w, y: lax.cond(y[0, 0] < 99, euler, lambda w, y: y, w, y)),
  "mapped": lambda w, y: jax.vmap(in_scan(euler), (None, 0))(w, y[:, None]),
  "number_of_an_array": repeated(lambda w, y: y + DT * slope(w, y)),
  "number_captured_by_a_loop": in_scan(lambda w, y: y + slope(w, y) * DT),
  "numbers_of_a_loop": over_times,
  "jitted_slope": in_scan(lambda w, y: y + jitted_slope(w, y)),
  "number_of_a_helper": in_scan(lambda w, y: jitted_euler(w, y, DT)),
  "where": in_scan(lambda w, y: y + jnp.where(y > 0, jitted_slope(w, y), 0)),
  "relu": in_scan(lambda w, y: y - jax.nn.relu(-0.002 * slope(w, y))),
  "clipped": in_scan(lambda w, y: y + jnp.clip(0.002 * slope(w, y), -1, 1)),
  "barrier": in_scan(lambda w, y: y + lax.optimization_barrier(0.002 * slope(w, y))),
  "by_halves": in_scan(by_halves),
  "of_a_sum": in_scan(lambda w, y: y + DT * (jitted_slope(w, y) * 500 - jnp.sin(y))),
  "branch": in_scan(lambda w, y: y + lax.cond(y[0, 0] < 9, jitted_slope, lambda w, y: 0 * y, w, y)),
  "once_a_step": in_scan(lambda w, y: y + 1.0 * jitted_slope(w, y)),
  "helpers": in_scan(lambda w, y: y + jax.jit(jax.jit(jax.jit(jax.nn.relu)))(jitted_slope(w, y))),
  "product": in_scan(lambda w, y: y + 0.002 * y * (3 - y)),
  "pair": in_scan(predators),
  "learned_rate": repeated(lambda w, y: y + 0.002 * w[0, 0] * (y @ w - y)),
  "in_the_second_factor": in_scan(lambda w, y: y + jnp.cos(y) * (slope(w, y) * 0.002)),
  "divided_in_it": in_scan(lambda w, y: y + slope(w, y) * (jnp.cos(y) / 500)),
  "quotient": in_scan(lambda w, y: y - 0.002 * slope(w, y) / (1 + y)),
  "masked": in_scan(lambda w, y: y + 0.002 * (y > 0).astype(jnp.float32) * slope(w, y)),
  "where_masked": in_scan(lambda w, y: y - 0.002 * slope(w, y) * (jnp.where(y > 0, 1.0, 0.0) * y)),
  "jitted_product": in_scan(lambda w, y: y + jnp.where(y > 9, 0, jitted_product(w, y, DT))),
  "packed": in_scan(packed),
  "unpacked": in_scan(unpacked),
  "a_part_of_it": in_scan(lambda w, y: y.at[0].set(y[0] + 0.002 * slope(w, y)[0])),
  "inner_points": in_scan(
    lambda w, y: y.at[1:-1].set(y[1:-1] + 0.002 * (y[2:] - y[1:-1] + y[:-2]) * y[1:-1])
  ),
  "updated_slice": in_scan(
    lambda w, y: lax.dynamic_update_slice(y, 0.002 * slope(w, y)[1:2] + y[1:2], (1, 0))
  ),
  "clipped_value": in_scan(lambda w, y: jnp.clip(y, -9, 9) + 0.002 * slope(w, y)),
  "clamped_value": in_scan(lambda w, y: 0.002 * slope(w, y) + lax.clamp(-9.0, y, 9.0)),
  "chosen_value": in_scan(lambda w, y: jnp.where(y < 9, y, 0) - 0.002 * slope(w, y)),
  "summed_up": in_scan(lambda w, y: sum([y, 0.002 * slope(w, y), 0.002 * jnp.sin(y)])),
  "scaled_value": in_scan(lambda w, y: 1.0 * y + 0.002 * slope(w, y)),
  "weighed": in_scan(lambda w, y: (499 * y + slope(w, y)) / 500),
  "weighed_by_parts": in_scan(lambda w, y: y / 0.002 + slope(w, y) - y * 499),
  "learned_size": lambda w, y: (lambda size: in_scan(lambda w, y: y + size * slope(w, y))(w, y))(
    jax.nn.softplus(w[0, 0] - 6.9)
  ),
  "learned_size_of_a_helper": lambda w, y: (
    lambda size: in_scan(lambda w, y: jitted_euler(w, y, size))(w, y)
  )(w[0, 0] * 0.003),
  "learned_time": lambda w, y: (
    lax.fori_loop(0, 50, lambda _, z: z - slope(w, z) / (w[0, 0] * 700), y) - y
  ),
  "times_a_sum": in_scan(lambda w, y: y - jnp.cos(y) * (DT * jnp.sin(y) + jitted_slope(w, y))),
  "before_a_matmul": in_scan(lambda w, y: y + (0.002 * slope(w, y)) @ w),
  "in_a_hidden_layer": repeated(lambda w, y: y + jnp.tanh(0.002 * (y @ w)) @ w),
  "by_small_weights": in_scan(lambda w, y: y + slope(w, y) @ (0.002 * w)),
  "into_a_function": in_scan(lambda w, y: y + jnp.expm1(jnp.sin(0.002 * (y @ w)))),
  "of_each_channel": in_scan(lambda w, y: y + jnp.diag(w)[None] / 300 * slope(w, y)),
  "learned_for_each": lambda w, y: (
    lambda sizes: in_scan(lambda w, y: y + sizes * slope(w, y))(w, y)
  )(jax.nn.softplus(jnp.diag(w) - 6.9)[None]),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), STEPPED, POLICIES)
def test_small_steps_move_what_came_out_of_a_matmul(fn, policy):
  w, x = jnp.eye(4) * 0.7, jnp.linspace(0.3, 2, 16).reshape(4, 4)
  found, want = in_both_formats(lambda w, x: fn(w, x @ w), policy, w, x)
  np.testing.assert_allclose(found, want, atol=0.02 * float(np.abs(want).max()))


def refined(gradient, turns=100):
  """What a latent is, by the means of a decoder: the rate is large, and the gradient of a mean."""

  def fn(p, y):
    gradient_of = gradient(lambda y: jnp.mean((jnp.tanh(y @ p["decoder"]) - 0.9) ** 2))
    return lax.fori_loop(0, turns, lambda _, y: y - 0.2 * gradient_of(y), y) - y

  return fn


def clipped_gradient(loss):
  clip = lambda g: g * jnp.where(jnp.max(g) > 1, 0.5, 1.0)
  return lambda y: clip(jax.grad(loss)(y))


REFINED = {
  "gradient": refined(jax.grad),
  "jitted": refined(lambda loss: jax.jit(jax.grad(loss))),
  "remat": refined(lambda loss: jax.grad(jax.checkpoint(loss))),
  "with_the_value": refined(lambda loss: lambda y: jax.value_and_grad(loss)(y)[1]),
  "clipped": refined(clipped_gradient),
}


@in_turns(("fn", "policy"), REFINED, POLICIES)
def test_a_latent_moves_by_its_gradient_whatever_the_rate(fn, policy):
  keys = jax.random.split(jax.random.key(1))
  p = {"encoder": jnp.eye(4) * 0.999, "decoder": jax.random.normal(keys[0], (4, 64)) * 0.4}
  x = jax.random.normal(keys[1], (16, 4)) + 1
  found, want = in_both_formats(lambda p, x: fn(p, x @ p["encoder"]), policy, p, x)
  np.testing.assert_allclose(found, want, atol=0.02 * float(np.abs(want).max()))


@jax.custom_vjp
def _reversible(w, h):
  return h + jnp.tanh(h @ w)


def _reversed(residuals, g):
  w, h = residuals
  by_w, by_h = jax.vjp(lambda w, h: jnp.tanh(h @ w), w, h)[1](g)
  return by_w, g + by_h


_reversible.defvjp(lambda w, h: (_reversible(w, h), (w, h)), _reversed)


def _trained_in_it(w, h):
  """A layer whose weights take a step of their own: what it gives is no gradient."""
  gradient = jax.grad(lambda w: jnp.mean((h @ w - 1) ** 2))(w)
  return h + jnp.tanh(h @ (w - 0.1 * gradient))


@both
@cases(
  residual=lambda w, h: h + jnp.tanh(h @ w),
  gated=lambda w, h: h + jnp.sin(h) * (h @ w),
  remat=jax.checkpoint(lambda w, h: h + jnp.tanh(h @ w)),
  own_rule=_reversible,
  trained=_trained_in_it,
)
def test_the_cotangents_of_a_residual_are_no_steps(fn, policy):
  def loss(w, x):
    h = x @ w
    for _ in range(3):
      h = fn(w, h)
    return jnp.sum(h @ w)

  x = jnp.ones((9, 4))
  for program in (mpjax.autocast(jax.grad(loss), policy), jax.grad(mpjax.autocast(loss, policy))):
    sums = [e for e in equations(jax.make_jaxpr(program)(W, x)) if e.primitive.name == "add"]
    stream = [e for e in sums if e.outvars[0].aval.shape == x.shape]
    assert len(stream) >= 3
    assert {e.outvars[0].aval.dtype.itemsize for e in stream} == {2}


@both
def test_the_32nd_of_an_interval_is_a_small_step(policy):
  fn = lambda w, x: lax.fori_loop(0, 32, lambda _, y: y + slope(w, y) / 32, x @ w)
  found = jax.make_jaxpr(mpjax.autocast(fn, policy))(jnp.eye(4), jnp.ones((4, 4)))
  (loop,) = [eqn for eqn in equations(found) if eqn.primitive.name in ("scan", "while")]
  assert loop.outvars[-1].aval.dtype == jnp.float32


@both
def test_a_small_step_is_differentiated(policy):
  w, x = jnp.eye(4) * 0.7, jnp.linspace(0.3, 2, 16).reshape(4, 4)
  loss = lambda w, x: jnp.sum(STEPPED["scanned"](w, lax.stop_gradient(x @ w)))
  found = rounded(jax.grad(mpjax.autocast(loss, policy)))(w, x)
  np.testing.assert_allclose(found, jax.grad(loss)(w, x), rtol=0.05, atol=1e-3)


@both
@cases(
  added=lambda h: 5 + 0.001 * h,
  subtracted=lambda h: 5 - h / 1000,
  last=lambda h: h * 0.001 - 5,
)
def test_a_number_keeps_a_small_step_beside_it(fn, policy):
  program = lambda w, x: (lambda y: y[1:] - y[:1])(fn(x @ w))
  x = jnp.linspace(0.3, 2, 16).reshape(4, 4)
  found, want = in_both_formats(program, policy, W, x)
  np.testing.assert_allclose(found, want, atol=1e-4)


def convolved(h, kernel):
  images = jnp.broadcast_to(h[:, None, None], (len(h), 1, 1, 4))
  dims = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=dims)[:, 0, 0]


class Position(nn.Module):
  @nn.compact
  def __call__(self, h):
    return 0.01 * lax.broadcasted_iota(jnp.float32, h.shape, 1) + 0.01 * jnp.exp(h)


class Turned(nn.Module):
  @nn.compact
  def __call__(self, h):
    turned = jax.jit(lambda h: lax.convert_element_type(lax.complex(h, h) * 0.5j, jnp.float32))
    return turned(h)


@both
@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("module", [Position, Turned])
def test_a_sum_with_what_is_made_of_no_operand_or_of_complex_numbers_is_planned(module, policy):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.Dense(4)(x)
      return nn.Dense(4)(h + module()(h))

  variables = Model().init(jax.random.key(0), DATA)
  want = Model().apply(variables, DATA)
  found = mpjax.autocast(Model().apply, policy)(variables, DATA)
  np.testing.assert_allclose(found, want, rtol=0.05, atol=0.05)


@both
def test_residuals_and_polynomials_take_no_small_steps(policy):
  """A scaled, a gated and a low-rank residual, branches, means, a leaky relu, the cube of gelu."""

  def fn(w, x):
    h = x @ w
    h = h + 0.1 * jnp.tanh(h @ w)
    h = h + w[0] * (h @ w)
    h = h @ w + 0.01 * (h @ w @ w)
    h = h + 0.01 * (x @ w)
    wide, mixed = jnp.tile(h, 1025), jnp.tile(h, (300, 1))
    h = h + wide @ jnp.tile(w, (1025, 1)) / 4100**0.5
    h = h + (jax.nn.relu(h @ mixed.T) / 1200 @ mixed) + (jax.nn.relu(h @ mixed.T) @ mixed) / 1200
    h = h + jax.jit(lambda h: jnp.where(h > 0, h @ w, 0.001 * h))(h)
    h = h + jax.nn.relu(0.0 * (h @ w)) + jnp.where(h > 0, 0.0 * (h @ w), 0)
    h = h + jax.nn.relu(wide @ jnp.tile(w, (1025, 1)) * (2 / 4100) ** 0.5)
    h = h + jax.jit(lambda h: jnp.round(h * 127) / 127)(h @ w)
    h = h + jax.nn.relu(convolved(h, jnp.tile(w, (12, 12, 1, 1))) / (144 * 4) ** 0.5)
    h = jnp.where(h > 0, h, 0.01 * h) + 1e-3
    return (h + 0 * (h @ w)) / 100

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(W, DATA))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}
  gelu = equations(jax.make_jaxpr(mpjax.autocast(lambda w, x: jax.nn.gelu(x @ w), policy))(W, DATA))
  if policy == "mixed_bfloat16":  # in float16 the cube leaves the format
    assert {e.outvars[0].aval.dtype.itemsize for e in gelu if e.primitive.name == "add"} == {2}


summing = lambda w, h: jnp.tile(h, 1025) @ jnp.tile(w, (1025, 1))
quantized = lambda h: jnp.round(h * 127)
PRODUCTS = {
  "scaled": lambda w, h: h + 0.1 * jnp.tanh(h) * (h @ w),
  "gated": lambda w, h: h + w[0] * jnp.sin(h) * (h @ w),
  "leaky": lambda w, h: h + jnp.where(h > 0, 1.0, 0.01) * (h @ w),
  "offset": lambda w, h: h + (200 * jnp.tanh(h)) * (0.005 * (h @ w)),
  "offset_by_a_sum": lambda w, h: h + 0.005 * jnp.tanh(h) * (200 * (h @ w) + h),
  "offset_by_a_number": lambda w, h: h + 0.005 * jnp.tanh(h) * (200 - h @ w),
  "offset_by_a_matmul": lambda w, h: h + 0.005 * jnp.tanh(h) * ((200 * h) @ w),
  "mean": lambda w, h: h + jnp.tanh(h) * summing(w, h) / 4100,
  "mean_of_a_factor": lambda w, h: h + summing(w, h) * (jnp.tanh(h) / 4100),
  "mean_of_divided_terms": lambda w, h: h + jnp.tanh(h) * summing(w, h / 4100),
  "sum_with_divided_weights": lambda w, h: h + jnp.tanh(h) * summing(w / 4100**0.5, h),
  "capped": lambda w, h: h + jnp.tanh(h) * (50 * jnp.tanh(h @ w / 50)),
  "of_two_sums": lambda w, h: h + (summing(w, h) / 4100**0.5) * (summing(w, h) * (2 / 4100) ** 0.5),
  "quantized": lambda w, h: h + jnp.tanh(h) * (quantized(h) / 127),
  "quantized_matmul": lambda w, h: h + (quantized(h) @ w) * (jnp.tanh(h) / 127),
  "nothing": lambda w, h: h + 0.0 * jnp.tanh(h) * (h @ w),
}


@in_turns(("fn", "policy"), PRODUCTS, POLICIES)
def test_a_product_with_an_ordinary_scale_is_no_small_step(fn, policy):
  layers = mpjax.autocast(lambda w, x: fn(w, x @ w) @ w, policy)
  found = equations(jax.make_jaxpr(layers)(W, DATA))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}


@both
def test_a_residual_of_means_takes_no_small_step(policy):
  class Pooled(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.avg_pool(x, (8, 8), (1, 1), "SAME")

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.Conv(4, (3, 3))(x)
      return nn.Conv(4, (3, 3))(h + Pooled()(h))

  x = jnp.ones((1, 16, 16, 3))
  variables = Model().init(jax.random.key(0), x)
  found = equations(jax.make_jaxpr(mpjax.autocast(Model().apply, policy))(variables, x))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "add"} == {2}


@both
@cases(
  bisection=lambda w, x: _bisect(x @ w),
  newton=lambda w, x: _until(lambda y: y - (y * y - x @ w) / (2 * y), x @ w),
  fixed_point=lambda w, x: _until(lambda y: jnp.cos(y * 0.5 + 0.1 * (x @ w)), x @ w),
)
def test_a_loop_to_a_tolerance_ends_when_it_does_in_float32(fn, policy):
  w, x = jnp.eye(4), jnp.full((1, 4), 0.707)
  assert abs(int(rounded(mpjax.autocast(fn, policy))(w, x)) - int(fn(w, x))) <= 2


@both
@cases(
  gram=lambda e, k: (lambda h: h @ k @ h)(jnp.eye(32) - 1 / 32),
  of_ones=lambda e, k: (jnp.eye(32) - jnp.ones((32, 32)) / 32) @ k,
  features=lambda e, k: (jnp.eye(32) - 1 / 32) @ e,
  turned=lambda e, k: e.T @ (jnp.eye(32) - 1 / 32),
)
def test_values_less_their_mean_are_float32(fn, policy):
  """As by hand, who goes on in float32 behind the layers."""
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  w, x = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 6

  def apply(w, x):
    e = jnp.tanh(x @ w) + 5.0
    return fn(e, e @ e.T)

  def by_hand(w, x):
    e = jnp.tanh(x.astype(dtype) @ w.astype(dtype)) + 5.0
    return fn(*(y.astype(jnp.float32) for y in (e, e @ e.T)))

  exact, hand, got = (jax.jit(f)(w, x) for f in (apply, by_hand, mpjax.autocast(apply, policy)))
  assert jnp.linalg.norm(got - exact) < 1.5 * jnp.linalg.norm(hand - exact)


def largest(fn, policy):
  h = jnp.ones((2, 4, 4))
  found = equations(jax.make_jaxpr(mpjax.autocast(lambda w, h: fn(h @ w), policy))(W, h))
  return {
    e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name.startswith("reduce_m")
  }


@both
@cases(
  points=lambda h: h.max(1) @ W,
  maxout=lambda h: h.reshape(2, 4, 2, 2).max(-1) @ W[:2],
  of_both_ends=lambda h: jnp.concatenate([h.max(1), h.min(1)], -1) @ jnp.tile(W, (2, 1)),
)
def test_a_pool_before_a_matmul_is_one_of_the_narrow_values(fn, policy):
  """A float32 one would store a float32 mask as large as what it is of."""
  assert largest(fn, policy) == {2}


@both
@cases(
  softmax=lambda h: jax.nn.softmax(h) @ W,
  by_hand=lambda h: jnp.exp(h - h.max(-1, keepdims=True)) @ W,
  quantized=lambda h: jnp.round(127 * h / jnp.abs(h).max(-1, keepdims=True)) @ W,
  logsumexp=lambda h: jax.nn.logsumexp(h, -1),
  returned=lambda h: h.max(1),
  both_ways=lambda h: (lambda m: (m @ W, m))(h.max(1)),
)
def test_the_largest_that_something_else_reads_is_float32(fn, policy):
  assert largest(fn, policy) == {4}


@both
@cases(
  hard_swish=jax.nn.hard_swish,
  hard_sigmoid=jax.nn.hard_sigmoid,
  gate=lambda h: h * jax.nn.hard_sigmoid(h),
  in_a_function=jax.jit(lambda h: jnp.tanh(h + 3)),
  in_a_checkpoint=jax.checkpoint(lambda h: jnp.tanh(h + 3)),
  in_a_loop=lambda h: lax.scan(lambda c, _: (jnp.tanh(c + 3), None), h, None, length=2)[0],
)
def test_what_a_function_adds_on_the_way_to_a_matmul_is_in_no_unit_of_its_own(fn, policy):
  network = mpjax.autocast(lambda w, x: fn(x @ w) @ w, policy)
  added = [e for e in equations(jax.make_jaxpr(network)(W, DATA)) if e.primitive.name == "add"]
  floats = {e.outvars[0].aval.dtype for e in added if e.outvars[0].aval.shape}
  assert floats == {jnp.dtype(policy.removeprefix("mixed_"))}


@both
@cases(
  of_all=lambda w, x: _root_tested_by(lambda: jnp.sum((x @ w) ** 2)),
  in_a_function=lambda w, x: _root_tested_by(jax.jit(lambda: jnp.sum((x @ w) ** 2))),
  moved=lambda w, x: _root_tested_by(lambda: jnp.sum((w.T @ x.T) ** 2)),
)
def test_a_loop_multiplies_as_its_test_does(fn, policy):
  """The root of what the loop computes is that of what the test does, or it never ends."""
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)) * 0.5
  assert int(jax.jit(mpjax.autocast(fn, policy))(w, x)) == int(fn(w, x)) < 20


@both
@cases(
  by_an_index=lambda w, h: jnp.argmax(h @ w) != 3,
  by_a_level=lambda w, h: jnp.mean(jax.nn.sigmoid(h @ w)) < 0.9,
)
def test_a_loop_whose_test_seeks_no_residual_multiplies_in_16_bits(fn, policy):
  def loop(w, x):
    more = lambda c: fn(w, c[0]) & (c[1] < 5)
    return lax.while_loop(more, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0))[0]

  found = equations(jax.make_jaxpr(mpjax.autocast(loop, policy))(W, DATA))
  (body,) = (e.params["body_jaxpr"] for e in found if e.primitive.name == "while")
  (matmul,) = (e for e in equations(body) if e.primitive.name == "dot_general")
  assert {a.aval.dtype.itemsize for a in matmul.invars} == {2}


def _root_tested_by(square):
  def test(c):
    return (jnp.abs(c[0] ** 2 - 2 - square()) > 1e-3) & (c[1] < 200)

  def turn(c):
    return 0.5 * (c[0] + (2 + square()) / c[0]), c[1] + 1

  return lax.while_loop(test, turn, (1.0, 0))[1]


def _until(turn, start):
  def body(c):
    return turn(c[0]), jnp.max(jnp.abs(turn(c[0]) - c[0])), c[2] + 1

  return lax.while_loop(lambda c: (c[1] > 1e-4) & (c[2] < 10_000), body, (start, jnp.inf, 0))[2]


def _bisect(h):
  def body(c):
    low, high, n = c
    middle = (low + high) / 2
    up = middle + jnp.tanh(middle) < h
    return jnp.where(up, middle, low), jnp.where(up, high, middle), n + 1

  wide = lambda c: (jnp.max(c[1] - c[0]) > 1e-4) & (c[2] < 10_000)
  return lax.while_loop(wide, body, (h - 4, h + 4, 0))[2]


# What a loop writes -------------------------------------------------------------------------------


def _scanned(turn, start, x):
  return lax.scan(lambda c, n: (turn(c, n, x[n]), None), start, jnp.arange(len(x)))[0]


def _until_full(turn, start, x):
  body = lambda c: (turn(c[0], c[1], x[c[1]]), c[1] + 1)
  return lax.while_loop(lambda c: c[1] < len(x), body, (start, 0))[0]


WRITES = {
  "slice": lambda c, n, h: lax.dynamic_update_slice(c, h[None], (n, 0)),
  "set": lambda c, n, h: c.at[n].set(h),
  "choice": lambda c, n, h: jnp.where(jnp.arange(16)[:, None] == n, h[None], c),
  "rolled": lambda c, n, h: jnp.roll(c, -1, 0).at[-1].set(h),
}


@pytest.mark.parametrize("loop", [_scanned, _until_full], ids=["scan", "while"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_buffer_is_as_narrow_as_what_a_loop_writes(write, loop):
  def fn(w, x):
    return loop(lambda c, n, x: write(c, n, x @ w), jnp.zeros((16, 4)), x) @ w

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, "mixed_float16"))(W, DATA[:4]))
  (made,) = (e for e in found if e.primitive.name in ("scan", "while"))
  (buffer,) = (v.aval for v in made.outvars if v.aval.shape == (16, 4))
  assert buffer.dtype == jnp.float16


@both
@cases(
  losses=lambda c, n, h: c.at[n].set(jnp.square(h)),
  sums=lambda c, n, h: c.at[n].add(h),
  masked=lambda c, n, h: jnp.where(h > 0, c + h, c),
)
def test_a_buffer_of_float32_values_or_sums_is_float32(fn, policy):
  found, want = in_both_formats(
    lambda w, x: _scanned(lambda c, n, x: fn(c, n, x @ w), jnp.full((16, 4), 0.0), x),
    policy,
    jnp.eye(4),
    1 + jnp.arange(1024.0).reshape(256, 4) % 3,
  )
  np.testing.assert_array_equal(found, want)


# Whole numbers ------------------------------------------------------------------------------------

IDS = jnp.arange(2400) * 7 % 2401
CODES = np.arange(2401, dtype=np.float32)
chosen = lambda ids: jax.nn.one_hot(ids, 2401)
COUNTS = {
  "of_each": lambda ids: jax.nn.one_hot(ids % 2, 2).T @ jnp.ones(len(ids)),
  "one_by_one": lambda ids: jnp.tril(jnp.ones((2400, 2400))) @ (ids % 3 > 0).astype(jnp.float32),
  "of_pairs": lambda ids: jnp.einsum("ti,tj->ij", *[jax.nn.one_hot(ids % n, n) for n in (2, 4)]),
  "a_position": lambda ids: chosen(ids) @ jnp.arange(2401.0),
  "a_table_of_numpy": lambda ids: chosen(ids) @ CODES,
  "an_index": lambda ids: (
    jnp.stack([ids, ids % 40], 1).astype(jnp.float32) @ jnp.array([40.0, 1.0])
  ),
  "of_rounded_codes": lambda ids: (
    jnp.floor(jnp.stack([ids / 7, jnp.sin(ids) * 9], 1)) @ jnp.array([17.0, 1.0])
  ),
  "jitted": jax.jit(lambda ids: jax.jit(chosen)(ids) @ jnp.arange(2401.0)),
  "remat": jax.checkpoint(lambda ids: chosen(ids) @ jnp.arange(2401.0)),
  "cond": lambda ids: lax.cond(
    ids[0] >= 0, lambda rows: rows @ CODES, lambda rows: rows[:, 0], chosen(ids)
  ),
  "mapped": lambda ids: lax.map(lambda row: row @ jnp.arange(2401.0), chosen(ids)),
  "scanned": lambda ids: lax.scan(
    lambda n, rows: (n + rows.T @ jnp.ones(600), None),
    jnp.zeros(2),
    jax.nn.one_hot(ids % 2, 2).reshape(4, 600, 2),
  )[0],
  "convolved": lambda ids: jnp.convolve((ids % 2).astype(jnp.float32), jnp.ones(600)),
}


@in_turns(("fn", "policy"), COUNTS, POLICIES)
def test_a_matmul_of_whole_numbers_counts(fn, policy):
  found, want = in_both_formats(lambda w, ids: fn(ids), policy, W, IDS)
  np.testing.assert_array_equal(found, want)
  assert np.max(want) > 256


BASE = jnp.array([1.0, 7.0, 49.0, 343.0])
DIGITS = {
  "of_a_vector": lambda d: d @ BASE,
  "of_a_matrix": lambda d: jnp.stack([d, d]) @ jnp.stack([BASE, BASE[::-1]]).T,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", DIGITS.values(), ids=DIGITS.keys())
def test_digits_that_a_layer_gave_are_those_of_a_number(number, policy):
  """No layer whose weights were rounded: 343 is 344 in bfloat16."""
  digits = lambda w, x: jnp.round(jnp.clip(3 * (x @ w), -3, 3)) + 3
  w, x = (jax.random.normal(jax.random.key(n), (m, 8)) for n, m in ((0, 4), (1, 200)))
  found = mpjax.autocast(lambda w, x: (digits(w, x), number(digits(w, x))), policy)(w.T / 2, x)
  np.testing.assert_array_equal(jnp.round(found[1]), jnp.round(number(found[0])))
  assert found[1].max() > 2048


def test_numbers_that_the_format_does_not_hold_are_no_layer():
  base = jnp.ones((4, 8)) * BASE[:, None]
  w, x = jnp.ones((8, 4)), jnp.ones((200, 8))
  for policy, count in (("mixed_bfloat16", 1), ("mixed_float16", 0)):  # float16 holds 343
    report = explain(lambda w, x: jnp.tanh(x @ w) @ base, policy, w, x)
    assert len([op for op in report.wide if "does not hold" in op.reason]) == count


def test_a_matmul_of_whole_numbers_with_others_is_narrow():
  fn = lambda w, x: (jax.nn.one_hot(jnp.arange(4), 4) @ w, jnp.tril(jnp.ones((8, 8))) @ (x @ w))
  assert explain(fn, "mixed_bfloat16", W, DATA).narrow_share == 1


@jax.custom_vjp
def _binarized(x):
  return jnp.sign(x)


_binarized.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) <= 1),))


@jax.custom_jvp
def _rounded(x):
  return jnp.round(x)


_rounded.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))

QUANTIZED = {
  "sign": (_binarized, 1.0),
  "where": (lambda x: jnp.where(x >= 0, 1.0, -1.0), 1.0),
  "round": (_rounded, 9.0),
  "clipped": (lambda x: jnp.clip(_rounded(x), -127, 127), 40.0),
  "floor": (lambda x: jnp.floor(x + 0.5), 9.0),
}


@in_turns(("case", "policy"), QUANTIZED, POLICIES)
def test_a_layer_whose_weights_are_rounded_is_narrow_and_exact(case, policy):
  quantize, scale = case
  weights = jax.random.normal(jax.random.key(3), (64, 64))
  x = 3 * jax.random.normal(jax.random.key(4), (32, 64))
  fn = lambda w, x: quantize(x * scale) @ quantize(w * scale)
  assert explain(fn, policy, weights, x).narrow_share == 1
  np.testing.assert_array_equal(mpjax.autocast(fn, policy)(weights, x), fn(weights, x))


@both
@pytest.mark.parametrize("captured", [True, False])
def test_a_layer_whose_frozen_weights_have_8_bits_is_narrow_and_exact(captured, policy):
  frozen = (jnp.arange(64 * 64) * 37 % 255 - 127).reshape(64, 64).astype(jnp.int8)
  w, x = jnp.eye(64), jnp.round(10 * jax.random.normal(jax.random.key(4), (32, 64)))
  weights = lambda q: (frozen if captured else q).astype(jnp.float32)
  fn = lambda w, x, q: jnp.round(x @ w) @ weights(q)
  assert explain(fn, policy, w, x, frozen).narrow_share == 1
  np.testing.assert_array_equal(mpjax.autocast(fn, policy)(w, x, frozen), fn(w, x, frozen))


# Products without a contraction -------------------------------------------------------------------

FREQUENCIES = np.asarray(1 / 1e4 ** (np.arange(0, 4, 2) / 4), np.float32)
OUTER = {
  "einsum": lambda t, f: jnp.einsum("t,k->tk", t, f),
  "batched": lambda t, f: jnp.einsum("bt,k->btk", t[None], f)[0],
  "swapped": lambda t, f: jnp.einsum("k,t->tk", f, t),
  "tensordot": lambda t, f: jnp.tensordot(t, f, axes=0),
  "outer": jnp.outer,
  "matmul": lambda t, f: t[:, None] @ f[None],
  "dot": lambda t, f: jnp.dot(t[:, None], f[None]),
  "dot_general": lambda t, f: lax.dot_general(t, f, (((), ()), ((), ()))),
  "vmap": lambda t, f: jax.vmap(lambda u: u * f)(t),
  "in_a_jit": jax.jit(lambda t, f: jnp.einsum("t,k->tk", t, f)),
}


@pytest.mark.quick(every=3)
@both
@cases(**OUTER)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32], ids=["integers", "floats"])
def test_positions_survive_every_outer_product(fn, dtype, policy):
  if dtype == jnp.int32 and fn is OUTER["dot_general"]:
    positions = lambda: jnp.array([1001, 8191, 2**30], jnp.int32).astype(jnp.float32)
  else:
    positions = lambda: jnp.array([1001, 8191, 2**30], dtype)
  angles = lambda w, t: fn(t, jnp.asarray(FREQUENCIES))
  got = rounded(mpjax.autocast(angles, policy))(W, positions())
  truth = np.outer(np.asarray(positions(), np.float64), FREQUENCIES)
  np.testing.assert_allclose(got, truth, rtol=1e-6)


@both
@cases(
  vdot=lambda g, t: jnp.vdot(g, t),
  einsum=lambda g, t: jnp.einsum("i,i->", g, t),
  matrices=lambda g, t: g[None] @ t[:, None],
  tensordot=lambda g, t: jnp.tensordot(g, t, 1),
)
def test_so_does_a_gradient_of_one_number_in_an_inner_product(fn, policy):
  def estimate(s, x, t):
    return fn(jax.grad(lambda s: jnp.sum((x @ x) * s))(s), t)

  args = jnp.ones(1), jnp.full((4, 4), 0.3), jnp.full(1, 3.3e-8)
  got, want = in_both_formats(estimate, policy, *args)
  np.testing.assert_allclose(got, want, rtol=0.01)


@both
def test_an_outer_product_of_what_is_narrow_stays_narrow(policy):
  fn = lambda w, x: jnp.einsum("i,j->ij", x[0] @ w, x[1] @ w)
  (first, _, outer) = matmuls(mpjax.autocast(fn, policy), W, DATA)
  assert outer.invars[0].aval.dtype == first.invars[0].aval.dtype


LINE = jnp.linspace(990, 1010, 32)[:, None]
OF_ONE = {
  "returned": lambda w, t: t @ w[:1] + w[1],
  "its_own_layer": lambda w, t: t @ w[:1] @ jnp.eye(4) * 0 + (t @ w[:1] - 1000 * w[0]),
  "of_two_parameters": lambda w, t: w[:, :1] @ w[:1] - 1,
}


@both
@pytest.mark.parametrize("fn", OF_ONE.values(), ids=OF_ONE.keys())
def test_what_a_layer_of_one_input_returns_is_exact(fn, policy):
  """A line through data near 1000: in 16 bits it would predict 1000, 1004, 1008."""
  w = jnp.arange(1.0, 17).reshape(4, 4) / 8 + 0.01
  found, want = in_both_formats(fn, policy, w, LINE)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


@both
def test_a_hidden_layer_of_one_input_is_narrow(policy):
  found = equations(
    jax.make_jaxpr(mpjax.autocast(lambda w, t: jnp.tanh(t @ w[:1] + w[1]) @ w, policy))(W, LINE)
  )
  (tanh,) = [e for e in found if e.primitive.name == "tanh"]
  assert tanh.outvars[0].aval.dtype.itemsize == 2


@both
@cases(
  neighbors=lambda w, x, bank: jax.nn.logsumexp(5 * (x @ w) @ bank.T, -1),
  best=lambda w, x, bank: jnp.argmax((x @ w) @ bank.T, -1),
)
def test_scores_of_data_are_those_of_a_layer(fn, policy):
  bank = jax.random.normal(jax.random.key(5), (64, 64))
  found = matmuls(mpjax.autocast(fn, policy), jnp.eye(64), bank[:4], bank)
  assert operand_bytes(found) == {2}


# Near one -----------------------------------------------------------------------------------------

GATES = {"z": jnp.eye(4) * 0.1, "w": jnp.eye(4)}


def scanned(turn):
  def run(p, x):
    return lax.scan(lambda h, u: (turn(p, h, u), None), jnp.zeros(4), x)[0]

  return run


def associative(decay):
  def run(p, x):
    a = decay(x @ p["z"])
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return lax.associative_scan(combine, (a, (1 - a) * (x @ p["w"])))[1][-1]

  return run


sigmoid = jax.nn.sigmoid
update = lambda p, u: sigmoid(u @ p["z"] - 6)
forget = lambda p, u: sigmoid(u @ p["z"] + 6)
hard = lambda p, u: jax.nn.hard_sigmoid(u @ p["z"] / 50 + 2.98)
state = lambda p, u: jnp.tanh(u @ p["w"])
gru = lambda z, h, n: (1 - z) * h + z * n
lstm = lambda f, h, n: f * h + 0.01 * n


def ahead(turn, gate, new):
  """What needs no state is computed for all steps at once, before the loop."""

  def run(p, x):
    return lax.scan(
      lambda h, u: (turn(u[0], h, u[1]), None), jnp.zeros(4), (gate(p, x), new(p, x))
    )[0]

  return run


def in_two_loops(turn):
  def run(p, x):
    loop = lambda h, u: (turn(p, h, u), None)
    return lax.scan(lambda h, us: lax.scan(loop, h, us), jnp.zeros(4), x.reshape(64, 32, 4))[0]

  return run


@jax.custom_jvp
def own_jvp(y):
  return sigmoid(y + 6)


@jax.custom_vjp
def own_vjp(y):
  return sigmoid(y + 6)


@jax.custom_vjp
def twice_vjp(y):
  return sigmoid(y + 6)


@jax.custom_vjp
def own_sigmoid(y):
  return sigmoid(y + 6)


# What is stored is the function's own, written once more, with what else there is.
own_sigmoid.defvjp(
  lambda y: (own_sigmoid(y), (jnp.sin(y), jax.nn.sigmoid(y + 6))),
  lambda kept, g: (g * (kept[1] * (1 - kept[1])),),
)
twice_vjp.defvjp(lambda y: (twice_vjp(y), twice_vjp(y)), lambda s, g: (g * (s * (1 - s)),))
own_jvp.defjvp(lambda primals, tangents: jax.jvp(lambda y: sigmoid(y + 6), primals, tangents))
own_vjp.defvjp(lambda y: (own_vjp(y),) * 2, lambda s, g: (g * (s * (1 - s)),))

RECURRENCES = {
  "gru": scanned(lambda p, h, u: gru(update(p, u), h, state(p, u))),
  "lstm": scanned(lambda p, h, u: lstm(forget(p, u), h, state(p, u))),
  "jitted_gru": scanned(lambda p, h, u: jax.jit(gru)(update(p, u), h, jnp.tanh(u))),
  "jitted_lstm": scanned(lambda p, h, u: jax.jit(lstm)(forget(p, u), h, state(p, u))),
  "jitted_turn": scanned(jax.jit(lambda p, h, u: lstm(forget(p, u), h, state(p, u)))),
  "jitted_gates": scanned(
    lambda p, h, u: (lambda f, n: lstm(f, h, n))(
      *jax.jit(lambda p, u: (forget(p, u), state(p, u)))(p, u)
    )
  ),
  "remat": scanned(jax.checkpoint(lambda p, h, u: lstm(forget(p, u), h, state(p, u)))),
  "cond": scanned(
    lambda p, h, u: lax.cond(u[0] > -9, gru, lambda f, h, n: h, update(p, u), h, state(p, u))
  ),
  "custom_jvp": scanned(lambda p, h, u: lstm(own_jvp(u @ p["z"]), h, state(p, u))),
  "custom_vjp": scanned(lambda p, h, u: lstm(own_vjp(u @ p["z"]), h, state(p, u))),
  "custom_vjp_called_twice": scanned(lambda p, h, u: lstm(twice_vjp(u @ p["z"]), h, state(p, u))),
  "gate_stored_by_itself": scanned(lambda p, h, u: lstm(own_sigmoid(u @ p["z"]), h, state(p, u))),
  "hard_sigmoid": scanned(lambda p, h, u: lstm(hard(p, u), h, state(p, u))),
  "hard_gru": scanned(lambda p, h, u: gru(1 - hard(p, u), h, state(p, u))),
  "hard_sigmoid_ahead": ahead(lstm, lambda p, x: hard(p, x), state),
  "clipped": scanned(lambda p, h, u: lstm(jnp.clip(0.99 + u @ p["z"] / 50, 0, 1), h, state(p, u))),
  "cumprod_of_hard": lambda p, x: jnp.cumprod(hard(p, x), 0)[-1],
  "gru_ahead": ahead(gru, update, state),
  "lstm_ahead": ahead(lstm, forget, state),
  "jitted_gru_ahead": ahead(jax.jit(gru), update, state),
  "while": lambda p, x: (
    lambda z, n: lax.fori_loop(0, len(x), lambda i, h: gru(z[i], h, n[i]), jnp.zeros(4))
  )(update(p, x), state(p, x)),
  "one_gate": lambda p, x: (
    lambda f: lax.scan(lambda h, n: (lstm(f, h, n), None), jnp.zeros(4), state(p, x))[0]
  )(forget(p, x[0])),
  "two_loops": in_two_loops(lambda p, h, u: lstm(forget(p, u), h, state(p, u))),
  "forgets_last": scanned(lambda p, h, u: forget(p, u) * (h + 0.01 * state(p, u))),
  "array_of_ones": ahead(lambda z, h, n: (jnp.ones_like(z) - z) * h + z * n, update, state),
  "decay": scanned(lambda p, h, u: jnp.exp(-jax.nn.softplus(u @ p["z"] - 6)) * h + 0.01 * u),
  "linear_decay": scanned(lambda p, h, u: (1 - 0.003 * jax.nn.relu(u @ p["z"])) * h + 0.01 * u),
  "linear_decay_ahead": ahead(lstm, lambda p, x: 1 - 0.003 * jax.nn.relu(x @ p["z"]), state),
  "cumprod_of_decays": lambda p, x: jnp.cumprod(1 - 0.003 * jax.nn.relu(x @ p["z"]), 0)[-1],
  "mingru": associative(lambda y: sigmoid(y + 6)),
  "exponential": associative(lambda y: jnp.exp(-jax.nn.softplus(y - 6))),
  "cumprod": lambda p, x: jnp.cumprod(sigmoid(x @ p["z"] + 7), 0)[-1],
  "cumprod_of_a_map": lambda p, x: jnp.cumprod(lax.map(lambda u: sigmoid(u @ p["z"] + 7), x), 0)[
    -1
  ],
  "logarithms": lambda p, x: lax.scan(
    lambda h, z: (h + jax.jit(jnp.log)(1 - z), None), jnp.zeros(4), sigmoid(x @ p["z"] + 8)
  )[0],
  "by_einsum": lambda p, x: lax.scan(
    lambda h, z: (jnp.einsum("i,i->i", z, h), None), jnp.ones(4), sigmoid(x[:64] @ p["z"] + 6)
  )[0],
  "rows_by_einsum": lambda p, x: lax.scan(
    lambda s, z: (jnp.einsum("i,ij->ij", z, s), None),
    jnp.ones((4, 3)),
    sigmoid(x[:64] @ p["z"] + 6),
  )[0],
  "linear_attention": lambda p, x: lax.scan(
    lambda s, u: (
      jnp.einsum("i,ij->ij", sigmoid(u @ p["z"] + 6), s) + jnp.outer(u @ p["w"], u) / 100,
      None,
    ),
    jnp.zeros((4, 4)),
    x,
  )[0],
  "arc_tangent": scanned(
    lambda p, h, u: (lambda z: z * h + (1 - z) * (u @ p["w"]))(
      0.5 + jnp.arctan((u @ p["z"] + 6) * 20) / jnp.pi
    )
  ),
  "unrolled": lambda p, x: functools.reduce(
    lambda h, u: u * h, list(sigmoid(x[:64] @ p["z"] + 6)), jnp.ones(4)
  ),
}


@pytest.mark.quick(every=5)
@in_turns(("fn", "policy"), RECURRENCES, POLICIES)
def test_gates_and_decays_near_one_forget_at_the_rate_of_float32(fn, policy):
  found, want = in_both_formats(fn, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.03)


DIFFERENTIATED = ("lstm_ahead", "custom_jvp", "custom_vjp", "cond")


@in_turns(("fn", "policy"), {name: RECURRENCES[name] for name in DIFFERENTIATED}, POLICIES)
def test_so_they_do_where_they_are_differentiated(fn, policy):
  loss = lambda p, x: jnp.sum(fn(p, x))
  found, _ = rounded(jax.value_and_grad(mpjax.autocast(loss, policy)))(GATES, KEYS)
  np.testing.assert_allclose(found, loss(GATES, KEYS), rtol=0.03)


# In 16 bits a sigmoid that a rule stores by a second call is 1, and its slope 0.
STORED = ("custom_vjp_called_twice", "gate_stored_by_itself", "hard_sigmoid")
GRADIENTS = {
  "outside": lambda loss, policy: jax.grad(mpjax.autocast(loss, policy)),
  "inside": lambda loss, policy: mpjax.autocast(jax.grad(loss), policy),
}


@pytest.mark.quick(every=3)
@in_turns(
  ("fn", "way", "policy"), {name: RECURRENCES[name] for name in STORED}, GRADIENTS, POLICIES
)
def test_and_a_gate_has_its_derivative(fn, way, policy):
  loss = lambda p, x: jnp.sum(fn(p, x))
  run = lambda p, x: [grad(p, x) for grad in (way(loss, policy), jax.grad(loss))]
  got, exact = rounded(run)(GATES, KEYS)
  assert jnp.linalg.norm(got["z"] - exact["z"]) < 0.1 * jnp.linalg.norm(exact["z"])


def blended(decay, turn=lambda d, h, u: d * h + (1 - d) * u):
  """A hundred turns, which 16 bits could count."""

  def run(p, x):
    us = x[:101] @ p["w"]
    return lax.scan(lambda h, u: (turn(decay(p), h, u), None), us[0], us[1:])[0]

  return run


def split_ahead(p, x):
  kept, new = p["d"], 1 - p["d"]
  us = x[:101] @ p["w"]
  return lax.scan(lambda h, u: (kept * h + new * u, None), us[0], us[1:])[0]


learned = lambda p: p["d"]
blend = lambda d, h, u: d * h + (1 - d) * u
DECAYS = {
  "parameter": blended(learned),
  "clipped": blended(lambda p: jnp.clip(p["d"], 0, 1)),
  "of_a_square": blended(lambda p: 1 - p["r"] ** 2),
  "of_a_sum": blended(lambda p: 0.9 + 0.1 * p["d"]),
  "sigmoid": blended(lambda p: sigmoid(p["s"])),
  "exponential": blended(lambda p: jnp.exp(-jnp.exp(-p["s"]))),
  "number": blended(lambda p: 0.99),
  "array_of_a_number": blended(lambda p: jnp.full(4, 0.99)),
  "without_the_rest": blended(learned, lambda d, h, u: d * h + u),
  "of_what_is_kept": blended(learned, lambda d, h, u: h + (1 - d) * (u - h)),
  "split_ahead": split_ahead,
  "jitted": blended(learned, jax.jit(blend)),
  "remat": blended(learned, jax.checkpoint(blend)),
  "vmap": lambda p, x: jax.vmap(
    lambda d, us: lax.scan(lambda h, u: (blend(d, h, u), None), us[0], us[1:])[0], (0, 1)
  )(p["d"], x[:101] @ p["w"]),
  "fori": lambda p, x: (
    lambda us: lax.fori_loop(1, 101, lambda i, h: blend(p["d"], h, us[i]), us[0])
  )(x @ p["w"]),
  "unrolled": lambda p, x: functools.reduce(
    functools.partial(blend, p["d"]), list(x[:101] @ p["w"])
  ),
  "unrolled_without_the_rest": lambda p, x: functools.reduce(
    lambda h, u: p["d"] * h + u, list(x[:101] @ p["w"])
  ),
  "nothing_else": lambda p, x: functools.reduce(lambda h, _: p["d"] * h, range(100), x @ p["w"]),
  "unrolled_number": lambda p, x: functools.reduce(
    functools.partial(blend, 0.99), list(x[:101] @ p["w"])
  ),
}
LEARNED = {"w": jnp.eye(4), "d": jnp.full(4, 0.99), "r": jnp.full(4, 0.1), "s": jnp.full(4, 4.6)}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), DECAYS, POLICIES)
def test_a_learned_decay_and_a_number_forget_as_in_float32_however_short_the_loop(fn, policy):
  """In bfloat16 0.99 is 0.988: it forgets a sixth faster, and is 0.998 with the 0.01 beside it."""
  found, want = in_both_formats(fn, policy, LEARNED, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.01)


@both
def test_a_number_that_a_scan_reads_as_an_array_is_one(policy):
  def forgotten(w, x):
    return lax.scan(lambda h, d: (d * h, None), x @ w, jnp.full(100, 0.998))[0]

  found, want = in_both_formats(forgotten, policy, W, DATA)
  np.testing.assert_allclose(found, want, rtol=0.01)


@both
def test_a_number_near_one_times_a_matmul_of_what_a_loop_hands_on_is_not_rounded(policy):
  def values(q, x):
    return lax.scan(lambda h, u: (0.99 * (h @ q) + u, None), jnp.zeros(4), x)[0]

  args = jnp.eye(4)[::-1], jnp.ones((40, 4))  # too short to be float32 as a whole
  found = equations(jax.make_jaxpr(mpjax.autocast(values, policy))(*args))
  (product,) = [e for e in found if e.primitive.name == "mul"]
  assert {atom.aval.dtype for atom in product.invars} == {jnp.dtype(jnp.float32)}
  got, want = in_both_formats(values, policy, *args)
  np.testing.assert_allclose(got, want, rtol=0.02)


CHAIN = jax.nn.softmax(jax.random.normal(jax.random.key(0), (4, 4)))
SKEW = jnp.array([[0.0, 1.0], [-1.0, 0.0]])


def value_iteration(p, r):
  turn = lambda _, v: jnp.max(r[:, None] + 0.99 * (p @ v)[:, None] * jnp.array([1.0, 0.9]), 1)
  return lax.fori_loop(0, 1000, turn, jnp.zeros(4))


def conjugate_gradients(p, r):
  normal = p.T @ p + 0.1 * jnp.eye(4)
  return jax.scipy.sparse.linalg.cg(lambda v: normal @ v, r, tol=1e-6)[0]


LINEAR = {
  "policy_evaluation": lambda p, r: lax.fori_loop(
    0, 1000, lambda _, v: r + 0.99 * (p @ v), jnp.zeros(4)
  ),
  "value_iteration": value_iteration,
  "to_a_tolerance": lambda p, r: lax.while_loop(
    lambda s: jnp.abs(s[0] - s[1]).max() > 1e-5,
    lambda s: (r + 0.98 * (p @ s[0]), s[0]),
    (r, jnp.zeros(4)),
  )[0],
  "to_a_residual": lambda p, r: lax.while_loop(
    lambda s: (jnp.linalg.norm(r - (jnp.eye(4) + p) @ s[0]) > 1e-4) & (s[1] < 2000),
    lambda s: (s[0] + 0.2 * (r - (jnp.eye(4) + p) @ s[0]), s[1] + 1),
    (jnp.zeros(4), 0),
  ),
  "einsum": lambda p, r: lax.fori_loop(
    0, 1000, lambda _, v: r + 0.99 * jnp.einsum("ij,j->i", p, v), jnp.zeros(4)
  ),
  "jitted": lambda p, r: lax.fori_loop(
    0, 1000, lambda _, v: jax.jit(lambda v: r + 0.99 * (p @ v))(v), jnp.zeros(4)
  ),
  "scan": lambda p, r: lax.scan(
    lambda v, _: (r + 0.99 * (p @ v), None), jnp.zeros(4), None, length=1000
  )[0],
  "rotation": lambda p, r: lax.fori_loop(
    0, 600, lambda _, x: x + 0.01 * (SKEW @ x), r[:2] * p[0, 0]
  ),
  "covariance": lambda p, r: lax.fori_loop(
    0, 300, lambda _, s: 0.99 * (p @ s @ p.T) + 0.01 * jnp.eye(4), jnp.diag(r)
  ),
  "conjugate_gradients": conjugate_gradients,
}


@both
@cases(**LINEAR)
def test_a_long_linear_recurrence_is_as_exact_as_in_float32(fn, policy):
  found = in_both_formats(fn, policy, CHAIN, jnp.arange(1.0, 5.0))
  for got, want in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(got, want, rtol=0.03, atol=0.01 * np.abs(want).max())


STEP = jnp.array([[1.0, 0.05], [0.0, 1.0]])
CONTROL = jnp.array([[0.00125], [0.05]])
LINKS = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (24, 24)), axis=0)


def driven(turns, u):
  """Where a mass is that is pushed so."""
  return lax.scan(lambda x, u: (STEP @ x + CONTROL @ u, x), jnp.array([1.0, 0.5]), u[:turns])


WITHOUT_LAYERS = {
  "controls": (lambda u, x: driven(60, u[:, None])[0] - jnp.array([6.0, 4.0]), jnp.full(60, 2.0)),
  "controls_by_index": (
    lambda u, x: (
      lax.fori_loop(0, 60, lambda i, s: STEP @ s + CONTROL @ u[i], jnp.array([1.0, 0.5])) - 6
    ),
    jnp.full((60, 1), 2.0),
  ),
  "controls_of_a_batch": (
    lambda u, x: jax.vmap(lambda u: driven(60, u)[0])(u) - jnp.array([6.0, 4.0]),
    jnp.stack([jnp.full((60, 1), 2.0), jnp.full((60, 1), 1.0)]),
  ),
  "filter": (
    lambda k, x: lax.scan(
      lambda s, y: (STEP @ s + k * (y - s[0]), None), jnp.ones(2), jnp.arange(60.0)
    )[0],
    jnp.array([0.4, 0.3]),
  ),
  "controls_long": (lambda u, x: driven(200, u[:, None])[0] - 30, jnp.full(200, 2.0)),
  "path": (lambda u, x: driven(40, u[:, None])[1], jnp.full(40, 2.0)),
  "learned_damping": (
    lambda p, x: lax.fori_loop(0, 50, lambda _, r: p * (x @ r) + (1 - p) / 24, jnp.ones(24) / 24),
    jnp.array(0.85),
  ),
  "learned_rewards": (
    lambda r, x: lax.fori_loop(0, 40, lambda _, v: r + 0.99 * (x.T @ v), jnp.zeros(24)),
    jnp.linspace(-1.0, 1.0, 24),
  ),
}


@both
@pytest.mark.parametrize(("fn", "p"), WITHOUT_LAYERS.values(), ids=WITHOUT_LAYERS)
def test_a_recurrence_in_which_no_layer_is_is_exact_though_parameters_drive_it(fn, p, policy):
  loss = lambda p, x: jnp.sum(fn(p, x) ** 2)
  got, want = in_both_formats(loss, policy, p, LINKS)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  both_formats = [mpjax.autocast(loss, policy), loss]
  run = jax.jit(lambda *args: [jax.grad(f)(*args) for f in both_formats], compiler_options=ROUNDING)
  got, want = run(p, LINKS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
  report = explain(loss, policy, p, LINKS)
  assert not report.leaks and {row.reason.split(":")[0] for row in report.wide} == {
    "linear recurrence"
  }


def joseph(p, x):
  """A Kalman filter with learned dynamics, in the form that keeps its covariance symmetric."""

  def turn(state, y):
    s, c = p["f"] @ state[0], p["f"] @ state[1] @ p["f"].T + 0.1 * jnp.eye(3)
    gain = jnp.linalg.solve(p["h"] @ c @ p["h"].T + 0.1 * jnp.eye(2), p["h"] @ c).T
    rest = jnp.eye(3) - gain @ p["h"]
    s = s + gain @ (y - p["h"] @ s)
    return (s, rest @ c @ rest.T + 0.1 * (gain @ gain.T)), s

  return lax.scan(turn, (jnp.zeros(3), jnp.eye(3)), x[:48].reshape(24, 2))[1]


def regulator(p, x):
  """The cost to go of a linear regulator, by Riccati's recursion."""
  a, b = p["f"], p["h"].T

  def turn(c, _):
    gain = jnp.linalg.solve(jnp.eye(2) + b.T @ c @ b, b.T @ c @ a)
    return jnp.eye(3) + a.T @ c @ (a - b @ gain), None

  return lax.scan(turn, jnp.eye(3), None, length=60)[0]


def least_squares(p, x):
  """Recursive least squares, whose covariance nothing but division keeps small."""

  def turn(state, row):
    c, w = state
    cx = c @ row
    gain = cx / (p["forget"] + row @ cx)
    return ((c - jnp.outer(gain, cx)) / p["forget"], w + gain * (row.sum() - row @ w)), w

  return lax.scan(turn, (100 * jnp.eye(4), jnp.zeros(4)), x.reshape(-1, 4))[1]


@both
@pytest.mark.parametrize("fn", [joseph, regulator, least_squares])
def test_a_recursion_that_solves_is_float32_with_learned_matrices_too(fn, policy):
  f = jnp.array([[0.99, 0.1, 0.0], [0.0, 0.98, 0.1], [0.0, 0.0, 0.97]])
  p = {"f": f, "h": jnp.array([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]]), "forget": jnp.array(0.99)}
  loss = lambda p, x: jnp.sum(fn(p, x) ** 2)
  x = jax.random.normal(jax.random.key(0), (120,))
  fns = [jax.value_and_grad(f) for f in (mpjax.autocast(loss, policy), loss)]
  got, want = jax.jit(lambda p, x: [f(p, x) for f in fns], compiler_options=ROUNDING)(p, x)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@both
@cases(
  heads=lambda w, x: lax.scan(
    lambda a, w: (a + jax.nn.softmax((x @ w) @ (x @ w).T) @ (x @ w), None), jnp.zeros((8, 4)), w
  )[0],
  latents=lambda w, x: lax.scan(
    lambda h, w: (h + jax.nn.softmax(nn.standardize(h) @ (x @ w).T) @ (x @ w), None), x[:2], w
  )[0],
  modulated=lambda w, x: lax.scan(lambda h, w: (h + jnp.tanh(h) * (x @ w), None), x, w)[0],
  ensemble=lambda w, x: lax.scan(lambda a, w: (a + x @ w, None), jnp.zeros((8, 4)), w)[0],
)
def test_layers_of_what_every_turn_is_given_stay_narrow(fn, policy):
  w = 0.1 * jax.random.normal(jax.random.key(0), (24, 4, 4))
  found = matmuls(mpjax.autocast(fn, policy), w, DATA)
  assert operand_bytes(found) == {2}


@both
@cases(
  decoded=lambda w, x: lax.scan(
    lambda s, _: (jnp.linalg.qr(s)[0], jax.nn.gelu(s[:8] @ w[0]) @ w[1]), w[0], None, length=20
  )[1],
  equilibrium=lambda w, x: lax.while_loop(
    lambda s: s[1] > 0.1,
    lambda s: (h := jnp.tanh(s[0] @ (w[0] / jnp.linalg.norm(w[0])) + x), jnp.abs(h - s[0]).max()),
    (x, jnp.inf),
  )[0],
)
def test_networks_in_loops_that_factor_matrices_stay_narrow(fn, policy):
  w, x = 0.1 * jax.random.normal(jax.random.key(0), (2, 32, 32)), jnp.ones((8, 32))
  found = matmuls(mpjax.autocast(lambda p, w, x: fn(w * p, x), policy), 1.0, w, x)
  layers = [e for e in found if 8 in e.outvars[0].aval.shape]
  assert layers and operand_bytes(layers) == {2}


def soap(w, basis, x):
  """A training step in a basis that is factored anew in each of them."""
  grad = jax.grad(lambda w: jnp.mean((jax.nn.gelu(x @ w[0]) @ w[1]) ** 2))(w)
  return w - 0.1 * basis @ (basis.T @ grad), jnp.linalg.qr(jnp.tanh(basis) + 0.1)[0]


def test_a_network_that_is_trained_in_a_basis_of_its_own_stays_narrow():
  w, x = 0.1 * jax.random.normal(jax.random.key(0), (2, 32, 32)), jnp.ones((8, 32))
  fn = lambda w, x: lax.fori_loop(0, 20, lambda _, s: soap(*s, x), (w, jnp.eye(32)))[0]
  found = matmuls(mpjax.autocast(fn, "mixed_bfloat16"), w, x)
  layers = [e for e in found if 8 in e.outvars[0].aval.shape]
  assert layers and operand_bytes(layers) == {2}


@both
def test_a_frozen_network_in_a_loop_to_a_time_stays_narrow(policy):
  def flow(p, base, x):
    layer = lambda h: h + 0.1 * jnp.tanh(nn.standardize(h) @ base[0] + h @ p) @ base[1]
    return lax.while_loop(lambda s: s[1] < 1.0, lambda s: (layer(s[0]), s[1] + 0.1), (x, 0.0))[0]

  w = 0.1 * jax.random.normal(jax.random.key(0), (2, 4, 4))
  found = matmuls(mpjax.autocast(flow, policy), W, w, DATA)
  assert operand_bytes(found) == {2}


@both
def test_a_learned_readout_makes_no_layer_of_what_it_reads(policy):
  turn = lambda w: lambda s, u: (STEP @ s + CONTROL @ u, w @ s)
  fn = lambda p: lax.scan(turn(p["w"]), jnp.ones(2), p["u"])[1]
  p = {"w": jnp.ones((3, 2)), "u": jnp.ones((60, 1))}
  found = [
    {a.aval.dtype.itemsize for a in e.invars} for e in matmuls(mpjax.autocast(fn, policy), p)
  ]
  assert sorted(map(tuple, found)) == [(2,), (4,)]


@both
@cases(
  layers=lambda w, x: lax.scan(lambda h, w: (h + 0.5 * (h @ w), None), x, w)[0],
  shared=lambda w, x: lax.scan(lambda h, _: (h @ w[0], None), x, None, length=24)[0],
  driven=lambda w, x: lax.scan(lambda h, u: (h @ w[0] + u @ w[1], h), x, jnp.ones((24, 8, 4)))[1],
  propagated=lambda w, x: lax.scan(
    lambda h, _: (0.9 * (LINKS[:8, :8] @ h) + 0.1 * (x @ w[0]), None), x @ w[0], None, length=24
  )[0],
)
def test_a_recurrence_of_layers_stays_narrow(fn, policy):
  w = 0.1 * jax.random.normal(jax.random.key(0), (24, 4, 4))
  found = matmuls(mpjax.autocast(fn, policy), w, DATA)
  assert operand_bytes(found) == {2}


@both
@cases(
  residual=lambda b, w, x: lax.scan(lambda h, w: (h + jnp.tanh(h) @ w, None), x, w)[0],
  biases=lambda b, w, x: lax.scan(
    lambda h, wb: (h + jax.nn.relu(h / 2 + wb[1]) @ wb[0], None), x, (w, b)
  )[0],
)
def test_frozen_layers_are_layers(fn, policy):
  w, b = 0.1 * jax.random.normal(jax.random.key(0), (24, 4, 4)), jnp.ones((24, 4))
  found = matmuls(mpjax.autocast(fn, policy), b, w, DATA)
  assert operand_bytes(found) == {2}


def followed(w, z):
  """A Kalman filter of two numbers: its gain multiplies what it carries, and depends on it."""
  f, h = jnp.array([[1.0, 0.1], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.5, 1.0]])

  def turn(c, z):
    m, p = f @ c[0], f @ c[1] @ f.T + 1e-3 * jnp.eye(2)
    gain = p @ h.T @ jnp.linalg.inv(h @ p @ h.T + 0.1 * jnp.eye(2))
    return (m + gain @ (z - h @ m), (jnp.eye(2) - gain @ h) @ p), m

  return lax.scan(turn, (jnp.array([900.0, 0.0]), 10 * jnp.eye(2)), jnp.tile(z, 2)[:60] * 300)[1]


rotated = lambda turns, x: lax.fori_loop(0, turns, lambda _, x: x + 0.01 * (SKEW @ x), x)
SHORTER = {
  "of_a_parameter": lambda p, r: rotated(600, p[0, :2]),
  "of_data": lambda p, r: p[0, 0] * rotated(100, r[:2]),
  "in_a_loop": lambda p, r: lax.fori_loop(0, 32, lambda _, x: rotated(16, x), p[0, :2]),
  "filter": followed,
}


@both
@cases(**SHORTER)
def test_what_loops_hand_on_is_exact_whoever_began_it_and_in_loops_together(fn, policy):
  found, want = in_both_formats(fn, policy, CHAIN, 1 + jnp.arange(64.0)[:, None] % 2)
  np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


TURNS = jnp.broadcast_to(jnp.eye(4), (512, 4, 4)) + 0.01 * jax.random.normal(
  jax.random.key(2), (512, 4, 4)
)
STATES = lambda u, v: (v[0] @ u[0], (v[0] @ u[1][..., None])[..., 0] + v[1])
ASSOCIATIVE = {
  "products": lambda p, a: lax.associative_scan(lambda u, v: v @ u, a)[-1],
  "einsum": lambda p, a: lax.associative_scan(lambda u, v: jnp.einsum("tij,tjk->tik", v, u), a)[-1],
  "reverse": lambda p, a: lax.associative_scan(jnp.matmul, a, reverse=True)[0],
  "states": lambda p, a: lax.associative_scan(STATES, (a, a[..., 0]))[1][-1],
  "of_a_parameter": lambda p, a: lax.associative_scan(jnp.matmul, jnp.broadcast_to(p, a.shape))[-1],
  "power": lambda p, a: jnp.linalg.matrix_power(a[0], 500),
  "jitted": lambda p, a: lax.associative_scan(jax.jit(lambda u, v: v @ u), a)[-1],
  "checkpointed": lambda p, a: lax.associative_scan(jax.checkpoint(lambda u, v: v @ u), a)[-1],
  "squared_again": lambda p, a: lax.fori_loop(0, 9, lambda _, c: c @ c, a[0]),
  "in_a_function": lambda p, a: jax.vmap(lambda a: lax.associative_scan(jnp.matmul, a)[-1])(
    a[None]
  ),
}


@in_turns(("fn", "policy"), ASSOCIATIVE, POLICIES)
def test_a_linear_recurrence_by_an_associative_scan_is_as_exact_as_in_float32(fn, policy):
  found, want = in_both_formats(fn, policy, TURNS[0], TURNS)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


NOT_LINEAR = {
  "recurrent_network": lambda w, x: lax.scan(
    lambda h, u: (jnp.tanh(h @ w + u), None), jnp.zeros(4), x
  )[0],
  "flow": lambda w, x: lax.fori_loop(
    0, 200, lambda _, h: h + 0.01 * (jax.nn.relu(h @ w) @ w), x[0]
  ),
  "equilibrium": lambda w, x: lax.while_loop(
    lambda h: jnp.sum(h) < 1e3, lambda h: jax.nn.standardize(h @ w + h), x[:2]
  ),
  "short": lambda w, x: lax.fori_loop(0, 16, lambda _, h: h @ w, x),
  "activation_that_is_carried": lambda w, x: lax.scan(
    lambda c, u: ((v := 0.9 * c[0] + 0.1 * (c[1] @ w + u), jnp.tanh(v)), None), (x[0], x[0]), x
  )[0],
  "spikes": lambda w, x: lax.scan(
    lambda c, u: (
      (v := 0.9 * c[0] * (1 - c[1]) + c[1] @ w + u, jax.jit(lambda v: (v > 1) * 1.0)(v)),
      None,
    ),
    (x[0], x[0]),
    x,
  )[0],
  "trained_by_hand": lambda w, x: lax.scan(
    lambda s, u: (s - 0.1 * jnp.outer(u, u @ s - u), None), w, x @ w
  )[0],
  "network_trained_by_hand": lambda w, x: lax.fori_loop(
    0,
    200,
    lambda _, p: (
      (h := jax.nn.relu(x[:8] @ p[0])),
      (e := h @ p[1] - x[:8]),
      (p[0] - 0.01 * x[:8].T @ ((e @ p[1].T) * (h > 0)), p[1] - 0.01 * h.T @ e),
    )[-1],
    (w, w),
  ),
  "delta_rule": lambda w, x: lax.scan(
    lambda s, u: (s + jnp.outer(u - s @ (k := jax.nn.standardize(u @ w)), k), s @ u),
    jnp.zeros((4, 4)),
    x[:64] @ w,
  )[1],
  "layers": lambda w, x: lax.scan(
    lambda h, own: (h + h @ own, None), x, jnp.broadcast_to(w, (200, 4, 4))
  )[0],
  "training": lambda w, x: lax.fori_loop(
    0, 200, lambda _, v: v - 0.1 * jax.grad(lambda v: jnp.mean((x @ v) ** 2))(v), w
  ),
}


@both
@cases(**NOT_LINEAR)
def test_matmuls_of_networks_in_long_loops_stay_narrow(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), 0.1 * jnp.eye(4), jnp.ones((200, 4)))
  assert found and all(a.aval.dtype.itemsize == 2 for eqn in found for a in eqn.invars)


def filtered(w, x):
  """A Kalman filter: its gain depends on what it carries, as what that multiplies."""
  f, h = jnp.array([[1.0, 0.1], [0.0, 1.0]]), jnp.array([[1.0, 0.0]])

  def turn(c, z):
    m, p = f @ c[0], f @ c[1] @ f.T + 1e-3 * jnp.eye(2)
    gain = p @ h.T @ jnp.linalg.inv(h @ p @ h.T + 0.1)
    return (m + gain @ (z - h @ m), p - gain @ (h @ p)), None

  return lax.scan(turn, (jnp.array([900.0, 0.0]), jnp.eye(2)), x)[0][0]


def quasi_newton(w, x):
  """BFGS on a quadratic: its matrix changes by outer products."""
  gradient = lambda y: jnp.sum(jnp.stack([jnp.full(4, 9.0), jnp.arange(1.0, 5)]), 0) * (y - 3)

  def turn(c):
    y, b, n = c
    step = -0.5 * jnp.linalg.solve(b, gradient(y))
    d, bs = gradient(y + step) - gradient(y), b @ step
    rank_two = jnp.outer(d, d) / jnp.sum(d * step) - jnp.outer(bs, bs) / jnp.sum(step * bs)
    return y + step, b + jnp.where(jnp.sum(d * step) > 1e-9, rank_two, 0.0), n + 1

  more = lambda c: (jnp.abs(gradient(c[0])).max() > 1e-2) & (c[2] < 60)
  y, _, n = lax.while_loop(more, turn, (x[0, 0] + jnp.arange(4.0), 20 * jnp.eye(4), 0))
  return jnp.append(y, n)


@both
@cases(filtered=filtered, quasi_newton=quasi_newton)
def test_matmuls_of_nothing_but_data_in_loops_are_float32(fn, policy):
  z = 1000 + jnp.arange(200.0).reshape(200, 1) / 10
  found, want = in_both_formats(fn, policy, W, z)
  np.testing.assert_allclose(found, want, rtol=1e-3)


@both
def test_so_it_does_where_its_parameters_are_made_inside(policy):
  def trained(seed, x):
    def step(w, n):
      target = lambda w: jnp.mean((jnp.tanh(x @ w[0]) @ w[1] - x) ** 2)
      return jax.tree.map(lambda a, g: a - 0.1 * g, w, jax.grad(target)(w)), n

    return lax.scan(step, (seed * jnp.eye(4), seed * jnp.eye(4)), jnp.arange(200))[0]

  found = matmuls(mpjax.autocast(trained, policy), 0.5, DATA)
  assert len(found) > 4 and {v.aval.dtype.itemsize for e in found for v in e.invars} == {2}


@both
def test_a_layer_that_a_loop_trains_stays_narrow(policy):
  def trained(w, x):
    step = lambda n, w: w - 0.1 * jax.grad(loss)(w, lax.dynamic_slice_in_dim(x, n % 4, 4))
    return lax.fori_loop(0, 64, step, w)

  found = matmuls(mpjax.autocast(trained, policy), W, DATA)
  assert {v.aval.dtype.itemsize for e in found for v in e.invars} == {2}


@both
@pytest.mark.parametrize("has_cache", [False, True])
def test_gates_of_a_net_that_a_loop_feeds_with_tokens_are_as_narrow_as_elsewhere(has_cache, policy):
  def net(p, token, cache, n):
    x = p["w"][token]
    if has_cache:
      cache = cache.at[n].set(x @ p["w"])
      x = jax.nn.softmax((x @ p["w"]) @ cache.T) @ cache
    return jax.nn.silu(x @ p["w"]) @ p["w"], cache

  def tokens(p, token):
    def turn(c, n):
      logits, cache = net(p, *c, n)
      return (jnp.argmax(logits), cache), logits

    return lax.scan(turn, (token, jnp.zeros((20, 4))), jnp.arange(20))[1]

  found = equations(jax.make_jaxpr(mpjax.autocast(tokens, policy))({"w": W}, 2))
  assert {e.outvars[0].aval.dtype.itemsize for e in found if e.primitive.name == "logistic"} == {2}


@both
def test_a_gate_of_what_was_handed_on_twice_is_float32(policy):
  def delayed(w, x):
    gates = jax.nn.sigmoid(x @ w + 7)
    turn = lambda c, g: ((0.001 * c[0] + g * c[1], c[0]), None)
    return lax.scan(turn, (jnp.ones(4), jnp.ones(4)), gates)[0][0]

  found, want = in_both_formats(delayed, policy, 0.01 * jnp.eye(4), jnp.ones((200, 4)))
  np.testing.assert_allclose(found, want, rtol=0.01)


@both
def test_what_no_turn_hands_on_is_blended_in_16_bits(policy):
  """A weighed residual, an RWKV's shift of tokens, a layer's own scales in a scan of layers."""

  def layers(p, x):
    h = x @ p["w"]
    h = (p["d"] * h + (1 - p["d"]) * (x @ p["w"])) @ p["w"]
    scales = jnp.stack([p["d"], p["r"]])
    h, _ = lax.scan(lambda h, d: (d * h + (1 - d) * (h @ p["w"]), None), h, scales)
    return h * 0.99 / 0.99 / p["d"]

  found = equations(jax.make_jaxpr(mpjax.autocast(layers, policy))(LEARNED, KEYS))
  products = [e for e in found if e.primitive.name in ("mul", "div")]
  assert {e.outvars[0].aval.dtype.itemsize for e in products} == {2}


@both
def test_what_a_long_loop_multiplies_but_does_not_hand_on_stays_in_16_bits(policy):
  """A reset gate or an output gate: nothing multiplies up."""

  def turn(p, h, u):
    reset = sigmoid(u @ p["z"])
    return jnp.tanh((reset * h) @ p["w"])

  found = equations(jax.make_jaxpr(mpjax.autocast(scanned(turn), policy))(GATES, KEYS))
  (gate,) = [e for e in found if e.primitive.name == "logistic"]
  assert gate.outvars[0].aval.dtype.itemsize == 2


@both
def test_a_swish_and_a_gated_unit_stay_in_16_bits(policy):
  def fn(p, x):
    h = x @ p["w"]
    return (jax.nn.silu(h) * (x @ p["z"]) + jax.nn.glu(h)[:, :1]) @ p["w"]

  grad = jax.make_jaxpr(mpjax.autocast(fn, policy))(GATES, KEYS)
  found = [e for e in equations(grad) if e.primitive.name == "logistic"]
  assert {e.outvars[0].aval.dtype.itemsize for e in found} == {2}


POWERS = {
  "squared": lambda s: jnp.sqrt(1 - s**2),
  "by_square": lambda s: jnp.sqrt(1 - jnp.square(s)),
  "multiplied": lambda s: jnp.sqrt(1 - s * s),
  "cubed": lambda s: 1 - s**3,
  "to_a_power": lambda s: 1 - s**1.5,
  "root": lambda s: 1 - jnp.sqrt(s),
  "jitted": lambda s: 1 - jax.jit(lambda s: s**2)(s),
}


@in_turns(("fn", "policy"), POWERS, POLICIES)
def test_powers_of_a_gate_keep_their_distance_from_one(fn, policy):
  program = lambda p, x: fn(jnp.tanh(x[:64] @ p["w"] / 9 + 4))
  found, want = in_both_formats(program, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.05)


@both
def test_the_root_of_a_gate_near_zero_has_a_slope(policy):
  """A sigmoid of -20 is 0 in float16, where the slope of a root is infinite."""
  loss = lambda p, x: jnp.sum(jnp.sqrt(sigmoid(x[:64] @ p["w"] - 20)))
  run = lambda p, x: [jax.grad(mpjax.autocast(loss, policy))(p, x), jax.grad(loss)(p, x)]
  found, want = rounded(run)(GATES, KEYS)
  np.testing.assert_allclose(found["w"], want["w"], rtol=0.05)


@both
@cases(
  inverse=lambda h, x: x / sigmoid(h),
  odds=lambda h, x: (1 - sigmoid(h)) / sigmoid(h),
  squared=lambda h, x: x / sigmoid(h) ** 2,
)
def test_what_is_divided_by_a_gate_near_zero_is_finite(fn, policy):
  """A sigmoid of -20 is 0 in float16."""
  program = lambda p, x: fn(x[:64] @ p["w"] - 20, x[:64])
  found, want = in_both_formats(program, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.2, atol=0.01 * float(np.abs(want).max()))


half_tanh = lambda h: 0.5 * (1 + jnp.tanh(h / 2))
OTHER_WORDS = {
  "half_tanh": lambda h: 1 - half_tanh(h),
  "affine": lambda h: 1 - (sigmoid(h) * 0.5 + 0.5),
  "weighed": lambda h: 1 - (0.25 * sigmoid(h) + 0.75 * sigmoid(h + 1)),
  "divided": lambda h: 1 - (sigmoid(h) + 3) / 4,
  "turned_round": lambda h: -(sigmoid(h) * 0.9999 - 1),
  "scaled": lambda h: 1 - 0.9999 * sigmoid(h),
  "from_another_number": lambda h: 6 - 6 * sigmoid(h),
  "product": lambda h: 1 - sigmoid(h) * sigmoid(h + 1),
  "mean": lambda h: 1 - sigmoid(h).mean(-1),
  "largest": lambda h: 1 - (sigmoid(h) * 0.9999).max(-1),
  "mean_of_affine": lambda h: 1 - jnp.mean(half_tanh(h), 0),
  "distribution": lambda h: 1 - jax.scipy.stats.norm.cdf(h * 0.46),
  "hard_sigmoid": lambda h: 1 - jax.nn.hard_sigmoid(h * 0.43),
  "clipped": lambda h: 1 - jnp.clip(h / 6.98, 0, 1),
  "soft_sign": lambda h: 1 - jax.nn.soft_sign(h * 100),
  "share": lambda h: (lambda r: 1 - r / (r + 1))(jax.nn.relu(h * 100)),
  "two_sigmoids": lambda h: sigmoid(h + 1) - sigmoid(h - 1),
  "two_distributions": lambda h: -half_tanh(h - 1) + jax.scipy.stats.norm.cdf(h * 0.46),
  "part_of_one": lambda h: (sigmoid(h) - sigmoid(h - 1)) / sigmoid(h),
  "negated": lambda h: -sigmoid(h) + 1,
  "two_at_the_low_end": lambda h: jnp.tanh(1 - h) - jnp.tanh(2 - h),
  "rest_of_a_value": lambda h: h - sigmoid(h) * h,
  "value_of_the_rest": lambda h: h * sigmoid(h) - h,
  "jitted": lambda h: 1 - jax.jit(lambda a, h: a * sigmoid(h) + a)(0.5, h),
  "cond": lambda h: 1 - lax.cond(h[0, 0] < 99, half_tanh, jnp.zeros_like, h),
  "scanned": lambda h: lax.scan(lambda n, u: (n, 1 - half_tanh(u)), 0, h)[1],
  "remat": lambda h: 1 - jax.checkpoint(half_tanh)(h),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), OTHER_WORDS, POLICIES)
def test_one_minus_a_gate_is_as_exact_in_other_words(fn, policy):
  """What numbers, products and means make of gates and clips comes near a number, too."""
  x = 6.5 + jnp.arange(16.0).reshape(4, 4) / 32  # that both formats hold
  program = lambda p, x: fn(x @ p["w"])
  found, want = in_both_formats(program, policy, GATES, x)
  np.testing.assert_allclose(found, want, rtol=0.07)
  (product,) = matmuls(mpjax.autocast(program, policy), GATES, x)
  assert {v.aval.dtype.itemsize for v in (*product.invars, *product.outvars)} == {2}


def short(turn):
  """A hundred turns, which 16 bits could count."""

  def run(p, x):
    us = x[:101] * 0.2 @ p["w"]
    return lax.scan(lambda h, u: (turn(h, u), None), us[0] + 3, us[1:])[0]

  return run


flowing = lambda h, u: sigmoid(u + 5) * h + sigmoid(u) * jnp.tanh(u)
interpolating = lambda h, u: (lambda n: n + sigmoid(u + 5) * (h - n))(jnp.tanh(u))
SHORT = {
  "lstm": short(flowing),
  "gru": short(interpolating),
  "jitted": short(jax.jit(flowing)),
  "remat": short(jax.checkpoint(interpolating)),
  "cond": short(lambda h, u: lax.cond(u[0] > -9, flowing, lambda h, u: h, h, u)),
  "half_tanh": short(lambda h, u: 0.5 * (1 + jnp.tanh(2.5 + u / 2)) * h),
  "two_loops": lambda p, x: short(
    lambda h, u: lax.scan(lambda h, _: (flowing(h, u), None), h, None, length=4)[0]
  )(p, x[:25]),
  "one_gate": lambda p, x: (
    lambda z, us: functools.reduce(lambda h, u: u + z * (h - u), list(us), us[0] + 3)
  )(sigmoid(x[0] @ p["z"] + 5), x[:64] @ p["w"]),
}


@pytest.mark.quick(every=3)
@in_turns(("fn", "policy"), SHORT, POLICIES)
def test_a_gate_in_a_loop_of_a_hundred_turns_forgets_as_in_float32(fn, policy):
  found, want = in_both_formats(fn, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.007)


@both
def test_what_does_not_come_near_what_it_is_taken_from_stays_in_16_bits(policy):
  """A gelu by tanh, the square of an output, a centered gate, a layer's norm, a few turns."""

  def fn(p, x):
    h = x[:64] @ p["w"]
    scaled = h * sigmoid(jnp.mean(h, 0) @ p["z"])
    centered = 2 * sigmoid(h) - 1 + (0.3 - sigmoid(h)) + (1 - 0.1 * (h * sigmoid(h)))
    normed = nn.LayerNorm(use_bias=False, use_scale=False).apply({}, jnp.tanh(h))
    few, _ = lax.scan(lambda h, _: (sigmoid(h) * h, None), h, None, length=8)
    return (scaled + centered + normed + few + 0.5 * h * (1 + jnp.tanh(0.8 * h))) @ p["w"]

  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(GATES, KEYS))
  found = [e for e in found if e.primitive.name in ("logistic", "tanh")]
  assert {e.outvars[0].aval.dtype.itemsize for e in found} == {2}


near_zero = lambda p, x: x[:64] @ p["w"] / 20
ONE_AT_ZERO = {
  "cosine": lambda p, x: 1 - jnp.cos(near_zero(p, x)),
  "cosine_first": lambda p, x: jnp.cos(near_zero(p, x)) - 1,
  "hyperbolic": lambda p, x: jnp.cosh(near_zero(p, x)) - 1,
  "of_a_piece": lambda p, x: 1 - jnp.split(jnp.cos(near_zero(p, x)), 2)[1],
  "jitted": lambda p, x: 1 - jax.jit(jnp.cos)(near_zero(p, x)),
  "scanned": lambda p, x: lax.scan(
    lambda n, h: (n + (1 - jnp.cos(h)), None), jnp.zeros(4), near_zero(p, x)
  )[0],
  "logarithm": lambda p, x: jnp.log(jnp.cosh(near_zero(p, x))),
}


@both
@cases(**ONE_AT_ZERO)
def test_what_is_one_at_zero_keeps_its_distance_from_one(fn, policy):
  found, want = in_both_formats(fn, policy, GATES, KEYS)
  np.testing.assert_allclose(found, want, rtol=0.03, atol=1e-6)


@both
def test_a_cosine_that_is_not_subtracted_from_one_stays_in_16_bits(policy):
  found = equations(
    jax.make_jaxpr(mpjax.autocast(lambda p, x: jnp.cos(x @ p["w"]), policy))(GATES, KEYS)
  )
  (cosine,) = [e for e in found if e.primitive.name == "cos"]
  assert cosine.outvars[0].aval.dtype.itemsize == 2


# Inner products -----------------------------------------------------------------------------------

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


COEFFICIENTS = jnp.array([35 / 384, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84])
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


# Factorizations -----------------------------------------------------------------------------------

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


TIMES = jnp.linspace(0, 3, 64)
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
LOW_RANK = jnp.outer(jnp.arange(1.0, 9), jnp.arange(3.0, 9)) + 0.01 * jnp.cos(
  jnp.arange(48.0)
).reshape(8, 6)
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


def power_iteration(a):
  """The largest eigenvalue, in a few turns."""
  v = jnp.sin(jnp.arange(1.0, 1 + len(a)))
  for _ in range(4):
    v = a @ (v / jnp.linalg.norm(a @ v))
  return v


@both
@cases(
  powers=lambda w, x: power_iteration(jnp.exp(-((x[:4, None] - x[None, :4]) ** 2).sum(-1))),
  transposed=lambda w, x: (lambda k: k.T @ (1 / (k @ jnp.sin(x[0]))))(jnp.exp(x)),
  einsum=lambda w, x: (
    lambda k: jnp.einsum("ij,j->i", k, jnp.einsum("ij,i->j", k, jnp.sin(x[:, 0])))
  )(jnp.exp(-(x @ w))),
  in_a_loop=lambda w, x: (
    lambda k: lax.fori_loop(0, 8, lambda _, v: 1 / (k.T @ (1 / (k @ v))), x[0])
  )(jnp.exp(x)),
)
def test_a_float32_matrix_times_what_it_made_is_float32(fn, policy):
  x = 3 + jnp.sin(jnp.arange(64.0)).reshape(16, 4)
  *_, product = matmuls(mpjax.autocast(fn, policy), 0.1 * jnp.eye(4), x)
  assert {v.aval.dtype for v in (*product.invars, *product.outvars)} == {np.dtype(jnp.float32)}


@both
@cases(
  one_example=lambda w, x: jnp.tanh(x[0] @ w) @ w,
  a_row_of_weights=lambda w, x: x @ w[0],
  given=lambda w, x: jnp.tanh(x.T @ x[:, 0]) @ w,
  normalizer=lambda w, x: (lambda q, k: q @ k.sum(0))(
    jax.nn.elu(x @ w) + 1, jax.nn.elu(x @ w.T) + 1
  ),
  one_query=lambda w, x: (lambda h: jax.nn.softmax(h[:1] @ h.T) @ h)(x @ w),
)
def test_a_vector_of_a_layer_is_multiplied_in_16_bits(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), W, jnp.ones((16, 4)))
  assert operand_bytes(found) == {2}


def sinkhorn(cost):
  """A plan of transport, and how many rounds it took."""
  kernel, n = jnp.exp(-cost / 0.05), len(cost)

  def turn(state):
    u, v, _, rounds = state
    u = 1 / n / (kernel @ v)
    v = 1 / n / (kernel.T @ u)
    return u, v, jnp.abs(u * (kernel @ v) - 1 / n).sum(), rounds + 1

  start = jnp.ones(n), jnp.ones(n), jnp.inf, 0
  u, v, _, rounds = lax.while_loop(lambda s: (s[2] > 1e-5) & (s[3] < 2000), turn, start)
  return u[:, None] * kernel * v, rounds


def until_done(cost):
  """The same, which carries whether it is done."""
  kernel, n = jnp.exp(-cost / 0.05), len(cost)

  def turn(state):
    u, v, _, rounds = state
    u = 1 / n / (kernel @ v)
    v = 1 / n / (kernel.T @ u)
    return u, v, jnp.abs(u * (kernel @ v) - 1 / n).sum() < 1e-5, rounds + 1

  start = jnp.ones(n), jnp.ones(n), False, 0
  u, v, _, rounds = lax.while_loop(lambda s: ~s[2] & (s[3] < 2000), turn, start)
  return u[:, None] * kernel * v, rounds


def inverse_root(a):
  """Of Denman and Beavers 1976, by products; and how many rounds it took."""
  a = a + a.T + 16 * jnp.eye(len(a))
  size = jnp.linalg.norm(a)

  def turn(state):
    y, z, _, rounds = state
    middle = 1.5 * jnp.eye(len(a)) - 0.5 * (z @ y)
    next_y = y @ middle
    return next_y, middle @ z, jnp.abs(next_y - y).max(), rounds + 1

  start = a / size, jnp.eye(len(a)), jnp.inf, 0
  _, z, _, rounds = lax.while_loop(lambda s: (s[2] > 1e-6) & (s[3] < 200), turn, start)
  return z / jnp.sqrt(size), rounds


@both
@pytest.mark.parametrize("fn", [sinkhorn, until_done, inverse_root])
def test_a_loop_to_a_tolerance_takes_as_many_rounds_as_in_float32(fn, policy):
  draw = jax.random.uniform(jax.random.key(0), (16, 16))
  (got, rounds), (want, of_float32) = in_both_formats(lambda w, x: fn(x), policy, W, draw)
  assert abs(rounds - of_float32) <= 1
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@both
def test_an_equilibrium_of_layers_is_sought_in_16_bits(policy):
  def fn(w, x):
    turn = lambda s: (jnp.tanh(s[0] @ w + x), jnp.abs(jnp.tanh(s[0] @ w + x) - s[0]).max())
    return lax.while_loop(lambda s: s[1] > 0.1, turn, (x, jnp.inf))[0]

  found = matmuls(mpjax.autocast(fn, policy), 0.1 * W, DATA)
  assert operand_bytes(found) == {2}


ORDERED = {
  "top_k": lambda f, h: lax.top_k(f(h).ravel(), 20)[1],
  "approximate": lambda f, h: lax.approx_max_k(f(h).ravel(), 20)[1],
  "argsort": lambda f, h: jnp.argsort(-f(h).ravel())[:20],
  "argmax": lambda f, h: jnp.argmax(f(h), 1),
  "threshold": lambda f, h: f(h) > 0.9995,
  "jitted": lambda f, h: jax.jit(lambda h: lax.top_k(f(h).ravel(), 20)[1])(h),
}
SATURATE = {
  "sigmoid": jax.nn.sigmoid,
  "tanh": lambda h: jnp.tanh(h - 3),
  "normal": lambda h: jax.scipy.stats.norm.cdf(h - 5),
}


@in_turns(("order", "gate", "policy"), ORDERED, SATURATE, POLICIES)
def test_scores_that_are_put_in_order_are_told_apart(order, gate, policy):
  """Logits from 6 to 10, which both formats hold: their sigmoids are 1 in both."""
  h = (6 + jnp.arange(64.0) / 16).reshape(8, 8)[:, ::-1]
  found, want = in_both_formats(lambda w, x: order(gate, x @ w), policy, jnp.eye(8), h)
  np.testing.assert_array_equal(found, want)


RETURNED = {
  "sigmoid": jax.nn.sigmoid,
  "tanh": jnp.tanh,
  "half_of_a_tanh": lambda h: 0.5 + 0.5 * jnp.tanh(h),
  "of_an_action": lambda h: 2.0 * jnp.tanh(h - 5),
  "jitted": jax.jit(lambda h: jax.nn.sigmoid(h)[:, :3]),
  "checkpointed": jax.checkpoint(jax.nn.sigmoid),
  "among_others": lambda h: {"loss": jnp.mean(h), "scores": jax.nn.sigmoid(h)}["scores"],
}


@in_turns(("fn", "policy"), RETURNED, POLICIES)
def test_scores_that_are_returned_are_told_apart(fn, policy):
  """Of logits from 6 to 10, as a metric orders them that is computed outside."""
  h = (6 + jnp.arange(64.0) / 16).reshape(8, 8)
  found, want = in_both_formats(lambda w, x: fn(x @ w), policy, jnp.eye(8), h)
  top = np.abs(want).max().round()
  np.testing.assert_allclose(top - found, top - want, rtol=1e-2)


@both
@cases(
  gated=lambda w, x: jax.nn.silu(x @ w),
  unit=lambda w, x: jax.nn.sigmoid(x @ w) * jnp.tanh(x @ w) * x,
  cell=lambda w, x: jax.nn.sigmoid(x @ w) * jnp.tanh(x @ w[::-1]),
  recurrent=lambda w, x: lax.scan(lambda h, u: (jnp.tanh(u + h @ w),) * 2, x[0], x @ w)[1],
)
def test_activations_that_are_returned_stay_narrow(fn, policy):
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(W, DATA))
  gates = [e for e in found if e.primitive.name in ("logistic", "tanh")]
  assert {v.aval.dtype.itemsize for e in gates for v in e.outvars} == {2}


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
@cases(
  kelvin=lambda h: h * 20 + 300,
  taken=lambda h: h - 100.0,
  of_a_module=lambda h: jax.jit(lambda h: h + 273.15)(h),
  strain=lambda h: (1 + h / 8) * (1 - h[::-1] / 8) - 1,
  determinant=lambda h: jnp.linalg.det(jnp.eye(2) + h.reshape(8, 2, 2) / 8) - 1,
)
def test_an_output_comes_back_in_its_own_unit(fn, policy):
  x = jnp.arange(32.0).reshape(8, 4) / 16 - 1  # that both formats hold
  got = mpjax.autocast(lambda w, x: fn(x @ w), policy)(jnp.eye(4), x)
  np.testing.assert_allclose(got, fn(x), rtol=1e-6)


IN_PIXELS = jnp.array([1003.0, 2.0, 511.0, 77.0])
affine = lambda p, x: x @ p["w"] + p["b"]


@both
@cases(
  offsets=lambda p, x: p["corners"] + 0.125 * (x @ p["w"]),
  with_a_bias=lambda p, x: p["corners"][None] + (x @ p["w"] + p["b"]),
  reshaped=lambda p, x: p["corners"].reshape(2, 2) - (x @ p["w"] + p["b"]).reshape(8, 2, 2),
  jitted=lambda p, x: jax.jit(lambda x: p["corners"] + (x @ p["w"]) / 8)(x),
  of_a_jitted_network=lambda p, x: p["corners"] + jax.jit(affine)(p, x),
  of_a_checkpoint=lambda p, x: p["corners"] + jax.checkpoint(affine)(p, x),
  negative=lambda p, x: p["corners"] + -affine(p, x),
  of_a_slice=lambda p, x: p["corners"][:2] + affine(p, x)[:, :2],
)
def test_an_output_to_which_a_parameter_is_added_comes_back_in_its_unit(fn, policy):
  x = jnp.arange(32.0).reshape(8, 4) / 16 - 1
  p = {"w": jnp.eye(4), "b": jnp.full(4, 0.5), "corners": IN_PIXELS}
  got = mpjax.autocast(fn, policy)(p, x)
  np.testing.assert_allclose(got, fn(p, x), rtol=1e-6)


@both
@cases(
  stream=lambda p, x: (0.5 * (x @ p["w"]) + p["corners"]) @ p["w"],
  activation=lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) + p["corners"],
  bias=lambda p, x: x @ p["w"] + p["corners"],
)
def test_a_parameter_that_is_added_to_a_stream_or_as_a_bias_follows(fn, policy):
  p = {"w": jnp.eye(4), "b": jnp.full(4, 0.5), "corners": IN_PIXELS}
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(p, DATA))
  adds = [e for e in found if e.primitive.name == "add"]
  assert {e.outvars[0].aval.dtype.itemsize for e in adds} == {2}


@both
@cases(
  centered=lambda h: h * 0.1 + 4.0,
  similarity=lambda h: 4.0 - h / 8,
  of_a_module=lambda h: jax.jit(lambda h: h / 16 + 3.0)(h),
)
def test_an_output_is_centered_in_float32(fn, policy):
  x = jnp.arange(32.0).reshape(8, 4) / 16 - 1
  got = mpjax.autocast(lambda w, x: fn(x @ w), policy)(jnp.eye(4), x)
  np.testing.assert_allclose(got, fn(x), rtol=1e-4)


@both
def test_what_a_matmul_reads_in_no_unit_of_its_own_stays_narrow(policy):
  masked = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), 0.0, -300.0)
  fn = lambda w, x: jax.nn.softmax(x @ w + masked + 100.0) @ w
  first, second = matmuls(mpjax.autocast(fn, policy), W, DATA[:4])
  assert {v.aval.dtype.itemsize for e in (first, second) for v in e.invars} == {2}


def unit(x):
  return x / jnp.linalg.norm(x, axis=1, keepdims=True)


NEAR = 0.02 * jax.random.normal(jax.random.key(3), (16, 16))
NEARLY_ONE = {
  "cosine_distances": lambda w, x: 1 - unit(x + w[0, 0]) @ unit(x).T,
  "of_pairs": lambda w, x: jnp.diagonal(unit(x + w[0, 0]) @ unit(x).T - 1),
  "diagonal": lambda w, x: 1 - jnp.diag(unit(x + w[0, 0]) @ (4 * unit(x).T) / 4),
  "identity": lambda w, x: (unit(x + w[0, 0]) @ unit(x).T - jnp.eye(16)) * jnp.eye(16),
  "orthogonal": lambda w, x: w.T @ w - jnp.eye(16),
  "by_einsum": lambda w, x: jnp.identity(16) - jnp.einsum("ij,ik->jk", w, w) / 1.0,
  "scaled": lambda w, x: 1.5 * jnp.eye(16) - 1.5 * (w @ w.T),
  "gradient": lambda w, x: jax.grad(lambda w: jnp.sum((w.T @ w - jnp.eye(16)) ** 2))(w),
}


@in_turns(("fn", "policy"), NEARLY_ONE, POLICIES)
def test_what_a_matmul_is_near_to_is_taken_from_what_it_gave_in_float32(fn, policy):
  x = 1 + 0.1 * jax.random.normal(jax.random.key(4), (16, 8))
  found, want = in_both_formats(fn, policy, jnp.eye(16) + NEAR, x)
  np.testing.assert_allclose(found, want, rtol=0.01, atol=0.01 * np.abs(want).max())


@both
def test_a_layer_near_a_number_has_16_bit_products_and_one_near_no_number_a_16_bit_result(policy):
  def layers(w, x):
    h = jnp.tanh(x @ w - 1)
    h = h @ (1 - h @ h[::-1].T)
    bias = -0.5 * jnp.abs(jnp.arange(16)[:, None] - jnp.arange(16))
    return (h @ x.T - bias) @ h

  layer, near, _, scores, _ = matmuls(mpjax.autocast(layers, policy), NEAR, NEAR)
  assert layer.outvars[0].aval.dtype.itemsize == 2
  assert {atom.aval.dtype.itemsize for atom in near.invars} == {2}
  assert near.outvars[0].aval.dtype == jnp.float32
  assert scores.outvars[0].aval.dtype.itemsize == 2


@both
def test_what_is_narrow_already_has_a_variance_of_16_bit_products(policy):
  fn = lambda w, x: (lambda h: weigh(h, h * h) - weigh(h, h) ** 2)(x @ w)
  _, second, first = matmuls(mpjax.autocast(fn, policy), jnp.eye(4), jnp.ones((4, 4)))
  assert {v.aval.dtype.itemsize for v in first.invars} == {2}
  assert first.outvars[0].aval.dtype == second.outvars[0].aval.dtype == jnp.float32


@both
@cases(
  gated=lambda w, x: (x @ w) - (x @ w[::-1]) * jnp.tanh(x @ w),
  jitted=lambda w, x: (x @ w) - jax.nn.silu(x) * (x @ w[::-1]),
  quadratic=lambda w, x: (x @ w) - (x @ w[::-1]) * (x @ (w + 1)),
)
def test_a_difference_of_layers_stays_in_16_bits(fn, policy):
  found = matmuls(mpjax.autocast(fn, policy), jnp.eye(4), jnp.ones((2, 4)))
  assert {v.aval.dtype.itemsize for e in found for v in (*e.invars, *e.outvars)} == {2}


# Transforms that the program computes -------------------------------------------------------------

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


# Constants ----------------------------------------------------------------------------------------

INTEGERS = {
  "where": lambda h, m: jnp.where(m, h, 0),
  "where_first": lambda h, m: jnp.where(m, 1, h),
  "select": lambda h, m: lax.select(jnp.broadcast_to(m, h.shape), h, jnp.full_like(h, 0)),
  "clip": lambda h, m: jnp.clip(h, 0, 6),
  "pad": lambda h, m: jnp.pad(h, ((1, 1), (0, 0))),
  "pad_value": lambda h, m: jnp.pad(h, ((1, 1), (0, 0)), constant_values=1),
  "maximum": lambda h, m: jnp.maximum(h, 0),
  "minimum": lambda h, m: jnp.minimum(h, jnp.array(6)),
  "full": lambda h, m: h + jnp.full(h.shape, 2),
  "set": lambda h, m: h.at[0].set(0),
  "add": lambda h, m: h.at[0].add(1),
  "jit": lambda h, m: jax.jit(lambda h, n: h * n)(h, 3),
  "concatenate": lambda h, m: jnp.concatenate([h, jnp.zeros(h.shape, jnp.int32)]),
  "power": lambda h, m: h * 2**3,
  "roll_in": lambda h, m: jnp.where(m, jnp.roll(h, 1, 0), jnp.zeros((), jnp.int32)),
}


@both
@cases(**INTEGERS)
def test_integer_constants_adapt(fn, policy):
  m = jnp.arange(4)[:, None] > 1
  program = lambda w, x: fn(x @ w, m) @ w
  assert not explain(program, policy, jnp.ones((8, 8)), jnp.ones((4, 8))).leaks


@both
def test_integers_that_are_data_stay_data(policy):
  fn = lambda w, n: n * 1.0
  assert float(mpjax.autocast(fn, policy)(W, jnp.array(4097))) == 4097.0
  counted = lambda w: jnp.arange(5000)[4097] * 1.0
  assert float(mpjax.autocast(counted, policy)(W)) == 4097.0


# Rows that are looked up --------------------------------------------------------------------------

CORNERS = {"v": 10 + jnp.arange(24.0).reshape(8, 3) / 20}
PAIRS = jnp.array([[0, 1], [1, 2], [5, 7]])
ROWS_OF = {
  "edges": lambda p, i: jnp.linalg.norm(p["v"][i[:, 0]] - p["v"][i[:, 1]], axis=-1),
  "taken": lambda p, i: jnp.diff(jnp.take(p["v"], i, axis=0), axis=1),
  "jitted": lambda p, i: jnp.diff(jax.jit(lambda v, i: v[i])(p["v"], i), axis=1),
  "mapped": lambda p, i: lax.map(lambda i: p["v"][i][0] - p["v"][i][1], i),
  "returned": lambda p, i: p["v"][i],
}


@in_turns(("fn", "policy"), ROWS_OF, POLICIES)
def test_rows_that_no_matmul_multiplies_are_parameters(fn, policy):
  """10.05 is 10.0625 in bfloat16: of the edges of a mesh nothing is left."""
  found, want = in_both_formats(fn, policy, CORNERS, PAIRS)
  np.testing.assert_allclose(found, want, rtol=1e-6)


@both
def test_positions_that_a_network_reads_the_distances_of_are_parameters(policy):
  def energy(points, pairs):
    squares = jnp.sum((points["v"][pairs[:, 0]] - points["v"][pairs[:, 1]]) ** 2, -1)
    return jnp.tanh(jnp.exp(-9 * squares)[:, None] * jnp.arange(1.0, 65)) @ jnp.ones((64, 64))

  found, want = in_both_formats(energy, policy, CORNERS, PAIRS)
  np.testing.assert_allclose(found, want, rtol=5e-3)


@both
@cases(
  layer=lambda p, i: jnp.tanh(p["v"][i]) @ p["v"].T,
  jitted=lambda p, i: jax.jit(lambda v, i: v[i])(p["v"], i) @ p["v"].T,
  in_a_layer=lambda p, i: jax.checkpoint(lambda h: jnp.tanh(h) @ p["v"].T)(p["v"][i]),
  in_scan=lambda p, i: lax.scan(lambda c, i: (c, p["v"][i]), 0, i)[1] @ p["v"].T,
)
def test_rows_of_an_embedding_are_narrow(fn, policy):
  table = {"v": jnp.ones((8, 6))}
  found = list(equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(table, PAIRS)))
  after = found[[e.primitive.name for e in found].index("gather") + 1]
  assert after.primitive.name == "convert_element_type"
  assert after.outvars[0].aval.dtype.itemsize == 2


# Products into totals -----------------------------------------------------------------------------

ROWS = {"a": jnp.eye(4), "b": jnp.eye(4) + 0.25}
TOTALS = {
  "dot": lambda a, b: jnp.sum(a * b, -1),
  "half_a_square": lambda a, b: jnp.mean(0.5 * (a - b) * (a - b), -1),
  "norm": lambda a, b: jnp.sqrt(a * a + b * b + a * b),
  "negative": lambda a, b: jnp.sum(-a * b + 1.0, -1) / 4,
  "cosine": lambda a, b: (
    jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
  ),
  "logarithm": lambda a, b: jnp.log(a * b + 1.0),
}


@both
@cases(**TOTALS)
def test_products_of_two_values_do_not_leave_the_range_before_they_are_added_up(fn, policy):
  total = lambda w, x: fn(x @ w["a"], x @ w["b"])
  x = 300 * (1 + jnp.arange(16.0).reshape(4, 4) / 16)
  got, want = in_both_formats(total, policy, ROWS, x)
  np.testing.assert_allclose(got, want, rtol=0.03)
  size = jnp.abs(want).mean()
  grad = lambda w, x: jax.grad(lambda w: jnp.mean(total(w, x)) / size)(w)
  got, want = in_both_formats(grad, policy, ROWS, x)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=0.05, atol=0.02 * np.abs(other).max())


def test_a_product_that_only_a_matmul_reads_stays_in_float16():
  fn = lambda w, x: ((x @ w["a"]) * (x @ w["b"])) @ w["a"]
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, "mixed_float16"))(ROWS, jnp.ones((2, 4))))
  (product,) = [e for e in found if e.primitive.name == "mul"]
  assert product.outvars[0].aval.dtype == jnp.float16


MUCH = {
  "unit": lambda h: h * 30000.0 + 60000.0,
  "jitted": lambda h: jax.jit(lambda h: h * 30000.0 + 60000.0)(h),
  "captured": (lambda much: lambda h: h * much + 60000.0)(jnp.float32(30000)),
  "first": lambda h: -30000.0 * h * 2,
  "divided": lambda h: h / 1e-4 * 20,
  "mapped": lambda h: lax.map(lambda h: h * 40000.0, h),
  "array": lambda h: h * np.full(4, 40000.0, np.float32),
}


@in_turns(("fn", "policy"), MUCH, POLICIES)
def test_an_output_in_its_own_unit_stays_in_range(fn, policy):
  found, want = in_both_formats(lambda w, x: fn(x @ w), policy, W, DATA)
  np.testing.assert_allclose(found, want, rtol=0.01)


FEATURES = 2 + jnp.sin(jnp.arange(128.0)).reshape(4, 32)
HEAD = {
  "v": jnp.eye(32),
  "w": jnp.full((32, 2), 0.125),
  "b": jnp.full(2, 60000.0),
  "c": jnp.full((2,), 40000.0),
}
HEADS = {
  "bias": lambda p, x: x @ p["w"] + p["b"],
  "scale": lambda p, x: (x @ p["w"]) * p["c"],
  "one_output": lambda p, x: jnp.einsum("td,d->t", x, p["w"][:, 0]) + p["b"][0],
  "hidden": lambda p, x: jnp.tanh(x @ jnp.eye(32)) @ p["w"] + p["b"],
  "jitted": lambda p, x: jax.jit(jnp.dot)(x, p["w"]) + p["b"],
  "in_scan": lambda p, x: lax.scan(lambda c, x: (c, x @ p["w"] + p["b"]), 0.0, x)[1],
  "mapped": lambda p, x: jax.vmap(lambda x: x @ p["w"] + p["b"])(x),
  "convolution": lambda p, x: lax.conv(x.T[None], p["w"].T[..., None], (1,), "SAME") + p["b"][0],
  "fed_back": lambda p, x: jnp.stack(forecast(p, x @ p["w"] + p["b"], 3)),
  "fed_back_in_scan": lambda p, x: lax.scan(
    lambda y, _: (forecast(p, y, 1)[-1], y), x @ p["w"] + p["b"], None, length=3
  )[1],
}


WEIGHED = {
  "kernel_regression": lambda w, x, y: jax.nn.softmax(jnp.tanh(x @ w) @ x.T) @ y - 300,
  "centroids": lambda w, x, y: (lambda a: jnp.einsum("nk,n->k", a, y[:, 0]) / a.sum(0))(
    jax.nn.softmax(x @ w)
  ),
  "smoothing": lambda w, x, y: w[0, 0] * (jnp.exp(-(x[:, :1] ** 2) - (x[:, :1] ** 2).T) @ y - y),
}


@both
@pytest.mark.parametrize("fn", WEIGHED.values(), ids=WEIGHED.keys())
def test_means_of_data_are_in_their_unit(fn, policy):
  """What a layer gave are the weights: by hand they round, and the data do not."""
  x = jax.random.normal(jax.random.key(0), (40, 8))
  y = 300 + jax.random.normal(jax.random.key(1), (40, 1))
  found, want = in_both_formats(fn, policy, jnp.eye(8) / 4, x, y)
  np.testing.assert_allclose(found, want, atol=0.01 * np.abs(want).max() + 0.01)


def forecast(p, y, steps):
  """What is predicted, and what is predicted of that."""
  found = [y]
  for _ in range(steps):
    y = jnp.tanh((y - 60000) @ p["w"].T) @ p["w"] + p["b"]
    found.append(y)
  return found


@in_turns(("fn", "policy"), HEADS, POLICIES)
def test_what_a_head_predicts_is_read_in_its_own_unit(fn, policy):
  """60,008 is 60,160 in bfloat16, and 60,000 in float16."""
  found, want = in_both_formats(fn, policy, HEAD, FEATURES)
  np.testing.assert_allclose(found, want, rtol=0.004 if fn is HEADS["scale"] else 2e-6)
  error = lambda p, x: jnp.mean((fn(p, x) / 60000 - 1) ** 2)
  (found, want) = in_both_formats(jax.value_and_grad(error), policy, HEAD, FEATURES)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-6), found, want)


@both
def test_a_head_multiplies_in_16_bits_and_its_weights_have_gradients_that_do_not_round(policy):
  def error(p, x):
    return jnp.mean((jnp.tanh(x @ p["v"]) @ p["w"] + p["b"] / 60000) ** 2)

  for fn in (jax.grad(mpjax.autocast(error, policy)), mpjax.autocast(jax.grad(error), policy)):
    first, head, *backward = matmuls(fn, HEAD, FEATURES)
    products = [first, head, *backward]
    assert {v.aval.dtype.itemsize for e in products for v in e.invars} == {2}
    assert [e.outvars[0].aval.dtype.itemsize for e in (first, head)] == [2, 4]
    assert 4 in {e.outvars[0].aval.dtype.itemsize for e in backward}


@both
@cases(
  squares=lambda r: jnp.sum(r * r),
  inner=lambda r: jnp.einsum("bi,bi->", r, r),
)
def test_a_head_is_one_whatever_its_loss_is_and_where_it_is_computed_again(fn, policy):
  def error(p, x):
    return fn((x @ p["w"] + p["b"]) / 60000 - 1)

  for around in (lambda f: f, jax.checkpoint):
    for run in (
      jax.value_and_grad(mpjax.autocast(around(error), policy)),
      mpjax.autocast(jax.value_and_grad(around(error)), policy),
    ):
      found, want = run(HEAD, FEATURES), jax.value_and_grad(error)(HEAD, FEATURES)
      close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-6)
      jax.tree.map(close, found, want)


@both
@pytest.mark.parametrize("spec", ["btd,dk->btk", "btd,dk->bkt", "bdt,dk->tbk", "btd,dk->tkb"])
def test_heads_run_in_any_order_of_their_dimensions(spec, policy):
  x = jnp.ones((2, 32, 4) if spec.startswith("bdt") else (2, 4, 32))
  fn = mpjax.autocast(lambda w, x: jnp.sum(jnp.einsum(spec, x, w) ** 2), policy)
  value, grads = jax.jit(jax.value_and_grad(fn, (0, 1)))(HEAD["w"], x)
  np.testing.assert_allclose(value, 2 * 4 * 2 * 16.0, rtol=0.01)
  np.testing.assert_allclose(
    jax.vmap(fn, (None, 0))(HEAD["w"], x[:, None])[0], value / 2, rtol=0.01
  )
  assert jnp.all(jnp.isfinite(grads[0])) and jnp.all(jnp.isfinite(grads[1]))


@both
@cases(
  of_a_vocabulary=lambda w, x: x @ w,
  of_a_low_rank=lambda w, x: (x @ w[:, :2]) @ w[:2],
  of_a_router=lambda w, x: jax.nn.softmax(x @ w[:, :2]) @ w[:2],
)
def test_other_matmuls_return_16_bits(fn, policy):
  first, *_ = matmuls(mpjax.autocast(fn, policy), jnp.eye(32), FEATURES)
  assert first.outvars[0].aval.dtype.itemsize == 2


@both
def test_the_square_root_of_a_width_times_an_embedding_stays_narrow(policy):
  fn = mpjax.autocast(lambda w, x: jnp.tanh(x @ w * 64.0) / 64.0, policy)
  (product,) = (e for e in equations(jax.make_jaxpr(fn)(W, DATA)) if e.primitive.name == "mul")
  assert product.outvars[0].aval.dtype.itemsize == 2


@both
@cases(
  dot_general=lambda h, q: lax.dot(h, q, preferred_element_type=jnp.float32),
  einsum=lambda h, q: jnp.einsum("bk,kn->bn", h, q),
  matmul=lambda h, q: q.T @ h.T,
)
def test_the_scale_of_integers_comes_before_their_sums_round(fn, policy):
  """Weights that were quantized: the sums of 2,048 products with integers leave float16."""
  q = jnp.asarray(np.random.default_rng(0).integers(1, 128, (2048, 16)), jnp.int8)
  program = lambda w, x: fn(x @ w, q) * 1e-3
  found, want = in_both_formats(program, policy, jnp.full((8, 2048), 0.125), jnp.ones((4, 8)))
  np.testing.assert_allclose(found, want, rtol=1e-3)


# Formats and modules ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("author", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@cases(
  einsum=lambda x, w: jnp.einsum("bd,df->bf", x, w),
  matmul=lambda x, w: x @ w,
  dot_general=lambda x, w: lax.dot_general(
    x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  ),
)
def test_the_operands_of_a_matmul_have_one_16_bit_format(fn, author, policy):
  (dot,) = matmuls(mpjax.autocast(lambda w, x: fn(x.astype(author), w), policy), W, DATA)
  assert len({v.aval.dtype for v in dot.invars}) == 1
  assert dot.invars[0].aval.dtype.itemsize == 2


class Router(nn.Module):
  experts: int

  @nn.compact
  def __call__(self, x):
    return nn.softmax(nn.Dense(self.experts)(x))


class Mixture(nn.Module):
  experts: int

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="inside")(x)
    weights = Router(self.experts, name="router")(x)
    return weights * jnp.float32(1)


@in_turns(("experts", "policy"), (4, 8), POLICIES)
def test_the_weights_of_a_router_do_not_round_whatever_their_number(experts, policy):
  model, x = Mixture(experts), jnp.ones((2, 8))
  variables = model.init(jax.random.key(0), x)
  (weights,) = [
    e.outvars[0]
    for e in equations(
      jax.make_jaxpr(lambda v: mpjax.apply_policy(model, policy).apply(v, x))(variables)
    )
    if e.primitive.name == "mul" and "Mixture" in str(e.source_info.name_stack)
  ][-1:]
  assert weights.aval.dtype == jnp.float32
  rounded = mpjax.apply_policy(model, policy).apply(variables, x)
  half = np.asarray(rounded).astype(mpjax.Policy.parse(policy).compute_dtype).astype(np.float32)
  assert not np.array_equal(rounded, half)


class Cell(nn.Module):
  """Steps that become small; its parameters are shared."""

  @nn.compact
  def __call__(self, y, _=None):
    return y + 0.001 * jnp.tanh(nn.Dense(4)(y)), None


class Elementwise(nn.Module):
  fn: Callable

  def __call__(self, x):
    return self.fn(x)


class Applied(nn.Module):
  """A layer, and an elementwise function as a module of its own behind it."""

  fn: Callable

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(4, use_bias=False, kernel_init=nn.initializers.ones)
    return Elementwise(self.fn)(dense(x))


class Moved(nn.Module):
  """How far cells move what a layer made."""

  way: str

  @nn.compact
  def __call__(self, x):
    first = y = nn.Dense(4)(x)
    if self.way == "scan":
      cells = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, length=50)
      y, _ = cells()(y)
    else:
      cell = Cell()
      for _ in range(50):
        y, _ = cell(y)
    return y - first


@in_turns(("way", "policy"), ("scan", "loop"), POLICIES)
def test_a_state_leaves_the_cell_that_takes_small_steps_as_float32(way, policy):
  model, x = Moved(way), jnp.linspace(0.3, 2, 16).reshape(4, 4)
  variables = model.init(jax.random.key(0), x)
  found, want = in_both_formats(model.apply, policy, variables, x)
  np.testing.assert_allclose(found, want, atol=0.02 * float(np.abs(want).max()))


LEFT = {
  "gate": (sigmoid, lambda g: 1 - g, 1.6),
  "gate_in_pieces": (lambda h: sigmoid(h)[:, ::-1], lambda g: 1 - g[:, :2], 1.6),
  "decay": (lambda h: jnp.exp(-jnp.exp(-h)), lambda a: 1 - a, 1.6),
  "probabilities": (lambda h: jax.nn.softmax(h * jnp.arange(4.0)[None]), jnp.log, 1.6),
  "own_unit": (lambda h: h * 30000, lambda h: h / 30000, 3.0),
  "written_out_sum": (
    lambda h: functools.reduce(lambda y, n: y + jnp.tanh(h * n / 249), range(100), h),
    lambda y: y - jnp.mean(y),
    0.25,
  ),
}


@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT)
@both
def test_what_others_need_exactly_leaves_its_module_as_float32(case, policy):
  inside, outside, size = case
  model, x = Applied(inside), size + jnp.arange(16.0).reshape(4, 4) / 32
  variables = model.init(jax.random.key(0), x)
  found, want = in_both_formats(lambda v, x: outside(model.apply(v, x)), policy, variables, x)
  np.testing.assert_allclose(found, want, rtol=0.05, atol=0.05 * float(np.abs(want).max()))


class Positions(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + jnp.asarray(
      np.sin(np.arange(x.shape[1]))[:, None] * np.ones(x.shape[2]), jnp.float32
    )


class Embedded(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(16, 8, name="embed")(tokens)
    return nn.Dense(8, name="dense")(nn.relu(Positions(name="positions")(x)))


@both
def test_embeddings_go_on_in_16_bits_behind_a_module_that_adds_a_table(policy):
  model, tokens = Embedded(), jnp.ones((2, 4), jnp.int32)
  variables = model.init(jax.random.key(0), tokens)
  cast = mpjax.apply_policy(model, policy)
  jaxpr = jax.make_jaxpr(lambda v: cast.apply(v, tokens))(variables)
  (relu,) = [e for e in equations(jaxpr) if e.primitive.name == "max"]
  assert relu.outvars[0].aval.dtype.itemsize == 2


def angles_of(r):
  """Rotations from two vectors each."""
  a = r[..., :3] / jnp.linalg.norm(r[..., :3], axis=-1, keepdims=True)
  b = r[..., 3:] - jnp.sum(a * r[..., 3:], -1, keepdims=True) * a
  b = b / jnp.linalg.norm(b, axis=-1, keepdims=True)
  return jnp.stack([a, b, jnp.cross(a, b)], -1)


def about(axis):
  """A rotation about an axis, as Rodrigues wrote it."""
  angle = jnp.sqrt(jnp.sum(axis**2) + 1e-12)
  x, y, z = axis / angle
  o = jnp.zeros(())
  k = jnp.stack([jnp.stack([o, -z, y]), jnp.stack([z, o, -x]), jnp.stack([-y, x, o])])
  return jnp.eye(3) + jnp.sin(angle) * k + (1 - jnp.cos(angle)) * k @ k


def homogeneous(p, x):
  """Rotations and shifts, one after the other."""
  shift = jnp.stack([p["t"], 2 * p["t"]])[..., None]
  bottom = jnp.broadcast_to(jnp.array([0.0, 0, 0, 1]), (2, 1, 4))
  first, second = jnp.concatenate([jnp.concatenate([angles_of(p["r"]), shift], -1), bottom], -2)
  return jnp.concatenate([x, jnp.ones((len(x), 1))], -1) @ (first @ second).T


def grid_of(p, x):
  """Where a network, whose head is small, says that an image is to be looked at."""
  theta = (jnp.tanh(jnp.tile(x, (1, 16))[:2] @ p["a"]) @ p["b"]).reshape(2, 2, 3)
  grid = jnp.stack([x[:, :2, None] * jnp.ones(3), x[:, 1:, None] * jnp.ones(3)], -1)[..., :1]
  return jnp.einsum("bij,nj->bni", theta, grid[:, 0, :, 0][:, [0, 1, 1]]) * 64


WIDE_X, FEW_FEATURES = jnp.ones((2, 16, 512)), {"e": jnp.ones((512, 64)), "u": jnp.ones((64, 64))}
STREAMS = {
  "added": lambda h, u: h + jnp.tanh(h @ u) @ u,
  "taken_away": lambda h, u: h - jnp.tanh(h @ u) @ u,
  "gated": lambda h, u: h - jax.nn.relu(h @ u) * (h - jnp.tanh(h @ u)),
  "virtual_node": lambda h, u: jax.nn.relu(h + (h.mean(1) @ u)[:, None]),
  "jitted": lambda h, u: jax.jit(lambda h, u: h + jnp.tanh(h @ u) @ u)(h, u),
  "in_a_scan": lambda h, u: lax.scan(
    lambda h, _: (h + jnp.tanh(h @ u) @ u, None), h, None, length=4
  )[0],
}


@in_turns(("turn", "policy"), STREAMS, POLICIES)
def test_a_stream_that_is_returned_is_no_head_where_it_begins(turn, policy):
  def encoder(p, x):
    h = x @ p["e"]
    for _ in range(2):
      h = turn(h, p["u"])
    return h

  first, *_ = matmuls(mpjax.autocast(encoder, policy), FEW_FEATURES, WIDE_X)
  assert first.outvars[0].aval.dtype.itemsize == 2


UNFIT = {
  "captured": lambda h: h @ FAR,
  "turned": lambda h: h @ FAR.T,
  "tiny": lambda h: h @ FAINT,
  "of_numpy": lambda h: h @ np.asarray(FAR),
  "identity": lambda h: h @ (jnp.eye(4) * 7e4),
  "filled": lambda h: h @ jnp.full((4, 8), 1e5),
  "jitted": lambda h: jax.jit(lambda h: h @ FAR)(h),
  "convolution": lambda h: lax.conv(h[None, None], jnp.full((1, 1, 2, 2), 1e5), (1, 1), "SAME"),
}
FAR = jnp.diag(jnp.array([1e5, 1, 2, 3]))
FAINT = FAR / 1e14


@in_turns(("fn", "policy"), UNFIT, POLICIES)
def test_a_matmul_with_numbers_that_float16_does_not_hold_has_a_result(fn, policy):
  def loss(w, x):
    found = fn(jnp.tanh(x @ w))
    return jnp.mean(found / jnp.abs(lax.stop_gradient(found)).max())

  value, grads = jax.value_and_grad(mpjax.autocast(loss, policy))(W, DATA)
  want, of_want = jax.value_and_grad(loss)(W, DATA)
  np.testing.assert_allclose(value, want, rtol=0.03)
  np.testing.assert_allclose(grads, of_want, atol=0.04 * float(jnp.abs(of_want).max()))


def test_captured_weights_multiply_in_float16_however_small_some_are():
  weights = jax.random.normal(jax.random.key(0), (4, 4)).at[0, 0].set(1e-7)
  (product,) = matmuls(mpjax.autocast(lambda w, x: (x * w[0]) @ weights, "mixed_float16"), W, DATA)
  assert product.invars[0].aval.dtype == jnp.float16


CAMERA = jnp.array([[1000.0, 0, 512], [0, 1000, 512], [0, 0, 1]])
SCENE = {
  "r": jnp.array([[1.0, 0.1, 0, 0, 1, 0.2], [0.8, 0, 0.3, 0.1, 1, 0]]),
  "t": jnp.array([0.1, -0.2, 6.0]),
  "points": jax.random.normal(jax.random.key(2), (20, 3)),
  "a": jax.random.normal(jax.random.key(3), (48, 64)) / 7,
  "b": jax.random.normal(jax.random.key(4), (64, 6)) / 8,
}
POINTS = {
  "rotated": lambda p, x: x @ angles_of(p["r"])[0].T,
  "in_batches": lambda p, x: jnp.einsum("bij,bnj->bni", angles_of(p["r"]), jnp.stack([x, -x])),
  "projected": lambda p, x: (x + p["t"]) @ CAMERA.T,
  "of_parameters": lambda p, x: jnp.einsum("bij,nj->bni", angles_of(p["r"]), p["points"]),
  "one_after_the_other": homogeneous,
  "about_an_axis": lambda p, x: x @ about(p["t"]).T,
}


@in_turns(("fn", "policy"), POINTS, POLICIES)
def test_points_are_rotated_and_projected_in_float32(fn, policy):
  """Pixels come in steps of 2 in bfloat16, where they lie at 500."""
  x = jax.random.normal(jax.random.key(1), (20, 3)) * 50
  loss = lambda p, x: jnp.mean(jnp.abs(fn(p, x) - 0.99 * fn(SCENE, x)))
  p = jax.tree.map(lambda a: 1.01 * a + 0.003, SCENE)
  for run in (
    jax.value_and_grad(mpjax.autocast(loss, policy)),
    mpjax.autocast(jax.value_and_grad(loss), policy),
  ):
    value, grads = jax.jit(run, compiler_options=ROUNDING)(p, x)
    want, of_want = jax.value_and_grad(loss)(p, x)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=0.01 * float(jnp.abs(b).max()))
    jax.tree.map(close, grads, of_want)


@both
def test_a_grid_that_a_network_moves_is_as_exact_as_its_head(policy):
  x = jax.random.normal(jax.random.key(1), (20, 3))
  found, want = in_both_formats(grid_of, policy, SCENE, x)
  close = 0.02 if policy == "mixed_bfloat16" else 0.003
  np.testing.assert_allclose(found, want, atol=close * float(jnp.abs(want).max()))
  products = equations(jax.make_jaxpr(mpjax.autocast(grid_of, policy))(SCENE, x))
  dots = [e.outvars[0].aval.dtype.itemsize for e in products if e.primitive.name == "dot_general"]
  assert dots == [2, 4, 4]


@both
def test_layers_of_two_or_three_features_stay_in_16_bits(policy):
  w = {"in": jnp.ones((3, 3)) / 3, "out": jnp.ones((3, 2))}

  def network(w, x):
    wide = jnp.broadcast_to(w["in"], (2, 3, 3))
    h = jnp.tanh(x @ w["in"]) @ w["in"] + (x @ (w["in"] * 0.5)) + (x @ wide)[0]
    return jnp.stack([h, h]) @ w["out"]

  for x in (jnp.ones((1, 3)), jnp.ones((2, 3)), jnp.ones((20, 3))):
    assert {
      v.aval.dtype.itemsize
      for e in matmuls(mpjax.autocast(network, policy), w, x)
      for v in e.invars
    } == {2}


@both
def test_a_mixture_of_two_or_three_vectors_is_no_projection_of_points(policy):
  """A router over two experts, and the first layer of one observation."""

  def mixture(p, h):
    experts = jnp.stack([nn.standardize(h @ p["u"]), nn.standardize(h @ p["u"].T)], 1)
    return jnp.einsum("tk,tkd->td", jax.nn.softmax(h[:, :2] @ p["u"][:2, :2]), experts) @ p["u"]

  frozen = jax.random.normal(jax.random.key(0), (3, 64))
  acting = lambda p, x: jnp.tanh(x @ frozen) @ p["u"]
  for fn, x in ((mixture, jnp.ones((8, 64))), (acting, jnp.ones(3)), (acting, jnp.ones((1, 3)))):
    for product in matmuls(mpjax.autocast(fn, policy), FEW_FEATURES, x):
      assert {v.aval.dtype.itemsize for v in product.invars} == {2}
