"""The embedded world's constraint tables have the released schema, true answers, and corruptions of equal length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hooked_llava.datasets.rows import row_image
from hooked_llava.datasets.vqa_constraints import CONSTRAINT_KINDS, FILES, read_vqa_constraints
from hooked_llava.toy.constraint_tables import constraint_rows, other_shape, write_constraints
from hooked_llava.toy.facts import RELATIONS, fact_table
from hooked_llava.toy.objects import SHAPES


def test_written_tables_are_read_back(tmp_path: Path) -> None:
    rows = constraint_rows(3)
    table = read_vqa_constraints(write_constraints(tmp_path, 3))
    assert table.unplaced == []
    assert table.adjusted == 0
    assert len(table.rows) == 3 * len(CONSTRAINT_KINDS)
    for written, read in zip(rows, table.rows, strict=True):
        fields = ("id", "question", "answer", "kind", "constraint")
        assert [getattr(read, name) for name in fields] == [getattr(written, name) for name in fields]
        assert read.objects == (written.objects if written.kind != "OK-VQA" else ())
        assert isinstance(written.image, Image.Image)
        image = row_image(read, tmp_path)
        assert image is not None
        np.testing.assert_array_equal(np.asarray(image), np.asarray(written.image))
    header = (tmp_path / FILES["Known"]).read_text().splitlines()[0]
    assert header == ",question,subject,main_entity,image_url,answer"


@pytest.mark.parametrize("kind", CONSTRAINT_KINDS)
def test_answers_are_true(kind: str) -> None:
    facts = fact_table()
    templates = {t: r.name for r in RELATIONS for t in r.templates}
    for row in constraint_rows(5, kinds=[kind]):
        relation = templates[row.question.replace(row.constraint, "{subject}")]
        assert row.answer == facts[relation, row.objects[0]]


def test_movies_ask_all_the_same() -> None:
    assert len({row.question for row in constraint_rows(6, kinds=["Movies"])}) == 1


def test_the_other_shape_is_another_one_of_as_many_words() -> None:
    for row in constraint_rows(8):
        words = other_shape(row).split()
        assert len(words) == len(row.constraint.split())
        assert words[0] == "the"
        assert words[1] in SHAPES
        assert words[1] != row.objects[0]
