"""The sizes of `tiny-shapes-next`, and an initialisation from the weights of `tiny-shapes`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import llava_next_layout
from hooked_llava.architecture.tiles import best_resolution
from hooked_llava.loading.embedded import embedded_folder
from hooked_llava.toy.objects import PATCH_SIZE
from hooked_llava.toy.processor import CHAT_TEMPLATE, build_tokenizer, vocabulary
from hooked_llava.toy.wide_questions import NUMBERS, WIDE_WORDS

TILE = 48
PINPOINTS = ((96, 96), (48, 96), (96, 48), (48, 144), (144, 48))
"""Heights and widths of canvases that are cut into tiles."""
_GRID = TILE // PATCH_SIZE
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def wide_vocabulary() -> dict[str, int]:
    """The words of `tiny-shapes`, with the same ids, and after them those of the new questions."""
    return vocabulary(WIDE_WORDS)


def layout_of(size: tuple[int, int]) -> ImageLayout:
    """How an image (width, height) stands in a prompt."""
    width, height = size
    return llava_next_layout((height, width), tile_size=TILE, patch_size=PATCH_SIZE, pinpoints=PINPOINTS)


def canvas_of(size: tuple[int, int]) -> tuple[int, int]:
    """The canvas (width, height) of an image (width, height), in whose middle it lies at its own size."""
    width, height = size
    canvas_height, canvas_width = best_resolution((height, width), PINPOINTS)
    return canvas_width, canvas_height


def build_wide_config(plain: LlavaForConditionalGeneration) -> LlavaNextConfig:
    """The configuration of `tiny-shapes`, but for tiles of 48 pixels and more words."""
    vision, text = plain.model.vision_tower.config.to_dict(), plain.config.get_text_config()
    text.vocab_size = len(wide_vocabulary())
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**{**vision, "image_size": TILE}),
        text_config=text,
        image_token_index=plain.config.image_token_id,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
        image_seq_length=_GRID**2,
        vision_feature_layer=plain.config.vision_feature_layer,
        vision_feature_select_strategy=plain.config.vision_feature_select_strategy,
        tie_word_embeddings=False,
        **{name: getattr(plain.config, name) for name in _SPECIAL},
    )


@torch.no_grad()
def build_wide_model(seed: int) -> LlavaNextForConditionalGeneration:
    """A new model with the weights of `tiny-shapes`; what that does not have is seeded.

    The vision tower keeps the position embeddings of the middle 6 x 6 of its 8 x 8 patches.
    """
    folder = embedded_folder("tiny-shapes")
    plain = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    weights = dict(plain.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(build_wide_config(plain)).float()
        new = _new_words(weights["model.language_model.embed_tokens.weight"])
        newline = new.std() * torch.randn(new.shape[1])
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], new + weights[name].mean(0)])
    for name in [n for n in weights if n.endswith("position_embedding.weight")]:
        weights[name] = _middle_positions(weights[name])
    weights["model.image_newline"] = weights["model.language_model.embed_tokens.weight"].mean(0) + newline
    model.load_state_dict({n: w for n, w in weights.items() if not n.endswith("position_ids")}, strict=True)
    model.generation_config.update(**{name: getattr(model.config, name) for name in _SPECIAL})
    return model


def _new_words(embed: Tensor) -> Tensor:
    """Embeddings of the new words without what all words share: random, of the usual length; `Two` is near `two`."""
    vocab, old = wide_vocabulary(), len(embed)
    new = torch.randn(len(vocab) - old, embed.shape[1]) * (embed - embed.mean(0)).std()
    for word in NUMBERS:
        lower, capital = vocab[word] - old, vocab[word.capitalize()] - old
        new[capital] = math.sqrt(0.5) * (new[lower] + new[capital])
    return new


def _middle_positions(positions: Tensor) -> Tensor:
    """Position embeddings of the middle patches of a larger square, after that of the class token."""
    side = math.isqrt(len(positions) - 1)
    first = (side - _GRID) // 2
    square = positions[1:].unflatten(0, (side, side))[first : first + _GRID, first : first + _GRID]
    return torch.cat([positions[:1], square.flatten(0, 1)])


def build_wide_processor() -> LlavaNextProcessor:
    """The processor saved with the weights."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(wide_vocabulary()),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
