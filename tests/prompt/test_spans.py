"""Spans joined by |, & and -, objects and random patches, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_llava.architecture import llava_layout
from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.spans import split_edge
from hooked_llava.prompt.token_map import TokenMap
from tests.layouts import DRAWN, made, map_of

# <s> image(2 x 2) text | question question | rest | last
TEXT = TokenMap(
    token_ids=(1, 5, 5, 5, 5, 9, 10, 11, 12, 13), real=range(10), image_starts=(1,), layouts=(llava_layout(2, 2),)
)
TOKENS = TEXT.with_spans(question=[6, 7], object=[2])


@pytest.mark.parametrize(
    ("expression", "positions"),
    [
        ("image", [1, 2, 3, 4]),
        ("question|rest", [5, 6, 7, 8]),
        ("question | rest|last", [5, 6, 7, 8, 9]),
        ("image-object", [1, 3, 4]),
        ("image - object & image", [1, 3, 4]),
        ("text-system-last", [5, 6, 7, 8]),
        ("text - question | image", [0, 1, 2, 3, 4, 5, 8, 9]),  # from left to right
        ("other", [1, 3, 4]),
        ("image&object", [2]),
        ("question&image", []),
    ],
)
def test_spans_are_joined_from_left_to_right(expression: str, positions: list[int]) -> None:
    assert TOKENS.span(expression) == TOKENS[expression] == positions


def test_random_patches_are_as_many_and_none_of_the_objects() -> None:
    big = TokenMap(token_ids=(1, *[5] * 64, 9, 10), real=range(67), image_starts=(1,), layouts=(llava_layout(8, 8),))
    big = big.with_spans(object=[10, 11, 18, 19])
    draws = {tuple(big.span("random", seed=seed)) for seed in range(20)}
    assert len(draws) > 15
    for drawn in draws:
        assert len(drawn) == len(set(drawn)) == 4
        assert set(drawn) <= set(big["image"]) - set(big["object"])
    assert big.span("random") == big.span("random")
    padded = TokenMap(
        token_ids=(0, 0, 0, *big.token_ids), real=range(3, 70), image_starts=(4,), layouts=(llava_layout(8, 8),)
    )
    padded = padded.with_spans(object=[13, 14, 21, 22])
    assert [p - 3 for p in padded.span("random")] == list(big.span("random"))
    other = TokenMap(token_ids=(1, *[5] * 64, 9, 11), real=range(67), image_starts=(1,), layouts=(llava_layout(8, 8),))
    assert other.with_spans(object=big["object"]).span("random") != big.span("random")


def test_names_of_ones_own_come_first() -> None:
    assert TOKENS.with_spans(random=[3], other=[4]).span("random|other") == [3, 4]


def test_spans_that_are_not_there() -> None:
    with pytest.raises(SpanError, match="span 'object'.*'other'.*object.*inputs.with_"):
        TEXT.span(["other", "question"][0])
    with pytest.raises(SpanError, match="no span 'object'. Say where"):
        TEXT.span("object")
    with pytest.raises(SpanError, match="There is no span 'imge'. Did you mean: image"):
        TOKENS.span("imge|question")
    with pytest.raises(SpanError, match="covers 3 patches.*leaves 1"):
        TEXT.with_spans(object=[1, 2, 3]).span("random")


def test_a_name_with_an_operator_in_it_is_taken_as_it_stands() -> None:
    mine = TOKENS.with_spans(**{"image-last": [5]})
    assert mine.span("image-last") == mine["image-last"] == [5]
    assert mine.span("image - last") == mine["image"]


@pytest.mark.parametrize("wrong", ["image", "->last", "image->", "", "->"])
def test_edges_that_are_none(wrong: str) -> None:
    with pytest.raises(InputError, match="expected 'source->target'"):
        split_edge(wrong)


@given(drawn=st.lists(DRAWN, min_size=1, max_size=3), data=st.data(), before=st.integers(0, 2))
@settings(max_examples=30)
def test_object_other_and_random_are_patches_of_any_layout(drawn: list[Any], data: st.DataObject, before: int) -> None:
    """Newlines and class tokens belong to the image, and to no object."""
    images = [made(one) for one in drawn]
    token_map = map_of(images, before=before)
    patches = Positions(p for image in range(len(images)) for p in token_map.patches(image))
    half = len(patches) // 2
    chosen = data.draw(st.lists(st.sampled_from(patches.tolist()), min_size=1, max_size=max(1, half), unique=True))
    named = token_map.with_spans(object=chosen)
    assert named["other"] == patches - chosen
    assert named["object|other"] == patches
    assert named["image - object - other"].isdisjoint(patches)
    if len(chosen) <= half:
        random = named["random"]
        assert len(random) == len(chosen)
        assert random - named["other"] == []
        unpadded = map_of(images).with_spans(object=[p - before for p in chosen])
        assert unpadded["random"] == [p - before for p in random]
