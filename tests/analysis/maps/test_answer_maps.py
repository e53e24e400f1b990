"""Maps of single tokens of an answer: each is the map of a one-token answer to a prompt that ends in the tokens before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava import results
from hooked_llava.analysis import answer_maps, patch_importance
from hooked_llava.errors import InputError
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.readout.answer import teacher_forced
from hooked_llava.readout.answer_cache import cache_answer
from tests.known_mechanism import LOGIT, OBJECTS, model_of
from tests.oracles.naive_scores import NaiveScores
from tests.pairs import pair
from tests.patch_world import GRID

ANSWER = [7, 9, 8]


def exact() -> Any:
    return pair("grouped", torch.float64)


def followed_by(prompt: dict[str, torch.Tensor], ids: list[int]) -> dict[str, torch.Tensor]:
    """The prompt with these tokens as its last."""
    longer = torch.cat([prompt["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
    return prompt | {"input_ids": longer, "attention_mask": torch.ones_like(longer)}


@pytest.mark.parametrize("method", sorted({*PATCH_MAPS} - {"tam"}))  # for which words of the answer are another context
def test_a_tokens_map_is_that_of_the_answer_to_a_prompt_that_ends_before_it(method: str) -> None:
    models, prompt = exact(), exact().prompt()
    maps = answer_maps(models.ours, prompt, ANSWER, method=method)
    assert dict(maps.sizes) == {"token": 3, "image": 1, "patch_row": 2, "patch_col": 2}
    for k, token in enumerate(ANSWER):
        alone = patch_importance(models.ours, followed_by(prompt, ANSWER[:k]), token, method=method)
        np.testing.assert_allclose(maps[k], alone, atol=1e-7)
    assert float(np.abs(maps[0] - maps[1]).max()) > 1e-6
    assert (maps.method, maps.analysis, maps.units) == (method, "answer_maps", PATCH_MAPS[method].units)


def test_log_increase_of_a_token_is_the_score_where_it_is_predicted() -> None:
    models, prompt = exact(), exact().prompt()
    seen = models.slow.run(**followed_by(prompt, ANSWER))
    n = prompt["input_ids"].shape[1]
    patches = models.ours.as_inputs(prompt).token_map.patches()
    found = answer_maps(models.ours, prompt, ANSWER, heads=[(1, 2)])
    for k, token in enumerate(ANSWER):
        by_hand = NaiveScores(models.hf, seen, token, at=n - 1 + k)
        np.testing.assert_allclose(found[k].values.ravel(), [by_hand.position(1, 2, p) for p in patches], atol=1e-6)
    whole = patch_importance(models.ours, prompt, [ANSWER], heads=[(1, 2)])
    np.testing.assert_allclose(found.sum("token"), whole, atol=1e-9)


def test_a_token_of_one_of_several_prompts_and_of_a_cache() -> None:
    models = exact()
    prompts = models.prompt(batch=2)
    answers = [ANSWER, [3, 6, 4]]
    together = patch_importance(models.ours, prompts, answers, token=1)
    assert together.attrs["measured"] == "one token"
    assert (together.token, together.target) == (1, ["#9", "#6"])
    cache = cache_answer(models.ours, prompts, answers)
    np.testing.assert_allclose(patch_importance(models.ours, cache, token=-2), together, atol=1e-9)
    for i, one in enumerate(models.ours.as_inputs(prompts)):
        alone = patch_importance(models.ours, one, [answers[i]], token=1)
        np.testing.assert_allclose(together[i], alone, atol=1e-6)
    part = cache.of_token(1)
    assert part.nbytes < cache.nbytes
    assert {x.shape[1] for x in part.resid} == {1}


def test_the_answer_may_be_appended_or_the_models_own(tmp_path: Any) -> None:
    models, prompt = exact(), exact().prompt()
    given = answer_maps(models.ours, prompt, ANSWER)
    appended = answer_maps(models.ours, teacher_forced(models.ours, prompt, ANSWER).inputs)
    np.testing.assert_allclose(appended, given, atol=1e-9)
    said = models.ours.generate(prompt, max_new_tokens=3, return_type="tokens")[0].tolist()
    own = answer_maps(models.ours, prompt, max_new_tokens=3)
    np.testing.assert_allclose(own, answer_maps(models.ours, prompt, said), atol=1e-9)
    assert own.word.values.tolist() == [f"#{i}" for i in said]
    assert (own.n_forward, own.n_generated) == (1 + len(said), len(said))
    results.save(own, tmp_path / "maps.safetensors")
    xr.testing.assert_identical(results.load(tmp_path / "maps.safetensors"), own)


@pytest.mark.parametrize(
    ("method", "passes"), [("log_increase", 1), ("attention", 1), ("relevancy", 3), ("rollout", 3)]
)
def test_what_all_tokens_cost(method: str, passes: int) -> None:
    models, counted = exact(), []
    with models.ours.hooks([("blocks.0.hook_resid_pre", lambda x, hook: counted.append(1))]):
        found = answer_maps(models.ours, models.prompt(), ANSWER, method=method)
    assert len(counted) == found.n_forward == passes


def test_on_the_known_mechanism_the_color_is_read_from_the_object_and_the_end_from_nowhere() -> None:
    model = model_of("direct")
    maps = answer_maps(model, model.ask(OBJECTS, "ring"), [model.to_single_token("Blue"), model.tokenizer.eos_token_id])
    expected = np.zeros((2, 1, GRID, GRID))
    expected[0, 0, 2, 1] = LOGIT
    np.testing.assert_allclose(maps, expected, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    models = exact()
    with pytest.raises(InputError, match=r"token=3.*answer of 3.*-3\.\.2"):
        patch_importance(models.ours, models.prompt(), [ANSWER], token=3)
    with pytest.raises(InputError, match=r"token=1.*answer of 1"):
        patch_importance(models.ours, models.prompt(), token=1)
    with pytest.raises(InputError, match="answer_maps.*got 2"):
        answer_maps(models.ours, models.prompt(batch=2), ANSWER)
    with pytest.raises(InputError, match="method='saliency'"):
        answer_maps(models.ours, models.prompt(), ANSWER, method="saliency")
    with pytest.raises(InputError, match="appended already"):
        answer_maps(models.ours, teacher_forced(models.ours, models.prompt(), ANSWER).inputs, ANSWER)
