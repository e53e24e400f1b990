from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.checks import as_index, as_indices, one_of, whole_number
from hooked_llava.errors import ConfigError, InputError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2, [2]),
        (-1, [3]),
        ([0, -1], [0, 3]),
        (np.int64(1), [1]),
        (torch.tensor(1), [1]),
        (torch.tensor([1, 3]), [1, 3]),
    ],
)
def test_any_whole_numbers(given: Any, expected: list[int]) -> None:
    assert as_indices(given, 4, "heads") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([4], r"\[4\].*heads; expected -4\.\.3"),
        ([], r"\[\].*heads.*one of 0\.\.3"),
        (1.0, r"heads=1.0.*whole numbers in -4..3"),
        ("all", "heads='all'.*whole numbers"),
        ([True, False], r"heads=\[True, False\].*mask\.nonzero"),
    ],
)
def test_what_chooses_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_indices(given, 4, "heads")


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 1.0, "1", None, [1]])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="steps.*whole number"):
        whole_number(value, "steps")


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"least": 1}, "k=0 words; expected at least 1"),
        (9, {"least": 1, "most": 8}, "k=9 words; expected 1 to 8"),
        (1.5, {"least": 1, "most": 8}, "k=1.5 words; expected 1 to 8"),
        (0, {"least": 1, "expected": "as many as you like"}, "k=0 words; expected as many"),
    ],
)
def test_a_whole_number_has_bounds(value: Any, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole_number(value, "k", of=" words", **bounds)
    assert whole_number(np.int64(8), "k", **bounds) == 8


def test_an_index_counts_from_either_end() -> None:
    assert [as_index(i, 4, "layer") for i in (0, 3, -1, -4)] == [0, 3, 3, 0]
    for i in (4, -5):
        with pytest.raises(InputError, match=rf"layer={i}.*-4\.\.3"):
            as_index(i, 4, "layer")
    with pytest.raises(ConfigError, match=r"layer.*0\.\.3"):
        as_index(-1, 4, "layer", says="The layer is out of range", from_end=False, error=ConfigError)


def test_none_at_all_may_be_fine() -> None:
    assert as_indices([], 4, "heads", empty=True) == []


@pytest.mark.parametrize(
    ("names", "says", "message"),
    [
        (["text", "tokens"], None, r"^return_type='txt'; expected 'text' or 'tokens'\.$"),
        (["text"], None, r"expected 'text'\.$"),
        (["text", "a", "b", "c"], None, r"one of.*text, a, b, c\. Did you mean: text\?$"),
        (["text"], "There is no type 'txt'.", r"^There is no type 'txt'\. Did you mean: text\? Known: text\.$"),
    ],
)
def test_one_of_these_names(names: list[str], says: str | None, message: str) -> None:
    assert one_of("text", names, "return_type", says=says) == "text"
    with pytest.raises(InputError, match=message):
        one_of("txt", names, "return_type", says=says)
