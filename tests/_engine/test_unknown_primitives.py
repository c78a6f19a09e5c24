"""A primitive that autocast has never seen runs as traced, wherever it stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

import mpjax
import mpjax.inspect
from _jaxprs import equations, wide_contractions
from _turns import in_turns

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
NAME = "foreign_scale"
foreign_p = Primitive(NAME)


def foreign(x):
  """Three times a float32; it takes nothing else."""
  return foreign_p.bind(x)


def _abstract(x):
  if x.dtype != np.float32:
    raise TypeError(f"foreign_scale takes float32; got {x.dtype}")
  return x


foreign_p.def_impl(lambda x: 3 * x)
foreign_p.def_abstract_eval(_abstract)
mlir.register_lowering(foreign_p, mlir.lower_fun(lambda x: 3 * x, multiple_results=False))
ad.deflinear2(foreign_p, lambda ct, _: [foreign(ct)])
batching.defvectorized(foreign_p)


@jax.custom_vjp
def by_custom_vjp(x, w):
  return foreign(jnp.tanh(x @ w))


by_custom_vjp.defvjp(
  lambda x, w: (by_custom_vjp(x, w), (x, w)),
  lambda residuals, ct: (foreign(ct) @ residuals[1].T, residuals[0].T @ foreign(ct)),
)


def layer(x, w):
  return foreign(jnp.tanh(x @ w))


PLACES = {
  "plain": lambda w, x: layer(x, w),
  "jit": lambda w, x: jax.jit(layer)(x, w),
  "scan": lambda w, x: lax.scan(lambda c, _: (layer(c, w), None), x, None, length=2)[0],
  "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda: layer(x, w), lambda: x @ w),
  "remat": lambda w, x: jax.checkpoint(layer)(x, w),
  "custom_vjp": lambda w, x: by_custom_vjp(x, w),
  "scan_of_remat": lambda w, x: lax.scan(
    lambda c, _: (jax.checkpoint(layer)(c, w), None), x, None, length=2
  )[0],
  "scan_of_custom_vjp": lambda w, x: lax.scan(
    lambda c, _: (by_custom_vjp(c, w), None), x, None, length=2
  )[0],
  "vmap": lambda w, x: jax.vmap(layer, (0, None))(x, w),
}


def loss(place):
  return lambda w, x: jnp.sum((PLACES[place](w, x) @ w) ** 2)


@functools.cache
def numbers():
  return jnp.asarray(np.linspace(-0.3, 0.4, 16).reshape(4, 4), jnp.float32), jnp.ones((2, 4))


@functools.cache
def gradient_in_float32(place):
  return jax.jit(jax.grad(loss(place)))(*numbers())


@pytest.mark.quick(every=3)
@in_turns(("place", "policy"), list(PLACES), list(COMPUTE))
def test_it_runs_in_float32_and_the_matmuls_around_it_do_not(place, policy):
  fn, want = loss(place), gradient_in_float32(place)
  for cast in (jax.grad(mpjax.autocast(fn, policy)), mpjax.autocast(jax.grad(fn), policy)):
    jaxpr = jax.make_jaxpr(cast)(*numbers())
    found = [e for e in equations(jaxpr) if e.primitive.name == NAME]
    assert len(found) >= 2
    assert {a.aval.dtype.name for e in found for a in (*e.invars, *e.outvars)} == {"float32"}
    assert not wide_contractions(jaxpr, COMPUTE[policy])
    (got,) = jax.jit(jaxpr_as_fun(jaxpr))(*numbers())
    assert jnp.linalg.norm(got - want) < 2.0**-6 * jnp.linalg.norm(want)


def test_explain_counts_it():
  x = jnp.ones((2, 2))
  fn = lambda w, x: foreign(foreign(x @ w)) + jnp.sin(x)
  report = mpjax.inspect.explain(fn, "mixed_bfloat16", x, x)
  assert [(op.op, op.count) for op in report.ops if op.rule == "unknown"] == [(NAME, 2)]
