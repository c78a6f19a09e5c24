"""A rule by a Linen module's own path governs it, wherever and however the module is called."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import mpjax
from _arrays import array
from _jaxprs import contractions
from mpjax.inspect import explain

# Linen's attention mixes ranks, its norms dtypes.
pytestmark = pytest.mark.usefixtures("promotion_of_users")

X = array(np.linspace(-1, 1, 128).reshape(2, 4, 16))


class Layers(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(16, name="o")(x)


class Inherits(Layers):
  def __call__(self, x):
    return super().__call__(x)


class SelfAttention(nn.MultiHeadDotProductAttention):
  """As Flax's own, which warns that it will go."""

  def __call__(self, x):
    return super().__call__(x)


class Within(nn.Module):
  """A module in one of its own name."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(16, name="part")(nn.Dense(16, name="o")(x))


class Branches(nn.Module):
  @nn.compact
  def __call__(self, x):
    a, b = nn.Dense(16, name="a"), nn.Dense(16, name="o")
    if self.is_initializing():
      a(x), b(x)
    return nn.cond(x.sum() > 0, lambda m, x: a(x), lambda m, x: b(x), self, x)


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      lambda layers, x, _: (layers(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    return scan(Layers(name="layers"), x, None)[0]


class Shares(nn.Module):
  def setup(self):
    self.inner = Layers()
    nn.share_scope(self, self.inner)

  def __call__(self, x):
    return self.inner(x)


class Takes(nn.Module):
  """A layer of the module around it, called in another one and in a scope of its author's."""

  @nn.compact
  def __call__(self, x, layer):
    with jax.named_scope("where"):
      return layer(nn.Dense(16, name="a")(x))


class Gives(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Takes(name="takes")(x, nn.Dense(16, name="o"))


class Sequence(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16, name="o")])(x)


class Normalizes(nn.Module):
  """Layers within wrappers, whose own variables are called as paths are: `o/kernel/scale`."""

  @nn.compact
  def __call__(self, x):
    x = nn.WeightNorm(nn.Dense(16, name="o"))(x)
    return nn.WeightNorm(nn.Dense(16, name="a"))(x)


class Net(nn.Module):
  part: nn.Module

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="head")(self.part(x))


CASES = {
  "attention": (lambda: nn.MultiHeadDotProductAttention(2), "query", 1),
  "self_attention": (lambda: SelfAttention(2), "query", 1),
  "inherits": (Inherits, "o", 1),
  "within": (Within, "part", 1),
  "normalized": (Normalizes, "o", 1),
  "cell": (lambda: nn.RNN(nn.LSTMCell(8)), "cell/hi", 1),
  "cells": (lambda: nn.RNN(nn.LSTMCell(8)), "cell/.*", 8),
  "branches": (Branches, "o", 1),
  "scanned": (Scanned, "layers/o", 1),
  "shares": (Shares, "o", 1),
  "gives": (Gives, "o", 1),
  "sequence": (Sequence, "o", 1),
}


@pytest.mark.parametrize(("make", "path", "layers"), CASES.values(), ids=CASES.keys())
def test_a_rule_by_the_path_of_a_layers_parameters_governs_that_layer(make, path, layers):
  policies = mpjax.PolicyMap({f"part/{path}": "float32"}, default="mixed_bfloat16")
  net, plain = mpjax.apply_policy(Net(make()), policies), Net(make())
  variables = plain.init(jax.random.key(0), X)
  found = [c.factors for c in contractions(jax.make_jaxpr(net.apply)(variables, X))]
  assert found.count(("float32", "float32")) == layers
  assert found.count(("bfloat16", "bfloat16")) == len(found) - layers > 0
  assert f"part/{path}" in str(explain(plain, policies, variables, X))


@pytest.mark.parametrize(
  ("model", "scopes", "path"),
  [(Gives(), "takes/where/o", "o"), (Net(Inherits()), "part/part/o", "part/o")],
  ids=["gives", "inherits"],
)
def test_a_rule_by_the_scopes_that_lead_to_a_layer_governs_it_first(model, scopes, path):
  policies = mpjax.PolicyMap({path: "mixed_float16", scopes: "float32"}, default="mixed_bfloat16")
  variables = model.init(jax.random.key(0), X)
  net = mpjax.apply_policy(model, policies)
  found = [c.factors for c in contractions(jax.make_jaxpr(net.apply)(variables, X))]
  assert sorted(found) == [("bfloat16", "bfloat16"), ("float32", "float32")]
  assert scopes in str(explain(model, "mixed_bfloat16", variables, X))  # as reports name it


@pytest.mark.parametrize("wrap", [nn.jit, nn.remat])
def test_parameters_of_16_bits_that_are_written_back_keep_their_dtype(wrap):
  class Wraps(nn.Module):
    @nn.compact
    def __call__(self, x):
      return wrap(nn.Dense)(16)(x)

  model = mpjax.apply_policy(Wraps(), "bfloat16")
  variables = model.init(jax.random.key(0), X)
  _, updated = model.apply(variables, X, mutable=["params"])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(updated)} == {"bfloat16"}
