"""Matmuls whose derivatives have other dtypes than JAX would give them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import jet
from jax.sharding import PartitionSpec as P

import mpjax
from _jaxprs import contractions, equations, result_dtypes
from _turns import in_turns
from mpjax._engine.running.matmul_derivatives import Contraction, with_wide_cotangent

# The dimensions of both operands and of the result, whose batch stands first, by letters.
CASES = {
  "rows": ("ij", "jk", "ik"),
  "transposed": ("ji", "jk", "ik"),
  "from_the_right": ("ij", "kj", "ik"),
  "batched": ("bij", "jbk", "bik"),
  "two_batches": ("ibjc", "cjbk", "bcik"),
  "two_contracted": ("ijk", "kjm", "im"),
  "two_contracted_turned": ("ikj", "kmj", "im"),
  "all_contracted": ("ij", "ij", ""),
  "batch_turned": ("icb", "bci", "cb"),
  "attention": ("bskh", "gbkts", "bkhgt"),
}
SIZES = dict(zip("bcghijkmst", (2, 3, 2, 4, 5, 3, 4, 2, 6, 3), strict=True))
# Every rounding that a program asks for happens.
COMPILER = {"xla_allow_excess_precision": False}
SOME = ("rows", "two_batches", "two_contracted_turned", "attention")
SOME_CASES = {name: CASES[name] for name in SOME}
SIDES = {"left": 0, "right": 1}
FORMATS = {"bf16": jnp.bfloat16, "f16": jnp.float16}
POLICIES = ("mixed_bfloat16", "mixed_float16")
every_format = pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS.keys())


def contraction_of(case, wide, dtype):
  left, right, out = case
  summed = [d for d in left if d in right and d not in out]
  batch = [d for d in out if d in left and d in right]
  places = [
    tuple(tuple(map(operand.index, dims)) for operand in (left, right)) for dims in (summed, batch)
  ]
  params = {"dimension_numbers": tuple(places), "precision": None}
  return Contraction.of(params, wide, jnp.dtype(dtype))


def draw(case, wide, dtype):
  """The wide operand in float32, with 16-bit values, the other, and a cotangent."""
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=[SIZES[d] for d in dims]), dtype) for dims in case]
  return arrays[wide].astype(jnp.float32), arrays[1 - wide], arrays[2]


def float64(x):
  return np.asarray(x).astype(np.float64)


def assert_close(found, want):
  found, want = float64(found), float64(want)
  assert np.linalg.norm(found - want) <= 0.02 * np.linalg.norm(want)


def product(case, wide, x, y):
  """Of the wide operand and the other, in float64."""
  return np.einsum(f"{case[wide]},{case[1 - wide]}->{case[2]}", float64(x), float64(y))


def cotangents(case, wide, x, y, ct):
  """Of the wide operand and of the other, in float64."""
  wides, others, results = case[wide], case[1 - wide], case[2]
  x, y, ct = map(float64, (x, y, ct))
  return (
    np.einsum(f"{results},{others}->{wides}", ct, y),
    np.einsum(f"{results},{wides}->{others}", ct, x),
  )


@pytest.mark.quick(every=3)
@in_turns(("case", "wide", "dtype"), CASES, SIDES, FORMATS)
def test_it_is_a_matmul_in_16_bits_whose_wide_cotangent_does_not_round(case, wide, dtype):
  x, y, ct = draw(case, wide, dtype)
  fn = with_wide_cotangent(contraction_of(case, wide, dtype))

  @functools.partial(jax.jit, compiler_options=COMPILER)
  def run(x, y, ct):
    out, pullback = jax.vjp(fn, x, y)
    return out, *pullback(ct)

  out, x_bar, y_bar = run(x, y, ct)
  assert [a.dtype for a in (out, x_bar, y_bar)] == [dtype, jnp.float32, dtype]

  close = functools.partial(np.testing.assert_allclose, atol=8 * float(jnp.finfo(dtype).eps))
  close(float64(out), product(case, wide, x, y))
  exact, other = cotangents(case, wide, x, y, ct)
  close(float64(y_bar), other)
  np.testing.assert_allclose(x_bar, exact, atol=1e-5)


def derivatives(fn, x, y, ct):
  """A function's derivatives of every kind, and of its derivatives."""

  def product(x, y):
    return jnp.sum((fn(x, y) * ct).astype(jnp.float32) ** 2)

  both = jax.grad(product, (0, 1))
  return [
    jax.jvp(fn, (x, y), (x, y)),
    jax.linearize(fn, x, y)[1](x, y),
    both(x, y),
    jax.jvp(both, (x, y), (x, y)),
    jax.grad(lambda x: jnp.sum(jax.grad(product)(x, y) ** 2))(x),
    jax.vjp(lambda t: jax.jvp(fn, (x, y), (x, t))[1], y)[1](ct),
    jax.jit(jax.checkpoint(fn))(x, y),
  ]


@pytest.mark.quick(every=3)
@in_turns(("case", "wide"), SOME_CASES, SIDES)
def test_its_derivatives_are_those_of_the_matmul(case, wide):
  contraction = contraction_of(case, wide, jnp.bfloat16)
  fns = with_wide_cotangent(contraction), contraction.run
  run = jax.jit(lambda *args: [derivatives(fn, *args) for fn in fns], compiler_options=COMPILER)
  for found, want in zip(*map(jax.tree.leaves, run(*draw(case, wide, jnp.bfloat16))), strict=True):
    assert_close(found, want)


AXES = {"both": (0, 0), "first": (1, None), "second": (None, -1)}


@pytest.mark.quick(every=3)
@in_turns(("case", "axes", "wide"), SOME_CASES, AXES, SIDES)
def test_it_maps_over_examples(case, axes, wide):
  x, y, ct = map(np.asarray, draw(case, wide, jnp.bfloat16))
  fn = with_wide_cotangent(contraction_of(case, wide, jnp.bfloat16))
  if axes[0] is not None:
    x = np.stack([x, 2 * x, -x], axes[0])
  if axes[1] is not None:
    y = np.stack([y, y + y.dtype.type(1), -y], axes[1])
  gradient = lambda x, y: jax.vjp(fn, x, y)[1](ct)
  mapped = jax.jit(jax.vmap(gradient, axes))(x, y)
  along = jax.jit(lambda x, y: jax.jvp(jax.vmap(fn, axes), (x, y), (1 - x, 1 - y))[1])(x, y)
  for n in range(3):
    one = [v if a is None else np.take(v, n, a) for v, a in zip((x, y), axes, strict=True)]
    for found, want in zip(mapped, cotangents(case, wide, *one, ct), strict=True):
      assert_close(found[n], want)
    x_n, y_n = one
    assert_close(along[n], product(case, wide, 1 - x_n, y_n) + product(case, wide, x_n, 1 - y_n))


def float32_results(dots):
  """The float32 results of matmuls, the gradients of the parameters, of 8 by 8, left out."""
  results = [v for e in dots for v in e.outvars if v.aval.dtype == jnp.float32]
  return [v for v in results if v.aval.shape[-2:] != (8, 8)]


QUERY = np.asarray(np.random.default_rng(0).normal(size=(1, 8, 2, 4)), np.float32)


def attention(w, x):
  heads = (x @ w).reshape(1, 16, 2, 4)
  return jax.nn.dot_product_attention(heads, heads, heads, is_causal=True)


def by_distance(w, x):
  """Attention by distances, which are float32: no matmul rounds them."""
  heads = (x @ w).reshape(16, 2, 4)
  weights = jax.nn.softmax(-((heads[:, None] - heads) ** 2).sum(-1), 1)
  return jnp.einsum("qkh,khd->qhd", weights, heads)


@every_format
@pytest.mark.parametrize("mapped", [False, True], ids=["one", "mapped"])
def test_the_weights_of_float32_scores_get_their_cotangent_in_float32(mapped, dtype):
  policy = {jnp.bfloat16: "mixed_bfloat16", jnp.float16: "mixed_float16"}[dtype]
  x = jax.random.normal(jax.random.key(0), (3, 16, 8))
  gradient = jax.grad(lambda w, x: mpjax.autocast(by_distance, policy)(w, x).sum())
  fn = jax.vmap(gradient, (None, 0)) if mapped else lambda w, x: gradient(w, x[0])
  with jax.numpy_rank_promotion("allow"):
    jaxpr = jax.make_jaxpr(fn)(jnp.eye(8), x)
  dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert {v.aval.dtype for e in dots for v in e.invars} == {jnp.dtype(dtype)}
  wide = [v.aval for v in float32_results(dots)]
  assert [aval.size for aval in wide] == [2 * 16 * 16 * (3 if mapped else 1)]


def masked(scores):
  return jnp.where(np.tri(16, dtype=bool), scores, -1e30)


def softcapped(scores):
  return jnp.tanh(scores / 5) * 5


def turned(scores):
  return masked(scores).T


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("made", [masked, softcapped, turned])
def test_scores_that_were_rounded_leave_the_cotangent_of_their_weights_in_16_bits(made, policy):
  def fn(w, x):
    q = x @ w
    return (jax.nn.softmax(made(q @ q.T)) @ q).sum()

  gradient = jax.grad(mpjax.autocast(fn, policy))
  jaxpr = jax.make_jaxpr(gradient)(jnp.eye(8), jnp.ones((16, 8)))
  dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert len(dots) > 3
  assert not float32_results(dots)


def second_derivatives(loss, operands):
  """Every block of the Hessian, of operand b by operand a."""
  pairs = [(a, b) for a in range(len(operands)) for b in range(len(operands))]
  return jax.jit(lambda *args: [jax.jacfwd(jax.grad(loss, a), b)(*args) for a, b in pairs])(
    *operands
  )


def convolved(w, x):
  kernel = w.reshape(1, 2, 4, 8)
  return lax.conv_general_dilated(
    x.reshape(1, 4, 8, 4), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def scanned(fn):
  """A loop whose turns share a weight."""
  return lambda w, x: lax.scan(lambda c, _: (jnp.tanh(fn(w, c)), None), x, length=2)[0]


def tied(w, x):
  """Scores whose matmul returns float32, and a softmax's weights."""
  return jnp.einsum("qk,kd->qd", jax.nn.softmax((x @ w) @ x.T), x)


TWICE = {
  "matmul": lambda w, x: x @ w,
  "convolution": convolved,
  "scan": scanned(lambda w, x: x @ w),
  "scan_of_scores": scanned(tied),
  "scan_of_examples": scanned(jax.vmap(lambda w, x: x @ w, (None, 0))),
  "scores": attention,
  "distances": by_distance,
  "einsum": tied,
}


@pytest.mark.quick("matmul-mixed_bfloat16", "convolution-mixed_float16")
@in_turns(("fn", "policy"), TWICE, POLICIES)
def test_every_block_of_second_derivatives_is_there(fn, policy):
  """The gradient by the data depends on the parameters, as in a gradient penalty."""
  w = jax.random.normal(jax.random.key(0), (8, 8)) / 3
  x = jax.random.normal(jax.random.key(1), (16, 8))

  def loss(w, x):
    return jnp.sum(fn(w, x) ** 3)

  with jax.numpy_rank_promotion("allow"):
    wanted = second_derivatives(loss, (w, x))
    found = second_derivatives(mpjax.autocast(loss, policy), (w, x))
  for got, want in zip(found, wanted, strict=True):
    assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)


def test_it_runs_in_a_shard_map():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  cast = mpjax.autocast(attention, "mixed_bfloat16")
  x = jax.random.normal(jax.random.key(0), (2, 16, 8))

  def loss(w, x):
    return lax.psum(sum(cast(w, one).sum() for one in x), "data")

  sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
  plain = lambda w, x: sum(cast(w, one).sum() for one in x)
  w = jax.random.normal(jax.random.key(1), (8, 8))
  found, want = (jax.jit(jax.grad(fn))(w, x) for fn in (sharded, plain))
  np.testing.assert_allclose(found, want, rtol=2**-6, atol=2**-6)


def test_where_types_say_how_arrays_are_sharded_it_stays_an_ordinary_matmul():
  mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    heads = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
    heads = jax.device_put(heads, P(None, None, None, "model"))
    scores = jax.random.normal(jax.random.key(1), (1, 2, 8, 8))

    def loss(x, values):
      weights = jax.nn.softmax(jnp.log1p(jnp.abs(scores * x)))
      mixed = jnp.einsum("bhts,bshd->bthd", weights, values)
      return jnp.sum(mixed**2, axis=(0, 1, 2, 3))

    cast = mpjax.autocast(loss, "mixed_bfloat16", argnums=())
    jaxpr = jax.make_jaxpr(jax.grad(cast))(jnp.float32(1), heads)
    assert result_dtypes(jaxpr, "dot_general") == {"bfloat16"}
    assert_close(*(jax.jit(jax.grad(fn))(jnp.float32(1), heads) for fn in (cast, loss)))


OTHERS = {
  "integers": lambda weights, x: weights @ (jnp.arange(16) % 5),
  "a_mask": lambda weights, x: weights @ jnp.eye(16, 3, dtype=bool),
  "another_format": lambda weights, x: jnp.dot(weights, x, preferred_element_type=jnp.bfloat16),
  "bfloat16": lambda weights, x: weights.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16),
  "a_vector": lambda weights, x: weights @ x[:, 0],
  "weights": lambda weights, x: weights @ weights,
  "on_the_right": lambda weights, x: x.T @ weights,
}


@pytest.mark.quick(every=3)
@in_turns(("mix", "policy"), OTHERS, POLICIES)
@pytest.mark.usefixtures("standard_promotion")
def test_weights_mix_whatever_they_mix_in_float32(mix, policy):
  x = jax.random.normal(jax.random.key(0), (16, 16))

  def loss(x):
    out = mix(jax.nn.softmax(jnp.log1p(x**2)), x)
    return jnp.sum(out.astype(jnp.float32) ** 2), out

  def result_and_gradient(fn):
    return jax.jit(lambda x: (fn(x)[1], jax.grad(fn, has_aux=True)(x)[0]))(x)

  cast = mpjax.autocast(loss, policy, argnums=())
  for found, want in zip(*map(result_and_gradient, (cast, loss)), strict=True):
    assert found.dtype == want.dtype
    assert_close(found, want)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("saved", ["dots_saveable", "nothing_saveable"])
def test_a_policy_of_a_checkpoint_sees_the_matmuls(saved, inside):
  checkpointed = jax.checkpoint(attention, policy=getattr(jax.checkpoint_policies, saved))
  cast = mpjax.autocast(checkpointed if inside else attention, "mixed_bfloat16")
  if not inside:
    cast = jax.checkpoint(cast, policy=getattr(jax.checkpoint_policies, saved))

  def matmuls(fn):
    gradient = jax.grad(lambda w, x: fn(w, x).sum())
    return len(contractions(jax.make_jaxpr(gradient)(jnp.eye(8), jnp.ones((16, 8)))))

  assert matmuls(cast) == matmuls(checkpointed)


def test_what_examples_share_is_not_copied_for_each():
  def loss(scale, values, x):
    return jnp.sum(jax.nn.softmax(jnp.log1p(x**2) * scale) @ values)

  cast = jax.vmap(mpjax.autocast(loss, "mixed_bfloat16"), (None, None, 0))
  gradient = jax.grad(lambda *args: jnp.sum(cast(*args)))
  jaxpr = jax.make_jaxpr(gradient)(jnp.float32(1), jnp.ones((16, 8)), jnp.ones((32, 4, 16)))
  largest = max(v.aval.size for e in equations(jaxpr) for v in e.outvars)
  assert largest == 32 * 4 * 16  # all examples' weights


LINEAR = {
  "values": lambda: lambda q: jax.nn.dot_product_attention(QUERY, QUERY, q),
  "weighted": lambda: lambda q: jax.nn.softmax(jnp.log1p(QUERY**2)) @ q.swapaxes(-1, -2),
  "a_tangent": lambda: jax.linearize(lambda q: jax.nn.dot_product_attention(q, q, q), QUERY)[1],
}


def test_it_has_a_taylor_series():
  fn = mpjax.autocast(lambda w, x: jnp.sin(x @ w), "mixed_bfloat16")
  w = jax.random.normal(jax.random.key(0), (4, 4))
  _, (first, second) = jet.jet(lambda t: fn(w, t * QUERY), (jnp.ones(()),), [[jnp.ones(()), 0.0]])
  want = (
    jnp.sin(QUERY @ w),
    (QUERY @ w) * jnp.cos(QUERY @ w),
    -((QUERY @ w) ** 2) * jnp.sin(QUERY @ w),
  )
  assert_close(first, want[1])
  assert_close(second, want[2])


def gated(w, x):
  z = jax.nn.sigmoid(x @ w)
  return (1 - z) * jnp.tanh(x @ w) + z * x


EXPANDED = {
  "gates": gated,
  "exponential": lambda w, x: jnp.exp(x @ w / 4) @ w,
  "elu": lambda w, x: jax.nn.elu(x @ w) @ w,
  "softmax": lambda w, x: jax.nn.softmax(x @ w) @ w,
  "attention": lambda w, x: jax.nn.dot_product_attention(*3 * [(x @ w)[None, :, None]]),
  "called": jax.jit(gated),
  "looked_up": lambda w, x: jnp.tanh((x @ w)[jnp.array([1, 0, 1, 3])]) @ w,
  "convolved": lambda w, x: jax.lax.conv_general_dilated(
    (x @ w)[None, None], w[None, None], (1, 1), "SAME"
  ),
  "recurring": lambda w, x: functools.reduce(lambda h, _: gated(w, h), range(5), x),
}


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("fn", EXPANDED.values(), ids=EXPANDED.keys())
def test_what_has_a_taylor_series_in_float32_has_one_under_a_policy(fn):
  w, x = jax.random.normal(jax.random.key(0), (2, 4, 4)) / 2
  direction = [[jnp.ones_like(x), jnp.zeros_like(x)]]

  def series(fn):
    return lambda w: jet.jet(lambda x: fn(w, x), (x,), direction)

  cast = mpjax.autocast(fn, "mixed_bfloat16")
  for got, want in zip(*(jax.tree.leaves(series(f)(w)) for f in (cast, fn)), strict=True):
    np.testing.assert_allclose(got, want, atol=0.06 * float(jnp.abs(want).max()))

  def energy(fn):
    return jax.grad(lambda w: sum(jnp.sum(t**2) for t in series(fn)(w)[1]))

  found, want = energy(cast)(w), energy(fn)(w)
  np.testing.assert_allclose(found, want, atol=0.06 * float(jnp.abs(want).max()))


def test_what_a_mask_of_no_use_chose_is_differentiated_and_transposed():
  """A transpose knows a mask, and calls a function that is left with no result."""
  x, w = jax.random.normal(jax.random.key(0), (2, 4, 4)) / 2
  seen = jnp.tril(jnp.ones((4, 4), bool))

  def masked(w):
    h = x @ w
    return jnp.where(seen, jax.nn.softmax(h @ h.T / 2), 0) @ h

  def transposed(fn):
    return jax.linear_transpose(jax.linearize(fn, w)[1], w)(fn(w))[0]

  def both(w):
    del w
    return transposed(masked)

  want = transposed(masked)
  for got in (
    transposed(mpjax.autocast(masked, "mixed_bfloat16")),
    mpjax.autocast(both, "mixed_bfloat16")(w),
  ):
    np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("made", LINEAR.values(), ids=LINEAR.keys())
def test_a_linear_function_is_transposed(made):
  def transposed(fn):
    return jax.jit(lambda q: jax.linear_transpose(fn, q)(fn(q))[0])(QUERY)

  linear = made()
  assert_close(transposed(mpjax.autocast(linear, "mixed_bfloat16", argnums=())), transposed(linear))


def test_a_rule_of_ones_own_may_hold_attention():
  attend = lambda q: jax.nn.dot_product_attention(q, q, q)
  fn = jax.custom_jvp(attend)
  fn.defjvp(lambda primals, tangents: jax.jvp(attend, primals, tangents))
  gradient = lambda fn: jax.grad(lambda q: jnp.sum(fn(q) ** 2))(QUERY)
  assert_close(gradient(mpjax.autocast(fn, "mixed_bfloat16", argnums=())), gradient(fn))


def test_two_softmaxes_that_one_matmul_reads_are_both_stored_in_16_bits():
  mix = lambda a, b: jax.nn.softmax(jnp.sin(a)) @ jax.nn.softmax(jnp.sin(b))
  a, b = jax.random.normal(jax.random.key(0), (2, 16, 16))
  cast = mpjax.autocast(mix, "mixed_bfloat16", argnums=())
  _, pullback = jax.vjp(cast, a, b)
  wide = [x for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32 and x.size == a.size]
  assert len(wide) <= 2  # of the sines
  for n in (0, 1):
    loss = lambda fn, n=n: jax.grad(lambda *ab: jnp.sum(fn(*ab) * a), n)(a, b)
    assert_close(loss(cast), loss(mix))


TURNED = ("bij,bjk->ki", "bij,bjk->bki", "bij,bjk->kbi")
SHAPES = {"small": (5, 6, 4), "large": (64, 64, 32)}


@pytest.mark.quick(every=3)
@in_turns(("spec", "sizes", "dtype"), TURNED, SHAPES, FORMATS)
def test_a_compiled_gradient_has_a_kernel_whatever_the_order(spec, sizes, dtype):
  """XLA must not turn the matmul of a wide cotangent into one that it cannot run on a CPU."""
  draw = np.random.default_rng(0).standard_normal
  rows, columns, width = sizes
  scores, values = (
    draw(shape).astype(np.float32) for shape in ((3, rows, columns), (3, columns, width))
  )

  def loss(s, v):
    return jnp.sum(jnp.sin(jnp.einsum(spec, jax.nn.softmax(jnp.sin(s)), v)))

  policy = f"mixed_{jnp.dtype(dtype).name}"
  found, want = (
    jax.jit(jax.grad(fn, (0, 1)))(scores, values)
    for fn in (mpjax.autocast(loss, policy, argnums=()), loss)
  )
  for got, exact in zip(found, want, strict=True):
    assert_close(got, exact)


def perceptron(p, x):
  return jnp.mean((jax.nn.relu(x @ p["up"]) @ p["down"]) ** 2)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_parameter_is_cast_once_for_a_matmul_and_its_derivative(checkpoint):
  """The partitioner gathers each cast of a sharded parameter, so that each is one more gather."""
  p = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
  fn = jax.checkpoint(perceptron) if checkpoint else perceptron
  grad = jax.grad(mpjax.autocast(fn, "mixed_bfloat16"))
  found = equations(jax.make_jaxpr(grad)(p, jnp.ones((2, 4))))
  casts = [e.outvars[0].aval.shape for e in found if e.primitive.name == "convert_element_type"]
  assert casts.count((4, 8)) == casts.count((8, 4)) == 1 + checkpoint  # what is computed again


def test_a_scan_stores_no_cast_of_a_parameter_for_each_turn():
  def loss(w, x):
    return jnp.mean(lax.scan(lambda h, u: (jnp.tanh(h @ w + u), None), x[0], x)[0])

  autocast = mpjax.autocast(loss, "mixed_bfloat16")
  stored = jax.eval_shape(lambda w: jax.vjp(autocast, w, jnp.ones((9, 2, 4)))[1], jnp.eye(4))
  assert {leaf.shape for leaf in jax.tree.leaves(stored)} <= {(4, 4), (9, 2, 4), (2, 4), ()}


def test_second_derivatives_follow_the_cast_that_both_read():
  p = {"up": jnp.eye(4) + 0.25, "down": jnp.eye(4) - 0.5}  # that 16 bits hold
  x = jnp.arange(8.0).reshape(2, 4) / 4

  def penalty(p, x):
    return jnp.sum(jax.grad(perceptron, 1)(p, x) ** 2)

  fn = mpjax.autocast(perceptron, "mixed_bfloat16")
  got = jax.grad(lambda p: jnp.sum(jax.grad(fn, 1)(p, x) ** 2))(p)
  chex.assert_trees_all_close(got, jax.grad(penalty)(p, x), rtol=0.02)
