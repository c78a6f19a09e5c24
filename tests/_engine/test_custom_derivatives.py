"""Derivatives of the user's own, one inside another, are called as without a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import mpjax
from _jaxprs import contractions, wide_contractions
from _turns import in_turns

POLICIES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
every_policy = pytest.mark.parametrize("policy", POLICIES)


def op(x, w):
  return jnp.tanh(x @ w)


@jax.custom_vjp
def backward_only(x, w):
  return op(x, w)


backward_only.defvjp(
  lambda x, w: jax.vjp(op, x, w), lambda pullback, ct: tuple(5.0 * g for g in pullback(ct))
)


def with_rule(body, rule, **options):
  """A function with a forward-mode derivative of its own."""

  @jax.custom_jvp
  def fn(x, w):
    return body(x, w)

  fn.defjvp(rule, **options)
  return fn


def through(fn):
  """A rule that differentiates a function, and triples the result."""

  def rule(primals, tangents):
    y, dy = jax.jvp(fn, primals, tangents)
    return y, 3.0 * dy

  return rule


NESTED = {
  "body_and_rule": with_rule(backward_only, through(backward_only)),
  "rule_alone": with_rule(op, through(backward_only)),
  "one_in_another": with_rule(
    with_rule(op, through(backward_only)), through(with_rule(op, through(backward_only)))
  ),
}
every_nested = pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED.keys())


@pytest.fixture(scope="module")
def operands():
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)) / 3.0
  return w, x[:4]


PLACES = {
  "alone": lambda fn, w, x: fn(x, w),
  "jit": lambda fn, w, x: jax.jit(fn)(x, w),
  "scan": lambda fn, w, x: lax.scan(lambda c, _: (fn(c, w), None), x, None, length=2)[0],
  "remat": lambda fn, w, x: jax.checkpoint(fn)(x, w),
}


@pytest.mark.quick(every=3)
@in_turns(("nested", "place", "policy"), NESTED, PLACES, list(POLICIES))
def test_a_rule_that_differentiates_a_custom_vjp_is_narrow_and_the_users(
  nested, place, policy, operands
):
  loss = lambda w, x: jnp.sum(place(nested, w, x) ** 2)
  grad = jax.grad(mpjax.autocast(loss, policy), (0, 1))
  jaxpr = jax.make_jaxpr(grad)(*operands)
  assert len(contractions(jaxpr)) >= 3
  assert not wide_contractions(jaxpr, POLICIES[policy])
  wanted = jax.jit(jax.grad(loss, (0, 1)))(*operands)
  for got, want in zip(jax.jit(grad)(*operands), wanted, strict=True):
    assert jnp.linalg.norm(got - want) < 8 * float(
      jnp.finfo(POLICIES[policy]).eps
    ) * jnp.linalg.norm(want)


@every_nested
def test_it_batches_as_without_a_policy(nested, operands):
  w, x = operands
  per_row = lambda fn: jax.vmap(lambda r: fn(r[None], w))(x)
  inside = lambda w, x: jax.vmap(lambda r: nested(r[None], w))(x).sum()
  # The vmap around an own rule is JAX's to refuse when it is differentiated; its value is not.
  got = mpjax.autocast(inside, "mixed_bfloat16")(w, x)
  np.testing.assert_allclose(got, inside(w, x), rtol=0.02, atol=0.02)
  row_grad = lambda fn: lambda r, w: jax.grad(lambda r: fn(r, w).sum())(r)
  cast = mpjax.autocast(nested, "mixed_bfloat16", argnums=1)
  got, want = per_row(row_grad(cast)), per_row(row_grad(nested))
  assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)


@every_nested
def test_forward_mode_is_refused_by_jax_as_without_a_policy(nested, operands):
  for fn in (
    lambda w, x: nested(x, w),
    mpjax.autocast(lambda w, x: nested(x, w), "mixed_bfloat16"),
  ):
    with pytest.raises(TypeError, match="forward-mode"):
      jax.jvp(fn, operands, operands)


def test_a_rule_is_not_called_where_nothing_is_differentiated(operands):
  def refuse(primals, tangents):
    raise NotImplementedError("no derivative")

  fn = with_rule(backward_only, refuse)
  cast = mpjax.autocast(lambda w, x: fn(x, w), "mixed_bfloat16")
  assert cast(*operands).shape == (4, 8)
  with pytest.raises(NotImplementedError, match="no derivative"):
    jax.grad(lambda w, x: cast(w, x).sum())(*operands)


def test_what_is_not_asked_for_need_not_be_transposable(operands):
  def rule(primals, tangents):
    (x, w), (tx, tw) = primals, tangents
    y, dy = jax.jvp(lambda x: backward_only(x, w), (x,), (tx,))
    halve = lambda c: (c[0] * 0.5, c[1] + 1.0)
    tw = lax.while_loop(lambda c: c[1] < 2.0 + 0.0 * jnp.sum(x), halve, (tw, 0.0))[0]
    return y, dy + x @ tw

  fn = with_rule(backward_only, rule)
  loss = lambda w, x: fn(x, w).sum()
  got, want = (jax.grad(f, 1)(*operands) for f in (mpjax.autocast(loss, "mixed_bfloat16"), loss))
  assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)


def test_an_unread_tangent_of_a_custom_vjp_keeps_nothing_from_forward_mode(operands):
  def rule(primals, tangents):
    y, _ = jax.jvp(backward_only, primals, tangents)
    return y, y * tangents[0].sum()

  fn = with_rule(backward_only, rule)
  forward = lambda f: jax.jit(lambda w, x: jax.jvp(f, (w, x), (w, x)))(*operands)
  plain = lambda w, x: fn(x, w)
  got, want = forward(mpjax.autocast(plain, "mixed_bfloat16"))[1], forward(plain)[1]
  assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)


def refusing(primals, tangents):
  """A rule for the derivative in x alone."""
  (x, w), (tx, tw) = primals, tangents
  if not isinstance(tw, SymbolicZero):
    raise ValueError("w must not be differentiated")
  return jax.jvp(lambda x: op(x, w), (x,), (tx,))


@pytest.mark.quick(every=2)
@in_turns(("body", "policy"), {"plain_body": op, "custom_vjp_body": backward_only}, list(POLICIES))
def test_a_rule_knows_which_tangents_are_zero(body, policy, operands):
  fn = with_rule(body, refusing, symbolic_zeros=True)
  w, x = operands
  loss = lambda x: fn(x, 2.0 * w).sum()
  cast = mpjax.autocast(loss, policy)
  for derivative in (jax.grad, jax.jacfwd, lambda f: jax.grad(jax.jit(f))):
    got, want = derivative(cast)(x), derivative(loss)(x)
    assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)
  with pytest.raises(ValueError, match="w must not"):
    jax.grad(mpjax.autocast(lambda w: fn(x, w).sum(), policy))(w)


@jax.custom_vjp
def scaled(x, scale):
  return jnp.tanh(x) * scale


def scaled_forward(x, scale):
  """Refuses, as `equinox.filter_custom_vjp` does, to be differentiated in its second operand."""
  if scale.perturbed:
    raise ValueError("scale must not be differentiated")
  return jnp.tanh(x.value) * scale.value, (x.value, scale.value)


def scaled_backward(residuals, ct):
  x, scale = residuals
  return 7.0 * ct * (1.0 - jnp.tanh(x) ** 2) * scale, None


scaled.defvjp(scaled_forward, scaled_backward, symbolic_zeros=True)


@every_policy
def test_a_forward_pass_knows_what_is_differentiated(policy, operands):
  loss = lambda w, x: scaled(x @ w, jnp.full((4, 8), 2.0)).sum()
  got = jax.jit(jax.grad(mpjax.autocast(loss, policy)))(*operands)
  want = jax.grad(loss)(*operands)
  assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)
  with pytest.raises(ValueError, match="scale must not"):
    jax.grad(mpjax.autocast(lambda w, x: scaled(x @ w, x @ w).sum(), policy))(*operands)


@every_policy
def test_a_row_of_a_batch_has_the_gradient_that_it_has_alone(policy, operands):
  w, x = operands
  loss = lambda x, w: scaled(x @ w, jnp.full((8,), 2.0)).sum()
  rows = jax.vmap(jax.grad(mpjax.autocast(loss, policy, argnums=1)), (0, None))(x, w)
  want = jax.vmap(jax.grad(loss), (0, None))(x, w)
  assert jnp.linalg.norm(rows - want) < 0.05 * jnp.linalg.norm(want)


def test_results_that_nobody_differentiates_have_zero_cotangents(operands):
  """A backward pass gets an array for each result, though only one of them is read."""

  @jax.custom_vjp
  def both(x, w):
    return op(x, w), x

  both.defvjp(
    lambda x, w: (both(x, w), (x, w)),
    lambda r, cts: tuple(
      a + b for a, b in zip(jax.vjp(op, *r)[1](cts[0]), (cts[1], 0.0), strict=True)
    ),
  )
  for read in (0, 1):
    loss = lambda w, x, read=read: both(x, w)[read].sum()
    got, want = (jax.grad(f, (0, 1))(*operands) for f in (mpjax.autocast(loss, "bfloat16"), loss))
    for a, b in zip(got, want, strict=True):
      assert jnp.linalg.norm(a - b) <= 0.05 * jnp.linalg.norm(b)


def scaled_by(rule, scale):
  """The identity times what its derivative rule closes over."""
  scaled = getattr(jax, f"custom_{rule}")(lambda y: y * scale())
  if rule == "vjp":
    scaled.defvjp(lambda y: (y * scale(), None), lambda _, ct: (ct * scale(),))
  else:
    scaled.defjvp(lambda y, t: (y[0] * scale(), t[0] * scale()))
  return scaled


def reads_a_loop(rule, w, x):
  turn = lambda c, row: (0.5 * c + row, None)
  return scaled_by(rule, lambda: lax.scan(turn, x[:1], x[:, None])[0])(x @ w)


def reads_what_is_narrow(rule, w, x):
  h = jax.nn.gelu(x @ jnp.ones((8, 8)))
  return scaled_by(rule, lambda: h)(x @ w) * jax.nn.softmax(h)


def reads_from_a_checkpoint(rule, w, x):
  scaled = scaled_by(rule, lambda: jnp.tanh(x))
  return jax.checkpoint(lambda y: scaled(y) ** 2)(x @ w)


def reads_through_another_rule(rule, w, x):
  inner = scaled_by(rule, lambda: jnp.tanh(x))
  outer = jax.custom_vjp(inner)
  outer.defvjp(lambda y: (inner(y), y), lambda y, ct: jax.vjp(inner, y)[1](ct))
  return outer(x @ w)


def reads_what_is_within_an_island(rule, w, x):
  h = lax.stop_gradient(x @ w)
  s = jnp.exp(h)
  return (scaled_by(rule, lambda: s)(x @ w) * jnp.log1p(s)) @ w


def reads_what_is_within_a_softmax(rule, w, x):
  scores = lax.stop_gradient(x @ w)
  e = jnp.exp(scores - scores.max(-1, keepdims=True))
  return scaled_by(rule, lambda: e)(x @ w) * ((e / e.sum(-1, keepdims=True)) @ w)


def reads_in_equal_layers(rule, w, x):
  helper = jax.jit(lambda z: jnp.exp(0.1 * z) * z + 0.2)
  for _ in range(4):
    m = helper(lax.stop_gradient(x @ w))
    n = m * m
    x = x + 0.1 * scaled_by(rule, lambda m=m: m)(jnp.tanh(x @ w))
    x = x + 0.1 * scaled_by(rule, lambda n=n: n)(jnp.tanh(x @ w)) * jnp.tanh(n + 1.0)
  return x


def reads_behind_many_rules(rule, w, x):
  for n in range(60):
    x = scaled_by(rule, lambda n=n: 1 + 0.01 * n * jnp.ones((1, 1)))(x) / (1 + 0.01 * n)
  return scaled_by(rule, lambda: jnp.tanh(x))(x @ w)


READERS = {
  "a_loop": reads_a_loop,
  "what_is_narrow": reads_what_is_narrow,
  "from_a_checkpoint": reads_from_a_checkpoint,
  "through_another_rule": reads_through_another_rule,
  "within_an_island": reads_what_is_within_an_island,
  "within_a_softmax": reads_what_is_within_a_softmax,
  "in_equal_layers": reads_in_equal_layers,
  "behind_many_rules": reads_behind_many_rules,
}
DERIVED = {
  "eagerly": jax.grad,
  "jitted": lambda loss: jax.jit(jax.grad(loss)),
  "batched": lambda loss: lambda w, x: jax.vmap(jax.grad(loss), (None, 0))(w, x[:, None]),
  "in_a_scan": lambda loss: jax.jit(
    lambda w, x: lax.scan(lambda w, _: (w - 0.01 * jax.grad(loss)(w, x), None), w, None, length=3)[
      0
    ]
  ),
}


@pytest.mark.quick(every=3)
@in_turns(
  ("reader", "rule", "derived", "policy"), READERS, ["vjp", "jvp"], DERIVED, [*POLICIES], turning=2
)
def test_a_rule_reads_what_its_caller_computed(reader, rule, derived, policy, operands):
  """It runs when the call is differentiated, on what the call made of its arguments then."""
  w, x = operands

  def loss(w, x):
    return reader(rule, w, x).sum()

  cast, bound = mpjax.autocast(loss, policy), 0.02 if policy == "mixed_bfloat16" else 0.003
  for given in (x, 1.5 * x):
    got, want = derived(cast)(w, given), derived(loss)(w, given)
    assert jnp.linalg.norm(got - want) <= bound * jnp.linalg.norm(want)


@pytest.mark.parametrize("rule", ["vjp", "jvp"])
def test_a_rule_that_reads_what_is_differentiated_says_what_to_write(rule):
  """In float32, too, that is an error, of a tracer."""

  def loss(w, x):
    scale = jnp.tanh(x @ w).mean(0, keepdims=True)
    return scaled_by(rule, lambda: scale)(x @ w).sum()

  arguments = jnp.eye(4), jnp.ones((2, 4))
  with pytest.raises(TypeError, match="Make it an argument of the function with the rule"):
    jax.grad(mpjax.autocast(loss, "mixed_bfloat16"))(*arguments)
