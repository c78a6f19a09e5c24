"""Functions marked by `cast_inputs` run in the compute dtype, whole, wherever they stand."""

import functools
import itertools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, PartitionSpec

import mpjax
from _jaxprs import contractions, equations, wide_contractions
from _turns import in_turns

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


def refuse_float32(x):
  """What cuDNN's attention does, when it is traced."""
  if x.dtype == jnp.float32:
    raise NotImplementedError("16-bit operands only")


def without_float32(x, w):
  refuse_float32(x)
  return jnp.tanh(x @ w)


@jax.custom_vjp
def with_rules(x, w):
  """Its backward pass reads a float32 residual, as attention's reads its normalizers."""
  refuse_float32(x)
  return jnp.tanh(x @ w)


def with_rules_forward(x, w):
  y = with_rules(x, w)
  return y, (x, w, y, jnp.square(y.astype(jnp.float32)))


def with_rules_backward(residuals, ct):
  x, w, y, squared = residuals
  assert squared.dtype == jnp.float32 and ct.dtype == x.dtype == y.dtype
  moved = ct * (1 - squared).astype(y.dtype)
  return moved @ w.T, x.T @ moved


with_rules.defvjp(with_rules_forward, with_rules_backward)


def widening(x, w):
  """Stores other intermediates in 16 bits than in float32."""
  return jax.nn.softmax((x @ w).astype(jnp.float32)).astype(x.dtype) @ w


def tanh(x, w):
  return jnp.tanh(x @ w)


KERNELS = {
  "without_float32": (without_float32, tanh),
  "with_rules": (with_rules, tanh),
  "widening": (widening, widening),
}


def over_devices(kernel):
  mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
  along = PartitionSpec("i")
  specs = {"in_specs": (along, PartitionSpec()), "out_specs": along, "check_vma": False}
  return lambda w, x: jax.shard_map(kernel, mesh=mesh, **specs)(x @ w, w).sum()


PLACES = {
  "plain": lambda k: lambda w, x: k(x @ w, w).sum(),
  "jit": lambda k: lambda w, x: jax.jit(k)(x @ w, w).sum(),
  "scan_of_checkpoint": lambda k: (
    lambda w, x: lax.scan(lambda c, _: (jax.checkpoint(k)(c, w), None), x @ w, None, length=3)[
      0
    ].sum()
  ),
  "scan": lambda k: lambda w, x: lax.scan(lambda c, _: (k(c, w), None), x, None, length=3)[0].sum(),
  "vmap": lambda k: lambda w, x: jax.vmap(lambda row: k(row[None], w))(x @ w).sum(),
  "cond": lambda k: lambda w, x: lax.cond(x[0, 0] > 0, k, k, x @ w, w).sum(),
  "closure": lambda k: (
    lambda w, x: mpjax.cast_inputs(lambda x: k(x, w.astype(x.dtype)))(x @ w).sum()
  ),
  "shard_map": over_devices,
}
DERIVATIVES = {
  "outside": lambda loss, policy: jax.grad(mpjax.autocast(loss, policy)),
  "inside": lambda loss, policy: mpjax.autocast(jax.grad(loss), policy),
  "inside_of_jit": lambda loss, policy: mpjax.autocast(jax.jit(jax.grad(loss)), policy),
  "batched": lambda loss, policy: mpjax.autocast(
    lambda w, x: jax.vmap(jax.grad(loss), (None, 0))(w, x[None])[0], policy
  ),
}


@functools.cache
def numbers():
  random = np.random.default_rng(0)
  w, x = random.normal(size=(4, 4)) / 2, random.normal(size=(2, 4))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def operands():
  return numbers()


@functools.cache
def gradient_in_float32(kernel, place):
  return jax.jit(jax.grad(PLACES[place](KERNELS[kernel][1])))(*numbers())


CASES = [
  *itertools.product(KERNELS, PLACES, ("outside", "inside"), ("mixed_bfloat16",)),
  *itertools.product(KERNELS, ("plain",), ("inside_of_jit", "batched"), ("mixed_float16",)),
]


def narrow_derivative(kernel, place, derivative, policy):
  marked = mpjax.cast_inputs(KERNELS[kernel][0])
  return jax.make_jaxpr(DERIVATIVES[derivative](PLACES[place](marked), policy))(*numbers())


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(("kernel", "place", "derivative", "policy"), CASES)
def test_a_kernel_and_its_derivative_are_narrow_in_every_place(kernel, place, derivative, policy):
  closed = narrow_derivative(kernel, place, derivative, policy)
  assert contractions(closed) and not wide_contractions(closed, COMPUTE[policy])
  assert not [e for e in equations(closed) if e.primitive.name.startswith("mpjax_cast_inputs")]


@pytest.mark.quick(every=3)
@in_turns(
  ("place", "derivative", "kernel", "policy"),
  *map(list, (PLACES, DERIVATIVES, KERNELS, COMPUTE)),
  turning=3,
)
def test_the_derivative_of_a_kernel_is_that_of_float32(place, derivative, kernel, policy):
  (got,) = jax.jit(jaxpr_as_fun(narrow_derivative(kernel, place, derivative, policy)))(*numbers())
  want = gradient_in_float32(kernel, place)
  assert got.dtype == jnp.float32
  assert jnp.linalg.norm(got - want) < 2.0**-5 * jnp.linalg.norm(want)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
  "place",
  [pytest.param(place, marks=pytest.mark.slow if n % 2 else ()) for n, place in enumerate(PLACES)],
)
def test_without_a_policy_it_changes_no_bit(place, operands):
  marked, plain = PLACES[place](mpjax.cast_inputs(widening)), PLACES[place](widening)
  assert jax.jit(marked)(*operands) == jax.jit(plain)(*operands)
  got, want = (np.asarray(jax.jit(jax.grad(f))(*operands)) for f in (marked, plain))
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)  # sums of gradients in any order


def test_it_is_differentiated_twice_as_without_it(operands):
  got, want = (
    jax.jit(jax.hessian(PLACES["plain"](kernel)))(*operands)
    for kernel in (mpjax.cast_inputs(widening), widening)
  )
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_forward_mode_is_narrow_too(operands):
  marked = lambda w, x: mpjax.cast_inputs(widening)(x, w).sum()
  for fn in (
    lambda w, x: jax.jvp(mpjax.autocast(marked, "mixed_bfloat16"), (w, x), (w, x))[1],
    mpjax.autocast(lambda w, x: jax.jvp(marked, (w, x), (w, x))[1], "mixed_bfloat16"),
  ):
    assert not wide_contractions(jax.make_jaxpr(fn)(*operands), "bfloat16")
    want = jax.jvp(lambda w, x: widening(x, w).sum(), operands, operands)[1]
    assert abs(fn(*operands) - want) < 0.05 * abs(want)


def test_a_trace_that_was_made_without_a_policy_is_narrow_under_one(operands):
  """JAX keeps the trace of a jitted function, whoever calls it."""
  layer = jax.jit(lambda w, x: mpjax.cast_inputs(widening)(x, w).sum())
  layer(*operands)
  for policy, compute in COMPUTE.items():
    grad = jax.grad(mpjax.autocast(layer, policy))
    assert not wide_contractions(jax.make_jaxpr(grad)(*operands), compute)


class Options:
  """No pytree, and not hashable either."""

  __hash__ = None


@pytest.mark.parametrize("by", ["position", "keyword"])
def test_what_is_no_array_reaches_the_function_as_it_is(by, operands):
  options = {
    "flavor": "fast",
    "causal": True,
    "scale": 0.5,
    "numpy_scale": np.float32(2),
    "heads": 2,
    "nothing": None,
    "function": jnp.tanh,
    "options": Options(),
    "dtype": jnp.float16,
  }
  seen = []

  def kernel(x, mask, flavor, causal, scale, numpy_scale, heads, nothing, function, options, dtype):
    seen.append((flavor, causal, scale, numpy_scale, heads, nothing, function, options, dtype))
    assert mask.dtype == jnp.bool_
    return {"y": function(x) * scale, "flag": mask}

  marked = mpjax.cast_inputs(kernel)
  given = ((*options.values(),), {}) if by == "position" else ((), options)
  fn = lambda w, x: marked(x @ w, x > 0, *given[0], **given[1])["y"].sum()
  cast = mpjax.autocast(fn, "mixed_bfloat16")
  for run in (fn, jax.jit(fn), cast, jax.grad(cast), mpjax.autocast(jax.grad(fn), "float16")):
    seen.clear()
    run(*operands)
    assert seen and all(given == tuple(options.values()) for given in seen)


def test_an_array_that_is_no_float32_keeps_its_dtype(operands):
  found = []

  def kernel(*arrays):
    found.append([x.dtype.name for x in arrays])
    return arrays[0]

  others = [jnp.arange(2), jnp.ones(2, jnp.float16), jnp.ones(2, bool), jnp.ones(2, jnp.complex64)]
  mpjax.autocast(lambda w: mpjax.cast_inputs(kernel)(w, *others), "mixed_bfloat16")(operands[0])
  assert ["bfloat16", "int32", "float16", "bool", "complex64"] in found


def test_a_float32_result_stays_float32(operands):
  """A kernel's normalizers, say: how each result leaves is the function's to say."""
  kernel = mpjax.cast_inputs(lambda x: (x, jnp.sum(x, -1, dtype=jnp.float32)))
  cast = mpjax.autocast(lambda w: [jnp.cos(y) for y in kernel(w)], "mixed_bfloat16")
  cosines = [e for e in equations(jax.make_jaxpr(cast)(operands[0])) if e.primitive.name == "cos"]
  assert [e.invars[0].aval.dtype for e in cosines] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
  ("outer", "inner", "compute"),
  [
    ("mixed_bfloat16", "mixed_float16", "float16"),
    ("mixed_float16", "mixed_bfloat16", "bfloat16"),
    ("float32", "mixed_bfloat16", "bfloat16"),
    ("mixed_bfloat16", "float32", "float32"),
  ],
)
def test_the_innermost_policy_governs(outer, inner, compute, operands):
  fn = lambda w, x: mpjax.cast_inputs(widening)(x, w).sum()
  nested = mpjax.autocast(mpjax.autocast(fn, inner), outer)
  assert not wide_contractions(jax.make_jaxpr(nested)(*operands), compute)


def test_a_scope_in_float32_calls_it_as_it_is(operands):
  def fn(w, x):
    with jax.named_scope("exact"):
      return mpjax.cast_inputs(widening)(x, w).sum()

  policies = mpjax.PolicyMap({"exact": "float32"}, default="mixed_bfloat16")
  closed = jax.make_jaxpr(mpjax.autocast(fn, policies))(*operands)
  assert {c.factors for c in contractions(closed)} == {("float32", "float32")}


def test_what_the_function_raises_is_raised_where_it_is_asked_for(operands):
  fn = lambda w, x: mpjax.cast_inputs(without_float32)(x, w).sum()
  for run in (fn, jax.jit(fn), jax.grad(fn), jax.jit(jax.grad(fn))):
    with pytest.raises(NotImplementedError, match="16-bit operands only"):
      run(*operands)
  wrong = lambda w, x: mpjax.cast_inputs(without_float32)(x, w[:3])
  with pytest.raises(NotImplementedError, match="16-bit operands only") as caught:
    mpjax.autocast(wrong, "mixed_bfloat16")(*operands)
  assert any("bfloat16 operands: dot_general" in note for note in caught.value.__notes__)


def test_results_of_other_shapes_are_refused(operands):
  packed = mpjax.cast_inputs(lambda x: x if x.dtype == jnp.float32 else x.reshape(-1))
  with pytest.raises(ValueError, match=r"same shapes in every format; .*f32\[4,4\].*bf16\[16\]"):
    mpjax.autocast(packed, "mixed_bfloat16")(operands[0])


def test_a_module_is_refused():
  with pytest.raises(TypeError, match=r"the Python module jax\.lax.*jax\.lax\.name = "):
    mpjax.cast_inputs(lax)
  for module in (nn.Dense(3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))):
    with pytest.raises(TypeError, match=r"a Flax module.*apply_policy"):
      mpjax.cast_inputs(module)
  for kind in (nn.Dense, nnx.Linear):
    with pytest.raises(TypeError, match=rf"the class {kind.__name__}, which makes a Flax module"):
      mpjax.cast_inputs(kind)
  with pytest.raises(TypeError, match=r"takes a function; got f32\[2\]"):
    mpjax.cast_inputs(jnp.ones(2))


def test_a_function_of_a_foreign_module_is_marked_in_its_place(operands):
  attention = types.ModuleType("attention")
  attention.kernel = without_float32
  layer = lambda w, x: attention.kernel(x @ w, w).sum()
  attention.kernel = mpjax.cast_inputs(attention.kernel)
  assert attention.kernel.__name__ == "without_float32"
  grad = jax.grad(mpjax.autocast(layer, "mixed_bfloat16"))
  assert not wide_contractions(jax.make_jaxpr(grad)(*operands), "bfloat16")


# Kernels that others wrote, lowered for a TPU, which needs none ---------------------------------

LENGTH, FEATURES = 256, 128


def flash():
  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

  return functools.partial(flash_attention, causal=True)


def splash():
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * 2)
  return jax.vmap(kernels.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1))


def megablox():
  from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

  def experts(query, key, value):
    rows, matrices = query.reshape(-1, FEATURES), key.reshape(-1, FEATURES, FEATURES)
    sizes = jnp.full(len(matrices), len(rows) // len(matrices), jnp.int32)
    return gmm(rows, matrices, sizes, rows.dtype)

  return experts


def around(kernel, place):
  """A loss of a projection and a kernel that stands in some place."""

  def attend(w, x):
    operand = (x @ w).reshape(1, 2, LENGTH, FEATURES)
    return jnp.mean(kernel(operand, operand, operand)) * jnp.ones(())

  places = {
    "plain": attend,
    "checkpoint": jax.checkpoint(attend),
    "scan": lambda w, x: lax.scan(lambda c, _: (c + attend(w, x), None), 0.0, None, length=2)[0],
    "vmap": lambda w, x: jax.vmap(attend, (None, 0))(w, x[None]).sum(),
  }
  return places[place]


def returned_by_kernels(fn, *args):
  """The dtypes that each TPU kernel in a program returns."""
  text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
  calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
  return [set(re.findall(r"(b?f\d+)>", line.rsplit("->", 1)[1])) for line in calls]


@pytest.mark.quick(every=2)
@pytest.mark.parametrize(
  ("make", "place", "gradient"),
  [
    *((make, "plain", "outside") for make in (flash, splash, megablox)),
    (splash, "plain", "inside"),
    (flash, "checkpoint", "outside"),
    (flash, "scan", "inside"),
    (flash, "vmap", "outside"),
  ],
)
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_the_pallas_kernels_of_jax_take_16_bits_forwards_and_backwards(make, place, gradient):
  w = jnp.full((FEATURES, FEATURES), 0.01)
  x = jnp.ones((2 * LENGTH, FEATURES))

  def derived(kernel, policy=None):
    loss = around(kernel, place)
    if policy is None:
      return jax.grad(loss)
    if gradient == "inside":
      return mpjax.autocast(jax.grad(loss), policy)
    return jax.grad(mpjax.autocast(loss, policy))

  wide = returned_by_kernels(derived(make()), w, x)
  narrow = returned_by_kernels(derived(mpjax.cast_inputs(make()), "mixed_bfloat16"), w, x)
  assert all(results == {"f32"} for results in wide)
  assert all("bf16" in results for results in narrow)  # the sums of a softmax stay float32
  assert len(narrow) == len(wide) > 1


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("derived", [lambda fn: fn, jax.grad], ids=["value", "gradient"])
def test_attention_runs_in_float16_on_a_cpu(derived, standard_promotion):
  """JAX asks for its float32 sums by an algorithm that CPUs do not have."""
  q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))

  def attend(w, q):
    heads = mpjax.cast_inputs(jax.nn.dot_product_attention)(q * w, q, q)
    return jax.jit(mpjax.cast_inputs(jax.nn.dot_product_attention))(heads, q, q).sum()

  for fn in (derived(attend), jax.jit(derived(attend))):
    cast = derived(mpjax.autocast(attend, "mixed_float16"))
    np.testing.assert_allclose(cast(jnp.float32(1.5), q), fn(jnp.float32(1.5), q), rtol=0.01)
