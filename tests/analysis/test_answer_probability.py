"""The answer's probability by layer, held against the formula on Hugging Face's own streams."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from hooked_llava.analysis import answer_probability, with_released_norm
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.viz import probability_curves
from tests.fixtures_processor import make_processor
from tests.pairs import pair

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)


@functools.cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair("plain", torch.float64).hf, processor=make_processor())


@functools.cache
def prompts() -> Inputs:
    return model().prepare(["What color is the star?", "Is it red or blue?"], [IMAGE, IMAGE.flip(1)])


@torch.no_grad()
def expected(row: int, token: int, norm: str) -> list[float]:
    """softmax(h W_U) of every hidden state at the last position."""
    hf, one = pair("plain", torch.float64).hf, prompts()[row]
    where = [int(p) for p in one.token_map.real]
    streams = hf(
        input_ids=one.input_ids[:, where], pixel_values=one.pixel_values, output_hidden_states=True
    ).hidden_states
    seen = pair("plain", torch.float64).slow.run(one.input_ids[:, where], one.pixel_values)
    raw = [stream[0, -1] for stream in streams[:-1]] + [seen["blocks.2.hook_resid_post"][0, -1]]
    if norm == "final":
        raw = [hf.model.language_model.norm(x) for x in raw]
        torch.testing.assert_close(
            raw[-1], streams[-1][0, -1], rtol=1e-4, atol=1e-5
        )  # Hugging Face's last state is normalised already
    return [(x @ hf.lm_head.weight.T).softmax(-1)[token].item() for x in raw]


def test_equal_to_the_formula_by_layer_and_form() -> None:
    found = answer_probability(model(), prompts(), ["Yes", "star"], ["no", "redder"])
    assert found.dims == ("prompt", "norm", "layer", "form")
    assert found.form.values.tolist() == ["lower", "capitalised", "false lower", "false capitalised"]
    for row, words in enumerate((["yes", "Yes", "no", "No"], ["star", "Star", "redder", "Redder"])):
        for column, word in enumerate(words):
            for norm in ("none", "final"):
                cells = found.sel(norm=norm).isel(prompt=row, form=column)
                token = model().tokenizer.convert_tokens_to_ids(word)
                if word in ("Star", "Redder"):
                    assert token == model().tokenizer.unk_token_id
                    assert np.isnan(cells).all()
                    continue
                np.testing.assert_allclose(cells, expected(row, token, norm), rtol=1e-4, atol=1e-9)


def test_in_half_precision_raw_logits_are_taken_in_single() -> None:
    half = HookedLLaVA.from_hf(pair("plain", torch.bfloat16).hf, processor=make_processor())
    asked = half.prepare("What color is the star?", IMAGE)
    _, cache = half.run_with_cache(asked, names_filter="resid_pre", positions="last")
    found = answer_probability(half, asked, "yes").sel(norm="none", form="lower")
    token, unembed = half.to_single_token("yes"), half.unembed.weight.float()
    for layer in range(half.cfg.n_layers):
        exact = (cache["resid_pre", layer][0, 0].float() @ unembed.T).softmax(-1)[token].item()
        assert found[layer].item() == pytest.approx(exact, rel=1e-5)


def test_one_prompt_and_no_false_option() -> None:
    found = answer_probability(model(), prompts()[0], "yes")
    assert found.dims == ("norm", "layer", "form")
    assert np.isnan(found.sel(form=["false lower", "false capitalised"])).all()
    both = answer_probability(model(), prompts(), "yes")
    np.testing.assert_allclose(found[..., :2], both[0, ..., :2], rtol=1e-4)
    assert found.attrs["answer"] == "yes"
    assert found.attrs["n_forward"] == 1


def test_the_models_own_answer_by_default(tiny_shapes: HookedLLaVA) -> None:
    asked = tiny_shapes.prepare("Who made the star?")
    found = answer_probability(tiny_shapes, asked)
    said = tiny_shapes.generate(asked)
    assert found.attrs["answer"] == said
    assert float(found.sel(norm="final", form="capitalised")[-1]) == pytest.approx(
        tiny_shapes(asked)[0, -1].softmax(-1).max().item(), abs=1e-4
    )


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError, match="answer= names 1 answers for 2 prompts"):
        answer_probability(model(), prompts(), ["red"])
    with pytest.raises(InputError, match="answer_probability.*no processor.*from_hf"):
        answer_probability(pair().ours, pair().prompt(), "red")


@torch.no_grad()
def test_the_released_curve_is_that_of_hugging_faces_hidden_states() -> None:
    """The last of them has passed the final norm, so that softmax(h W_U) of all is what the released code plots."""
    hf, one = pair("plain", torch.float64).hf, prompts()[0]
    probability = answer_probability(model(), one, "red", "blue")
    joined = with_released_norm(probability)
    where = [int(p) for p in one.token_map.real]
    how = {"input_ids": one.input_ids[:, where], "pixel_values": one.pixel_values}
    hidden = hf(**how, output_hidden_states=True).hidden_states
    token = model().to_single_token("red")
    expected = [float((h[0, -1] @ hf.lm_head.weight.T).softmax(-1)[token]) for h in hidden]
    np.testing.assert_allclose(joined.sel(norm="released", form="lower"), expected, atol=1e-6)
    assert joined.norm.values.tolist() == ["none", "final", "released"]
    np.testing.assert_array_equal(joined.sel(norm=["none", "final"]), probability)
    assert joined.attrs == probability.attrs
    lines = probability_curves(probability, norm="released").axes[0].lines
    np.testing.assert_allclose(np.asarray(lines[0].get_ydata()), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"'none' and 'final'"):
        with_released_norm(probability.sel(norm="none"))
    with pytest.raises(InputError, match="last layer"):
        with_released_norm(probability.isel(layer=slice(None, -1)))
