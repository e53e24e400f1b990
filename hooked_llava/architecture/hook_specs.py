"""The rows of the table of hooks: what passes through each, its shape and its other names, by the config."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.sizes import TowerConfig, VisionConfig


@dataclass(frozen=True)
class HookSpec:
    """One row of the table, shared by the hooks of all layers.

    Attributes:
        name (str): Full name; `{i}` stands for the layer.
        axes (tuple[str, ...]): Names of the tensor's axes.
        meaning (str): What the tensor is.
        large (bool): Whether a cache without a filter leaves it out because of its size.
        aliases (tuple[str, ...]): Other names that are understood.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    large: bool = False
    aliases: tuple[str, ...] = ()


_RESID = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_KEY_VALUE_HEADS = ("batch", "pos", "kv_head", "d_head")
_EDGES = ("batch", "head", "query", "key")
_NEURONS = ("batch", "pos", "d_mlp")
_SCALE = ("batch", "pos", "1")


def _norm_hooks(name: str, what: str) -> list[HookSpec]:
    return [
        HookSpec(f"{name}.hook_scale", _SCALE, f"root mean square (or standard deviation) that {what} is divided by"),
        HookSpec(f"{name}.hook_normalized", _RESID, f"{what} after the division, before the norm's weight"),
    ]


def _attention_hooks(cfg: TowerConfig) -> list[HookSpec]:
    attn = "blocks.{i}.attn."
    projections: list[HookSpec] = []
    for x, word in (("q", "queries"), ("k", "keys"), ("v", "values")):
        heads = _HEADS if x == "q" else _KEY_VALUE_HEADS
        projections += [
            HookSpec(
                f"{attn}hook_{x}_input",
                (*heads[:-1], "d_model"),
                f"residual stream, before the norm, as each head's {word} read it",
                large=True,
                aliases=(f"blocks.{{i}}.hook_{x}_input",),
            ),
            HookSpec(f"{attn}hook_{x}", heads, word),
        ]
    rotated = [
        HookSpec(f"{attn}hook_rot_q", _HEADS, "queries after the rotary embedding"),
        HookSpec(f"{attn}hook_rot_k", _KEY_VALUE_HEADS, "keys after the rotary embedding"),
    ]
    return [
        *projections,
        *(rotated if cfg.rotary is not None else []),
        HookSpec(f"{attn}hook_attn_scores", _EDGES, "attention scores before the softmax; blocked edges are -inf"),
        HookSpec(f"{attn}hook_pattern", _EDGES, "attention pattern: softmax of the scores over the keys"),
        HookSpec(f"{attn}hook_z", _HEADS, "values averaged by the pattern"),
        HookSpec(
            f"{attn}hook_result",
            ("batch", "pos", "head", "d_model"),
            "what each head adds to the residual stream",
            large=True,
        ),
    ]


def _block_hooks(cfg: TowerConfig) -> list[HookSpec]:
    linear = HookSpec("blocks.{i}.mlp.hook_pre_linear", _NEURONS, "the linear half of the gated MLP")
    between = [
        HookSpec("blocks.{i}.hook_resid_mid", _RESID, "residual stream between attention and MLP"),
        HookSpec("blocks.{i}.hook_mlp_in", _RESID, "residual stream, before the norm, as the MLP reads it"),
        *_norm_hooks("blocks.{i}.ln2", "the MLP's input"),
    ]
    return [
        HookSpec("blocks.{i}.hook_resid_pre", _RESID, "residual stream entering the block"),
        *_norm_hooks("blocks.{i}.ln1", "the block's input" if cfg.parallel_attn_mlp else "the attention's input"),
        *_attention_hooks(cfg),
        HookSpec("blocks.{i}.hook_attn_out", _RESID, "what attention adds to the residual stream"),
        *([] if cfg.parallel_attn_mlp else between),
        HookSpec("blocks.{i}.mlp.hook_pre", _NEURONS, "MLP neurons before the activation function"),
        *([linear] if cfg.gated_mlp else []),
        HookSpec("blocks.{i}.mlp.hook_post", _NEURONS, "MLP neurons, as the output map reads them"),
        HookSpec("blocks.{i}.hook_mlp_out", _RESID, "what the MLP adds to the residual stream"),
        HookSpec("blocks.{i}.hook_resid_post", _RESID, "residual stream leaving the block"),
    ]


_FEATURES = ("tile", "feature", "d_model")

PROJECTOR_HOOKS = (
    HookSpec("projector.hook_pre", _FEATURES, "hidden layer before the activation function"),
    HookSpec("projector.hook_post", _FEATURES, "hidden layer after the activation function"),
    HookSpec("projector.hook_out", _FEATURES, "image features in the language model's residual stream"),
)
"""The projector's rows."""


def vision_hooks(cfg: VisionConfig) -> list[HookSpec]:
    """The vision tower's rows, in the order in which the hooks fire."""
    first = ", class token first" if cfg.class_token else ""
    specs = [
        HookSpec("hook_patch_embed", ("batch", "patch", "d_model"), "patches after the convolution"),
        HookSpec("hook_pos_embed", _RESID, f"learned positions{first}"),
        *(_norm_hooks("ln_pre", "the embedding") if cfg.pre_norm else []),
        HookSpec("hook_embed", _RESID, f"what enters block 0{', after the pre-norm' if cfg.pre_norm else ''}{first}"),
        *_block_hooks(cfg),
        HookSpec("hook_out", ("batch", "feature", "d_features"), "vision features, as the projector receives them"),
    ]
    return [
        replace(
            spec,
            name=f"vision.{spec.name}",
            axes=tuple("tile" if axis == "batch" else axis for axis in spec.axes),
            aliases=tuple(f"vision.{alias}" for alias in spec.aliases),
        )
        for spec in specs
    ]


def language_hooks(cfg: TowerConfig) -> list[HookSpec]:
    """The language tower's rows and that of the merge, in the order in which the hooks fire."""
    return [
        HookSpec("hook_text_embed", _RESID, "token embeddings, before the image is merged in"),
        HookSpec("hook_image_embed", ("image", "feature", "d_model"), "what the merge puts at the image positions"),
        HookSpec("hook_embed", _RESID, "what enters block 0: text and image"),
        *_block_hooks(cfg),
        *_norm_hooks("ln_final", "the final residual stream"),
        HookSpec("hook_logits", ("batch", "pos", "d_vocab"), "logits"),
    ]


def sae_hooks(at: HookSpec, name: str) -> tuple[HookSpec, HookSpec, HookSpec]:
    """The rows of an autoencoder attached to the hook `name`: its features before and after the choice, and its error."""
    axes = tuple(axis for axis in at.axes[:-1] if axis not in ("head", "kv_head"))  # heads are side by side
    return (
        HookSpec(f"{name}.hook_sae_pre", (*axes, "d_sae"), "every feature before the largest are chosen", large=True),
        HookSpec(f"{name}.hook_sae_acts", (*axes, "d_sae"), "activations of the autoencoder's features", large=True),
        HookSpec(f"{name}.hook_sae_error", at.axes, "activation less its reconstruction", large=True),
    )


def markdown_table(config: LLaVAConfig) -> str:
    """The table of all hooks as Markdown, for the documentation."""
    rows = ["| hook | shape | meaning |", "|---|---|---|"]
    for spec in (*language_hooks(config.language), *PROJECTOR_HOOKS, *vision_hooks(config.vision)):
        also = f" (also `{'`, `'.join(spec.aliases)}`)" if spec.aliases else ""
        named = "; cached when named" if spec.large else ""
        rows.append(f"| `{spec.name}`{also} | [{' '.join(spec.axes)}] | {spec.meaning}{named} |")
    return "\n".join(rows)
