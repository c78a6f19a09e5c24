"""Every optimizer of optax and optax.contrib, listed from the packages.

One that a new optax adds is in the list; one that needs more than a learning rate is told so here.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import optax
import optax.contrib

Transformation = optax.GradientTransformation

MADE: dict[str, Callable[[Any, float], Transformation]] = {
  "mechanize": lambda make, rate: make(optax.sgd(rate)),
  "noisy_sgd": lambda make, rate: make(rate, key=0),
  "sam": lambda make, rate: make(optax.sgd(rate), optax.sgd(rate / 2), opaque_mode=True),
  "schedule_free": lambda make, rate: make(optax.sgd(rate), rate),
}
"""How those are made that need more than a learning rate."""

NOT_OURS = {
  "dpsgd": "its gradients have an axis of examples, which it averages itself",
  "optimistic_adam": "deprecated for optimistic_adam_v2",
}


def _found() -> Iterator[tuple[str, Any]]:
  """What has a learning rate, or is named above; transformations without one are parts of these."""
  for package in (optax, optax.contrib):
    for name, make in sorted(vars(package).items()):
      if name.startswith(("_", "scale_by_")) or not inspect.isfunction(make):
        continue
      signature = inspect.signature(make)
      known = name in MADE or "learning_rate" in signature.parameters
      if known and "GradientTransformation" in str(signature.return_annotation):
        yield name, make


FOUND = dict(_found())
"""All of them, those that are not ours included: how each is made, by name."""

NAMES = [name for name in FOUND if name not in NOT_OURS]


def build(name: str, rate: float = 0.1) -> Transformation:
  """An optimizer of the list."""
  make = FOUND[name]
  return MADE[name](make, rate) if name in MADE else make(learning_rate=rate)
