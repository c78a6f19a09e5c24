"""`mpjax.nnx.value_and_grad`: what moves, what comes back, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mpjax

# Flax's norms and adam mix dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nnx.Module):
  """Statistics, dropout, and two layers."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, x):
  return jnp.mean((model(x) - 1.0) ** 2)


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (8, 4))


@pytest.fixture
def model():
  return Net(nnx.Rngs(0))


def test_the_loss_is_that_of_flax_and_the_gradients_are_times_the_scale(model, x):
  found = mpjax.nnx.value_and_grad(loss_fn)(model, x, loss_scale=2.0**10)
  other = Net(nnx.Rngs(0))
  loss, grads = nnx.value_and_grad(loss_fn)(other, x)
  chex.assert_trees_all_equal(found, (loss, jax.tree.map(lambda g: g * 2.0**10, grads)))
  chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(other)))


@pytest.mark.quick
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("where", ["model", "loss"])
def test_statistics_and_random_streams_move_under_a_policy(model, x, policy, where):
  before = np.array(model.norm.mean[...])
  under = mpjax.apply_policy(model, policy) if where == "model" else model
  loss = mpjax.nnx.autocast(loss_fn, policy) if where == "loss" else loss_fn
  step = nnx.jit(mpjax.nnx.value_and_grad(loss))
  losses = [step(under, x, loss_scale=8.0)[0] for _ in range(2)]
  assert np.any(before != model.norm.mean[...]) and model.norm.mean[...].dtype == jnp.float32
  assert int(model.dropout.rngs.count[...]) == 2 and losses[0] != losses[1]
  assert losses[0].dtype == jnp.float32


def test_keyword_models_and_streams_move_too(model, x):
  rngs = nnx.Rngs(noise=1)
  loss = lambda w, x, *, model, rngs: w * loss_fn(model, x) + jax.random.normal(rngs.noise(), ())
  run = mpjax.nnx.value_and_grad(loss)
  _, grad = run(jnp.float32(2), x, model=model, rngs=rngs, loss_scale=4.0)
  assert grad.dtype == jnp.float32 and grad != 0
  assert int(rngs.noise.count[...]) == int(model.dropout.rngs.count[...]) == 1


def test_several_arguments_and_auxiliary_output(model, x):
  loss = lambda w, model, x: (w * loss_fn(model, x), {"mean": jnp.mean(x)})
  run = mpjax.nnx.value_and_grad(loss, argnums=(0, -2), has_aux=True)
  (value, aux), (scalar, grads) = run(jnp.float32(3), model, x, loss_scale=2.0)
  np.testing.assert_allclose(scalar, value / 3 * 2, rtol=1e-6)
  assert set(aux) == {"mean"} and set(grads) == {"hidden", "norm", "head"}


def test_wrt_names_the_variables(x):
  layer = nnx.LoRALinear(4, 2, lora_rank=1, rngs=nnx.Rngs(0))
  _, grads = mpjax.nnx.value_and_grad(loss_fn, wrt=nnx.LoRAParam)(layer, x, loss_scale=1.0)
  assert {type(g) for g in jax.tree.leaves(grads, is_leaf=lambda g: hasattr(g, "get_value"))} == {
    nnx.LoRAParam
  }
  with pytest.raises(ValueError, match=r"wrt must name Variables.*Net has none.*nnx.Param"):
    mpjax.nnx.value_and_grad(loss_fn, wrt=nnx.LoRAParam)(Net(nnx.Rngs(0)), x, loss_scale=1.0)


def test_a_loop_with_a_scaled_optimizer_skips_and_trains(model, x):
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), init_scale=2.0**10)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    scale = mpjax.loss_scale(optimizer.opt_state)
    loss, grads = mpjax.nnx.value_and_grad(loss_fn)(model, x, loss_scale=scale)
    optimizer.update(model, grads)
    return loss

  kernel = np.array(model.head.kernel[...])
  step(model, optimizer, x * jnp.inf)
  np.testing.assert_array_equal(kernel, model.head.kernel[...])
  assert float(mpjax.loss_scale(optimizer.opt_state)) == 2.0**9
  model = Net(nnx.Rngs(0))  # the statistics took the infinities; a loop of one's own selects them
  losses = [float(step(model, optimizer, x)) for _ in range(30)]
  assert losses[-1] < 0.5 * losses[0]


def test_a_submodule_that_the_loss_adds_arrives(model, x):
  def loss(model, x):
    model.extra = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    return loss_fn(model, x) + jnp.mean(model.extra(x))

  mpjax.nnx.value_and_grad(loss)(model, x, loss_scale=1.0)
  assert isinstance(model.extra, nnx.Linear)


@pytest.mark.parametrize(
  "args",
  [
    lambda model: (model,),
    lambda model: ({"inner": model},),
    lambda model: (jnp.float32(1), nnx.Rngs(0)),
    lambda model: (nnx.Param(jnp.float32(1)),),
  ],
  ids=["model", "model in a dict", "rngs", "variable"],
)
def test_the_one_for_pytrees_refuses_graph_nodes_and_names_this_one(model, args):
  run = mpjax.value_and_grad(lambda *args: jnp.float32(0))
  with pytest.raises(TypeError, match=r"Got an NNX \w+ among.*Use mpjax\.nnx\.value_and_grad"):
    run(*args(model), loss_scale=1.0)


def test_a_diff_state_says_which_variables(model, x):
  run = lambda argnums: mpjax.nnx.value_and_grad(loss_fn, argnums=argnums)(model, x, loss_scale=1.0)
  (_, grads), (_, wanted) = run(nnx.DiffState(0, nnx.Param)), run(0)
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, wanted)
  _, (grads, _) = run((nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("bias"))), 1))
  assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"bias"}
  with pytest.raises(ValueError, match="wrt must name Variables that the model has"):
    run(nnx.DiffState(0, nnx.Cache))


def test_a_position_that_the_call_has_not_is_refused(model, x):
  with pytest.raises(ValueError, match=r"argnums must name arguments.*Got 2 for 2 positional"):
    mpjax.nnx.value_and_grad(loss_fn, argnums=2)(model, x, loss_scale=1.0)


def test_a_loss_that_is_no_scalar_is_refused(model, x):
  with pytest.raises(TypeError, match=r"real floating-point scalar. Got f32\[8,2\]"):
    mpjax.nnx.value_and_grad(lambda model, x: model(x))(model, x, loss_scale=1.0)


LAYERS = {"Linen": nn.Dense(3), "NNX": nnx.Dropout(0.5)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("make", [mpjax.value_and_grad, mpjax.nnx.value_and_grad])
def test_a_module_is_no_loss(make, kind):
  name = type(LAYERS[kind]).__name__
  with pytest.raises(TypeError, match=rf"takes a loss function. Got {name}. Write a function"):
    make(LAYERS[kind])
  with pytest.raises(TypeError, match=rf"takes a loss function. Got the class {name}. Write a"):
    make(type(LAYERS[kind]))


@pytest.mark.parametrize(
  ("apply_policy", "module", "text"),
  [
    (mpjax.nnx.apply_policy, nn.Dense(3), r"Got the Linen module Dense. .* mpjax.linen.apply_pol"),
    (mpjax.linen.apply_policy, LAYERS["NNX"], r"Got the NNX model Dropout. .* mpjax.nnx.apply_pol"),
    (mpjax.nnx.apply_policy, nnx.Linear, r"Got the class Linear. Make an instance"),
    (mpjax.linen.apply_policy, jnp.sin, r"Got .* For a function use mpjax.autocast"),
  ],
)
def test_a_module_of_the_other_kind_is_told_where_to_go(apply_policy, module, text):
  with pytest.raises(TypeError, match=text):
    apply_policy(module, "mixed_bfloat16")


# Flax's tree mode ---------------------------------------------------------------------------------


class Normed(nnx.Module):
  """Statistics, and floats alone: Flax differentiates all of it."""

  def __init__(self, rngs):
    self.layer = nnx.Linear(4, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.layer(x))


@pytest.fixture(params=[(True, False), (False, False), (False, True)], ids=str)
def tree_mode(request):
  graph, updates = request.param
  with nnx.set_graph_mode(graph), nnx.set_graph_updates(updates):
    yield


@pytest.mark.parametrize("argnums", [0, -2, (0, 1), [1, 0]], ids=str)
def test_in_tree_mode_it_does_what_flax_does(x, argnums, tree_mode):
  model, other = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
  before = np.array(model.norm.mean[...])
  found = mpjax.nnx.value_and_grad(loss_fn, argnums)(model, x, loss_scale=4.0)
  loss, grads = nnx.value_and_grad(loss_fn, argnums=argnums)(other, x)
  chex.assert_trees_all_equal(found, (loss, jax.tree.map(lambda g: g * 4.0, grads)))
  chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(other)))
  assert np.any(before != model.norm.mean[...])


def test_a_loop_of_ones_own_trains_in_tree_mode(x, tree_mode):
  model = mpjax.apply_policy(Normed(nnx.Rngs(0)), "mixed_float16")
  tx = mpjax.dynamic_loss_scaling(optax.adam(1e-2), init_scale=2.0**10)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    scale = mpjax.loss_scale(optimizer.opt_state)
    run = mpjax.nnx.value_and_grad(lambda m, x: (loss_fn(m, x), {"x": x}), has_aux=True)
    (loss, _), grads = run(model, x, loss_scale=scale)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer, x)) for _ in range(10)]
  assert losses[-1] < losses[0] and int(optimizer.step[...]) == 10


@pytest.mark.parametrize(
  "chosen",
  [{"wrt": nnx.LoRAParam}, {"argnums": (1, nnx.DiffState(0, nnx.Param))}],
  ids=["wrt", "DiffState"],
)
def test_variables_cannot_be_chosen_in_tree_mode(chosen, tree_mode):
  with pytest.raises(ValueError, match=r"all Variables.*Got (wrt=|DiffState).*Leave it out"):
    mpjax.nnx.value_and_grad(loss_fn, **chosen)


def test_a_function_made_in_graph_mode_stays_in_it(model, x):
  run = mpjax.nnx.value_and_grad(loss_fn)
  with nnx.set_graph_updates(False):
    _, grads = run(model, x, loss_scale=1.0)
  assert isinstance(grads, nnx.State) and set(grads) == {"hidden", "norm", "head"}
