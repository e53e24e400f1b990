"""When what a model said counts as the answer of the table."""

from __future__ import annotations

from collections.abc import Callable

Match = Callable[[str, str], bool]
"""From what the model said and the row's answer to whether it is right."""


def answers_match(said: str, answer: str) -> bool:
    """Whether two answers are the same but for case, blanks around them and a final full stop.

    >>> answers_match(" Red.", "red"), answers_match("Redder", "red")
    (True, False)
    """
    return _plain(said) == _plain(answer)


def answers_match_exactly(said: str, answer: str) -> bool:
    """Whether what was said, in lower case and without blanks around it, is the answer: Zhang et al.'s (2411.18620) rule.

    The answer is taken as it is; a full stop, or a capital in the table's answer, makes a difference.

    >>> answers_match_exactly(" Red ", "red"), answers_match_exactly("Red.", "red"), answers_match_exactly("Red", "Red")
    (True, False, False)
    """
    return said.strip().lower() == answer


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
