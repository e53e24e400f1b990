"""Pairs of a tiny Hugging Face LLaVA and ours on the same weights, made once, and prompts put together to batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import jaxtyping
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.loading.sharing import share_weights
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import PAD_TOKEN_ID, make_hf_model, make_prompt, randomise
from tests.oracles.slow_llava import SlowLLaVA

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_heads": 6, "n_key_value_heads": 2, "attention_bias": True},
    "multi_query": {"n_key_value_heads": 1, "d_head": 10},
    "odd": {
        "d_model": 39, "n_heads": 3, "n_key_value_heads": 3, "d_head": 14, "d_mlp": 51,
        "d_vision": 20, "d_vision_mlp": 33, "image_size": 21, "patch_size": 7,
    },
    "deep": {"n_layers": 5, "n_vision_layers": 5, "vision_feature_layer": -3},
    "last_layer": {"vision_feature_layer": -1},
    "several_layers": {"vision_feature_layer": [-1, 0, -2]},
    "full": {"select_strategy": "full"},
    "several_layers_full": {"vision_feature_layer": [1, -2], "select_strategy": "full"},
    "tied": {"tied": True},
    "linear_rope": {"text": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}},
    "llama3_rope": {"text": {"rope_parameters": _LLAMA3}},
    "yarn_rope": {"text": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}},
    "biases": {"text": {"mlp_bias": True}, "attention_bias": True, "projector_bias": False},
    "activations": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}, "projector_hidden_act": "silu"},
}  # fmt: skip

_OF_A_LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"n_key_value_heads": 2, "d_head": 10, "text": {"sliding_window": 5}},
    "qwen2": {
        "n_heads": 6, "n_key_value_heads": 2, "tied": True,
        "text": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    },
    "phi": {"n_key_value_heads": 2, "head_bias": True},
    "stablelm": {"n_key_value_heads": 2, "text": {"use_qkv_bias": True, "partial_rotary_factor": 0.5}},
    "stablelm_parallel": {"language": "stablelm", "text": {"use_parallel_residual": True, "partial_rotary_factor": 0.5}},
}  # fmt: skip
_OF_A_TOWER: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {"image_size": 18, "vision_feature_layer": -1},  # two pixels are left over
}
FAMILY: dict[str, dict[str, Any]] = {
    f"{language}-{tower}": {"language": language, "tower": tower} | own | of_tower
    for language, own in _OF_A_LANGUAGE.items()
    for tower, of_tower in _OF_A_TOWER.items()
}
"""Every language model with every vision tower."""


@dataclass(frozen=True)
class Pair:
    """One set of weights under two implementations."""

    hf: LlavaForConditionalGeneration
    ours: HookedLLaVA

    @property
    def slow(self) -> SlowLLaVA:
        return SlowLLaVA(self.hf)

    def prompt(self, **options: Any) -> dict[str, Tensor]:
        return make_prompt(self.hf, **options)

    @torch.no_grad()
    def hf_logits(self, prompt: dict[str, Tensor]) -> Tensor:
        return self.hf(**prompt).logits


@functools.cache
def pair(geometry: str = "plain", dtype: torch.dtype = torch.float32, seed: int = 0) -> Pair:
    """The same objects for every test that asks: read them, do not change them."""
    hf = make_hf_model(seed, dtype=dtype, **(GEOMETRIES | FAMILY)[geometry])
    return Pair(hf, HookedLLaVA.from_hf(hf))


@functools.cache
def layer_norm_pair(geometry: str = "plain", dtype: torch.dtype = torch.float64) -> Pair:
    """A LLaVA whose language tower has LayerNorms, of which no family that loads is one: torch's own in Hugging Face's model."""
    hf = make_hf_model(dtype=dtype, **GEOMETRIES[geometry])
    text = hf.config.text_config
    towers = hf.model.language_model
    for owner, name in [(towers, "norm")] + [
        (layer, name) for layer in towers.layers for name in ("input_layernorm", "post_attention_layernorm")
    ]:
        setattr(owner, name, torch.nn.LayerNorm(text.hidden_size, eps=text.rms_norm_eps, dtype=dtype))
    randomise(hf.to(torch.float32), 1)
    hf = hf.to(dtype).requires_grad_(False)
    config = LLaVAConfig.from_hf(hf.config)
    config = replace(config, language=replace(config.language, normalization_type="LN"))
    ours = HookedLLaVA.build(config, device="meta", hf_config=hf.config)
    share_weights(ours, hf, config)
    return Pair(hf, ours)


def fresh_pair(geometry: str = "plain", dtype: torch.dtype = torch.float32) -> Pair:
    """A pair of one's own, to be changed."""
    return pair.__wrapped__(geometry, dtype)


def batch(prompts: list[dict[str, Tensor]], side: Literal["left", "right"]) -> dict[str, Tensor]:
    """Single prompts of different lengths and numbers of images, padded to one batch."""
    length = max(p["input_ids"].shape[1] for p in prompts)
    joined: dict[str, Tensor] = {}
    for name, filler in (("input_ids", PAD_TOKEN_ID), ("attention_mask", 0)):
        rows = []
        for prompt in prompts:
            missing = length - prompt[name].shape[1]
            pad = (missing, 0) if side == "left" else (0, missing)
            rows.append(torch.nn.functional.pad(prompt[name], pad, value=filler))
        joined[name] = torch.cat(rows)
    pixels = [p["pixel_values"] for p in prompts if "pixel_values" in p]
    return joined | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def counted_positions(mask: Tensor) -> Tensor:
    """Position numbers over real tokens, as Hugging Face's generate makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def as_users_run() -> Iterator[None]:
    """Without the type checks that only tests have, so that wrong types meet the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def rounding_errors(exact: Any, rounded: Any, prompt: dict[str, Tensor]) -> dict[str, float]:
    """Mean squared errors of logits in bfloat16, from what the rounded weights give in float32: theirs, and ours both ways.

    `exact` and `rounded` are one model of Hugging Face's in both dtypes.
    """
    reference = copy.deepcopy(exact)
    reference.load_state_dict({name: w.float() for name, w in rounded.state_dict().items()})
    ours = HookedLLaVA.from_hf(rounded)
    prompt = prompt | {"pixel_values": prompt["pixel_values"].bfloat16().float()}
    real = prompt["attention_mask"].bool() if "attention_mask" in prompt else ...
    with torch.no_grad():
        truth = reference(**prompt).logits[real].double()
        logits = {
            "theirs": rounded(**prompt | {"pixel_values": prompt["pixel_values"].bfloat16()}).logits,
            "fused": ours(**prompt),
            "explicit": ours.run_with_cache(**prompt)[0],
        }
    return {name: (one[real] - truth).pow(2).mean().item() for name, one in logits.items()}


def assert_as_near_as_theirs(errors: list[dict[str, float]]) -> None:
    """Our errors in bfloat16 are at most 1.5 times Hugging Face's, seed by seed; with every hook over all seeds."""
    assert all(e["fused"] <= 1.5**2 * e["theirs"] for e in errors), errors
    assert sum(e["explicit"] for e in errors) <= 1.5**2 * sum(e["theirs"] for e in errors), errors  # one seed varies


def off(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute value."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


FP32 = 1e-5
"""Share of the scale; the promise is 1e-4."""


def hf_streams(model: Any, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of every block of both towers, of the projector, and the logits, under our hooks' names."""
    seen: dict[str, Tensor] = {}
    tower = model.model.vision_tower
    parts = {"projector.hook_out": model.model.multi_modal_projector}
    encoder = getattr(tower, "vision_model", tower).encoder
    parts |= {f"vision.blocks.{i}.hook_resid_post": layer for i, layer in enumerate(encoder.layers)}
    parts |= {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(model.model.language_model.layers)}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            seen["hook_logits"] = model(**prompt).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen


def assert_same_streams(models: Pair, prompt: dict[str, Tensor], tolerance: float = FP32) -> None:
    theirs = hf_streams(models.hf, prompt)
    names = [name for name in theirs if name in models.ours.hook_dict]
    _, ours = models.ours.run_with_cache(**prompt, names_filter=names)
    assert len(names) > models.ours.cfg.n_layers
    real = prompt["attention_mask"].bool()
    for name in names:
        a, b = ours[name], theirs[name]
        if not name.startswith(("vision.", "projector.")):
            a, b = a[real], b[real]
        assert off(a, b) <= tolerance, name
