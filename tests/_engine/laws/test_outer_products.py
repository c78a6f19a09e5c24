"""Products without a contraction: positions, layers of one input, scores of data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _backends import rounded
from _both_formats import DATA, W, both, cases, in_both_formats, matmuls, operand_bytes
from _jaxprs import equations

pytestmark = pytest.mark.usefixtures("promotion_of_users")


FREQUENCIES = np.asarray(1 / 1e4 ** (np.arange(0, 4, 2) / 4), np.float32)
OUTER = {
  "einsum": lambda t, f: jnp.einsum("t,k->tk", t, f),
  "batched": lambda t, f: jnp.einsum("bt,k->btk", t[None], f)[0],
  "swapped": lambda t, f: jnp.einsum("k,t->tk", f, t),
  "tensordot": lambda t, f: jnp.tensordot(t, f, axes=0),
  "outer": jnp.outer,
  "matmul": lambda t, f: t[:, None] @ f[None],
  "dot": lambda t, f: jnp.dot(t[:, None], f[None]),
  "dot_general": lambda t, f: lax.dot_general(t, f, (((), ()), ((), ()))),
  "vmap": lambda t, f: jax.vmap(lambda u: u * f)(t),
  "in_a_jit": jax.jit(lambda t, f: jnp.einsum("t,k->tk", t, f)),
}


@pytest.mark.quick(every=3)
@both
@cases(**OUTER)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32], ids=["integers", "floats"])
def test_positions_survive_every_outer_product(fn, dtype, policy):
  if dtype == jnp.int32 and fn is OUTER["dot_general"]:
    positions = lambda: jnp.array([1001, 8191, 2**30], jnp.int32).astype(jnp.float32)
  else:
    positions = lambda: jnp.array([1001, 8191, 2**30], dtype)
  angles = lambda w, t: fn(t, jnp.asarray(FREQUENCIES))
  got = rounded(mpjax.autocast(angles, policy))(W, positions())
  truth = np.outer(np.asarray(positions(), np.float64), FREQUENCIES)
  np.testing.assert_allclose(got, truth, rtol=1e-6)


@both
@cases(
  vdot=lambda g, t: jnp.vdot(g, t),
  einsum=lambda g, t: jnp.einsum("i,i->", g, t),
  matrices=lambda g, t: g[None] @ t[:, None],
  tensordot=lambda g, t: jnp.tensordot(g, t, 1),
)
def test_so_does_a_gradient_of_one_number_in_an_inner_product(fn, policy):
  def estimate(s, x, t):
    return fn(jax.grad(lambda s: jnp.sum((x @ x) * s))(s), t)

  args = jnp.ones(1), jnp.full((4, 4), 0.3), jnp.full(1, 3.3e-8)
  got, want = in_both_formats(estimate, policy, *args)
  np.testing.assert_allclose(got, want, rtol=0.01)


@both
def test_an_outer_product_of_what_is_narrow_stays_narrow(policy):
  fn = lambda w, x: jnp.einsum("i,j->ij", x[0] @ w, x[1] @ w)
  (first, _, outer) = matmuls(mpjax.autocast(fn, policy), W, DATA)
  assert outer.invars[0].aval.dtype == first.invars[0].aval.dtype


LINE = array(np.linspace(990, 1010, 32)[:, None])
OF_ONE = {
  "returned": lambda w, t: t @ w[:1] + w[1],
  "its_own_layer": lambda w, t: t @ w[:1] @ jnp.eye(4) * 0 + (t @ w[:1] - 1000 * w[0]),
  "of_two_parameters": lambda w, t: w[:, :1] @ w[:1] - 1,
}


@both
@pytest.mark.parametrize("fn", OF_ONE.values(), ids=OF_ONE.keys())
def test_what_a_layer_of_one_input_returns_is_exact(fn, policy):
  """A line through data near 1000: in 16 bits it would predict 1000, 1004, 1008."""
  w = jnp.arange(1.0, 17).reshape(4, 4) / 8 + 0.01
  found, want = in_both_formats(fn, policy, w, LINE)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)


@both
def test_a_hidden_layer_of_one_input_is_narrow(policy):
  found = equations(
    jax.make_jaxpr(mpjax.autocast(lambda w, t: jnp.tanh(t @ w[:1] + w[1]) @ w, policy))(W, LINE)
  )
  (tanh,) = [e for e in found if e.primitive.name == "tanh"]
  assert tanh.outvars[0].aval.dtype.itemsize == 2


@both
@cases(
  neighbors=lambda w, x, bank: jax.nn.logsumexp(5 * (x @ w) @ bank.T, -1),
  best=lambda w, x, bank: jnp.argmax((x @ w) @ bank.T, -1),
)
def test_scores_of_data_are_those_of_a_layer(fn, policy):
  bank = jax.random.normal(jax.random.key(5), (64, 64))
  found = matmuls(mpjax.autocast(fn, policy), jnp.eye(64), bank[:4], bank)
  assert operand_bytes(found) == {2}


@both
@cases(
  slope=lambda w: jax.grad(lambda s: jnp.einsum("ij,->ij", w, s).sum())(0.5),
  push=lambda w: jax.jvp(lambda s: jnp.tensordot(s, w, axes=0), (0.5,), (1.0,)),
  quadratic=lambda w: jax.grad(lambda y: jnp.einsum("ij,i,j", w, y, y))(jnp.ones(2)),
  one=lambda w: jnp.tensordot(1.0, w @ w, axes=0),
)
def test_a_number_may_be_an_operand(fn, policy):
  w = jnp.array([[2.0, -1.0], [-1.0, 3.0]])
  for found, want in zip(
    *map(jax.tree.leaves, (mpjax.autocast(fn, policy)(w), fn(w))), strict=True
  ):
    np.testing.assert_allclose(found, want, rtol=0.01)
