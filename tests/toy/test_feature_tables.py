"""Questions for autoencoders: of all kinds, and none of the training prompts among those that are measured."""

from __future__ import annotations

from hooked_llava.datasets.rows import row_image
from hooked_llava.toy.feature_tables import FEATURE_KINDS, HELD_OUT_SEED, feature_rows


def test_kinds_come_in_turn_and_seeds_give_other_images():
    rows, others = feature_rows(10), feature_rows(10, seed=HELD_OUT_SEED)
    assert [row.kind for row in rows] == [*FEATURE_KINDS, *FEATURE_KINDS[:2]]
    assert len({row.id for row in rows}) == 10
    pixels = {row_image(row).tobytes() for row in (*rows, *others)}  # type: ignore[union-attr]
    assert len(pixels) == 20
    assert [row.question for row in feature_rows(10)] == [row.question for row in rows]
