"""Sizes and choices of the parts of a LLaVA model.

One `TowerConfig` drives the blocks of both towers: what differs between CLIP and Vicuna (norm, gating, rotary
positions, causality, biases) is a field here, not a second block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_llava.errors import ConfigError


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding, already resolved to frequencies.

    Attributes:
        frequencies (tuple[float, ...]): Angle in radians that one position turns each pair of dimensions by; length
            d_head / 2, or shorter where only the first dimensions of a head are turned (Phi).
        attention_scaling (float): Factor on cosine and sine (other than 1 for some long-context scalings, for example
            YaRN).
    """

    frequencies: tuple[float, ...]
    attention_scaling: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What a stack of transformer blocks needs to know.

    Attributes:
        n_layers (int): Number of blocks in the checkpoint.
        n_heads (int): Query heads per block.
        n_key_value_heads (int): Key-value heads per block; fewer than n_heads for grouped-query attention.
        d_model (int): Width of the residual stream.
        d_head (int): Width of one attention head.
        d_mlp (int): Number of MLP neurons.
        act_fn (str): Activation function of the MLP, by its Hugging Face name.
        normalization_type (Literal["RMS", "LN"]): RMSNorm (language) or LayerNorm (vision).
        eps (float): Added to the variance inside the norms.
        gated_mlp (bool): Whether the MLP multiplies the activation by a second linear map (SwiGLU).
        qkv_bias (bool): Whether queries, keys and values have a bias.
        out_bias (bool): Whether the attention output has a bias.
        mlp_bias (bool): Whether the MLP's linear maps have biases.
        causal (bool): Whether a position sees only itself and earlier positions.
        rotary (RotaryConfig | None): Rotary positions, or None for towers that add learned positions at the bottom.
        window (int | None): How many keys a query of a windowed layer sees, the last ones, its own included; None where
            no layer has a window.
        windowed_layers (tuple[int, ...]): Layers whose queries see only the window.
        parallel_attn_mlp (bool): Whether attention and MLP read the same normalized residual stream, side by side (Phi), instead
            of one after the other.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    act_fn: str
    normalization_type: Literal["RMS", "LN"]
    eps: float
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    causal: bool
    rotary: RotaryConfig | None = None
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    parallel_attn_mlp: bool = False

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
        """Always False, for TransformerLens."""
        return False

    @property
    def final_rms(self) -> bool:
        """Whether the norm after the last block is an RMSNorm, for TransformerLens."""
        return self.normalization_type == "RMS"


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    """The vision tower.

    Attributes:
        model_type (str): Its kind, by its Hugging Face name: an entry of `vision.VISION_TOWERS`.
        image_size (int): Side of a square tile in pixels.
        patch_size (int): Side of a square patch in pixels.
        n_channels (int): Color channels.
        feature_layers (tuple[int, ...]): Non-negative hidden-state indices that the projector reads: 0 is the input of
            block 0, i the output of block i-1.
        several_features (bool): Whether the checkpoint gives a list of feature layers (their features are
            concatenated).
        class_token (bool): Whether a class token stands before the patches.
        drop_class_token (bool): Whether the class token is left out of the features (select strategy "default").
        pre_norm (bool): Whether the embedding is normalized before block 0.
        patch_bias (bool): Whether the patches' convolution has a bias.
        pooling_head (bool): Whether the checkpoint holds an attention-pooling head, which LLaVA does not use.
    """

    model_type: str
    image_size: int
    patch_size: int
    n_channels: int
    feature_layers: tuple[int, ...]
    several_features: bool
    class_token: bool
    drop_class_token: bool
    pre_norm: bool
    patch_bias: bool
    pooling_head: bool

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
        """Positions in the tower: the patches, and the class token if there is one."""
        return self.patches_along("pos").stop

    @property
    def n_features(self) -> int:
        """Vectors per tile that the projector receives."""
        return self.patches_along("feature").stop

    def patches_along(self, axis: str) -> range:
        """The indices of the patches, row by row, along an axis of a hook's tensor: "patch", "feature", "pos", "query" or "key".

        The axis has no entries after them. Before them comes the class token, if there is one: not along "patch", and along
        "feature" only where the projector receives it.
        """
        before = {"patch": False, "feature": self.keeps_class_token}.get(axis, self.class_token)
        return range(before, before + self.n_patches)

    @property
    def keeps_class_token(self) -> bool:
        """Whether the features begin with a class token."""
        return self.class_token and not self.drop_class_token

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
    """The two-layer map from vision features to the language model's residual stream.

    Attributes:
        d_in (int): Width of the vision features.
        d_model (int): Width of the language model, and of the hidden layer.
        act_fn (str): Activation function by its Hugging Face name.
        bias (bool): Whether both linear maps have a bias.
    """

    d_in: int
    d_model: int
    act_fn: str
    bias: bool


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(TowerConfig):
    """The language tower.

    Attributes:
        model_type (str): Its kind, by its Hugging Face name: an entry of `language.LANGUAGE_MODELS`.
        d_vocab (int): Number of tokens.
        n_ctx (int): Longest prompt the model was made for.
        tied_embeddings (bool): Whether the unembedding is the transposed embedding.
        unembed_bias (bool): Whether the unembedding has a bias: Hugging Face's configs do not say, the checkpoint's
            tensors do.
    """

    model_type: str
    d_vocab: int
    n_ctx: int
    tied_embeddings: bool
    unembed_bias: bool = False
