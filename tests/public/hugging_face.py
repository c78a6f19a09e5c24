"""Flax models of transformers (until its version 5) and diffusers, built from configurations."""

import importlib
import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np

from public.model import Built, Public, linen, noise

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 8)).astype(np.int32)
POSITIONS = np.tile(np.arange(8, dtype=np.int32), (2, 1))
MASK = np.where(POSITIONS < 6, 1, 0).astype(np.int32)
PIXELS = noise(2, 16, 16, 3)

INPUTS = {
  "input_ids": TOKENS,
  "attention_mask": MASK,
  "token_type_ids": np.zeros_like(TOKENS),
  "position_ids": POSITIONS,
  "decoder_input_ids": TOKENS,
  "decoder_attention_mask": MASK,
  "decoder_position_ids": POSITIONS,
  "head_mask": None,
  "pixel_values": PIXELS,
  "input_features": noise(2, 80, 16),
  "input_values": noise(2, 120),
  "deterministic": True,
}

TEXT = {
  "vocab_size": 64,
  "hidden_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "max_position_embeddings": 32,
}
VISION = {
  "hidden_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "image_size": 16,
  "patch_size": 4,
}


def _transformers(
  cls: str, config: str, *, omit: tuple[str, ...] = (), inputs: Any = None, **options: Any
) -> Any:
  """A builder of a transformers model: its Linen module, with the inputs that its call names."""

  def build() -> Built:
    transformers = importlib.import_module("transformers")
    settings = getattr(transformers, config)(**options)
    model = getattr(transformers, cls)(settings, _do_init=False)
    accepted = inspect.signature(type(model.module).__call__).parameters
    given = {**INPUTS, **(inputs or {})}
    named = {name: given[name] for name in accepted if name in given and name not in omit}
    return linen(model.module, rngs=("dropout", "indices"), **named)

  return build


def _unet() -> Built:
  unets = importlib.import_module("diffusers.models.unets.unet_2d_condition_flax")
  model = unets.FlaxUNet2DConditionModel(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(32, 32),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
  )
  latents = noise(2, 4, 8, 8)
  prompt = noise(2, 5, 16)
  return linen(model, latents, jnp.array([3, 700]), prompt)


def _autoencoder() -> Built:
  vae = importlib.import_module("diffusers.models.vae_flax")
  model = vae.FlaxAutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    sample_size=16,
  )
  return linen(model, PIXELS.transpose(0, 3, 1, 2), sample_posterior=True, rngs=("gaussian",))


def _of_transformers(name: str, kind: str, build: Any, rule: str, **options: Any) -> Public:
  needs = ("transformers",)
  return Public(name, "transformers", needs, kind, build, rule, has_dtype=True, **options)


def _of_diffusers(name: str, build: Any, rule: str) -> Public:
  needs = ("diffusers", "transformers")
  return Public(name, "diffusers", needs, "diffusion", build, rule, has_dtype=True)


_WHISPER = _transformers(
  "FlaxWhisperForConditionalGeneration",
  "WhisperConfig",
  vocab_size=64,
  d_model=32,
  encoder_layers=1,
  decoder_layers=1,
  encoder_attention_heads=4,
  decoder_attention_heads=4,
  encoder_ffn_dim=48,
  decoder_ffn_dim=48,
  max_source_positions=8,
  max_target_positions=32,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
  decoder_start_token_id=1,
)
_WAV2VEC2 = _transformers(
  "FlaxWav2Vec2ForCTC",
  "Wav2Vec2Config",
  omit=("attention_mask",),
  vocab_size=32,
  hidden_size=32,
  num_hidden_layers=1,
  num_attention_heads=4,
  intermediate_size=48,
  conv_dim=(16, 16),
  conv_stride=(4, 2),
  conv_kernel=(8, 4),
  num_feat_extract_layers=2,
  num_conv_pos_embeddings=8,
  num_conv_pos_embedding_groups=4,
  do_stable_layer_norm=True,
  feat_extract_norm="layer",
  mask_time_prob=0.0,
)
_CLIP = _transformers(
  "FlaxCLIPModel",
  "CLIPConfig",
  text_config=TEXT | {"eos_token_id": 63},
  vision_config=VISION,
  projection_dim=16,
)
_GPT2 = _transformers(
  "FlaxGPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32
)
_BERT = _transformers("FlaxBertForMaskedLM", "BertConfig", inputs={"deterministic": False}, **TEXT)
_ROFORMER = _transformers("FlaxRoFormerForMaskedLM", "RoFormerConfig", **TEXT)
_BIGBIRD = _transformers(
  "FlaxBigBirdForMaskedLM", "BigBirdConfig", block_size=1, num_random_blocks=1, **TEXT
)
_MISTRAL = _transformers("FlaxMistralForCausalLM", "MistralConfig", num_key_value_heads=2, **TEXT)
_VIT = _transformers("FlaxViTForImageClassification", "ViTConfig", **VISION)
_RESNET = _transformers(
  "FlaxResNetForImageClassification",
  "ResNetConfig",
  inputs={"deterministic": False},
  embedding_size=8,
  hidden_sizes=[8, 16],
  depths=[1, 1],
  layer_type="basic",
)

MODELS: tuple[Public, ...] = (
  _of_transformers("BERT", "text", _BERT, "bert/encoder/.*/attention"),
  _of_transformers("RoFormer", "text", _ROFORMER, "roformer/encoder/.*/attention"),
  _of_transformers("BigBird", "text", _BIGBIRD, "bert/encoder/.*/attention"),
  _of_transformers("GPT-2", "text", _GPT2, "transformer/h/0/mlp"),
  _of_transformers("Mistral", "text", _MISTRAL, "model/layers/0/mlp"),
  _of_transformers("ViT", "vision", _VIT, "classifier"),
  _of_transformers("ResNet", "vision", _RESNET, "classifier", offset=2.0),
  _of_transformers("CLIP", "vision and text", _CLIP, "text_model", loss_scale=2.0**4),
  _of_transformers("Wav2Vec2", "audio", _WAV2VEC2, "lm_head"),
  _of_transformers("Whisper", "audio", _WHISPER, "model/encoder"),
  _of_diffusers("Stable Diffusion UNet", _unet, "mid_block"),
  _of_diffusers("Stable Diffusion autoencoder", _autoencoder, "encoder"),
)
