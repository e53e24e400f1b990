"""Real geometries: the sizes of checkpoints on the hub, as configs without their weights, and shrunken for a first look."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from benchmarks._models import Size

TEXT = 43  # tokens of a prompt after its image
_PAD = 0
_CLIP: dict[str, Any] = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
_SIGLIP: dict[str, Any] = {
    "image_size": 384,
    "patch_size": 14,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
_NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_ONEVISION = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
_OUTER: dict[str, Any] = {
    "llava": LlavaConfig,
    "llava_next": LlavaNextConfig,
    "llava_onevision": LlavaOnevisionConfig,
}
_LANGUAGES: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
_TOWERS: dict[str, Any] = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
_SMALL: dict[str, dict[str, int]] = {
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 199},
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "tile": {"image_size": 32, "patch_size": 8},
}


@dataclass(frozen=True)
class Geometry:
    """The sizes of one checkpoint.

    Attributes:
        kind (str): The `model_type` of the outer model.
        language (str): That of the language model.
        text (dict[str, Any]): Fields of its config.
        image_token (int): The id that stands for an image.
        tower (str): The vision tower, "clip" or "siglip".
        vision (dict[str, Any]): Fields of its config.
        tiles (tuple[Size, ...]): Rows and columns of tiles that an image may be cut into; none where it is one tile.
        image (Size): Height and width of the image that is asked about.
    """

    kind: str
    language: str
    text: dict[str, Any]
    image_token: int
    tower: str = "clip"
    vision: dict[str, Any] = field(default_factory=lambda: _CLIP)
    tiles: tuple[Size, ...] = ()
    image: Size = (336, 336)

    def config(self) -> Any:
        """The Hugging Face config."""
        text = {"pad_token_id": _PAD, "tie_word_embeddings": False, **self.text}
        vision = _TOWERS[self.tower](**self.vision)
        clip = self.tower == "clip"
        fields: dict[str, Any] = {
            "text_config": _LANGUAGES[self.language](**text),
            "vision_config": vision,
            "vision_feature_layer": -2 if clip else -1,
            "vision_feature_select_strategy": "default" if clip else "full",
            "image_token_index": self.image_token,
            "tie_word_embeddings": text["tie_word_embeddings"],
        }
        side = vision.image_size
        if self.tiles:
            fields["image_grid_pinpoints"] = [[rows * side, columns * side] for rows, columns in self.tiles]
        else:
            fields["image_seq_length"] = (side // vision.patch_size) ** 2
        config = _OUTER[self.kind](**fields)
        config.pad_token_id = _PAD
        return config

    def small(self) -> Geometry:
        """The same kind of model about the same kind of image, with seconds' worth of work on a CPU."""
        grouped = self.text["num_key_value_heads"] < self.text["num_attention_heads"]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if grouped else 4}
        scale = _SMALL["tile"]["image_size"] / self.vision["image_size"]
        height, width = (round(side * scale) for side in self.image)
        return replace(
            self,
            text={**self.text, **_SMALL["text"], **heads},
            vision={**self.vision, **_SMALL["vision"], **_SMALL["tile"]},
            image_token=5,
            image=(height, width),
        )


_WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "rope_theta": 1e6}
_OF_ONEVISION: dict[str, Any] = {
    "image_token": 151_646,
    "tower": "siglip",
    "vision": _SIGLIP,
    "tiles": _ONEVISION,
    "image": (480, 640),
}
_VICUNA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_064,
    "max_position_embeddings": 4096,
}
GEOMETRIES = {
    "llava-1.5-7b": Geometry("llava", "llama", _VICUNA, 32_000),
    "llava-1.6-mistral-7b": Geometry(
        "llava_next",
        "mistral",
        {**_WIDE, "vocab_size": 32_064, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None},
        32_000,
        tiles=_NEXT,
        image=(480, 640),
    ),
    "llama3-llava-next-8b": Geometry(
        "llava_next",
        "llama",
        {**_WIDE, "vocab_size": 128_320, "max_position_embeddings": 8192, "rope_theta": 5e5},
        128_256,
        tiles=_NEXT,
        image=(480, 640),
    ),
    "onevision-0.5b": Geometry(
        "llava_onevision",
        "qwen2",
        {
            **_QWEN,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 152_000,
            "tie_word_embeddings": True,
        },
        **_OF_ONEVISION,
    ),
    "onevision-7b": Geometry(
        "llava_onevision",
        "qwen2",
        {
            **_QWEN,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_128,
        },
        **_OF_ONEVISION,
    ),
}
"""What `benchmarks.full_size` builds, and `benchmarks.memory_table` counts."""
FOR_COUNTING = {
    **GEOMETRIES,
    "llava-1.5-13b": Geometry(
        "llava",
        "llama",
        {
            **_VICUNA,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
        },
        32_000,
    ),
}
"""And those that are only counted."""
