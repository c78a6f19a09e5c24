"""Autocast as its users meet it: which dtype comes out, what is exact, what errors say."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import mpjax
from _arrays import array
from _jaxprs import contractions, equations, primitives, result_dtypes, wide_contractions

BF16 = "mixed_bfloat16"


@pytest.fixture(autouse=True)
def _standard(standard_promotion):
  """The functions here mix dtypes as users do."""


def affine(params, x):
  return x @ params["w"] + params["b"]


@pytest.fixture
def operands():
  return {"w": jnp.ones((8, 8)), "b": jnp.zeros((2, 8))}, jnp.ones((2, 8))


def test_an_all_float32_policy_changes_no_equation(operands):
  plain, cast = (jax.make_jaxpr(f)(*operands) for f in (affine, mpjax.autocast(affine, "float32")))
  assert str(plain) == str(cast)


def test_results_have_the_output_dtype_and_gradients_that_of_the_parameters(operands):
  cast = mpjax.autocast(affine, "params=float32, compute=bfloat16, output=float16")
  assert cast(*operands).dtype == jnp.float16
  grads = jax.grad(lambda p, x: mpjax.autocast(affine, BF16)(p, x).sum())(*operands)
  assert {g.dtype.name for g in jax.tree.leaves(grads)} == {"float32"}


def test_a_bias_and_a_python_scalar_follow_the_matmul(operands):
  network = lambda p, x: (affine(p, x) * 2.5 + 1) @ p["w"]
  jaxpr = jax.make_jaxpr(mpjax.autocast(network, BF16))(*operands)
  assert result_dtypes(jaxpr, "add") == result_dtypes(jaxpr, "mul") == {"bfloat16"}


@pytest.mark.parametrize(
  "stray",
  [
    lambda x: x * np.float32(2),
    lambda x: x * np.sqrt(2.0),
    lambda x: x + np.ones((2, 8), np.float32),
    lambda x: x.astype(jnp.float32),
    lambda x: x + jnp.arange(8.0)[None],
  ],
  ids=["numpy_scalar", "numpy_sqrt", "closure_table", "astype", "positions"],
)
def test_what_widens_a_stream_does_not_widen_the_next_matmul(stray, operands):
  fn = lambda p, x: stray(affine(p, x)).astype(jnp.float32) @ p["w"].astype(jnp.float32)
  assert not wide_contractions(jax.make_jaxpr(mpjax.autocast(fn, BF16))(*operands), "bfloat16")


@pytest.mark.parametrize("label", [2049.0, 4097.0])
@pytest.mark.parametrize("policy", [BF16, "mixed_float16"])
def test_float_labels_survive(label, policy, operands):
  fn = lambda p, x, y: (x @ p["w"]).sum() * 0.0 + y
  assert mpjax.autocast(fn, policy)(*operands, jnp.float32(label)) == label


def test_a_constant_that_the_format_cannot_hold_makes_the_result_data(operands):
  for value, dtype in [(-1e9, "float32"), (1e-12, "float32"), (-1e4, "float16")]:
    fn = lambda p, x: jnp.where(x > 0, x @ p["w"], value)  # noqa: B023
    jaxpr = jax.make_jaxpr(mpjax.autocast(fn, "mixed_float16"))(*operands)
    assert result_dtypes(jaxpr, "select_n") == {dtype}


def test_a_weight_used_by_every_step_of_a_scan_gets_an_exact_gradient():
  def loss(w):
    return lax.scan(lambda c, _: (c, jnp.ones((1, 1)) @ w), 0.0, None, length=4000)[1].sum()

  for cast in (jax.grad(mpjax.autocast(loss, BF16)), mpjax.autocast(jax.grad(loss), BF16)):
    assert cast(jnp.ones((1, 1)))[0, 0] == 4000


def test_a_token_seen_4096_times_gets_an_exact_gradient():
  tokens = jnp.zeros((4096,), jnp.int32)
  loss = lambda table: (table[tokens] @ jnp.ones((4, 1))).sum()
  assert (jax.grad(mpjax.autocast(loss, BF16))(jnp.ones((3, 4)))[0] == 4096).all()


def test_an_accumulator_started_from_zeros_stays_float32():
  def total(w, xs):
    return lax.scan(lambda c, x: (c + (x @ w)[0, 0], None), jnp.zeros(()), xs)[0]

  xs = jnp.ones((2000, 1, 1))
  assert mpjax.autocast(total, BF16)(jnp.ones((1, 1)), xs) == 2000


def test_sixteen_bit_parameters_are_used_in_float32_and_get_gradients_of_their_own_dtype():
  params = {"w": jnp.ones((8, 8), jnp.bfloat16)}
  fn = mpjax.autocast(lambda p, x: (x @ p["w"]).sum(), "bfloat16")
  grads = jax.grad(lambda p: fn(p, jnp.ones((2, 8))).astype(jnp.float32))(params)
  assert grads["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "leaf",
  [
    array([0, 1, 2], jnp.int32),
    array([True, False], bool),
    jax.random.key(0),
    array([1, 1], jnp.complex64),
    array([1, 1], jnp.float8_e4m3fn),
    None,
    "text",
    3,
    2.5,
  ],
  ids=["int", "bool", "key", "complex", "float8", "none", "str", "int_", "float_"],
)
def test_other_leaves_pass_untouched(leaf):
  out, _ = mpjax.autocast(lambda w, leaf: (leaf, w @ w), BF16)(jnp.ones((2, 2)), leaf)
  assert type(out) is type(leaf) or isinstance(out, jax.Array)
  assert getattr(out, "dtype", None) == getattr(leaf, "dtype", None)


def test_arguments_that_are_no_arrays_are_static(operands):
  fn = lambda p, x, *, train: affine(p, x) if train else x
  assert (mpjax.autocast(fn, BF16)(*operands, train=False) == operands[1]).all()


def test_parameters_may_be_passed_by_name(operands):
  params, x = operands
  jaxpr = jax.make_jaxpr(lambda p, x: mpjax.autocast(affine, BF16)(params=p, x=x))(params, x)
  assert result_dtypes(jaxpr, "add") == {"bfloat16"}


def test_argnums_says_where_the_parameters_are(operands):
  params, x = operands
  swapped = lambda x, p: affine(p, x)
  narrow = jax.make_jaxpr(mpjax.autocast(swapped, BF16, argnums=1))(x, params)
  wide = jax.make_jaxpr(mpjax.autocast(swapped, BF16))(x, params)
  assert result_dtypes(narrow, "add") == {"bfloat16"}
  assert result_dtypes(wide, "add") == {"float32"}


def test_argnums_out_of_range_says_what_to_do():
  with pytest.raises(ValueError, match=r"argnums=\(3,\) must name arguments.*set argnums"):
    mpjax.autocast(lambda x: x, BF16, argnums=3)(1.0)


def test_rules_govern_scopes_and_all_beneath_them(operands):
  def fn(p, x):
    with jax.named_scope("encoder"):
      x = affine(p, x)
    with jax.named_scope("head"), jax.named_scope("dense"):
      return affine(p, x)

  policies = mpjax.PolicyMap({"head": "float32"}, default=BF16)
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policies))(*operands)
  assert [c.result for c in contractions(jaxpr)] == ["bfloat16", "float32"]


def test_a_rule_that_matches_nothing_names_the_scopes(operands):
  def fn(p, x):
    with jax.named_scope("encoder"):
      return affine(p, x)

  policies = mpjax.PolicyMap({"encodr": "float32"}, default=BF16)
  with pytest.raises(ValueError, match=r"'encodr' matched no module. Closest: encoder. Paths seen"):
    mpjax.autocast(fn, policies)(*operands)


def test_an_unknown_primitive_runs_as_traced(operands):
  twice = Primitive("twice_of_this_test")
  twice.def_abstract_eval(lambda x: x)
  mlir.register_lowering(twice, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
  jaxpr = jax.make_jaxpr(mpjax.autocast(lambda p, x: twice.bind(affine(p, x)), BF16))(*operands)
  assert result_dtypes(jaxpr, "twice_of_this_test") == {"float32"}
  assert not wide_contractions(jaxpr, "bfloat16")


def test_keep_float32_marks_a_value_and_is_the_identity_outside(operands):
  fn = lambda p, x: mpjax.keep_float32(affine(p, x)) * 2 + p["b"]
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, BF16))(*operands)
  assert result_dtypes(jaxpr, "mul") == {"float32"}
  assert (fn(*operands) == 2 * affine(*operands)).all()


def test_two_threads_each_get_their_own_dtypes(operands):
  found = {}

  def run(policy):
    for _ in range(5):
      jaxpr = jax.make_jaxpr(mpjax.autocast(affine, policy))(*operands)
      found.setdefault(policy, set()).update(c.result for c in contractions(jaxpr))

  threads = [threading.Thread(target=run, args=(p,)) for p in (BF16, "mixed_float16")]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {BF16: {"bfloat16"}, "mixed_float16": {"float16"}}


def test_remat_policies_names_and_jit_names_survive(operands):
  policy = jax.checkpoint_policies.save_only_these_names("kept")

  @jax.jit
  def inner(p, x):
    return jax.ad_checkpoint.checkpoint_name(affine(p, x), "kept")

  fn = jax.checkpoint(inner, policy=policy)
  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, BF16))(*operands)
  (outer,) = [e for e in jaxpr.jaxpr.eqns if "policy" in e.params]
  assert outer.params["policy"] is policy
  assert primitives(jaxpr)["name"] == 1
  assert "name=inner" in str(jaxpr)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    fn = mpjax.autocast(lambda w, x: x @ w, BF16)
    assert fn(np.ones((2, 2)), np.ones((2, 2))).dtype == np.float64


def test_a_matmul_of_the_callers_own_format_keeps_its_algorithm(operands):
  w, x = operands[0]["w"], operands[1]
  algorithm = lax.DotAlgorithmPreset.BF16_BF16_F32
  own = lambda w, x: jnp.matmul(*(a.astype(jnp.bfloat16) for a in (x, w)), precision=algorithm)
  for policy in ("mixed_bfloat16", "mixed_float16"):
    jaxpr = jax.make_jaxpr(mpjax.autocast(own, policy))(w, x)
    (dot,) = (eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general")
    assert dot.params["precision"] == algorithm


def test_a_matmul_asked_for_a_float64_result_is_not_rounded_before():
  with jax.enable_x64(True):
    draw = lambda seed: np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
    w, x = draw(0), draw(1)
    fn = lambda w, x: lax.dot(x, w, preferred_element_type=jnp.float64)
    got = mpjax.autocast(fn, "mixed_bfloat16")(w, x)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, x.astype(np.float64) @ w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", [BF16, "mixed_float16"])
@pytest.mark.parametrize(
  "loss",
  [
    lambda p: -jnp.log(1 - p).mean(),
    lambda p: -jnp.log(1 - jnp.clip(p, 1e-7, 1 - 1e-7)).mean(),
    lambda p: -jnp.log1p(-p).mean(),
  ],
  ids=["log", "clipped", "log1p"],
)
def test_a_confident_wrong_sigmoid_keeps_its_gradient(loss, policy):
  w = jax.random.normal(jax.random.key(0), (8, 8)) * 0.3
  x = jax.random.normal(jax.random.key(1), (4, 8))
  fn = lambda w, x: loss(jax.nn.sigmoid(jnp.abs(x @ w) + 9))
  value, grad = jax.jit(jax.value_and_grad(mpjax.autocast(fn, policy)))(w, x)
  want, want_grad = jax.jit(jax.value_and_grad(fn))(w, x)
  np.testing.assert_allclose(value, want, rtol=1e-3)
  assert jnp.linalg.norm(grad - want_grad) < 0.02 * jnp.linalg.norm(want_grad)


def test_a_clip_just_below_one_still_guards():
  fn = lambda w, x: jnp.arctanh(jnp.clip(jnp.tanh(x @ w), -1 + 1e-5, 1 - 1e-5)).mean()
  assert np.isfinite(mpjax.autocast(fn, BF16)(9 * jnp.eye(4), jnp.ones((2, 4))))


def test_a_numpy_scalar_argument_is_data(operands):
  fn = lambda p, x, y: (x @ p["w"]).sum() * 0.0 + y
  assert mpjax.autocast(fn, BF16)(*operands, np.float32(2049.0)) == 2049


def test_what_is_no_function_is_refused():
  with pytest.raises(TypeError, match="autocast takes a function; got int"):
    mpjax.autocast(3, BF16)
  with pytest.raises(TypeError, match="argnums must be positions, integers; got 'w'"):
    mpjax.autocast(affine, BF16, argnums="w")
  with pytest.raises(TypeError, match=r"argnums must be positions, integers; got 1\.5"):
    mpjax.autocast(affine, BF16, argnums=1.5)


def test_a_model_of_nnx_keeps_its_updates():
  class Model(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.norm(self.linear(x))

  model = Model()
  mpjax.autocast(lambda model, x: model(x).sum(), BF16)(model, jnp.ones((2, 4)))
  assert model.norm.mean[...].any()
  assert model.norm.mean[...].dtype == jnp.float32


def test_an_attribute_that_a_call_sets_is_refused_not_lost():
  class Counter(nnx.Module):
    def __init__(self):
      self.calls = 0

    def __call__(self, x):
      self.calls += 1
      return x

  with pytest.raises(ValueError, match=r"'calls'. Make it an nnx.Variable"):
    mpjax.apply_policy(Counter(), BF16)(jnp.ones(2))


def test_captured_intermediates_arrive():
  class Model(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
      y = self.linear(x)
      self.sow(nnx.Intermediate, "hidden", y)
      return y

  model = mpjax.apply_policy(Model(), BF16)
  _, captured = nnx.capture(model, nnx.Intermediate)(jnp.ones((2, 4)))
  assert [leaf.shape for leaf in jax.tree.leaves(captured)] == [(2, 4)]


def test_setup_may_make_submodules_with_a_public_method():
  class Model(linen.Module):
    def setup(self):
      self.head = self.make(2)

    def make(self, features):
      return linen.Dense(features)

    def __call__(self, x):
      return self.head(x)

    def _hidden(self, x):
      return self.head(x)

  model = mpjax.apply_policy(Model(), BF16)
  variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
  for method in (None, "_hidden", Model._hidden):
    run = lambda v: model.apply(v, jnp.ones((2, 4)), method=method)  # noqa: B023
    assert [c.result for c in contractions(jax.make_jaxpr(run)(variables))] == ["bfloat16"]


def test_a_layer_with_a_dtype_of_its_own_keeps_it_and_the_result_has_the_output_dtype():
  model = mpjax.apply_policy(linen.Dense(2, dtype=jnp.bfloat16), "mixed_float16")
  variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
  assert model.apply(variables, jnp.ones((2, 4))).dtype == jnp.float32


def test_a_function_or_module_is_no_value_to_mark_and_a_bool_no_position():
  with pytest.raises(TypeError, match=r"marks values. Got softmax, which is called. Mark what it"):
    mpjax.keep_float32(jax.nn.softmax)
  for module in (linen.Dense(4), nnx.Linear(2, 4, rngs=nnx.Rngs(0))):
    with pytest.raises(TypeError, match=r"Got .*, which is called. .*mpjax.apply_policy\(module"):
      mpjax.keep_float32(module)
  with pytest.raises(TypeError, match="must be positions, integers; got True"):
    mpjax.autocast(lambda w, x: x @ w, "mixed_bfloat16", argnums=True)


def test_an_error_of_a_trace_names_the_function_and_its_line():
  def reads_a_value(params, x):
    return float((x @ params["w"]).sum())

  line = reads_a_value.__code__.co_firstlineno
  with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
    mpjax.autocast(reads_a_value, "mixed_bfloat16")({"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
  assert f"tracing the function reads_a_value at {__file__}:{line} " in str(caught.value)
