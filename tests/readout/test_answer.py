"""log P of answers in one place: exact where the model is sure, with gradients, and read where each token is predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hooked_llava.errors import InputError
from hooked_llava.readout.answer import (
    answer_is_first,
    answer_is_said,
    answer_log_probability,
    append_tokens,
    read_answer,
    said_until_wrong,
    teacher_forced,
)
from hooked_llava.readout.answer_tokens import Answer, appendable
from hooked_llava.replay.replay import Replay
from tests.pairs import batch, pair

LOGITS = torch.randn(
    4, 2, 3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)  # run prompt read vocab
IDS = torch.tensor([[[3, -1], [4, 7], [0, -1]], [[5, 6], [-1, -1], [-1, -1]]])  # of answers of three tokens and of one


def by_hand(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The sum over positions of the log of the variants' probabilities."""
    total = 0.0
    for row, variants in zip(logits.tolist(), ids.tolist(), strict=True):
        wanted = [math.exp(row[i]) for i in variants if i >= 0]
        if wanted:
            total += math.log(sum(wanted) / sum(map(math.exp, row)))
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_p_is_its_definition(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    found = answer_log_probability(logits, IDS)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    expected = [[by_hand(logits[r, p].double(), IDS[p]) for p in range(2)] for r in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("lead", [20.0, 60.0, 90.0])
def test_where_the_model_is_sure_log_p_is_not_rounded_away(lead: float) -> None:
    logits = torch.zeros(2, 11)
    logits[0, 3] = logits[1, 4] = lead
    found = answer_log_probability(logits, torch.tensor([[3], [4]]))
    assert float(found) == pytest.approx(-2 * math.log1p(10 * math.exp(-lead)), rel=1e-5)
    assert float(found) < 0
    never = answer_log_probability(logits, torch.tensor([[0], [0]]))
    assert float(never) == pytest.approx(-2 * (lead + math.log1p(10 * math.exp(-lead))), rel=1e-6)


def test_gradients_are_those_of_log_softmax_also_where_nothing_counts() -> None:
    logits = LOGITS.clone().requires_grad_()
    (found,) = torch.autograd.grad(answer_log_probability(logits, IDS).sum(), logits)
    log_p = logits.log_softmax(-1)
    first = log_p[:, 0, 0, 3] + log_p[:, 0, 1, [4, 7]].logsumexp(-1) + log_p[:, 0, 2, 0]
    (expected,) = torch.autograd.grad((first + log_p[:, 1, 0, [5, 6]].logsumexp(-1)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_an_answer_is_said_if_every_token_of_it_is() -> None:
    best = torch.nn.functional.one_hot(torch.tensor([[3, 7, 0], [5, 1, 1]]), 11).float()
    assert answer_is_said(best, IDS).tolist() == answer_is_first(best, IDS).tolist() == [True, True]
    for position in range(3):
        worse = best.clone()
        worse[0, position] = torch.eye(11)[9]
        assert answer_is_said(worse, IDS).tolist() == answer_is_first(worse, IDS).tolist() == [False, True]
        assert said_until_wrong(worse[0].argmax(-1), IDS[0]) == [*[3, 7, 0][:position], 9]
    assert said_until_wrong(best[1].argmax(-1), IDS[1]) == [5]
    tied = torch.zeros(1, 11)
    assert (answer_is_said(tied, torch.tensor([[3]])), answer_is_first(tied, torch.tensor([[3]]))) == (False, True)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    for function in (answer_log_probability, answer_is_first):
        with pytest.raises(InputError, match=r"Token id 11 .* 0\.\.10"):
            function(LOGITS, torch.tensor([[11]] * 3))


def test_answers_of_different_lengths_are_appended_and_read_apart() -> None:
    models = pair("grouped")
    singles = [models.prompt(seed=seed, n_text=n) for seed, n in ((0, 6), (1, 9), (2, 7))]
    joined, answers = models.ours.as_inputs(batch(singles, "right")), [[7, 9], [8], [20, 31, 8]]
    reading = read_answer(models.ours, joined, answers)
    forced = teacher_forced(models.ours, joined, answers)
    assert reading.positions == forced.positions
    logits = Replay(models.ours, reading.inputs).logits(reading.positions)
    found = reading.log_probability(reading.shaped(logits))
    torch.testing.assert_close(forced.metric(logits), found)
    for row, (single, answer) in enumerate(zip(singles, answers, strict=True)):
        alone = teacher_forced(models.ours, single, answer)
        expected = alone.metric(Replay(models.ours, alone.inputs).logits(alone.positions))
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-4)
        assert float(reading.metric(row)(logits[row])) == pytest.approx(float(expected), abs=1e-4)
        token_map = reading.inputs.token_maps[row]
        assert [token_map.token_ids[p] for p in token_map["answer"]] == answer
        assert token_map["predicting"] == [p - 1 for p in token_map["answer"]]
        assert token_map["last"] == joined.padded_left().token_maps[row]["last"]
    again = read_answer(models.ours, reading.inputs)
    assert torch.equal(again.logit_positions, reading.logit_positions)
    assert torch.equal(again.ids, reading.ids)
    assert again.measured == "whole answer"


def test_what_is_measured_is_said() -> None:
    ours, prompt = pair().ours, pair().prompt()
    assert read_answer(ours, prompt).measured == "first token"
    assert read_answer(ours, prompt, 7).measured == "whole answer"
    assert read_answer(ours, prompt, Answer("reddish", (7, 8), whole=False)).measured == "first token"
    assert read_answer(ours, prompt, Answer("red", (7, 8))).attrs(ours) == {
        "answer": "red",
        "answer_tokens": ["#7"],
        "measured": "whole answer",
    }


def test_one_answer_at_a_time() -> None:
    ours = pair().ours
    forced = teacher_forced(ours, pair().prompt(), [7, 8]).inputs
    with pytest.raises(InputError, match="answer.*target=7"):
        read_answer(ours, forced, 7, "target")
    apart = ours.as_inputs(batch([pair().prompt(seed=0, n_text=6), pair().prompt(seed=1, n_text=6)], "left"))
    assert append_tokens(ours, apart, torch.tensor([[7, 8], [9, -1]])).attention_mask[:, -1].tolist() == [True, False]


def test_an_answer_holds_no_token_that_stands_for_an_image() -> None:
    models = pair("grouped")
    image = models.ours.config.image_token_id
    with pytest.raises(InputError, match=rf"prompt 0 .*token {image} at place 1"):
        teacher_forced(models.ours, models.prompt(), [7, image, 8])
    assert appendable(models.ours, [7, image, 8]) == [7]
