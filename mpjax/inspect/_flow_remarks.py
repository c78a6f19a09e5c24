"""What an explanation says beside dtypes: what a policy overrides, or what it cannot promise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from mpjax._core.dtypes import BFLOAT16, FLOAT16, FLOAT32, describe
from mpjax._core.primitives import MATMULS, Rule
from mpjax._engine.analyses.loop_carries import long_sums
from mpjax._engine.planning.plan import Plan, Step
from mpjax._engine.planning.planner import Planner
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import bodies_of, repetitions
from mpjax._engine.program.kinds import is_data
from mpjax._engine.program.versions import JaxprEqn, Literal
from mpjax.inspect._flow_costs import integer_operand, is_float, is_matmul, runs_in, runs_narrow
from mpjax.inspect._flow_data import Remark
from mpjax.inspect._inspected import Subject, has_shape
from mpjax.inspect._source_lines import UNKNOWN, Line, line_of


def remarks_on(step: Step, line: Line, compute: np.dtype) -> Iterator[Remark]:
  """What is to be said of a step by itself.

  Args:
    step: The step.
    line: Its line.
    compute: The dtype in which the policy computes; float32 in a region of its own policy.
  """
  is_float32 = compute == FLOAT32
  path, name = step.place.path, step.eqn.primitive.name
  is_named = step.rule is Rule.NAMED or not is_matmul(step)
  if is_named and step.because and runs_narrow(step):
    yield _narrowed(step, line, step.because)
  if not is_matmul(step):
    return
  if not is_float32 and runs_in(step) == _FLOAT64:
    yield Remark("float64", path, line, name)
  if not is_float32 and runs_in(step).kind == "c":
    yield Remark("complex", path, line, f"{name} multiplies {runs_in(step)}")
  integer = integer_operand(step.eqn)
  if integer:
    yield Remark("integers", path, line, f"{name} of {integer}")
  if step.place.has_policy:
    if runs_narrow(step):
      yield Remark("policy", path, UNKNOWN)
  elif not is_float32 and any(step.operands) and runs_narrow(step):
    wanted = _precision(step.eqn)
    if wanted:
      yield Remark("precision", path, line, f"{name} with precision={wanted}")
  if not is_float32 and runs_in(step) in (BFLOAT16, FLOAT16) and runs_in(step) != compute:
    what = f"{name} runs in {runs_in(step).name}, not in the policy's {compute.name}"
    yield Remark("format", path, line, what)


_FLOAT64 = np.dtype(np.float64)


def _narrowed(step: Step, line: Line, because: str) -> Remark:
  what = f"{step.eqn.primitive.name} in {runs_in(step).name}. It is a {because}"
  return Remark("narrowed", step.place.path, line, what)


def narrowed_sums(
  step: Step, line: Line, changed: Collection[str], *, has_matmuls: bool
) -> Iterator[Remark]:
  """Says of a loop which of the sums that it carries in float32 a rule adds up in 16 bits.

  Args:
    step: The step.
    line: Its line.
    changed: The primitives for which the policy map changes the table.
    has_matmuls: Whether the loop holds a matmul.
  """
  body, plan = bodies_of(step.eqn)[-1], step.bodies[-1]
  long = long_sums(body, repetitions(step.eqn), has_matmuls=has_matmuls) if body.carry else []
  for n, is_long in enumerate(long):
    if is_long and is_data(plan.in_forms[body.carry[n]]):
      where = _Roundings(changed).through(plan, [body.carry[n]], line)[n]
      if where is not None:
        yield _narrowed(*where, "running sum: what a loop adds to it again and again is lost there")


class _Roundings(NamedTuple):
  """Finds where float32 is rounded by a rule of the policy map.

  Attributes:
    changed: The primitives for which the map changes the table.
  """

  changed: Collection[str]

  def through(self, plan: Plan, reading: Sequence[int], outer: Line) -> list[_Where]:
    """The first step in 16 bits that some operands come through, for each result of a plan."""
    inner = versions.open_jaxpr(plan.jaxpr)
    found: dict[Any, _Where] = {inner.invars[n]: None for n in reading}
    for step in plan.steps:
      known = [found[a] for a in step.eqn.invars if not isinstance(a, Literal) and a in found]
      if not known or is_matmul(step):
        continue
      line, first = line_of(step.eqn, outer), next(filter(None, known), None)
      made = [first] * len(step.outs)
      if first is None and step.bodies:
        made = self.inside(step, found, line)
      elif first is None and runs_narrow(step) and self.is_by_rule(step):
        made = [(step, line)] * len(step.outs)
      found |= dict(zip(step.eqn.outvars, made, strict=True))
    return [None if isinstance(a, Literal) else found.get(a) for a in inner.outvars]

  def inside(self, step: Step, reading: Collection[Any], line: Line) -> list[_Where]:
    """The same of a step that holds plans."""
    columns: list[list[_Where]] = []
    for body, plan in zip(bodies_of(step.eqn), step.bodies, strict=True):
      if not body.is_test:
        places = jaxprs.ordered_places(body.take(step.eqn.invars), reading)
        columns.append(self.through(plan, places, line))
    return [next(filter(None, column), None) for column in zip(*columns, strict=True)]

  def is_by_rule(self, step: Step) -> bool:
    """Whether a rule of the map speaks of an operation, or a change of the table does."""
    return step.rule is Rule.NAMED or step.eqn.primitive.name in self.changed


_Where = tuple[Step, Line] | None


def of_float64(remark: Remark, subject: Subject, plan: Plan) -> Remark:
  """Names the arguments that are float64 in a remark on a matmul of float64, and in no other."""
  if remark.kind != "float64":
    return remark
  inner: Any = versions.open_jaxpr(plan.jaxpr)
  wide = [
    f"{name} {describe(var.aval)}"
    for name, var in zip(subject.operand_names(), inner.invars, strict=True)
    if var.aval.dtype == _FLOAT64
  ]
  source = f"cast {', '.join(wide[:3])} to float32" if wide else "cast what it reads to float32"
  return remark._replace(
    what=f"{remark.what} multiplies in float64, which a policy leaves alone; {source}"
  )


def never_reached(subject: Subject, planner: Planner) -> list[Remark]:
  """Says of rules that they never win: rules above them take all that they match."""
  policies = subject.policies
  shadowed = policies.shadowed((*planner.ops, *subject.known))
  return [
    Remark("rule", (), UNKNOWN, f"{rule!r} never wins, for {' and '.join(map(repr, others))}")
    for rule, others in shadowed
  ]


def _precision(eqn: JaxprEqn) -> str:
  """The precision or algorithm that a matmul asks for by its author's wish; empty for none."""
  precision = eqn.params.get("precision")
  chosen = precision if isinstance(precision, tuple) else (precision,)
  asked = [p for p in chosen if p not in (None, lax.Precision.DEFAULT)]
  return getattr(asked[0], "name", str(asked[0])) if asked else ""


# A batch in the place of the parameters -----------------------------------------------------------


def batch_first(subject: Subject, plan: Plan) -> list[Remark]:
  """Says that an argument taken for parameters is a batch, where that is sure.

  It holds no floats at all, and a matmul reads a leaf of a later argument that is a tree, as
  parameters are. Or it stands in a matmul as data do: on the left, contracted over its last
  dimension, or as the image of a convolution, while such a leaf stands there as a weight,
  contracted over its first. That is sure of one bare array and of images. Of a leaf of a tree if
  what it is multiplied by is called a weight and it is not, or if the tree holds labels: no
  gradient is taken of arrays of integers. ``params["w"] @ batch["x"]`` looks the same otherwise.
  """
  roles, names = _roles(subject), subject.operand_names()
  if not _MAY_BE_BATCHES.intersection(roles):
    return []
  inner: Any = versions.open_jaxpr(plan.jaxpr)
  described = [
    f"{name} {describe(var.aval)}" for name, var in zip(names, inner.invars, strict=True)
  ]
  known = {var: n for n, var in enumerate(inner.invars)}
  for step, line, left, right in _products(plan, known, UNKNOWN):
    if right is None or roles[right] != "tree":
      continue
    weight = described[right]
    if "no floats" in roles:
      first = described[roles.index("no floats")]
      what = (
        f"looks for the parameters in {first}, where no floats are, and takes {weight} for data"
      )
    elif left is not None and _is_data(step.eqn, roles[left], names[left], names[right]):
      what = (
        f"takes {described[left]} for the parameters, which is multiplied, as data are, by {weight}"
      )
    else:
      continue
    return [Remark("batch", step.place.path, line, what)]
  return []


def _is_data(eqn: JaxprEqn, role: str, name: str, other: str) -> bool:
  """Whether what stands in a matmul as data do, and in the place of parameters, is data.

  Args:
    eqn: The matmul.
    role: The role of the operand that stands so.
    name: Its name.
    other: That of what it is multiplied by, a leaf of another tree.
  """
  if role in ("batch", "with labels"):
    return True
  is_image = eqn.primitive.name == "conv_general_dilated"
  return role == "parameters" and (is_image or (_is_weight(other) and not _is_weight(name)))


def _is_weight(name: str) -> bool:
  """Whether a leaf is called a weight, as those of layers are."""
  last = name.rpartition("/")[2].lower()
  return last in ("w", "kernel", "weight", "weights")


_MAY_BE_BATCHES = frozenset({"batch", "no floats", "parameters", "with labels"})


def _roles(subject: Subject) -> list[str]:
  """What each operand may be, by what stands in the place of the parameters.

  There a bare array is a "batch", what holds no floats has "no floats", a leaf of a tree is one of
  "parameters", or stands in one "with labels"; elsewhere it is one of a "tree", or nothing.
  """
  if subject.scoping.root:
    return []
  flags, named = subject.flags
  values: list[tuple[Any, Any]] = [
    *zip(subject.args, flags, strict=True),
    *((subject.kwargs[key], named.get(key, False)) for key in sorted(subject.kwargs)),
  ]
  if subject.scoping.absolute:  # the states of models, then the other arguments
    (params, _), (rest, _), (args, inside), (kwargs, _) = values
    values = [(params, False), (rest, None), *zip(args, inside, strict=True), (kwargs, False)]
  roles = [role for value, flag in values for role in _roles_in(value, flag)]
  # The parameters of models are known by their kind, wherever the models stand.
  return ["" if subject.scoping.absolute and role == "no floats" else role for role in roles]


def _roles_in(value: Any, is_parameters: bool | None) -> list[str]:
  leaves = [leaf for leaf in jax.tree.leaves(value) if has_shape(leaf)]
  if is_parameters is None:
    return [""] * len(leaves)
  is_tree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
  if not is_parameters:
    return ["tree" if is_tree else ""] * len(leaves)
  if not any(is_float(leaf) for leaf in leaves):
    return ["no floats"] * len(leaves)
  labels = [leaf for leaf in leaves if leaf.shape and leaf.dtype in _LABELS]
  return [("with labels" if labels else "parameters") if is_tree else "batch"] * len(leaves)


_LABELS = frozenset(map(np.dtype, ("int32", "int64", "uint32", "bool")))
"""What labels, tokens and masks are; 8-bit integers are weights of a quantized layer, too."""


def _products(
  plan: Plan, known: dict[Any, int], outer: Line
) -> Iterator[tuple[Step, Line, int | None, int | None]]:
  """The matmuls that read operands of a function as data and as weights, with which these are."""

  def number(atom: Any) -> int | None:
    return None if isinstance(atom, Literal) else known.get(atom)

  known = dict(known)
  for step in plan.steps:
    line, name = line_of(step.eqn, outer), step.eqn.primitive.name
    if name in ("convert_element_type", "copy", "sharding_constraint"):
      source = number(step.eqn.invars[0])
      known |= {} if source is None else {step.eqn.outvars[0]: source}
    elif name in MATMULS and _multiplies_as_layers_do(step.eqn):
      yield step, line, number(step.eqn.invars[0]), number(step.eqn.invars[1])
    for body, inner in zip(bodies_of(step.eqn) if step.bodies else (), step.bodies, strict=True):
      invars = versions.open_jaxpr(inner.jaxpr).invars
      pairs = list(zip(invars, map(number, body.take(step.eqn.invars)), strict=True))
      constant = [n not in body.carry for n in range(len(pairs))]
      inside = {
        v: n for (v, n), kept in zip(pairs, constant, strict=True) if kept and n is not None
      }
      yield from _products(inner, inside, line)


def _multiplies_as_layers_do(eqn: JaxprEqn) -> bool:
  if eqn.primitive.name != "dot_general":
    return True
  (left, right), batch = eqn.params["dimension_numbers"]
  ranks = [len(atom.aval.shape) for atom in eqn.invars[:2]]  # type: ignore[union-attr]
  last, first = tuple(left) == (ranks[0] - 1,), tuple(right) == (0,)
  return last and first and ranks[1] >= 2 and not any(map(len, batch))
