"""The operations with bodies of random programs: control flow, rules, transformations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from _program_types import STRAY, Body, Op, blend


def same(*avals: Any) -> tuple[Any, ...]:
  """A body that gets the operands as they are."""
  return avals


def rows(first: Any, *others: Any) -> tuple[Any, ...]:
  """A body that gets a row of the first operand."""
  return (first.update(shape=first.shape[1:]), *others)


def jit(knob: int, body: Body, a: Any) -> Any:
  if knob % 4 == 3:
    return jax.jit(lambda n, a: n * body(a), static_argnums=0)(2, a)
  return jax.jit(body, inline=knob % 2 == 1)(a)


def remat(knob: int, body: Body, a: Any) -> Any:
  policies = jax.checkpoint_policies
  policy = (
    None,
    policies.dots_saveable,
    policies.save_only_these_names("kept"),
    policies.everything_saveable,
  )[knob % 4]
  return jax.checkpoint(body, policy=policy, prevent_cse=knob < 4)(a)


def scan(knob: int, body: Body, a: Any, b: Any) -> Any:
  def step(carry: Any, _: Any) -> Any:
    new = body(carry, b)
    return new, jnp.mean(new, axis=0) if new.ndim else new

  carry, stacked = lax.scan(step, a, None, length=3, reverse=knob % 2 == 1, unroll=1 + knob // 6)
  return stacked if knob % 4 == 2 else carry


def scan_rows(knob: int, body: Body, a: Any, b: Any) -> Any:
  def step(carry: Any, row: Any) -> Any:
    new = body(row, carry)
    return 0.5 * (carry + new.reshape(carry.shape)), new

  start = a[0] if knob % 2 else jnp.zeros_like(a[0])
  carry, stacked = lax.scan(step, start, b)
  return carry if knob % 4 < 2 else stacked


def while_loop(knob: int, body: Body, a: Any) -> Any:
  def goes_on(carry: Any) -> Any:
    return (carry[1] < 2) & (jnp.sum(carry[0]) < 1e6 if knob % 2 else True)

  return lax.while_loop(goes_on, lambda c: (body(c[0]), c[1] + 1), (a, 0))[0]


def fori_loop(knob: int, body: Body, a: Any) -> Any:
  return lax.fori_loop(0, 2, lambda _, c: body(c) + (STRAY if knob % 2 else 0), a)


def fori_dynamic(knob: int, body: Body, a: Any, trips: Any) -> Any:
  return lax.fori_loop(0, trips % 3, lambda _, c: body(c), a)


def cond(knob: int, body: Body, a: Any, b: Any) -> Any:
  other = (lambda a, b: a, lambda a, b: a * STRAY, lambda a, b: blend(a, b))[knob % 3]
  return lax.cond(jnp.sum(b) > 0, body, other, a, b)


def switch(knob: int, body: Body, a: Any, index: Any) -> Any:
  return lax.switch(index, [body, lambda a: jnp.zeros_like(a), lambda a: 0.5 * a], a)


def custom_jvp(knob: int, body: Body, a: Any) -> Any:
  """A derivative of its own; one in three differentiates a function that has a backward pass."""
  fn = jax.custom_jvp(body)
  through = body
  if knob % 3 == 1:
    through = jax.custom_vjp(body)
    through.defvjp(lambda a: jax.vjp(body, a), lambda pullback, ct: pullback(ct))

  @fn.defjvp
  def rule(primals: Any, tangents: Any) -> Any:
    y, dy = jax.jvp(through, primals, tangents)
    return y, 0.5 * dy + 0.1 * jnp.tanh(primals[0]) * tangents[0]

  return fn(a)


def custom_vjp(knob: int, body: Body, a: Any, b: Any) -> Any:
  """A backward pass of its own, which has a matmul of its own."""
  fn = jax.custom_vjp(body)

  def forward(a: Any, b: Any) -> Any:
    y, pullback = jax.vjp(body, a, b)
    return y, (pullback, a, None)

  def backward(residuals: Any, ct: Any) -> Any:
    pullback, a, _ = residuals
    da, db = pullback(ct)
    own = 0.1 * (ct @ ct.T) @ a if a.ndim == 2 else ct
    return 0.5 * da + own, db

  fn.defvjp(forward, backward, optimize_remat=knob == 7)
  return fn(a, b)


def custom_vjp_index(knob: int, body: Body, a: Any, index: Any) -> Any:
  fn = jax.custom_vjp(lambda a, index: body(a)[index % 2])

  def backward(residuals: Any, ct: Any) -> Any:
    a, index = residuals
    return jnp.zeros_like(a).at[index % 2].add(ct), None

  fn.defvjp(lambda a, index: (fn(a, index), (a, index)), backward)
  return fn(a, index)


def custom_gradient(knob: int, body: Body, a: Any) -> Any:
  return jax.custom_gradient(lambda a: (body(a), lambda ct: jnp.tanh(a) * ct))(a)


def custom_vmap(knob: int, body: Body, a: Any) -> Any:
  fn = jax.custom_batching.custom_vmap(body)
  fn.def_vmap(lambda size, batched, a: (jax.vmap(body)(a), True))
  return jax.vmap(fn)(jnp.stack([a, a]))[0] if knob % 2 else fn(a)


def shard_map(knob: int, body: Body, a: Any) -> Any:
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda a: lax.pmean(body(a), "d") if knob % 2 else body(a),
    mesh=mesh,
    in_specs=P(),
    out_specs=P(),
    check_vma=bool(knob // 4),
  )
  return mapped(a)


def scope(knob: int, body: Body, a: Any) -> Any:
  with jax.named_scope(("wide", "block")[knob % 2]):
    return body(a)


RATE = 2.0**-6
LONG = 320
"""More turns than bfloat16 counts."""


def descend(knob: int, body: Body, a: Any) -> Any:
  """What gradient steps change, over their rate: nothing is left of a step that 16 bits lose."""
  grad = jax.grad(lambda a: jnp.sum(jnp.tanh(a + body(a))))  # a body may not read it
  if knob % 4 == 1:
    momentum = 0.5 * grad(a)
    return (a - RATE * (momentum + grad(a - RATE * momentum)) - a) / RATE
  if knob % 4 == 2:
    step = lambda a, _: (a - RATE * grad(a), None)
    return (lax.scan(step, a, None, length=2)[0] - a) / RATE
  if knob % 4 == 3:
    return (a + RATE * (jnp.tanh(body(a)) - a) - a) / RATE
  return (a - RATE * grad(a) - a) / RATE


def long_loop(knob: int, body: Body, a: Any) -> Any:
  """A sum of as many terms as there are turns, or as many small steps towards what a body gives."""
  start = (a, jnp.zeros_like(a), 0.5 * a)[knob % 3]
  change = body(a) / LONG

  def turn(carry: Any) -> Any:
    return carry + (change if knob < 4 else (jnp.tanh(body(carry)) - carry) / LONG)

  if knob % 2:
    return lax.fori_loop(0, LONG, lambda _, carry: turn(carry), start)
  return lax.scan(lambda carry, _: (turn(carry), None), start, None, length=LONG)[0]


def to_tolerance(knob: int, body: Body, a: Any) -> Any:
  """A bisection or an iteration, which ends by a float; one more where it did not end.

  Its gradient is that of ``a`` alone, for JAX differentiates no such loop backwards.
  """
  fixed, most = lax.stop_gradient(a), 40
  if knob % 2:
    below = 4 + jnp.mean(jnp.tanh(body(fixed)))
    sought = below + 0.3

    def halve(carry: Any) -> Any:
      low, high, turns = carry
      middle = (low + high) / 2
      is_above = middle > sought
      return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high), turns + 1

    goes_on = lambda carry: (carry[1] - carry[0] > 1e-3) & (carry[2] < most)
    found, _, turns = lax.while_loop(goes_on, halve, (below, below + 1, 0))
  else:
    step = lambda carry: (0.1 * jnp.tanh(body(fixed + carry[0])), carry[0], carry[2] + 1)
    goes_on = lambda carry: (jnp.max(jnp.abs(carry[0] - carry[1])) > 1e-2) & (carry[2] < most)
    found, _, turns = lax.while_loop(goes_on, step, (fixed, fixed + 1, 0))
  return a + (found + jnp.where(turns < most, 0, 1)).astype(a.dtype)


def to_scalar(body: Body) -> Body:
  return lambda *args: jnp.mean(body(*args))


def linear(knob: int, body: Body, a: Any) -> Any:
  if knob % 3 == 0:
    return jax.jvp(body, (a,), (0.5 * a,))[1]
  if knob % 3 == 1:
    return jax.vjp(body, a)[1](jnp.cos(a))[0]
  return jax.linearize(body, a)[1](0.5 * a)


NESTED: dict[str, Op] = {
  "jit": Op(("F",), jit, same),
  "remat": Op(("F",), remat, same),
  "scan": Op(("F", "F"), scan, same),
  "scan_rows": Op(("V", "V="), scan_rows, lambda a, b: rows(b, *rows(a))),
  "while_loop": Op(("F",), while_loop, same),
  "fori_loop": Op(("F",), fori_loop, same),
  "fori_dynamic": Op(("F", "N"), fori_dynamic, lambda a, n: (a,)),
  "cond": Op(("F", "F"), cond, same),
  "switch": Op(("F", "N"), switch, lambda a, n: (a,)),
  "vmap": Op(("V", "F"), lambda knob, body, a, b: jax.vmap(body, (0, None))(a, b), rows),
  "map": Op(("V",), lambda knob, body, a: lax.map(body, a), rows),
  "scope": Op(("F",), scope, same),
  "grad": Op(("F",), lambda knob, body, a: jax.grad(to_scalar(body))(a), same),
  "linear": Op(("F",), linear, same),
  "descend": Op(("F",), descend, same),
  "long_loop": Op(("F",), long_loop, same),
  "to_tolerance": Op(("F",), to_tolerance, same, isolated=True),
  "custom_jvp": Op(("F",), custom_jvp, same, isolated=True),
  "custom_vjp": Op(("F", "F"), custom_vjp, same, isolated=True),
  "custom_vjp_index": Op(("V", "N"), custom_vjp_index, lambda a, n: (a,), isolated=True),
  "custom_gradient": Op(("F",), custom_gradient, same, isolated=True),
  "custom_vmap": Op(("F",), custom_vmap, same, isolated=True),
  "shard_map": Op(("F",), shard_map, same, isolated=True),
}
