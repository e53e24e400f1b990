"""Words are replaced where they stand, by as many tokens, whatever the tokenizer does at their borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hooked_llava.errors import InputError
from hooked_llava.interventions import Replay
from hooked_llava.interventions.corruptions import (
    MeanEmbedding,
    Noise,
    OtherImage,
    Replace,
    corrupt,
    describe,
    find_constraints,
    replacement,
)
from hooked_llava.model import HookedLLaVA
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.pairs import pair


@pytest.fixture(scope="module", params=[False, True], ids=["words", "metaspace"])
def model(request: pytest.FixtureRequest) -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(), make_processor(metaspace=request.param))


def test_the_new_tokens_are_those_of_the_reworded_prompt(model: Any) -> None:
    prompt, other = (model.prepare(f"Who made {words}?") for words in ("the star", "a circle"))
    where = find_constraints(prompt.token_map, "the star")
    new = replacement(model, prompt.token_map, where, Replace("a circle"))
    assert new == {p: int(other.input_ids[0, p]) for p in where[0]}


def test_with_a_picture_in_the_prompt(model: Any) -> None:
    prompt = model.prepare("What color is this star?", np.zeros((16, 16, 3), np.uint8))
    where = find_constraints(prompt.token_map, ["color", "this star"])
    new = replacement(model, prompt.token_map, where, Replace(["shape", "the circle"]))
    words = [model.tokenizer.decode([new[p]]).strip() for p in sorted(new)]
    assert words == ["shape", "the", "circle"]


def test_the_first_token_at_every_place(model: Any) -> None:
    prompt = model.prepare("Who made the star?")
    where = find_constraints(prompt.token_map, "made the star")
    new = replacement(model, prompt.token_map, where, Replace("circle square", repeat=True))
    first = model.tokenizer("circle", add_special_tokens=False)["input_ids"][0]
    assert list(new.values()) == [first] * 3


def test_a_prompt_of_token_ids_takes_words_as_well(model: Any) -> None:
    prompt = model.prepare("Who made the star?")
    bare = model.as_inputs({"input_ids": prompt.input_ids})
    where = find_constraints(bare.token_map, "the star")
    other = model.prepare("Who made a circle?")
    new = replacement(model, bare.token_map, where, Replace("a circle"))
    assert new == {p: int(other.input_ids[0, p]) for p in where[0]}


def test_words_need_a_tokenizer() -> None:
    models = pair()
    replay = Replay(models.ours, models.prompt())
    where = find_constraints(replay.inputs.token_map, [6, 7])
    with pytest.raises(InputError, match=r"Words need a tokenizer.*use Noise\(\) or MeanEmbedding\(\)"):
        corrupt(models.ours, replay, where, "the circle")
    assert corrupt(models.ours, replay, where, Noise()).first == 6


def test_the_corrupted_run_shares_the_clean_beginning(model: Any) -> None:
    replay = Replay(model, model.prepare("Who made the star?"))
    where = find_constraints(replay.inputs.token_map, "star")
    found = corrupt(model, replay, where, "circle")
    assert found.n_forward == 0
    assert replay.work.token_layers == (replay.kept.n_positions - where[0][0]) * model.cfg.n_layers
    assert found.labels[where[0][0]].strip() == "circle"


def test_described_in_a_few_words() -> None:
    assert describe(Replace(["a", "b"], repeat=True)) == "replaced by 'a, b' at every token"
    assert describe(Noise(samples=3)) == "noise of three times the embeddings' spread, 3 draws"
    assert describe(MeanEmbedding()) == "mean embedding"
    assert describe(OtherImage(None)) == "another picture"
