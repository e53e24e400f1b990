"""The config of a whole model: the sizes of its parts, read from the checkpoint's config and never assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hooked_llava.architecture.language import read_language
from hooked_llava.architecture.llava import llava_kind, read_projector
from hooked_llava.architecture.sizes import LanguageConfig, ProjectorConfig, VisionConfig
from hooked_llava.architecture.tiles import Tiling
from hooked_llava.architecture.vision import read_vision
from hooked_llava.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class LLaVAConfig:
    """The three parts together, and how an image enters the prompt.

    Attributes:
        model_type (str): The kind of the whole, by its Hugging Face name: an entry of `llava.LLAVA_MODELS`.
        vision (VisionConfig): Sizes and choices of the vision tower.
        projector (ProjectorConfig): Of the projector.
        language (LanguageConfig): Of the language tower.
        image_token_id (int): Token id whose positions are overwritten by image embeddings.
        pad_token_id (int | None): Token id that fills up short rows of a batch, if the checkpoint names one.
        eos_token_ids (tuple[int, ...]): Token ids that end an answer.
        tiling (Tiling | None): How images of any resolution are cut into tiles; None for LLaVA-1.5, where an image is one
            tile.
        model_name (str): Where the weights came from, for results and errors.
    """

    model_type: str
    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    image_token_id: int
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tiling: Tiling | None = None
    model_name: str = "llava"

    @classmethod
    def from_hf(cls, hf_config: PreTrainedConfig, *, model_name: str | None = None) -> LLaVAConfig:
        """Read the Hugging Face config of a LLaVA model; raises `ConfigError` for an architecture this library does not build.

        >>> from transformers import LlavaConfig
        >>> LLaVAConfig.from_hf(LlavaConfig()).vision.patch_grid
        (24, 24)
        """
        kind = llava_kind(hf_config.model_type)
        language = read_language(hf_config.text_config, tied=bool(hf_config.tie_word_embeddings))
        vision = read_vision(
            hf_config.vision_config,
            layers=hf_config.vision_feature_layer,
            strategy=hf_config.vision_feature_select_strategy,
        )
        tiling = None if kind.tiling is None else kind.tiling(hf_config)
        if tiling is not None and vision.n_features != vision.n_patches:
            raise ConfigError(
                f"vision_feature_select_strategy={hf_config.vision_feature_select_strategy!r} gives {vision.n_features} features "
                f"for a tile of {vision.n_patches} patches, which make no grid: a {kind.architecture} cannot join its tiles "
                "then (transformers fails, or drops a patch). Expected 'default' for CLIP, which drops the class token."
            )
        return cls(
            model_type=hf_config.model_type,
            vision=vision,
            projector=read_projector(hf_config, d_in=vision.d_features, d_model=language.d_model),
            language=language,
            image_token_id=hf_config.image_token_id,
            pad_token_id=_first_not_none(hf_config, "pad_token_id"),
            eos_token_ids=_token_ids(_first_not_none(hf_config, "eos_token_id")),
            tiling=tiling,
            model_name=model_name or getattr(hf_config, "_name_or_path", "") or "llava",
        )


def _first_not_none(hf_config: Any, name: str) -> Any:
    """A field of the text config or else of the outer config: checkpoints differ in where they put token ids."""
    value = getattr(hf_config.text_config, name, None)
    return value if value is not None else getattr(hf_config, name, None)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
