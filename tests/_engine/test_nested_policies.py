"""Functions under policies that call each other: the innermost policy governs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mpjax
from _arrays import array
from _jaxprs import equations

both = pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
W, X = array(np.eye(4)), array(np.ones((2, 4)))


def operands(fn, *args):
  """The dtypes of the first operands of a function's matmuls, in order."""
  found = equations(jax.make_jaxpr(fn)(*args))
  return [e.invars[0].aval.dtype.name for e in found if e.primitive.name == "dot_general"]


def narrow(policy):
  return mpjax.Policy.parse(policy).compute_dtype.name


@both
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_a_float32_policy_inside_another_is_a_float32_region(policy, wrap):
  exact = mpjax.autocast(wrap(lambda w, x: jnp.tanh(x @ w) @ w), "float32")
  fn = mpjax.autocast(lambda w, x: exact(w, x @ w) @ w, policy)
  assert operands(fn, W, X) == [narrow(policy), "float32", "float32", narrow(policy)]
  grad = jax.grad(lambda w: fn(w, X).sum())
  assert operands(grad, W).count("float32") >= 2 + 4  # a checkpoint computes one again


@both
def test_the_region_costs_no_equation(policy):
  fn = lambda w, x: jnp.tanh(x @ w)
  plain, marked = (jax.make_jaxpr(f)(W, X) for f in (fn, mpjax.autocast(fn, "float32")))
  assert str(plain) == str(marked)


@both
def test_a_scan_in_a_float32_region_is_float32(policy):
  def layers(w, x):
    return jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=3)[0]

  fn = mpjax.autocast(lambda w, x: mpjax.autocast(layers, "float32")(w, x) @ w, policy)
  assert operands(fn, W, X) == ["float32", narrow(policy)]


def test_another_16_bit_policy_governs_inside():
  inner = mpjax.autocast(lambda w, x: x @ w, "mixed_float16")
  fn = mpjax.autocast(lambda w, x: inner(w, x) @ w, "mixed_bfloat16")
  assert operands(fn, W, X) == ["float16", "bfloat16"]


@both
def test_a_float32_region_holds_modules_too(policy):
  model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  fn = mpjax.autocast(lambda m, x: mpjax.autocast(lambda m, x: m(x), "float32")(m, x), policy)
  assert operands(lambda x: fn(model, x), X) == ["float32"]
  dense = nn.Dense(4)
  variables = dense.init(jax.random.key(0), X)
  fn = mpjax.autocast(mpjax.autocast(dense.apply, "float32"), policy)
  assert operands(fn, variables, X) == ["float32"]
