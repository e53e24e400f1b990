"""Tiny Hugging Face LLaVAs with random weights, for parity with the real implementation."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
)
from transformers.utils import logging

IMAGE_TOKEN_ID = 5
PAD_TOKEN_ID = 0
D_VOCAB = 99
LANGUAGES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "phi": PhiConfig,
    "stablelm": StableLmConfig,
}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def tiny_hf_config(
    *,
    language: str = "llama",
    tower: str = "clip",
    n_heads: int = 4,
    n_key_value_heads: int = 4,
    n_layers: int = 3,
    n_vision_layers: int = 3,
    d_model: int = 48,
    d_head: int | None = None,
    d_mlp: int = 74,
    d_vision: int = 32,
    d_vision_mlp: int = 54,
    image_size: int = 16,
    patch_size: int = 8,
    vision_feature_layer: int | list[int] = -2,
    select_strategy: str | None = None,
    tied: bool = False,
    attention_bias: bool = False,
    projector_bias: bool = True,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **overrides: Any,
) -> LlavaConfig:
    """A config of odd sizes; `text`, `vision` and further keywords override single fields of the three configs."""
    strategy = select_strategy or ("full" if tower == "siglip" else "default")
    n_special = tower == "clip" and strategy == "full"
    text_fields: dict[str, Any] = {
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_key_value_heads,
        "vocab_size": D_VOCAB,
        "max_position_embeddings": 256,
        "attention_bias": attention_bias,
        "tie_word_embeddings": tied,
        "pad_token_id": PAD_TOKEN_ID,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_eps" if language in ("phi", "stablelm") else "rms_norm_eps": 1e-5,
        **({} if d_head is None else {"head_dim": d_head}),
    }
    vision_fields: dict[str, Any] = {
        "hidden_size": d_vision,
        "intermediate_size": d_vision_mlp,
        "num_hidden_layers": n_vision_layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        **({"projection_dim": d_vision} if tower == "clip" else {}),
    }
    fields: dict[str, Any] = {
        "image_token_id": IMAGE_TOKEN_ID,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": strategy,
        "multimodal_projector_bias": projector_bias,
        "image_seq_length": (image_size // patch_size) ** 2 + n_special,
        "pad_token_id": PAD_TOKEN_ID,
        "tie_word_embeddings": tied,
    }
    return LlavaConfig(
        text_config=LANGUAGES[language](**{**text_fields, **(text or {})}),
        vision_config=TOWERS[tower](**{**vision_fields, **(vision or {})}),
        **{**fields, **overrides},
    )


def make_hf_model(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    head_bias: bool = False,
    **config: Any,
) -> LlavaForConditionalGeneration:
    """A tiny random LLaVA in eval mode whose every weight matters; keywords as in `tiny_hf_config`.

    With `head_bias` the unembedding, which has no bias in Hugging Face's LLaVA, is replaced by one that has.
    """
    hf_config = tiny_hf_config(**config)
    hf_config._attn_implementation = attention
    logging.disable_progress_bar()
    model = LlavaForConditionalGeneration(hf_config).eval()
    if head_bias:
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    randomise(model, seed)
    return model.to(dtype).requires_grad_(False)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices with a spread that keeps every layer audible; norm weights around 1 and biases not 0.

    With Hugging Face's own initialisation (spread 0.02, norms exactly 1, biases exactly 0) a layer that is skipped
    or a norm weight that is forgotten would hardly show in the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        elif "embed" in name:
            parameter.copy_(0.5 * noise)
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(1.5 * noise / fan_in**0.5)


def make_prompt(
    model: LlavaForConditionalGeneration, *, n_images: int = 1, n_text: int = 7, batch: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random text with images at its start, as keywords for Hugging Face's forward; every row of the same length."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    vision = config.vision_config
    n_patches = (vision.image_size // vision.patch_size) ** 2
    class_token = vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
    n_features = n_patches + class_token
    text = torch.randint(IMAGE_TOKEN_ID + 1, D_VOCAB, (batch, n_text + n_images), generator=generator)
    image = torch.full((batch, n_features), IMAGE_TOKEN_ID)
    pieces = [text[:, :1]]
    for i in range(n_images):  # a text token between two images, as a prompt has
        pieces += [image, text[:, 1 + i : 2 + i]]
    input_ids = torch.cat([*pieces, text[:, 1 + n_images :]], dim=1)
    prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if n_images:
        shape = (batch * n_images, vision.num_channels, vision.image_size, vision.image_size)
        prompt["pixel_values"] = torch.randn(shape, generator=generator).to(model.dtype)
    return prompt
