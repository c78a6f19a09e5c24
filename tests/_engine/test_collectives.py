"""What goes from device to device in `jax.shard_map`, and in which dtype."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import mpjax
from tests._jaxprs import equations

P = PartitionSpec
POLICIES = ["mixed_bfloat16", "mixed_float16"]
FORMATS = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
MOVES = {"all_gather", "all_gather_invariant", "all_to_all", "ppermute", "reduce_scatter"}
SENDS = MOVES | {"psum", "psum_invariant"}
D, N = "d", 4


def norm(x):
  return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def gathered(p, x):
  """Fully sharded parameters."""
  a, b = (lax.all_gather(p[k], D, axis=n, tiled=True) for n, k in enumerate("ab"))
  return jnp.tanh(x @ a) @ b


def gathered_in_scan(p, x):
  def turn(h, w):
    return jnp.tanh(h @ lax.all_gather(w, D, axis=0, tiled=True)), None

  return lax.scan(turn, x, jnp.stack([p["a"], p["a"] + 0.1]))[0]


def gathered_and_checkpointed(p, x):
  a, b = (lax.all_gather(p[k], D, axis=n, tiled=True) for n, k in enumerate("ab"))
  return jax.checkpoint(lambda a, b, x: jnp.tanh(x @ a) @ b)(a, b, x)


def gathered_twice_read(p, x):
  a = lax.all_gather(p["a"], D, axis=0, tiled=True)
  return jnp.tanh(x @ a) @ a.T


def gathered_untiled(p, x):
  a = lax.all_gather(p["a"], D).reshape(-1, p["a"].shape[-1])
  return jnp.tanh(x @ a) @ a.T


def permuted(p, x):
  """Each device in turn has the keys of another."""
  a, b = p["a"], p["b"].T
  q, k = norm(jnp.tanh(x @ jnp.tile(a, (N, 1)))), norm(jnp.tanh(x @ jnp.tile(b, (N, 1))))
  for _ in range(2):
    k = lax.ppermute(k, D, [(n, (n + 1) % N) for n in range(N)])
    q = q + jax.nn.softmax(q @ k.T) @ k
  return q @ jnp.tile(a.T, (1, N))


def exchanged(p, x):
  """Experts on devices: a norm's result goes to them."""
  z = norm(jnp.tanh(x @ jnp.tile(p["a"], (N, 1)))[:, :16])
  z = lax.all_to_all(z, D, 0, 1, tiled=True)
  z = jnp.tanh(z @ jnp.tile(p["b"], (N, 1)))
  return lax.all_to_all(z, D, 1, 0, tiled=True) @ jnp.ones((z.shape[1] // N, 16))


def head(p, h):
  """A layer of the same weights on all devices."""
  return h @ jnp.tile(p["a"], (16 // len(p["a"]), 1))


def tensor_parallel(p, x):
  h = x @ jnp.ones((16, 16)) / 16
  for _ in range(2):
    parts = jnp.tanh(norm(h) @ p["a"].T) @ p["b"].T
    h = h + lax.psum(parts, D)
  return head(p, h)


def sequence_parallel(p, x):
  h = x @ jnp.eye(16)
  for _ in range(2):
    z = lax.all_gather(norm(h), D, axis=0, tiled=True)
    parts = jnp.einsum("nf,fg->ng", jnp.tanh(z @ p["a"].T), p["b"].T)
    h = h + lax.psum_scatter(parts, D, scatter_dimension=0, tiled=True)
  return head(p, h)


# What each model sends forward in 16 bits; what else it sends is no activation, and no weight.
MODELS = {
  "gathered": (gathered, {"all_gather": 2}),
  "gathered in a scan": (gathered_in_scan, {"all_gather": 1}),
  "gathered and checkpointed": (gathered_and_checkpointed, {"all_gather": 2}),
  "gathered, read twice": (gathered_twice_read, {"all_gather": 1}),
  "gathered, not tiled": (gathered_untiled, {"all_gather": 1}),
  "permuted": (permuted, {"ppermute": 2}),
  "exchanged": (exchanged, {"all_to_all": 2}),
  "tensor parallel": (tensor_parallel, {"psum": 2}),
  "sequence parallel": (sequence_parallel, {"all_gather": 2, "reduce_scatter": 2}),
}


def mesh(size=N):
  return jax.make_mesh((size,), (D,), axis_types=(AxisType.Auto,))


def on_devices(model, on=None):
  """The loss of a model of which each device has a part of the parameters, and of the rows."""
  specs = ({"a": P(D), "b": P(None, D)}, P(D), P(D))

  @partial(jax.shard_map, mesh=on or mesh(), in_specs=specs, out_specs=P())
  def loss(p, x, y):
    return lax.pmean(jnp.square(model(p, x) - y).mean(), D)

  return loss


def problem(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  a, b, x, y = (jax.random.normal(k, (16, 16)) for k in keys)
  return {"a": a / 4, "b": b / 4}, x, y


def sent(jaxpr, format_=None):
  """How often matrices are sent, by collective, in a format; in any if none is given."""
  found = Counter()
  for eqn in equations(jaxpr):
    name, aval = eqn.primitive.name, eqn.invars[0].aval if eqn.invars else None
    if name in SENDS and aval.ndim > 1 and format_ in (None, str(aval.dtype)):
      found[name.removesuffix("_invariant")] += 1
  return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_what_all_that_reads_it_rounds_travels_rounded(name, policy):
  model, expected = MODELS[name]
  loss = mpjax.autocast(on_devices(model), policy)
  jaxpr = jax.make_jaxpr(loss)(*problem())
  assert sent(jaxpr, FORMATS[policy]) == expected
  assert not sent(jaxpr, "float32").keys() & expected.keys()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [n for n in MODELS if "gathered" in n])
def test_gradients_of_weights_are_summed_over_devices_in_float32(name, policy):
  loss = mpjax.autocast(on_devices(MODELS[name][0]), policy)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(*problem())
  found = sent(jaxpr, "float32")
  assert found["reduce_scatter"] >= 1
  assert not sent(jaxpr, FORMATS[policy])["reduce_scatter"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["permuted", "exchanged", "sequence parallel"])
def test_cotangents_of_activations_go_back_in_16_bits(name, policy):
  loss = mpjax.autocast(on_devices(MODELS[name][0]), policy)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(*problem())
  forward, found = MODELS[name][1], sent(jaxpr, FORMATS[policy])
  first = name == "sequence parallel"  # nothing comes back to data
  assert sum(found.values()) == 2 * sum(forward.values()) - first


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(("name", "policy"), [*zip(MODELS, 5 * POLICIES, strict=False)])
def test_gradients_are_as_near_float32_as_those_of_one_format(name, policy):
  plain = on_devices(MODELS[name][0])
  loss = mpjax.autocast(plain, policy)

  @jax.jit
  def both(*args):
    _, found = jax.value_and_grad(lambda *args: 64 * loss(*args))(*args)
    return jax.grad(plain)(*args), jax.tree.map(lambda g: g / 64, found)

  expected, found = both(*problem())
  for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert ours.dtype == jnp.float32
    error = np.linalg.norm(ours - theirs)
    assert error <= 4 * jnp.finfo(FORMATS[policy]).eps * np.linalg.norm(theirs)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_gathered_rounded_is_what_would_be_rounded_behind(policy):
  p, x, y = problem()
  loss = jax.jit(mpjax.autocast(on_devices(gathered), policy))

  def rounded(p, x):
    cast = {k: v.astype(FORMATS[policy]).astype(jnp.float32) for k, v in p.items()}
    return gathered(cast, x)

  again = jax.jit(mpjax.autocast(on_devices(rounded), policy))
  np.testing.assert_array_equal(loss(p, x, y), again(p, x, y))


def exactly_read_too(p, x):
  a = lax.all_gather(p["a"], D, axis=0, tiled=True)
  return jnp.tanh(x @ a) @ a.T + 1e-3 * jnp.sum(a)


def counted(p, x):
  return (x + lax.psum(x, D)) @ jnp.tile(p["a"], (N, 1))


def standardized(p, x):
  h = jnp.tanh(x @ jnp.tile(p["a"], (N, 1)))
  h = h - lax.psum(h.mean(0, keepdims=True), D) / N
  return h @ jnp.tile(p["b"], (1, N))


def summed_output(p, x):
  h = jnp.tanh(x @ p["a"].T) @ p["b"].T
  return lax.psum(h, D)


OTHERS = {
  "weights that are read exactly, too": (exactly_read_too, "all_gather"),
  "a sum of data": (counted, "psum"),
  "statistics of what layers gave": (standardized, "psum"),
  "parts of an output": (summed_output, "psum"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_needed_exactly_travels_in_float32(name, policy):
  model, kind = OTHERS[name]
  jaxpr = jax.make_jaxpr(mpjax.autocast(on_devices(model), policy))(*problem())
  assert sent(jaxpr)[kind] == sent(jaxpr, "float32")[kind] == 1


def test_more_devices_than_16_bits_count_sum_up_in_float32():
  """Traced for devices that are not there."""
  many = jax.sharding.AbstractMesh((32,), (D,), axis_types=(AxisType.Auto,))
  loss = mpjax.autocast(on_devices(tensor_parallel, many), "mixed_bfloat16")
  wide = {"a": jnp.ones((32, 16)), "b": jnp.ones((16, 32))}
  jaxpr = jax.make_jaxpr(loss)(wide, jnp.ones((32, 16)), jnp.ones((32, 16)))
  assert sent(jaxpr, "float32") == {"psum": 2}


@pytest.mark.parametrize("transform", ["vmap", "jvp", "hessian", "no check", "eager"])
def test_transformations_of_what_travels(transform):
  p, x, y = problem()
  plain = on_devices(gathered)
  if transform == "no check":
    specs = ({"a": P(D), "b": P(None, D)}, P(D), P(D))

    @partial(jax.shard_map, mesh=mesh(), in_specs=specs, out_specs=P(D), check_vma=False)
    def plain(p, x, y):
      return jnp.square(gathered(p, x) - y).mean()[None]

  runs = {
    "vmap": lambda f: jax.vmap(f, (None, 0, None))(p, jnp.stack([x, 2 * x]), y),
    "jvp": lambda f: jax.jvp(lambda p: f(p, x, y), (p,), (p,))[1],
    "hessian": lambda f: jax.jvp(jax.grad(lambda p: f(p, x, y)), (p,), (p,))[1]["a"],
    "no check": lambda f: jax.grad(lambda p: f(p, x, y).sum())(p)["b"],
    "eager": lambda f: f(p, x, y),
  }
  run = runs[transform] if transform == "eager" else lambda f: jax.jit(lambda: runs[transform](f))()
  expected, found = run(plain), run(mpjax.autocast(plain, "mixed_bfloat16"))
  assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_a_checkpoint_stores_what_was_gathered_in_16_bits():
  loss = mpjax.autocast(on_devices(gathered_and_checkpointed), "mixed_bfloat16")
  jaxpr = jax.make_jaxpr(jax.grad(loss))(*problem())
  (again,) = (e for e in equations(jaxpr) if e.params.get("differentiated"))
  weights = [v.aval.dtype for v in again.invars if v.aval.shape == (16, 16)]
  assert weights == [jnp.bfloat16] * 2
