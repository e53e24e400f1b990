"""Scores of layers, heads and positions, held against the paper's formulas on the slow model's activations."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava import results
from hooked_llava.analysis import (
    head_overlap,
    head_scores,
    heads_by_attention,
    layer_scores,
    logit_attribution,
    patch_importance,
    position_scores,
    top_heads,
)
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_cache import cache_answer
from hooked_llava.readout.metrics import Answer
from tests.fixtures_processor import make_processor
from tests.oracles.naive_scores import NaiveScores
from tests.pairs import as_users_run, batch, pair

GEOMETRIES = ["grouped", "biases"]


def exact(geometry: str = "grouped") -> Any:
    return pair(geometry, torch.float64)


@functools.cache
def naive(geometry: str, token: int = 7) -> NaiveScores:
    models = exact(geometry)
    return NaiveScores(models.hf, models.slow.run(**models.prompt()), token)


@functools.cache
def talking() -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair().hf, processor=make_processor())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_heads_are_scored_by_the_papers_formula(geometry: str) -> None:
    models, by_hand = exact(geometry), naive(geometry)
    scores = head_scores(models.ours, models.prompt(), 7)
    assert scores.dims == ("layer", "head")
    expected = [[by_hand.head(i, h) for h in range(by_hand.n_heads)] for i in range(3)]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.target == "#7"
    assert scores.n_forward == 1


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_layers_are_scored_and_telescope_to_the_answers_log_probability(geometry: str) -> None:
    models, by_hand = exact(geometry), naive(geometry)
    scores = layer_scores(models.ours, models.prompt(), 7)
    np.testing.assert_allclose(scores, [by_hand.layer(i) for i in range(3)], atol=1e-6)
    real = models.ours(models.prompt())[0, -1].log_softmax(-1)[7].item()
    assert scores.log_probability == pytest.approx(real, abs=1e-10), "the frozen lens at the end is the model's output"
    gained = scores.log_probability - scores.log_probability_of_embedding
    assert scores.sum().item() == pytest.approx(gained, abs=1e-10)
    assert scores.component.values.tolist() == ["attn", "mlp"]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_positions_are_scored_by_the_papers_formula(geometry: str) -> None:
    models, by_hand = exact(geometry), naive(geometry)
    read = position_scores(models.ours, models.prompt(), 7, heads=[(1, 3), (2, 0)])
    n = models.prompt()["input_ids"].shape[1]
    expected = [[by_hand.position(i, h, k) for k in range(n)] for i, h in ((1, 3), (2, 0))]
    np.testing.assert_allclose(read.score, expected, atol=1e-6)
    pattern = by_hand.seen["blocks.2.attn.hook_pattern"][0, 0, -1]
    np.testing.assert_allclose(read.attention[1], pattern, atol=1e-6)
    assert read.layer_head.values.tolist() == ["1.3", "2.0"]


def test_the_best_heads_are_chosen_best_first_and_positions_cut() -> None:
    models = exact()
    scores = head_scores(models.ours, models.prompt(), 7)
    best = top_heads(scores, 3)
    values = [float(scores[pair]) for pair in best]
    assert values == sorted(scores.values.ravel())[:-4:-1]
    read = position_scores(models.ours, models.prompt(), 7, heads=3, positions="image")
    assert read.layer_head.values.tolist() == [f"{layer}.{head}" for layer, head in best]
    whole = position_scores(models.ours, models.prompt(), 7, heads=best)
    np.testing.assert_allclose(read.score, whole.score.sel(position=read.position), atol=1e-12)


def test_the_models_own_token_is_the_default_and_words_are_taken() -> None:
    models = exact()
    own = int(models.ours(models.prompt())[0, -1].argmax())
    xr.testing.assert_allclose(
        head_scores(models.ours, models.prompt()), head_scores(models.ours, models.prompt(), own)
    )
    model = talking()
    inputs = model.prepare("What color is the star?", images=torch.zeros(3, 16, 16))
    red = head_scores(model, inputs, "red")
    token = model.to_single_token("red")
    for same in (np.int64(token), torch.tensor(token), np.array([token]), [torch.tensor(token)]):
        np.testing.assert_array_equal(head_scores(model, inputs, same), red)
    assert red.target == "red"
    np.testing.assert_allclose(red, head_scores(model, inputs, model.to_single_token("red")))
    spelled = head_scores(model, inputs, Answer("red", (model.to_single_token("red"), model.to_single_token("blue"))))
    assert abs(spelled - red).max() > 1e-3


def test_a_zero_vector_scores_zero() -> None:
    models = exact()
    cache = cache_answer(models.ours, models.prompt(), 7)
    nothing = torch.zeros(1, 1, 5, 48, dtype=torch.float64)
    assert cache.score(nothing, cache.resid[1]).abs().max() < 1e-13


def test_an_answer_of_several_tokens_is_the_sum_over_its_tokens_under_teacher_forcing() -> None:
    model = talking()
    inputs = model.prepare("What color is the star?", images=torch.zeros(3, 16, 16))
    scores = head_scores(model, inputs, "red star")
    red, star = model.to_single_token("red"), model.to_single_token("star")
    longer = {
        "input_ids": torch.cat([inputs.input_ids, torch.tensor([[red]])], 1),
        "pixel_values": inputs.pixel_values,
    }
    second = head_scores(model, longer, star)
    np.testing.assert_allclose(scores, head_scores(model, inputs, red) + second, atol=1e-4)
    layers = layer_scores(model, inputs, "red star")
    gained = layers.log_probability - layers.log_probability_of_embedding
    assert layers.sum().item() == pytest.approx(gained, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(side: Any) -> None:
    models = exact()
    alone = [models.prompt(n_text=7), models.prompt(n_text=4, seed=1), models.prompt(n_images=0, n_text=5, seed=2)]
    together = batch(alone, side)
    scores = head_scores(models.ours, together, [7, 8, 9])
    layers = layer_scores(models.ours, together, [7, 8, 9])
    for i, prompt in enumerate(alone):
        np.testing.assert_allclose(scores.sel(prompt=i), head_scores(models.ours, prompt, 7 + i), atol=1e-10)
        np.testing.assert_allclose(layers.sel(prompt=i), layer_scores(models.ours, prompt, 7 + i), atol=1e-10)
    assert scores.target == ["#7", "#8", "#9"]


def test_in_half_precision_scores_are_taken_in_single() -> None:
    half = pair("grouped", torch.bfloat16)
    scores = head_scores(half.ours, half.prompt(), 7)
    exactly = head_scores(exact().ours, exact().prompt(), 7)
    assert scores.dtype == np.float32
    assert abs(scores.values - exactly.values).max() < 0.1 * abs(exactly.values).max()


def test_several_analyses_share_one_forward_pass() -> None:
    models = exact()
    cache = cache_answer(models.ours, models.prompt(), 7)
    for analysis in (head_scores, layer_scores, patch_importance):
        shared, alone = analysis(models.ours, cache), analysis(models.ours, models.prompt(), 7)
        np.testing.assert_allclose(shared, alone, atol=1e-12)
        assert (shared.n_forward, alone.n_forward) == (0, 1)
    with pytest.raises(InputError, match=r"it lacks \['z'\], and target=None"):
        head_scores(models.ours, cache_answer(models.ours, models.prompt(), 7, parts=("v",)))
    with pytest.raises(InputError, match=r"lacks \[.*target="):
        head_scores(models.ours, cache, 8)
    with pytest.raises(InputError, match="method='.*AnswerCache"):
        patch_importance(models.ours, cache, method="rollout")


def test_each_of_several_prompts_has_its_own_best_heads() -> None:
    models = exact()
    two = models.ours.as_inputs(models.prompt(batch=2))
    read = position_scores(models.ours, two, [7, 9], heads=2)
    alone = [position_scores(models.ours, two[i], 7 + 2 * i, heads=2) for i in range(2)]
    assert read.layer_head.values.tolist() == [one.layer_head.values.tolist() for one in alone]
    np.testing.assert_allclose(read.score.sel(prompt=1), alone[1].score, atol=1e-9)


def test_positions_of_a_decision_and_padding_that_scores_nothing() -> None:
    models = exact()
    prompts = batch([models.prompt(n_text=7), models.prompt(n_text=4, seed=1)], "right")
    cache = cache_answer(models.ours, prompts, [7, 8])
    shared = position_scores(models.ours, cache, heads=2)
    alone = position_scores(models.ours, prompts, [7, 8], heads=2)
    xr.testing.assert_allclose(shared, alone)
    assert shared.layer_head.values.tolist() == alone.layer_head.values.tolist()
    assert (shared.n_forward, alone.n_forward) == (0, 2)
    short = position_scores(models.ours, models.prompt(n_text=4, seed=1), 8, heads=2)
    n = short.sizes["position"]
    np.testing.assert_allclose(alone.score[1, :, :n], short.score, atol=1e-9)
    assert np.isnan(alone.score[1, :, n:]).all()
    assert np.isfinite(alone.score[0]).all()
    with pytest.raises(InputError, match=r"lacks \[.*target="):
        position_scores(models.ours, cache, 8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_under_an_answer_of_several_tokens_are_those_of_the_prompt(side: Any) -> None:
    model = talking()
    both = model.prepare(["What color is the star?", "Is it red?"], padding_side=side)
    alone = position_scores(model, model.prepare("Is it red?"), "red star", heads=[(1, 2)])
    padded = position_scores(model, both[1], "red star", heads=[(1, 2)])
    real = both[1].padded_left().token_map.real
    np.testing.assert_allclose(padded.score[0, list(real)], alone.score[0], atol=1e-5)
    assert padded.label.values[list(real)].tolist() == alone.label.values.tolist()


def test_only_a_little_is_kept() -> None:
    models = exact()
    prompts = models.ours.as_inputs(models.prompt())
    cache = cache_answer(models.ours, prompts)
    n, cfg = prompts.shape[1], models.ours.config.language
    per_layer = cfg.n_heads * n + n * cfg.n_key_value_heads * cfg.d_head + cfg.n_heads * cfg.d_head + 2 * cfg.d_model
    assert sum(t.numel() for t in cache.held.values()) == 3 * per_layer


def test_the_first_order_of_a_score_is_the_direct_attribution_less_that_of_the_mean_word() -> None:
    """For a small vector S = v . (u_w - E_p[u]), so scores of a head scaled down follow the attribution."""
    models = exact()
    cache = cache_answer(models.ours, models.prompt(), 7)
    z = cache.part(2, "z")[0, 0, 1].double() @ models.ours.blocks[2].attn.W_O[1].double()
    stream = cache.resid[2].double()
    small = cache.score((1e-5 * z)[None, None], stream).item() / 1e-5
    logits = models.ours.unembed(stream[0, 0] / cache.scale[0, 0] * models.ours.ln_final.weight)
    parts = [
        float(logit_attribution(models.ours, models.prompt(), w, by="head").sel(layer=2, head=1))
        for w in range(models.ours.cfg.d_vocab)
    ]
    expected = parts[7] - float(logits.softmax(-1) @ torch.tensor(parts, dtype=torch.float64))
    assert small == pytest.approx(expected, rel=1e-3)


def test_overlap_and_ranking_by_attention() -> None:
    assert head_overlap([(0, 1), (2, 3)], [(2, 3), (0, 1)]) == 1.0
    assert head_overlap([(0, 1), (2, 3)], [(2, 3), (1, 1)]) == 0.5
    with pytest.raises(InputError, match="The sets have 1 and 2 heads"):
        head_overlap([(0, 1)], [(2, 3), (0, 1)])
    models = exact()
    mass = heads_by_attention(models.ours, models.prompt())
    image = list(models.ours.as_inputs(models.prompt()).token_map["image"])
    pattern = naive("grouped").seen["blocks.1.attn.hook_pattern"][0, :, -1]
    np.testing.assert_allclose(mass.sel(layer=1), pattern[:, image].sum(-1), atol=1e-6)


def test_each_prompt_attends_to_a_span_of_its_own_length() -> None:
    model = talking()
    questions = ["What color is the star?", "Is it red?"]
    both = heads_by_attention(model, model.prepare(questions), "question")
    assert both.dims == ("prompt", "layer", "head")
    for i, question in enumerate(questions):
        alone = heads_by_attention(model, model.prepare(question), "question")
        np.testing.assert_allclose(both.sel(prompt=i), alone, atol=1e-5)
    shared = heads_by_attention(model, cache_answer(model, model.prepare(questions), parts=("pattern",)), "question")
    np.testing.assert_array_equal(shared, both)


def test_scores_of_several_prompts_are_ranked_by_their_mean() -> None:
    scores = xr.DataArray([[[0.0, 4.0]], [[3.0, 0.0]]], dims=("prompt", "layer", "head"), coords={"layer": [5]})
    assert top_heads(scores, 1) == [(5, 1)]
    with pytest.raises(InputError, match="k=3 heads; expected 1 to 2"):
        top_heads(scores, 3)
    with pytest.raises(InputError, match=r"axes \(.*expected layer.*head"):
        top_heads(scores.isel(layer=0), 1)


def test_results_are_saved_and_loaded(tmp_path: Any) -> None:
    models = exact()
    for result in (
        head_scores(models.ours, models.prompt(), 7),
        position_scores(models.ours, models.prompt(), 7, heads=2),
    ):
        results.save(result, tmp_path / "result.safetensors")
        xr.testing.assert_identical(results.load(tmp_path / "result.safetensors"), result)


def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    models = exact()
    two = models.prompt(batch=2)
    with pytest.raises(InputError, match=r"heads \[\(0, 99\)\]; expected"):
        position_scores(models.ours, models.prompt(), 7, heads=[(0, 99)])
    monkeypatch.setattr(models.ours.language, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"Token id 99.*0\.\.98"):
        head_scores(models.ours, models.prompt(), 99)
    with as_users_run(), pytest.raises(InputError, match="target=1.5.*token"):
        head_scores(models.ours, two, 1.5)
    for heads in (2.0, True):
        with as_users_run(), pytest.raises(InputError, match=f"heads={heads}.*whole number, 'all'"):
            position_scores(models.ours, models.prompt(), 7, heads=heads)
    with as_users_run(), pytest.raises(InputError, match=r"heads=\[1, 2\]"):
        position_scores(models.ours, models.prompt(), 7, heads=[1, 2])
    with pytest.raises(InputError, match="target= names 3 answers for 2 prompts"):
        head_scores(models.ours, two, [7, 8, 9])
    with pytest.raises(InputError, match=r"target=\[.*different numbers.*single tokens"):
        head_scores(models.ours, two, [Answer("a", (7, 8)), Answer("b", (9,))])
    with pytest.raises(InputError, match=r"positions=.*prompt.*\.\."):
        position_scores(models.ours, models.prompt(), 7, positions=[99])


def test_top_heads_of_chosen_ones_are_called_by_their_numbers() -> None:
    coords = {"layer": [4, 2], "head": [7, 1, 3]}
    scores = xr.DataArray([[0.1, 0.5, 0.2], [0.9, 0.0, 0.3]], dims=("layer", "head"), coords=coords)
    assert top_heads(scores, 3) == [(2, 7), (4, 1), (2, 3)]
