from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import ConfigError, InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.verify import ParityRow, ParityTable, verify
from tests.builders import D_VOCAB, IMAGE_TOKEN_ID, PAD_TOKEN_ID, make_hf_model, make_prompt

GEOMETRIES = (
    {},
    {"n_key_value_heads": 2, "d_head": 10},
    {"n_key_value_heads": 1, "attention_bias": True, "text": {"mlp_bias": True}},
    {"vision_feature_layer": -1, "select_strategy": "full", "projector_bias": False},
    {"vision_feature_layer": [-1, -3], "image_size": 32},
    {"tied": True, "n_layers": 5, "n_vision_layers": 2},
)


@pytest.fixture(scope="module")
def hf_model():
    return make_hf_model()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_model_is_the_same_as_the_one_it_was_made_from(geometry):
    hf_model = make_hf_model(**geometry)
    table = verify(HookedLLaVA.from_hf(hf_model), hf_model)
    assert table.ok, table


def test_rows_follow_the_forward_pass(hf_model):
    hooks = [row.hook for row in verify(HookedLLaVA.from_hf(hf_model), hf_model).rows]
    assert hooks == [
        "vision.blocks.0.hook_resid_pre",
        "vision.blocks.0.hook_resid_post",
        "vision.blocks.1.hook_resid_post",
        "vision.hook_out",
        "projector.hook_out",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post",
        "hook_logits",
    ]


@pytest.mark.parametrize("n_images", [0, 2])
def test_given_inputs_are_used(hf_model, n_images):
    table = verify(HookedLLaVA.from_hf(hf_model), hf_model, make_prompt(hf_model, n_images=n_images, batch=2))
    assert table.ok, table
    assert any(row.hook.startswith("vision.") for row in table.rows) == bool(n_images)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_left_out(hf_model, left):
    prompt = make_prompt(hf_model, batch=2, n_text=9)
    padded = slice(0, 1) if left else slice(-3, None)
    prompt["input_ids"][1, padded] = PAD_TOKEN_ID
    prompt["attention_mask"][1, padded] = 0
    table = verify(HookedLLaVA.from_hf(hf_model), hf_model, prompt)
    assert table.ok, table


def test_the_same_seed_gives_the_same_table(hf_model):
    model = HookedLLaVA.from_hf(hf_model)
    assert verify(model, hf_model) == verify(model, hf_model)
    assert verify(model, hf_model) != verify(model, hf_model, seed=1)


@pytest.mark.parametrize(
    ("name", "first_wrong"),
    [
        ("vision.ln_pre.weight", "vision.blocks.0.hook_resid_pre"),
        ("vision.blocks.1.mlp.down.bias", "vision.blocks.1.hook_resid_post"),
        ("projector.linear_out.bias", "projector.hook_out"),
        ("language.embed.weight", "blocks.0.hook_resid_pre"),
        ("language.blocks.2.attn.output.weight", "blocks.2.hook_resid_post"),
        ("language.ln_final.weight", "hook_logits"),
    ],
)
def test_a_changed_weight_shows_from_its_place_on(tmp_path, hf_model, name, first_wrong):
    hf_model.save_pretrained(tmp_path)
    model = HookedLLaVA.from_pretrained(tmp_path)
    assert verify(model, hf_model).ok
    model.get_parameter(name).mul_(1.01)
    table = verify(model, hf_model)
    assert not table.ok
    wrong = [row.hook for row in table.rows if not row.ok]
    assert wrong[0] == first_wrong
    assert all(row.ok for row in table.rows[: [row.hook for row in table.rows].index(first_wrong)])


def test_a_nan_is_not_the_same(tmp_path, hf_model):
    hf_model.save_pretrained(tmp_path)
    model = HookedLLaVA.from_pretrained(tmp_path)
    model.get_parameter("projector.linear_out.bias").fill_(float("nan"))
    table = verify(model, hf_model)
    assert not table.ok
    assert table.worst.hook == "projector.hook_out"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_allowed_its_roundings(dtype):
    hf_model = make_hf_model(dtype=dtype)
    model = HookedLLaVA.from_hf(hf_model)
    table = verify(model, hf_model)
    assert table.ok, table
    assert table.rows[0].tolerance == 8 * torch.finfo(dtype).eps
    assert verify(model, hf_model, tolerance=0.5).rows[0].tolerance == 0.5


def ours_among_hooks(hf_model):
    """Our hooks only: transformers installs some of its own when it first runs, and keeps them."""
    hooks = [(*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in hf_model.modules()]
    return [hook for of_module in hooks for hook in of_module if hook.__module__.startswith("hooked_llava")]


def test_hugging_faces_model_is_left_without_a_trace(hf_model, monkeypatch):
    before = {name: parameter.clone() for name, parameter in hf_model.named_parameters()}
    model = HookedLLaVA.from_hf(hf_model)
    verify(model, hf_model)
    heard = []

    def failing(hidden):
        heard.extend(ours_among_hooks(hf_model))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(hf_model.lm_head, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        verify(model, hf_model)
    assert heard
    assert not ours_among_hooks(hf_model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in hf_model.named_parameters())


def test_inputs_are_checked(hf_model):
    with pytest.raises(InputError):
        verify(HookedLLaVA.from_hf(hf_model), hf_model, torch.full((1, 3), IMAGE_TOKEN_ID))


def test_models_of_different_sizes_are_refused(hf_model):
    model = HookedLLaVA.from_hf(make_hf_model(n_layers=4, d_mlp=80))
    message = r"language part: n_layers=4 and 3, d_mlp=80 and 74 \(ours and Hugging Face's\)"
    with pytest.raises(ConfigError, match=message):
        verify(model, hf_model)
    other = make_hf_model(image_token_id=D_VOCAB - 1)
    with pytest.raises(ConfigError, match=r"image_token_id=98 and 5 \(ours and Hugging Face's\)"):
        verify(HookedLLaVA.from_hf(other), hf_model)


def test_the_table_prints_aligned():
    rows = (
        ParityRow("blocks.0.hook_resid_post", difference=1e-7, scale=0.0, tolerance=1e-4),
        ParityRow("hook_logits", difference=0.0, scale=0.0, tolerance=1e-4),
    )
    table = ParityTable(rows)
    assert (table.ok, table.worst) == (False, rows[0])
    assert str(table).splitlines() == [
        "activation                difference  scale  ratio    same",
        "blocks.0.hook_resid_post  1.0e-07     0      1.0e+00  NO",
        "hook_logits               0.0e+00     0      0.0e+00  yes",
        "1 of 2 activations are the same (ratio at most 1.0e-04).",
    ]
