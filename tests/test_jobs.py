"""The two built-in jobs: their data, their splits, and that they train under a policy."""

import re
import sys
import sysconfig

import jax
import numpy as np
import pytest

from mpjax import Policy
from mpjax._digits import Digits, ResNet
from mpjax._jobs import UsageError, fingerprint
from mpjax._text import Text

pytestmark = pytest.mark.usefixtures("standard_promotion")

JOBS = {
  "digits": lambda: Digits(ResNet(widths=(4, 8))),
  "text": lambda: Text(width=16, depth=1, heads=2),
}
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


@pytest.fixture(params=JOBS, scope="module")
def job(request):
  return JOBS[request.param]()


def rows(inputs):
  return {row.tobytes() for row in np.asarray(inputs)}


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


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(UsageError, match=r'pip install "mpjax\[demo\]"'):
    Digits()


def test_a_batch_depends_on_step_and_seed_alone(job):
  one, again = job.batch(5, 8, 0), job.batch(5, 8, 0)
  assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
  for other in (job.batch(6, 8, 0), job.batch(5, 8, 1)):
    assert not np.array_equal(one.inputs, other.inputs)


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_no_contraction_of_a_step_is_left_in_float32(job, name):
  policy = Policy.parse(name)
  text = job.start(policy, 4, 0).lower(job.batch(0, 8, 0)).as_text()
  operands = re.findall(r"stablehlo\.(?:dot_general|convolution).* : \((.*)\) ->", text)
  dtypes = {dtype for types in operands for dtype in re.findall(r"x(\w+)>", types)}
  assert len(operands) > 10
  assert dtypes == {{"bfloat16": "bf16", "float16": "f16"}[policy.compute_dtype.name]}


@pytest.mark.parametrize("name", POLICIES)
def test_a_session_learns_keeps_its_dtypes_and_is_restored_to_the_bit(job, name):
  policy = Policy.parse(name)
  session, other = job.start(policy, 12, 0), job.start(policy, 12, 0)
  losses = [session.step(job.batch(i, 32, 0)) for i in range(8)]
  assert float(losses[-1].loss) < float(losses[0].loss)
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(session.state())}
  assert not dtypes & {"bfloat16", "float16"}
  other.restore(jax.tree.map(np.array, session.state()))
  for i in range(8, 12):
    one, two = (s.step(job.batch(i, 32, 0)).loss for s in (session, other))
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
  assert session.evaluate() == other.evaluate()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_parameters_are_held_in_the_param_dtype(job, name):
  session = job.start(Policy.parse(name), 4, 0)
  outcome = session.step(job.batch(0, 8, 0))
  assert np.isfinite(outcome.loss)
  assert name in {leaf.dtype.name for leaf in jax.tree.leaves(session.state())}


def test_a_fingerprint_tells_values_shapes_and_dtypes_apart():
  ones = np.ones(4, np.float32)
  others = [np.zeros(4, np.float32), ones.reshape(2, 2), ones.view(np.int32)]
  assert fingerprint(ones) == fingerprint(ones.copy())
  assert fingerprint(ones) not in {fingerprint(other) for other in others}
