"""The config: everything read from the checkpoint's, nothing assumed, and what cannot be built refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from transformers import LlavaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.errors import ConfigError
from tests.builders import tiny_hf_config
from tests.pairs import FAMILY, GEOMETRIES


def read(**fields: Any) -> LLaVAConfig:
    return LLaVAConfig.from_hf(tiny_hf_config(**fields))


def test_every_size_comes_from_the_checkpoint() -> None:
    config = LLaVAConfig.from_hf(
        tiny_hf_config(
            n_heads=6, n_key_value_heads=2, n_layers=4, n_vision_layers=5, d_model=54, d_head=10, d_mlp=31, d_vision=28,
            d_vision_mlp=37, image_size=21, patch_size=7, attention_bias=True,
            text={"rms_norm_eps": 0.003, "mlp_bias": True, "hidden_act": "gelu", "max_position_embeddings": 77},
            vision={"layer_norm_eps": 0.004, "hidden_act": "gelu", "num_channels": 1}, projector_hidden_act="relu",
        )
    )  # fmt: skip
    language, vision = config.language, config.vision
    assert (language.n_layers, language.n_heads, language.n_key_value_heads) == (4, 6, 2)
    assert (language.d_model, language.d_head, language.d_mlp, language.d_vocab, language.n_ctx) == (54, 10, 31, 99, 77)
    assert (language.eps, language.act_fn, language.normalization_type) == (0.003, "gelu", "RMS")
    assert (language.qkv_bias, language.out_bias, language.mlp_bias, language.gated_mlp, language.causal) == (True,) * 5
    assert (vision.n_layers, vision.n_heads, vision.n_key_value_heads, vision.d_model, vision.d_mlp) == (
        5,
        4,
        4,
        28,
        37,
    )
    assert (vision.eps, vision.act_fn, vision.normalization_type, vision.n_channels) == (0.004, "gelu", "LN", 1)
    assert (vision.gated_mlp, vision.causal, vision.rotary) == (False, False, None)
    assert (vision.patch_grid, vision.n_patches, vision.n_positions, vision.n_features) == ((3, 3), 9, 10, 9)
    assert (config.projector.d_in, config.projector.d_model, config.projector.act_fn) == (28, 54, "relu")
    assert config.image_token_id == 5
    assert language.final_rms
    assert not vision.final_rms
    assert not language.attn_only


def test_head_width_defaults_to_its_share_of_the_model() -> None:
    assert read(d_model=48, n_heads=4).language.d_head == 12


@pytest.mark.parametrize(
    ("layer", "n_layers", "expected", "n_run"),
    [
        (-2, 24, (23,), 23),
        (-1, 3, (3,), 3),
        (0, 3, (0,), 0),
        (-4, 3, (0,), 0),
        (2, 3, (2,), 2),
        ([1, -1, -3], 3, (1, 3, 1), 3),
    ],
)
def test_feature_layers(layer: int | list[int], n_layers: int, expected: tuple[int, ...], n_run: int) -> None:
    vision = read(vision_feature_layer=layer, n_vision_layers=n_layers).vision
    assert vision.feature_layers == expected
    assert vision.n_layers_run == n_run
    assert vision.d_features == vision.d_model * len(expected)
    assert vision.several_features == isinstance(layer, list)


def test_the_class_token_is_kept_by_the_full_strategy() -> None:
    assert read(select_strategy="full").vision.n_features == 5
    assert read(select_strategy="default").vision.n_features == 4


def test_special_tokens_from_either_config() -> None:
    assert read().eos_token_ids == (2,)
    assert read(text={"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)
    assert read(text={"eos_token_id": None}).eos_token_ids == ()
    assert read().pad_token_id == 0
    assert read(text={"pad_token_id": 3}).pad_token_id == 3
    outer = tiny_hf_config(text={"pad_token_id": None})
    outer.pad_token_id = 4
    assert LLaVAConfig.from_hf(outer).pad_token_id == 4


def test_names() -> None:
    assert LLaVAConfig.from_hf(tiny_hf_config(), model_name="mine").model_name == "mine"
    assert read().model_name == "llava"


@pytest.mark.parametrize("geometry", ["plain", "linear_rope", "llama3_rope", "yarn_rope", "multi_query"])
def test_rotary_frequencies_are_hugging_faces(geometry: str) -> None:
    hf_config = tiny_hf_config(**GEOMETRIES[geometry])
    theirs = LlamaRotaryEmbedding(hf_config.text_config)
    ours = LLaVAConfig.from_hf(hf_config).language.rotary
    assert ours is not None
    assert torch.equal(torch.tensor(ours.frequencies), theirs.inv_freq)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)


def text(**fields: Any) -> Callable[[LlavaConfig], None]:
    return lambda config: [setattr(config.text_config, name, value) for name, value in fields.items()] and None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: setattr(c, "model_type", "llava_nxt"), "type 'llava_nxt'.*Known: llava"),
        (text(model_type="lama"), "language model.*'lama'.*Did you mean: llama"),
        (lambda c: setattr(c.vision_config, "model_type", "clip_vision"), "type 'clip_vision'.*Did you mean: clip_vision_model"),
        (lambda c: vars(c).update(vision_feature_select_strategy="cls"), "vision_feature_select_strategy.*'cls'.*'default'"),
        (lambda c: setattr(c, "vision_feature_layer", 4), r"vision_feature_layer=4.*3 vision layers; expected -4\.\.3"),
        (lambda c: setattr(c, "vision_feature_layer", [-1, -5]), r"vision_feature_layer=-5.*-4\.\.3"),
        (text(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "rotary embedding.*'dynamic'.*default, linear"),
        (text(num_key_value_heads=3), "n_heads=4.*n_key_value_heads=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(change: Callable[[LlavaConfig], None], match: str) -> None:
    config = tiny_hf_config()
    change(config)
    with pytest.raises(ConfigError, match=match):
        LLaVAConfig.from_hf(config)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tower": "siglip", "select_strategy": "default"}, "'default'.*SigLIP.*class token"),
        ({"language": "phi", "text": {"qk_layernorm": True}}, "qk_layernorm=True.*not built here"),
        ({"language": "mistral", "text": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}}, "type 'dynamic'"),
        ({"language": "qwen2", "n_key_value_heads": 3}, "n_heads=4.*n_key_value_heads=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_of_the_family_is_refused(fields: dict[str, Any], match: str) -> None:
    config = tiny_hf_config(**fields)
    with pytest.raises(ConfigError, match=match):
        LLaVAConfig.from_hf(config)


@pytest.mark.parametrize("name", FAMILY)
def test_sizes_of_the_family(name: str) -> None:
    fields = {key: value for key, value in FAMILY[name].items() if key != "head_bias"}
    config = LLaVAConfig.from_hf(tiny_hf_config(**fields))
    language, vision = config.language, config.vision
    windows = {"mistral": (5, (0, 1, 2)), "qwen2": (4, (1, 2))}
    assert (language.window, language.windowed_layers) == windows.get(fields["language"], (None, ()))
    assert (language.qkv_bias, language.out_bias, language.mlp_bias) == {
        "qwen2": (True, False, False), "phi": (True, True, True), "stablelm": (True, False, False),
        "stablelm_parallel": (False, False, False),
    }.get(name.partition("-")[0], (False, False, False))  # fmt: skip
    assert language.parallel_attn_mlp == name.startswith(("phi", "stablelm_parallel"))
    assert language.rotary is not None
    n_turned = 2 * len(language.rotary.frequencies)
    assert n_turned == language.d_head // (2 if fields["language"] in ("phi", "stablelm") else 1)
    assert language.tied_embeddings == (fields["language"] == "qwen2")
    assert vision.class_token == vision.pre_norm == (fields["tower"] == "clip")
    assert (vision.n_positions, vision.n_features) == ((5, 4) if fields["tower"] == "clip" else (4, 4))
    assert list(vision.patches_along("pos")) == list(range(vision.n_positions - 4, vision.n_positions))
    assert not vision.keeps_class_token


def test_a_list_says_which_layers_slide() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    assert read(language="qwen2", text=text).language.windowed_layers == (0, 2)
    assert read(language="qwen2", text=text | {"use_sliding_window": False}).language.windowed_layers == ()
    assert read(language="mistral", text={"sliding_window": None}).language.window is None


def test_it_is_frozen() -> None:
    config = read()
    with pytest.raises(FrozenInstanceError):
        config.image_token_id = 3  # type: ignore[misc]
    assert replace(config, image_token_id=3).image_token_id == 3
