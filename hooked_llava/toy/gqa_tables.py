"""The embedded world's questions as the tables of Zhang et al. (arXiv 2411.18620), so that one study serves both."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from hooked_llava.datasets.gqa import COLUMNS, FILES, GQA_KINDS, NOTHING, TYPES
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.prompt.images import load_image
from hooked_llava.toy.evaluate import Example, held_out
from hooked_llava.toy.objects import Box
from hooked_llava.toy.scenes import IMAGE_SIZE

TOY_KINDS = {
    "ChooseAttr": "choose_attr",
    "ChooseCat": "choose_cat",
    "ChooseRel": "choose_rel",
    "CompareAttr": "compare_attr",
    "LogicalObj": "logical_obj",
    "QueryAttr": "query_pos",
}
"""Kind as the paper names it -> as this world does."""
_SEED = 2_000_003  # apart from training and from the images on which accuracy is measured
_DETAILED = {
    "ChooseAttr": "chooseAttr",
    "ChooseCat": "categoryThatChoose",
    "ChooseRel": "relChooser",
    "CompareAttr": "twoCommon",
    "LogicalObj": "existThatOr",
    "QueryAttr": "positionQuery",
}


def gqa_rows(n: int, *, kinds: Iterable[str] = GQA_KINDS, seed: int = _SEED) -> list[StudyRow]:
    """n held-out questions of each kind, each about its own image, with their answers in lower case as in GQA.

    >>> row = gqa_rows(1, kinds=["QueryAttr"])[0]
    >>> row.kind, row.image.size, len(row.boxes)
    ('QueryAttr', (64, 64), 1)
    """
    rows = []
    for kind in kinds:
        for number, example in enumerate(held_out(TOY_KINDS[kind], n, seed)):
            rows.append(_row(f"{kind}-{number}", kind, example))
    return rows


def write_gqa(folder: str | Path, n: int, *, kinds: Iterable[str] = GQA_KINDS, seed: int = _SEED) -> Path:
    """The same questions as CSV files with the released names and columns, and their images as PNG files beside them.

    `read_gqa(folder)` reads them back, with the images in the same folder. Cells of which this world knows nothing
    hold "-".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     len(list(write_gqa(folder, n=2, kinds=["ChooseRel"]).iterdir()))
    3
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        examples = held_out(TOY_KINDS[kind], n, seed)
        with (folder / FILES[kind]).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS[kind], restval=NOTHING)
            table.writeheader()
            for number, example in enumerate(examples):
                row = _row(f"{kind}-{number}", kind, example)
                load_image(row.image).save(folder / f"{row.id}.png")
                table.writerow(_cells(row, _places(kind, example)))
    return folder


def _row(row_id: str, kind: str, example: Example) -> StudyRow:
    question, scene = example.question, example.scene
    assert scene is not None
    places = _places(kind, example)
    return StudyRow(
        id=row_id,
        question=question.text,
        answer=question.answer.lower(),
        image=scene.render(),
        false_option=question.false_option.lower() if "false option" in COLUMNS[kind] else "",
        true_option=question.answer.lower() if "true option" in COLUMNS[kind] else "",
        kind=kind,
        objects=tuple(name for name, _ in places),
        boxes=tuple(box for _, box in places if box is not None),
        size=(IMAGE_SIZE, IMAGE_SIZE),
    )


def _places(kind: str, example: Example) -> list[tuple[str, Box | None]]:
    """The objects that GQA would name for such a question, each with its box."""
    question = example.question
    if kind == "ChooseCat":  # GQA names the category and boxes the object that is meant
        return [("shape", question.answer_boxes[0])]
    return list(zip(question.objects, question.boxes, strict=True))


def _cells(row: StudyRow, places: list[tuple[str, Box | None]]) -> dict[str, str]:
    structural, semantic = TYPES[row.kind]
    cells = {"question_id": row.id, "img_id": row.id, "question": row.question, "answer": row.answer}
    cells |= {"type_detailed": _DETAILED[row.kind], "type_semantic": semantic, "type_structural": structural}
    cells |= {"image_w": str(IMAGE_SIZE), "image_h": str(IMAGE_SIZE)}
    if "false option" in COLUMNS[row.kind]:
        cells |= {"true option": row.answer, "false option": row.false_option}
    names = ("central object",) if "central object name" in COLUMNS[row.kind] else ("object1", "object2")
    for name, (shape, box) in zip(names, places, strict=True):
        cells[f"{name} name"] = shape
        if box is not None:
            x0, y0, x1, y1 = box
            cells |= {f"{name} x": str(x0), f"{name} y": str(y0)}
            cells |= {f"{name} w": str(x1 - x0), f"{name} h": str(y1 - y0)}
    return cells
