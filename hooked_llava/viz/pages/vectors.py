"""Small drawings that a page has by the hundred, as the path of an SVG: a region of an image, a few bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

BARS_WIDTH, BARS_HEIGHT = 100, 24
"""The size of the drawing that `bars_path` fills."""
_TALLEST = 23


def outside_path(region: Bool[np.ndarray, "height width"]) -> str:
    """Everything outside a region, in pixels; to be filled by the rule evenodd, in which the rectangles inside are holes.

    >>> outside_path(np.array([[True, False], [True, False]]))
    'M0 0h2v2h-2zM0 0h1v2h-1z'
    """
    height, width = region.shape
    holes = "".join(_rectangle(x, y, w, h) for x, y, w, h in rectangles(region))
    return _rectangle(0, 0, width, height) + holes


def rectangles(region: Bool[np.ndarray, "height width"]) -> Iterator[tuple[int, int, int, int]]:
    """A region as rectangles (x, y, width, height) that do not overlap; equal rows are one.

    >>> list(rectangles(np.array([[True, False, True], [True, False, True]])))
    [(0, 0, 1, 2), (2, 0, 1, 2)]
    """
    differs = np.flatnonzero((region[1:] != region[:-1]).any(axis=1)) + 1
    tops = [0, *differs.tolist(), len(region)]
    for top, bottom in pairwise(tops):
        edges = np.flatnonzero(np.diff(np.pad(region[top].astype(np.int8), 1)))
        for left, right in edges.reshape(-1, 2).tolist():
            yield left, top, right - left, bottom - top


def bars_path(counts: Sequence[int] | Int[np.ndarray, " bin"]) -> str:
    """A bar for each count, the tallest as high as the drawing; one that is not 0 can be seen.

    >>> bars_path([2, 0, 1])
    'M0 24h33v-23h-33zM67 24h33v-12h-33z'
    """
    most = max(*counts, 1)
    ends = [round(BARS_WIDTH * i / len(counts)) for i in range(len(counts) + 1)]
    heights = [max(1, round(_TALLEST * int(count) / int(most))) if count else 0 for count in counts]
    bars = zip(pairwise(ends), heights, strict=True)
    return "".join(f"M{x} {BARS_HEIGHT}h{end - x}v-{h}h-{end - x}z" for (x, end), h in bars if h)


def _rectangle(x: int, y: int, width: int, height: int) -> str:
    return f"M{x} {y}h{width}v{height}h-{width}z"
