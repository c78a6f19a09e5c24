"""Key paths as rules and messages print them."""

from typing import NamedTuple

import flax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import tree_util

from mpjax._core.tree_paths import leaf_paths, path_str


class Pair(NamedTuple):
  left: float
  right: float


@pytest.mark.parametrize(
  ("tree", "paths"),
  [
    ({"encoder": [{"kernel": 1.0}, {"kernel": 2.0}]}, ["encoder/0/kernel", "encoder/1/kernel"]),
    (flax.core.freeze({"a": {"b": 1.0}}), ["a/b"]),
    ({"x": Pair(1.0, 2.0)}, ["x/left", "x/right"]),
    ((1.0, (2.0,)), ["0", "1/0"]),
    (1.0, [""]),
    ({"a": None}, []),
  ],
  ids=["lists", "FrozenDict", "NamedTuple", "tuples", "root", "None"],
)
def test_every_container_prints_bare_names(tree, paths):
  assert [path for path, _ in leaf_paths(tree)] == paths


def test_an_nnx_variable_has_the_path_of_its_linen_parameter():
  model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  paths = ["layers/0/bias", "layers/0/kernel"]
  assert [path for path, _ in leaf_paths(nnx.state(model))] == paths
  assert [path for path, _ in leaf_paths(nnx.to_pure_dict(nnx.state(model)))] == paths


def test_a_dictionary_key_named_value_is_kept():
  (key_path, _), *_ = tree_util.tree_flatten_with_path({"attn": {"value": jnp.ones(1)}})[0]
  assert path_str(key_path) == "attn/value"
