"""Float formats by name."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from _arrays import array
from mpjax._core.dtypes import (
  BFLOAT16,
  FLOAT16,
  FLOAT32,
  describe,
  is_castable,
  parse_dtype,
  short_name,
)


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    ("float32", FLOAT32),
    ("f32", FLOAT32),
    ("fp32", FLOAT32),
    ("bfloat16", BFLOAT16),
    ("bf16", BFLOAT16),
    ("float16", FLOAT16),
    ("f16", FLOAT16),
    ("fp16", FLOAT16),
    (" BFloat16 ", BFLOAT16),
    (np.str_("bf16"), BFLOAT16),
    (jnp.bfloat16, BFLOAT16),
    (jnp.float16, FLOAT16),
    (np.float32, FLOAT32),
    (ml_dtypes.bfloat16, BFLOAT16),
    (np.dtype("float16"), FLOAT16),
  ],
  ids=repr,
)
def test_a_format_is_read_however_it_is_given(value, expected):
  dtype = parse_dtype(value)
  assert isinstance(dtype, np.dtype)
  assert dtype == expected
  assert hash(dtype) == hash(expected)


@pytest.mark.parametrize(
  "value",
  ["f8", "half", "float64", "f4", "<f4", "e", "", "int32", np.float64, np.dtype(">f4"), jnp.int8],
  ids=repr,
)
def test_another_format_is_refused_with_the_legal_names(value):
  with pytest.raises(ValueError, match=r"must be one of: float32 = f32.*bfloat16 = bf16.*f16"):
    parse_dtype(value)


@pytest.mark.parametrize("value", [None, 16, b"f4", np.ones(2, np.float32), ("f4",)], ids=repr)
def test_what_is_no_dtype_is_refused_with_the_legal_names(value):
  with pytest.raises(TypeError, match=r"must be one of: float32.*Got .*of type .*Pass"):
    parse_dtype(value)


def test_a_float_type_of_python_is_no_format():
  with pytest.raises(TypeError, match="must be one of"):
    parse_dtype(float)


@pytest.mark.parametrize(
  ("leaf", "castable"),
  [
    (array([1, 1]), True),
    (array([1, 1], jnp.bfloat16), True),
    (np.ones(2, np.float16), True),
    (np.float32(1), True),
    (jax.ShapeDtypeStruct((2,), jnp.float32), True),
    (np.ones(2), False),
    (array([1, 1], jnp.float8_e4m3fn), False),
    (array([1, 1], jnp.complex64), False),
    (array([0, 1], jnp.int32), False),
    (array([1, 1], bool), False),
    (jax.random.key(0), False),
    (jax.random.PRNGKey(0), False),
    (jnp.float32, False),
    (1.0, False),
    (None, False),
    ("float32", False),
  ],
  ids=lambda x: describe(x) if not isinstance(x, bool) else str(x),
)
def test_only_arrays_of_the_three_formats_are_castable(leaf, castable):
  assert is_castable(leaf) is castable


def test_a_tracer_is_castable():
  assert jax.eval_shape(lambda x: jnp.array(is_castable(x)), jnp.ones(2)).dtype == bool
  seen = []
  jax.make_jaxpr(lambda x: seen.append(is_castable(x)))(jnp.ones(2))
  assert seen == [True]


@pytest.mark.parametrize(
  ("leaf", "text"),
  [
    (array(np.ones((3, 4)), jnp.bfloat16), "bf16[3,4]"),
    (np.float64(1), "f64[]"),
    (array([1, 1], jnp.uint8), "u8[2]"),
    (array([1], bool), "bool[1]"),
    (array([1], jnp.complex64), "c64[1]"),
    (array([1], jnp.float8_e4m3fn), "f8_e4m3fn[1]"),
    (jax.random.key(0), "key<fry>[]"),
    (None, "NoneType"),
    (1.5, "float"),
  ],
  ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_leaf_is_described_by_dtype_and_shape(leaf, text):
  assert describe(leaf) == text


def test_a_scalar_type_has_a_short_name():
  assert short_name(jnp.float16) == "f16"
