from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.checks import chosen
from hooked_llava.errors import InputError


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
    assert chosen(given, 4, "heads") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([4], r"\[4\] are out of range for the heads; expected -4..3"),
        ([], r"\[\] chooses none of the heads; give at least one of 0..3"),
        (1.0, r"heads=1.0; expected whole numbers in -4..3"),
        ("all", "heads='all'; expected whole numbers"),
        ([True, False], "A mask is turned into numbers"),
    ],
)
def test_what_chooses_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(given, 4, "heads")
