"""What a call that nothing compiles may keep for the next, and what it must look at anew."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpjax
from mpjax._engine import kept_plans

POLICY = "mixed_bfloat16"


@pytest.fixture
def planned(monkeypatch):
  """What is planned from here on, nothing being kept yet."""
  kept_plans._kept.cache_clear()
  found = []
  plan = kept_plans.Planned.__init__

  def counting(self, program, *read_by_rules):
    found.append(self)
    plan(self, program, *read_by_rules)

  monkeypatch.setattr(kept_plans.Planned, "__init__", counting)
  return found


@pytest.fixture
def weights():
  key = jax.random.key(0)
  return {"w": jax.random.normal(key, (8, 8)), "b": jnp.ones(8)}


X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)


def deep(p, x):
  """Helpers, a loop and a branch: each has a body that is rebuilt."""
  x = jax.nn.relu(x @ p["w"] + p["b"][None])
  x, _ = jax.lax.scan(lambda h, _: (jax.nn.gelu(h @ p["w"]), None), x, None, length=3)
  x = jax.lax.cond(x.sum() > 0, lambda h: h @ p["w"], lambda h: h, x)
  return jax.nn.softmax(x).max(axis=-1).sum()


@pytest.fixture
def compiled():
  """What XLA compiled from here on."""
  seen = []

  def listen(name, *_, **__):
    if "backend_compile" in name:
      seen.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_call_is_not_planned_and_compiles_nothing(planned, compiled, weights):
  call = mpjax.autocast(deep, POLICY)
  first = call(weights, X)
  compiled.clear()
  np.testing.assert_array_equal(first, call(weights, X))
  assert compiled == []
  assert len(planned) == 1


def test_a_second_gradient_compiles_no_more_than_that_of_the_function(planned, compiled, weights):
  counts = []
  for fn in (mpjax.autocast(deep, POLICY), deep):
    jax.grad(fn)(weights, X)
    compiled.clear()
    jax.grad(fn)(weights, X)
    counts.append(len(compiled))
  assert counts[0] <= counts[1]
  assert len(planned) == 1


def test_a_function_made_anew_at_each_call_has_the_same_plan(planned, weights):
  for _ in range(3):
    mpjax.autocast(lambda p, x: (x @ p["w"]).sum(), POLICY)(weights, X)
  assert len(planned) == 1


def test_what_is_kept_computes_what_a_plan_of_its_own_does(weights):
  call = jax.value_and_grad(mpjax.autocast(deep, "mixed_float16"))
  call(weights, X)
  kept = call(weights, X + 1)
  kept_plans._kept.cache_clear()
  jax.tree.map(np.testing.assert_array_equal, kept, call(weights, X + 1))


def test_what_a_function_reads_outside_is_read_at_every_call(weights):
  number, table, switch = 1.0, np.ones((4, 8), np.float32), True

  def f(p, x):
    y = (x + table) @ p["w"] * number
    return jnp.tanh(y) if switch else y

  cast = mpjax.autocast(f, POLICY)

  def agrees():
    np.testing.assert_allclose(cast(weights, X), f(weights, X), rtol=0.02, atol=0.1)

  agrees()
  number = 3.0
  agrees()
  table *= 2  # in place: the array that the first trace captured
  agrees()
  table[0, 0] = -5
  agrees()
  switch = False
  agrees()
  number = 1.0
  table /= 2
  agrees()


def test_a_number_of_another_kind_is_another_number(weights):
  seen = [
    mpjax.autocast(lambda p, x, n=n: (x @ p["w"]).sum() * n, POLICY)(weights, X)
    for n in (1.0, -0.0, 0.0, 2.0)
  ]
  assert np.signbit(seen[1]) != np.signbit(seen[2])
  np.testing.assert_allclose(seen[3], 2 * seen[0])


@pytest.mark.parametrize("change", ["policy", "shape", "static", "scope", "rule"])
def test_another_program_is_planned(planned, weights, change):
  def f(p, x, flag=False):
    with jax.named_scope("other" if change == "scope" and flag else "head"):
      y = x @ p["w"] + (p["b"][None] if flag and change == "static" else 0.0)
    return y.sum()

  args = {
    "policy": ("mixed_float16", X, False),
    "shape": (POLICY, X[:2], False),
    "static": (POLICY, X, True),
    "scope": (POLICY, X, True),
    "rule": (mpjax.PolicyMap({"head": "float32"}, default=POLICY), X, False),
  }
  policy, x, flag = args[change]
  for _ in range(2):
    mpjax.autocast(f, POLICY)(weights, X)
    mpjax.autocast(f, policy)(weights, x, flag=flag)
  assert len(planned) == 2


def test_a_rule_of_a_map_is_looked_for_at_every_call(weights):
  cast = mpjax.autocast(
    lambda p, x: x @ p["w"], mpjax.PolicyMap({"nowhere": "float32"}, default=POLICY)
  )
  for _ in range(2):
    with pytest.raises(ValueError, match="nowhere"):
      cast(weights, X)


def scaled(p, x, scale, *, symbolic_zeros=False):
  """Rules made anew in each call."""

  @jax.custom_vjp
  def times(y):
    return y * scale

  def forward(y):
    return (y.value if symbolic_zeros else y) * scale, None

  times.defvjp(forward, lambda _, g: (g * scale,), symbolic_zeros=symbolic_zeros)
  return times(x @ p["w"]).sum()


def test_derivative_rules_are_the_same_where_their_traces_are(planned, weights):
  for scale in (2.0, 3.0, 2.0, 3.0):
    grads = jax.grad(mpjax.autocast(scaled, POLICY))(weights, X, scale)
    expected = jax.grad(scaled)(weights, X, scale)
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=0.02, atol=0.02)
  assert len(planned) == 2


def keeps(number):
  """The sum of two arrays with a rule that keeps one of them, as it came."""
  plus = jax.custom_vjp(jnp.add)
  plus.defvjp(lambda *given: (given[0] + given[1], given[number]), lambda kept, g: (g * kept, g))
  return plus


def test_rules_that_keep_another_operand_are_told_apart(planned):
  one, two = jnp.full(4, 1.0), jnp.full(4, 2.0)
  for number in (0, 1, 0):
    loss = mpjax.autocast(lambda x, y: keeps(number)(x, y).sum(), POLICY)  # noqa: B023
    np.testing.assert_array_equal(jax.grad(loss)(one, two), (one, two)[number])
  assert len(planned) == 2


def test_a_rule_that_looks_at_zeros_is_planned_at_each_call(planned, weights):
  for _ in range(2):
    jax.grad(mpjax.autocast(scaled, POLICY))(weights, X, 2.0, symbolic_zeros=True)
  assert len(planned) == 2


def test_rules_of_rules_without_end_are_not_compared(planned, weights):
  exported = jax.export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((4, 8), jnp.float32))
  for _ in range(2):
    jax.grad(mpjax.autocast(lambda p, x: exported.call(x @ p["w"]).sum(), POLICY))(weights, X)
  assert len(planned) == 2


def test_a_rule_that_raises_does_so_where_it_is_needed(planned, weights):
  @jax.custom_jvp
  def only_forward(y):
    return jnp.sin(y)

  @only_forward.defjvp
  def rule(primals, tangents):
    raise NotImplementedError("no derivative")

  cast = mpjax.autocast(lambda p, x: only_forward(x @ p["w"]).sum(), POLICY)
  assert cast(weights, X) == cast(weights, X)
  assert len(planned) == 1
  for _ in range(2):
    with pytest.raises(NotImplementedError, match="no derivative"):
      jax.grad(cast)(weights, X)
  assert len(planned) == 3


def test_a_call_without_derivatives_does_not_look_at_rules(planned, weights, monkeypatch):
  read = []
  traced = kept_plans._traced_rules
  monkeypatch.setattr(kept_plans, "_traced_rules", lambda eqn: read.append(eqn) or traced(eqn))
  for scale in (2.0, 3.0):
    cast = mpjax.autocast(lambda p, x, s=scale: by_a_rule(s)(x @ p["w"]).sum(), POLICY)
    cast(weights, X)
    cast(weights, X)
  assert (len(planned), len(read)) == (1, 0)
  slopes = [
    jax.grad(mpjax.autocast(lambda x, s=scale: by_a_rule(s)(x).sum(), POLICY))(jnp.ones(2))
    for scale in (2.0, 3.0)
  ]
  np.testing.assert_array_equal(slopes, [[2.0, 2.0], [3.0, 3.0]])


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_traced_calls_keep_nothing(planned, weights, transform):
  call = transform(lambda x: mpjax.autocast(lambda p, x: x @ p["w"], POLICY)(weights, x))
  call(X)
  call(X + 1)
  assert kept_plans._kept.cache_info().currsize == 0
  assert len(planned) == (1 if transform is jax.jit else 2)


def captured(weights, table):
  return mpjax.autocast(lambda p, x: (x @ p["w"]).sum() + (table @ p["w"]).sum(), POLICY)(
    weights, X
  )


def test_small_captured_arrays_are_the_same_where_their_numbers_are(planned, weights):
  first, second, other = (
    captured(weights, np.arange(16, dtype=np.float32).reshape(2, 8) + n) for n in (0, 0, 1)
  )
  assert first == second != other
  assert len(planned) == 2


def test_a_program_that_captured_much_is_not_kept(weights):
  """The arrays would be, too: in a loop over batches those of thirty-two."""
  kept_plans._kept.cache_clear()
  held = []
  for n in range(2):
    table = jnp.full((kept_plans.NUMBERS // 8 + 1, 8), float(n))
    captured(weights, table)
    held.append(weakref.ref(table))
    del table
  gc.collect()
  assert [ref() for ref in held] == [None, None]
  assert kept_plans._kept.cache_info().currsize == 0


def test_a_jitted_helper_that_captured_an_array_is_not_kept(planned, weights):
  table = jnp.ones((4, 8))
  helper = jax.jit(lambda w: (table @ w).sum())
  call = mpjax.autocast(lambda p: jax.jit(lambda p: helper(p["w"]))(p), POLICY)
  assert call(weights) == call(weights)
  assert len(planned) == 2 - kept_plans._kept.cache_info().currsize


def by_a_rule(table):
  """The sine with a derivative that a table scales."""
  times = jax.custom_vjp(jnp.sin)
  times.defvjp(lambda y: (jnp.sin(y), None), lambda _, g: (g * table,))
  return times


def test_an_array_in_a_rule_is_that_of_the_call(weights):
  def slope(table):
    return jax.grad(mpjax.autocast(lambda x: by_a_rule(table)(x).sum(), POLICY))(jnp.ones(4))

  first = np.full(4, 3.0, np.float32)
  slope(first)
  second = first.copy()
  first[:] = 50
  np.testing.assert_array_equal(slope(second), np.full(4, 3.0))
  third = jnp.full(4, 3.0)
  slope(third)
  third.delete()
  np.testing.assert_array_equal(slope(jnp.full(4, 3.0)), np.full(4, 3.0))


def test_rules_in_rules_are_told_apart():
  def second_derivative(slope):
    inner = jax.custom_jvp(jnp.sin)
    inner.defjvp(lambda p, t: (inner(*p), slope * t[0]))
    outer = jax.custom_jvp(jnp.sin)
    outer.defjvp(lambda p, t: (outer(*p), inner(*p) * t[0]))
    return jax.grad(jax.grad(mpjax.autocast(outer, POLICY)))(0.5)

  assert [float(second_derivative(slope)) for slope in (2.0, 3.0)] == [2.0, 3.0]


def test_operands_are_not_kept():
  kept_plans._kept.cache_clear()
  cast = jax.grad(mpjax.autocast(lambda p, x: (x @ p["w"]).sum(), POLICY))

  def call():
    params = {"w": jnp.ones((8, 8))}
    cast(params, X)
    return weakref.ref(params["w"])

  gone = call()
  gc.collect()
  assert gone() is None
  assert kept_plans._kept.cache_info().currsize == 1


def second_derivative(f):
  return jax.grad(lambda *args: jax.grad(f)(*args)["w"].sum())


def rectified(p, x):
  return (jax.nn.relu(x @ p["w"]) ** 2).sum()


@pytest.mark.parametrize(
  ("derivative", "fn"), [(jax.grad, deep), (second_derivative, rectified)], ids=["first", "second"]
)
def test_a_kept_plan_does_not_grow(planned, weights, derivative, fn):
  """The plan of a derivative rule is made where it is first needed, and is kept, too."""
  call = derivative(mpjax.autocast(fn, POLICY))
  call(weights, X)
  call(weights, X)
  (kept,) = planned
  before = len(kept.planner._plans)
  call(weights, X)
  assert len(kept.planner._plans) == before


def test_models_keep_their_plans(planned):
  model = mpjax.linen.apply_policy(nn.Dense(4), POLICY)
  variables = model.init(jax.random.key(0), X)
  planned.clear()
  outs = [model.apply(variables, X) for _ in range(2)]
  np.testing.assert_array_equal(*outs)
  assert len(planned) == 1

  model = mpjax.nnx.apply_policy(nnx.BatchNorm(8, rngs=nnx.Rngs(0)), POLICY)
  planned.clear()
  means = []
  for _ in range(2):
    model(X)
    means.append(model.mean[...])
  assert len(planned) == 1
  assert not np.array_equal(*means)  # what a call changes is changed at each call


def test_only_so_many_programs_are_kept(planned, weights):
  cast = mpjax.autocast(lambda p, x: (x @ p["w"]).sum(), POLICY)
  for n in range(kept_plans.PROGRAMS + 2):
    cast(weights, np.ones((n + 1, 8), np.float32))
  assert kept_plans._kept.cache_info().currsize == kept_plans.PROGRAMS
  cast(weights, np.ones((1, 8), np.float32))
  assert len(planned) == kept_plans.PROGRAMS + 3
