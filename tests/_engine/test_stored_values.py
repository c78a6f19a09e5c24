"""What is stored for the backward pass is no more than by hand, where a scan makes it count.

Outside of a loop a compiler may compute again what it need not store.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import mpjax
from _arrays import array, normal
from _turns import in_turns

POLICIES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
X = array(normal(0, 64, 32))
W = array(normal(1, 6, 32, 32) / 12)
SERIES = array(normal(2, 48, 16, 1))
GROUPS = array(np.random.default_rng(3).integers(0, 64, 256), np.int32)
SENDERS = array(np.random.default_rng(4).integers(0, 64, 256), np.int32)


def stack(layer):
  """Equal layers in a scan, each with a matrix and a vector of its own."""

  def run(p, cast):
    turn = lambda h, own: (h + layer(h, own, cast), None)
    return lax.scan(turn, cast(X) @ cast(p["in"]), {"w": p["w"], "v": p["w"][:, :1]})[0]

  return run


def recurrence(cell):
  """A recurrent network over a series of single numbers."""

  def run(p, cast):
    gates = lambda u, h: cast(u) @ cast(p["w"][0, :1]) + h @ cast(p["in"])
    turn = lambda h, u: (cell(gates(u, h), h), None)
    return lax.scan(turn, cast(jnp.zeros((16, 32))), SERIES)[0]

  return run


def largest_neighbor(p, cast):
  h = cast(X)
  for w in p["w"]:
    found = jax.ops.segment_max((h @ cast(w))[SENDERS], GROUPS, 64)
    h = nn.relu(jnp.where(jnp.isfinite(found), found, 0)) + h
  return h @ cast(p["in"])


def largest_of_four(p, cast):
  h = cast(X)
  for w in p["w"]:
    h = nn.relu((h @ cast(w))[SENDERS.reshape(64, 4)].max(1)) + h
  return h @ cast(p["in"])


def activated(activation, total):
  """Layers that end in an activation of a sum, which is float32 by hand, too, until it is added."""

  def run(p, cast):
    h = cast(X)
    for w in p["w"]:
      h = activation(cast(total((h @ cast(w)).astype(jnp.float32))) + cast(p["in"][:1]))
    return h @ cast(p["in"])

  return run


of_neighbors = lambda h: jax.ops.segment_sum(h[SENDERS], GROUPS, 64)
so_far = lambda h: jnp.cumsum(h, 0) / jnp.arange(1.0, 65)[:, None]

PROGRAMS = {
  "relu_of_a_sum": activated(nn.relu, of_neighbors),
  "maximum_of_a_mean": activated(lambda h: jnp.maximum(h, 0), so_far),
  "leaky_relu_of_what_is_centered": activated(nn.leaky_relu, lambda h: h - h.mean(0)[None]),
  "layer_scale": stack(lambda h, own, cast: cast(own["v"]) * nn.relu(h @ cast(own["w"]))),
  "rezero": stack(lambda h, own, cast: cast(own["v"][0, 0]) * nn.relu(h @ cast(own["w"]))),
  "learned_steepness": stack(
    lambda h, own, cast: jnp.tanh(cast(own["v"]) * h) @ cast(own["w"]) @ cast(own["w"])
  ),
  "inner_products": stack(
    lambda h, own, cast: (
      cast(
        jnp.sum((h @ cast(own["w"])) * (h @ cast(own["w"].T)), -1, keepdims=True, dtype=jnp.float32)
      )
      @ cast(own["v"])
    )
  ),
  "gates": recurrence(lambda g, h: (1 - nn.sigmoid(g)) * h + nn.sigmoid(g) * jnp.tanh(g)),
  "network": recurrence(lambda g, h: jnp.tanh(g)),
  "largest_neighbor": largest_neighbor,
  "largest_of_four": largest_of_four,
}
IN_BFLOAT16 = {  # float16 has no room for squares, nor for what a sum may be
  "silu_of_a_sum": activated(nn.silu, of_neighbors),
  "elu_of_a_mean": activated(nn.elu, so_far),
  "squared_relu": stack(lambda h, own, cast: nn.relu(h @ cast(own["w"])) ** 2 @ cast(own["w"])),
  "gated_square": stack(lambda h, own, cast: (jnp.square(h @ cast(own["w"])) * h) @ cast(own["w"])),
}


def loss(program, p, dtype=jnp.float32):
  return jnp.mean(program(p, lambda x: x.astype(dtype)).astype(jnp.float32) ** 2)


def stored(fn, p):
  kept = jax.eval_shape(lambda p: jax.vjp(fn, p)[1], p)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def assert_no_more(program, policy):
  p = {"w": W, "in": W[0]}
  found = stored(mpjax.autocast(lambda p: loss(program, p), policy), p)
  assert found <= 1.1 * stored(lambda p: loss(program, p, POLICIES[policy]), p)


@in_turns(("program", "policy"), PROGRAMS, [*POLICIES])
def test_no_more_is_stored_than_by_hand(program, policy):
  assert_no_more(program, policy)


@pytest.mark.parametrize("program", IN_BFLOAT16.values(), ids=IN_BFLOAT16.keys())
def test_squares_that_weights_multiply_are_stored_as_by_hand(program):
  assert_no_more(program, "mixed_bfloat16")


@pytest.mark.quick(every=3)
@in_turns(("program", "policy"), PROGRAMS | IN_BFLOAT16, [*POLICIES])
def test_gradients_are_as_exact_as_by_hand(program, policy):
  fns = (
    lambda p: loss(program, p),
    lambda p: loss(program, p, POLICIES[policy]),
    mpjax.autocast(lambda p: loss(program, p), policy),
  )
  want, by_hand, found = jax.jit(lambda p: [jax.grad(f)(p) for f in fns])({"w": W, "in": W[0]})
  for name, exact in want.items():
    error = lambda g, name=name, exact=exact: np.linalg.norm(g[name] - exact)
    assert error(found) <= 2 * error(by_hand) + 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_float32_holds_before_an_activation_is_not_lost(policy):
  """An offset that is taken away in the function, a sum that is divided behind it, no result."""

  def watched(h):
    jax.jit(lambda s: jax.debug.callback(lambda s: None, s))(jnp.sum(h))
    return h

  programs = {
    "offset": lambda h: jax.jit(lambda s: jnp.maximum(s - 300, 0))(300 + jnp.cumsum(h, 0) / 64),
    "divided": lambda h: nn.relu(jnp.sum(4096 * nn.relu(h), 0, keepdims=True)) / 65536,
    "no_result": watched,
  }
  for fn in programs.values():
    run = lambda w, fn=fn: jnp.mean((fn(X @ w) @ w) ** 2)
    by_hand = lambda w, fn=fn: jnp.mean(
      (lambda cast: cast(fn(cast(X @ w)).astype(jnp.float32) @ w) ** 2)(
        lambda x: x.astype(POLICIES[policy]).astype(jnp.float32)
      )
    )
    fns = (run, by_hand, mpjax.autocast(run, policy))
    want, hand, found = jax.jit(lambda w, fns=fns: [jax.grad(f)(w) for f in fns])(W[0])
    error = lambda g, want=want: np.linalg.norm(g - want)
    assert error(found) <= 2 * error(hand) + 1e-2 * np.linalg.norm(want)
