"""A matrix that is data is no layer's: states, inputs and labels that it transforms are exact.

Networks whose weights are data, for they are not trained, stay narrow.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import softmax

import mpjax
from _arrays import array, normal
from _backends import ROUNDING
from _both_formats import both, matmuls, operand_bytes
from _jaxprs import equations
from _turns import in_turns

COMPUTE = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
WIDTH, BATCH = 12, 16
pytestmark = pytest.mark.usefixtures("promotion_of_users")


ring = lambda n, shift: np.roll(np.eye(n), shift, 0)
LAPLACIAN = array(2 * np.eye(WIDTH) - ring(WIDTH, 1) - ring(WIDTH, -1))
KELVINS = array(293 + 5 * normal(0, BATCH, WIDTH))
NEXT = array(np.kron([[1, 0.5], [0, 1]], np.eye(6)))  # where what moves is after half a second
PUSH = array(np.kron([[0.125], [0.5]], np.eye(6)))
SEEN = array(np.eye(12)[:6])
STATES = array(np.concatenate([50 + np.asarray(KELVINS)[:, :6] / 9, np.ones((BATCH, 6))], 1))
IMPLICIT = array(np.linalg.inv(np.eye(WIDTH) + 0.5 * np.asarray(LAPLACIAN)))
BLENDS = array(softmax(2 * normal(1, WIDTH, WIDTH), -1))
TIMES = np.linspace(-1, 1, WIDTH)
POWERS = np.stack([TIMES**n for n in range(3)], 1)
FITTED, POWERS = array(np.linalg.pinv(POWERS)), array(POWERS)
WAVES = np.exp(-2j * np.pi * np.outer(np.arange(WIDTH), np.arange(WIDTH)) / WIDTH)
WAVES *= np.hanning(WIDTH)[:, None]
PITCHES = np.random.default_rng(2).uniform(0.2, 0.5, (BATCH, 1))
SOUND = array(np.sin(np.arange(WIDTH) * PITCHES))
METRIC = array(np.diag([1, -1, -1, -1]))
MOMENTA = 50 * normal(3, BATCH, WIDTH, 3)
ENERGIES = np.sqrt((MOMENTA**2).sum(-1, keepdims=True) + 2)
MOMENTA = array(np.concatenate([ENERGIES, MOMENTA], -1))
DISCOUNTS = array(np.tril(0.99 ** (np.arange(WIDTH)[:, None] - np.arange(WIDTH))))
BOTH_WAVES = array(np.concatenate([WAVES.real, WAVES.imag], 1))


def spectrum(x):
  return jnp.log((x @ array(WAVES.real)) ** 2 + (x @ array(WAVES.imag)) ** 2 + 1e-8) / 4 + 1


def spectrum_by_convolution(x):
  kernels, names = BOTH_WAVES[:, None], ("NHC", "HIO", "NHC")
  found = lax.conv_general_dilated(x[..., None], kernels, (1,), "VALID", dimension_numbers=names)
  real, imaginary = jnp.split(found[:, 0], 2, -1)
  return jnp.log(real**2 + imaginary**2 + 1e-8) / 4 + 1


def repeated(step, start, turns=15):
  return lax.scan(lambda x, _: (step(x),) * 2, start, None, length=turns)[1]


def filtered(net):
  def turn(s, seen):
    ahead = s @ NEXT.T
    gain = jax.nn.sigmoid(net(ahead - 50))[:, :6]
    return ahead + jnp.concatenate([gain * (seen - ahead @ SEEN.T)] * 2, 1), ahead

  return lax.scan(turn, STATES, jnp.broadcast_to(STATES[:, :6] + 0.1, (12, BATCH, 6)))[1]


CHANGES = array(0.02 * normal(5, 100, BATCH, 3))


def controlled(weigh, net, *, loop=lax.scan):
  """A state that moves by what a network gives, times the changes of a signal."""
  move = lambda z, dx: weigh(jnp.tanh(net(jnp.tile(z, (1, 3)))).reshape(BATCH, 4, 3), dx)
  turn = lambda z, dx: (z + (move(z, dx) + move(z + move(z, dx), dx)) / 2, None)
  return loop(turn, net(KELVINS - 293)[:, :4], CHANGES)[0]


def by_index(turn, z, slices):
  return [lax.fori_loop(0, len(slices), lambda n, z: turn(z, slices[n])[0], z)]


def rewarded(net):
  returns = (10 + KELVINS / 293) @ DISCOUNTS
  return (returns - returns.mean(0)) * net(KELVINS - 293)


PROGRAMS = {
  "update": lambda net: KELVINS - 0.1 * KELVINS @ LAPLACIAN + 0.1 * net(KELVINS - 293) - 293,
  "updates": lambda net: (
    repeated(lambda t: t - 0.1 * t @ LAPLACIAN + 0.1 * net(t - 293), KELVINS) - 293
  ),
  "motion": lambda net: (
    repeated(lambda s: s @ NEXT.T + net(s - 50)[:, :6] @ PUSH.T, STATES)[..., :6] - 50
  ),
  "filter": lambda net: filtered(net)[..., :6] - 50,
  "implicit": lambda net: repeated(lambda t: (t + net(t - 293)) @ IMPLICIT, KELVINS, 20) - 293,
  "regridded": lambda net: net((KELVINS @ BLENDS - 293) / 2),
  "detrended": lambda net: net(KELVINS - KELVINS @ FITTED.T @ POWERS.T),
  "spectrum": lambda net: net(spectrum(SOUND)),
  "convolution": lambda net: net(spectrum_by_convolution(SOUND)),
  "controlled": lambda net: controlled(lambda f, dx: jnp.einsum("bhc,bc->bh", f, dx), net),
  "controlled_each": lambda net: controlled(jax.vmap(jnp.matmul), net, loop=by_index),
  "returns": rewarded,
  "masses": lambda net: net(jnp.log1p(jnp.abs((MOMENTA @ METRIC * MOMENTA).sum(-1)))),
  "products": lambda net: net(
    jnp.log1p(jnp.abs(jnp.einsum("bia,ac,bjc->bij", MOMENTA, METRIC, MOMENTA))[:, 0]) / 5
  ),
  "pooled": lambda net: net(
    jnp.einsum(
      "bt,btd->bd", jax.nn.softmax(net(KELVINS - 293)), KELVINS[:, :, None] + MOMENTA[..., :1]
    )
    * jnp.ones(WIDTH)
    - 293
  ),
}


def weights(seed, *widths):
  pairs = enumerate(itertools.pairwise(widths))
  return [array(normal((seed, n), *pair) / pair[0] ** 0.5) for n, pair in pairs]


def network(p, dtype=jnp.float32):
  """By hand in a format of its own, whose result is float32."""
  wide = lambda x: x.astype(jnp.float32)
  dot = lambda x, w: x.astype(dtype) @ w.astype(dtype)
  return lambda x: wide(dot(jnp.tanh(dot(x, p[0])), p[1]))


@pytest.mark.quick(every=3)
@in_turns(("name", "policy"), [*PROGRAMS], [*COMPUTE])
def test_values_and_gradients_are_as_exact_as_by_hand(name, policy):
  p = weights(4, WIDTH, 32, WIDTH)
  signs = jax.random.rademacher(jax.random.key(5), (1,), jnp.float32)

  def of(net):
    found = PROGRAMS[name](net)
    return jnp.mean(found * signs) + jnp.mean(found**2)

  exact = lambda p: of(network(p))
  by_hand = lambda p: of(network(p, COMPUTE[policy]))
  fns = [jax.value_and_grad(fn) for fn in (mpjax.autocast(exact, policy), by_hand, exact)]
  found, hand, want = jax.jit(lambda p: [f(p) for f in fns], compiler_options=ROUNDING)(p)
  for got, other, exact in zip(*map(jax.tree.leaves, (found, hand, want)), strict=True):
    distance = lambda a, exact=exact: jnp.linalg.norm(a - exact)
    assert distance(got) <= 2 * distance(other) + 1e-5 * jnp.linalg.norm(exact)


def test_a_plan_of_transport_has_a_mass_in_float16():
  """Beside which a kernel of 1e-13 times a scaling of 1e5 is infinite."""

  def mass(p, x, y):
    kernel = jnp.exp(-jnp.sum(((x @ p)[:, None] - y[None]) ** 2, -1) / 0.5)

    def turn(uv, _):
      u = 1 / (kernel @ uv[1])
      return (u, 1 / (u @ kernel)), None

    (u, v), _ = lax.scan(turn, (jnp.ones(BATCH),) * 2, None, length=15)
    return jnp.sum(u * (kernel @ v))

  x = array(normal(0, BATCH, WIDTH))
  y = array(normal(1, BATCH, 4) * [1, 2, 0.5, 1])
  found = mpjax.autocast(mass, "mixed_float16")(jnp.eye(WIDTH, 4), x, y)
  np.testing.assert_allclose(found, BATCH, rtol=0.02)


FROZEN = weights(6, *[WIDTH] * 5)
BIAS = array(np.ones(WIDTH))
TABLE = array(normal(7, 30, WIDTH))
LINKS = array(ring(BATCH, 1) + ring(BATCH, -1))


def norm(x):
  return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def turned(q, angles):
  first, second = jnp.split(q, 2, -1)
  sine, cosine = jnp.sin(angles), jnp.cos(angles)
  return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def attention(h):
  angles = jnp.arange(h.shape[0])[:, None] * 0.1 ** jnp.arange(WIDTH // 2)
  q, k, v = (norm(h) @ w for w in FROZEN[:3])
  return h + jax.nn.softmax(turned(q, angles) @ turned(k, angles).T) @ v @ FROZEN[3]


NETWORKS = {
  "layers": lambda x: jax.nn.relu(jnp.tanh(x @ FROZEN[0] + BIAS) @ FROZEN[1]),
  "deep": lambda x: lax.scan(lambda h, w: (jax.nn.gelu(h @ w), None), x, jnp.stack(FROZEN))[0],
  "residual": lambda x: lax.scan(lambda h, w: (h + jax.nn.relu(h) @ w, None), x, jnp.stack(FROZEN))[
    0
  ],
  "gated": lambda x: (jax.nn.silu(x @ FROZEN[0]) * (x @ FROZEN[1])) @ FROZEN[2],
  "normed": lambda x: norm(x @ FROZEN[0] + BIAS) * BIAS @ FROZEN[1],
  "leaky": lambda x: jax.nn.leaky_relu(x @ FROZEN[0]) @ FROZEN[1],
  "attention": lambda x: attention(TABLE[jnp.arange(BATCH)] + 0 * x[:, :1]),
  "propagated": lambda x: jax.nn.relu(LINKS @ (LINKS @ x) @ FROZEN[0]),
  "adapted": lambda x: jax.nn.relu(x @ FROZEN[0] + (x @ FROZEN[1][:, :2]) @ FROZEN[2][:2]),
  "jitted": jax.jit(lambda x: jax.nn.relu(x @ FROZEN[0]) @ FROZEN[1]),
}


@in_turns(("name", "policy"), [*NETWORKS], [*COMPUTE])
def test_networks_that_are_not_trained_stay_narrow(name, policy):
  x = array(normal(0, BATCH, WIDTH))
  loss = lambda p, x: jnp.mean((jnp.tanh(NETWORKS[name](x) @ p[0]) @ p[1]) ** 2)
  found = matmuls(mpjax.autocast(loss, policy), weights(4, WIDTH, 32, WIDTH), x)
  assert operand_bytes(found) == {2}


@both
def test_a_function_of_nothing_but_data_multiplies_in_16_bits(policy):
  for fn in (lambda x: x @ FROZEN[0], lambda x: jnp.sum(x @ FROZEN[0] + 1)):
    found = matmuls(mpjax.autocast(fn, policy, argnums=()), KELVINS)
    assert operand_bytes(found) == {2}


@both
def test_a_convolution_of_a_frozen_network_is_narrow(policy):
  kernel, x = jnp.ones((3, 3, 2, 4)), jnp.ones((1, 8, 8, 2))
  layer = lambda x: lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  loss = lambda w, x: jnp.mean(jax.nn.relu(layer(x) * 0.5 + jnp.arange(4.0)) @ w)
  jaxpr = jax.make_jaxpr(mpjax.autocast(loss, policy))(jnp.ones((4, 4)), x)
  found = [
    e for e in equations(jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")
  ]
  assert operand_bytes(found) == {2}


SQUARE = array(np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0])


def moved(way):
  """A motion that a network drives, its turn in a function that is called."""
  turn = way(lambda s, p: s @ NEXT.T + network(p)(s - 50)[:, :6] @ PUSH.T)
  return lambda p, x: repeated(lambda s: turn(s, p), STATES, 5)


DECIDED = {
  "plain": lambda p, x: KELVINS - 0.1 * KELVINS @ LAPLACIAN + network(p)(x),
  "jitted": lambda p, x: KELVINS - 0.1 * jax.jit(jnp.matmul)(KELVINS, LAPLACIAN) + network(p)(x),
  "checkpointed": lambda p, x: (
    KELVINS - 0.1 * jax.checkpoint(jnp.matmul)(KELVINS, LAPLACIAN) + network(p)(x)
  ),
  "einsum": lambda p, x: KELVINS - jnp.einsum("bi,ij->bj", KELVINS, LAPLACIAN) + network(p)(x),
  "batched": lambda p, x: jax.vmap(lambda t: t - LAPLACIAN @ t)(KELVINS) + network(p)(x),
  "floor": lambda p, x: network(p)(jnp.log(jnp.maximum((x @ SQUARE) ** 2, 1e-8))),
  "clip": lambda p, x: network(p)(jnp.log(jnp.clip((x @ SQUARE) ** 2, 1e-8))),
  "value": lambda p, x: jnp.mean((network(p)(x) - x @ DISCOUNTS) ** 2),
  "turn": moved(lambda turn: turn),
  "jitted_turn": moved(jax.jit),
  "checkpointed_turn": moved(jax.checkpoint),
}


@in_turns(("name", "policy"), [*DECIDED], [*COMPUTE])
def test_a_transform_is_one_however_it_is_written(name, policy):
  """Around it stand two layers, and the input that a motion is given."""
  p, x = weights(4, WIDTH, 32, WIDTH), array(normal(0, BATCH, WIDTH))
  found = matmuls(mpjax.autocast(DECIDED[name], policy), p, x)
  wide = [e for e in found if operand_bytes([e]) == {4}]
  assert len(wide) == 1 and len(found) in (3, 4)


ACTIVATIONS = {
  "gelu": jax.nn.gelu,
  "elu": jax.nn.elu,
  "leaky": jax.nn.leaky_relu,
  "where": lambda h: jnp.where(h > 0, h, 0.2 * h),
  "square": jnp.square,
  "over_8": lambda h: jax.nn.relu(norm(h)) / 8,
  "hard_swish": lambda h: h * jnp.clip(h + 3, 0, 6) / 6,
  "highway": lambda h: jax.nn.sigmoid(h + 2) * h,
}


@in_turns(("name", "policy"), [*ACTIVATIONS], [*COMPUTE])
def test_frozen_networks_are_narrow_whatever_their_activation(name, policy):
  act, x = ACTIVATIONS[name], array(normal(0, BATCH, WIDTH))
  frozen = jnp.stack(FROZEN)

  def teacher(x, layers):
    h = lax.scan(lambda h, w: (h + act(norm(h) @ w) @ w.T, None), x, layers)[0]
    return act(h @ layers[0] + BIAS) @ layers[1]

  programs = {
    "distilled": lambda p, x: jnp.mean((network(p)(x) - teacher(x, frozen)) ** 2),
    "compared": lambda p, x: jnp.mean((x - teacher(x, frozen) - network(p)(x)) ** 2),
    "of_one": lambda p, x: jnp.mean(network(p)(teacher(x[:1], frozen))),
    "of_a_row": lambda p, x: jnp.mean(network(p)(teacher(x[0], frozen))),
    "guided": lambda p, x: x + 0.1 * teacher(norm(network(p)(x)), frozen),
  }
  for fn in programs.values():
    found = matmuls(mpjax.autocast(fn, policy), weights(4, WIDTH, 32, WIDTH), x)
    assert operand_bytes(found) == {2}


@both
def test_numbers_may_be_returned_beside_a_product(policy):
  turn = lambda carry, _: ((carry[0] @ SQUARE, 0.0), None)
  programs = (
    lambda p, x: jnp.sum(jax.jit(lambda x: (x @ SQUARE, 1.0))(x)[0]) + jnp.sum(p),
    lambda p, x: (jnp.sum(p), 1.0, x @ SQUARE),
    lambda p, x: jnp.sum(lax.scan(turn, (x, 0.0), None, length=3)[0][0] @ p),
    lambda p, x: jnp.sum(lax.select_n(jnp.bool_(True), x @ SQUARE, x) @ p),
  )
  x = array(normal(0, BATCH, WIDTH))
  for fn in programs:
    run = lambda fn: jax.jit(fn)(jnp.eye(WIDTH), x)
    for got, want in zip(
      *map(jax.tree.leaves, (run(mpjax.autocast(fn, policy)), run(fn))), strict=True
    ):
      np.testing.assert_allclose(got, want, rtol=0.05, atol=0.05)


MASK = array(np.tri(BATCH, WIDTH))
WEIGHED = {
  "mean_over_a_mask": lambda p, h: network(p)(
    jnp.einsum("bti,bt->bi", jnp.tanh(h)[:, None] * MASK[..., None], MASK)
  ),
  "hypernetwork": lambda p, h: network(p)(
    jax.nn.relu(jnp.einsum("bi,bi...->b...", MASK, h[..., None] * h[:, None]))
  ),
}


@in_turns(("name", "policy"), [*WEIGHED], [*COMPUTE])
def test_what_a_layer_goes_on_from_stays_narrow_though_data_weigh_it(name, policy):
  p, x = weights(4, WIDTH, 32, WIDTH), array(normal(0, BATCH, WIDTH))
  found = matmuls(mpjax.autocast(lambda p, x: WEIGHED[name](p, network(p)(x)), policy), p, x)
  assert len(found) == 5
  assert operand_bytes(found) == {2}


highest = functools.partial(jnp.matmul, precision="highest")


def coupled(multiply, turns):
  """A flow by couplings whose stream permutations by matrices split, in a loop or written out."""

  def flow(p, x, orders):
    def couple(x, order):
      first, second = jnp.split(multiply(x, order), 2, -1)
      shift, scale = jnp.split(jax.nn.gelu(first @ p[0]) @ p[1], 2, -1)
      moved = (second + 0.1 * shift) * (2 * jax.nn.sigmoid(scale))
      return multiply(jnp.concatenate([first, moved], -1), order.T)

    return turns(couple, x, orders)

  return flow


def written_out(couple, x, orders):
  for order in orders:
    x = couple(x, order)
  return x


scanned = lambda couple, x, orders: lax.scan(lambda x, o: (couple(x, o), None), x, orders)[0]
ASKED = {
  "written_out": (highest, written_out),
  "scanned": (highest, scanned),
  "by_an_algorithm": (
    functools.partial(jnp.matmul, precision=lax.DotAlgorithmPreset.F32_F32_F32),
    written_out,
  ),
  "around_it": (jax.default_matmul_precision("highest")(jnp.matmul), written_out),
}


@in_turns(("asked", "policy"), ASKED, [*COMPUTE])
def test_what_an_author_asks_of_matmuls_without_a_layer_is_kept(asked, policy):
  p = weights(4, WIDTH // 2, 32, WIDTH)
  orders = jnp.stack([array(ring(WIDTH, n)) for n in (1, 2)])
  found = matmuls(mpjax.autocast(coupled(*asked), policy), p, KELVINS / 100, orders)
  layers = [e for e in found if e.invars[1].aval.shape != (WIDTH, WIDTH)]
  assert operand_bytes(layers) == {2} and len(layers) < len(found)
  assert operand_bytes(e for e in found if e not in layers) == {4}


@both
def test_layers_do_not_ask_nor_does_the_default_of_jax(policy):
  p, orders = weights(4, WIDTH // 2, 32, WIDTH), array(ring(WIDTH, 1))[None]
  layers = mpjax.autocast(lambda p, x: highest(jnp.tanh(highest(x, p[0])), p[1]), policy)
  assert operand_bytes(matmuls(layers, p, KELVINS[:, :6])) == {2}
  back = jax.grad(lambda p, x: layers(p, x).sum())
  assert operand_bytes(matmuls(back, p, KELVINS[:, :6])) == {2}
  frozen = lambda x: highest(jnp.tanh(highest(x, FROZEN[0]) + BIAS), FROZEN[1])
  teacher = mpjax.autocast(lambda p, x: frozen(jax.nn.relu(x)) @ p[0], policy)
  assert operand_bytes(matmuls(teacher, weights(4, WIDTH, 4), KELVINS)) == {2}
  norm = mpjax.autocast(lambda p, x: highest(jax.nn.standardize(x @ p[0]), p[1].T @ p[1]), policy)
  assert operand_bytes(matmuls(norm, [p[0], jnp.ones((4, 32))], KELVINS[:, :6])) == {2}
  table = jnp.cos(KELVINS[:, :6])
  scores = mpjax.autocast(lambda p, x, c: highest((x @ p) * c, ((x @ p) * c).T), policy)
  assert operand_bytes(matmuls(scores, jnp.ones((6, 6)), KELVINS[:, :6], table)) == {2}
  plain = mpjax.autocast(coupled(jnp.matmul, written_out), policy)
  with jax.default_matmul_precision("highest"):
    assert operand_bytes(matmuls(plain, p, KELVINS / 100, orders)) == {2}
