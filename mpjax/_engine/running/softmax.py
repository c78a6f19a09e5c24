"""Softmaxes of a plan whose backward pass needs their 16-bit result alone.

The derivative of a softmax is a function of its weights (as in `jax.nn.softmax`, or FlashAttention,
Dao et al. 2022). Weights that are only ever read in 16 bits, as by the matmul with an attention's
values, are stored so for that matmul; the float32 exponentials and sums need not be stored at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._core.dtypes import FLOAT32
from mpjax._core.primitives import Rule, Trait, having
from mpjax._engine.planning.plan import Readers, Step, is_elementwise, shared_format
from mpjax._engine.program import jaxprs
from mpjax._engine.program.kinds import Kind, is_data
from mpjax._engine.program.versions import Atom, JaxprEqn, Literal, Var
from mpjax._engine.running.environment import to_dtype

_RESHAPES = frozenset({"broadcast_in_dim", "reshape"})
_MASKS = having(Trait.JIT) | {"select_n"}
_REARRANGES = frozenset({"transpose", "reshape", "squeeze", "expand_dims"})


class Softmax(NamedTuple):
  """Steps of a plan, by index, that make ``exp(x - m) / sum(exp(x - m), axes)``.

  Attributes:
    steps: The indices in order, the division last.
    inputs: x, and m, which is one number along the axes.
    axes: The axes of the sum.
    dtype: The 16-bit format in which the result is read.
    held: The dtype in which it leaves: float32 where its cotangent is to come in that, be it that
      those of several readers add up, or that a matmul hands out one that did not round.
    matmul: The index of that matmul, which alone reads a softmax of scores that never rounded, or
      None.
    is_masked: Whether a mask reads it, whose result is what a matmul stores.
    is_multiplied: Whether numbers multiply it, in float32, before it rounds.
  """

  steps: tuple[int, ...]
  inputs: tuple[Var, Var]
  axes: tuple[int, ...]
  dtype: np.dtype
  held: np.dtype
  matmul: int | None
  is_masked: bool
  is_multiplied: bool

  @property
  def due(self) -> int:
    """The index of the step for which it is run."""
    return self.steps[-1] if self.matmul is None else self.matmul

  def alone(self) -> Softmax:
    """The same without its matmul, that is run with another softmax."""
    return self._replace(matmul=None, held=self.dtype)


def match(
  steps: Sequence[Step], readers: Readers, makers: Mapping[Var, int], last: int
) -> Softmax | None:
  """The softmax that ends with a division, if one does whose result is read in 16 bits."""
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
  formats, multiples = _formats(steps, readers, result)
  fits = (
    total.invars[0] is steps[exp].eqn.outvars[0]
    and _keeps_axes(steps, chain, axes)
    and jaxprs.shape(x) == jaxprs.shape(result)
    and _is_one_number(m, axes, steps, makers)
    and len(formats) == 1
    and FLOAT32 not in formats
    and all(_is_inside(steps, readers, n, members) for n in members[:-1])
    and all(is_data(steps[n].outs[0]) for n in members)
  )
  if not fits:
    return None
  matmul = _matmul_behind(steps, readers, last) if is_data(steps[shifted].operands[0]) else None
  if matmul is not None and _was_narrow(x, steps, makers):
    matmul = None
  held = None if matmul is not None else shared_format(readers, steps[last])
  if multiples and len(readers[result]) == 1 and not is_data(steps[shifted].operands[0]):
    held = formats[0]  # its cotangent is stored as exactly as the scores are
  reading = [steps[n].eqn.primitive.name for n, _ in readers[result] if n >= 0]
  return Softmax(
    tuple(members),
    (x, m),
    axes,
    formats[0],
    held or FLOAT32,
    matmul,
    is_masked=bool(multiples) or not _MASKS.isdisjoint(reading),
    is_multiplied=bool(multiples),
  )


def _formats(steps: Sequence[Step], readers: Readers, var: Var) -> tuple[list[np.dtype], list[int]]:
  """The dtypes in which a value is read, or its multiples: and the steps that make these.

  As a dropout does between a softmax and a matmul: ``w * mask / 0.9``.
  """
  formats, multiples, waiting = set[np.dtype](), list[int](), [var]
  while waiting:
    for n, read in readers[waiting.pop()]:
      if n >= 0 and _is_multiple(steps[n]) and read.to in (None, FLOAT32) and read.via is None:
        multiples.append(n)
        waiting += steps[n].eqn.outvars
      else:
        formats.add(read.via or read.to or FLOAT32)
  return [*formats], multiples


def _is_multiple(step: Step) -> bool:
  """Whether a step multiplies a float32 value by numbers, or divides it by them."""
  name = step.eqn.primitive.name
  kinds = [form and form.kind for form in step.operands]
  is_product = name == "mul" and {*kinds} == {Kind.DATA, Kind.CONSTANT}
  return is_product or (name == "div" and kinds == [Kind.DATA, Kind.CONSTANT])


def _was_narrow(var: Var, steps: Sequence[Step], makers: Mapping[Var, int]) -> bool:
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


def _maker(steps: Sequence[Step], makers: Mapping[Var, int], index: int, name: str) -> int | None:
  """The step that made the first operand of a step, if it is of a primitive."""
  atom = steps[index].eqn.invars[0]
  made = None if isinstance(atom, Literal) else makers.get(atom)
  return made if made is not None and steps[made].eqn.primitive.name == name else None


def _sum_behind(steps: Sequence[Step], makers: Mapping[Var, int], last: int) -> list[int]:
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
  shape = jaxprs.shape(steps[chain[-1]].eqn.invars[0])
  kept = [axis for axis in range(len(shape)) if axis not in axes]
  for index in reversed(chain[:-1]):
    eqn = steps[index].eqn
    place = [*range(len(shape))] if len(jaxprs.shape(eqn.invars[0])) == len(shape) else kept
    if eqn.primitive.name == "broadcast_in_dim":
      if [*map(int, eqn.params["broadcast_dimensions"])] != place:
        return False
    elif jaxprs.shape(eqn.outvars[0]) != _narrowed(shape, axes):
      return False
  return len(jaxprs.shape(steps[chain[0]].eqn.outvars[0])) == len(shape)


def _narrowed(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _is_one_number(
  atom: Atom, axes: tuple[int, ...], steps: Sequence[Step], makers: Mapping[Var, int]
) -> bool:
  """Whether a value is the same all along some axes, so that a softmax does not depend on it."""
  shape = jaxprs.shape(atom)
  if all(axis < len(shape) and shape[axis] == 1 for axis in axes):
    return True
  made = None if isinstance(atom, Literal) else makers.get(atom)
  eqn: JaxprEqn | None = None if made is None else steps[made].eqn
  if eqn is None or eqn.primitive.name not in ("broadcast_in_dim", "stop_gradient"):
    return False
  if eqn.primitive.name == "stop_gradient":
    return _is_one_number(eqn.invars[0], axes, steps, makers)
  sizes = dict(zip(eqn.params["broadcast_dimensions"], jaxprs.shape(eqn.invars[0]), strict=True))
  return all(sizes.get(axis, 1) == 1 for axis in axes)


def _is_inside(steps: Sequence[Step], readers: Readers, index: int, members: list[int]) -> bool:
  """Whether only members read what a step makes, in float32."""
  reads = readers[steps[index].eqn.outvars[0]]
  return all(n in members and read.via is None and read.to in (None, FLOAT32) for n, read in reads)


def storing_weights(
  compute: Callable[..., list[jax.Array]], softmax: Softmax
) -> Callable[..., list[jax.Array]]:
  """A softmax whose derivative stores the weights, in 16 bits.

  They no longer sum to one. Divided by their sum they are the weights of scores that differ by
  what each was rounded, so that the derivative is as exact as they are, near one too.

  On GPUs a barrier makes XLA store just these: it computes what is cheap again, and would do so
  from the float32 exponentials, or from the scores, which it then stores beside the weights. Not
  where a mask reads them, for then it is that whose result the matmul stores.

  Args:
    compute: The softmax, from its two inputs to a list of its result in float32.
    softmax: What it computes.
  """

  @jax.custom_jvp
  def run(*inputs: Any) -> list[jax.Array]:
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
    kept = to_dtype(weights, softmax.dtype)
    if not softmax.is_masked:
      kept = lax.platform_dependent(
        kept, cuda=lax.optimization_barrier, rocm=lax.optimization_barrier, default=lambda x: x
      )
    stores_kept = jax.checkpoint(moved, prevent_cse=False)
    return [to_dtype(kept, softmax.held)], [stores_kept(kept, tangents[0])]

  def widened(*inputs: Any) -> list[jax.Array]:
    (weights,) = run(*inputs)
    return [to_dtype(weights, FLOAT32)]

  return widened if softmax.is_multiplied else run
