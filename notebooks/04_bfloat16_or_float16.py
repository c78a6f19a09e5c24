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
# # bfloat16 or float16, which and when
#
# Both have 16 bits and spend them differently. bfloat16 keeps float32's 8 bits of exponent and has 8 bits of
# precision; float16 has 5 bits of exponent and 11 bits of precision. Everything below follows from that.
#
# | | smallest normal | largest | distance from 1 to the next number |
# |---|---|---|---|
# | float32 | 1.2e-38 | 3.4e38 | 1.2e-7 |
# | bfloat16 | 1.2e-38 | 3.4e38 | 0.0078 |
# | float16 | 6.1e-5 | 65504 | 0.00098 |

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import lax

import mpjax
from mpjax import inspect, plot

FORMATS = ("bfloat16", "float16")
for name in ("float32", *FORMATS):
  info = jnp.finfo(name)
  print(f"{name:9} normal {info.smallest_normal:.2g}  max {info.max:.3g}  epsilon {info.eps:.2g}")

# %% [markdown]
# ## Precision against range, in one picture
#
# The relative error of rounding a number, over the whole range. float16 is eight times as precise where it works, and
# does not work at all outside of 2^-25 to 2^16.

# %%
numbers = np.exp2(np.linspace(-40, 20, 4000)).astype(np.float32)
figure, ax = plt.subplots(figsize=(8, 3.5), layout="constrained")
for name, color, style in (("bfloat16", "#0072B2", "-"), ("float16", "#E69F00", "--")):
  with np.errstate(over="ignore"):
    kept = numbers.astype(jnp.dtype(name)).astype(np.float32)
  error = np.minimum(np.abs(kept / numbers - 1), 1)
  worst = error.reshape(-1, 40).max(axis=1)
  ax.plot(np.log2(numbers[::40]), worst, style, color=color, label=name)
ax.set_yscale("log")
ax.set(xlabel="magnitude, as a power of two", ylabel="largest relative error")
_ = ax.legend(frameon=False)

# %% [markdown]
# ## Sums: why matmuls accumulate in float32
#
# Add 1 a few thousand times. In bfloat16 the sum stops at 256, for 257 is not a bfloat16 number and 256 + 1 rounds back; float16
# stops at 2048. Hardware multiplies 16-bit numbers and adds up the products in float32, and mpjax takes every sum, mean
# and variance to float32.

# %%
ones = jnp.ones(5000)


def running_sum(dtype):
  def add(total, one):
    return lax.reduce_precision(total + one, *BITS[dtype]), None

  return lax.scan(add, jnp.float32(0), ones)[0]


BITS = {"bfloat16": (8, 7), "float16": (5, 10), "float32": (8, 23)}
for name in BITS:
  print(f"{name:9} counts to {float(running_sum(name)):.0f}")

# %%
for policy in ("mixed_bfloat16", "mixed_float16"):
  total = mpjax.autocast(lambda w, x: jnp.sum(x @ w), policy)(
    jnp.ones((1, 1)), jnp.ones((70000, 1))
  )
  print(f"{policy:15} sums 70,000 ones out of a matmul to {float(total):.0f}")

# %% [markdown]
# float16 also *overflows* in a sum: 70,000 is above 65,504. Under the policy it does not.
#
# ## Softmax and cross-entropy
#
# The logits come out of a matmul in 16 bits. What follows, the exponentials and their sum, is where precision is lost
# for good. A probability near 1 has a log-probability near 0, and 16 bits have no number between 1 and 0.996
# (bfloat16).

# %%
logits = jnp.array([[8.0, 1.0, 0.5, -2.0]])
exact = jax.nn.log_softmax(logits)[0, 0]
for name in FORMATS:
  low = logits.astype(name)
  probabilities = jnp.exp(low) / jnp.sum(jnp.exp(low), axis=-1, keepdims=True)
  print(
    f"{name:9} by hand, all in 16 bits: {float(jnp.log(probabilities)[0, 0]):.6f}   exact: {exact:.6f}"
  )

for policy in ("mixed_bfloat16", "mixed_float16"):
  out = mpjax.autocast(lambda w, x: jax.nn.log_softmax(x @ w), policy)(jnp.eye(4), logits)
  print(f"{policy:15} {float(out[0, 0]):.6f}")

# %% [markdown]
# ## Norms
#
# A variance is a mean of squares. In float16 the square of 300 overflows: a LayerNorm after a large activation gives
# zeros or NaN. Statistics belong in float32, in either format.

# %%
features = jnp.array([[300.0, -300.0, 200.0, 100.0]])


def layer_norm(x):
  return (x - jnp.mean(x)) * lax.rsqrt(jnp.mean(jnp.square(x - jnp.mean(x))) + 1e-6)


for name in FORMATS:
  low = features.astype(name)
  squares = jnp.square(low - jnp.mean(low))
  print(f"{name:9} squares in 16 bits: {squares[0]}")
for policy in ("mixed_bfloat16", "mixed_float16"):
  out = mpjax.autocast(lambda w, x: layer_norm(x @ w), policy)(jnp.eye(4), features)
  print(f"{policy:15} {np.round(np.asarray(out[0]), 3)}")
print("float32        ", np.round(np.asarray(layer_norm(features)[0]), 3))

# %% [markdown]
# ## The optimizer: parameters and moments stay in float32
#
# An update of Adam is about the learning rate, say 10^-3, whatever the gradient. Beside a parameter of 1 that is less than half of bfloat16's
# distance to the next number: the sum rounds back and the parameter never moves. The same happens to running
# averages: 0.999 is 1 in bfloat16.

# %%
average = jnp.float32(0)
in_bfloat16 = jnp.bfloat16(0)
for _ in range(500):
  average = 0.99 * average + 0.01
  in_bfloat16 = jnp.bfloat16(0.99) * in_bfloat16 + jnp.bfloat16(0.01)
print(
  f"average of 500 ones, decay 0.99: float32 {float(average):.3f}, bfloat16 {float(in_bfloat16):.3f}"
)

# %% [markdown]
# `collect_statistics` measures it on a model: which parameters would stall without float32 masters?

# %%
keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (256, 32))
labels = jnp.argmax(x @ jax.random.normal(keys[1], (32, 8)), axis=-1)
params = {
  "hidden": {"kernel": 0.2 * jax.random.normal(keys[2], (32, 64)), "scale": jnp.ones(64)},
  "head": 0.2 * jax.random.normal(keys[3], (64, 8)),
}


def loss_fn(params, x, labels):
  with jax.named_scope("hidden"):
    h = jnp.tanh(x @ params["hidden"]["kernel"]) * params["hidden"]["scale"]
  with jax.named_scope("head"):
    logits = h @ params["head"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


tx = inspect.collect_statistics(optax.adam(1e-3))


@jax.jit
def train(params):
  def step(carry, _):
    params, state = carry
    grads = jax.grad(mpjax.autocast(loss_fn, "mixed_bfloat16"))(params, x, labels)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  return lax.scan(step, (params, tx.init(params)), length=50)[0]


trained, state = train(params)
report = inspect.update_report(inspect.statistics(state))
report

# %%
_ = plot.plot_updates(report)

# %% [markdown]
# Scales of norms start at 1 and lose nearly everything in bfloat16. This is why a policy such as `mixed_bfloat16` keeps
# `params=float32`: the mixed in mixed precision.
#
# ## Range: does float16 hold this model's gradients?

# %%
_, values = jax.jit(inspect.record(jax.grad(loss_fn), "mixed_float16"))(trained, x, labels)
for name in FORMATS:
  print(name, "-", inspect.range_report(values.gradients, name).summary)

# %% [markdown]
# ## Precision: which gradients are nearer to float32's?

# %%
exact = jax.grad(loss_fn)(trained, x, labels)
scale = 2.0**10


def distance(policy):
  loss = mpjax.autocast(loss_fn, policy)
  grads = jax.jit(jax.grad(lambda *a: loss(*a) * scale))(trained, x, labels)
  difference = jax.tree.map(lambda a, b: a / scale - b, grads, exact)
  return float(optax.global_norm(difference) / optax.global_norm(exact))


for policy in ("mixed_bfloat16", "mixed_float16"):
  print(f"{policy:15} relative gradient error {distance(policy):.5f}")

# %% [markdown]
# ## Which one, then
#
# | | bfloat16 | float16 |
# |---|---|---|
# | hardware | TPUs; NVIDIA from A100 on; recent CPUs | NVIDIA from V100 on |
# | loss scaling | no | yes, dynamic |
# | precision | 8 bits | 11 bits: gradients about eight times as exact, within its range |
# | overflow | as in float32 | above 65,504: attention scores, large activations |
# | use it | by default, where the hardware has it | on V100 and T4; where a module is sensitive to precision and its values are small |
#
# They also mix: `mpjax.PolicyMap({"head": "mixed_float16"}, default="mixed_bfloat16")`. And if you do not want to
# guess, `inspect.tune(loss_fn, args, candidates=["mixed_float16", "mixed_bfloat16"])` measures each module alone.
