"""The embedded world's existence questions as the tables of POPE (Li et al., arXiv 2305.10355).

What is asked for is a shape of a color. Half of the questions name one of the image. The others name, as POPE's do, a shape
that is not there: any in any color ("random"); the one that is in most images of the table ("popular"); or, closest to what is
there, a shape of the image in the color of another one ("adversarial").
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hooked_llava.datasets.pope import POPE_KINDS
from hooked_llava.datasets.rows import StudyRow
from hooked_llava.prompt.images import load_image
from hooked_llava.toy.evaluate import held_out
from hooked_llava.toy.objects import COLOR_NAMES, SHAPES
from hooked_llava.toy.questions import a_shape_there, pick
from hooked_llava.toy.scenes import Scene

_SEED = 4_000_037  # apart from training and from the images on which accuracy is measured


def pope_rows(n: int, *, kinds: Iterable[str] = POPE_KINDS, seed: int = _SEED) -> list[StudyRow]:
    """n questions of each kind about held-out images, by turns with the answers Yes and No.

    >>> [(row.kind, row.answer) for row in pope_rows(2, kinds=["adversarial"])]
    [('adversarial', 'Yes'), ('adversarial', 'No')]
    """
    scenes = [one.scene for one in held_out("choose_cat", n, seed) if one.scene is not None]  # of two colors at least
    shown = Counter(o.shape for scene in scenes for o in scene.objects)
    return [
        _row(f"{kind}-{number + 1}", kind, scene, shown, present=number % 2 == 0)
        for kind in kinds
        for number, scene in enumerate(scenes)
    ]


def write_pope(folder: str | Path, n: int, *, kinds: Iterable[str] = POPE_KINDS, seed: int = _SEED) -> Path:
    """The same questions as POPE's files, tiny_shapes_pope_random.json and so on, and their images as PNG files beside them.

    `read_pope(folder)` reads them back, with the images in the same folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in write_pope(folder, n=1, kinds=["random"]).iterdir())
    ['random-1.png', 'tiny_shapes_pope_random.json']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        with (folder / f"tiny_shapes_pope_{kind}.json").open("w", encoding="utf-8") as file:
            for number, row in enumerate(pope_rows(n, kinds=[kind], seed=seed), start=1):
                image = f"{row.id}.png"
                load_image(row.image).save(folder / image)
                asked = {"question_id": number, "image": image, "text": row.question, "label": row.answer.lower()}
                file.write(json.dumps(asked) + "\n")
    return folder


def _row(row_id: str, kind: str, scene: Scene, shown: Counter[str], *, present: bool) -> StudyRow:
    rng = np.random.default_rng([_SEED, *row_id.encode()])
    if present:
        there = pick(rng, scene.named)
        color, shape = there.color, there.shape
    else:
        color, shape = _absent(kind, scene, shown, rng)
    found = scene.find(shape)
    return StudyRow(
        id=row_id,
        question=a_shape_there(color, shape),
        answer="Yes" if present else "No",
        image=scene.render(),
        kind=kind,
        objects=(shape,),
        boxes=() if found is None else (found.box,),
    )


def _absent(kind: str, scene: Scene, shown: Counter[str], rng: np.random.Generator) -> tuple[str, str]:
    """Color and shape of what is not in the image."""
    if kind == "adversarial":
        pairs = [(b.color, a.shape) for a in scene.named for b in scene.named if a.color != b.color]
        return pick(rng, pairs)
    absent: Sequence[str] = [shape for shape in SHAPES if scene.find(shape) is None]
    if kind == "popular":
        absent = [max(absent, key=lambda shape: shown[shape])]
    return pick(rng, COLOR_NAMES), pick(rng, absent)
