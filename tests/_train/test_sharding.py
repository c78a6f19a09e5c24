"""Train steps over several devices: data parallel, parameters sharded, tensor parallel, by hand."""

import functools
import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from _hlo import collectives
from _jaxprs import contractions, equations
from mpjax._scaling.device_gradients import with_narrow_sums

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
STRATEGIES = ("data parallel", "fully sharded", "tensor parallel")


def make_mesh(shape=(8,), names=("data",), kind=AxisType.Auto):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def loss_fn(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
  return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)


@functools.cache
def problem():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    "w1": jax.random.normal(keys[0], (16, 32)) / 4,
    "b1": jnp.zeros(32),
    "w2": jax.random.normal(keys[1], (32, 8)) / 6,
  }
  batch = {"x": jax.random.normal(keys[2], (64, 16)), "y": jax.random.normal(keys[3], (64, 8))}
  return params, batch


def placed(strategy):
  """Parameters and batch of the problem, sharded as a strategy shards them."""
  params, batch = problem()
  if strategy == "tensor parallel":
    mesh = make_mesh((4, 2), ("data", "model"))
    specs = {"w1": P(None, "model"), "b1": P(), "w2": P("model", None)}
  else:
    mesh = make_mesh()
    specs = {name: P("data") if strategy == "fully sharded" else P() for name in params}
  shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  return jax.device_put(params, shardings), jax.device_put(batch, NamedSharding(mesh, P("data")))


def optimizer(policy, **settings):
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-0.1))
  if policy == "mixed_float16":
    return mpjax.dynamic_loss_scaling(inner, growth_interval=3, **settings)
  return mpjax.static_loss_scaling(inner, 1, **settings)


def train(step, tx, params, batches):
  state = mpjax.TrainState.create(params, tx)
  for batch in batches:
    state, metrics = step(state, batch)
  return state, metrics


def assert_same_shardings(actual, expected):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, seconds, **rest: COMPILED.append(name) if "backend_compile" in name else None
)


def assert_close(actual, expected, policy):
  # Sums are taken in another order, and on one device some of them in 16 bits: a few units in the
  # last place of the compute dtype, of the largest entry.
  bound = 8 * float(jnp.finfo(mpjax.Policy.parse(policy).compute_dtype).eps)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.max(np.abs(a - b)) <= bound * max(np.max(np.abs(b)), 1e-3), path


# The compiler shards ------------------------------------------------------------------------------


@functools.cache
def unsharded(policy):
  params, batch = problem()
  tx = optimizer(policy)
  step = mpjax.make_train_step(loss_fn, tx, policy=policy)
  return train(step, tx, params, [batch] * 4)


@pytest.mark.quick
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sharded_step_trains_as_on_one_device_and_keeps_its_shardings(strategy, policy):
  params, batch = placed(strategy)
  tx = optimizer(policy)
  counted = chex.assert_max_traces(loss_fn, n=1)
  step = mpjax.make_train_step(counted, tx, policy=policy)
  state = mpjax.TrainState.create(params, tx)
  assert_same_shardings(state.params, params)
  assert_same_shardings(state.opt_state.inner_state[1].trace, params)
  first = state
  state, _ = step(state, batch)
  assert all(
    leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt_state.inner_state))
  )
  assert COMPILED.pop() and not COMPILED.clear()
  for _ in range(3):
    old, (state, metrics) = state, step(state, batch)
    assert_same_shardings(state, old)
  assert not COMPILED
  expected, expected_metrics = unsharded(policy)
  assert_close(state.params, expected.params, policy)
  assert_close(metrics.grad_norm, expected_metrics.grad_norm, policy)
  assert float(metrics.loss_scale) == float(expected_metrics.loss_scale)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nan_in_one_shard_skips_the_step_on_every_device(strategy):
  params, batch = placed(strategy)
  tx = optimizer("mixed_float16")
  step = mpjax.make_train_step(loss_fn, tx, policy="mixed_float16", donate=False)
  state = mpjax.TrainState.create(params, tx)
  bad = jax.device_put(batch | {"x": batch["x"].at[5, 3].set(jnp.nan)}, batch["x"].sharding)
  after, metrics = step(state, bad)
  assert not metrics.applied
  for old, new in zip(
    jax.tree.leaves((state.params, state.opt_state.inner_state)),
    jax.tree.leaves((after.params, after.opt_state.inner_state)),
    strict=True,
  ):
    for a, b in zip(old.addressable_shards, new.addressable_shards, strict=True):
      np.testing.assert_array_equal(a.data, b.data)
  decisions = [bool(shard.data) for shard in after.opt_state.last_finite.addressable_shards]
  assert decisions == [False] * 8


# What the devices exchange ------------------------------------------------------------------------


def collectives_of(strategy, reduce_dtype, **settings):
  params, batch = placed(strategy)
  tx = optimizer("mixed_float16")
  settings |= {"policy": "mixed_float16", "reduce_dtype": reduce_dtype}
  step = mpjax.make_train_step(loss_fn, tx, **settings)
  compiled = step.lower(mpjax.TrainState.create(params, tx), batch).compile()
  return collectives(compiled.as_text())


def sizes(found, dtype):
  return {math.prod(c.shape) for c in found if c.dtype == dtype}


def test_the_compiler_sums_gradients_in_the_dtype_asked_for():
  # float16, because XLA for CPU computes bfloat16 matmuls in float32: for bfloat16 and the
  # compilers of GPU and TPU see benchmarks/own/collectives.py.
  wide = collectives_of("data parallel", "float32")
  narrow = collectives_of("data parallel", "compute")
  assert sizes(wide, "f32") >= {16 * 32, 32 * 8}
  assert not sizes(wide, "f16")
  assert sizes(narrow, "f16") >= {16 * 32, 32 * 8}
  assert sizes(narrow, "f32") <= {1}  # the loss and the norm


@pytest.mark.parametrize(("reduce_dtype", "sent"), [("float32", "f32"), ("compute", "f16")])
def test_the_gradients_of_micro_batches_are_summed_in_the_dtype_asked_for(reduce_dtype, sent):
  found = collectives_of("data parallel", reduce_dtype, accumulate=4)
  assert sizes(found, sent) >= {16 * 32, 32 * 8}
  assert {c.dtype for c in found if c.shape} == {sent}


def convolve(kernel, x):
  return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def test_the_kernel_gradients_of_convolutions_are_summed_in_the_dtype_asked_for():
  mesh, tx = make_mesh(), mpjax.static_loss_scaling(optax.sgd(0.1), 1)
  kernel = jax.device_put(jnp.ones((3, 4, 8)), NamedSharding(mesh, P()))
  x = jax.device_put(jnp.ones((16, 6, 4)), NamedSharding(mesh, P("data")))
  loss = lambda kernel, x: jnp.mean(convolve(kernel, x) ** 2)
  for reduce_dtype, sent in (("float32", "f32"), ("compute", "f16")):
    step = mpjax.make_train_step(loss, tx, policy="mixed_float16", reduce_dtype=reduce_dtype)
    lowered = step.lower(mpjax.TrainState.create(kernel, tx), x)
    assert {c.dtype for c in collectives(lowered.compile().as_text()) if c.shape} == {sent}


@pytest.mark.parametrize(("platform", "returned"), [("cuda", "bf16"), ("tpu", "f32")])
def test_a_convolution_takes_16_bits_everywhere_and_returns_float32_but_on_gpus(platform, returned):
  grad = jax.value_and_grad(
    mpjax.autocast(lambda w, x: jnp.mean(convolve(w, x) ** 2), "mixed_bfloat16")
  )
  traced = jax.jit(grad).trace(jnp.ones((3, 4, 8)), jnp.ones((16, 6, 4)))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  types = re.findall(r"stablehlo\.convolution.* : \(.*x(\w+)>, .*x(\w+)>\) -> .*x(\w+)>", text)
  assert ("bf16", "bf16", returned) in types and len(types) == 2
  assert {dtype for pair in types for dtype in pair[:2]} == {"bf16"}


def test_sharded_parameters_are_gathered_in_the_compute_dtype():
  found = collectives_of("fully sharded", "float32")
  gathered = {c.shape: c.dtype for c in found if c.kind == "all-gather"}
  assert gathered[16, 32] == "f16"
  summed = {c.dtype for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.shape}
  assert summed == {"f32"}


def test_what_reduce_dtype_may_be_is_listed():
  with pytest.raises(ValueError, match=r"'float32', or 'compute'.*Got 'bf16'.*reduce_gradients"):
    mpjax.make_train_step(loss_fn, optax.sgd(0.1), reduce_dtype="bf16")


def deep_loss(params, x):
  def block(h, w):
    return jax.checkpoint(lambda h: jnp.tanh(h @ w + params["bias"][None]))(h), None

  h, _ = lax.scan(block, x @ params["embedding"], params["layers"])
  logits = jax.jit(lambda h: h @ params["embedding"].T)(h)
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0])


def test_the_matmuls_of_weight_gradients_and_no_others_return_float32():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "embedding": jax.random.normal(keys[0], (12, 8)),
    "layers": jax.random.normal(keys[1], (3, 8, 8)) / 3,
    "bias": jnp.zeros(8),
  }
  x = jax.random.normal(keys[2], (5, 12))
  wide = mpjax.autocast(deep_loss, "mixed_bfloat16")
  both = (jax.value_and_grad(f) for f in (with_narrow_sums(wide), wide))
  before, after = (contractions(jax.make_jaxpr(f)(params, x)) for f in both)
  assert {c.result for c in before} == {"bfloat16"}
  assert {f for c in (*before, *after) for f in c.factors} == {"bfloat16"}
  assert len(before) == len(after)
  assert sum(c.result == "float32" for c in after) == 3  # of the layers, and both of the embedding


def test_the_gradient_of_a_weight_is_not_rounded_to_16_bits():
  keys = jax.random.split(jax.random.key(0), 2)
  x, cotangent = (jax.random.normal(key, (64, 8), jnp.bfloat16) for key in keys)

  def loss(w):
    return jnp.sum((x.astype(jnp.float32) @ w) * cotangent.astype(jnp.float32))

  truth = np.asarray(x, np.float64).T @ np.asarray(cotangent, np.float64)
  wide = mpjax.autocast(loss, "mixed_bfloat16")
  both = (jax.grad(f) for f in (with_narrow_sums(wide), wide))
  errors = [np.abs(np.asarray(f(jnp.zeros((8, 8)))) - truth) for f in both]
  assert np.max(errors[0]) > 2.0**-10 * np.max(np.abs(truth))
  assert np.max(errors[1]) < 2.0**-20 * np.max(np.abs(truth))


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("devices", [1, 8], ids=["one device", "mesh"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradients_of_a_batch_of_sequences_sum_in_float32_on_cpus(policy, devices):
  """Two dimensions are contracted and the result is transposed: XLA would fold that on a CPU."""
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
  loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"])
  params = {"a": jnp.eye(8, 16), "b": jnp.eye(16, 8)}
  x = jax.device_put(jnp.ones((8, 4, 8)), NamedSharding(mesh, P("data")))
  tx = optimizer(policy)
  step = mpjax.make_train_step(loss, tx, policy=policy)
  for run in (step, jax.jit(lambda state, x: step(state, x))):
    _, metrics = run(mpjax.TrainState.create(params, tx), x)
    assert float(metrics.loss) == pytest.approx(np.tanh(1.0), rel=0.01)
    assert metrics.applied


# By hand: shard_map and pmap ----------------------------------------------------------------------


def step_by_hand(tx, policy, dtype):
  def step(params, opt_state, batch):
    grad = mpjax.value_and_grad(mpjax.autocast(loss_fn, policy))
    local = lax.pcast(params, "data", to="varying")
    loss, grads = grad(local, batch, loss_scale=mpjax.loss_scale(opt_state))
    grads = mpjax.reduce_gradients(grads, "data", dtype)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, lax.pmean(loss, "data")

  specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P(), P())}
  return jax.jit(jax.shard_map(step, mesh=make_mesh(), **specs))


@pytest.mark.quick(every=2, start=1)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_shard_map_step_sums_in_its_dtype_and_trains_as_on_one_device(dtype):
  params, batch = problem()
  tx = optimizer("mixed_float16", axis_name="data")
  step = step_by_hand(tx, "mixed_float16", dtype)
  opt_state = tx.init(params)
  sent = {
    atom.aval.dtype.name
    for eqn in equations(jax.make_jaxpr(step)(params, opt_state, batch))
    if eqn.primitive.name.startswith("psum")
    for atom in eqn.invars
    if atom.aval.ndim
  }
  assert sent == {dtype}
  for _ in range(4):
    params, opt_state, _ = step(params, opt_state, batch)
  assert_close(params, unsharded("mixed_float16")[0].params, "mixed_float16")
  bad = batch | {"x": batch["x"].at[60].set(jnp.nan)}
  after, opt_state, _ = step(params, opt_state, bad)
  assert not mpjax.step_is_finite(opt_state)
  for leaf in jax.tree.leaves(after):
    assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1
  chex.assert_trees_all_equal(after, params)


def test_a_mean_of_the_largest_float16_numbers_does_not_overflow():
  largest = jnp.full((8,), 65504.0)
  mean = jax.vmap(
    lambda g: mpjax.reduce_gradients(g, "d", "float16"), axis_name="d", out_axes=None
  )(largest)
  assert float(mean) == 65504.0


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="this JAX has no pmap")
def test_a_pmap_step_skips_on_every_device():
  params, batch = problem()
  tx = optimizer("mixed_float16", axis_name="data")

  def step(params, opt_state, batch):
    grad = mpjax.value_and_grad(mpjax.autocast(loss_fn, "mixed_float16"))
    _, grads = grad(params, batch, loss_scale=mpjax.loss_scale(opt_state))
    grads = mpjax.reduce_gradients(grads, "data", "float16")
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  mapped = jax.pmap(step, axis_name="data", in_axes=(None, None, 0))
  split = jax.tree.map(lambda a: a.reshape(8, 8, *a.shape[1:]), batch)
  after, _ = mapped(params, tx.init(params), split)
  first = jax.tree.map(lambda a: a[0], after)
  assert not np.array_equal(first["w1"], params["w1"])
  bad = split | {"x": split["x"].at[6].set(jnp.nan)}
  after, opt_state = mapped(params, tx.init(params), bad)
  assert opt_state.last_finite.tolist() == [False] * 8
  chex.assert_trees_all_equal(after, jax.tree.map(lambda a: jnp.stack([a] * 8), params))


# Annotations of Flax and of JAX -------------------------------------------------------------------


class Partitioned(nn.Module):
  """A perceptron with axis names on its kernels and on its hidden values."""

  mesh: jax.sharding.Mesh

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    names = nn.with_logical_partitioning(init, (None, "hidden"))
    x = nn.tanh(nn.Dense(32, kernel_init=names, name="up")(x))
    x = nn.with_logical_constraint(x, ("batch", "hidden"), rules=RULES, mesh=self.mesh)
    names = nn.with_logical_partitioning(init, ("hidden", None))
    return nn.Dense(8, kernel_init=names, name="down")(x)


RULES = (("batch", "data"), ("hidden", "model"))


def test_linen_partitioning_reaches_parameters_moments_and_hidden_values():
  mesh = make_mesh((4, 2), ("data", "model"))
  _, batch = problem()
  model = mpjax.apply_policy(Partitioned(mesh), "mixed_float16")
  tx = optimizer("mixed_float16")

  def create():
    return mpjax.TrainState.create(model.init(jax.random.key(0), batch["x"])["params"], tx)

  def loss(params, batch):
    return jnp.mean((model.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)

  names = nn.get_partition_spec(jax.eval_shape(create))
  shardings = nn.logical_to_mesh_sharding(names, mesh, RULES)
  state = jax.jit(create, out_shardings=shardings)()
  batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
  constraints = [
    (eqn.outvars[0].aval.dtype.name, eqn.params["sharding"].spec)
    for eqn in equations(jax.make_jaxpr(loss)(state.params, batch))
    if eqn.primitive.name == "sharding_constraint" and eqn.outvars[0].aval.shape == (64, 32)
  ]
  assert constraints == [("float16", P("data", "model"))]
  step = mpjax.make_train_step(chex.assert_max_traces(loss, n=1), tx, donate=False)
  after, metrics = step(state, batch)
  after, metrics = step(after, batch)
  assert metrics.applied
  moments = after.opt_state.inner_state[1].trace
  for tree in (after.params, moments):
    assert tree["up"]["kernel"].value.sharding.spec == P(None, "model")
    assert tree["down"]["kernel"].value.sharding.spec == P("model")
    assert tree["down"]["kernel"].names == ("hidden", None)


class NamedPerceptron(nnx.Module):
  def __init__(self, rngs):
    init = nnx.initializers.lecun_normal()
    up = nnx.with_partitioning(init, (None, "model"))
    down = nnx.with_partitioning(init, ("model", None))
    self.up = nnx.Linear(16, 32, kernel_init=up, rngs=rngs)
    self.down = nnx.Linear(32, 8, kernel_init=down, rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


def nnx_training(mesh):
  _, batch = problem()
  loss = lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
  chex.clear_trace_counter()
  counted = chex.assert_max_traces(loss, n=1)
  step = mpjax.nnx.make_train_step(counted, policy="mixed_float16")
  with jax.set_mesh(mesh):
    model = NamedPerceptron(nnx.Rngs(0))
    optimizer_ = nnx.Optimizer(model, optimizer("mixed_float16"), wrt=nnx.Param)
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    before = jax.tree.map(lambda x: x.sharding, nnx.as_pure(nnx.state((model, optimizer_))))
    for _ in range(3):
      metrics = step(model, optimizer_, batch)
  after = nnx.as_pure(nnx.state((model, optimizer_)))
  assert metrics.applied
  for x, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  return model, nnx.as_pure(nnx.state(model))


def test_nnx_sharding_metadata_reaches_parameters_and_moments_and_stays():
  model, sharded = nnx_training(make_mesh((4, 2), ("data", "model")))
  assert model.up.kernel[...].sharding.spec == P(None, "model")
  single = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  _, alone = nnx_training(single)
  assert_close(sharded, alone, "mixed_float16")


@pytest.mark.parametrize("strategy", [P(), P(None, "data")], ids=["replicated", "sharded"])
def test_an_nnx_step_is_traced_once_though_its_optimizer_was_made_on_no_mesh(strategy):
  _, batch = problem()
  mesh = make_mesh()
  loss = lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
  step = mpjax.nnx.make_train_step(chex.assert_max_traces(loss, n=1), policy="mixed_float16")
  model = nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0))
  nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, strategy)))
  optimizer_ = nnx.Optimizer(model, optimizer("mixed_float16"), wrt=nnx.Param)
  batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
  for n in range(3):
    assert step(model, optimizer_, batch).applied
    assert model.kernel[...].sharding.is_equivalent_to(NamedSharding(mesh, strategy), 2)
    assert int(optimizer_.step[...]) == n + 1
    assert len(optimizer_.step[...].sharding.device_set) == mesh.size


def test_on_an_explicit_mesh_types_keep_their_shardings_and_gradients_theirs():
  mesh = make_mesh(kind=AxisType.Explicit)
  params, batch = problem()

  def loss(params, batch):
    return loss_fn(jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params), batch)

  tx = optimizer("mixed_float16")
  step = mpjax.make_train_step(loss, tx, policy="mixed_float16")
  with jax.set_mesh(mesh):
    params = jax.device_put(params, NamedSharding(mesh, P("data")))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    jaxpr = jax.make_jaxpr(mpjax.autocast(loss, "mixed_float16"))(params, batch)
    (first, *_) = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert first.outvars[0].aval.dtype == jnp.float16
    assert first.outvars[0].aval.sharding.spec == P("data", None)
    state, _ = train(step, tx, params, [batch] * 4)
  assert_same_shardings(state.params, params)
  assert_close(state.params, unsharded("mixed_float16")[0].params, "mixed_float16")


def test_a_convolution_inside_a_users_shard_map_trains():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec

  def loss_fn(params, images):
    def local(kernel, images):
      out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME")
      return jax.lax.psum(jnp.sum(jnp.sin(out)), "d")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec())
    return mapped(params["kernel"], images)

  tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1)
  everywhere = jax.sharding.NamedSharding(mesh, spec())
  params = jax.device_put({"kernel": jnp.ones((2, 1, 3, 3)) / 9}, everywhere)
  images = jax.device_put(jnp.ones((2, 1, 4, 4)), jax.sharding.NamedSharding(mesh, spec("d")))
  step = mpjax.make_train_step(loss_fn, tx, policy="mixed_bfloat16")
  _, metrics = step(mpjax.TrainState.create(params, tx), images)
  assert bool(metrics.applied)
