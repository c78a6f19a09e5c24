"""Laws of autocast on random programs: over a hundred in every run, thousands under ``-m slow``.

The programs are sentences of the language in `_programs`. A failure prints the program that it
shrank to.
"""

import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxpr_as_fun

import mpjax
import mpjax.inspect
from _jaxprs import CONTRACTIONS, equations, primitives, sub_jaxprs
from _program_ops import COMPLEX, CONTRACT, LINALG, OPS, TAME
from _programs import (
  EXTRAS,
  INPUTS,
  PARAMS,
  REFUSALS,
  WIDER,
  Gene,
  as_is,
  genes,
  programs,
  write,
)
from mpjax._core.policy_map import as_policy_map
from mpjax._core.primitives import RULES, Rule
from mpjax._engine.execute import decide
from mpjax._engine.program.matmuls import may_transform_points

COMPUTE = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
UNIT = {"mixed_bfloat16": 2.0**-8, "mixed_float16": 2.0**-11}
policies = st.sampled_from(sorted(COMPUTE))
transforms = st.sampled_from(["forward", "grad_outside", "grad_inside"])
every_transform = st.sampled_from(
  ["forward", "grad_outside", "grad_inside", "forward_mode", "batched", "batched_grad"]
)


pytestmark = pytest.mark.usefixtures("promotion_of_users")


def search(quick, thorough):
  """Parametrizes a test by how many programs it draws."""
  counts = [
    pytest.param(quick, id="quick"),
    pytest.param(thorough, id="thorough", marks=pytest.mark.slow),
  ]
  return pytest.mark.parametrize("count", counts)


def hold(check, count, *strategies):
  """Draw ``count`` times and check; returns whether most draws came through the check to its end.

  What a check assumes rejects a draw, so that a law may never have been tried. The quick search is
  the same in every run.
  """
  came_through = 0

  def counted(drawn):
    nonlocal came_through
    check(*drawn)
    came_through += 1

  quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
  profile = settings(
    max_examples=count, derandomize=count < 200, deadline=None, suppress_health_check=quiet
  )
  profile(given(st.tuples(*strategies))(counted))()
  return came_through > count // 2


# What the checks ask -----------------------------------------------------------------------------


def is_param(name):
  return name in PARAMS


def transformed(program, policy, transform):
  """The program or the gradient of its loss, under a policy."""
  if transform == "forward":
    return mpjax.autocast(program, policy)
  if transform == "grad_inside":
    return mpjax.autocast(jax.grad(program.loss, allow_int=True), policy)
  if transform == "batched":
    return over_two(mpjax.autocast(program, policy))
  loss = mpjax.autocast(program.loss, policy)
  if transform == "forward_mode":
    return along_params(loss)
  grad = jax.grad(loss, allow_int=True)
  return over_two(grad) if transform == "batched_grad" else grad


def over_two(fn):
  """A function batched over two copies of its data."""

  def batched(params, data):
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), data)
    return jax.vmap(fn, (None, 0))(params, twice)

  return batched


def along_params(fn):
  """The derivative of a function along its float parameters."""

  def derivative(params, data):
    floats = {k: x for k, x in params.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return jax.jvp(lambda some: fn({**params, **some}, data), (floats,), (floats,))

  return derivative


def lowered(fn, *avals):
  """A function traced and lowered: what plain JAX refuses, it refuses here."""
  traced = jax.jit(fn).trace(*avals)
  traced.lower()
  return traced


def plain(program, transform):
  """The float32 program, traced; a program that plain JAX refuses is not drawn."""
  try:
    return lowered(transformed(program, "float32", transform), *program.split(is_param))
  except REFUSALS:
    assume(False)
  except Exception as error:  # of a class that JAX does not export
    assume(type(error).__name__ != "CustomVJPException")
    raise


def types(traced):
  return jax.tree.map(lambda out: (out.shape, out.dtype), traced.out_info)


def own_dtypes(program, traced):
  """Whether the program, traced in float32, chooses 16-bit, complex or 64-bit formats itself."""
  names = {"to_bfloat16", "to_float16", *COMPLEX} | set(LINALG)
  if program.ops() & names or set(program.inputs) & {"h", "f", "z", *WIDER}:
    return True
  # NumPy's scalars are float64, so that `x / np.sqrt(n)` is where 64 bits are enabled.
  return any("float64" in factors(e) for e in equations_of(traced) if is_contraction(e))


def scoped_equations(jaxpr, wide=False) -> Iterator[tuple[bool, object]]:
  """Every equation that autocast decides, and whether it stands in the scope named wide.

  What runs as traced is passed over, with its bodies.
  """
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    inside = wide or "wide" in str(eqn.source_info.name_stack)
    yield inside, eqn
    if RULES.get(eqn.primitive.name, Rule.TRACED) is not Rule.TRACED:
      for value in eqn.params.values():
        for inner in sub_jaxprs(value):
          yield from scoped_equations(inner, inside)


def is_contraction(eqn):
  """Whether an equation is a matmul or convolution of floats."""
  floats = (jnp.issubdtype(atom.aval.dtype, jnp.floating) for atom in eqn.invars[:2])
  return eqn.primitive.name in CONTRACTIONS and any(floats)


def factors(eqn):
  return {atom.aval.dtype.name for atom in eqn.invars[:2]}


# The laws ----------------------------------------------------------------------------------------


def runs_and_keeps_its_types(program, policy, transform):
  want = plain(program, transform)
  got = lowered(transformed(program, policy, transform), *program.split(is_param))
  assert types(got) == types(want)
  if own_dtypes(program, want):
    return
  for eqn in equations_of(got):
    narrow = not is_contraction(eqn) or factors(eqn) == {COMPUTE[policy]}
    narrow = narrow or (transform == "grad_outside" and may_transform_points(eqn))
    assert narrow or may_sum_squares(eqn) or says_why(program, policy, transform), eqn
  if transform in ("forward", "grad_inside"):
    check_sensitive(got, COMPUTE[policy])


def says_why(program, policy, transform):
  """Whether `explain` lists matmuls of the program that are float32 for what they compute.

  A rule for a derivative that JAX takes of it afterwards, it does not see.
  """
  is_forward = transform in ("forward", "batched")
  fns = [program] if is_forward else [program.loss, jax.grad(program.loss, allow_int=True)]
  operands = program.split(is_param)
  return any(mpjax.inspect.explain(fn, policy, *operands).wide for fn in fns)


def equations_of(traced):
  return [eqn for _, eqn in scoped_equations(traced.jaxpr)]


def check_sensitive(traced, compute):
  """What the table wants in float32 is in float32, wherever it stands."""
  wanted = {Rule.FULL, Rule.ALWAYS} | ({Rule.RANGE} if compute == "float16" else set())
  for eqn in equations_of(traced):
    if RULES.get(eqn.primitive.name) in wanted:
      assert not {"bfloat16", "float16"} & {a.aval.dtype.name for a in eqn.invars}, eqn


@search(50, 2000)
def test_whatever_runs_in_float32_runs_narrow_with_the_same_types(count):
  assert hold(runs_and_keeps_its_types, count, programs(), policies, every_transform)


@search(12, 300)
def test_so_it_does_where_64_bits_are_enabled(count):
  with jax.enable_x64(True):
    wide = programs(extras=WIDER, depth=1)
    assert hold(runs_and_keeps_its_types, count, wide, policies, transforms)


def obeys_rules(program, policy, transform):
  """A scope named wide has float32 matmuls and no others; all else has narrow ones."""
  assume("scope" in program.ops() and program.ops() & set(CONTRACT))
  want = plain(program, transform)
  assume(any(wide for wide, _ in scoped_equations(want.jaxpr)))
  rules = mpjax.PolicyMap({r"(.*/)?wide": "float32"}, default=policy)
  got = lowered(transformed(program, rules, transform), *program.split(is_param))
  assert types(got) == types(want)
  # What no iteration changes JAX moves out of a loop that it differentiates, and out of its scope.
  moves = transform == "grad_outside" and bool(program.ops() & SCANNED)
  for wide, eqn in scoped_equations(got.jaxpr):
    if is_contraction(eqn):
      held = {"float32"} if wide else {COMPUTE[policy]}
      is_float32 = factors(eqn) == {"float32"}
      may_be = moves or may_sum_squares(eqn) or (is_float32 and says_why(program, rules, transform))
      assert factors(eqn) == held or (is_float32 and may_be), eqn


def may_sum_squares(eqn):
  """Whether a matmul adds up all that it multiplies, as ``x @ x``, or is a derivative of one.

  That is an outer product, which adds up nothing.
  """
  if eqn.primitive.name != "dot_general":
    return False
  (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
  sizes = [eqn.invars[0].aval.shape[dim] for dim in contracted]
  return all(size == 1 for size in sizes) or eqn.outvars[0].aval.ndim == len(batch)


SCANNED = {"scan", "scan_rows", "fori_loop", "map", "descend", "long_loop"}
SCOPED = [*CONTRACT, *TAME, *["scope"] * 12]


@pytest.mark.ci
@search(10, 500)
def test_rules_of_scopes_reach_into_every_construct(count):
  drawn = programs(SCOPED, extras={}, depth=3)
  assert hold(obeys_rules, count, drawn, policies, transforms)


def is_the_identity(program):
  plain(program, "forward")
  params, data = example(program)
  policies, flags = as_policy_map("float32"), ([True, False], {})
  result = decide(program, policies, (params, data), {}, flags).run()
  # Traced as a whole, as autocast traces it: a jit that closes over arrays folds them as constants.
  want = jaxpr_as_fun(jax.make_jaxpr(program)(params, data))(*jax.tree.leaves((params, data)))
  for a, b in zip(result.leaves, want, strict=True):
    np.testing.assert_array_equal(bits(a), bits(b))


def bits(x):
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def example(program, seed=0):
  """Numbers for the inputs: parameters and data."""
  draw = np.random.default_rng(seed)

  def one(aval):
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
      return jax.random.key(seed)
    if jnp.issubdtype(aval.dtype, jnp.inexact):
      return jnp.asarray(draw.uniform(-1, 1, aval.shape), aval.dtype)
    return jnp.asarray(draw.integers(0, 2, aval.shape), aval.dtype)

  params, data = program.split(is_param)
  return {k: one(a) for k, a in params.items()}, {k: one(a) for k, a in data.items()}


@search(12, 300)
def test_the_float32_policy_is_the_identity_bit_for_bit(count):
  assert hold(is_the_identity, count, programs(depth=1, size=4))


def nothing_narrow(program, policy):
  want = plain(program, "forward")
  assume(not any(e.primitive.name in CONTRACTIONS for e in equations(want.jaxpr)))
  got = lowered(mpjax.autocast(program, policy, argnums=()), *program.split(is_param))
  assert primitives(got.jaxpr) == primitives(want.jaxpr)
  for eqn in equations(got.jaxpr):
    for atom in (*eqn.invars, *eqn.outvars):
      assert getattr(atom.aval, "dtype", None) not in (jnp.bfloat16, jnp.float16), eqn


MATMULS = {*CONTRACT, *LINALG, "to_bfloat16", "to_float16", "complex_matmul", "custom_vjp"}
WITHOUT_MATMULS = [op for op in OPS if op not in MATMULS]


@search(20, 600)
def test_without_matmuls_and_parameters_nothing_is_narrow(count):
  extras = {k: EXTRAS[k] for k in ("i", "m", "k", "z", "n")}
  assert hold(nothing_narrow, count, programs(WITHOUT_MATMULS, extras), policies)


# Values ------------------------------------------------------------------------------------------


def rounding(unit, sample):
  """Changes every float that an operation reads by up to one rounding: at random, but the same in
  every call."""

  def read(place, value):
    if not jnp.issubdtype(value.dtype, jnp.floating):
      return value
    draw = np.random.default_rng(zlib.crc32(f"{place}/{sample}".encode()))
    return value * np.asarray(1 + draw.uniform(-unit, unit, value.shape), np.float32)

  return read


def flat(tree):
  return [
    np.asarray(x, np.float64)
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]


def distance(a, b):
  return np.asarray([np.max(np.abs(p - q), initial=0.0) for p, q in zip(a, b, strict=True)])


SAMPLES = 2
FACTOR = 4.0


def bound(want, rounded, unit):
  """How far a result may be off: a few times what rounding of every operand does, at random."""
  moved = np.max([distance(r, want) for r in rounded], axis=0)
  size = np.asarray([np.max(np.abs(a), initial=0.0) for a in want])
  return FACTOR * (moved + unit * size + 2.0**-20)


def run_all(fns, *args):
  """The results of several functions by one compilation, as arrays of NumPy."""
  run = jax.jit(lambda *args: [fn(*args) for fn in fns])
  return jax.device_get(run(*args))


def check_bounds(plain, rounded, cast, unit):
  want = flat(plain)
  limit = bound(want, [flat(r) for r in rounded], unit)
  for got in cast:
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, plain)
    error = distance(flat(got), want)
    assert np.all(error <= limit), (error, limit)


def is_close(program, policy):
  """Values and gradients, jit and grad within autocast and around it, by one compilation."""
  plain(program, "grad_outside")

  def with_values(read=as_is):
    def loss(params, data):
      leaves = jax.tree.leaves(program(params, data, read))
      values = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
      return sum(map(jnp.mean, values)), values

    return loss

  grad = lambda loss: jax.grad(loss, has_aux=True)  # the means of what is normalized cancel
  fns = [
    grad(with_values()),
    *(grad(with_values(rounding(UNIT[policy], n))) for n in range(SAMPLES)),
  ]
  try:
    for fn in fns[:2]:
      jax.make_jaxpr(fn)(*example(program))
  except REFUSALS:  # a custom_vjp in forward mode, which JAX takes where it is jitted
    assume(False)
  fns += [
    grad(mpjax.autocast(with_values(), policy)),
    mpjax.autocast(jax.jit(grad(with_values())), policy),
  ]
  found = run_all(fns, *example(program))
  check_bounds(found[0], found[1 : 1 + SAMPLES], found[1 + SAMPLES :], UNIT[policy])


@search(10, 600)
def test_values_and_gradients_are_those_of_float32_within_the_format(count):
  assert hold(is_close, count, programs(TAME, {}, size=5), policies)


UNCOUNTED = ("descend", "long_loop", "to_tolerance", "angles")
"""What 16 bits cannot count: steps, long sums, tolerances, far positions."""
LAYERS = ["matmul", "tanh", "transposed", "average", "normalize", "jit", "scope", "remat"]
LATEST = (0, 0, 0)


def uncounted(name):
  """Programs that do so to what a matmul gave, which is held in 16 bits, between layers."""
  layers = st.lists(genes(LAYERS, 1), max_size=2).map(tuple)
  made = st.builds(Gene, st.just(name), st.just(LATEST), st.integers(0, 7), layers)
  given = Gene("matmul", LATEST, 0, ())
  return st.builds(lambda block, rest: write([given, block, *rest], INPUTS), made, layers)


@pytest.mark.parametrize("name", UNCOUNTED)
@search(5, 200)
def test_what_16_bits_cannot_count_is_that_of_float32(name, count):
  assert hold(is_close, count, uncounted(name), policies)


def batches(program, policy):
  """vmap(autocast(f)) and autocast(vmap(f)) are one thing."""
  plain(program, "forward")
  params, data = example(program)
  many = {k: jnp.stack([v, 0.5 * v]) for k, v in data.items()}
  rounded = [lambda p, d, n=n: program(p, d, rounding(UNIT[policy], n)) for n in range(SAMPLES)]
  fns = [jax.vmap(fn, (None, 0)) for fn in (program, *rounded, mpjax.autocast(program, policy))]
  fns.append(mpjax.autocast(jax.vmap(program, (None, 0)), policy))
  found = run_all(fns, params, many)
  check_bounds(found[0], found[1 : 1 + SAMPLES], found[1 + SAMPLES :], UNIT[policy])


@pytest.mark.ci
@search(12, 300)
def test_vmap_commutes_with_autocast(count):
  assert hold(batches, count, programs(TAME, {}, size=4, depth=1), policies)


def test_programs_print_like_python():
  """What a failure shows can be read."""
  drawn = [
    Gene("matmul", (0, 1, 0), 0, ()),
    Gene("scan", (0, 0, 0), 1, (Gene("tanh", (0, 0, 0), 0, ()),)),
  ]
  program = write(drawn, INPUTS)
  assert "scan(v0, v0, knob=1)\n    lambda v2, v3:\n      v4 = tanh(v3, knob=0)" in repr(program)
