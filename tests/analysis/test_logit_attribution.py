"""Direct logit attribution, held against sums over Hugging Face's weights."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava.analysis import logit_attribution
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.fixtures_processor import make_processor
from tests.pairs import Pair, as_users_run, pair

GEOMETRIES = ["grouped", "biases"]


def exact(geometry: str) -> Pair:
    return pair(geometry, torch.float64)


@functools.cache
def seen(geometry: str) -> dict[str, Tensor]:
    return exact(geometry).slow.run(**exact(geometry).prompt())


def direction(geometry: str, token: int, baseline: int | None, position: int) -> Tensor:
    """What a contribution is multiplied by: the norm's weight times the unembedding over the position's scale."""
    hf = exact(geometry).hf
    unembedding = hf.lm_head.weight[token] - (hf.lm_head.weight[baseline] if baseline is not None else 0)
    return hf.model.language_model.norm.weight * unembedding / seen(geometry)["ln_final.hook_scale"][0, position]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("baseline", "position", "index"), [(None, "last", -1), (8, "last", -1), (8, 3, 3), (None, -2, -2)]
)
def test_components_sum_to_the_logit(geometry: str, baseline: int | None, position: Any, index: int) -> None:
    models = exact(geometry)
    parts = logit_attribution(models.ours, models.prompt(), 7, baseline, position=position)
    logits = models.ours(models.prompt())[0, index]
    total = (logits[7] - (logits[baseline] if baseline is not None else 0)).item()
    assert parts.sum().item() == pytest.approx(total, abs=1e-4)
    assert parts.logit == pytest.approx(total, abs=1e-4)
    assert parts.component.values.tolist() == ["embed", "0_attn", "0_mlp", "1_attn", "1_mlp", "2_attn", "2_mlp"]
    by = direction(geometry, 7, baseline, index)
    for name, hook in (
        ("embed", "hook_embed"),
        ("1_attn", "blocks.1.hook_attn_out"),
        ("2_mlp", "blocks.2.hook_mlp_out"),
    ):
        value = (seen(geometry)[hook][0, index] @ by).item()
        assert parts.sel(component=name).item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_heads_sum_to_attention_less_its_bias(geometry: str) -> None:
    models = exact(geometry)
    heads = logit_attribution(models.ours, models.prompt(), 7, 8, by="head")
    assert dict(heads.sizes) == {"layer": 3, "head": models.ours.cfg.n_heads}
    by = direction(geometry, 7, 8, -1)
    for layer in range(3):
        result = seen(geometry)[f"blocks.{layer}.attn.hook_result"][0, -1] @ by
        np.testing.assert_allclose(heads[layer], result, atol=1e-4)
        out = seen(geometry)[f"blocks.{layer}.hook_attn_out"][0, -1] - models.ours.blocks[layer].attn.b_O
        assert heads[layer].sum().item() == pytest.approx((out @ by).item(), abs=1e-4)


def test_the_models_own_answer_is_the_default() -> None:
    models = pair()
    parts = logit_attribution(models.ours, models.prompt())
    best = models.ours(models.prompt())[0, -1].argmax().item()
    assert parts.attrs["answer"] == f"#{best}"
    assert parts.attrs["baseline"] == ""
    assert parts.attrs["position"] == models.prompt()["input_ids"].shape[1] - 1


def test_words_are_taken() -> None:
    model = HookedLLaVA.from_hf(pair().hf, processor=make_processor())
    inputs = model.prepare("What color is the star?", images=torch.zeros(3, 16, 16))
    parts = logit_attribution(model, inputs, "red", "blue")
    same = logit_attribution(model, inputs, model.to_single_token("red"), model.to_single_token("blue"))
    assert (parts.answer, parts.baseline) == ("red", "blue")
    np.testing.assert_array_equal(parts, same)


def test_what_does_not_fit_is_refused() -> None:
    models = pair()
    with pytest.raises(InputError, match="position='image'.*4 positions.*'last'"):
        logit_attribution(models.ours, models.prompt(), 7, position="image")
    with pytest.raises(InputError, match=r"Token id 99.*0\.\.98"):
        logit_attribution(models.ours, models.prompt(), 99)
    with as_users_run(), pytest.raises(InputError, match="by='heads'; expected one of 'component', 'layer', 'head'"):
        logit_attribution(models.ours, models.prompt(), 7, by="heads")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("position", ["last", 5])
def test_every_division_sums_to_the_logit_with_what_is_left_over(geometry: str, position: Any) -> None:
    models = exact(geometry)
    index = -1 if position == "last" else position
    by = direction(geometry, 7, 8, index)
    found = {
        way: logit_attribution(models.ours, models.prompt(), 7, 8, by=way, position=position)
        for way in ("component", "layer", "head", "neuron", "source", "patch")
    }

    def part(*hooks: str) -> float:
        return sum((seen(geometry)[hook][0, index] @ by).item() for hook in hooks)

    mlps = [f"blocks.{i}.hook_mlp_out" for i in range(3)]
    attentions = [f"blocks.{i}.hook_attn_out" for i in range(3)]
    biases = sum((models.ours.blocks[i].attn.b_O @ by).item() for i in range(3))
    mlp_biases = sum((models.ours.blocks[i].mlp.b_out @ by).item() for i in range(3))
    rest = {
        "component": 0.0,
        "layer": part("hook_embed"),
        "head": part("hook_embed", *mlps) + biases,
        "source": part("hook_embed", *mlps) + biases,
        "neuron": part("hook_embed", *attentions) + mlp_biases,
    }
    for way, expected in rest.items():
        assert found[way].sum().item() == pytest.approx(found[way].logit - expected, abs=1e-4), way
        assert found[way].rest == pytest.approx(expected, abs=1e-4), way
    np.testing.assert_allclose(found["source"].sum("source"), found["head"], atol=1e-4)
    image = list(models.ours.as_inputs(models.prompt()).token_map["image"])
    grid = found["source"].values[..., image].reshape(found["patch"].shape)
    np.testing.assert_allclose(found["patch"], grid, atol=1e-6)
    layer = [part(attention, mlp) for attention, mlp in zip(attentions, mlps, strict=True)]
    np.testing.assert_allclose(found["layer"], layer, atol=1e-4)


def test_a_message_is_pattern_times_value_through_the_output_weights() -> None:
    models = exact("grouped")
    found = logit_attribution(models.ours, models.prompt(), 7, 8, by="source")
    block, held = models.ours.blocks[1], seen("grouped")
    message = (
        held["blocks.1.attn.hook_pattern"][0, 4, -1, 3] * held["blocks.1.attn.hook_v"][0, 3, 1]
    )  # head 4 reads key-value head 1
    expected = (message @ block.attn.W_O[4].double() @ direction("grouped", 7, 8, -1)).item()
    assert found.sel(layer=1, head=4, source=3).item() == pytest.approx(expected, abs=1e-5)


def test_patches_of_several_images_and_of_none() -> None:
    models = pair("full")
    found = logit_attribution(models.ours, models.prompt(n_images=2), 7, by="patch")
    assert dict(found.sizes) == {"layer": 3, "head": 4, "image": 2, "patch_row": 2, "patch_col": 2}
    sources = logit_attribution(models.ours, models.prompt(n_images=2), 7, by="source")
    token_map = models.ours.as_inputs(models.prompt(n_images=2)).token_map
    value = sources.sel(source=token_map.patch_to_position(1, 0, image=1))
    np.testing.assert_allclose(found.sel(image=1, patch_row=1, patch_col=0), value)
    with pytest.raises(InputError, match=r"by='patch'.*images.*0"):
        logit_attribution(models.ours, models.prompt(n_images=0), 7, by="patch")


@pytest.mark.parametrize("by", ["component", "head", "source"])
def test_several_prompts_side_by_side(by: Any) -> None:
    models = pair()
    found = logit_attribution(models.ours, models.prompt(batch=2), 7, by=by)
    inputs = models.ours.as_inputs(models.prompt(batch=2))
    for i in range(2):
        alone = logit_attribution(models.ours, inputs[i], 7, by=by)
        np.testing.assert_allclose(found.sel(prompt=i), alone, atol=1e-5)
        assert found.logit[i] == pytest.approx(alone.logit, abs=1e-5)


@pytest.mark.parametrize("by", ["component", "layer", "head"])
def test_parts_and_rest_are_the_logit_in_half_precision_too(by: Any) -> None:
    models = pair("plain", torch.bfloat16)
    found = logit_attribution(models.ours, models.prompt(), 7, by=by)
    assert float(found.sum()) + found.rest == pytest.approx(found.logit, abs=1e-5)
