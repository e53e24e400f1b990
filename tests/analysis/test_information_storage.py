"""What is stored where, held against logits and ranks taken one by one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import (
    head_readings,
    head_scores,
    information_storage,
    position_scores,
    reciprocal_rank,
    top_heads,
)
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_cache import cache_answer
from tests.oracles.naive_scores import NaiveScores
from tests.pairs import as_users_run, batch, pair


def exact() -> Any:
    return pair("grouped", torch.float64)


@functools.cache
def naive() -> NaiveScores:
    return NaiveScores(exact().hf, exact().slow.run(**exact().prompt()), 7)


def rank(values: torch.Tensor, token: int) -> int:
    """Place of a token when all are sorted, from 1."""
    return values.argsort(descending=True).tolist().index(token) + 1


def test_differences_and_ranks_in_the_stream_and_in_messages() -> None:
    models, by_hand = exact(), naive()
    stored = information_storage(models.ours, models.prompt(), 7, 8, positions=[2, 5], heads=[(1, 3)])
    table = models.hf.model.language_model.embed_tokens.weight
    for i, position in enumerate((2, 5)):
        for layer in range(4):
            last = by_hand.seen["blocks.2.hook_resid_post"]
            stream = (by_hand.seen[f"blocks.{layer}.hook_resid_pre"] if layer < 3 else last)[0, position]
            for space, logits in (("unembed", by_hand.lens(stream)), ("embed", table @ stream)):
                cell = stored.sel(space=space, layer=layer).isel(position=i)
                assert cell.logit_difference.item() == pytest.approx((logits[7] - logits[8]).item(), abs=1e-5)
                assert cell["rank"].values.tolist() == [rank(logits, 7), rank(logits, 8)]
        logits = by_hand.lens(by_hand.message(1, 3, position))
        cell = stored.sel(space="unembed").isel(head=0, position=i)
        assert cell.head_output_logit_difference.item() == pytest.approx((logits[7] - logits[8]).item(), abs=1e-5)
        assert cell.head_output_rank.values.tolist() == [rank(logits, 7), rank(logits, 8)]
    assert (stored.correct, stored.distractor, stored.heads) == ("#7", "#8", ["1.3"])


def test_the_best_heads_best_positions_are_the_default() -> None:
    models = exact()
    stored = information_storage(models.ours, models.prompt(), 7, 8, top=3)
    own = int(models.ours(models.prompt())[0, -1].argmax())
    best = top_heads(head_scores(models.ours, models.prompt(), own), 1)
    scores = position_scores(models.ours, models.prompt(), own, heads=best).score[0]
    assert stored.position.values.tolist() == np.argsort(-scores.values)[:3].tolist()


def test_the_best_of_the_heads_that_are_named_chooses_the_positions() -> None:
    models = exact()
    scores = head_scores(models.ours, models.prompt())
    order = top_heads(scores, scores.size)
    for heads in ([order[5], order[2], order[9]], "all"):
        best = order[2] if heads != "all" else order[0]
        stored = information_storage(models.ours, models.prompt(), 7, 8, top=3, heads=heads)
        wanted = information_storage(models.ours, models.prompt(), 7, 8, top=3, heads=[best])
        assert stored.position.values.tolist() == wanted.position.values.tolist()
    last = information_storage(models.ours, models.prompt(), 7, 8, top=3, heads=[order[9]])
    assert last.position.values.tolist() != wanted.position.values.tolist(), "another head chooses others"


def test_the_best_of_the_positions_that_are_named() -> None:
    models = exact()
    image = list(models.ours.as_inputs(models.prompt()).token_map["image"])
    score = position_scores(models.ours, models.prompt(), heads=1, positions="image").score[0]
    whole = information_storage(models.ours, models.prompt(), 7, 8, positions="image")
    assert whole.position.values.tolist() == image, "all, in their order"
    best = information_storage(models.ours, models.prompt(), 7, 8, positions="image", top=2)
    assert best.position.values.tolist() == [image[i] for i in np.argsort(-score.values)[:2]]
    same = whole.logit_difference.sel(position=best.position)
    np.testing.assert_allclose(best.logit_difference, same, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_none_of_the_best_positions(side: Any) -> None:
    models = exact()
    short = models.prompt(n_text=4, seed=1)
    padded = models.ours.as_inputs(batch([models.prompt(n_text=12), short], side))[1]
    alone = information_storage(models.ours, short, 7, 8)
    stored = information_storage(models.ours, padded, 7, 8)
    assert stored.position.values.tolist() == [padded.token_map.real.start + p for p in alone.position.values]
    np.testing.assert_allclose(stored.logit_difference, alone.logit_difference, atol=1e-9)


@pytest.mark.parametrize("how", [{}, {"positions": [2, 5]}, {"positions": "image", "top": 3}])
def test_a_prompt_is_run_once(how: dict[str, Any]) -> None:
    models, fired = exact(), []
    with models.ours.hooks(fwd_hooks=[("hook_embed", lambda tensor, hook: fired.append(hook.name))]):
        stored = information_storage(models.ours, models.prompt(), 7, 8, **how)
        assert len(fired) == stored.n_forward == 1
        positions = {} if "top" in how else how
        read = head_readings(models.ours, models.prompt(), 2, 1, 7, **positions)
    assert len(fired) == 2
    assert read.n_forward == 1


def test_a_decision_stands_in_for_its_prompts() -> None:
    models = exact()
    two = models.ours.as_inputs(models.prompt(batch=2))
    cache = cache_answer(models.ours, two)
    shared = information_storage(models.ours, cache, [7, 9], 8, top=3)
    alone = information_storage(models.ours, two, [7, 9], 8, top=3)
    np.testing.assert_allclose(shared.logit_difference, alone.logit_difference, atol=1e-9)
    assert (shared.n_forward, alone.n_forward) == (2, 2), "an answer cache does not hold the residual stream elsewhere"
    other = information_storage(models.ours, cache_answer(models.ours, two[0], 7), 7, 8, top=3, heads=[(1, 2)])
    scores = position_scores(models.ours, two[0], 7, heads=[(1, 2)]).score[0]
    assert other.position.values.tolist() == np.argsort(-scores.values)[:3].tolist(), "for the decision's own target"


def test_prompts_have_words_of_their_own_and_ranks_are_averaged() -> None:
    models = exact()
    both = information_storage(models.ours, models.prompt(batch=2), [7, 9], 8, positions=[2, 3])
    alone = information_storage(models.ours, models.ours.as_inputs(models.prompt(batch=2))[1], 9, 8, positions=[2, 3])
    np.testing.assert_allclose(both.logit_difference.sel(prompt=1), alone.logit_difference, atol=1e-9)
    assert both.correct == ["#7", "#9"]
    mean = reciprocal_rank(both)
    np.testing.assert_allclose(mean.resid, (1 / both["rank"]).mean(("prompt", "position")))
    assert mean.head_output.dims == ("space", "head", "word")


def test_in_tiny_shapes_image_embeddings_hold_their_color_and_shape() -> None:
    """Its training draws image embeddings to the sum of their words' embeddings, so here the truth is known."""
    from hooked_llava.toy.images import image_path, image_scene

    model = HookedLLaVA.from_pretrained("tiny-shapes")
    inputs = model.prepare("What color is the star?", images=image_path("demo"))
    star = image_scene("demo").find("star")
    patches = inputs.token_map.box_to_patches(star.box, coverage=0.9)
    ground = inputs.token_map["image"] - inputs.token_map.box_to_patches(star.box, coverage=0)
    for word, other in ((star.color, "purple"), ("star", "moon")):
        on = information_storage(model, inputs, word, other, positions=list(patches), spaces=["embed"])
        off = information_storage(model, inputs, word, other, positions=list(ground), spaces=["embed"])
        on, off = (reciprocal_rank(found).resid.sel(space="embed", layer=0) for found in (on, off))
        assert on.sel(word="correct") > 2 * off.sel(word="correct")
        assert on.sel(word="correct") > 2 * on.sel(word="distractor")


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models = exact()
    monkeypatch.setattr(models.ours.language, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=r"Token id 99.*0\.\.98"):
        information_storage(models.ours, models.prompt(), 7, 99)
    with pytest.raises(InputError, match=r"heads \[\(9, 0\)\]; expected"):
        information_storage(models.ours, models.prompt(), 7, 8, heads=[(9, 0)])
    with pytest.raises(InputError, match="top=0 positions"):
        information_storage(models.ours, models.prompt(), 7, 8, positions="image", top=0)
    with pytest.raises(InputError, match="distractor= names 3 answers for 1 prompts"):
        information_storage(models.ours, models.prompt(), 7, [8, 9, 10])
    with as_users_run(), pytest.raises(InputError, match="space='words'.*unembed, embed, cosine"):
        information_storage(models.ours, models.prompt(), 7, 8, spaces=["words"])
