"""Where operands of an equation go in its bodies, and where the bodies' results go."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import mpjax
from _jaxprs import equations
from mpjax._engine.analyses.linear_recurrences import Recurrences
from mpjax._engine.program import versions
from mpjax._engine.program.bodies import bodies_of, mapped, repetitions, settled


@jax.custom_jvp
def with_jvp(x, y):
  return x * y


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0] * primals[1]))


@jax.custom_vjp
def with_vjp(x, y):
  return x * y


with_vjp.defvjp(lambda x, y: (with_vjp(x, y), y), lambda y, g: (g * y, None))


@jax.custom_batching.custom_vmap
def with_vmap(x, y):
  return x * y


with_vmap.def_vmap(lambda n, batched, x, y: (x * y, True))


def over_devices(x, y):
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = (PartitionSpec(), PartitionSpec("d"))
  return jax.shard_map(lambda x, y: x * y, mesh=mesh, in_specs=specs, out_specs=specs[1])(x, y)


PROGRAMS = {
  "jit": jax.jit(lambda x, y: x * y),
  "remat": jax.checkpoint(lambda x, y: x * y),
  "scan": lambda x, y: lax.scan(lambda c, z: (c + x * z, (c, z)), x, y),
  "scan without constants": lambda x, y: lax.scan(lambda c, z: (c + z, None), x, y)[0],
  "while": lambda x, y: lax.while_loop(lambda c: c[0] < y.sum(), lambda c: (c[0] + x, y), (x, y)),
  "fori": lambda x, y: lax.fori_loop(0, y.astype(int)[0], lambda i, c: c + i * x, x),
  "cond": lambda x, y: lax.cond(x > 1, lambda z: z * x, lambda z: z - 1, y),
  "custom_jvp": with_jvp,
  "custom_vjp": with_vjp,
  "custom_vmap": with_vmap,
  "shard_map": over_devices,
}


def shapes(atoms):
  return [atom.aval.shape for atom in atoms]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_operand_of_a_body_has_its_place_in_the_equation(name):
  eqns = jax.make_jaxpr(PROGRAMS[name])(jnp.float32(2), jnp.ones(4)).eqns
  eqn = next(eqn for eqn in eqns if bodies_of(eqn))
  for body in bodies_of(eqn):
    inner = versions.open_jaxpr(body.jaxpr)
    operands = shapes(eqn.invars)
    consts, carry, slices = body.split(operands)
    one_turn = [shape[1:] for shape in slices]
    assert [*consts, *carry, *slices] == body.take(operands)
    if name != "shard_map":  # the parts that one device holds are smaller
      assert [*consts, *carry, *one_turn] == shapes(inner.invars)
    results = shapes(inner.outvars)
    assert results == [()] if body.is_test else results[: len(carry)] == carry
    assert body.is_test or len(results) == len(eqn.outvars)


def test_how_often_bodies_run_is_said_where_the_equation_says_it():
  counts = {
    name: [repetitions(e) for e in jax.make_jaxpr(fn)(jnp.float32(2), jnp.ones(4)).eqns][-1]
    for name, fn in PROGRAMS.items()
    if name in ("jit", "scan", "while", "cond", "shard_map")
  }
  assert counts == {"jit": 1, "scan": 4, "while": None, "cond": 1, "shard_map": 4}


def test_operations_without_a_body_have_none():
  (add,) = jax.make_jaxpr(lambda x: x + 1)(1.0).eqns
  assert bodies_of(add) == ()


def test_a_carry_settles_where_a_turn_adds_nothing():
  turned = settled([0, 3, 1], lambda c: [c[1], c[1], c[0], 9], max)
  assert turned == [3, 3, 3]


def test_another_function_runs_on_the_devices_of_a_shard_map():
  x, y = jnp.float32(2), jnp.arange(4.0)
  eqn = jax.make_jaxpr(over_devices)(x, y).eqns[-1]
  assert jax.jit(mapped(eqn, lambda x, y: (x + y,)))(x, y)[0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_what_a_scan_reads_once_in_16_bits_it_is_given_so(policy):
  """The states of a recurrence are float32; the matmul of the next one alone reads them."""

  def recurrence(w, x, states):
    def turn(h, u):
      h = h + jnp.tanh(u[0] @ w)
      return h + u[1], h

    return lax.scan(turn, jnp.zeros(4), (x, states))[1]

  def fn(w, x):
    states = recurrence(w, x, x)
    return recurrence(w, states, jnp.sin(x)).sum()

  jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(jnp.eye(4), jnp.ones((6, 4)))
  scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
  sizes = [[v.aval.dtype.itemsize for v in e.invars if v.aval.shape == (6, 4)] for e in scans]
  assert sizes == [[2, 4], [2, 4]]  # what a matmul reads, and what is added
  assert [e.outvars[1].aval.dtype for e in scans] == [jnp.float32] * 2


def test_loops_in_loops_are_looked_at_once_for_all_that_is_asked(monkeypatch):
  """Not once more for each turn of each fixed point around them: a thousand times the innermost."""

  def nest(depth, x, w):
    if not depth:
      return jnp.tanh(x @ w)
    turn = lambda c, _: ((nest(depth - 1, c[1], w), c[2] + c[0], 0.5 * c[0]), None)
    return lax.scan(turn, (x, x, x), None, length=20)[0][0]

  calls, look = [], Recurrences._linear_results
  counted = lambda *args: (calls.append(1), look(*args))[1]
  monkeypatch.setattr(Recurrences, "_linear_results", counted)
  autocast = mpjax.autocast(lambda w, x: nest(10, x, w), "mixed_bfloat16")
  jax.make_jaxpr(autocast)(jnp.eye(4), jnp.ones((2, 4)))
  assert 0 < len(calls) < 200
