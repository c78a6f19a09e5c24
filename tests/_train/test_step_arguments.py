"""What a step, a state and their helpers are not given: one sentence each, and no whole tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import mpjax
from _arrays import array

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes in many places

PARAMS = {f"w{i}": array(np.ones((4, 1))) for i in range(50)}
TX = mpjax.dynamic_loss_scaling(optax.adam(0.1))
SGD = optax.sgd(1.0)
X = array(np.ones((3, 4)))


def loss_fn(params, x):
  return jnp.mean(x @ params["w0"])


def flax_state():
  return train_state.TrainState.create(apply_fn=loss_fn, params=PARAMS, tx=TX)


def make_model():
  return nnx.Linear(4, 1, rngs=nnx.Rngs(0))


def again():
  step, state = mpjax.make_train_step(loss_fn, TX), mpjax.TrainState.create(PARAMS, TX)
  step(state, X)
  return step(state, X)


def in_a_jit(transform):
  step = mpjax.make_train_step(loss_fn, TX, max_consecutive_skips=3)
  return transform(lambda state, x: step(state, x))(mpjax.TrainState.create(PARAMS, TX), X)


def with_integer():
  model = make_model()
  model.ids = nnx.Param(jnp.arange(3))
  return model, nnx.Optimizer(model, SGD, wrt=nnx.Param)


nnx_step = mpjax.nnx.make_train_step(lambda model, x: jnp.mean(model(x) ** 2))


def optimizer_of(model):
  return nnx.Optimizer(model, TX, wrt=nnx.Param)


def created(params, **fields):
  return mpjax.TrainState.create(params, TX, **fields)


def stepped(loss, state, batch=X, tx=TX, **settings):
  return mpjax.make_train_step(loss, tx, **settings)(state, batch)


def a_mean(params, x):
  return jnp.mean(jax.tree.leaves(params)[0]) * jnp.mean(x)


def lookahead():
  tx = optax.lookahead(optax.sgd(0.1), 5, 0.5)
  params = optax.LookaheadParams.init_synced({"w": jnp.ones(3)})
  state = mpjax.TrainState.create(params, tx)
  return stepped(lambda params, x: jnp.sum(params.fast["w"]), state, tx=tx)


def statistics_without_their_name():
  statistics = {"norm": {"mean": jnp.zeros(3)}}
  loss = lambda params, statistics, x: (a_mean(params, x), {"batch_stats": statistics})
  return stepped(loss, created(PARAMS, model_state=statistics))


def named_loss(params, x):
  return loss_fn(params, x), {"x": x, "name": "loss"}


def named_nnx_loss(model, x):
  return jnp.mean(model(x)), ["loss", x]


def nnx_stepped(loss, **settings):
  model = make_model()
  return mpjax.nnx.make_train_step(loss, **settings)(model, optimizer_of(model), X)


WRONG = {
  "inputs and labels apart": (
    lambda: mpjax.make_train_step(loss_fn, TX)(created(PARAMS), X, X),
    "Got 2 arguments after the state. Write step(state, (x, y))",
  ),
  "inputs and labels lowered apart": (
    lambda: mpjax.make_train_step(loss_fn, TX).lower(created(PARAMS), X, X),
    "Got 2 arguments after the state. Write step(state, (x, y))",
  ),
  "an NNX model, its optimizer and a batch": (
    lambda: mpjax.make_train_step(loss_fn, TX)((m := make_model()), optimizer_of(m), X),
    "Got the NNX model Linear. Use mpjax.nnx.make_train_step with nnx.Optimizer",
  ),
  "a string in the batch": (
    lambda: stepped(loss_fn, created(PARAMS), {"x": X, "split": "train"}),
    "takes arrays alone. Got 'train' of type str at batch/split. Leave it out, or close over it",
  ),
  "a string in a batch without a scaler": (
    lambda: stepped(a_mean, mpjax.TrainState.create({"w": X}, SGD), (X, "train"), SGD),
    "takes arrays alone. Got 'train' of type str at batch/1. Leave it out",
  ),
  "strings in an array": (
    lambda: stepped(loss_fn, created(PARAMS), {"x": X, "names": np.array(["a", "b"])}),
    "Got array(['a', 'b'], dtype='<U1') of type ndarray at batch/names",
  ),
  "a string lowered": (
    lambda: mpjax.make_train_step(loss_fn, TX).lower(created(PARAMS), "train"),
    "Got 'train' of type str at batch. Leave it out",
  ),
  "a string in a model_state": (
    lambda: stepped(a_mean, created(PARAMS, model_state={"name": "net"})),
    "Got 'net' of type str at state/model_state/name",
  ),
  "a string in an NNX batch": (
    lambda: nnx_step(model := make_model(), optimizer_of(model), {"x": X, "split": "train"}),
    "takes arrays alone. Got 'train' of type str at batch/split",
  ),
  "a string for an NNX loss": (
    lambda: nnx_step(model := make_model(), optimizer_of(model), X, mode="train"),
    "takes arrays alone. Got 'train' of type str at mode. Leave it out, or close over it in loss",
  ),
  "a string for an NNX loss lowered": (
    lambda: nnx_step.lower(model := make_model(), optimizer_of(model), X, "train"),
    "takes arrays alone. Got 'train' of type str at batch/1",
  ),
  "a string in aux": (
    lambda: stepped(named_loss, created(PARAMS), has_aux=True),
    "an aux of arrays: a step is compiled, and returns these alone. Got 'loss' of type str at name",
  ),
  "a string in an aux of micro-batches": (
    lambda: stepped(
      named_loss, created(PARAMS), has_aux=True, accumulate=3, policy="mixed_bfloat16"
    ),
    "Got 'loss' of type str at name. Leave it out of aux",
  ),
  "a string in an NNX aux": (
    lambda: nnx_stepped(named_nnx_loss, has_aux=True),
    "an aux of arrays: a step is compiled, and returns these alone. Got 'loss' of type str at 0",
  ),
  "a name to keep in float32": (
    lambda: mpjax.keep_float32("head"),
    "keep_float32 marks arrays. Got 'head' of type str. Mark the value itself, keep_float32(x);",
  ),
  "a name among what is kept in float32": (
    lambda: mpjax.keep_float32({"x": X, "name": "head"}),
    "keep_float32 marks arrays. Got 'head' of type str at name.",
  ),
  "an NNX model for parameters": (
    lambda: created(make_model()),
    "Got the NNX Linear. Use mpjax.nnx.make_train_step with nnx.Optimizer",
  ),
  "an NNX model among parameters": (
    lambda: created({"net": make_model()}),
    "Got the NNX Linear at net. Use mpjax.nnx.make_train_step",
  ),
  "the state of a whole NNX model": (
    lambda: created(nnx.state(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))),
    "Got the NNX BatchStat at mean. Use mpjax.nnx.make_train_step",
  ),
  "an NNX model for a state": (
    lambda: mpjax.make_train_step(loss_fn, TX)(make_model(), X),
    "Got the NNX model Linear. Use mpjax.nnx.make_train_step with nnx.Optimizer",
  ),
  "what a step returned for a state": (
    lambda: stepped(loss_fn, stepped(loss_fn, created(PARAMS))),
    "Write state, metrics = step(state, batch)",
  ),
  "a Linen module for parameters": (
    lambda: created(nn.Dense(3)),
    "Got the Linen module Dense. Pass module.init(key, x)['params']",
  ),
  "no parameters": (lambda: created(None), "Got None. Pass a pytree of arrays"),
  "a name among parameters": (
    lambda: created({"w": jnp.ones(3), "name": "net"}),
    "Parameters must be arrays. Got 'net' of type str at name",
  ),
  "a number for a key": (lambda: created(PARAMS, rng=0), "rng must be one key. Got 0"),
  "many keys": (
    lambda: created(PARAMS, rng=jax.random.split(jax.random.key(0), 2)),
    "rng must be one key. Got key<fry>[2]",
  ),
  "streams for a key": (lambda: created(PARAMS, rng=nnx.Rngs(0)), "rng must be one key"),
  "an integer parameter": (
    lambda: stepped(a_mean, created({"a": X, "table": {"ids": jnp.arange(3)}})),
    "Parameters must be floats. Got table/ids: i32[3]. Keep it in model_state or in the batch",
  ),
  "a bool parameter": (
    lambda: stepped(a_mean, created({"a": X, "mask": jnp.ones(3, bool)}), accumulate=3),
    "Parameters must be floats. Got mask: bool[3]",
  ),
  "a key among parameters": (
    lambda: stepped(
      a_mean, mpjax.TrainState.create({"a": X, "k": jax.random.key(0)}, optax.sgd(1.0)), tx=SGD
    ),
    "Parameters must be floats. Got k: key<fry>[]",
  ),
  "an NNX parameter that is an integer": (
    lambda: nnx_step(*with_integer(), X),
    "Parameters must be floats. Got ids: i32[3]",
  ),
  "a loss that wants a key": (
    lambda: stepped(lambda params, batch, rng: 0.0, created(PARAMS)),
    "no model_state and no rng: loss_fn is called as loss_fn(params, batch). Got <lambda>(params",
  ),
  "a loss that wants none": (
    lambda: stepped(lambda params, batch: 0.0, created(PARAMS, rng=jax.random.key(0))),
    "loss_fn is called as loss_fn(params, batch, rng=key)",
  ),
  "a loss that wants no model_state": (
    lambda: stepped(
      lambda params, batch: 0.0, created(PARAMS, model_state={"s": X}), policy="mixed_float16"
    ),
    "loss_fn is called as loss_fn(params, model_state, batch)",
  ),
  "16-bit parameters by a policy": (
    lambda: stepped(loss_fn, created(PARAMS), policy="bfloat16"),
    "For training write 'mixed_bfloat16', which keeps them in float32",
  ),
  "optax.lookahead": (lookahead, "Got those of optax.lookahead"),
  "parameters of another shape": (
    lambda: stepped(a_mean, created({"w": X}).replace(params={"w": X.T})),
    "made for the parameters that it comes with. Got inner_state/0/mu/w: f32[3,4] for f32[4,3]",
  ),
  "the optimizer of another model": (
    lambda: nnx_step(make_model(), optimizer_of(nnx.Linear(4, 2, rngs=nnx.Rngs(0))), X),
    "Got one of another model, whose state has inner_state/0/mu/bias: f32[2] for f32[1]",
  ),
  "the optimizer of a model of other parts": (
    lambda: nnx_step(make_model(), optimizer_of(nnx.Embed(4, 2, rngs=nnx.Rngs(0))), X),
    "has inner_state/0/mu/bias: nothing for f32[1]",
  ),
  "statistics without their name": (
    statistics_without_their_name,
    "Got batch_stats/norm/mean: f32[3] for nothing and norm/mean: nothing for f32[3]",
  ),
  "a state that was donated": (again, "A step that donates takes a state once"),
  "a limit in a jit": (lambda: in_a_jit(jax.jit), "told on the host"),
  "a limit in a scan": (
    lambda: in_a_jit(lambda f: lambda s, x: jax.lax.scan(lambda s, x: (f(s, x)[0], 0), s, X[None])),
    "told on the host",
  ),
  "autocast of a model": (
    lambda: mpjax.nnx.autocast(make_model(), "mixed_bfloat16"),
    "Got the NNX model Linear. Use mpjax.apply_policy(module, policy)",
  ),
  "nnx.autocast as in torch": (
    lambda: mpjax.nnx.autocast(enabled=True),
    "autocast is no context manager",
  ),
  "swapped": (
    lambda: mpjax.make_train_step(loss_fn, TX)(X, mpjax.TrainState.create(PARAMS, TX)),
    "Got the batch first. Write step(state, batch)",
  ),
  "a Flax state": (
    lambda: mpjax.make_train_step(loss_fn, TX)(flax_state(), X),
    "Got flax.training.train_state.TrainState. Make one: mpjax.TrainState.create(params, tx)",
  ),
  "a Linen module for a loss": (
    lambda: mpjax.make_train_step(nn.Dense(2), TX),
    "made from a loss function. Got Dense",
  ),
  "a class for a loss": (
    lambda: mpjax.make_train_step(nn.Dense, TX),
    "made from a loss function. Got the class Dense",
  ),
  "an NNX model for a loss": (
    lambda: mpjax.nnx.make_train_step(make_model()),
    "made from a loss function. Got Linear",
  ),
  "autocast of a class": (
    lambda: mpjax.autocast(nn.Dense, "mixed_bfloat16"),
    "Got the class Dense. Make an instance",
  ),
  "an optimizer before its model": (
    lambda: nnx_step(optimizer_of(make_model()), make_model(), X),
    "Got the optimizer first. Write step(model,",
  ),
  "an optimizer without its model": (
    lambda: nnx_step(optimizer_of(make_model()), X),
    "Got the optimizer first. Write step(model,",
  ),
  "a transformation for an optimizer": (
    lambda: nnx_step(make_model(), TX, X),
    "Got GradientTransformationExtraArgs for the optimizer. Write step(model, nnx.Optimizer(",
  ),
  "a state for a model": (
    lambda: nnx_step(mpjax.TrainState.create(PARAMS, TX), X),
    "Got TrainState for the model",
  ),
  "lowered": (
    lambda: mpjax.make_train_step(loss_fn, TX).lower(PARAMS, X),
    "Got builtins.dict. Make one",
  ),
  "another optimizer": (
    lambda: mpjax.make_train_step(loss_fn, optax.sgd(0.1, momentum=0.9))(
      mpjax.TrainState.create(PARAMS, TX), X
    ),
    "The state must be that of the step's optimizer",
  ),
  "no scaler in the state": (
    lambda: mpjax.make_train_step(loss_fn, TX)(mpjax.TrainState.create(PARAMS, optax.adam(0.1)), X),
    "The state must be that of the step's optimizer",
  ),
  "created in the other order": (
    lambda: mpjax.TrainState.create(TX, PARAMS),
    "Got the optimizer first. Write TrainState.create(params, tx)",
  ),
  "shapes for parameters": (
    lambda: mpjax.TrainState.create(jax.eval_shape(lambda: PARAMS), TX),
    "write jax.eval_shape(lambda params: TrainState.create(params, tx), params)",
  ),
  "shapes for a model's state": (
    lambda: mpjax.TrainState.create(
      PARAMS, TX, model_state={"m": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    ),
    "Got the shape bf16[2] at model_state/m. For a state of shapes write",
  ),
  "the state for the scale": (
    lambda: mpjax.value_and_grad(loss_fn)(PARAMS, X, loss_scale=TX.init(PARAMS)),
    "Got LossScalingState. Pass loss_scale=mpjax.loss_scale(opt_state)",
  ),
  "no scale": (
    lambda: mpjax.nnx.value_and_grad(lambda m, x: jnp.mean(m(x)))(make_model(), X),
    "Got no loss_scale. Pass loss_scale=mpjax.loss_scale(opt_state)",
  ),
  "many scales": (
    lambda: mpjax.value_and_grad(loss_fn)(PARAMS, X, loss_scale=jnp.ones(3)),
    "loss_scale must be a scalar. Got f32[3]",
  ),
  "a predicate for each element": (
    lambda: mpjax.select(jnp.ones(4, bool), PARAMS, PARAMS),
    "must be one boolean, for the whole tree. Got bool[4]",
  ),
  "a number for a predicate": (lambda: mpjax.select(1.0, PARAMS, PARAMS), "Got 1.0"),
  "a tree for a predicate": (lambda: mpjax.select(PARAMS, PARAMS, PARAMS), "one boolean"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_short_error(case):
  call, text = WRONG[case]
  with pytest.raises((TypeError, ValueError)) as caught:
    call()
  assert text in str(caught.value)
  assert len(str(caught.value)) < 500


@pytest.mark.parametrize("pred", [True, jnp.array(True), jax.numpy.bool_(True)])
def test_booleans_select(pred):
  assert mpjax.select(pred, {"a": jnp.ones(())}, {"a": jnp.zeros(())})["a"] == 1


def test_the_parameters_of_an_nnx_model_may_be_those_of_a_state():
  graph, params = nnx.split(make_model(), nnx.Param)
  loss = lambda params, x: jnp.mean(nnx.merge(graph, params)(x))
  state, metrics = stepped(loss, created(params))
  assert metrics.applied
  assert isinstance(state.params, nnx.State)


def test_the_shapes_of_a_state_are_had_without_arrays():
  shapes = jax.eval_shape(lambda: PARAMS)
  state = jax.eval_shape(lambda params: mpjax.TrainState.create(params, TX), shapes)
  assert jax.tree.leaves(state.params) == jax.tree.leaves(shapes)
  assert jax.tree.leaves(state) == jax.tree.leaves(jax.eval_shape(lambda: created(PARAMS)))


def test_a_type_error_inside_a_loss_is_its_own():
  with pytest.raises(TypeError, match=r"^unsupported operand"):
    stepped(lambda params, batch: params + 1, created(PARAMS))


def test_a_type_error_inside_an_nnx_loss_is_its_own():
  with pytest.raises(TypeError, match=r"^unsupported operand"):
    nnx_stepped(lambda model, x: model + 1)


def test_numbers_and_what_numpy_makes_of_them_may_be_in_a_batch_and_in_aux():
  aux = {"n": 3, "flag": True, "row": np.arange(3), "none": None, "key": jax.random.key(0)}
  state, batch = created(PARAMS), {"x": X, **aux}
  metrics = stepped(lambda p, b: (loss_fn(p, b["x"]), aux), state, batch, has_aux=True)[1]
  assert int(metrics.aux["n"]) == 3


def test_raw_keys_are_keys():
  state = created(PARAMS, rng=jax.random.PRNGKey(0))
  assert stepped(lambda params, x, rng: loss_fn(params, x), state)[1].applied


def test_a_step_says_what_it_is_of():
  step = mpjax.make_train_step(loss_fn, TX, policy="mixed_float16")
  assert repr(step) == "<TrainStep of loss_fn under mixed_float16>"
  assert repr(mpjax.make_train_step(loss_fn, TX)) == "<TrainStep of loss_fn>"
  assert repr(nnx_step) == "<TrainStep of <lambda>>"
