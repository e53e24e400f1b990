"""Our tensor names <-> Hugging Face's, in every layout that LLaVA-1.5 checkpoints have had.

Hugging Face has moved the parts around over the years: the language tower under `language_model.model.` (hub
checkpoints, and what transformers 5 still writes) or `model.language_model.` (in memory), the head as
`language_model.lm_head` or `lm_head`, the CLIP tower with and without `vision_model.`. All of them are read;
`hf_name` gives the one spelling that is written.
"""

from __future__ import annotations

import re

from hooked_llava.architecture.config import LLaVAConfig, TowerConfig
from hooked_llava.errors import CheckpointError

_VISION = {
    "embeddings.class_embedding": "class_embed",
    "embeddings.patch_embedding": "patch_embed",
    "embeddings.position_embedding": "pos_embed",
    "pre_layrnorm": "ln_pre",  # Hugging Face's own spelling
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
_LANGUAGE = {
    "embed_tokens": "embed",
    "norm": "ln_final",
    "layers.{}.input_layernorm": "blocks.{}.ln1",
    "layers.{}.post_attention_layernorm": "blocks.{}.ln2",
    "layers.{}.self_attn.q_proj": "blocks.{}.attn.query",
    "layers.{}.self_attn.k_proj": "blocks.{}.attn.key",
    "layers.{}.self_attn.v_proj": "blocks.{}.attn.value",
    "layers.{}.self_attn.o_proj": "blocks.{}.attn.output",
    "layers.{}.mlp.gate_proj": "blocks.{}.mlp.gate",
    "layers.{}.mlp.up_proj": "blocks.{}.mlp.up",
    "layers.{}.mlp.down_proj": "blocks.{}.mlp.down",
}
_PROJECTOR = {"linear_1": "linear_in", "linear_2": "linear_out"}
_HEAD = {"lm_head": "unembed"}

# (prefixes read, the written one first; our prefix; names below it). The first prefix that fits decides, so that
# "language_model.lm_head." is tried before "language_model.".
_PARTS = (
    (("language_model.", ""), "language.", _HEAD),
    (("language_model.model.", "language_model."), "language.", _LANGUAGE),
    (("vision_tower.", "vision_tower.vision_model."), "vision.", _VISION),
    (("multi_modal_projector.",), "projector.", _PROJECTOR),
)
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # computed from the config; old checkpoints store them
_KINDS = ("weight", "bias")

TIED = "language.unembed.weight"
"""The tensor that a checkpoint with tied embeddings leaves out."""
TIED_TO = "language.embed.weight"
"""The tensor that then stands for it."""


def our_name(hf_name: str) -> str | None:
    """Our name of a Hugging Face tensor, or None for a buffer that is computed and not loaded.

    Raises `CheckpointError` for a tensor that no LLaVA-1.5 model has.

    >>> our_name("language_model.model.layers.3.self_attn.o_proj.weight")
    'language.blocks.3.attn.output.weight'
    >>> our_name("model.vision_tower.vision_model.embeddings.class_embedding")
    'vision.class_embed'
    """
    if hf_name.endswith(_BUFFERS):
        return None
    name = hf_name.removeprefix("model.")
    for prefixes, ours, table in _PARTS:
        for prefix in prefixes:
            translated = _translate(name.removeprefix(prefix), table) if name.startswith(prefix) else None
            if translated is not None:
                return ours + translated
    raise CheckpointError(
        f"Tensor {hf_name!r} belongs to no part of a LLaVA-1.5 model (vision_tower, multi_modal_projector, "
        "language_model, lm_head). Check that the checkpoint is a LlavaForConditionalGeneration."
    )


def hf_name(our_name: str) -> str:
    """The name that Hugging Face's `save_pretrained` writes for one of our tensors.

    Raises `CheckpointError` for a name that is none of ours.

    >>> hf_name("language.unembed.weight")
    'language_model.lm_head.weight'
    """
    for prefixes, ours, table in _PARTS:
        reverse = {ours_below: hf_below for hf_below, ours_below in table.items()}
        translated = _translate(our_name.removeprefix(ours), reverse) if our_name.startswith(ours) else None
        if translated is not None:
            return prefixes[0] + translated
    raise CheckpointError(
        f"{our_name!r} is not a tensor of HookedLLaVA; expected a name such as 'language.blocks.0.attn.query.weight', "
        "as in dict(model.named_parameters())."
    )


def _translate(name: str, table: dict[str, str]) -> str | None:
    """A name below its prefix looked up in a table, with layer numbers and weight/bias carried over."""
    stem, _, kind = name.rpartition(".")
    if kind not in _KINDS:
        stem, kind = name, ""
    layer = re.search(r"(?<=\.)\d+(?=\.)", stem)
    pattern = stem[: layer.start()] + "{}" + stem[layer.end() :] if layer else stem
    if pattern not in table:
        return None
    translated = table[pattern].format(layer.group() if layer else "")
    return f"{translated}.{kind}" if kind else translated


def expected_tensors(config: LLaVAConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds, in the order of the forward pass.

    With tied embeddings the unembedding is not among them: it is the embedding.

    >>> from transformers import LlavaConfig
    >>> shapes = expected_tensors(LLaVAConfig.from_hf(LlavaConfig()))
    >>> shapes["projector.linear_in.weight"]
    (4096, 1024)
    """
    vision, language, projector = config.vision, config.language, config.projector
    shapes: dict[str, tuple[int, ...]] = {
        "vision.class_embed": (vision.d_model,),
        "vision.patch_embed.weight": (vision.d_model, vision.n_channels, vision.patch_size, vision.patch_size),
        "vision.pos_embed.weight": (vision.n_positions, vision.d_model),
        **_norm("vision.ln_pre", vision),
        **_blocks("vision", vision),
        **_norm("vision.ln_post", vision),
        **_linear("projector.linear_in", projector.d_in, projector.d_model, projector.bias),
        **_linear("projector.linear_out", projector.d_model, projector.d_model, projector.bias),
        TIED_TO: (language.d_vocab, language.d_model),
        **_blocks("language", language),
        **_norm("language.ln_final", language),
        TIED: (language.d_vocab, language.d_model),
    }
    if language.tied_embeddings:
        del shapes[TIED]
    return shapes


def _blocks(tower: str, cfg: TowerConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    d_query, d_key = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    for i in range(cfg.n_layers):
        block = f"{tower}.blocks.{i}"
        shapes |= _norm(f"{block}.ln1", cfg)
        shapes |= _linear(f"{block}.attn.query", cfg.d_model, d_query, cfg.qkv_bias)
        shapes |= _linear(f"{block}.attn.key", cfg.d_model, d_key, cfg.qkv_bias)
        shapes |= _linear(f"{block}.attn.value", cfg.d_model, d_key, cfg.qkv_bias)
        shapes |= _linear(f"{block}.attn.output", d_query, cfg.d_model, cfg.out_bias)
        shapes |= _norm(f"{block}.ln2", cfg)
        if cfg.gated_mlp:
            shapes |= _linear(f"{block}.mlp.gate", cfg.d_model, cfg.d_mlp, cfg.mlp_bias)
        shapes |= _linear(f"{block}.mlp.up", cfg.d_model, cfg.d_mlp, cfg.mlp_bias)
        shapes |= _linear(f"{block}.mlp.down", cfg.d_mlp, cfg.d_model, cfg.mlp_bias)
    return shapes


def _linear(name: str, d_in: int, d_out: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (d_out, d_in)}
    return {**weight, f"{name}.bias": (d_out,)} if bias else weight


def _norm(name: str, cfg: TowerConfig) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (cfg.d_model,)}
    return {**weight, f"{name}.bias": (cfg.d_model,)} if cfg.normalization_type == "LN" else weight
