"""Which tokens an answer adds to its prompt, held against tokenizing the whole text, with tokenizers as checkpoints have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_llava.analysis import (
    ablate_heads,
    answer_probability,
    attention_contribution,
    attention_knockout,
    causal_trace,
    deletion_curves,
    head_scores,
    information_storage,
    logit_attribution,
    logit_lens,
    patch_importance,
)
from hooked_llava.analysis.answer_probability import _forms
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.templates import TEMPLATES, Template
from hooked_llava.readout.answer import teacher_forced
from hooked_llava.readout.answer_tokens import Answer, answer_tokens, per_prompt, separator, single_token
from tests.fixtures_tokenizers import KINDS, Kind, talking
from tests.pairs import pair

each_kind = pytest.mark.parametrize("kind", KINDS)
# prompt, answer, and the text that is meant
CASES = [
    ("USER: Who made the star? ASSISTANT:", "2", " 2"),
    ("USER: Who made the star? ASSISTANT:", "red", " red"),
    ("USER: Who made the star? ASSISTANT:", " red", " red"),
    ("USER: Who made the star? ASSISTANT:", "Red star", " Red star"),
    ("USER: Who made the star? ASSISTANT:", "23, é", " 23, é"),
    ("USER: Who made the star? ASSISTANT:", "\nRed", "\nRed"),
    ("The color of the star is", "redder", " redder"),
    ("The color of the star is", "n't red", " n't red"),
    ("Who made the star?\n", "2", "2"),
    ("Who made the star?\n", "Red star", "Red star"),
    ("Who made the star?\n", " red", " red"),
    ("Who made the star?<|end|>\n\n", "Clara Boris", "Clara Boris"),
    ("Who made the star?<|end|>", "Red", "Red"),
    ("Who made the star?<|end|>", " 2", " 2"),
]


def ids_of(model: HookedLLaVA, text: str) -> list[int]:
    return model.prepare(text, template=None).input_ids[0].tolist()


@each_kind
@pytest.mark.parametrize(("prompt", "answer", "continuation"), CASES)
def test_the_prompt_and_its_answer_are_the_whole_text_token_by_token(
    kind: Kind, prompt: str, answer: str, continuation: str
) -> None:
    model = talking(kind)
    asked, whole = model.prepare(prompt, template=None), ids_of(model, prompt + continuation)
    [found] = answer_tokens(model, asked, answer)
    assert [*asked.input_ids[0].tolist(), *found.ids] == whole
    assert found.text == answer
    assert prompt + separator(model, prompt, answer) + answer == prompt + continuation


@each_kind
def test_a_prompt_of_ids_gives_the_same(kind: Kind) -> None:
    model = talking(kind)
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)
    asked = model.prepare("What color is the star?", image)
    bare = model.as_inputs({"input_ids": asked.input_ids, "pixel_values": asked.pixel_values})
    for answer in ("2", "red", " red", "Red star"):
        assert answer_tokens(model, bare, answer)[0].ids == answer_tokens(model, asked, answer)[0].ids


def test_what_the_kinds_of_tokenizers_do() -> None:
    """The first token is a mark of its own where the vocabulary has no word with it."""
    names = {}
    for kind in KINDS:
        model = talking(kind)
        [two] = answer_tokens(model, model.prepare("Who made the star?"), "2")
        names[kind] = model.tokenizer.convert_ids_to_tokens(list(two.ids))
        red = single_token(model, model.prepare("Who made the star?").token_map, "Red")
        assert model.tokenizer.convert_ids_to_tokens(red) in ("▁Red", "ĠRed")
    assert names == {"llama": ["▁", "2"], "llama legacy": ["▁", "2"], "byte-level": ["Ġ", "2"]}


@each_kind
def test_without_a_prompt_the_answer_follows_one_that_prepare_makes(kind: Kind) -> None:
    model = talking(kind)
    asked = model.prepare("Who made the star?")
    assert Answer.of(model, "Red") == Answer.of(model, "Red", inputs=asked)
    two = Answer.of(model, "2", first_token=True)
    assert model.tokenizer.convert_ids_to_tokens(two.ids[0]) in ("▁", "Ġ")
    assert not two.whole
    assert Answer.of(model, "Red").whole
    with pytest.raises(InputError, match=r"'2'.*single token.*\["):
        Answer.of(model, "2")
    at_a_line = model.prepare("Who made the star?\n", template=None)
    glued = Answer.of(model, "Red", inputs=at_a_line, first_token=True)
    assert glued.ids[0] == answer_tokens(model, at_a_line, "Red")[0].ids[0] != Answer.of(model, "Red").ids[0]


@each_kind
def test_variants_are_made_after_the_prompt(kind: Kind) -> None:
    model = talking(kind)
    found = Answer.of(model, "Red", variants=True)
    names = set(model.tokenizer.convert_ids_to_tokens(list(found.ids)))
    mark = "Ġ" if kind == "byte-level" else "▁"
    assert {f"{mark}Red", f"{mark}red"} <= names
    assert mark not in names
    assert found.ids[0] == Answer.of(model, "Red").ids[0]


def test_an_answer_that_changes_the_prompts_own_tokens_is_refused() -> None:
    for kind, prompt, answer in (
        ("byte-level", "Who made the star?\n", "\nRed"),  # two line breaks are one token
        ("llama", "Who made the star? ", "red"),  # the space becomes the word's
        ("llama legacy", "Who made the star? ASSISTANT: ", "Red star"),
        ("byte-level", "Who made the star? ", "red"),
    ):
        model = talking(kind)
        before, whole = ids_of(model, prompt), ids_of(model, prompt + answer)
        assert whole[: len(before)] != before
        with pytest.raises(InputError, match="prompt.*last tokens.*token ids"):
            answer_tokens(model, model.prepare(prompt, template=None), answer)
        assert answer_tokens(model, model.prepare(prompt, template=None), [[7, 8]])[0].ids == (7, 8)


@each_kind
def test_an_empty_answer_is_none(kind: Kind) -> None:
    model = talking(kind)
    asked = model.prepare("Who made the star?")
    for empty in ("", [[]]):
        with pytest.raises(InputError, match="no tokens"):
            answer_tokens(model, asked, empty)


def test_ids_that_spell_nothing_need_ids() -> None:
    model = talking("byte-level")
    half = model.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    assert len(half) == 1
    with pytest.raises(InputError, match="token.*answer.*token"):
        answer_tokens(model, torch.tensor([half]), "red")
    with pytest.raises(InputError, match="no tokenizer|processor"):
        answer_tokens(pair().ours, torch.tensor([[7, 8]]), "red")
    assert answer_tokens(pair().ours, torch.tensor([[7, 8]]), 9)[0].text == "#9"


@each_kind
def test_every_prompt_of_a_batch_has_its_own(kind: Kind) -> None:
    model = talking(kind)
    prompts = ["The color of the star is", "Who made the star?\n"]
    batch = model.prepare(prompts, template=None)
    for given in ("Red", ["Red", "2"]):
        for prompt, one, found in zip(prompts, per_prompt(given, 2), answer_tokens(model, batch, given), strict=True):
            glue = "" if prompt.endswith("\n") else " "
            assert [*ids_of(model, prompt), *found.ids] == ids_of(model, prompt + glue + one)


@each_kind
def test_a_templates_own_separator_stands_before_the_answer(kind: Kind) -> None:
    model = talking(kind)
    for template, between in (
        (Template(name="glued", user="Q: ", assistant=" A:", answer_separator=""), ""),
        (Template(name="line", user="Q: ", assistant=" A:", answer_separator="\n"), "\n"),
        (Template(name="chat", user="Q: ", assistant="<|end|>\n", answer_separator=" "), " "),
        (TEMPLATES["llava-1.5"], " "),
        (TEMPLATES["plain"], ""),
    ):
        asked = model.prepare("Who made the star?", template=template)
        [found] = answer_tokens(model, asked, "Red star")
        assert [*asked.input_ids[0].tolist(), *found.ids] == ids_of(model, f"{asked.prompts[0]}{between}Red star")
        prefixed = model.prepare("Who made the star?", template=template, answer_prefix="Red")
        [further] = answer_tokens(model, prefixed, "star")
        assert [*prefixed.input_ids[0].tolist(), *further.ids] == [*asked.input_ids[0].tolist(), *found.ids]
        forced = teacher_forced(model, asked, "Red star").inputs
        assert forced.prompts == (f"{asked.prompts[0]}{between}Red star",)
        assert forced.input_ids[0].tolist() == ids_of(model, forced.prompts[0])


@each_kind
def test_a_prompt_that_writes_its_beginning_out(kind: Kind) -> None:
    model = talking(kind)
    asked = model.prepare("<s>Who made the star? ASSISTANT:", template=None)
    [found] = answer_tokens(model, asked, "2")
    assert [*asked.input_ids[0].tolist(), *found.ids] == ids_of(model, "<s>Who made the star? ASSISTANT: 2")


@each_kind
def test_every_analysis_follows_the_tokens_that_come_after_the_prompt(kind: Kind) -> None:
    model = talking(kind)
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)
    asked = model.prepare("What color is the star?", image)
    for word in ("2", " red", "Red star", "Red"):
        [found] = answer_tokens(model, asked, word)
        names = model.tokenizer.convert_ids_to_tokens(list(found.ids))
        forced = teacher_forced(model, asked, word)
        assert forced.inputs.input_ids[0].tolist() == [*asked.input_ids[0].tolist(), *found.ids]
        edges = ["question->last"]
        for result in (
            attention_knockout(model, asked, edges, "all", answer=word),
            causal_trace(model, asked, "star", answer=word, kinds=("mlp",), layers=[0], positions="last"),
            head_scores(model, asked, word),
            patch_importance(model, asked, word, method="grad_x_input"),
            deletion_curves(model, asked, {"x": torch.eye(2).numpy()}, word, shares=(0, 1)),
        ):
            assert result.attrs["answer_tokens"] == names
            assert result.attrs["measured"] == "whole answer"
        by_layer = answer_probability(model, asked, word)
        assert by_layer.attrs["measured"] == "first token"
        first = answer_tokens(model, asked, word.strip().lower())[0].ids[0]
        assert by_layer.attrs["answer_tokens"][0] == model.tokenizer.convert_ids_to_tokens(first)
        last = model(asked)[0, -1].detach().softmax(-1)
        assert float(by_layer.sel(norm="final", form="lower")[-1]) == pytest.approx(float(last[first]), rel=1e-3)
        one_token = (
            lambda given: logit_lens(model, asked, answers=[given]).answer_probability,
            lambda given: logit_attribution(model, asked, given),
            lambda given: (
                attention_contribution(model, asked, "star", measure="logit", answer=given).constraint_to_last
            ),
            lambda given: information_storage(model, asked, given, 7, positions="question").logit_difference,
            lambda given: ablate_heads(model, asked, [(0, 0)], given, replace="zero").log_probability,
        )
        for analysis in one_token:
            if len(found.ids) > 1:
                with pytest.raises(InputError, match=r"'.*'.*single token.*\[|one token"):
                    analysis(word)
            else:
                np.testing.assert_array_equal(analysis(word), analysis(found.ids[0]))


@each_kind
def test_the_models_own_first_token_is_followed_even_if_it_spells_nothing(kind: Kind) -> None:
    model = talking(kind)
    asked = model.prepare("What color is the star?")
    mark = model.tokenizer.convert_tokens_to_ids("Ġ" if kind == "byte-level" else "▁")
    assert _forms(model, asked.token_map, model.to_string([mark]), mark) == [mark, mark]
