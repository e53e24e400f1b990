"""Words are replaced where they stand, by as many tokens, whatever the tokenizer does at their borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import (
    MeanEmbedding,
    Noise,
    OtherImage,
    Replace,
    corrupt,
    describe,
    find_constraints,
    replacement,
)
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.positions import Positions
from hooked_llava.replay import Replay
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.fixtures_tokenizers import KINDS, Kind, talking
from tests.pairs import as_users_run, pair


@pytest.fixture(scope="module", params=[False, True], ids=["words", "metaspace"])
def model(request: pytest.FixtureRequest) -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(), make_processor(metaspace=request.param))


def test_the_new_tokens_are_those_of_the_reworded_prompt(model: Any) -> None:
    prompt, other = (model.prepare(f"Who made {words}?") for words in ("the star", "a circle"))
    where = find_constraints(prompt.token_map, "the star")
    new = replacement(model, prompt.token_map, where, Replace("a circle"))
    assert new == {p: int(other.input_ids[0, p]) for p in where[0]}


def test_with_a_image_in_the_prompt(model: Any) -> None:
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
    with pytest.raises(InputError, match=r"words.*Noise\(\).*MeanEmbedding\(\).*processor=.*from_hf"):
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
    assert describe(OtherImage(None)) == "another image"


def test_positions_may_be_numbers_of_any_kind(model: Any) -> None:
    token_map = model.prepare("Who made the star?").token_map
    several = ([3, 4], np.array([3, 4]), torch.tensor([3, 4]), range(3, 5), [np.int64(3), torch.tensor(4)])
    with as_users_run():
        for given in several:
            assert find_constraints(token_map, given) == [Positions([3, 4])]
        for given in (4, np.int64(4), torch.tensor(4), np.array([4])):
            assert find_constraints(token_map, given) == [Positions([4])]
        assert find_constraints(token_map, [np.array([3]), "star"]) == [Positions([3]), token_map.find("star")]


def test_constraints_that_overlap_are_refused(model: Any) -> None:
    token_map = model.prepare("Who made the star?").token_map
    with pytest.raises(InputError, match=r"Constraints 0 and 1, 'the star' and 'star', share positions"):
        find_constraints(token_map, ["the star", "star"])


def test_a_spread_below_zero_is_refused(model: Any) -> None:
    replay = Replay(model, model.prepare("Who made the star?"))
    where = find_constraints(replay.inputs.token_map, "star")
    with pytest.raises(InputError, match=r"Noise\(std=-1\) is no spread"):
        corrupt(model, replay, where, Noise(std=-1.0))
    corrupt(model, replay, where, Noise(std=0.0))


def test_the_other_image_may_come_as_a_processor_returns_it() -> None:
    models = pair()
    prompt = models.prompt()
    other = {**prompt, "pixel_values": -prompt["pixel_values"]}
    replay = Replay(models.ours, prompt)
    where = find_constraints(replay.inputs.token_map, [7])
    found, same = (corrupt(models.ours, replay, where, OtherImage(o)) for o in (other, models.ours.as_inputs(other)))
    assert torch.equal(found.replays[0].logits(), same.replays[0].logits())
    assert not torch.equal(found.replays[0].logits(), replay.logits())


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_is_that_of_the_word_in_the_sentence(kind: Kind) -> None:
    """Byte-level tokens hold the space before their word, which the word alone does not have."""
    model = talking(kind)
    prompt, other = model.prepare("Who made the red star?"), model.prepare("Who made the circle?")
    where = find_constraints(prompt.token_map, "red star")
    new = replacement(model, prompt.token_map, where, Replace("circle", repeat=True))
    assert list(new.values()) == [other.token_map.token_ids[other.token_map.find("circle")[0]]] * len(where[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_tokens_is_that_in_the_sentence(kind: Kind) -> None:
    model = talking(kind)
    prompt, other = model.prepare("What color is the star?"), model.prepare("What color is the redder circle?")
    where = find_constraints(prompt.token_map, "star")
    n = len(other.token_map.find("redder circle"))
    assert n > len(where[0])
    with pytest.raises(InputError, match=f"'redder circle'.*{n} tokens.*'star' {len(where[0])}"):
        replacement(model, prompt.token_map, where, Replace("redder circle"))
