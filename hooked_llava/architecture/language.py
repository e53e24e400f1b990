"""The language models that load: for each, how its Hugging Face config is read and what its tensors are called there.

A new one is an entry of `LANGUAGE_MODELS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hooked_llava.architecture.kinds import TowerKind
from hooked_llava.architecture.sizes import LanguageConfig, RotaryConfig
from hooked_llava.checks import one_of
from hooked_llava.errors import ConfigError

_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")

_NAMES = {
    "embed_tokens": "embed",
    "layers.{}.input_layernorm": "blocks.{}.ln1",
    "layers.{}.self_attn.q_proj": "blocks.{}.attn.query",
    "layers.{}.self_attn.k_proj": "blocks.{}.attn.key",
    "layers.{}.self_attn.v_proj": "blocks.{}.attn.value",
}
_LLAMA_NAMES = {
    **_NAMES,
    "norm": "ln_final",
    "layers.{}.post_attention_layernorm": "blocks.{}.ln2",
    "layers.{}.self_attn.o_proj": "blocks.{}.attn.output",
    "layers.{}.mlp.gate_proj": "blocks.{}.mlp.gate",
    "layers.{}.mlp.up_proj": "blocks.{}.mlp.up",
    "layers.{}.mlp.down_proj": "blocks.{}.mlp.down",
}
_PHI_NAMES = {
    **_NAMES,
    "final_layernorm": "ln_final",
    "layers.{}.self_attn.dense": "blocks.{}.attn.output",
    "layers.{}.mlp.fc1": "blocks.{}.mlp.up",
    "layers.{}.mlp.fc2": "blocks.{}.mlp.down",
}


def _llama(text: Any) -> dict[str, Any]:
    return {
        "normalization_type": "RMS",
        "eps": text.rms_norm_eps,
        "gated_mlp": True,
        "qkv_bias": text.attention_bias,
        "out_bias": text.attention_bias,
        "mlp_bias": text.mlp_bias,
    }


def _mistral(text: Any) -> dict[str, Any]:
    return {
        "normalization_type": "RMS",
        "eps": text.rms_norm_eps,
        "gated_mlp": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        **_windows(text, range(text.num_hidden_layers)),
    }


def _qwen2(text: Any) -> dict[str, Any]:
    sliding = [i for i, kind in enumerate(text.layer_types) if kind == "sliding_attention"]
    return {**_mistral(text), "qkv_bias": True, **_windows(text, sliding)}


def _phi(text: Any) -> dict[str, Any]:
    return {
        **_with_layer_norms(text),
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "parallel_attn_mlp": True,
    }


def _stablelm(text: Any) -> dict[str, Any]:
    return {
        **_with_layer_norms(text),
        "gated_mlp": True,
        "qkv_bias": text.use_qkv_bias,
        "out_bias": False,
        "mlp_bias": False,
        "parallel_attn_mlp": text.use_parallel_residual,
    }


def _with_layer_norms(text: Any) -> dict[str, Any]:
    """What Phi and StableLM share: LayerNorms, and a rotary embedding of a part of each head."""
    if text.qk_layernorm:
        raise ConfigError(
            "The language model has qk_layernorm=True, norms on the queries and keys of each head, which are not built here. "
            "Phi-1, Phi-1.5, Phi-2 and most StableLM have none."
        )
    rotary = _rotary(text, share=text.rope_parameters["partial_rotary_factor"])
    return {"normalization_type": "LN", "eps": text.layer_norm_eps, "rotary": rotary}


def _windows(text: Any, layers: Iterable[int]) -> dict[str, Any]:
    """The sliding window and the layers that have it."""
    window = text.sliding_window
    return {"window": window, "windowed_layers": () if window is None else tuple(layers)}


LANGUAGE_MODELS = {
    "llama": TowerKind("Llama", "LLaVA-1.5 (Vicuna, Llama-2), models with Llama-3", _llama, _LLAMA_NAMES),
    "mistral": TowerKind("Mistral", "BakLLaVA, models with Mistral-7B", _mistral, _LLAMA_NAMES),
    "qwen2": TowerKind("Qwen2", "models with Qwen1.5, Qwen2 and Qwen2.5", _qwen2, _LLAMA_NAMES),
    "phi": TowerKind("Phi", "models with Phi-1, Phi-1.5 and Phi-2", _phi, _PHI_NAMES),
    "stablelm": TowerKind("StableLM", "models with StableLM 2 and 3B", _stablelm, _LLAMA_NAMES),
}
"""Every language model that loads, by the `model_type` of its Hugging Face config."""


def read_language(text: Any, *, tied: bool) -> LanguageConfig:
    """The config of the language tower from its Hugging Face config; whether embeddings are tied the outer config says.

    Raises `ConfigError` for a language model that is not built here.

    >>> from transformers import LlamaConfig
    >>> read_language(LlamaConfig(), tied=False).d_head
    128
    """
    says = f"The language model is of type {text.model_type!r}, which is not built here."
    kind = LANGUAGE_MODELS[one_of(text.model_type, LANGUAGE_MODELS, "text_config", says=says, error=ConfigError)]
    n_heads = text.num_attention_heads
    sizes = {
        "n_layers": text.num_hidden_layers,
        "n_heads": n_heads,
        "n_key_value_heads": text.num_key_value_heads or n_heads,
        "d_model": text.hidden_size,
        "d_head": getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        "d_mlp": text.intermediate_size,
        "act_fn": text.hidden_act,
        "rotary": _rotary(text),
        "d_vocab": text.vocab_size,
        "n_ctx": text.max_position_embeddings,
    }
    return LanguageConfig(model_type=text.model_type, causal=True, tied_embeddings=tied, **{**sizes, **kind.read(text)})


def _rotary(text: Any, *, share: float = 1.0) -> RotaryConfig:
    """The frequencies of the rotary embedding, which turns that share of each head's dimensions, the first of them."""
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
    d_rotary = int(d_head * share)
    exponents = torch.arange(0, d_rotary, 2, dtype=torch.float32) / d_rotary
    return RotaryConfig(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()))
