"""Questions about images of the embedded world, for autoencoders: what they are trained on, and what they are measured on."""

from __future__ import annotations

from hooked_llava.datasets.rows import StudyRow
from hooked_llava.toy.evaluate import held_out

TRAINING_SEED, HELD_OUT_SEED = 9_000_003, 9_000_033
"""Apart from each other, from the models' training, and from the images on which accuracy is measured."""
ANSWERED_KINDS = ("query_color", "choose_attr", "choose_cat", "choose_rel", "query_pos", "exist", "name_shape")
"""Kinds whose answer comes right after the question."""
FEATURE_KINDS = (*ANSWERED_KINDS[:-1], "color_vqa", "name_shape")
"""Kinds of question, in turn."""


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
