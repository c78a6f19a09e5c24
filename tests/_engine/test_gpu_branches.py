"""What a plan has for GPUs alone, run on a CPU with every 16-bit value rounded."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mpjax
from _arrays import array, normal
from _backends import branches_of, rounded
from _jaxprs import result_dtypes
from _turns import in_turns

POLICIES = {"mixed_bfloat16": 2.0**-7, "mixed_float16": 2.0**-10}
both = pytest.mark.parametrize("policy", POLICIES)
KERNEL = array(normal(0, 3, 2, 4) / 2)
SIGNAL = array(normal(1, 8, 16, 2))
DIMENSIONS = ("NWC", "WIO", "NWC")


@pytest.fixture(autouse=True, scope="module")
def _of_gpus():
  with branches_of("cuda"), jax.numpy_dtype_promotion("standard"):
    yield


def test_no_other_module_has_something_for_a_platform():
  root = Path(mpjax.__file__).parent
  texts = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
  assert {name for name, text in texts.items() if "platform_dependent(" in text} == {
    "_engine/running/float32_products.py",
    "_engine/running/softmax.py",
    "inspect/_histogram.py",
    "inspect/_side_by_side.py",  # hands on what a program has
  }


@both
def test_a_convolution_rounds_its_result_here(policy):
  grad = jax.grad(mpjax.autocast(convolved(), policy))
  found = result_dtypes(jax.make_jaxpr(grad)(KERNEL, SIGNAL), "conv_general_dilated")
  assert found == {policy.removeprefix("mixed_")}


def convolved(strides=(1,), padding="SAME", **options):
  def loss(kernel, x):
    y = lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=DIMENSIONS, **options
    )
    return jnp.sum(jnp.tanh(y))

  return loss


def step(loss):
  return lambda kernel, x: kernel - 1e-3 * jax.grad(loss)(kernel, x)


def steps(loss):
  def run(kernel, x):
    return lax.scan(lambda k, _: (step(loss)(k, x), None), kernel, None, length=20)[0]

  return run


CONVOLUTIONS = {
  "plain": convolved(),
  "strided": convolved((2,), "VALID"),
  "dilated": convolved(rhs_dilation=(2,)),
  "transposed": convolved(padding=[(1, 1)], lhs_dilation=(2,)),
  "in_a_remat": jax.checkpoint(convolved()),
  "for_each_example": lambda k, x: jnp.sum(
    jax.vmap(lambda x: convolved()(k, x[None]))(x) * jnp.arange(1.0, 9.0)
  ),
  "in_a_scan": lambda k, x: jnp.sum(lax.map(lambda x: convolved()(k, x[None]), x)),
}


@pytest.mark.quick(every=3)
@in_turns(("loss", "policy"), CONVOLUTIONS, list(POLICIES))
def test_the_gradient_of_a_kernel_is_float32_to_one_rounding(loss, policy):
  found = rounded(jax.grad(mpjax.autocast(loss, policy), (0, 1)))(KERNEL, SIGNAL)
  for got, want in zip(found, jax.jit(jax.grad(loss, (0, 1)))(KERNEL, SIGNAL), strict=True):
    assert got.dtype == jnp.float32
    largest = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * POLICIES[policy] * largest)


@in_turns(("run", "policy"), {"once": step, "often": steps}, list(POLICIES))
def test_a_gradient_step_moves_a_kernel_by_what_float32_moves_it(run, policy):
  run = run(convolved())
  change = jax.jit(run)(KERNEL, SIGNAL) - KERNEL
  found = rounded(mpjax.autocast(run, policy))(KERNEL, SIGNAL) - KERNEL
  largest = float(jnp.max(jnp.abs(change)))
  np.testing.assert_allclose(found, change, rtol=0, atol=0.03 * largest)


@both
def test_a_kernel_that_is_used_often_has_its_gradient_summed_up(policy):
  def loss(kernel, x):
    return jnp.sum(lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=DIMENSIONS))

  grad = rounded(jax.grad(mpjax.autocast(loss, policy)))
  found = grad(jnp.ones((1, 1, 1)), jnp.ones((4, 1024, 1)))
  assert float(found[0, 0, 0]) == 4096


ATTENTION = {
  "by_hand": lambda q, x: jax.nn.softmax(q @ q.T) @ x,
  "jax": lambda q, x: jax.nn.dot_product_attention(*(a.reshape(1, 16, 2, 4) for a in (q, q, x)))[0],
  "masked": lambda q, x: jax.nn.softmax(jnp.where(jnp.tri(16) > 0, q @ q.T, -1e30)) @ x,
  "in_a_remat": jax.checkpoint(lambda q, x: jax.nn.softmax(q @ q.T) @ x),
  "mapped": lambda q, x: jax.vmap(lambda s: jax.nn.softmax(s * (q @ q.T)) @ x)(jnp.ones(3)),
  "in_a_scan": lambda q, x: lax.scan(
    lambda h, s: (jax.nn.softmax(s * (q @ q.T)) @ h, None), x, jnp.ones(3)
  )[0],
}


@pytest.mark.quick(every=3)
@in_turns(("attend", "policy"), ATTENTION, list(POLICIES))
def test_attention_that_stores_its_weights_behind_a_barrier_has_the_gradient_of_float32(
  attend, policy
):
  def loss(w, x):
    return jnp.sum(jnp.sin(attend(x @ w, x)))

  w, x = jnp.eye(8) / 2, jax.random.normal(jax.random.key(2), (16, 8))
  found = rounded(jax.grad(mpjax.autocast(loss, policy)))(w, x)
  want = jax.jit(jax.grad(loss))(w, x)
  largest = float(jnp.max(jnp.abs(want)))
  np.testing.assert_allclose(found, want, rtol=0, atol=8 * POLICIES[policy] * largest)
