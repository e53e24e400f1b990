"""What autoencoders of the embedded world are trained on and measured on: questions about images, and what patches show."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from hooked_llava.architecture.layout import ImageLayout
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


def patch_labels(scene: Scene, layout: ImageLayout, *, coverage: float = SEEN) -> Bool[np.ndarray, "cell label"]:
    """Which of `PATCH_LABELS` each cell of an image has, in the order of `layout.object_features()`.

    A cell shows the color and the shape of every object that covers at least the share `coverage` of it, and lies in the half
    in which its middle lies.

    >>> from hooked_llava.model.llava import HookedLLaVA
    >>> from hooked_llava.toy.images import image_path, image_scene
    >>> inputs = HookedLLaVA.from_pretrained("tiny-shapes").prepare("What?", images=image_path("one-shape"))
    >>> found = patch_labels(image_scene("one-shape"), inputs.token_map.layout())
    >>> found.shape, [name for name, some in zip(PATCH_LABELS[:18], found.any(0)) if some]
    ((64, 23), ['blue', 'star'])
    """
    shown = np.zeros((layout.n_features, len(PATCH_LABELS)), dtype=np.bool_)
    label = {name: shown[:, number] for number, name in enumerate(PATCH_LABELS)}
    label[BACKGROUND][layout.object_features()] = True
    for one in scene.objects:
        for grid, share in layout.mask_shares(one.mask)[0].items():
            covered = layout.cell_features(grid)[share >= coverage]
            label[one.color][covered] = label[one.shape][covered] = True
            label[BACKGROUND][covered] = False
    width, height = scene.size
    for grid in layout.grids:
        cells, (x, y) = layout.cell_features(grid.name), np.moveaxis(grid.boxes[..., :2] + grid.boxes[..., 2:], -1, 0)
        for name, half in zip(PATCH_POSITIONS, (x < width, x >= width, y < height, y >= height), strict=True):
            label[name][cells[half]] = True
    return shown[layout.object_features()]
