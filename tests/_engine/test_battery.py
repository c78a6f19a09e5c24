"""Whatever runs in float32 runs under autocast: forward and gradient, with close values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

import battery
import mpjax
from _turns import in_turns

EPS = {"mixed_bfloat16": 2.0**-7, "mixed_float16": 2.0**-10}

# The bound is 8 units of the format, relative to the largest entry; these amplify what the matmul
# before them rounds.
ROUGH = {"numpy.sinc": 64, "lax.reduce_precision": 64}  # the latter's own grid is coarse


pytestmark = pytest.mark.usefixtures("promotion_of_users")


def gradient(fn):
  """The gradient of a sum in which every entry of the results weighs something else."""

  def total(y):
    weights = np.linspace(0.5, 1.5, y.size, dtype=np.float32).reshape(y.shape)
    return jnp.sum(weights * jnp.abs(y) ** 2).astype(jnp.float32)

  def loss(w, x):
    leaves = jax.tree.leaves(fn(w, x))
    return sum(total(y) for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact))

  return jax.grad(loss)


@functools.cache
def operands():
  w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)) * 0.5
  return w, x[:2] + 0.1


@functools.cache
def functions(name):
  """A case, and its gradient where plain JAX has one, as traced in float32, with what they return.

  That trace is all that autocast reads of a function. It is made once, for both policies.
  """
  fn = battery.CASES[name]
  fns = [fn] if name in battery.FORWARD_ONLY else [fn, gradient(fn)]
  traced = [jax.make_jaxpr(fn, return_shape=True)(*operands()) for fn in fns]
  return [(as_traced(jaxpr, shapes), shapes) for jaxpr, shapes in traced]


def as_traced(jaxpr, shapes):
  structure = jax.tree.structure(shapes)
  return lambda *args: structure.unflatten(jaxpr_as_fun(jaxpr)(*args))


def under(policy, name):
  """The results of a case under a policy."""
  return lambda w, x: [mpjax.autocast(fn, policy)(w, x) for fn, _ in functions(name)]


@pytest.mark.quick(every=7)
@in_turns(("name", "policy"), list(battery.CASES), reversed(EPS))
def test_it_compiles_to_results_of_the_same_types(name, policy):
  """In the other format it is traced on the explicit mesh of test_explicit_mesh.py."""
  traced = jax.jit(under(policy, name)).trace(*operands())
  traced.lower()  # where JAX refuses an operation that has no 16-bit kernel
  want = [shapes for _, shapes in functions(name)]
  assert jax.tree.structure(traced.out_info) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(traced.out_info), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


@functools.cache
def results(name):
  """The values of a case in float32 and under both policies, by one compilation."""
  policies = {policy: under(policy, name) for policy in ("float32", *EPS)}
  run = lambda w, x: {policy: fn(w, x) for policy, fn in policies.items()}
  return jax.device_get(jax.jit(run)(*operands()))


@pytest.mark.slow
@pytest.mark.parametrize("policy", EPS)
@pytest.mark.parametrize("name", battery.CASES)
def test_its_values_and_gradients_are_close_to_those_of_float32(name, policy):
  limit = EPS[policy] * ROUGH.get(name, 8)
  leaves = map(jax.tree.leaves, (results(name)[policy], results(name)["float32"]))
  for a, b in zip(*leaves, strict=True):
    if jnp.issubdtype(b.dtype, jnp.inexact):
      a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
      finite = np.isfinite(b)
      assert (np.isfinite(a) == finite).all()
      error, size = np.abs(a - b)[finite], np.abs(b)[finite]
      assert np.max(error, initial=0.0) <= limit * np.max(size, initial=1e-6)


PUBLIC = {"linalg": jnp.linalg, "fft": jnp.fft, "nn": jax.nn, "special": jax.scipy.special}
NO_FLOATS = {
  "nn.get_scaled_dot_general_config",  # makes a configuration for cuDNN
  "nn.scaled_dot_general",  # these two take formats of 8 bits and a GPU
  "nn.scaled_matmul",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_battery_holds_every_public_function(module):
  names = {n for n, f in vars(PUBLIC[module]).items() if callable(f) and not n.startswith("_")}
  assert not {f"{module}.{name}" for name in names} - set(battery.CASES) - NO_FLOATS
