"""The models that are compared: Hugging Face's class with seeded random weights, and a prompt with an image."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

POSITIONS = {"medium": 620, "tiny-shapes": 88, "quick": 40}
"""Geometries, and how many positions a prompt has in each."""
_PAD, _IMAGE, _FIRST_TEXT = 0, 5, 6


def hf_config(geometry: str) -> LlavaConfig:
    """The sizes of a geometry; `tiny-shapes` has those of the embedded model."""
    if geometry == "tiny-shapes":
        from hooked_llava.toy.init import build_config

        return build_config()
    if geometry == "medium":  # both towers have the same width and depth; 24 x 24 patches
        return make_config(image_size=336, patch_size=14, d_vision=512, d_model=512, n_layers=8, d_mlp=1376)
    return make_config(image_size=32, patch_size=8, d_vision=32, d_model=32, n_layers=2, d_mlp=64, d_vocab=199)


def make_config(
    *,
    image_size: int,
    patch_size: int,
    d_vision: int,
    d_model: int,
    n_layers: int,
    d_mlp: int,
    d_vocab: int = 32_000,
    n_heads: int = 8,
    n_vision_layers: int | None = None,
    n_vision_heads: int | None = None,
) -> LlavaConfig:
    """A LLaVA-1.5 of those sizes; the vision tower's MLP is four times as wide as its residual stream."""
    vision = CLIPVisionConfig(
        hidden_size=d_vision,
        intermediate_size=4 * d_vision,
        num_hidden_layers=n_vision_layers or n_layers,
        num_attention_heads=n_vision_heads or n_heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=d_vision,
    )
    text = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=d_vocab,
        max_position_embeddings=4096,
        pad_token_id=_PAD,
        tie_word_embeddings=False,
    )
    seq_length = (image_size // patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-2,
        image_seq_length=seq_length,
        image_token_index=_IMAGE,
        tie_word_embeddings=False,
    )
    config.pad_token_id = _PAD
    return config


def _vision(config: LlavaConfig) -> PreTrainedConfig:
    """The vision tower's sizes, which transformers declares as any config or none."""
    assert isinstance(config.vision_config, PreTrainedConfig)
    return config.vision_config


def random_hf_model(config: LlavaConfig, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """Seeded random weights in Hugging Face's class; generation never meets an end token."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.eos_token_id = config.get_text_config().eos_token_id = None
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def random_prompt(config: LlavaConfig, n_positions: int, *, batch: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """Tensors as a processor returns them: one image a row, then text; row i has `i * pad` pads on its left."""
    torch.manual_seed(1)
    text, n_features, image = config.get_text_config(), config.image_seq_length, config.image_token_index
    size = _vision(config).image_size
    ids = torch.randint(_FIRST_TEXT, text.vocab_size, (batch, n_positions))
    ids[ids == image] += 1 if image + 1 < text.vocab_size else -1
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row * pad], ids[row, : row * pad] = 0, text.pad_token_id
        first = row * pad + 1
        ids[row, first : first + n_features] = image
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(batch, 3, size, size)}


def with_attention(model: LlavaForConditionalGeneration, attention: str) -> LlavaForConditionalGeneration:
    """A copy with the same weights and another implementation of attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    return other


def make_bridge(model: LlavaForConditionalGeneration) -> Any:
    """TransformerLens's bridge around this model, which it rewrites in place: give it a copy of its own."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model.set_attn_implementation("eager")  # as TransformerBridge.boot_transformers does
    return build_bridge_from_module(
        model, type(model).__name__, hf_config=model.config, model_name="random-llava"
    ).eval()


def has_nnsight() -> bool:
    """Whether the optional column can be measured."""
    return find_spec("nnsight") is not None


def sizes(config: LlavaConfig, n_positions: int) -> dict[str, int]:
    """The geometry in numbers, for the result file."""
    vision, text = _vision(config), config.get_text_config()
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "image_tokens": config.image_seq_length,
        "positions": n_positions,
        "vision_layers": vision.num_hidden_layers,
        "vision_d_model": vision.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "d_model": text.hidden_size,
        "d_mlp": text.intermediate_size,
        "d_vocab": text.vocab_size,
    }
