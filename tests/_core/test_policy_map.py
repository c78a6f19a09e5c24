"""Rules by path: order, depth, what they refuse."""

import copy
import pickle

import pytest

import mpjax
from mpjax._core.policy_map import as_policy_map

RULES = {r"block_\d+/attn": "mixed_float16", r"block_0": "float32", "head": "float32"}


@pytest.fixture
def policies():
  return mpjax.PolicyMap(RULES, default="mixed_bfloat16")


@pytest.mark.parametrize(
  ("path", "dtype"),
  [
    ("block_0/attn/query", "float16"),
    ("block_0/mlp", "float32"),
    ("block_1/mlp", "bfloat16"),
    ("block_1/attn", "float16"),
    ("head", "float32"),
    ("head/dense", "float32"),
    ("header", "bfloat16"),
    ("my/head", "bfloat16"),
  ],
)
def test_the_first_rule_that_matches_the_path_or_a_parent_wins(policies, path, dtype):
  assert policies.policy_at(path).compute_dtype == dtype


def test_maps_are_equal_and_hash_alike_and_pickle(policies):
  other = mpjax.PolicyMap(tuple(RULES.items()), default=mpjax.Policy.parse("mixed_bfloat16"))
  assert policies == other
  assert hash(policies) == hash(other)
  assert pickle.loads(pickle.dumps(policies)) == policies
  assert eval(repr(policies), {"PolicyMap": mpjax.PolicyMap}) == policies
  assert policies != mpjax.PolicyMap(RULES, default="float32")


def test_a_map_cannot_be_changed(policies):
  with pytest.raises(AttributeError, match="cannot be changed"):
    policies.default = "float32"


def test_a_bad_pattern_and_a_bad_policy_say_so():
  with pytest.raises(ValueError, match=r"'\(' is none .* Escape"):
    mpjax.PolicyMap({"(": "float32"}, default="float32")
  with pytest.raises(ValueError, match=r"'\*/head' is none .* write '\.\*' for '\*'"):
    mpjax.PolicyMap({"*/head": "float32"}, default="float32")
  with pytest.raises(TypeError, match=r"rules, then the default. Got 'mixed_bfloat16' for the rul"):
    mpjax.PolicyMap("mixed_bfloat16", {"head": "float32"})
  with pytest.raises(TypeError, match=r"must be a pair.*got 'head'.*Write a dictionary"):
    mpjax.PolicyMap(["head"], default="mixed_bfloat16")
  with pytest.raises(TypeError, match="must be a path pattern; got 3"):
    mpjax.PolicyMap({3: "float32"}, default="float32")
  with pytest.raises(ValueError, match="mixed_bfloat16"):
    mpjax.PolicyMap({"a": "mixed_bf16"}, default="float32")


def test_a_map_without_a_default_says_so_and_is_copied_with_one(policies):
  with pytest.raises(TypeError, match=r"Got no default\. Write .*, default='mixed_bfloat16'\)"):
    mpjax.PolicyMap({"a": "float32"})
  with pytest.raises(TypeError, match=r"Got no rules\. Write mpjax\.PolicyMap\({'head'"):
    mpjax.PolicyMap(default="mixed_bfloat16")
  assert copy.deepcopy(policies) == copy.copy(policies) == policies


def test_an_unused_rule_lists_the_paths(policies):
  with pytest.raises(ValueError, match=r"'head' matched no module.*Paths seen: block_0, "):
    policies.check_used([("block_0", "attn")])
  policies.check_used([("block_0", "attn"), ("head", "dense")])


def test_a_policy_is_a_map_without_rules():
  assert as_policy_map("float32").is_float32()
  assert not as_policy_map("params=bf16, compute=f32, output=f32").is_float32()
  assert as_policy_map("mixed_float16").policy_at("a/b").compute_dtype == "float16"
