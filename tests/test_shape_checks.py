"""What is annotated is checked in the first calls of every test."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest

from hooked_llava.results.map_quality import pointing
from tests.shape_checks import CALLS, check_again

SCORES, POSITIVE = np.zeros((1, 3)), np.ones((1, 3), dtype=bool)


def test_a_wrong_shape_is_found() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="positive"):
        pointing(SCORES, POSITIVE[:, :2])


def test_after_many_calls_a_function_is_left_unchecked_until_the_next_test() -> None:
    for _ in range(CALLS):
        pointing(SCORES, POSITIVE)
    with pytest.raises(IndexError):
        pointing(SCORES, POSITIVE[:, :2])
    check_again()
    with pytest.raises(jaxtyping.TypeCheckError, match="positive"):
        pointing(SCORES, POSITIVE[:, :2])
