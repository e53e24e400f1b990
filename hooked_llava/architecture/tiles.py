"""How images of any resolution are cut into tiles, and which patches of the tiles are kept: transformers' rules.

Sizes are (height, width). The arithmetic follows transformers operation by operation, because its rounding decides
how many positions an image has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hooked_llava.errors import ConfigError, InputError

Size: TypeAlias = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a model takes images of any resolution: the whole image on one tile, and a canvas of tiles.

    Attributes:
        pinpoints (tuple[Size, ...]): The canvases that an image may be laid on, each (height, width) in pixels.
        max_tiles (int | None): OneVision: the canvas is pooled to about as many tiles' patches, and left out in prompts of
            several images. None for LLaVA-NeXT, which does neither.

    >>> Tiling(pinpoints=((336, 672), (672, 336)), max_tiles=9).pinpoints[0]
    (336, 672)
    """

    pinpoints: tuple[Size, ...]
    max_tiles: int | None = None


def best_resolution(image_size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The canvas for an image: the one that keeps most of its pixels, then the one that wastes least.

    Raises `ConfigError` if there are no pinpoints.

    >>> best_resolution((300, 500), [[336, 672], [672, 336], [672, 672]])
    (336, 672)
    """
    if not pinpoints:
        raise ConfigError("image_grid_pinpoints is empty; expected at least one (height, width).")
    height, width = image_size

    def suits(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    best = max(pinpoints, key=suits)  # the first, where several suit equally well
    return best[0], best[1]


def scaled_size(image_size: Size, canvas: Size) -> Size:
    """The size of the image on its canvas, its aspect ratio kept.

    >>> scaled_size((300, 500), (336, 672))
    (336, 560)
    """
    (height, width), (canvas_height, canvas_width) = image_size, canvas
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_height), canvas_width)


def unpadding(image_size: Size, grid: Size) -> Size:
    """How many rows and columns of patches are cut away at either side of a canvas, as padding.

    The scale is that of the grid in patches, rounded down to whole patches, so that a strip of the image may go with it.

    >>> unpadding((300, 500), (24, 48))
    (0, 4)
    """
    (height, width), (rows, columns) = image_size, grid
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return (rows - kept) // 2, 0
    kept = int(round(width * (rows / height), 7))
    return 0, (columns - kept) // 2


def pooled_grid(grid: Size, patches_per_tile: int, max_tiles: int) -> Size:
    """Rows and columns after OneVision's pooling: a grid of clearly more patches than `max_tiles` tiles have is shrunk.

    Raises `InputError` for a grid so thin that nothing is left of it.

    >>> pooled_grid((81, 81), 27, 9), pooled_grid((108, 162), 27, 9)
    ((81, 81), (66, 99))
    """
    rows, columns = grid
    ratio = math.sqrt(rows * columns / (max_tiles * patches_per_tile**2))
    if ratio <= 1.1:
        return grid
    pooled = int(rows // ratio), int(columns // ratio)
    if 0 in pooled:
        raise InputError(
            f"The image is so thin that nothing is left of its {rows} x {columns} (rows x columns) patches when they are "
            f"pooled to {pooled[0]} x {pooled[1]}; give one that is less thin."
        )
    return pooled
