# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where did the NaN come from?
#
# The loss is NaN. Where was it made? By the time you see it, it has passed through every layer, and printing values inside
# `jit` and `scan` takes an afternoon. `locate_nonfinite` runs the function once more, one operation at a time, and says
# which operation made the *first* inf or NaN: in which module, on which line, from which operands, in which iteration.
# Four cases from practice, each with its cure.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import mpjax
from mpjax.inspect import locate_nonfinite
from mpjax.plot import plot_nonfinite

# %% [markdown]
# ## Case 1: float16 attention overflows
#
# Twelve layers; after some training one head of one layer has grown large weights. In float32 nothing happens. In float16
# the product of queries and keys passes 65,504 and becomes inf, the softmax makes NaN of it (inf - inf), and the next
# layer spreads it over everything.


# %%
class Attention(nn.Module):
  heads: int = 4

  @nn.compact
  def __call__(self, x):
    q, k, v = (
      nn.Dense(x.shape[-1], name=name)(x).reshape(*x.shape[:-1], self.heads, -1)
      for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(x.shape)


class Layers(nn.Module):
  @nn.compact
  def __call__(self, x):
    for n in range(12):
      x = x + Attention(name=f"layer_{n}")(x)
    return x


x = jax.random.normal(jax.random.key(0), (2, 6, 16))
variables = Layers().init(jax.random.key(1), x)
head = (jnp.arange(16) // 4 == 2) * 400.0 + 1.0  # head 2 of layer 7 has grown
for name in ("query", "key"):
  variables["params"]["layer_7"][name]["kernel"] *= head

model = mpjax.apply_policy(Layers(), "mixed_float16")
print("finite?", bool(mpjax.all_finite(model.apply(variables, x))))
report = locate_nonfinite(model, variables, x)
report

# %% [markdown]
# The verdict names layer 7, the line of the scores, and the index `[:, 2, :, :]`: only head 2. The table below shows
# what followed: NaN in the softmax. Its operands are finite but large:

# %%
ax = plot_nonfinite(report)

# %% [markdown]
# The cure: bfloat16, which has float32's range; or normalized queries and keys; or a rule for this product alone. A policy
# is an argument, so trying it takes a line:

# %%
careful = mpjax.PolicyMap({"dot_general@layer_7": "float32"}, default="mixed_float16")
print(locate_nonfinite(Layers(), variables, x, policy=careful).summary)
print(locate_nonfinite(Layers(), variables, x, policy="mixed_bfloat16").summary)

# %% [markdown]
# ## Case 2: the thirteenth step of a scan
#
# A recurrent cell, a hundred steps of it in one `scan`. The compiler sees one body; you see one NaN. Which step, which input?


# %%
@jax.jit
def rollout(weights, durations):
  def step(state, duration):
    with jax.named_scope("step"):
      state = jnp.tanh(state @ weights + jnp.log(duration))
    return state, state.mean()

  return jax.lax.scan(step, jnp.zeros((1, 8)), durations)


durations = jnp.ones((100, 1, 8)).at[13, 0, 3].set(-0.5)  # one sensor reading is broken
report = locate_nonfinite(rollout, jnp.eye(8) / 2, durations)
print(report.summary)

# %% [markdown]
# `scan` runs compiled until something breaks; only the bad iteration is taken apart. It is the data: a duration of -0.5.
# Iterations count from 0. A `while` loop is searched in the same way, and of a `cond` you are told the branch.
#
# ## Case 3: the value is fine, the gradient is not
#
# The classic. `jnp.where` selects the safe branch, the loss is finite, and the gradient is NaN: the derivative of the branch
# that was *not* taken is infinite, and 0 * inf is NaN. `backward=True` runs the backward pass too.


# %%
def surprise(params, x):
  p = x @ params["w"]
  return -jnp.sum(jnp.where(p > 0, jnp.log(p), 0.0))


params, x = {"w": jnp.eye(4)}, jnp.array([[0.5, 0.0, 0.2, 0.3]])
print(locate_nonfinite(surprise, params, x).summary)
print()
report = locate_nonfinite(surprise, params, x, backward=True)
print(report.summary)

# %% [markdown]
# Forward, `log(0)` is inf and is masked, so it never arrives: the report counts it, and does not blame it. Backward, the
# division by zero in the derivative of the logarithm arrives. The cure is to make the argument safe *inside* as well:


# %%
def safe_surprise(params, x):
  p = x @ params["w"]
  inside = jnp.where(p > 0, p, 1.0)
  return -jnp.sum(jnp.where(p > 0, jnp.log(inside), 0.0))


print(locate_nonfinite(safe_surprise, params, x, backward=True).summary)

# %% [markdown]
# ## Case 4: a derivative that somebody wrote
#
# A `custom_vjp` is code that runs only in the backward pass, where no print reaches. This norm divides by itself:


# %%
@jax.custom_vjp
def norm(x):
  return jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def norm_forward(x):
  return norm(x), (x, norm(x))


def norm_backward(residuals, g):
  x, n = residuals
  return (g * x / n,)


norm.defvjp(norm_forward, norm_backward)


def penalty(params, x):
  with jax.named_scope("penalty"):
    return jnp.sum(norm(x @ params["w"]))


report = locate_nonfinite(penalty, params, jnp.zeros((2, 4)), backward=True)
print(report.summary)

# %% [markdown]
# JAX gives everything that a custom rule computes the line of the *call*; so the report names that line and, beside it, the
# rule with the line where it is defined.
#
# ## In float16: is the loss scale too large?
#
# Under loss scaling an overflow in the backward pass is part of the plan: the step is skipped and the scale halved. If
# that happens at every step, ask which operation limits the scale. Start the backward pass with the scale that you have:


# %%
def loss(params, x):
  return jnp.mean((x @ params["w"]) ** 2)


big = jnp.full((4, 4), 3.0)
for scale in (2.0**10, 2.0**15):
  found = locate_nonfinite(
    loss, params, big, policy="mixed_float16", backward=True, loss_scale=scale
  )
  print(f"scale {scale:7.0f}:", found.summary.splitlines()[0])

# %% [markdown]
# ## What to do about what you find
#
# | what the report says | what usually helps |
# |---|---|
# | inf in a matmul, float16 | bfloat16; a rule `"dot_general@layer": "float32"`; normalize the operands |
# | inf in `exp`, `pow`, `square` | subtract the maximum first; a rule for the module |
# | NaN in `sub` of a softmax | a row is masked completely with `-inf`: use a large finite number |
# | NaN or inf in `div`, `log`, `sqrt`, backward | the double `where` of case 3; an epsilon *inside* the square root |
# | only with loss scaling, backward | a lower `max_scale`; nothing, if it is rare: the step is skipped |
# | `argument` | the data: look at the index |
