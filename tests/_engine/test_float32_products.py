"""Products of 16-bit factors in float32 run on a CPU, whatever is transposed beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _turns import in_turns
from mpjax._engine.running.float32_products import fixed, unfolded

# Both factors of a matmul, and which of their dimensions are contracted and which are a batch's.
# XLA takes a transposition beside them into all of them, and cannot run most of them then on a CPU.
CASES = {
  "columns": ((16, 8), (16, 4), ((0,), (0,)), ((), ())),
  "rows": ((8, 16), (16, 4), ((1,), (0,)), ((), ())),
  "two_contracted": ((2, 8, 16), (2, 8, 4), ((0, 1), (0, 1)), ((), ())),
  "two_contracted_apart": ((2, 8, 16), (2, 4, 16), ((0, 2), (0, 2)), ((), ())),
  "three_contracted": ((2, 3, 8, 16), (2, 3, 8, 4), ((0, 1, 2), (0, 1, 2)), ((), ())),
  "batch": ((2, 16, 8), (2, 16, 4), ((1,), (1,)), ((0,), (0,))),
}
FORMATS = ("bfloat16", "float16")
every_format = pytest.mark.parametrize("dtype", FORMATS)


def mirrored(dims, rank):
  return tuple(rank - 1 - dim for dim in dims)


@pytest.mark.quick(every=3)
@in_turns(("case", "turned", "dtype"), CASES, ("result", "factors", "all"), FORMATS)
def test_a_matmul_runs_beside_a_transposition(case, turned, dtype):
  *shapes, contracted, batch = case
  rng = np.random.default_rng(0)
  left, right = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
  dims = contracted, batch
  if turned != "result":
    ranks = left.ndim, right.ndim
    dims = tuple(tuple(map(mirrored, pair, ranks)) for pair in dims)

  def matmul(left, right, product):
    if turned != "result":
      left, right = left.T, right.T
    found = product(left, right)
    return found if turned == "factors" else found.T

  def product(left, right):
    return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

  wide = [x.astype(jnp.float32) for x in (left, right)]
  got = jax.jit(lambda a, b: matmul(a, b, unfolded(product)))(left, right)
  np.testing.assert_allclose(got, matmul(*wide, product), rtol=1e-5, atol=1e-5)


def test_what_keeps_an_order_is_the_identity_under_every_transformation():
  x = jnp.arange(6.0).reshape(2, 3)
  for got, want in (
    (fixed(x), x),
    (jax.jvp(fixed, (x,), (2 * x,)), (x, 2 * x)),
    (jax.jit(jax.vmap(fixed, 1, 1))(x), x),
    (jax.grad(lambda x: (fixed(x) ** 2).sum())(x), 2 * x),
    (mpjax.autocast(lambda w: fixed(w), "mixed_bfloat16")(x), x),
  ):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_format
def test_only_a_cpu_has_barriers(dtype):
  x = jnp.ones((2, 3), dtype)
  for platform, count in {"cpu": 1, "cuda": 0, "tpu": 0}.items():
    lowered = jax.jit(fixed).trace(x).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier") == count
