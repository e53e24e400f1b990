"""Rows of a table as prompts: images found, objects and constraints placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from hooked_llava.datasets.rows import StudyRow, boxes_lost, check_rows, prepare_rows, row_image
from hooked_llava.datasets.study import study
from hooked_llava.editing.request import EditRequest, prepare_request
from hooked_llava.errors import InputError, SpanError
from hooked_llava.experiments.corruptions import find_constraints
from hooked_llava.model.llava import HookedLLaVA
from tests.fixtures_processor import make_processor
from tests.pairs import pair

RED = np.full((64, 64, 3), 200, dtype=np.uint8)


def row(**fields: object) -> StudyRow:
    return StudyRow(**{"id": "7", "question": "What color is the star?", "answer": "red", "image": RED, **fields})


def test_objects_and_constraints_become_spans(tiny_shapes: HookedLLaVA) -> None:
    rows = [
        row(boxes=((0, 0, 8, 8), (56, 56, 64, 64)), constraint="the star"),
        row(question="Is there a ring?", boxes=((0, 0, 9, 8),)),
        row(question="What shape is this?"),
    ]
    inputs = prepare_rows(tiny_shapes, rows)
    first, second, third = inputs.token_maps
    assert first["object"] == [first.patch_to_position(0, 0), first.patch_to_position(7, 7)]
    assert [first.labels[p] for p in first["constraint"]] == ["the", "star"]
    assert second["object"] == [second.patch_to_position(0, 0), second.patch_to_position(0, 1)]
    half = prepare_rows(tiny_shapes, rows[1:2], coverage=0.5).token_map
    assert half["object"] == [half.patch_to_position(0, 0)]
    assert "object" not in third
    assert "constraint" not in second
    assert inputs[0].prompts == tiny_shapes.prepare(rows[0].question, RED).prompts


def test_template_tail_and_prefix_are_those_of_prepare(tiny_shapes: HookedLLaVA) -> None:
    inputs = prepare_rows(tiny_shapes, [row(answer_prefix="The color of the star is")], tail=None)
    expected = tiny_shapes.prepare("What color is the star?", RED, tail=None, answer_prefix="The color of the star is")
    assert inputs.prompts == expected.prompts
    with pytest.raises(InputError, match=r"rows.*answers.*\["):
        prepare_rows(tiny_shapes, [row(answer_prefix="The"), row()])


def test_boxes_that_the_model_does_not_see_are_left_out_and_counted(tiny_shapes: HookedLLaVA) -> None:
    cropping = HookedLLaVA.from_hf(pair().hf, processor=make_processor())  # the middle square of an image
    wide = np.full((64, 200, 3), 200, dtype=np.uint8)
    left, middle = (0, 0, 8, 8), (80, 0, 112, 32)
    rows = [row(id=str(i), image=wide, boxes=boxes) for i, boxes in enumerate([(left,), (middle,), (left, middle), ()])]
    inputs = prepare_rows(cropping, rows)
    assert ["object" in m for m in inputs.token_maps] == [False, True, True, False]
    assert inputs.token_maps[2]["object"] == inputs.token_maps[1]["object"]
    assert boxes_lost(inputs, rows) == [1, 0, 1, 0]
    found = study(
        cropping, rows, lambda inputs, rows: xr.DataArray(np.zeros(len(rows)), dims="prompt"), only_correct=False
    )
    assert found.boxes_lost.to_series().to_dict() == {"0": 1, "1": 0, "2": 1, "3": 0}
    small = [row(boxes=((0, 0, 2, 2),))]
    assert "object" not in prepare_rows(tiny_shapes, small, coverage=0.9).token_map  # too small for the coverage
    assert boxes_lost(prepare_rows(tiny_shapes, small, coverage=0.9), small, 0.9) == [1]
    with pytest.raises(SpanError, match=r"Row 7: \(9, 9, 3, 3\).*x0 < x1"):
        prepare_rows(tiny_shapes, [row(boxes=((9, 9, 3, 3),))])
    with pytest.raises(InputError, match="coverage=2.*0 to 1"):
        prepare_rows(tiny_shapes, [row()], coverage=2)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_boxes_are_drawn_on_the_upright_image(kind: str, tiny_shapes: HookedLLaVA, tmp_path: Path) -> None:
    """A photo stored on its side: size and boxes are those of the image as a person sees it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((80, 64, 3), dtype=np.uint8)).save(tmp_path / f"12.{kind}", exif=exif)
    asked = row(image="12", size=(80, 64), boxes=((8, 0, 16, 8),))
    named = [row(image=f"12.{kind}", size=(80, 64), boxes=((8, 0, 16, 8),))]
    check_rows(named, tmp_path)
    shown = row_image(named[0], tmp_path)
    assert shown is not None
    assert shown.size == (80, 64)
    token_map = prepare_rows(tiny_shapes, named, tmp_path).token_map
    assert token_map.layout().original_size == (64, 80)
    assert token_map["object"].tolist() == [token_map.patch_to_position(0, 0)]
    if kind != "tif":  # an ending that must be given
        assert prepare_rows(tiny_shapes, [asked], tmp_path).token_map["object"] == token_map["object"]
    with pytest.raises(InputError, match="is 80 x 64 pixels.*boxes.*in 64 x 80"):
        check_rows([row(image=f"12.{kind}", size=(64, 80), boxes=((8, 0, 16, 8),))], tmp_path)


def test_a_constraint_that_is_not_asked_for_is_refused(tiny_shapes: HookedLLaVA) -> None:
    with pytest.raises(SpanError, match="Row 7: 'the ring' does not occur"):
        prepare_rows(tiny_shapes, [row(constraint="the ring")])


def test_a_constraint_that_stands_twice(tiny_shapes: HookedLLaVA) -> None:
    twice = row(question="Is the star a red star?", constraint="star")
    with pytest.raises(SpanError, match="Row 7.*'star' occurs 2.*question.*constraint_occurrence="):
        prepare_rows(tiny_shapes, [twice])
    places = [
        prepare_rows(tiny_shapes, [replace(twice, constraint_occurrence=i)]).token_map["constraint"] for i in range(2)
    ]
    wider = prepare_rows(tiny_shapes, [replace(twice, constraint="red star")]).token_map
    assert places[0][0] < places[1][0]
    assert places[1] == wider["constraint"][-1:]
    with pytest.raises(SpanError, match="Row 7: occurrence=2, but 'star' occurs 2 times"):
        prepare_rows(tiny_shapes, [replace(twice, constraint_occurrence=2)])
    with pytest.raises(SpanError, match="Row 7.*'sta'.*'star'"):
        prepare_rows(tiny_shapes, [row(question="Is it a star?", constraint="sta")])


def test_advice_is_what_the_function_takes(tiny_shapes: HookedLLaVA) -> None:
    """Words that stand twice, in every function that takes words: what the error says can be done there."""
    asked = "Is the star a red star?"
    inputs = tiny_shapes.prepare(asked)
    second = inputs.token_map.find("star", within="question", occurrence=1)
    positions = r"'star' occurs 2.*token_map\.find\(words, occurrence=\.\.\., whole_words=\.\.\.\)"
    for call in (
        lambda words: inputs.token_map.with_spans(mine=words)["mine"],
        lambda words: inputs.with_spans(mine=words).token_map["mine"],
        lambda words: find_constraints(inputs.token_map, words)[0],
    ):
        with pytest.raises(SpanError, match=positions):
            call("star")
        assert call(second) == second
    with pytest.raises(SpanError, match=r"occurs 2.*inputs.with_spans\(options=positions\)"):
        tiny_shapes.prepare(asked, options=["star"])
    assert inputs.with_spans(options=second).token_map["options"] == second
    request = EditRequest(asked, "Boris", constraint="star")
    with pytest.raises(SpanError, match="occurs 2.*position.*edit"):
        prepare_request(tiny_shapes, request)
    prepared = prepare_request(tiny_shapes, EditRequest(inputs.with_spans(mine=second), "Boris"), "mine")
    assert prepared.from_end[0] + len(inputs.token_map) == second[-1]


def test_images_are_found_with_or_without_their_ending(tmp_path: Path) -> None:
    Image.fromarray(RED).save(tmp_path / "12.png")
    for name in ("12", "12.png"):
        assert row_image(row(image=name), tmp_path).size == (64, 64)
    assert row_image(row(image=tmp_path / "12.png")).size == (64, 64)
    assert row_image(row(image=None)) is None
    with pytest.raises(InputError, match="Row 7.*image '13'"):
        row_image(row(image="13"), tmp_path)
    with pytest.raises(InputError, match="folder.*images="):
        row_image(row(image="12"))
    with pytest.raises(InputError, match="is 64 x 64 pixels.*boxes.*in 500 x 333"):
        row_image(row(image="12", boxes=((0, 0, 4, 4),), size=(500, 333)), tmp_path)
    assert row_image(row(image="12", size=(500, 333)), tmp_path).size == (64, 64)  # no box is concerned
