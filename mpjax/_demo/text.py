"""The text job: a byte-level transformer, in NNX, on the source text of Python's own library."""

from __future__ import annotations

import math
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mpjax
import mpjax.nnx
from mpjax._demo.jobs import (
  Batch,
  Metric,
  Outcome,
  UsageError,
  fingerprint,
  scaled_for,
  warmup_cosine,
)

_CONTEXT = 64
_EVERY_HELD_OUT = 10
_EVALUATED = 256
_LEAST_BYTES = 100_000
_PEAK_RATE = 5e-3
_WEIGHT_DECAY = 1e-2
_CLIP_NORM = 1.0


class _Block(nnx.Module):
  """Attention and a two-layer network, each normalized first and added to what came in."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
    self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = x + self.attention(self.attention_norm(x), mask=mask)
    return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
  """A byte-level language model; it says nothing about dtypes."""

  def __init__(self, width: int = 128, depth: int = 2, heads: int = 4, *, rngs: nnx.Rngs) -> None:
    self.byte = nnx.Embed(256, width, rngs=rngs)
    self.position = nnx.Embed(_CONTEXT, width, rngs=rngs)
    self.blocks = nnx.List([_Block(width, heads, rngs) for _ in range(depth)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, 256, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Scores of the next byte at each place of ``tokens``, ``[batch, length]``."""
    x = self.byte(tokens) + self.position(jnp.arange(tokens.shape[1]))
    mask = nnx.make_causal_mask(tokens)
    for block in self.blocks:
      x = block(x, mask)
    return self.head(self.norm(x))


class Text:
  """The source text of the running Python's standard library, its top-level modules.

  Attributes:
    name: "text".
    metric: Bits per byte on held-out modules: every tenth by name.
    fingerprint: A digest of the training text.
    train_size: The number of windows that the training text holds.
    held_out: Windows spread evenly over the held-out text.
  """

  name = "text"
  metric = Metric("bits_per_byte", 1.0, "", "", 4)

  def __init__(self, width: int = 128, depth: int = 2, heads: int = 4) -> None:
    self._train, held_out = _load()
    self._sizes = width, depth, heads
    places = np.linspace(0, len(held_out) - _CONTEXT - 1, _EVALUATED).astype(int)
    self.held_out = _windows(held_out, places)
    self.train_size = len(self._train) // _CONTEXT
    self.fingerprint = fingerprint(self._train)

  def batch(self, index: int, size: int, seed: int) -> Batch:
    """The batch of step ``index``: windows drawn at random from the training text."""
    draw = np.random.default_rng((seed, index))
    return _windows(self._train, draw.integers(0, len(self._train) - _CONTEXT, size))

  def start(self, policy: mpjax.Policy, steps: int, seed: int) -> TextSession:
    """A session at step 0; the same initial values for every policy."""
    model = Transformer(*self._sizes, rngs=nnx.Rngs(seed))
    return TextSession(model, self.held_out, policy, steps)


class TextSession:
  """An NNX model in training under a policy."""

  def __init__(self, model: Transformer, held_out: Batch, policy: mpjax.Policy, steps: int) -> None:
    self._held_out = held_out
    nnx.update(model, policy.cast_to_param(nnx.state(model, nnx.Param)))
    tx = optax.chain(
      optax.clip_by_global_norm(_CLIP_NORM),
      optax.adamw(warmup_cosine(_PEAK_RATE, steps), weight_decay=_WEIGHT_DECAY),
    )
    self._model = model
    self._optimizer = nnx.Optimizer(model, scaled_for(policy, tx), wrt=nnx.Param)
    self._step = mpjax.nnx.make_train_step(_loss, policy=policy)
    self._evaluate = nnx.jit(partial(_held_out_loss, policy=policy))

  def lower(self, batch: Batch) -> Any:
    """Lowers the step for batches like this one; ``compile()`` of it serves later steps too."""
    return self._step.lower(self._model, self._optimizer, batch)

  def step(self, batch: Batch) -> Outcome:
    """Takes one training step."""
    metrics = self._step(self._model, self._optimizer, batch)
    return Outcome(metrics.loss, metrics.loss_scale, metrics.applied)

  def evaluate(self) -> float:
    """Bits needed for each held-out byte, given those before it in its window."""
    return float(self._evaluate(self._model, self._held_out)) / math.log(2)

  def state(self) -> Any:
    """Everything that a step reads and writes, as a tree of arrays."""
    return nnx.to_pure_dict(nnx.state((self._model, self._optimizer)))

  def restore(self, state: Any) -> None:
    """Goes on from a state that `state` returned."""
    current = nnx.state((self._model, self._optimizer))
    nnx.replace_by_pure_dict(current, state)
    nnx.update((self._model, self._optimizer), current)


def _loss(model: Any, batch: Batch) -> jax.Array:
  losses = optax.softmax_cross_entropy_with_integer_labels(model(batch.inputs), batch.targets)
  return jnp.mean(losses)


def _held_out_loss(model: Transformer, batch: Batch, policy: mpjax.Policy) -> jax.Array:
  return _loss(mpjax.nnx.apply_policy(model, policy), batch)


def _windows(text: np.ndarray, places: np.ndarray) -> Batch:
  windows = text[places[:, None] + np.arange(_CONTEXT + 1)].astype(np.int32)
  return Batch(windows[:, :-1], windows[:, 1:])


def _load() -> tuple[np.ndarray, np.ndarray]:
  """Training and held-out text, u8 each; the same for every run of one Python version."""
  folder = Path(sysconfig.get_path("stdlib"))
  # What a build writes about its own machine is no source text.
  paths = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_sysconfigdata")]
  texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
  if sum(map(len, texts)) < _LEAST_BYTES:
    raise UsageError(
      "The text job reads the source of Python's standard library, of which there is too little "
      f"in {folder}. Run it with a Python that ships its .py files, or choose --job digits."
    )
  held_out = texts[_EVERY_HELD_OUT - 1 :: _EVERY_HELD_OUT]
  kept = [text for n, text in enumerate(texts) if n % _EVERY_HELD_OUT != _EVERY_HELD_OUT - 1]
  return np.concatenate(kept), np.concatenate(held_out)
