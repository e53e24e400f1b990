"""The six tables of GQA questions that Zhang et al. (arXiv 2411.18620) released, as rows of a study.

Each is a CSV file of questions of one kind that LLaVA models answer correctly, drawn from the balanced validation set of
GQA. The images are Visual Genome's, by their ids; they are not part of the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hooked_llava.datasets.rows import PixelBox, StudyRow
from hooked_llava.datasets.tables import has_columns, number, plain_id, read_table, released_files, whole
from hooked_llava.errors import InputError

GQA_TAIL = " \nAnswer the question using a single word or phrase."
"""What the paper's released code puts after each question; for `model.prepare(..., template="vicuna-v1", tail=GQA_TAIL)`.

The space before the line break is the paper's; LLaVA's own evaluation has none (`GQA_TAIL.strip()`).
"""
NOTHING = "-"
"""What stands in a cell that has no value, such as the box of an object that is not in the image."""
_EMPTY = (NOTHING, "", "nan")
_ASKED = ("question_id", "img_id", "question", "answer")
_OPTIONS = ("true option", "false option")
_TYPES = ("type_detailed", "type_semantic", "type_structural", "operations")
_IMAGE = ("captions", "image_w", "image_h")
_CENTRAL, _PAIR = ("central object",), ("object1", "object2")


def _named(objects: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{o} {what}" for o in objects for what in ("name", "id"))


def _placed(objects: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{o} {what}" for o in objects for what in "whxy")


_ATTRIBUTES = (
    "central object attributes",
    "central object question attribute",
    "all objects",
    "all objects attributes",
)
COLUMNS: dict[str, tuple[str, ...]] = {
    "ChooseAttr": (
        *(*_ASKED, *_OPTIONS, *_named(_CENTRAL), *_ATTRIBUTES, *_TYPES, "operation_1", "operation_2"),
        *(*_IMAGE, *_placed(_CENTRAL), "full answer"),
    ),
    "ChooseCat": (*_ASKED, *_OPTIONS, *_named(_CENTRAL), *_TYPES, *_IMAGE, *_placed(_CENTRAL)),
    "ChooseRel": (*_ASKED, *_OPTIONS, *_named(_PAIR), *_TYPES, *_IMAGE, *_placed(_PAIR)),
    "CompareAttr": (*_ASKED, *_named(_PAIR), "question word", *_TYPES, *_IMAGE, *_placed(_PAIR)),
    "LogicalObj": (*_ASKED, *_named(_PAIR), "question word", *_TYPES, *_IMAGE, *_placed(_PAIR)),
    "QueryAttr": (*_ASKED, *_named(_CENTRAL), "question word", *_TYPES, *_IMAGE, *_placed(_CENTRAL)),
}
"""Kind of question -> columns of its file."""
GQA_KINDS = tuple(COLUMNS)
"""The six kinds, as the paper names them."""
TYPES = {
    "ChooseAttr": ("choose", "attr"),
    "ChooseCat": ("choose", "cat"),
    "ChooseRel": ("choose", "rel"),
    "CompareAttr": ("compare", "attr"),
    "LogicalObj": ("logical", "obj"),
    "QueryAttr": ("query", "attr"),
}
"""Kind of question -> the columns type_structural and type_semantic."""
_STRUCTURAL, _SEMANTIC = "type_structural", "type_semantic"
_KIND_OF = {types: kind for kind, types in TYPES.items()}
FILES = {
    "ChooseAttr": "GQA_val_correct_question_with_choose_ChooseAttr.csv",
    "ChooseCat": "GQA_val_correct_question_with_categoryThatThisChoose_objThisChoose_ChooseCat.csv",
    "ChooseRel": "GQA_val_correct_question_with_relChooser_ChooseRel.csv",
    "CompareAttr": "GQA_val_correct_question_with_twoCommon_CompareAttr.csv",
    "LogicalObj": "GQA_val_correct_question_with_existThatOr_LogicalObj.csv",
    "QueryAttr": "GQA_val_correct_question_with_positionQuery_QueryAttr.csv",
}
"""Kind of question -> name of the released file."""


def read_gqa(
    path: str | Path,
    *,
    kinds: Iterable[str] | None = None,
    limit: int | None = None,
    encoding: str | None = None,
) -> list[StudyRow]:
    """The questions of one released CSV file, or of all that are in a folder, with the objects' boxes.

    The box is the central object's where a table has one, and otherwise those of object 1 and object 2 as far as they
    are in the image, as in the paper. Rows name their images by Visual Genome's ids.

    Args:
        path: a file, or a folder with some of the six files under their released names.
        kinds: kinds of question to read (`GQA_KINDS`); all that are there by default.
        limit: questions of each kind, the first ones, at least 1; all by default.
        encoding: of the files' text; by default by its byte order mark, else UTF-8, else Windows-1252 with a warning.

    Tables that another program has saved again are read too: with numbers written as 64.0, other encodings, semicolons or
    tabs. Raises `InputError` for a file that is not there, that lacks columns, or that has a broken row, for unknown kinds, and
    for a limit below 1.

    >>> import tempfile
    >>> from hooked_llava.toy.gqa_tables import write_gqa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = read_gqa(write_gqa(folder, n=2), kinds=["QueryAttr"])
    >>> len(rows), rows[0].kind, rows[0].answer in ("left", "right"), len(rows[0].boxes)
    (2, 'QueryAttr', True, 1)
    """
    wanted = GQA_KINDS if kinds is None else tuple(kinds)
    files = released_files(path, wanted, FILES)
    rows = [row for file in files for row in _read(file, limit, encoding) if row.kind in wanted]
    if not rows:
        raise InputError(
            f"{str(path)!r} holds no questions of the kinds {', '.join(wanted)}; give one of the released CSV files, "
            "or the folder they are in."
        )
    return rows


def is_gqa(path: str | Path) -> bool:
    """Whether this is a table of GQA questions, by its columns, or a folder that holds one under its released name.

    >>> is_gqa("nowhere")
    False
    """
    return has_columns(path, (_STRUCTURAL, _SEMANTIC), FILES.values())


def _read(file: Path, limit: int | None, encoding: str | None) -> list[StudyRow]:
    cells = read_table(file, encoding=encoding, limit=limit).rows
    rows = []
    for place, row in enumerate(cells, start=1):
        kind = _KIND_OF.get((row.get(_STRUCTURAL, ""), row.get(_SEMANTIC, "")))
        if kind is None:
            raise InputError(f"{str(file)!r}, question {place} is of none of the six kinds (by its columns type_...).")
        if missing := sorted(_needed(kind) - set(row)):
            raise InputError(f"{str(file)!r} lacks the columns {missing} of a table of {kind}.")
        rows.append(_row(row, kind, f"{str(file)!r}, question {place}"))
    return rows


def _needed(kind: str) -> set[str]:
    placed = {f"{o} {what}" for o in _objects(kind) for what in ("name", *"whxy")}
    return {*_ASKED, "image_w", "image_h", *placed, *(_OPTIONS if _OPTIONS[0] in COLUMNS[kind] else ())}


def _objects(kind: str) -> tuple[str, ...]:
    return _CENTRAL if f"{_CENTRAL[0]} name" in COLUMNS[kind] else _PAIR


def _row(cells: dict[str, str], kind: str, where: str) -> StudyRow:
    try:
        boxes = [_box(cells, name) for name in _objects(kind)]
        size = (whole(cells["image_w"]), whole(cells["image_h"]))
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} has a size or box that is not in pixels ({error}).") from None
    return StudyRow(
        id=plain_id(cells["question_id"]),
        question=cells["question"],
        answer=cells["answer"],
        image=plain_id(cells["img_id"]),
        false_option=cells.get("false option") or "",
        true_option=cells.get("true option") or "",
        kind=kind,
        objects=tuple(cells[f"{name} name"] for name in _objects(kind)),
        boxes=tuple(box for box in boxes if box is not None),
        size=size,
    )


def _box(cells: dict[str, str], name: str) -> PixelBox | None:
    """(x0, y0, x1, y1) from x, y, width and height; None where the object is not in the image."""
    values = [cells[f"{name} {what}"].strip() for what in "xywh"]
    if NOTHING in values or all(value.lower() in _EMPTY for value in values):
        return None
    x, y, width, height = (number(value) for value in values)
    return (x, y, x + width, y + height)
