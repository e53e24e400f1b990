"""The vision towers that load: for each, how its Hugging Face config is read and what its tensors are called there.

A new one is an entry of `VISION_TOWERS`.
"""

from __future__ import annotations

from typing import Any

from hooked_llava.architecture.kinds import TowerKind
from hooked_llava.architecture.sizes import VisionConfig
from hooked_llava.checks import as_index, one_of
from hooked_llava.errors import ConfigError

_NAMES = {
    "embeddings.patch_embedding": "patch_embed",
    "embeddings.position_embedding": "pos_embed",
    "post_layernorm": "ln_post",
    "encoder.layers.{}.layer_norm1": "blocks.{}.ln1",
    "encoder.layers.{}.layer_norm2": "blocks.{}.ln2",
    "encoder.layers.{}.self_attn.q_proj": "blocks.{}.attn.query",
    "encoder.layers.{}.self_attn.k_proj": "blocks.{}.attn.key",
    "encoder.layers.{}.self_attn.v_proj": "blocks.{}.attn.value",
    "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attn.output",
    "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.up",
    "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.down",
}
_CLIP_NAMES = {
    **_NAMES,
    "embeddings.class_embedding": "class_embed",
    "pre_layrnorm": "ln_pre",  # Hugging Face's own typo
}
_SIGLIP_NAMES = {
    **_NAMES,
    "head.probe": "head.probe",
    "head.attention.in_proj_weight": "head.attention.in_proj_weight",
    "head.attention.in_proj_bias": "head.attention.in_proj_bias",
    "head.attention.out_proj": "head.attention.out_proj",
    "head.layernorm": "head.norm",
    "head.mlp.fc1": "head.up",
    "head.mlp.fc2": "head.down",
}


def _clip(vision: Any) -> dict[str, Any]:
    return {"class_token": True, "pre_norm": True, "patch_bias": False, "pooling_head": False}


def _siglip(vision: Any) -> dict[str, Any]:
    return {"class_token": False, "pre_norm": False, "patch_bias": True, "pooling_head": vision.vision_use_head}


VISION_TOWERS = {
    "clip_vision_model": TowerKind("CLIP", "LLaVA-1.5, BakLLaVA", _clip, _CLIP_NAMES),
    "siglip_vision_model": TowerKind("SigLIP", 'models with SigLIP (select strategy "full")', _siglip, _SIGLIP_NAMES),
}
"""Every vision tower that loads, by the `model_type` of its Hugging Face config."""


def read_vision(vision: Any, *, layers: int | list[int], strategy: str) -> VisionConfig:
    """The config of the vision tower from its Hugging Face config, and of which features of it are used.

    Raises `ConfigError` for a vision tower that is not built here and for features that it does not have.

    >>> from transformers import CLIPVisionConfig
    >>> read_vision(CLIPVisionConfig(), layers=-2, strategy="default").feature_layers
    (11,)
    """
    says = f"The vision tower is of type {vision.model_type!r}, which is not built here."
    kind = VISION_TOWERS[one_of(vision.model_type, VISION_TOWERS, "vision_config", says=says, error=ConfigError)]
    if strategy not in ("default", "full"):
        raise ConfigError(
            f"vision_feature_select_strategy is {strategy!r}; expected 'default' (patches only) or 'full' "
            "(class token and patches)."
        )
    own = kind.read(vision)
    if strategy == "default" and not own["class_token"]:
        raise ConfigError(
            f"vision_feature_select_strategy is 'default', which leaves out the first feature, and {kind.title} has no class "
            "token there: transformers would silently drop the first patch. Set it to 'full' in config.json."
        )
    several = isinstance(layers, (list, tuple))
    n_layers = vision.num_hidden_layers
    return VisionConfig(
        model_type=vision.model_type,
        n_layers=n_layers,
        n_heads=vision.num_attention_heads,
        n_key_value_heads=vision.num_attention_heads,
        d_model=vision.hidden_size,
        d_head=vision.hidden_size // vision.num_attention_heads,
        d_mlp=vision.intermediate_size,
        act_fn=vision.hidden_act,
        normalization_type="LN",
        eps=vision.layer_norm_eps,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        causal=False,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        n_channels=vision.num_channels,
        feature_layers=tuple(_feature_layer(i, n_layers) for i in (layers if several else [layers])),
        several_features=several,
        drop_class_token=strategy == "default",
        **own,
    )


def _feature_layer(index: int, n_layers: int) -> int:
    """A Hugging Face hidden-state index (0..n_layers, or negative) as a non-negative one."""
    says = f"vision_feature_layer={index} is out of range for {n_layers} vision layers"
    return as_index(index, n_layers + 1, "vision_feature_layer", says=says, error=ConfigError)
