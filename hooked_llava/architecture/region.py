"""The part of an image that grids show together: a union of rectangles, and areas within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from hooked_llava.architecture.boxes import Box
from hooked_llava.architecture.grid import Grid

_SLIVER = 1e-9
"""Pixels; what is thinner is rounding."""


@dataclass(frozen=True, eq=False)
class Region:
    """The image divided by lines into fields, each wholly inside the region or wholly outside.

    Attributes:
        y (Float[np.ndarray, " y_line"]): Horizontal lines, in pixels from the top.
        x (Float[np.ndarray, " x_line"]): Vertical lines, in pixels from the left.
        inside (Bool[np.ndarray, "y_field x_field"]): Which fields between the lines are in the region.
    """

    y: Float[np.ndarray, " y_line"]
    x: Float[np.ndarray, " x_line"]
    inside: Bool[np.ndarray, "y_field x_field"]

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> Region:
        """What some cell of the grids shows; raises `SpanError` if the original's size is not known."""
        height, width = grids[0].rows.pixels.original, grids[0].columns.pixels.original
        y = _lines(height, [grid.rows.stretches for grid in grids])
        x = _lines(width, [grid.columns.stretches for grid in grids])
        inside = np.zeros((len(y) - 1, len(x) - 1), dtype=np.bool_)
        for grid in grids:
            inside |= np.outer(_within(y, grid.rows.stretches), _within(x, grid.columns.stretches))
        return cls(y, x, inside)

    def area_in_box(self, box: Box) -> float:
        """How many square pixels of a box lie in the region."""
        x0, y0, x1, y1 = box
        areas = np.outer(_overlaps(self.y, y0, y1), _overlaps(self.x, x0, x1))
        return float(areas[self.inside].sum())

    def area_in_mask(self, mask: Bool[np.ndarray, "height width"]) -> float:
        """How many pixels of a mask lie in the region, parts of pixels counted."""
        rows, columns = (
            _overlaps(lines[:, None], np.arange(length), np.arange(length) + 1)
            for lines, length in zip((self.y, self.x), mask.shape, strict=True)
        )
        return float((rows @ mask.astype(np.float64) @ columns.T)[self.inside].sum())

    def boxes_outside(self) -> list[Box]:
        """Boxes that together are the part of the image outside the region; they do not overlap."""
        boxes: list[Box] = []
        for row, (y0, y1) in enumerate(zip(self.y[:-1].tolist(), self.y[1:].tolist(), strict=True)):
            outside = np.flatnonzero(~self.inside[row])
            for run in np.split(outside, np.flatnonzero(np.diff(outside) > 1) + 1) if len(outside) else ():
                x0, x1 = float(self.x[run[0]]), float(self.x[run[-1] + 1])
                if y1 - y0 > _SLIVER and x1 - x0 > _SLIVER:
                    boxes.append((x0, y0, x1, y1))
        return boxes


def _lines(length: int, of_grids: list[list[tuple[float, float]]]) -> np.ndarray:
    return np.unique(
        [0.0, float(length), *(edge for stretches in of_grids for stretch in stretches for edge in stretch)]
    )


def _within(lines: np.ndarray, stretches: list[tuple[float, float]]) -> np.ndarray:
    """For each field between two lines whether it lies in one of the stretches."""
    inside = np.zeros(len(lines) - 1, dtype=np.bool_)
    for start, stop in stretches:
        inside |= (lines[:-1] >= start) & (lines[1:] <= stop)
    return inside


def _overlaps(lines: np.ndarray, start: np.ndarray | float, stop: np.ndarray | float) -> np.ndarray:
    return np.clip(np.minimum(lines[1:], stop) - np.maximum(lines[:-1], start), 0, None)
