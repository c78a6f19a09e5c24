"""Saving with Orbax and restoring with `mpjax.checkpoint`: the same bits, or an error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import _resumed_job as job
import mpjax
from _arrays import array
from mpjax import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def bits(tree):
  """The bytes of every leaf, keys included."""
  return [
    np.asarray(
      jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    ).tobytes()
    for x in jax.tree.leaves(tree)
  ]


def saved(directory, tree, step=0):
  """Writes one checkpoint as anybody would, without mpjax."""
  with job.manager_of(directory) as manager:
    manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()


def restored(directory, like, **options):
  with job.manager_of(directory) as manager:
    return checkpoint.restore(manager, like, **options)


# The same bits ------------------------------------------------------------------------------------


SHORT, NARROW = 6, 8  # steps, of which that of batch 4 is skipped, and the width of the job


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """A sharded run that never stopped: where it saved before every step, and the states there."""
  directory, mesh, step = tmp_path_factory.mktemp("run"), job.make_mesh(), job.make_step()
  states = [job.create(mesh, NARROW)]
  with job.manager_of(directory, keep=None) as manager:
    for index in range(SHORT):
      manager.save(index, args=ocp.args.StandardSave(states[-1]))
      manager.wait_until_finished()
      copied = jax.tree.map(jnp.copy, states[-1])
      states.append(step(copied, job.batch_of(index, mesh, NARROW))[0])
  return directory, step, states


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("stopped", range(SHORT))
def test_a_sharded_run_resumes_with_the_same_bits_at_any_step(whole_run, stopped):
  directory, step, states = whole_run
  mesh = job.make_mesh()
  with job.manager_of(directory, keep=None) as manager:
    state = checkpoint.restore(manager, job.create(mesh, NARROW), step=stopped)
  assert bits(state) == bits(states[stopped])
  assert state.params["w"].sharding == states[stopped].params["w"].sharding
  for index in range(stopped, SHORT):
    state, _ = step(state, job.batch_of(index, mesh, NARROW))
  assert bits(state) == bits(states[SHORT])
  assert int(state.step) == SHORT - 1


def test_a_checkpoint_goes_onto_another_mesh(whole_run):
  directory, _, states = whole_run
  smaller = job.create(job.make_mesh(4), NARROW)
  with job.manager_of(directory, keep=None) as manager:
    moved = checkpoint.restore(manager, smaller, step=2)
  assert bits(moved) == bits(states[2])
  assert moved.params["w"].sharding == smaller.params["w"].sharding
  assert len(moved.params["w"].sharding.device_set) == 4


class Net(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.2, rngs=rngs)
    self.down = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


def nnx_run(policy="mixed_float16"):
  plain = Net(nnx.Rngs(0))
  model = mpjax.apply_policy(plain, policy)
  tx = mpjax.dynamic_loss_scaling(optax.trace(0.9), growth_interval=2)
  return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_an_nnx_model_and_its_optimizer_resume_with_the_same_bits(tmp_path):
  step = mpjax.nnx.make_train_step(lambda model, x: jnp.mean(model(x) ** 2))
  x = jax.random.normal(jax.random.key(0), (8, 4))
  run = nnx_run()
  step(*run, x)
  step(*run, x.at[0, 0].set(jnp.nan))
  saved(tmp_path, nnx.as_pure(nnx.state(run)))
  step(*run, x)
  again = nnx_run()
  nnx.update(again, restored(tmp_path, nnx.as_pure(nnx.state(again))))
  assert int(again[1].opt_state.total_skips[...]) == 1
  step(*again, x)
  assert bits(nnx.state(again)) == bits(nnx.state(run))


# Plain models and models under a policy -----------------------------------------------------------


def test_checkpoints_of_a_plain_linen_model_and_of_one_under_a_policy_are_the_same(tmp_path):
  plain = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.Dense(2)])
  model = mpjax.apply_policy(plain, "mixed_bfloat16")
  x = jnp.ones((2, 4))
  ours, theirs = (m.init(jax.random.key(n), x) for n, m in enumerate((model, plain)))
  saved(tmp_path / "plain", theirs)
  saved(tmp_path / "ours", ours)
  chex.assert_trees_all_equal(restored(tmp_path / "plain", ours), theirs)
  chex.assert_trees_all_equal(restored(tmp_path / "ours", theirs), ours)


def test_checkpoints_of_a_plain_nnx_model_and_of_one_under_a_policy_are_the_same(tmp_path):
  plain, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
  model = mpjax.apply_policy(Net(nnx.Rngs(2)), "mixed_float16")
  saved(tmp_path / "plain", nnx.as_pure(nnx.state(plain)))
  nnx.update(model, restored(tmp_path / "plain", nnx.as_pure(nnx.state(model))))
  assert bits(nnx.state(model)) == bits(nnx.state(plain))
  saved(tmp_path / "ours", nnx.as_pure(nnx.state(model)))
  nnx.update(other, restored(tmp_path / "ours", nnx.as_pure(nnx.state(other))))
  assert bits(nnx.state(other)) == bits(nnx.state(plain))


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("like", "text"),
  [
    ({"a": {"n": array(0)}}, r"has a/n: i32\[\] for f32\[\].*cast_floating"),
    ({"a": {"n": array([0, 0], jnp.int32)}}, r"has a/n: i32\[\] for i32\[2\]"),
    ({"a": {"m": array(0, jnp.int32)}}, r"has a/m: nothing for i32\[\]"),
  ],
  ids=["dtype", "shape", "name"],
)
def test_a_checkpoint_of_other_arrays_is_refused_by_path(tmp_path, like, text):
  saved(tmp_path, {"a": {"n": jnp.int32(16777217)}})
  with pytest.raises(ValueError, match=text):
    restored(tmp_path, like)


@pytest.mark.parametrize(
  ("given", "got"),
  [
    (
      "/tmp/run",
      r"the path '/tmp/run'\. Write .*ocp\.CheckpointManager\('/tmp/run', item_handlers=",
    ),
    (Path("/tmp/run"), r"the path '/tmp/run'\. Write restore\(manager, like\) with manager"),
    ({"n": 0}, r"dict\. Write restore\(manager, like\) with .*ocp\.CheckpointManager\(directory"),
  ],
  ids=["string", "path", "state first"],
)
def test_a_restore_from_no_manager_says_how_to_make_one(given, got):
  with pytest.raises(TypeError, match=rf"takes the ocp\.CheckpointManager of a run\. Got {got}"):
    checkpoint.restore(given, like={"n": jnp.int32(0)})


def test_a_restore_without_checkpoint_or_handler_says_what_to_do(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"Got none in .*latest_step\(\) first"):
    restored(tmp_path, {})
  saved(tmp_path, {"n": jnp.int32(1)})
  with pytest.raises(FileNotFoundError, match=r"no step 7 in .*has steps \[0\]"):
    restored(tmp_path, {}, step=7)
  with (
    ocp.CheckpointManager(tmp_path) as manager,
    pytest.raises(ValueError, match=r"item_handlers=ocp\.StandardCheckpointHandler"),
  ):
    checkpoint.restore(manager, {"n": jnp.int32(0)})


@pytest.mark.parametrize(
  "made",
  [
    lambda: {"w": jnp.ones(2), "epoch": 3, "rate": 0.5},
    lambda: nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    lambda: {"value": {"value": jnp.ones(2)}},
  ],
  ids=["numbers", "variables", "names"],
)
def test_what_orbax_saves_comes_back_as_it_was(made, tmp_path):
  tree = made()
  saved(tmp_path, tree)
  found = restored(tmp_path, tree)
  chex.assert_trees_all_equal(found, tree)
  assert jax.tree.structure(found) == jax.tree.structure(tree)


def test_a_manager_of_several_items_is_refused(tmp_path):
  items = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
  tree = {"w": jnp.ones(2)}
  args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({"epoch": 3}))
  with ocp.CheckpointManager(tmp_path, item_handlers=items) as manager:
    manager.save(0, args=args)
    manager.wait_until_finished()
    with pytest.raises(ValueError, match=r"one item. Got one of meta, state\."):
      checkpoint.restore(manager, tree)


# Killed -------------------------------------------------------------------------------------------

STEPS = 26


def start(directory):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, job.__file__, str(directory), str(STEPS)]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def kill(process):
  process.send_signal(signal.SIGKILL)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == -signal.SIGKILL  # and had not ended by itself
  return output


def last_step(output):
  return int(output.strip().splitlines()[-1].split()[-1])


def wait_until(happened, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not happened():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.001)


@pytest.mark.ci
def test_a_killed_run_loses_only_the_steps_since_its_last_complete_save(tmp_path):
  # Killed in the middle of a save that is not the first.
  with start(tmp_path) as process:
    seen = ""
    while "step 10\n" not in seen:
      seen += process.stdout.readline()
    writing = lambda: any("tmp" in entry.name for entry in tmp_path.iterdir())
    wait_until(writing, process)
    reached = last_step(seen + kill(process))
  assert writing()  # the save was not complete
  with job.manager_of(tmp_path) as manager:
    complete = manager.latest_step()
  # The save of a step may still have been under way when it was killed, never two of them.
  assert complete in (reached // 4 * 4, reached // 4 * 4 - 4)
  with start(tmp_path) as process:
    output, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert f"from {complete}\n" in output and f"step {STEPS}\n" in output
  # The same bits as without a kill.
  mesh, step = job.make_mesh(), job.make_step()
  state = job.create(mesh)
  for index in range(STEPS // 4 * 4):
    state, _ = step(state, job.batch_of(index, mesh))
  assert bits(restored(tmp_path, job.create(mesh))) == bits(state)
