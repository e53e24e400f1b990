"""Tiny random LLaVA-NeXT and OneVision models, and prompts about images of any size, as Hugging Face's forward takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.utils import logging

from hooked_llava.loading.onevision import OnevisionProcessor
from hooked_llava.model.llava import HookedLLaVA
from tests.architecture.processors import (
    MAX_TILES,
    PATCH,
    REMAINDER_TILE,
    TILE,
    next_processor,
    onevision_processor,
    pinpoints,
)
from tests.architecture.processors import make_layout as layout_of_kind
from tests.builders import D_VOCAB, IMAGE_TOKEN_ID, PAD_TOKEN_ID, randomise, tiny_hf_config
from tests.fixtures_processor import make_tokenizer

Size = tuple[int, int]
KINDS = ("next", "onevision")
SQUARE, WIDE, TALL = (60, 64), (50, 170), (190, 61)
"""Sizes (height, width) whose layouts differ."""
TILES = {"next": TILE, "onevision": REMAINDER_TILE}
"""Pixels along a tile."""
_PARTS: dict[str, dict[str, Any]] = {
    "next": {"language": "llama", "tower": "clip", "vision_feature_layer": -2},
    "onevision": {"language": "qwen2", "tower": "siglip", "vision_feature_layer": -1},
}


def hf_config(kind: str, **overrides: Any) -> Any:
    """The config of a tiny model of that kind: `language` and `tower` name its parts, others are fields of it."""
    parts = _PARTS[kind] | {name: overrides.pop(name) for name in ("language", "tower") if name in overrides}
    if parts["tower"] != _PARTS[kind]["tower"]:
        parts["vision_feature_layer"] = -3
    sizes = {"n_layers": 2, "n_key_value_heads": 2, "image_size": TILES[kind], "patch_size": PATCH}
    plain = tiny_hf_config(**parts, **sizes, text={"max_position_embeddings": 1024})
    fields: dict[str, Any] = {
        "text_config": plain.text_config,
        "vision_config": plain.vision_config,
        "vision_feature_layer": plain.vision_feature_layer,
        "vision_feature_select_strategy": plain.vision_feature_select_strategy,
        "image_token_id": IMAGE_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "image_grid_pinpoints": pinpoints(TILES[kind]),
    }
    if kind == "next":
        return LlavaNextConfig(**{**fields, **overrides})
    return LlavaOnevisionConfig(**{**fields, "vision_aspect_ratio": f"anyres_max_{MAX_TILES}", **overrides})


def make_hf(kind: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A tiny random model in eval mode whose every weight matters; keywords as in `hf_config`."""
    logging.disable_progress_bar()
    built = {"next": LlavaNextForConditionalGeneration, "onevision": LlavaOnevisionForConditionalGeneration}[kind]
    model = built(hf_config(kind, **config)).eval()
    randomise(model, seed)
    return model.to(dtype).requires_grad_(False)


@cache
def both(kind: str, language: str | None = None, tower: str | None = None) -> tuple[HookedLLaVA, Any]:
    """Our model and Hugging Face's on the same weights, shared by all tests: read them, do not change them."""
    parts = {"language": language, "tower": tower}
    theirs = make_hf(kind, **{name: part for name, part in parts.items() if part is not None})
    return HookedLLaVA.from_hf(theirs), theirs


def make_prompts(
    kind: str, *prompts: Sequence[Size], n_text: int = 5, padding_side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """A batch of prompts about random images of these sizes (height, width), as a processor returns it.

    The second image of a prompt follows the first at once, later ones after a word. What a processor appends to images of
    fewer tiles than others is not zero here, as it must not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, layouts = [], []
    for sizes in prompts:
        several = kind == "onevision" and len(sizes) > 1
        own = [layout_of_kind("several" if several else kind, *size, TILES[kind]) for size in sizes]
        words = torch.randint(IMAGE_TOKEN_ID + 1, D_VOCAB, (n_text + len(own),), generator=generator).tolist()
        images = [[IMAGE_TOKEN_ID] * layout.n_features + [words.pop()] * (i != 0) for i, layout in enumerate(own)]
        rows.append([words.pop(), *chain.from_iterable(images), *words])
        layouts += own
    longest = max(map(len, rows))
    pads = [[PAD_TOKEN_ID] * (longest - len(row)) for row in rows]
    left = padding_side == "left"
    fields = {
        "input_ids": torch.tensor([[*p, *r] if left else [*r, *p] for p, r in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor(
            [
                [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
                for p, r in zip(pads, rows, strict=True)
            ]
        ),
    }
    if layouts:
        shape = len(layouts), max(layout.n_tiles for layout in layouts), 3, TILES[kind], TILES[kind]
        fields["pixel_values"] = torch.randn(shape, generator=generator)
        fields["image_sizes"] = torch.tensor(list(chain.from_iterable(prompts)))
        if kind == "onevision":
            fields["batch_num_images"] = torch.tensor([len(sizes) for sizes in prompts if sizes])
    return fields


def processor_of(kind: str) -> Any:
    """A processor for models of that kind, with real image processing and a small tokenizer."""
    if kind == "onevision":
        return OnevisionProcessor(onevision_processor(TILES[kind]), make_tokenizer())
    return LlavaNextProcessor(
        next_processor(TILES[kind]), make_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


@cache
def with_processor(kind: str) -> HookedLLaVA:
    """The shared model with a processor of its own: read it, do not change it."""
    return HookedLLaVA.from_hf(both(kind)[1], processor_of(kind))


def drawn(*sizes: Size, seed: int = 0) -> list[Image.Image]:
    """Random images of these sizes."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
