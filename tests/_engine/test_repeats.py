"""Runs that recur change how a function is traced, not what comes of it."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from _jaxprs import sub_jaxprs
from mpjax._engine.planning.plan import Step
from mpjax._engine.running import repeats
from mpjax._engine.running.islands import Island
from mpjax._engine.running.softmax import Softmax

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYERS = 4  # as often as a run must recur to be traced once for all


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + nn.Dense(8)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
    q, k, v = (nn.Dense(8, name=name)(x).reshape(1, 3, 2, 4) for name in "qkv")
    x = x + jax.nn.dot_product_attention(q, k, v).reshape(3, 8)
    return x * jax.nn.softmax(nn.Dense(8)(x)) + jnp.where(x > 0, x, 0.1)


class Deep(nn.Module):
  @nn.compact
  def __call__(self, x):
    for n in range(LAYERS):
      x = Layer(name=f"layer_{n}")(x)
    return x


@pytest.fixture(scope="module")
def operands():
  x = jax.random.normal(jax.random.key(0), (3, 8))
  with jax.numpy_dtype_promotion("standard"):
    return jax.jit(Deep().init)(jax.random.key(1), x), x


def loss(variables, x):
  return (Deep().apply(variables, x) ** 2).sum()


def signatures(jaxpr, scope=""):
  """What each equation does, where it stands and on what, inside of jitted functions too."""
  for eqn in jaxpr.eqns:
    place = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
    bodies = [body for value in eqn.params.values() for body in sub_jaxprs(value)]
    for body in bodies:
      yield from signatures(body, place)
    if eqn.primitive.name not in ("jit", "pjit"):
      yield eqn.primitive.name, place, *(str(v.aval) for v in (*eqn.invars, *eqn.outvars))


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_equations_are_those_of_tracing_step_by_step(policy, operands, monkeypatch):
  jaxpr = jax.make_jaxpr(mpjax.autocast(loss, policy))(*operands)
  monkeypatch.setattr(repeats, "OFTEN", 10**9)
  plain = jax.make_jaxpr(mpjax.autocast(loss, policy))(*operands)
  assert Counter(signatures(jaxpr.jaxpr)) == Counter(signatures(plain.jaxpr))


@pytest.mark.quick(every=2, start=1)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_what_recurs_in_another_shape_is_no_recurrence(policy):
  """As in the stages of a ResNet: a parameter is spread over the shape of what it is added to."""

  def shrinking(p, x):
    for _ in range(LAYERS + 1):  # the first one's input is data, and no recurrence
      x = x[1:]
      with jax.named_scope("layer"):
        x = jnp.tanh(x @ p["w"]) * p["scale"] + p["bias"]
    return x.sum()

  p = {"w": jnp.eye(8), "scale": jnp.ones((1, 8)), "bias": jnp.ones((1, 8))}
  grad = jax.jit(jax.grad(mpjax.autocast(shrinking, policy)))
  assert grad(p, jnp.ones((2 * LAYERS, 8)))["bias"].shape == (1, 8)


def test_runs_that_recur_are_found_and_traced_once(operands, monkeypatch):
  found, jitted = [], []
  joined, jit = repeats.joined, jax.jit

  def counting_joined(plan, units, kept):
    parts = joined(plan, units, kept)
    found.extend(part for part in parts if isinstance(part, repeats.Repeat))
    return parts

  def counting_jit(fn, **options):
    return jit(lambda *xs: [jitted.append(fn), fn(*xs)][1], **options)

  monkeypatch.setattr(repeats, "joined", counting_joined)
  monkeypatch.setattr(jax, "jit", counting_jit)
  jax.make_jaxpr(jax.grad(mpjax.autocast(loss, "mixed_float16")))(*operands)
  codes = {repeat.code for repeat in found}
  assert {type(unit) for repeat in found for unit in repeat.units} == {Step, Island, Softmax}
  assert len(found) >= LAYERS * len(codes) > 0
  assert len(jitted) == len(codes)


@pytest.mark.ci
def test_values_are_the_same_to_the_bit(operands, monkeypatch):
  grads = jax.jit(jax.grad(mpjax.autocast(loss, "mixed_bfloat16")))(*operands)
  monkeypatch.setattr(repeats, "OFTEN", 10**9)
  stepwise = jax.jit(jax.grad(mpjax.autocast(loss, "mixed_bfloat16")))(*operands)
  jax.tree.map(np.testing.assert_array_equal, grads, stepwise)


def test_layers_that_differ_in_a_number_are_not_mixed_up():
  def fn(w, x):
    for n in range(8):
      x = jnp.tanh(x @ w + 0.5) * (float(n % 2) + 0.25) - 1.0
    return x

  args = jnp.eye(4) * 0.5, jnp.ones((2, 4))
  cast = mpjax.autocast(fn, "mixed_bfloat16")
  np.testing.assert_allclose(jax.jit(cast)(*args), fn(*args), atol=0.03)
