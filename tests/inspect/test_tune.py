"""The search for the cheapest policy map."""

import html

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import mpjax
from mpjax import inspect
from mpjax._core.policy import as_policy
from mpjax.inspect._policies_by_module import Names, as_text, policy_map, rules_of
from mpjax.inspect._tune_report import Trial

NAMES = Names({"mixed_bfloat16": as_policy("mixed_bfloat16")})
LOW, WIDE = "mixed_bfloat16", "float32"


def cancel(x, w):
  """A small difference of large numbers: 16 bits keep none of it."""
  large = jnp.full(w.shape, 100.0)
  return x @ (w + large) - x @ large


class Cancel(nn.Module):
  @nn.compact
  def __call__(self, x):
    return cancel(x, self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], 8)))


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="first")(x)
    return nn.Dense(8, name="last")(Cancel(name="odd")(jnp.tanh(x)))


class NNXCancel(nnx.Module):
  def __init__(self, rngs):
    self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), (8, 8)))

  def __call__(self, x):
    return cancel(x, self.w[...])


class NNXNet(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.List([nnx.Linear(8, 8, rngs=rngs), NNXCancel(rngs)])

  def __call__(self, x):
    for module in self.body:
      x = module(jnp.tanh(x))
    return x


def plain_problem():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {f"w{n}": 0.3 * jax.random.normal(keys[n], (8, 8)) for n in range(3)}

  def loss(params, x):
    for n in range(3):
      with jax.named_scope(f"layer{n}"):
        x = (cancel if n == 1 else jnp.matmul)(x, params[f"w{n}"])
    return jnp.mean(jnp.square(x))

  return loss, (params, jax.random.normal(keys[3], (16, 8)))


def linen_problem():
  x = jax.random.normal(jax.random.key(0), (16, 8))
  params = LinenNet().init(jax.random.key(1), x)["params"]

  def loss(params, x):
    return jnp.mean(jnp.square(LinenNet().apply({"params": params}, x)))

  return loss, (params, x)


def nnx_problem():
  def loss(model, x):
    return jnp.mean(jnp.square(model(x)))

  return loss, (NNXNet(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (16, 8)))


@pytest.mark.quick(every=3)
@pytest.mark.parametrize(
  ("problem", "planted"),
  [
    (plain_problem, "layer1"),
    (linen_problem, "LinenNet/odd"),
    (nnx_problem, "body/1"),
  ],
  ids=["function", "linen", "nnx"],
)
def test_the_planted_sensitive_module_is_found_and_nothing_else(problem, planted):
  loss, args = problem()
  report = inspect.tune(loss, args)
  assert report.modules == ((planted, "float32"),)
  assert report.policy_map == mpjax.PolicyMap({planted: "float32"}, default="mixed_bfloat16")
  assert eval(report.text, {"mpjax": mpjax}) == report.policy_map
  assert f"<pre>{html.escape(report.text)}</pre>" in report._repr_html_()
  assert report.chosen.within and report.chosen.error <= report.tolerance
  assert report.chosen.policy_map == report.policy_map
  assert report.chosen.tried == f"float32: {planted}; else mixed_bfloat16"
  assert 0 < report.chosen.float32_flops < report.flops
  assert [s.module for s in report.sensitivity if not s.within] == [planted]
  assert report.compilations <= 3 + len(report.sensitivity) + 1
  assert ("leave 'LinenNet/' out" in report.note) == (problem is linen_problem)


def test_a_gradient_that_is_zero_but_for_rounding_sends_nothing_to_float32():
  def loss(p, x):
    hidden = x @ p["w"] + p["b"]  # whose own mean is taken away: the bias has no gradient
    return jnp.square((hidden - hidden.mean(0, keepdims=True)) @ p["head"] - 1).mean()

  keys = jax.random.split(jax.random.key(0), 3)
  p = {"w": jax.random.normal(keys[0], (16, 32)) / 4, "b": jnp.ones((1, 32))}
  p["head"] = jax.random.normal(keys[1], (32, 4)) / 6
  report = inspect.tune(loss, (p, jax.random.normal(keys[2], (64, 16))))
  assert report.policy_map == mpjax.PolicyMap({}, "mixed_bfloat16")


def test_a_module_that_its_author_gave_float32_is_no_error():
  def loss(p, x):
    with jax.named_scope("body"):
      hidden = x @ p["w"]
    with jax.named_scope("head"):
      out = mpjax.autocast(lambda w, h: h @ w, "float32")(p["head"], hidden)
    return jnp.square(out).mean()

  p, x = {"w": jnp.full((16, 16), 0.1), "head": jnp.full((16, 4), 0.1)}, jnp.ones((8, 16)) / 3
  named = mpjax.PolicyMap({"head": "mixed_float16"}, "mixed_bfloat16")
  assert jnp.isfinite(mpjax.autocast(loss, named)(p, x))
  assert inspect.tune(loss, (p, x), tolerance=1e-5).policy_map.default is not None


def test_a_loss_that_low_precision_does_not_hurt_costs_two_compilations():
  def loss(params, x):
    return jnp.mean(jnp.square(x @ params))

  report = inspect.tune(loss, (jnp.eye(4), jnp.ones((2, 4))), candidates=["mixed_float16"])
  assert report.policy_map == mpjax.PolicyMap({}, "mixed_float16")
  assert report.compilations == 2 and report.chosen.float32_flops == 0
  assert [row.tried for row in report.rows] == ["all in mixed_float16", "all in float32"]
  assert "{}" in report.text and "0.0% of the FLOPs are in float32" in report.summary


def test_a_module_that_float16_overflows_gets_bfloat16_before_float32():
  def loss(params, x):
    with jax.named_scope("small"):
      x = x @ params
    with jax.named_scope("large"):
      return jnp.mean(jnp.abs(1e6 * x @ params)) * 1e-6

  args = (jnp.eye(4) + 0.1, jnp.ones((2, 4)))
  report = inspect.tune(loss, args, candidates=["mixed_float16", "mixed_bfloat16"])
  assert report.modules == (("large", "mixed_bfloat16"),)
  assert report.policy_map.default == mpjax.Policy.parse("mixed_float16")


def test_the_bytes_are_those_that_xla_states_for_the_lowered_loss_and_gradients():
  def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params) @ params)

  args = jnp.eye(4), jnp.ones((2, 4))
  report = inspect.tune(loss, args)
  under = {row.tried: mpjax.autocast(loss, row.policy_map) for row in report.rows}
  moved = {
    tried: jax.jit(jax.value_and_grad(fn)).lower(*args).cost_analysis()["bytes accessed"]
    for tried, fn in under.items()
  }
  assert {row.tried: row.bytes_moved for row in report.rows} == moved
  assert len(moved) == 2
  assert "moved MiB" in str(report) and "cost analysis" in str(report)


def test_equal_costs_go_to_fewer_rules_and_then_to_less_error():
  few, many = mpjax.PolicyMap({}, LOW), mpjax.PolicyMap({"a": WIDE}, LOW)
  cheap = Trial("", 0.0, 0.02, "", 1.0, 8.0, few, within=True)
  exact, longer = cheap._replace(gradient_error=0.01), cheap._replace(policy_map=many)
  wide = cheap._replace(float32_flops=2.0, gradient_error=0.0)
  heavy = cheap._replace(bytes_moved=9.0, gradient_error=0.0)
  order = sorted([wide, heavy, longer, cheap, exact], key=lambda trial: trial.rank)
  assert order == [exact, cheap, longer, heavy, wide]


@pytest.mark.parametrize(
  ("assignment", "rules"),
  [
    ({("a",): LOW, ("b",): LOW}, []),
    ({(): WIDE, ("a",): LOW, ("a", "c"): LOW}, [(("a",), LOW)]),
    ({(): LOW, ("a",): WIDE, ("a", "c"): LOW}, [(("a", "c"), LOW), (("a",), WIDE)]),
    ({(): LOW, ("a", "c"): WIDE, ("a", "d"): WIDE, ("b",): LOW}, [(("a",), WIDE)]),
    ({(): LOW, ("a", "c"): WIDE, ("a", "d"): LOW}, [(("a", "c"), WIDE)]),
  ],
)
def test_an_assignment_becomes_the_fewest_rules_that_say_the_same(assignment, rules):
  assert rules_of(assignment) == rules
  policies = policy_map(assignment, NAMES)
  for path, name in assignment.items():
    assert policies.policy_at("/".join(path)) == as_policy(name)
  assert eval(as_text(assignment), {"mpjax": mpjax}) == policies


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"candidates": ["float32"]}, "candidates must hold a policy below float32"),
    ({"tolerance": 0}, "tolerance must be above 0"),
    ({"candidates": ["f12"]}, "f12"),
  ],
)
def test_bad_settings_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    inspect.tune(jnp.sum, (jnp.ones(3),), **settings)


def test_a_tolerance_that_is_no_number_is_refused():
  with pytest.raises(TypeError, match=r"tolerance must be a number\. Got '5%'"):
    inspect.tune(jnp.sum, (jnp.ones(3),), candidates=[LOW], tolerance="5%")


def test_a_loss_that_computes_with_no_floats_is_refused():
  with pytest.raises(ValueError, match="computes with none"):
    inspect.tune(lambda w: 1.0, (jnp.ones(3),), candidates=[LOW])


@pytest.mark.parametrize("flag", [True, "mean"])
def test_arguments_that_are_no_arrays_are_static(flag):
  loss = lambda w, x, flag: jnp.mean((x @ w) ** 2) if flag in (True, "mean") else jnp.sum(x)
  report = inspect.tune(loss, (jnp.eye(4), jnp.ones((2, 4)), flag), candidates=[LOW])
  assert report.policy_map == mpjax.PolicyMap({}, default=LOW)


def test_8_bit_weights_are_tuned():
  params = {"w": jnp.ones((8, 3), jnp.float8_e4m3fn), "scale": jnp.ones(3)}
  loss = lambda p, x: jnp.sum(x @ (p["w"].astype(jnp.float32) * p["scale"]))
  with jax.numpy_rank_promotion("allow"):
    assert inspect.tune(loss, (params, jnp.ones((4, 8))), candidates=[LOW]).chosen.within


def test_a_loss_that_is_not_finite_in_float32_is_refused():
  with pytest.raises(ValueError, match=r"must be finite in float32.*locate_nonfinite"):
    inspect.tune(lambda w: jnp.sum(jnp.log(w)), (jnp.zeros(3),))


@pytest.mark.parametrize(
  "layer", [lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(1)), lambda: nnx.Dropout(0.1, rngs=nnx.Rngs(1))]
)
def test_a_model_whose_variables_change_is_tuned(layer):
  linear = lambda n: nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(n))
  model = nnx.Sequential(linear(0), layer(), linear(1))
  before = jax.tree.map(jnp.copy, nnx.state(model))
  x = jax.random.normal(jax.random.key(0), (8, 4))
  loss = lambda model, x: jnp.mean((model(x) - 1) ** 2)
  report = inspect.tune(loss, (model, x), candidates=[LOW], tolerance=0.5)
  assert report.policy_map == mpjax.PolicyMap({}, default=LOW)
  same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before, nnx.state(model))
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("alone", [{"w": jnp.ones(2)}, jnp.ones(2)], ids=["dict", "array"])
def test_arguments_that_are_no_tuple_are_told_to_be_one(alone):
  with pytest.raises(TypeError, match=r"must be a tuple.* Write tune\(loss_fn, \(params,\)\)"):
    inspect.tune(lambda w: jnp.sum(w), alone)


def test_a_pair_and_a_string_of_candidates_are_told_what_to_write():
  with pytest.raises(TypeError, match=r"Got tuple. .* or pass has_aux=True if it is a pair"):
    mpjax.inspect.tune(lambda w: (jnp.sum(w), {"aux": w}), (jnp.ones(2),))
  with pytest.raises(TypeError, match=r"Write candidates=\['mixed_bfloat16'\]"):
    mpjax.inspect.tune(jnp.sum, (jnp.ones(2),), candidates="mixed_bfloat16")
