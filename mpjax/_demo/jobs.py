"""What the built-in jobs of `mpjax compare` have in common.

A job is a data set with a held-out split, a model and an optimizer; a session is one training run
of a job under one policy. The runner knows only these two shapes, not Linen or NNX.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax

# The scale may double this often, so that a run of a few hundred steps shows it at work; the
# library's default, one doubling in 2000 steps, is for training that takes longer.
_GROWTH_INTERVAL = 50


class UsageError(Exception):
  """What the person at the command line can put right: the message is the whole report."""


class Batch(NamedTuple):
  """A batch of examples.

  Attributes:
    inputs: What the model is given; the first axis is the batch.
    targets: The integer labels of the inputs.
  """

  inputs: np.ndarray
  targets: np.ndarray


@dataclass(frozen=True)
class Metric:
  """How well a model does on held-out data.

  Attributes:
    name: Its name in reports, such as "accuracy".
    factor: What a value is multiplied by to be printed.
    unit: What stands behind a printed value, such as "%".
    difference_unit: What stands behind a printed difference of two values.
    decimals: The number of decimals that mean something.
  """

  name: str
  factor: float
  unit: str
  difference_unit: str
  decimals: int

  def show(self, value: float) -> str:
    """Prints a value of this metric."""
    return f"{value * self.factor:.{self.decimals}f}{self.unit}"

  def show_difference(self, value: float) -> str:
    """Prints a difference of two values of this metric."""
    return f"{value * self.factor:+.{self.decimals}f}{self.difference_unit}"


class Outcome(NamedTuple):
  """What one training step reports; each field a scalar array, maybe still being computed.

  Attributes:
    loss: f32[], the loss, unscaled.
    loss_scale: f32[], the scale that this step used.
    applied: bool[], whether the step was applied; False if it was skipped as not finite.
  """

  loss: jax.Array
  loss_scale: jax.Array
  applied: jax.Array


class Session(Protocol):
  """One model in training under one policy."""

  def lower(self, batch: Batch) -> Any:
    """Lowers the step for batches like this one; ``compile()`` of it serves later steps too."""
    ...

  def step(self, batch: Batch) -> Outcome:
    """Takes one training step."""
    ...

  def evaluate(self) -> float:
    """The job's metric on the held-out data, computed under the policy."""
    ...

  def state(self) -> Any:
    """Everything that a step reads and writes, as a tree of arrays."""
    ...

  def restore(self, state: Any) -> None:
    """Goes on from a state that `state` returned."""
    ...


class Job(Protocol):
  """A model, its optimizer and real data with a held-out split."""

  name: str
  metric: Metric
  fingerprint: str
  train_size: int

  def batch(self, index: int, size: int, seed: int) -> Batch:
    """The batch of step ``index``: a function of its arguments alone."""
    ...

  def start(self, policy: mpjax.Policy, steps: int, seed: int) -> Session:
    """A session at step 0; the same initial values for every policy."""
    ...


def fingerprint(*arrays: np.ndarray) -> str:
  """A short digest of data: equal for equal arrays."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(str((array.dtype.str, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]


def scaled_for(
  policy: mpjax.Policy, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Wraps an optimizer in dynamic loss scaling if the policy has float16 anywhere.

  bfloat16 has float32's range and needs no scaling, so those policies get ``tx`` itself.
  """
  if jnp.float16 in (policy.param_dtype, policy.compute_dtype, policy.output_dtype):
    return mpjax.dynamic_loss_scaling(tx, growth_interval=_GROWTH_INTERVAL)
  return tx


def warmup_cosine(peak: float, steps: int) -> optax.Schedule:
  """A learning rate that rises over the first twentieth of the steps and then falls to zero."""
  return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20, steps)
