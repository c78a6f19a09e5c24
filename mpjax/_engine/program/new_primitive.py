"""Primitives of our own, each with the rules that JAX's transformations ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]


def new_primitive(
  name: str,
  run: Function,
  *,
  shape: Function | None = None,
  jvp: Function | None = None,
  transpose: Function,
  batch: Function | None = None,
) -> Primitive:
  """A primitive with one result.

  Args:
    name: Its name.
    run: What it computes, of arrays and of its parameters.
    shape: The type of its result, of the types of its operands; run is traced if there is none.
    jvp: Its derivative; one that is linear in its operand has none.
    transpose: Its transpose.
    batch: Its rule for batches; one that works element by element has none.
  """
  made = Primitive(name)

  @functools.lru_cache(maxsize=1024)
  def traced(*avals: Any, **params: Any) -> Any:
    return jax.make_jaxpr(functools.partial(run, **params))(*avals).out_avals[0]

  made.def_impl(run)
  made.def_abstract_eval(traced if shape is None else shape)
  if jvp is None:
    ad.deflinear2(made, transpose)
  else:
    ad.primitive_jvps[made] = jvp
    ad.primitive_transposes[made] = transpose
  if batch is None:
    batching.defvectorized(made)
  else:
    batching.primitive_batchers[made] = batch
  mlir.register_lowering(made, mlir.lower_fun(run, multiple_results=False))
  return made
