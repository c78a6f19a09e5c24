"""A loss scale inside a function: larger cotangents in it, true derivatives out of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import mpjax
from _arrays import array
from _turns import in_turns
from mpjax._engine.running.scaled_cotangents import into, out_of

SCALE = 2.0**15
POLICY = "mixed_float16"
SMALL = 1e-7  # a cotangent that float16 loses

W = array(np.linspace(-0.6, 0.8, 64).reshape(8, 8))
X = array(np.linspace(-1, 1, 32).reshape(4, 8))


def layer(w, x):
  return jnp.tanh(x @ w) * SMALL


def loss(w, x):
  return jnp.sum(layer(w, x))


def scaled(fn, policy=POLICY, scale=SCALE, **how):
  return mpjax.autocast(fn, policy, loss_scale=scale, **how)


def near(got, want, rtol=0.01):
  """Whether trees of arrays agree, relative to the largest number of each."""
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())
    assert np.abs(other).max() > 0


def test_gradients_that_float16_loses_survive_and_are_true():
  want = jax.grad(loss, (0, 1))(W, X)
  lost = jax.grad(mpjax.autocast(loss, POLICY), (0, 1))(W, X)
  kept = jax.grad(scaled(loss), (0, 1))(W, X)
  near(kept, want)
  with pytest.raises(AssertionError):
    near(lost, want)


def test_what_enters_the_last_matmul_is_larger_by_the_scale():
  jaxpr = jax.make_jaxpr(jax.grad(scaled(loss)))(W, X)
  factors = [
    (eqn.params["forward"], eqn.params["backward"])
    for eqn in jaxpr.eqns
    if eqn.primitive.name == "mpjax_loss_scale"
  ]
  assert (SCALE, 1.0) in factors
  assert (1 / SCALE, 1.0) in factors


def test_values_and_tangents_are_those_without_a_scale():
  plain, inside = mpjax.autocast(layer, POLICY), scaled(layer)
  for got, want in (
    (inside(W, X), plain(W, X)),
    (jax.jvp(inside, (W, X), (X.T @ X, X)), jax.jvp(plain, (W, X), (X.T @ X, X))),
  ):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def each(fn):
  return jax.vmap(jax.grad(lambda w, x: fn(w, x[None])), (None, 0))(W, X)


def in_a_scan(fn):
  def total(w):
    return lax.scan(lambda c, x: (c + fn(w, x[None]), None), 0.0, X)[0]

  return jax.grad(total)(W)


def in_a_checkpoint(fn):
  return jax.jit(jax.grad(jax.checkpoint(fn)))(W, X)


def linearized(fn):
  return jax.linear_transpose(jax.linearize(lambda w: fn(w, X), W)[1], W)(1.0)


def forward_over_reverse(fn):
  return jax.jvp(jax.grad(lambda w: fn(w, X)), (W,), (W + 1,))


def reverse_over_forward(fn):
  return jax.grad(lambda w: jax.jvp(lambda w: fn(w, X), (w,), (W + 1,))[1])(W)


def reverse_over_reverse(fn):
  return jax.grad(lambda w: jnp.sum(jax.grad(fn)(w, X) * (W + 1)))(W)


def third_order(fn):
  def slope(v):
    return jax.grad(lambda w: jnp.sum(jax.grad(fn)(w, X) * v))(W)

  return jax.grad(lambda v: jnp.sum(slope(v) * (W + 1)))(W)


def gradient_of_the_cotangent(fn):
  _, pull = jax.vjp(lambda w: fn(w, X), W)
  return jax.grad(lambda c: jnp.sum(pull(c)[0] * (W + 1)))(1.0)


DERIVATIVES = {
  derive.__name__: derive
  for derive in (
    each,
    in_a_scan,
    in_a_checkpoint,
    linearized,
    forward_over_reverse,
    reverse_over_forward,
    reverse_over_reverse,
    third_order,
    gradient_of_the_cotangent,
  )
}


@pytest.mark.quick(every=3)
@in_turns(("derive", "policy"), DERIVATIVES, ("mixed_float16", "mixed_bfloat16"))
def test_every_derivative_is_true(derive, policy):
  near(derive(scaled(loss, policy)), derive(loss), 0.05 if policy == "mixed_bfloat16" else 0.01)


def test_results_and_operands_in_16_bits_round_once_on_each_side():
  def grads(fn, w, x):
    out, pull = jax.vjp(fn, w, x)
    return out, pull(jnp.full(out.shape, 2.0**-14, out.dtype))

  out, (to_w, to_x) = grads(
    scaled(lambda w, x: (x.astype(w.dtype) @ w) * 2.0**-6, "float16"),
    W.astype("float16"),
    X.astype("float16"),
  )
  assert {out.dtype, to_w.dtype, to_x.dtype} == {np.dtype("float16")}
  cotangent = jnp.full((4, 8), 2.0**-20)
  true = X.T @ cotangent, cotangent @ W.T
  for got, want in zip((to_w, to_x), true, strict=True):  # both are subnormal in float16
    np.testing.assert_allclose(got.astype("float32"), want, rtol=0, atol=2.0**-24)


def test_an_author_s_own_16_bit_and_integer_results_keep_their_dtypes():
  def fn(w, x):
    return {"half": (x @ w).astype(jnp.bfloat16), "count": jnp.argmax(x @ w), "loss": loss(w, x)}

  out = scaled(fn)(W, X)
  assert out["half"].dtype == jnp.bfloat16
  assert jnp.issubdtype(out["count"].dtype, jnp.integer)
  assert out["loss"].dtype == jnp.float32

  def objective(w):
    out = scaled(fn)(w, X)
    return out["loss"] * 1e7 + jnp.sum(out["half"].astype(jnp.float32)), out["count"]

  def plainly(w):
    return loss(w, X) * 1e7 + jnp.sum(X @ w)

  near(jax.grad(objective, has_aux=True)(W)[0], jax.grad(plainly)(W))


def test_integers_keys_and_static_arguments_pass():
  def fn(w, x, ids, key, power):
    noise = jax.random.uniform(key, (4, 8))
    return jnp.sum(((x + noise)[ids] @ w) ** power) * SMALL

  args = X, jnp.array([0, 2]), jax.random.key(0), 2
  near(jax.grad(scaled(fn))(W, *args), jax.grad(fn)(W, *args))


@pytest.mark.parametrize("how", ["plain", "jit", "scan", "checkpoint", "cond"])
def test_gradients_of_what_a_function_closes_over_are_true(how):
  def objective(closed, transform):
    def fn(w, x):
      h = jnp.tanh(x @ w)
      if how == "jit":
        return jnp.sum(jax.jit(lambda h: jnp.tanh(h @ closed))(h)) * SMALL
      if how == "scan":
        return jnp.sum(lax.scan(lambda c, _: (jnp.tanh(c @ closed), None), h, None, 3)[0]) * SMALL
      if how == "checkpoint":
        return jnp.sum(jax.checkpoint(lambda h: jnp.tanh(h @ closed))(h)) * SMALL
      if how == "cond":
        return jnp.sum(lax.cond(x[0, 0] < 0, lambda h: h @ closed, lambda h: h, h)) * SMALL
      return jnp.sum(jnp.tanh(h @ closed)) * SMALL

    return transform(fn)(W, X)

  near(jax.grad(objective)(W + 0.1, scaled), jax.grad(objective)(W + 0.1, lambda fn: fn))


def test_what_overflows_is_not_finite_and_skipped():
  def large(params):
    return scaled(lambda w, x: jnp.sum(x @ w), scale=2.0**17)(params, X)

  grads = jax.grad(large)(W)
  assert not bool(mpjax.all_finite(grads))
  tx = mpjax.static_loss_scaling(optax.sgd(0.1), 1)
  updates, state = tx.update(grads, tx.init(W), W)
  assert not bool(mpjax.step_is_finite(state))
  assert not np.any(updates)


def test_the_inner_of_two_scales_governs():
  inner = scaled(layer, scale=2.0**12)
  both = scaled(lambda w, x: jnp.sum(jax.jit(inner)(w, x)) + loss(w, x), scale=2.0**20)
  near(jax.grad(both)(W, X), 2 * jax.grad(loss)(W, X))
  alike = scaled(lambda w, x: jnp.sum(scaled(layer)(w, x)))
  once = lambda w, x: jnp.sum(scaled(layer)(w, x))
  np.testing.assert_array_equal(jax.grad(alike)(W, X), jax.grad(once)(W, X))
  # With a gradient taken inside of the outer function, of what has a scale of its own.
  step = scaled(lambda w, x: jnp.sum(jax.grad(scaled(loss))(w, x) * (x.T @ x)), scale=2.0**3)
  want = jax.grad(lambda w: jnp.sum(jax.grad(loss)(w, X) * (X.T @ X)))(W)
  near(jax.grad(step)(W, X), want)


def test_a_float32_policy_and_a_scale_of_one_add_nothing():
  for policy, scale in (("float32", SCALE), (POLICY, 1)):
    found = jax.make_jaxpr(jax.grad(scaled(loss, policy, scale)))(W, X)
    want = jax.make_jaxpr(jax.grad(mpjax.autocast(loss, policy)))(W, X)
    assert str(found) == str(want)


@pytest.mark.parametrize(
  ("value", "kind", "message"),
  [
    (1000, ValueError, r"loss_scale must be a positive power of two.*Got 1000.*Choose 2\*\*10"),
    (0.0, ValueError, "loss_scale must be a positive power of two"),
    (True, ValueError, "loss_scale must be a power of two"),
    ("dynamic", TypeError, "loss_scale must be a power of two. Got 'dynamic'"),
  ],
)
@pytest.mark.parametrize("policy", [POLICY, "float32"])
def test_what_is_no_power_of_two_is_refused(value, kind, message, policy):
  with pytest.raises(kind, match=message):
    mpjax.autocast(loss, policy, loss_scale=value)


def test_a_scale_that_is_traced_is_refused():
  with pytest.raises(TypeError, match="known when the function is made"):
    jax.jit(lambda s: scaled(loss, scale=s)(W, X))(2.0)


def test_both_borders_batch_compile_and_keep_types():
  x = jnp.arange(4, dtype=jnp.float16)
  np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: into(x, SCALE)))(x), x)
  assert into(jnp.arange(3), SCALE).dtype == jnp.int32
  assert out_of(x, SCALE).dtype == jnp.float32
  (grad,) = jax.vjp(lambda x: into(x, SCALE), x)[1](jnp.full(4, 512, jnp.float16))
  assert grad.dtype == jnp.float16
  np.testing.assert_array_equal(grad, np.full(4, 2.0**-6))
