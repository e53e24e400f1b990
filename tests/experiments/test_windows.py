"""Windows of layers, held against the papers' own expressions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_llava.errors import InputError
from hooked_llava.experiments.windows import centered_window, paper_width, released_window

LAYERS = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))


@given(LAYERS, st.integers(1, 70))
def test_centered_windows_are_the_papers(layer: tuple[int, int], width: int) -> None:
    l, n_layers = layer
    expected = [i for i in range(n_layers) if l - math.floor(width / 2) <= i <= l + math.ceil(width / 2) - 1]
    assert list(centered_window(l, width, n_layers)) == expected
    assert l in centered_window(l, width, n_layers)


@pytest.mark.parametrize(
    ("center", "width", "n_layers", "layers"),
    [(5, 9, 40, range(1, 10)), (0, 9, 40, range(5)), (31, 7, 32, range(28, 32)), (3, 1, 6, [3]), (2, 4, 6, range(4))],
)
def test_the_papers_examples(center: int, width: int, n_layers: int, layers: range) -> None:
    assert list(centered_window(center, width, n_layers)) == list(layers)


@given(LAYERS, st.integers(1, 70))
def test_released_windows_are_twice_as_wide_and_one_more(layer: tuple[int, int], w: int) -> None:
    l, n_layers = layer
    expected = [l] if w == 1 else [i for i in range(n_layers) if abs(i - l) <= w]
    assert list(released_window(l, w, n_layers)) == expected


def test_negative_layers_count_from_the_end() -> None:
    assert centered_window(-1, 3, 8) == centered_window(7, 3, 8)
    assert released_window(-2, 2, 8) == released_window(6, 2, 8)


def test_the_share_is_the_papers() -> None:
    assert [paper_width(n) for n in (40, 32)] == [9, 7]  # what the paper used for 13b, and its script for 7b
    assert all(paper_width(n) % 2 == 1 and 3 <= paper_width(n) <= max(3, n) for n in range(1, 100))
    assert all(abs(40 * paper_width(n) - 9 * n) <= 40 for n in range(13, 100))  # within a layer, in whole numbers


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"Layer 6.*-6\.\.5"):
        centered_window(6, 3, 6)
    with pytest.raises(InputError, match="window of 0 layers"):
        centered_window(2, 0, 6)
    with pytest.raises(InputError, match="w=0; expected at least 1"):
        released_window(2, 0, 6)
