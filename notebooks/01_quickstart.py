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
# # Quickstart: mixed precision for a Flax model
#
# Training in 16 bits saves memory and time, and loses accuracy in three places: where numbers grow too large or too
# small, where many are added up, and where small updates meet large parameters. mpjax answers each: sensitive
# operations stay float32, sums are made in float32, and parameters never leave float32. You choose a **policy**; the
# model stays as it is.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

import mpjax
from mpjax import plot

# %% [markdown]
# ## What a policy is
#
# Three dtypes: how parameters are *kept*, in which matmuls and convolutions *compute*, and how results are *returned*.

# %%
for name in ("float32", "mixed_bfloat16", "mixed_float16"):
  print(f"{name:15}", mpjax.Policy.parse(name))

# %% [markdown]
# ## What a policy does to a function
#
# `autocast` traces your function in float32 and decides for every operation. Look at the program that comes out: the
# matmul takes `bf16`, the scale and the softmax work in `f32`, and the parameters `a` and `b` are `f32` at the door.


# %%
def attention_scores(params, x):
  queries, keys = x @ params["q"], x @ params["k"]
  return jax.nn.softmax(queries @ keys.T / np.sqrt(8.0))


params = {"q": jnp.ones((16, 8)) * 0.1, "k": jnp.ones((16, 8)) * 0.1}
x = jnp.linspace(-1, 1, 4 * 16).reshape(4, 16)
print(jax.make_jaxpr(mpjax.autocast(attention_scores, "mixed_bfloat16"))(params, x))

# %% [markdown]
# NumPy's `np.sqrt(8.0)` would have pulled everything after it to float32 in plain 16-bit code; here the scale is
# float32 only because the softmax that reads it is: so the scores round once.

# %% [markdown]
# ## A Linen model
#
# 1,797 handwritten digits; a random fifth is held out. The model names no dtype anywhere.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images, labels = digits.images.astype(np.float32)[order, ..., None] / 16, digits.target[order]
cut = len(images) * 4 // 5
train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    for features in (16, 32):
      x = nn.Conv(features, (3, 3), name=f"conv_{features}")(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
      x = nn.avg_pool(x, (2, 2), (2, 2))
    return nn.Dense(10, name="head")(x.reshape(len(x), -1))


# %% [markdown]
# `apply_policy` returns a module of the same class with the same parameters. The loss scaler wraps the optimizer; the
# train step puts the pieces together: it scales the loss, skips a step whose gradients are not finite, and then also
# keeps the BatchNorm statistics as they were.


# %%
def train_linen(policy, steps=150):
  model = mpjax.apply_policy(CNN(), policy)
  variables = model.init(jax.random.key(0), images[:1], train=False)
  tx = mpjax.dynamic_loss_scaling(optax.adam(3e-3), growth_interval=50)  # 2000 is the default

  def loss_fn(params, model_state, batch):
    x, y = batch
    logits, updates = model.apply(
      {"params": params, **model_state}, x, train=True, mutable=["batch_stats"]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

  step = mpjax.make_train_step(loss_fn, tx)
  state = mpjax.TrainState.create(
    variables["params"], tx, model_state={"batch_stats": variables["batch_stats"]}
  )
  rng, curve = np.random.default_rng(0), []
  for _ in range(steps):
    picked = rng.integers(0, cut, 64)
    state, metrics = step(state, (train[0][picked], train[1][picked]))
    curve.append((float(metrics.loss), float(metrics.loss_scale)))
  predict = jax.jit(lambda v, x: model.apply(v, x, train=False).argmax(-1))
  guesses = predict({"params": state.params, **state.model_state}, test[0])
  return np.array(curve), float((guesses == test[1]).mean()), state


curves = {}
for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
  curves[policy], accuracy, state = train_linen(policy)
  kept = {leaf.dtype.name for leaf in jax.tree.leaves(state.params)}
  print(f"{policy:15} held-out accuracy {accuracy:.3f}   parameters {kept}")

# %% [markdown]
# The three curves lie on each other: that is what mixed precision should look like. The scale of the loss doubles while
# nothing overflows; when a step does overflow, it is skipped and the scale is halved.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
runs = [plot.Curve(policy, *curve.T, np.ones(150, bool)) for policy, curve in curves.items()]
_ = plot.plot_losses(runs, ax=left)
_ = plot.plot_scales(runs, ax=right)

# %% [markdown]
# ## An NNX model
#
# The same with NNX. The model under the policy shares its Variables with the plain one, so an optimizer or a checkpoint
# of the one is that of the other.


# %%
class MLP(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(64, 128, rngs=rngs)
    self.norm = nnx.LayerNorm(128, rngs=rngs)
    self.head = nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.gelu(self.norm(self.hidden(x.reshape(len(x), -1)))))


plain = MLP(nnx.Rngs(0))
model = mpjax.apply_policy(plain, "mixed_float16")
optimizer = nnx.Optimizer(model, mpjax.dynamic_loss_scaling(optax.adamw(2e-3)), wrt=nnx.Param)


def loss_fn(model, batch):
  x, y = batch
  return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


step = mpjax.nnx.make_train_step(loss_fn)
rng = np.random.default_rng(0)
for _ in range(150):
  picked = rng.integers(0, cut, 64)
  metrics = step(model, optimizer, (train[0][picked], train[1][picked]))
print("loss", round(float(metrics.loss), 3), "skipped", int(metrics.total_skips))
print(
  "held-out accuracy of the plain model:",
  round(float((plain(test[0]).argmax(-1) == test[1]).mean()), 3),
)

# %% [markdown]
# ## Rules
#
# Parts of a model can have another policy, by the path of the module. A rule that matches nothing is an error that
# lists the paths, so a typo cannot pass.

# %%
careful = mpjax.PolicyMap({"head": "float32"}, default="mixed_bfloat16")
variables = CNN().init(jax.random.key(0), images[:1], train=False)
program = jax.make_jaxpr(lambda v, x: mpjax.apply_policy(CNN(), careful).apply(v, x, train=False))
for equation in program(variables, images[:2]).eqns:
  if equation.primitive.name in ("dot_general", "conv_general_dilated"):
    print(equation.primitive.name, equation.source_info.name_stack, equation.outvars[0].aval.dtype)

try:
  typo = mpjax.PolicyMap({"haed": "float32"}, default="mixed_bfloat16")
  mpjax.apply_policy(CNN(), typo).apply(variables, images[:2], train=False)
except ValueError as error:
  print(error)
