"""Haiku, Equinox and what is built on them: functions, through plain `autocast`."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from public.model import Built, Public, compiled, function, noise

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 8)).astype(np.int32)
PIXELS = noise(2, 16, 16, 3)
SERIES = noise(2, 8, 8)


# Haiku ----------------------------------------------------------------------------------------


def _haiku(fn: Any, *inputs: Any) -> Built:
  """A Haiku function without state."""
  hk = importlib.import_module("haiku")
  transformed = hk.without_apply_rng(hk.transform(fn))
  params = compiled(transformed.init, jax.random.key(0), *inputs)
  return function(transformed.apply, params, *inputs)


def _haiku_transformer() -> Built:
  hk = importlib.import_module("haiku")

  def model(tokens: Any) -> Any:
    x = hk.Embed(64, 32, name="embed")(tokens)
    mask = jnp.tril(jnp.ones((1, 1, 8, 8), bool))
    norm = hk.LayerNorm(-1, True, True)(x)
    attention = hk.MultiHeadAttention(4, 8, w_init=hk.initializers.VarianceScaling(), name="attn")
    x = x + attention(norm, norm, norm, mask=mask)
    x = x + hk.nets.MLP([64, 32], activation=jax.nn.gelu, name="mlp")(hk.RMSNorm(-1)(x))
    return hk.Linear(64, name="head")(x)

  return _haiku(model, TOKENS)


def _haiku_recurrent() -> Built:
  hk = importlib.import_module("haiku")

  def model(x: Any) -> Any:
    core = hk.DeepRNN([hk.LSTM(16, name="lstm"), jnp.tanh, hk.GRU(16, name="gru")])
    hidden, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.BatchApply(hk.Linear(4, name="head"))(hidden)

  return _haiku(model, SERIES)


def _haiku_resnet() -> Built:
  """Haiku's own ResNet with BatchNorm; its statistics are an argument, as data."""
  hk = importlib.import_module("haiku")

  def model(images: Any) -> Any:
    net = hk.nets.ResNet(
      [1, 1, 1, 1],
      10,
      bottleneck=False,
      channels_per_group=(8, 8, 16, 16),
      use_projection=(True, True, True, True),
    )
    return net(images, is_training=True)

  images = noise(8, 32, 32, 3)
  transformed = hk.without_apply_rng(hk.transform_with_state(model))
  params, state = compiled(transformed.init, jax.random.key(0), images)
  return function(transformed.apply, params, state, images)


def _haiku_scan() -> Built:
  """Haiku's lifted scan over layers, each rematerialized."""
  hk = importlib.import_module("haiku")

  def model(x: Any) -> Any:
    def block(x: Any) -> Any:
      return x + hk.nets.MLP([16, 8], name="mlp")(hk.LayerNorm(-1, True, True)(x))

    return hk.layer_stack(3)(hk.remat(block))(x)

  return _haiku(model, SERIES)


# Equinox --------------------------------------------------------------------------------------


def _equinox(model: Any, *inputs: Any, call: Any = None) -> Built:
  """An Equinox module: its arrays are the parameters, the rest is static."""
  eqx = importlib.import_module("equinox")
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def apply(params: Any, *inputs: Any) -> Any:
    model = eqx.combine(params, static)
    return (call or type(model).__call__)(model, *inputs)

  return function(jax.vmap(apply, in_axes=(None, *(0 for _ in inputs))), params, *inputs)


def _equinox_mlp() -> Built:
  eqx = importlib.import_module("equinox")
  return _equinox(eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0)), SERIES[0])


def _equinox_attention() -> Built:
  eqx = importlib.import_module("equinox")
  keys = jax.random.split(jax.random.key(0), 3)
  modules = (
    eqx.nn.LayerNorm(8),
    eqx.nn.MultiheadAttention(2, 8, key=keys[0]),
    eqx.nn.RotaryPositionalEmbedding(8),
    eqx.nn.MLP(8, 8, 16, 1, key=keys[1]),
  )

  def call(modules: Any, x: Any) -> Any:
    norm, attention, rotate, mlp = modules
    y = rotate(jax.vmap(norm)(x))
    x = x + attention(y, y, y, mask=jnp.tril(jnp.ones((8, 8), bool)))
    return x + jax.vmap(mlp)(jax.vmap(norm)(x))

  return _equinox(modules, SERIES, call=call)


def _equinox_convolutions() -> Built:
  eqx = importlib.import_module("equinox")
  keys = jax.random.split(jax.random.key(0), 3)
  model = eqx.nn.Sequential(
    [
      eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
      eqx.nn.GroupNorm(2, 8),
      eqx.nn.Lambda(jax.nn.silu),
      eqx.nn.MaxPool2d(2, 2),
      eqx.nn.ConvTranspose2d(8, 4, 2, 2, key=keys[1]),
      eqx.nn.Lambda(jnp.ravel),
      eqx.nn.Linear(4 * 16 * 16, 10, key=keys[2]),
    ]
  )
  return _equinox(model, PIXELS.transpose(0, 3, 1, 2))


def _equinox_recurrent() -> Built:
  eqx = importlib.import_module("equinox")
  keys = jax.random.split(jax.random.key(0), 2)
  modules = (eqx.nn.LSTMCell(8, 16, key=keys[0]), eqx.nn.Linear(16, 4, key=keys[1]))

  def call(modules: Any, x: Any) -> Any:
    cell, head = modules
    state = (jnp.zeros(16), jnp.zeros(16))
    (hidden, _), _ = jax.lax.scan(lambda state, x: (cell(x, state), None), state, x)
    return head(hidden)

  return _equinox(modules, SERIES, call=call)


def _normalizing_flow() -> Built:
  eqx, flows, distributions, bijections, paramax = map(
    importlib.import_module,
    ("equinox", "flowjax.flows", "flowjax.distributions", "flowjax.bijections", "paramax"),
  )
  flow = flows.masked_autoregressive_flow(
    jax.random.key(0),
    base_dist=distributions.Normal(jnp.zeros(4)),
    transformer=bijections.RationalQuadraticSpline(knots=4, interval=3),
    flow_layers=2,
    nn_width=16,
  )
  params, static = eqx.partition(
    flow, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable)
  )

  def log_prob(params: Any, x: Any) -> Any:
    return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

  return function(log_prob, params, SERIES[:, 0, :4])


def _neural_ode(adjoint: str) -> Built:
  """A batch of initial values, each with steps of its own size, and diffrax's way to gradients."""
  eqx, diffrax = importlib.import_module("equinox"), importlib.import_module("diffrax")
  mlp = eqx.nn.MLP(4, 4, 16, 2, activation=jnp.tanh, key=jax.random.key(0))
  field, static = eqx.partition(mlp, eqx.is_inexact_array)

  def solve(params: Any, start: Any) -> Any:
    term = diffrax.ODETerm(lambda t, y, params: eqx.combine(params, static)(y))
    times, control = jnp.linspace(0, 1, 5), diffrax.PIDController(1e-3, 1e-3)
    solution = diffrax.diffeqsolve(
      term,
      diffrax.Tsit5(),
      0.0,
      1.0,
      0.1,
      start,
      params,
      saveat=diffrax.SaveAt(ts=times),
      stepsize_controller=control,
      adjoint=getattr(diffrax, adjoint)(),
      max_steps=64,
    )
    return solution.ys

  return function(jax.vmap(solve, (None, 0)), field, noise(3, 4))


# Distributions ----------------------------------------------------------------------------------


def _actor_critic() -> Built:
  """PureJaxRL's actor and critic: a Linen module that returns a distribution of distrax."""
  distrax = importlib.import_module("distrax")

  class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
      actor = nn.tanh(nn.Dense(16, name="actor")(x))
      mean = nn.Dense(2, name="mean")(nn.tanh(nn.Dense(16, name="actor_2")(actor)))
      spread = self.param("log_std", nn.initializers.zeros, (2,))
      critic = nn.tanh(nn.Dense(16, name="critic")(x))
      value = nn.Dense(1, name="value")(nn.tanh(nn.Dense(16, name="critic_2")(critic)))
      return distrax.MultivariateNormalDiag(mean, jnp.exp(spread)), value[..., 0]

  module, seen, done = ActorCritic(), noise(8, 6), noise(8, 2)
  params = compiled(lambda x: module.init(jax.random.key(0), x)["params"], seen)

  def policy(params: Any, seen: Any, done: Any) -> Any:
    choice, value = module.apply({"params": params}, seen)
    return choice.log_prob(done), choice.entropy(), value

  return function(policy, params, seen, done)


# Graphs -----------------------------------------------------------------------------------------


def _graph_network() -> Built:
  """A graph network of jraph with Haiku's perceptrons."""
  hk, jraph = importlib.import_module("haiku"), importlib.import_module("jraph")

  def model(nodes: Any, edges: Any, senders: Any, receivers: Any) -> Any:
    graph = jraph.GraphsTuple(
      nodes=nodes,
      edges=edges,
      senders=senders,
      receivers=receivers,
      globals=jnp.ones((1, 4)),
      n_node=jnp.array([6]),
      n_edge=jnp.array([8]),
    )
    network = jraph.GraphNetwork(
      update_edge_fn=jraph.concatenated_args(hk.nets.MLP([8, 8], name="edges")),
      update_node_fn=jraph.concatenated_args(hk.nets.MLP([8, 8], name="nodes")),
      update_global_fn=jraph.concatenated_args(hk.nets.MLP([8, 1], name="globals")),
    )
    out = network(graph)
    return out.nodes, out.globals

  ends = np.array([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]], np.int32)
  nodes, edges = noise(6, 4), noise(8, 4)
  return _haiku(model, nodes, edges, *ends)


def _of_haiku(name: str, build: Any, rule: str, **options: Any) -> Public:
  return Public(name, "dm-haiku", ("haiku",), "functions", build, rule, **options)


def _of_equinox(name: str, build: Any, rule: str | None) -> Public:
  return Public(name, "equinox", ("equinox",), "functions", build, rule)


def _of_diffrax(name: str, adjoint: str) -> Public:
  build = functools.partial(_neural_ode, adjoint)
  return Public(name, "diffrax", ("diffrax", "equinox"), "differential equations", build)


MODELS: tuple[Public, ...] = (
  _of_haiku("Haiku transformer", _haiku_transformer, "attn"),
  _of_haiku("Haiku LSTM and GRU", _haiku_recurrent, "head"),
  _of_haiku("Haiku ResNet", _haiku_resnet, "res_net/logits", near=8.0, offset=2.0),
  _of_haiku("Haiku layer stack", _haiku_scan, "mlp/linear_0"),
  _of_equinox("Equinox MLP", _equinox_mlp, None),
  _of_equinox("Equinox transformer", _equinox_attention, "eqx.nn.MultiheadAttention"),
  _of_equinox("Equinox convolutions", _equinox_convolutions, ".*/?eqx.nn.Linear"),
  _of_equinox("Equinox LSTM", _equinox_recurrent, "eqx.nn.Linear"),
  Public("Autoregressive flow", "flowjax", ("flowjax",), "functions", _normalizing_flow),
  _of_diffrax("Neural ODE", "RecursiveCheckpointAdjoint"),
  _of_diffrax("Neural ODE, adjoint backwards in time", "BacksolveAdjoint"),
  Public(
    "Actor and critic",
    "distrax",
    ("distrax",),
    "reinforcement learning",
    _actor_critic,
    "ActorCritic/actor",
  ),
  Public("Graph network", "jraph", ("jraph", "haiku"), "graphs", _graph_network, "nodes"),
)
