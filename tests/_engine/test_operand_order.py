"""The operands of a matmul whose result is turned at once."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import mpjax
from _arrays import array, normal
from _jaxprs import equations


def narrow(fn):
  return mpjax.autocast(lambda w, x: fn(x @ w, x @ w), "mixed_bfloat16")


def grouped(q, k):
  q, k = q.reshape(-1, 16, 2, 3, 4), k.reshape(-1, 16, 2, 12)[..., :4]
  return jnp.einsum("bqgrd,bkgd->bgrqk", q, k)


def matmul(q, k):
  return q @ k.swapaxes(-1, -2)


def read_twice(q, k):
  scores = matmul(k, q)
  return scores.swapaxes(-1, -2) + scores


def last_matmul(jaxpr):
  return [e for e in equations(jaxpr) if e.primitive.name == "dot_general"][-1]


W = array(normal(0, 24, 24))
X = array(normal(1, 2, 16, 24))


def in_jax(q, k):
  q, k = q.reshape(-1, 16, 2, 3, 4), k.reshape(-1, 16, 2, 12)[..., :4]
  return jnp.einsum("BTNGH,BSNH->BNGTS", q, k)


def weighting(q, k):
  weights = jnp.einsum("bqd,bkd->bqk", q, k).reshape(-1, 2, 8, 4, 4)
  return jnp.einsum("bgrqk,bkgd->bqgrd", weights, k[:, :4, :6].reshape(-1, 4, 2, 3))


@pytest.mark.parametrize("fn", [grouped, in_jax])
def test_the_scores_of_grouped_attention_lie_as_their_softmax_reads_them(fn):
  scores = last_matmul(jax.make_jaxpr(narrow(fn))(W, X))
  assert scores.outvars[0].aval.shape == (2, 2, 3, 16, 16)  # batch, group, head, query, key
  plain = last_matmul(jax.make_jaxpr(fn)(X, X))
  assert plain.outvars[0].aval.shape != scores.outvars[0].aval.shape


def test_an_operand_that_is_no_smaller_than_half_of_the_result_is_not_turned():
  mixed = last_matmul(jax.make_jaxpr(narrow(weighting))(W, X))
  assert mixed.invars[0].aval.shape == (2, 2, 8, 4, 4)
  assert mixed.outvars[0].aval.shape == (2, 2, 8, 4, 3)  # the values are turned, not the weights


@pytest.mark.parametrize("fn", [matmul, read_twice])
def test_others_keep_their_order(fn):
  ours, plain = jax.make_jaxpr(narrow(fn))(W, X), jax.make_jaxpr(fn)(X, X)
  orders = [last_matmul(jaxpr).params["dimension_numbers"] for jaxpr in (ours, plain)]
  assert orders[0] == orders[1]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("fn", [grouped, in_jax, weighting])
@pytest.mark.parametrize("of", [lambda f: f, jax.vmap, jax.jit, jax.checkpoint])
def test_values_and_gradients_are_those_of_the_plain_order(of, fn):
  def loss(run):
    return lambda w, x: jnp.sum(jnp.sin(of(run)(x @ w, x @ w)))

  def one(q, k):
    return fn(q[None], k[None])[0]

  taken = one if of is jax.vmap else fn
  small = W / 24
  wanted = jax.jit(jax.grad(loss(taken), (0, 1)))(small, X)
  found = jax.jit(jax.grad(mpjax.autocast(loss(taken), "mixed_bfloat16"), (0, 1)))(small, X)
  for got, want in zip(found, wanted, strict=True):
    assert jnp.linalg.norm(got - want) < 0.02 * jnp.linalg.norm(want)


def test_a_result_with_a_sharding_of_its_own_keeps_its_order():
  mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))

  def fn(w, x, y):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x @ w, y @ w, dims, out_sharding=P("x", None)).T

  operands = jnp.ones((6, 6)), jnp.ones((4, 6)), jnp.ones((7, 6))
  with jax.set_mesh(mesh):
    assert mpjax.autocast(fn, "mixed_bfloat16")(*operands).shape == fn(*operands).shape == (7, 4)
