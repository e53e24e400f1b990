from __future__ import annotations

import pytest

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import TIED, expected_tensors, hf_name, our_name
from hooked_llava.errors import CheckpointError
from tests.builders import make_hf_model, tiny_hf_config

CONFIG = LLaVAConfig.from_hf(tiny_hf_config())
GEOMETRIES = (
    {},
    {"n_key_value_heads": 2, "d_head": 10},
    {"attention_bias": True, "projector_bias": False},
    {"vision_feature_layer": [-1, -3], "select_strategy": "full"},
    {"text": {"mlp_bias": True}, "image_size": 32},
)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_expected_tensors_are_those_of_the_hugging_face_model(geometry):
    model = make_hf_model(**geometry)
    config = LLaVAConfig.from_hf(model.config)
    theirs = {our_name(name, config): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert theirs == expected_tensors(config)


def test_tied_unembedding_is_not_expected():
    untied = expected_tensors(LLaVAConfig.from_hf(tiny_hf_config()))
    tied = expected_tensors(LLaVAConfig.from_hf(tiny_hf_config(tied=True)))
    assert set(untied) - set(tied) == {TIED}


def test_hf_name_is_read_back():
    config = LLaVAConfig.from_hf(tiny_hf_config(attention_bias=True, text={"mlp_bias": True}))
    for name in expected_tensors(config):
        assert our_name(hf_name(name, config), config) == name
        assert our_name("model." + hf_name(name, config), config) == name


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("lm_head.weight", "language.unembed.weight"),
        ("language_model.lm_head.weight", "language.unembed.weight"),
        ("model.language_model.embed_tokens.weight", "language.embed.weight"),
        ("language_model.model.norm.weight", "language.ln_final.weight"),
        ("model.language_model.layers.11.mlp.down_proj.bias", "language.blocks.11.mlp.down.bias"),
        ("vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias", "vision.blocks.2.mlp.up.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision.ln_pre.bias"),
        ("model.vision_tower.encoder.layers.0.self_attn.out_proj.weight", "vision.blocks.0.attn.output.weight"),
        ("vision_tower.vision_model.embeddings.class_embedding", "vision.class_embed"),
        ("multi_modal_projector.linear_2.bias", "projector.linear_out.bias"),
        ("model.multi_modal_projector.linear_1.weight", "projector.linear_in.weight"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_our_name_reads_every_layout(name, ours):
    assert our_name(name, CONFIG) == ours


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.c_attn.weight",
        "language_model.model.layers.0.self_attn.k_norm.weight",
        "vision_tower.encoder.layers.x.layer_norm1.weight",
        "image_newline",
    ],
)
def test_our_name_refuses_what_llava_does_not_have(name):
    with pytest.raises(CheckpointError, match=f"Tensor '{name}'.*LlavaForConditionalGeneration"):
        our_name(name, CONFIG)


@pytest.mark.parametrize("name", ["language.blocks.0.attn.W_Q", "embed.weight", "vision.class_embed.weights"])
def test_hf_name_refuses_what_is_not_ours(name):
    with pytest.raises(CheckpointError, match=f"'{name}'.*HookedLLaVA.*'language.blocks.0"):
        hf_name(name, CONFIG)
