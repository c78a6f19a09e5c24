"""The operands of a matmul have one format, and modules hand on what others need."""

import functools
from collections.abc import Callable

import flax.linen as nn
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


@both
@pytest.mark.parametrize("author", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@cases(
  einsum=lambda x, w: jnp.einsum("bd,df->bf", x, w),
  matmul=lambda x, w: x @ w,
  dot_general=lambda x, w: lax.dot_general(
    x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  ),
)
def test_the_operands_of_a_matmul_have_one_16_bit_format(fn, author, policy):
  (dot,) = matmuls(mpjax.autocast(lambda w, x: fn(x.astype(author), w), policy), W, DATA)
  assert len({v.aval.dtype for v in dot.invars}) == 1
  assert dot.invars[0].aval.dtype.itemsize == 2


class Router(nn.Module):
  experts: int

  @nn.compact
  def __call__(self, x):
    return nn.softmax(nn.Dense(self.experts)(x))


class Mixture(nn.Module):
  experts: int

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="inside")(x)
    weights = Router(self.experts, name="router")(x)
    return weights * jnp.float32(1)


@in_turns(("experts", "policy"), (4, 8), POLICIES)
def test_the_weights_of_a_router_do_not_round_whatever_their_number(experts, policy):
  model, x = Mixture(experts), jnp.ones((2, 8))
  variables = model.init(jax.random.key(0), x)
  (weights,) = [
    e.outvars[0]
    for e in equations(
      jax.make_jaxpr(lambda v: mpjax.apply_policy(model, policy).apply(v, x))(variables)
    )
    if e.primitive.name == "mul" and "Mixture" in str(e.source_info.name_stack)
  ][-1:]
  assert weights.aval.dtype == jnp.float32
  rounded = mpjax.apply_policy(model, policy).apply(variables, x)
  half = np.asarray(rounded).astype(mpjax.Policy.parse(policy).compute_dtype).astype(np.float32)
  assert not np.array_equal(rounded, half)


class Cell(nn.Module):
  """Steps that become small; its parameters are shared."""

  @nn.compact
  def __call__(self, y, _=None):
    return y + 0.001 * jnp.tanh(nn.Dense(4)(y)), None


class Elementwise(nn.Module):
  fn: Callable

  def __call__(self, x):
    return self.fn(x)


class Applied(nn.Module):
  """A layer, and an elementwise function as a module of its own behind it."""

  fn: Callable

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(4, use_bias=False, kernel_init=nn.initializers.ones)
    return Elementwise(self.fn)(dense(x))


class Moved(nn.Module):
  """How far cells move what a layer made."""

  way: str

  @nn.compact
  def __call__(self, x):
    first = y = nn.Dense(4)(x)
    if self.way == "scan":
      cells = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, length=50)
      y, _ = cells()(y)
    else:
      cell = Cell()
      for _ in range(50):
        y, _ = cell(y)
    return y - first


@in_turns(("way", "policy"), ("scan", "loop"), POLICIES)
def test_a_state_leaves_the_cell_that_takes_small_steps_as_float32(way, policy):
  model, x = Moved(way), jnp.linspace(0.3, 2, 16).reshape(4, 4)
  variables = model.init(jax.random.key(0), x)
  found, want = in_both_formats(model.apply, policy, variables, x)
  np.testing.assert_allclose(found, want, atol=0.02 * float(np.abs(want).max()))


LEFT = {
  "gate": (jax.nn.sigmoid, lambda g: 1 - g, 1.6),
  "gate_in_pieces": (lambda h: jax.nn.sigmoid(h)[:, ::-1], lambda g: 1 - g[:, :2], 1.6),
  "decay": (lambda h: jnp.exp(-jnp.exp(-h)), lambda a: 1 - a, 1.6),
  "probabilities": (lambda h: jax.nn.softmax(h * jnp.arange(4.0)[None]), jnp.log, 1.6),
  "own_unit": (lambda h: h * 30000, lambda h: h / 30000, 3.0),
  "written_out_sum": (
    lambda h: functools.reduce(lambda y, n: y + jnp.tanh(h * n / 249), range(100), h),
    lambda y: y - jnp.mean(y),
    0.25,
  ),
}


@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT)
@both
def test_what_others_need_exactly_leaves_its_module_as_float32(case, policy):
  inside, outside, size = case
  model, x = Applied(inside), size + jnp.arange(16.0).reshape(4, 4) / 32
  variables = model.init(jax.random.key(0), x)
  found, want = in_both_formats(lambda v, x: outside(model.apply(v, x)), policy, variables, x)
  np.testing.assert_allclose(found, want, rtol=0.05, atol=0.05 * float(np.abs(want).max()))


class Positions(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + jnp.asarray(
      np.sin(np.arange(x.shape[1]))[:, None] * np.ones(x.shape[2]), jnp.float32
    )


class Embedded(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(16, 8, name="embed")(tokens)
    return nn.Dense(8, name="dense")(nn.relu(Positions(name="positions")(x)))


@both
def test_embeddings_go_on_in_16_bits_behind_a_module_that_adds_a_table(policy):
  model, tokens = Embedded(), jnp.ones((2, 4), jnp.int32)
  variables = model.init(jax.random.key(0), tokens)
  cast = mpjax.apply_policy(model, policy)
  jaxpr = jax.make_jaxpr(lambda v: cast.apply(v, tokens))(variables)
  (relu,) = [e for e in equations(jaxpr) if e.primitive.name == "max"]
  assert relu.outvars[0].aval.dtype.itemsize == 2


WIDE_X = array(np.ones((2, 16, 512)))
FEW_FEATURES = {"e": array(np.ones((512, 64))), "u": array(np.ones((64, 64)))}
STREAMS = {
  "added": lambda h, u: h + jnp.tanh(h @ u) @ u,
  "taken_away": lambda h, u: h - jnp.tanh(h @ u) @ u,
  "gated": lambda h, u: h - jax.nn.relu(h @ u) * (h - jnp.tanh(h @ u)),
  "virtual_node": lambda h, u: jax.nn.relu(h + (h.mean(1) @ u)[:, None]),
  "jitted": lambda h, u: jax.jit(lambda h, u: h + jnp.tanh(h @ u) @ u)(h, u),
  "in_a_scan": lambda h, u: lax.scan(
    lambda h, _: (h + jnp.tanh(h @ u) @ u, None), h, None, length=4
  )[0],
}


@in_turns(("turn", "policy"), STREAMS, POLICIES)
def test_a_stream_that_is_returned_is_no_head_where_it_begins(turn, policy):
  def encoder(p, x):
    h = x @ p["e"]
    for _ in range(2):
      h = turn(h, p["u"])
    return h

  first, *_ = matmuls(mpjax.autocast(encoder, policy), FEW_FEATURES, WIDE_X)
  assert first.outvars[0].aval.dtype.itemsize == 2


LEVELS = np.linspace(275, 290, 4).astype(np.float32)


class Behind(nn.Module):
  """A layer, and what makes a result of it: in a module of its own, or not."""

  fn: Callable
  is_module: bool

  @nn.compact
  def __call__(self, x):
    said = nn.Dense(4)(nn.tanh(nn.Dense(8)(x)))
    return Elementwise(self.fn)(said) if self.is_module else self.fn(said)


@both
@cases(
  denormalized=lambda o: o * np.full(4, 12.3, np.float32) + LEVELS,
  anchors=lambda o: (2 * jax.nn.sigmoid(o) - 0.5 + np.arange(4, dtype=np.float32)) * 80,
  template=lambda o: o + 100 * LEVELS,
  increasing=lambda o: jnp.cumsum(jax.nn.softplus(o), -1),
  log_probabilities=nn.log_softmax,
  mixed=lambda o: jnp.logaddexp(o, LEVELS),
  looked_up=lambda o: jnp.interp(o, np.arange(4, dtype=np.float32), LEVELS),
)
@pytest.mark.parametrize("transformed", ["module", "loss", "scope"])
def test_behind_the_last_layer_nothing_rounds_where_it_leaves_a_module(fn, transformed, policy):
  x = jax.random.normal(jax.random.key(0), (16, 6))
  variables = Behind(fn, is_module=False).init(jax.random.key(1), x)

  def plain(variables, x, *, is_module=False):
    if transformed == "module":
      return mpjax.apply_policy(Behind(fn, is_module), policy).apply(variables, x)
    if transformed == "scope" and is_module:
      return Behind(jax.named_scope("denormalize")(fn), is_module=False).apply(variables, x)
    return Behind(fn, is_module).apply(variables, x)

  cast = (lambda f: f) if transformed == "module" else lambda f: mpjax.autocast(f, policy)
  inside = cast(functools.partial(plain, is_module=True))
  np.testing.assert_array_equal(*(jax.jit(f)(variables, x) for f in (inside, cast(plain))))


@both
def test_what_leads_on_into_a_layer_still_leaves_its_module_in_16_bits(policy):
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4)(jnp.abs(Elementwise(lambda h: h + LEVELS)(nn.Dense(4)(x))))

  x = jnp.ones((2, 6))
  variables = Network().init(jax.random.key(1), x)
  run = lambda v: mpjax.apply_policy(Network(), policy).apply(v, x)
  found = equations(jax.make_jaxpr(run)(variables))
  (outside,) = (e for e in found if e.primitive.name == "abs")
  assert outside.outvars[0].aval.dtype.itemsize == 2
