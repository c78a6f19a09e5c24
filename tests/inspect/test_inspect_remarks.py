"""explain: what a policy overrides or cannot promise is said, and is no promise kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import mpjax
from mpjax.inspect import explain
from zoo.cases import CASES

BOTH = pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
BF16 = "mixed_bfloat16"
W, X = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((2, 8), jnp.float32)
IMAGE, FILTER = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 8, 8), (3, 3, 3, 3)))
TABLE = np.ones((1, 8), np.float32)
ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))


def kinds(report):
  return [remark.kind for remark in report.remarks]


def is_kept(report):
  """Whether the report says so; all three ways to say it must agree."""
  assert report.keeps_promise == ("does what it promises" in report.summary)
  assert report.keeps_promise == (not any(r.breaks_promise for r in report.remarks))
  return report.keeps_promise


# What a rule for operations narrows --------------------------------------------------------------


def relaxed(w, x):
  with jax.named_scope("relaxation"):
    h = x @ w
    return h + 0.002 * jnp.tanh(h @ w)


def biased(w, x):
  with jax.named_scope("relaxation"):
    return x @ w + w[:1]


@BOTH
def test_a_small_step_that_a_rule_keeps_in_16_bits_is_named(policy):
  policies = mpjax.PolicyMap({"add@relaxation": policy}, default=policy)
  report = explain(relaxed, policies, W, X)
  (remark,) = report.remarks
  assert remark.kind == "narrowed" and remark.module == "relaxation"
  assert "add in" in remark.text and "small step" in remark.text
  assert not is_kept(report)
  assert is_kept(explain(relaxed, policy, W, X)) and is_kept(explain(biased, policies, W, X))
  wide = mpjax.PolicyMap({"add@relaxation": "float32"}, default=policy)
  assert not explain(relaxed, wide, W, X).remarks


def descended(w, x):
  grad = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
  with jax.named_scope("step"):
    return w - 1e-3 * grad


def with_momentum(w, x):
  grad = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
  return jax.jit(lambda w, grad: w - 1e-3 * jnp.sign(grad))(w, grad)


@BOTH
@pytest.mark.parametrize("fn", [descended, with_momentum])
def test_a_step_of_a_parameter_that_a_rule_keeps_in_16_bits_is_named(policy, fn):
  report = explain(fn, mpjax.PolicyMap({}, default=policy, ops={"sub": "lower"}), W, X)
  assert kinds(report) == ["narrowed"] and not is_kept(report)
  assert "sub in" in report.summary and "change of a parameter" in report.summary
  assert is_kept(explain(fn, mpjax.PolicyMap({}, default=policy, ops={"mul": "lower"}), W, X))
  assert is_kept(explain(fn, policy, W, X))


def test_a_rule_by_path_keeps_a_step_of_a_parameter_too():
  policies = mpjax.PolicyMap({"sub@step": BF16}, default=BF16)
  report = explain(descended, policies, W, X)
  assert kinds(report) == ["narrowed"] and report.remarks[0].module == "step"


def added(c, h):
  with jax.named_scope("sum"):
    return c + h


ADDING = {
  "scan": lambda w, x, n: lax.scan(lambda c, _: (added(c, x @ w), None), x @ w, None, length=n)[0],
  "fori": lambda w, x, n: lax.fori_loop(0, n, lambda _, c: added(c, jnp.tanh(x @ w)), x @ w),
  "jit": lambda w, x, n: lax.scan(
    lambda c, h: (jax.jit(added)(c, h * 2), None), x[0], jnp.stack([x @ w] * n)[:, 0]
  )[0],
  "cond": lambda w, x, n: lax.scan(
    lambda c, _: (lax.cond(c.sum() > 0, lambda c: added(c, x @ w), lambda c: c, c), None),
    x @ w,
    None,
    length=n,
  )[0],
}


@pytest.mark.parametrize("fn", ADDING.values(), ids=ADDING)
def test_a_long_sum_that_a_rule_keeps_in_16_bits_is_named(fn):
  policies = mpjax.PolicyMap({"add@(.*/)?sum": BF16}, default=BF16)
  report = explain(lambda w, x: fn(w, x, 300), policies, W, X)
  assert "narrowed" in kinds(report) and not is_kept(report)
  assert "add in bfloat16" in report.summary and "running sum" in report.summary
  assert is_kept(explain(lambda w, x: fn(w, x, 300), BF16, W, X))
  assert is_kept(explain(lambda w, x: fn(w, x, 4), policies, W, X))


# What the author asked for -----------------------------------------------------------------------


PRECISIONS = {
  "matmul": lambda w, x: jnp.matmul(x, w, precision="highest"),
  "einsum": lambda w, x: jnp.einsum("bd,dk->bk", x, w, precision=lax.Precision.HIGH),
  "an algorithm": lambda w, x: lax.dot_general(
    x, w, ROWS_BY_COLUMNS, precision=lax.DotAlgorithmPreset.F32_F32_F32
  ),
  "in a jit": lambda w, x: jax.jit(lambda x: jnp.dot(x, w, precision="float32"))(x),
  "in a scan": lambda w, x: lax.scan(
    lambda c, _: (jnp.dot(c, w, precision="highest"), None), x, None, length=3
  )[0],
}


@BOTH
@pytest.mark.parametrize("fn", PRECISIONS.values(), ids=PRECISIONS)
def test_a_precision_that_is_overridden_is_said(policy, fn):
  report = explain(fn, policy, W, X)
  assert kinds(report) == ["precision"] and not is_kept(report)
  assert report.remarks[0].line.file == __file__
  assert "with precision=" in report.summary and "overridden by the policy" in str(report)


def test_a_convolution_and_a_gradient_say_it_too():
  fn = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", precision="highest")
  report = explain(fn, BF16, FILTER, IMAGE, grad=True)
  assert kinds(report) == ["precision"] and report.remarks[0].count == 2
  assert "conv_general_dilated with precision=HIGHEST" in report.remarks[0].text


FORMATS = {"mixed_bfloat16": jnp.float16, "mixed_float16": jnp.bfloat16}


@BOTH
def test_the_other_format_to_which_an_author_cast_is_said(policy, standard_promotion):
  dtype = FORMATS[policy]
  fn = lambda w, x: (x.astype(dtype) @ w) @ w.astype(dtype)
  report = explain(fn, policy, W, X)
  assert kinds(report) == ["format"] and report.remarks[0].count == 2
  assert f"runs in {jnp.dtype(dtype).name}" in report.summary and not is_kept(report)
  assert report.remarks[0].line.file == __file__
  own = explain(fn, f"mixed_{jnp.dtype(dtype).name}", W, X)
  assert not own.remarks and is_kept(own)
  in_float32 = mpjax.PolicyMap({"own": "float32"}, policy)
  assert not explain(jax.named_scope("own")(fn), in_float32, W, X).remarks


@BOTH
def test_a_precision_that_holds_is_not_remarked(policy):
  moved = lambda w, x, order: jnp.matmul(x, order, precision="highest") @ w
  report = explain(moved, policy, W, X, W)
  assert not report.remarks and is_kept(report)
  assert report.narrow_share == 0.5 and "precision=HIGHEST" in report.wide[0].reason


def test_a_precision_that_no_policy_overrides_is_not_remarked():
  fn = PRECISIONS["matmul"]
  with_rule = mpjax.PolicyMap({"exact": "float32"}, default=BF16)
  scoped = lambda w, x: jax.named_scope("exact")(fn)(w, x) @ w
  inside = lambda w, x: mpjax.autocast(fn, "float32")(w, x) @ w
  default = lambda w, x: jnp.matmul(x, w, precision="default")
  for case, policy in ((scoped, with_rule), (inside, BF16), (default, BF16)):
    report = explain(case, policy, W, X)
    assert not report.remarks and is_kept(report)


@pytest.mark.parametrize("other", [jnp.int8, jnp.float32], ids=["of integers", "mixed"])
def test_matmuls_of_integers_are_counted_apart(other):
  def fn(w, x, codes, values):
    product = lax.dot_general(
      values, codes, ROWS_BY_COLUMNS, preferred_element_type=jnp.promote_types(other, jnp.int32)
    )
    return x @ w, product

  codes, values = jax.ShapeDtypeStruct((8, 8), jnp.int8), jax.ShapeDtypeStruct((2, 8), other)
  with jax.numpy_dtype_promotion("standard"):
    report = explain(fn, BF16, W, X, codes, values)
  assert kinds(report) == ["integers"] and is_kept(report)
  assert report.narrow_share == 1.0 and report.flops == 2 * 2 * 8 * 8
  assert "1 of 1 matmuls" in report.summary and "1 on integers as written" in report.summary
  assert "in float32 for what they compute" not in report.summary and not report.wide
  assert [row.matmuls for row in report.rows] == [1]


# Loops ------------------------------------------------------------------------------------------


def to_a_tolerance(w, x):
  test = lambda c: jnp.abs(c[0] - c[1]).max() > 1e-3
  return lax.while_loop(test, lambda c: (jnp.tanh(c[0] @ w), c[0]), (x, x + 1))


def to_a_flag(w, x):
  def turn(c):
    new = jnp.tanh(c[0] @ w)
    return new, jnp.all(jnp.abs(new - c[0]) < 1e-3), c[2] + 1

  return lax.while_loop(lambda c: ~c[1] & (c[2] < 100), turn, (x, jnp.array(False), 0))


def to_what_a_matmul_chose(w, x):
  limit = (x @ w).sum()
  return lax.while_loop(lambda c: c < limit, lambda c: c + 1.0, jnp.float32(0))


@BOTH
@pytest.mark.parametrize("fn", [to_a_tolerance, to_a_flag, to_what_a_matmul_chose])
def test_a_loop_that_ends_by_floats_of_16_bit_matmuls_is_said(policy, fn):
  report = explain(fn, policy, W, X)
  assert kinds(report) == ["loop"] and not is_kept(report)
  assert report.remarks[0].line.function == fn.__name__
  assert not explain(mpjax.autocast(fn, "float32"), policy, W, X).remarks


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: lax.fori_loop(0, x.shape[0], lambda i, c: jnp.tanh(c @ w), x),
    lambda w, x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ w), (0, x)),
    lambda w, x: lax.while_loop(lambda c: c[0] < 5.0, lambda c: (c[0] + 1, c[1] @ w), (0.0, x)),
    lambda w, x: lax.scan(lambda c, _: (jnp.where(c > 0, c @ w, c), None), x, None, length=3)[0],
  ],
  ids=["fori", "while", "a float count", "scan"],
)
def test_a_loop_that_counts_is_not_remarked(fn):
  assert "loop" not in kinds(explain(fn, BF16, W, X))


# Parameters ---------------------------------------------------------------------------------------


DENSE: Any = nn.Dense(8)
LINEAR = nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
BATCH_FIRST = {
  "a matmul": (lambda x, p: jax.nn.relu(x @ p["w"]).sum(), X, {"w": W}),
  "in a jit": (lambda x, p: jax.jit(lambda x, w: (x @ w).sum())(x, p["w"]), X, {"w": W}),
  "a convolution": (
    lambda x, p: lax.conv(x, p["w"], (1, 1), "SAME").sum(),
    IMAGE,
    {"w": FILTER},
  ),
  "einsum": (lambda x, p: jnp.einsum("bd,dk->bk", x, p[0]).sum(), X, [W, W]),
  "Linen": (
    lambda x, v: DENSE.apply(v, x).sum(),
    X,
    {"params": {"kernel": W, "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}},
  ),
  "NNX": (lambda x, model: model(x).sum(), X, LINEAR),
  "a dict": (
    lambda b, p: jnp.mean((b["x"] @ p["w"] - b["y"]) ** 2),
    {"x": X, "y": X},
    {"w": W, "b": W},
  ),
  "a pair": (lambda b, p: jnp.mean((b[0] @ p["w"] - b[1]) ** 2), (X, X), {"w": W}),
  "two layers": (
    lambda b, p: (jnp.tanh(b["x"] @ p[0]["kernel"]) @ p[1]["kernel"]).sum(),
    {"x": X},
    [{"kernel": W}, {"kernel": W}],
  ),
  "labels": (
    lambda b, p: jax.nn.log_softmax(b[0] @ p[0])[jnp.arange(2), b[1]].sum(),
    (X, jax.ShapeDtypeStruct((2,), jnp.int32)),
    [W],
  ),
  "images in a dict": (
    lambda b, p: (lax.conv(b["image"], p[0], (1, 1), "SAME").mean() - b["y"]).mean(),
    {"image": IMAGE, "y": jax.ShapeDtypeStruct((), jnp.float32)},
    [FILTER],
  ),
  "a dict, Linen": (
    lambda b, v: DENSE.apply(v, b["x"]).sum(),
    {"x": X},
    {"params": {"kernel": W, "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}},
  ),
  "a dict, NNX": (lambda b, model: model(b["x"]).sum(), {"x": X}, LINEAR),
  "tokens": (
    lambda tokens, p: (p["table"][tokens] @ p["w"]).sum(),
    jax.ShapeDtypeStruct((3,), jnp.int32),
    {"table": W, "w": W},
  ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("case", BATCH_FIRST)
def test_a_batch_that_is_taken_for_the_parameters_is_said(case, grad):
  fn, *args = BATCH_FIRST[case]
  if grad and case == "tokens":
    with pytest.raises(ValueError, match="Set argnums"):
      explain(fn, BF16, *args, grad=True)
    return
  report = explain(fn, BF16, *args, grad=grad)
  assert "batch" in kinds(report) and not is_kept(report)
  assert "pass the parameters first, or set argnums" in report.summary


INDEX = jax.ShapeDtypeStruct((8,), jnp.int32)
SOUND = {
  "a weight on the left": (lambda p, b: (p["w"] @ b["x"]).sum(), {"w": W}, {"x": W}, {}),
  "weights of a batch": (
    lambda p, b: (p["kernel"] @ b["weights"]).sum() + (b["x"] @ p["kernel"]).sum(),
    {"kernel": W},
    {"x": X, "weights": W},
    {},
  ),
  "a bias on the left": (
    lambda p, b: jnp.mean((p["w"] @ b["x"] + p["b"] - b["y"]) ** 2),
    {"w": W, "b": W},
    {"x": W, "y": W},
    {},
  ),
  "indices among them": (
    lambda p, b: ((b["x"] @ p["w"]) + p["table"][p["index"]][:2]).sum(),
    {"w": W, "table": W, "index": INDEX},
    {"x": X},
    {},
  ),
  "argnums": (lambda x, p: (x @ p["w"]).sum(), X, {"w": W}, {"argnums": 1}),
  "a weight and a batch": (lambda w, b: (b["x"] @ w).sum(), W, {"x": X}, {}),
  "the weight on the left": (lambda w, b: (w @ b["x"].T).sum(), W, {"x": X}, {}),
  "two arrays": (lambda w, x: (x @ w).sum(), W, X, {}),
  "a tree": (lambda p, b: (p["w"] @ b["x"]).sum(), {"w": W}, {"x": W}, {}),
  "NNX": (lambda m, x: m(x).sum(), LINEAR, X, {}),
  "tokens, then an NNX model": (
    lambda t, m: m(jnp.zeros((3, 8))).sum() + t.sum(dtype=jnp.float32) * 0.0,
    jax.ShapeDtypeStruct((3,), jnp.int32),
    LINEAR,
    {},
  ),
}


@pytest.mark.parametrize("case", SOUND)
def test_parameters_that_stand_in_their_place_are_not_remarked(case):
  fn, *args, options = SOUND[case]
  assert not explain(fn, BF16, *args, **options).remarks


MODELS = [case for case in CASES if case.api == "linen"]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_models_are_told_from_their_batches(case):
  model, batch = case.pure(case.module()), case.batch(0)
  swapped = lambda batch, params: model.loss(params, model.state, batch)
  in_place = explain(model.loss, BF16, model.params, model.state, batch)
  assert "batch" not in kinds(in_place)
  assert "batch" in kinds(explain(swapped, BF16, batch, model.params))


# Policies inside ----------------------------------------------------------------------------------


def leaky(params, x):
  return (x @ params["kernel"] * TABLE) @ params["kernel"]


@BOTH
def test_a_region_with_its_own_policy_that_was_not_looked_into_is_said(policy):
  variables = {"params": {"kernel": W, "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}}
  model: Any = mpjax.apply_policy(DENSE, policy)
  cases = [
    (lambda v, x: model.apply(v, x).sum(), variables),
    (lambda v, x: mpjax.autocast(leaky, policy)(v, x).sum(), variables["params"]),
  ]
  for fn, args in cases:
    report = explain(fn, policy, args, X)
    assert kinds(report) == ["policy"] and not is_kept(report)
    assert "not looked into" in report.summary
  assert is_kept(explain(model, None, variables, X))


def test_a_float32_region_has_nothing_to_look_into():
  fn = lambda p, x: mpjax.autocast(leaky, "float32")(p, x) @ p["kernel"]
  report = explain(fn, BF16, {"kernel": W}, X)
  assert not report.remarks and report.narrow_share == pytest.approx(1 / 3)


# Leaks that a person recognizes -------------------------------------------------------------------


def test_leaks_of_one_line_are_one_with_a_count():
  def fn(params, x):
    for n, w in enumerate(params):
      with jax.named_scope(f"layer_{n}"):
        x = (x @ w) * TABLE
    return x @ params[0]

  report = explain(fn, BF16, [W] * 4, X)
  (leak,) = report.leaks
  assert leak.count == 4 and leak.modules == tuple(f"layer_{n}" for n in range(4))
  assert leak.module == "layer_0" and leak.bytes == 4 * 2 * 8 * 2
  assert [row.leaks for row in report.rows] == [1, 1, 1, 1, 0]
  assert "mul (4 times)" in str(report) and "1 place widens" in report.summary


def test_leaks_of_two_lines_are_two():
  def fn(w, x):
    x = (x @ w) * TABLE
    x = (x @ w) * TABLE
    return x @ w

  assert [leak.count for leak in explain(fn, BF16, W, X).leaks] == [1, 1]


NOISE = {
  "normal": lambda key: jax.random.normal(key, (2, 8)),
  "uniform": lambda key: jax.random.uniform(key, (2, 8)),
  "truncated": lambda key: jax.random.truncated_normal(key, -2.0, 2.0, (2, 8)),
  "scaled": lambda key: 0.1 * jax.random.normal(key, (2, 8)) + 1.0,
  "gumbel": lambda key: jax.random.gumbel(key, (2, 8)),
}


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_random_numbers_are_called_so(noise, make):
  fn = lambda w, x, key: (x @ w + noise(key)) @ w
  (leak,) = explain(fn, BF16, W, X, make(0)).leaks
  (cause,) = leak.widened_by
  assert cause.startswith("random numbers at ")


@pytest.mark.parametrize(
  "fn", [jnp.maximum, lambda h, n: jnp.where(h > 0, h, n), lambda h, n: h + n]
)
def test_a_number_that_no_format_holds_is_named_by_its_value(fn):
  report = explain(lambda w, x: fn(x @ w, 70001) @ w, "mixed_float16", W, X)
  (cause,) = report.leaks[0].widened_by
  assert cause.startswith("the number 70001")


# What no policy narrows, and rules that never win -----------------------------------------------


@BOTH
@pytest.mark.parametrize("grad", [False, True])
def test_a_matmul_of_float64_is_a_fault_that_names_the_argument(policy, grad):
  with jax.enable_x64(True):
    x = np.ones((2, 8))
    report = explain(lambda w, x: jnp.tanh(x @ w.astype(x.dtype)), policy, W, x, grad=grad)
    alone = explain(lambda w, x: x @ w, policy, W, x.astype(np.float32))
  assert set(kinds(report)) == {"float64"} and not is_kept(report)
  assert "cast x f64[2,8] to float32" in report.summary and not report.wide
  assert is_kept(alone)


def test_a_constant_of_float64_is_named_too():
  with jax.enable_x64(True):
    report = explain(lambda w, x: (x @ w).astype(jnp.float64) @ np.ones((8, 2)), BF16, W, X)
  assert kinds(report) == ["float64"] and "cast what it reads to float32" in report.summary


@pytest.mark.parametrize("grad", [False, True])
def test_a_matmul_of_complex_numbers_is_named(grad):
  def fn(p, x):  # a spectral layer
    spectrum = jnp.einsum("bki,kio->bko", jnp.fft.rfft(x, axis=1), lax.complex(p["r"], p["i"]))
    return jnp.sum(jnp.fft.irfft(spectrum, 8, axis=1) ** 2)

  p = {"r": jnp.ones((5, 4, 4)), "i": jnp.ones((5, 4, 4))}
  report = explain(fn, "mixed_bfloat16", p, jnp.ones((2, 8, 4)), grad=grad)
  assert set(kinds(report)) == {"complex"} and report.narrow_share == 0
  assert "multiplies complex64, of which there is no 16-bit format" in report.summary


def in_scopes(w, x):
  for name in ("body", "head"):
    with jax.named_scope(name):
      x = x @ w
  return x


@pytest.mark.parametrize(
  ("rules", "shadowed"),
  [
    ({".*": BF16, "head": "float32"}, "'head' never wins, for '.*' above it"),
    ({"body": BF16, "he.*": BF16, "head|body": "float32"}, "for 'body' and 'he.*' above it"),
    ({"head": BF16, "add@head|exp@head|dot_general@head": "float32"}, "for 'head' above it"),
    ({"head": "float32", ".*": BF16}, ""),
    ({"dot_general@head": BF16, "head": "float32"}, ""),
    ({"body": BF16, ".*": "float32"}, ""),
    ({".*": BF16, "head": BF16}, ""),
  ],
)
def test_a_rule_that_never_wins_is_said(rules, shadowed):
  report = explain(in_scopes, mpjax.PolicyMap(rules, default=BF16), W, X)
  assert kinds(report) == ["rule"] * bool(shadowed)
  assert is_kept(report) == (not shadowed)
  assert shadowed in report.summary
