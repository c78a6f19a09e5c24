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
# # Below 16 bits: stalls, rounding, and float8's grid
#
# Two ways lead below mixed precision, and they save different things. **Fewer bytes a parameter**: parameters and the
# optimizer's moments in bfloat16, which works if they are rounded stochastically. **Faster large matmuls**: operands in
# float8, each under a scale of its own. This notebook shows what goes wrong without, and what is lost with them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mpjax
from mpjax import inspect

# %% [markdown]
# ## A parameter that does not move
#
# Near 1, bfloat16's numbers lie 2^-8 to 2^-7 apart. An update of -0.001 is less than half of that: rounded to the
# nearest, the parameter stays where it is, for ever. Rounded up or down at random, such that it is right on average, it
# arrives.

# %%
STEPS, COUNT = 101, 512


def descend(tx, dtype):
  """The mean of many equal parameters before each of a hundred updates of -0.001."""

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jnp.ones_like(params), state, params)
    return (optax.apply_updates(params, updates), state), params.astype(jnp.float32).mean()

  params = jnp.ones(COUNT, dtype)
  return jax.jit(lambda c: jax.lax.scan(step, c, None, STEPS))((params, tx.init(params)))[1]


sgd = optax.sgd(1e-3)
paths = {
  "float32": descend(sgd, jnp.float32),
  "bfloat16, to the nearest": descend(sgd, jnp.bfloat16),
  "bfloat16, stochastic": descend(mpjax.stochastic_rounding(sgd), jnp.bfloat16),
}
figure, ax = plt.subplots(figsize=(7, 3.2))
colors = "#0072B2", "#E69F00", "#009E73"
for (name, path), style, color in zip(paths.items(), ("-", "--", ":"), colors, strict=True):
  ax.plot(path, style, color=color, linewidth=2, label=f"{name}: {float(path[-1]):.2f}")
ax.set(xlabel="update", ylabel="parameter (mean of 512)", title="A hundred updates of -0.001")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A second moment that does not fall
#
# Adam's second moment moves by a thousandth of itself a step, `b2 = 0.999`: too little for bfloat16. It should fall from
# 0.5 to 0.07 in 2,000 steps without gradients. To the nearest it stays at 0.5, and the learning rate stays too small.

# %%
adam = optax.scale_by_adam(b2=0.999)


def fall(tx, narrow=lambda state: state):
  """The mean second moment after 2,000 steps without gradients."""
  params = jnp.zeros(COUNT)
  state = tx.init(params)
  state = jax.tree.map(lambda x: jnp.full_like(x, 0.5) if x.ndim == 1 else x, state)

  def step(state, _):
    return narrow(tx.update(jnp.zeros(COUNT), state, params)[1]), None

  state = jax.jit(lambda s: jax.lax.scan(step, s, None, 2000)[0])(narrow(state))
  moments = [x for x in jax.tree.leaves(state) if x.ndim == 1]
  return float(moments[-1].astype(jnp.float32).mean())


def to_nearest(state):
  """Moments as bfloat16 would hold them, in float32."""
  return jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 7) if x.ndim == 1 else x, state)


print(f"float32             {fall(adam):.3f}")
print(f"bfloat16, nearest   {fall(adam, to_nearest):.3f}")
print(f"bfloat16_states     {fall(mpjax.bfloat16_states(adam)):.3f}")

# %% [markdown]
# ## float8's grid
#
# e4m3 has three bits of mantissa and reaches from 2^-9 to 448, e5m2 has two and reaches from 2^-16 to 57,344. So a number
# is off by up to 6% or 12%, and what is much smaller than the largest number of its tensor becomes zero. Hence the scale:
# a power of two that brings the largest number just below the top.

# %%
magnitudes = jnp.asarray(np.geomspace(1e-6, 1e6, 200 * 64).reshape(200, 64), jnp.float32)
formats = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bfloat16": jnp.bfloat16}
figure, ax = plt.subplots(figsize=(7, 3.2))
for (name, dtype), color in zip(formats.items(), colors, strict=True):
  errors = jnp.abs(magnitudes.astype(dtype).astype(jnp.float32) - magnitudes) / magnitudes
  fits = magnitudes[:, -1] <= float(jnp.finfo(dtype).max)
  ax.loglog(magnitudes[fits, 0], errors[fits].max(axis=1), color=color, label=name)
ax.set(xlabel="magnitude", ylabel="largest relative error", title="What rounding costs")
ax.set_ylim(1e-3, 3)
ax.legend(frameon=False, loc="upper right")
plt.show()

# %% [markdown]
# ## A model under `mixed_float8`
#
# Values stay bfloat16. The matmuls of a parameter multiply in float8, but for the head before the logarithm; attention's
# scores have no parameter and stay too. `explain` lists each.

# %%
keys = jax.random.split(jax.random.key(0), 5)
tokens = jax.random.randint(keys[0], (8, 32), 0, 64)
params = {
  "embed": jax.random.normal(keys[1], (64, 64)),
  "attend": 0.1 * jax.random.normal(keys[2], (3, 64, 64)),
  "up": 0.1 * jax.random.normal(keys[3], (64, 256)),
  "down": 0.1 * jax.random.normal(keys[4], (256, 64)),
}


def loss_fn(params, tokens):
  h = params["embed"][tokens]
  with jax.named_scope("attention"):
    query, key, value = (h @ w for w in params["attend"])
    scores = jnp.einsum("btd,bsd->bts", query, key) / 8
    h = h + jax.nn.softmax(jnp.where(jnp.tri(32, dtype=bool), scores, -1e9)) @ value
  with jax.named_scope("perceptron"):
    h = h + jax.nn.gelu(h @ params["up"]) @ params["down"]
  with jax.named_scope("head"):
    logits = h @ params["embed"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


inspect.explain(loss_fn, "mixed_float8", params, tokens)

# %% [markdown]
# ## What it loses
#
# The gradients of the parameters beside those in float32. A step in float8 is far less exact than one in bfloat16.
# Whether a training ends worse for it is another question: `benchmarks/results/float8.md` has the answer for a small
# model of text.

# %%
exact = jax.jit(jax.grad(loss_fn))(params, tokens)
for policy in ("mixed_bfloat16", "mixed_float8"):
  grads = jax.jit(jax.grad(mpjax.autocast(loss_fn, policy)))(params, tokens)
  errors = jax.tree.map(
    lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), grads, exact
  )
  print(f"{policy:15}", {name: f"{error:.1%}" for name, error in errors.items()})

# %% [markdown]
# How many numbers of each weight its scale rounds to zero:

# %%
inspect.range_report(inspect.histogram(params), "float8_e4m3fn", scale="amax")
