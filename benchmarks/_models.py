"""The models that are compared: Hugging Face's class with seeded random weights, and a prompt with an image."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.layouts import layout_of
from hooked_llava.architecture.llava import LLAVA_MODELS

Size = tuple[int, int]
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


def _vision(config: Any) -> PreTrainedConfig:
    """The vision tower's sizes, which transformers declares as any config or none."""
    assert isinstance(config.vision_config, PreTrainedConfig)
    return config.vision_config


def random_hf_model(
    config: Any, attention: str = "sdpa", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Seeded random weights in Hugging Face's class, made where they stay; generation never meets an end token."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.eos_token_id = config.get_text_config().eos_token_id = None
    config._attn_implementation = attention
    built = getattr(transformers, LLAVA_MODELS[config.model_type].architecture)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = built(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    model.generation_config.eos_token_id = None
    return model


def image_positions(config: Any, size: Size | None = None) -> tuple[int, int]:
    """Positions and tiles of an image of that (height, width), which matters where images are cut into tiles."""
    if LLAVA_MODELS[config.model_type].tiling is None:
        return config.image_seq_length, 1
    height, width = size or 2 * (_vision(config).image_size,)
    layout = layout_of(LLaVAConfig.from_hf(config), None, height=height, width=width)
    return layout.n_features, layout.n_tiles


def random_prompt(
    config: Any, n_positions: int, *, batch: int = 1, pad: int = 0, size: Size | None = None
) -> dict[str, Tensor]:
    """Tensors as a processor returns them: one image a row, then text; row i has `i * pad` pads on its left."""
    torch.manual_seed(1)
    text, image, side = config.get_text_config(), config.image_token_index, _vision(config).image_size
    n_features, n_tiles = image_positions(config, size)
    ids = torch.randint(_FIRST_TEXT, text.vocab_size, (batch, n_positions))
    ids[ids == image] += 1 if image + 1 < text.vocab_size else -1
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row * pad], ids[row, : row * pad] = 0, config.pad_token_id
        first = row * pad + 1
        ids[row, first : first + n_features] = image
    prompt = {"input_ids": ids, "attention_mask": mask}
    if LLAVA_MODELS[config.model_type].tiling is None:
        return {**prompt, "pixel_values": torch.randn(batch, 3, side, side)}
    pixels = torch.randn(batch, n_tiles, 3, side, side)
    return {**prompt, "pixel_values": pixels, "image_sizes": torch.tensor([size or (side, side)] * batch)}


def with_attention(model: Any, attention: str) -> Any:
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


def sizes(config: Any, n_positions: int, size: Size | None = None) -> dict[str, int]:
    """The geometry in numbers, for the result file."""
    vision, text = _vision(config), config.get_text_config()
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "image_tokens": image_positions(config, size)[0],
        "positions": n_positions,
        "vision_layers": vision.num_hidden_layers,
        "vision_d_model": vision.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "d_model": text.hidden_size,
        "d_mlp": text.intermediate_size,
        "d_vocab": text.vocab_size,
    }
