"""Metrics against their definitions, written with plain floats, for any batch shape."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.interventions import Intervention, Replay
from hooked_llava.metrics import (
    Answer,
    at_last,
    kl_divergence,
    log_probability,
    logit_difference,
    own_answers,
    probability,
    rank,
    relative_change,
    teacher_forced,
)
from hooked_llava.model import HookedLLaVA
from tests.fixtures_processor import make_processor
from tests.pairs import pair

LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
TWO = Answer("two", (1, 4))


@functools.cache
def model(metaspace: bool = False) -> HookedLLaVA:
    return HookedLLaVA.from_hf(pair().hf, processor=make_processor(metaspace=metaspace))


def by_hand(function: Any) -> torch.Tensor:
    return torch.tensor([[function(row.tolist()) for row in rows] for rows in LOGITS])


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (probability(2), lambda row: softmax(row)[2]),
        (probability(TWO), lambda row: softmax(row)[1] + softmax(row)[4]),
        (log_probability(TWO), lambda row: math.log(softmax(row)[1] + softmax(row)[4])),
        (logit_difference(2, 5), lambda row: row[2] - row[5]),
        (logit_difference(TWO, 5), lambda row: math.log((softmax(row)[1] + softmax(row)[4]) / softmax(row)[5])),
        (rank(3), lambda row: float(sum(x > row[3] for x in row))),
        (rank(TWO), lambda row: float(sum(x > max(row[1], row[4]) for x in row))),
        (
            kl_divergence(LOGITS[0, 0]),
            lambda row: sum(
                p * math.log(p / q) for p, q in zip(softmax(LOGITS[0, 0].tolist()), softmax(row), strict=True)
            ),
        ),
        (
            relative_change(2, LOGITS[0, 0]),
            lambda row: 100 * (softmax(row)[2] / softmax(LOGITS[0, 0].tolist())[2] - 1),
        ),
    ],
)
def test_definition_in_any_shape(metric: Any, expected: Any) -> None:
    torch.testing.assert_close(metric(LOGITS), by_hand(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metric(LOGITS[1, 2]), by_hand(expected)[1, 2], rtol=1e-4, atol=1e-5)


def test_at_last_reads_where_each_prompt_ends() -> None:
    metric = probability(2)
    assert at_last(metric)(LOGITS) == pytest.approx(float(metric(LOGITS[:, -1]).mean()))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = pair().ours.as_inputs({"input_ids": torch.tensor([[1, 8, 0], [1, 8, 9]]), "attention_mask": mask})
    expected = (metric(LOGITS[0, 1]) + metric(LOGITS[1, 2])) / 2
    assert at_last(metric, inputs)(LOGITS) == pytest.approx(float(expected))


def test_own_answers_take_sides_and_need_two() -> None:
    first, second = torch.eye(7)[2], torch.eye(7)[5]
    assert own_answers(first, second)(LOGITS[0, 0]) == pytest.approx(float(LOGITS[0, 0, 2] - LOGITS[0, 0, 5]))
    with pytest.raises(InputError, match="same answer"):
        own_answers(first, first)
    with pytest.raises(InputError, match="several positions"):
        own_answers(LOGITS[0], LOGITS[1])


def test_answers_and_their_spellings() -> None:
    ids = {word: model().to_single_token(word) for word in ("red", "Red", "star")}
    assert Answer.of(model(), "red").ids == (ids["red"],)
    assert set(Answer.of(model(), "Red", variants=True).ids) == {ids["red"], ids["Red"]}
    assert Answer.of(model(), "Red", variants=True).ids[0] == ids["Red"]
    assert Answer.of(model(), "star", variants=True).ids == (ids["star"],)  # "Star" is not in the vocabulary
    assert Answer.of(model(), 7).ids == (7,)
    assert Answer.of(model(), TWO) is TWO
    with pytest.raises(InputError, match="not a single token"):
        Answer.of(model(), "red star")
    assert Answer.of(model(), "red star", first_token=True).ids == (ids["red"],)


def test_teacher_forcing_multiplies_the_tokens_probabilities() -> None:
    inputs = model().prepare("What color is the star?", images=torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16))
    forced = teacher_forced(model(), inputs, "red star")
    ids = [model().to_single_token(word) for word in ("red", "star")]
    expected, longer = 0.0, inputs.input_ids
    for token in ids:  # one token at a time
        fields = {"input_ids": longer, "pixel_values": inputs.pixel_values}
        expected += float(model()(fields)[0, -1].detach().log_softmax(-1)[token])
        longer = torch.cat([longer, torch.tensor([[token]])], dim=1)
    replay = Replay(model(), forced.inputs)
    assert float(forced.metric(replay.logits(forced.positions))) == pytest.approx(expected, abs=1e-4)
    assert list(forced.inputs.token_map["answer"]) == [inputs.shape[1], inputs.shape[1] + 1]
    assert forced.inputs.token_map["question"] == inputs.token_map["question"]
    run = [Intervention("blocks.1.hook_mlp_out", positions="image", zero=True)]
    found = replay.run([run, []], forced.metric, positions=forced.positions)
    assert found.shape == (2,)
    assert found[0] != found[1] == pytest.approx(expected, abs=1e-4)


def test_teacher_forcing_of_a_padded_batch() -> None:
    inputs = model().prepare(["What color is the star?", "Is it red?"], padding_side="right")
    forced = teacher_forced(model(), inputs, [7, 8, 9])
    found = forced.metric(Replay(model(), forced.inputs).logits(forced.positions))
    for row in range(2):
        alone = teacher_forced(model(), model().prepare(["What color is the star?", "Is it red?"][row]), [7, 8, 9])
        expected = alone.metric(Replay(model(), alone.inputs).logits(alone.positions))
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(InputError, match="no tokens"):
        teacher_forced(model(), inputs, [])
