"""Rows that are looked up are parameters where no matmul multiplies them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array
from _both_formats import POLICIES, both, cases, in_both_formats
from _jaxprs import equations
from _turns import in_turns

pytestmark = pytest.mark.usefixtures("promotion_of_users")


CORNERS = {"v": array(10 + np.arange(24).reshape(8, 3) / 20)}
PAIRS = array([[0, 1], [1, 2], [5, 7]], np.int32)
ROWS_OF = {
  "edges": lambda p, i: jnp.linalg.norm(p["v"][i[:, 0]] - p["v"][i[:, 1]], axis=-1),
  "taken": lambda p, i: jnp.diff(jnp.take(p["v"], i, axis=0), axis=1),
  "jitted": lambda p, i: jnp.diff(jax.jit(lambda v, i: v[i])(p["v"], i), axis=1),
  "mapped": lambda p, i: lax.map(lambda i: p["v"][i][0] - p["v"][i][1], i),
  "returned": lambda p, i: p["v"][i],
}


@in_turns(("fn", "policy"), ROWS_OF, POLICIES)
def test_rows_that_no_matmul_multiplies_are_parameters(fn, policy):
  """10.05 is 10.0625 in bfloat16: of the edges of a mesh nothing is left."""
  found, want = in_both_formats(fn, policy, CORNERS, PAIRS)
  np.testing.assert_allclose(found, want, rtol=1e-6)


@both
def test_positions_that_a_network_reads_the_distances_of_are_parameters(policy):
  def energy(points, pairs):
    squares = jnp.sum((points["v"][pairs[:, 0]] - points["v"][pairs[:, 1]]) ** 2, -1)
    return jnp.tanh(jnp.exp(-9 * squares)[:, None] * jnp.arange(1.0, 65)) @ jnp.ones((64, 64))

  found, want = in_both_formats(energy, policy, CORNERS, PAIRS)
  np.testing.assert_allclose(found, want, rtol=5e-3)


@both
@cases(
  layer=lambda p, i: jnp.tanh(p["v"][i]) @ p["v"].T,
  jitted=lambda p, i: jax.jit(lambda v, i: v[i])(p["v"], i) @ p["v"].T,
  in_a_layer=lambda p, i: jax.checkpoint(lambda h: jnp.tanh(h) @ p["v"].T)(p["v"][i]),
  in_scan=lambda p, i: lax.scan(lambda c, i: (c, p["v"][i]), 0, i)[1] @ p["v"].T,
)
def test_rows_of_an_embedding_are_narrow(fn, policy):
  table = {"v": jnp.ones((8, 6))}
  found = list(equations(jax.make_jaxpr(mpjax.autocast(fn, policy))(table, PAIRS)))
  after = found[[e.primitive.name for e in found].index("gather") + 1]
  assert after.primitive.name == "convert_element_type"
  assert after.outvars[0].aval.dtype.itemsize == 2
