"""Flax's own layers, composed, under a policy: no matmul stays wide, nothing else changes."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax
from _jaxprs import as_many_matmuls, wide_contractions
from _turns import in_turns
from zoo.cases import filled
from zoo.compositions import LINEN, NNX, Composition

# Flax's norms mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}

COMPOSITIONS = {f"linen-{c}": c for c in LINEN} | {f"nnx-{c}": c for c in NNX}


class Setting(NamedTuple):
  """A composition's module, its parameters and other state, and inputs."""

  module: Any
  params: Any
  state: Any
  inputs: tuple[Any, ...]


@functools.cache
def setting(made: Composition) -> Setting:
  rng = np.random.default_rng(0)
  inputs = tuple(
    rng.standard_normal(x.shape, np.float32)
    if x.dtype == jnp.float32
    else rng.integers(1, 6, x.shape).astype(np.int32)
    for x in made.inputs
  )
  if made in NNX:
    model = made.build(nnx.Rngs(0))
    _, params, state = nnx.split(model, nnx.Param, ...)
    return Setting(model, params, state, inputs)
  module = made.build()
  rngs = {name: jax.random.key(0) for name in ("params", *made.rngs)}
  shapes = jax.eval_shape(lambda: module.init(rngs, *inputs, **made.options))
  variables = filled(dict(shapes), 0)
  return Setting(module, variables.pop("params"), variables, inputs)


def call_of(made: Composition, module: Any) -> Any:
  """The function ``(params, state, inputs) -> (outputs, new state)`` of a module."""
  if isinstance(module, nn.Module):

    def apply(params, state, inputs):
      rngs = {name: jax.random.key(1) for name in made.rngs}
      variables = {"params": params, **state}
      return module.apply(variables, *inputs, **made.options, mutable=list(state), rngs=rngs)

    return apply
  graph = nnx.graphdef(module)

  def merged(params, state, inputs):
    model = nnx.merge(graph, params, state, copy=True)
    return model(*inputs, **made.options), nnx.state(model, nnx.Not(nnx.Param))

  return merged


@functools.cache
def traced(made: Composition, policy: str = "float32", way: str = "module") -> Any:
  """The trace of the loss and its gradient, with outputs and state beside."""
  module = setting(made).module
  call = call_of(made, mpjax.apply_policy(module, policy) if way == "module" else module)
  if way == "function":
    call = mpjax.autocast(call, policy)

  def loss(params, state, inputs):
    outputs, state = call(params, state, inputs)
    errors = [jnp.mean((x - 0.5) ** 2) for x in jax.tree.leaves(outputs)]
    return 1024 * sum(errors), (outputs, state)

  return jax.jit(jax.grad(loss, has_aux=True)).trace(*setting(made)[1:])


def description(tree: Any) -> list[str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}" for path, x in leaves]


@pytest.mark.quick(every=5)
@in_turns(("made", "way", "policy"), COMPOSITIONS, ("module", "function"), list(COMPUTE))
def test_no_matmul_stays_wide_and_nothing_else_changes_dtype(made, policy, way):
  ours, plain = traced(made, policy, way), traced(made)
  wide = wide_contractions(ours.jaxpr, COMPUTE[policy])
  assert len(wide) == (made.power_iteration if way == "module" or made in NNX else 0)
  assert as_many_matmuls(ours.jaxpr, plain.jaxpr)
  assert description(ours.out_info) == description(plain.out_info)


@pytest.mark.slow
@pytest.mark.parametrize("policy", COMPUTE)
@pytest.mark.parametrize("made", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_values_and_gradients_are_near_float32(made, policy):
  ours, plain = (
    traced(made, of).lower().compile()(*setting(made)[1:]) for of in (policy, "float32")
  )
  bound = 8 * float(jnp.finfo(COMPUTE[policy]).eps)
  for got, want in zip(ours, plain, strict=True):  # gradients; outputs and state
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    pairs = [p for p in pairs if jnp.issubdtype(p[0].dtype, jnp.floating)]
    # Those of a bias before a norm are zero but for what rounds of the others.
    largest = max((np.abs(np.float64(truth)).max() for _, truth in pairs), default=0.0)
    for found, truth in pairs:
      atol = bound * max(np.abs(np.float64(truth)).max(), largest / 8)
      np.testing.assert_allclose(np.float64(found), np.float64(truth), atol=atol + 1e-6)
