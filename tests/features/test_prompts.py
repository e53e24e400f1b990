"""What is asked, and how replies of all kinds are read."""

from __future__ import annotations

import pytest

from hooked_llava.features.prompts import (
    CONCEPT_PROMPT,
    DETECT_PROMPT,
    EXPLAIN_PROMPT,
    REFINE_PROMPT,
    filled,
    is_unable,
    read_answer_phrase,
    read_concept,
    read_explanation,
    read_yes_or_no,
)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("[EXPLANATION]: The train", "The train"),
        ("[EXPLANATION] The train", "The train"),
        ("I first output [EXPLANATION]: and then:\n[EXPLANATION]: The sunglasses.\n", "The sunglasses."),
        ("[EXPLANATION]:", ""),
        ("The train", ""),
        ("", ""),
    ],
)
def test_explanations(reply: str, text: str) -> None:
    assert read_explanation(reply) == text


@pytest.mark.parametrize(
    ("reply", "phrase"),
    [
        ('[ANSWER] The word "ORD"', 'The word "ORD"'),
        ("[ANSWER]: dogs\n\nThat is because of the dogs.", "dogs"),
        ("Output: [ANSWER] dogs", "dogs"),
        ("dogs", ""),
    ],
)
def test_phrases(reply: str, phrase: str) -> None:
    assert read_answer_phrase(reply) == phrase


@pytest.mark.parametrize(
    ("reply", "concept"),
    [
        ("object", "object"),
        ("ANSWER: Color.", "color"),
        ("[texture]", "texture"),
        ("scene or object", None),
        ("partial", None),
        ("", None),
    ],
)
def test_concepts(reply: str, concept: str | None) -> None:
    assert read_concept(reply) == concept


@pytest.mark.parametrize(
    ("reply", "said"), [("Yes.", True), ("NO", False), ("yes and no", None), ("", None), ("nothing", None)]
)
def test_yes_or_no(reply: str, said: bool | None) -> None:
    assert read_yes_or_no(reply) is said


def test_unable() -> None:
    assert is_unable("I am unable to produce descriptions.")
    assert not is_unable("")


@pytest.mark.parametrize("prompt", [REFINE_PROMPT, CONCEPT_PROMPT, DETECT_PROMPT])
def test_descriptions_stand_in_prompts_as_they_are(prompt: str) -> None:
    assert prompt.count("{description}") == 1
    assert "a {brace} and {0}" in filled(prompt, "a {brace} and {0}")


def test_prompts_ask_for_what_is_read() -> None:
    assert read_explanation(EXPLAIN_PROMPT.partition("can simply output ")[2])
    assert "[ANSWER]" in REFINE_PROMPT
    assert "[scene, object, part, material, texture, color]" in CONCEPT_PROMPT
