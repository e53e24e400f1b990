"""The embedded world's questions as tables: what is written is read back, and says what the world says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hooked_llava.datasets.gqa import GQA_KINDS, read_gqa
from hooked_llava.datasets.rows import row_image
from hooked_llava.toy.evaluate import held_out
from hooked_llava.toy.gqa_tables import TOY_KINDS, gqa_rows, write_gqa


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = gqa_rows(3)
    again = read_gqa(write_gqa(tmp_path, 3))
    assert [replace(row, image=None) for row in again] == [replace(row, image=None) for row in rows]
    assert len({row.id for row in rows}) == 3 * len(GQA_KINDS)
    for row, read in zip(rows, again, strict=True):
        assert np.array_equal(np.asarray(row_image(read, tmp_path)), np.asarray(row.image))


def test_rows_say_what_the_world_says() -> None:
    for kind in GQA_KINDS:
        for row, example in zip(gqa_rows(8, kinds=[kind], seed=5), held_out(TOY_KINDS[kind], 8, 5), strict=True):
            assert row.question == example.question.text
            assert row.answer.capitalize() == example.question.answer
            known = {o.box: o for o in example.scene.objects}
            assert set(row.boxes) <= set(known)
            if kind == "ChooseCat":
                assert known[row.boxes[0]].shape == row.answer
            elif kind != "LogicalObj":
                assert tuple(known[box].shape for box in row.boxes) == row.objects
            else:
                assert [known[box].shape for box in row.boxes] == [s for s in row.objects if example.scene.find(s)]


def test_images_are_not_those_that_accuracy_is_measured_on() -> None:
    ours = gqa_rows(5, kinds=["QueryAttr"])
    theirs = [example.scene.render() for example in held_out("query_pos", 5)]
    assert not any(np.array_equal(np.asarray(row.image), np.asarray(p)) for row in ours for p in theirs)
