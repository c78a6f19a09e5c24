"""Models that nobody here wrote, held to the assertions of our own.

`python -m pytest -m models` runs this group and ends with a table. It needs the packages of the
`models` extra, and tests those that are installed; a model of a package that is missing is skipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mpjax
from _jaxprs import Contraction, as_many_matmuls, contractions, wide_contractions
from public import flax_packages, functional, hugging_face
from public.model import (
  Built,
  Public,
  Ran,
  Traced,
  description,
  relative_error,
  traced,
  with_offset,
)
from public.table import RECORD, row

# Published code mixes dtypes and ranks, and warns.
pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
WAYS = ("module", "function")
MODELS = (*hugging_face.MODELS, *flax_packages.MODELS, *functional.MODELS)

every_model = pytest.mark.parametrize("model", MODELS, ids=str, scope="module")
every_policy = pytest.mark.parametrize("policy", COMPUTE)
either_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def _as_published(model):
  """Skips what is not installed; lets published code promote as it expects."""
  for name in model.needs:
    pytest.importorskip(name, reason=f"needs the package {model.package}")
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@functools.cache
def built(model: Public) -> Built:
  made = model.build()
  return made._replace(params=with_offset(made.params, model.offset)) if model.offset else made


@functools.cache
def plain(model: Public) -> Traced:
  made = built(model)
  return traced(made, made.call_of(made.module), model.loss_scale)


@functools.cache
def plain_values(model: Public) -> Ran:
  return plain(model).run()


@functools.cache
def under(model: Public, policy: str | mpjax.PolicyMap, way: str = "module") -> Traced:
  """A model traced under a policy: its module, or the function that applies the plain one."""
  made = built(model)
  if way == "module" and made.module is not None:
    call = made.call_of(mpjax.apply_policy(made.module, policy))
  else:
    call = mpjax.autocast(made.call_of(made.module), policy)
  return traced(made, call, model.loss_scale)


@functools.cache
def by_hand(model: Public, dtype: str) -> Traced:
  """A model with its own `dtype` field set."""
  made = built(model)
  call = made.call_of(made.module.clone(dtype=jnp.dtype(dtype)))
  return traced(made, call, model.loss_scale)


def narrowable(found: list[Contraction]) -> list[Contraction]:
  """Those without a complex factor, for which there is no 16-bit format, and no norms.

  A norm that is written as a value's inner product with itself is float32, by design.
  """
  real = [one for one in found if not any("complex" in dtype for dtype in one.factors)]
  return [one for one in real if not one.is_inner]


def counts(jaxpr: Any, dtype: str) -> tuple[int, int]:
  """How many matmuls run in 16 bits, and how many there are."""
  total = len(contractions(jaxpr))
  return total - len(wide_contractions(jaxpr, dtype)), total


@every_model
@every_policy
@either_way
def test_loss_and_gradient_hold_no_wide_matmul(model, policy, way):
  jaxpr = under(model, policy, way).jaxpr
  found = narrowable(wide_contractions(jaxpr, COMPUTE[policy]))
  if model.kind == "differential equations":  # a solver's sums of its stages, by a law
    found = [one for one in found if not one.has_weights]
  assert found == []
  assert as_many_matmuls(jaxpr, plain(model).jaxpr)


@every_model
@every_policy
@either_way
def test_outputs_state_and_gradients_keep_their_paths_shapes_and_dtypes(model, policy, way):
  ours, theirs = under(model, policy, way), plain(model)
  assert description(ours.outputs) == description(theirs.outputs)
  assert description(ours.state) == description(theirs.state)
  assert description(ours.grads) == description(theirs.grads) == description(built(model).params)


@every_model
@every_policy
def test_init_makes_the_variables_of_the_plain_model(model, policy):
  made = built(model)
  if made.init_of is None:
    pytest.skip("only Linen modules have init")
  variables = made.init_of(mpjax.apply_policy(made.module, policy))
  assert description(variables) == description(made.init_of(made.module))


@every_model
@every_policy
def test_outputs_and_gradients_are_near_float32(model, policy, record_property):
  dtype = COMPUTE[policy]
  truth, trace = plain_values(model), under(model, policy)
  ours = trace.run()
  errors = relative_error(ours.outputs, truth.outputs), relative_error(ours.grads, truth.grads)
  hand_errors = (None, None)
  if model.has_dtype:
    theirs = by_hand(model, dtype).run()
    hand_errors = (
      relative_error(theirs.outputs, truth.outputs),
      relative_error(theirs.grads, truth.grads),
    )
  record = row(model, policy, counts(trace.jaxpr, dtype), *errors, *hand_errors)
  record_property(RECORD, list(record))  # what one process can send another
  # The table compares with the model's own dtype; a single draw of parameters cannot judge that.
  assert max(errors) <= model.near * float(jnp.finfo(dtype).eps)


@every_model
def test_a_rule_keeps_one_part_float32(model):
  if model.rule is None:
    pytest.skip("has no scope of its own with a matmul")
  rules = mpjax.PolicyMap({model.rule: "float32"}, default="mixed_bfloat16")
  wide = narrowable(wide_contractions(under(model, rules).jaxpr, "bfloat16"))
  assert 0 < len(wide) < len(contractions(plain(model).jaxpr))
  assert {dtype for one in wide for dtype in one.factors} == {"float32"}


@every_model
def test_a_rule_that_matches_no_part_names_those_that_are_there(model):
  rules = mpjax.PolicyMap({"no/such/part": "float32"}, default="mixed_bfloat16")
  with pytest.raises(ValueError, match="'no/such/part' matched no module"):
    under(model, rules)
