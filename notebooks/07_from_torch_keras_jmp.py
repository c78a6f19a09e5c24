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
# # Coming from PyTorch AMP, Keras or jmp
#
# What you know, and what it is called here. The code of the other library stands as text; that of mpjax runs. At the end of
# each section: what behaves differently, so that nothing surprises you.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import mpjax
from mpjax.inspect import explain

rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
y = jnp.asarray(rng.integers(0, 10, 32))


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(16, 64, rngs=rngs)
    self.norm = nnx.LayerNorm(64, rngs=rngs)
    self.head = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.hidden(x))))


def cross_entropy(model, batch):
  x, y = batch
  return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


# %% [markdown]
# ## From PyTorch AMP
#
# ```python
# model = MLP().cuda()
# optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
# scaler = torch.amp.GradScaler()
#
# for x, y in batches:
#     optimizer.zero_grad()
#     with torch.autocast("cuda", dtype=torch.float16):
#         loss = F.cross_entropy(model(x), y)
#     scaler.scale(loss).backward()
#     scaler.unscale_(optimizer)
#     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
#     scaler.step(optimizer)
#     scaler.update()
# ```
#
# The same here. The context manager becomes an argument. The scaler becomes a part of the optimizer, so clipping sees true
# gradients without a call to `unscale_`, and its state is saved wherever the optimizer's is.

# %%
model = MLP(nnx.Rngs(0))
tx = mpjax.dynamic_loss_scaling(
  optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), init_scale=2**15
)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
step = mpjax.nnx.make_train_step(cross_entropy, policy="mixed_float16")
for _ in range(20):
  metrics = step(model, optimizer, (x, y))
print(
  f"loss {float(metrics.loss):.3f}, skipped {int(metrics.total_skips)}, scale {float(metrics.loss_scale):g}"
)

# %% [markdown]
# | PyTorch | mpjax |
# |---|---|
# | `with torch.autocast(..., dtype=torch.bfloat16):` | `mpjax.autocast(fn, "mixed_bfloat16")`, `apply_policy(model, ...)`, or `policy=` of a train step |
# | `with torch.autocast(..., enabled=False):` | a rule: `PolicyMap({"head": "float32"}, default=...)` |
# | `@custom_fwd(cast_inputs=torch.float16)` | `mpjax.cast_inputs(kernel)` |
# | `x.float()` to protect a value | `mpjax.keep_float32(x)` (the program is traced in float32: `astype(float32)` says nothing new) |
# | `GradScaler(init_scale, growth_factor, ...)` | `dynamic_loss_scaling(tx, init_scale=..., growth_factor=..., ...)` |
# | `scaler.get_scale()` | `mpjax.loss_scale(opt_state)` |
# | `found_inf`, "was the step skipped?" | `mpjax.step_is_finite(opt_state)` |
# | `torch.autograd.set_detect_anomaly(True)` | `mpjax.inspect.locate_nonfinite(loss, ...)` |
#
# **What differs.** torch casts when an operation is dispatched, by a list of operations; mpjax casts by a table on the traced
# program, so `jit`, `scan` and custom derivatives are looked into, and you can read the result beforehand. torch's
# `cross_entropy` is on the list; here the logarithm and the sums inside *any* loss are. A weight that is used many times is
# cast at every use, so its gradient adds up in float32. And the scale has a floor and a ceiling.

# %%
explain(cross_entropy, "mixed_float16", model, (x, y))

# %% [markdown]
# ## From Keras
#
# ```python
# keras.mixed_precision.set_global_policy("mixed_float16")
# model = keras.Sequential([
#     keras.layers.Dense(64, activation="relu"),
#     keras.layers.Dense(10, dtype="float32"),   # logits in float32
# ])
# optimizer = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.Adam(1e-3))
# ```
#
# There is no global policy here; a policy is given to a model. The names of the policies are the same. A layer's own
# `dtype` becomes a rule by its path, and the model's code stays free of dtypes:


# %%
class Dense2(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10, name="logits")(nn.relu(nn.Dense(64, name="hidden")(x)))


policies = mpjax.PolicyMap({"logits": "float32"}, default="mixed_float16")
linen_model = mpjax.apply_policy(Dense2(), policies)
variables = linen_model.init(jax.random.key(0), x)
report = explain(linen_model, None, variables, x)
print(report.summary, "\n")
print(report.tables()[1])

# %% [markdown]
# **What differs.** In Keras a layer casts what it is given to its compute dtype, and everything within, except where the
# author of the layer thought of it, runs so. Here sums, logarithms and statistics run in float32 wherever they stand, and
# labels and positions are not cast. `LossScaleOptimizer` wraps an optimizer; `dynamic_loss_scaling` is an optax
# transformation around the whole chain, so it stands outermost: around `optax.multi_transform`, around `optax.MultiSteps`.
#
# ## From jmp
#
# ```python
# policy = jmp.get_policy("params=float32,compute=float16,output=float32")
# loss_scale = jmp.DynamicLossScale(jmp.half_dtype()(2 ** 15))
#
# def loss_fn(params, loss_scale, x, y):
#     params, x = policy.cast_to_compute((params, x))
#     loss = cross_entropy(apply(params, x), y)
#     return loss_scale.scale(loss)
#
# grads = loss_scale.unscale(jax.grad(loss_fn)(params, loss_scale, x, y))
# grads_finite = jmp.all_finite(grads)
# loss_scale = loss_scale.adjust(grads_finite)
# params, opt_state = jmp.select_tree(grads_finite, new, old)
# ```
#
# The spec strings are the same, and so are `cast_to_compute`, `all_finite` and `select`, in case you want to go on
# by hand:

# %%
policy = mpjax.Policy.parse("params=float32,compute=float16,output=float32")
params = {
  "w1": jnp.asarray(rng.normal(size=(16, 64)) * 0.2, jnp.float32),
  "w2": jnp.asarray(rng.normal(size=(64, 10)) * 0.2, jnp.float32),
}
table = np.linspace(0.5, 1.5, 64, dtype=np.float32)[None]


def forward(params, x):
  return (jnp.tanh(x @ params["w1"]) * table) @ params["w2"]


def loss_fn(params, x, y):
  logits = forward(params, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


tx = mpjax.dynamic_loss_scaling(optax.adam(1e-3))


@jax.jit
def train_step(params, opt_state, x, y):
  scale = mpjax.loss_scale(opt_state)
  run = mpjax.autocast(loss_fn, policy)
  loss, grads = mpjax.value_and_grad(run)(params, x, y, loss_scale=scale)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


opt_state = tx.init(params)
for _ in range(20):
  params, opt_state, loss = train_step(params, opt_state, x, y)
print(f"loss {float(loss):.3f}, last step applied: {bool(mpjax.step_is_finite(opt_state))}")

# %% [markdown]
# **What differs.** jmp casts the trees at the door; what happens inside is up to JAX's type promotion. After one stray
# float32 array (here `table`) everything behind it, the second matmul included, runs in float32 without a word. Count it:


# %%
def matmul_dtypes(fn, *args):
  eqns = jax.make_jaxpr(fn)(*args).eqns
  return [str(e.invars[0].aval.dtype) for e in eqns if e.primitive.name == "dot_general"]


def by_hand(params, x):
  return forward(*policy.cast_to_compute((params, x)))


print("cast at the door:", matmul_dtypes(by_hand, params, x))
print("autocast:        ", matmul_dtypes(mpjax.autocast(forward, policy), params, x))

# %% [markdown]
# And `explain` names the line, so that you can decide whether it is meant:

# %%
print(explain(forward, policy, params, x).summary)
