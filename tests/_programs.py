"""Random JAX programs as sentences of a small typed language.

Hypothesis draws `Gene`s, which say little: an operation, some numbers, the genes of a body. `write`
makes a `Program` of them, statement by statement: operands are picked among the values that the
operation takes, the latest first, and a statement that plain JAX refuses is left out. Every list of
genes is so a program, deleting a gene leaves one, and a failing program shrinks to a short one that
prints like Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

from _program_blocks import NESTED
from _program_ops import OPS
from _program_types import blend, takes

F32 = jnp.float32


class Gene(NamedTuple):
  """What Hypothesis draws for one statement."""

  op: str
  picks: tuple[int, ...]
  knob: int
  body: tuple[Gene, ...]


class Statement(NamedTuple):
  """``name = op(args)``, with a body of the parameters ``params`` if the operation has one."""

  name: str
  op: str
  args: tuple[str, ...]
  knob: int
  params: tuple[str, ...] = ()
  body: tuple[Statement, ...] = ()

  def lines(self, indent: str) -> Iterator[str]:
    yield f"{indent}{self.name} = {self.op}({', '.join(self.args)}, knob={self.knob})"
    if self.params:
      yield f"{indent}  lambda {', '.join(self.params)}:"
      for statement in self.body:
        yield from statement.lines(indent + "    ")


Read = Callable[[str, Any], Any]
Values = Mapping[str, Any]


def execute(statement: Statement, values: Values, read: Read) -> Any:
  """The value of a statement, where the values of earlier ones are known.

  Args:
    statement: What to compute.
    values: By name.
    read: Called with a place, which is a name, and a value that is read there; what it returns is
      used. A test sees and changes through it what every operation gets.
  """
  operands = [read(f"{statement.name}.{n}", values[a]) for n, a in enumerate(statement.args)]
  op = OPS[statement.op]
  if not op.nested:
    return op.fn(statement.knob, *operands)

  def body(*params: Any) -> Any:
    inner = {} if op.isolated else dict(values)
    inner.update(zip(statement.params, params, strict=True))
    for line in statement.body:
      inner[line.name] = execute(line, inner, read)
    last = statement.body[-1].name if statement.body else statement.params[0]
    return blend(params[0], inner[last])

  return op.fn(statement.knob, body, *operands)


def as_is(place: str, value: Any) -> Any:
  del place
  return value


class Program:
  """A function of parameters and data, each a dict of arrays by name."""

  def __init__(self, inputs: Mapping[str, Any], statements: Sequence[Statement]) -> None:
    self.inputs, self.statements = dict(inputs), tuple(statements)

  def __call__(self, params: Values, data: Values, read: Read = as_is) -> Any:
    values = {**params, **data}
    for statement in self.statements:
      values[statement.name] = execute(statement, values, read)
    names = [s.name for s in self.statements]
    rest = {"earlier": [values[name] for name in names[-3:-1]], "none": None}
    return (values[names[-1]] if names else values["x"]), rest

  def loss(self, params: Values, data: Values, read: Read = as_is) -> Any:
    """A number that depends on all float results."""
    leaves = jax.tree.leaves(self(params, data, read))
    inexact = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.mean(jnp.real(leaf)).astype(F32) for leaf in inexact), jnp.zeros((), F32))

  def split(self, is_param: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The abstract inputs: the parameters, and the data."""
    pairs = self.inputs.items()
    return {k: a for k, a in pairs if is_param(k)}, {k: a for k, a in pairs if not is_param(k)}

  def ops(self) -> set[str]:
    """The names of all operations, in bodies too."""
    return set(_ops(self.statements))

  def __repr__(self) -> str:
    inputs = ", ".join(f"{k}: {a.dtype.name}{list(a.shape)}" for k, a in self.inputs.items())
    lines = itertools.chain.from_iterable(s.lines("  ") for s in self.statements)
    return "\n".join([f"\ndef program({inputs}):", *lines, "  return the last three"])


def _ops(statements: Sequence[Statement]) -> Iterator[str]:
  for statement in statements:
    yield statement.op
    yield from _ops(statement.body)


# Writing -----------------------------------------------------------------------------------------


def write(genes: Sequence[Gene], inputs: Mapping[str, Any]) -> Program:
  """The program that genes mean, for inputs of the given shapes and dtypes."""
  names = map("v{}".format, itertools.count())
  return Program(inputs, _write(genes, dict(inputs), names))


def _write(genes: Sequence[Gene], avals: dict[str, Any], names: Iterator[str]) -> list[Statement]:
  statements = []
  for gene in genes:
    statement = _statement(gene, avals, names)
    aval = None if statement is None else _type_of(statement, avals)
    if aval is not None:
      avals[statement.name] = aval
      statements.append(statement)
  return statements


def _statement(gene: Gene, avals: dict[str, Any], names: Iterator[str]) -> Statement | None:
  op, args = OPS[gene.op], []
  for kind, pick in zip(op.kinds, gene.picks, strict=False):
    known = [avals[a] for a in args]
    candidates = [name for name, aval in reversed(avals.items()) if takes(kind, aval, known)]
    if not candidates:
      return None
    args.append(candidates[pick % len(candidates)])
  statement = Statement(next(names), gene.op, tuple(args), gene.knob)
  if not op.nested:
    return statement
  inside = op.params(*(avals[a] for a in args))
  params = tuple(next(names) for _ in inside)
  known = ({} if op.isolated else dict(avals)) | dict(zip(params, inside, strict=True))
  return statement._replace(params=params, body=tuple(_write(gene.body, known, names)))


REFUSALS = (TypeError, ValueError, NotImplementedError, ZeroDivisionError)
"""What plain JAX refuses a program with; the last is a transform's of a single number."""


def _type_of(statement: Statement, avals: Mapping[str, Any]) -> Any:
  """The type of a statement's value, None where plain JAX refuses the statement."""
  try:
    aval = jax.eval_shape(lambda values: execute(statement, values, as_is), dict(avals))
  except (*REFUSALS, RuntimeWarning):
    return None  # the warning is NumPy's, of a constant that float16 does not hold
  return aval if sum(aval.shape) <= 64 and len(aval.shape) <= 4 else None


# Drawing -----------------------------------------------------------------------------------------

INPUTS: dict[str, Any] = {
  "w": jax.ShapeDtypeStruct((4, 4), F32),
  "v": jax.ShapeDtypeStruct((4,), F32),
  "x": jax.ShapeDtypeStruct((3, 4), F32),
}
"""What every program has: two parameters and data."""

EXTRAS: dict[str, Any] = {
  "i": jax.ShapeDtypeStruct((3,), jnp.int32),
  "m": jax.ShapeDtypeStruct((3, 4), jnp.bool_),
  "k": jax.eval_shape(lambda: jax.random.key(0)),
  "z": jax.ShapeDtypeStruct((3, 4), jnp.complex64),
  "h": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16),
  "f": jax.ShapeDtypeStruct((4, 4), jnp.float16),
  "n": jax.ShapeDtypeStruct((), jnp.int32),
}
WIDER: dict[str, Any] = {
  "d": jax.ShapeDtypeStruct((3, 4), jnp.float64),
  "l": jax.ShapeDtypeStruct((3,), jnp.int64),
  "y": jax.ShapeDtypeStruct((4, 4), jnp.complex128),
}
"""Data that a program may have, and what needs 64 bits."""

PARAMS = frozenset({"w", "v"})


def genes(ops: Sequence[str], depth: int) -> st.SearchStrategy[Gene]:
  """One gene with bodies that are nested no deeper than ``depth``."""
  flat = [op for op in ops if op not in NESTED]
  picks = st.tuples(*[st.integers(0, 5)] * 3)
  leaf = st.builds(Gene, st.sampled_from(flat), picks, st.integers(0, 7), st.just(()))
  nested = [op for op in ops if op in NESTED]
  if not depth or not nested:
    return leaf
  bodies = st.lists(genes(ops, depth - 1), max_size=3).map(tuple)
  block = st.builds(Gene, st.sampled_from(nested), picks, st.integers(0, 7), bodies)
  return st.one_of(leaf, leaf, block)


def programs(
  ops: Sequence[str] | None = None,
  extras: Mapping[str, Any] = EXTRAS,
  *,
  depth: int = 2,
  size: int = 6,
) -> st.SearchStrategy[Program]:
  """Programs of the given operations, all by default, with some of the given inputs."""
  keys = st.lists(st.sampled_from(sorted(extras)), max_size=2, unique=True)
  chosen = keys if extras else st.just([])
  inputs = chosen.map(lambda keys: INPUTS | {k: extras[k] for k in keys})
  known = list(ops or OPS)
  return st.builds(write, st.lists(genes(known, depth), min_size=1, max_size=size), inputs)
