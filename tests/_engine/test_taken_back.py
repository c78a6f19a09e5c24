"""What is subtracted and added again leaves what it is beside, however small: straight-through."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

import mpjax
from _turns import in_turns

CODES, WIDTH = 64, 8
COMPUTE = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
held = lax.stop_gradient

ESTIMATORS = {
  "added": lambda z, q: z + held(q - z),
  "first": lambda z, q: held(q - z) + z,
  "subtracted": lambda z, q: z - held(z - q),
  "sum_less": lambda z, q: (z + held(q)) - held(z),
  "less_sum": lambda z, q: held(z + q) - z,
  "moved": lambda z, q: (z.T + held(q - z).T).T,
  "moved_twice": lambda z, q: (z.T + held(q.T - z.T)).T,
  "reshaped_twice": lambda z, q: (z.reshape(-1) + held(q.reshape(-1) - z.reshape(-1))).reshape(
    z.shape
  ),
  "cut_twice": lambda z, q: jnp.concatenate(
    [z[:, a:b] + held(q[:, a:b] - z[:, a:b]) for a, b in ((0, 4), (4, 8))], 1
  ),
  "times_one": lambda z, q: z + 1.0 * held(q - z),
  "jitted": jax.jit(lambda z, q: z + held(q - z)),
  "in_a_loop": lambda z, q: lax.map(lambda rows: rows[0] + held(rows[1] - rows[0]), (z, q)),
  "checkpoint": jax.checkpoint(lambda z, q: z + held(q - z)),
  "sign": lambda z, q: z + held(0.01 * jnp.sign(z) - z),
  "hard_softmax": lambda z, q: 1e-3 * nn.one_hot(jnp.argmax(z, -1), WIDTH) - held(z) + z,
}


def through_codes(estimator, multiply, p, x, ids):
  z = multiply(x, p["encoder"])
  return multiply(estimator(z, p["codes"][ids]), p["decoder"])


@pytest.mark.quick(every=3)
@in_turns(("estimator", "policy"), ESTIMATORS, [*COMPUTE])
def test_codes_reach_the_decoder_as_by_hand(estimator, policy):
  """Codes are small beside what they stand for, as they are at the start of a training."""
  keys = jax.random.split(jax.random.key(0), 4)
  p = {
    "encoder": 0.35 * jax.random.normal(keys[0], (WIDTH, WIDTH)),
    "codes": jax.random.uniform(keys[1], (CODES, WIDTH), minval=-1 / CODES, maxval=1 / CODES),
    "decoder": 0.35 * jax.random.normal(keys[2], (WIDTH, WIDTH)),
  }
  x, ids = jax.random.normal(keys[3], (32, WIDTH)), jnp.arange(32) * 2

  def by_hand(a, b):
    narrow = COMPUTE[policy]
    return (a.astype(narrow) @ b.astype(narrow)).astype(jnp.float32)

  def run(multiply):
    return lambda p, x: through_codes(estimator, multiply, p, x, ids)

  def error(fn):
    decoded = jax.jit(jax.grad(lambda p, x: jnp.mean((fn(p, x) - x) ** 2)))
    pairs = [(fn(p, x), want(p, x)), (decoded(p, x)["decoder"], decoded_wanted)]
    return [jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted) for got, wanted in pairs]

  want = run(jnp.matmul)
  decoded_wanted = jax.grad(lambda p, x: jnp.mean((want(p, x) - x) ** 2))(p, x)["decoder"]
  for own, hand in zip(error(mpjax.autocast(want, policy)), error(run(by_hand)), strict=True):
    assert own <= 2 * hand


def rounded(z):
  return z + held(jnp.round(z * 16) / 16 - z)


def hard(h):
  gate = nn.sigmoid(h)
  return (gate > 0.5).astype(gate.dtype) - held(gate) + gate


BLOCKS = {
  "branch": lambda h, w, own: h + own(rounded)(nn.relu(h @ w) @ w),
  "stream": lambda h, w, own: own(rounded)(h + nn.relu(h @ w) @ w),
  "factor": lambda h, w, own: h + own(rounded)(nn.relu(h @ w)) * (h @ w),
  "gate": lambda h, w, own: h + own(hard, nn.sigmoid)(h @ w) * (h @ w),
  "concatenated": lambda h, w, own: (
    h + jnp.concatenate([own(rounded)(h @ w)[:, :32], (h @ w)[:, 32:]], -1)
  ),
  "into_a_layer": lambda h, w, own: h + own(rounded)(nn.relu(h @ w)) @ w,
}


@in_turns(("block", "policy"), BLOCKS, [*COMPUTE])
@pytest.mark.parametrize("again", [lambda block: block, jax.checkpoint], ids=["stored", "again"])
def test_it_stores_no_more_than_what_stands_in_its_place(block, again, policy):
  """In blocks of a residual stream, which remains in 16 bits."""
  w, x = jnp.ones((6, 64, 64)), jnp.ones((128, 64))

  def stored(own):
    turn = again(lambda h, w: block(h, w, own))
    loss = lambda w: jnp.mean(lax.scan(lambda h, w: (turn(h, w), None), x @ w[0], w)[0] ** 2)
    found = jax.eval_shape(lambda w: jax.vjp(mpjax.autocast(loss, policy), w)[1], w)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))

  least = x.size * 2 * 6 // 8  # truths of a gate are stored, too
  without = stored(lambda fn, instead=lambda z: z: instead)
  assert stored(lambda fn, instead=None: fn) <= without + least
