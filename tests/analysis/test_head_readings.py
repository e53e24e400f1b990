"""The paper's readings of a head, from sums over the slow model's activations."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import attention_to_object, head_readings, position_scores
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from tests.fixtures_processor import make_processor
from tests.oracles.naive_scores import NaiveScores
from tests.pairs import as_users_run, batch, pair


def exact() -> Any:
    return pair("grouped", torch.float64)


@functools.cache
def naive() -> NaiveScores:
    return NaiveScores(exact().hf, exact().slow.run(**exact().prompt()), 7)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_four_readings_are_their_sums(layer: int) -> None:
    models, by_hand = exact(), naive()
    read = head_readings(models.ours, models.prompt(), layer, 4, 7, positions=[2, 6], k=5)
    seen = by_hand.seen
    for i, position in enumerate((2, 6)):
        attention = sum(
            (seen[f"blocks.{j}.hook_attn_out"][0, position] for j in range(layer)), torch.zeros(48, dtype=torch.float64)
        )
        mlps = sum(
            (seen[f"blocks.{j}.hook_mlp_out"][0, position] for j in range(layer)), torch.zeros(48, dtype=torch.float64)
        )
        stream = seen[f"blocks.{layer}.hook_resid_pre"][0, position]
        torch.testing.assert_close(attention + mlps + seen["hook_embed"][0, position], stream)
        vectors = {
            "layer_input": stream,
            "key_input": attention,
            "value_input": mlps,
            "value_output": by_hand.message(layer, 4, position),
        }
        for name, vector in vectors.items():
            logits = by_hand.lens(vector)
            found = read.sel(reading=name).isel(position=i)
            np.testing.assert_allclose(found.value, logits.topk(5).values.detach(), atol=1e-5)
            if logits.abs().max() > 0:
                assert found.token_id.values.tolist() == logits.topk(5).indices.tolist()
        pattern = seen[f"blocks.{layer}.attn.hook_pattern"][0, 4, -1, position].item()
        assert read.attention[i].item() == pytest.approx(pattern, abs=1e-6)


def test_the_best_positions_come_first_with_their_scores() -> None:
    models = exact()
    read = head_readings(models.ours, models.prompt(), 1, 3, 7, top=4)
    scores = position_scores(models.ours, models.prompt(), 7, heads=[(1, 3)]).score[0]
    order = np.argsort(-scores.values)[:4]
    assert read.position.values.tolist() == order.tolist()
    np.testing.assert_allclose(read.score, scores.values[order], atol=1e-10)
    assert read.token.values[0, 0, 0].startswith("#")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_none_of_the_best_positions(side: Any) -> None:
    models = exact()
    short = models.prompt(n_text=4, seed=1)
    padded = models.ours.as_inputs(batch([models.prompt(n_text=12), short], side))[1]
    alone = head_readings(models.ours, short, 1, 3, 7, top=50)
    read = head_readings(models.ours, padded, 1, 3, 7, top=50)
    real = padded.token_map.real
    assert read.position.values.tolist() == [real.start + p for p in alone.position.values]
    np.testing.assert_allclose(read.score, alone.score, atol=1e-9)


def test_words_in_the_space_of_input_embeddings() -> None:
    models = exact()
    inner, cosine = (
        head_readings(models.ours, models.prompt(), 2, 0, 7, positions=[0, 3], space=space, k=3)
        for space in ("embed", "cosine")
    )
    stream, table = naive().seen["blocks.2.hook_resid_pre"][0, 3], models.hf.model.language_model.embed_tokens.weight
    np.testing.assert_allclose(inner.value.sel(reading="layer_input")[1], (table @ stream).topk(3).values, atol=1e-5)
    expected = torch.nn.functional.cosine_similarity(table, stream[None]).topk(3)
    np.testing.assert_allclose(cosine.value.sel(reading="layer_input")[1], expected.values, atol=1e-6)
    assert cosine.token_id.sel(reading="layer_input")[1].values.tolist() == expected.indices.tolist()


def test_attention_to_an_object_under_two_questions() -> None:
    models = exact()
    same, other = models.prompt(seed=1), models.prompt(seed=2)
    found = attention_to_object(models.ours, same, other, [2, 3])
    for name, prompt in (("same", same), ("other", other)):
        held = models.slow.run(**prompt)
        for layer in range(3):
            expected = held[f"blocks.{layer}.attn.hook_pattern"][0, :, -1, 2:4].sum(-1)
            np.testing.assert_allclose(found.sel(question=name, layer=layer), expected, atol=1e-6)
    chosen = attention_to_object(models.ours, same, other, [2, 3], heads=[(2, 1), (0, 5)])
    assert chosen.layer_head.values.tolist() == ["2.1", "0.5"]
    np.testing.assert_allclose(chosen[:, 0], found.sel(layer=2, head=1))


def test_each_prompt_has_its_own_object() -> None:
    models = exact()
    two = models.ours.as_inputs(models.prompt(batch=2))
    maps = [m.with_spans(object=where) for m, where in zip(two.token_maps, ([1], [2, 3]), strict=True)]
    from dataclasses import replace

    named = replace(two, token_maps=tuple(maps))
    found = attention_to_object(models.ours, named, named, "object")
    alone = [attention_to_object(models.ours, two[i], two[i], where) for i, where in enumerate(([1], [2, 3]))]
    np.testing.assert_allclose(found, (alone[0] + alone[1]) / 2, atol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    models = exact()
    with pytest.raises(InputError, match=r"heads \[\(1, 6\)\]; expected"):
        head_readings(models.ours, models.prompt(), 1, 6)
    with pytest.raises(InputError, match="prompt.*got 2"):
        head_readings(models.ours, models.prompt(batch=2), 1, 1)
    for top in (0, -1):
        with pytest.raises(InputError, match=f"top={top} positions.*least 1"):
            head_readings(models.ours, models.prompt(), 1, 1, top=top)
    two = models.prompt(batch=2)
    with pytest.raises(InputError, match="2 prompts.*object and 1"):
        attention_to_object(models.ours, two, models.prompt(), [2])
    with pytest.raises(InputError, match="k=0 words"):
        head_readings(models.ours, models.prompt(), 1, 1, k=0)
    with as_users_run(), pytest.raises(InputError, match="space='words'.*unembed, embed, cosine"):
        head_readings(models.ours, models.prompt(), 1, 1, space="words")


def test_words_and_spaces_are_checked_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedLLaVA.from_hf(pair().hf, processor=make_processor())
    inputs = model.prepare("What color is the star?")
    monkeypatch.setattr(model.language, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="target=.*one token"):
        head_readings(model, inputs, 1, 1, "red star")
    with as_users_run(), pytest.raises(InputError, match="space='words'"):
        head_readings(model, inputs, 1, 1, space="words")
