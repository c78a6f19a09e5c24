"""Matmuls of float8 operands: their scales, their derivatives, and which they are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax
from _arrays import array, normal
from _jaxprs import equations
from mpjax._engine.running.float8 import BACKWARD, FORWARD, Scaled, in_float8, scaled
from mpjax._engine.running.matmul_derivatives import Contraction

CASES = {
  "rows": ("ij", "jk", "ik"),
  "transposed": ("ji", "jk", "ik"),
  "from_the_right": ("ij", "kj", "ik"),
  "two_rows": ("aij", "jk", "aik"),
  "two_contracted_turned": ("ikj", "kmj", "im"),
  "all_contracted": ("ij", "ij", ""),
}
SIZES = dict(zip("aijkm", (3, 32, 48, 16, 5), strict=True))
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_side = pytest.mark.parametrize("wide", [0, 1], ids=["left", "right"])
KEY = jax.random.key(0)
# Errors of a whole result, from roundings to 4 bits of mantissa and to 3.
OF_FORWARD, OF_BACKWARD = 0.05, 0.09


def matmul(case="ij jk ik", wide=1):
  left, right, out = case.split() if isinstance(case, str) else case
  summed = [d for d in left if d in right and d not in out]
  dims = (tuple(tuple(map(side.index, summed)) for side in (left, right)), ((), ()))
  params = {"dimension_numbers": dims, "precision": None}
  return in_float8(Contraction.of(params, wide, jnp.dtype(jnp.bfloat16)))


def draw(case, wide):
  keys = jax.random.split(KEY, 3)
  arrays = [
    jax.random.normal(key, [SIZES[d] for d in dims], jnp.bfloat16)
    for key, dims in zip(keys, case, strict=True)
  ]
  return arrays[wide].astype(jnp.float32), arrays[1 - wide], arrays[2]


def error(ours, exact):
  ours, exact = (np.asarray(x).astype(np.float64) for x in (ours, exact))
  return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def in_formats(fn, *args):
  """The formats of the operands of every matmul of a function, forwards and backwards."""
  found = []
  for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
    if eqn.primitive.name in ("dot_general", "mpjax_float8_tangent"):
      found.append(tuple(v.aval.dtype.name for v in eqn.invars[:2]))
  return found


round_to = jax.jit(scaled, static_argnums=1)


def test_products_of_a_parameter_that_its_author_cast_are_no_float8_matmuls():
  """What contracts nothing, as a Dense of a time, and what contracts everything."""
  half = jnp.bfloat16

  def fn(p, t):
    h = t.astype(half)[:, None] @ p["w"].astype(half)
    return h * jnp.vdot(p["w"].astype(half), h[:1])

  p, t = {"w": jnp.ones((1, 8))}, jnp.arange(4.0)
  formats = in_formats(mpjax.autocast(fn, "mixed_float8"), p, t)
  assert formats and not any("float8" in name for pair in formats for name in pair)
  rows = mpjax.inspect.explain(fn, "mixed_float8", p, t).float8
  assert {row.reason for row in rows} == {"it is a product or a sum of products, no matmul"}


# Scales -------------------------------------------------------------------------------------------


@given(
  st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4),
  st.sampled_from([FORWARD, BACKWARD]),
  st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_a_scale_is_the_smallest_power_of_two_under_which_all_fits(values, dtype, held):
  x = jnp.array(values, jnp.float32).astype(held)
  found = round_to(x, dtype)
  scale, largest = float(found.scale[0]), float(jnp.max(jnp.abs(x.astype(jnp.float32))))
  assert np.frexp(scale)[0] == 0.5
  assert np.isfinite(np.asarray(found.values, np.float32)).all()
  top = float(jnp.finfo(dtype).max)
  assert largest / scale <= top
  assert largest < 2.0**-100 or largest / (scale / 2) > top


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD], ids=["e4m3", "e5m2"])
def test_what_is_not_finite_stays_so_and_moves_no_other(bad, dtype):
  x = jax.random.normal(KEY, (4, 8), jnp.bfloat16)
  with_bad = scaled(x.at[1, 2].set(bad), dtype)
  values = np.asarray(with_bad.values, np.float32)
  assert not np.isfinite(values[1, 2])
  rest = np.isfinite(values)
  assert rest.sum() == values.size - 1
  plain = scaled(x.at[1, 2].set(0), dtype)
  assert np.array_equal(values[rest], np.asarray(plain.values, np.float32)[rest])


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD], ids=["e4m3", "e5m2"])
def test_numbers_near_the_largest_have_a_finite_scale(dtype):
  x = jnp.array([3e38, 1.0], jnp.bfloat16)
  values, scale = round_to(x, dtype)
  assert error(values.astype(jnp.float32) * scale, x) < OF_FORWARD


def test_a_nan_in_one_row_is_in_that_row_of_the_result_alone():
  w, x, _ = draw(CASES["rows"], 1)
  y = matmul()(w, x.at[3, 0].set(jnp.nan))
  assert np.isnan(np.asarray(y[3], np.float32)).all()
  assert np.isfinite(np.asarray(jnp.delete(y, 3, axis=0), np.float32)).all()


@pytest.mark.parametrize("factor", [0.0, 2.0**-60, 2.0**-30, 2.0**40])
def test_operands_of_any_size_multiply_as_exactly(factor):
  w, x, ct = draw(CASES["rows"], 1)
  f = matmul()
  y, back = jax.vjp(f, w, x * jnp.bfloat16(factor))
  plain, plain_back = jax.vjp(f, w, x)
  assert np.array_equal(np.asarray(y), np.asarray(plain * jnp.bfloat16(factor)))
  assert np.array_equal(back(ct)[0], plain_back(ct)[0] * np.float32(factor))
  tiny = jax.vjp(f, w, x)[1](ct * jnp.bfloat16(factor))
  assert np.array_equal(tiny[0], plain_back(ct)[0] * np.float32(factor))


@pytest.mark.parametrize("outlier", [1e3, 1e5])
def test_outliers_take_the_others_bits_and_no_more(outlier):
  """A tensor with one value far above the rest: 1e5 needs e5m2's range, as cotangents have."""
  w, x, ct = draw(CASES["rows"], 1)
  _, back = jax.vjp(matmul(), w, x)
  ct = ct.at[0, 0].set(outlier)
  exact = np.asarray(x, np.float64).T @ np.asarray(ct, np.float64)
  assert error(back(ct)[0][:, 1:], exact[:, 1:]) < OF_BACKWARD


# Values and derivatives ---------------------------------------------------------------------------


@pytest.mark.quick(every=3)
@every_case
@every_side
def test_results_and_gradients_have_the_errors_of_their_formats(case, wide):
  w, x, ct = draw(case, wide)
  exact = lambda w, x: jnp.einsum(
    f"{case[0]},{case[1]}->{case[2]}", *((w, x) if wide == 0 else (x, w))
  )
  y, back = jax.vjp(matmul(case, wide), w, x)
  assert y.dtype == jnp.bfloat16
  want, want_back = jax.vjp(exact, w, x.astype(jnp.float32))
  if case[2]:
    assert error(y, want) < OF_FORWARD
  for ours, theirs, dtype in zip(
    back(ct), want_back(ct.astype(jnp.float32)), (jnp.float32, jnp.bfloat16), strict=True
  ):
    assert ours.dtype == dtype
    assert ours.shape == theirs.shape
    assert error(ours, theirs) < OF_BACKWARD


def test_float8_multiplies_as_float32_does_what_it_holds():
  """So a device without float8 computes the same: sums of products of few bits are exact."""
  w, x, _ = draw(CASES["rows"], 1)
  ours = matmul()(w, x)
  left, right = scaled(x, FORWARD), scaled(w, FORWARD)
  exact = left.values.astype(jnp.float32) @ right.values.astype(jnp.float32)
  scale = (left.scale * right.scale)[0, 0]
  assert np.array_equal(ours, (exact * scale).astype(jnp.bfloat16))


@pytest.mark.parametrize("side", [0, 1], ids=["parameter", "data"])
def test_a_tangent_agrees_with_the_cotangents(side):
  w, x, ct = draw(CASES["rows"], 1)
  f, tangents = matmul(), [jnp.zeros_like(w), jnp.zeros_like(x)]
  tangents[side] = (w, x)[side]
  _, moved = jax.jvp(f, (w, x), tuple(tangents))
  back = jax.vjp(f, w, x)[1](ct)[side]
  dot = lambda a, b: float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))
  scale = np.linalg.norm(np.asarray(moved, np.float64)) * np.linalg.norm(np.asarray(ct, np.float64))
  assert abs(dot(moved, ct) - dot(tangents[side], back)) < OF_BACKWARD * scale


def test_vmap_runs_each_example_under_its_own_scale():
  w, x, ct = draw(CASES["rows"], 1)
  f = matmul()
  xs = jnp.stack([x, x * jnp.bfloat16(1e-4), x * jnp.bfloat16(1e4)])
  ws = jnp.stack([w * 3, w, w * 1e-5])
  each = zip(ws, xs, strict=True)
  assert np.array_equal(jax.vmap(f)(ws, xs), jnp.stack([f(*pair) for pair in each]))
  assert np.array_equal(jax.vmap(f, (None, 0))(w, xs), jnp.stack([f(w, x) for x in xs]))
  assert np.array_equal(jax.vmap(f, (0, None))(ws, x), jnp.stack([f(w, x) for w in ws]))
  back = jax.vmap(lambda w, x: jax.vjp(f, w, x)[1](ct))
  one = [jax.vjp(f, *pair)[1](ct) for pair in zip(ws, xs, strict=True)]
  for ours, theirs in zip(back(ws, xs), zip(*one, strict=True), strict=True):
    assert np.array_equal(ours, jnp.stack(theirs))


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("mapped", [(None, 0), (0, None), (0, 0)], ids=["data", "weights", "both"])
def test_gradients_of_a_mapped_function_sum_over_examples_of_any_scale(mapped):
  w, x, ct = draw(CASES["rows"], 1)
  xs = jnp.stack([x, x * jnp.bfloat16(1e-3), x * jnp.bfloat16(64)])
  ws = jnp.stack([w * 3, w, w * 1e-3])
  args = (ws if mapped[0] == 0 else w, xs if mapped[1] == 0 else x)

  def total(f, *args):
    return jnp.sum(jax.vmap(f, mapped)(*args).astype(jnp.float32) * ct.astype(jnp.float32)[None])

  ours = jax.grad(functools.partial(total, matmul()), (0, 1))(*args)
  exact = functools.partial(total, lambda w, x: x @ w)
  want = jax.grad(exact, (0, 1))(args[0], args[1].astype(jnp.float32))
  assert error(ours[0], want[0]) < OF_BACKWARD
  assert error(ours[1], want[1]) < OF_BACKWARD


@pytest.mark.ci
def test_examples_inside_examples():
  w, x, _ = draw(CASES["rows"], 1)
  f = matmul()
  ws, xs = jnp.stack([w, w * 3]), jnp.stack([x, x * jnp.bfloat16(0.01), x])

  def total(w, xs):
    return jnp.sum(jax.vmap(lambda x: f(w, x))(xs).astype(jnp.float32))

  both = jax.vmap(jax.grad(total), (0, None))(ws, xs)
  assert np.array_equal(both, jnp.stack([jax.grad(total)(w, xs) for w in ws]))


@pytest.mark.ci  # `test_matmul_derivatives.py` holds second derivatives in every run
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev], ids=["forward", "reverse"])
def test_every_block_of_second_derivatives_is_there(outer):
  w, x = jax.random.normal(KEY, (3, 2)) * 0.5, jax.random.normal(KEY, (3, 3))

  def loss(product, w, x):
    return jnp.sum(jnp.tanh(product(w, x).astype(jnp.float32)) ** 2)

  f = matmul()
  ours = outer(
    jax.grad(functools.partial(loss, lambda w, x: f(w, x.astype(jnp.bfloat16))), (0, 1)), (0, 1)
  )
  want = outer(jax.grad(functools.partial(loss, lambda w, x: x @ w), (0, 1)), (0, 1))
  for row, exact in zip(ours(w, x), want(w, x), strict=True):
    for block, other in zip(row, exact, strict=True):
      assert error(block, other) < 0.25


def test_the_gradient_of_a_weight_that_a_scan_shares_sums_in_float32():
  """4,096 times a gradient of one: 256 where sums are bfloat16."""
  f = matmul()

  def loss(w, xs):
    def turn(total, x):
      return total + f(w, x[None]).astype(jnp.float32)[0, 0], None

    return lax.scan(turn, jnp.float32(0), xs)[0]

  found = jax.grad(loss)(jnp.ones((1, 1)), jnp.ones((4096, 1), jnp.bfloat16))
  assert found[0, 0] == 4096


# Which matmuls ------------------------------------------------------------------------------------

EIGHT = ("float8_e4m3fn", "float8_e4m3fn")
SIXTEEN = ("bfloat16", "bfloat16")


def eight(fn, *args, policy="mixed_float8", **options):
  """How many matmuls of a function under a policy are float8, and how many are not."""
  found = in_formats(mpjax.autocast(fn, policy, **options), *args)
  return found.count(EIGHT), found.count(SIXTEEN)


def test_a_matmul_of_one_parameter_multiplies_in_float8():
  w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
  assert eight(lambda w, x: x @ w, w, x) == (1, 0)
  assert eight(lambda w, x: jnp.tanh(x @ w) @ w.T, w, x) == (2, 0)
  assert eight(lambda w, x: jnp.einsum("ij,kj->ki", w, x), w, x) == (1, 0)
  assert eight(lambda w, x: x @ w @ x.T, w, x) == (1, 1), "what is no parameter"
  assert eight(lambda w, x: x.T @ x + w, w, x) == (0, 1), "no parameter at all"
  assert eight(lambda w, x: jnp.einsum("bi,bij->bj", x, w), jnp.ones((4, 8, 8)), x) == (0, 1)
  assert eight(lambda w, x: w @ w @ x.T, w, x) == (0, 2), "two parameters, then none"


def narrow_layers(weights, x):
  """A stack of layers that is cast to bfloat16 once and scanned, as in a model's ``dtype=``."""
  start, stack = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
  return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), start, stack)[0]


def of(convert, multiply=jnp.matmul):
  """A product of an input and a weight that were converted, in float32."""
  return lambda w, x: multiply(*convert(x, w)).astype(jnp.float32)


@pytest.mark.parametrize(
  "fn",
  [
    of(lambda x, w: (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))),
    of(lambda x, w: (x, w.astype(jnp.bfloat16))),
    of(lambda x, w: (x.astype(jnp.bfloat16), w)),
    of(lambda x, w: (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16).T)),
    of(lambda x, w: (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)[:, :4])),
    of(lambda x, w: (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), jax.jit(jnp.matmul)),
    of(lambda x, w: (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), jax.checkpoint(jnp.matmul)),
    of(lambda x, w: (x.astype(jnp.bfloat16), jax.jit(lambda w: w.astype(jnp.bfloat16))(w))),
    of(
      lambda x, w: (
        x.astype(jnp.bfloat16),
        lax.dynamic_index_in_dim(w.astype(jnp.bfloat16)[None], 0, keepdims=False),
      )
    ),
    lambda w, x: narrow_layers(w[None], x).astype(jnp.float32),
  ],
  ids=["both", "weight", "input", "turned", "part", "jit", "checkpoint", "cast", "index", "scan"],
)
def test_a_parameter_that_its_author_cast_to_bfloat16_multiplies_in_float8(fn, standard_promotion):
  assert eight(fn, WEIGHTS[0], INPUTS) == (1, 0)
  loss = lambda w, x: jnp.sum(jnp.sin(fn(w, x)))
  found, want = (
    jax.grad(f, (0, 1))(WEIGHTS[0], INPUTS) for f in (mpjax.autocast(loss, "mixed_float8"), loss)
  )
  for ours, exact in zip(found, want, strict=True):
    assert ours.dtype == jnp.float32
    assert error(ours, exact) < OF_BACKWARD


def test_what_is_no_cast_parameter_or_was_given_another_format_does_not(standard_promotion):
  bf16, w, x = jnp.bfloat16, jnp.ones((8, 8)), jnp.ones((4, 8))
  assert eight(lambda w, x: w.astype(bf16) @ w.astype(bf16), w, x) == (0, 1), "two"
  assert eight(lambda w, x: x.astype(bf16) @ x.astype(bf16).T + w[0, 0], w, x) == (0, 1), "none"
  assert eight(lambda w, x: x.astype(bf16) @ (w.astype(bf16) * x[0, 0].astype(bf16)), w, x) == (
    0,
    1,
  )
  rows = lambda w, x: w.astype(bf16)[jnp.array([0, 1, 5])] @ w.astype(bf16)
  assert eight(rows, w, x) == (1, 0), "rows that are looked up are data"
  turn = lambda h: jnp.tanh(h @ x.astype(bf16).T @ x.astype(bf16))
  loop = lambda w: lax.fori_loop(0, 3, lambda n, h: turn(h), w.astype(bf16))
  assert eight(loop, w) == (0, 2), "what a loop made of one"

  def reasons(fn):
    return [row.reason for row in mpjax.inspect.explain(fn, "mixed_float8", w, x).float8]

  half = lambda w, x: x @ w.astype(jnp.float16)
  assert reasons(half) == ["its author gave it float16"]
  assert "none of them in float8" in mpjax.inspect.explain(half, "mixed_float8", w, x).summary
  wide = lambda w, x: jnp.matmul(x.astype(bf16), w.astype(bf16), preferred_element_type=jnp.float32)
  assert reasons(wide) == ["its author gave it float32"]
  head = lambda w, x: jax.nn.log_softmax((x.astype(bf16) @ w.astype(bf16)).astype(jnp.float32))
  assert reasons(head) == ["it leads into a logarithm"]


@pytest.mark.parametrize(
  "loss",
  [
    lambda logits, labels: -jnp.mean(jax.nn.log_softmax(logits)[:, 0]),
    lambda logits, labels: jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    ),
    lambda logits, labels: jnp.mean(jax.nn.logsumexp(logits + 1, axis=-1)),
    lambda logits, labels: jnp.mean(optax.sigmoid_binary_cross_entropy(logits[:, 0], 1.0)),
    lambda logits, labels: jnp.mean(jnp.log(jax.nn.softmax(logits))),
  ],
  ids=["log_softmax", "integer_labels", "logsumexp", "sigmoid", "log_of_softmax"],
)
def test_the_head_before_a_logarithm_does_not(loss, standard_promotion):
  params = {"body": jnp.ones((8, 8)), "head": jnp.ones((8, 4))}

  def fn(params, x, labels):
    return loss(jax.nn.relu(x @ params["body"]) @ params["head"], labels)

  assert eight(fn, params, jnp.ones((4, 8)), jnp.zeros(4, int)) == (1, 1)
  chunked = lambda *args: jnp.sum(
    lax.map(jax.checkpoint(lambda x: fn(args[0], x, args[2])), args[1])
  )
  assert eight(chunked, params, jnp.ones((2, 4, 8)), jnp.zeros(4, int)) == (1, 1)


def test_a_layer_before_a_square_does():
  def loss(w, x):
    return jnp.mean((jax.nn.softmax(x @ w) - 1) ** 2)

  assert eight(loss, jnp.ones((8, 8)), jnp.ones((4, 8))) == (1, 0)


def test_paths_choose():
  params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}

  def fn(params, x):
    with jax.named_scope("a"):
      x = x @ params["a"]
    with jax.named_scope("b"):
      return x @ params["b"]

  x = jnp.ones((4, 8))
  for rules, default in (
    ({"b": "mixed_bfloat16"}, "mixed_float8"),
    ({"a": "mixed_float8"}, "mixed_bfloat16"),
  ):
    assert in_formats(mpjax.autocast(fn, mpjax.PolicyMap(rules, default)), params, x) == [
      EIGHT,
      SIXTEEN,
    ]
  with pytest.raises(ValueError, match=r"A rule for an operation, here 'dot_general@b'"):
    mpjax.PolicyMap({"dot_general@b": "mixed_float8"}, "float32")


def test_the_backward_pass_inside_a_policy_has_cotangents_in_e5m2():
  def loss(w, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)

  formats = in_formats(
    mpjax.autocast(jax.grad(loss), "mixed_float8"), jnp.ones((8, 8)), jnp.ones((4, 8))
  )
  assert formats.count(EIGHT) == 2
  assert ("float8_e5m2", "float8_e4m3fn") in formats


@pytest.mark.parametrize(
  "around",
  [
    lambda loss: loss,
    jax.jit,
    jax.checkpoint,
    lambda loss: lambda p, x: jnp.sum(lax.map(jax.checkpoint(lambda row: loss(p, row[None])), x)),
  ],
  ids=["plain", "jit", "checkpoint", "chunked"],
)
def test_the_cotangents_of_the_head_inside_a_policy_stay_in_16_bits(around):
  """Of the logits, that is; those of the layer before are e5m2."""
  params = {"body": jnp.ones((8, 8)), "head": jnp.ones((8, 4))}

  def loss(params, x):
    logits = jnp.tanh(jnp.tanh(x @ params["body"]) @ params["body"].T) @ params["head"]
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

  fn = mpjax.autocast(jax.grad(around(loss)), "mixed_float8")
  cotangents = ("float8_e5m2", "float8_e4m3fn")
  formats = in_formats(fn, params, jnp.ones((4, 8)))
  assert formats.count(cotangents) + formats.count(cotangents[::-1]) == 1, "into the second layer"
  plan = mpjax.inspect.explain(jax.grad(around(loss)), "mixed_float8", params, jnp.ones((4, 8)))
  assert "it is the derivative of one that leads into a logarithm" in str(plan)


@pytest.mark.parametrize("policy", ["mixed_float8", "p=f32, c=bf16, o=bf16, m=fp8"])
def test_gradients_of_parameters_are_float32(policy):
  params = {"w": jnp.ones((8, 8)), "b": jnp.zeros((1, 8))}
  loss = mpjax.autocast(lambda p, x: jnp.sum((x @ p["w"] + p["b"]) ** 2), policy)
  grads = jax.grad(lambda p: loss(p, jnp.ones((4, 8))).astype(jnp.float32))(params)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def mlp(w, x):
  for layer in range(w.shape[0]):
    x = x + jnp.tanh(x @ w[layer])
  return jnp.mean(x**2)


def scanned(w, x):
  return jnp.mean(lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, w)[0] ** 2)


WEIGHTS = array(normal(0, 3, 16, 16) * 0.2)
INPUTS = array(normal(1, 8, 16))


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
  "written",
  [
    scanned,
    jax.checkpoint(mlp),
    jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable),
    jax.jit(mlp),
    lambda w, x: lax.cond(x[0, 0] > -100, mlp, lambda w, x: jnp.sum(w), w, x),
    lambda w, x: jnp.mean(jax.vmap(mlp, (None, 0))(w, x[:, None])),
  ],
  ids=["scan", "checkpoint", "dots_saveable", "jit", "cond", "vmap"],
)
def test_a_program_written_in_another_way_has_the_same_gradients(written):
  want = jax.jit(jax.grad(mpjax.autocast(mlp, "mixed_float8")))(WEIGHTS, INPUTS)
  grad = jax.grad(mpjax.autocast(written, "mixed_float8"))
  exact = jax.grad(mlp)(WEIGHTS, INPUTS)
  assert error(want, exact) < OF_BACKWARD
  assert error(jax.jit(grad)(WEIGHTS, INPUTS), exact) < 1.3 * error(want, exact)
  assert any("float8" in name for pair in in_formats(grad, WEIGHTS, INPUTS) for name in pair)


@pytest.mark.quick(every=2, start=1)
@pytest.mark.parametrize("looped", [False, True], ids=["", "scan"])
def test_a_derivative_that_a_user_gave_is_transposed(looped):
  """What it multiplies is tangents, and what rounds them to float8 must be linear in them."""

  @jax.custom_jvp
  def product(w, x):
    return x @ w

  @product.defjvp
  def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    if not looped:
      return x @ w, x @ dw + dx @ w
    return x @ w, lax.scan(lambda y, _: (y + x @ dw, None), dx @ w, None, 1)[0]

  def loss(w, x):
    return jnp.mean(jnp.tanh(product(w, x)) ** 2)

  ours = jax.grad(mpjax.autocast(loss, "mixed_float8"), (0, 1))
  found = ours(WEIGHTS[0], INPUTS)
  for grad, exact in zip(found, jax.grad(loss, (0, 1))(WEIGHTS[0], INPUTS), strict=True):
    assert grad.dtype == jnp.float32
    assert error(grad, exact) < OF_BACKWARD
  _, moved = jax.jvp(mpjax.autocast(loss, "mixed_float8"), (WEIGHTS[0], INPUTS), found)
  assert error(moved, jax.jvp(loss, (WEIGHTS[0], INPUTS), found)[1]) < OF_BACKWARD
  assert any(
    "float8_e5m2" in pair or "float8_e4m3fn" in pair
    for pair in in_formats(ours, WEIGHTS[0], INPUTS)
  )


@pytest.mark.ci
def test_devices_that_share_a_batch_have_the_gradients_of_one():
  mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
  grad = jax.grad(mpjax.autocast(mlp, "mixed_float8"))
  want = jax.jit(grad)(WEIGHTS, INPUTS)
  sharding = jax.NamedSharding(mesh, P("batch"))
  assert error(jax.jit(grad)(WEIGHTS, jax.device_put(INPUTS, sharding)), want) < 1e-2

  over = {"mesh": mesh, "in_specs": (P(), P("batch")), "out_specs": P()}

  def shard(w, x):
    return lax.pmean(jax.grad(mpjax.autocast(mlp, "mixed_float8"))(w, x), "batch")

  mapped = jax.shard_map(
    shard, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=False
  )
  found = jax.jit(mapped)(WEIGHTS, INPUTS)
  assert found.dtype == jnp.float32
  assert error(found, jax.grad(mlp)(WEIGHTS, INPUTS)) < OF_BACKWARD

  def mean(w, x):
    return lax.pmean(mlp(w, x), "batch")

  checked = jax.shard_map(mpjax.autocast(mean, "mixed_float8"), **over)
  found = jax.jit(jax.grad(checked))(WEIGHTS, INPUTS)
  assert found.dtype == jnp.float32
  assert error(found, jax.grad(mlp)(WEIGHTS, INPUTS)) < OF_BACKWARD


def test_columns_over_devices():
  mesh = jax.make_mesh((4, 2), ("batch", "columns"), axis_types=(AxisType.Auto,) * 2)
  grad = jax.jit(jax.grad(mpjax.autocast(mlp, "mixed_float8")))
  weights = jax.device_put(WEIGHTS, jax.NamedSharding(mesh, P(None, None, "columns")))
  inputs = jax.device_put(INPUTS, jax.NamedSharding(mesh, P("batch")))
  assert error(grad(weights, inputs), grad(WEIGHTS, INPUTS)) < 2e-2


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="Explicit meshes came later")
def test_arrays_on_an_explicit_mesh_multiply_in_16_bits_and_it_is_said():
  mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    inputs = jax.device_put(INPUTS, jax.NamedSharding(mesh, P("batch")))
    fn = lambda w, x: jnp.mean(x @ w)
    assert eight(fn, WEIGHTS[0], inputs) == (0, 1)
    report = mpjax.inspect.explain(fn, "mixed_float8", WEIGHTS[0], inputs)
  assert [row.reason for row in report.float8] == ["its arrays lie on an Explicit mesh"]


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["plain", "dtype"])
def test_models_of_flax_multiply_in_float8(dtype, standard_promotion):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = x + nn.MultiHeadDotProductAttention(2, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
      hidden = nn.gelu(nn.Dense(32, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x)))
      return (x + nn.Dense(16, dtype=dtype)(hidden)).astype(jnp.float32)

  x = jax.random.normal(KEY, (2, 4, 16))
  model = mpjax.apply_policy(Block(), "mixed_float8")
  variables = jax.jit(model.init)(KEY, x)
  formats = in_formats(model.apply, variables, x)
  assert formats.count(EIGHT) == 6
  assert formats.count(SIXTEEN) == 2
  ours, want = (jax.jit(m.apply)(variables, x) for m in (model, Block()))
  assert error(ours, want) < OF_FORWARD

  layers = mpjax.apply_policy(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), "mixed_float8")
  graph, state = nnx.split(layers)
  assert in_formats(lambda s: nnx.merge(graph, s)(x), state) == [EIGHT]


@pytest.mark.ci
def test_a_train_step_learns_as_in_bfloat16(standard_promotion):
  data = jax.random.normal(KEY, (64, 16))
  wanted = jnp.tanh(data @ WEIGHTS[0])
  model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(16)])

  def loss_fn(params, batch):
    return jnp.mean((model.apply(params, batch["x"]) - batch["y"]) ** 2)

  losses = {}
  for policy in ("mixed_bfloat16", "mixed_float8"):
    tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2))
    step = mpjax.make_train_step(loss_fn, tx, policy=policy)
    state = mpjax.TrainState.create(params=model.init(KEY, data), tx=tx)
    for _ in range(60):
      state, metrics = step(state, {"x": data, "y": wanted})
    losses[policy] = float(metrics.loss)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
  assert losses["mixed_float8"] < 2 * losses["mixed_bfloat16"] + 1e-3


# Reports ------------------------------------------------------------------------------------------


def test_explain_says_in_which_formats_each_matmul_multiplies_or_why_not():
  params = {"body": jnp.ones((8, 8)), "head": jnp.ones((8, 4))}

  def loss(params, x):
    h = jnp.tanh(x @ params["body"])
    return -jnp.mean(jax.nn.log_softmax(h @ h.T @ h @ params["head"])[:, 0])

  report = mpjax.inspect.explain(loss, "mixed_float8", params, jnp.ones((4, 8)))
  assert [(row.formats, row.reason, row.count) for row in report.float8] == [
    ("e4m3 x e4m3 -> bf16, backward e5m2", "", 1),
    ("in 16 bits", "no single operand is a parameter", 2),
    ("in 16 bits", "it leads into a logarithm", 1),
  ]
  assert report.narrow_share == 1
  assert report.keeps_promise
  assert "FLOP), 1 of them in float8 (40%); nothing widens" in report.summary
  assert "e4m3 x e4m3 -> bf16, backward e5m2" in str(report)
  assert not mpjax.inspect.explain(loss, "mixed_bfloat16", params, jnp.ones((4, 8))).float8


def test_check_measures_what_float8_costs():
  loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
  report = mpjax.inspect.check(loss, "mixed_float8", WEIGHTS[0], INPUTS)
  (row,) = report.gradients
  assert 0.005 < row.gradient.error < OF_BACKWARD


def test_a_scaled_array_is_its_values_times_its_scale():
  x = jax.random.normal(KEY, (8, 8))
  values, scale = scaled(x, FORWARD)
  assert isinstance(scaled(x, FORWARD), Scaled)
  assert error(values.astype(jnp.float32) * scale, x) < 0.03
