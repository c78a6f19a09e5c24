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
# # Memory and cost, for a GPU or TPU that you do not have
#
# Will the step fit? What would bfloat16 save? The compiler knows before anything runs, and the compilers for NVIDIA GPUs and TPUs do not need
# the device: `inspect.cost` asks them from any machine. And `inspect.tune` finds out which modules can be in 16 bits at
# all.

# %%
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import mpjax
from mpjax import inspect, plot

# %% [markdown]
# ## A train step that takes a policy
#
# If a step has a parameter `policy`, `cost` calls it with each policy in turn. Shapes are enough: no array is made, so
# the model may be larger than this machine's memory.


# %%
class MLP(nn.Module):
  width: int
  depth: int

  @nn.compact
  def __call__(self, x):
    for n in range(self.depth):
      h = nn.gelu(nn.Dense(4 * self.width, name=f"up_{n}")(nn.LayerNorm(name=f"norm_{n}")(x)))
      x = x + nn.Dense(self.width, name=f"down_{n}")(h)
    return nn.Dense(10, name="head")(x)


tx = optax.adamw(1e-3)


def problem(width, depth, batch):
  """The model's loss, and the shapes of the train state and of a batch."""
  model = MLP(width, depth)

  def loss_fn(params, batch):
    x, y = batch
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
  y = jax.ShapeDtypeStruct((batch,), jnp.int32)
  state = jax.eval_shape(
    lambda key, x: mpjax.TrainState.create(model.init(key, x)["params"], tx), jax.random.key(0), x
  )
  return loss_fn, state, (x, y)


loss_fn, state, batch = problem(width=512, depth=3, batch=4096)


def step(state, batch, policy):
  return mpjax.make_train_step(loss_fn, tx, policy=policy)(state, batch)


# %% [markdown]
# ## What it needs on an H100
#
# The step is lowered here and compiled by the device's own compiler in another process. The compilers are large, so they are an extra:
#
# ```bash
# pip install ".[gpu]"   # NVIDIA: 5 GB, from a checkout of the repository
# pip install ".[tpu]"   # TPU: 0.2 GB
# ```
#
# or install them into an environment of their own and pass its interpreter: `python="/envs/gpu/bin/python"`. Where a
# compiler is missing, as where this notebook was run, the error says so:

# %%
try:
  print(inspect.cost(step, state, batch, target="gpu:h100", donate_argnums=0))
except ModuleNotFoundError as error:
  print(error)

# %% [markdown]
# Where it is installed, this comes out (JAX 0.12.0):
#
# > On gpu:h100, 79.1 GiB a device: float32 needs 332.3 MiB, which fits; mixed_bfloat16 needs 276.3 MiB (0.83 of
# > float32), which fits; mixed_float16 needs 250.3 MiB (0.75 of float32), which fits.
#
# | policy | args MiB | temp MiB | output MiB | peak MiB | GFLOP | moved MiB | ms | to float32 |
# |---|---|---|---|---|---|---|---|---|
# | float32 | 80.20 | 252.13 | 72.18 | 332.33 | 155.59~ | 1995.88 | 0.67 | 1.00 |
# | mixed_bfloat16 | 80.20 | 196.13 | 72.18 | 276.33 | 155.69~ | 1375.73 | 0.45 | 0.67 |
# | mixed_float16 | 80.20 | 170.14 | 72.18 | 250.33 | 155.99~ | 1471.71 | 0.48 | 0.71 |
#
# Arguments and results are parameters and Adam's moments: 12 bytes a parameter, float32 under each of these policies. What 16 bits
# save is in the temporaries, and so it is more the larger the batch. The compiler for GPUs states no FLOPs: `~` marks those of the
# program before it is compiled. Nor does it time: *ms* is an estimate, kernel by kernel, the longer of bytes over bandwidth and
# operations over the peak of their dtype. The ratio is what to look at. Peaks for three GPUs, from the top of the repository
# (`python -m mpjax cost benchmarks.own.cost_cases:mlp --donate 0 --target gpu:h100` prints a column again):
#
# | peak MiB | `gpu:h100` | `gpu:a100` | `gpu:v100` |
# |---|---|---|---|
# | float32 | 332 | 421 | 356 |
# | mixed_bfloat16 | 276 | 346 | 356 |
# | mixed_float16 | 250 | 250 | 250 |
#
# The last column is no mistake. A V100 has no bfloat16: its compiler takes it back to float32, and nothing is saved. Use
# `mixed_float16` there; see notebook 04.
#
# A step that is too large for a TPU is a row of the report as well, with the compiler's own words: *Ran out of memory on
# HBM, the total memory required for HLO temporaries (40.06G) exceeds available HBM (15.75G)*.
#
# ## The same, on this CPU

# %%
report = inspect.cost(step, state, batch, donate_argnums=0)
report

# %%
_ = plot.plot_cost(report)

# %% [markdown]
# **A CPU is no model of a GPU.** It computes bfloat16 in float32, so it converts back and forth: under `mixed_bfloat16`
# it may need *more* memory, and moves more bytes. What you read off a CPU is the memory of arguments and results, and the FLOPs.
#
# ## Which modules may be in 16 bits?
#
# Cost is one half; the other is whether the loss survives. `tune` measures loss and gradients against float32, each
# module alone where it must, and returns the cheapest policy map within a tolerance. Here is a model with one module that takes
# a small difference of large numbers, which 16 bits cannot represent.


# %%
class Difference(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], x.shape[-1]))
    return x @ (w + 100) - x @ jnp.full_like(w, 100)


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(32, name="first")(x))
    x = Difference(name="difference")(x)
    return nn.Dense(4, name="last")(nn.tanh(x))


x = jax.random.normal(jax.random.key(0), (64, 16))
y = jnp.arange(64) % 4
params = Model().init(jax.random.key(1), x)["params"]


def model_loss(params, x, y):
  logits = Model().apply({"params": params}, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


tuned = inspect.tune(model_loss, (params, x, y), tolerance=0.05)
tuned

# %%
_ = plot.plot_frontier(tuned)

# %% [markdown]
# The text is made to be pasted, and `tuned.policy_map` is the same as an object:

# %%
loss = jax.jit(mpjax.autocast(model_loss, tuned.policy_map))(params, x, y)
print(float(loss), float(model_loss(params, x, y)))

# %% [markdown]
# ## On your own model
#
# - `inspect.cost(step, *shapes, policies=[...], target="gpu:a100")` before you rent the machine;
# - `inspect.tune(loss_fn, (params, batch))` with a real batch and trained parameters, if you have them: what is sensitive
#   changes during training;
# - both reports go on as data: `report.to_rows()` for pandas, `report.to_json()` for a log.
