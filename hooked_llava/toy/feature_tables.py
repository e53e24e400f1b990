"""What autoencoders of the embedded world are trained on and measured on: questions about images, and what patches show."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from hooked_llava.datasets.rows import StudyRow
from hooked_llava.toy.evaluate import held_out
from hooked_llava.toy.objects import COLOR_NAMES, SHAPES
from hooked_llava.toy.scenes import SEEN, Scene

TRAINING_SEED, HELD_OUT_SEED = 9_000_003, 9_000_033
"""Apart from each other, from the models' training, and from the images on which accuracy is measured."""
ANSWERED_KINDS = ("query_color", "choose_attr", "choose_cat", "choose_rel", "query_pos", "exist", "name_shape")
"""Kinds whose answer comes right after the question."""
FEATURE_KINDS = (*ANSWERED_KINDS[:-1], "color_vqa", "name_shape")
"""Kinds of question, in turn."""
PATCH_POSITIONS = ("left", "right", "top", "bottom")
BACKGROUND = "background"
PATCH_LABELS = (*COLOR_NAMES, *SHAPES, *PATCH_POSITIONS, BACKGROUND)
"""What a patch may show: colors, shapes, the half of the image that it lies in, and no object at all."""


def feature_rows(
    n: int, *, seed: int = TRAINING_SEED, kinds: tuple[str, ...] = FEATURE_KINDS, world: str = "tiny-shapes"
) -> list[StudyRow]:
    """n questions of some kinds in turn, each about its own image of an embedded world, with their answers.

    >>> [(row.question, row.answer) for row in feature_rows(1)]
    [('What color is the diamond?', 'Green')]
    """
    each = -(-n // len(kinds))
    by_kind = {kind: held_out(kind, each, seed, world=world) for kind in kinds}
    rows = []
    for number in range(each):
        for kind, examples in by_kind.items():
            one = examples[number]
            assert one.scene is not None
            answer = one.question.answer
            row = StudyRow(
                id=f"{kind}-{number}", question=one.question.text, answer=answer, kind=kind, image=one.scene.render()
            )
            rows.append(row)
    return rows[:n]


def patch_labels(scene: Scene, *, coverage: float = SEEN) -> Bool[np.ndarray, "patch label"]:
    """Which of `PATCH_LABELS` each patch of an image has, row after row.

    A patch shows the color and the shape of every object that covers at least the share `coverage` of it.

    >>> from hooked_llava.toy.images import image_scene
    >>> found = patch_labels(image_scene("one-shape"))
    >>> shown = found.any(0)
    >>> found.shape, [name for name, some in zip(PATCH_LABELS[:18], shown) if some]
    ((64, 23), ['blue', 'star'])
    """
    shares = scene.patch_coverage
    n_rows, n_columns = shares.shape[1:]
    covered = shares.reshape(len(scene.objects), -1) >= coverage
    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    shown = np.zeros((n_rows * n_columns, len(PATCH_LABELS)), dtype=np.bool_)
    for one, at in zip(scene.objects, covered, strict=True):
        shown[at, PATCH_LABELS.index(one.color)] = True
        shown[at, PATCH_LABELS.index(one.shape)] = True
    halves = (column < n_columns // 2, column >= n_columns // 2, row < n_rows // 2, row >= n_rows // 2)
    for name, half in zip(PATCH_POSITIONS, halves, strict=True):
        shown[:, PATCH_LABELS.index(name)] = half
    shown[:, PATCH_LABELS.index(BACKGROUND)] = ~covered.any(0)
    return shown
