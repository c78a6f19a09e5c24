"""A user's script that uses every public name, for type checkers: it runs, and both accept it.

`assert_type` says what a name is to mypy (strict) and to pyright, both in ``.ci/run``;
`tests/house/test_public_names.py` holds the script complete.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from matplotlib.figure import Figure

import mpjax

Params = dict[str, jax.Array]


def loss_fn(params: Params, x: jax.Array, y: jax.Array, smoothing: float = 0.0) -> jax.Array:
  with jax.named_scope("body"):
    hidden = jax.nn.relu(x @ params["w1"])
  with jax.named_scope("head"):
    logits = hidden @ params["w2"]
  return jnp.mean((logits - y) ** 2) + smoothing


params: Params = {"w1": jnp.full((8, 16), 0.1), "w2": jnp.full((16, 4), 0.1)}
x, y = jnp.ones((2, 8)), jnp.ones((2, 4))

# Policies: presets, specs, objects and maps.
policy = mpjax.Policy.parse("mixed_bfloat16")
assert_type(policy, mpjax.Policy)
assert_type(policy.cast_to_compute(params), Params)
assert_type(mpjax.cast_floating(params, jnp.bfloat16), Params)
rules = mpjax.PolicyMap({"head": "float32", "body": policy}, default="mixed_float16", ops={})
exp: str = mpjax.DEFAULT_OPS["exp"]
version: str = mpjax.__version__

# A function keeps its signature, defaults and keywords included.
cast_loss = mpjax.autocast(loss_fn, "mixed_bfloat16", argnums=0)
value: jax.Array = cast_loss(params, x, y, smoothing=0.1)
for spec in (policy, rules, "p=f32, c=bf16, o=f32"):
  assert_type(mpjax.autocast(loss_fn, spec)(params, x, y), jax.Array)
grads: Params = jax.grad(cast_loss)(params, x, y)
assert_type(mpjax.keep_float32(params), Params)


@mpjax.cast_inputs
def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
  return a @ b


assert_type(kernel(x, params["w1"]), jax.Array)

# Loss scaling in a loop of one's own.
tx = mpjax.dynamic_loss_scaling(
  optax.chain(optax.clip_by_global_norm(1.0), mpjax.inspect.collect_statistics(optax.sgd(1e-3)))
)
opt_state = tx.init(params)
loss, scaled = mpjax.value_and_grad(cast_loss)(params, x, y, loss_scale=mpjax.loss_scale(opt_state))
updates, opt_state = tx.update(scaled, opt_state, params)
moved = optax.apply_updates(params, updates)
finite: jax.Array = mpjax.step_is_finite(opt_state) & mpjax.all_finite(moved)
assert_type(mpjax.select(finite, params, params), Params)
fixed: optax.GradientTransformation = mpjax.static_loss_scaling(optax.sgd(1e-3), 2.0**10)
for lean in (
  mpjax.master_weights(optax.sgd(1e-3)),
  mpjax.stochastic_rounding(optax.sgd(1e-3), seed=1),
  mpjax.bfloat16_states(optax.sgd(1e-3, momentum=0.9)),
):
  assert_type(lean, optax.GradientTransformationExtraArgs)


def averaged(grads: Params) -> Any:
  return mpjax.reduce_gradients(grads, "batch")


over_devices = jax.vmap(averaged, axis_name="batch")(jax.tree.map(lambda g: g[None], grads))

# Linen and NNX.
dense = mpjax.apply_policy(nn.Dense(4), "mixed_bfloat16")
assert_type(dense, nn.Dense)
assert_type(mpjax.linen.apply_policy(nn.Dense(4), rules), nn.Dense)
linear = mpjax.apply_policy(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "mixed_float16")
assert_type(linear, nnx.Linear)
assert_type(mpjax.nnx.apply_policy(linear, "float32", methods=["__call__"]), nnx.Linear)
own = mpjax.policy_of(linear)


def model_loss(model: nnx.Linear, x: jax.Array) -> jax.Array:
  return jnp.mean(model(x) ** 2)


assert_type(mpjax.nnx.autocast(model_loss, "mixed_bfloat16")(linear, x), jax.Array)
optimizer = nnx.Optimizer(linear, mpjax.static_loss_scaling(optax.sgd(1e-3)), wrt=nnx.Param)
scale = mpjax.loss_scale(optimizer.opt_state)
loss, model_grads = mpjax.nnx.value_and_grad(model_loss)(linear, x, loss_scale=scale)
nnx_step = mpjax.nnx.make_train_step(model_loss)
assert_type(nnx_step, mpjax.nnx.TrainStep)
assert_type(nnx_step(linear, optimizer, x), mpjax.training.StepMetrics)


# Train steps.
def batch_loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  return loss_fn(params, *batch)


step = mpjax.make_train_step(batch_loss, tx, policy="mixed_float16", donate=False)
assert_type(step, mpjax.training.TrainStep)
state = mpjax.TrainState.create(params, tx)
state, metrics = step(state, (x, y))
assert_type(state, mpjax.training.TrainState)
assert_type(metrics.loss, jax.Array)
assert_type(state.replace(step=jnp.zeros((), jnp.int32)), mpjax.TrainState)
make_step: Callable[..., mpjax.training.TrainStep] = mpjax.training.make_train_step
try:
  step(state, (x, y))
except mpjax.training.NonFiniteError as error:
  paths: tuple[str, ...] = error.paths
except mpjax.training.LowPrecisionWarning:
  pass

# Tests of training.
kinds: tuple[str, ...] = mpjax.testing.FAULTS
schedule = mpjax.testing.FaultSchedule.at({3: "nan"})
struck: list[int] = schedule.struck
mpjax.testing.inject({"x": x}, schedule, 0)
mpjax.testing.inject_gradients(params, schedule, 0)
faults = mpjax.testing.inject_faults(schedule)
counted = mpjax.testing.FaultState(jnp.zeros((), jnp.int32))


def whole_step(params: Params, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
  scale = mpjax.loss_scale(opt_state)
  _, grads = mpjax.value_and_grad(cast_loss)(params, x, y, loss_scale=scale)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


mpjax.testing.assert_scale_invariant(whole_step, params, tx.init(params), x, y)

# Reports.
flow = mpjax.inspect.explain(loss_fn, "mixed_bfloat16", params, x, y)
assert_type(flow, mpjax.inspect.FlowReport)
checked = mpjax.inspect.check(loss_fn, "mixed_bfloat16", params, x, y)
assert_type(checked, mpjax.inspect.CheckReport)
located = mpjax.inspect.locate_nonfinite(loss_fn, params, x / 0, y)
assert_type(located, mpjax.inspect.NonFiniteReport)
histogram = mpjax.inspect.histogram(params)
assert_type(histogram + histogram, mpjax.inspect.Histogram)
ranges = mpjax.inspect.range_report(histogram, "float16", scale=2.0)
assert_type(ranges, mpjax.inspect.RangeReport)
_, values = mpjax.inspect.record(loss_fn, "mixed_float16")(params, x, y)
assert_type(values, mpjax.inspect.Values)
statistics = mpjax.inspect.statistics(opt_state)
assert_type(statistics, mpjax.inspect.Statistics)
stalls = mpjax.inspect.update_report(statistics)
assert_type(stalls, mpjax.inspect.UpdateReport)
tuned = mpjax.inspect.tune(loss_fn, (params, x, y), tolerance=0.1)
assert_type(tuned, mpjax.inspect.TuneReport)
needed = mpjax.inspect.cost(loss_fn, params, x, y, policies=["float32", "mixed_bfloat16"])
assert_type(needed, mpjax.inspect.CostReport)
reports: list[mpjax.inspect.Report] = [flow, checked, located, ranges, stalls, tuned, needed]
rows: list[list[dict[str, Any]]] = [report.to_rows() for report in reports]


def count_of(state: mpjax.inspect.StatisticsState) -> int:
  return int(state.step)


# Plots.
def axes() -> Any:
  return Figure().subplots()


mpjax.plot.plot_flow(flow, ax=axes())
mpjax.plot.plot_check(checked, ax=axes())
mpjax.plot.plot_nonfinite(located, ax=axes())
mpjax.plot.plot_range(ranges, ax=axes())
mpjax.plot.plot_scale_choice(ranges, ax=axes())
mpjax.plot.plot_updates(stalls, ax=axes())
mpjax.plot.plot_frontier(tuned, ax=axes())
mpjax.plot.plot_cost(needed, ax=axes())
curve = mpjax.plot.Curve("float32", np.array([2.0, 1.0]), np.ones(2), np.ones(2, bool))
mpjax.plot.plot_losses([curve], ax=axes())
mpjax.plot.plot_scales([curve], ax=axes())
smooth: "np.ndarray[Any, Any]" = mpjax.plot.running_mean(curve.losses, 2)

# Files.
with tempfile.TemporaryDirectory() as folder:
  mpjax.plot.save_curves([curve], Path(folder) / "curves.png")
  handler = ocp.StandardCheckpointHandler()
  with ocp.CheckpointManager(folder, item_handlers=handler) as manager:
    manager.save(0, args=ocp.args.StandardSave(params))
    manager.wait_until_finished()
    assert_type(mpjax.checkpoint.restore(manager, params), Params)
