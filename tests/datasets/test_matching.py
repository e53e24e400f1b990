"""What counts as the right answer."""

from __future__ import annotations

import pytest

from hooked_llava.datasets import answers_match, answers_match_exactly


def test_answers_are_compared_without_case_and_full_stop() -> None:
    assert answers_match(" Red.", "red")
    assert answers_match("cell phone", "Cell phone")
    assert not answers_match("Redder", "red")
    assert not answers_match("", "red")


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("Red", "red", True),
        (" red\n", "red", True),
        ("Red.", "red", False),
        ("Red", "Red", False),
        ("red", " red", False),
        ("", "red", False),
    ],
)
def test_the_papers_own_comparison(said: str, answer: str, right: bool) -> None:
    assert answers_match_exactly(said, answer) is right is (said.strip().lower() == answer)
