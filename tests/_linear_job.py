"""A job that compiles in no time, for tests of what is around the jobs of `mpjax compare`."""

import functools
import signal
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from mpjax._demo.jobs import Batch, Metric, Outcome, scaled_for

WIDTH = 4


def _loss(params: Any, batch: Batch) -> Any:
  return jnp.mean((batch.inputs @ params["w"] - batch.targets) ** 2)


class LinearJob:
  """Fits a line to noise.

  Args:
    ctrl_c_at: Batches on which Ctrl-C is pressed as they are made.
    bad_at: Batches that hold NaN.
  """

  name = "linear"
  metric = Metric("error", 1.0, "", "", 3)
  train_size = 64
  fingerprint = "0"

  def __init__(self, ctrl_c_at: tuple[int, ...] = (), bad_at: tuple[int, ...] = ()) -> None:
    self.ctrl_c_at = list(ctrl_c_at)
    self.bad_at = bad_at
    self.sessions: list[LinearSession] = []

  def batch(self, index: int, size: int, seed: int) -> Batch:
    if self.ctrl_c_at and index == self.ctrl_c_at[0]:
      self.ctrl_c_at.pop(0)
      signal.raise_signal(signal.SIGINT)
    rng = np.random.default_rng((seed, index))
    inputs = rng.normal(size=(size, WIDTH)).astype(np.float32)
    targets = inputs.sum(1) * (np.nan if index in self.bad_at else 0.1)
    return Batch(inputs, targets.astype(np.float32))

  def start(self, policy: mpjax.Policy, steps: int, seed: int) -> "LinearSession":
    self.sessions.append(LinearSession(policy))
    return self.sessions[-1]


@functools.cache
def _step_of(policy: mpjax.Policy) -> tuple[Any, Any]:
  """The optimizer and the step, which are compiled once for all sessions of a policy."""
  tx = scaled_for(policy, optax.sgd(0.05, momentum=0.9))
  return tx, mpjax.make_train_step(_loss, tx, policy=policy)


class LinearSession:
  def __init__(self, policy: mpjax.Policy) -> None:
    tx, self._step = _step_of(policy)
    params = policy.cast_to_param({"w": jnp.zeros(WIDTH)})
    self.train_state = mpjax.TrainState.create(params, tx)

  def lower(self, batch: Batch) -> Any:
    return self._step.lower(self.train_state, batch)

  def step(self, batch: Batch) -> Outcome:
    self.train_state, metrics = self._step(self.train_state, batch)
    return Outcome(metrics.loss, metrics.loss_scale, metrics.applied)

  def evaluate(self) -> float:
    return float(jnp.abs(self.train_state.params["w"].astype(jnp.float32) - 0.1).max())

  def state(self) -> Any:
    return self.train_state

  def restore(self, state: Any) -> None:
    self.train_state = state
