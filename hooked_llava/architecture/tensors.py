"""Our tensor names <-> Hugging Face's, in every layout that checkpoints have had, composed from the kinds of the parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.language import LANGUAGE_MODELS
from hooked_llava.architecture.llava import LLAVA_MODELS
from hooked_llava.architecture.sizes import TowerConfig, VisionConfig
from hooked_llava.architecture.vision import VISION_TOWERS
from hooked_llava.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HEAD = {"lm_head": "unembed"}
_NEWLINE = {"image_newline": "image_newline"}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # computed from the config; old checkpoints store them
_KINDS = ("weight", "bias")

TIED = "language.unembed.weight"
"""The tensor that a checkpoint with tied embeddings leaves out."""
TIED_TO = "language.embed.weight"
"""The tensor that then stands for it."""
_UNEMBED_BIAS = ("language.unembed.bias", "lm_head.bias")


def model_config(hf_config: PreTrainedConfig, names: Iterable[str], *, model_name: str | None = None) -> LLaVAConfig:
    """The config of a model that has tensors of these names, ours or theirs: only they say if its unembedding has a bias.

    Raises `ConfigError` as `LLaVAConfig.from_hf`.

    >>> from transformers import LlavaConfig
    >>> model_config(LlavaConfig(), ["language_model.lm_head.bias"]).language.unembed_bias
    True
    """
    config = LLaVAConfig.from_hf(hf_config, model_name=model_name)
    has_bias = any(name.endswith(_UNEMBED_BIAS) for name in names)
    return replace(config, language=replace(config.language, unembed_bias=has_bias))


@dataclass(frozen=True)
class _Part:
    """Names of the tensors of a part.

    Attributes:
        prefixes (tuple[str, ...]): Hugging Face's, the one that is written first.
        ours (str): Our prefix.
        names (Mapping[str, str]): Below the prefixes, Hugging Face's and ours.
    """

    prefixes: tuple[str, ...]
    ours: str
    names: Mapping[str, str]


def _parts(config: LLaVAConfig) -> tuple[_Part, ...]:
    """The parts of a model. The first prefix that fits decides: "language_model.lm_head." is tried before "language_model."."""
    return _parts_of_kinds(config.model_type, config.language.model_type, config.vision.model_type)


@cache
def _parts_of_kinds(model_type: str, language: str, vision: str) -> tuple[_Part, ...]:
    kind = LLAVA_MODELS[model_type]
    return (
        _Part(kind.head, "language.", _HEAD),
        _Part(kind.language, "language.", LANGUAGE_MODELS[language].names),
        _Part(kind.vision, "vision.", VISION_TOWERS[vision].names),
        _Part(kind.projector, "projector.", kind.projector_names),
        _Part(("",), "", _NEWLINE if kind.tiling else {}),
    )


def our_name(hf_name: str, config: LLaVAConfig) -> str | None:
    """Our name of a Hugging Face tensor, or None for a buffer that is computed and not loaded.

    Raises `CheckpointError` for a tensor that no model of these kinds has.

    >>> from transformers import LlavaConfig
    >>> config = LLaVAConfig.from_hf(LlavaConfig())
    >>> our_name("language_model.model.layers.3.self_attn.o_proj.weight", config)
    'language.blocks.3.attn.output.weight'
    >>> our_name("model.vision_tower.vision_model.embeddings.class_embedding", config)
    'vision.class_embed'
    """
    if hf_name.endswith(_BUFFERS):
        return None
    name = hf_name.removeprefix("model.")
    for part in _parts(config):
        for prefix in part.prefixes:
            translated = _translate(name.removeprefix(prefix), part.names) if name.startswith(prefix) else None
            if translated is not None:
                return part.ours + translated
    raise CheckpointError(
        f"Tensor {hf_name!r} belongs to no part of a {LLAVA_MODELS[config.model_type].architecture} (vision tower "
        f"{config.vision.model_type}, projector, language model {config.language.model_type}, lm_head). Check that "
        "config.json belongs to the checkpoint."
    )


def hf_name(our_name: str, config: LLaVAConfig) -> str:
    """The name that Hugging Face's `save_pretrained` writes for one of our tensors.

    Raises `CheckpointError` for a name that is none of ours.

    >>> from transformers import LlavaConfig
    >>> hf_name("language.unembed.weight", LLaVAConfig.from_hf(LlavaConfig()))
    'language_model.lm_head.weight'
    """
    for part in _parts(config):
        reverse = {ours: theirs for theirs, ours in part.names.items()}
        translated = _translate(our_name.removeprefix(part.ours), reverse) if our_name.startswith(part.ours) else None
        if translated is not None:
            return part.prefixes[0] + translated
    raise CheckpointError(
        f"{our_name!r} is not a tensor of HookedLLaVA; expected a name such as 'language.blocks.0.attn.query.weight', "
        "as in dict(model.named_parameters())."
    )


def _translate(name: str, table: Mapping[str, str]) -> str | None:
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
        **_vision_embedding(vision),
        **_blocks("vision", vision),
        **_norm("vision.ln_post", vision),
        **(_pooling_head(vision) if vision.pooling_head else {}),
        **_linear("projector.linear_in", projector.d_in, projector.d_model, projector.bias),
        **_linear("projector.linear_out", projector.d_model, projector.d_model, projector.bias),
        **({} if config.tiling is None else {"image_newline": (language.d_model,)}),
        TIED_TO: (language.d_vocab, language.d_model),
        **_blocks("language", language),
        **_norm("language.ln_final", language),
        **_linear("language.unembed", language.d_model, language.d_vocab, language.unembed_bias),
    }
    if language.tied_embeddings:
        del shapes[TIED]
    return shapes


def _vision_embedding(cfg: VisionConfig) -> dict[str, tuple[int, ...]]:
    return {
        **({"vision.class_embed": (cfg.d_model,)} if cfg.class_token else {}),
        "vision.patch_embed.weight": (cfg.d_model, cfg.n_channels, cfg.patch_size, cfg.patch_size),
        **({"vision.patch_embed.bias": (cfg.d_model,)} if cfg.patch_bias else {}),
        "vision.pos_embed.weight": (cfg.n_positions, cfg.d_model),
        **(_norm("vision.ln_pre", cfg) if cfg.pre_norm else {}),
    }


def _pooling_head(cfg: VisionConfig) -> dict[str, tuple[int, ...]]:
    return {
        "vision.head.probe": (1, 1, cfg.d_model),
        "vision.head.attention.in_proj_weight": (3 * cfg.d_model, cfg.d_model),
        "vision.head.attention.in_proj_bias": (3 * cfg.d_model,),
        **_linear("vision.head.attention.out_proj", cfg.d_model, cfg.d_model, bias=True),
        **_norm("vision.head.norm", cfg),
        **_linear("vision.head.up", cfg.d_model, cfg.d_mlp, bias=True),
        **_linear("vision.head.down", cfg.d_mlp, cfg.d_model, bias=True),
    }


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
        shapes |= {} if cfg.parallel_attn_mlp else _norm(f"{block}.ln2", cfg)
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
