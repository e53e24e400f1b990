"""The released tables, read from real rows, and the embedded world's in the same form."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hooked_llava.datasets.gqa import COLUMNS, FILES, GQA_KINDS, read_gqa
from hooked_llava.errors import InputError

REAL = Path(__file__).parent / "gqa"
"""Two rows of each of the six files (MIT licence, from GQA, CC BY 4.0; see NOTICE.md there)."""


def test_the_files_have_the_released_columns() -> None:
    for kind in GQA_KINDS:
        with (REAL / FILES[kind]).open(newline="", encoding="utf-8") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS[kind]


def test_real_rows() -> None:
    rows = read_gqa(REAL)
    assert [row.kind for row in rows] == [kind for kind in GQA_KINDS for _ in range(2)]
    first = rows[0]
    assert first.id == "07339448"  # as text: the zero in front counts
    assert (first.question, first.answer, first.false_option) == ("Is the floor black or tan?", "tan", "black")
    assert (first.image, first.size, first.objects) == ("2391275", (500, 333), ("floor",))
    assert first.boxes == ((206, 304, 206 + 217, 304 + 28),)
    relation = next(row for row in rows if row.kind == "ChooseRel")
    assert relation.objects == ("chair", "drink")
    assert relation.boxes == ((35, 51, 204, 162), (185, 120, 231, 165))
    logical = next(row for row in rows if row.kind == "LogicalObj")
    assert logical.objects == ("grass", "sand")
    assert logical.boxes == ((0, 200, 500, 333),)  # there is no sand in the image
    assert logical.false_option == ""


def test_a_part_of_them() -> None:
    assert [row.kind for row in read_gqa(REAL, kinds=["QueryAttr", "ChooseRel"], limit=1)] == ["QueryAttr", "ChooseRel"]
    alone = read_gqa(REAL / FILES["CompareAttr"])
    assert [row.kind for row in alone] == ["CompareAttr"] * 2


def test_the_kind_is_known_by_the_types(tmp_path: Path) -> None:
    text = (REAL / FILES["LogicalObj"]).read_text(encoding="utf-8")  # with the same columns as CompareAttr
    (tmp_path / "mine.csv").write_text(text, encoding="utf-8")
    assert [row.kind for row in read_gqa(tmp_path / "mine.csv")] == ["LogicalObj"] * 2
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="question 1"):
        read_gqa(tmp_path / "other.csv")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'ChooseAtr'.*ChooseAttr"):
        read_gqa(REAL, kinds=["ChooseAtr"])
    with pytest.raises(InputError, match="limit=0 questions.*least 1"):
        read_gqa(REAL, limit=0)
    with pytest.raises(InputError, match="nowhere'.*CSV files.*folder"):
        read_gqa(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds none of GQA_val"):
        read_gqa(tmp_path)
    with pytest.raises(InputError, match="questions.*QueryAttr"):
        read_gqa(REAL / FILES["ChooseRel"], kinds=["QueryAttr"])
    text = (REAL / FILES["QueryAttr"]).read_text(encoding="utf-8")
    (tmp_path / FILES["QueryAttr"]).write_text(text.replace("image_w", "width"), encoding="utf-8")
    with pytest.raises(InputError, match=r"columns \['image_w'\].*QueryAttr"):
        read_gqa(tmp_path)
    (tmp_path / FILES["QueryAttr"]).write_text(text.replace(",500,281,", ",wide,281,"), encoding="utf-8")
    with pytest.raises(InputError, match="question 1.*size.*box.*pixels"):
        read_gqa(tmp_path)
    (tmp_path / FILES["QueryAttr"]).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"\.csv'.*CSV file in UTF-8.*encoding="):
        read_gqa(tmp_path)
