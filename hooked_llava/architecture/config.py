"""Sizes and choices of the three parts of a LLaVA model, read from the checkpoint's config and never assumed.

One `TowerConfig` drives the blocks of both towers: what differs between CLIP and Vicuna (norm, gating, rotary
positions, causality, biases) is a field here, not a second block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hooked_llava.checks import as_index
from hooked_llava.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
_VISION_TYPES = ("clip_vision_model",)
_LANGUAGE_TYPES = ("llama",)


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding, already resolved to frequencies."""

    frequencies: tuple[float, ...]
    """Angle in radians that one position turns each pair of dimensions by; length d_head / 2."""
    attention_scaling: float = 1.0
    """Factor on cosine and sine (other than 1 for some long-context scalings, for example YaRN)."""


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What a stack of transformer blocks needs to know."""

    n_layers: int
    """Number of blocks in the checkpoint."""
    n_heads: int
    """Query heads per block."""
    n_key_value_heads: int
    """Key-value heads per block; fewer than n_heads for grouped-query attention."""
    d_model: int
    """Width of the residual stream."""
    d_head: int
    """Width of one attention head."""
    d_mlp: int
    """Number of MLP neurons."""
    act_fn: str
    """Activation function of the MLP, by its Hugging Face name."""
    normalization_type: Literal["RMS", "LN"]
    """RMSNorm (language) or LayerNorm (vision)."""
    eps: float
    """Added to the variance inside the norms."""
    gated_mlp: bool
    """Whether the MLP multiplies the activation by a second linear map (SwiGLU)."""
    qkv_bias: bool
    """Whether queries, keys and values have a bias."""
    out_bias: bool
    """Whether the attention output has a bias."""
    mlp_bias: bool
    """Whether the MLP's linear maps have biases."""
    causal: bool
    """Whether a position sees only itself and earlier positions."""
    rotary: RotaryConfig | None = None
    """Rotary positions, or None for towers that add learned positions at the bottom."""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_key_value_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not a multiple of n_key_value_heads={self.n_key_value_heads}; "
                "every key-value head must serve the same number of query heads. Check the checkpoint's config."
            )

    @property
    def n_layers_run(self) -> int:
        """Blocks that are run."""
        return self.n_layers

    @property
    def attn_only(self) -> bool:
        """Always False; TransformerLens asks."""
        return False

    @property
    def final_rms(self) -> bool:
        """Whether the norm after the last block is an RMSNorm; TransformerLens asks."""
        return self.normalization_type == "RMS"


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    """The CLIP vision tower."""

    image_size: int
    """Side of a square tile in pixels."""
    patch_size: int
    """Side of a square patch in pixels."""
    n_channels: int
    """Colour channels."""
    feature_layers: tuple[int, ...]
    """Non-negative hidden-state indices that the projector reads: 0 is the input of block 0, i the output of block i-1."""
    several_features: bool
    """Whether the checkpoint gives a list of feature layers (their features are concatenated)."""
    drop_class_token: bool
    """Whether the class token is left out of the features (select strategy "default")."""

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in one tile."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def n_patches(self) -> int:
        """Patches in one tile."""
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def n_positions(self) -> int:
        """Positions in the tower: the class token and the patches."""
        return self.patches_along("pos").stop

    @property
    def n_features(self) -> int:
        """Vectors per tile that the projector receives."""
        return self.patches_along("feature").stop

    def patches_along(self, axis: str) -> range:
        """The indices of the patches, row by row, along an axis of a hook's tensor: "patch", "feature", "pos", "query" or "key".

        The axis has no entries after them. Before them comes the class token, except along "patch", and along "feature"
        where the projector does not receive it.
        """
        first = 0 if axis == "patch" or (axis == "feature" and self.drop_class_token) else 1
        return range(first, first + self.n_patches)

    @property
    def n_layers_run(self) -> int:
        """Blocks that are run: none above the highest feature layer."""
        return max(self.feature_layers)

    @property
    def d_features(self) -> int:
        """Width of one feature vector."""
        return self.d_model * len(self.feature_layers)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The two-layer map from vision features to the language model's residual stream."""

    d_in: int
    """Width of the vision features."""
    d_model: int
    """Width of the language model, and of the hidden layer."""
    act_fn: str
    """Activation function by its Hugging Face name."""
    bias: bool
    """Whether both linear maps have a bias."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(TowerConfig):
    """The Vicuna language tower."""

    d_vocab: int
    """Number of tokens."""
    n_ctx: int
    """Longest prompt the model was made for."""
    tied_embeddings: bool
    """Whether the unembedding is the transposed embedding."""


@dataclass(frozen=True, kw_only=True)
class LLaVAConfig:
    """The three parts together, and how an image enters the prompt."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    image_token_id: int
    """Token id whose positions are overwritten by image embeddings."""
    pad_token_id: int | None
    """Token id that fills up short rows of a batch, if the checkpoint names one."""
    eos_token_ids: tuple[int, ...]
    """Token ids that end an answer."""
    model_name: str = "llava"
    """Where the weights came from, for results and messages."""

    @classmethod
    def from_hf(cls, hf_config: PreTrainedConfig, *, model_name: str | None = None) -> LLaVAConfig:
        """Read a Hugging Face `LlavaConfig`; raises `ConfigError` for an architecture this library does not build.

        >>> from transformers import LlavaConfig
        >>> LLaVAConfig.from_hf(LlavaConfig()).vision.patch_grid
        (24, 24)
        """
        if hf_config.model_type != "llava":
            raise ConfigError(
                f"The config describes a model of type {hf_config.model_type!r}; expected 'llava' "
                "(LlavaForConditionalGeneration). Load a LLaVA checkpoint in Hugging Face format."
            )
        language = _language_config(hf_config.text_config, tied=bool(hf_config.tie_word_embeddings))
        vision = _vision_config(hf_config)
        projector = ProjectorConfig(
            d_in=vision.d_features,
            d_model=language.d_model,
            act_fn=hf_config.projector_hidden_act,
            bias=hf_config.multimodal_projector_bias,
        )
        return cls(
            vision=vision,
            projector=projector,
            language=language,
            image_token_id=hf_config.image_token_id,
            pad_token_id=_first_not_none(hf_config, "pad_token_id"),
            eos_token_ids=_token_ids(_first_not_none(hf_config, "eos_token_id")),
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


def _language_config(text: Any, *, tied: bool) -> LanguageConfig:
    if text.model_type not in _LANGUAGE_TYPES:
        raise ConfigError(
            f"The language model is of type {text.model_type!r}; this version builds {', '.join(_LANGUAGE_TYPES)}. "
            "LLaVA-1.5 checkpoints (Vicuna, Llama-2) load; other families do not yet."
        )
    n_heads = text.num_attention_heads
    return LanguageConfig(
        n_layers=text.num_hidden_layers,
        n_heads=n_heads,
        n_key_value_heads=text.num_key_value_heads or n_heads,
        d_model=text.hidden_size,
        d_head=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        d_mlp=text.intermediate_size,
        act_fn=text.hidden_act,
        normalization_type="RMS",
        eps=text.rms_norm_eps,
        gated_mlp=True,
        qkv_bias=text.attention_bias,
        out_bias=text.attention_bias,
        mlp_bias=text.mlp_bias,
        causal=True,
        rotary=_rotary_config(text),
        d_vocab=text.vocab_size,
        n_ctx=text.max_position_embeddings,
        tied_embeddings=tied,  # the outer config decides: transformers ties by it
    )


def _rotary_config(text: Any) -> RotaryConfig:
    parameters = text.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in _ROTARY_TYPES:
        raise ConfigError(
            f"The rotary embedding is of type {kind!r}, whose frequencies depend on the prompt's length; "
            f"expected one of {', '.join(_ROTARY_TYPES)}."
        )
    if kind != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](text, device=torch.device("cpu"))
        return RotaryConfig(tuple(frequencies.tolist()), float(scaling))
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    exponents = torch.arange(0, d_head, 2, dtype=torch.float32) / d_head
    return RotaryConfig(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()))


def _vision_config(hf_config: Any) -> VisionConfig:
    vision = hf_config.vision_config
    if vision.model_type not in _VISION_TYPES:
        raise ConfigError(
            f"The vision tower is of type {vision.model_type!r}; this version builds {', '.join(_VISION_TYPES)}."
        )
    strategy = hf_config.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise ConfigError(
            f"vision_feature_select_strategy is {strategy!r}; expected 'default' (patches only) or 'full' "
            "(class token and patches)."
        )
    layers = hf_config.vision_feature_layer
    several = isinstance(layers, (list, tuple))
    return VisionConfig(
        n_layers=vision.num_hidden_layers,
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
        feature_layers=tuple(_feature_layer(i, vision.num_hidden_layers) for i in (layers if several else [layers])),
        several_features=several,
        drop_class_token=strategy == "default",
    )


def _feature_layer(index: int, n_layers: int) -> int:
    """A Hugging Face hidden-state index (0..n_layers, or negative) as a non-negative one."""
    says = f"vision_feature_layer={index} is out of range for {n_layers} vision layers"
    return as_index(index, n_layers + 1, "vision_feature_layer", says=says, error=ConfigError)
