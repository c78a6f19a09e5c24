"""Flax models of smaller packages, in Linen and in NNX."""

import importlib
from typing import Any

import numpy as np
from flax import linen as nn
from flax import nnx

from public.model import Built, Public, in_nnx, linen, noise

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 8)).astype(np.int32)
PIXELS = noise(2, 32, 32, 3)


# Linen ----------------------------------------------------------------------------------------


def _nano_moe() -> Built:
  config = importlib.import_module("nano_moe.config").NanoMoEConfig(
    vocab_size=64, n_layers=1, n_heads=4, d_model=32, d_ff=48, block_size=16
  )
  module = importlib.import_module("nano_moe.model").NanoMoE(config)
  return linen(module, TOKENS, deterministic=False, rngs=("dropout",))


def _resnet18() -> Built:
  resnet = importlib.import_module("flaxmodels").ResNet18
  module = resnet(output="logits", pretrained=None, num_classes=10)
  # BatchNorm needs values to normalize: these pictures end as 8 of 2 x 2.
  return linen(module, np.abs(noise(8, 64, 64, 3)))


def _transformer_in_transformer() -> Built:
  tnt = importlib.import_module("transformer_in_transformer_flax")
  config = tnt.TNTConfig(
    num_classes=5,
    depth=1,
    image_size=32,
    inner_dim=8,
    inner_heads=2,
    inner_dim_head=4,
    outer_dim=16,
    outer_heads=2,
    outer_dim_head=8,
  )
  return linen(tnt.TransformerInTransformer(config), PIXELS)


def _long_range(layer: str) -> Any:
  def build() -> Built:
    package = importlib.import_module("long_range_models")
    layers = importlib.import_module(f"long_range_models.{layer.lower()}")
    inner = getattr(layers, f"{layer}Layer")(feature_dim=8, state_dim=8)
    return linen(package.SequenceModel(inner, 64, emb_dim=8), TOKENS)

  return build


def _gated_linear_rnn() -> Built:
  models = importlib.import_module("flax_gated_linear_rnn.language_models.gated_linear_rnn_lm")
  module = models.GatedLinearRNNLM(
    n_layer=1,
    d_model=16,
    d_h=16,
    d_channel_mixing=24,
    eps=1e-5,
    channel_mixing_dropout=0.1,
    time_mixing_dropout=0.1,
    embedding_dropout=0.1,
    input_vocab_size=64,
    output_vocab_size=64,
    max_seq_length=16,
    use_word_embedding=True,
    positional_encoding_mode="sinusoidal",
    use_head=True,
  )
  return linen(module, TOKENS, training=True, rngs=("dropout",))


def _diffusion_transformer(file: str, cls: str, **options: Any) -> Any:
  def build() -> Built:
    models = importlib.import_module(f"flaxdiff.models.{file}")
    module = getattr(models, cls)(
      patch_size=8, emb_features=32, num_layers=1, num_heads=4, **options
    )
    times, prompt = np.array([0.1, 0.7], np.float32), noise(2, 5, 24)
    return linen(module, PIXELS, times, prompt)

  return build


def _equivariant() -> Built:
  e3x = importlib.import_module("e3x")

  class Potential(nn.Module):
    """The energy of a molecule by one step of equivariant message passing."""

    @nn.compact
    def __call__(self, numbers, positions, to, source):
      basis = e3x.nn.basis(
        positions[source] - positions[to],
        num=8,
        max_degree=2,
        radial_fn=e3x.nn.reciprocal_bernstein,
        cutoff_fn=e3x.nn.smooth_cutoff,
      )
      x = e3x.nn.Embed(num_embeddings=20, features=8)(numbers)
      messages = e3x.nn.MessagePass()(x, basis, dst_idx=to, src_idx=source)
      x = e3x.nn.Dense(8)(e3x.nn.silu(e3x.nn.Dense(8)(e3x.nn.add(x, messages))))
      x = e3x.nn.change_max_degree_or_type(x, max_degree=0, include_pseudotensors=False)
      return nn.Dense(1, name="head")(x).sum()

  to, source = importlib.import_module("e3x.ops").sparse_pairwise_indices(5)
  numbers, positions = np.array([1, 6, 8, 1, 7], np.int32), noise(5, 3)
  return linen(Potential(), numbers, positions, to, source)


# NNX ------------------------------------------------------------------------------------------


def _mamba2_text() -> Built:
  mamba2 = importlib.import_module("mamba2_jax.modeling")
  config = mamba2.Mamba2Config(
    vocab_size=64, hidden_size=32, state_size=8, head_dim=16, chunk_size=4, num_hidden_layers=1
  )
  return in_nnx(mamba2.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), TOKENS)


def _mamba2_forecaster() -> Built:
  mamba2 = importlib.import_module("mamba2_jax.modeling")
  model = mamba2.Mamba2Forecaster(
    3, d_model=32, n_layers=1, d_state=8, headdim=16, chunk_size=4, rngs=nnx.Rngs(0)
  )
  return in_nnx(model, noise(2, 8, 3))


def _graph(cls: str) -> Any:
  def build() -> Built:
    models = importlib.import_module("jraphx.nn.models")
    model = getattr(models, cls)(8, 16, 2, 4, rngs=nnx.Rngs(0))
    edges = np.array([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]], np.int32)
    return in_nnx(model, noise(6, 8), edges)

  return build


def _actor_critic() -> Built:
  factories = importlib.import_module("nnx_ppo.networks.factories")
  model = factories.make_mlp_actor_critic(8, 2, [16, 16], [16], nnx.Rngs(0))
  states = model.initialize_state(4)
  return in_nnx(model, states, noise(4, 8))


MODELS: tuple[Public, ...] = (
  Public("NanoMoE", "nano-moe-jax", ("nano_moe",), "mixture of experts", _nano_moe, "block_0"),
  Public(
    "ResNet-18",
    "flaxmodels",
    ("flaxmodels",),
    "vision",
    _resnet18,
    "Dense_0",
    has_dtype=True,
    offset=2.0,
  ),
  Public(
    "Transformer in Transformer",
    "transformer-in-transformer-flax",
    ("transformer_in_transformer_flax",),
    "vision",
    _transformer_in_transformer,
    "Encoder_0",
  ),
  Public("LRU", "long-range-models", ("long_range_models",), "text", _long_range("LRU"), "Dense_0"),
  Public("S5", "long-range-models", ("long_range_models",), "text", _long_range("S5"), "Dense_0"),
  Public(
    "Gated linear RNN",
    "flax-gated-linear-rnn",
    ("flax_gated_linear_rnn",),
    "text",
    _gated_linear_rnn,
    "head",
  ),
  Public(
    "DiT",
    "flaxdiff",
    ("flaxdiff.models.simple_dit",),
    "diffusion",
    _diffusion_transformer("simple_dit", "SimpleDiT"),
    "dit_block_0",
    has_dtype=True,
  ),
  Public(
    "MM-DiT",
    "flaxdiff",
    ("flaxdiff.models.simple_mmdit",),
    "diffusion",
    _diffusion_transformer("simple_mmdit", "SimpleMMDiT"),
    "mmdit_block_0",
    has_dtype=True,
  ),
  Public("E(3)-equivariant potential", "e3x", ("e3x",), "molecules", _equivariant, "head"),
  Public("Mamba-2", "mamba2-jax", ("mamba2_jax",), "text", _mamba2_text, "backbone/layers/0"),
  Public(
    "Mamba-2 forecaster",
    "mamba2-jax",
    ("mamba2_jax",),
    "time series",
    _mamba2_forecaster,
    "output_proj",
  ),
  Public("GCN", "jraphx", ("jraphx",), "graphs", _graph("GCN"), "convs/0"),
  Public("GAT", "jraphx", ("jraphx",), "graphs", _graph("GAT"), "convs/0"),
  Public("PPO actor and critic", "nnx-ppo", ("nnx_ppo",), "reinforcement learning", _actor_critic),
)
