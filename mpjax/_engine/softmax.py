"""Softmaxes of a plan whose backward pass needs their 16-bit result alone.

The derivative of a softmax is a function of its weights (as in `jax.nn.softmax`, or FlashAttention,
Dao et al. 2022). Weights that are only ever read in 16 bits, as by the matmul with an attention's
values, are stored so for that matmul; the float32 exponentials and sums need not be stored at all.
A matmul that is their only reader is run with them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import Rule
from mpjax._engine import jaxprs
from mpjax._engine.environment import to_dtype
from mpjax._engine.jaxprs import JaxprEqn, Literal, Var
from mpjax._engine.kinds import Form, Kind
from mpjax._engine.matmul_derivatives import Contraction
from mpjax._engine.plan import Readers, Step, is_elementwise, shared_format

_RESHAPES = frozenset({"broadcast_in_dim", "reshape"})
_REARRANGES = frozenset({"transpose", "reshape", "squeeze", "expand_dims"})


class Softmax(NamedTuple):
  """Steps of a plan, by index, that make ``exp(x - m) / sum(exp(x - m), axes)``.

  Attributes:
    steps: The indices in order, the division last.
    inputs: x, and m, which is one number along the axes.
    axes: The axes of the sum.
    dtype: The 16-bit format in which the result is read.
    held: The dtype in which it leaves: float32 where its cotangent is to come in that, be it that
      those of several readers add up, or that scores never rounded and their matmul hands out one
      that does not either.
    matmul: The index of the matmul that alone reads it and is run with it, or None.
  """

  steps: tuple[int, ...]
  inputs: tuple[Var, Var]
  axes: tuple[int, ...]
  dtype: np.dtype
  held: np.dtype
  matmul: int | None

  @property
  def due(self) -> int:
    """The index of the step for which it is run."""
    return self.steps[-1] if self.matmul is None else self.matmul

  def alone(self) -> Softmax:
    """The same without its matmul, that is run with another softmax."""
    return self._replace(matmul=None, held=self.dtype)


def match(
  steps: Sequence[Step], readers: Readers, makers: Mapping[Any, int], last: int
) -> Softmax | None:
  """The softmax that ends with a step, if one does whose result is read in 16 bits."""
  if steps[last].eqn.primitive.name != "div":
    return None
  exp, chain = _maker(steps, makers, last, "exp"), _sum_behind(steps, makers, last)
  shifted = None if exp is None else _maker(steps, makers, exp, "sub")
  if exp is None or shifted is None or not chain:
    return None
  x, m = steps[shifted].eqn.invars
  if isinstance(x, Literal) or isinstance(m, Literal):
    return None
  members = sorted({last, exp, shifted, *chain})
  total, result = steps[chain[-1]].eqn, steps[last].eqn.outvars[0]
  axes = tuple(map(int, total.params["axes"]))
  formats = [*{read.via or read.to or FLOAT32 for _, read in readers.get(result, ())}]
  fits = (
    total.invars[0] is steps[exp].eqn.outvars[0]
    and _keeps_axes(steps, chain, axes)
    and _shape(x) == _shape(result)
    and _is_one_number(m, axes, steps, makers)
    and len(formats) == 1
    and FLOAT32 not in formats
    and all(_is_inside(steps, readers, n, members) for n in members[:-1])
    and all(_is_data(steps[n].outs[0]) for n in members)
  )
  if not fits:
    return None
  matmul = _matmul_behind(steps, readers, last)
  never_rounded = _is_data(steps[shifted].operands[0]) and not _was_narrow(x, steps, makers)
  if matmul is not None and not never_rounded and not _sums_along(steps[matmul], result, axes):
    matmul = None
  held = FLOAT32 if matmul is not None and never_rounded else shared_format(readers, steps[last])
  return Softmax(tuple(members), (x, m), axes, formats[0], held or FLOAT32, matmul)


def _sums_along(step: Step, weights: Var, axes: tuple[int, ...]) -> bool:
  """Whether a matmul sums over just the axes along which its weights sum to one."""
  contracted, _ = step.eqn.params["dimension_numbers"]
  summed = contracted[0 if step.eqn.invars[0] is weights else 1]
  return step.parameter is None and sorted(map(int, summed)) == sorted(axes)


def _is_data(form: Form | None) -> bool:
  return form is not None and form.kind is Kind.DATA


def _was_narrow(var: Var, steps: Sequence[Step], makers: Mapping[Any, int]) -> bool:
  """Whether a float32 value was made of a 16-bit one of its size: scaled, masked, biased."""
  queue, seen = [var], {var}
  while queue:
    made = makers.get(queue.pop())
    if made is None:
      continue
    step = steps[made]
    if not (is_elementwise(step) or step.eqn.primitive.name in _REARRANGES):
      continue
    for atom, form in zip(step.eqn.invars, step.operands, strict=True):
      if (
        form is None
        or isinstance(atom, Literal)
        or atom in seen
        or jaxprs.size(atom) != jaxprs.size(var)
      ):
        continue
      if form.kind is Kind.NARROW:
        return True
      seen.add(atom)
      queue.append(atom)
  return False


def _matmul_behind(steps: Sequence[Step], readers: Readers, last: int) -> int | None:
  """The matmul that alone reads a softmax, as it is, if one does, in one format throughout."""
  (result,) = steps[last].eqn.outvars
  (index, read), *others = readers[result]
  step = steps[index]
  matmul = step.rule is Rule.LOWER and step.eqn.primitive.name == "dot_general"
  alone = not others and index >= 0 and read.via is None
  if not (matmul and alone) or None in (*step.operands, *step.outs):
    return None
  return None if jaxprs.is_sharded_explicitly(result.aval) else index


def _maker(steps: Sequence[Step], makers: Mapping[Any, int], index: int, name: str) -> int | None:
  """The step that made the first operand of a step, if it is of a primitive."""
  atom = steps[index].eqn.invars[0]
  made = None if isinstance(atom, Literal) else makers.get(atom)
  return made if made is not None and steps[made].eqn.primitive.name == name else None


def _sum_behind(steps: Sequence[Step], makers: Mapping[Any, int], last: int) -> list[int]:
  """The steps from a denominator back to the sum that it is, the sum last; none if it is not."""
  chain: list[int] = []
  atom = steps[last].eqn.invars[-1]
  while not isinstance(atom, Literal) and (made := makers.get(atom)) is not None:
    chain.append(made)
    name = steps[made].eqn.primitive.name
    if name == "reduce_sum":
      return chain
    if name not in _RESHAPES:
      return []
    atom = steps[made].eqn.invars[0]
  return []


def _keeps_axes(steps: Sequence[Step], chain: Sequence[int], axes: tuple[int, ...]) -> bool:
  """Whether a sum over some axes stands along them again, where it came from."""
  shape = _shape(steps[chain[-1]].eqn.invars[0])
  kept = [axis for axis in range(len(shape)) if axis not in axes]
  for index in reversed(chain[:-1]):
    eqn = steps[index].eqn
    place = [*range(len(shape))] if len(_shape(eqn.invars[0])) == len(shape) else kept
    if eqn.primitive.name == "broadcast_in_dim":
      if [*map(int, eqn.params["broadcast_dimensions"])] != place:
        return False
    elif _shape(eqn.outvars[0]) != _narrowed(shape, axes):
      return False
  return len(_shape(steps[chain[0]].eqn.outvars[0])) == len(shape)


def _shape(atom: Any) -> tuple[int, ...]:
  return atom.aval.shape


def _narrowed(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _is_one_number(
  atom: Any, axes: tuple[int, ...], steps: Sequence[Step], makers: Mapping[Any, int]
) -> bool:
  """Whether a value is the same all along some axes, so that a softmax does not depend on it."""
  shape = _shape(atom)
  if all(axis < len(shape) and shape[axis] == 1 for axis in axes):
    return True
  made = makers.get(atom)
  eqn: JaxprEqn | None = None if made is None else steps[made].eqn
  if eqn is None or eqn.primitive.name not in ("broadcast_in_dim", "stop_gradient"):
    return False
  if eqn.primitive.name == "stop_gradient":
    return _is_one_number(eqn.invars[0], axes, steps, makers)
  sizes = dict(zip(eqn.params["broadcast_dimensions"], _shape(eqn.invars[0]), strict=True))
  return all(sizes.get(axis, 1) == 1 for axis in axes)


def _is_inside(steps: Sequence[Step], readers: Readers, index: int, members: list[int]) -> bool:
  """Whether only members read what a step makes, in float32."""
  reads = readers.get(steps[index].eqn.outvars[0], ())
  return all(n in members and read.via is None and read.to in (None, FLOAT32) for n, read in reads)


def storing_weights(
  compute: Callable[..., list[Any]], softmax: Softmax
) -> Callable[..., list[Any]]:
  """A softmax whose derivative stores the weights, in 16 bits.

  They no longer sum to one. Divided by their sum they are the weights of scores that differ by
  what each was rounded, so that the derivative is as exact as they are, near one too.

  Args:
    compute: The softmax, from its two inputs to a list of its result in float32.
    softmax: What it computes.
  """

  @jax.custom_jvp
  def run(*inputs: Any) -> list[Any]:
    (weights,) = compute(*inputs)
    return [to_dtype(weights, softmax.held)]

  over_axes = functools.partial(jnp.sum, axis=softmax.axes, keepdims=True)

  def moved(kept: Any, tangent: Any) -> Any:
    weights, tangent = to_dtype(kept, FLOAT32), to_dtype(tangent, FLOAT32)
    total = jnp.maximum(over_axes(weights), jnp.finfo(FLOAT32).tiny)
    return to_dtype(weights * (tangent - over_axes(weights * tangent) / total), softmax.held)

  @run.defjvp
  def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    (weights,) = run(*primals)
    kept = _stored(to_dtype(weights, softmax.dtype))
    stores_kept = jax.checkpoint(moved, prevent_cse=False)
    return [to_dtype(kept, softmax.held)], [stores_kept(kept, tangents[0])]

  return run


def weighing(
  compute: Callable[..., list[Any]], softmax: Softmax, contraction: Contraction
) -> Callable[..., Any]:
  """A softmax and the matmul with its weights, whose derivative stores these, in 16 bits.

  What the softmax takes off the cotangent of its weights, their mean of it, is the product of the
  matmul's result and its cotangent (Dao et al. 2022, FlashAttention, appendix B): so nothing that
  is as large as the scores is read twice.

  Args:
    compute: The softmax, from its two inputs to a list of its result in float32.
    softmax: What it computes.
    contraction: The matmul, its weights the wide operand.

  Returns:
    A function of the softmax's two inputs and the matmul's other operand.
  """

  @jax.custom_jvp
  def run(scores: Any, highest: Any, other: Any) -> Any:
    (weights,) = compute(scores, highest)
    return contraction.run(weights, other)

  def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
    *inputs, other = primals
    (weights,) = compute(*inputs)
    kept = _stored(to_dtype(weights, softmax.dtype))
    result = contraction.run(kept, other)
    terms = []
    if not isinstance(tangents[0], SymbolicZero):
      terms.append(along_scores(kept, other, result, tangents[0]))
    if not isinstance(tangents[2], SymbolicZero):
      terms.append(contraction.run(kept, tangents[2]))
    return result, functools.reduce(operator.add, terms) if terms else jnp.zeros_like(result)

  run.defjvp(rule, symbolic_zeros=True)
  along_scores = functools.partial(_along_scores_p.bind, contraction=contraction, axes=softmax.axes)
  return run


_along_scores_p = Primitive("mpjax_along_scores")
"""What a tangent of the scores makes of the matmul's result, from its 16-bit weights on."""


@_along_scores_p.def_impl
def _along_scores(
  kept: Any, other: Any, result: Any, tangent: Any, *, contraction: Contraction, axes: Any
) -> Any:
  del result
  weights, tangent = to_dtype(kept, FLOAT32), to_dtype(tangent, FLOAT32)
  sums = functools.partial(jnp.sum, axis=axes, keepdims=True)
  mean = sums(weights * tangent) / jnp.maximum(sums(weights), jnp.finfo(FLOAT32).tiny)
  return contraction.run(weights * (tangent - mean), other)


@_along_scores_p.def_abstract_eval
def _abstract_eval(*avals: Any, **params: Any) -> Any:
  (aval,) = jax.make_jaxpr(functools.partial(_along_scores, **params))(*avals).out_avals
  return aval


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  """The term of the tangent, and those of the weights and of the matmul's other operand."""
  bind = functools.partial(_along_scores_p.bind, **params)
  *held, tangent = primals
  terms = [] if isinstance(tangents[3], ad.Zero) else [bind(*held, tangents[3])]
  if not all(isinstance(t, ad.Zero) for t in tangents[:2]):
    moved = [ad.instantiate_zeros(t) for t in tangents[:2]]
    plain = functools.partial(_along_scores, result=None, tangent=tangent, **params)
    terms.append(jax.jvp(plain, tuple(held[:2]), tuple(moved))[1])
  out = bind(*primals)
  return out, functools.reduce(operator.add, terms) if terms else jnp.zeros_like(out)


def _transpose(
  cotangent: Any, kept: Any, other: Any, result: Any, tangent: Any, **params: Any
) -> Any:
  if isinstance(cotangent, ad.Zero):
    return None, None, None, None
  contraction = params["contraction"]
  (shares,) = jax.linear_transpose(lambda x: contraction.run(x, other), kept)(cotangent)
  mean = contraction.rows(
    to_dtype(cotangent, FLOAT32) * to_dtype(result, FLOAT32), kept.ndim, other.ndim
  )
  found = to_dtype(kept, FLOAT32) * (to_dtype(shares, FLOAT32) - mean)
  return None, None, None, to_dtype(found, tangent.aval.dtype)


def _batch(args: Any, dims: Any, *, contraction: Contraction, axes: Any) -> Any:
  (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
  ahead = [batching.bdim_at_front(x, d, size) for x, d in zip(args, dims, strict=True)]
  shifted = tuple(axis + 1 for axis in axes)
  return _along_scores_p.bind(*ahead, contraction=contraction.batched(0, 1), axes=shifted), 0


ad.primitive_jvps[_along_scores_p] = _jvp
ad.primitive_transposes[_along_scores_p] = _transpose
batching.primitive_batchers[_along_scores_p] = _batch
mlir.register_lowering(_along_scores_p, mlir.lower_fun(_along_scores, multiple_results=False))


def _stored(weights: Any) -> Any:
  """What the backward pass is to read: on GPUs behind a barrier, so that XLA stores just this.

  It computes what is cheap again, and would do so from the float32 exponentials, or from the
  scores, which it then stores beside the weights.
  """
  barrier = lax.optimization_barrier
  return lax.platform_dependent(weights, cuda=barrier, rocm=barrier, default=lambda x: x)
