"""What a feature store is asked, answered from dense activations by loops over images and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class PlainImage:
    """An image with every activation, zeros included.

    Attributes:
        acts: [feature position, feature]; NaN at positions that are not stored.
        cells: the feature positions that are cells, by grid.
        content: what is the same for the same image.
    """

    acts: np.ndarray
    cells: dict[str, list[int]]
    content: str

    def positions(self, grid: str) -> list[int]:
        """The stored cells of a grid, or of all."""
        names = list(self.cells) if grid == "all" else [name for name in self.cells if name == grid]
        return [p for name in names for p in self.cells[name] if not np.isnan(self.acts[p, 0])]

    def score(self, feature: int, by: str, positions: Sequence[int]) -> float:
        """A feature over some cells."""
        values = [float(self.acts[p, feature]) for p in positions]
        if not values:
            return 0.0
        return sum(values) / len(values) if by == "mean" else max(values)


def top_by_hand(
    images: Sequence[PlainImage], feature: int, n: int, by: str, grid: str, *, distinct: bool
) -> list[tuple[int, float]]:
    """The best images and their scores."""
    scores = [(number, image.score(feature, by, image.positions(grid))) for number, image in enumerate(images)]
    ranked = sorted((one for one in scores if one[1] > 0), key=lambda one: (-one[1], one[0]))
    found: list[tuple[int, float]] = []
    for number, score in ranked:
        seen = [images[other].content for other, _ in found]
        if not (distinct and images[number].content in seen):
            found.append((number, score))
    return found[:n]


def active_by_hand(image: PlainImage, positions: Sequence[int], n: int, by: str) -> list[tuple[int, float]]:
    """The most active features over some cells of an image."""
    stored = [p for p in positions if not np.isnan(image.acts[p, 0])]
    scores = [(feature, image.score(feature, by, stored)) for feature in range(image.acts.shape[1])]
    return sorted((one for one in scores if one[1] > 0), key=lambda one: (-one[1], one[0]))[:n]


def pixel_mask_by_hand(boxes: Sequence[Sequence[float]], lit: Sequence[bool], height: int, width: int) -> np.ndarray:
    """The pixels that boxes show, which do not overlap, and of which at least half of what is shown is lit."""
    mask = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            shown = bright = 0.0
            for (x0, y0, x1, y1), is_lit in zip(boxes, lit, strict=True):
                area = max(0.0, min(x1, x + 1) - max(x0, x)) * max(0.0, min(y1, y + 1) - max(y0, y))
                shown += area
                bright += area * is_lit
            mask[y, x] = shown > 0 and bright / shown >= 0.5 - 1e-9
    return mask
