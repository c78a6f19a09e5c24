"""Sums of long loops count, and what every turn reads has the sum of its cotangents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array, normal
from _backends import ROUNDING, rounded
from _both_formats import DATA, KEYS, POLICIES, W, both, cases, in_both_formats
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


ONES = array(np.ones((4001, 1)))
one = array(np.ones((1, 1)))
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


ITEMS = array(0.5 + 0.3 * normal(5, 600, 4))
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


@pytest.mark.quick(every=3)
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


# Of edges, half of one node.
SOURCES = array(np.where(np.arange(1200) % 2, 3, np.arange(1200) % 8), np.int32)
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
