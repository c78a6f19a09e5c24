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
# # Loss scaling made visible
#
# float16 has the precision for training, but not the range: everything up to 2^-25 becomes zero, and gradients are
# small. Multiplying the loss by a **scale** multiplies every gradient by it (the chain rule is linear), so the whole
# histogram of the gradients moves to the right, into float16's range. This notebook lets you see that on a model, choose
# a scale from the picture, and watch a dynamic scale live through faults.
#
# You need this for float16 only: bfloat16 has float32's range.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mpjax
from mpjax import inspect, plot

# %% [markdown]
# ## A model that float16 cannot train
#
# A small regression, whose loss is scaled down by 10^-8. That is not far-fetched: means over many pixels or tokens,
# small loss weights and deep networks all make gradients that small.

# %%
keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (128, 16))
y = jnp.tanh(x @ jax.random.normal(keys[1], (16, 1)))
start = {
  "hidden": 0.3 * jax.random.normal(keys[2], (16, 32)),
  "out": 0.3 * jax.random.normal(keys[3], (32, 1)),
}


def loss_fn(params, x, y):
  with jax.named_scope("hidden"):
    h = jnp.tanh(x @ params["hidden"])
  with jax.named_scope("out"):
    return 1e-8 * jnp.mean((h @ params["out"] - y) ** 2)


def train(policy, tx, steps=80, fault=lambda step: 1.0):
  """Trains in one compiled scan; returns the losses, the scales, and which steps were applied."""
  value_and_grad = mpjax.value_and_grad(mpjax.autocast(loss_fn, policy))

  def step(carry, n):
    params, state = carry
    scale = mpjax.loss_scale(state)
    loss, grads = value_and_grad(params, x, y, loss_scale=scale)
    grads = jax.tree.map(lambda g: g * fault(n), grads)
    updates, state = tx.update(grads, state, params)
    out = loss * 1e8, scale, mpjax.step_is_finite(state)
    return (optax.apply_updates(params, updates), state), out

  carry, (losses, scales, applied) = jax.jit(
    lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))
  )()
  return carry, plot.Curve(policy, *map(np.asarray, (losses, scales, applied)))


sgd = optax.sgd(2e7)
_, reference = train("float32", mpjax.static_loss_scaling(sgd, 1))
_, unscaled = train("mixed_float16", mpjax.static_loss_scaling(sgd, 1))
print(
  "last loss in float32:",
  reference.losses[-1],
  "  in float16 without scaling:",
  unscaled.losses[-1],
)

# %% [markdown]
# Nothing was learned, and nothing complained: a gradient of zero is perfectly finite.
#
# ## Look at the gradients
#
# `inspect.record` runs a function **in float32**, so that nothing is lost yet, and counts the values that a policy
# would hold in 16 bits. Given the gradient of a loss it counts the backward pass apart. `range_report` then says what a
# format makes of them.

# %%
_, values = jax.jit(inspect.record(jax.grad(loss_fn), "mixed_float16"))(start, x, y)
report = inspect.range_report(values.gradients, "float16")
report

# %% [markdown]
# This is the figure in section 3.2 of *Mixed Precision Training* (Micikevicius et al., 2018), for this model. Red is
# what becomes zero; orange is what float16 holds as subnormal numbers, with fewer bits.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
_ = plot.plot_range(report, ax=left)
_ = plot.plot_range(
  inspect.range_report(values.gradients, "float16", scale=report.recommended_scale), ax=right
)

# %% [markdown]
# ## Choose a scale
#
# Too small a scale leaves gradients at zero; too large a one makes the largest overflow. Between them lies a band of
# good scales. The recommendation stays a factor of 16 below the top, for gradients that will be larger than today's, and
# goes to 2^24 at most, up to where `dynamic_loss_scaling` goes by default.
#
# Why powers of two only? Multiplying by one changes the exponent and no bit of the mantissa, so scaling and unscaling
# are exact.

# %%
_ = plot.plot_scale_choice(report)

# %%
_, scaled = train("mixed_float16", mpjax.static_loss_scaling(sgd, report.recommended_scale))
print("float32:", reference.losses[-1], "  float16, scaled:", scaled.losses[-1])
assert abs(scaled.losses[-1] - reference.losses[-1]) < 0.02 * reference.losses[-1]
runs = [
  reference._replace(label="float32"),
  unscaled._replace(label="float16"),
  scaled._replace(label="float16, scaled"),
]
_ = plot.plot_losses(runs)

# %% [markdown]
# ## A scale that finds itself
#
# Gradients change while a model learns, so a fixed scale is a guess. `dynamic_loss_scaling` doubles the scale after some
# good steps; when a gradient comes out as inf or NaN, it skips that step as a whole and halves the scale. The default
# waits 2,000 steps before it doubles; here it waits 8, to show it in 120 steps.
#
# We inject a fault: in steps 50 to 53 all gradients are inf, as a bad batch or a broken worker would make them.

# %%
dynamic = mpjax.dynamic_loss_scaling(sgd, growth_interval=8, init_scale=2**15)
_, run = train(
  "mixed_float16",
  dynamic,
  steps=120,
  fault=lambda n: jnp.where((n >= 50) & (n < 54), jnp.inf, 1.0),
)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
_ = plot.plot_losses(
  [reference._replace(label="float32"), run._replace(label="float16, dynamic")], ax=left
)
_ = plot.plot_scales([run._replace(label="dynamic scale")], ax=right)
print("skipped steps:", int(np.sum(~run.applied)), "  last loss:", run.losses[-1])

# %% [markdown]
# Each fault costs one step and one halving; no parameter ever saw the inf. The loss goes on from where it was.
#
# ## Watch it during training
#
# To keep an eye on gradients over a whole training run, wrap the optimizer in `collect_statistics`. It counts
# inside the compiled step; counts are exact up to 2^64. Inside the loss scaler it sees unscaled gradients, and skipped
# steps do not count.

# %%
tx = mpjax.dynamic_loss_scaling(inspect.collect_statistics(optax.adam(1e-3), every=5))
(_, state), _ = train("mixed_float16", tx)
collected = inspect.statistics(state)
inspect.update_report(collected)

# %% [markdown]
# The updates beside the parameters. What lies left of a band is less than half the distance to the next number: a
# parameter kept in that format would not move at all. This is why parameters stay in float32.

# %%
_ = plot.plot_updates(inspect.update_report(collected))

# %% [markdown]
# ## On your own model
#
# 1. `_, values = jax.jit(inspect.record(jax.grad(loss_fn), "mixed_float16"))(params, batch)`
# 2. `inspect.range_report(values.gradients, "float16")` and `plot.plot_scale_choice` of it.
# 3. If there are good scales, `mpjax.dynamic_loss_scaling(tx, init_scale=...)` starts from the recommended one. If the
#    report says that no scale fits, use bfloat16, or let `inspect.tune` find the module that needs more.
