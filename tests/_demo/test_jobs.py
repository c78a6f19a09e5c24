"""The two built-in jobs: their data, their splits, and that they train under a policy."""

import re
import sys
import sysconfig
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax import Policy
from mpjax._demo.digits import Digits, ResNet
from mpjax._demo.jobs import UsageError, fingerprint
from mpjax._demo.text import Text


@pytest.fixture(autouse=True)
def _as_outside_tests():
  """Flax and optax, and a model that says nothing about dtypes, mix dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


JOBS = {
  "digits": lambda: Digits(ResNet(widths=(8,))),
  "text": lambda: Text(width=16, depth=1, heads=2),
}
SHORT = {"bfloat16": "bf16", "float16": "f16"}


@pytest.fixture(params=JOBS, scope="module")
def job(request):
  return JOBS[request.param]()


def rows(inputs):
  return {row.tobytes() for row in np.asarray(inputs)}


def dtypes(tree):
  return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def contracted(lowered):
  """The dtypes of the factors of every matmul and convolution."""
  pattern = r"stablehlo\.(?:dot_general|convolution)\b.* : \((.*)\) ->"
  factors = re.findall(pattern, lowered.as_text())
  return {dtype for pair in factors for dtype in re.findall(r"x([a-z]+[0-9]+)>", pair)}


def test_the_digits_are_all_there_and_held_out_ones_are_never_trained_on():
  job = JOBS["digits"]()
  trained = np.concatenate([job.batch(i, 100, 0).inputs for i in range(14)])
  assert len(rows(trained)) == job.train_size == 1400
  assert len(job.held_out.targets) == 397
  assert not rows(trained) & rows(job.held_out.inputs)
  assert trained.dtype == np.float32 and trained.min() == 0 and trained.max() == 1


def test_an_epoch_of_digits_holds_every_image_once_and_the_next_has_another_order():
  job = JOBS["digits"]()
  first, second = (
    np.concatenate([job.batch(e * 14 + i, 100, 0).inputs for i in range(14)]) for e in (0, 1)
  )
  assert len(rows(first)) == len(rows(second)) == 1400
  assert not np.array_equal(first, second)


def test_the_text_is_that_of_the_running_python_with_modules_held_out():
  job = JOBS["text"]()
  batch = job.batch(0, 4, 0)
  assert batch.inputs.shape == batch.targets.shape == (4, 64)
  assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
  text = "".join(map(chr, job.held_out.inputs.ravel()))
  assert "def " in text and "self" in text
  assert job.fingerprint == JOBS["text"]().fingerprint


def test_a_python_without_its_source_text_is_told_so(monkeypatch, tmp_path):
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(UsageError, match="choose --job digits"):
    Text()


def test_a_missing_scikit_learn_is_named_with_its_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(UsageError, match="pip install scikit-learn"):
    Digits()


def test_a_batch_depends_on_step_and_seed_alone(job):
  one, again = job.batch(5, 8, 0), job.batch(5, 8, 0)
  assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
  for other in (job.batch(6, 8, 0), job.batch(5, 8, 1)):
    assert not np.array_equal(one.inputs, other.inputs)


@pytest.mark.quick(every=2)
def test_a_session_computes_in_16_bits_learns_and_is_restored_to_the_bit(job):
  policy = Policy.parse({"digits": "mixed_bfloat16", "text": "mixed_float16"}[job.name])
  session = job.start(policy, 8, 0)
  batches = [job.batch(i, 32, 0) for i in range(8)]
  assert contracted(session.lower(batches[0])) == {SHORT[policy.compute_dtype.name]}
  first = session.step(batches[0])
  for batch in batches[1:5]:
    session.step(batch)
  saved = jax.tree.map(np.array, session.state())
  assert not dtypes(saved) & {"bfloat16", "float16"}
  last = [session.step(batch) for batch in batches[5:]]
  assert last[-1].loss < first.loss
  session.restore(jax.tree.map(jnp.asarray, saved))
  again = [session.step(batch) for batch in batches[5:]]
  assert bits(again) == bits(last)


def test_parameters_are_held_in_the_param_dtype(job):
  session = job.start(Policy.parse("bfloat16"), 4, 0)
  assert "bfloat16" in dtypes(session.state())


@pytest.mark.quick
@pytest.mark.parametrize("name", ["float32", "float16"])
def test_a_session_is_evaluated_under_its_policy(job, name):
  session = job.start(Policy.parse(name), 4, 0)
  assert 0 <= session.evaluate() < 12


@pytest.mark.ci
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_compiled_residual_network_is_near_float32(name):
  model, images = ResNet(), JOBS["digits"]().held_out.inputs[:32]
  variables = model.init(jax.random.key(0), images, train=False)
  wide = model.apply(variables, images, train=False)
  narrow = jax.jit(partial(mpjax.apply_policy(model, name).apply, train=False))(variables, images)
  assert narrow.dtype.name == name
  np.testing.assert_allclose(np.asarray(narrow, np.float32), wide, atol=0.05 * np.abs(wide).max())


def test_a_fingerprint_tells_values_shapes_and_dtypes_apart():
  ones = np.ones(4, np.float32)
  others = [np.zeros(4, np.float32), ones.reshape(2, 2), ones.view(np.int32)]
  assert fingerprint(ones) == fingerprint(ones.copy())
  assert fingerprint(ones) not in {fingerprint(other) for other in others}
