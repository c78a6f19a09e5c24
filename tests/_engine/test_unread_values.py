"""What a function computes and nobody reads: tracing keeps it, and so does planning."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

import mpjax
from _turns import in_turns


def joined_for_a_system(h, w):
  return jnp.linalg.solve(w.T @ w + jnp.eye(8), jnp.concatenate([h, h]).T)


UNREAD = {
  "concatenate": lambda h, w: jnp.concatenate([h, h]),
  "concatenate_with_data": lambda h, w: jnp.concatenate([3 * h, jnp.sin(w @ w)]),
  "softmax": lambda h, w: nn.softmax(h),
  "softmax_of_data": lambda h, w: nn.softmax(2 * w),
  "attention": lambda h, w: nn.softmax(h @ h.T) @ h,
  "norm": lambda h, w: nn.standardize(h),
  "distances": lambda h, w: jnp.sum(h**2, 1)[:, None] - 2 * h @ w,
  "product": lambda h, w: jnp.tanh(h) * jnp.exp(h),
  "multiple": lambda h, w: 0.02 * h,
  "step": lambda h, w: w - 0.01 * (h.T @ h),
  "system": joined_for_a_system,
  "outer": lambda h, w: jnp.einsum("i,j->ij", h[0], w[0]),
  "gate": lambda h, w: 1 - nn.sigmoid(h),
  "lookup": lambda h, w: w[jnp.arange(3)] + h[:3],
  "loop": lambda h, w: lax.scan(lambda c, x: (c + x, jnp.concatenate([c, x])), h[0], h)[1],
  "branch": lambda h, w: lax.cond(h.sum() > 0, lambda: h @ w, lambda: h),
  "rule": lambda h, w: nn.relu(h @ w),
}
PLACES = {
  "function": lambda fn: fn,
  "jit": jax.jit,
  "checkpoint": jax.checkpoint,
  "loop": lambda fn: lambda x, w: lax.scan(lambda c, _: (fn(c, w), None), x, None, length=2)[0],
}


@pytest.mark.parametrize("where", ["before", "after"])
@in_turns(
  ("unread", "place", "policy"),
  UNREAD,
  PLACES,
  ["mixed_bfloat16", "mixed_float16"],
  turning=2,
)
def test_what_nobody_reads_may_stand_anywhere(unread, place, policy, where):
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8))

  def layer(x, w, is_kept):
    if is_kept and where == "before":
      unread(x, w)
    h = x @ w
    if is_kept and where == "after":
      unread(h, w)
    return jnp.tanh(h)

  def gradient(is_kept):
    run = place(lambda x, w: layer(x, w, is_kept))
    return jax.jit(jax.grad(mpjax.autocast(lambda w, x: run(x, w).sum(), policy)))(w, x)

  difference = jnp.linalg.norm(gradient(True) - gradient(False))
  assert difference <= 0.02 * jnp.linalg.norm(gradient(False))
