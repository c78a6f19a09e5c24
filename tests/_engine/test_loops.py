"""What every turn of a loop rounds alike is rounded once, before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _both_formats import POLICIES, both, cases
from _jaxprs import equations
from _turns import in_turns

TURNS = 6


def layer(p, h):
  return jnp.tanh(jnp.tanh(h @ p["up"]) @ p["down"].T)


def nested(p, x):
  inner = lambda h, _: (layer(p, h), None)
  return lax.scan(lambda h, _: lax.scan(inner, h, None, length=2), x, None, length=3)[0]


def to_a_limit(p, x):
  more = lambda c: c[0] < TURNS
  return lax.while_loop(more, lambda c: (c[0] + 1, layer(p, c[1])), (0, x))[1]


def chosen(p, x):
  turn = lambda h, n: (lax.cond(n >= 0, layer, lambda p, h: h, p, h), None)
  return lax.scan(turn, x, jnp.arange(TURNS))[0]


LOOPS = {
  "scan": lambda p, x: lax.scan(lambda h, _: (layer(p, h), None), x, None, length=TURNS)[0],
  "reverse": lambda p, x: lax.scan(
    lambda h, n: (layer(p, h + n), None), x, jnp.zeros(TURNS), reverse=True, unroll=2
  )[0],
  "fori": lambda p, x: lax.fori_loop(0, TURNS, lambda _, h: layer(p, h), x),
  "while": to_a_limit,
  "nested": nested,
  "jitted": lambda p, x: lax.fori_loop(0, TURNS, lambda _, h: jax.jit(layer)(p, h), x),
  "checkpointed": lambda p, x: lax.fori_loop(0, TURNS, lambda _, h: jax.checkpoint(layer)(p, h), x),
  "cond": chosen,
}


def unrolled(p, x):
  for _ in range(TURNS):
    x = layer(p, x)
  return x


@pytest.fixture(scope="module")
def operands():
  keys = jax.random.split(jax.random.key(0), 3)
  p = {"up": jax.random.normal(keys[0], (8, 16)) / 3, "down": jax.random.normal(keys[1], (8, 16))}
  return p, jax.random.normal(keys[2], (4, 8))


@in_turns(("loop", "policy", "stored"), LOOPS, POLICIES, [False, True], turning=2)
def test_every_turn_reads_a_copy_in_16_bits(loop, policy, stored, operands):
  """Alone: where turns read float32 there is an identity, whose first operand is the value."""
  dtype = jnp.dtype(policy.removeprefix("mixed_"))
  p, x = operands
  p = jax.tree.map(lambda a: a.astype(dtype), p) if stored else p
  jaxpr = jax.make_jaxpr(mpjax.autocast(loop, policy))(p, x)
  loops = [e for e in equations(jaxpr) if e.primitive.name in ("scan", "while")]
  bodies = [e.params.get("body_jaxpr") or e.params["jaxpr"] for e in loops]
  for body in (body.jaxpr for body in bodies):
    weights = [v for v in body.invars if v.aval.size == 128]
    assert {v.aval.dtype for v in weights} == {dtype, np.dtype("float32")}
    wide = [v for v in weights if v.aval.dtype == jnp.float32]
    readers = [e for e in body.eqns for place, a in enumerate(e.invars) if a in wide and place != 1]
    assert all(e.primitive.name in ("scan", "mpjax_rounded") for e in readers)


@in_turns(("loop", "policy"), LOOPS, POLICIES)
def test_it_computes_what_a_loop_written_out_does(loop, policy, operands):
  fns = [mpjax.autocast(fn, policy) for fn in (loop, unrolled)]
  if loop is not to_a_limit:  # which JAX does not differentiate
    fns = [jax.grad(lambda p, x, fn=fn: fn(p, x).sum()) for fn in fns]
  found, want = jax.jit(lambda p, x: [fn(p, x) for fn in fns])(*operands)
  scale = 0.05 if policy == "mixed_bfloat16" else 0.01
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=scale * float(jnp.abs(b).max()))


@both
@pytest.mark.parametrize("stored", ["float32", "16 bits"])
def test_what_comes_back_to_a_copy_adds_up_in_float32(stored, policy):
  w = jnp.ones((4, 4), jnp.dtype(policy.removeprefix("mixed_")) if stored == "16 bits" else None)

  def total(w, x):
    turn = lambda c, row: (c, (row[None] @ w).sum())
    return lax.scan(turn, 0.0, x)[1].sum()

  grad = jax.jit(jax.grad(mpjax.autocast(total, policy)))(w, jnp.ones((5000, 4)))
  np.testing.assert_allclose(np.asarray(grad, np.float32), np.full((4, 4), 5000.0), rtol=2e-3)


def to_limits_of_their_own(p, x):
  def one(limit, x):
    more = lambda c: c[0] < limit
    return lax.while_loop(more, lambda c: (c[0] + 1, layer(p, c[1][None])[0]), (0, x))[1]

  return jax.vmap(one)(1 + jnp.arange(4), x)


def printing(p, x):
  def turn(h, n):
    jax.debug.callback(lambda n: None, n)
    return layer(p, h), n

  return lax.scan(turn, x, jnp.arange(TURNS))[0]


def of_examples(p, x):
  return jax.vmap(lambda x: LOOPS["scan"](p, x[None])[0])(x)


@both
@cases(batch=to_limits_of_their_own, effects=printing, examples=of_examples)
def test_whatever_loop_runs_in_float32_runs(fn, policy, operands):
  fns = [mpjax.autocast(fn, policy), fn, lambda p, x: jax.vmap(mpjax.autocast(fn, policy))(p, x)]
  p, x = operands
  found, want = (f(p, x) for f in fns[:2])
  np.testing.assert_allclose(found, want, atol=0.2)
  many = fns[2](jax.tree.map(lambda a: jnp.stack([a, -a]), p), jnp.stack([x, x]))
  np.testing.assert_allclose(many[0], found, atol=0.05)


@both
def test_what_a_turn_reads_in_float32_has_no_copy(policy):
  def fn(p, x):
    turn = lambda h, _: (jnp.tanh(h @ p["w"]) * jnp.exp(p["w"]).sum(), None)
    return lax.scan(turn, x, None, length=3)[0]

  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))({"w": jnp.eye(4)}, jnp.ones((4, 4)))
  (loop,) = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
  assert all(v.aval.dtype == jnp.float32 for v in loop.params["jaxpr"].jaxpr.invars)
