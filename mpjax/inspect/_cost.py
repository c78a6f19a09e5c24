"""Memory and cost of a compiled step under several policies, as the compiler states them."""

from __future__ import annotations

import functools
import inspect
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export

from mpjax._core.policy import Policy
from mpjax._core.policy_map import PolicyLike, PolicyMap, as_policy_map
from mpjax._engine.autocast import which
from mpjax._flax.dispatch import autocast
from mpjax._flax.nnx_calls import is_node
from mpjax.inspect._compiled_text import Card, estimated_cycles, float8_calls, moved, roofline
from mpjax.inspect._cost_report import CostReport, CostRow
from mpjax.inspect._float8 import float8_work
from mpjax.inspect._policies_inside import where_traced
from mpjax.inspect._target_compiler import read_figures
from mpjax.inspect._targets import Target, card_here, check_installed, compile_for, read_target

_POLICIES = ("float32", "mixed_bfloat16")


def cost(
  step: Callable[..., Any],
  *args: Any,
  policies: Sequence[PolicyLike] | Mapping[str, PolicyLike] = _POLICIES,
  target: str | None = None,
  argnums: int | Sequence[int] = 0,
  donate_argnums: int | Sequence[int] = (),
  python: str | None = None,
) -> CostReport:
  """What a compiled step needs under several policies. Nothing is run, no array is made.

  Without a target the step is compiled for the present backend. With one it is compiled by the
  real compiler of a TPU or GPU that need not be there: lowered here, compiled in a process of its
  own. That needs ``pip install "jax[tpu]" flatbuffers`` or ``"jax[cuda12]" flatbuffers`` (5 GB),
  here or in the environment whose interpreter is ``python``.

  A CPU computes 16 bits in float32 and so needs more memory under such a policy, not less: its
  figures say nothing about a GPU or TPU.

  Args:
    step: The function. If it has a parameter ``policy``, it is called with each policy and applies
      it by itself, to the loss inside a train step, say; if not, it runs under `mpjax.autocast`.
    *args: Its arguments: arrays, ``jax.ShapeDtypeStruct``, pytrees of them, NNX models.
    policies: Policies, by the name to report them under if it is a mapping.
    target: One of ``"gpu:a100"``, ``"gpu:h100"``, ``"gpu:v100"``, ``"tpu:v4"``, ``"tpu:v5e"``,
      ``"tpu:v5p"``, ``"tpu:v6e"``.
    argnums: Which arguments hold the parameters, for a step without ``policy``.
    donate_argnums: Which arguments the step may overwrite, by position, as for ``jax.jit``.
    python: The interpreter that compiles for the target; the present one by default.

  Returns:
    The report.

  Raises:
    ValueError: If the target or a policy is not known, or there is no argument to donate.
    ModuleNotFoundError: If the target's compiler is not installed.
    RuntimeError: If the compiler fails for a reason other than the device's memory.

  Example:
    >>> import jax.numpy as jnp, mpjax
    >>> w = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> report = mpjax.inspect.cost(lambda w, x: jnp.sum(x @ w), w, jnp.ones((2, 8)))
    >>> [row.policy for row in report.rows], report.rows[0].argument_bytes
    (['float32', 'mixed_bfloat16'], 320)
  """
  named = _named(policies)
  described = None if target is None else read_target(target)
  if described is not None:
    check_installed(described, python)
  donated = {donate_argnums} if isinstance(donate_argnums, int) else set(donate_argnums)
  _check_donated(donated, len(args))
  programs = [_Program(_under(step, policy, argnums), args, donated) for policy in named.values()]
  if described is None:
    figures = [program.compile_here() for program in programs]
    is_gpu, card = jax.default_backend() == "gpu", card_here(jax.devices()[0].device_kind)
  else:
    exported = [program.export_for(described) for program in programs]
    figures = compile_for(described, exported, programs[0].donated, python)
    is_gpu, card = described.card is not None, described.card
  for policy, program, found in zip(named.values(), programs, figures, strict=True):
    found |= read_text(found.pop("text", None) or "", is_gpu, card)
    if as_policy_map(policy).multiplies_in_float8():
      found["float8"] = float8_work(program.traced())
  return CostReport(
    target=target or jax.devices()[0].device_kind,
    memory_bytes=described.memory if described else _memory_here(),
    rows=tuple(_row(name, f) for name, f in zip(named, figures, strict=True)),
    **_held(programs[0], args, argnums),
    inside=None if _takes_policy(step) else where_traced(_Program(step, args, donated).traced()),
  )


def _named(policies: Sequence[PolicyLike] | Mapping[str, PolicyLike]) -> dict[str, PolicyLike]:
  if isinstance(policies, Mapping):
    named = dict(policies)
  else:
    several = [policies] if isinstance(policies, str | Policy | PolicyMap) else list(policies)
    named = {_name(policy): policy for policy in several}
  if not named:
    raise ValueError("There must be at least one policy. Got none. Name for example 'float32'.")
  return named


def _name(policy: PolicyLike) -> str:
  return repr(policy) if isinstance(policy, PolicyMap) else str(policy)


def _under(
  step: Callable[..., Any], policy: PolicyLike, argnums: int | Sequence[int]
) -> Callable[..., Any]:
  """The step under a policy: its own way if it takes one."""
  if not _takes_policy(step):
    return autocast(step, policy, argnums=argnums)
  return lambda *args: step(*args, policy=policy)


def _takes_policy(step: Callable[..., Any]) -> bool:
  try:
    return "policy" in inspect.signature(step).parameters
  except (TypeError, ValueError):  # some callables have no signature
    return False


def _check_donated(donated: set[int], count: int) -> None:
  outside = sorted(n for n in donated if not -count <= n < count)
  if outside:
    raise ValueError(
      f"donate_argnums must be positions of the step's {count} arguments. Got {outside[0]}. Count "
      "them from 0, the step itself left out."
    )


class _Program:
  """A step as a function from arrays to arrays, its other arguments held."""

  def __init__(self, step: Callable[..., Any], args: Sequence[Any], donated: set[int]) -> None:
    self.step = step
    split = [_split(arg) for arg in args]
    self.merges = [merge for _, merge in split]
    self.in_place = [is_node(arg) for arg in args]
    self.out: Any = None  # known once the program is traced
    leaves, self.trees = [], []
    for tree, _ in split:
      flat, structure = jax.tree.flatten(tree)
      leaves.append(flat)
      self.trees.append(structure)
    self.leaves = [leaf for flat in leaves for leaf in flat]
    self.shapes = [_shape(leaf) for leaf in self.leaves if _is_array(leaf)]
    owners = [n for n, flat in enumerate(leaves) for leaf in flat if _is_array(leaf)]
    inside = {n % len(args) for n in donated}
    self.donated = [place for place, n in enumerate(owners) if n in inside]

  def __call__(self, *arrays: Any) -> list[Any]:
    rest = iter(arrays)
    leaves = iter([next(rest) if _is_array(leaf) else leaf for leaf in self.leaves])
    states = [jax.tree.unflatten(t, itertools.islice(leaves, t.num_leaves)) for t in self.trees]
    args = [merge(state) for merge, state in zip(self.merges, states, strict=True)]
    out = self.step(*args)
    self.out = jax.tree.map(lambda x: _shape(x) if _is_array(x) else x, out)
    kept = [nnx.state(arg) for arg in args if is_node(arg)]
    return [x for x in jax.tree.leaves((kept, out)) if _is_array(x)]

  @functools.cached_property
  def jitted(self) -> Any:
    """The program under ``jax.jit``, which keeps its trace."""
    return jax.jit(self.__call__, donate_argnums=tuple(self.donated))

  def traced(self) -> Any:
    """The program as a jaxpr."""
    return self.jitted.trace(*self.shapes).jaxpr

  def compile_here(self) -> dict[str, Any]:
    """The figures of the present backend's compiler."""
    lowered = self.jitted.lower(*self.shapes)
    began = time.perf_counter()
    figures = read_figures(lowered.compile(), lambda: lowered)
    return {**figures, "compile_seconds": time.perf_counter() - began}

  def export_for(self, target: Target) -> bytes:
    """The program lowered for a target, as bytes."""
    exported = export.export(self.jitted, platforms=[target.platform])(*self.shapes)
    return bytes(exported.serialize())


def _split(arg: Any) -> tuple[Any, Callable[[Any], Any]]:
  """An argument as a pytree of arrays, and how to get the argument back."""
  if not is_node(arg):
    return arg, lambda tree: tree
  graphdef, state = nnx.split(arg)
  return state, lambda tree: nnx.merge(graphdef, tree)


def _is_array(x: Any) -> bool:
  return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _held(program: _Program, args: Sequence[Any], argnums: int | Sequence[int]) -> dict[str, Any]:
  """How many parameters there are, and the bytes of each that a step takes and hands back."""
  places = {n for n, is_held in enumerate(which(argnums, len(args))) if is_held}
  count = sum(leaf.size for n in places for leaf in _floats(_parameters(args[n])))
  if not count:
    return {}
  carried = places | {n for n in range(len(args)) if program.in_place[n] or _carries(program, n)}
  size = sum(
    np.prod(leaf.shape, dtype=np.int64) * leaf.dtype.itemsize
    for n in carried
    for leaf in jax.tree.leaves(_split(args[n])[0])
    if _is_array(leaf)
  )
  return {"parameters": int(count), "bytes_per_parameter": float(size) / int(count)}


def _carries(program: _Program, n: int) -> bool:
  """Whether a step hands back a container like the one that it was given as this argument."""
  structure = program.trees[n]
  if jax.tree_util.treedef_is_leaf(structure):
    return False
  is_like = lambda node: jax.tree.structure(node) == structure  # noqa: E731
  return any(map(is_like, jax.tree.leaves(program.out, is_leaf=is_like)))


def _parameters(arg: Any) -> Any:
  """The parameters in an argument: a train state, a model, a model's variables, or themselves."""
  if is_node(arg):
    return nnx.state(arg, nnx.Param)
  if isinstance(arg, Mapping):
    return arg.get("params", arg)
  return getattr(arg, "params", arg)


def _floats(tree: Any) -> list[Any]:
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if _is_array(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)]


def _memory_here() -> int | None:
  stats = jax.local_devices()[0].memory_stats()  # those of other processes tell none
  return stats.get("bytes_limit") if stats else None


_STATED = [name for name in CostRow._fields[1:] if name not in CostRow._field_defaults]


def read_text(text: str, is_gpu: bool, card: Card | None) -> dict[str, Any]:
  """What the text of a compiled program tells beyond its compiler's figures.

  Of a GPU whose data sheet is not known there is no time.
  """
  if not text or not is_gpu:
    return {"estimated_cycles": estimated_cycles(text)}
  found = {"bytes_moved": moved(text), "float8_calls": float8_calls(text)}
  if card is None:
    return found
  time = roofline(text, card)
  return {**found, "estimated_seconds": time.seconds, "unknown_kernels": time.unknown}


def _row(name: str, figures: Mapping[str, Any]) -> CostRow:
  return CostRow(name, **{**dict.fromkeys(_STATED), **figures})
