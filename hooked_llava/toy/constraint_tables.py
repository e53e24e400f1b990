"""The embedded world's facts as the tables of VQA-Constraints (Basu et al., arXiv 2406.04236), with answers.

"Known" asks any fact about "this shape", "Movies" one question in one wording, and "OK-VQA" asks about one of several
shapes by its name. A further column holds the answer, which the released tables lack.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from hooked_llava.datasets.rows import StudyRow
from hooked_llava.datasets.vqa_constraints import CONSTRAINT_KINDS, FILES, SUBJECTS
from hooked_llava.prompt.images import load_image
from hooked_llava.toy.evaluate import FACT_WITH_IMAGE, Example, held_out
from hooked_llava.toy.facts import RELATIONS, fact_answer
from hooked_llava.toy.objects import SHAPES

_SEED = 3_000_017  # apart from training and from the images on which accuracy is measured
_ONE_TEMPLATE = RELATIONS[0]
_THIS = "this shape"


def constraint_rows(n: int, *, kinds: Iterable[str] = CONSTRAINT_KINDS, seed: int = _SEED) -> list[StudyRow]:
    """n held-out questions of each kind, each about its own image, with constraint and answer.

    >>> [(row.constraint, row.kind) for row in constraint_rows(1, kinds=["Known", "Movies"])]
    [('this shape', 'Known'), ('this shape', 'Movies')]
    """
    return [_row(f"{kind}-{i}", kind, one) for kind in kinds for i, one in enumerate(_examples(kind, n, seed))]


def write_constraints(
    folder: str | Path, n: int, *, kinds: Iterable[str] = CONSTRAINT_KINDS, seed: int = _SEED
) -> Path:
    """The same questions as CSV files with the released names and columns, and their images as PNG files beside them.

    `read_vqa_constraints(folder)` reads them back, with the images in the same folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     len(list(write_constraints(folder, n=2, kinds=["Movies"]).iterdir()))
    3
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        subject = [SUBJECTS[kind]] if kind in SUBJECTS else []
        columns = ["", "question", *subject, "main_entity", "image_url", "answer"]
        with (folder / FILES[kind]).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(columns)
            for number, row in enumerate(constraint_rows(n, kinds=[kind], seed=seed)):
                load_image(row.image).save(folder / f"{row.id}.png")
                shown = list(row.objects[: len(subject)])
                table.writerow([number, row.question, *shown, row.constraint, f"./{row.id}.png", row.answer])
    return folder


def other_shape(row: StudyRow) -> str:
    """Words of as many tokens as the row's constraint that name another shape, for the corrupted run.

    >>> other_shape(constraint_rows(1, kinds=["OK-VQA"])[0]).split()[0]
    'the'
    """
    asked = row.objects[0]
    return f"the {SHAPES[(SHAPES.index(asked) + 1 + sum(map(ord, row.id)) % (len(SHAPES) - 1)) % len(SHAPES)]}"


def _examples(kind: str, n: int, seed: int) -> list[Example]:
    """Images and questions; of Movies the images only, since all are asked the same."""
    asked = {"OK-VQA": FACT_WITH_IMAGE, "Movies": "name_shape", "Known": "fact_image"}
    return held_out(asked[kind], n, seed)


def _row(row_id: str, kind: str, example: Example) -> StudyRow:
    question, scene = example.question, example.scene
    assert scene is not None
    shape, text, answer = question.objects[0], question.text, question.answer
    if kind == "Movies":
        text = _ONE_TEMPLATE.templates[0].format(subject=_THIS)
        answer = fact_answer(_ONE_TEMPLATE.name, shape)
    box = question.boxes[0]
    return StudyRow(
        id=row_id,
        question=text,
        answer=answer,
        image=scene.render(),
        kind=kind,
        objects=(shape,),
        boxes=() if box is None else (box,),
        constraint=f"the {shape}" if kind == "OK-VQA" else _THIS,
    )
