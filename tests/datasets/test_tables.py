"""Tables as other programs save them again: numbers, encodings, delimiters and empty lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from hooked_llava.datasets.gqa import COLUMNS, FILES, GQA_KINDS, read_gqa
from hooked_llava.datasets.tables import number, plain_id, read_table, whole
from hooked_llava.datasets.vqa_constraints import read_vqa_constraints
from hooked_llava.errors import InputError

GQA = Path(__file__).parent / "gqa"
CONSTRAINTS = """,question,director,main_entity,image_url
0,Name a movie directed by this director?,Jérôme Salle,this director,./A photo of Jérôme Salle
1,Name a movie directed by this director?,Zoë Bell,this director,./A photo of Zoë Bell
"""


def rewritten(text: str, change: Callable[[str], str] = str, delimiter: str = ",") -> str:
    """The same table with every cell below the header changed, and other separators."""
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter)
    writer.writerows([header, *([change(cell) for cell in row] for row in rows)])
    return written.getvalue()


def as_float(cell: str) -> str:
    """What pandas makes of a column of integers with a gap in it."""
    return f"{cell}.0" if cell.isdigit() and not cell.startswith("0") else cell


@pytest.mark.parametrize("kind", GQA_KINDS)
def test_a_released_table_saved_again_is_the_same(kind: str, tmp_path: Path) -> None:
    text, wanted = (GQA / FILES[kind]).read_text(encoding="utf-8"), read_gqa(GQA / FILES[kind])
    versions = {
        "floats": rewritten(text, as_float).encode(),
        "commas": rewritten(text, lambda cell: as_float(cell).replace(".0", ",0"), ";").encode(),
        "tabs": rewritten(text, delimiter="\t").encode("utf-16"),
        "excel": rewritten(text, delimiter=";").encode("utf-8-sig"),
        "utf-32": text.encode("utf-32"),
        "blank lines": (text + "\n" + "," * (len(COLUMNS[kind]) - 1) + "\n\n").encode(),
        "more columns": rewritten(text, lambda cell: cell).replace("question_id", " question_id ").encode(),
    }
    for name, data in versions.items():
        (tmp_path / "table.csv").write_bytes(data)
        rows = read_gqa(tmp_path / "table.csv")
        assert [repr(row) for row in rows] == [repr(row) for row in wanted], name


def test_an_object_that_is_not_there_may_have_empty_cells(tmp_path: Path) -> None:
    text, wanted = (GQA / FILES["LogicalObj"]).read_text(encoding="utf-8"), read_gqa(GQA / FILES["LogicalObj"])
    for empty in ("", "nan", "NaN"):
        saved = rewritten(text, lambda cell, empty=empty: empty if cell == "-" else cell)
        (tmp_path / "table.csv").write_text(saved, encoding="utf-8")
        assert [row.boxes for row in read_gqa(tmp_path / "table.csv")] == [row.boxes for row in wanted]


def test_numbers_that_are_none_are_still_refused(tmp_path: Path) -> None:
    text = (GQA / FILES["QueryAttr"]).read_text(encoding="utf-8")
    for wrong in ("wide", "500.5", "", "inf"):
        (tmp_path / "table.csv").write_text(text.replace(",500,281,", f",{wrong},281,"), encoding="utf-8")
        with pytest.raises(InputError, match="question 1.*size.*box.*pixels"):
            read_gqa(tmp_path / "table.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "latin-1"])
def test_every_encoding_keeps_the_words(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "multimodal_movies.csv"
    file.write_bytes(CONSTRAINTS.encode(encoding))
    if encoding in ("cp1252", "latin-1"):
        with pytest.warns(UserWarning, match="Windows-1252.*encoding="):
            table = read_vqa_constraints(file)
    else:
        table = read_vqa_constraints(file)
    assert [row.objects for row in table.rows] == [("Jérôme Salle",), ("Zoë Bell",)]
    assert [row.id for row in table.rows] == ["Movies-0", "Movies-1"]
    assert [row.objects for row in read_vqa_constraints(file, encoding=encoding).rows] == [
        ("Jérôme Salle",),
        ("Zoë Bell",),
    ]


def test_the_encoding_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "multimodal_movies.csv"
    file.write_bytes(CONSTRAINTS.replace("Zoë Bell", "黒澤明").replace("é", "e").replace("ô", "o").encode("shift-jis"))
    assert read_vqa_constraints(file, encoding="shift-jis").rows[1].objects == ("黒澤明",)
    for encoding, said in (
        ("ascii", r"multimodal_movies\.csv'.*'ascii'.*encoding="),
        ("no-such", "unknown encoding: no-such"),
    ):
        with pytest.raises(InputError, match=said):
            read_vqa_constraints(file, encoding=encoding)


def test_rows_are_numbered_as_before_when_saved_by_pandas(tmp_path: Path) -> None:
    saved = rewritten(CONSTRAINTS, as_float).replace(",question", "Unnamed: 0,question", 1)
    (tmp_path / "multimodal_movies.csv").write_text(saved, encoding="utf-8")
    assert [row.id for row in read_vqa_constraints(tmp_path).rows] == ["Movies-0", "Movies-1"]
    with pytest.raises(InputError, match="limit=0"):
        read_vqa_constraints(tmp_path, limit=0)


def test_cells(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text('\n a , b\n1,"x\ny"\n2\n,\n3,z,more\n')
    table = read_table(file)
    assert table.columns == ("a", "b")
    assert table.rows == [{"a": "1", "b": "x\ny"}, {"a": "2", "b": ""}, {"a": "3", "b": "z"}]
    assert read_table(file, limit=2).rows == table.rows[:2]
    file.write_text("")
    assert read_table(file).columns == ()


def test_numbers() -> None:
    for text, value in (("64", 64), ("64.0", 64), (" 64,00 ", 64), ("-3.", -3), ("1e2", 100), ("12.5", 12.5)):
        assert number(text) == value
        assert isinstance(number(text), type(value))
    for text in ("", "-", "a", "nan", "inf"):
        with pytest.raises(ValueError, match=r"."):
            number(text)
        with pytest.raises(ValueError, match=r"."):
            whole(text)
    for text in ("64.5", "1e2"):
        with pytest.raises(ValueError, match=text):
            whole(text)
    for text in ("0012", "1.0.0", "v1.0", "1.05", "image.0"):
        assert plain_id(text) == text
