"""How loops run: weights that all their turns round alike are rounded once, before.

A compiler for GPUs casts what a loop reads in each of its turns: twice the bytes of a decoder, and
of 16-bit weights, which enter as float32, four times. In the loop such a weight is a 16-bit copy,
widened again, which compilers take back where it rounds; its cotangent is that of the float32
value, which nothing in the loop reads.

Of slices, the weights of scanned layers, there are copies only where there were some before: of
parameters that are stored in 16 bits, and in the loop of a decoder around.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from mpjax._core.dtypes import FLOAT32
from mpjax._engine.planning.plan import Plan, Step, shared_by_turns
from mpjax._engine.planning.rounded_alike import rounded_alike
from mpjax._engine.program import jaxprs, versions
from mpjax._engine.program.bodies import Body, bodies_of
from mpjax._engine.program.versions import ClosedJaxpr
from mpjax._engine.running.copies import NONE_ALIKE, Copies
from mpjax._engine.running.environment import to_dtype


class Rebuilds(Protocol):
  """What loops need of what runs them."""

  copies: Copies

  def rebuild(
    self, plan: Plan, rounding: tuple[int, ...] = (), alike: Mapping[int, np.dtype] = NONE_ALIKE
  ) -> ClosedJaxpr:
    """The closed jaxpr of a plan."""
    ...

  def kept(self, key: Hashable, make: Callable[[], ClosedJaxpr]) -> ClosedJaxpr:
    """What is rebuilt once for a key."""
    ...


def scan(interpreter: Rebuilds, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A loop; what its turns read often rounds inside: its cotangents are added up."""
  (plan,), (body,) = step.bodies, bodies_of(step.eqn)
  shared = shared_by_turns(step.eqn, plan)
  given = [to_dtype(x, FLOAT32) if n in shared else x for n, x in enumerate(operands)]
  is_known = jaxprs.is_known(step.params["length"])  # `lax.scan` asks for it
  copies = _copies(interpreter, step, body, given) if is_known else {}
  if not copies:
    jaxpr, _ = versions.like(step.params["jaxpr"], interpreter.rebuild(plan, shared))
    return jaxprs.run_with(step.eqn, given, step.params | {"jaxpr": jaxpr})

  def run(alike: Mapping[int, np.dtype], copies: list[Any], operands: list[Any]) -> list[Any]:
    turn = interpreter.rebuild(plan, shared, alike)
    consts, carry, slices = body.split(operands)
    pairs = [*zip(alike, copies, strict=True)]
    stacked = {n: x for n, x in pairs if n >= body.carry.stop}

    def again(carry: list[Any], given: Any) -> Any:
      own, of_slices = given
      read = [of_slices.get(n, x) for n, x in pairs]
      outs = jaxprs.evaluate(turn, [*read, *consts, *carry, *own])
      return outs[: len(carry)], outs[len(carry) :]

    how = {key: step.params[key] for key in ("length", "reverse", "unroll")}
    last, made = lax.scan(again, carry, (slices, stacked), **how)
    return [*last, *made]

  return _of_copies(interpreter, step, run, copies, given)


def while_loop(interpreter: Rebuilds, step: Step, operands: list[jax.Array]) -> list[jax.Array]:
  """A loop with a test of its own."""
  (test, body), (of_test, plan) = bodies_of(step.eqn), step.bodies
  of_one = not jaxprs.shape(versions.open_jaxpr(test.jaxpr).outvars[0])  # no batch of loops
  copies = _copies(interpreter, step, body, body.take(operands)) if of_one else {}
  if not copies:
    cond, rebuilt = map(interpreter.rebuild, step.bodies)
    params = step.params | {"cond_jaxpr": cond, "body_jaxpr": rebuilt}
    return jaxprs.run_with(step.eqn, operands, params)

  def run(alike: Mapping[int, np.dtype], copies: list[Any], operands: list[Any]) -> list[Any]:
    more, turn = interpreter.rebuild(of_test), interpreter.rebuild(plan, (), alike)
    read, (consts, carry, _) = test.split(operands).consts, body.split(operands)
    return lax.while_loop(
      lambda carry: jaxprs.evaluate(more, [*read, *carry])[0],
      lambda carry: jaxprs.evaluate(turn, [*copies, *consts, *carry]),
      carry,
    )

  return _of_copies(interpreter, step, run, copies, operands)


def _copies(
  interpreter: Rebuilds, step: Step, body: Body, operands: Sequence[jax.Array]
) -> dict[int, jax.Array]:
  """The copies of what all turns of a loop round alike; of slices, those that there are.

  None where a loop has effects, or references, which are no arrays: it runs as it stands.
  """
  if step.eqn.effects or not all(isinstance(a.aval, ShapedArray) for a in step.eqn.invars):
    return {}
  slices = range(body.carry.stop, len(operands)) if interpreter.copies else ()
  found = dict[int, jax.Array]()
  plan = step.bodies[-1]
  for n, dtype in rounded_alike(plan, [*range(body.carry.start), *slices]).items():
    copy = interpreter.copies.of(operands[n], dtype)
    if copy is not None or n < body.carry.start:
      found[n] = to_dtype(operands[n], dtype) if copy is None else copy
  return found


def _of_copies(
  interpreter: Rebuilds,
  step: Step,
  run: Callable[[Mapping[int, np.dtype], list[Any], list[Any]], list[Any]],
  copies: Mapping[int, jax.Array],
  operands: Sequence[jax.Array],
) -> list[jax.Array]:
  """A loop that reads copies, traced once: JAX keeps what it makes of a jaxpr, and compiles it."""
  alike = {n: x.dtype for n, x in copies.items()}
  given = [*copies.values(), *map(jnp.asarray, operands)]  # a flag or number is no array
  dtypes = tuple(x.dtype for x in given)

  def make() -> ClosedJaxpr:
    whole: list[Any] = [v.aval for v in step.eqn.invars]
    of_copies = [whole[bodies_of(step.eqn)[-1].operands[n]] for n in alike]
    avals = map(jaxprs.with_dtype, [*of_copies, *whole], dtypes)
    return jaxprs.trace(lambda *xs: run(alike, [*xs[: len(alike)]], [*xs[len(alike) :]]), [*avals])

  key = id(step), step.bodies, tuple(alike), dtypes
  return jaxprs.evaluate(interpreter.kept(key, make), given)
