"""Products into totals do not leave the range, and outputs come back in their unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _both_formats import DATA, POLICIES, W, both, cases, in_both_formats, matmuls
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


ROWS = {"a": array(np.eye(4)), "b": array(np.eye(4) + 0.25)}
TOTALS = {
  "dot": lambda a, b: jnp.sum(a * b, -1),
  "half_a_square": lambda a, b: jnp.mean(0.5 * (a - b) * (a - b), -1),
  "norm": lambda a, b: jnp.sqrt(a * a + b * b + a * b),
  "negative": lambda a, b: jnp.sum(-a * b + 1.0, -1) / 4,
  "cosine": lambda a, b: (
    jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
  ),
  "logarithm": lambda a, b: jnp.log(a * b + 1.0),
}


@both
@cases(**TOTALS)
def test_products_of_two_values_do_not_leave_the_range_before_they_are_added_up(fn, policy):
  total = lambda w, x: fn(x @ w["a"], x @ w["b"])
  x = 300 * (1 + jnp.arange(16.0).reshape(4, 4) / 16)
  got, want = in_both_formats(total, policy, ROWS, x)
  np.testing.assert_allclose(got, want, rtol=0.03)
  size = jnp.abs(want).mean()
  grad = lambda w, x: jax.grad(lambda w: jnp.mean(total(w, x)) / size)(w)
  got, want = in_both_formats(grad, policy, ROWS, x)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=0.05, atol=0.02 * np.abs(other).max())


def test_a_product_that_only_a_matmul_reads_stays_in_float16():
  fn = lambda w, x: ((x @ w["a"]) * (x @ w["b"])) @ w["a"]
  found = equations(jax.make_jaxpr(mpjax.autocast(fn, "mixed_float16"))(ROWS, jnp.ones((2, 4))))
  (product,) = [e for e in found if e.primitive.name == "mul"]
  assert product.outvars[0].aval.dtype == jnp.float16


MUCH = {
  "unit": lambda h: h * 30000.0 + 60000.0,
  "jitted": lambda h: jax.jit(lambda h: h * 30000.0 + 60000.0)(h),
  "captured": (lambda much: lambda h: h * much + 60000.0)(jnp.float32(30000)),
  "first": lambda h: -30000.0 * h * 2,
  "divided": lambda h: h / 1e-4 * 20,
  "mapped": lambda h: lax.map(lambda h: h * 40000.0, h),
  "array": lambda h: h * np.full(4, 40000.0, np.float32),
}


@in_turns(("fn", "policy"), MUCH, POLICIES)
def test_an_output_in_its_own_unit_stays_in_range(fn, policy):
  found, want = in_both_formats(lambda w, x: fn(x @ w), policy, W, DATA)
  np.testing.assert_allclose(found, want, rtol=0.01)


FEATURES = array(2 + np.sin(np.arange(128)).reshape(4, 32))
HEAD = {
  "v": array(np.eye(32)),
  "w": array(np.full((32, 2), 0.125)),
  "b": array(np.full(2, 60000)),
  "c": array(np.full(2, 40000)),
}
HEADS = {
  "bias": lambda p, x: x @ p["w"] + p["b"],
  "scale": lambda p, x: (x @ p["w"]) * p["c"],
  "one_output": lambda p, x: jnp.einsum("td,d->t", x, p["w"][:, 0]) + p["b"][0],
  "hidden": lambda p, x: jnp.tanh(x @ jnp.eye(32)) @ p["w"] + p["b"],
  "jitted": lambda p, x: jax.jit(jnp.dot)(x, p["w"]) + p["b"],
  "in_scan": lambda p, x: lax.scan(lambda c, x: (c, x @ p["w"] + p["b"]), 0.0, x)[1],
  "mapped": lambda p, x: jax.vmap(lambda x: x @ p["w"] + p["b"])(x),
  "convolution": lambda p, x: lax.conv(x.T[None], p["w"].T[..., None], (1,), "SAME") + p["b"][0],
  "fed_back": lambda p, x: jnp.stack(forecast(p, x @ p["w"] + p["b"], 3)),
  "fed_back_in_scan": lambda p, x: lax.scan(
    lambda y, _: (forecast(p, y, 1)[-1], y), x @ p["w"] + p["b"], None, length=3
  )[1],
}


WEIGHED = {
  "kernel_regression": lambda w, x, y: jax.nn.softmax(jnp.tanh(x @ w) @ x.T) @ y - 300,
  "centroids": lambda w, x, y: (lambda a: jnp.einsum("nk,n->k", a, y[:, 0]) / a.sum(0))(
    jax.nn.softmax(x @ w)
  ),
  "smoothing": lambda w, x, y: w[0, 0] * (jnp.exp(-(x[:, :1] ** 2) - (x[:, :1] ** 2).T) @ y - y),
}


@both
@pytest.mark.parametrize("fn", WEIGHED.values(), ids=WEIGHED.keys())
def test_means_of_data_are_in_their_unit(fn, policy):
  """What a layer gave are the weights: by hand they round, and the data do not."""
  x = jax.random.normal(jax.random.key(0), (40, 8))
  y = 300 + jax.random.normal(jax.random.key(1), (40, 1))
  found, want = in_both_formats(fn, policy, jnp.eye(8) / 4, x, y)
  np.testing.assert_allclose(found, want, atol=0.01 * np.abs(want).max() + 0.01)


def forecast(p, y, steps):
  """What is predicted, and what is predicted of that."""
  found = [y]
  for _ in range(steps):
    y = jnp.tanh((y - 60000) @ p["w"].T) @ p["w"] + p["b"]
    found.append(y)
  return found


@in_turns(("fn", "policy"), HEADS, POLICIES)
def test_what_a_head_predicts_is_read_in_its_own_unit(fn, policy):
  """60,008 is 60,160 in bfloat16, and 60,000 in float16."""
  found, want = in_both_formats(fn, policy, HEAD, FEATURES)
  np.testing.assert_allclose(found, want, rtol=0.004 if fn is HEADS["scale"] else 2e-6)
  error = lambda p, x: jnp.mean((fn(p, x) / 60000 - 1) ** 2)
  (found, want) = in_both_formats(jax.value_and_grad(error), policy, HEAD, FEATURES)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-6), found, want)


@both
def test_a_head_multiplies_in_16_bits_and_its_weights_have_gradients_that_do_not_round(policy):
  def error(p, x):
    return jnp.mean((jnp.tanh(x @ p["v"]) @ p["w"] + p["b"] / 60000) ** 2)

  for fn in (jax.grad(mpjax.autocast(error, policy)), mpjax.autocast(jax.grad(error), policy)):
    first, head, *backward = matmuls(fn, HEAD, FEATURES)
    products = [first, head, *backward]
    assert {v.aval.dtype.itemsize for e in products for v in e.invars} == {2}
    assert [e.outvars[0].aval.dtype.itemsize for e in (first, head)] == [2, 4]
    assert 4 in {e.outvars[0].aval.dtype.itemsize for e in backward}


@both
@cases(
  squares=lambda r: jnp.sum(r * r),
  inner=lambda r: jnp.einsum("bi,bi->", r, r),
)
def test_a_head_is_one_whatever_its_loss_is_and_where_it_is_computed_again(fn, policy):
  def error(p, x):
    return fn((x @ p["w"] + p["b"]) / 60000 - 1)

  for around in (lambda f: f, jax.checkpoint):
    for run in (
      jax.value_and_grad(mpjax.autocast(around(error), policy)),
      mpjax.autocast(jax.value_and_grad(around(error)), policy),
    ):
      found, want = run(HEAD, FEATURES), jax.value_and_grad(error)(HEAD, FEATURES)
      close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-6)
      jax.tree.map(close, found, want)


@both
@pytest.mark.parametrize("spec", ["btd,dk->btk", "btd,dk->bkt", "bdt,dk->tbk", "btd,dk->tkb"])
def test_heads_run_in_any_order_of_their_dimensions(spec, policy):
  x = jnp.ones((2, 32, 4) if spec.startswith("bdt") else (2, 4, 32))
  fn = mpjax.autocast(lambda w, x: jnp.sum(jnp.einsum(spec, x, w) ** 2), policy)
  value, grads = jax.jit(jax.value_and_grad(fn, (0, 1)))(HEAD["w"], x)
  np.testing.assert_allclose(value, 2 * 4 * 2 * 16.0, rtol=0.01)
  np.testing.assert_allclose(
    jax.vmap(fn, (None, 0))(HEAD["w"], x[:, None])[0], value / 2, rtol=0.01
  )
  assert jnp.all(jnp.isfinite(grads[0])) and jnp.all(jnp.isfinite(grads[1]))


@both
@cases(
  of_a_vocabulary=lambda w, x: x @ w,
  of_a_low_rank=lambda w, x: (x @ w[:, :2]) @ w[:2],
  of_a_router=lambda w, x: jax.nn.softmax(x @ w[:, :2]) @ w[:2],
)
def test_other_matmuls_return_16_bits(fn, policy):
  first, *_ = matmuls(mpjax.autocast(fn, policy), jnp.eye(32), FEATURES)
  assert first.outvars[0].aval.dtype.itemsize == 2


@both
def test_the_square_root_of_a_width_times_an_embedding_stays_narrow(policy):
  fn = mpjax.autocast(lambda w, x: jnp.tanh(x @ w * 64.0) / 64.0, policy)
  (product,) = (e for e in equations(jax.make_jaxpr(fn)(W, DATA)) if e.primitive.name == "mul")
  assert product.outvars[0].aval.dtype.itemsize == 2


@both
@cases(
  dot_general=lambda h, q: lax.dot(h, q, preferred_element_type=jnp.float32),
  einsum=lambda h, q: jnp.einsum("bk,kn->bn", h, q),
  matmul=lambda h, q: q.T @ h.T,
)
def test_the_scale_of_integers_comes_before_their_sums_round(fn, policy):
  """Weights that were quantized: the sums of 2,048 products with integers leave float16."""
  q = jnp.asarray(np.random.default_rng(0).integers(1, 128, (2048, 16)), jnp.int8)
  program = lambda w, x: fn(x @ w, q) * 1e-3
  found, want = in_both_formats(program, policy, jnp.full((8, 2048), 0.125), jnp.ones((4, 8)))
  np.testing.assert_allclose(found, want, rtol=1e-3)
