"""The dtype in which gradients are summed over devices.

Under automatic partitioning a compiler puts the sum over devices where the partial sums are: at
the matmul that computes a weight's gradient. If that matmul returns 16 bits, as the derivative of
a 16-bit matmul does, then 16 bits are summed, however soon they are converted to float32. `widen`
rewrites such matmuls to return the float32 that they accumulate in. Under ``jax.shard_map`` the
sum is the user's own, and `reduce_gradients` takes it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32, parse_dtype
from mpjax._engine import jaxprs, versions
from mpjax._engine.float32_products import fixed_p
from mpjax._engine.jaxprs import JaxprEqn, Literal, Var, is_float32, with_dtype

AxisName = str | Sequence[str]


def reduce_gradients(grads: Any, axis_name: AxisName, dtype: Any = FLOAT32) -> Any:
  """Averages gradients over the devices of a mapped axis, in a dtype of your choice.

  For a train step of your own under ``jax.shard_map`` or ``jax.pmap``, between
  `mpjax.value_and_grad` and the optimizer. What each device adds is divided by the number of
  devices first, so the mean overflows no sooner than its terms. Each device must hold gradients
  of its own part of the batch alone: under ``shard_map`` with ``check_vma=True`` pass the
  parameters through ``jax.lax.pcast(params, axis_name, to="varying")`` before they are
  differentiated, or JAX sums their gradients itself, in the dtype of each use.

  Args:
    grads: A tree of gradients, scaled or not.
    axis_name: The axis or axes.
    dtype: In which dtype to send and sum: float32, or a 16-bit one to halve the traffic.

  Returns:
    The mean in float32 (float64 and complex leaves are summed as they are, integers pass), the
    same on every device.

  Raises:
    ValueError: If ``dtype`` is none of float32, bfloat16 and float16.

  Example:
    >>> mean = lambda g: reduce_gradients({"w": g}, "data", "bfloat16")
    >>> jax.vmap(mean, axis_name="data", out_axes=None)(jnp.array([1.0, 2.0]))
    {'w': Array(1.5, dtype=float32)}
  """
  sent = parse_dtype(dtype)
  axes = axis_name if isinstance(axis_name, str) else tuple(axis_name)
  count = lax.psum(1, axes)

  def mean(leaf: Any) -> Any:
    if leaf is None or not jnp.issubdtype(leaf.dtype, jnp.inexact):
      return leaf
    if leaf.dtype.itemsize > FLOAT32.itemsize:
      return lax.psum(leaf / jnp.asarray(count, leaf.dtype), axes)
    share = leaf.astype(FLOAT32) / jnp.asarray(count, FLOAT32)
    return lax.psum(share.astype(sent), axes).astype(FLOAT32)

  return jax.tree.map(mean, grads)


def read_reduce_dtype(value: Any) -> bool:
  """Whether the argument ``reduce_dtype`` asks for float32; ``"compute"`` does not.

  Raises:
    ValueError: If it is neither.
  """
  if isinstance(value, str) and value.strip().lower() == "compute":
    return False
  try:
    known = parse_dtype(value) == FLOAT32
  except (TypeError, ValueError):
    known = False
  if known:
    return True
  raise ValueError(
    "reduce_dtype must be 'float32', or 'compute' for the dtype that the policy's matmuls return. "
    f"Got {value!r}. Write one of the two; for another dtype take the sum yourself, with "
    "mpjax.reduce_gradients under jax.shard_map."
  )


def widen(fn: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
  """Makes the matmuls whose results only add up to gradients return float32.

  A matmul or convolution is rewritten if its 16-bit result does nothing but move and be converted
  to float32 on its way to a gradient. Its operands stay 16-bit, so it is as fast, and its result
  is what it was before it was rounded. Convolutions on GPUs and every other operation are left as
  they are.

  Args:
    fn: A function of pytrees of arrays that returns a pair, its second entry the gradients.

  Returns:
    A function of the same arguments and results.
  """

  def widened(*args: Any) -> tuple[Any, Any]:
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    tree = jax.tree.structure(shapes)
    first, grads = tree.children()
    flags = [False] * first.num_leaves + [True] * grads.num_leaves
    inner = _rewrite(versions.open_jaxpr(closed), flags)
    consts = versions.constants(closed)
    out = jax.core.eval_jaxpr(inner, consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(tree, out)

  return widened


# Which results only add up to gradients -----------------------------------------------------------

_CONTRACTIONS = frozenset({"dot_general", "ragged_dot", "ragged_dot_general"})
_CONVOLUTION = "conv_general_dilated"

_MOVES = frozenset(
  {"copy", "copy_p", "expand_dims", "reshape", "rev", "squeeze", "transpose"}
  | {"psum", "psum_invariant", "sharding_constraint", "pvary"}
)
"""Operations of one operand that are the same for every dtype, and linear."""

_SUMS = _MOVES | {"add", "add_any", "concatenate", "pad", "reduce_sum", "convert_element_type"}
"""What may happen to a float32 gradient on its way out of the function."""

_NARROW = (BFLOAT16, FLOAT16)


def _rewrite(jaxpr: Any, flags: Sequence[bool]) -> Any:
  """A jaxpr whose matmuls are widened where they only add up to the flagged results."""
  sums = _sums(jaxpr, flags)
  wide: dict[Any, Var] = {}
  eqns = []
  for eqn in jaxpr.eqns:
    invars = [a if isinstance(a, Literal) else wide.get(a, a) for a in eqn.invars]
    new = eqn.replace(invars=invars, params=_with_bodies(eqn, sums))
    starts = _starts(eqn, sums)
    if starts or eqn.primitive.name in _MOVES:  # as many results as operands, or one of two
      moved = zip(eqn.invars, eqn.outvars, strict=False)
      found = [out for a, out in moved if starts or (not isinstance(a, Literal) and a in wide)]
      wide |= {out: Var(with_dtype(out.aval, FLOAT32)) for out in found}
      new = new.replace(outvars=[wide.get(out, out) for out in eqn.outvars])
    eqns += _started(new) if starts else [new]
  return jaxpr.replace(eqns=eqns)


def _starts(eqn: JaxprEqn, sums: set[Any]) -> bool:
  """Whether an equation computes 16 bits that it can compute in float32 instead."""
  kinds = _CONTRACTIONS | {_CONVOLUTION, "reduce_sum"}
  return eqn.primitive.name in kinds and eqn.outvars[0] in sums and _is_narrow(eqn.outvars[0])


def _started(eqn: JaxprEqn) -> list[JaxprEqn]:
  """The equations of a matmul, convolution or sum that returns float32."""
  if eqn.primitive.name == _CONVOLUTION:
    return _started_convolution(eqn)
  if eqn.primitive is not primitives.reduce_sum_p:
    return _started_matmul(eqn)
  (operand,) = eqn.invars
  wide = Var(with_dtype(operand.aval, FLOAT32))
  return [_converted(eqn, operand, wide), eqn.replace(invars=[wide])]


def _started_matmul(eqn: JaxprEqn) -> list[JaxprEqn]:
  """The equations of a matmul that returns float32, which no transposition folds into on a CPU."""
  (result,) = eqn.outvars
  factors, product = [Var(atom.aval) for atom in eqn.invars[:2]], Var(result.aval)
  params = eqn.params | _RETURNS_FLOAT32
  return [
    *map(functools.partial(_fixed, eqn), eqn.invars, factors),
    eqn.replace(invars=[*factors, *eqn.invars[2:]], outvars=[product], params=params),
    _fixed(eqn, product, result),
  ]


def _fixed(eqn: JaxprEqn, operand: Any, result: Any) -> JaxprEqn:
  """An equation beside another, that keeps the order of an array's dimensions."""
  return eqn.replace(primitive=fixed_p, invars=[operand], outvars=[result], params={})


def _converted(eqn: JaxprEqn, operand: Any, wide: Any) -> JaxprEqn:
  """An equation beside another that converts to float32."""
  params = {"new_dtype": FLOAT32, "weak_type": False, "sharding": None}
  convert = primitives.convert_element_type_p
  return eqn.replace(primitive=convert, invars=[operand], outvars=[wide], params=params)


_RETURNS_FLOAT32 = {"preferred_element_type": FLOAT32}


def _started_convolution(eqn: JaxprEqn) -> list[JaxprEqn]:
  """The equations of a convolution that returns float32.

  Not on GPUs: there XLA would run the whole of it in float32, since cuDNN returns what it takes.
  """

  def wide(*operands: Any) -> Any:
    return eqn.primitive.bind(*operands, **eqn.params | _RETURNS_FLOAT32)

  def narrow(*operands: Any) -> Any:
    return eqn.primitive.bind(*operands, **eqn.params).astype(FLOAT32)

  def chosen(*operands: Any) -> Any:
    return lax.platform_dependent(*operands, cuda=narrow, rocm=narrow, default=wide)

  with jaxprs.located(eqn):
    traced = versions.open_jaxpr(jaxprs.trace(chosen, [atom.aval for atom in eqn.invars]))
  (result,) = eqn.outvars
  if traced.outvars[0].aval != result.aval:  # a shard_map's types are not known out of it
    operand: Any = eqn.invars[0]
    dtype = eqn.params["preferred_element_type"] or operand.aval.dtype
    rounded = Var(with_dtype(result.aval, dtype))
    return [eqn.replace(outvars=[rounded]), _converted(eqn, rounded, result)]
  renamed: dict[Any, Any] = dict(zip(traced.invars, eqn.invars, strict=True))
  renamed |= dict(zip(traced.outvars, eqn.outvars, strict=True))

  def rename(atom: Any) -> Any:
    return atom if isinstance(atom, Literal) else renamed.get(atom, atom)

  return [
    inner.replace(invars=[*map(rename, inner.invars)], outvars=[*map(rename, inner.outvars)])
    for inner in traced.eqns
  ]


def _variables(eqn: JaxprEqn) -> list[Any]:
  return [a for a in eqn.invars if not isinstance(a, Literal)]


def _sums(jaxpr: Any, flags: Sequence[bool]) -> set[Any]:
  """The variables that do nothing but add up to the flagged results of a jaxpr.

  A 16-bit one must besides be converted to float32 before anything is added to it.
  """
  outs = zip(jaxpr.outvars, flags, strict=True)
  barred = {a for a, flag in outs if not isinstance(a, Literal) and (not flag or _is_narrow(a))}
  used = set(_results(jaxpr))
  for eqn in reversed(jaxpr.eqns):
    reads = _variables(eqn)
    used.update(reads)
    if not _adds_up(eqn, barred):
      barred.update(reads)
  return used - barred


def _adds_up(eqn: JaxprEqn, barred: set[Any]) -> bool:
  """Whether all that an equation does with its operands is to add them up to gradients."""
  name = eqn.primitive.name
  if name not in _SUMS or any(out in barred for out in eqn.outvars):
    return False
  if name == "convert_element_type":
    return is_float32(eqn.outvars[0])
  return name in _MOVES or not any(map(_is_narrow, eqn.outvars))


def _is_narrow(atom: Any) -> bool:
  return getattr(atom.aval, "dtype", None) in _NARROW


# Bodies of scan, cond, jit, remat and shard_map ---------------------------------------------------


def _with_bodies(eqn: JaxprEqn, sums: set[Any]) -> dict[str, Any]:
  """The parameters of an equation with the jaxprs that compute its results rewritten."""
  flags = [out in sums for out in eqn.outvars]
  if not any(flags) or eqn.primitive.name not in _BODIES:
    return eqn.params
  key = _BODIES[eqn.primitive.name]
  bodies = eqn.params[key]
  if eqn.primitive.name == "scan":
    flags = _scan_flags(eqn, flags)
  if isinstance(bodies, tuple):
    return eqn.params | {key: tuple(_rewrite_body(body, flags) for body in bodies)}
  return eqn.params | {key: _rewrite_body(bodies, flags)}


_BODIES = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "remat2": "jaxpr",
  "checkpoint": "jaxpr",
  "closed_call": "call_jaxpr",
  "shard_map": "jaxpr",
  "scan": "jaxpr",
  "cond": "branches",
}


def _rewrite_body(body: Any, flags: Sequence[bool]) -> Any:
  inner = _rewrite(versions.open_jaxpr(body), flags)
  return body.replace(jaxpr=inner) if hasattr(body, "jaxpr") else inner


def _scan_flags(eqn: JaxprEqn, flags: Sequence[bool]) -> list[bool]:
  """The results of a scan's body that only add up: a carry must besides only add up in the body."""
  consts, carry = versions.scan_shape(eqn)
  body = versions.open_jaxpr(eqn.params["jaxpr"])
  entering = body.invars[consts : consts + carry]
  read = {a for inner in body.eqns for a in _variables(inner)} | set(_results(body))
  now = list(flags)
  while True:
    sums = _sums(body, now)
    kept = [a in sums or a not in read for a in entering] + [True] * (len(now) - carry)
    before, now = now, [a and b for a, b in zip(now, kept, strict=True)]
    if before == now:
      return now


def _results(jaxpr: Any) -> list[Any]:
  return [a for a in jaxpr.outvars if not isinstance(a, Literal)]
