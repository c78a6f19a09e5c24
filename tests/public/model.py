"""One functional view of models from anywhere: Linen, NNX, Haiku, Equinox and plain functions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

JITTER = 0.02
"""Added to every parameter, so that layers which start at zero have gradients to compare."""

Call = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``call(params, state, inputs) -> (outputs, new state)``."""


def noise(*shape: int) -> np.ndarray:
  """A float32 array of unit variance, the same for every call."""
  return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


class Built(NamedTuple):
  """A small model with random parameters.

  Attributes:
      module: A Linen module or an NNX model; None if it is only a function.
      params: What is trained.
      state: What else the model keeps: statistics, random number generators.
      inputs: Arrays to call it with.
      call_of: Makes the function of a module; of None if there is none.
      init_of: The shapes of the variables that a Linen module makes; None for others.
  """

  module: Any
  params: Any
  state: Any
  inputs: Any
  call_of: Callable[[Any], Call]
  init_of: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Public:
  """A published model.

  Attributes:
      name: What the table calls it.
      package: Its package, as pip knows it.
      needs: The modules to import before it can be built.
      kind: What it is for.
      build: Makes it.
      rule: The scope pattern of one of its parts that has matmuls; None where it has no parts.
      has_dtype: Whether it has a `dtype` field, its own way to 16 bits.
      near: The largest relative error to float32 allowed, in units of the format's epsilon.
      loss_scale: What keeps float16 gradients above the subnormals, and finite.
      offset: Added to the offset of every normalization. Rounding flips the relus behind one that
          are near zero, which costs the gradient the square root of the format's epsilon, by
          hand as well; few are near zero when most are positive.
  """

  name: str
  package: str
  needs: tuple[str, ...]
  kind: str
  build: Callable[..., Built]
  rule: str | None = None
  has_dtype: bool = False
  near: float = 4.0
  loss_scale: float = 2.0**10
  offset: float = 0.0

  def __str__(self) -> str:
    return self.name


def linen(
  module: nn.Module, *args: Any, rngs: Sequence[str] = (), method: Any = None, **kwargs: Any
) -> Built:
  """A Linen module, called with arrays, and with keyword arguments that are arrays or static."""
  arrays = {name: value for name, value in kwargs.items() if isinstance(value, np.ndarray)}
  static = {name: value for name, value in kwargs.items() if name not in arrays}
  keys = {name: jax.random.key(seed) for seed, name in enumerate(rngs)}

  def init(module: nn.Module, inputs: Any) -> Any:
    args, arrays = inputs
    rngs = {"params": jax.random.key(17), **keys}
    return module.init(rngs, *args, **arrays, **static, method=method)

  def call_of(module: nn.Module) -> Call:
    def call(params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
      args, arrays = inputs
      variables = {"params": params, **state}
      return module.apply(
        variables, *args, **arrays, **static, method=method, mutable=list(state), rngs=keys
      )

    return call

  def init_of(module: nn.Module) -> Any:
    return jax.eval_shape(functools.partial(init, module), (args, arrays))

  state = dict(compiled(functools.partial(init, module), (args, arrays)))
  return Built(module, jittered(state.pop("params")), state, (args, arrays), call_of, init_of)


def in_nnx(model: nnx.Module, *inputs: Any, **static: Any) -> Built:
  """An NNX model, called with arrays and with static keyword arguments."""
  graph, params, state = nnx.split(model, nnx.Param, ...)
  params = jittered(params)

  def call_of(model: Any) -> Call:
    graph = nnx.graphdef(model)

    def call(params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
      model = nnx.merge(graph, params, state, copy=True)
      outputs = model(*inputs, **static)
      return outputs, nnx.state(model, nnx.Not(nnx.Param))

    return call

  return Built(nnx.merge(graph, params, state), params, state, inputs, call_of)


def function(fn: Callable[..., Any], params: Any, *inputs: Any) -> Built:
  """A function of parameters and arrays."""

  def call(params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
    return fn(params, *inputs), state

  return Built(None, jittered(params), {}, inputs, lambda _: call)


def jittered(params: Any) -> Any:
  """Parameters moved a little, in their own dtypes."""
  rng = np.random.default_rng(0)

  def move(x: Any) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return (np.asarray(x) + JITTER * rng.standard_normal(x.shape)).astype(x.dtype)

  return jax.tree.map(move, params)


def with_offset(params: Any, offset: float) -> Any:
  """Parameters with a number added to the offset of every normalization."""
  if not isinstance(params, Mapping):
    return params
  moved = {name: with_offset(value, offset) for name, value in params.items()}
  shifts = {"bias", "offset"} & moved.keys() if "scale" in moved else ()
  return moved | {name: moved[name] + np.float32(offset) for name in shifts}


# Losses, and running them ---------------------------------------------------------------------


class Traced(NamedTuple):
  """The jaxpr of a model's loss and gradient, what they return, and a way to run them."""

  jaxpr: Any
  outputs: Any
  state: Any
  grads: Any
  run: Callable[[], "Ran"]


class Ran(NamedTuple):
  """What a model and its gradient returned, on the host."""

  outputs: Any
  state: Any
  grads: Any


def traced(built: Built, call: Call, loss_scale: float) -> Traced:
  """Trace a model's loss and gradient once, the loss scaled and the gradient unscaled."""

  def loss(params: Any, state: Any, inputs: Any) -> tuple[jax.Array, Any]:
    outputs, state = call(params, state, inputs)
    return loss_scale * _distance(outputs), (outputs, state)

  def step(params: Any, state: Any, inputs: Any) -> Ran:
    (_, (outputs, state)), grads = jax.value_and_grad(loss, has_aux=True)(params, state, inputs)
    return Ran(outputs, state, jax.tree.map(lambda g: g / loss_scale, grads))

  operands = (built.params, built.state, built.inputs)
  trace = jax.jit(step).trace(*operands)

  def run() -> Ran:
    compiled = trace.lower().compile(compiler_options=compiler_options())
    return jax.device_get(compiled(*operands))

  return Traced(trace.jaxpr, *trace.out_info, run)


def _distance(outputs: Any) -> Any:
  """The squared distance of everything that a model returns to random targets."""
  rng = np.random.default_rng(1)
  return sum(
    jnp.mean(jnp.abs(x.astype(jnp.float32) - rng.standard_normal(x.shape, np.float32)) ** 2)
    for x in floats(outputs)
  )


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
  """Run a function compiled in a hurry."""
  return jax.jit(fn).lower(*args).compile(compiler_options=compiler_options())(*args)


@functools.cache
def compiler_options() -> Mapping[str, Any]:
  """Every rounding that is asked for happens; no time goes into optimizing what runs once."""
  slow = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}
  fast = slow | {"xla_cpu_use_fusion_emitters": False}
  try:
    jax.jit(jnp.negative, compiler_options=fast)(1.0)
  except jax.errors.JaxRuntimeError:
    return slow
  return fast


def floats(tree: Any) -> list[Any]:
  """The floating leaves of a tree."""
  leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def relative_error(found: Any, truth: Any) -> float:
  """The distance of two trees over the size of the second, in float64; inf if not finite."""
  flat = [
    np.concatenate([np.asarray(x, np.float64).ravel() for x in floats(tree)])
    for tree in (found, truth)
  ]
  error = float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))
  return error if np.isfinite(error) else np.inf


def description(tree: Any) -> list[str]:
  """The path, shape and dtype of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}" for path, x in leaves]
