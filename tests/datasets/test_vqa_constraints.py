"""Reading VQA-Constraints: columns as released, constraints as they stand in the question, and what cannot be placed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_llava.datasets.vqa_constraints import CONSTRAINT_KINDS, place_constraint, read_vqa_constraints
from hooked_llava.errors import InputError

KNOWN = """,question,subject,main_entity,image_url
0,This building is located in,Space Needle,This building,./A photo of Space Needle
5,"This application, a product created by",MacApp,"This application,",./A photo of MacApp
8,The capital of this place is,Roman Republic,This place,./A photo of Roman Republic
9,This file system is developed by,NTFS,"This file.",./A photo of NTFS
"""
OKVQA = """,question,main_entity,image_url
0,What sport can you use this for?,this,./val2014/COCO_val2014_000000297147.jpg
1,Name the type of plant this is?,this plant,./val2014/COCO_val2014_000000339761.jpg
2,Why would this cat do this?,this,./val2014/COCO_val2014_000000339762.jpg
3,What is that?,,./val2014/COCO_val2014_000000339763.jpg
"""
MOVIES = """,question,director,main_entity,image_url
0,Name a movie directed by this director?,Jérôme Salle,this director,./A photo of Jérôme Salle
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("multimodal_known", KNOWN), ("okvqa", OKVQA), ("multimodal_movies", MOVIES)):
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    return tmp_path


def test_all_three_tables(folder: Path) -> None:
    table = read_vqa_constraints(folder)
    assert [row.id for row in table.rows] == ["OK-VQA-0", "Movies-0", "Known-0", "Known-5", "Known-8", "Known-9"]
    assert {row.kind for row in table.rows} == set(CONSTRAINT_KINDS)
    by_id = {row.id: row for row in table.rows}
    assert by_id["OK-VQA-0"].image == "COCO_val2014_000000297147.jpg"
    assert by_id["OK-VQA-0"].objects == ()
    assert by_id["Movies-0"].objects == ("Jérôme Salle",)
    assert by_id["Known-0"].image == "A photo of Space Needle"
    assert all(row.answer == "" for row in table.rows)
    assert all(row.question.count(row.constraint) == 1 for row in table.rows)


def test_a_constraint_is_written_as_it_stands_in_the_question(folder: Path) -> None:
    rows = {row.id: row for row in read_vqa_constraints(folder, kinds=["Known"]).rows}
    assert rows["Known-5"].constraint == "This application,"
    assert rows["Known-8"].constraint == "this place"
    assert rows["Known-9"].constraint == "This file"


def test_rows_that_cannot_be_placed_are_reported(folder: Path) -> None:
    table = read_vqa_constraints(folder / "okvqa.csv")
    assert [(row.id, row.why) for row in table.unplaced] == [
        ("OK-VQA-1", "not in the question"),
        ("OK-VQA-2", "several times in the question"),
        ("OK-VQA-3", "without main_entity"),
    ]
    assert table.unplaced[0].constraint == "this plant"
    assert str(table) == (
        "1 questions (0 placed with other capitals or punctuation); 3 not placed: 1 not in the question; 1 several times "
        "in the question; 1 without main_entity"
    )
    assert read_vqa_constraints(folder / "multimodal_known.csv").adjusted == 2


def test_only_the_first_rows(folder: Path) -> None:
    assert [row.id for row in read_vqa_constraints(folder, limit=1).rows] == ["OK-VQA-0", "Movies-0", "Known-0"]


@pytest.mark.parametrize(
    ("question", "words", "placed"),
    [
        ("This is what this does?", "this", "this"),  # capitals tell them apart
        ("Is it a?", "a?", "a?"),
        ("Is this thing on?", "thing  on", "thing on"),
        ("What does this grow from?", "his", None),
        ("THIS or This?", "this", None),
        ("What is it?", "?!", None),
        ("Is that red?", " hat", None),  # spaces of the table are no border of a word
        ("Who made this?", "thi ", None),
        ("Who made this?", " this ", "this"),
    ],
)
def test_where_a_constraint_stands(question: str, words: str, placed: str | None) -> None:
    assert place_constraint(question, words)[0] == placed


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file.*CSV files.*folder"):
        read_vqa_constraints(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match=r"none of okvqa\.csv"):
        read_vqa_constraints(tmp_path)
    with pytest.raises(InputError, match=r"There is no kind 'known'. Did you mean: Known"):
        read_vqa_constraints(tmp_path, kinds=["known"])
    path = tmp_path / "okvqa.csv"
    path.write_text("question,answer\nWho?,me\n")
    with pytest.raises(InputError, match=r"lacks the columns \['main_entity', 'image_url'\]"):
        read_vqa_constraints(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a CSV file in UTF-8"):
        read_vqa_constraints(path)
