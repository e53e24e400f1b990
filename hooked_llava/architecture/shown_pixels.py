"""Which pixels of the vision tiles show what given cells show: a part of the original image, found in every grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int

from hooked_llava.architecture.grid import GridAxis
from hooked_llava.architecture.layout import ALL, ImageLayout


def shown_pixels(
    layout: ImageLayout,
    features: Sequence[int] | Int[np.ndarray, " chosen"],
    *,
    tile_size: tuple[int, int],
    patch_size: int,
    grid: str = ALL,
) -> Bool[np.ndarray, "tile height width"]:
    """The pixels of an image's tiles that show what some of its features show.

    On a cell's own grid these are all pixels of its patches, padding included; on the other grids those whose center lies
    in the part of the original that the cell shows. `grid` keeps to the tiles of one grid; newlines and class tokens show
    nothing. Raises `SpanError` for a grid that the image does not have.

    >>> from hooked_llava.architecture.layouts import llava_next_layout
    >>> layout = llava_next_layout((4, 8), tile_size=4, patch_size=2, pinpoints=[[4, 8]])
    >>> shown = shown_pixels(layout, [0], tile_size=(4, 4), patch_size=2)
    >>> shown.sum((1, 2)).tolist(), shown[1, :2].all()
    ([4, 8, 0], np.True_)
    """
    height, width = tile_size
    shown = np.zeros((layout.n_tiles, height, width), dtype=np.bool_)
    chosen = {name: np.isin(layout.cell_features(name), features) for name in layout.names}
    for on in layout.grids if grid == ALL else (layout.grid(grid),):
        rows, columns = on.rows.n_tiles, on.columns.n_tiles
        canvas = np.zeros((rows * height, columns * width), dtype=np.bool_)
        for of in layout.grids:
            down, across = (chosen[of.name].any(axis) for axis in (1, 0))  # rows and columns with a chosen cell
            y = _pixels_of_cells(of.rows, on.rows, height, patch_size)[down].astype(np.float32)
            x = _pixels_of_cells(of.columns, on.columns, width, patch_size)[across].astype(np.float32)
            canvas |= y.T @ chosen[of.name][np.ix_(down, across)] @ x > 0
        tiles = canvas.reshape(rows, height, columns, width).swapaxes(1, 2)
        shown[on.first_tile : on.first_tile + on.n_tiles] |= tiles.reshape(-1, height, width)
    return shown


@lru_cache(maxsize=256)
def _pixels_of_cells(
    cells: GridAxis, on: GridAxis, tile_length: int, patch_size: int
) -> Bool[np.ndarray, "cell pixel"]:
    """For the cells along one axis the pixels along a canvas that show what they show."""
    pixel = np.arange(on.n_tiles * tile_length)
    if cells == on:
        tile, inside = np.divmod(pixel, tile_length)
        patch = inside // patch_size
        seen = patch < on.patches_per_tile
        index = tile * on.patches_per_tile + np.where(seen, patch, 0)
        return (cells.weights > 0)[:, index] & seen
    centers = np.array([on.pixels.to_original(u + 0.5) for u in pixel.tolist()])
    return (centers >= cells.starts[:, None]) & (centers < cells.stops[:, None])
