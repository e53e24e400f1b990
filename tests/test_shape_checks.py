"""What is annotated is checked in the first calls: of every test where there are shapes, else of every file of tests."""

from __future__ import annotations

from functools import partial

import jaxtyping
import numpy as np
import pytest

from hooked_llava.checks import as_index
from hooked_llava.replay.row_edits import edit_function
from hooked_llava.results.map_quality import pointing
from tests.shape_checks import CALLS, check_again

SCORES, POSITIVE = np.zeros((1, 3)), np.ones((1, 3), dtype=bool)
wrong_shape = partial(pointing, SCORES, POSITIVE[:, :2])
wrong_type = partial(as_index, 0, 3, what=5)


def test_a_wrong_shape_is_found() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="positive"):
        wrong_shape()


def test_after_some_calls_shapes_are_left_unchecked_until_the_next_test() -> None:
    for _ in range(CALLS):
        pointing(SCORES, POSITIVE)
    with pytest.raises(IndexError):
        wrong_shape()
    check_again("file")
    with pytest.raises(IndexError):
        wrong_shape()
    check_again("test")
    with pytest.raises(jaxtyping.TypeCheckError, match="positive"):
        wrong_shape()


def test_after_some_calls_types_are_left_unchecked_until_the_next_file() -> None:
    check_again("file")
    with pytest.raises(jaxtyping.TypeCheckError, match="what"):
        wrong_type()
    for _ in range(CALLS):
        as_index(0, 3, what="layer")
    assert wrong_type() == 0
    check_again("test")
    assert wrong_type() == 0
    check_again("file")
    with pytest.raises(jaxtyping.TypeCheckError, match="what"):
        wrong_type()


def test_the_first_functions_made_inside_a_function_are_checked() -> None:
    check_again("file")
    made = [edit_function([]) for _ in range(CALLS + 2)]
    assert [hasattr(function, "__wrapped__") for function in made] == [True] * CALLS + [False] * 2
    with pytest.raises(jaxtyping.TypeCheckError, match="hook"):
        made[0](np.zeros(1), "no hook point")
