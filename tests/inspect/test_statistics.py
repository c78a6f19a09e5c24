"""Exponent histograms, what an optimizer collects, and what formats keep of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax
from mpjax import inspect
from mpjax._core.formats import read_format, rounded
from mpjax.inspect._histogram import (
  FINITE,
  INF,
  LOWEST,
  NAN,
  ZERO,
  _bin_of,
  _compared,
  _scattered,
  add_counts,
)

FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def spread(count=4000, seed=0):
  """Values over the whole range of float32, subnormals, powers of two and zeros among them."""
  rng = np.random.default_rng(seed)
  values = rng.standard_normal(count) * 2.0 ** rng.integers(-150, 126, count)
  powers = 2.0 ** np.arange(-149, 128)
  return np.concatenate([values, powers, -powers, [0, -0.0]]).astype(np.float32)


def test_every_float32_falls_into_the_bin_that_float64_says():
  values = np.concatenate([spread(), np.array([np.inf, -np.inf, np.nan], np.float32)])
  counted = jax.jit(inspect.histogram)({"x": values})
  magnitudes = np.abs(values.astype(np.float64))
  finite = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
  wanted = np.bincount(np.ceil(np.log2(finite)).astype(int) - 1 - LOWEST, minlength=FINITE)
  np.testing.assert_array_equal(counted.bins()[0, :FINITE], wanted)
  assert counted.bins()[0, [INF, NAN]].tolist() == [2, 1]
  assert counted.bins()[0, ZERO] == np.sum(magnitudes == 0)
  assert counted.largest[0] == finite.max()


def test_both_ways_to_count_agree():
  found = _bin_of(spread(500))
  np.testing.assert_array_equal(_scattered(found), _compared(found))


@pytest.mark.parametrize("name", FORMATS)
def test_what_underflows_is_exact_for_rounding_to_the_nearest(name):
  values = spread()
  report = inspect.range_report(inspect.histogram([values]), name)
  nonzero = values[values != 0]
  with np.errstate(over="ignore"):
    zeros = np.sum(nonzero.astype(read_format(name).dtype).astype(np.float32) == 0)
  assert report.total.underflow == zeros / len(nonzero)


@pytest.mark.parametrize(("name", "last"), [("float16", 65519.99), ("float8_e4m3fn", 464.0)])
def test_what_overflows_is_counted_from_the_rounding_of_the_largest_value(name, last):
  counted = inspect.histogram([jnp.array([1.0, last])])
  assert inspect.range_report(counted, name).total.overflow == 0
  assert inspect.range_report(counted, name, scale=2).total.overflow == 0.5
  beyond = inspect.histogram([jnp.array([1.0, np.nextafter(np.float32(last), np.inf) + 0.01])])
  assert inspect.range_report(beyond, name).total.overflow == 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_a_real_cast(name):
  values = spread()
  to = read_format(name)
  values = values[(np.abs(values) > 2.0**-110) & (np.abs(values) < 2.0**to.top)]
  wanted = values.astype(to.dtype).astype(np.float32)
  np.testing.assert_array_equal(jax.jit(lambda x: rounded(x, to))(values), wanted)


def test_a_count_carries_into_its_high_word_and_never_stalls():
  a = jnp.array([[0, 3], [2**32 - 1, 5]], jnp.uint32)
  assert add_counts(a, a).tolist() == [[1, 6], [2**32 - 2, 10]]
  held = inspect.histogram({"w": jnp.ones(3)})
  near = inspect.Histogram(held.counts.at[1, 0, -LOWEST - 1].set(2**32 - 2), held.largest, ("w",))
  assert (near + held).bins()[0, -LOWEST - 1] == 2**32 + 1


def test_histograms_add_up_in_a_scan_and_refuse_another_tree():
  steps = jnp.arange(1, 5, dtype=jnp.float32)

  def step(total, x):
    return total + inspect.histogram({"g": x}), None

  start = inspect.histogram({"g": jnp.float32(0)})
  total, _ = jax.jit(lambda xs: jax.lax.scan(step, start, xs))(steps)
  assert total.bins().sum() == 5 and total.largest.tolist() == [4.0]
  with pytest.raises(ValueError, match=r"not alike: g, h\. Take both of"):
    _ = start + inspect.histogram({"h": jnp.float32(0)})


def test_a_histogram_shows_in_a_line_and_prints_a_row_for_each_leaf():
  held = inspect.histogram({"b": jnp.array([0.0, jnp.nan]), "w": jnp.array([0.75, 1.0, 3.0])})
  assert repr(held) == ("Histogram(2 leaves, 5 values: 1 zero, 1 NaN, others above 2^-1, up to 3)")
  assert [line.split() for line in str(held).splitlines()[1:]] == [
    ["b", "2", "1", "0", "0", "1"],
    ["w", "3", "0", "2^-1", "3", "0", "0"],
  ]
  assert "<td" in held._repr_html_() and "2^-1" in held._repr_html_()
  assert repr(inspect.histogram({})) == "Histogram(0 leaves, 0 values)"
  nothing = np.zeros((2, 50, 281), np.uint32)
  many = inspect.Histogram(nothing, np.zeros(50), tuple(map(str, range(50))))
  assert len(str(many).splitlines()) < 25 and "and 30 more leaves" in str(many)


def test_a_histogram_shows_where_its_counts_cannot_be_read():
  seen = []

  def step(x):
    held = inspect.histogram(x)
    seen.extend([repr(held), str(held), held._repr_html_()])
    return held

  shapes = jax.eval_shape(step, jnp.ones(3))
  stacked = jax.vmap(inspect.histogram)(jnp.ones((4, 3)))
  gone = inspect.histogram(jnp.ones(3))
  gone.counts.delete()
  assert {*seen, repr(shapes), repr(gone)} == {
    "Histogram(1 leaf, counts u32[2,1,281])",
    "<p>Histogram(1 leaf, counts u32[2,1,281])</p>",
  }
  assert repr(stacked) == "Histogram(1 leaf, counts u32[4,2,1,281])"
  assert repr(jax.tree.map(lambda leaf: None, gone)) == "Histogram(1 leaf, counts not here)"


def test_what_is_no_float_is_left_out():
  tree = {"key": jax.random.key(0), "n": jnp.arange(3), "x": jnp.ones(2, jnp.bfloat16), "no": None}
  assert inspect.histogram(tree).names == ("x",)
  assert inspect.histogram({}).names == ()


def test_an_optimizer_collects_without_changing_a_bit(params):
  plain = optax.sgd(0.1, momentum=0.9)
  collecting = inspect.collect_statistics(plain)
  grads = jax.tree.map(lambda p: 0.25 * p, params)
  updates, _ = plain.update(grads, plain.init(params), params)
  seen, state = jax.jit(collecting.update)(grads, collecting.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, updates, seen)
  collected = inspect.statistics({"opt": state})
  assert int(collected.steps) == 1
  assert collected.gradients.names == ("dense/bias", "dense/kernel")
  assert collected.gradients.largest.tolist() == [0.125, 0.25]
  assert collected.parameters.largest.tolist() == [0.5, 1.0]
  np.testing.assert_array_equal(collected.ratios.bins().sum(axis=1), [3, 6])


def test_a_step_that_the_loss_scaler_skips_is_not_counted_and_every_second_one_can_be(params):
  tx = mpjax.dynamic_loss_scaling(inspect.collect_statistics(optax.sgd(0.1), every=2), init_scale=8)
  step, state = jax.jit(tx.update), tx.init(params)
  for factor in (8.0, np.inf, 8.0, 8.0):  # the scale is 8, then 4
    _, state = step(jax.tree.map(lambda p, f=factor: p * np.float32(f), params), state, params)
  collected = inspect.statistics(state)
  assert int(collected.steps) == 2  # of three applied ones, the first and the third
  assert int(collected.gradients.bins()[:, INF].sum()) == 0
  assert float(collected.gradients.largest[1]) == 2.0  # unscaled by 4


def test_statistics_are_found_in_the_state_of_an_nnx_optimizer():
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, inspect.collect_statistics(optax.sgd(0.1)), wrt=nnx.Param)
  optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model))
  assert set(inspect.statistics(optimizer.opt_state).gradients.names) == {"bias", "kernel"}
  with pytest.raises(ValueError, match=r"Got 0\. Wrap the optimizer: mpjax\.inspect\.collect"):
    inspect.statistics(optax.sgd(0.1).init({}))


def test_the_report_names_the_parameters_that_would_stall_without_float32_masters():
  params = {"moves": jnp.linspace(0.5, 1, 64), "stalls": jnp.linspace(0.5, 1, 64)}
  grads = {"moves": jnp.full(64, 2.0**-6), "stalls": jnp.full(64, 2.0**-11)}
  tx = inspect.collect_statistics(optax.sgd(1.0))
  _, state = tx.update(grads, tx.init(params), params)
  report = inspect.update_report(inspect.statistics(state))
  rows = {row.name: row for row in report.rows}
  assert (rows["moves"].bfloat16, rows["moves"].float16) == (0, 0)
  assert rows["stalls"].bfloat16 == 1 and rows["stalls"].float16 < 1
  kept = params["stalls"].astype(jnp.float16)
  real = np.mean((kept.astype(jnp.float32) - 2.0**-11).astype(jnp.float16) == kept)
  assert rows["stalls"].float16 == real
  assert report.summary.startswith("Of 2 parameters") and "1 in bfloat16" in report.summary


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda h: inspect.range_report(h, "float12"), "one of bfloat16, float16.*Got 'float12'"),
    (lambda h: inspect.range_report(h, scale=3), "scale must be a positive power of two"),
    (lambda h: inspect.range_report(h, scale="max"), "a power of two or 'amax'. Got 'max'"),
    (lambda h: inspect.range_report(h, tolerance=1.5), "tolerance must be a share"),
    (lambda h: inspect.range_report(inspect.histogram([jnp.zeros(3)])), "other than zero. Got no"),
    (lambda h: inspect.record(jnp.sin, "float32"), "holds nothing so"),
  ],
)
def test_bad_input_is_refused_with_what_to_do(call, words):
  with pytest.raises(ValueError, match=words):
    call(inspect.histogram([jnp.ones(3)]))


# Loss scales ----------------------------------------------------------------------------------


def tiny_loss(params, x, y):
  """A regression whose gradients, times 1e-8, are zero in float16."""
  with jax.named_scope("hidden"):
    h = jnp.tanh(x @ params["w1"])
  with jax.named_scope("out"):
    return jnp.float32(1e-8) * jnp.mean(jnp.square(h @ params["w2"] - y))


def regression():
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (64, 8))
  y = jnp.tanh(x @ jax.random.normal(keys[1], (8, 1)))
  shapes = {"w1": (8, 16), "w2": (16, 1)}
  params = {n: 0.3 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys[2:], strict=True)}
  return params, x, y


def final_loss(policy, scale):
  """The loss after 60 steps with a static scale, as float32 computes it."""
  params, x, y = regression()
  tx = mpjax.static_loss_scaling(optax.sgd(2e7), scale)
  grad = mpjax.value_and_grad(mpjax.autocast(tiny_loss, policy))

  def step(carry, _):
    params, state = carry
    _, grads = grad(params, x, y, loss_scale=mpjax.loss_scale(state))
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60)[0][0])
  return float(1e8 * tiny_loss(run(params), x, y))


def test_the_recommended_scale_recovers_the_loss_that_float16_loses_to_underflow():
  params, x, y = regression()
  _, values = jax.jit(inspect.record(jax.grad(tiny_loss), "mixed_float16"))(params, x, y)
  report = inspect.range_report(values.gradients)
  assert report.total.underflow > 0.9 and report.recommended_scale is not None
  start = float(1e8 * tiny_loss(params, x, y))
  wanted = final_loss("float32", 1)
  assert wanted < 0.2 * start
  assert final_loss("mixed_float16", 1) > 0.9 * start  # nothing was learned
  assert final_loss("mixed_float16", report.recommended_scale) == pytest.approx(wanted, rel=0.02)


def test_no_scale_fits_values_that_span_more_than_float16():
  values = jnp.exp2(jnp.arange(-100.0, 0.0))
  report = inspect.range_report(inspect.histogram([values]))
  assert report.recommended_scale is None
  assert "No scale fits" in report.summary and "Use bfloat16" in report.summary
  assert inspect.range_report(inspect.histogram([values]), "bfloat16").recommended_scale


def test_the_scales_named_are_the_last_good_ones():
  report = inspect.range_report(inspect.histogram([jnp.array([3.0, 2.0**-40])]), tolerance=0.25)
  values = np.array([3.0, 2.0**-40])
  with np.errstate(over="ignore"):
    highest, beyond, lowest, below = (
      np.float16(values * scale)
      for scale in (
        report.highest_scale,
        2 * report.highest_scale,
        report.lowest_scale,
        report.lowest_scale / 2,
      )
    )
  assert np.isfinite(highest).all() and np.isinf(beyond).any()
  assert (lowest == 0).mean() <= 0.25 < (below == 0).mean()


# Values by module ---------------------------------------------------------------------------------


def looped(params, x):
  """Scan over checkpointed layers, a branch, and a while loop when not differentiated."""

  def layer(h, w):
    with jax.named_scope("layer"):
      return jnp.tanh(h @ w), None

  h, _ = jax.lax.scan(jax.checkpoint(layer), x, params["stack"])
  with jax.named_scope("branch"):
    h = jax.lax.cond(jnp.sum(h) > 0, lambda h: h @ params["w"], lambda h: 2 * h, h)
  return 1e-6 * jnp.mean(jnp.square(h))  # so that no gradient is as large as an activation


def test_values_are_counted_by_module_through_scan_cond_and_checkpoint_and_the_result_is_the_same():
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "stack": jax.random.normal(keys[0], (3, 4, 4)),
    "w": jax.random.normal(keys[1], (4, 4)),
  }
  x = jax.random.normal(keys[2], (2, 4))
  plain = jax.value_and_grad(looped)
  out, values = jax.jit(inspect.record(plain, "mixed_float16"))(params, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-10), out, plain(params, x)
  )
  activations = dict(
    zip(values.activations.names, values.activations.bins().sum(axis=1), strict=True)
  )
  # Three layers: the carry, cast for a matmul, the matmul and tanh of 2 x 4 values each. What the
  # backward pass computes again is neither counted twice nor taken for a gradient.
  assert activations["layer"] == 3 * (8 + 8 + 8)
  layers = [n for n, name in enumerate(values.gradients.names) if name.startswith("layer")]
  assert layers and all(values.gradients.largest[n] < 1e-4 for n in layers)
  assert "branch" in activations and "branch" in values.gradients.names


def test_values_of_a_while_loop_add_up_over_its_steps():
  def fn(w, x):
    return jax.lax.fori_loop(0, jnp.asarray(x.shape[0]), lambda _, h: jnp.tanh(h @ w), x)

  w, x = jnp.eye(5), jnp.ones((5, 5))
  out, values = inspect.record(fn, "mixed_float16")(w, x)
  np.testing.assert_allclose(out, fn(w, x), rtol=1e-6)
  assert values.activations.bins().sum() >= 5 * 2 * 25
  assert values.gradients.names == ()


@pytest.mark.parametrize("kind", ["function", "model"])
def test_a_compiled_record_is_traced_once(kind):
  traced = []

  def loss(model, x):
    traced.append(x.shape)
    return jnp.mean(jnp.square(model(x) if kind == "model" else x @ model))

  if kind == "model":
    model, compiled = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.jit
  else:
    model, compiled = jnp.ones((4, 2)), jax.jit
  recorded = compiled(inspect.record(loss, "mixed_float16"))
  for _ in range(3):
    _, values = recorded(model, jnp.ones((3, 4)))
  assert len(traced) == 1
  assert values.activations.names


def test_an_nnx_model_is_counted_under_its_attribute_paths():
  model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))

  def loss(model, x):
    return jnp.mean(jnp.square(model(x)))

  _, values = inspect.record(nnx.grad(loss), "mixed_float16")(model, jnp.ones((3, 4)))
  assert {"layers/0", "layers/1"} <= set(values.activations.names)
  assert {"layers/1"} <= set(values.gradients.names)
