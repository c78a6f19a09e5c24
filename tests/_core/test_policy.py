"""The triple of dtypes and its spec strings."""

import copy
import dataclasses
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpjax import Policy, PolicyMap
from mpjax._core.policy import as_policy
from mpjax._core.policy import spec as spec_of

MIXED = Policy(jnp.float32, jnp.bfloat16, jnp.float32)
NAMES = ("float32", "bfloat16", "float16")
ALIASES = ("float32", "f32", "fp32", "bfloat16", "bf16", "float16", "f16", "fp16")
SPACE = st.sampled_from(["", " ", "  ", "\t", "\n"])
policies = st.builds(Policy, *[st.sampled_from(NAMES)] * 3)


@pytest.mark.parametrize(
  ("spec", "dtypes"),
  [
    ("float32", ("float32", "float32", "float32")),
    ("bfloat16", ("bfloat16", "bfloat16", "bfloat16")),
    ("float16", ("float16", "float16", "float16")),
    ("mixed_bfloat16", ("float32", "bfloat16", "float32")),
    ("mixed_float16", ("float32", "float16", "float32")),
    (" mixed_bfloat16\n", ("float32", "bfloat16", "float32")),
    ("params=float32,compute=bfloat16,output=float32", ("float32", "bfloat16", "float32")),
    ("p=f32,c=bf16,o=f16", ("float32", "bfloat16", "float16")),
    ("o = f16 , p = fp32 ,\tcompute=bf16", ("float32", "bfloat16", "float16")),
  ],
)
def test_a_spec_names_three_dtypes(spec, dtypes):
  policy = Policy.parse(spec)
  assert (policy.param_dtype, policy.compute_dtype, policy.output_dtype) == tuple(
    np.dtype(jnp.dtype(name)) for name in dtypes
  )


def test_f16_is_float16_and_not_what_numpy_reads():
  assert Policy.parse("p=f16,c=f16,o=f16") == Policy.parse("float16")


PRESETS = "float32, bfloat16, float16, mixed_bfloat16, mixed_float16, mixed_float8"
LEGAL = rf"A policy must be a preset \({PRESETS}\)"


@pytest.mark.parametrize(
  ("spec", "found"),
  [
    ("mixed", "Got 'mixed'"),
    ("", "Got ''"),
    ("p=f32,c=bf16,o=f32,", "Got ''"),
    ("p=f32,c=bf16,x=f32", "unknown key 'x'"),
    ("p=f32,c=bf16,p=f32", "'p' a second time"),
    ("p=f32,params=f32,c=bf16,o=f32", "'params' a second time"),
    ("p=f32,c=bf16", "no output"),
    ("c=bf16", "no params and no output"),
  ],
)
def test_a_spec_that_cannot_be_read_is_refused_with_what_is_legal(spec, found):
  with pytest.raises(ValueError, match=rf"{LEGAL}.*{found}.*[.]"):
    Policy.parse(spec)


@pytest.mark.parametrize("name", ["f8", "float64", "half", "float128", "", "f4"])
def test_an_unknown_dtype_is_refused_with_the_legal_names(name):
  with pytest.raises(ValueError, match="must be one of: float32 = f32 = fp32; bfloat16 = bf16"):
    Policy.parse(f"p=f32,c={name},o=f32")


@pytest.mark.parametrize(
  "spec", ["p=f32,c=bf16,o=f32,m=fp8", "c=bf16, matmul=float8, p=f32, o=f32"]
)
def test_matmuls_in_float8_are_a_fourth_key_that_only_shows_where_it_is_set(spec):
  policy = Policy.parse(spec)
  assert policy == Policy.parse("mixed_float8") == Policy("float32", "bfloat16", "float32", "fp8")
  assert str(policy) == "params=float32,compute=bfloat16,output=float32,matmul=fp8"
  assert Policy.parse(str(policy)) == policy != Policy.parse("mixed_bfloat16")
  assert spec_of(policy) == "mixed_float8"
  assert "matmul" not in str(Policy.parse("mixed_bfloat16"))
  assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize("dtype", ["fp8", "float8_e4m3fn", "e5m2", jnp.float8_e4m3fn])
def test_values_are_not_held_in_float8(dtype):
  with pytest.raises(ValueError, match=r"compute_dtype must be .* Got .* Write m=fp8"):
    Policy("float32", dtype, "float32")


@pytest.mark.parametrize(
  "spec", ["p=f32,c=f16,o=f32,m=fp8", "p=bf16,c=bf16,o=bf16,m=fp8", "p=f32,c=bf16,o=f16,m=fp8"]
)
def test_float8_is_refused_beside_formats_with_which_it_was_not_tried(spec):
  with pytest.raises(ValueError, match=r"need params=float32, compute=bfloat16.*'mixed_float8'"):
    Policy.parse(spec)


def test_matmuls_multiply_in_the_compute_dtype_or_in_float8():
  with pytest.raises(ValueError, match=r"Got 'bf16'\. Write m=fp8, or drop it"):
    Policy.parse("p=f32,c=bf16,o=f32,m=bf16")


def test_a_policy_refuses_dtypes_it_cannot_hold():
  with pytest.raises(ValueError, match="Got 'float64'"):
    Policy(np.float64, "bfloat16", "float32")
  with pytest.raises(TypeError, match="Got None of type NoneType"):
    Policy("float32", None, "float32")


@given(policies)
def test_a_printed_policy_parses_back(policy):
  assert Policy.parse(str(policy)) == policy
  assert eval(repr(policy)) == policy


@given(
  st.permutations("pco"), st.tuples(*[st.sampled_from(ALIASES)] * 3), st.lists(SPACE, min_size=6)
)
def test_order_and_white_space_are_free(order, names, space):
  dtypes = dict(zip("pco", names, strict=True))
  spec = ",".join(f"{space[0]}{key}{space[1]}={space[2]}{dtypes[key]}{space[3]}" for key in order)
  assert Policy.parse(spec) == Policy(*names)


@given(policies, policies)
def test_equal_policies_have_equal_hashes(one, other):
  assert (one == other) == (str(one) == str(other))
  assert one != other or hash(one) == hash(other)


@pytest.mark.parametrize(
  "policy",
  [
    Policy("f32", "bf16", "fp32"),
    Policy(np.float32, jnp.bfloat16, np.dtype("float32")),
    Policy(jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.float32),
    Policy.parse("mixed_bfloat16"),
    Policy(param_dtype="float32", compute_dtype="bfloat16", output_dtype="float32"),
  ],
)
def test_a_policy_is_the_same_however_its_dtypes_were_given(policy):
  assert policy == MIXED
  assert hash(policy) == hash(MIXED)
  assert all(
    isinstance(dtype, np.dtype)
    for dtype in (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
  )


def test_a_policy_is_a_static_argument_that_does_not_trace_twice():
  traces = []

  @partial(jax.jit, static_argnames="policy")
  def f(x, policy):
    traces.append(policy)
    return policy.cast_to_compute(x)

  assert f(jnp.ones(2), policy=Policy("f32", "bf16", "f32")).dtype == jnp.bfloat16
  f(jnp.ones(2), policy=Policy.parse("mixed_bfloat16"))
  assert len(traces) == 1


def test_a_policy_is_immutable_and_pickles():
  with pytest.raises(AttributeError):
    MIXED.param_dtype = np.dtype("float16")
  assert pickle.loads(pickle.dumps(MIXED)) == MIXED


def test_the_three_casts_use_their_own_dtype():
  policy = Policy("float32", "bfloat16", "float16")
  tree = {"w": jnp.ones(2, jnp.float16), "n": jnp.arange(2)}
  assert policy.cast_to_param(tree)["w"].dtype == jnp.float32
  assert policy.cast_to_compute(tree)["w"].dtype == jnp.bfloat16
  assert policy.cast_to_output(tree)["w"] is tree["w"]
  assert policy.cast_to_compute(tree)["n"] is tree["n"]


def test_a_policy_argument_may_be_a_policy_or_a_string():
  assert as_policy(MIXED) is MIXED
  assert as_policy("mixed_bfloat16") == MIXED
  with pytest.raises(
    TypeError, match=r"must be a mpjax.Policy or a spec string. Got 16 of type int"
  ):
    as_policy(16)


@pytest.mark.parametrize(
  ("word", "closest"),
  [
    ("bf16", "mixed_bfloat16, bfloat16"),
    ("fp16", "mixed_float16, float16"),
    ("half", "mixed_float16, float16"),
    ("mixed_bf16", "mixed_bfloat16, bfloat16"),
    ("bf16-mixed", "mixed_bfloat16, bfloat16"),
    ("mixed_fp16", "mixed_float16, float16"),
    ("mixed_bfloat", "mixed_bfloat16"),
  ],
)
def test_a_word_that_is_no_preset_is_answered_with_the_closest(word, closest):
  with pytest.raises(ValueError, match=rf"Got '{word}'\. Closest: {closest}"):
    Policy.parse(word)


def test_a_policy_made_of_one_spec_names_parse():
  with pytest.raises(TypeError, match=r"three dtypes.*mpjax\.Policy\.parse\('mixed_bfloat16'\)"):
    Policy("mixed_bfloat16")
  with pytest.raises(TypeError, match="compute_dtype"):
    Policy(param_dtype="float32")


@pytest.mark.parametrize(
  ("args", "kwargs", "got"),
  [
    ((), {"compute_dtype": "bfloat16"}, "no param_dtype and no output_dtype"),
    (("float32", "bfloat16"), {}, "no output_dtype"),
    (("float32",), {"output_dtype": "float32"}, "no compute_dtype"),
    ((), {"params": "f32", "compute": "bf16", "output": "f32"}, "the unknown keyword 'params'"),
    (("f32", "bf16", "f32"), {"matmul": "fp8"}, "the unknown keyword 'matmul'"),
  ],
  ids=["one by name", "two by position", "none between", "keys of a spec", "a fourth"],
)
def test_a_policy_made_of_other_names_lists_them_and_the_strings(args, kwargs, got):
  names = "param_dtype, compute_dtype and output_dtype"
  with pytest.raises(TypeError, match=rf"{names}\. Got {got}\. Write .*a string: 'mixed_bfloat16'"):
    Policy(*args, **kwargs)


def test_a_policy_is_copied():
  assert copy.copy(MIXED) == copy.deepcopy(MIXED) == dataclasses.replace(MIXED) == MIXED


def test_a_dict_as_policy_names_policy_map():
  with pytest.raises(TypeError, match=r"Got a dict\..*mpjax\.PolicyMap\(rules, default=...\)"):
    as_policy({"head": "float32"})


HUGE = "x" * 10**5


@pytest.mark.parametrize(
  "call",
  [
    lambda: Policy.parse(HUGE),
    lambda: Policy.parse(f"{HUGE}=f32"),
    lambda: Policy.parse(f"p=f32,c={HUGE},o=f32"),
    lambda: Policy.parse([HUGE] * 1000),
    lambda: Policy(HUGE),
    lambda: Policy(HUGE, "bf16", "f32"),
    lambda: Policy(**{HUGE: HUGE}),
    lambda: as_policy({HUGE: HUGE}),
    lambda: as_policy(np.zeros((300, 300))),
    lambda: PolicyMap({f"({HUGE}": "float32"}, "float32"),
    lambda: PolicyMap({HUGE: "float32"}, "float32").check_used([("head",)]),
    lambda: PolicyMap({}, "float32", ops={HUGE: "full"}),
    lambda: PolicyMap({}, "float32", ops={"exp": HUGE}),
  ],
)
def test_no_message_repeats_what_is_long(call):
  with pytest.raises((ValueError, TypeError)) as error:
    call()
  assert len(str(error.value)) < 600


def test_semicolons_are_told_to_be_commas():
  with pytest.raises(ValueError, match=r"apart by commas. .* Write 'p=f32,c=bf16,o=f32'"):
    Policy.parse("p=f32;c=bf16;o=f32")
