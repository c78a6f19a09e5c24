"""What a policy makes of whole models: the zoo, in Linen and in NNX, against float32 and by hand.

"By hand" is Flax's own way: the same code with `dtype=` passed to every layer. A model runs under
a policy in two ways: `module`, where `apply_policy` wraps the model and the loss stays outside, and
`loss`, where `autocast` wraps the whole loss.

Of an architecture's eight combinations of API, format and way, `.ci/run` asks what types say of two
that are opposite in every respect, and numbers, which take three compilations, of one of these, the
eight taking turns over the architectures. Every run asks a third of the types, and numbers of one
architecture. The rest of the square is `slow`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxpr_as_fun

import mpjax
from _jaxprs import as_many_matmuls, wide_contractions
from _turns import in_turns
from zoo.cases import CASES, Case, Pure, filled

# Flax's norms and hand-written 16-bit models, and adamw, mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
WAYS = ("module", "loss")
SEEDS = 48
LOSS_SCALE = 2.0**10  # keeps float16 gradients above the subnormals

# Every rounding that the program asks for happens.
COMPILER = {"xla_allow_excess_precision": False}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
  return request.param


@functools.cache
def pure(case: Case, policy: str = "float32", way: str = "plain") -> Pure:
  """A case as it is, by hand, or under a policy."""
  if way == "module":
    return case.pure(mpjax.apply_policy(case.module(), policy))
  if way == "loss":
    return pure(case)._replace(loss=mpjax.autocast(pure(case).loss, policy))
  return case.pure(case.module(None if way == "plain" else jnp.dtype(COMPUTE[policy])))


class Traced(NamedTuple):
  jaxpr: Any
  loss: jax.ShapeDtypeStruct
  state: Any
  grads: Any


@functools.cache
def traced(case: Case, policy: str = "float32", way: str = "plain") -> Traced:
  """The jaxpr of the scaled loss and its gradient, and the shapes of what they return."""
  plain, loss = pure(case), pure(case, policy, way).loss

  def scaled(params, state, batch):
    value, new_state = loss(params, state, batch)
    return value * LOSS_SCALE, new_state

  jaxpr, shapes = jax.make_jaxpr(jax.value_and_grad(scaled, has_aux=True), return_shape=True)(
    plain.params, plain.state, case.batch(0)
  )
  (value, state), grads = shapes
  return Traced(jaxpr, value, state, grads)


class Ran(NamedTuple):
  """Gradients and new state for every seed: each leaf with a leading axis of seeds."""

  state: Any
  grads: Any


@functools.cache
def data(case: Case) -> tuple[Any, Any]:
  plain = pure(case)
  trees = [(filled(plain.params, seed), case.batch(seed)) for seed in range(SEEDS)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@functools.cache
def ran(case: Case, policy: str = "float32", way: str = "plain") -> Ran:
  """Runs what was traced."""
  state, shapes = pure(case).state, traced(case, policy, way)
  run = jaxpr_as_fun(shapes.jaxpr)
  structure = jax.tree.structure((shapes.loss, shapes.state, shapes.grads))

  def one(inputs):
    params, batch = inputs
    _, new_state, grads = structure.unflatten(run(*jax.tree.leaves((params, state, batch))))
    return Ran(new_state, jax.tree.map(lambda g: g / LOSS_SCALE, grads))

  run_all = jax.jit(lambda inputs: jax.lax.map(one, inputs), compiler_options=COMPILER)
  return jax.device_get(run_all(data(case)))


def squares(tree: Any) -> np.ndarray:
  """The sum of squares over all leaves, one number a seed."""
  leaves = [np.asarray(leaf, np.float64).reshape(SEEDS, -1) for leaf in jax.tree.leaves(tree)]
  return sum((leaf**2).sum(1) for leaf in leaves)


def relative_errors(found: Any, truth: Any) -> np.ndarray:
  difference = jax.tree.map(lambda a, b: a.astype(np.float64) - b, found, truth)
  return np.sqrt(squares(difference) / squares(truth))


def float_dtypes(tree: Any) -> set[str]:
  leaves = jax.tree.leaves(tree)
  return {x.dtype.name for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


def paths(tree: Any) -> list[str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]


def is_typed(case: Case, policy: str, way: str) -> bool:
  """Whether asking for the types of a combination is not slow.

  Of an architecture's eight these are two, opposite in every respect: Linen and NNX, the one format
  and the other, around the module and around the loss. The formats take turns over the
  architectures, and the ways over every second one.
  """
  place, nnx = divmod(CASES.index(case), 2)
  formats, ways = list(COMPUTE), WAYS
  return policy == formats[(place + nnx) % 2] and way == ways[(place // 2 + nnx) % 2]


def is_measured(case: Case, policy: str, way: str) -> bool:
  """Whether its numbers are: of those two in Linen for four architectures, in NNX for the next."""
  place, nnx = divmod(CASES.index(case), 2)
  return is_typed(case, policy, way) and nnx == place // 4 % 2


def combinations(quick: Callable[[Case, str, str], bool], *names: str) -> pytest.MarkDecorator:
  """Every combination of a case, a policy and a way; those that are not `quick` are slow."""
  return pytest.mark.parametrize(
    ("case", "policy", "way"),
    [
      pytest.param(
        case,
        policy,
        way,
        id=f"{case}-{way}-{policy}",
        marks=() if quick(case, policy, way) else pytest.mark.slow,
      )
      for case in CASES
      for policy in COMPUTE
      for way in WAYS
      if case.name in names or not names
    ],
    indirect=["case"],
  )


@pytest.mark.quick(every=3, start=1)
@combinations(is_typed)
def test_loss_and_gradient_hold_no_wide_matmul(case, policy, way):
  jaxpr = traced(case, policy, way).jaxpr
  assert wide_contractions(jaxpr, COMPUTE[policy]) == []
  assert as_many_matmuls(jaxpr, traced(case).jaxpr)


@pytest.mark.quick(every=3, start=1)
@combinations(is_typed)
def test_loss_state_and_gradients_keep_their_paths_and_float32(case, policy, way):
  ours, plain = traced(case, policy, way), traced(case)
  assert ours.loss.dtype == jnp.float32
  assert paths(ours.grads) == paths(plain.grads)
  assert paths(ours.state) == paths(plain.state)


@pytest.mark.quick(every=3, start=1)
@combinations(is_typed)
def test_parameters_and_optimizer_state_keep_their_paths_and_float32(case, policy, way):
  model, plain = pure(case, policy, "module"), pure(case)
  assert paths(model.params) == paths(plain.params)
  assert float_dtypes(model.params) == {"float32"}
  optimizer = optax.adamw(1e-3)

  def update(params, grads):
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state

  params, state = jax.eval_shape(update, plain.params, traced(case, policy, way).grads)
  assert float_dtypes((params, state)) == {"float32"}
  assert paths(state) == paths(jax.eval_shape(optimizer.init, plain.params))


@pytest.mark.quick("gru-nnx-loss-mixed_float16")
@combinations(is_measured)
def test_gradient_error_is_no_larger_than_by_hand(case, policy, way):
  truth = ran(case).grads
  ours = relative_errors(ran(case, policy, way).grads, truth)
  by_hand = relative_errors(ran(case, policy, "by_hand").grads, truth)
  excess = np.log(ours / by_hand)
  # A flipped relu or expert makes single errors jump: twice the standard error is noise.
  noise = 2 * excess.std() / SEEDS**0.5
  assert excess.mean() <= max(0.01, min(noise, 0.1)), (
    f"{np.exp(np.log(ours).mean()):.3g} against {np.exp(np.log(by_hand).mean()):.3g} by hand: "
    f"ratio {np.exp(excess.mean()):.3f}, noise {noise:.3f}"
  )


@pytest.mark.ci
@combinations(is_measured, "resnet")
def test_batchnorm_statistics_are_as_good_as_by_hand(case, policy, way):
  truth = ran(case).state
  ours, by_hand = ran(case, policy, way).state, ran(case, policy, "by_hand").state
  assert float_dtypes(ours) == {"float32"}
  errors = [relative_errors(state, truth).mean() for state in (ours, by_hand)]
  assert errors[0] <= 1.02 * errors[1]
  assert squares(jax.tree.map(np.subtract, ours, pure(case).state)).min() > 0


FLOAT32 = {"spec": "float32", "map": mpjax.PolicyMap({".*": "float32"}, default="float32")}


@pytest.mark.quick(every=3)
@in_turns(("case", "policy"), {str(case): case for case in CASES}, FLOAT32)
def test_an_all_float32_policy_adds_no_equation(case, policy):
  assert str(traced(case, policy, "module").jaxpr) == str(traced(case).jaxpr)
