"""Marks that a function leaves in its trace for autocast; without autocast they change nothing."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir

KEEP_FLOAT32 = "mpjax.keep_float32"

T = TypeVar("T")


def keep_float32(x: T) -> T:
  """Mark values as float32 that was meant, inside a function under `autocast`.

  A marked value stays float32 through elementwise operations up to the next matmul: a residual
  stream that must not round, say. Outside autocast this is the identity.

  Args:
    x: A pytree of arrays, of any shapes and dtypes.

  Returns:
    The same values.

  Example:
    >>> import jax, jax.numpy as jnp, mpjax
    >>> fn = lambda w, x: mpjax.keep_float32(x @ w) + 1
    >>> w = x = jnp.ones((4, 4))
    >>> mpjax.autocast(fn, "p=f32, c=bf16, o=f32")(w, x).dtype.name
    'float32'
  """
  return jax.tree.map(lambda leaf: checkpoint_name(leaf, KEEP_FLOAT32), x)


def cast_inputs(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Hand a function compute-dtype operands when it is called under `autocast`.

  Autocast traces a function in float32 and leaves what it does not know (a Pallas kernel, a
  foreign call) in float32. A function marked so is instead traced anew with its float32 operands
  in the compute dtype of its scope: what ``torch.amp.custom_fwd(cast_inputs=...)`` does. Outside
  autocast, and under differentiation inside autocast, it is called as it is.

  Args:
    fn: A function of arrays that returns a pytree of arrays. It must accept the 16-bit formats.

  Returns:
    A function with the same signature.
  """

  @functools.wraps(fn)
  def marked(*args: Any, **kwargs: Any) -> Any:
    leaves, tree = jax.tree.flatten((args, kwargs))
    out_tree = None

    def flat(*flat_leaves: Any) -> list[Any]:
      nonlocal out_tree
      flat_args, flat_kwargs = jax.tree.unflatten(tree, flat_leaves)
      out, out_tree = jax.tree.flatten(fn(*flat_args, **flat_kwargs))
      return out

    out = _cast_inputs_p.bind(*map(jax.numpy.asarray, leaves), fn=flat)
    return jax.tree.unflatten(out_tree, out)  # type: ignore[arg-type]  # set by tracing flat

  return marked


def marked_results(eqn: JaxprEqn, dtypes: Sequence[np.dtype | None]) -> list[Any]:
  """The abstract results of a marked function on operands of the given dtypes (None: as traced)."""
  operands: Any = zip(eqn.invars, dtypes, strict=True)
  avals = [jax.ShapeDtypeStruct(a.aval.shape, dtype or a.aval.dtype) for a, dtype in operands]
  return jax.eval_shape(eqn.params["fn"], *avals)


_cast_inputs_p = Primitive("mpjax_cast_inputs")
_cast_inputs_p.multiple_results = True


@_cast_inputs_p.def_impl
def _impl(*args: Any, fn: Callable[..., list[Any]]) -> list[Any]:
  return fn(*args)


@_cast_inputs_p.def_abstract_eval
def _abstract_eval(*avals: Any, fn: Callable[..., list[Any]]) -> list[Any]:
  closed = jax.make_jaxpr(fn)(*avals)
  return list(closed.out_avals)


def _jvp(primals: Any, tangents: Any, *, fn: Callable[..., list[Any]]) -> Any:
  return jax.jvp(lambda *xs: fn(*xs), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _batch(args: Any, dims: Any, *, fn: Callable[..., list[Any]]) -> Any:
  out = _cast_inputs_p.bind(*args, fn=jax.vmap(fn, in_axes=tuple(dims)))
  return out, [0] * len(out)


ad.primitive_jvps[_cast_inputs_p] = _jvp
batching.primitive_batchers[_cast_inputs_p] = _batch
mlir.register_lowering(
  _cast_inputs_p,
  mlir.lower_fun(lambda *args, fn: fn(*args), multiple_results=True),
)
