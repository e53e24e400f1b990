"""Metrics against their definitions, written with plain floats, for any batch shape."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from hooked_llava import analysis
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_tokens import per_prompt
from hooked_llava.readout.metrics import (
    Answer,
    at_last,
    from_transformer_lens,
    kl_divergence,
    log_probability,
    logit_difference,
    own_answers,
    probability,
    rank,
    relative_change,
    teacher_forced,
    value_of,
)
from hooked_llava.replay import Intervention, Replay, sweep
from tests.builders import D_VOCAB
from tests.fixtures_processor import make_processor
from tests.pairs import as_users_run, pair

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
    with pytest.raises(InputError, match=r"same answer \(token 2\)"):
        own_answers(first, first)
    red = torch.eye(99)[model().to_single_token("red")]
    with pytest.raises(InputError, match=r"same answer \(red, token \d+\)"):
        own_answers(red, red, model())
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
    with pytest.raises(InputError, match=r"'.*'.*single token.*\["):
        Answer.of(model(), "red star")
    assert Answer.of(model(), "red star", first_token=True).ids == (ids["red"],)
    for same in (np.int64(7), torch.tensor(7)):
        assert Answer.of(model(), same) == Answer.of(model(), 7)


def test_a_word_that_the_tokenizer_does_not_know_is_no_answer() -> None:
    """Every such word has the same token, whose probability would be followed in its place."""
    inputs = model().prepare("Is it red?")
    for attempt in (
        lambda: Answer.of(model(), "zebra", first_token=True),
        lambda: Answer.of(model(), "red zebra", first_token=True),
        lambda: teacher_forced(model(), inputs, "zebra"),
        lambda: teacher_forced(model(), inputs, "red zebra"),
    ):
        with pytest.raises(InputError, match=r"tokenizer.*'(red )?zebra'.*\[.*'<unk>'\]"):
            attempt()
    with pytest.raises(InputError, match="'' has no tokens"):
        Answer.of(model(), "", first_token=True)


def test_one_answer_for_all_prompts_or_one_for_each() -> None:
    assert per_prompt(TWO, 2) == [TWO, TWO]
    assert per_prompt(np.array([7, 8]), 2) == [7, 8]
    assert per_prompt(torch.tensor(7), 2) == [7, 7]
    with pytest.raises(InputError, match="word= names 1 answers for 2 prompts"):
        per_prompt(["red"], 2, "word")


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


def test_a_forced_answer_lies_behind_all_other_spans() -> None:
    inputs = model().prepare("What color is the star?", images=torch.zeros(3, 16, 16))
    forced = teacher_forced(model(), inputs, "red star").inputs
    spans = dict(forced.token_map.spans)
    assert spans.pop("answer").tolist() == [inputs.shape[1], inputs.shape[1] + 1]
    assert spans.pop("predicting").tolist() == [inputs.shape[1] - 1, inputs.shape[1]]
    assert spans == inputs.token_map.spans
    assert forced.last.tolist() == inputs.last.tolist()
    assert forced.to(dtype=torch.float64)[0].token_map["last"] == inputs.token_map["last"]
    padded = model().prepare(["What color is the star?", "Is it red?"], padding_side="right")
    for own, before in zip(teacher_forced(model(), padded, 7).inputs, padded.padded_left(), strict=True):
        assert own.token_map["last"] == before.token_map["last"]
        assert own.token_map["rest"] == before.token_map["rest"]


def test_one_token_id_is_an_answer() -> None:
    inputs = model().prepare("Is it red?")
    assert teacher_forced(model(), inputs, 7).inputs.input_ids[0, -1] == 7
    with pytest.raises(InputError, match="Token id 99"):
        teacher_forced(model(), inputs, 99)


def test_a_bare_space_is_no_spelling() -> None:
    """Older Llama tokenizers put a space before the text and then write every space as a mark."""
    pieces = ["<unk>", "<s>", "▁", "▁▁", "▁red", "▁Red", "▁star", "red", "ish", *"Redstarih"]
    vocab = list(dict.fromkeys(pieces))
    backend = Tokenizer(models.Unigram([(piece, -float(len(vocab) - len(piece))) for piece in vocab], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    processor = make_processor()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    old = HookedLLaVA.from_hf(pair().hf, processor=processor)
    encoded = old.tokenizer(" reddish", add_special_tokens=False)["input_ids"]
    assert not old.tokenizer.decode(encoded[:1]).strip()
    found = Answer.of(old, "reddish", variants=True, first_token=True).ids
    words = {old.tokenizer.convert_ids_to_tokens(i) for i in found}
    assert words == {"▁red", "▁Red"}
    assert old.tokenizer.convert_ids_to_tokens(Answer.of(old, " reddish", first_token=True).ids[0]).strip("▁")


def test_metrics_refuse_what_is_no_token() -> None:
    for make in (probability, log_probability, rank, lambda answer: logit_difference(answer, 1)):
        for wrong in ("Red", 1.5, -1):
            with as_users_run(), pytest.raises(InputError, match=r"Answer.*token id.*Answer\.of\(model"):
                make(wrong)
        with pytest.raises(InputError, match="Token id 999.*0..6"):
            make(999)(LOGITS)


def test_a_metric_of_transformer_lens_works_everywhere() -> None:
    def theirs(logits: torch.Tensor) -> torch.Tensor:
        assert logits.ndim == 3
        return (logits[:, -1, 7] - logits[:, -1, 9]).mean()

    own = from_transformer_lens(theirs)
    inputs = pair().ours.as_inputs(pair().prompt())
    runs = [[Intervention("blocks.1.hook_mlp_out", positions=p, zero=True)] for p in range(3)]
    replay = Replay(pair().ours, inputs)
    torch.testing.assert_close(replay.run(runs, own), replay.run(runs, logit_difference(7, 9)))
    assert replay.run([], own).shape == (0,)
    wide = torch.randn(2, 3, D_VOCAB, requires_grad=True)
    assert own(wide).shape == (2, 3)
    assert own(wide).requires_grad
    with pytest.raises(InputError, match=r"returned shape \(1, 99\)"):
        from_transformer_lens(lambda logits: logits[:, -1])(wide)


def test_the_value_of_a_metric_is_one_number() -> None:
    assert value_of(probability(2), LOGITS[0, 0]) == pytest.approx(softmax(LOGITS[0, 0].tolist())[2])
    with pytest.raises(InputError, match=r"shape \(3,\).*\(3, 7\)"):
        value_of(probability(2), LOGITS[0])


# ---------------------------------------------------------------------- metrics of the wrong shape

RED = 7
WRONG: dict[str, Any] = {
    "TransformerLens's, one for each prompt": lambda x: x[:, -1, RED],
    "TransformerLens's, averaged": lambda x: x[:, -1, RED].mean(),
    "one number for all": lambda x: x[..., RED].mean(),
    "one prompt of the batch": lambda x: x[..., 0, RED],
    "several numbers": lambda x: x[..., [RED, RED + 1]],
    "an axis too many": lambda x: x[..., [RED]],
    "logits": lambda x: x,
    "a float": lambda x: float(x.sum()),
    "one run of all": lambda x: x[:1, ..., RED],
}


def two() -> tuple[Any, Any]:
    models = pair()
    return models.ours.as_inputs(models.prompt(seed=1)), models.ours.as_inputs(models.prompt(seed=2))


def both() -> Any:
    return pair().ours.as_inputs(pair().prompt(batch=2))


def zero_mlp() -> list[list[Intervention]]:
    return [[Intervention("blocks.1.hook_mlp_out", positions=p, zero=True)] for p in range(4)]


TAKES_A_METRIC: dict[str, Any] = {
    "Replay.run": lambda m: Replay(pair().ours, both()).run(zero_mlp(), m),
    "Replay.sweep": lambda m: Replay(pair().ours, both()).sweep(zero_mlp(), m).run(),
    "Replay.run of several positions": lambda m: Replay(pair().ours, both()).run(zero_mlp(), m, [3, 4, 5]),
    "attention_knockout": lambda m: analysis.attention_knockout(pair().ours, both(), ["image->last"], metric=m),
    "activation_patching": lambda m: analysis.activation_patching(pair().ours, *two(), positions="last", metric=m),
    "attribution_patching": lambda m: analysis.attribution_patching(pair().ours, *two(), hooks="z", metric=m),
    "edge_attribution": lambda m: analysis.edge_attribution(pair().ours, *two(), metric=m),
    "path_patching": lambda m: analysis.path_patching(pair().ours, *two(), senders="mlps", metric=m),
    "path_patching of a batch": lambda m: analysis.path_patching(
        pair().ours, both(), both(), senders="mlps", metric=[probability(2), m]
    ),
    "causal_trace": lambda m: analysis.causal_trace(
        pair().ours, two()[0], [7], corruption=Noise(), kinds="mlp", metric=m
    ),
}
# What a metric may be where one run's logits are [d_vocab], or a position axis is there to be kept or taken up.
FITS = {
    "one number for all": ("attribution", "edge"),
    "one prompt of the batch": ("Replay.run of several",),  # reads the first of the positions, as a metric may
}


@pytest.mark.parametrize("taker", TAKES_A_METRIC)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_metric_of_the_wrong_shape_is_refused_before_anything_is_run(
    taker: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taker.startswith(FITS.get(wrong, ())):
        TAKES_A_METRIC[taker](WRONG[wrong])
        return
    ran: list[Any] = []
    monkeypatch.setattr(sweep, "LayerPass", lambda *given: ran.append(given))
    with as_users_run(), pytest.raises(InputError, match=r"metrics\.from_transformer_lens"):
        TAKES_A_METRIC[taker](WRONG[wrong])
    assert not ran


@pytest.mark.parametrize("taker", TAKES_A_METRIC)
def test_a_metric_that_is_none(taker: str) -> None:
    with as_users_run(), pytest.raises(InputError, match="metric=.*logit"):
        TAKES_A_METRIC[taker](3)


def test_a_metric_that_fails_says_on_what() -> None:
    with pytest.raises(InputError, match=r"logits \(3, 2, 99\).*out of bounds.*from_transformer_lens"):
        Replay(pair().ours, both()).run(zero_mlp(), lambda x: x[..., 4, 7])
    with pytest.raises(ZeroDivisionError):  # a fault of its own stays as it is
        Replay(pair().ours, both()).run(zero_mlp(), lambda x: x[..., 7] / (1 // 0))


def test_transformer_lenss_metric_adapted_reads_its_own_prompt() -> None:
    adapted = from_transformer_lens(lambda x: x[:, -1, RED].mean())
    assert torch.equal(
        Replay(pair().ours, both()).run(zero_mlp(), adapted), Replay(pair().ours, both()).run(zero_mlp())[..., RED]
    )
