"""Optimizers of optax, as the scaler and the train steps call them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import optax


def as_transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
  """An optax transformation, or ``optax.MultiSteps``, as one that takes extra arguments.

  Raises:
    TypeError: If it is neither.
  """
  if isinstance(inner, optax.MultiSteps):
    # Its own conversion to a transformation drops extra arguments.
    update: Any = inner.update
    return optax.GradientTransformationExtraArgs(inner.init, update)
  if isinstance(inner, optax.GradientTransformation):
    return optax.with_extra_args_support(inner)
  raise TypeError(
    "The optimizer must be an optax.GradientTransformation. Got "
    f"{inner!r} of type {type(inner).__name__}. Pass for example optax.adam(1e-3)."
  )


def update_with(
  extra: Mapping[str, Any], update: Callable[..., Any], *args: Any, **required: Any
) -> Any:
  """Calls an optimizer's update with those extra arguments that it takes.

  Most transformations take whatever comes, and use what they need; `optax.contrib.sam` and chains
  that hold it refuse what they do not know. What a chain holds is not to be seen from outside,
  hence a call to find out: a refused argument is left out, and the next call has the others.

  Args:
    extra: Arguments by name, all of which may be left out.
    update: The function.
    *args: Its positional arguments.
    **required: Arguments by name that it must take.

  Returns:
    What it returns.
  """
  taken = dict(extra)
  while True:
    try:
      return update(*args, **required, **taken)
    except TypeError as error:
      refused = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
      if refused is None or taken.pop(refused[1], _MISSING) is _MISSING:
        raise


_MISSING = object()
