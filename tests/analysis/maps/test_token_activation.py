"""Token activation maps against the released code's steps, and on a model whose patches hold no words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import answer_maps, patch_importance
from hooked_llava.analysis.maps.token_activation import rank_gaussian
from hooked_llava.errors import InputError
from hooked_llava.readout.answer_cache import cache_answer
from tests.known_mechanism import OBJECTS, model_of, places
from tests.oracles import naive_tam
from tests.pairs import batch, pair
from tests.patch_world import GRID
from tests.tiled import drawn, with_processor


def exact(geometry: str = "odd") -> Any:
    return pair(geometry, torch.float64)


def by_hand(models: Any, prompt: dict[str, torch.Tensor], answer: list[int]) -> np.ndarray:
    """The map of every token of the answer."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([answer])], 1)
    longer = prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = models.hf_logits(longer)[0].numpy()
    token_map, n = models.ours.as_inputs(prompt).token_map, prompt["input_ids"].shape[1]
    image, shape = list(token_map.patches()), models.ours.config.vision.patch_grid
    asked = [(p, int(ids[0, p])) for p in range(max(image) + 1, n - 1)]
    said = [(n - 1 + k, token) for k, token in enumerate(answer)]
    raw = [naive_tam.without_context(logits, image, asked + said[:k], token) for k, token in enumerate(answer)]
    return np.array([naive_tam.rank_gaussian(own.reshape(shape)) for own in raw])


@pytest.mark.parametrize("geometry", ["odd", "full", "grouped", "phi-clip"])
def test_a_map_is_what_the_released_steps_give(geometry: str) -> None:
    models = exact(geometry)
    prompt, answer = models.prompt(n_text=6), [7, 9, 7, 8]
    expected = by_hand(models, prompt, answer)
    found = answer_maps(models.ours, prompt, answer, method="tam")
    np.testing.assert_allclose(found.values[:, 0], expected, atol=1e-5)
    assert expected.max() > 1e-3
    whole = patch_importance(models.ours, prompt, [answer], method="tam")
    np.testing.assert_allclose(whole[0], expected.sum(0), atol=1e-5)
    assert (whole.n_forward, found.n_forward) == (1, 1)


def test_a_padded_batch_gives_what_each_prompt_gives_alone() -> None:
    models = exact()
    alone = [models.prompt(n_text=6), models.prompt(n_text=4, seed=1)]
    together = patch_importance(models.ours, batch(alone, "left"), method="tam")
    each = [patch_importance(models.ours, prompt, method="tam") for prompt in alone]
    own = [int(models.ours(prompt)[0, -1].argmax()) for prompt in alone]
    for i, prompt in enumerate(alone):
        np.testing.assert_allclose(together[i], each[i], atol=1e-6)
        np.testing.assert_allclose(each[i], patch_importance(models.ours, prompt, own[i], method="tam"), atol=1e-9)
    assert max(float(one.max()) for one in each) > 1e-3


def test_it_costs_one_pass_for_all_tokens() -> None:
    models, counted = exact(), []
    with models.ours.hooks([("blocks.0.hook_resid_pre", lambda x, hook: counted.append(1))]):
        answer_maps(models.ours, models.prompt(), [7, 9, 8], method="tam")
    assert len(counted) == 1


@pytest.mark.parametrize("shape", [(4, 5), (2, 2), (1, 3)])
def test_the_filter_is_that_of_the_released_code(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random(shape) * (np.random.default_rng(1).random(shape) > 0.3)
    np.testing.assert_allclose(rank_gaussian(values), naive_tam.rank_gaussian(values), atol=1e-12)
    assert not rank_gaussian(np.zeros(shape)).any()


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_grids_are_filtered_one_by_one_and_newlines_left_out(kind: str) -> None:
    model = with_processor(kind)
    prompt = model.prepare("What color is the star?", drawn((50, 170)))
    layout, token_map = prompt.layouts[0], prompt.token_map
    logits = model(prompt)[0].detach().double().numpy()
    cells = layout.object_features()
    image = [token_map.image_starts[0] + int(f) for f in cells]
    asked = [(p, token_map.token_ids[p]) for p in token_map["question"]]
    own = np.full(layout.n_features, np.nan)
    own[cells] = naive_tam.without_context(logits, image, asked, 7)
    found = patch_importance(model, prompt, 7, method="tam")[0].values
    for name, values in layout.unfold(own).items():
        np.testing.assert_allclose(layout.unfold(found)[name], naive_tam.rank_gaussian(values), atol=1e-4)
    assert np.isnan(found[layout.newline_features()]).all()


def test_on_the_known_mechanism_it_is_empty_until_a_patch_holds_the_word() -> None:
    """The patches hold colors where the unembedding does not read: a map of words sees nothing of them."""
    model = model_of("direct")
    inputs = model.ask(OBJECTS, "ring")
    assert not patch_importance(model, inputs, method="tam").values.any()
    blue, place = model.to_single_token("Blue"), places(model)["object"]

    def say_blue(resid: torch.Tensor, hook: Any) -> None:
        resid[:, place] += model.unembed.weight[blue]

    with model.hooks([("blocks.4.hook_resid_mid", say_blue)]):
        found = patch_importance(model, inputs, method="tam")[0].values
    around = np.zeros((GRID, GRID), dtype=bool)
    around[1:4, 0:3] = True
    assert ((found > 1e-3) == around).all(), "the filter spreads a single patch over its neighbors"


def test_a_cache_without_the_last_residual_stream_is_refused() -> None:
    models = exact()
    cache = cache_answer(models.ours, models.prompt(), 7)
    with pytest.raises(InputError, match=r"lacks \['blocks.2.hook_resid_post'\]"):
        patch_importance(models.ours, cache, method="tam")
