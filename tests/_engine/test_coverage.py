"""Autocast reaches a matmul or convolution wherever JAX can hide one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from _coverage_table import RECORD
from _jaxprs import contractions, equations, wide_contractions
from _turns import is_its_turn

POLICIES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


def dot(x, w):
  return jnp.tanh(x @ w)


def conv(x, w):
  kernel = w.reshape(4, 4, 4)[:1]
  return jnp.tanh(
    lax.conv_general_dilated(
      x.reshape(2, 2, 4), kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
  ).reshape(x.shape)


OPS = {"dot": dot, "conv": conv}


@functools.cache
def custom_vjp_of(op):
  @jax.custom_vjp
  def fn(x, w):
    return op(x, w)

  def forward(x, w):
    y, pullback = jax.vjp(op, x, w)
    return y, (pullback, x)

  def backward(residuals, ct):
    pullback, _ = residuals
    dx, dw = pullback(ct)
    return 2.0 * dx, 2.0 * dw  # a rule of the user's own: twice the true gradient

  fn.defvjp(forward, backward)
  return fn


@functools.cache
def custom_jvp_of(op):
  @jax.custom_jvp
  def fn(x, w):
    return op(x, w)

  @fn.defjvp
  def rule(primals, tangents):
    y, dy = jax.jvp(op, primals, tangents)
    return y, 3.0 * dy

  return fn


def custom_vmap(op, w, x):
  @jax.custom_batching.custom_vmap
  def fn(x):
    return op(x, w)

  @fn.def_vmap
  def batched(size, is_batched, x):
    del size, is_batched
    return 2.0 * jax.vmap(op, (0, None))(x, w), True  # a rule of the user's own

  return jax.vmap(fn)(jnp.stack([x, x]))[0] + fn(x)


def closure_over_an_array(op, w, x):
  offset = jnp.eye(*x.shape)  # an array of JAX's, not of the call
  return jax.jit(lambda w, x: op(x + offset, w) + offset)(w, x)


def scan(op, w, x):
  return lax.scan(lambda c, _: (op(c, w), c.sum()), x, None, length=3)[0]


def scan_over_weights(op, w, x):
  return lax.scan(lambda c, v: (op(c, v), None), x, jnp.stack([w, 2.0 * w]))[0]


def scan_with_stray_float32(op, w, x):
  stray = np.ones(x.shape, np.float32)
  return lax.scan(lambda c, _: (op(c, w) + stray, None), x, None, length=2)[0]


def while_loop(op, w, x):
  return lax.while_loop(lambda c: c[1] < 3, lambda c: (op(c[0], w), c[1] + 1), (x, 0))[0]


def fori_loop(op, w, x):
  return lax.fori_loop(0, 3, lambda _, c: op(c, w), x)


def cond(op, w, x):
  return lax.cond(x.sum() > 0, lambda x: op(x, w), lambda x: x, x)


def cond_with_stray_float32(op, w, x):
  stray = np.full(x.shape, 0.5, np.float32)
  return lax.cond(x.sum() > 0, lambda x: op(x, w), lambda x: x + stray, x)


def switch(op, w, x):
  return lax.switch(1, [lambda x: x, lambda x: op(x, w), lambda x: 2.0 * x], x)


def shard_map(op, w, x):
  mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda w, x: lax.pmean(op(x, w), "d"), mesh=mesh, in_specs=(P(), P("d")), out_specs=P()
  )
  return mapped(w, x)


def kernel(op, w, x):
  from jax.experimental import pallas as pl

  def add(a_ref, b_ref, o_ref):
    o_ref[...] = a_ref[...] + b_ref[...]

  call = pl.pallas_call(add, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)
  return call(op(x, w), x)


def callback(op, w, x):
  aval = jax.ShapeDtypeStruct(x.shape, x.dtype)
  y = op(x, w)
  return y + lax.stop_gradient(jax.pure_callback(np.asarray, aval, lax.stop_gradient(x)))


def associative_scan(op, w, x):
  return lax.associative_scan(jnp.add, op(x, w))


def closure_over_a_tracer(op, w, x):
  return jax.jit(lambda x: op(x, w))(x)


def debug_print(op, w, x):
  jax.debug.callback(lambda y: None, x)
  return op(x, w)


def named(op, w, x):
  with jax.named_scope("layer"):
    return op(x, w)


CONSTRUCTS = {
  "plain": lambda op, w, x: op(x, w),
  "jit": lambda op, w, x: jax.jit(op)(x, w),
  "nested_jit": lambda op, w, x: jax.jit(lambda x: jax.jit(op)(x, w))(x),
  "jit_inline": lambda op, w, x: jax.jit(op, inline=True)(x, w),
  "jit_static": lambda op, w, x: jax.jit(lambda n, x, w: n * op(x, w), static_argnums=0)(2, x, w),
  "jit_donate": lambda op, w, x: jax.jit(op, donate_argnums=0)(2.0 * x, w),
  "jit_keywords": lambda op, w, x: jax.jit(op, keep_unused=True)(x, w=w),
  "einsum": lambda op, w, x: jnp.einsum("ij,jk,ki->ki", op(x, w), w, x.T),
  "scan": scan,
  "grad_of_scan": lambda op, w, x: jax.grad(lambda x: scan(op, w, x).sum())(x),
  "scan_over_weights": scan_over_weights,
  "scan_with_stray_float32": scan_with_stray_float32,
  "while": while_loop,
  "fori_loop": fori_loop,
  "cond": cond,
  "cond_with_stray_float32": cond_with_stray_float32,
  "switch": switch,
  "map": lambda op, w, x: lax.map(lambda row: op(jnp.stack([row, row]), w)[0], x),
  "remat": lambda op, w, x: jax.checkpoint(op)(x, w),
  "remat_of_scan": lambda op, w, x: jax.checkpoint(lambda w, x: scan(op, w, x))(w, x),
  "scan_of_remat": lambda op, w, x: scan(jax.checkpoint(op), w, x),
  "remat_saving_dots": lambda op, w, x: jax.checkpoint(
    op, policy=jax.checkpoint_policies.dots_saveable
  )(x, w),
  "custom_vjp": lambda op, w, x: custom_vjp_of(op)(x, w),
  "custom_jvp": lambda op, w, x: custom_jvp_of(op)(x, w),
  "custom_jvp_of_custom_vjp": lambda op, w, x: custom_jvp_of(custom_vjp_of(op))(x, w),
  "scan_of_custom_vjp": lambda op, w, x: scan(custom_vjp_of(op), w, x),
  "remat_of_custom_jvp": lambda op, w, x: jax.checkpoint(custom_jvp_of(op))(x, w),
  "custom_vmap": custom_vmap,
  "shard_map": shard_map,
  "vmap": lambda op, w, x: jax.vmap(lambda r: op(jnp.stack([r, r]), w)[0])(x),
  "grad_inside": lambda op, w, x: jax.grad(lambda x: op(x, w).sum())(x),
  "linearize_inside": lambda op, w, x: jax.linearize(lambda x: op(x, w), x)[1](x),
  "pallas": kernel,
  "pure_callback": callback,
  "debug": debug_print,
  "named_scope": named,
  "associative_scan": associative_scan,
  "closure": closure_over_a_tracer,
  "closure_over_an_array": closure_over_an_array,
}
NO_REVERSE = {"while", "pallas", "custom_vmap"}  # in plain JAX


def make(op, construct):
  def fn(w, x):
    return jnp.sum(CONSTRUCTS[construct](OPS[op], w, x) ** 2)

  return fn


pytestmark = pytest.mark.usefixtures("promotion_of_users")


@functools.cache
def numbers():
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)) * 0.5
  return w, x[:2] + 0.1


@pytest.fixture(scope="module")
def operands():
  return numbers()


TRANSFORMS = {
  "forward": lambda fn, policy: mpjax.autocast(fn, policy),
  "gradient": lambda fn, policy: jax.grad(mpjax.autocast(fn, policy)),
  "gradient_inside": lambda fn, policy: mpjax.autocast(jax.grad(fn), policy),
}


def transforms_of(construct):
  return ("forward",) if construct in NO_REVERSE else tuple(TRANSFORMS)


@functools.cache
def truth(construct, op):
  """The value and the gradient in float64, with the same rules of the user's own."""
  with jax.enable_x64(True):
    fn = make(op, construct)
    exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in numbers()]
    found = jax.jit(fn if construct in NO_REVERSE else jax.value_and_grad(fn))(*exact)
    value, gradient = found if isinstance(found, tuple) else (found, None)
  return {"forward": value, "gradient": gradient, "gradient_inside": gradient}


@functools.cache
def narrow(construct, op, policy):
  """The jaxpr of every transform under a policy."""
  fn = make(op, construct)
  cast = {name: TRANSFORMS[name](fn, policy) for name in transforms_of(construct)}
  return {name: jax.make_jaxpr(cast[name])(*numbers()) for name in cast}


@functools.cache
def results(construct, op, policy):
  """What every transform yields under a policy, by one compilation."""
  fns = {name: jaxpr_as_fun(jaxpr) for name, jaxpr in narrow(construct, op, policy).items()}
  return jax.device_get(
    jax.jit(lambda *args: {name: fns[name](*args)[0] for name in fns})(*numbers())
  )


def in_turn(construct, op):
  """The format that is not slow: one of a construct around a matmul, the other of a convolution.
  In the other format it is traced on the explicit mesh of test_explicit_mesh.py."""
  return list(POLICIES)[(list(CONSTRUCTS).index(construct) + list(OPS).index(op)) % 2]


def computed(construct, op, policy):
  """Whether the computation is not slow: of each construct around one operation."""
  axes = {construct: CONSTRUCTS, op: OPS, policy: POLICIES}
  places = [list(axis).index(name) for name, axis in axes.items()]
  return is_its_turn(places, [len(axis) for axis in axes.values()], turning=2)


def common(construct, op, policy):
  """Whether it is in every run, and not in `.ci/run` alone: of each fifth construct."""
  return computed(construct, op, policy) and list(CONSTRUCTS).index(construct) % 5 == 0


def cases(quick, quicker=None):
  """All cases; those that are not `quick` are slow, and those that are not `quicker` `ci`."""

  def marks(*case):
    if not quick(*case):
      return pytest.mark.slow
    return () if quicker is None or quicker(*case) else pytest.mark.ci

  return pytest.mark.parametrize(
    ("construct", "op", "transform", "policy"),
    [
      pytest.param(
        construct,
        op,
        transform,
        policy,
        id=f"{construct}-{op}-{policy}-{transform}",
        marks=marks(construct, op, policy),
      )
      for construct in CONSTRUCTS
      for op in OPS
      for policy in POLICIES
      for transform in transforms_of(construct)
    ],
  )


@cases(lambda construct, op, policy: policy == in_turn(construct, op))
def test_no_contraction_stays_float32(construct, op, transform, policy):
  jaxpr = narrow(construct, op, policy)[transform]
  assert contractions(jaxpr)
  assert not wide_contractions(jaxpr, POLICIES[policy])
  assert {aval.dtype for aval in jaxpr.out_avals} == {np.dtype(np.float32)}


@cases(computed, common)
def test_values_are_those_of_float64(construct, op, transform, policy, record_property):
  got = results(construct, op, policy)[transform]
  want = np.asarray(truth(construct, op)[transform])
  scale = np.max(np.abs(want)) + 1e-3
  error = float(np.max(np.abs(got - want)) / scale / jnp.finfo(POLICIES[policy]).eps)
  record_property(RECORD, [construct, op, transform, policy, error])
  assert error <= 3


# Policies of remat, names, shardings, donation, effects -------------------------------------------


def params_of(fn, primitive, key):
  """One parameter of all equations of a primitive, in order."""
  found = (e for e in equations(jax.make_jaxpr(fn)(*numbers())) if e.primitive.name == primitive)
  return [eqn.params[key] for eqn in found]


def residual_bytes(fn):
  """What the backward pass of a function stores."""
  _, pullback = jax.vjp(fn, *numbers())
  return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))


def named_dot(x, w):
  return checkpoint_name(dot(x, w), "hidden")


REMAT_POLICIES = {
  "nothing": jax.checkpoint_policies.nothing_saveable,
  "everything": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "names": jax.checkpoint_policies.save_only_these_names("hidden"),
  "other_names": jax.checkpoint_policies.save_only_these_names("other"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("saved", REMAT_POLICIES)
def test_a_remat_policy_survives_and_stores_no_more_than_in_float32(saved, policy):
  block = jax.checkpoint(
    lambda w, x: jnp.sin(named_dot(jnp.sin(named_dot(x, w)), w)), policy=REMAT_POLICIES[saved]
  )
  plain = lambda w, x: block(w, x).sum()
  cast = mpjax.autocast(plain, policy)
  for key in ("policy", "prevent_cse"):
    assert params_of(cast, "remat2", key) == params_of(plain, "remat2", key) != []
  assert params_of(cast, "name", "name") == ["hidden", "hidden"]
  assert residual_bytes(cast) <= residual_bytes(plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_shardings_survive(policy):
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

  def plain(w, x):
    weights = lax.with_sharding_constraint(w, NamedSharding(mesh, P("d")))
    return lax.with_sharding_constraint(x @ weights, NamedSharding(mesh, P(None, "d"))).sum()

  cast = mpjax.autocast(plain, policy)
  wanted = params_of(plain, "sharding_constraint", "sharding")
  assert params_of(cast, "sharding_constraint", "sharding") == wanted != []


@pytest.mark.parametrize("policy", POLICIES)
def test_donation_survives_inside_and_outside(policy):
  inner = jax.jit(lambda w, x: x @ w, donate_argnums=(1,))
  plain = lambda w, x: inner(w, x * 2.0)
  cast = mpjax.autocast(plain, policy)
  assert params_of(cast, "jit", "donated_invars") == params_of(plain, "jit", "donated_invars")
  aliased = [
    jax.jit(fn, donate_argnums=(1,))
    .lower(*numbers())
    .compile()
    .memory_analysis()
    .alias_size_in_bytes
    for fn in (plain, cast)
  ]
  assert aliased[0] == aliased[1] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_effects_survive_in_their_order(policy, capfd):
  def plain(w, x):
    jax.debug.print("first {}", x.shape, ordered=True)
    y = lax.scan(lambda c, _: (c @ w, jax.debug.print("turn", ordered=True)), x, None, length=2)[0]
    jax.debug.print("last", ordered=True)
    return y.sum()

  cast = mpjax.autocast(plain, policy)
  assert jax.make_jaxpr(cast)(*numbers()).effects == jax.make_jaxpr(plain)(*numbers()).effects
  jax.block_until_ready(jax.jit(cast)(*numbers()))
  jax.effects_barrier()
  assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [
    *("first", "turn", "turn", "last")
  ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_scopes_survive(transform, policy):
  def plain(w, x):
    for n in range(6):  # as many as are traced once for all
      with jax.named_scope(f"layer_{n}"):
        x = jnp.tanh(x @ w / 3.0 + x.mean())
    return x.sum()

  def scopes(fn):
    stacks = {str(e.source_info.name_stack) for e in jax.make_jaxpr(fn)(*numbers()).eqns}
    return {stack.replace("mpjax.policy/", "").replace("mpjax.policy", "") for stack in stacks}

  under = mpjax.autocast(plain, policy)
  assert scopes(transform(under)) == scopes(transform(mpjax.autocast(plain, "float32")))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_arguments_may_come_by_keyword(transform, policy, operands):
  w, x = operands
  plain = lambda w, *, x, power: jnp.sum(dot(x, w) ** power)
  cast = transform(mpjax.autocast(plain, policy))
  jaxpr = jax.make_jaxpr(lambda w, x: cast(w, x=x, power=2))(w, x)
  assert contractions(jaxpr) and not wide_contractions(jaxpr, POLICIES[policy])
  want, got = transform(plain)(w, x=x, power=2), cast(w, x=x, power=2)
  assert jnp.linalg.norm(got - want) < 0.02 * jnp.linalg.norm(want)


@pytest.mark.parametrize("policy", POLICIES)
def test_results_that_are_no_arrays_come_back_as_they_are(policy, operands):
  fn = lambda w, x: (x @ w, None, 3, "text")
  got = mpjax.autocast(fn, policy)(*operands)
  assert got[1:] == fn(*operands)[1:]
  assert got[0].dtype == jnp.float32


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_constants_come_back_as_the_arrays_that_they_are(jit, policy, operands):
  fn = lambda w, x: (jnp.asarray(1.0), jnp.asarray(3), jnp.int32(3), jnp.zeros(()), jnp.bool_(1))
  got, want = jit(mpjax.autocast(fn, policy))(*operands), jit(fn)(*operands)
  for a, b in zip(got, want, strict=True):
    assert isinstance(a, jax.Array)
    assert (a.shape, a.dtype, a.weak_type, a) == (b.shape, b.dtype, b.weak_type, b)
