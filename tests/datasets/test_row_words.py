"""Options and objects found in the questions of the six kinds, and the edges that they name."""

from __future__ import annotations

import pytest

from hooked_llava.datasets import StudyRow, prepare_rows, read_gqa
from hooked_llava.datasets.row_words import word_places
from hooked_llava.datasets.study import _identity
from hooked_llava.errors import SpanError
from hooked_llava.experiments.edges import study_edges
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.gqa_tables import gqa_rows, write_gqa

MODEL = HookedLLaVA.from_pretrained("tiny-shapes")
ASKED = {  # kind: question, answer, true option, false option, objects, and where they are by their words
    "ChooseAttr": ("Is the jar full or empty?", "full", "full", "empty", ["jar"], ["full", "empty"], ["jar"]),
    "ChooseCat": (
        *("Which kind of animal is this, a cat or a bird?", "cat", "cat", "bird", ["cat"], ["cat", "bird"], ["cat"]),
    ),
    "ChooseRel": (
        "Is the faucet to the right or to the left of the toilet?",
        *("right", "to the right of", "to the left of", ["faucet", "toilet"], [], ["faucet", "toilet"]),
    ),
    "CompareAttr": (
        "What do the bears and the floor have in common?",
        *("color", "", "", ["bear", "floor"], [], ["bears", "floor"]),
    ),
    "LogicalObj": (
        "Are there either any refrigerators or berries that are red?",
        *("yes", "", "", ["refrigerator", "berry"], [], ["refrigerators", "berries"]),
    ),
    "QueryAttr": (
        "On which side of the photo is the apple?", "left", "", "", ["apple"], [], ["apple"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ASKED)
def test_the_words_of_each_kind(kind: str) -> None:
    question, answer, true, false, objects, options, named = ASKED[kind]
    row = StudyRow(
        id="1", question=question, answer=answer, true_option=true, false_option=false, objects=tuple(objects)
    )
    found = {
        name: [question[slice(*p)] for p in places]
        for name, places in word_places(question, row.options, row.objects).items()
    }
    assert found.pop("object_word") == named
    assert [found[name][0] for name in ("true_option", "false_option") if name in found] == options


@pytest.mark.parametrize(
    ("question", "answer", "false", "places"),
    [
        ("Is the left bag left or right?", "left", "right", (16, 24)),  # nearest to the other option
        ("Is the redder bag blue or red?", "red", "blue", (26, 18)),  # no part of a word
        ("Red or blue?", "red", "blue", (0, 7)),  # in whichever case
        ("Is it more red than blue?", "red", "blue", (11, 20)),  # each once
    ],
)
def test_options_are_whole_words_beside_or(question: str, answer: str, false: str, places: tuple[int, int]) -> None:
    row = StudyRow(id="1", question=question, answer=answer, false_option=false)
    found = word_places(question, row.options, row.objects)
    assert (found["true_option"][0][0], found["false_option"][0][0]) == places


def test_what_is_not_named_or_not_clear_has_no_place() -> None:
    assert word_places("Is it red?", ("red", "blue"), []) == {}
    assert word_places("Is the red one red and not blue?", ("red", "blue"), []) == {}
    assert word_places("What is it?", None, [""]) == {}


def test_prepared_rows_have_the_spans() -> None:
    rows = [row for kind in ("ChooseAttr", "CompareAttr", "QueryAttr") for row in gqa_rows(3, kinds=[kind])]
    inputs = prepare_rows(MODEL, rows)
    for token_map, row in zip(inputs.token_maps, rows, strict=True):
        words = {name: [token_map.labels[p] for p in token_map[name]] for name in token_map.named if "_" in name}
        assert words.pop("object_word") == [word for word in _asked(row.question) if word in row.objects]
        if row.false_option:
            assert words == {"true_option": [row.answer], "false_option": [row.false_option]}
            assert not token_map["true_option"] - token_map["question"]
        else:
            assert words == {}
            with pytest.raises(SpanError, match="span 'true_option'"):
                token_map["true_option"]


def test_the_released_tables_bring_their_options_and_edges_are_names(tmp_path) -> None:
    rows = read_gqa(write_gqa(tmp_path, n=1), kinds=["ChooseAttr"])
    assert rows[0].true_option == rows[0].answer
    assert [edge.source for edge in study_edges(["false_option->last", "question-true_option->last"])] == [
        "false_option",
        "question-true_option",
    ]


def test_words_count_for_the_hash_of_a_study_where_an_edge_names_them() -> None:
    one, other = (StudyRow(id="1", question="Is it red?", answer="red", objects=(name,)) for name in ("it", "bag"))
    for edges, differ in ((["image->last"], False), (["object_word->last"], True)):
        hashes = {_identity(MODEL, [row], {"about": {"edges": edges}})[0] for row in (one, other)}
        assert (len(hashes) == 2) == differ


def _asked(question: str) -> list[str]:
    return question.rstrip("?").split()
