"""The lattice of meanings, constants that fit, and the table of primitives."""

import itertools
import re
import sys

import jax.experimental.compute_on
import jax.experimental.custom_partitioning
import jax.experimental.rnn
import jax.experimental.sparse
import jax.experimental.xla_metadata
import jax.export
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

import mpjax  # noqa: F401  # registers its primitives
from mpjax._core.primitives import RULES, Rule
from mpjax._engine.program.kinds import CONSTANT, DATA, PARAM, fits, join, narrow, saturated

BF16, F16 = np.dtype(jnp.bfloat16), np.dtype(np.float16)
FORMS = [None, CONSTANT, PARAM, narrow(BF16), narrow(F16), DATA]


@pytest.mark.parametrize(
  ("forms", "expected"),
  [
    ((), None),
    ((None, None), None),
    ((None, PARAM), PARAM),
    ((CONSTANT, PARAM), PARAM),
    ((PARAM, narrow(BF16)), narrow(BF16)),
    ((narrow(F16), CONSTANT, narrow(F16)), narrow(F16)),
    ((narrow(F16), narrow(BF16)), DATA),
    ((narrow(BF16), DATA), DATA),
    ((PARAM, DATA), DATA),
  ],
  ids=str,
)
def test_a_join_takes_the_largest_meaning(forms, expected):
  assert join(forms) == expected


def test_the_join_is_commutative_associative_and_idempotent():
  for a, b, c in itertools.product(FORMS, repeat=3):
    assert join((a, b)) == join((b, a))
    assert join((join((a, b)), c)) == join((a, join((b, c))))
    assert join((a, a)) == a


@pytest.mark.parametrize(
  ("value", "in_float16", "in_bfloat16"),
  [
    (0.0, True, True),
    (0.1, True, True),
    (np.inf, True, True),
    (np.nan, True, True),
    (65504.0, True, True),
    (65505.0, False, True),
    (65536.0, False, True),
    (-1e5, False, True),
    (-1e9, False, True),
    (1e-3, True, True),
    (0.9, True, True),
    (0.999, True, False),
    (1 - 1e-5, False, False),
    (1 + 1e-5, False, False),
    (-1.0, True, True),
    (1e-6, False, True),
    (1e-12, False, True),
    (np.finfo(np.float32).min, False, True),
    (np.finfo(np.float32).tiny, False, True),
  ],
)
def test_a_constant_fits_what_holds_it(value, in_float16, in_bfloat16):
  assert fits(value, F16) == in_float16
  assert fits(value, BF16) == in_bfloat16


@given(st.floats(width=32), st.sampled_from([BF16, F16]))
def test_a_finite_constant_that_fits_stays_finite(value, dtype):
  if np.isfinite(value) and fits(value, dtype):
    assert np.isfinite(np.asarray(saturated(value, [dtype]), np.float32).astype(dtype))


def test_saturating_changes_no_other_number():
  assert saturated(1e30, [BF16, F16]) == 1e30
  assert saturated(65504.0, [F16]) == 65504.0
  assert np.isnan(saturated(np.nan, [F16]))


def test_the_table_decides_every_public_primitive():
  public = {
    value.name for name, value in vars(jax.extend.core.primitives).items() if name.endswith("_p")
  }
  assert not public - set(RULES), "decide these in mpjax/_core/primitives.py"


def test_the_table_decides_what_only_derivatives_and_outlying_modules_bring():
  """Whatever can be differentiated, transposed or batched is registered in one of these."""
  registries = (ad.primitive_jvps, ad.primitive_transposes, batching.fancy_primitive_batchers)
  known = {p.name for registry in registries for p in registry} & _names_in_jax()
  assert known > {"remat_opt", "linear_call", "compute_on", "composite", "bcoo_dot_general"}
  assert known > {"mpjax_attached", "mpjax_constant", "mpjax_rounded"}  # of our own
  without = {"custom_partitioning", "call_exported"}  # neither a derivative nor a batching rule
  assert not sorted((known | without) - set(RULES)), "decide these in mpjax/_core/primitives.py"


def _names_in_jax():
  """The primitives that JAX's modules and ours hold, but for those that stand inside of kernels."""
  modules = [m for name, m in [*sys.modules.items()] if name.startswith(("jax.", "mpjax."))]
  held = [v for m in modules if not _IN_KERNELS.search(m.__name__) for v in vars(m).values()]
  return {v.name for v in held if isinstance(v, Primitive)}


_IN_KERNELS = re.compile("pallas|mosaic")


def test_a_kernel_runs_as_traced_and_is_reported():
  assert RULES["pallas_call"] is RULES["call_exported"] is Rule.FOREIGN
  assert RULES["remat_opt"] is Rule.REMAT_OPT
  assert RULES["dot_general"] is Rule.LOWER
