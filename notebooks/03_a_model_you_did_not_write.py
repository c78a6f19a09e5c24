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
# # Apply a policy to a model that you did not write
#
# You have a model from a package or a colleague, in float32, and want to train it in 16 bits. You do not know its code,
# and you do not want to edit it. Four questions, in this order:
#
# 1. What would the policy do to it? `explain` reads the program; nothing runs, no memory is needed.
# 2. Does float32 leak somewhere, and which line is it?
# 3. Do the numbers survive? `check` runs both versions side by side.
# 4. Which part needs a rule of its own?

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import mpjax
from mpjax.inspect import check, explain
from mpjax.plot import plot_check, plot_flow

# %% [markdown]
# ## The model
#
# This stands for the code of somebody else. It works well in float32. Two things in it matter in 16 bits; try to spot
# them before you read on.


# %%
def sinusoids(length, width):
  angles = np.arange(length)[:, None] / 10_000 ** (np.arange(width) / width)
  return np.sin(angles).astype(np.float32)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.LayerNorm(name="norm_1")(x)
    x = x + nn.MultiHeadDotProductAttention(4, name="attention")(h, h)
    h = nn.LayerNorm(name="norm_2")(x)
    h = nn.Dense(4 * x.shape[-1], name="up")(h)
    return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(h))


class Energy(nn.Module):
  @nn.compact
  def __call__(self, x):
    return jnp.abs(nn.Dense(64, name="project")(x * 1000.0) * 100.0)


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(256, 64, name="embed")(tokens)
    x = x + sinusoids(tokens.shape[1], 64)
    for n in range(3):
      x = Block(name=f"block_{n}")(x)
    energy = Energy(name="energy")(x)
    return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(1)), energy.mean()


# %% [markdown]
# ## 1. What would the policy do?
#
# `explain` takes what you would call the model with. Shapes are enough: `jax.eval_shape` gives those of the parameters
# of a model of any size without making them.

# %%
model = Classifier()
tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
report = explain(model, "mixed_bfloat16", variables, tokens)
report.fold(1)

# %% [markdown]
# The first line is the verdict. All matmuls run in bfloat16, as promised. And yet the policy does not do all that it
# promises: one line widens what should be narrow.
#
# ## 2. The leak
#
# The table of sinusoids is a NumPy float32 array. It meets the narrow embeddings, and float32 wins, as it does in torch.
# From there the whole residual stream is float32, in every block: the matmuls are still fast, but what is stored
# between them is twice as large. The report says how much that is and how many more values it widened.

# %%
for leak in report.leaks:
  print(leak.line, "|", leak.line.text)
  print("  widened by", ", ".join(leak.widened_by))
  print("  costs", leak.bytes, "bytes, and widens", leak.also, "more values")

# %%
ax = plot_flow(report.fold(1))

# %% [markdown]
# What to do about it? There are three honest answers.
#
# - **Nothing.** A float32 residual stream is good numerics, and many people want it. Then you know what it costs.
# - **Put the line into a module** or a `jax.named_scope`. What leaves a module goes on in 16 bits if a value of its shape
#   came in so: the sum is made in float32 and rounded once. Most published models have such a module already.
# - **Make it a parameter**, if it is one: parameters and Python numbers adapt to what they meet.
#
# Here is the second one, as a patch of one line.


# %%
class Position(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + sinusoids(x.shape[1], x.shape[2])


class Patched(Classifier):
  @nn.compact
  def __call__(self, tokens):
    x = Position(name="position")(nn.Embed(256, 64, name="embed")(tokens))
    for n in range(3):
      x = Block(name=f"block_{n}")(x)
    energy = Energy(name="energy")(x)
    return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(1)), energy.mean()


patched = Patched()
fixed = explain(patched, "mixed_bfloat16", variables, tokens)
print(fixed.summary)


def float32_bytes(report):
  return sum(row.bytes.get("float32", 0) for row in report.rows)


print(f"{float32_bytes(report):,.0f} -> {float32_bytes(fixed):,.0f} bytes of float32")

# %% [markdown]
# One level deeper: what runs in one module, operation by operation. `table` is what mpjax knows of the primitive: `full`
# ones (sums, logarithms, statistics) run in float32 whatever comes in, `follow` ones in whatever their operands have.

# %%
fixed.by_op("block_0/attention")

# %% [markdown]
# ## 3. Do the numbers survive?
#
# `check` runs the float32 model and the one under the policy side by side, on real values, and compares what every module
# is given and hands out, and the gradient of every parameter. Give it a loss rather than a model, so that the gradients
# are those of your training.

# %%
rng = np.random.default_rng(0)
inputs, labels = jnp.asarray(rng.integers(0, 256, (8, 32))), jnp.asarray(rng.integers(0, 10, 8))
real = patched.init(jax.random.key(0), inputs)


def loss(params, inputs, labels):
  logits, energy = patched.apply({"params": params}, inputs)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return nll + 1e-9 * energy


for policy in ("mixed_bfloat16", "mixed_float16"):
  print(check(loss, policy, real["params"], inputs, labels, gradients=False).summary, "\n")

# %% [markdown]
# bfloat16 agrees within its rounding. float16 does not: a module overflows. Its numbers are fine for float32 and
# bfloat16, whose largest number is 3.4e38; that of float16 is 65,504. This is the second thing that matters in the
# model's code: the factors 1000 and 100 in `Energy`.

# %%
halves = check(loss, "mixed_float16", real["params"], inputs, labels, loss_scale=2.0**10)
ax = plot_check(halves)

# %% [markdown]
# Read the picture from the top: a dot is the error of what a module hands out, the bar that of what it was given. Errors
# grow a little from block to block; that is rounding, and harmless. The cross is not.
#
# ## 4. A rule for the part that needs one
#
# Under `loss` the paths begin with the model's name. The rule says: this module and all beneath it in float32, the
# rest as before. `explain` lists which rule won where, and `check` says whether it helped.

# %%
careful = mpjax.PolicyMap({"Patched/energy": "float32"}, default="mixed_float16")
print(explain(loss, careful, real["params"], inputs, labels).tables()[-1], "\n")
print(check(loss, careful, real["params"], inputs, labels, loss_scale=2.0**10).summary)

# %% [markdown]
# With `apply_policy` the same rule is written from the model itself, as `"energy"`. Train it with
# `mpjax.apply_policy(patched, ...)` and a loss scaler, as in the quickstart.
#
# Reports are data: `report.to_rows()` goes into `pandas.DataFrame`, `report.to_json()` into a file, and a test of your own
# can hold a model to its policy:

# %%
assert explain(patched, "mixed_bfloat16", variables, tokens).keeps_promise
report.to_rows()[0]
