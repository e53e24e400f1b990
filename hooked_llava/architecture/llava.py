"""The outer models that load, which join a vision tower, a projector and a language model: their tiles and their tensors' names.

Hugging Face has moved the parts around over the years: the language tower under `language_model.model.` (hub checkpoints,
and what transformers 5 still writes) or `model.language_model.` (in memory), the head as `language_model.lm_head` or
`lm_head`, the CLIP tower with and without `vision_model.`. All of them are read; the first of each is written.
A new one is an entry of `LLAVA_MODELS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hooked_llava.architecture.sizes import ProjectorConfig
from hooked_llava.architecture.tiles import Tiling
from hooked_llava.checks import one_of
from hooked_llava.errors import ConfigError


def _next_tiling(hf_config: Any) -> Tiling:
    return Tiling(pinpoints=tuple((int(height), int(width)) for height, width in hf_config.image_grid_pinpoints))


def _onevision_tiling(hf_config: Any) -> Tiling:
    ratio = hf_config.vision_aspect_ratio
    number = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if number is None:
        raise ConfigError(f"vision_aspect_ratio is {ratio!r}; expected 'anyres_max_' and a number of tiles.")
    return replace(_next_tiling(hf_config), max_tiles=int(number[1]))


@dataclass(frozen=True)
class LlavaKind:
    """One kind of outer model. Prefixes are those below `model.`, if that is there; the one that is written comes first.

    Attributes:
        architecture (str): The class in transformers.
        title (str): What it is called.
        examples (str): Models of that kind.
        projector_names (Mapping[str, str]): Names of the projector's tensors: Hugging Face's and ours.
        head (tuple[str, ...]): Prefixes of `lm_head`.
        language (tuple[str, ...]): Prefixes of the language model's tensors.
        vision (tuple[str, ...]): Prefixes of the vision tower's tensors.
        projector (tuple[str, ...]): Prefixes of the projector's tensors.
        image_fields (tuple[str, ...]): What its forward pass in transformers takes of what a processor makes of images.
        tiling (Callable[[Any], Tiling] | None): How images become tiles, from the Hugging Face config, joined with an
            `image_newline`; None where an image is one tile.
    """

    architecture: str
    title: str
    examples: str
    projector_names: Mapping[str, str]
    head: tuple[str, ...] = ("language_model.", "")
    language: tuple[str, ...] = ("language_model.model.", "language_model.")
    vision: tuple[str, ...] = ("vision_tower.", "vision_tower.vision_model.")
    projector: tuple[str, ...] = ("multi_modal_projector.",)
    image_fields: tuple[str, ...] = ("pixel_values",)
    tiling: Callable[[Any], Tiling] | None = None


_PROJECTOR_NAMES = {"linear_1": "linear_in", "linear_2": "linear_out"}

LLAVA_MODELS = {
    "llava": LlavaKind("LlavaForConditionalGeneration", "LLaVA", "LLaVA-1.5 7B and 13B, BakLLaVA", _PROJECTOR_NAMES),
    "llava_next": LlavaKind(
        "LlavaNextForConditionalGeneration",
        "LLaVA-NeXT",
        "LLaVA-1.6 Vicuna and Mistral, llama3-llava-next-8b",
        _PROJECTOR_NAMES,
        image_fields=("pixel_values", "image_sizes"),
        tiling=_next_tiling,
    ),
    "llava_onevision": LlavaKind(
        "LlavaOnevisionForConditionalGeneration",
        "LLaVA-OneVision",
        "LLaVA-OneVision 0.5B, 7B and 72B",
        _PROJECTOR_NAMES,
        image_fields=("pixel_values", "image_sizes", "batch_num_images"),
        tiling=_onevision_tiling,
    ),
}
"""Every outer model that loads, by the `model_type` of its Hugging Face config."""


def llava_kind(model_type: str) -> LlavaKind:
    """The kind of outer model of that Hugging Face name; raises `ConfigError` for one that is not built here.

    >>> llava_kind("llava").architecture
    'LlavaForConditionalGeneration'
    """
    says = f"The config describes a model of type {model_type!r}, which is not built here."
    return LLAVA_MODELS[one_of(model_type, LLAVA_MODELS, "model_type", says=says, error=ConfigError)]


def read_projector(hf_config: Any, *, d_in: int, d_model: int) -> ProjectorConfig:
    """The config of the projector between towers of these widths, from the outer Hugging Face config.

    >>> from transformers import LlavaConfig
    >>> read_projector(LlavaConfig(), d_in=1024, d_model=4096).act_fn
    'gelu'
    """
    return ProjectorConfig(
        d_in=d_in, d_model=d_model, act_fn=hf_config.projector_hidden_act, bias=hf_config.multimodal_projector_bias
    )
