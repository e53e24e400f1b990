"""Edges by name: spans joined, objects and random patches, and what is refused."""

from __future__ import annotations

import pytest

from hooked_llava.errors import InputError, SpanError
from hooked_llava.interventions.edges import STANDARD, Edge, edges_of, marked, span, study_edges
from hooked_llava.token_map import TokenMap
from tests.pairs import pair

# <s> picture(2 x 2) text | question question | rest | last
TEXT = TokenMap(token_ids=(1, 5, 5, 5, 5, 9, 10, 11, 12, 13), real=range(10), image_starts=(1,), grid=(2, 2))
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
    assert span(TOKENS, expression) == positions


def test_random_patches_are_as_many_and_none_of_the_objects() -> None:
    big = TokenMap(token_ids=(1, *[5] * 64, 9, 10), real=range(67), image_starts=(1,), grid=(8, 8))
    big = big.with_spans(object=[10, 11, 18, 19])
    draws = {tuple(span(big, "random", seed=seed)) for seed in range(20)}
    assert len(draws) > 15
    for drawn in draws:
        assert len(drawn) == len(set(drawn)) == 4
        assert set(drawn) <= set(big["image"]) - set(big["object"])
    assert span(big, "random") == span(big, "random")
    padded = TokenMap(token_ids=(0, 0, 0, *big.token_ids), real=range(3, 70), image_starts=(4,), grid=(8, 8))
    padded = padded.with_spans(object=[13, 14, 21, 22])
    assert [p - 3 for p in span(padded, "random")] == list(span(big, "random"))
    other = TokenMap(token_ids=(1, *[5] * 64, 9, 11), real=range(67), image_starts=(1,), grid=(8, 8))
    assert span(other.with_spans(object=big["object"]), "random") != span(big, "random")


def test_names_of_ones_own_come_first() -> None:
    assert span(TOKENS.with_spans(random=[3], other=[4]), "random|other") == [3, 4]


def test_spans_that_are_not_there() -> None:
    with pytest.raises(SpanError, match="no span 'object', which 'other' needs. Say where the object is: inputs.with_"):
        span(TEXT, ["other", "question"][0])
    with pytest.raises(SpanError, match="no span 'object'. Say where"):
        span(TEXT, "object")
    with pytest.raises(SpanError, match="There is no span 'imge'. Did you mean: image"):
        span(TOKENS, "imge|question")
    with pytest.raises(SpanError, match="covers 3 patches and leaves 1: too few"):
        span(TEXT.with_spans(object=[1, 2, 3]), "random")


def test_edges_by_name_or_with_their_ends() -> None:
    assert edges_of(["a->b"]) == [Edge("a->b", "a", "b")]
    assert edges_of({"mine": ("image", [9])}) == [Edge("mine", "image", [9])]
    blocked = Edge.of("image -> last").blocked([1, 2])
    assert [iv.hook for iv in blocked] == ["blocks.1.attn.hook_attn_scores", "blocks.2.attn.hook_attn_scores"]
    assert blocked[0].block == ("source of image -> last", "target of image -> last")
    for wrong in ("image", "->last", "image->", ""):
        with pytest.raises(InputError, match="is no edge; expected 'source->target'"):
            Edge.of(wrong)
    with pytest.raises(InputError, match="given twice"):
        edges_of(["a->b", "a->b"])


def test_marked_prompts_have_both_ends_of_every_edge() -> None:
    ours = pair("plain").ours
    inputs = ours.as_inputs(pair("plain").prompt(n_text=6)).with_spans(question=[6, 7])
    edges = edges_of({"one": ("image", "question|last"), "two": ([0, 2], None), "three": ("object", "last")})
    found, present = marked(inputs, edges, missing="skip")
    assert present.tolist() == [[True, True, False]]
    ends = {name: found.token_map[name].tolist() for edge in edges for name in edge.ends}
    last = inputs.shape[1] - 1
    assert ends["source of one"] == [1, 2, 3, 4]
    assert ends["target of one"] == [6, 7, last]
    assert ends["source of two"] == [0, 2]
    assert ends["target of two"] == list(range(last + 1))
    assert ends["source of three"] == ends["target of three"] == []
    assert "one" not in inputs.token_map.named
    with pytest.raises(SpanError):
        marked(inputs, edges)
    with pytest.raises(InputError, match="every source lies behind every target"):
        marked(inputs, edges_of({"back": ("last", "question")}), missing="skip")


def test_edges_of_a_study_mean_the_same_in_every_question() -> None:
    every = [f"{name}->last" for name in STANDARD]
    assert [edge.name for edge in study_edges(every)] == every
    assert study_edges({"whole": (None, "last")})[0].source is None
    with pytest.raises(SpanError, match="'patches', which no prompt has"):
        study_edges(["image&patches->last"])
    with pytest.raises(InputError, match="names positions by number"):
        study_edges({"mine": (range(3), "last")})
