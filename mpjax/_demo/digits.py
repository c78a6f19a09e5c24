"""The digits job: a residual network with BatchNorm, in Linen, on real handwritten digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import mpjax
from mpjax._demo.jobs import (
  Batch,
  Metric,
  Outcome,
  UsageError,
  fingerprint,
  scaled_for,
  warmup_cosine,
)

_HELD_OUT = 397
_SPLIT_SEED = 0
_PEAK_RATE = 0.1
_WEIGHT_DECAY = 5e-4


class _Block(nn.Module):
  """Two convolutions around which the input is carried (He et al., 2016)."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    def norm(h: jax.Array) -> jax.Array:
      return nn.BatchNorm(use_running_average=not train, momentum=0.9)(h)

    h = nn.Conv(self.features, (3, 3), strides=self.stride, use_bias=False)(x)
    h = nn.Conv(self.features, (3, 3), use_bias=False)(nn.relu(norm(h)))
    if x.shape != h.shape:
      x = norm(nn.Conv(self.features, (1, 1), strides=self.stride, use_bias=False)(x))
    return nn.relu(x + norm(h))


class ResNet(nn.Module):
  """A small residual network for images; it says nothing about dtypes.

  Attributes:
    widths: The number of channels of each block; every block after the first halves the image.
    classes: The number of classes.
  """

  widths: tuple[int, ...] = (32, 64)
  classes: int = 10

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Class scores for images ``[batch, height, width, channels]``."""
    h = nn.Conv(self.widths[0], (3, 3), use_bias=False)(images)
    h = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(h))
    for number, width in enumerate(self.widths):
      h = _Block(width, 1 if number == 0 else 2)(h, train=train)
    # Changes no value. Without it jaxlib 0.12.0 for CPU fuses the last block with the mean and
    # returns NaN or noise in bfloat16; so it does for a model with `dtype=` arguments.
    h = jax.lax.optimization_barrier(h)
    return nn.Dense(self.classes)(h.mean(axis=(1, 2)))


class Digits:
  """scikit-learn's 1,797 handwritten digits of 8 by 8 pixels (Alpaydin & Kaynak, 1998).

  Attributes:
    name: "digits".
    metric: Accuracy on 397 held-out images, the same ones for every seed.
    fingerprint: A digest of the training images and labels.
    train_size: The number of training images.
    held_out: The images and labels that training never sees.
  """

  name = "digits"
  metric = Metric("accuracy", 100.0, "%", " pt", 2)

  def __init__(self, model: nn.Module | None = None) -> None:
    images, labels = _load()
    self.held_out = Batch(images[:_HELD_OUT], labels[:_HELD_OUT])
    self._train = Batch(images[_HELD_OUT:], labels[_HELD_OUT:])
    self._model = model or ResNet()
    self._initial: dict[int, Any] = {}  # by seed: to make them takes as long as to train
    self.train_size = len(self._train.targets)
    self.fingerprint = fingerprint(*self._train)

  def batch(self, index: int, size: int, seed: int) -> Batch:
    """The batch of step ``index``; every epoch goes through the images in a new order."""
    epoch, place = divmod(index, self.train_size // size)
    order = np.random.default_rng((seed, epoch)).permutation(self.train_size)
    chosen = order[place * size : (place + 1) * size]
    return Batch(self._train.inputs[chosen], self._train.targets[chosen])

  def start(self, policy: mpjax.Policy, steps: int, seed: int) -> DigitsSession:
    """A session at step 0; the same initial values for every policy."""
    if seed not in self._initial:
      self._initial[seed] = jax.jit(self._model.init, static_argnames="train")(
        jax.random.key(seed), self.held_out.inputs[:1], train=False
      )
    return DigitsSession(self._model, self._initial[seed], self.held_out, policy, steps)


class DigitsSession:
  """A Linen model in training under a policy."""

  def __init__(
    self, model: nn.Module, variables: Any, held_out: Batch, policy: mpjax.Policy, steps: int
  ) -> None:
    self._held_out = held_out
    tx = optax.chain(
      optax.add_decayed_weights(_WEIGHT_DECAY),
      optax.sgd(warmup_cosine(_PEAK_RATE, steps), momentum=0.9, nesterov=True),
    )
    tx = scaled_for(policy, tx)
    self._state = mpjax.TrainState.create(
      policy.cast_to_param(variables["params"]), tx, model_state=variables["batch_stats"]
    )
    self._step = mpjax.make_train_step(_loss_of(model), tx, policy=policy)
    self._predict = jax.jit(mpjax.apply_policy(model, policy).apply, static_argnames="train")

  def lower(self, batch: Batch) -> Any:
    """Lowers the step for batches like this one; ``compile()`` of it serves later steps too."""
    return self._step.lower(self._state, batch)

  def step(self, batch: Batch) -> Outcome:
    """Takes one training step."""
    self._state, metrics = self._step(self._state, batch)
    return Outcome(metrics.loss, metrics.loss_scale, metrics.applied)

  def evaluate(self) -> float:
    """The share of held-out images that the model names correctly."""
    variables = {"params": self._state.params, "batch_stats": self._state.model_state}
    scores = self._predict(variables, self._held_out.inputs, train=False)
    return float((np.asarray(scores).argmax(-1) == self._held_out.targets).mean())

  def state(self) -> Any:
    """Everything that a step reads and writes, as a tree of arrays."""
    return self._state

  def restore(self, state: Any) -> None:
    """Goes on from a state that `state` returned."""
    self._state = state


def _loss_of(model: nn.Module) -> Any:
  def loss_fn(params: Any, batch_stats: Any, batch: Batch) -> tuple[jax.Array, Any]:
    scores, updated = model.apply(
      {"params": params, "batch_stats": batch_stats},
      batch.inputs,
      train=True,
      mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)
    return jnp.mean(losses), updated["batch_stats"]

  return loss_fn


def _load() -> tuple[np.ndarray, np.ndarray]:
  """Images ``f32[1797, 8, 8, 1]`` between 0 and 1 and labels ``i32[1797]``, shuffled."""
  try:
    from sklearn.datasets import load_digits
  except ModuleNotFoundError as error:
    raise UsageError(
      "The digits job needs scikit-learn: pip install scikit-learn, or choose --job text."
    ) from error
  data: Any = load_digits()
  order = np.random.default_rng(_SPLIT_SEED).permutation(len(data.target))
  images = (data.images / 16).astype(np.float32)[..., None]
  return images[order], data.target.astype(np.int32)[order]
